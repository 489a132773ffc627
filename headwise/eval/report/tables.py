"""The rows of a report's tables, as text: the same for the page, for Markdown and for the model card."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from headwise.eval.report.summary import significant
from headwise.eval.result import Comparison, Evaluation, Score
from headwise.eval.verdict import Damage, is_perplexity, name
from headwise.format import size

LEGEND = (
    "Child minus parent on the same samples, in points (perplexity: percent). Flips: right only in the child (+), "
    "only in the parent (−). p: two-sided, after Holm's correction."
)


@dataclass(frozen=True)
class Row:
    """One figure. `tone` is "bad", "good" or ""; `part` marks a group's parts and figures beside the main one."""

    figure: str
    detail: str
    parent: str
    child: str
    difference: str
    interval: str
    flips: str
    p: str
    tone: str
    part: bool


def figures(found: Evaluation) -> Iterator[Row]:
    """The tasks' figures, the main one of each task first."""
    for one in found.comparisons:
        yield _row(one)


def _row(one: Comparison) -> Row:
    pair, damage = one.paired, Damage.of(one)
    shots = f", {one.num_fewshot}-shot" if one.num_fewshot else ""
    which = f" ({one.filter})" if one.filter else ""
    beside = not one.headline and one.group is None  # another metric of the task above
    tone = ""
    if damage is not None and significant(one):
        tone = "bad" if damage.value > 0 else "good"
    probability = None if pair is None else pair.p_value if pair.p_holm is None else pair.p_holm
    return Row(
        figure=f"{one.metric}{which}" if beside else name(one),
        detail=f"{'' if beside else f'{one.metric}{which}{shots}, '}{one.samples:,} samples",
        parent=value(one, one.parent),
        child=value(one, one.child),
        difference=_difference(one),
        interval=_interval(one),
        flips="" if pair is None or pair.gained is None else f"+{pair.gained} −{pair.lost}",
        p="" if probability is None else "< 0.001" if probability < 0.001 else f"{probability:.3f}",
        tone=tone,
        part=not one.headline,
    )


def value(one: Comparison, score: Score | None) -> str:
    """ "43.1%" or "5.920"."""
    if score is None:
        return ""
    share = not is_perplexity(one) and 0 <= score.value <= 1
    digits = 3 if abs(score.value) < 10 else 2 if abs(score.value) < 100 else 1
    return f"{100 * score.value:.1f}%" if share else f"{score.value:,.{digits}f}"


def _difference(one: Comparison) -> str:
    pair = one.paired
    if pair is None:
        return ""
    if is_perplexity(one):
        return signed(100 * (Damage.of(one) or Damage(0, 0, 0)).value, "%")
    return signed(100 * pair.difference) if _is_share(one) else signed(pair.difference, digits=4)


def _interval(one: Comparison) -> str:
    pair = one.paired
    if pair is None:
        return ""
    if is_perplexity(one) and (damage := Damage.of(one)) is not None:
        return f"{signed(100 * damage.low)} to {signed(100 * damage.high)}"
    scale, digits = (100, 1) if _is_share(one) else (1, 4)
    return f"{signed(scale * pair.low, digits=digits)} to {signed(scale * pair.high, digits=digits)}"


def _is_share(one: Comparison) -> bool:
    scores = [score for score in (one.child, one.parent) if score is not None]
    return not is_perplexity(one) and all(0 <= score.value <= 1 for score in scores)


def signed(number: float, unit: str = "", digits: int = 1) -> str:
    """ "+3.1%", "−0.2" with a real minus sign, "0" where it is exactly that."""
    if number == 0:
        return f"0{unit}"
    return f"{number:+.{digits}f}{unit}".replace("-", "−")


def agreement(found: Evaluation) -> Iterator[tuple[str, str, str]]:
    """What, how much, and what that means: how alike parent and child are on the same text."""
    before = found.parent and found.parent.cache_bytes_per_token
    after = found.child.cache_bytes_per_token
    if after:
        was = f"{size(before)} before, {after / before:.1%} of it left" if before else ""
        yield "KV cache per token", size(after), was
    if (seen := found.diagnostics) is not None:
        yield "same next token", f"{seen.top1:.2%}", f"of {seen.tokens:,} predictions"
        yield "shared top five", f"{seen.top5:.2%}", "of the parent's five likeliest tokens"
        error = "" if seen.kl_standard_error is None else f" ± {seen.kl_standard_error:.2g}"
        yield "KL divergence", f"{seen.kl:.4f}{error}", f"nats per token; 99th percentile {seen.kl_p99:.3g}"
    if (by := found.positions) is not None and by.trained and by.child.length >= by.trained:
        start, end = by.child.length - by.child.width, by.child.length
        other = f"; the parent's {by.parent.end:.3f}" if by.parent else ""
        yield "loss at the far end", f"{by.child.end:.3f}", f"nats per token from {start:,} to {end:,}{other}"
    if (drafts := found.acceptance) is not None:
        yield (
            "accepted as a draft",
            f"{drafts.rate:.1%}",
            f"{drafts.tokens_per_step:.2f} tokens per step of the parent; {drafts.exact:.1%} of outputs exact",
        )


def writing(found: Evaluation) -> Iterator[tuple[str, str, str]]:
    """What, of the parent, of the child: how greedy continuations read."""
    said = found.generation
    if said is None:
        return
    for label, field in (("repeated 4-grams", "repetition"), ("ends too early", "early_end")):
        parent = "" if said.parent is None else f"{getattr(said.parent, field):.1%}"
        yield label, parent, f"{getattr(said.child, field):.1%}"
    if said.agreement is not None:
        yield f"agrees over the first {said.agreement_tokens} tokens", "", f"{said.agreement:.1%}"
    if said.identical is not None:
        yield "identical to the end", "", f"{said.identical:.1%}"


def flagged(found: Evaluation) -> Iterator[tuple[str, str]]:
    """Heads that attend to one token or to all alike where the parent's do not, in words."""
    entropy = found.diagnostics and found.diagnostics.entropy
    if not entropy:
        return
    for label, heads in (("Collapsed", entropy.collapsed), ("Uniform", entropy.uniform)):
        if heads:
            more = f" and {len(heads) - 12} more" if len(heads) > 12 else ""
            yield label, ", ".join(f"layer {head.layer} head {head.head}" for head in heads[:12]) + more
