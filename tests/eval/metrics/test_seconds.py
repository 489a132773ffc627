"""The forecast of the time of an evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from headwise.eval.metrics import seconds
from headwise.eval.metrics.inputs import EvalInputs
from headwise.eval.metrics.seconds import REST_SECONDS, forecast_seconds
from headwise.eval.model import find_model
from headwise.eval.settings import EvalRecipe, EvalSettings
from tests.convert.speaking import save_speaking

RECIPE = EvalRecipe(about="Text.", tasks=["a"])


def choice_task(questions: int) -> Any:
    return SimpleNamespace(
        eval_docs=[{"q": "x" * 40}] * questions,
        OUTPUT_TYPE="multiple_choice",
        config=SimpleNamespace(num_fewshot=None, generation_kwargs=None),
        doc_to_text=lambda doc: doc["q"],
        doc_to_choice=lambda doc: [" yes", " no"],
    )


def test_the_forecast_counts_questions_models_and_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seconds, "_matrix_rate", lambda _: 1e9)
    monkeypatch.setattr(seconds.compat, "lm_eval_num_questions", lambda task, limit: limit or len(task.eval_docs))
    model = find_model(save_speaking(tmp_path / "model", max_position_embeddings=64))
    tokenizer = model.load_tokenizer()
    settings = EvalSettings().resolve(RECIPE, "cpu")

    def forecast(questions: int, models: int = 1, limit: int | None = None, blocks: int = 0) -> float:
        inputs = EvalInputs(blocks=torch.zeros(blocks, 32) if blocks else None)
        tasks = [SimpleNamespace(get_all_tasks=lambda: [choice_task(questions)])]  # a group
        given = replace(settings, limit=limit)
        total = forecast_seconds(RECIPE, given, tasks, inputs, [model] * models, tokenizer)
        assert total is not None
        return total - REST_SECONDS

    loading = forecast(0)
    one = forecast(50) - loading
    # 50 questions with two answers of 41 to 45 bytes, a token each, at half of the rate.
    parameters = model.subject.parameters
    assert parameters and one == pytest.approx(2 * parameters * 50 * 87 / 0.5e9, rel=0.05)
    assert forecast(100) - loading == pytest.approx(2 * one)
    assert forecast(100, limit=25) - loading == pytest.approx(one / 2)
    assert forecast(50, models=2) == pytest.approx(2 * forecast(50))
    assert forecast(50, blocks=8) - forecast(50) == pytest.approx(2 * parameters * 8 * 32 / 0.5e9)


def test_what_cannot_be_counted_has_no_forecast(tmp_path: Path) -> None:
    model = find_model(save_speaking(tmp_path / "model", max_position_embeddings=64))
    settings = EvalSettings(device="cpu").resolve(RECIPE, "cpu")
    tokenizer = model.load_tokenizer()
    broken = choice_task(3)
    broken.doc_to_text = None
    assert forecast_seconds(RECIPE, settings, [broken], EvalInputs(), [model], tokenizer) is None
    unknown = replace(model, subject=replace(model.subject, parameters=None))
    assert forecast_seconds(RECIPE, settings, [], EvalInputs(), [unknown], tokenizer) is None
