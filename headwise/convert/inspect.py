"""Inspect a model: its attention, its cache and the layouts it can be converted to, from config and headers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from headwise.convert.from_mla.heads import expands, plan_heads, refuse_output_biases
from headwise.convert.from_mla.target import reduced_config
from headwise.convert.mla.exact import latent_layout
from headwise.convert.mla.size_choice import listed_sizes, sizes_note
from headwise.convert.positions.rope_range import RopeRange, rope_ranges
from headwise.errors import HeadwiseError, SettingError
from headwise.fields import whole_number
from headwise.format import dtype_name, latent_name, plain_fields, size
from headwise.io import hub
from headwise.io.gguf import open_gguf
from headwise.io.quantized.quantization import PLAIN_DTYPE, plain_config, quantization_of, refuse_quantised_names
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
from headwise.io.tokenizer import tokenizer_kind
from headwise.models import architecture, mla_source
from headwise.models.architecture import Architecture
from headwise.models.config import dtype_of, stored_dtype
from headwise.models.layout import AttentionLayout, CacheSize, describe, state_bytes
from headwise.models.protocol import context_length, find_attention_model, latent_model
from headwise.models.stock_match import match_source
from headwise.records.manifest import recorded_damage
from headwise.serving.engines import EngineVerdict, cache_rows
from headwise.serving.latent_shape import latent_config, pad_layout, with_powers
from headwise.serving.model_forecast import ModelForecast, count_parameters_of
from headwise.serving.planner import ServingForecast
from headwise.serving.settings import ServingSettings
from headwise.serving.weight_files import WeightFiles, known_size

TWO_CACHES = (
    "The cache counts one token of the source and one of the target: cross-attention caches the encoder's tokens, "
    "self-attention the decoder's."
)
MERGED_CACHES = (
    "The cache counts one token of the source and one of the target: every layer of the decoder caches both."
)
INDEXERS = "the model has MLA already, and its indexers fit no other; convert the model that it was made from"
REDUCED = "A smaller MLA is approximate. These are examples: every rank below the model's is possible."
EXPANDED = "MHA is exact: every query head gets the keys and values that the latent expands to."
LINEAR_NORMS = (
    "MLA is approximate at every size: the model normalises queries and keys, and linear maps replace the norms."
)


@dataclass(frozen=True)
class ReachableLayout:
    """A layout that a model can be converted to.

    Attributes:
        to: the value of `to` for the conversion.
        num_key_value_heads: of a grouped layout; None for MLA.
        kv_lora_rank: of MLA; else None.
        qk_rope_head_dim: of MLA; else None.
        cache: size of the KV cache.
        saved: fraction of the present cache that is saved at the longest context of `cache`.
        serving: what it costs on each GPU; None without a forecast.
        engines: verdicts of the engines that the settings name, or of all.
    """

    to: str
    num_key_value_heads: int | None
    kv_lora_rank: int | None
    qk_rope_head_dim: int | None
    cache: CacheSize
    saved: float
    serving: ServingForecast | None = None
    engines: tuple[EngineVerdict, ...] = ()

    @property
    def name(self) -> str:
        """Return "GQA-8", "MQA", "MHA" or "MLA 512+64"."""
        if self.kv_lora_rank is not None:
            return latent_name(self.kv_lora_rank, self.qk_rope_head_dim)
        return f"GQA-{self.num_key_value_heads}" if self.to == "gqa" else self.to.upper()

    def to_dict(self) -> dict[str, Any]:
        """Return the layout as plain data."""
        return asdict(self) | {"engines": [verdict.to_dict() for verdict in self.engines]}


@dataclass(frozen=True)
class Inspection:
    """The attention of a model and its possible layouts.

    Attributes:
        model: the model as it was given.
        revision: the commit of a Hub repository; None for a local folder.
        model_type: as in config.json.
        dtype: of the weights.
        parameters: number of parameters; None if it is unknown.
        parameters_from: "headers" (counted), "index" (estimated from its size), "config" (counted in the stock
            class without weights) or None.
        layouts: of every layer.
        cache: size of the KV cache.
        options: the layouts it can be converted to.
        mla: why MLA is not possible; None if it is.
        rope_ranges: the ranges of the rotary frequencies; empty without `context`.
        damage: recorded damage of every layer of a converted folder, in nats per token; else empty.
        serving: what the model itself costs on each GPU; None without a forecast.
        engines: verdicts of the engines that the settings name, or of all, on the model itself.
        notes: what a user should know before a conversion.
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
    serving: ServingForecast | None = None
    engines: tuple[EngineVerdict, ...] = ()
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return the inspection as plain data."""
        return {
            **plain_fields(self, "layouts", "cache", "options", "rope_ranges", "damage", "serving", "engines"),
            "layers": [describe(layout) for layout in self.layouts],
            "cache": asdict(self.cache),
            "options": [option.to_dict() for option in self.options],
            "serving": asdict(self.serving) if self.serving else None,
            "engines": [verdict.to_dict() for verdict in self.engines],
            "damage": list(self.damage),
            "reach": [rope_range.to_dict() for rope_range in self.rope_ranges],
        }


def inspect_model(
    model: str | Path,
    *,
    context: int | str | None = None,
    engines: str | Sequence[str] = (),
    tp: int | None = None,
    dcp: int | None = None,
    memory: int | str | None = None,
    cache_dtype: str | None = None,
    card: str | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> Inspection:
    """Inspect a model; only config, index and headers are read.

    Args:
        model: a folder, a GGUF file, or `org/name[@revision]` on the Hub.
        context: check the rotary frequencies up to this many tokens, such as "8K", too; length of sequences in a
            forecast.
        engines: judge whether these engines serve each layout, with shapes that they need; none: all engines.
        tp: GPUs of tensor parallelism, for a forecast of what each layout costs on each GPU.
        dcp: GPUs that divide the cache of a sequence.
        memory: of one GPU, such as "80GB"; None: the card's.
        cache_dtype: element type of the cache, "bf16" or "fp8".
        card: a GPU of `headwise/serving/cards.yaml`.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub.

    Raises:
        SettingError: a setting is not legal, or does not fit the model.
        HeadwiseError: there is no such model, or its type cannot be converted.
    """
    settings = ServingSettings(engines, tp, dcp, memory, cache_dtype, card)
    try:
        context = None if context is None else whole_number(context)
    except ValueError:
        wanted = "a whole number of at least 1, such as 8192 or 8K"
        raise SettingError("context", f"`context` is {context!r}, which is not {wanted}.") from None
    parameters: int | None
    origin: str | None
    damage: tuple[float, ...] = ()
    quantized: list[str] = []
    matched: Checkpoint | None = None
    files = WeightFiles()
    if (path := find_gguf(model, revision)) is not None:
        opened, commit = open_gguf(path), None
        tokenizer = "unreadable"
        config, dtype = opened.config, opened.dtype
        named = config.get("architectures")
        files = WeightFiles.of_gguf(opened)
        parameters, origin = sum(math.prod(entry.shape) for entry in opened.entries.values()), "headers"
    else:
        folder, commit = find_folder(model, revision=revision, token=token, patterns=["config.json", INDEX])
        stored = read_config(folder)
        named = stored.get("architectures")
        config = plain_config(stored)
        if config is not stored and stored_dtype(config) is None:  # in which every quantised weight is read
            config["dtype"] = dtype_name(PLAIN_DTYPE)
        if (matched := _match_headers(str(model), folder, commit)) is not None:
            config = matched.config
            parameters, origin, files = matched.num_parameters, "headers", WeightFiles.of_checkpoint(matched)
            quantized = [matched.quantized.note] if matched.quantized else []
        else:
            if (quantization := quantization_of(stored)) is not None:
                # Packed tensors do not show how many weights they hold.
                parameters, origin = None, None
                files = WeightFiles.of_method(quantization[0], _index_metadata(folder).get("total_size"))
            else:
                parameters, origin = _count_parameters(str(model), folder, commit, token, config)
            if parameters is None and settings.forecasts:  # building the class takes longer than all else
                parameters = count_parameters_of(config)[0]
                origin = None if parameters is None else "config"
        dtype = dtype_of(config)
        damage = recorded_damage(folder)
        tokenizer = tokenizer_kind(folder) if commit is None else "unreadable"
    attention = find_attention_model(config)
    layouts = attention.layouts(config)
    trained = context_length(config)
    longest = max(filter(None, (trained, context)), default=None)
    cache = CacheSize.of(layouts, dtype, longest)
    serving = ModelForecast(settings, context, trained, tokenizer)
    if layouts[0].kind == "mla":
        serving.measure(parameters, layouts, config, config["hidden_size"], dtype, files)
        cost = serving.forecast(layouts, config, own=True)
        latent = _latent_options(config, matched, cache, dtype, settings.engines)
        options = tuple(_judged(serving, *option) for option in latent)
        return Inspection(
            model=str(model),
            revision=commit,
            model_type=config["model_type"],
            dtype=dtype,
            parameters=parameters,
            parameters_from=origin,
            layouts=tuple(layouts),
            cache=cache,
            options=options,
            mla=INDEXERS if layouts[0].indexer else None,
            damage=damage,
            serving=cost,
            engines=serving.verdicts(config | {"architectures": named}, layouts, own=True),
            notes=(
                *quantized,
                *_indexer_notes(layouts),
                *serving.notes(layouts, cost),
                *([] if layouts[0].indexer else _latent_notes(options)),
            ),
        )
    arch = architecture.find_architecture(config)
    mla = _why_not_mla(arch.text_config(config), layouts, dtype)
    hidden_size = arch.stock_config(config).hidden_size
    serving.measure(parameters, layouts, config, hidden_size, dtype, files)
    cost = serving.forecast(layouts, config, own=True)
    sizes = listed_sizes(layouts, hidden_size, settings.engines) if mla is None else []
    options = tuple(
        _judged(serving, option, new, _config_of(option, new, config, arch, settings.engines))
        for option, new in _options(layouts, arch.legal_groups(config), cache, dtype, sizes, settings.engines)
    )
    smaller = (option for option in options if option.saved > 0)
    return Inspection(
        model=str(model),
        revision=commit,
        model_type=arch.wrapper or arch.model_type,
        dtype=dtype,
        parameters=parameters,
        parameters_from=origin,
        layouts=tuple(layouts),
        cache=cache,
        options=options,
        mla=mla,
        rope_ranges=tuple(_ranges(config, arch, context, settings)) if context else (),
        damage=damage,
        serving=cost,
        engines=serving.verdicts(config | {"architectures": named}, layouts, own=True),
        notes=(
            *quantized,
            *_linear_notes(layouts, dtype),
            *serving.notes(layouts, cost, _gpu_caches(options, ("mla",)), _gpu_caches(smaller, ("mqa", "gqa"))),
            *([MERGED_CACHES if layouts[-1].merged else TWO_CACHES] if arch.reads_pairs else []),
            *([sizes_note(any(option.to == "mla" for option in options))] if mla is None else []),
            *([LINEAR_NORMS] if mla is None and arch.qk_norm(config) else []),
        ),
    )


def _indexer_notes(layouts: Sequence[AttentionLayout]) -> Iterator[str]:
    """Yield a line about each shape of indexers."""
    for shape in dict.fromkeys(layout.indexer for layout in layouts):
        if shape is not None:
            yield (
                f"Sparse attention: every query attends to {shape.index_topk:,} keys, which {shape.index_n_heads} "
                f"index queries of {shape.index_head_dim} elements select. The index key is in the cache."
            )


def _linear_notes(layouts: Sequence[AttentionLayout], dtype: torch.dtype) -> Iterator[str]:
    """Yield a line about the layers of a hybrid model that have no attention."""
    count = sum(not layout.attends for layout in layouts)
    if count:
        yield (
            f"{count} of {len(layouts)} layers have no attention. Their states take "
            f"{size(state_bytes(layouts, dtype))} for each sequence of any length, and are in the cache at each "
            "context. A conversion carries these layers over."
        )


def _options(
    layouts: Sequence[AttentionLayout],
    legal: Sequence[int],
    cache: CacheSize,
    dtype: torch.dtype,
    sizes: Iterable[tuple[int, int]],
    engines: Collection[str],
) -> Iterator[tuple[ReachableLayout, list[AttentionLayout]]]:
    encoder = not any(layout.cached for layout in layouts)
    changing = [layout for layout in layouts if layout.cached or encoder]
    for groups in legal:
        if not all(layout.can_become(groups) for layout in changing):
            continue
        new = [layout.with_groups(groups) if layout.cached or encoder else layout for layout in layouts]
        if new != list(layouts):
            after = CacheSize.of(new, dtype, max(cache.at))
            kind = next((layout for layout in new if layout.cached), new[0]).kind
            yield ReachableLayout(kind, groups, None, None, after, _saved(cache, after)), new
    for rank, rope in sizes:
        new = [pad_layout(latent_layout(layout, rank, rope), engines) for layout in layouts]
        after = CacheSize.of(new, dtype, max(cache.at))
        if after.bytes_per_token < cache.bytes_per_token:
            yield ReachableLayout("mla", None, rank, rope, after, _saved(cache, after)), new


def _config_of(
    option: ReachableLayout,
    layouts: Sequence[AttentionLayout],
    config: dict[str, Any],
    arch: Architecture,
    engines: Collection[str],
) -> dict[str, Any]:
    """Return the config.json of an option of a model with heads."""
    if option.num_key_value_heads is not None:
        return arch.with_groups(config, option.num_key_value_heads)
    return latent_config(arch.stock_config(config).to_dict(), layouts[0], engines, arch.has_bias(config))


def _latent_options(
    config: dict[str, Any],
    checkpoint: Checkpoint | None,
    cache: CacheSize,
    dtype: torch.dtype,
    engines: Collection[str],
) -> Iterator[tuple[ReachableLayout, list[AttentionLayout], dict[str, Any]]]:
    """Yield what a model with MLA can become, with its layouts and its config.json.

    These are the cache rows that engines serve, half the row, half the rank, and heads where these are exact.
    """
    model = latent_model(config)
    layout = model.layouts(config)[0]
    if layout.indexer is not None:
        return
    whole, rope = layout.kv_lora_rank or 0, layout.rotary_dim
    halves = ((whole + rope) // 2 - rope, whole // 2)
    for rank in sorted({*(row - rope for row in cache_rows(engines)), *halves}):
        if 0 < rank < whole:
            new = with_powers(reduced_config(config, model, rank, rope), engines)
            after = CacheSize.of(model.layouts(new), dtype, max(cache.at))
            yield ReachableLayout("mla", None, rank, rope, after, _saved(cache, after)), model.layouts(new), new
    if not expands(config):
        return
    try:
        new = plan_heads(config, model, dtype)
        if checkpoint is not None:
            refuse_output_biases(checkpoint, model)
        heads = architecture.find_architecture(new).layouts(new)
    except HeadwiseError:
        return
    after = CacheSize.of(heads, dtype, max(cache.at))
    yield ReachableLayout("mha", layout.num_attention_heads, None, None, after, _saved(cache, after)), heads, new


def _latent_notes(options: Sequence[ReachableLayout]) -> Iterator[str]:
    """Yield what the user should know about the options of a model with MLA."""
    yield REDUCED
    if any(option.to == "mha" for option in options):
        yield EXPANDED


def _ranges(config: dict[str, Any], arch: Architecture, context: int, settings: ServingSettings) -> list[RopeRange]:
    """Return what RoPE reaches; nothing for models that rotate otherwise, where a forecast needs the length."""
    if arch.reads_pairs:  # an encoder and a decoder have rotations of their own
        return []
    try:
        return list(rope_ranges(config, arch, context))
    except HeadwiseError:
        if settings.forecasts:
            return []
        raise


def _judged(
    serving: ModelForecast,
    option: ReachableLayout,
    layouts: Sequence[AttentionLayout],
    config: Mapping[str, Any],
) -> ReachableLayout:
    """Return an option with its forecast and its verdicts, from its layouts and its config.json."""
    cost = serving.forecast(layouts, config)
    return replace(option, serving=cost, engines=serving.verdicts(config, layouts))


def _gpu_caches(options: Iterable[ReachableLayout], kinds: Collection[str]) -> list[tuple[str, float]]:
    """Return name and cache bytes per token on each GPU of every layout of some kinds that can be served."""
    return [
        (option.name, option.serving.cache_bytes_per_token)
        for option in options
        if option.to in kinds and option.serving and option.serving.cache_bytes_per_token is not None
    ]


def _saved(before: CacheSize, after: CacheSize) -> float:
    longest = max(before.at)
    return 1 - after.at[longest] / before.at[longest] if before.at[longest] else 0.0


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
            names = read_weight_map(folder, INDEX)
            if quantization_of(read_config(folder)) is None:
                refuse_quantised_names(model, names)
        return None
    if not ((folder / SINGLE).is_file() or any(folder.glob("model-*.safetensors"))):
        return None
    opened = read_headers(source_in_folder(model, folder))
    return match_source(opened)


def _index_metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a folder's index; empty without any."""
    metadata = read_json(folder, INDEX).get("metadata") if (folder / INDEX).is_file() else None
    return metadata if isinstance(metadata, dict) else {}


def _count_parameters(
    model: str, folder: Path, commit: str | None, token: str | None, config: dict[str, Any]
) -> tuple[int | None, str | None]:
    if commit is not None:
        count = hub.count_parameters(hub.split_revision(model)[0], commit, token)
        if count is not None:
            return count, "headers"
    sizes = _index_metadata(folder)
    if (parameters := known_size(sizes.get("total_parameters"))) is not None:
        return parameters, "index"
    if (num_bytes := known_size(sizes.get("total_size"))) is not None:
        return num_bytes // dtype_of(config).itemsize, "index"
    return None, None
