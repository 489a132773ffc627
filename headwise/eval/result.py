"""The result of an evaluation: made by `evaluate_model`, printed by the command, written into the report.

`Evaluation.to_dict()` is the object that `--json` prints and `report.json` holds: the fields below under their own
names, tuples as lists, paths as text, plus two computed keys, `passed` and `summary`. `Evaluation.from_dict` reads
it back. Differences are always child minus parent; in `damage` a larger value is worse. A part that was not
measured is None or empty, never zero. `docs/reference/evaluation-json.md` lists every key.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from headwise.measure.divergence import Divergence
from headwise.measure.positions import PositionLoss
from headwise.schema import restore

# A difference is significant if its p-value after Holm's correction is below this level.
LEVEL = 0.05


@dataclass(frozen=True)
class Subject:
    """A model that was evaluated.

    Attributes:
        model: the Hub repository, or the last part of a local path: its folders may be private.
        revision: the commit of a Hub repository; None for a folder.
        model_type: `model_type` of config.json.
        attention: layout in words, such as "GQA, 4 KV heads" or "MLA 128+32"; None for an unknown model type.
        cache_bytes_per_token: KV cache per token in the dtype of config.json; None for an unknown model type.
        parameters: number of parameters; None if it is unknown.
        sha256: hash of weights, config and tokenizer, 64 hex digits.
    """

    model: str
    revision: str | None
    model_type: str
    attention: str | None
    cache_bytes_per_token: int | None
    parameters: int | None
    sha256: str


@dataclass(frozen=True)
class Score:
    """One figure of one model.

    Attributes:
        value: the figure.
        standard_error: sampling error of the figure; None where lm-eval gives none.
    """

    value: float
    standard_error: float | None


# The gate that fails where an answer is NaN or infinite.
FINITE = "finite"


@dataclass(frozen=True)
class Paired:
    """Child minus parent on the same samples.

    Attributes:
        difference: difference of the two figures; for perplexities, difference of their logarithms (nats).
        standard_error: of the difference, from the differences of the samples.
        low: lower end of the 95% interval of the difference: the differences that the test does not reject.
        high: upper end of the same interval.
        samples: number of pairs.
        p_value: two-sided p-value of no difference, below 0.05 exactly where the interval excludes 0.
        test: "score" (McNemar's and Tango's) for independent answers that are right or wrong, "t" for other means,
            "bootstrap" over documents for perplexities.
        p_holm: `p_value` after Holm's correction: of a headline figure over the headlines, of another figure over
            all figures. None for a figure without a damage that is no headline.
        gained: samples that only the child gets right; None if the figure does not consist of 0 and 1.
        lost: samples that only the parent gets right; None likewise.
    """

    difference: float
    standard_error: float
    low: float
    high: float
    samples: int
    p_value: float
    test: str
    p_holm: float | None = None
    gained: int | None = None
    lost: int | None = None


@dataclass(frozen=True)
class Comparison:
    """One figure of one task, of the child and of the parent.

    Attributes:
        task: lm-eval's name, or "heldout" for the perplexity of held-out text, "targets" for that of pairs, or
            "images" for that of the texts of images.
        metric: lm-eval's name ("acc_norm", "exact_match"), or "perplexity".
        filter: lm-eval's filter; None for its default, "none".
        headline: whether this is the main figure of the task. Holm's correction and the gate use these figures.
        group: lm-eval group that contains the task and has a headline figure of its own.
        higher_is_better: direction of the figure; None where lm-eval gives none.
        num_fewshot: examples in the prompt.
        version: version of the task.
        samples: number of questions or blocks.
        child: figure of the child.
        parent: figure of the parent; None without a baseline.
        paired: None without a baseline, or for a figure that is not a mean over samples (F1, BLEU).
        damage: loss of quality: points for accuracies (0.01 is one point), relative increase for perplexities (0.01
            is 1%). None without a baseline or a direction.
        detectable: smallest damage that these samples would show as significant. None with a damage: no damage of
            any size.
        clusters: number of passages, where several samples share one and the test takes passages as
            independent (Miller 2024, arXiv 2411.00640); None: the samples are independent.
        unfit: why the figure cannot show a loss, such as a parent that guesses; None: it can.
    """

    task: str
    metric: str
    filter: str | None
    headline: bool
    group: str | None
    higher_is_better: bool | None
    num_fewshot: int | None
    version: str | None
    samples: int
    child: Score
    parent: Score | None = None
    paired: Paired | None = None
    damage: float | None = None
    detectable: float | None = None
    clusters: int | None = None
    unfit: str | None = None

    @property
    def is_perplexity(self) -> bool:
        """Return whether the figure is a perplexity, which is compared by its logarithm."""
        return self.metric.endswith("perplexity")

    @property
    def is_significant(self) -> bool:
        """Return whether the difference is significant at 5% after Holm's correction."""
        return self.paired is not None and self.paired.p_holm is not None and self.paired.p_holm < LEVEL

    def describe(self) -> str:
        """Return both figures, their difference and its interval.

        For example "arc_easy acc 43.1% -> 40.2% (-2.9 points, 95% -4.0 to -1.8)".
        """
        assert self.paired is not None and self.parent is not None
        paired, label = self.paired, f"{self.task} {self.metric}"
        if self.is_perplexity:
            return (
                f"{label} {self.parent.value:.4g} -> {self.child.value:.4g} "
                f"({paired.difference:+.4f} nats, 95% {paired.low:+.4f} to {paired.high:+.4f})"
            )
        return (
            f"{label} {self.parent.value:.1%} -> {self.child.value:.1%} "
            f"({100 * paired.difference:+.1f} points, 95% {100 * paired.low:+.1f} to {100 * paired.high:+.1f})"
        )


