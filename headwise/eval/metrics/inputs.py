"""What every model of an evaluation reads: text, and the arguments of tasks that make their own questions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from headwise.eval.metrics import generation
from headwise.eval.settings import Recipe
from headwise.measure.positions import overlapping
from headwise.text.blocks import blocks_from

RULER_LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)


@dataclass(frozen=True)
class Material:
    """The text that every model reads: blocks for perplexity, windows for loss by position, beginnings to continue.

    A stretch is so many positions of the curve; 0: no curve.
    """

    blocks: Tensor | None = None
    windows: Tensor | None = None
    prompts: Tensor | None = None
    stretch: int = 0
    new_tokens: int = 0

    @property
    def empty(self) -> bool:
        return self.blocks is None and self.windows is None and self.prompts is None

    def content_hash(self) -> str:
        total = hashlib.sha256(f"{self.stretch} {self.new_tokens}".encode())
        for part in (self.blocks, self.windows, self.prompts):
            total.update(b"" if part is None else f"{tuple(part.shape)}".encode() + part.numpy().tobytes())
        return total.hexdigest()


def make_material(chosen: Recipe, tokenizer: Any, context: int | None, seed: int) -> Material:
    """Text for everything but the tasks."""
    blocks = windows = prompts = None
    stretch = 0
    if (text := chosen.perplexity) is not None:
        length = min(text.length, context or text.length)
        blocks = blocks_from(text.text, tokenizer, split=text.split, length=length, count=text.blocks, seed=seed)
        stretch = length // text.stretches if length % text.stretches == 0 else 0
    if (by := chosen.positions) is not None and context is not None:
        stretch = max(1, context // by.stretches)
        length = stretch * by.stretches
        count = -(-by.windows // by.stretches) + 1
        held = blocks_from(by.text, tokenizer, split=by.split, length=length, count=count, seed=seed)
        windows = overlapping(held, length, stretch)[: by.windows]
    if (writing := chosen.generation) is not None:
        prompts = generation.prompts_of(
            tokenizer, writing.prompts, min(writing.prompt_tokens, (context or 1 << 20) // 2), seed
        )
    return Material(blocks, windows, prompts, stretch, writing.new_tokens if writing else 0)


def task_arguments(chosen: Recipe, context: int | None, seed: int) -> dict[str, Any]:
    """Arguments of the tasks that make their own questions: passkey, cloze and RULER."""
    found: dict[str, Any] = {"seed": seed}
    if chosen.passkey is not None:
        found |= {"depths": chosen.passkey.depths, "samples": chosen.passkey.samples}
        found |= {"lengths": [int(share * (context or 0)) for share in chosen.passkey.lengths]}
        found |= {"max_seq_lengths": [length for length in RULER_LENGTHS if length <= (context or 0)]}
    return found
