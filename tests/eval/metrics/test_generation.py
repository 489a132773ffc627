"""Continuations: greedy decoding, and the defects repetition, early ends and disagreement."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.eval.metrics.generation import assess_generation, repetition, select_prompts, write_continuations
from headwise.eval.result import GenerationComparison
from tests.convert.speaking import save_speaking

PROMPTS = torch.randint(1, 257, (6, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("models") / "parent", max_position_embeddings=128)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assess(child: list[list[int]], parent: list[list[int]] | None, new_tokens: int = 20) -> GenerationComparison:
    prompts = torch.ones(len(child), 4, dtype=torch.long)
    return assess_generation(prompts, child, parent, new_tokens, NumberTokenizer())


class NumberTokenizer:
    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


def test_repetition_is_the_share_of_repeated_4_grams() -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repetition([1] * 11) == pytest.approx(7 / 8)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2]) == 0


def varied(seed: int, length: int = 20) -> list[int]:
    return torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:length].tolist()


def test_equal_continuations_have_no_defect() -> None:
    rows = [varied(seed) for seed in range(8)]
    result = assess(rows, rows)
    assert result.complaints == () and result.agreement == 1 and result.identical == 1
    assert result.child == result.parent and result.samples[0].child == result.samples[0].parent


def test_repetition_is_a_defect() -> None:
    parent = [varied(seed) for seed in range(8)]
    child = [row[:8] + [5] * 12 for row in parent]
    (complaint,) = assess(child, parent).complaints
    assert complaint.startswith("The output repeats itself: ") and complaint.endswith(
        "same text, 0% in the parent's."
    )
    assert assess(parent, child).complaints == ()  # better than its parent


def test_early_ends_are_a_defect() -> None:
    parent = [varied(seed) for seed in range(8)]
    (complaint,) = assess([row[:8] for row in parent], parent).complaints
    assert complaint == (
        "The output ends early: 100% of the continuations have less than half of the requested length, "
        "0% in the parent's."
    )


def test_a_difference_from_the_first_token_is_a_defect() -> None:
    parent = [varied(seed) for seed in range(8)]
    child = [[token + 1000 for token in row] for row in parent]
    result = assess(child, parent)
    assert result.agreement == 0 and "0.0 of the first 8 tokens agree" in result.complaints[0]
    late = [row[:6] + other[6:] for row, other in zip(parent, child, strict=True)]
    assert assess(late, parent).complaints == () and assess(late, parent).agreement == 6 / 8


def test_one_prompt_is_no_evidence() -> None:
    parent = [varied(seed) for seed in range(8)]
    child = [[5] * 20, *parent[1:]]
    assert assess(child, parent).complaints == ()


def test_without_a_parent_only_strong_defects_count() -> None:
    assert assess([varied(seed) for seed in range(4)], None).complaints == ()
    assert "repeats itself" in assess([[5] * 40] * 4, None, 40).complaints[0]
    assert (
        "100% of the continuations have less than half of the requested length."
        in assess([[5]] * 4, None).complaints[0]
    )


def test_continuations_are_greedy_for_any_generation_config(model: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    result = write_continuations(model, PROMPTS, 6)
    with torch.no_grad():
        for prompt, written in zip(PROMPTS, result, strict=True):
            text = prompt
            for token in written:
                assert int(model(text[None]).logits[0, -1].argmax()) == token
                text = torch.cat([text, torch.tensor([token])])


def test_continuations_stop_at_the_end_of_their_text(model: Any) -> None:
    first = write_continuations(model, PROMPTS[:1], 4)[0]
    model.generation_config.eos_token_id = first[1]
    assert write_continuations(model, PROMPTS[:1], 4) == [first[: first.index(first[1]) + 1]]


def test_prompts_are_held_out_text(folder: Path) -> None:
    result = select_prompts(AutoTokenizer.from_pretrained(folder), 3, 16, seed=0)
    assert result.shape == (3, 16)
    assert torch.equal(result, select_prompts(AutoTokenizer.from_pretrained(folder), 3, 16, seed=0))
