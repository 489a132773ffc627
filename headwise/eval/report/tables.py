"""Build the rows of a report's tables as text, for the page, Markdown, the model card and the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headwise.eval.result import Comparison, Evaluation, Score
from headwise.eval.verdict import Damage, figure_name
from headwise.format import factor, size

LEGEND = (
    "Change: child minus parent on the same samples, in points (perplexity: factor or percent). Flips: right only "
    "in the child (+), only in the parent (−). Interval: of one figure alone. p (Holm): corrected for their number."
)
HEADS_SHOWN = 12


@dataclass(frozen=True)
class FigureRow:
    """One figure as text.

    Attributes:
        figure: name of the figure.
        detail: metric, filter, number of examples and samples.
        parent: figure of the parent; empty without one.
        child: figure of the child.
        difference: child minus parent; empty without a parent.
        interval: 95% interval of the difference.
        flips: gained and lost samples.
        p: two-sided p-value of the figure alone, below 0.05 where the interval excludes 0.
        p_holm: the same after Holm's correction, which decides what is significant; empty for other figures.
        tone: "bad" or "good" for a significant difference, else "".
        part: whether the figure is a part of a group or another metric of the task above.
        main: whether a short table has the row: a headline, a perplexity or a significant difference.
    """

    figure: str
    detail: str
    parent: str
    child: str
    difference: str
    interval: str
    flips: str
    p: str
    p_holm: str
    tone: str
    part: bool
    main: bool


def figure_rows(evaluation: Evaluation) -> Iterator[FigureRow]:
    """Yield the figures of the tasks, the main figure of each task first.

    Args:
        evaluation: the whole result.
    """
    for comparison in evaluation.comparisons:
        yield _row(comparison)


def _row(comparison: Comparison) -> FigureRow:
    paired, damage = comparison.paired, Damage.of(comparison)
    shots = f", {comparison.num_fewshot}-shot" if comparison.num_fewshot else ""
    metric = f"{comparison.metric} ({comparison.filter})" if comparison.filter else comparison.metric
    is_other_metric = not comparison.headline and comparison.group is None
    tone = ""
    if damage is not None and comparison.is_significant:
        tone = "bad" if damage.value > 0 else "good"
    return FigureRow(
        figure=metric if is_other_metric else figure_name(comparison),
        detail=f"{'' if is_other_metric else f'{metric}{shots}, '}{_format_samples(comparison)}",
        parent=_format_score(comparison, comparison.parent),
        child=_format_score(comparison, comparison.child),
        difference=_difference(comparison),
        interval=_interval(comparison),
        flips="" if paired is None or paired.gained is None else f"+{paired.gained} −{paired.lost}",
        p=_format_p(paired.p_value if paired else None),
        p_holm=_format_p(paired.p_holm if paired else None),
        tone=tone,
        part=not comparison.headline,
        main=comparison.headline or comparison.is_perplexity or bool(tone),
    )


def _format_p(value: float | None) -> str:
    return "" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _format_samples(comparison: Comparison) -> str:
    passages = f" in {comparison.clusters:,} passages" if comparison.clusters else ""
    return f"{comparison.samples:,} sample{'s' * (comparison.samples != 1)}{passages}"


def _format_score(comparison: Comparison, score: Score | None) -> str:
    """Return "43.1%" or "5.920"."""
    if score is None:
        return ""
    is_share = not comparison.is_perplexity and 0 <= score.value <= 1
    digits = 3 if abs(score.value) < 10 else 2 if abs(score.value) < 100 else 1
    return f"{100 * score.value:.1f}%" if is_share else f"{score.value:,.{digits}f}"


def _difference(comparison: Comparison) -> str:
    paired = comparison.paired
    if paired is None:
        return ""
    if comparison.is_perplexity:
        value = (Damage.of(comparison) or Damage(0, 0, 0)).value
        return f"×{factor(1 + value)}" if value >= 1 else format_signed(100 * value, "%")
    if _is_share(comparison):
        return format_signed(100 * paired.difference)
    return format_signed(paired.difference, digits=4)


def _interval(comparison: Comparison) -> str:
    paired = comparison.paired
    if paired is None:
        return ""
    if comparison.is_perplexity and (damage := Damage.of(comparison)) is not None:
        if damage.value >= 1:
            return f"×{factor(1 + damage.low)} to ×{factor(1 + damage.high)}"
        return f"{format_signed(100 * damage.low)} to {format_signed(100 * damage.high)}"
    scale, digits = (100, 1) if _is_share(comparison) else (1, 4)
    low, high = (format_signed(scale * end, digits=digits) for end in (paired.low, paired.high))
    return f"{low} to {high}"


def _is_share(comparison: Comparison) -> bool:
    scores = [score for score in (comparison.child, comparison.parent) if score is not None]
    return not comparison.is_perplexity and all(0 <= score.value <= 1 for score in scores)


def format_signed(number: float, unit: str = "", digits: int = 1) -> str:
    """Return a number with its sign: "+3.1%", "−0.2" with a minus sign, and "0" for exactly 0.

    Args:
        number: the number.
        unit: text behind it.
        digits: digits behind the decimal point.
    """
    if number == 0:
        return f"0{unit}"
    return f"{number:+.{digits}f}{unit}".replace("-", "−")


def agreement_rows(evaluation: Evaluation) -> Iterator[tuple[str, str, str]]:
    """Yield the KV cache and the agreement of child and parent on the same text: label, number, explanation.

    Args:
        evaluation: the whole result.
    """
    before = evaluation.parent and evaluation.parent.cache_bytes_per_token
    after = evaluation.child.cache_bytes_per_token
    if after:
        yield (
            "KV cache per token",
            size(after),
            f"{size(before)} before, {after / before:.1%} of it" if before else "",
        )
    if (divergence := evaluation.diagnostics) is not None:
        yield "same next token", f"{divergence.top1:.2%}", f"of {divergence.tokens:,} predictions"
        yield "shared top five", f"{divergence.top5:.2%}", "of the parent's five most likely tokens"
        error = "" if divergence.kl_standard_error is None else f" ± {divergence.kl_standard_error:.2g}"
        percentile = f"nats per token; 99th percentile {divergence.kl_p99:.3g}"
        yield "KL divergence", f"{divergence.kl:.4f}{error}", percentile
    if (positions := evaluation.positions) is not None:
        child, parent = positions.child, positions.parent
        if positions.trained and child.length >= positions.trained:
            start, end = child.length - child.width, child.length
            parent_loss = f"; the parent's {parent.end:.3f}" if parent else ""
            yield (
                "loss at the last positions",
                f"{child.end:.3f}",
                (f"nats per token from {start:,} to {end:,}{parent_loss}"),
            )
    if (drafts := evaluation.acceptance) is not None:
        yield (
            "accepted as a draft",
            f"{drafts.rate:.1%}",
            f"{drafts.tokens_per_step:.2f} tokens per parent forward pass",
        )


def generation_rows(evaluation: Evaluation) -> Iterator[tuple[str, str, str]]:
    """Yield the quality of the greedy continuations: label, parent, child.

    Args:
        evaluation: the whole result.
    """
    generation = evaluation.generation
    if generation is None:
        return
    for label, field in (("repeated 4-grams", "repetition"), ("early ends", "early_end")):
        parent = "" if generation.parent is None else f"{getattr(generation.parent, field):.1%}"
        yield label, parent, f"{getattr(generation.child, field):.1%}"
    if generation.agreement is not None:
        label = f"agreement in the first {generation.agreement_tokens} tokens"
        yield label, "", f"{generation.agreement:.1%}"
    if generation.identical is not None:
        yield "identical to the end", "", f"{generation.identical:.1%}"


def flagged_heads(evaluation: Evaluation) -> Iterator[tuple[str, str]]:
    """Yield the heads that are collapsed or uniform in the child and not in the parent: label, list.

    Args:
        evaluation: the whole result.
    """
    entropy = evaluation.diagnostics and evaluation.diagnostics.entropy
    if not entropy:
        return
    for label, heads in (("Collapsed heads", entropy.collapsed), ("Uniform heads", entropy.uniform)):
        if heads:
            more = f" and {len(heads) - HEADS_SHOWN} more" if len(heads) > HEADS_SHOWN else ""
            yield label, ", ".join(f"layer {head.layer} head {head.head}" for head in heads[:HEADS_SHOWN]) + more
