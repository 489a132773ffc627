"""The result as data: its summary, and a round trip through JSON."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from headwise.eval.result import Evaluation, bounded_exp, growth
from headwise.format import plain
from tests.eval.evaluations import alone, full, identical, unharmed


@pytest.mark.parametrize("evaluation", [full(), unharmed(), identical(), alone()])
def test_a_round_trip_through_json_changes_nothing(evaluation: Evaluation) -> None:
    data = json.loads(json.dumps(plain(evaluation)))
    assert Evaluation.from_dict(data) == evaluation
    assert data["passed"] == evaluation.passed and data["summary"] == list(evaluation.summary)


def test_the_summary_names_significant_figures_agreement_cache_and_failed_gates() -> None:
    worse, better, others, agreement, drafts, cache, gate = full().summary
    assert worse.startswith(
        "Significantly worse: heldout perplexity 5.92 -> 6.106 (+0.0310 nats, 95% +0.0270 to +0.0350)"
    )
    assert "arc_easy acc_norm 43.1% -> 40.2% (-2.9 points, 95% -4.0 to -1.8)" in worse
    assert better.startswith("Significantly better: a_task_with_a_remarkably_long_name")
    assert others == "No significant difference in 5 of 8 figures."
    assert "91.2% of 65,536 predictions (KL 0.0412 nats)" in agreement and "87.1%" in drafts
    assert cache == "KV cache: 16,384 -> 8,192 bytes per token (50.0%)."
    assert gate == "Gate arc_easy acc_norm fails: 0.029 lost, above 0.01 (p 0.001)."


def test_parts_that_were_not_measured_have_no_sentence() -> None:
    assert replace(alone(), comparisons=()).summary == ()


def test_a_broken_model_has_a_finite_perplexity() -> None:
    assert growth(1e6) == bounded_exp(1e6) - 1 < float("inf")
    assert growth(0.5) == pytest.approx(bounded_exp(0.5) - 1)
