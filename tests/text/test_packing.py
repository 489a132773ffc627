"""Rows hold every token, and a document in a row is what it would be alone."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import AutoTokenizer, DataCollatorWithFlattening, DeepseekV3Config, DeepseekV3ForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL
from headwise.text.marks import BEGINS, tokens_of
from headwise.text.packing import Collator, collator, encode, pack, separates_documents
from tests import tiny_models

END = 2
DOCUMENTS = [[5, 9, 11, 7, 8, END], [20, 21, END], [30, 31, 32, 33, 34, 35, 36, 37, 38, END], [40, 41, END]]
ROW = torch.tensor([t | BEGINS * (i == 0) for document in DOCUMENTS for i, t in enumerate(document)])
TOKENS = tokens_of(ROW)
# Position ids of these classes do not reach the mask.
FALCON_LEAKS = Version(transformers.__version__) < Version("5.24")
LEAKING = {"qwen2_vl", "qwen2_5_vl"} | ({"falcon"} if FALCON_LEAKS else set())


@cache
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EMBEDDED_MODEL)


def network(model_type: str) -> Any:
    if model_type != "deepseek_v3":
        return tiny_models.build(model_type)[0]
    config = DeepseekV3Config(
        vocab_size=61,
        hidden_size=36,
        intermediate_size=40,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        num_attention_heads=3,
        num_key_value_heads=3,
        kv_lora_rank=8,
        q_lora_rank=None,
        qk_nope_head_dim=6,
        qk_rope_head_dim=4,
        v_head_dim=5,
    )
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(config).eval()


def test_packing_keeps_every_token_and_marks_every_end() -> None:
    texts = ["def f():\n    return 1\n", "é ü 漢", "x = 2\n" * 30]
    encoded = list(encode(texts, tokenizer()))
    end = tokenizer().eos_token_id
    assert [tokens[-1] for tokens in encoded] == [end] * 3
    rows = tokens_of(pack(encoded, 8))
    stream = np.concatenate(encoded)
    assert rows.flatten().tolist() == stream[: rows.numel()].tolist()
    assert len(stream) - rows.numel() < 8
    whole = rows.flatten().tolist() + stream[rows.numel() :].tolist()
    assert tokenizer().decode(whole) == "".join(text + tokenizer().eos_token for text in texts)


def test_a_first_token_opens_every_document_and_every_row() -> None:
    document = np.arange(10, 30, dtype=np.int32)
    rows = tokens_of(pack([document], 5, begin=1))
    assert rows.shape == (5, 5)
    assert rows[:, 0].tolist() == [1] * 5
    assert rows[:, 1:].flatten().tolist() == list(range(10, 30))
    # 1 10 11 | 1 10: a document that ends with a row is followed by one BOS, not two.
    two = pack([document[:4], document[:4], document[:2]], 5, begin=1)
    assert not (two & BEGINS).any()
    assert two.tolist() == [[1, 10, 11, 12, 13], [1, 10, 11, 12, 13]]
    close = pack([document[:3], document[:7]], 5, begin=1)
    assert close.tolist() == [[1, 10, 11, 12, 1 | BEGINS], [1, 10, 11, 12, 13]]
    assert pack([], 5, begin=1).shape == (0, 5)


def test_every_token_predicts_the_next_of_its_document() -> None:
    batch = Collator(True)([ROW, TOKENS])
    assert batch["position_ids"][0].tolist() == [p for d in DOCUMENTS for p in range(len(d))]
    assert batch["labels"][0].tolist() == [t for d in DOCUMENTS for t in [-100, *d[1:]]]
    assert torch.equal(batch["input_ids"][0], TOKENS)
    # A token that ends documents may occur inside one, as in a conversation: the packer's marks decide.
    assert batch["position_ids"][1].tolist() == list(range(len(ROW)))
    whole = Collator(False)([ROW])
    assert set(whole) == {"input_ids", "labels"} and int((whole["labels"] == -100).sum()) == 1


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "olmo3", "gpt_neox", "smollm3", "starcoder2", "deepseek_v3"])
def test_a_packed_document_has_the_logits_it_has_alone(model_type: str, attention: str) -> None:
    model = network(model_type)
    model.set_attn_implementation(attention)
    assert separates_documents(model)
    batch = Collator(True)([ROW])
    del batch["labels"]
    with torch.no_grad():
        packed = model(**batch, use_cache=False).logits[0]
        alone = torch.cat([model(input_ids=torch.tensor([d]), use_cache=False).logits[0] for d in DOCUMENTS])
        together = model(input_ids=batch["input_ids"], use_cache=False).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert (packed - together).abs().max() > 1e-2  # without position ids the documents would see each other


def test_flash_attention_is_told_where_documents_end() -> None:
    reverse = torch.tensor([t | BEGINS * (i == 0) for document in DOCUMENTS[::-1] for i, t in enumerate(document)])
    batch = Collator(True, flat=True)([ROW, reverse])
    assert batch["input_ids"].shape == batch["labels"].shape == (1, 2 * len(ROW))
    (ends, _), (longest, _) = prepare_fa_kwargs_from_position_ids(batch["position_ids"])
    assert ends.diff().tolist() == [6, 3, 10, 3, 3, 10, 3, 6]
    assert int(longest) == 10


def test_a_flat_batch_is_what_transformers_makes_of_the_documents() -> None:
    rows = [ROW, torch.cat([ROW[6:], ROW[:6]])]
    documents = [*DOCUMENTS, *DOCUMENTS[1:], DOCUMENTS[0]]
    expected = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": part} for part in documents])
    batch = Collator(True, flat=True)(rows)
    for name in ("input_ids", "labels", "position_ids"):
        assert torch.equal(batch[name], expected[name]), name


def test_a_class_that_cannot_keep_documents_apart_is_refused() -> None:
    model = network("qwen2_vl")
    with pytest.raises(HeadwiseError, match=r"Qwen2VLForConditionalGeneration does not mask attention") as refused:
        collator(model)
    assert refused.value.hint is not None and "data.separate_documents=false" in refused.value.hint
    assert not collator(model, separate_documents=False).separate_documents


@pytest.mark.full
@pytest.mark.parametrize("model_type", sorted(tiny_models.CONFIGS))
def test_which_classes_keep_documents_apart(model_type: str) -> None:
    assert separates_documents(network(model_type)) == (model_type not in LEAKING)
