"""Reduce an evaluation to a verdict of one or two sentences for the person who decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from headwise.eval.result import FINITE, Comparison, Evaluation, growth
from headwise.format import factor

# A damage, or the upper end of its interval, is small up to one point or one percent.
SMALL = 0.01
BROKEN = "the output is broken."


@dataclass(frozen=True)
class Verdict:
    """The verdict on a child.

    Attributes:
        tone: "good", "open" (the samples do not decide), "bad", or "plain" (nothing was compared).
        text: one or two sentences.
    """

    tone: str
    text: str


@dataclass(frozen=True)
class Damage:
    """Loss of quality of one figure with its 95% interval: points, or a relative increase for perplexities.

    Attributes:
        value: the loss; negative for a gain.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, comparison: Comparison) -> Damage | None:
        """Compute the damage of a figure.

        Args:
            comparison: the figure of both models.

        Returns:
            None without a parent or a direction.
        """
        paired = comparison.paired
        if paired is None or comparison.higher_is_better is None or comparison.damage is None:
            return None
        sign = -1 if comparison.higher_is_better else 1
        values = [sign * paired.difference, *sorted((sign * paired.low, sign * paired.high))]
        if comparison.is_perplexity:
            values = [growth(value) for value in values]
        return cls(*values)


_Damaged = tuple[Comparison, Damage]


def verdict_of(evaluation: Evaluation) -> Verdict:
    """Reduce an evaluation to its verdict.

    Args:
        evaluation: the whole result.

    Returns:
        Tone and text.
    """
    infinite = [gate.detail for gate in evaluation.gates if gate.name == FINITE and not gate.passed]
    if infinite:
        return Verdict("bad", f"{_capital(BROKEN)} {' '.join(infinite)}")
    if evaluation.parent is None:
        no_parent = "No parent was measured, so the figures are compared with nothing: give `baseline`."
        complaints = evaluation.generation.complaints if evaluation.generation else ()
        if complaints:
            return Verdict("bad", f"{_capital(BROKEN)} {' '.join(complaints)} {no_parent}")
        return Verdict("plain", no_parent)
    tone, text = _compared(evaluation)
    before, after = evaluation.parent.cache_bytes_per_token, evaluation.child.cache_bytes_per_token
    if before and after and before != after:
        return Verdict(tone, f"With {100 * after / before:.3g}% of the parent's KV cache: {text}")
    return Verdict(tone, _capital(text))


def _compared(evaluation: Evaluation) -> tuple[str, str]:
    # Every metric counts, in its own direction: a perplexity can collapse while an accuracy on ten items does not.
    pairs = [(c, damage) for c in evaluation.comparisons if (damage := Damage.of(c)) is not None]
    worse = [(c, damage) for c, damage in pairs if c.is_significant and damage.value > 0]
    if evaluation.generation and evaluation.generation.complaints:
        largest = [f"{_capital(_largest(worse))}."] if worse else []
        return "bad", " ".join((BROKEN, *evaluation.generation.complaints, *largest, _advice(evaluation)))
    names = {gate.name for gate in evaluation.gates if not gate.passed}
    failed = [(c, damage) for c, damage in pairs if gate_name(c) in names]
    if failed and evaluation.fail_above is not None:
        gate = f"the gate of {100 * evaluation.fail_above:g}% {_share(failed, pairs)}".rstrip()
        return "bad", f"the child fails {gate}; {_largest(failed)}. {_advice(evaluation)}"
    if worse:
        share = f" {_share(worse, pairs)}".rstrip()
        if max(damage.high for _, damage in worse) <= SMALL:
            return "open", f"a small but significant loss{share}; {_largest(worse)}."
        return "bad", f"a significant loss{share}; {_largest(worse)}. {_advice(evaluation)}"
    if not pairs:
        return _agreement(evaluation)
    # Equal accuracies do not prove equality on other questions; a perplexity that is equal to the last bit does.
    if all(damage.value == 0 for _, damage in pairs) and any(damage == Damage(0, 0, 0) for _, damage in pairs):
        return "good", "every figure equals the parent's."
    unfit = "".join(f" {_capital(figure_name(c))} cannot show a loss: {c.unfit}." for c, _ in pairs if c.unfit)
    # The parts of a group have wide intervals; the group has them all.
    fit = [(c, damage) for c, damage in pairs if not c.unfit and c.group is None]
    if not fit:
        return "open", f"a loss of quality could not be measured.{unfit} Measure text and tasks that fit the model."
    comparison, damage = max(fit, key=lambda pair: pair[1].high)
    bound = f"{format_amount(comparison, damage.high)} in {figure_name(comparison)}"
    if damage.high <= SMALL:
        return "good", f"no significant loss, and a loss above {bound} is unlikely.{unfit}"
    return "open", (
        f"no significant loss, but the samples do not rule out a loss of up to {bound}. {_power(comparison)}"
        f" Measure more samples.{unfit}"
    )


