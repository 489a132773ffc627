"""Every figure of the child beside its parent's, judged by pairs; and the gate on the headline figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.eval import stats as compare
from headwise.eval.result import Comparison, Gate, Paired, Score
from headwise.eval.stats import Difference
from headwise.eval.tasks.samples import Figure, Results
from headwise.eval.verdict import gate_name

LEVEL = 0.05


@dataclass(frozen=True)
class Judged:
    """A comparison with what its gate needs: `damage` is turned so that more is worse, in nats for perplexities."""

    comparison: Comparison
    damage: Difference | None = None

    def exceeds(self, fail_above: float) -> float:
        """One-sided p-value of a damage above `fail_above`."""
        assert self.damage is not None
        is_log = self.comparison.metric.endswith("perplexity")
        return self.damage.above(math.log1p(fail_above) if is_log else fail_above)


def compare_tasks(child: Results, parent: Results | None) -> list[Judged]:
    """All figures of all tasks; a group's own figure comes before its parts'.

    Raises:
        HeadwiseError: the two were not asked the same.
    """
    found: list[Judged] = []
    member = {task: group for group, tasks in child.groups.items() for task in tasks}
    pooled = {group: _pool(group, child, parent) for group in child.groups}
    for figure in child.figures.values():
        group = member.get(figure.task)
        own = pooled.get(group) if group else None
        if own and not any(j.comparison.task == group for j in found):
            found.append(judge(*own, headline=True))
        main = own is None and figure is child.headline(figure.task)
        found.append(judge(figure, _other(figure, parent), headline=main, group=group))
    # The headline first within its task.
    order = {task: place for place, task in enumerate(dict.fromkeys(j.comparison.task for j in found))}
    found.sort(key=lambda j: (order[j.comparison.task], not j.comparison.headline))
    return found


def compare_perplexity(text: str, child: Tensor, parent: Tensor | None, tokens: int) -> Judged:
    """Perplexity of held-out text.

    Args:
        text: a name for it.
        child, parent: nats of each block, (blocks,).
        tokens: predicted in each block.
    """
    sizes = torch.full_like(child, tokens, dtype=torch.float64)

    def figure(nats: Tensor) -> Figure:
        mean = nats.double() / tokens
        error = float(mean.std()) / math.sqrt(len(mean)) if len(mean) > 1 else None
        value = math.exp(float(mean.mean()))
        return Figure(
            text, "perplexity", None, value, None if error is None else value * error, False, None, None,
            tuple(str(block) for block in range(len(nats))), -nats.double(), sizes, log=True,
        )  # fmt: skip

    return judge(figure(child), None if parent is None else figure(parent), headline=True)


def judge(child: Figure, parent: Figure | None, *, headline: bool, group: str | None = None) -> Judged:
    """Compare two figures over the same samples."""
    plain = Comparison(
        task=child.task,
        metric=child.metric,
        filter=child.filter,
        headline=headline,
        group=group,
        higher_is_better=child.higher_is_better,
        num_fewshot=child.num_fewshot,
        version=child.version,
        samples=len(child.keys),
        child=Score(child.value, child.standard_error),
        parent=None if parent is None else Score(parent.value, parent.standard_error),
    )
    if parent is None or child.sums is None or parent.sums is None:
        return Judged(plain)
    assert child.weights is not None and parent.weights is not None
    binary = child.is_binary and parent.is_binary
    gained = lost = None
    if child.log:
        found = compare.paired_ratio(-child.sums, -parent.sums, child.weights)
        damage: Difference | None = found
        test, p_value = "bootstrap", found.p_value()
    else:
        even = bool((child.weights == child.weights[0]).all())
        found = (
            compare.paired_mean(child.sums / child.weights, parent.sums / parent.weights)
            if even
            else compare.paired_ratio(child.sums, parent.sums, child.weights)
        )
        found = replace(found, binary=binary)
        known = child.is_share and child.higher_is_better is not None
        damage = (-found if child.higher_is_better else found) if known else None
        test, p_value = "t" if even else "bootstrap", found.p_value()
        if binary:
            gained, lost = compare.flips(child.sums, parent.sums)
            test, p_value = "mcnemar", compare.mcnemar(gained, lost)
    low, high = found.interval()
    paired = Paired(
        difference=found.estimate,
        standard_error=found.standard_error,
        low=low,
        high=high,
        samples=found.samples,
        p_value=p_value,
        test=test,
        gained=gained,
        lost=lost,
    )
    size = None if damage is None else math.expm1(damage.estimate) if child.log else damage.estimate
    return Judged(replace(plain, paired=paired, damage=size), damage)


def correct(judged: Sequence[Judged]) -> list[Judged]:
    """Holm's correction over the headline figures."""
    family = [j for j in judged if j.comparison.headline and j.comparison.paired]
    adjusted = iter(compare.holm([j.comparison.paired.p_value for j in family if j.comparison.paired]))
    corrected = []
    for one in judged:
        paired = one.comparison.paired
        if one.comparison.headline and paired:
            one = replace(one, comparison=replace(one.comparison, paired=replace(paired, p_holm=next(adjusted))))
        corrected.append(one)
    return corrected


