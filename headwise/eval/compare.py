"""Compare every figure of the child with its parent's, sample by sample, and gate the headline figures."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headwise.errors import HeadwiseError
from headwise.eval.result import LEVEL, Comparison, Gate, Paired, Score, bounded_exp, growth
from headwise.eval.stats import (
    Difference,
    count_flips,
    holm,
    paired_answers,
    paired_mean,
    paired_ratio,
    smallest_significant,
    t_quantile,
)
from headwise.eval.tasks.samples import TaskFigure, TaskResults
from headwise.eval.verdict import gate_name


@dataclass(frozen=True)
class GatedComparison:
    """A comparison with what its gate needs.

    Attributes:
        comparison: the figure of both models.
        damage: loss of quality with its sampling error, in nats for perplexities; None without a parent or a
            direction.
    """

    comparison: Comparison
    damage: Difference | None = None

    def exceeds(self, fail_above: float) -> float:
        """Compute the one-sided p-value of a damage of at most `fail_above`.

        Args:
            fail_above: damage that the gate allows: 0.01 is one point, or 1% of perplexity.
        """
        assert self.damage is not None
        return self.damage.above(math.log1p(fail_above) if self.comparison.is_perplexity else fail_above)


def compare_tasks(
    child: TaskResults, parent: TaskResults | None, cut: Mapping[str, frozenset[str]] | None = None
) -> list[GatedComparison]:
    """Compare all figures of all tasks.

    A question whose prompt was cut for one model only is left out: the models did not read the same.

    Args:
        child: results of the child.
        parent: results of the parent; None without a baseline.
        cut: the questions that are left out, as `cut_for_one` returns them; None: they are found here.

    Returns:
        The comparisons; a group's figure precedes those of its parts.

    Raises:
        HeadwiseError: child and parent have different questions.
    """
    compared: list[GatedComparison] = []
    group_of = {task: group for group, tasks in child.groups.items() for task in tasks}
    cut = cut_for_one(child, parent) if cut is None else cut
    pooled = {group: _pool(group, child, parent, cut) for group in child.groups}
    for figure in child.figures.values():
        group = group_of.get(figure.task)
        group_figures = pooled.get(group) if group else None
        if group_figures and not any(c.comparison.task == group for c in compared):
            compared.append(compare_figure(*group_figures, headline=True))
        headline = group_figures is None and figure is child.headline(figure.task)
        counterpart = _parent_figure(figure, parent)
        figures = _without(figure, cut), counterpart and _without(counterpart, cut)
        compared.append(compare_figure(*figures, headline=headline, group=group))
    # The headline is the first figure of its task.
    order = {task: place for place, task in enumerate(dict.fromkeys(c.comparison.task for c in compared))}
    compared.sort(key=lambda c: (order[c.comparison.task], not c.comparison.headline))
    return compared


def compare_perplexity(task: str, child: Tensor, parent: Tensor | None, tokens: Tensor) -> GatedComparison:
    """Compare the perplexity of a held-out text.

    Args:
        task: name of the text.
        child: nats of each block, (blocks,).
        parent: nats of each block, (blocks,); None without a baseline.
        tokens: predicted tokens in each block, (blocks,).
    """
    sizes = tokens.double()

    def perplexity(nats: Tensor) -> TaskFigure:
        ratio = nats.double().sum() / sizes.sum()
        rest = (nats.double() - ratio * sizes) / sizes.mean()  # linearized ratio: blocks may differ in size
        error = float(rest.std()) / math.sqrt(len(rest)) if len(rest) > 1 else None
        value = bounded_exp(float(ratio))
        return TaskFigure(
            task=task,
            metric="perplexity",
            filter=None,
            value=value,
            standard_error=None if error is None else value * error,
            higher_is_better=False,
            num_fewshot=None,
            version=None,
            keys=tuple(str(block) for block in range(len(nats))),
            sums=-nats.double(),
            weights=sizes,
            log=True,
        )

    return compare_figure(perplexity(child), None if parent is None else perplexity(parent), headline=True)


def compare_figure(
    child: TaskFigure, parent: TaskFigure | None, *, headline: bool, group: str | None = None
) -> GatedComparison:
    """Compare two figures over the same samples.

    Args:
        child: figure of the child.
        parent: figure of the parent; None without a baseline.
        headline: whether this is the main figure of the task.
        group: group that contains the task.
    """
    comparison = Comparison(
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
        clusters=len(set(child.clusters)) or None,
    )
    if parent is None or child.sums is None or parent.sums is None:
        return GatedComparison(comparison)
    assert child.weights is not None and parent.weights is not None
    binary = child.is_binary and parent.is_binary
    gained = lost = None
    ours, theirs, weights = (_by_cluster(child.clusters, each) for each in (child.sums, parent.sums, child.weights))
    damage: Difference | None
    if child.log:
        damage = difference = paired_ratio(-ours, -theirs, weights)
        test = "bootstrap"
    else:
        if binary and not child.clusters:
            difference, test = paired_answers(child.sums, parent.sums), "score"
        elif bool((weights == weights[0]).all()):
            difference, test = paired_mean(ours / weights, theirs / weights), "t"
        else:
            difference, test = paired_ratio(ours, theirs, weights), "bootstrap"
        difference = replace(difference, bounded=binary)
        has_damage = child.is_share and child.higher_is_better is not None
        damage = (-difference if child.higher_is_better else difference) if has_damage else None
        if binary:
            gained, lost = count_flips(child.sums, parent.sums)
    low, high = difference.interval()
    paired = Paired(
        difference=difference.estimate,
        standard_error=difference.standard_error,
        low=low,
        high=high,
        samples=len(child.sums),
        p_value=difference.p_value(),
        test=test,
        gained=gained,
        lost=lost,
    )
    amount = None if damage is None else growth(damage.estimate) if child.log else damage.estimate
    return GatedComparison(replace(comparison, paired=paired, damage=amount), damage)


def _by_cluster(clusters: Sequence[str], values: Tensor) -> Tensor:
    """Return the sums of values over the samples of each passage; the values themselves without passages."""
    if not clusters:
        return values
    numbers = {cluster: number for number, cluster in enumerate(dict.fromkeys(clusters))}
    index = torch.tensor([numbers[cluster] for cluster in clusters])
    return torch.zeros(len(numbers), dtype=torch.float64).index_add(0, index, values.double())


def correct(compared: Sequence[GatedComparison]) -> list[GatedComparison]:
    """Apply Holm's correction, and compute the smallest damage that each figure could show.

    The headline figures are one family. Every other figure with a damage is corrected for all figures together, so
    that more metrics of a task do not weaken the test of its main figure.

    Args:
        compared: all figures.

    Returns:
        The same figures with `p_holm` and `detectable`.
    """
    paired = [gated for gated in compared if gated.comparison.paired]
    headlines = [gated for gated in paired if gated.comparison.headline]
    judged = [gated for gated in paired if gated.comparison.headline or gated.damage]
    adjusted: dict[int, tuple[float, int]] = {}
    for family in (judged, headlines):  # a headline takes the value of the second, smaller family
        p_values = holm([g.comparison.paired.p_value for g in family if g.comparison.paired])
        adjusted |= {id(g): (p_value, len(family)) for g, p_value in zip(family, p_values, strict=True)}
    corrected = []
    for gated in compared:
        comparison, pairs = gated.comparison, gated.comparison.paired
        if pairs and id(gated) in adjusted:
            p_holm, tests = adjusted[id(gated)]
            comparison = replace(comparison, paired=replace(pairs, p_holm=p_holm))
            if gated.damage is not None:
                smallest = smallest_significant(gated.damage, LEVEL / tests)
                if smallest is not None and comparison.is_perplexity:
                    smallest = growth(smallest)
                comparison = replace(comparison, detectable=smallest)
            gated = replace(gated, comparison=comparison)
        corrected.append(gated)
    return corrected


# Nats of the parent, as a share of those of a uniform guess, above which a text is unfit to show a loss.
UNFIT_SHARE = 0.5


def name_unfit_text(gated: GatedComparison, vocabulary: int | None) -> GatedComparison:
    """Mark the perplexity of a text on which the parent itself fails.

    Args:
        gated: the perplexity of held-out text.
        vocabulary: number of tokens that the models know; None if it is unknown.
    """
    comparison = gated.comparison
    if comparison.parent is None or not vocabulary or comparison.parent.value <= vocabulary**UNFIT_SHARE:
        return gated
    reason = f"the parent's own perplexity is {comparison.parent.value:,.0f}, so the text does not fit the model"
    return replace(gated, comparison=replace(comparison, unfit=reason))


def name_unfit_task(gated: GatedComparison, samples: Sequence[Mapping[str, Any]]) -> GatedComparison:
    """Mark the accuracy of a multiple-choice task at which the parent is not better than a guess.

    Args:
        gated: a figure of the task.
        samples: what lm-eval logged of the task.
    """
    comparison = gated.comparison
    choices = [len(sample.get("resps") or ()) for sample in samples]
    if comparison.parent is None or comparison.metric not in ("acc", "acc_norm") or min(choices, default=0) < 2:
        return gated
    chance = sum(1 / number for number in choices) / len(choices)
    error = math.sqrt(chance * (1 - chance) / comparison.samples)
    if comparison.parent.value > chance + t_quantile(1 - LEVEL, max(1, comparison.samples - 1)) * error:
        return gated
    reason = f"the parent has {comparison.parent.value:.0%}, and a guess has {chance:.0%}"
    return replace(gated, comparison=replace(comparison, unfit=reason))


def damage_gates(compared: Sequence[GatedComparison], fail_above: float) -> Iterator[Gate]:
    """Gate every headline figure: it fails if its damage is significantly larger than `fail_above`.

    The tests are one-sided, at 5% for all figures together (Holm).

    Args:
        compared: all figures.
        fail_above: damage that is allowed: 0.01 is one point, or 1% of perplexity.

    Yields:
        A gate for each headline figure.
    """
    headlines = [c for c in compared if c.comparison.headline and c.damage is not None]
    p_values = holm([c.exceeds(fail_above) for c in headlines])
    for gated, p_value in zip(headlines, p_values, strict=True):
        comparison, damage = gated.comparison, gated.damage
        assert damage is not None and comparison.damage is not None
        lower_bound = damage.interval(1 - 2 * LEVEL)[0]
        unit, singular = " points", " point"
        if comparison.is_perplexity:
            unit, singular, lower_bound = "%", "%", growth(lower_bound)
        # Adding zero turns -0 into 0.
        amount, bound = (f"{100 * share + 0:+.2f}{unit}" for share in (comparison.damage, lower_bound))
        allowed = f"{100 * fail_above:g}{singular if fail_above == 0.01 else unit}"
        shown = f"p = {p_value:.3g}" if p_value >= 0.001 else "p < 0.001"
        yield Gate(
            name=gate_name(comparison),
            passed=p_value >= LEVEL,
            detail=f"Damage {amount}, at least {bound} with 95% confidence; {allowed} allowed ({shown}).",
        )


def same_questions(child: TaskResults, parent: TaskResults) -> bool:
    """Return whether both models have the same questions and prompts, sample by sample.

    Args:
        child: results of the child.
        parent: results of the parent.
    """
    keys = {place: figure.keys for place, figure in child.figures.items()}
    return keys == {place: figure.keys for place, figure in parent.figures.items()}


def cut_for_one(child: TaskResults, parent: TaskResults | None) -> dict[str, frozenset[str]]:
    """Return the questions whose prompts exceed the context of one model, and not of the other.

    Args:
        child: results of the child.
        parent: results of the parent; None without a baseline.

    Returns:
        task -> keys of its questions, for each task of which a prompt was cut.
    """
    cut: dict[str, frozenset[str]] = {}
    for task, counts in child.answers.items():
        other = counts if parent is None else parent.answers.get(task, counts)
        if counts.cut or other.cut:
            cut[task] = frozenset(counts.cut) ^ frozenset(other.cut)
    return cut


def _without(figure: TaskFigure, cut: Mapping[str, frozenset[str]]) -> TaskFigure:
    """Return a figure without the questions that were cut for one model; a cut prompt has fewer examples."""
    if figure.task not in cut:
        return figure
    figure = replace(figure, num_fewshot=None)
    kept = [key not in cut[figure.task] for key in figure.keys]
    if all(kept) or figure.sums is None or figure.weights is None:
        return figure
    if not any(kept):
        return replace(figure, sums=None, weights=None)
    keys = tuple(key for key, keep in zip(figure.keys, kept, strict=True) if keep)
    return _of_samples(figure, keys, figure.sums[kept], figure.weights[kept])


def _parent_figure(figure: TaskFigure, parent: TaskResults | None) -> TaskFigure | None:
    if parent is None:
        return None
    counterpart = parent.figures.get((figure.task, figure.metric, figure.filter))
    if counterpart is None or counterpart.keys != figure.keys:
        raise HeadwiseError(
            f"Task {figure.task} has different questions for parent and child, so they cannot be compared.",
            "Its questions depend on chance or on the model: leave out the task.",
        )
    return counterpart


def _pool(
    group: str, child: TaskResults, parent: TaskResults | None, cut: Mapping[str, frozenset[str]]
) -> tuple[TaskFigure, TaskFigure | None] | None:
    """Return a group's headline: the first figure of lm-eval that equals the mean over the samples of all tasks."""
    for key, value in child.group_values.get(group, {}).items():
        metric, _, filter_name = key.partition(",")
        places = [(task, metric, None if filter_name == "none" else filter_name) for task in child.groups[group]]
        figures = [child.figures[place] for place in places if place in child.figures]
        if len(figures) < len(places) or any(figure.sums is None for figure in figures):
            continue
        if math.isclose(value, _concatenate(group, figures).value, rel_tol=1e-6):
            counterparts = [figure for each in figures if (figure := _parent_figure(each, parent))]
            pooled, others = (
                [kept for figure in each if (kept := _without(figure, cut)).sums is not None]
                for each in (figures, counterparts)
            )
            if pooled:
                return _concatenate(group, pooled), _concatenate(group, others) if others else None
    return None


def _concatenate(group: str, figures: Sequence[TaskFigure]) -> TaskFigure:
    sums = torch.cat([figure.sums for figure in figures if figure.sums is not None])
    weights = torch.cat([figure.weights for figure in figures if figure.weights is not None])
    keys = tuple(key for figure in figures for key in figure.keys)
    passages = {key: passage for figure in figures for key, passage in figure.passages.items()}
    return _of_samples(replace(figures[0], task=group, version=None, passages=passages), keys, sums, weights)


def _of_samples(figure: TaskFigure, keys: tuple[str, ...], sums: Tensor, weights: Tensor) -> TaskFigure:
    """Return a figure of these samples alone."""
    error = float((sums / weights).std()) / math.sqrt(len(sums)) if len(sums) > 1 else None
    value = float(sums.sum() / weights.sum())
    return replace(
        figure,
        value=bounded_exp(-value) if figure.log else value,
        standard_error=None if figure.log else error,
        keys=keys,
        sums=sums,
        weights=weights,
    )
