"""Sample text from a model itself, as calibration and training text that needs no data.

Sequences are sampled at temperature 1 from a start token on, many at once, with a static KV cache. Where the
tokenizer has a chat template, a part of the sequences starts with the opening of a user's turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.compat import cache_argument
from headwise.cuda import record
from headwise.environment import available_memory
from headwise.errors import HeadwiseError
from headwise.progress import SILENT, Progress
from headwise.text.packing import end_of_text

# Tokens that separate documents in pretraining text, in the spellings of model families; the first one that a
# tokenizer knows starts a sample. An instruct model's end-of-sequence token ends a turn, not a document.
SEPARATORS = ("<|endoftext|>", "<|begin_of_text|>", "<bos>", "<s>", "<|end_of_text|>")
CHAT_SHARE = 0.25
# Share of the available memory that the KV cache of a batch may take, and the most sequences at once.
CACHE_SHARE = 0.3
MAX_SEQUENCES = {"cuda": 2048, "cpu": 64}
# Shorter samples are drawn step by step: the prompt and the recording take the first three steps.
FEWEST_RECORDED = 8
# Tokens of every sequence whose sampling is timed, after the prompt and the first of them.
TIMED = 4


def start_token(tokenizer: Any) -> int:
    """Return the token that a document of the pretraining text starts after.

    Args:
        tokenizer: a stock tokenizer.

    Raises:
        HeadwiseError: the tokenizer has no such token.
    """
    vocabulary = tokenizer.get_vocab()
    known = next((vocabulary[name] for name in SEPARATORS if name in vocabulary), None)
    if known is not None:
        return int(known)
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end_of_text(tokenizer)


def chat_start(tokenizer: Any) -> list[int]:
    """Return the tokens before a user's first words in a chat; none without a chat template.

    Args:
        tokenizer: a stock tokenizer.
    """
    if not getattr(tokenizer, "chat_template", None):
        return []
    words = "headwise"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": words}], tokenize=False)
    except Exception:  # a template may refuse any conversation, with any error
        return []
    opening, _, rest = text.partition(words)
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"]) if rest else []


def documents_of(rows: Tensor, tokenizer: Any) -> list[str]:
    """Return the text of sampled sequences, cut where the model began a new document.

    Args:
        rows: int64 (sequences, length), as `sample_tokens` returns them.
        tokenizer: a stock tokenizer.
    """
    start = start_token(tokenizer)
    documents = []
    for row in rows:
        cuts = (row == start).nonzero().flatten()
        for part in row.tensor_split(cuts):
            text = tokenizer.decode(part[part != start], skip_special_tokens=False)
            # A character may be cut at the end of a sequence.
            if text := text.rstrip("\ufffd").strip():
                documents.append(text)
    return documents


@torch.no_grad()
def sample_tokens(
    model: Any,
    tokenizer: Any,
    *,
    sequences: int,
    length: int,
    chat_share: float = CHAT_SHARE,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """Sample sequences from a causal language model.

    The start token itself is left out: a sequence begins with the first sampled token, as a block of packed text
    begins inside a document.

    Args:
        model: the stock model, on its device; it is put into evaluation mode.
        tokenizer: its tokenizer.
        sequences: number of sequences.
        length: tokens in each.
        chat_share: share of the sequences that starts with the opening of a chat, where there is a template.
        temperature: of the softmax.
        seed: of the samples; the same seed, device and batch size repeat them.
        batch_size: sequences at once; None: as many as the available memory allows.
        progress: receives a stage that counts tokens.

    Returns:
        int64 (sequences, length), on the CPU, in random order.

    Raises:
        HeadwiseError: the tokenizer has no token to start with, or one that the model does not know, or the model
            gives logits that are not finite.
    """
    start, chat = start_token(tokenizer), chat_start(tokenizer)
    if len(chat) >= length:
        chat = []
    num_chats = round(chat_share * sequences) if chat else 0
    prompts = [[start]] * (sequences - num_chats) + [chat] * num_chats
    device = next(model.parameters()).device
    batch_size = batch_size or _batch_size(model, length, device)
    generator = torch.Generator(device=device).manual_seed(seed)
    progress.stage("Sampling", total=sequences * length, unit="tokens")
    model.eval()
    rows: list[Tensor] = []
    for prompt in ([start], chat):
        left = prompts.count(prompt) if prompt else 0
        while left > 0:
            rows.append(
                _sample_batch(
                    model, prompt, min(batch_size, left), length, temperature, generator, tokenizer, progress
                )
            )
            left -= batch_size
    order = torch.randperm(sequences, generator=torch.Generator().manual_seed(seed))
    return torch.cat(rows)[order]


def seconds_per_token(
    model: Any, tokenizer: Any, *, sequences: int, length: int, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Time a few steps of sampling with caches of the full length.

    Args:
        model: the stock model, on its device.
        tokenizer: its tokenizer.
        sequences: number of sequences to sample.
        length: tokens in each.
        clock: returns the present time in seconds.

    Returns:
        Seconds for one token of one sequence.

    Raises:
        HeadwiseError: as in `sample_tokens`.
    """
    device = next(model.parameters()).device
    count = min(sequences, _batch_size(model, length, device))
    generator = torch.Generator(device=device).manual_seed(0)
    start_of_text = [start_token(tokenizer)]
    times = []
    for most in (1, 1, 1 + TIMED):  # the first run of a process also loads libraries, and does not count
        start = clock()
        _sample_batch(model, start_of_text, count, length, 1.0, generator, tokenizer, SILENT, most)
        times.append(clock() - start)
    # Where other work made the short run the longer one, the start counts as a part of the steps.
    steps = times[2] - times[1] if times[2] > times[1] else times[2]
    return steps / (TIMED * count)


