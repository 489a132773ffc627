"""Pretraining from random weights: the same model twice, a complete folder or none, and what is refused."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.demo import pretrain
from headwise.demo.settings import Init, PretrainSettings, load_settings
from headwise.errors import HeadwiseError, SettingError
from headwise.text.sources import Data
from headwise.train.settings import Training

TINY = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
TRAINING = Training(
    tokens=10 * 512,
    batch_tokens=512,
    micro_batch_tokens=256,
    learning_rate=1e-2,
    precision="float32",
    log_every=5,
    evaluate_every=5,
)


def losses(folder: Path, column: str = "loss") -> list[float]:
    with (folder / "curve.csv").open() as file:
        return [float(row[column]) for row in csv.DictReader(file) if row[column]]


def test_from_nothing_twice_is_the_same_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    init = Init(vocab_size=260, config=TINY)
    data = Data({str(text): 1}, 64, heldout=str(text), heldout_blocks=2)
    settings = PretrainSettings("a test", init, data, TRAINING)
    for name in ("one", "two"):
        record = pretrain.pretrain(settings, tmp_path / name, command="typed")
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two

    seen = losses(tmp_path / "one")
    assert len(seen) == 2 and seen[-1] < seen[0] - 0.3
    heldout = losses(tmp_path / "one", "heldout")
    assert record["heldout"]["nats"] == pytest.approx(heldout[-1], abs=0.02)  # bfloat16 is what was saved
    assert (record["steps"], record["tokens"], record["command"]) == (10, 10 * 512, "typed")
    assert json.loads((tmp_path / "two" / "training.json").read_text()) == json.loads(json.dumps(record))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto")
    assert model.dtype == torch.bfloat16 and model.config.use_cache
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == 260
    assert tokenizer.decode(tokenizer("x = 120\n        é漢")["input_ids"]) == "x = 120\n        é漢"
    config = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "text.txt", "two"]


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and more words " * 200)
    data = Data({str(text): 1}, 64, heldout=str(text), heldout_blocks=2)
    settings = PretrainSettings("a test", Init(260, TINY), data, TRAINING)
    with pytest.raises(HeadwiseError, match="exists already"):
        pretrain.pretrain(settings, tmp_path)
    with pytest.raises(HeadwiseError, match=r"batch_tokens 500 .* multiple of 256"):
        pretrain.pretrain(replace(settings, train=replace(TRAINING, batch_tokens=500)), tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain, "save", full)
    with pytest.raises(OSError, match="No space"):
        pretrain.pretrain(replace(settings, train=replace(TRAINING, tokens=512)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_the_settings_of_the_embedded_model_are_legal() -> None:
    settings = load_settings(assignments=["train.tokens=1M"])
    assert settings.init.config["model_type"] == "llama" and settings.train.tokens == 1_000_000
    with pytest.raises(SettingError, match=r"`init\.config` is \{\}, which is not a mapping with a model_type"):
        load_settings(assignments=["init.config={}"])


def test_the_command_names_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        pretrain.run_pretraining([str(tmp_path / "out"), "--set", "train.tokns=1"])
    assert ended.value.code == 2
    assert "Did you mean train.tokens?" in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())
