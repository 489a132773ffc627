"""What an evaluation means for whoever has to decide, in one sentence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwise.eval.report.summary import significant
from headwise.eval.result import Comparison, Evaluation

# A loss, or what the samples leave open of one, that is called small: one point or one percent.
SMALL = 0.01
BROKEN = "not usable as it is."


@dataclass(frozen=True)
class Verdict:
    """`tone` is "good", "open" (the data do not decide), "bad", or "plain" (nothing was compared)."""

    tone: str
    text: str


@dataclass(frozen=True)
class Damage:
    """How much worse the child is, and the 95% interval of that: in points, or relative for perplexities."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, one: Comparison) -> Damage | None:
        """None where there is nothing to compare with, or no direction."""
        pair = one.paired
        if pair is None or one.higher_is_better is None:
            return None
        sign = -1 if one.higher_is_better else 1
        ends = sorted((sign * pair.low, sign * pair.high))
        values = [sign * pair.difference, *ends]
        if is_perplexity(one):
            values = [math.expm1(value) for value in values]
        return cls(*values)


def is_perplexity(one: Comparison) -> bool:
    """Whether a figure is a perplexity, compared by its logarithm."""
    return one.metric.endswith("perplexity")


def judge(found: Evaluation) -> Verdict:
    """The verdict."""
    if found.parent is None:
        alone = "No parent was measured, so these figures stand alone: name it with --baseline."
        broken = found.generation.complaints if found.generation else ()
        if broken:
            return Verdict("bad", f"{_capital(BROKEN)} {' '.join(broken)} {alone}")
        return Verdict("plain", alone)
    tone, text = _judge(found)
    before, after = found.parent.cache_bytes_per_token, found.child.cache_bytes_per_token
    if before and after and before != after:
        return Verdict(tone, f"With {100 * after / before:.3g}% of the parent's KV cache: {text}")
    return Verdict(tone, _capital(text))


def _judge(found: Evaluation) -> tuple[str, str]:
    pairs = [(one, damage) for one in found.headlines if (damage := Damage.of(one)) is not None]
    worse = [(one, damage) for one, damage in pairs if significant(one) and damage.value > 0]
    if found.generation and found.generation.complaints:
        most = [f"Its {_most(worse)}."] if worse else []
        return "bad", " ".join((BROKEN, *found.generation.complaints, *most, _advice(found)))
    names = {gate.name for gate in found.gates if not gate.passed}
    failed = [(one, damage) for one, damage in pairs if gate_name(one) in names]
    if failed and found.fail_above is not None:
        gate = f"the gate of {100 * found.fail_above:g}% {_share(failed, pairs)}".rstrip()
        return "bad", f"it fails {gate}; {_most(failed)}. {_advice(found)}"
    if worse:
        share = f" {_share(worse, pairs)}".rstrip()
        if max(damage.high for _, damage in worse) <= SMALL:
            return "open", f"a small loss{share} that is no accident; {_most(worse)}."
        return "bad", f"a real loss{share}; {_most(worse)}. {_advice(found)}"
    if not pairs:
        return _agreement(found)
    # Right and wrong answers alike leave room for others; a perplexity that is the same to the last bit does not.
    if all(damage.value == 0 for _, damage in pairs) and any(damage == Damage(0, 0, 0) for _, damage in pairs):
        return "good", "in every figure exactly what its parent is."
    one, damage = max(pairs, key=lambda pair: pair[1].high)
    bound = f"{amount(one, damage.high)} in {name(one)}"
    if damage.high <= SMALL:
        return "good", f"no loss beyond noise, and none above {bound} is likely."
    return "open", f"no loss beyond noise, but one of up to {bound} is not ruled out: measure more samples."


def _most(worse: Sequence[tuple[Comparison, Damage]]) -> str:
    one, damage = max(worse, key=lambda pair: pair[1].value)
    return f"{name(one)} is {amount(one, damage.value)} worse (95% interval {span(one, damage)})"


def _share(some: Sequence[Any], pairs: Sequence[Any]) -> str:
    return f"in {len(some)} of {len(pairs)} figures" if len(pairs) > 1 else ""


def _advice(found: Evaluation) -> str:
    before, after = found.parent and found.parent.cache_bytes_per_token, found.child.cache_bytes_per_token
    more = ", or keep more cache" if before and after and after < before else ""
    return f"Train it with `headwise uptrain`{more}."


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _agreement(found: Evaluation) -> tuple[str, str]:
    if found.diagnostics is None:
        return "plain", "nothing was compared."
    return "plain", f"it agrees with its parent on {found.diagnostics.top1:.1%} of the next tokens."


def gate_name(one: Comparison) -> str:
    """What the gate on a figure is called."""
    return f"{one.task} {one.metric}"


def name(one: Comparison) -> str:
    """A figure in words: "arc_easy" or "held-out perplexity"."""
    task = "held-out" if one.task == "heldout" else one.task
    return f"{task} perplexity" if is_perplexity(one) else task


def amount(one: Comparison, value: float) -> str:
    """ "2.9 points" or "3.1%"."""
    digits = f"{abs(100 * value):.2g}" if abs(value) < 0.01 else f"{abs(100 * value):.1f}"
    return f"{digits}%" if is_perplexity(one) else f"{digits} points"


def span(one: Comparison, damage: Damage) -> str:
    """The interval of a damage: "1.8 to 4.0"."""
    return f"{100 * damage.low:.1f} to {100 * damage.high:.1f}"
