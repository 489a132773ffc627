"""Run the `headwise` command in tests, in this process or in a new one, with the library or with substitutes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result

from headwise._cli import render
from headwise.cli import cli

CONVERT = ["convert", "model", "out"]
SCRIPT = [sys.executable, "-c", "from headwise.cli import main; main()"]


def run(*arguments: str, **environment: str) -> Result:
    """Run a command line in this process."""
    return CliRunner(env=environment).invoke(cli, arguments)


def run_script(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line in a new process."""
    environment = {**os.environ, **environment}
    return subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, env=environment)


@pytest.fixture
def config_folder(tmp_path: Path) -> str:
    """A folder with the config.json of a Llama: 3 layers, 8 heads and 4 KV heads of 8 numbers, bfloat16."""
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "num_hidden_layers": 3,
        "vocab_size": 61,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return str(tmp_path)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Replace `convert_model` and `verify_model`: `arguments` holds those of the last call, `action` is called."""
    calls = SimpleNamespace(arguments={}, action=lambda **_: SimpleNamespace(to_dict=lambda: {"done": True}))

    def substitute(*positional: Any, **arguments: Any) -> Any:
        assert not positional
        calls.progress = arguments.pop("progress", None)
        calls.arguments = arguments
        return calls.action(**arguments)

    for name in ("convert.pipeline.convert_model", "convert.verify.check.verify_model"):
        module, function = f"headwise.{name}".rsplit(".", 1)
        monkeypatch.setitem(sys.modules, module, SimpleNamespace(**{function: substitute}))
    for kind in ("render_plan", "render_conversion", "render_verification"):
        monkeypatch.setattr(render, kind, lambda _: None)
    return calls