@dataclass(frozen=True)
class PositionComparison:
    """Loss by position of child and parent on the same tokens.

    Attributes:
        child: loss of the child.
        parent: loss of the parent; None without a baseline.
        trained: `max_position_embeddings` of the child.
        parent_trained: `max_position_embeddings` of the parent.
    """

    child: PositionLoss
    parent: PositionLoss | None
    trained: int | None
    parent_trained: int | None


@dataclass(frozen=True)
class TextQuality:
    """Quality of the greedy continuations of one model.

    Attributes:
        repetition: mean share of 4-grams that occur earlier in the same continuation (seq-rep-4 of Welleck et al.
            2019, arXiv 1908.04319).
        early_end: share of continuations that end before half the requested length.
    """

    repetition: float
    early_end: float


@dataclass(frozen=True)
class Continuation:
    """One prompt and its greedy continuations, as text.

    Attributes:
        prompt: the prompt.
        child: continuation by the child.
        parent: continuation by the parent; None without a baseline.
    """

    prompt: str
    child: str
    parent: str | None


@dataclass(frozen=True)
class GenerationComparison:
    """Greedy continuations of child and parent after the same prompts.

    Attributes:
        prompts: number of prompts.
        new_tokens: tokens requested after each prompt.
        child: quality of the child's continuations.
        parent: quality of the parent's continuations; None without a baseline.
        agreement: mean share of the first `agreement_tokens` tokens before the first difference; None without a
            baseline.
        agreement_tokens: number of tokens that `agreement` compares.
        identical: share of continuations that are equal to the end; None without a baseline.
        complaints: defects in sentences; empty if there are none.
        samples: a few continuations to read.
    """

    prompts: int
    new_tokens: int
    child: TextQuality
    parent: TextQuality | None
    agreement: float | None
    agreement_tokens: int
    identical: float | None
    complaints: tuple[str, ...]
    samples: tuple[Continuation, ...]


@dataclass(frozen=True)
class DraftAcceptance:
    """The child as draft model of its parent, in greedy speculative decoding.

    Attributes:
        prompts: number of prompts.
        new_tokens: tokens requested after each prompt.
        draft_tokens: tokens drafted in one step.
        rate: accepted tokens / drafted tokens.
        tokens_per_step: tokens per forward pass of the parent.
    """

    prompts: int
    new_tokens: int
    draft_tokens: int
    rate: float
    tokens_per_step: float


@dataclass(frozen=True)
class PasskeyCell:
    """Share of passkeys retrieved at one length and depth.

    Attributes:
        length: tokens of the prompt with its answer.
        depth: share of the filler text before the key.
        child: share that the child retrieves.
        parent: share that the parent retrieves; None without a baseline.
    """

    length: int
    depth: float
    child: float
    parent: float | None


