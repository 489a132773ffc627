"""Record what the command prints and writes, and compare two recordings.

    python tests/recorded.py record TREE FILE.json [--fresh]
    python tests/recorded.py compare A.json B.json [--ignore PART ...] [--all]

`record` makes tiny models from stock config classes and runs a list of `headwise` command lines on them, with the
package of the folder TREE. Use it before and after a change that must not change behaviour, then run `compare`.

For each command line FILE.json holds the exit code, stdout, stderr and every file that the command wrote: the
SHA-256 of each tensor, the content of config.json, headwise.json and README.md, the SHA-256 of other files.
Temporary paths, durations, versions and timestamps are replaced by placeholders. One thread and fixed seeds make a
second recording of the same tree equal to the first.

Every command line runs in a process of its own. Importing torch and transformers takes most of the time of such a
process, so most of them are forked from one that has imported both, and nothing of headwise. The others, and all of
them with `--fresh`, run as `python -m headwise` in a new interpreter; the output is the same.

`compare` prints each difference and exits with 1 if there is one. `--ignore` leaves out a part of every command
line: exit, stdout, stderr, or the name of a written file such as README.md. `--all` prints every difference instead
of the first few of each command line.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import hashlib
import json
import os
import platform
import random
import re
import resource
import runpy
import shlex
import shutil
import string
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

SEED = 20
VOCABULARY = 259  # one token for each byte, an end token, and two that no text contains
TIMEOUT = 600.0
MODIFIED = 1_600_000_000  # seconds since 1970, the age of every model file
LINES_SHOWN, WIDTH_SHOWN = 12, 110
NO_FILE = "(missing)"

# ---------------------------------------------------------------------------------------------------- models

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 36,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
HALF_ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}
WINDOWS = {
    "sliding_window": 7,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.0, 1.5, 2.5, 4.0],
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 12}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 50000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 8,
}


def heads(query: int, key_value: int, head_dim: int | None = None, hidden: int | None = None) -> dict[str, Any]:
    """Return the config fields of an attention shape; None leaves the class default or `COMMON`."""
    fields = {"num_attention_heads": query, "num_key_value_heads": key_value}
    fields |= {"head_dim": head_dim} if head_dim else {}
    return fields | ({"hidden_size": hidden} if hidden else {})


# Folder name: model type and config fields. The shapes are odd, so that a wrong order of heads or a transposed
# matrix changes a result.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", heads(9, 3, 8) | {"attention_bias": True}),
    "mha": ("llama", heads(8, 8, 8, 48) | {"num_hidden_layers": 3, "tie_word_embeddings": True}),
    "yarn": ("llama", heads(6, 3, 8) | {"rope_parameters": YARN}),
    "linear": ("llama", heads(6, 3, 8) | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    "llama3": ("llama", heads(6, 3, 10, 42) | {"rope_parameters": LLAMA3}),
    "mistral": ("mistral", heads(14, 7, 6) | {"sliding_window": 9}),
    "qwen2": ("qwen2", heads(14, 2, hidden=56)),
    "qwen2-window": (
        "qwen2",
        heads(14, 2, hidden=56) | {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 9},
    ),
    "qwen3": ("qwen3", heads(10, 5, 8)),
    "gemma3": ("gemma3_text", heads(6, 3, 8) | WINDOWS | {"query_pre_attn_scalar": 7}),
    "phi3": ("phi3", heads(9, 3, hidden=72) | HALF_ROTARY),
    "phi3-long": ("phi3", heads(9, 3, hidden=72) | {"rope_parameters": LONGROPE}),
    "phi": ("phi", heads(9, 3, hidden=72) | HALF_ROTARY),
    "stablelm": ("stablelm", heads(9, 3, hidden=72) | {"use_qkv_bias": True} | HALF_ROTARY),
    "gpt_neox": (
        "gpt_neox",
        {"num_attention_heads": 5, "hidden_size": 80, "rope_parameters": {"partial_rotary_factor": 0.25}},
    ),
    "mixtral": ("mixtral", heads(14, 7, 6) | EXPERTS),
    "glm4_moe": (
        "glm4_moe",
        heads(9, 3, 8) | {"use_qk_norm": True, "num_experts_per_tok": 2} | ROUTED | HALF_ROTARY,
    ),
    "exaone4": ("exaone4", heads(9, 3, 8) | WINDOWS),
    "olmo2": ("olmo2", heads(9, 3, hidden=72)),
    "cohere": ("cohere", heads(9, 3, hidden=72)),
    "smollm3": ("smollm3", heads(14, 2, hidden=56) | {"num_hidden_layers": 4, "no_rope_layer_interval": 2}),
    "granite": ("granite", heads(9, 3, hidden=72) | {"attention_multiplier": 0.3, "residual_multiplier": 0.4}),
    "falcon": (
        "falcon",
        {"num_attention_heads": 9, "num_kv_heads": 3, "hidden_size": 72, "new_decoder_architecture": True},
    ),
    "gpt2": ("gpt2", {"n_embd": 36, "n_head": 9, "n_layer": 2, "n_positions": 64}),
    "bloom": ("bloom", {"hidden_size": 72, "n_head": 9, "n_layer": 2}),
    "llava": (
        "llava",
        {
            "text_config": COMMON | heads(9, 3, 8) | {"model_type": "llama"},
            "vision_config": CLIP,
            "image_token_index": VOCABULARY - 1,
        },
    ),
}
# Folder name: fields of config.json that a conversion refuses.
BAD_CONFIGS: dict[str, dict[str, Any]] = {
    "quantised": {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    "misspelt": {"model_type": "lama"},
    "untyped": {"model_type": None},
    "remote-code": {"attn_implementation": "org/kernel"},
    "bad-heads": {"num_key_value_heads": 3},
    "bad-width": {"hidden_size": "wide"},
    "bad-depth": {"num_hidden_layers": -1},
    "bad-dtype": {"dtype": "int3"},
    "bad-rope": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": -2.0}},
    "no-such-rope": {"rope_parameters": {"rope_type": "spiral", "rope_theta": 10000.0}},
    "deepseek": {"model_type": "deepseek_v3"},
}
# Saved in another way than in one float32 file.
DTYPES = {"mistral": "bfloat16", "phi3": "float16"}
SHARDED = {"qwen2": "24KB"}
# Folders without a tokenizer, which calibration on text must refuse.
NO_TOKENIZER = {"olmo2"}


def make_models(folder: Path) -> None:
    """Write the models of `MODELS`, the broken ones, and the text files into `folder`.

    Every parameter is random, biases and norms too: a lost zero bias would change nothing.
    """
    import torch
    import transformers

    generator = torch.Generator().manual_seed(SEED)
    for name, (model_type, fields) in MODELS.items():
        given = fields if "text_config" in fields else COMMON | fields
        config = transformers.AutoConfig.for_model(model_type, **given)
        kind = (
            transformers.AutoModelForImageTextToText
            if "text_config" in fields
            else transformers.AutoModelForCausalLM
        )
        with torch.random.fork_rng():
            model = kind.from_config(config)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(0.5 + 0.3 * noise if "norm" in key and "weight" in key else 0.15 * noise)
        model.to(getattr(torch, DTYPES.get(name, "float32")))
        model.save_pretrained(folder / name, max_shard_size=SHARDED.get(name, "5GB"))
        if name not in NO_TOKENIZER:
            save_tokenizer(folder / name)
    (folder / "llama" / "LICENSE").write_text("A licence of a tiny model.\n")
    (folder / "llama" / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\n---\n\n# A tiny model\n")
    (folder / "llama" / "modeling_tiny.py").write_text("raise SystemExit('code of a checkpoint ran')\n")
    make_broken_models(folder)
    lines = make_text()
    (folder / "text.txt").write_text("\n".join(lines))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in reversed(lines)))


def make_text() -> list[str]:
    """Return lines of random words, in which every printable character occurs and some are frequent."""
    choose = random.Random(SEED)
    weights = [1 / (1 + place) for place in range(len(string.printable))]
    words = ["".join(choose.choices(string.printable, weights, k=choose.randint(1, 9))) for _ in range(400)]
    return [" ".join(choose.choices(words, k=30)) for _ in range(120)]


def _update(config: dict[str, Any], fields: dict[str, Any]) -> None:
    config.update(fields)


def make_broken_models(folder: Path) -> None:
    """Write checkpoints that a conversion refuses, or takes with an option only."""
    import torch

    bad_key, bad_mlp = "model.layers.1.self_attn.k_proj.weight", "model.layers.0.mlp.up_proj.weight"

    def put_nan(tensors: dict[str, Any]) -> None:
        tensors[bad_mlp][3, 3] = float("nan")

    def cut(tensors: dict[str, Any]) -> None:
        tensors[bad_key] = tensors[bad_key][:-8].clone()

    copy_changed(folder / "mha", folder / "nan", tensors=put_nan)
    copy_changed(folder / "mha", folder / "wrong-shape", tensors=cut)
    copy_changed(folder / "mha", folder / "left-over", tensors=lambda t: t.update({"extra.weight": torch.zeros(3)}))
    copy_changed(folder / "mha", folder / "incomplete", tensors=lambda t: t.pop(bad_key))
    for name, fields in BAD_CONFIGS.items():
        copy_changed(folder / "mha", folder / name, config=partial(_update, fields=fields))
    for name, text in (("not-json", "{"), ("a-list", "[]")):
        copy_changed(folder / "mha", folder / name)
        (folder / name / "config.json").write_text(text)
    copy_changed(folder / "mha", folder / "bad-header")
    with open(folder / "bad-header" / "model.safetensors", "r+b") as file:
        file.seek(8)
        file.write(b"[")
    copy_changed(folder / "qwen2", folder / "no-shard")
    next((folder / "no-shard").glob("model-00002-*")).unlink()
    copy_changed(folder / "qwen2", folder / "outside")
    index = folder / "outside" / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001-", "../model-00001-"))
    copy_changed(folder / "mha", folder / "no-weights")
    (folder / "no-weights" / "model.safetensors").unlink()
    copy_changed(folder / "mha", folder / "no-config")
    (folder / "no-config" / "config.json").unlink()
    copy_changed(folder / "mha", folder / "truncated")
    with open(folder / "truncated" / "model.safetensors", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)
    copy_changed(folder / "mha", folder / "pickled")
    weights = folder / "pickled" / "model.safetensors"
    from safetensors.torch import load_file

    torch.save(load_file(weights), folder / "pickled" / "pytorch_model.bin")
    weights.unlink()


def save_tokenizer(folder: Path) -> None:
    """Write a tokenizer with one token for each byte."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({byte: number for number, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)


