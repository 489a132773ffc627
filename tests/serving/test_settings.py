"""The settings of a serving forecast."""

from __future__ import annotations

from typing import Any

import pytest

from headwise.errors import SettingError
from headwise.serving.settings import ServingSettings


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"engines": ["vLLM"]}, "engines", "Did you mean"),
        ({"tp": 0}, "tp", "whole number"),
        ({"dcp": 2}, "dcp", "does not divide `tp` 1"),
        ({"tp": 8, "dcp": 3}, "dcp", "does not divide `tp` 8"),
        ({"memory": "much"}, "memory", "a size such as 80GB"),
        ({"memory": True}, "memory", "a size such as 80GB"),
        ({"cache_dtype": "int4"}, "cache_dtype", "one of bf16, fp8"),
        ({"card": "h101"}, "card", "Did you mean"),
        ({"engines": "llama.cpp", "cache_dtype": "fp8"}, "cache_dtype", "llama.cpp has no FP8 cache"),
        (
            {"memory": "80"},
            "memory",
            "80 bytes, which is less than 1 GB. Give at least 1 GB with its unit, such as 80GB.",
        ),
        ({"memory": 80}, "memory", "80 bytes"),
    ],
)
def test_refusals(values: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(SettingError) as caught:
        ServingSettings(**values)
    assert caught.value.field == field
    assert words in f"{caught.value.message} {caught.value.hint}"


def test_a_far_name_is_no_suggestion() -> None:
    with pytest.raises(SettingError) as caught:
        ServingSettings(engines=["tensorrt"])
    assert caught.value.hint is None


def test_a_forecast_is_made_where_it_is_wanted() -> None:
    assert not ServingSettings().forecasts and not ServingSettings(engines="vllm").forecasts
    assert ServingSettings(tp=2).forecasts and ServingSettings(memory="80GB").memory == 80_000_000_000
