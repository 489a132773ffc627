"""What a model writes: greedy continuations, and whether they repeat, break off, or part from the parent's.

A divergence of next-token distributions averages over good contexts; a model can be close there and still fall
into a loop once it reads its own words. So the words themselves are looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.eval.result import Generation, Sample, Writing
from headwise.eval.stats import paired_mean

BATCH = 8
NGRAM = 4
SHOWN = 3
# How many tokens of a continuation should be the parent's: after the first that differs all may.
AGREEMENT_TOKENS = 8
# Beyond these a model is called broken, where the interval says so at 95%: more of the text repeats than the
# parent's, more continuations break off, and hardly any begins as the parent's does.
MORE_REPETITION, MORE_EARLY_ENDS, LEAST_AGREEMENT = 0.2, 0.1, 0.3
# Without a parent to compare with, only the plainly broken is called so.
MOST_REPETITION, MOST_EARLY_ENDS = 0.9, 0.75
LOOPS = "It repeats itself: {} of its four-token phrases came before in the same text"
BREAKS_OFF = "It breaks off: {} of its texts end before half their length"


def prompts_of(tokenizer: Any, count: int, length: int, seed: int) -> Tensor:
    """Beginnings to continue, from held-out modules: (count, length)."""
    from headwise.text.blocks import blocks_from

    # Neighbouring blocks are of one piece of text: every fourth, for variety.
    return blocks_from("builtin", tokenizer, split="heldout", length=length, count=4 * count, seed=seed)[::4]


def make_greedy(model: Any, new_tokens: int) -> list[int]:
    """Have `generate` take the likeliest token and nothing else; returns the tokens that end a text."""
    from transformers import GenerationConfig

    ends = model.generation_config.eos_token_id
    ends = model.config.get_text_config().eos_token_id if ends is None else ends
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, eos_token_id=ends or None, pad_token_id=ends[0] if ends else 0
    )
    return ends


@torch.inference_mode()
def continuations(model: Any, prompts: Tensor, new_tokens: int) -> list[list[int]]:
    """Greedy continuations, each up to and with the token that ends its text."""
    ends = make_greedy(model, new_tokens)
    found = []
    for batch in prompts.to(model.device).split(BATCH):
        written = model.generate(batch, attention_mask=torch.ones_like(batch))[:, batch.shape[1] :]
        found += [_cut(row, ends) for row in written.tolist()]
    return found


def judge(
    prompts: Tensor,
    child: Sequence[list[int]],
    parent: Sequence[list[int]] | None,
    new_tokens: int,
    tokenizer: Any,
) -> Generation:
    """Compare what the child wrote with what the parent wrote after the same prompts."""
    agreement = identical = None
    if parent is not None:
        same = [_common(a, b) for a, b in zip(child, parent, strict=True)]
        shares = torch.tensor([min(1.0, n / _length(b)) for n, b in zip(same, parent, strict=True)])
        agreement, identical = (
            float(shares.double().mean()),
            _mean(a == b for a, b in zip(child, parent, strict=True)),
        )
        complaints = tuple(_compared(child, parent, shares, new_tokens))
    else:
        complaints = tuple(_by_itself(child, new_tokens))
    return Generation(
        prompts=len(child),
        new_tokens=new_tokens,
        child=_writing(child, new_tokens),
        parent=None if parent is None else _writing(parent, new_tokens),
        agreement=agreement,
        agreement_tokens=AGREEMENT_TOKENS,
        identical=identical,
        complaints=complaints,
        samples=tuple(
            Sample(
                tokenizer.decode(prompts[i]),
                tokenizer.decode(child[i]),
                None if parent is None else tokenizer.decode(parent[i]),
            )
            for i in range(min(SHOWN, len(child)))
        ),
    )


def repetition(tokens: Sequence[int]) -> float:
    """Share of 4-grams that occurred before in the same text (Welleck et al. 2019, seq-rep-4)."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _compared(
    child: Sequence[list[int]], parent: Sequence[list[int]], shares: Tensor, new_tokens: int
) -> Iterator[str]:
    rows = (
        (LOOPS, repetition, MORE_REPETITION),
        (BREAKS_OFF, lambda row: _is_early(row, new_tokens), MORE_EARLY_ENDS),
    )
    for fault, measure, bound in rows:
        own, other = (torch.tensor([float(measure(row)) for row in rows]) for rows in (child, parent))
        if paired_mean(own, other).above(bound) < 0.05:
            yield f"{fault.format(f'{own.mean():.0%}')}, {other.mean():.0%} of its parent's."
    if (-paired_mean(shares, torch.zeros_like(shares))).above(-LEAST_AGREEMENT) < 0.05:
        same = AGREEMENT_TOKENS * float(shares.mean())
        yield f"It leaves its parent's words at once: they part after {same:.1f} of {AGREEMENT_TOKENS} tokens."


def _by_itself(rows: Sequence[list[int]], new_tokens: int) -> Iterator[str]:
    own = _writing(rows, new_tokens)
    if own.repetition > MOST_REPETITION:
        yield f"{LOOPS.format(f'{own.repetition:.0%}')}."
    if own.early_end > MOST_EARLY_ENDS:
        yield f"{BREAKS_OFF.format(f'{own.early_end:.0%}')}."


def _writing(rows: Sequence[list[int]], new_tokens: int) -> Writing:
    return Writing(_mean(map(repetition, rows)), _mean(_is_early(row, new_tokens) for row in rows))


def _is_early(row: Sequence[int], new_tokens: int) -> bool:
    return len(row) < new_tokens / 2


def _length(row: Sequence[int]) -> int:
    return max(1, min(AGREEMENT_TOKENS, len(row)))


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _cut(row: list[int], ends: Sequence[int]) -> list[int]:
    place = next((i for i, token in enumerate(row) if token in ends), len(row))
    return row[: place + 1]


def _mean(values: Any) -> float:
    listed = [float(value) for value in values]
    return sum(listed) / len(listed)
