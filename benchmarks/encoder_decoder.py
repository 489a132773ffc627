"""Fewer KV heads in an encoder-decoder: self- and cross-attention by merge method, losses side by side.

    python benchmarks/encoder_decoder.py --out /tmp/encoder-decoder > encoder-decoder.jsonl
    python benchmarks/encoder_decoder.py --out /tmp/tiny --tiny      a model of a minute on a CPU

Trains a model of the stock T5Gemma or T5Gemma 2 class from nothing on text of the package and of the running
Python. The source is a text with most vowels missing, the target is the text. Then converts self- and
cross-attention of the decoder to a half, a quarter and one KV head, calibrated on pairs of the training text. Each
line of the output is a JSON object. Losses are in nats per target token on held-out text. Needs no network.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForSeq2SeqLM, PreTrainedTokenizerFast, T5Gemma2Config, T5GemmaConfig

from headwise.convert.pipeline import convert_model
from headwise.convert.plan import Plan
from headwise.text.builtin import library_documents
from headwise.text.mixture import mixture_documents
from headwise.text.pairs import Pairs, pad

# Characters of a target, tokens that are kept of either side, and the share of vowels that the source lacks.
CHARACTERS, LENGTH, MISSING = 256, 160, 0.8
PAD, BOS, EOS = 0, 1, 2
# The shape of the model, the tokens of the vocabulary, and the sequences of a step.
FULL = {"width": 512, "layers": 6, "heads": 8, "head_dim": 64, "inner": 1408, "vocabulary": 4096, "batch": 128}
TINY = {"width": 64, "layers": 2, "heads": 8, "head_dim": 8, "inner": 128, "vocabulary": 512, "batch": 8}
# A vision tower that no text runs.
VISION = {"model_type": "siglip_vision_model", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
VISION |= {"num_attention_heads": 2, "image_size": 8, "patch_size": 4, "vision_use_head": False}
METHODS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mean", {"method": "mean", "refit": "off"}),
    ("aligned", {"method": "aligned", "refit": "off"}),
    ("optimal", {"method": "optimal", "refit": "off"}),
    ("optimal, refit", {"method": "optimal", "refit": "layers"}),
)


def show(**fields: Any) -> None:
    """Print one JSON line."""
    print(json.dumps(fields), flush=True)


def corrupt(text: str, rng: random.Random) -> str:
    """Return a text without most of its vowels."""
    return "".join(c for c in text if c not in "aeiouAEIOU" or rng.random() > MISSING)


def windows(documents: list[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    """Yield pairs from random places, each document as often as its length."""
    lengths = [max(1, len(text) - CHARACTERS) for text in documents]
    while True:
        text = rng.choices(documents, lengths)[0]
        start = rng.randrange(max(1, len(text) - CHARACTERS))
        target = text[start : start + CHARACTERS]
        if source := corrupt(target, rng):
            yield source, target


def train_tokenizer(documents: list[str], size: int, folder: Path) -> Any:
    """Return a byte-level BPE tokenizer of texts and of texts without vowels."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    rng = random.Random(0)
    texts = [text[:200_000] for text in documents]
    tokenizer.train_from_iterator([*texts, *(corrupt(text, rng) for text in texts[::4])], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return fast


def encode(pairs: list[tuple[str, str]], tokenizer: Any) -> Pairs:
    """Return pairs as token ids; targets begin with BOS and end with EOS."""
    sources = tokenizer([source for source, _ in pairs], add_special_tokens=False)["input_ids"]
    targets = tokenizer([target for _, target in pairs], add_special_tokens=False)["input_ids"]
    whole = [[BOS, *target, EOS] for target in targets]
    return Pairs(*pad(sources, LENGTH, PAD), *pad(whole, LENGTH, PAD))


def token_losses(model: Any, pairs: Pairs, device: torch.device) -> tuple[Tensor, int]:
    """Return the summed loss of the targets in nats, and the number of predicted tokens."""
    given = pairs.model_inputs(device)
    logits = model(**given).logits[:, :-1].float()
    labels = given["decoder_input_ids"][:, 1:].masked_fill(given["decoder_attention_mask"][:, 1:] == 0, -100)
    loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
    return loss, int((labels >= 0).sum())


@torch.no_grad()
def heldout_loss(model: Any, pairs: Pairs, device: torch.device) -> float:
    """Return nats per target token."""
    total, count = 0.0, 0
    for start in range(0, len(pairs), 64):
        loss, tokens = token_losses(model, pairs[start : start + 64], device)
        total, count = total + float(loss), count + tokens
    return total / count


def train(shape: dict[str, int], documents: list[str], tokenizer: Any, options: Any, device: torch.device) -> Any:
    """Return a trained model; the learning rate falls to zero over the given seconds."""
    stack = {
        "vocab_size": shape["vocabulary"],
        "hidden_size": shape["width"],
        "intermediate_size": shape["inner"],
        "num_hidden_layers": shape["layers"],
        "num_attention_heads": shape["heads"],
        "num_key_value_heads": shape["heads"],
        "head_dim": shape["head_dim"],
        "query_pre_attn_scalar": shape["head_dim"],
        "layer_types": ["full_attention"] * shape["layers"],
        "max_position_embeddings": 512,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    more = {"dropout_rate": 0.1, "decoder_start_token_id": BOS}
    config: Any
    if options.type == "t5gemma2":
        encoder = {"text_config": dict(stack), "vision_config": VISION, "mm_tokens_per_image": 4}
        config = T5Gemma2Config(encoder=encoder, decoder=dict(stack), **more)
    else:
        config = T5GemmaConfig(encoder=dict(stack), decoder=dict(stack), vocab_size=shape["vocabulary"], **more)
    torch.manual_seed(options.seed)
    model = AutoModelForSeq2SeqLM.from_config(config, attn_implementation="eager").to(device).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1.0, betas=(0.9, 0.98), weight_decay=0.05, fused=device.type == "cuda"
    )
    stream = windows(documents, random.Random(options.seed))
    started, step, shown = time.monotonic(), 0, 0.0
    while (passed := time.monotonic() - started) < options.seconds:
        rate = min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * passed / options.seconds))
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate
        batch = encode([next(stream) for _ in range(shape["batch"])], tokenizer)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, tokens = token_losses(model, batch, device)
        (loss / tokens).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        if passed - shown > 20:
            shown = passed
            show(event="training", step=step, seconds=round(passed, 1), loss=round(float(loss) / tokens, 4))
    parameters = sum(p.numel() for p in model.parameters())
    show(event="trained", steps=step, sequences=step * shape["batch"], parameters=parameters, config=stack)
    return model.eval()