@torch.no_grad()
def _sample_batch(
    model: Any,
    prompt: Sequence[int],
    count: int,
    length: int,
    temperature: float,
    generator: torch.Generator,
    tokenizer: Any,
    progress: Progress,
    most: int | None = None,
) -> Tensor:
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    device = next(model.parameters()).device
    kept = length if len(prompt) == 1 else length - len(prompt)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=len(prompt) + kept)
    vocab_size = model.config.get_text_config().vocab_size
    if max(prompt) >= vocab_size:
        raise HeadwiseError(
            f"The tokenizer begins a text with token {max(prompt)}; the vocabulary has {vocab_size}.",
            "Its files belong to another model: replace them.",
        )
    allowed = min(len(tokenizer), vocab_size)
    drawn = torch.zeros(count, kept, dtype=torch.long, device=device)
    finite = torch.ones((), dtype=torch.bool, device=device)

    def draw(tokens: Tensor, position: Tensor) -> Tensor:
        output = model(
            input_ids=tokens,
            **cache_argument(model, cache),
            cache_position=position,
            position_ids=position[None],
            logits_to_keep=1,
            use_cache=True,
        )
        logits = output.logits[:, -1, :allowed].float() / temperature
        finite.logical_and_(logits.isfinite().all())
        # The largest of logits with Gumbel noise is a sample of their softmax.
        noise = torch.empty_like(logits).exponential_(generator=generator).log_()
        best: Tensor = (logits - noise).argmax(-1, keepdim=True)
        return best

    token = draw(torch.tensor(prompt, device=device).expand(count, -1), torch.arange(len(prompt), device=device))
    drawn[:, :1] = token
    position = torch.tensor([len(prompt)], device=device)
    place = torch.tensor([1], device=device)

    def step() -> None:
        token.copy_(draw(token, position))
        drawn.index_copy_(1, place, token)
        position.add_(1)
        place.add_(1)

    # Other kinds of cache (windows, states) count their tokens on the host, which a CUDA graph cannot repeat.
    steps = kept if most is None else min(kept, most)
    graphed = steps > FEWEST_RECORDED and all(type(layer) is StaticLayer for layer in cache.layers)
    repeat, sampled = (record(step, device, [generator]), 3) if graphed else (step, 1)
    progress.advance(count * sampled)
    for _ in range(steps - sampled):
        repeat()
        progress.advance(count)
    if not bool(finite):
        raise HeadwiseError("The model gives logits that are not finite, so no text can be sampled from it.")
    if len(prompt) == 1:
        return drawn.cpu()
    return torch.cat([torch.tensor(prompt).expand(count, -1), drawn.cpu()], 1)


def _batch_size(model: Any, length: int, device: torch.device) -> int:
    """Return how many sequences' caches fit into a share of the available memory."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = next(model.parameters()).element_size()
    one = 2 * config.num_hidden_layers * heads * width * length * itemsize + 8 * config.vocab_size
    most = MAX_SEQUENCES.get(device.type, MAX_SEQUENCES["cpu"])
    free = available_memory(device)
    return most if free is None else max(1, min(most, int(CACHE_SHARE * free / one)))