@dataclass(frozen=True)
class Gate:
    """One condition on the result.

    Attributes:
        name: name of the condition.
        passed: whether the condition holds.
        detail: the reason, in a sentence.
    """

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Evaluation:
    """The whole result of `evaluate_model`.

    Attributes:
        child: the converted model.
        parent: the model it is compared with; None without a baseline.
        recipe: name of the recipe; None if only tasks were given.
        command: command line that repeats the evaluation.
        settings: tasks, num_fewshot, limit, batch_size, dtype, device, backend, seed, include_path and recipe.
        comparisons: figures in the order of the recipe; the headline of a task first, a group before its parts.
        seconds: wall clock by stage, in order; "parent: tasks" is missing if `reused` is true.
        lm_eval_seconds: the part of `seconds` spent inside lm-eval.
        versions: versions of the packages that decide the figures.
        reused: whether the parent's results come from an earlier run.
        positions: None if the recipe has no text.
        diagnostics: None if the recipe has none, or without a baseline.
        generation: None if the recipe has none.
        acceptance: None if the recipe has none, or without a baseline.
        passkey: empty if the recipe has no passkey task.
        fail_above: damage that the gate allows; None without a gate.
        gates: conditions; they decide the exit code only with `fail_above`.
        notes: sentences on what limits the figures, such as prompts that were truncated.
        figures: name ("entropy", "positions", "passkey") -> PNG, relative to the report's folder.
        logs: "child", "parent" -> folder with lm-eval's result and sample files, relative to the report's folder.
        schema_version: version of this format.
    """

    child: Subject
    parent: Subject | None
    recipe: str | None
    command: str
    settings: dict[str, Any]
    comparisons: tuple[Comparison, ...]
    seconds: dict[str, float]
    lm_eval_seconds: float
    versions: dict[str, str]
    reused: bool = False
    positions: PositionComparison | None = None
    diagnostics: Divergence | None = None
    generation: GenerationComparison | None = None
    acceptance: DraftAcceptance | None = None
    passkey: tuple[PasskeyCell, ...] = ()
    fail_above: float | None = None
    gates: tuple[Gate, ...] = ()
    notes: tuple[str, ...] = ()
    figures: dict[str, str] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    schema_version: int = 1

    @property
    def passed(self) -> bool:
        """Return whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    @property
    def headlines(self) -> tuple[Comparison, ...]:
        """Return the main figure of each task."""
        return tuple(comparison for comparison in self.comparisons if comparison.headline)

    @property
    def summary(self) -> tuple[str, ...]:
        """Return the result in a few sentences."""
        return tuple(_summary_sentences(self))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data; the docstring of the module describes it."""
        return dataclasses.asdict(self) | {"passed": self.passed, "summary": list(self.summary)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """Build an evaluation from the result of `to_dict`, also after a round trip through JSON.

        Args:
            data: result of `to_dict`; JSON turns NaN into None.

        Returns:
            The evaluation.

        Raises:
            KeyError: a key is missing.
            TypeError: a value has the wrong type.
        """
        return restore(cls, data)


# exp of more nats than this is infinite.
MAX_NATS = 700.0


def bounded_exp(nats: float) -> float:
    """Return the perplexity of a loss, and a very large number where it has no float.

    Args:
        nats: per token.
    """
    return math.exp(min(nats, MAX_NATS))


def growth(nats: float) -> float:
    """Return the relative increase of the perplexity for an increase of the loss, bounded as `bounded_exp`.

    Args:
        nats: the increase, per token.
    """
    return math.expm1(min(nats, MAX_NATS))


def _summary_sentences(evaluation: Evaluation) -> Iterator[str]:
    """Yield sentences about the headline figures, the agreement with the parent and the gates."""
    headlines = [comparison for comparison in evaluation.headlines if comparison.paired is not None]
    others = [c for c in evaluation.comparisons if not c.headline and c.damage is not None]
    compared = [*headlines, *others]
    significant = [comparison for comparison in compared if comparison.is_significant]
    if compared:
        worse = [comparison.describe() for comparison in significant if (comparison.damage or 0) > 0]
        better = [comparison.describe() for comparison in significant if (comparison.damage or 0) < 0]
        num_others = len(compared) - len(worse) - len(better)
        if worse:
            yield f"Significantly worse: {'; '.join(worse)}."
        if better:
            yield f"Significantly better: {'; '.join(better)}."
        if num_others:
            yield f"No significant difference in {num_others} of {len(compared)} figures."
    if (divergence := evaluation.diagnostics) is not None:
        yield (
            f"The child predicts the parent's next token in {divergence.top1:.1%} of {divergence.tokens:,} "
            f"predictions (KL {divergence.kl:.4f} nats)."
        )
    if (drafts := evaluation.acceptance) is not None:
        yield (
            f"As a draft model of its parent, {drafts.rate:.1%} of its tokens are accepted: "
            f"{drafts.tokens_per_step:.2f} tokens per forward pass of the parent."
        )
    after = evaluation.child.cache_bytes_per_token
    before = evaluation.parent and evaluation.parent.cache_bytes_per_token
    if after and before:
        yield f"KV cache: {before:,} -> {after:,} bytes per token ({after / before:.1%})."
    for gate in evaluation.gates:
        if not gate.passed:
            yield f"Gate {gate.name} fails: {gate.detail}"
    yield from evaluation.notes
