"""Smoke test: convert, verify, evaluate, uptrain and time a tiny model, through the command line alone.

The test uses no Python name of headwise, so that one file serves every version of the package. It runs in every
environment: the pinned one, the newest releases (`make test-newest`), the lowest ones (`make test-lowest`), and the
built wheel (`make wheel`).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from headwise.compat import cache_of

pytestmark = pytest.mark.smoke

CONTEXT, LAYERS, HEADS, HEAD_DIM = 128, 2, 4, 8
TARGETS = {
    "gqa": ["--to", "gqa", "--groups", "2"],
    "mla": ["--to", "mla", "--rank", "16", "--rope-dim", "8"],
}
# Cache elements per token and layer: keys and values of two heads; the latent and the shared rotary key.
CACHE_ELEMENTS = {"gqa": 2 * 2 * HEAD_DIM, "mla": 16 + 8}


@dataclass(frozen=True)
class Workspace:
    """A folder with a parent model and text, in which the commands run."""

    path: Path

    def run(self, *arguments: str) -> dict[str, Any]:
        """Run one headwise command with --json and return its result.

        Args:
            arguments: the command and its options.
        """
        command = [sys.executable, "-m", "headwise", *arguments, "--json"]
        # Models are loaded as users load them; tests/conftest.py chooses otherwise.
        environment = {k: v for k, v in os.environ.items() if k != "HF_DEACTIVATE_ASYNC_LOAD"}
        done = subprocess.run(
            command,
            cwd=self.path,
            env=environment | {"HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr}"
        result: dict[str, Any] = json.loads(done.stdout)
        return result


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace whose parent is a random Llama model with multi-head attention and a byte tokenizer."""
    path = tmp_path_factory.mktemp("smoke")
    tokens = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(
        path / "parent"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(path / "parent")
    for name, first in (("train", 0), ("heldout", 1000)):
        functions = [f"def add_{i}(x):\n    return x + {i % 10}\n\n\n" for i in range(first, first + 800)]
        (path / f"{name}.txt").write_text("".join(functions))
    return Workspace(path)


# With `pytest --dist loadgroup`, one process runs all tests of a target, so each model is converted once.
GROUPED = [pytest.param(target, marks=pytest.mark.xdist_group(target)) for target in TARGETS]


@pytest.fixture(scope="module", params=GROUPED)
def child(workspace: Workspace, request: pytest.FixtureRequest) -> str:
    """The folder of a converted model, named after its target."""
    calibration = ["--calibrate", "train.txt", "--calibration-tokens", "2048"]
    workspace.run("convert", "parent", request.param, *TARGETS[request.param], *calibration)
    name: str = request.param
    return name


def test_the_converted_folder_verifies(workspace: Workspace, child: str) -> None:
    result = workspace.run("verify", child, "--against", "parent")
    assert result["checks"] and all(check["passed"] for check in result["checks"]), result


def test_stock_transformers_loads_it_with_a_smaller_cache(workspace: Workspace, child: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(workspace.path / child, dtype=torch.float32)
    with torch.no_grad():
        output = model(torch.arange(9)[None])
    cache = cache_of(output)
    elements = {layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers}
    assert elements == {CACHE_ELEMENTS[child]}
    assert output.logits.isfinite().all()


def test_eval_measures_the_loss_and_the_acceptance(workspace: Workspace, child: str) -> None:
    result = workspace.run("eval", child, "--baseline", "parent", "--recipe", "quick", "--limit", "4", "--no-cache")
    measured = {figure["task"]: figure for figure in result["comparisons"] if figure["headline"]}
    assert set(measured) == {"heldout", "headwise_cloze_code", "headwise_cloze_prose"}
    assert all(measured["heldout"][side]["value"] > 1 for side in ("child", "parent"))
    assert result["diagnostics"]["kl"] > 0
    assert len(result["diagnostics"]["layers"]) == LAYERS
    assert 0 < result["acceptance"]["rate"] < 1


def test_uptrain_lowers_the_heldout_loss(workspace: Workspace, child: str) -> None:
    out = f"{child}-uptrained"
    options = ["--tokens", "16384", "--set", f"data.length={CONTEXT}", "--set", "train.batch_tokens=1024"]
    loss = ["--set", "loss.kl=0", "--set", "loss.cross_entropy=1"]
    text = ["--text", "train.txt", "--heldout", "heldout.txt"]
    result = workspace.run("uptrain", child, out, "--teacher", "parent", *options, *loss, *text)
    assert result["tokens"] == 16384
    assert math.isfinite(result["after"]) and result["after"] < result["before"]
    assert all(check["passed"] for check in workspace.run("verify", out)["checks"])


def test_bench_times_parent_and_child(workspace: Workspace, child: str) -> None:
    options = ["--context", "64", "--steps", "2", "--dtype", "float32"]
    result = workspace.run("bench", child, "--baseline", "parent", *options)
    parent, converted = result["same_batch"]
    assert converted["cache_bytes"] < parent["cache_bytes"]
    assert parent["seconds_per_step"] > 0 and converted["seconds_per_step"] > 0
