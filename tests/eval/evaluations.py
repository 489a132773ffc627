"""Invented evaluations for the tests of reports and verdicts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from headwise.eval.result import (
    Comparison,
    Continuation,
    DraftAcceptance,
    Evaluation,
    Gate,
    GenerationComparison,
    Paired,
    PasskeyCell,
    PositionComparison,
    Score,
    Subject,
    TextQuality,
)
from headwise.measure.divergence import Divergence, LayerError
from headwise.measure.entropy import AttentionEntropy, HeadIndex
from headwise.measure.positions import PositionLoss

CHILD = Subject("out/gqa-4", None, "llama", "GQA, 4 KV heads", 8_192, 4_540_000, "ab" * 32)
PARENT = Subject("org/parent", "c0ffee" * 6 + "abcd", "llama", "MHA, 8 KV heads", 16_384, 4_900_000, "cd" * 32)


def accuracy(task: str, parent: float, difference: float, error: float, p: float, **more: Any) -> Comparison:
    """A task of 1,000 questions."""
    gained = 40
    pair = Paired(
        difference, error, difference - 1.96 * error, difference + 1.96 * error, 1000, p, "score",
        more.pop("p_holm", p), gained, gained - round(1000 * difference),
    )  # fmt: skip
    fields = {"filter": None, "headline": True, "group": None, "num_fewshot": 0, "version": "1.0"} | more
    return Comparison(
        task=task, metric=more.get("metric", "acc_norm"), higher_is_better=True, samples=1000,
        child=Score(parent + difference, 0.015), parent=Score(parent, 0.015), paired=pair, damage=-difference,
        **{key: value for key, value in fields.items() if key != "metric"},
    )  # fmt: skip


def perplexity(nats: float, error: float, p: float = 0.0001) -> Comparison:
    """Held-out text."""
    pair = Paired(nats, error, nats - 2 * error, nats + 2 * error, 128, p, "bootstrap", p)
    return Comparison(
        task="heldout", metric="perplexity", filter=None, headline=True, group=None, higher_is_better=False,
        num_fewshot=None, version=None, samples=128, child=Score(5.92 * math.exp(nats), 0.04),
        parent=Score(5.92, 0.04), paired=pair, damage=math.expm1(nats),
    )  # fmt: skip


def entropy() -> AttentionEntropy:
    parent = tuple(tuple(0.2 + 0.6 * ((3 * layer + head) % 8) / 8 for head in range(8)) for layer in range(6))
    child = tuple(tuple(min(0.995, x + 0.1 * (head % 3)) for head, x in enumerate(row)) for row in parent)
    heads = (HeadIndex(2, 5), HeadIndex(4, 1))
    return AttentionEntropy(
        child, parent, (HeadIndex(1, 7),), heads, (), (HeadIndex(0, 0),), heads, 0.05, 0.95, 0.2
    )


def full() -> Evaluation:
    """Everything is measured; the loss is significant."""
    curve = [2.4 - 0.5 * math.log1p(step) / 3 for step in range(16)]
    return Evaluation(
        child=CHILD,
        parent=PARENT,
        recipe="standard",
        command="headwise eval out/gqa-4 --baseline org/parent@c0ffee --recipe standard --seed 0",
        settings={
            "tasks": ["arc_easy", "mmlu"],
            "limit": None,
            "recipe": {"perplexity": {"text": "builtin", "blocks": 48}, "online": [], "limit": None},
            "batch_size": 8,
            "device": "cpu",
        },
        comparisons=(
            perplexity(0.031, 0.002),
            accuracy("arc_easy", 0.431, -0.029, 0.0056, 0.0004),
            accuracy("arc_easy", 0.44, -0.02, 0.0056, 0.01, headline=False, p_holm=None, metric="acc"),
            accuracy("hellaswag", 0.512, -0.004, 0.004, 0.31),
            accuracy("a_task_with_a_remarkably_long_name", 0.30, 0.021, 0.006, 0.004),
            accuracy("mmlu", 0.262, 0.001, 0.005, 0.8),
            accuracy("mmlu_anatomy", 0.25, 0.01, 0.03, 0.7, headline=False, group="mmlu", p_holm=None),
            accuracy("gsm8k", 0.05, 0.0, 0.002, 1.0, filter="strict-match", num_fewshot=5, metric="exact_match"),
        ),
        seconds={"parent: tasks": 61.2, "child: tasks": 58.0, "diagnostics": 9.5},
        lm_eval_seconds=119.2,
        versions={"headwise": "0.1.0", "lm_eval": "0.4.13", "torch": "2.13.0"},
        positions=PositionComparison(
            PositionLoss(tuple(x + 0.05 for x in curve), 64, 65_536),
            PositionLoss(tuple(curve), 64, 65_536),
            2048,
            2048,
        ),
        diagnostics=Divergence(
            tokens=65_536,
            kl=0.0412,
            kl_standard_error=0.0008,
            kl_p99=0.61,
            top1=0.9123,
            top5=0.9345,
            layers=tuple(LayerError(i, 0.02 + 0.01 * i, 0.08 - 0.005 * i) for i in range(6)),
            entropy=entropy(),
        ),
        generation=GenerationComparison(
            16,
            64,
            TextQuality(0.12, 0.02),
            TextQuality(0.11, 0.01),
            0.83,
            32,
            0.44,
            (),
            (
                Continuation("def main():\n    ", "return 0\n\n\ndef other():\n    pass", "return 1"),
                Continuation("The ", "cat", "dog"),
            ),
        ),
        acceptance=DraftAcceptance(16, 64, 5, 0.871, 4.61),
        passkey=tuple(
            PasskeyCell(length, depth, 1.0 if length < 2048 else 0.4 + depth / 2, 1.0)
            for length in (512, 1024, 2048)
            for depth in (0.0, 0.5, 1.0)
        ),
        fail_above=None,
        gates=(
            Gate("arc_easy acc_norm", False, "0.029 lost, above 0.01 (p 0.001)."),
            Gate("heldout perplexity", True, "within 5%."),
        ),
    )


def unharmed() -> Evaluation:
    """No significant loss."""
    rows = (perplexity(0.001, 0.002, 0.6), accuracy("arc_easy", 0.431, -0.001, 0.003, 0.8))
    return replace(full(), comparisons=rows, gates=())


def identical() -> Evaluation:
    """Parent and child are one model."""
    return replace(
        full(), comparisons=(perplexity(0.0, 0.0, 1.0), accuracy("arc_easy", 0.431, 0.0, 0.0, 1.0)), gates=()
    )


def alone() -> Evaluation:
    """No parent, no diagnostics."""
    row = replace(accuracy("arc_easy", 0.431, 0.0, 0.0, 1.0), parent=None, paired=None, damage=None)
    return replace(
        full(), parent=None, comparisons=(row,), positions=None, diagnostics=None, acceptance=None, passkey=(),
        gates=(), generation=None,
    )  # fmt: skip


def only(*comparisons: Comparison) -> Evaluation:
    """The full evaluation with other figures and without gates."""
    return replace(full(), comparisons=comparisons, gates=())


def equal_answers() -> Comparison:
    """Twenty questions with equal answers."""
    comparison = accuracy("arc_easy", 0.4, 0.0, 0.0, 1.0)
    assert comparison.paired is not None
    return replace(
        comparison, samples=20, paired=replace(comparison.paired, low=-0.139, high=0.139), detectable=0.3
    )


def few_answers() -> Comparison:
    """Five questions, which cannot show a loss."""
    return replace(equal_answers(), samples=5, detectable=None)


def broken() -> Evaluation:
    """The generated text has a defect."""
    base = full().generation
    assert base is not None
    generation = replace(base, complaints=("The output repeats itself: 61% of its 4-grams, 11% in the parent's.",))
    return replace(unharmed(), generation=generation)
