"""Passkey retrieval, against hand-made models."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.errors import HeadwiseError
from headwise.eval.tasks import passkey
from headwise.eval.tasks.passkey import make_passkey_documents, passkey_shares, solve_passkeys


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(["<end>", *alphabet])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def test_passkey_prompts_fill_their_length_and_hide_the_key_at_its_depth() -> None:
    tokenizer = byte_tokenizer()
    docs = make_passkey_documents(tokenizer, lengths=(600, 1000), depths=(0.0, 0.5, 1.0), samples=2)
    assert len(docs) == 12
    for doc in docs:
        size = len(tokenizer(f"{doc['prompt']} {doc['key']}")["input_ids"])
        assert 0.85 * doc["length"] < size <= doc["length"]
        body = doc["prompt"].removeprefix(passkey.BEGIN).removesuffix(passkey.END)
        needle = passkey.NEEDLE.format(key=doc["key"])
        place = body.index(needle) / (len(body) - len(needle))
        assert place == pytest.approx(doc["depth"], abs=0.05)
    assert docs == make_passkey_documents(tokenizer, lengths=(600, 1000), depths=(0.0, 0.5, 1.0), samples=2)
    with pytest.raises(HeadwiseError, match="A passkey prompt of 64 tokens is too short"):
        make_passkey_documents(tokenizer, lengths=(64,))


def test_a_model_that_copies_the_key_solves_it() -> None:
    tokenizer = byte_tokenizer()
    docs = make_passkey_documents(tokenizer, lengths=(400,), depths=(0.0, 1.0), samples=2)
    model = Copier(tokenizer)
    assert set(passkey_shares(solve_passkeys(model, tokenizer, docs)).values()) == {1.0}
    wrong = [doc | {"key": "00000"} for doc in docs]
    assert set(passkey_shares(solve_passkeys(model, tokenizer, wrong)).values()) == {0.0}


class Copier(torch.nn.Module):
    """Continues with what followed the earlier "pass key is", as an induction head would."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(()))
        self.cue = tokenizer("pass key is")["input_ids"]
        self.size = len(tokenizer)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        text = input_ids[0].tolist()
        cue = len(self.cue)
        starts = [i + cue for i in range(len(text) - cue + 1) if text[i : i + cue] == self.cue]
        first, last = starts[0], starts[-1]
        logits = torch.zeros(1, len(text), self.size)
        for at in range(last - 1, len(text)):
            logits[0, at, text[first + at - last + 1]] = 1
        return SimpleNamespace(logits=logits)


def test_lm_eval_runs_the_task_offline_and_agrees_with_solve(tmp_path: Path) -> None:
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    model.forward = Copier(tokenizer).forward
    metadata = {"tokenizer": str(tmp_path), "lengths": [300, 400], "depths": [0.0, 1.0], "samples": 1}
    manager = TaskManager(
        include_path=str(Path(passkey.__file__).parent), include_defaults=False, metadata=metadata
    )
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", max_length=512, batch_size=1)
    found = lm_eval.simple_evaluate(
        lm, tasks=["headwise_passkey"], task_manager=manager, log_samples=True, bootstrap_iters=0
    )
    logged = passkey_shares(found["samples"]["headwise_passkey"])
    docs = make_passkey_documents(tokenizer, (300, 400), (0.0, 1.0), 1)
    assert logged == passkey_shares(solve_passkeys(model, tokenizer, docs))
    assert set(logged.values()) == {1.0}
    assert [s["doc"]["prompt"] for s in found["samples"]["headwise_passkey"]] == [doc["prompt"] for doc in docs]
