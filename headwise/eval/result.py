"""What an evaluation found, as data: made by `evaluate`, printed by the command, written by the report.

`Evaluation.to_dict()` is what `--json` prints and `report.json` holds: the fields below under their own names,
tuples as lists, paths as text, plus two computed keys, `passed` and `summary`. `Evaluation.from_dict` reads it
back. Differences are always child minus parent; `damage` turns them so that more is worse. A part that was not
asked for or could not be measured is None (or empty), never a zero. `docs/evaluation-json.md` lists every key.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from headwise.eval.plain import restore
from headwise.measure.curve import Curve


@dataclass(frozen=True)
class Subject:
    """A model that was evaluated.

    Attributes:
        model: as it was given: a folder or a Hub repository.
        revision: the commit, of a Hub repository.
        model_type: as in config.json.
        attention: in words: "GQA, 4 KV heads", "MLA 128+32"; None where headwise does not know the type.
        cache_bytes_per_token: of KV cache, in the dtype of config.json; None likewise.
        parameters: their number; None where it is not known.
        sha256: of everything that decides what the model says (weights, config, tokenizer): 64 hex digits.
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
    """One model's figure, with the standard error of its sampling where there is one."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Paired:
    """Child minus parent on the same samples.

    Attributes:
        difference: of the two figures; for perplexities, of their logarithms (nats).
        standard_error: of the difference, from the differences of the samples.
        low, high: the 95% interval of the difference: Student's t for means, studentised bootstrap over documents
            for perplexities.
        samples: pairs.
        p_value: two-sided, of no difference: exact McNemar for figures of 0 and 1, else as the interval.
        p_holm: the same after Holm's correction over the headline figures; None beside them.
        test: "mcnemar", "t" or "bootstrap".
        gained, lost: samples that only the child, only the parent gets right; None where there is no right.
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
    """One figure of one task.

    Attributes:
        task: lm-eval's name, or "heldout" for the perplexity of held-out text.
        metric: lm-eval's name ("acc_norm", "exact_match"), or "perplexity".
        filter: lm-eval's filter; None for its default, "none".
        headline: the task's main figure; these are corrected for their number and decide the gate.
        group: of lm-eval, that the task is a part of; its own headline figure stands in place of its parts'.
        higher_is_better: the direction; None where lm-eval does not say.
        num_fewshot, version: of the task, as lm-eval has them.
        child, parent: parent is None without a baseline.
        paired: None without a baseline, or for a figure that is no mean over samples (F1, BLEU).
        damage: how much worse the child is: lost points for accuracies (0.01 is one point), relative increase for
            perplexities (0.01 is 1%). None without a baseline or a direction.
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


@dataclass(frozen=True)
class Positions:
    """Loss by position, on the same tokens. `trained` is max_position_embeddings: the child's, the parent's."""

    child: Curve
    parent: Curve | None
    trained: int | None
    parent_trained: int | None


@dataclass(frozen=True)
class Layer:
    """How far the child's activations are from the parent's: min over c of ||c child - parent|| / ||parent||, over
    all tokens. A factor counts for nothing because norms take it out; MLA folders scale their residual stream.

    `hidden` is of the residual stream behind the layer, `attention` of what the layer's attention says; both on
    each model's own inputs, so that errors of earlier layers are in them.
    """

    layer: int
    hidden: float
    attention: float


@dataclass(frozen=True)
class Head:
    """A query head by its place."""

    layer: int
    head: int


@dataclass(frozen=True)
class Entropy:
    """Attention entropy of every query head, as a share of the most it can be (0: one token, 1: all alike).

    Attributes:
        child, parent: (layers, heads).
        collapsed, uniform: heads of the child beyond the bounds where the parent's is not.
        parent_collapsed, parent_uniform: heads of the parent beyond them.
        collapsed_below, uniform_above: the bounds.
        changed: heads whose entropy differs by more than `changed_by`.
    """

    child: tuple[tuple[float, ...], ...]
    parent: tuple[tuple[float, ...], ...]
    collapsed: tuple[Head, ...]
    uniform: tuple[Head, ...]
    parent_collapsed: tuple[Head, ...]
    parent_uniform: tuple[Head, ...]
    changed: tuple[Head, ...]
    collapsed_below: float
    uniform_above: float
    changed_by: float


@dataclass(frozen=True)
class Diagnostics:
    """Parent and child on the same tokens.

    Attributes:
        tokens: predictions compared.
        kl: mean KL(parent || child) of the next-token distributions, nats.
        kl_standard_error: over blocks of text.
        kl_p99: the 99th percentile over tokens.
        top1, top5: share of predictions with the same first token; mean share of the parent's five first tokens
            among the child's five.
        layers: errors of each layer; empty where the two differ in depth or width.
        entropy: None where the stock class does not give attention weights, or the two differ in heads.
    """

    tokens: int
    kl: float
    kl_standard_error: float | None
    kl_p99: float
    top1: float
    top5: float
    layers: tuple[Layer, ...] = ()
    entropy: Entropy | None = None


@dataclass(frozen=True)
class Writing:
    """Greedy continuations of one model.

    `repetition`: mean share of 4-grams that repeat an earlier one of the same continuation (Welleck et al. 2019,
    arXiv 1908.04319, seq-rep-4). `early_end`: share of continuations that end the text before half their length.
    """

    repetition: float
    early_end: float


@dataclass(frozen=True)
class Sample:
    """One prompt and its greedy continuations, as text."""

    prompt: str
    child: str
    parent: str | None


@dataclass(frozen=True)
class Generation:
    """What the models write.

    Attributes:
        prompts, new_tokens: how many, and tokens asked for after each.
        child, parent: parent is None without a baseline.
        agreement: mean share of the first `agreement_tokens` tokens up to the first that differs; None likewise.
        identical: share of continuations that are the same to the end; None likewise.
        complaints: what is wrong, in sentences; empty is good.
        samples: a few to read.
    """

    prompts: int
    new_tokens: int
    child: Writing
    parent: Writing | None
    agreement: float | None
    agreement_tokens: int
    identical: float | None
    complaints: tuple[str, ...]
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Acceptance:
    """The child as the draft of its parent, in transformers' assisted generation.

    Attributes:
        prompts, new_tokens: how many, and tokens asked for after each.
        draft_tokens: proposed at once.
        rate: accepted tokens / proposed tokens.
        tokens_per_step: tokens for each forward pass of the parent.
        exact: share of outputs equal to the parent's own greedy output, token for token.
    """

    prompts: int
    new_tokens: int
    draft_tokens: int
    rate: float
    tokens_per_step: float
    exact: float


@dataclass(frozen=True)
class Cell:
    """Share of passkeys retrieved at one length (tokens) and depth (share of the text before the key)."""

    length: int
    depth: float
    child: float
    parent: float | None


@dataclass(frozen=True)
class Gate:
    """One condition, whether it holds, and why, in a sentence."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Evaluation:
    """Everything.

    Attributes:
        child, parent: parent is None without a baseline.
        recipe: its name, or None where tasks were named instead.
        command: the command line that repeats this.
        settings: what was decided: tasks, num_fewshot, limit, batch_size, dtype, device, backend, seed, recipe.
        comparisons: in the order of the recipe; each task's headline figure first, a group's before its parts'.
        positions, diagnostics, generation, acceptance, passkey: None or empty where the recipe has none.
        fail_above: of the gate; None: no gate was asked for.
        gates: judged in any case; only with `fail_above` do they decide the exit code.
        seconds: wall clock by stage, in the order of the work; "parent: tasks" is missing when reused is true.
        lm_eval_seconds: of these, spent inside lm-eval.
        reused: the parent's task results were kept from an earlier run.
        versions: packages that took part.
        figures: name ("entropy", "positions", "passkey") -> PNG, relative to the report's folder.
        logs: "child", "parent" -> folder with lm-eval's own result and sample files, relative likewise.
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
    positions: Positions | None = None
    diagnostics: Diagnostics | None = None
    generation: Generation | None = None
    acceptance: Acceptance | None = None
    passkey: tuple[Cell, ...] = ()
    fail_above: float | None = None
    gates: tuple[Gate, ...] = ()
    figures: dict[str, str] = field(default_factory=dict)
    logs: dict[str, str] = field(default_factory=dict)
    schema_version: int = 1

    @property
    def passed(self) -> bool:
        """Whether every gate holds."""
        return all(gate.passed for gate in self.gates)

    @property
    def headlines(self) -> tuple[Comparison, ...]:
        """One figure for each task."""
        return tuple(one for one in self.comparisons if one.headline)

    @property
    def summary(self) -> tuple[str, ...]:
        """The answer in a few sentences."""
        from headwise.eval.report.summary import sentences

        return tuple(sentences(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain data; see the module's docstring."""
        return dataclasses.asdict(self) | {"passed": self.passed, "summary": list(self.summary)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Evaluation:
        """The evaluation that `to_dict` gave, also after a round through JSON (where NaN became None).

        Raises:
            KeyError, TypeError: the data is no evaluation.
        """
        return restore(cls, data)
