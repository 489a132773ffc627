"""Training on several processes: the arguments of accelerate, and what the machine cannot do."""

from __future__ import annotations

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.train import launch
from headwise.train.settings import LAUNCH_KINDS


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

    words = launch.launch_arguments(kind, asked, ["distill", "OUT", "--set", "train.seed=1"])
    options, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    assert (options.module, options.training_script) == (True, "headwise._cli.worker")
    assert options.training_script_args == ["distill", "OUT", "--set", "train.seed=1"]
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
            launch.launch_arguments(kind, processes, [])


def test_fsdp2_needs_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(HeadwiseError, match="this machine has none"):
        launch.launch_arguments("fsdp2", 2, [])
    assert "ddp.yaml" in launch.launch_arguments("ddp", 2, [])[1]


def test_every_kind_has_its_configuration() -> None:
    assert {path.stem for path in launch.CONFIGS.glob("*.yaml")} == set(LAUNCH_KINDS)
