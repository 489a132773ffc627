"""The verdict: its tone, its words, and the damage behind it."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import pytest

from headwise.eval.result import Evaluation
from headwise.eval.verdict import Damage, format_amount, verdict_of
from tests.eval.evaluations import (
    PARENT,
    accuracy,
    alone,
    broken,
    equal_answers,
    few_answers,
    full,
    identical,
    only,
    perplexity,
    unharmed,
)


@pytest.mark.parametrize(
    ("evaluation", "tone", "words"),
    [
        (
            full(),
            "bad",
            r"50% of the parent's KV cache: a significant loss in 2 of 8 .* held-out perplexity is 3\.1% worse",
        ),
        (
            replace(full(), fail_above=0.01),
            "bad",
            r"fails the gate of 1% in 1 of 8 figures; arc_easy is 2\.9 points worse",
        ),
        (
            broken(),
            "bad",
            r"cache: the output is broken\. The output repeats itself: 61% of its 4-grams, 11% in the parent's\. "
            "Train it with",
        ),
        (unharmed(), "good", r"no significant loss, and a loss above 0\.69 points in arc_easy is unlikely"),
        (identical(), "good", "every figure equals the parent's"),
        (
            only(equal_answers()),
            "open",
            r"up to 13\.9 points in arc_easy\. 20 items could not .* below 30\.0 points",
        ),
        (only(few_answers()), "open", r"5 items could not show a loss of any size"),
        (
            only(accuracy("lambada", 0.4, -0.01, 0.02, 0.6), replace(perplexity(5.92, 0.5), task="lambada")),
            "bad",
            r"in 1 of 2 figures; lambada perplexity is 372 times the parent's \(95% interval 137 to 1,012\)",
        ),
        (
            only(replace(equal_answers(), unfit="the parent has 25%, and a guess has 25%")),
            "open",
            r"could not be measured\. arc_easy cannot show a loss: the parent has 25%",
        ),
        (alone(), "plain", "No parent was measured.*`baseline`"),
        (
            only(accuracy("arc_easy", 0.4, -0.01, 0.02, 0.6)),
            "open",
            r"do not rule out a loss of up to 4\.9 points in arc_easy",
        ),
        (
            only(perplexity(0.004, 0.001)),
            "open",
            r"small but significant loss; held-out perplexity is 0\.4% worse",
        ),
        (only(), "plain", r"predicts the parent's next token in 91\.2% of predictions"),
        (replace(only(perplexity(0.1, 0.01)), child=PARENT), "bad", "^A significant loss;"),
    ],
)
def test_tone_and_words(evaluation: Evaluation, tone: str, words: str) -> None:
    verdict = verdict_of(evaluation)
    assert verdict.tone == tone and re.search(words, verdict.text), verdict


def test_a_perplexity_that_doubles_is_a_factor() -> None:
    words = [format_amount(perplexity(5.92, 0.5), value) for value in (0.004, 0.99, 1.0, 3986)]
    assert words == ["0.4%", "99.0%", "a factor of 2", "a factor of 3,987"]
    assert format_amount(accuracy("arc_easy", 0.4, -0.01, 0.02, 0.6), 0.139) == "13.9 points"


def test_a_larger_damage_is_worse() -> None:
    worse = Damage.of(accuracy("arc_easy", 0.4, -0.03, 0.01, 0.01))
    assert worse and (worse.value, worse.low, worse.high) == pytest.approx((0.03, 0.0104, 0.0496))
    higher = Damage.of(perplexity(0.031, 0.002))
    assert higher and (higher.value, higher.low) == pytest.approx((math.expm1(0.031), math.expm1(0.027)))
