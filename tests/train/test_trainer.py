"""The training loop: batches on one GPU, and the learning rate schedules."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from transformers import AutoConfig, AutoModelForCausalLM, TrainingArguments

from headwise.text.marks import BEGINS
from headwise.text.packing import Collator
from headwise.train.settings import Loss, Training
from headwise.train.trainer import Task, Trainer, learning_rate, make_trainer, resume

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


def test_one_process_trains_on_one_of_several_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer would put nn.DataParallel over all, and twice the tokens into each step."""

    def two_gpus(self: TrainingArguments) -> torch.device:
        self.distributed_state, self._n_gpu = PartialState(cpu=True), 2
        return torch.device("cpu")

    setup = cached_property(two_gpus)
    setup.__set_name__(TrainingArguments, "_setup_devices")
    monkeypatch.setattr(TrainingArguments, "_setup_devices", setup)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=32))
    blocks, task = torch.zeros(40, 64, dtype=torch.long), Task(Loss(cross_entropy=1.0))
    trainer = make_trainer(network, blocks, blocks[:1], TRAINING, task, tmp_path, length=64, collate=Collator(None))
    assert isinstance(trainer, Trainer) and trainer.args.n_gpu == 1
    rows = next(iter(trainer.get_train_dataloader()))["input_ids"]
    assert rows.numel() == TRAINING.micro_batch_tokens


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
    assert learning_rate(1.0, replace(TRAINING, warmup=1.0)) == pytest.approx(1.0)


def test_a_step_in_parts_has_the_loss_of_the_whole_step(tmp_path: Path) -> None:
    """Documents of one token leave few predicted tokens in some micro-batches."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(**TINY, vocab_size=32)
    weights = AutoModelForCausalLM.from_config(config).state_dict()
    blocks = torch.randint(32, (8, 64), dtype=torch.int32)
    blocks[1::2, 2:] |= BEGINS
    losses, gradients = [], []
    for micro in (512, 64):
        network = AutoModelForCausalLM.from_config(config)
        network.load_state_dict(weights)
        settings = replace(TRAINING, tokens=512, micro_batch_tokens=micro, log_every=1, max_grad_norm=1e9)
        trainer = make_trainer(
            network, blocks, blocks[:1], settings, Task(Loss(cross_entropy=1.0)), tmp_path / str(micro), length=64,
            collate=Collator(True),
        )  # fmt: skip
        resume(trainer, None)
        first = next(line for line in trainer.state.log_history if "loss" in line)
        losses.append(first["loss"])
        gradients.append(float(first["grad_norm"]))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-3)


def test_the_cpu_trains_where_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, which the Trainer would use."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    network = AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, vocab_size=32))
    blocks = torch.zeros(16, 64, dtype=torch.int32)
    trainer = make_trainer(
        network,
        blocks,
        blocks[:1],
        replace(TRAINING, precision="bf16"),
        Task(Loss(cross_entropy=1.0)),
        tmp_path,
        length=64,
        collate=Collator(True),
        device="cpu",
    )
    assert trainer.args.use_cpu and trainer.args.device.type == trainer.accelerator.device.type == "cpu"
    assert not trainer.args.dataloader_pin_memory and not trainer._bf16
