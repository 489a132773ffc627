"""Metadata and tensor names of a GGUF file -> config.json and tensor names of a stock class.

An architecture is a row of `gguf.yaml`. Metadata that has an effect and no place in the stock class is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from headwise.errors import HeadwiseError

LAYER_TENSOR = re.compile(r"blk\.(\d{1,5})\.(.+)\.(weight|bias)")
MODEL_TENSOR = re.compile(r"(.+)\.(weight|bias)")
ROPE_FACTORS = "rope_freqs.weight"
# Largest relative error of the frequency factors that a known rule explains; they are float32.
FACTOR_TOLERANCE = 1e-4
DEFAULT_ROPE_THETA = 10000.0
# Keys of config.json <- metadata. The tokens that begin, end and pad a text.
TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


@dataclass(frozen=True)
class GgufRow:
    """One row of `gguf.yaml`, whose comments describe the fields."""

    architecture: str
    model_type: str
    class_name: str
    counts: dict[str, str]
    optional_counts: dict[str, str]
    numbers: dict[str, str]
    constants: dict[str, Any]
    flags: dict[str, str]
    neutral: dict[str, Any]
    tensors: dict[str, str]
    layer_tensors: dict[str, str]
    interleaved: tuple[str, ...]
    norm_offset: float
    local_rope_theta: float | None
    window_pattern: int | None
    score_scale_of_hidden_size: tuple[int, ...] | None


@dataclass(frozen=True)
class Placement:
    """Where a tensor of the stock class comes from.

    Attributes:
        source: its name in the GGUF file.
        interleaved_heads: number of heads whose rotary rows are interleaved in the file; 0: none are.
        norm_offset: what the file adds to the values.
    """

    source: str
    interleaved_heads: int = 0
    norm_offset: float = 0.0


@lru_cache(maxsize=1)
def load_gguf_table() -> dict[str, Any]:
    """Return gguf.yaml."""
    result: dict[str, Any] = yaml.safe_load(resources.files(__package__).joinpath("gguf.yaml").read_text("utf-8"))
    return result


def find_gguf_row(metadata: Mapping[str, Any], path: Path) -> GgufRow:
    """Return the row of a file.

    Args:
        metadata: of the file.
        path: of the file.

    Raises:
        HeadwiseError: its architecture has no row.
    """
    rows = load_gguf_table()["architectures"]
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in rows:
        raise HeadwiseError(
            f"{path} has general.architecture: {architecture!r}, which headwise cannot read from a GGUF file.",
            f"Use the model's safetensors checkpoint. Supported in GGUF files: {', '.join(sorted(rows))}.",
        )
    row = dict(rows[architecture])
    names = " ".join(str(metadata.get(key, "")) for key in ("general.basename", "general.name")).lower()
    for part, changed in row.pop("variants").items():
        if part in names:
            row |= changed
    frozen = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
    return GgufRow(
        architecture=architecture,
        **{f.name: frozen[f.name] for f in fields(GgufRow) if f.name in frozen},  # type: ignore[arg-type]
    )


def config_from_metadata(
    metadata: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    row: GgufRow,
    path: Path,
    *,
    tied: bool,
    rope_factors: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return config.json of a GGUF file.

    Args:
        metadata: of the file.
        shapes: of all its tensors, in the order of torch.
        row: of its architecture.
        path: of the file, for messages.
        tied: whether the output head is the embedding.
        rope_factors: the values of `rope_freqs.weight`, divisors of the rotary frequencies.

    Raises:
        HeadwiseError: a key is missing or has an impossible value, or has an effect without a place in the class.
    """
    reader = _Metadata(metadata, row.architecture, path)
    for key, neutral in row.neutral.items():
        if (value := reader.get(key, neutral)) != neutral:
            raise reader.error(key, f"is {value!r}, which the stock {row.model_type} class cannot compute")
    config: dict[str, Any] = {"architectures": [row.class_name], "model_type": row.model_type, **row.constants}
    config |= {name: reader.count(key) for name, key in row.counts.items()}
    config |= {name: reader.count(key) for name, key in row.optional_counts.items() if reader.get(key)}
    config |= {name: reader.number(key) for name, key in row.numbers.items()}
    heads = config["num_attention_heads"]
    config["num_key_value_heads"] = groups = reader.count("attention.head_count_kv", heads)
    layers = {layer for layer in (_split_name(name)[0] for name in shapes) if layer is not None}
    if len(layers) != config["num_hidden_layers"]:
        raise reader.error(
            "block_count", f"is {config['num_hidden_layers']}, and the file holds {len(layers)} layers"
        )
    config["vocab_size"] = reader.rows_of("token_embd.weight", shapes)
    config["head_dim"] = head_dim = _head_dim(reader, shapes, heads, groups)
    config |= {name: f"blk.0.{tensor}" in shapes for name, tensor in row.flags.items()}
    config["tie_word_embeddings"] = tied
    config |= _rope(reader, row, head_dim, rope_factors)
    if row.window_pattern:
        config["layer_types"] = _layer_types(reader, config["num_hidden_layers"], row.window_pattern)
    if row.score_scale_of_hidden_size:
        wide = config["num_hidden_layers"] in row.score_scale_of_hidden_size
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if wide else head_dim
    for name, key in TOKEN_IDS.items():
        if isinstance(value := metadata.get(key), int) and 0 <= value < config["vocab_size"]:
            config[name] = value
    return config


