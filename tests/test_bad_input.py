"""What bad input gets from the command itself: one sentence, exit code 2, and nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file
from torch import Tensor

from headwise.cli import cli
from headwise.convert import layers, pipeline
from headwise.convert.forecast import peak_memory
from headwise.convert.refit.regression import refit
from headwise.io import fs as disk
from tests.convert.speaking import TEXT, contents, save_speaking

TO = ("--to", "gqa", "--groups", "2")
UNCALIBRATED = (*TO, "--calibrate", "none")
REFITTED = (*TO, "--calibrate", TEXT["calibrate"], "--calibration-tokens", str(TEXT["calibration_tokens"]))
CALIBRATED = (*REFITTED, "--refit", "off")
BAD = "model.layers.1.mlp.up_proj.weight"
BAD_KEY = "model.layers.1.self_attn.k_proj.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_speaking(tmp_path / "model")


def run(*words: Any) -> Result:
    return CliRunner(env={"HEADWISE_DEBUG": ""}).invoke(cli, [str(word) for word in words])


def refused(model: Path, words: str, *options: str, out: Path | None = None) -> str:
    """Try a conversion that must fail; the source and its surroundings stay as they were."""
    home = model.parent
    before = contents(home)
    done = run("convert", model, out or home / "out", *(options or UNCALIBRATED))
    assert done.exit_code == 2, done.stderr
    messages = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(messages) == 1 and words in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and "This is a bug" not in done.stderr
    assert done.stdout == "" and contents(home) == before
    assert not list(home.glob(".*"))
    return done.stderr


def edit_config(model: Path, **fields: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))


def edit_tensors(model: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(model / "model.safetensors")
    change(tensors)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def put_nan(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name][3, 3] = float("nan")

    return change


def shard(model: Path) -> dict[str, Any]:
    """Save the model in two files; returns its index."""
    tensors = load_file(model / "model.safetensors")
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        part = {n: t for i, (n, t) in enumerate(tensors.items()) if i % 2 == number}
        save_file(part, model / name, metadata={"format": "pt"})
    (model / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {n: names[i % 2] for i, n in enumerate(tensors)}}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_a_missing_folder(model: Path) -> None:
    refused(model.with_name("nowhere"), "There is no folder")


def test_no_config(model: Path) -> None:
    (model / "config.json").unlink()
    refused(model, "has no config.json")


def test_a_truncated_shard(model: Path) -> None:
    index = shard(model)
    last = model / max(index["weight_map"].values())
    last.write_bytes(last.read_bytes()[:-100])
    assert last.name in refused(model, "truncated")


@pytest.mark.parametrize("place", ["model-00003-of-00002.safetensors", "../elsewhere.safetensors"])
def test_an_index_that_names_a_missing_shard_or_a_path_outside(model: Path, place: str) -> None:
    index = shard(model)
    (model.parent / "elsewhere.safetensors").touch()
    index["weight_map"][BAD] = place
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(model, place)


@pytest.mark.parametrize("name", [BAD_KEY, "model.layers.0.self_attn.o_proj.weight"])
def test_an_attention_tensor_of_the_wrong_shape(model: Path, name: str) -> None:
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name][:-8].clone()}))
    message = refused(model, f"tensor {name} has shape")
    assert "by config.json it is (" in message


@pytest.mark.parametrize("name", [BAD, "model.norm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("options", [UNCALIBRATED, CALIBRATED], ids=["uncalibrated", "calibrated"])
def test_another_tensor_of_the_wrong_shape(model: Path, name: str, options: tuple[str, ...]) -> None:
    edit_tensors(model, lambda tensors: tensors.update({name: tensors[name][:-8].clone()}))
    refused(model, name, *options)


@pytest.mark.parametrize("name", [BAD_KEY, BAD])
@pytest.mark.parametrize("options", [UNCALIBRATED, CALIBRATED], ids=["uncalibrated", "calibrated"])
def test_a_missing_tensor(model: Path, name: str, options: tuple[str, ...]) -> None:
    edit_tensors(model, lambda tensors: tensors.pop(name))
    refused(model, name, *options)


@pytest.mark.parametrize("name", [BAD_KEY, BAD, "model.embed_tokens.weight"])
@pytest.mark.parametrize("options", [UNCALIBRATED, CALIBRATED], ids=["uncalibrated", "calibrated"])
def test_weights_that_are_not_finite(model: Path, name: str, options: tuple[str, ...]) -> None:
    edit_tensors(model, put_nan(name))
    assert "--allow-nan" in refused(model, f"Tensor {name} holds NaN", *options)


def test_weights_that_are_not_finite_may_be_allowed(model: Path, tmp_path: Path) -> None:
    name = BAD.replace("layers.1", "layers.0")
    edit_tensors(model, put_nan(name))
    done = run("convert", model, tmp_path / "out", *UNCALIBRATED, "--allow-nan")
    assert done.exit_code == 0, done.stderr
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after[name].isnan().sum() == 1 and after[BAD_KEY].shape[0] == 16
    message = refused(model, "inputs of layer 1 are NaN", *CALIBRATED, "--allow-nan", out=tmp_path / "b")
    assert "--calibrate none" in message


def test_keys_that_are_not_finite_may_be_averaged(model: Path, tmp_path: Path) -> None:
    edit_tensors(model, put_nan(BAD_KEY))
    assert "--method mean" in refused(model, BAD_KEY, *UNCALIBRATED, "--allow-nan")
    done = run("convert", model, tmp_path / "out", *UNCALIBRATED, "--allow-nan", "--method", "mean")
    assert done.exit_code == 0, done.stderr
    assert 0 < load_file(tmp_path / "out" / "model.safetensors")[BAD_KEY].isnan().sum() < 48
    json.loads((tmp_path / "out" / "headwise.json").read_text(), parse_constant=pytest.fail)


@pytest.mark.parametrize(("groups", "heads"), [("3", 8), ("5", 8), ("16", 8)])
def test_a_group_count_that_does_not_divide(model: Path, groups: str, heads: int) -> None:
    assert "1, 2, 4, 8" in refused(model, f"cannot have {groups}", "--to", "gqa", "--groups", groups)


def test_a_group_count_that_is_not_reachable(tmp_path: Path) -> None:
    model = save_speaking(tmp_path / "model", num_attention_heads=12, num_key_value_heads=4, hidden_size=96)
    assert "Give one of 1, 2, 4, 12" in refused(model, "cannot become 3", "--to", "gqa", "--groups", "3")


def test_a_quantised_checkpoint(model: Path) -> None:
    edit_config(model, quantization_config={"quant_method": "gptq", "bits": 4})
    assert "remove the quantization entry" in refused(model, "the quantisation gptq, and no tensor is quantised")
    edit_config(model, quantization_config={"quant_method": "hqq"})
    assert "unquantised" in refused(model, "names the method hqq, and headwise reads fp8")


def test_an_unknown_model_type(model: Path) -> None:
    edit_config(model, model_type="lama")
    message = refused(model, "model type lama")
    assert "Did you mean llama? `headwise inspect --types`" in message


@pytest.mark.parametrize("place", [".", "out", "a/out", ".."])
def test_out_inside_model_or_around_it(model: Path, place: str) -> None:
    refused(model, "overlap", out=model / place)


def test_an_existing_out(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "--force" in refused(model, "exists already")


def test_no_space_is_seen_before_the_first_byte(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = disk.shutil.disk_usage(model)
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: usage._replace(free=disk.SPARE_BYTES + 1000))
    refused(model, "The output needs")


def test_no_memory_is_seen_before_the_first_byte(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "available_memory", lambda _: 1000)
    assert "--calibration-tokens" in refused(model, "GB of memory at its peak, and 0.00 GB are free")


def failing(call: str, number: int, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the n-th call on, the operating system refuses."""
    real, count = getattr(os, call), 0

    def refuse(*arguments: Any, **options: Any) -> Any:
        nonlocal count
        count += 1
        if count > after:
            raise OSError(number, os.strerror(number), str(arguments[0]))
        return real(*arguments, **options)

    monkeypatch.setattr(os, call, refuse)


