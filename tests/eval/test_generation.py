"""Continuations: what counts as repeating, breaking off and going on as the parent does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.eval.metrics import generation
from headwise.eval.metrics.acceptance import acceptance
from headwise.eval.metrics.generation import continuations, judge, repetition
from tests.convert.speaking import save_speaking

PROMPTS = torch.randint(1, 257, (6, 8), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("models") / "parent", max_position_embeddings=128)


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def judged(child: list[list[int]], parent: list[list[int]] | None, new_tokens: int = 20) -> Any:
    prompts = torch.ones(len(child), 4, dtype=torch.long)
    return judge(prompts, child, parent, new_tokens, Spelled())


class Spelled:
    def decode(self, tokens: Any) -> str:
        return " ".join(map(str, tokens))


def test_repetition_is_the_share_of_four_grams_seen_before() -> None:
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0
    assert repetition([1] * 11) == pytest.approx(7 / 8)
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([1, 2]) == 0


def varied(seed: int, length: int = 20) -> list[int]:
    return torch.randperm(1000, generator=torch.Generator().manual_seed(seed))[:length].tolist()


def test_the_same_words_raise_no_complaint() -> None:
    rows = [varied(seed) for seed in range(8)]
    found = judged(rows, rows)
    assert found.complaints == () and found.agreement == 1 and found.identical == 1
    assert found.child == found.parent and found.samples[0].child == found.samples[0].parent


def test_a_loop_is_called_so() -> None:
    parent = [varied(seed) for seed in range(8)]
    child = [row[:8] + [5] * 12 for row in parent]
    (complaint,) = judged(child, parent).complaints
    assert complaint.startswith("It repeats itself: ") and complaint.endswith("same text, 0% of its parent's.")
    assert judged(parent, child).complaints == ()  # better than its parent


def test_breaking_off_is_called_so() -> None:
    parent = [varied(seed) for seed in range(8)]
    (complaint,) = judged([row[:8] for row in parent], parent).complaints
    assert complaint == "It breaks off: 100% of its texts end before half their length, 0% of its parent's."


def test_going_another_way_at_once_is_called_so() -> None:
    parent = [varied(seed) for seed in range(8)]
    child = [[token + 1000 for token in row] for row in parent]
    found = judged(child, parent)
    assert found.agreement == 0 and "they part after 0.0 of 8 tokens" in found.complaints[0]
    late = [row[:6] + other[6:] for row, other in zip(parent, child, strict=True)]
    assert judged(late, parent).complaints == () and judged(late, parent).agreement == 6 / 8


def test_one_unlucky_prompt_is_no_evidence() -> None:
    parent = [varied(seed) for seed in range(8)]
    child = [[5] * 20, *parent[1:]]
    assert judged(child, parent).complaints == ()


def test_without_a_parent_only_the_plainly_broken_is_called_so() -> None:
    assert judged([varied(seed) for seed in range(4)], None).complaints == ()
    assert "repeats itself" in judged([[5] * 40] * 4, None, 40).complaints[0]
    assert "breaks off: 100% of its texts end before half their length." in judged([[5]] * 4, None).complaints[0]


def test_continuations_are_greedy_whatever_the_folder_asks_for(model: Any) -> None:
    model.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=5.0)
    found = continuations(model, PROMPTS, 6)
    with torch.no_grad():
        for prompt, written in zip(PROMPTS, found, strict=True):
            text = prompt
            for token in written:
                assert int(model(text[None]).logits[0, -1].argmax()) == token
                text = torch.cat([text, torch.tensor([token])])


def test_continuations_stop_at_the_end_of_their_text(model: Any) -> None:
    first = continuations(model, PROMPTS[:1], 4)[0]
    model.generation_config.eos_token_id = first[1]
    assert continuations(model, PROMPTS[:1], 4) == [first[: first.index(first[1]) + 1]]


def test_a_model_accepts_all_of_its_own_drafts(model: Any, folder: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = acceptance(twin, model, PROMPTS[:3], new_tokens=10, draft_tokens=4)
    assert found.rate == 1 and found.exact == 1
    assert found.tokens_per_step == 5  # four accepted and one of the parent's own


def test_a_strange_draft_is_refused_and_the_output_stays_exact(model: Any, folder: Path) -> None:
    stranger = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        stranger.model.layers[1].mlp.down_proj.weight.normal_(generator=torch.Generator().manual_seed(5))
    found = acceptance(stranger, model, PROMPTS[:3], new_tokens=10, draft_tokens=4)
    assert found.rate < 0.5 and found.exact == 1
    assert found.tokens_per_step == pytest.approx(1 + 4 * found.rate, abs=0.6)


def test_an_end_among_the_drafts_costs_no_acceptance(model: Any, folder: Path) -> None:
    twin = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    written = continuations(model, PROMPTS[:1], 8)[0]
    for one in (model, twin):
        one.generation_config.eos_token_id = written[2]
    found = acceptance(twin, model, PROMPTS[:1], new_tokens=8, draft_tokens=4)
    assert found.rate == 1 and found.exact == 1


def test_prompts_are_held_out_text(folder: Path) -> None:
    found = generation.prompts_of(AutoTokenizer.from_pretrained(folder), 3, 16, seed=0)
    assert found.shape == (3, 16)
    assert torch.equal(found, generation.prompts_of(AutoTokenizer.from_pretrained(folder), 3, 16, seed=0))
