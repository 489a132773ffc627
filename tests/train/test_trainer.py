"""The loop trains, keeps its budgets, and leaves a folder that stock transformers loads, or nothing."""

from __future__ import annotations

import csv
import json
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from headwise.demo import pretrain
from headwise.errors import HeadwiseError
from headwise.recipes import worker as train
from headwise.recipes.settings import Data, Init, UptrainRecipe, Training
from headwise.text.packing import Collator
from headwise.train.callbacks import TimeBudget
from headwise.train.trainer import Trainer, learning_rate, make_trainer

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


def test_one_process_trains_on_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer would put nn.DataParallel over all, and twice the tokens into each step."""

    def two_gpus(self: TrainingArguments) -> torch.device:
        self.distributed_state, self._n_gpu = PartialState(cpu=True), 2
        return torch.device("cpu")

    setup = cached_property(two_gpus)
    setup.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", setup)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=32))
    blocks, recipe = torch.zeros(40, 64, dtype=torch.long), UptrainRecipe("", Data({"t": 1}, 64), TRAINING)
    trainer = make_trainer(network, blocks, blocks[:1], recipe, tmp_path, collate=Collator(None))
    assert isinstance(trainer, Trainer) and trainer.args.n_gpu == 1
    rows = next(iter(trainer.get_train_dataloader()))["input_ids"]
    assert rows.numel() == TRAINING.micro_batch_tokens


def test_from_nothing_twice_is_the_same_model(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(400)))
    init = Init(vocab_size=260, config=TINY)
    recipe = UptrainRecipe("a test", Data({str(text): 1}, 64, heldout=str(text), heldout_blocks=2), TRAINING, init=init)
    for name in ("one", "two"):
        record = pretrain.pretrain(recipe, tmp_path / name, command="typed")
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
    settings = json.loads((tmp_path / "one" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "text.txt", "two"]


def test_refusals_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("words and more words " * 200)
    recipe = UptrainRecipe(
        "a test", Data({str(text): 1}, 64, heldout=str(text), heldout_blocks=2), TRAINING, init=Init(260, TINY)
    )
    with pytest.raises(HeadwiseError, match="exists already"):
        pretrain.pretrain(recipe, tmp_path)
    with pytest.raises(HeadwiseError, match="needs a model"):
        pretrain.pretrain(replace(recipe, init=None), tmp_path / "out")
    with pytest.raises(HeadwiseError, match=r"batch_tokens 500 .* multiple of 256"):
        pretrain.pretrain(replace(recipe, train=replace(TRAINING, batch_tokens=500)), tmp_path / "out")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pretrain, "save", full)
    with pytest.raises(OSError, match="No space"):
        pretrain.pretrain(replace(recipe, train=replace(TRAINING, tokens=512)), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]


def test_schedules() -> None:
    cosine = replace(TRAINING, warmup=0.1, final_learning_rate=0.1)
    assert learning_rate(0.05, cosine) == pytest.approx(0.5)
    assert learning_rate(0.1, cosine) == pytest.approx(1.0)
    assert learning_rate(0.55, cosine) == pytest.approx(0.55)
    assert learning_rate(1.0, cosine) == learning_rate(1.5, cosine) == pytest.approx(0.1)
    wsd = replace(TRAINING, warmup=0.1, schedule="wsd")
    shares = [learning_rate(p, wsd) for p in (0.05, 0.1, 0.5, 0.8, 0.9, 1.0)]
    assert shares == pytest.approx([0.5, 1.0, 1.0, 1.0, 0.5, 0.0])
    assert learning_rate(0.0, replace(TRAINING, warmup=0.0)) == 1.0


def test_a_time_budget_shortens_the_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 100.0, 105.0])  # made, begun, half-way through the timed steps, their end
    monkeypatch.setattr(time, "time", lambda: next(clock))
    said: list[str] = []
    budget = TimeBudget(125.0, SimpleNamespace(note=said.append))  # type: ignore[arg-type]
    arguments = SimpleNamespace(world_size=1)
    state = SimpleNamespace(global_step=0, max_steps=1000, is_world_process_zero=True)
    budget.on_train_begin(arguments, state, None)
    for step in range(1, 60):
        state.global_step = step
        budget.on_step_end(arguments, state, None)
    assert state.max_steps == 150  # 25 steps took 5 s, 20 s are left after step 50
    assert len(said) == 1


def test_the_command_says_what_is_wrong(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert train.main(["pretrain-demo", str(tmp_path / "out"), "--set", "train.tokns=1"]) == 2
    assert "Did you mean train.tokens?" in " ".join(capsys.readouterr().err.split())
    assert train.main(["pretrain-demo", str(tmp_path / "out"), "--model", "m"]) == 2
    assert "takes no model" in " ".join(capsys.readouterr().err.split())
    assert train.main(["distill", str(tmp_path / "out")]) == 2
    assert "needs a model" in " ".join(capsys.readouterr().err.split())
