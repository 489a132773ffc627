"""A tiny parent with the embedded model's tokenizer, and folders converted from it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

from headwise.convert.pipeline import convert_model
from headwise.io.source import EMBEDDED_MODEL
from tests import tiny_models

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
}


def parent(folder: Path, kind: str = "llama", **fields: Any) -> Path:
    """A random stock model in float32, with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{"vocab_size": len(tokenizer), **SHAPE, **fields})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def tiny_parent(folder: Path, kind: str, **fields: Any) -> Path:
    """A random stock model that reads images or pairs as well, with a tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tiny_models.save(kind, folder, vocab_size=len(tokenizer), **fields)
    tokenizer.save_pretrained(folder)
    return folder


def seeing_parent(folder: Path, **heads: Any) -> Path:
    """A random LLaVA with the stock processor of images: every image becomes four tokens."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    tiny_models.save("llava", folder, vocab_size=len(tokenizer), **heads)
    config = tiny_models.read_config(folder) | {"image_token_index": len(tokenizer) - 1}
    (folder / "config.json").write_text(json.dumps(config))
    size: Any = {"height": 8, "width": 8}
    images = transformers.CLIPImageProcessorPil(size=size, crop_size=size)
    shape = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    transformers.LlavaProcessor(images, tokenizer, **shape).save_pretrained(folder)
    return folder


def tiled_parent(folder: Path) -> Path:
    """A random mllama with its stock processor: every image becomes up to four tiles."""
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED_MODEL)
    tokenizer.add_special_tokens({"bos_token": tokenizer.eos_token, "additional_special_tokens": ["<|image|>"]})
    tiny_models.save("mllama", folder, vocab_size=len(tokenizer))
    config = tiny_models.read_config(folder) | {"image_token_index": len(tokenizer) - 1}
    (folder / "config.json").write_text(json.dumps(config))
    images: Any = transformers.MllamaImageProcessorPil(size={"height": 8, "width": 8}, max_image_tiles=4)
    transformers.MllamaProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def image_pairs(folder: Path, count: int = 12) -> Path:
    """A file of image-text pairs beside its images, which are noise; texts differ in length."""
    folder.mkdir()
    noise = np.random.default_rng(0)
    rows = []
    for n in range(count):
        Image.fromarray(noise.integers(0, 256, (9, 12, 3), dtype=np.uint8)).save(folder / f"{n}.png")
        rows.append({"image": f"{n}.png", "text": f"noise number {n} " * (1 + n % 4)})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


def converted(model: Path, out: Path, **arguments: Any) -> Path:
    """Convert it without reading text."""
    defaults = {} if arguments.get("exact") else {"calibrate": "none", "refit": "off"}
    convert_model(model, out, verify=False, **{**defaults, **arguments})
    return out


def pairs(path: Path, lines: int = 60) -> Path:
    """A file of pairs; targets differ in length."""
    rows = [
        {"source": f"def f{n}(x): return x * {n}", "target": f"multiplies by {n} " * (1 + n % 3)}
        for n in range(lines)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text(path: Path, lines: int = 600) -> Path:
    """A file of short documents that a tiny model can learn something of."""
    chosen = random.Random(0)
    names = ["alpha", "beta", "gamma", "delta"]
    path.write_text(
        "".join(
            f"def {chosen.choice(names)}_{i}(x):\n    return x + {chosen.randint(0, 9)}\n\n\n" for i in range(lines)
        )
    )
    return path
