"""What a request for MLA that cannot be met gets from the command: one sentence with the reason and a way out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests import tiny_models
from tests.convert.speaking import save_speaking
from tests.test_bad_input import refused

MLA = ("--to", "mla", "--calibrate", "none")
SHAPE = (*MLA, "--rank", "16", "--rope-dim", "4")


def sentence(message: str) -> str:
    return " ".join(message.split())


@pytest.mark.parametrize(
    ("rank", "rope_dim", "words"),
    [
        ("15", "8", "--rank 15 is not an even number from 2 to 48"),
        ("50", "8", "--rank 50 is not an even number from 2 to 48"),  # hidden_size
        ("16", "7", "--rope-dim 7 is not an even number from 2 to 64"),
        ("16", "66", "--rope-dim 66 is not an even number from 2 to 64"),
    ],
)
def test_a_shape_the_model_does_not_have(tmp_path: Path, rank: str, rope_dim: str, words: str) -> None:
    model = save_speaking(tmp_path / "model")
    message = sentence(refused(model, "--r", *MLA, "--rank", rank, "--rope-dim", rope_dim))
    assert words in message
    # The shapes offered, each with the share of the 128 numbers it keeps.
    offered = re.findall(r"(\d+) \+ (\d+) \((\d+)%\)", message)
    assert offered and all(round((int(r) + int(p)) / 1.28) == int(share) for r, p, share in offered)


@pytest.mark.parametrize(("rank", "rope_dim"), [("24", "12"), ("16", "16")], ids=["more", "all"])
def test_a_shape_that_keeps_all_there_is(tmp_path: Path, rank: str, rope_dim: str) -> None:
    model = save_speaking(tmp_path / "model", num_key_value_heads=2)
    message = sentence(refused(model, "", *MLA, "--rank", rank, "--rope-dim", rope_dim))
    assert "where the model itself caches 32" in message and "--exact" in message


def test_a_share_of_more_than_a_latent_can_use(tmp_path: Path) -> None:
    """128 numbers, of which a latent takes the hidden_size of 48 and a rotary key twice a head's 8."""
    model = save_speaking(tmp_path / "model")
    for share in ("0.75", "1"):
        message = sentence(refused(model, f"--cache {share} leaves", *MLA, "--cache", share))
        assert "can use 64" in message and "at most 50.0%" in message and "--exact" in message


@pytest.mark.parametrize("option", ["--rank", "--rope-dim"])
def test_a_shape_of_nothing(tmp_path: Path, option: str) -> None:
    model = save_speaking(tmp_path / "model")
    sizes = {"--rank": "16", "--rope-dim": "4"} | {option: "0"}
    message = sentence(refused(model, option, *MLA, *(word for pair in sizes.items() for word in pair)))
    assert "0" in message


def test_a_share_too_small_for_a_rotary_key(tmp_path: Path) -> None:
    model = save_speaking(tmp_path / "model")
    refused(model, "too few for a rotary key", *MLA, "--cache", "1%")


@pytest.mark.parametrize("shape", [SHAPE, ("--to", "mla", "--exact")], ids=["lossy", "exact"])
def test_float16_has_no_room_for_the_latent_norm(tmp_path: Path, shape: tuple[str, ...]) -> None:
    model = save_speaking(tmp_path / "model")
    assert "bfloat16 or float32" in sentence(refused(model, "float16", *shape, "--dtype", "float16"))


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("olmo2", "normalises the outputs of attention and MLP in place of their inputs"),
        ("gemma3_text", "alternates windows with full attention"),
        ("qwen2_moe", "a learned gate multiplies its shared expert"),
        ("gemma2", "soft-capped scores"),
        ("phimoe", "chooses experts by sparse mixing"),
        ("starcoder2", "LayerNorm"),
        ("gpt_neox", "LayerNorm"),
        ("mistral", "sliding_window is 5: no stock MLA model has a sliding window"),
        ("qwen2", "no stock MLA model has a sliding window"),
    ],
)
def test_a_model_that_stock_deepseek_cannot_express(tmp_path: Path, model_type: str, reason: str) -> None:
    model = tiny_models.save(model_type, tmp_path / "model")
    message = sentence(refused(model, "", *SHAPE))
    assert reason in message and "It can become GQA or MQA: --to gqa --groups N." in message


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--to", "mla", "--exact"), "--exact is not possible for a qwen3 model: it normalises queries and keys"),
        ((*SHAPE, "--calibrate", "none"), "--calibrate none is not possible for MLA from a qwen3 model"),
    ],
    ids=["exact", "uncalibrated"],
)
def test_what_norms_on_queries_and_keys_rule_out(tmp_path: Path, options: tuple[str, ...], reason: str) -> None:
    model = tiny_models.save("qwen3", tmp_path / "model")
    assert reason in sentence(refused(model, "", *options))