def place_tensors(
    shapes: Mapping[str, tuple[int, ...]], row: GgufRow, config: Mapping[str, Any], path: Path
) -> dict[str, Placement]:
    """Return where every tensor of the stock class comes from, in the order of the file.

    Args:
        shapes: of the file's tensors.
        row: of its architecture.
        config: from `make_config`.
        path: of the file, for messages.

    Raises:
        HeadwiseError: a tensor of the file has no place in the stock class.
    """
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    unused = load_gguf_table()["unused_layer_tensors"]
    placements: dict[str, Placement] = {}
    for name in shapes:
        if name == ROPE_FACTORS or (name == "output.weight" and config["tie_word_embeddings"]):
            continue
        layer, part, suffix = _split_name(name)
        if layer is not None and part in unused:
            continue
        known = row.tensors if layer is None else row.layer_tensors
        if part not in known or (layer is not None and layer >= config["num_hidden_layers"]):
            raise HeadwiseError(
                f"{path} has a tensor {name}, which has no place in the stock {row.model_type} class.",
                "Use the model's safetensors checkpoint.",
            )
        prefix = "" if layer is None else f"model.layers.{layer}."
        placements[f"{prefix}{known[part]}.{suffix}"] = Placement(
            name,
            heads[part] if part in row.interleaved else 0,
            row.norm_offset if part.endswith("norm") else 0.0,
        )
    return placements


