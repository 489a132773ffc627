"""Choose the target of a conversion from its settings and the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.convert.base import Target
from headwise.convert.calibration.moments import measured_beside_text
from headwise.convert.from_mla.heads import HeadsTarget, expands
from headwise.convert.from_mla.target import ReducedTarget, refuse_settings_of_heads
from headwise.convert.gqa.target import GroupedTarget
from headwise.convert.mla.target import LatentTarget
from headwise.convert.positions.moved import with_positions
from headwise.convert.settings import ConvertSettings
from headwise.convert.sparse.target import SharedIndexerTarget
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import Checkpoint
from headwise.measure.image_prompts import VISION_CLASS
from headwise.models.architecture import Architecture, find_architecture
from headwise.models.layout import CROSS, AttentionLayout
from headwise.models.mla_source import sharing_class, written_class
from headwise.models.protocol import AttentionModel, latent_model


def check_source(checkpoint: Checkpoint, model: AttentionModel, settings: ConvertSettings) -> None:
    """Refuse what cannot be made of a model that has MLA already: it gets a smaller cache, indexers, or heads.

    Args:
        checkpoint: the source.
        model: its stock class.
        settings: of the conversion.

    Raises:
        HeadwiseError: the model has indexers already, or the settings are for other models.
    """
    layout, stock = model.layouts(checkpoint.config)[0], written_class(checkpoint.config)
    if settings.index_layers is not None and layout.indexer is None:
        raise SettingError(
            "index_layers",
            f"`index_layers` shares the indexers of a sparse model, and {checkpoint.source} has none.",
            "Convert it with `sparse` first, and then its output with `index_layers`.",
        )
    if layout.kind != "mla":
        return
    if layout.indexer is not None:
        if settings.index_layers is not None and stock is not None and sharing_class(stock):
            return
        raise HeadwiseError(
            f"config.json: {checkpoint.source} is a {model.model_type} model, which has indexers already.",
            "Convert the model that it was made from; `index_layers` lets the layers of a deepseek_v32 model share "
            "them.",
        )
    if settings.sparse is None:
        if settings.to != "mla" and not (settings.to == "mha" and expands(checkpoint.config)):
            _refuse_for_latent(checkpoint, model, settings)
        refuse_settings_of_heads(settings, checkpoint.source)
        return
    if stock is None or settings.sparse not in stock.sparse:
        raise HeadwiseError(
            f"config.json: {checkpoint.source} is a {model.model_type} model, which no stock class with an indexer "
            "replaces.",
            "Leave it as it is.",
        )
    for name in ("rank", "rope_dim", "cache", "context", "sliding_window"):
        if getattr(settings, name) is not None:
            raise SettingError(
                name,
                f"`{name}` acts on the model that {checkpoint.source} was made from: MLA keeps its size and its "
                "positions under `sparse`.",
                f"Leave out `{name}`.",
            )


def choose_target(
    checkpoint: Checkpoint, model: AttentionModel, settings: ConvertSettings, index_layers: Sequence[int] = ()
) -> Target:
    """Return the decided conversion.

    Args:
        checkpoint: the source.
        model: its stock class.
        settings: of the conversion.
        index_layers: layers of a sparse source that keep an indexer.

    Raises:
        HeadwiseError: the conversion is not possible for this model.
    """
    dtype: torch.dtype | None = getattr(torch, settings.dtype) if settings.dtype else None
    if index_layers:
        stock = written_class(checkpoint.config)
        sharing = sharing_class(stock) if stock else None
        assert sharing is not None  # `check_source` refused the others
        return SharedIndexerTarget(checkpoint, model, sharing, index_layers, dtype=dtype)
    if model.layouts(checkpoint.config)[0].kind == "mla":
        if settings.to == "mha":
            return HeadsTarget(checkpoint, latent_model(checkpoint.config), dtype=dtype)
        if settings.sparse is None:
            return ReducedTarget(checkpoint, latent_model(checkpoint.config), settings, dtype=dtype)
        return LatentTarget(checkpoint, model, checkpoint.config, settings, dtype=dtype)
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    config = arch.with_groups(checkpoint.config, {})
    if not arch.is_decoder:
        _refuse_positions(checkpoint, settings)
    if settings.dtype is not None:
        for part in (config, arch.text_config(config)):
            part["dtype"] = part["torch_dtype"] = settings.dtype
    config, notes = with_positions(config, arch, settings)
    parent = find_architecture(config, checkpoint.tensors)
    target: Target
    if settings.to == "mla":
        target = LatentTarget(checkpoint, parent, config, settings, dtype=dtype)
    else:
        counts = part_counts(arch, arch.layouts(checkpoint.config), settings) if settings.to else {}
        target = GroupedTarget(
            checkpoint, arch, parent.with_groups(config, counts), config, settings, changed=set(counts), dtype=dtype
        )
        measured = measured_beside_text(settings.images, settings.moments, checkpoint)
        crossing = arch.on_text and not arch.reads_pairs and arch.cross_states(config) and CROSS in counts
        cross = [i for i, layout in enumerate(target.layouts) if crossing and layout.part == CROSS]
        if not all(map(measured, cross)) and not target.exact:
            target.warnings.append(
                "No images are read: cross-attention is merged without moments, and every direction of its input "
                "counts the same. `images` measures it."
            )
        apart = {x.part for i, x in enumerate(target.layouts) if not x.on_text and not measured(i)}
        unread = [part for part in counts if part in apart]
        if unread and not target.exact:
            target.warnings.append(
                f"Text does not run {' and '.join(unread)}, and nothing else is read: the weights alone decide how "
                "heads merge, and every direction of their input counts the same."
                + (" `images` measures it." if arch.auto_class == VISION_CLASS else "")
            )
    target.notes[:0] = notes
    return target


def _refuse_for_latent(checkpoint: Checkpoint, model: AttentionModel, settings: ConvertSettings) -> None:
    """Raise HeadwiseError: a model with MLA becomes MLA of another size or, if it is dense, heads."""
    start = f"config.json: {checkpoint.source} is a {model.model_type} model, which has MLA already"
    smaller = "Give `to` mla with `cache`, or with `rank` and `rope_dim`, for a smaller cache."
    if settings.to is None:
        raise HeadwiseError(f"{start}: alone, its positions and its precision stay as they are.", smaller)
    if expands(checkpoint.config):
        raise HeadwiseError(f"{start}, and no key-value heads to merge.", f"{smaller} `to` mha expands it exactly.")
    why = (
        "headwise writes the way back to key-value heads for dense models only, and this is a mixture of experts"
        if latent_model(checkpoint.config).linear
        else "the norm of its latent is no linear map, and no stock class with key-value heads has it"
    )
    raise HeadwiseError(f"{start}: {why}.", smaller)


def part_counts(
    arch: Architecture, layouts: Sequence[AttentionLayout], settings: ConvertSettings
) -> dict[str, int]:
    """Return the number of KV heads of every part that a conversion changes.

    Args:
        arch: the architecture of the source.
        layouts: of its layers.
        settings: of the conversion.

    Raises:
        SettingError: the model has no such part, or two parts share one number and get two.
    """
    heads = {layout.part: layout.num_attention_heads for layout in layouts if layout.attends}
    cached = {layout.part for layout in layouts if layout.cached}
    named = settings.parts or dict.fromkeys(part for part in heads if part in cached or not cached)
    name = arch.wrapper or arch.model_type
    counts: dict[str, int] = {}
    for part, count in named.items():
        if part not in heads:
            raise SettingError(
                "part", f"`part` is {part}, and {name} has {', '.join(heads)}.", "Name a part that the model has."
            )
        counts[part] = count or {"mqa": 1, "mha": heads[part], "gqa": settings.groups}[str(settings.to)] or 0
    places = {part.part: part.count_key for part in arch.parts}
    for part, count in list(counts.items()):
        for other in (p for p in heads if p != part and places and places[p] == places[part]):
            if counts.setdefault(other, count) != count:
                raise SettingError(
                    "part",
                    f"`part` gives {part} {count} KV heads and {other} {counts[other]}, and {name} has one number "
                    "for both.",
                    "Give both the same number.",
                )
    return counts


def _refuse_positions(checkpoint: Checkpoint, settings: ConvertSettings) -> None:
    """Raise SettingError for settings that act on the positions of a decoder."""
    for name in ("context", "sliding_window"):
        if getattr(settings, name) is not None:
            raise SettingError(
                name,
                f"`{name}` acts on decoder-only models, and {checkpoint.source} is none.",
                f"Leave out `{name}`.",
            )