def main() -> None:
    """Train, convert, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the models; it is replaced")
    parser.add_argument("--type", choices=("t5gemma", "t5gemma2"), default="t5gemma", help="the stock class")
    parser.add_argument("--seconds", type=float, default=200.0, help="of training")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--calibration-tokens", type=int, default=196_608)
    parser.add_argument("--heldout", type=int, default=1024, help="pairs to measure on")
    parser.add_argument("--tiny", action="store_true", help="a small model and little text, to try the script")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    shape, device = TINY if options.tiny else FULL, torch.device(options.device)
    started = time.monotonic()
    shutil.rmtree(options.out, ignore_errors=True)
    parent = options.out / "parent"
    parent.mkdir(parents=True)
    show(event="begin", torch=torch.__version__, transformers=transformers.__version__, device=str(device))

    english = [text for text in mixture_documents("prose") if len(text) > CHARACTERS]
    # English is a twelfth of the code: four times in a list that is drawn from by length.
    documents = english * 4 + [text for text in library_documents("train") if len(text) > CHARACTERS]
    tokenizer = train_tokenizer(documents[:: 8 if options.tiny else 1], shape["vocabulary"], parent)
    rng = random.Random(1)
    stream = windows([text for text in mixture_documents("heldout") if len(text) > CHARACTERS], rng)
    held = encode([next(stream) for _ in range(options.heldout)], tokenizer)
    model = train(shape, documents, tokenizer, options, device)
    model.save_pretrained(parent)
    base = heldout_loss(model, held, device)
    del model
    stream = windows(documents, random.Random(2))
    pairs = options.out / "pairs.jsonl"
    rows = [next(stream) for _ in range(max(64, options.calibration_tokens // 128))]
    pairs.write_text("".join(json.dumps({"source": s, "target": t}) + "\n" for s, t in rows), encoding="utf-8")
    show(event="parent", kv_heads=shape["heads"], loss=base, heldout_tokens=int(held.target_mask[:, 1:].sum()))

    def measure(name: str, part: str, groups: int, **settings: Any) -> None:
        out = options.out / "converted"
        begun = time.monotonic()
        result = convert_model(
            parent, out, to="gqa", groups=groups, part=part, device=options.device, force=True, **settings
        )
        seconds = time.monotonic() - begun
        assert not isinstance(result, Plan)
        loaded = AutoModelForSeq2SeqLM.from_pretrained(result.out, dtype=torch.float32, attn_implementation="eager")
        loss = heldout_loss(loaded.to(device).eval(), held, device)
        show(
            event="converted",
            parts="decoder, cross" if part == "decoder" and options.type == "t5gemma" else part,
            kv_heads=groups,
            of=shape["heads"],
            method=name,
            calibration=Path(str(settings.get("calibrate", "none"))).name,
            loss=loss,
            damage=loss - base,
            seconds=round(seconds, 1),
        )

    given = {"calibrate": str(pairs), "calibration_tokens": options.calibration_tokens}
    halves = [shape["heads"] // 2, shape["heads"] // 4, 1]
    for groups in halves[: 1 if options.tiny else None]:
        for name, settings in METHODS:
            calibration = {} if name == "mean" else given
            measure(name, "decoder", groups, **settings, **calibration)
    own = {"calibrate": "sampled", "calibration_tokens": options.calibration_tokens // 4}
    others = (
        ("optimal", "decoder", halves[0], own),
        ("mean", "encoder", halves[0], {}),
        ("optimal", "encoder", halves[0], given),
        ("optimal, refit", "encoder", halves[0], given),
    )
    for name, part, groups, more in others[: 1 if options.tiny else None]:
        measure(name, part, groups, **dict(METHODS)[name], **more)
    show(event="end", seconds=round(time.monotonic() - started, 1))


if __name__ == "__main__":
    main()