def generation_config(metadata: Mapping[str, Any], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return generation_config.json: the tokens of `TOKEN_IDS`, and the end of a turn among those that end a text.

    Args:
        metadata: of the file.
        config: from `make_config`.
    """
    ids = {name: config[name] for name in TOKEN_IDS if name in config}
    turn = metadata.get("tokenizer.ggml.eot_token_id")
    if "eos_token_id" in ids and isinstance(turn, int) and turn not in (ids["eos_token_id"], -1):
        ids["eos_token_id"] = [ids["eos_token_id"], turn]
    return ids


def card_fields(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a model card's front matter that the metadata of a file hold.

    Args:
        metadata: of the file.
    """
    keys = {
        "license": "general.license",
        "license_name": "general.license.name",
        "license_link": "general.license.link",
        "language": "general.languages",
    }
    return {name: metadata[key] for name, key in keys.items() if isinstance(metadata.get(key), str | list)}


class _Metadata:
    """Metadata of an architecture, by the part of the key behind its name."""

    def __init__(self, metadata: Mapping[str, Any], architecture: str, path: Path) -> None:
        self._metadata, self._architecture, self._path = metadata, architecture, path

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self._architecture}.{key}", default)

    def number(self, key: str, default: Any = None) -> Any:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "is no single number, and a stock class has layers of one shape")
        if not 0 < value < 1e30:
            raise self.error(key, f"is {value!r}, and a number above 0 is needed")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int):
            raise self.error(key, f"is {value!r}, and a whole number is needed")
        return value

    def rows_of(self, tensor: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
        if len(shapes.get(tensor, ())) != 2:
            raise HeadwiseError(
                f"{self._path} has no matrix {tensor}.", "The file is incomplete: download it again."
            )
        return shapes[tensor][0]

    def error(self, key: str, reason: str) -> HeadwiseError:
        return HeadwiseError(
            f"{self._path}: {self._architecture}.{key} {reason}.", "Use the model's safetensors checkpoint."
        )


def _head_dim(reader: _Metadata, shapes: Mapping[str, tuple[int, ...]], heads: int, groups: int) -> int:
    """Return the dimensions of a head by the shapes of layer 0; all of them rotate."""
    for part, count in (("q", heads), ("k", groups), ("v", groups)):
        rows = reader.rows_of(f"blk.0.attn_{part}.weight", shapes)
        head_dim = rows // count
        if rows % count or (part != "q" and head_dim != shapes["blk.0.attn_q.weight"][0] // heads):
            raise reader.error(
                "attention.head_count",
                f"is {heads}, with {groups} KV heads, and attn_{part}.weight has {rows} rows",
            )
    for key in ("attention.key_length", "attention.value_length", "rope.dimension_count"):
        if (value := reader.get(key, head_dim)) != head_dim:
            raise reader.error(key, f"is {value!r}, and the tensors have heads of {head_dim} dimensions")
    return head_dim


def _rope(reader: _Metadata, row: GgufRow, head_dim: int, factors: np.ndarray | None) -> dict[str, Any]:
    theta = float(reader.number("rope.freq_base", DEFAULT_ROPE_THETA))
    rope: dict[str, Any] = {"rope_theta": theta, "rope_type": "default"}
    kind = reader.get("rope.scaling.type", "none")
    factor = reader.get("rope.scaling.factor", reader.get("rope.scale_linear"))
    if kind in ("linear", "none") and factor is not None and factor not in (0, 1):
        rope |= {"rope_type": "linear", "factor": float(reader.number("rope.scaling.factor", factor))}
    elif kind == "yarn":
        names = {"beta_fast": "rope.scaling.yarn_beta_fast", "beta_slow": "rope.scaling.yarn_beta_slow"}
        rope |= {
            "rope_type": "yarn",
            "factor": float(reader.number("rope.scaling.factor")),
            "original_max_position_embeddings": reader.count("rope.scaling.original_context_length"),
            **{name: float(reader.number(key)) for name, key in names.items() if reader.get(key) is not None},
        }
    elif kind not in ("linear", "none"):
        raise reader.error("rope.scaling.type", f"is {kind!r}, and only linear and yarn can be read")
    for key, neutral in (("rope.scaling.attn_factor", 1.0), ("rope.scaling.yarn_log_multiplier", 0.0)):
        if (value := reader.get(key, neutral)) != neutral:
            raise reader.error(key, f"is {value!r}, and only {neutral} can be read")
    if factors is not None and not np.allclose(factors, 1.0, rtol=FACTOR_TOLERANCE):
        rope |= _llama3_rope(reader, theta, head_dim, factors)
    if row.local_rope_theta is None:
        return {"rope_parameters": rope}
    local = float(reader.number("rope.freq_base_swa", row.local_rope_theta))
    return {
        "rope_parameters": {
            "full_attention": rope,
            "sliding_attention": {"rope_theta": local, "rope_type": "default"},
        }
    }


def _llama3_rope(reader: _Metadata, theta: float, head_dim: int, factors: np.ndarray) -> dict[str, Any]:
    """Return the llama3 rule whose divisors of the rotary frequencies are in the file."""
    rule = load_gguf_table()["llama3_rope"]
    factor = float(factors.max())
    low, high, length = rule["low_freq_factor"], rule["high_freq_factor"], rule["original_max_position_embeddings"]
    turns = length * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)  # within the original length
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=FACTOR_TOLERANCE):
        raise reader.error("rope", f"has factors in {ROPE_FACTORS} that the llama3 rule does not explain")
    return {"rope_type": "llama3", "factor": float(f"{factor:.6g}"), **rule}


def _layer_types(reader: _Metadata, num_layers: int, default: int) -> list[str]:
    """Return whether each layer has a window, from a period or from one truth value for each layer."""
    pattern = reader.get("attention.sliding_window_pattern", default)
    if isinstance(pattern, np.ndarray):
        if len(pattern) != num_layers:
            raise reader.error(
                "attention.sliding_window_pattern", f"has {len(pattern)} entries for {num_layers} layers"
            )
        windows = [bool(value) for value in pattern]
    else:
        period = reader.count("attention.sliding_window_pattern", default)
        windows = [(layer + 1) % period != 0 for layer in range(num_layers)]
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _split_name(name: str) -> tuple[int | None, str, str]:
    """Layer, part and suffix of a tensor's name; an empty part for a name of another form."""
    if match := LAYER_TENSOR.fullmatch(name):
        return int(match[1]), match[2], match[3]
    if match := MODEL_TENSOR.fullmatch(name):
        return None, match[1], match[2]
    return None, "", ""
