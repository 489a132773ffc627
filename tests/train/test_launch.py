"""Training on several processes: what is launched, and the same result on one process and on two."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL
from headwise.progress import Progress
from headwise.recipes.uptrain import uptrain_model
from headwise.train import launch
from headwise.train.settings import LAUNCH_KINDS

REPOSITORY = Path(__file__).parents[2]
SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
RECIPE = """
about: distillation in a few steps, documents apart
data: {text: {TEXT: 1}, length: 64, heldout_blocks: 4}
loss: {kl: 0.9, cross_entropy: 0.1}
train:
  {tokens: 4096, batch_tokens: 1024, micro_batch_tokens: 256, learning_rate: 1e-3, log_every: 1, evaluate_every: 2,
   save_every: 1}
"""


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)


@pytest.mark.usefixtures("devices")
@pytest.mark.parametrize(
    ("kind", "asked", "processes"), [("single", None, 1), ("ddp", None, 4), ("ddp", 2, 2), ("fsdp2", 4, 4)]
)
def test_accelerate_understands_the_packaged_configurations(kind: str, asked: int | None, processes: int) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    arguments = {"model": "M", "out": "OUT", "settings": ["train.seed=1"]}
    words = launch.launch_arguments(kind, asked, arguments)
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (options.module, options.training_script) == (True, "headwise._cli.worker")
    (argument,) = options.training_script_args
    assert json.loads(argument) == arguments
    assert (options.num_processes, options.mixed_precision) == (processes, "no")
    assert (options.multi_gpu, options.use_fsdp) == (kind == "ddp", kind == "fsdp2")
    if kind == "fsdp2":
        assert (options.fsdp_version, options.fsdp_auto_wrap_policy) == (2, "TRANSFORMER_BASED_WRAP")


@pytest.mark.usefixtures("devices")
def test_what_the_machine_cannot_do_is_refused() -> None:
    for kind, processes, sentence in [
        ("fsdp2", 8, "8 processes need 8 accelerators, and this machine has 4"),
    ]:
        with pytest.raises(HeadwiseError, match=sentence):
            launch.launch_arguments(kind, processes, {})


def test_fsdp2_needs_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(HeadwiseError, match="this machine has none"):
        launch.launch_arguments("fsdp2", 2, {})
    assert "ddp.yaml" in launch.launch_arguments("ddp", 2, {})[1]


def test_every_kind_has_its_configuration() -> None:
    assert {path.stem for path in launch.CONFIGS.glob("*.yaml")} == set(LAUNCH_KINDS)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with parent, child, recipe, and `one`: the child trained by one process."""
    home = tmp_path_factory.mktemp("scale")
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    torch.manual_seed(0)
    for name, groups in (("parent", 4), ("child", 2)):
        config = LlamaConfig(vocab_size=len(tokenizer), **SIZES, num_key_value_heads=groups)
        LlamaForCausalLM(config).save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    texts = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 7) for i in range(400)]
    (home / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (home / "recipe.yaml").write_text(RECIPE.replace("TEXT", str(home / "text.jsonl")))
    uptrain_model(home / "child", home / "one", recipe=home / "recipe.yaml", teacher=home / "parent")
    return home


def arguments(case: Path, out: str) -> dict[str, Any]:
    paths = {"model": "child", "out": out, "recipe": "recipe.yaml", "teacher": "parent"}
    return {name: str(case / path) for name, path in paths.items()}


def assert_same(case: Path, other: str) -> None:
    curves = []
    for name in ("one", other):
        with (case / name / "uptraining.csv").open() as file:
            curves.append([(row["step"], row["loss"] or row["heldout"]) for row in csv.DictReader(file)])
    assert [step for step, _ in curves[0]] == [step for step, _ in curves[1]] and len(curves[0]) == 7
    for (_, one), (_, two) in zip(*curves, strict=True):
        assert float(two) == pytest.approx(float(one), rel=1e-5)
    one, two = (load_file(case / name / "model.safetensors") for name in ("one", other))
    before = load_file(case / "child" / "model.safetensors")
    assert one.keys() == two.keys() == before.keys()
    for name in one:
        moved = (one[name] - before[name]).abs().max()
        assert (one[name] - two[name]).abs().max() <= 1e-3 * moved, name
    files = [sorted(path.name for path in (case / name).iterdir()) for name in ("one", other)]
    assert files[0] == files[1]


def test_two_processes_train_as_one_does(case: Path) -> None:
    assert launch.launch_processes("ddp", 2, arguments(case, "two")) == 0
    assert_same(case, "two")


def sharded(case: Path, out: str, **more: Any) -> subprocess.Popen[str]:
    """Start a training that is sharded over two processes."""
    config = launch.CONFIGS / "fsdp2.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    command += ["--num_processes", "2", "--main_process_port", "0", str(Path(__file__).parent / "fsdp2_on_cpu.py")]
    command.append(json.dumps(arguments(case, out) | more))
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def train_sharded(case: Path, out: str, **more: Any) -> None:
    process = sharded(case, out, **more)
    output, _ = process.communicate()
    assert process.returncode == 0, output[-3000:]


def interrupt(case: Path, out: str) -> Path:
    """Train in this process until the second checkpoint; return the folder of the checkpoints."""

    class Stop(Progress):
        def advance(self, amount: int, **figures: Any) -> None:
            if list(training.glob("checkpoint-2")):
                raise KeyboardInterrupt

    training = case / f".{out}.headwise-work" / "training"
    paths = {name: case / path for name, path in (("recipe", "recipe.yaml"), ("teacher", "parent"))}
    with pytest.raises(KeyboardInterrupt):
        uptrain_model(case / "child", case / out, **paths, progress=Stop())
    assert list(training.glob("checkpoint-*")) and not (case / out).exists()
    return training


@pytest.mark.full
def test_a_run_is_resumed_by_another_number_of_processes(case: Path) -> None:
    interrupt(case, "resumed")
    assert launch.launch_processes("ddp", 2, arguments(case, "resumed") | {"resume": True}) == 0
    assert_same(case, "resumed")


@pytest.mark.full
def test_a_sharded_student_and_teacher_train_as_whole_ones_do(case: Path) -> None:
    train_sharded(case, "shards")
    assert_same(case, "shards")


@pytest.mark.full
def test_a_whole_run_is_resumed_in_shards(case: Path) -> None:
    interrupt(case, "to-shards")
    train_sharded(case, "to-shards", resume=True)
    assert_same(case, "to-shards")


@pytest.mark.full
def test_a_sharded_run_is_resumed_by_one_process(case: Path) -> None:
    training = case / ".from-shards.headwise-work" / "training"
    process = sharded(case, "from-shards")
    while process.poll() is None and not list(training.glob("checkpoint-*")):
        time.sleep(0.01)
    process.terminate()
    output, _ = process.communicate()
    checkpoints = sorted(path.name for path in training.glob("checkpoint-*"))
    assert checkpoints and "checkpoint-4" not in checkpoints, output[-3000:]
    shards = training / checkpoints[-1]
    assert (shards / "optimizer_0").is_dir() and not (shards / "pytorch_model_fsdp_0").exists()
    uptrain_model(
        case / "child", case / "from-shards", recipe=case / "recipe.yaml", teacher=case / "parent", resume=True
    )
    assert_same(case, "from-shards")


@pytest.mark.full
def test_a_mistake_is_told_once_with_its_exit_code(case: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch.launch_processes("ddp", 2, arguments(case, "none") | {"settings": ["train.tokns=1"]}) == 2
    output = capfd.readouterr().err
    assert output.count("unknown key train.tokns") == 1 and "Traceback" not in output
    assert not (case / "none").exists()
