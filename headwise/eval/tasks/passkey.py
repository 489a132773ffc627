"""Passkey retrieval: a number is hidden in filler text, and the model must say it at the end.

The text of Mohtashami & Jaggi 2023 (arXiv 2305.16300), built at run time for any tokenizer. A document counts as
solved when greedy decoding writes the whole number, which lm-eval's `loglikelihood` tests with one forward pass.
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


def documents(
    tokenizer: Any,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Prompts on a grid of length and depth.

    Args:
        tokenizer: measures the prompts.
        lengths: tokens of prompt and answer together, at most.
        depths: share of the filler that stands before the key.
        samples: documents for each point of the grid, each with a key of its own.
        seed: of the keys.

    Returns:
        `{"prompt", "key", "length", "depth"}` each; the prompt ends before the space that precedes the key.

    Raises:
        HeadwiseError: a length is too short for the question alone.
    """

    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    rng = random.Random(seed)
    found = []
    for length in lengths:
        # Five digits and slack for what two pieces of text share at their seams.
        fixed = tokens(BEGIN + NEEDLE.format(key=88888) + END + " 88888") + 8
        if fixed >= length:
            raise HeadwiseError(f"A passkey prompt needs {fixed} tokens, and a length of {length} was asked for.")
        lines = int((length - fixed) / (tokens(" ".join(FILLER * 8)) + 1) * 8 * len(FILLER))
        filler = [FILLER[i % len(FILLER)] for i in range(lines)]
        for depth in depths:
            for _ in range(samples):
                key = str(rng.randint(10000, 99999))
                place = round(depth * lines)
                text = [*filler[:place], NEEDLE.format(key=key), *filler[place:]]
                found.append({"prompt": BEGIN + " ".join(text) + END, "key": key, "length": length, "depth": depth})
    return found


def dataset(
    tokenizer: Any = None,
    pretrained: str | None = None,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    samples: int = SAMPLES,
    seed: int = 0,
    **_: Any,
) -> dict[str, Any]:
    """The lm-eval task's data; arguments come from its metadata, the model's own among them."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    if tokenizer is None or isinstance(tokenizer, str):
        if (name := tokenizer or pretrained) is None:
            raise HeadwiseError(
                "The passkey task measures its prompts in tokens and was given no tokenizer.",
                'Pass one: --metadata \'{"tokenizer": "FOLDER"}\'',
            )
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return {"test": Dataset.from_list(documents(tokenizer, lengths, depths, samples, seed))}


@torch.inference_mode()
def solve(model: Any, tokenizer: Any, found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What lm-eval logs for these documents, `{"doc", "acc"}` each, where lm-eval is not installed."""
    device = next(model.parameters()).device
    samples = []
    for doc in found:
        given = len(tokenizer(doc["prompt"])["input_ids"])
        tokens = torch.tensor(tokenizer(f"{doc['prompt']} {doc['key']}")["input_ids"], device=device)
        logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
        samples.append({"doc": doc, "acc": float(torch.equal(logits[given - 1 :].argmax(-1), tokens[given:]))})
    return samples


def grid(samples: Iterable[dict[str, Any]]) -> dict[tuple[int, float], float]:
    """Share solved for each (length, depth), from the samples that lm-eval logs."""
    cells: dict[tuple[int, float], list[float]] = {}
    for sample in samples:
        place = (sample["doc"]["length"], sample["doc"]["depth"])
        cells.setdefault(place, []).append(float(sample["acc"]))
    return {place: sum(solved) / len(solved) for place, solved in sorted(cells.items())}