def test_space_that_runs_out_is_said_and_the_work_is_kept(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        failing("pwrite", errno.ENOSPC, 7, patch)
        done = run("convert", model, tmp_path / "out", *UNCALIBRATED)
    assert done.exit_code == 2 and "no space is left on the disk" in done.stderr and "--resume" in done.stderr
    assert not (tmp_path / "out").exists()
    assert run("convert", model, tmp_path / "out", *UNCALIBRATED, "--resume").exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_no_permission_to_write(model: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    failing("mkdir", number, 0, monkeypatch)
    refused(model, "cannot be written: " + disk.REASONS[number][0])


def test_no_permission_to_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.io import reader as checkpoint

    def closed(path: Path, *arguments: Any, **options: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "open", closed, raising=False)
    refused(model, "model.safetensors cannot be read: permission is denied")


def test_an_interrupt_while_computing_and_while_verifying(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("convert", model, tmp_path / "a" / "out", *REFITTED, "--refit", "2")
    assert run(*words).exit_code == 0
    whole = contents(tmp_path / "a" / "out")

    def stop(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    def second(attention: Any, parameters: Any, record: Any, **options: Any) -> Any:
        return stop() if record.index else refit(attention, parameters, record, **options)

    for name, at in (("refit_layer", second), ("check_folder", stop), ("open_checkpoint", stop)):
        out = tmp_path / name / "out"
        words = ("convert", model, out, *REFITTED, "--refit", "2")
        with monkeypatch.context() as patch:
            patch.setattr(layers if name == "refit_layer" else pipeline, name, at)
            done = run(*words)
        assert done.exit_code == 130 and done.stderr.count("Error: ") == 1, done.stderr
        assert not out.exists()
        if name == "open_checkpoint":  # nothing had begun
            assert not out.parent.exists()
            continue
        assert "--resume" in done.stderr
        assert "--resume" in run(*words).stderr and not out.exists()
        assert run(*words, "--resume").exit_code == 0
        assert contents(out) == whole and [path.name for path in out.parent.iterdir()] == ["out"]


def test_a_real_interrupt_of_the_real_command(model: Path, tmp_path: Path) -> None:
    """Ctrl-C at some moment of a run in a process of its own, then --resume, until it is done."""
    command = [sys.executable, "-c", "from headwise.cli import main; main()", "convert", str(model)]
    words = [*REFITTED, "--refit", "100000"]
    out = tmp_path / "out"

    def hear_interrupts() -> None:
        """Whoever started the tests in the background told every process below to ignore Ctrl-C."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        [*command, str(out), *words], stderr=subprocess.PIPE, text=True, preexec_fn=hear_interrupts
    ) as process:
        journal = tmp_path / ".out.headwise-work" / "journal.jsonl"
        # The imports take minutes on a busy machine; the time limit of every test ends this wait.
        while not journal.exists() and process.poll() is None:
            time.sleep(0.05)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        message = process.communicate()[1]
    assert process.returncode == 130 and "--resume" in message and "Traceback" not in message
    assert not out.exists() and journal.exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="its file names are UTF-8")
def test_names_that_are_not_utf_8_are_refused(model: Path) -> None:
    """Records and cards are UTF-8; the bytes of a file name may be anything."""
    odd = Path(os.fsdecode(os.fsencode(model.parent) + b"/odd\xff"))
    refused(model, "is not a name in UTF-8", out=odd)
    model.rename(odd)
    refused(odd, "is not a name in UTF-8")
    assert run("inspect", odd).exit_code == 2
