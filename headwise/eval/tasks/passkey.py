"""Generate the passkey task: a number hidden in filler text, which the model must retrieve at the end.

The text is that of Mohtashami & Jaggi 2023 (arXiv 2305.16300), built at run time for any tokenizer. A document is
solved if greedy decoding writes the whole number, which lm-eval's `loglikelihood` tests with one forward pass.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from headwise.errors import HeadwiseError

BEGIN = "There is a pass key hidden inside a lot of irrelevant text. Find it and memorize it.\n\n"
FILLER = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
END = "\n\nWhat is the pass key? The pass key is"

LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SAMPLES = 10
# Two joined texts can have more tokens than both of them apart.
SLACK_TOKENS = 8


def make_passkey_documents(
    tokenizer: Any,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Build prompts on a grid of length and depth.

    Args:
        tokenizer: measures the prompts.
        lengths: most tokens of prompt and answer together.
        depths: shares of the filler text before the key.
        samples: documents at each point of the grid, each with a key of its own.
        seed: random seed of the keys.

    Returns:
        `{"prompt", "key", "length", "depth"}` of each document; the prompt ends before the space that precedes the
        key.

    Raises:
        HeadwiseError: a length is too short for the question alone.
    """
    rng = random.Random(seed)
    question = BEGIN + NEEDLE.format(key=88888) + END + " 88888"
    fixed = count_tokens(tokenizer, question) + SLACK_TOKENS
    documents = []
    for length in lengths:
        if fixed >= length:
            raise HeadwiseError(
                f"A passkey prompt of {length} tokens is too short: the question alone has {fixed} tokens.",
                "Use a longer length.",
            )
        filler = filler_lines(tokenizer, length - fixed)
        for depth in depths:
            for _ in range(samples):
                key = str(rng.randint(10000, 99999))
                place = round(depth * len(filler))
                text = [*filler[:place], NEEDLE.format(key=key), *filler[place:]]
                prompt = BEGIN + " ".join(text) + END
                documents.append({"prompt": prompt, "key": key, "length": length, "depth": depth})
    return documents


def count_tokens(tokenizer: Any, text: str) -> int:
    """Return the tokens of a text, without special ones.

    Args:
        tokenizer: the tokenizer.
        text: the text.
    """
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def filler_lines(tokenizer: Any, num_tokens: int) -> list[str]:
    """Return lines of filler text.

    Args:
        tokenizer: measures them.
        num_tokens: most tokens of all lines together.
    """
    lines = FILLER * 8
    num_lines = int(num_tokens / (count_tokens(tokenizer, " ".join(lines)) + 1) * len(lines))
    return [FILLER[i % len(FILLER)] for i in range(num_lines)]


def passkey_dataset(
    tokenizer: Any = None,
    pretrained: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """Build the data of lm-eval's task headwise_passkey.

    Args:
        tokenizer: a tokenizer or its folder; None: that of `pretrained`.
        pretrained: the model that lm-eval runs.
        lengths: most tokens of prompt and answer together.
        depths: shares of the filler text before the key.
        samples: documents at each point of the grid.
        seed: random seed of the keys.

    Returns:
        The split "test".

    Raises:
        HeadwiseError: there is no tokenizer, or a length is too short.
    """
    from datasets import Dataset

    tokenizer = find_tokenizer(tokenizer, pretrained)
    return {"test": Dataset.from_list(make_passkey_documents(tokenizer, lengths, depths, samples, seed))}


def find_tokenizer(tokenizer: Any, pretrained: str | None) -> Any:
    """Return the tokenizer that measures the prompts of a generated task.

    Args:
        tokenizer: a tokenizer or its folder; None: that of `pretrained`.
        pretrained: the model that lm-eval runs.

    Raises:
        HeadwiseError: there is none.
    """
    from transformers import AutoTokenizer

    if tokenizer is not None and not isinstance(tokenizer, str):
        return tokenizer
    if (name := tokenizer or pretrained) is None:
        raise HeadwiseError(
            "The task has no tokenizer, which it needs to measure its prompts in tokens.",
            'Add it to the metadata: {"tokenizer": "FOLDER"}',
        )
    return AutoTokenizer.from_pretrained(name, trust_remote_code=False)


@torch.inference_mode()
def solve_passkeys(model: Any, tokenizer: Any, documents: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Solve documents without lm-eval.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        documents: result of `make_passkey_documents`.

    Returns:
        `{"doc", "acc"}` of each document, as lm-eval logs it.
    """
    device = next(model.parameters()).device
    samples = []
    for document in documents:
        prompt_length = len(tokenizer(document["prompt"])["input_ids"])
        text = f"{document['prompt']} {document['key']}"
        tokens = torch.tensor(tokenizer(text)["input_ids"], device=device)
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        solved = torch.equal(logits[prompt_length - 1 :].argmax(-1), tokens[prompt_length:])
        samples.append({"doc": document, "acc": float(solved)})
    return samples


def passkey_shares(samples: Iterable[dict[str, Any]]) -> dict[tuple[int, float], float]:
    """Compute the share of solved documents at each point of the grid.

    Args:
        samples: samples that lm-eval logged, or the result of `solve_passkeys`.

    Returns:
        (length, depth) -> share.
    """
    cells: dict[tuple[int, float], list[float]] = {}
    for sample in samples:
        place = (sample["doc"]["length"], sample["doc"]["depth"])
        cells.setdefault(place, []).append(float(sample["acc"]))
    return {place: sum(solved) / len(solved) for place, solved in sorted(cells.items())}
