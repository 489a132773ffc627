"""What a model is and what it can become, from its config, its index and the headers of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwise.convert.positions.rope_range import RopeRange, rope_ranges
from headwise.errors import HeadwiseError
from headwise.format import plain_fields
from headwise.io import hub
from headwise.io.reader import read_headers
from headwise.io.source import (
    INDEX,
    SINGLE,
    source_in_folder,
    find_folder,
    read_config,
    read_json,
)
from headwise.models import architecture, mla_source
from headwise.models.config import dtype_of
from headwise.models.layout import CONTEXTS, AttentionLayout, CacheSize, describe
from headwise.models.protocol import LatentModel

# Latent and rotary widths whose cache rows every engine that was tried can hold (docs: engines).
LATENTS = ((256, 64), (448, 64), (512, 64))


@dataclass(frozen=True)
class ReachableLayout:
    """One thing a model can become; `saved` is the share of the cache at the longest of `CONTEXTS`."""

    to: str
    num_key_value_heads: int | None
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    cache: CacheSize
    saved: float


@dataclass(frozen=True)
class Inspection:
    """What config and headers tell about a model.

    `parameters` is counted in the headers, or estimated from the index's size (`parameters_from` says which:
    "headers" or "index"), or None. `mla` is None if the model can become MLA, or the reason why it cannot.
    """

    model: str
    revision: str | None
    model_type: str
    dtype: torch.dtype
    parameters: int | None
    parameters_from: str | None
    layouts: tuple[AttentionLayout, ...]
    cache: CacheSize
    options: tuple[ReachableLayout, ...]
    mla: str | None
    rope_ranges: tuple[RopeRange, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            **plain_fields(self, "layouts", "cache", "options", "rope_ranges"),
            "layers": [describe(layout) for layout in self.layouts],
            "cache": asdict(self.cache),
            "options": [asdict(option) for option in self.options],
            "reach": [rope_range.to_dict() for rope_range in self.rope_ranges],
        }


def inspect_model(
    model: str | Path, *, context: int | None = None, revision: str | None = None, token: str | None = None
) -> Inspection:
    """Inspect a local folder or a Hub repository; nothing but config, index and headers is read.

    Args:
        context: also say how far the rotary frequencies carry, up to this many tokens.

    Raises:
        HeadwiseError: there is no such model, or its type cannot be converted.
    """
    folder, commit = find_folder(model, revision=revision, token=token, patterns=["config.json", INDEX])
    config = read_config(folder)
    dtype = dtype_of(config)
    parameters, origin = _count_parameters(str(model), folder, commit, token, dtype)
    if LatentModel.wrote(config):
        layouts = LatentModel(config).layouts
        return Inspection(
            model=str(model),
            revision=commit,
            model_type=config["model_type"],
            dtype=dtype,
            parameters=parameters,
            parameters_from=origin,
            layouts=tuple(layouts),
            cache=CacheSize.of(layouts, dtype),
            options=(),
            mla="its attention is latent already",
        )
    arch = architecture.find_architecture(config)
    layouts = arch.layouts(config)
    cache = CacheSize.of(layouts, dtype)
    mla = _why_not_mla(arch.text_config(config), dtype)
    return Inspection(
        model=str(model),
        revision=commit,
        model_type=arch.wrapper or arch.model_type,
        dtype=dtype,
        parameters=parameters,
        parameters_from=origin,
        layouts=tuple(layouts),
        cache=cache,
        options=tuple(_options(layouts, arch.legal_groups(config), cache, dtype, mla is None)),
        mla=mla,
        rope_ranges=tuple(rope_ranges(config, arch, context)) if context else (),
    )


def _options(
    layouts: Sequence[AttentionLayout], legal: Sequence[int], cache: CacheSize, dtype: torch.dtype, mla: bool
) -> Iterator[ReachableLayout]:
    for groups in legal:
        new = [layout.with_groups(groups) for layout in layouts]
        if new != list(layouts):
            after = CacheSize.of(new, dtype)
            yield ReachableLayout(new[0].kind, groups, None, None, after, _saved(cache, after))
    for rank, rope in LATENTS if mla else ():
        # The stock MLA class has no windows.
        new = [replace(x, kv_lora_rank=rank, qk_rope_head_dim=rope, sliding_window=None) for x in layouts]
        after = CacheSize.of(new, dtype)
        if after.bytes_per_token < cache.bytes_per_token:
            yield ReachableLayout("mla", None, rank, rope, after, _saved(cache, after))


def _saved(before: CacheSize, after: CacheSize) -> float:
    return 1 - after.at[CONTEXTS[-1]] / before.at[CONTEXTS[-1]]


def _why_not_mla(text_config: dict[str, Any], dtype: torch.dtype) -> str | None:
    try:
        mla_source.find_mla_source(text_config, dtype)
    except HeadwiseError as error:
        return error.message
    return None


def _count_parameters(
    model: str, folder: Path, commit: str | None, token: str | None, dtype: torch.dtype
) -> tuple[int | None, str | None]:
    if commit is not None:
        counted = hub.count_parameters(hub.split_revision(model)[0], commit, token)
        if counted is not None:
            return counted, "headers"
    elif (folder / SINGLE).is_file() or any(folder.glob("model-*.safetensors")):
        tensors = read_headers(source_in_folder(model, folder)).tensors.values()
        return sum(math.prod(entry.shape) for entry in tensors), "headers"
    metadata = read_json(folder, INDEX).get("metadata") if (folder / INDEX).is_file() else None
    known = metadata if isinstance(metadata, dict) else {}
    if isinstance(known.get("total_parameters"), int):
        return known["total_parameters"], "index"
    if isinstance(known.get("total_size"), int):
        return known["total_size"] // dtype.itemsize, "index"
    return None, None