def _power(comparison: Comparison) -> str:
    """Return the smallest loss that the samples of a figure could show, in a sentence."""
    sample = {"heldout": "block", "targets": "pair", "images": "pair"}.get(comparison.task, "item")
    samples = f"{comparison.samples:,} {sample}"
    samples += "s" * (comparison.samples != 1)
    if comparison.detectable is None:
        return f"{samples} could not show a loss of any size."
    return f"{samples} could not show a loss below {format_amount(comparison, comparison.detectable)}."


def _largest(worse: Sequence[_Damaged]) -> str:
    comparison, damage = max(worse, key=lambda pair: pair[1].value)
    if comparison.is_perplexity and damage.value >= 1:
        low, high = (factor(1 + value) for value in (damage.low, damage.high))
        times = f"{factor(1 + damage.value)} times the parent's"
        return f"{figure_name(comparison)} is {times} (95% interval {low} to {high})"
    return (
        f"{figure_name(comparison)} is {format_amount(comparison, damage.value)} worse "
        f"(95% interval {format_interval(damage)})"
    )


def _share(some: Sequence[Any], pairs: Sequence[Any]) -> str:
    return f"in {len(some)} of {len(pairs)} figures" if len(pairs) > 1 else ""


def _advice(evaluation: Evaluation) -> str:
    before = evaluation.parent and evaluation.parent.cache_bytes_per_token
    after = evaluation.child.cache_bytes_per_token
    more = ", or keep more cache" if before and after and after < before else ""
    return f"Train it with `headwise uptrain`{more}."


def _capital(text: str) -> str:
    # A name such as headwise_piqa stays as it is.
    return text if "_" in text.split()[0] else text[0].upper() + text[1:]


def _agreement(evaluation: Evaluation) -> tuple[str, str]:
    if evaluation.diagnostics is None:
        return "plain", "nothing was compared."
    return (
        "plain",
        f"the child predicts the parent's next token in {evaluation.diagnostics.top1:.1%} of predictions.",
    )


def gate_name(comparison: Comparison) -> str:
    """Return the name of the gate on a figure, such as "arc_easy acc_norm".

    Args:
        comparison: the figure.
    """
    return f"{comparison.task} {comparison.metric}"


def figure_name(comparison: Comparison) -> str:
    """Return the name of a figure for readers: "arc_easy", "held-out perplexity", "arc_easy acc" beside a headline.

    Args:
        comparison: the figure.
    """
    task = "held-out" if comparison.task == "heldout" else comparison.task
    if comparison.is_perplexity:
        return f"{task} {comparison.metric.replace('_', ' ')}"
    return task if comparison.headline or comparison.group else f"{task} {comparison.metric}"


def format_amount(comparison: Comparison, value: float) -> str:
    """Return a damage with its unit: "2.9 points" or "3.1%"; from a doubling on "a factor of 2.7".

    Args:
        comparison: the figure, which decides the unit.
        value: the damage.
    """
    if comparison.is_perplexity and value >= 1:
        return f"a factor of {factor(1 + value)}"
    digits = f"{abs(100 * value):.2g}" if abs(value) < 0.01 else f"{abs(100 * value):.1f}"
    return f"{digits}%" if comparison.is_perplexity else f"{digits} points"


def format_interval(damage: Damage) -> str:
    """Return the interval of a damage, such as "1.8 to 4.0".

    Args:
        damage: the damage.
    """
    return f"{100 * damage.low:.1f} to {100 * damage.high:.1f}"