def copy_changed(
    source: Path,
    folder: Path,
    *,
    tensors: Callable[[dict[str, Any]], Any] | None = None,
    config: Callable[[dict[str, Any]], Any] | None = None,
) -> None:
    """Copy a model folder and change the copy. Without `source`, which a command did not write, do nothing.

    Args:
        source: the folder to copy.
        folder: the copy.
        tensors: changes the tensors of its model.safetensors in place.
        config: changes the content of its config.json in place.
    """
    from safetensors.torch import load_file, save_file

    if not source.is_dir():
        return
    shutil.copytree(source, folder)
    if tensors is not None:
        content = load_file(folder / "model.safetensors")
        tensors(content)
        save_file(content, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        fields = json.loads((folder / "config.json").read_text())
        config(fields)
        (folder / "config.json").write_text(json.dumps(fields, indent=2))


# --------------------------------------------------------------------------------------------- command lines


class Fresh(str):
    """A command line that always runs in a new interpreter."""


UNCALIBRATED = "--calibrate none"
TEXT = "--calibrate models/text.txt"
ON_TEXT = f"{TEXT} --calibration-tokens 1536"


def command_lines(work: Path) -> Iterator[str]:
    """Yield the command lines in order; between them, change copies of what they wrote.

    Args:
        work: the folder they run in, which holds `models`.
    """
    yield from helps()
    yield from inspections()
    yield from merges()
    yield from calibrations()
    yield from latents()
    yield from positions()
    yield from outputs()
    yield from verifications(work)
    yield from wrong_options()
    yield from wrong_models()
    yield from other_verbs(work)


def helps() -> Iterator[str]:
    """Yield the help of every verb and the recipes."""
    yield Fresh("--help")
    for verb in (
        "inspect",
        "convert",
        "verify",
        "uptrain",
        "eval",
        "bench",
        "card",
        "push",
        "demo",
        "env",
        "recipes",
    ):
        yield Fresh(f"{verb} --help")


def inspections() -> Iterator[str]:
    """Yield `inspect` of every kind of model."""
    yield Fresh("inspect models/demo --json")
    yield "inspect models/demo --context 8192"
    yield "inspect models/llama"
    yield "inspect models/llama --json --context 4096"
    yield "inspect models/llama3 --json --context 200"
    yield "inspect models/mha --context 256 --plot reach.png"
    yield "inspect models/gemma3 --json --context 65536"
    for name in (
        "mistral",
        "qwen2-window",
        "qwen3",
        "phi3",
        "stablelm",
        "gpt_neox",
        "falcon",
        "smollm3",
        "llava",
        "yarn",
    ):
        yield f"inspect models/{name} --json"


def merges() -> Iterator[str]:
    """Yield conversions to fewer, more and as many KV heads, of every model type and by every method."""
    yield Fresh(f"convert models/mha out/optimal --to gqa --groups 2 --refit off {ON_TEXT}")
    for method in ("optimal", "aligned", "mean", "first", "random"):
        yield f"convert models/mha out/{method}-none --to gqa --groups 4 --method {method} {UNCALIBRATED} --json"
    yield f"convert models/mha out/seed --to mqa --method random --seed 5 {UNCALIBRATED} --json"
    for grouping in ("optimal", "contiguous"):
        words = f"--to gqa --groups 4 --grouping {grouping}"
        yield f"convert models/mha out/text-{grouping} {words} --refit off {ON_TEXT} --json"
        yield f"convert models/mha out/mean-{grouping} {words} --method mean {UNCALIBRATED} --json"
    yield "convert models/llama out/llama-mha --to mha --json"
    yield "convert models/mistral out/mistral-14 --to gqa --groups 14 --json"
    yield f"convert models/llama out/llama-mqa --to mqa --refit off {ON_TEXT} --json"
    yield f"convert models/gpt_neox out/gpt_neox --to gqa --groups 3 {UNCALIBRATED} --json"
    yield "convert models/gpt_neox out/gpt_neox --to mha --json"
    yield "convert models/falcon out/falcon --to gqa --groups 1 --json"
    yield "convert models/falcon out/falcon --to mha --json"
    for name in ("mistral", "qwen2", "qwen2-window", "qwen3", "gemma3", "phi3", "phi", "stablelm", "mixtral"):
        yield f"convert models/{name} out/{name} --to mqa --refit off {ON_TEXT} --json"
    for name in ("mha", "qwen3", "olmo2", "phi"):
        yield f"convert models/{name} out/{name}-mean --to mqa --method mean {UNCALIBRATED} --json"
    for name in ("glm4_moe", "exaone4", "yarn"):
        yield f"convert models/{name} out/{name} --to mqa --refit off {ON_TEXT} --json"
    yield f"convert models/qwen3 out/qwen3-aligned --to mqa --method aligned {UNCALIBRATED} --json"
    for name in ("olmo2", "cohere", "smollm3", "granite", "llava"):
        yield f"convert models/{name} out/{name} --to gqa --groups 1 {UNCALIBRATED} --json"


def calibrations() -> Iterator[str]:
    """Yield conversions with every source of calibration text, with moments, and with a refit."""
    yield Fresh("convert models/demo out/demo --to gqa --groups 4 --calibration-tokens 2048 --refit off --json")
    yield "convert models/llama out/builtin --to mqa --calibration-tokens 256 --refit 5 --json"
    rows = "--calibrate models/rows.jsonl --calibration-tokens 512"
    yield f"convert models/llama out/rows --to mqa {rows} --refit 2 -v"
    yield f"convert models/mha out/refit --to gqa --groups 2 --refit 5 {ON_TEXT} --seed 3 --json"
    yield f"convert models/mha out/auto --to gqa --groups 4 {TEXT} --calibration-tokens 256 --json"
    yield f"convert models/qwen3 out/qwen3-refit --to mqa --refit 3 {ON_TEXT} --json"
    yield f"convert models/mha out/saved --to gqa --groups 4 --save-moments moments --refit off {ON_TEXT} --json"
    yield f"convert models/mha out/mean-refit --to gqa --groups 4 --method mean --refit 3 {ON_TEXT} --json"
    yield f"convert models/mha out/again --to gqa --groups 4 --save-moments moments --refit off {ON_TEXT} --json"
    yield "convert models/mha out/reused --to gqa --groups 2 --moments moments --json"
    yield "convert models/mha out/reused-mla --to mla --rank 24 --rope-dim 8 --moments moments --json"
    yield "convert models/llama out/foreign --to mqa --moments moments"


def latents() -> Iterator[str]:
    """Yield conversions to MLA."""
    yield Fresh("convert models/demo out/demo-mla --to mla --cache 50% --calibrate none --json")
    shape = "--to mla --rank 24 --rope-dim 8"
    yield f"convert models/mha out/mla --refit off {shape} {ON_TEXT} --json"
    yield f"convert models/mha out/mla-refit --refit 5 {shape} {ON_TEXT} --json"
    for method in ("transmla", "partial-rope-high", "partial-rope-low", "partial-rope-uniform"):
        words = f"--to mla --rank 24 --rope-dim 16 --method {method} {UNCALIBRATED}"
        yield f"convert models/mha out/{method} {words} --json"
    partial = "--to mla --method partial-rope"
    yield f"convert models/mha out/partial-rope {partial} --cache 25% --refit off {ON_TEXT} --json"
    yield f"convert models/mha out/partial-none {partial} --cache 50% {UNCALIBRATED} --json"
    yield f"convert models/mha out/share --to mla --cache 0.3 --pad-values {UNCALIBRATED} --json"
    yield f"convert models/mha out/free {shape} --rope-frequencies free --refit off {ON_TEXT} --json"
    yield "convert models/mha out/exact --to mla --exact"
    for name in ("llama", "qwen2", "granite", "llama3", "phi3"):
        yield f"convert models/{name} out/{name}-exact --to mla --exact --dtype float32 --json"
    yield f"convert models/qwen2 out/qwen2-mla --to mla --rank 12 --rope-dim 4 {UNCALIBRATED} --json"
    yield f"convert models/qwen2 out/qwen2-mla-refit --to mla --rank 12 --rope-dim 4 --refit 2 {ON_TEXT} --json"
    yield f"convert models/llama out/llama-mla --to mla --cache 50% --refit 2 {ON_TEXT} --json"
    yield f"convert models/smollm3 out/smollm3-mla --to mla --rank 12 --rope-dim 4 --refit off {ON_TEXT} --json"
    yield f"convert models/llama3 out/llama3-plan --to mla --rank 20 --rope-dim 6 {UNCALIBRATED} --dry-run"
    yield f"convert models/llama3 out/llama3-mla --to mla --rank 20 --rope-dim 6 --refit off {ON_TEXT} --json"
    for name in ("mistral", "qwen3", "gemma3", "mixtral", "olmo2", "gpt_neox"):
        yield f"convert models/{name} out/{name}-mla --to mla --rank 12 --rope-dim 4 {UNCALIBRATED} --json"


def positions() -> Iterator[str]:
    """Yield rescaled rotary positions and sliding windows."""
    yield Fresh("convert models/mha out/yarn --context 256 --rope yarn --json")
    for rule in ("auto", "ntk", "linear", "dynamic", "llama3", "longrope"):
        yield f"convert models/mha out/context-{rule} --context 256 --rope {rule} --json"
    yield "convert models/mha out/dynamic --context 256 --rope dynamic --no-verify --json"
    yield "convert models/mha out/base --context 256 --rope base --rope-theta 1e6 --json"
    yield "convert models/llama3 out/llama3-auto --context 512 --json"
    for name in ("yarn", "linear", "phi3-long"):
        yield f"convert models/{name} out/{name}-auto --context 256 --json"
    yield "convert models/linear out/linear-ntk --context 256 --rope ntk --json"
    yield "convert models/yarn out/refused --context 256 --rope llama3"
    yield "convert models/gemma3 out/gemma3-ntk --context 256 --rope ntk --json"
    yield "convert models/gemma3 out/gemma3-context --context 256 --json"
    yield "convert models/gpt_neox out/gpt_neox-context --context 128 --rope ntk --json"
    yield "convert models/phi3 out/phi3-longrope --context 256 --rope longrope --json"
    yield f"convert models/qwen3 out/qwen3-yarn --to mqa --context 256 --rope yarn --refit off {ON_TEXT} --json"
    latent = f"--to mla --rank 24 --rope-dim 8 {UNCALIBRATED}"
    yield f"convert models/mha out/mla-ntk {latent} --context 256 --rope ntk --json"
    yield "convert models/mha out/window --sliding-window 16 --json"
    yield "convert models/mha out/alternate --sliding-window 16 --window-layers alternate --json"
    yield "convert models/qwen2 out/some --sliding-window 16 --window-layers 1 --json"
    yield "convert models/mistral out/unlimited --sliding-window 0 --json"
    yield f"convert models/mistral out/narrow --to mqa --sliding-window 4 {UNCALIBRATED} --json"


def outputs() -> Iterator[str]:
    """Yield plans, precisions, shards and what may stand in the place of OUT."""
    yield Fresh("convert models/demo out/plan --to gqa --groups 2 --dry-run")
    yield "convert models/demo out/plan --to mla --cache 12.5% --dry-run --json"
    yield "convert models/demo out/plan --to mla --cache 60% --pad-values --dry-run"
    yield "convert models/llama out/plan --to mqa --context 256 --dry-run --json"
    yield "convert models/llava out/plan --to mqa --dry-run"
    yield "convert models/mha out/bfloat16 --dtype bfloat16 --json"
    yield f"convert models/qwen2 out/shards --to mqa {UNCALIBRATED} --max-shard-size 20KB --dtype float16 --json"
    yield f"convert models/mha out/resumed --to mqa {UNCALIBRATED} --resume"
    yield f"convert models/mha out/unverified --to mqa {UNCALIBRATED} --no-verify"
    yield f"convert models/mha out/quiet --to mqa {UNCALIBRATED} --quiet"
    yield f"convert models/mha out/quiet --to gqa --groups 2 {UNCALIBRATED} --json"
    yield f"convert models/mha out/quiet --to gqa --groups 2 {UNCALIBRATED} --force --json"
    yield f"convert models/mha out/quiet/inside --to mqa {UNCALIBRATED}"
    yield f"convert models/mha models/mha/inside --to mqa {UNCALIBRATED}"
    yield f"convert models/nan out/nan --to mqa {UNCALIBRATED} --allow-nan --json"
    yield f"convert models/pickled out/pickled --to mqa {UNCALIBRATED} --allow-pickle --json"


def verifications(work: Path) -> Iterator[str]:
    """Yield `verify` of folders as they were written, and of changed copies."""
    yield Fresh("verify out/optimal --json")
    yield "verify out/optimal --against models/mha --json"
    yield "verify out/optimal --against models/llama --json"
    yield "verify out/optimal --hashes"
    yield "verify out/llama-mha --against models/llama"
    yield "verify out/qwen2-exact --against models/qwen2 --json"
    yield "verify out/mla --against models/mha --json"
    yield "verify out/shards --json"
    yield "verify out/alternate --against models/mha --json"
    yield "verify out/yarn --against models/mha --json"
    yield "verify models/mha --json"

    def flip(tensors: dict[str, Any]) -> None:
        tensors["model.layers.1.self_attn.v_proj.weight"][0, 0] += 1

    def flip_other(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.mlp.down_proj.weight"][0, 0] += 1

    def scale(tensors: dict[str, Any]) -> None:
        tensors["model.layers.0.self_attn.kv_a_layernorm.weight"] *= 1000

    out = work / "out"
    copy_changed(out / "optimal", out / "flipped", tensors=flip)
    copy_changed(out / "optimal", out / "lacking", tensors=lambda t: t.pop("model.norm.weight"))
    copy_changed(out / "optimal", out / "other-config", config=lambda c: c.update(rope_theta=5.0, rms_norm_eps=0.1))
    copy_changed(out / "optimal", out / "other-heads", config=lambda c: c.update(num_key_value_heads=4))
    copy_changed(out / "optimal", out / "other-mlp", tensors=flip_other)
    copy_changed(out / "mla", out / "other-latent", tensors=scale)
    copy_changed(out / "mla", out / "other-latent-mlp", tensors=flip_other)
    copy_changed(out / "mla", out / "other-latent-config", config=lambda c: c.update(hidden_act="gelu"))
    copy_changed(out / "optimal", out / "other-tokenizer")
    copy_changed(out / "optimal", out / "no-record")
    copy_changed(out / "optimal", out / "bad-record")
    for folder, file, text in (
        ("other-tokenizer", "tokenizer.json", "{}"),
        ("no-record", "headwise.json", ""),
        ("bad-record", "headwise.json", "[]"),
    ):
        if (out / folder / file).exists():
            (out / folder / file).write_text(text)
    (out / "no-record" / "headwise.json").unlink(missing_ok=True)
    for name in ("flipped", "lacking", "other-config", "other-heads", "other-tokenizer", "no-record", "bad-record"):
        yield f"verify out/{name} --json"
    yield "verify out/flipped --against models/mha"
    yield "verify out/other-config --against models/mha --json"
    yield "verify out/other-mlp --against models/mha --json"
    yield "verify out/other-latent --json"
    yield "verify out/other-latent-mlp --against models/mha --json"
    yield "verify out/other-latent-config --against models/mha --json"
    yield "verify out/mla --against models/llama --json"
    yield "verify out/exact --against models/mha --json"
    yield "verify out/window --against models/mha --json"
    yield "verify out/llava --against models/llava --json"
    yield "verify out/flipped --hashes --json"
    yield "verify out/other-tokenizer --hashes --json"
    yield "verify out/no-record --hashes"
    yield "verify out/nowhere"


def wrong_options() -> Iterator[str]:
    """Yield options that contradict each other, lack another, or name what does not exist."""
    convert = "convert models/mha out/refused"
    for words in (
        "",
        "--to gaq",
        "--to gqa",
        "--to gqa --groups 0",
        "--to gqa --groups 2 --method optimum",
        "--to gqa --groups 2 --method transmla",
        "--to mla --exact --method mean",
        "--to mqa --groups 1",
        "--to mha --calibrate none",
        "--to mha --grouping optimal",
        "--context 256 --refit off",
        "--to mla",
        "--to mla --rank 24",
        "--to mla --rope-dim 8",
        "--to mla --cache 12.5% --rank 24 --rope-dim 8",
        "--to mla --cache 120%",
        "--to mla --exact --refit off",
        "--to mqa --exact",
        "--to mqa --refit never",
        "--to mqa --moments a --save-moments b",
        "--to mqa --calibrate none --calibration-tokens 9",
        "--to mqa --calibrate none --save-moments a",
        "--to mqa --rope ntk",
        "--context 256 --rope base",
        "--context 256 --rope ntk --rope-theta 1e6",
        "--context 256 --rope yam",
        "--to mqa --window-layers all",
        "--to mqa --private",
        "--to mqa --no-verify --push-to-hub org/name",
        "--to mqa --grops 2",
        "--dtype int8",
    ):
        yield Fresh(f"{convert} {words}".strip())
    yield Fresh("convrt models/mha out/refused")
    yield Fresh("convert models/mha")
    yield Fresh("verify out/optimal --hashes --against models/mha")
    yield Fresh("verify out/optimal --revision main")
    yield Fresh("inspect models/mha --plot reach.png")
    yield Fresh("uptrain out/optimal --processes 2")
    yield Fresh("uptrain out/optimal --tokens 1k --fraction 1%")
    yield Fresh("eval out/optimal --fail-above 1%")
    yield Fresh("bench out/optimal")
    for words in (
        "--to gqa --groups 3",
        "--to gqa --groups 16",
        "--to mla --rank 15 --rope-dim 8",
        "--to mla --rank 24 --rope-dim 7",
        "--to mla --cache 1",
        "--to mla --cache 1%",
        "--to mla --exact --dtype float16",
        "--to mla --rank 24 --rope-dim 8 --context 256 --rope dynamic",
        "--context 256 --rope base --rope-theta 1",
        "--to mla --rank 24 --rope-dim 8 --method partial-rope-high",
        "--to mqa --calibrate none --refit 5",
        "--to mqa --calibration-tokens 100",
        "--to mqa --calibrate models/nowhere.txt --refit off",
        "--to mqa --calibrate models/mha --refit off",
        "--to mqa --calibrate hf:org/name --refit off",
        "--to mqa --moments nowhere",
        "--to gqa --groups 8 --refit 5",
        "--context 64",
        "--sliding-window 64",
        "--sliding-window 0",
        "--sliding-window 16 --window-layers 0,7",
        "--sliding-window 16 --window-layers some",
        "--to mqa --calibrate none --max-shard-size much",
        "--to mqa --device cuda:99",
        "--to mqa --revision main",
    ):
        yield f"{convert} {words}"


def wrong_models() -> Iterator[str]:
    """Yield conversions of models that are broken, not there, or of a type that cannot be converted."""
    names = ["no-config", "not-json", "a-list", "truncated", "bad-header", "no-shard", "outside", "no-weights"]
    names += ["pickled", "nan", "wrong-shape", "left-over", "incomplete", "nowhere", "text.txt", "gpt2", "bloom"]
    for name in (*BAD_CONFIGS, *names):
        yield f"convert models/{name} out/refused --to mqa {UNCALIBRATED}"
    yield f"convert models/nan out/refused --to mqa --refit off {ON_TEXT}"
    yield f"convert models/nan out/refused --to mqa --refit off {ON_TEXT} --allow-nan"
    yield "inspect models/bad-rope"
    yield "inspect models/quantised --json"
    yield "convert models/olmo2 out/refused --to mqa --refit off"
    yield "convert models/llama out/refused --sliding-window 16"
    yield "convert models/phi out/refused --sliding-window 16"
    yield "convert models/mixtral out/refused --sliding-window 16 --window-layers 0"
    yield "convert models/gemma3 out/refused --sliding-window 16"
    yield "convert models/smollm3 out/refused --to mla --rank 12 --rope-dim 4 --method transmla"
    yield "convert models/llama3 out/refused --to mla --rank 40 --rope-dim 30"
    yield "convert out/mla out/refused --to mqa"
    yield "inspect out/mla --json"
    yield "inspect models/bloom"
    yield "inspect nobody/nothing"


def other_verbs(work: Path) -> Iterator[str]:
    """Yield the recipes, short trainings, an evaluation, a demo, and refusals of the other verbs."""
    yield Fresh("recipes list --json")
    for name in ("distill", "layerwise", "long-context", "paper", "two-stage", "quick", "standard"):
        yield f"recipes show {name} --json"
    yield "recipes show long-context --eval"
    yield "recipes validate distill"
    yield "recipes show dstill"
    text = "--text models/text.txt --heldout models/rows.jsonl --set data.length=64"
    distil = "--tokens 1k --set train.batch_tokens=256"
    yield f"uptrain out/optimal out/uptrained --teacher models/mha {text} {distil} --json"
    yield "verify out/uptrained --against models/mha --json"
    lora = "--set train.parameters=attention --set 'train.lora={rank: 4}'"
    yield f"uptrain out/optimal out/lora --teacher models/mha {text} {distil} {lora} --json"
    yield f"uptrain out/optimal out/topk --teacher models/mha {text} {distil} --set teacher.topk=8 --json"
    yield f"uptrain out/optimal out/paper --recipe paper {text} {distil} --json"
    layerwise = "--recipe layerwise --set layerwise.tokens=1024 --set layerwise.steps=4"
    yield f"uptrain out/mla out/layerwise --teacher models/mha {text} {layerwise} --json"
    yield "eval out/optimal --baseline models/mha --limit 2 --report out/report --json"
    yield "eval out/mla --limit 2 --report out/alone"
    yield "eval out/optimal --baseline models/mha --limit 2 --report out/gated --fail-above 1%"
    copy_changed(work / "out" / "optimal", work / "out" / "with-figures")
    yield "card out/with-figures out/report"
    yield "card out/flipped out/report"
    yield "verify out/with-figures --hashes --json"
    yield "bench out/optimal --baseline models/mha --context 32 --steps 2 --json"
    yield "env --json"
    yield "demo --quick --model models/mha --out out/demo-picture --json"
    yield "uptrain out/optimal out/refused --teacher models/llama --tokens 1k"
    yield "uptrain out/optimal out/refused --set train.lerning_rate=1"
    yield "push out/flipped org/name --dry-run"
    yield "push out/optimal org/name --dry-run"
    yield "push out/optimal name --dry-run"
    yield "card out/optimal out/nowhere"
    yield "eval out/nowhere"
    yield "bench out/nowhere --baseline models/mha"


# ------------------------------------------------------------------------------------------------- recording


def record(tree: Path, file: Path, fresh: bool) -> int:
    """Run every command line with the package in `tree` and write the recording.

    Returns:
        The exit code.
    """
    if not (tree / "headwise" / "__main__.py").is_file():
        print(f"{tree} holds no headwise package.", file=sys.stderr)
        return 2
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="headwise-recorded-") as folder:
        work = Path(folder).resolve()
        words = [sys.executable, __file__, "worker", str(tree.resolve()), str(file.resolve()), str(work)]
        code = subprocess.run([*words, *(["--fresh"] * fresh)], env=environment(tree, work, forks=True)).returncode
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code == 0:
        cpu = used.ru_utime + used.ru_stime
        count = len(json.loads(file.read_text())["runs"])
        print(f"{count} command lines, {time.monotonic() - start:.0f} s, {cpu:.0f} s of CPU")
    return code


def environment(tree: Path, work: Path, *, forks: bool = False) -> dict[str, str]:
    """Return the environment of a command line: nothing of the caller's but PATH.

    Args:
        tree: the folder that holds the package.
        work: a temporary folder, for caches.
        forks: the process imports the libraries before the command can choose their settings, so choose the same.
    """
    chosen = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    chosen |= dict.fromkeys(("HF_HUB_OFFLINE", "NO_COLOR", "TOKENIZERS_PARALLELISM"), "1") | {"COLUMNS": "100"}
    chosen |= {"TOKENIZERS_PARALLELISM": "false", "PYTHONHASHSEED": "0", "CUDA_VISIBLE_DEVICES": ""}
    chosen |= {"TERM": "dumb", "LC_ALL": "C.UTF-8", "TZ": "UTC", "PATH": os.environ.get("PATH", os.defpath)}
    chosen |= {"HOME": str(work / "home"), "HF_HOME": str(work / "home" / "hf"), "PYTHONPATH": str(tree.resolve())}
    if forks:
        chosen |= {"TRANSFORMERS_VERBOSITY": "critical", "HF_HUB_VERBOSITY": "error"}
        chosen |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return chosen


def worker(tree: Path, file: Path, folder: Path, fresh: bool) -> int:
    """Make the models, run every command line, and write the recording; runs in the environment of `environment`.

    Returns:
        The exit code.
    """
    import safetensors
    import torch
    import transformers
    import transformers.models.deepseek_v3.modeling_deepseek_v3

    place = subprocess.run(
        [sys.executable, "-c", "import headwise; print(headwise.__file__)"],
        env=environment(tree, folder),
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if not Path(place.stdout.strip() or "/").is_relative_to(tree):
        print(f"`import headwise` finds {place.stdout or place.stderr}, and not {tree}.", file=sys.stderr)
        return 2
    del sys.path[0]  # the folder of this script, which a command line does not have
    work = folder / "work"
    (work / "models").mkdir(parents=True)
    make_models(work / "models")
    shutil.copytree(tree / "headwise" / "demo" / "model", work / "models" / "demo")
    for path in work.rglob("*"):
        os.utime(path, (0, MODIFIED))  # the fingerprint of a checkpoint depends on it
    normal = Normalizer(tree, folder)
    known: dict[str, tuple[int, int, int]] = {}
    inputs = contents(work, known, normal)
    assert "headwise" not in sys.modules, "a fork would run with modules that this process imported"
    runs: dict[str, Any] = {}
    for line in command_lines(work):
        assert line not in runs, f"{line} stands twice in the list"
        # Copies that were changed since the last command line are no output of the next one.
        contents(work, known, normal)
        arguments = shlex.split(line)
        start = time.monotonic()
        if fresh or isinstance(line, Fresh):
            code, out, err = run_fresh(arguments, work, environment(tree, folder))
        else:
            code, out, err = run_forked(arguments, work, folder)
        runs[line] = {
            "exit": code,
            "stdout": parsed(out, normal),
            "stderr": normal.lines(err),
            "files": contents(work, known, normal),
        }
        print(f"{time.monotonic() - start:5.1f} s  exit {code}  {line}", file=sys.stderr, flush=True)
    made_with = {"python": platform.python_version(), "machine": platform.machine()}
    made_with |= {library.__name__: library.__version__ for library in (torch, transformers, safetensors)}
    recording = {"made_with": made_with, "inputs": inputs, "runs": runs}
    file.write_text(json.dumps(recording, indent=1, sort_keys=True) + "\n")
    return 0


def run_fresh(arguments: list[str], work: Path, env: dict[str, str]) -> tuple[int, str, str]:
    """Run `python -m headwise` in a new interpreter; return exit code, stdout and stderr."""
    done = subprocess.run(
        [sys.executable, "-m", "headwise", *arguments],
        cwd=work,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    return done.returncode, done.stdout, done.stderr


def run_forked(arguments: list[str], work: Path, folder: Path) -> tuple[int, str, str]:
    """Run the package's `__main__` in a fork of this process; return exit code, stdout and stderr."""
    streams = [folder / "stdout", folder / "stderr"]
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out, err = (path.read_text() for path in streams)
        return code, out, err
    code = 1
    try:
        os.chdir(work)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in enumerate(streams, start=1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), number)
        sys.path.insert(0, str(work))
        sys.argv = ["headwise", *arguments]
        runpy.run_module("headwise", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# ------------------------------------------------------------------------------------- what is written down

# Keys of JSON objects and columns of tables whose values depend on the machine or the moment. The hash of
# uptraining.csv does, for its column of seconds.
VOLATILE = re.compile(
    r"versions|headwise|transformers_version|(?:\w+_)?seconds(?:_per_step)?|\w+_per_second|speedup|uptraining\.csv"
    r"|python|platform|threads|devices|torch|transformers|accelerate|safetensors|huggingface_hub|numpy|triton"
    r"|datasets|peft|lm_eval"
)
# JSON files of which the content is recorded; the commands copy or hash the others byte for byte.
READ = {"config.json", "headwise.json", "moments.json", "report.json", "alone.json", "demo.json"}
DURATION = re.compile(r"\b\d[\d,]*(?:\.\d+)? s\b|\b\d+:\d\d(?::\d\d)?\b")
TIMESTAMP = re.compile(r"\d{4}-\d\d-\d\d[T ]\d\d[:-]\d\d(?:[:-]\d\d(?:\.\d+)?)?(?:Z|[+-]\d\d:?\d\d)?")
VERSION = re.compile(r"\b(headwise|torch|transformers) v?\d+\.\d+\S*\d")
# Lines of progress that come after some seconds only.
MOMENTARY = re.compile(r"^\w[\w ]*: .* (?:left|so far)$")


class Normalizer:
    """Replaces what differs between two recordings of the same behaviour.

    Args:
        tree: the folder that holds the package.
        folder: the temporary folder of the recording.
    """

    def __init__(self, tree: Path, folder: Path) -> None:
        self.paths = {str(folder / "work"): "<work>", str(folder): "<temporary>", str(tree): "<tree>"}

    def text(self, text: str) -> str:
        """Return `text` without temporary paths, timestamps and versions."""
        for path, name in self.paths.items():
            text = text.replace(path, name)
        text = re.sub(r"<tree>/headwise/\S+\.py:\d+", "<source>", text)
        return VERSION.sub(r"\1 <version>", TIMESTAMP.sub("<timestamp>", text))

    def lines(self, text: str) -> list[str]:
        """Return the lines of `text` as `text` does, without durations and lines that only a slow machine shows."""
        lines = [self.text(line.rstrip()) for line in text.splitlines() if not MOMENTARY.match(line)]
        return [DURATION.sub("<duration>", line) for line in lines]

    def data(self, value: Any) -> Any:
        """Return a value of JSON without volatile keys, its strings as `text` returns them."""
        if isinstance(value, dict):
            return {
                key: "<volatile>" if VOLATILE.fullmatch(key) else self.data(item) for key, item in value.items()
            }
        if isinstance(value, list):
            return [self.data(item) for item in value]
        return self.text(value) if isinstance(value, str) else value


def parsed(text: str, normal: Normalizer) -> Any:
    """Return stdout as the JSON object that it is, or as lines."""
    try:
        return normal.data(json.loads(text))
    except ValueError:
        return normal.lines(text)


def contents(work: Path, known: dict[str, tuple[int, int, int]], normal: Normalizer) -> dict[str, Any]:
    """Return the content of the files in `work` that are new or changed since `known`, and update `known`.

    A removed file is there with the content None.
    """
    found: dict[str, Any] = {}
    states = {}
    for path in sorted(work.rglob("*")):
        if path.is_dir():
            continue
        name = path.relative_to(work).as_posix()
        status = path.stat()
        states[name] = (status.st_ino, status.st_size, status.st_mtime_ns)
        if known.get(name) != states[name]:
            found[normal.text(name)] = content(path, normal)
    found |= dict.fromkeys(known.keys() - states.keys())
    known.clear()
    known.update(states)
    return found


def content(path: Path, normal: Normalizer) -> Any:
    """Return what is recorded of one file."""
    try:
        if path.name.startswith("results_"):
            return "<results of lm-eval>"  # it holds the machine, the clock and the state of the repository
        if path.suffix == ".safetensors":
            return tensors_of(path)
        if path.name in READ:
            return normal.data(json.loads(path.read_text()))
        if path.suffix == ".md":
            return normal.lines(path.read_text())
        if path.suffix == ".csv":
            with open(path, newline="") as file:
                return [json.dumps(normal.data(row)) for row in csv.DictReader(file)]
        if path.suffix == ".html":
            return hashed("\n".join(normal.lines(path.read_text())).encode())
    except Exception as problem:
        return f"unreadable ({type(problem).__name__}), {hashed(path.read_bytes())}"
    return hashed(path.read_bytes())


def tensors_of(path: Path) -> dict[str, Any]:
    """Return dtype, shape and SHA-256 of every tensor, the metadata, and the SHA-256 of the file."""
    import torch
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    summary = {}
    for name, tensor in tensors.items():
        data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        summary[name] = f"{tensor.dtype} {list(tensor.shape)} {hashed(data)}"
    return {"metadata": metadata, "tensors": summary, "file": hashed(path.read_bytes())}


def hashed(data: bytes) -> str:
    """Return the SHA-256 in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


# ------------------------------------------------------------------------------------------------- comparing


def compare(a: Path, b: Path, ignored: set[str], everything: bool) -> int:
    """Print the differences of two recordings.

    Returns:
        The exit code: 1 if there are differences.
    """
    old, new = (json.loads(path.read_text()) for path in (a, b))
    for difference in differences(old["made_with"], new["made_with"]):
        print(f"Note: made with other versions: {difference}", file=sys.stderr)
    pairs = {"(inputs)": (old["inputs"], new["inputs"])}
    for line in old["runs"] | new["runs"]:
        pairs[line] = (without(old["runs"].get(line), ignored), without(new["runs"].get(line), ignored))
    changed = 0
    for line, (before, after) in pairs.items():
        found = list(differences(before, after))
        if not found:
            continue
        changed += 1
        print(line)
        shown = found if everything else found[:LINES_SHOWN]
        print("\n".join(f"    {difference}" for difference in shown))
        if len(found) > len(shown):
            print(f"    ... and {len(found) - len(shown)} more")
    print(
        f"{changed} of {len(pairs) - 1} command lines differ."
        if changed
        else f"{len(pairs) - 1} command lines are equal."
    )
    return int(changed > 0)


def without(run: dict[str, Any] | None, ignored: set[str]) -> Any:
    """Return a run without the ignored parts and files; `NO_FILE` where there is no such run."""
    if run is None:
        return NO_FILE
    kept = {part: value for part, value in run.items() if part not in ignored}
    if "files" in kept:
        kept["files"] = {name: value for name, value in kept["files"].items() if Path(name).name not in ignored}
    return kept


def differences(old: Any, new: Any, place: str = "") -> Iterator[str]:
    """Yield a line for each difference of two values of JSON, with its place."""
    if old == new and type(old) is type(new):
        return
    if isinstance(old, dict) and isinstance(new, dict):
        for key in dict.fromkeys([*old, *new]):
            yield from differences(
                old.get(key, NO_FILE), new.get(key, NO_FILE), f"{place} > {key}" if place else key
            )
    elif isinstance(old, list) and isinstance(new, list):
        if any(isinstance(item, str) for item in [*old, *new]):
            lines = difflib.unified_diff([str(x) for x in old], [str(x) for x in new], lineterm="", n=0)
            yield from (f"{place}: {shortened(line)}" for line in list(lines)[2:] if not line.startswith("@@"))
        elif len(old) == len(new):
            for number, pair in enumerate(zip(old, new, strict=True)):
                yield from differences(*pair, f"{place}[{number}]")
        else:
            yield f"{place}: {len(old)} entries -> {len(new)} entries"
    else:
        yield f"{place}: {shortened(json.dumps(old))} -> {shortened(json.dumps(new))}"


def shortened(text: str) -> str:
    """Return the text, cut where it is long."""
    return text if len(text) <= WIDTH_SHOWN else f"{text[: WIDTH_SHOWN - 3]}..."


def main() -> int:
    """Run the command that the arguments name; return the exit code."""
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("record", "worker"):
        command = commands.add_parser(name, help="record TREE in FILE" if name == "record" else argparse.SUPPRESS)
        command.add_argument("tree", type=Path)
        command.add_argument("file", type=Path)
        if name == "worker":
            command.add_argument("folder", type=Path)
        command.add_argument("--fresh", action="store_true", help="use a new interpreter for every command line")
    command = commands.add_parser("compare", help="print the differences of two recordings")
    command.add_argument("a", type=Path)
    command.add_argument("b", type=Path)
    command.add_argument(
        "--ignore", action="append", default=[], metavar="PART", help="exit, stdout, stderr or a file"
    )
    command.add_argument("--all", action="store_true", help="print every difference")
    given = parser.parse_args()
    if given.command == "compare":
        return compare(given.a, given.b, set(given.ignore), given.all)
    if given.command == "worker":
        return worker(given.tree, given.file, given.folder, given.fresh)
    return record(given.tree, given.file, given.fresh)


if __name__ == "__main__":
    sys.exit(main())
