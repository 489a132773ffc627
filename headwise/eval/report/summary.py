"""The answer to "what did I lose, and is it real?", in a few sentences."""

from __future__ import annotations

from collections.abc import Iterator

from headwise.eval.result import Comparison, Evaluation


def sentences(found: Evaluation) -> Iterator[str]:
    """The headline figures, the agreement, and the gates."""
    compared = [one for one in found.headlines if one.paired is not None]
    real = [one for one in compared if significant(one)]
    if compared:
        worse = [describe(one) for one in real if (one.damage or 0) > 0]
        better = [describe(one) for one in real if (one.damage or 0) < 0]
        rest = len(compared) - len(worse) - len(better)
        if worse:
            yield f"Worse than chance explains: {'; '.join(worse)}."
        if better:
            yield f"Better than chance explains: {'; '.join(better)}."
        if rest:
            yield f"No difference that is more than noise in {rest} of {len(compared)} figures."
    if (seen := found.diagnostics) is not None:
        yield (
            f"The next token is the parent's in {seen.top1:.1%} of {seen.tokens:,} predictions "
            f"(KL {seen.kl:.4f} nats)."
        )
    if (drafts := found.acceptance) is not None:
        yield (
            f"As a draft of its parent it has {drafts.rate:.1%} of its tokens accepted, "
            f"{drafts.tokens_per_step:.2f} tokens per step of the parent."
        )
    child, parent = found.child.cache_bytes_per_token, found.parent and found.parent.cache_bytes_per_token
    if child and parent:
        yield f"KV cache: {parent:,} -> {child:,} bytes per token ({child / parent:.1%})."
    for gate in found.gates:
        if not gate.passed:
            yield f"Gate {gate.name} fails: {gate.detail}"


def significant(one: Comparison) -> bool:
    """Whether a headline difference stands after the correction for their number, at 5%."""
    return one.paired is not None and one.paired.p_holm is not None and one.paired.p_holm < 0.05


def describe(one: Comparison) -> str:
    """ "arc_easy acc 43.1% -> 40.2% (-2.9 points, 95% -4.0 to -1.8)"."""
    assert one.paired is not None and one.parent is not None
    pair = one.paired
    if one.metric.endswith("perplexity"):
        where = f"{pair.low:+.4f} to {pair.high:+.4f}"
        return (
            f"{one.task} {one.metric} {one.parent.value:.4g} -> {one.child.value:.4g} "
            f"({pair.difference:+.4f} nats, 95% {where})"
        )
    return (
        f"{one.task} {one.metric} {one.parent.value:.1%} -> {one.child.value:.1%} "
        f"({100 * pair.difference:+.1f} points, 95% {100 * pair.low:+.1f} to {100 * pair.high:+.1f})"
    )
