"""Speculative acceptance: what the assisted generation of transformers accepts, without generating drafts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from headwise.eval.metrics.acceptance import count_accepted, measure_acceptance
from headwise.eval.metrics.generation import write_continuations
from tests.convert.speaking import save_speaking

PROMPTS = torch.randint(1, 257, (6, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("models") / "parent", max_position_embeddings=128)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_a_model_accepts_all_of_its_own_drafts(model: Any, folder: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    result = measure_acceptance(twin, model, PROMPTS[:3], new_tokens=10, draft_tokens=4)
    assert result.rate == 1
    assert result.tokens_per_step == 5  # four accepted and one of the parent's own


def test_a_strange_draft_is_accepted_as_assisted_generation_accepts_it(model: Any, folder: Path) -> None:
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        noise = torch.randn(
            other.model.layers[1].mlp.down_proj.weight.shape, generator=torch.Generator().manual_seed(5)
        )
        other.model.layers[1].mlp.down_proj.weight.add_(0.3 * noise)
    result = measure_acceptance(other, model, PROMPTS[:3], new_tokens=21, draft_tokens=4)
    assert 0 < result.rate < 0.9
    other.generation_config.num_assistant_tokens = 4
    other.generation_config.num_assistant_tokens_schedule = "constant"
    other.generation_config.assistant_confidence_threshold = 0.0
    passes: list[int] = []
    model.register_forward_pre_hook(lambda *_: passes.append(1))
    for prompt in PROMPTS[:3].split(1):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), assistant_model=other)
    assert result.tokens_per_step == 3 * 21 / len(passes)


def test_an_end_among_the_drafts_costs_no_acceptance(model: Any, folder: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = write_continuations(model, PROMPTS[:1], 8)[0]
    for one in (model, twin):
        one.generation_config.eos_token_id = written[2]
    result = measure_acceptance(twin, model, PROMPTS[:1], new_tokens=8, draft_tokens=4)
    assert result.rate == 1


def test_accepted_tokens_are_counted_up_to_the_first_difference_and_the_end() -> None:
    text = [1, 2, 3, 4, 5, 6, 7]
    # 4 and 1 are the verifying model's; only two tokens are left for the last draft.
    assert count_accepted(text, text, 3) == (6, 6, 2)
    # 1 is accepted, 2 is not; 3 and 4 are accepted, 5 is not; 6 and 7 are accepted.
    assert count_accepted(text, [1, 9, 3, 4, 9, 6, 7], 3) == (5, 8, 3)
    assert count_accepted(text, [9] * 7, 2) == (0, 13, 7)
    assert count_accepted([], [], 3) == (0, 0, 0)
