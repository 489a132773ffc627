"""Each private API of a dependency does what `headwise.compat` needs of it."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.utils import logging

from headwise import compat


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_cache_argument_passes_the_cache(model: Any) -> None:
    cache = DynamicCache(config=model.config)
    tokens = torch.arange(6)[None]
    model(tokens[:, :4], **compat.cache_argument(model, cache))
    assert cache.get_seq_length() == 4
    rest = model(tokens[:, 4:], **compat.cache_argument(model, cache)).logits
    torch.testing.assert_close(rest, model(tokens, use_cache=False).logits[:, 4:])


def test_every_name_has_the_place_that_the_loader_gives_it(model: Any) -> None:
    names = ["model.layers.0.mlp.up_proj.weight", "layers.1.mlp.up_proj.weight", "lm_head.weight"]
    strange = ["model.layers.2.mlp.up_proj.weight", "module.model.norm.weight"]
    places = compat.places_of(model, [*names, *strange])
    assert [places[name] for name in names] == [names[0], f"model.{names[1]}", names[2]]
    assert [places[name] for name in strange] == [None, None]


@torch.no_grad()
@pytest.mark.filterwarnings("error::FutureWarning")
def test_cache_of_returns_the_cache_of_an_output(model: Any) -> None:
    cache = compat.cache_of(model(torch.arange(6)[None], use_cache=True))
    assert cache.get_seq_length() == 6
    generated = model.generate(torch.arange(6)[None], max_new_tokens=2, return_dict_in_generate=True)
    assert compat.cache_of(generated).get_seq_length() == 7


@torch.no_grad()
def test_a_static_cache_is_allocated_and_filled_without_a_forward_pass(model: Any) -> None:
    shaped = StaticCache(config=model.config, max_cache_len=4)
    model(torch.zeros(1, 1, dtype=torch.long), **compat.cache_argument(model, shaped))
    cache = StaticCache(config=model.config, max_cache_len=10)
    compat.allocate_static_cache(cache, shaped, batch=3)
    tensors = compat.cache_tensors(cache)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 2, 10, 4)] * 4
    compat.fill_static_cache(cache, 6)
    assert cache.get_seq_length() == 6 and all(bool((tensor != 0).all()) for tensor in tensors)
    before = [tensor.clone() for tensor in tensors]
    model(torch.ones(3, 1, dtype=torch.long), **compat.cache_argument(model, cache))
    assert cache.get_seq_length() == 7
    for tensor, old in zip(compat.cache_tensors(cache), before, strict=True):
        changed = (tensor != old).any(-1).any(1).any(0)
        assert changed.tolist() == [place == 6 for place in range(10)]


class _OldRotary(torch.nn.Module):
    """A rotary module that takes position ids with three axes only, as in transformers 5.16."""

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> None:
        self.length = int(position_ids[:, :, None, :].max()) + 1


def test_run_rotary_gives_a_module_the_position_ids_that_it_takes(model: Any) -> None:
    old = _OldRotary()
    compat.run_rotary(old, 7)
    assert old.length == 8
    compat.run_rotary(model.model.rotary_emb, 7)


@pytest.mark.parametrize("hub_bars", [True, False])
@pytest.mark.parametrize("bars", [True, False])
def test_no_progress_bars_restores_the_settings_of_the_user(bars: bool, hub_bars: bool) -> None:
    before = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()

    def switch(bars: bool, hub_bars: bool) -> None:
        (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
        (enable_progress_bars if hub_bars else disable_progress_bars)()

    try:
        switch(bars, bars and hub_bars)
        with compat.no_progress_bars():
            assert not logging.is_progress_bar_enabled() and are_progress_bars_disabled()
        assert logging.is_progress_bar_enabled() == bars
        assert are_progress_bars_disabled() == (not (bars and hub_bars))
    finally:
        switch(*before)


def test_lm_eval_takes_a_number_or_a_share_of_the_questions() -> None:
    pytest.importorskip("lm_eval")
    task = SimpleNamespace(eval_docs=range(10))
    counts = [compat.lm_eval_num_questions(task, limit) for limit in (None, 3, 0.25, 100)]
    assert counts == [10, 3, 3, 10]


def test_lm_eval_takes_the_ranks_of_accelerate() -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    lm = HFLM.__new__(HFLM)
    lm._rank, lm._world_size = 0, 1
    lm.accelerator = SimpleNamespace(process_index=2, num_processes=3)
    compat.set_lm_eval_ranks(lm)
    assert (lm.rank, lm.world_size) == (2, 3)
    compat.set_lm_eval_ranks(SimpleNamespace())  # a model without accelerate


def test_every_answer_of_lm_eval_is_reported(model: Any) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"<end>": 0, "a": 1, "b": 2}, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    lm = HFLM(pretrained=model, tokenizer=fast, device="cpu", max_length=16, batch_size=2)
    answers: list[Any] = []
    compat.on_lm_eval_answer(lm, lambda *answer: answers.append(answer))
    requests = [Instance("loglikelihood", {}, ("a b", text), 0) for text in (" a", " b", " a b")]
    results = lm.loglikelihood(requests, disable_tqdm=True)
    expected = [("loglikelihood", r.args, result) for r, result in zip(requests, results, strict=True)]
    assert sorted(answers) == sorted(expected)


def test_git_is_silent_inside_lm_eval(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval import evaluator

    original = evaluator.get_git_commit_hash

    def complain() -> str:
        os.write(2, b"fatal: not a git repository\n")
        return "hash"

    evaluator.get_git_commit_hash = complain
    try:
        with compat.silent_lm_eval_git():
            assert evaluator.get_git_commit_hash() == "hash"
        assert capfd.readouterr().err == "" and evaluator.get_git_commit_hash is complain
        evaluator.get_git_commit_hash()
        assert "fatal" in capfd.readouterr().err
    finally:
        evaluator.get_git_commit_hash = original
