"""Inspect a model: its attention, its cache and the layouts it can be converted to, from config and headers."""

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
from headwise.io.gguf import open_gguf
from headwise.io.reader import Checkpoint, read_headers
from headwise.io.source import (
    INDEX,
    SINGLE,
    find_folder,
    find_gguf,
    read_config,
    read_json,
    read_weight_map,
    source_in_folder,
)
from headwise.models import architecture, mla_source
from headwise.models.config import dtype_of
from headwise.models.layout import CONTEXTS, AttentionLayout, CacheSize, describe
from headwise.models.protocol import find_attention_model
from headwise.models.stock_match import match_source, refuse_quantised_names
from headwise.records.manifest import recorded_damage

# Pairs (kv_lora_rank, qk_rope_head_dim) with cache rows that engines support (serving/engines.yaml).
LATENTS = ((256, 64), (448, 64), (512, 64))


@dataclass(frozen=True)
class ReachableLayout:
    """A layout that a model can be converted to.

    Attributes:
        to: the value of `to` for the conversion.
        num_key_value_heads: of a grouped layout; None for MLA.
        kv_lora_rank: of MLA; else None.
        qk_rope_head_dim: of MLA; else None.
        cache: size of the KV cache.
        saved: fraction of the present cache that is saved at the longest of `CONTEXTS`.
    """

    to: str
    num_key_value_heads: int | None
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    cache: CacheSize
    saved: float


@dataclass(frozen=True)
class Inspection:
    """The attention of a model and its possible layouts.

    Attributes:
        model: the model as it was given.
        revision: the commit of a Hub repository; None for a local folder.
        model_type: as in config.json.
        dtype: of the weights.
        parameters: number of parameters; None if it is unknown.
        parameters_from: "headers" (counted), "index" (estimated from its size) or None.
        layouts: of every layer.
        cache: size of the KV cache.
        options: the layouts it can be converted to.
        mla: why MLA is not possible; None if it is.
        rope_ranges: the ranges of the rotary frequencies; empty without `context`.
        damage: recorded damage of every layer of a converted folder, in nats per token; else empty.
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
    damage: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as plain data."""
        return {
            **plain_fields(self, "layouts", "cache", "options", "rope_ranges", "damage"),
            "layers": [describe(layout) for layout in self.layouts],
            "cache": asdict(self.cache),
            "options": [asdict(option) for option in self.options],
            "damage": list(self.damage),
            "reach": [rope_range.to_dict() for rope_range in self.rope_ranges],
        }


def inspect_model(
    model: str | Path, *, context: int | None = None, revision: str | None = None, token: str | None = None
) -> Inspection:
    """Inspect a model; only config, index and headers are read.

    Args:
        model: a folder, a GGUF file, or `org/name[@revision]` on the Hub.
        context: also check the rotary frequencies up to this many tokens.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub.

    Raises:
        HeadwiseError: there is no such model, or its type cannot be converted.
    """
    parameters: int | None
    origin: str | None
    damage: tuple[float, ...] = ()
    if (path := find_gguf(model, revision)) is not None:
        opened, commit = open_gguf(path), None
        config, dtype = opened.config, opened.dtype
        parameters, origin = sum(math.prod(entry.shape) for entry in opened.entries.values()), "headers"
    else:
        folder, commit = find_folder(model, revision=revision, token=token, patterns=["config.json", INDEX])
        config = read_config(folder)
        if (matched := _match_headers(str(model), folder, commit)) is not None:
            config = matched.config
            parameters, origin = sum(math.prod(entry.shape) for entry in matched.tensors.values()), "headers"
        else:
            parameters, origin = _count_parameters(str(model), folder, commit, token, dtype_of(config))
        dtype = dtype_of(config)
        damage = recorded_damage(folder)
    layouts = find_attention_model(config).layouts(config)
    if layouts[0].kind == "mla":
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
            mla="the model has MLA already",
            damage=damage,
        )
    arch = architecture.find_architecture(config)
    cache = CacheSize.of(layouts, dtype)
    mla = _why_not_mla(arch.text_config(config), layouts, dtype)
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
        damage=damage,
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


def _why_not_mla(text_config: dict[str, Any], layouts: Sequence[AttentionLayout], dtype: torch.dtype) -> str | None:
    try:
        mla_source.find_mla_source(text_config, dtype)
        mla_source.refuse_windows(layouts)
    except HeadwiseError as error:
        return error.message
    return None


def _match_headers(model: str, folder: Path, commit: str | None) -> Checkpoint | None:
    """Match the tensors of a local folder with the stock class; None: no headers are at hand.

    Of a Hub repository only the names in its index are known.
    """
    if commit is not None:
        if (folder / INDEX).is_file():
            refuse_quantised_names(model, read_weight_map(folder, INDEX))
        return None
    if not ((folder / SINGLE).is_file() or any(folder.glob("model-*.safetensors"))):
        return None
    opened = read_headers(source_in_folder(model, folder))
    grouped = find_attention_model(opened.config, opened.tensors).layouts(opened.config)[0].kind != "mla"
    return match_source(opened) if grouped else opened


def _count_parameters(
    model: str, folder: Path, commit: str | None, token: str | None, dtype: torch.dtype
) -> tuple[int | None, str | None]:
    if commit is not None:
        count = hub.count_parameters(hub.split_revision(model)[0], commit, token)
        if count is not None:
            return count, "headers"
    metadata = read_json(folder, INDEX).get("metadata") if (folder / INDEX).is_file() else None
    sizes = metadata if isinstance(metadata, dict) else {}
    if isinstance(sizes.get("total_parameters"), int):
        return sizes["total_parameters"], "index"
    if isinstance(sizes.get("total_size"), int):
        return sizes["total_size"] // dtype.itemsize, "index"
    return None, None
