"""Rewrite an MLA folder so that plain quantizers keep it: a prototype, measured in docs/results/serving.md.

The rows before the latent norm are near 1e-7, where float16 and the scales of quantized types have no digits. A
power of two moves from them into `input_layernorm`, which GGUF keeps in float32. All other readers of the
normalized hidden state grow by the same power, so that the function is the same. A larger tolerance of the linear
norm (`deepseek.linear_norm`) makes the rows larger still.

    python -m tests.llama_cpp.rescale FOLDER OUT TOLERANCE EXPONENT
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

from headwise.models.deepseek import NORM_EPS, NORM_TOLERANCE


def rescale(folder: Path, out: Path, tolerance: float = NORM_TOLERANCE, exponent: int = 11) -> None:
    """Write the rescaled folder.

    Args:
        folder: an MLA model in one weight file.
        out: the folder to make.
        tolerance: relative error of the latent norm for a token of ordinary size.
        exponent: of the power of two that moves into `input_layernorm`.
    """
    shutil.copytree(folder, out, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors, rank = load_file(folder / "model.safetensors"), config["kv_lora_rank"]
    steps = [math.floor(math.log2(math.sqrt(2 * NORM_EPS * size))) for size in (NORM_TOLERANCE, tolerance)]
    larger, moved = 2.0 ** (steps[1] - steps[0]), 2.0**exponent
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn"
        tensors[f"model.layers.{layer}.input_layernorm.weight"] /= moved
        tensors[f"{prefix}.kv_a_proj_with_mqa.weight"] *= moved
        tensors[f"{prefix}.kv_a_proj_with_mqa.weight"][:rank] *= larger
        tensors[f"{prefix}.kv_b_proj.weight"] /= larger
        if config["q_lora_rank"] is None:
            tensors[f"{prefix}.q_proj.weight"] *= moved
        else:
            tensors[f"{prefix}.q_a_proj.weight"] *= moved * larger
            tensors[f"{prefix}.q_b_proj.weight"] /= larger
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})


if __name__ == "__main__":
    rescale(Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4]))