def damage_gates(judged: Sequence[Judged], fail_above: float) -> Iterator[Gate]:
    """Whether any headline figure lost more than `fail_above`: it fails only where the evidence says so at 5%, all
    figures together (one-sided, Holm)."""
    family = [j for j in judged if j.comparison.headline and j.damage is not None]
    for one, p in zip(family, compare.holm([j.exceeds(fail_above) for j in family]), strict=True):
        comparison, damage = one.comparison, one.damage
        assert damage is not None and comparison.damage is not None
        least = damage.interval(1 - 2 * LEVEL)[0]
        unit, one_unit = " points", " point"
        if comparison.metric.endswith("perplexity"):
            unit, one_unit, least = "%", "%", math.expm1(min(least, 700))
        # Adding zero turns -0 into 0.
        amount, bound = (f"{100 * share + 0:+.2f}{unit}" for share in (comparison.damage, least))
        allowed = f"{100 * fail_above:g}{one_unit if fail_above == 0.01 else unit}"
        yield Gate(
            name=gate_name(comparison),
            passed=p >= LEVEL,
            detail=f"Damage {amount}, at least {bound} with 95% confidence; {allowed} allowed (p = {p:.3g}).",
        )


def same_questions(child: Results, parent: Results) -> bool:
    """Whether both were asked the same, sample by sample."""
    keys = {at: figure.keys for at, figure in child.figures.items()}
    return keys == {at: figure.keys for at, figure in parent.figures.items()}


def _other(figure: Figure, parent: Results | None) -> Figure | None:
    if parent is None:
        return None
    other = parent.figures.get((figure.task, figure.metric, figure.filter))
    if other is None or other.keys != figure.keys:
        raise HeadwiseError(
            f"Task {figure.task} asked parent and child different questions, so that they cannot be compared.",
            "Its questions depend on chance or on the model; leave it out.",
        )
    return other


def _pool(group: str, child: Results, parent: Results | None) -> tuple[Figure, Figure | None] | None:
    """A group's headline: all samples of its tasks together, in a figure that lm-eval makes of them so."""
    for key, value in child.group_values.get(group, {}).items():
        metric, _, filter_name = key.partition(",")
        places = [(task, metric, None if filter_name == "none" else filter_name) for task in child.groups[group]]
        heads = [child.figures[place] for place in places if place in child.figures]
        if len(heads) < len(places) or any(head.sums is None for head in heads):
            continue
        pooled = _joined(group, heads)
        if math.isclose(value, pooled.value, rel_tol=1e-6):
            others = [_other(head, parent) for head in heads] if parent else []
            return pooled, _joined(group, [other for other in others if other]) if others else None
    return None


def _joined(group: str, heads: Sequence[Figure]) -> Figure:
    sums = torch.cat([head.sums for head in heads if head.sums is not None])
    weights = torch.cat([head.weights for head in heads if head.weights is not None])
    error = float((sums / weights).std()) / math.sqrt(len(sums)) if len(sums) > 1 else None
    value = float(sums.sum() / weights.sum())
    return replace(
        heads[0],
        task=group,
        value=math.exp(-value) if heads[0].log else value,
        standard_error=None if heads[0].log else error,
        keys=tuple(key for head in heads for key in head.keys),
        sums=sums,
        weights=weights,
        version=None,
    )
