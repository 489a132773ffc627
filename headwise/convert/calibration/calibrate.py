"""Decide what is measured on the parent, measure it, and yield the statistics layer by layer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import Target
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.corpus import (
    LONG_TEXT,
    MIXTURE,
    NUM_HELDBACK,
    SAMPLED,
    TextChoice,
    choose_text,
    read_corpus,
)
from headwise.convert.calibration.image_stream import ImageStream, plan_images
from headwise.convert.calibration.layer_stream import LayerRecord, LayerStream
from headwise.convert.calibration.moments import Moments
from headwise.convert.calibration.norm_stats import NormedProjections
from headwise.convert.calibration.pair_corpus import PAIR_LENGTH, read_pair_corpus
from headwise.convert.calibration.pair_stream import PairStream
from headwise.convert.forecast.amounts import (
    RefitChoice,
    calibration_length,
    calibration_tokens,
    choose_index_steps,
    choose_refit,
    trained_length,
)
from headwise.convert.forecast.stage_seconds import CALIBRATION_LENGTH
from headwise.convert.settings import ConvertSettings
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import Checkpoint, has_nonfinite
from headwise.io.writer import Writer
from headwise.measure.image_prompts import open_prompts
from headwise.models.architecture import find_architecture
from headwise.models.protocol import AttentionModel, find_attention_model
from headwise.progress import Progress


def plan_calibration(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    target: Target,
    settings: ConvertSettings,
    device: torch.device,
    earlier: Mapping[str, Any] | None = None,
) -> CalibrationPlan | None:
    """Decide what is measured on the parent.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        settings: of the conversion.
        device: where the layers run.
        earlier: what an interrupted run recorded of its calibration, whose choices are kept; None: nothing.

    Returns:
        The text and the amount; None if nothing is measured.

    Raises:
        SettingError: `refit` is set where there is nothing to fit, `images` where nothing is measured, or the text
            is too short.
    """
    if settings.images is not None:
        return plan_images(checkpoint, arch, target, settings)
    index_heads = max((layout.indexer.index_n_heads for layout in target.layouts if layout.indexer), default=0)
    if (target.exact and not index_heads) or not any(map(target.converted_names, range(len(target.layouts)))):
        if settings.refits_layers or settings.refits_jointly:
            raise SettingError(
                "refit", f"`refit` is {settings.refit}, and an exact conversion leaves nothing to refit."
            )
        return None
    apart = all(not target.layouts[i].on_text for i in range(len(target.layouts)) if target.converted_names(i))
    if apart and not (settings.moments is not None and target.calibrated):
        for name in ("refit", "calibrate", "moments", "save_moments"):
            if getattr(settings, name) not in (None, "auto", "off", "none"):
                raise SettingError(
                    name,
                    f"`{name}` acts on layers that text runs, and none of them changes.",
                    f"Leave out `{name}`.",
                )
        return None
    if settings.calibrate == "none":
        return None
    if settings.moments is not None:
        saved = Moments.open(settings.moments, checkpoint)
        return CalibrationPlan(saved.text, saved.sequences, saved.length, 0, saved.seed, reuse=settings.moments)
    trained = trained_length(arch, target.parent_config if index_heads else checkpoint.config)
    longest = PAIR_LENGTH if arch.reads_pairs else calibration_length(index_heads > 0, exact=target.exact)
    length = min(longest, trained)
    before = earlier or {}
    if settings.refit == "auto" and isinstance(before.get("steps"), int):
        refit = RefitChoice(before["steps"], "as in the interrupted run")
    else:
        refit = choose_refit(checkpoint, arch, target, settings.refit or "off", length, device)
    steps = refit.steps
    if not steps and not target.calibrated and not index_heads and settings.save_moments is None:
        return None
    given = before.get("index_steps") if settings.index_steps is None else settings.index_steps
    index_steps = choose_index_steps(arch, target, given, length, device) if index_heads else 0
    count = settings.calibration_tokens
    if count is None:
        joint = settings.refits_jointly
        count = calibration_tokens(checkpoint, arch, steps, device, joint=joint, index_steps=index_steps)
        count = max(count, 2 * length)  # of wide models and long sequences, memory alone holds fewer
    if count < 2 * length:
        raise SettingError(
            "calibration_tokens",
            f"`calibration_tokens` is {count}, which is less than two sequences of {length} tokens.",
            f"Give {2 * length} or more.",
        )
    if settings.calibrate == SAMPLED and checkpoint.headless:
        raise SettingError(
            "calibrate",
            f"`calibrate` {SAMPLED} needs a language-model head, and {checkpoint.source} has none.",
            "Leave out `calibrate`, or name a text.",
        )
    if settings.calibrate == "auto" and not index_heads and before.get("text") in (SAMPLED, MIXTURE):
        chosen = TextChoice(before["text"], "the interrupted run read it")
    else:
        chosen = choose_text(
            checkpoint,
            arch,
            LONG_TEXT if index_heads and settings.calibrate == "auto" else settings.calibrate or "auto",
            (count // length + NUM_HELDBACK) * length,
            device,
            settings.allow_nan,
            length,
        )
    return CalibrationPlan(
        chosen.text,
        count // length,
        length,
        steps,
        settings.seed,
        reason=chosen.reason,
        refit_reason=refit.reason,
        fitted=target.fitted,
        keep=settings.save_moments,
        index_heads=index_heads,
        index_steps=index_steps,
        asked=settings.calibration_tokens,
    )


def plan_loss(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    target: Target,
    settings: ConvertSettings,
    calibration: CalibrationPlan | None,
) -> CalibrationPlan | None:
    """Return the text on which the loss of parent and result is measured.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        settings: of the conversion.
        calibration: what is measured on the parent; None: nothing.

    Returns:
        The calibration with its held-back text; without calibration, held-back text of the mixture. None for a
        conversion that loses nothing, and for a model that is no decoder.
    """
    if not arch.is_decoder:
        return None
    if calibration is not None and calibration.images is not None:
        return None  # `headwise eval` measures the loss with images
    if calibration is not None and calibration.reuse is None:
        # At positions beyond its context the parent is no measure.
        return calibration if calibration.length <= trained_length(arch, checkpoint.config) else None
    if target.exact or settings.allow_nan or arch.auto_class != "AutoModelForCausalLM":
        return None
    length = min(CALIBRATION_LENGTH, trained_length(arch, checkpoint.config))
    return CalibrationPlan(MIXTURE, 0, length, 0, settings.seed)


def iter_layer_stats(
    checkpoint: Checkpoint,
    target: Target,
    calibration: CalibrationPlan | None,
    layers: Iterable[int],
    device: torch.device,
    progress: Progress,
    cache: Path | None = None,
) -> Iterator[tuple[LayerRecord | None, int]]:
    """Yield the statistics of layers, with their indices, in the order of the model.

    Args:
        checkpoint: the source.
        target: the decided conversion.
        calibration: what to measure; None yields no statistics.
        layers: indices of the layers to measure, ascending; each is drawn when the one before it is done.
        device: where the layers run.
        progress: receives a note before the text is read.
        cache: folder that keeps the text; None: it is not kept.
    """
    if calibration is None:
        yield from ((None, i) for i in layers)
        return
    if calibration.reuse is not None:
        saved = Moments.open(calibration.reuse, checkpoint)
        for i in layers:
            yield saved.read(i, device) if target.layouts[i].on_text or saved.holds(i) else None, i
        return
    arch = find_attention_model(target.parent_config, checkpoint.tensors)
    if calibration.images is not None:
        progress.note(f"Reading {calibration.amount} through the parent.")
        seeing = find_architecture(target.parent_config, checkpoint.tensors)
        prompts = open_prompts(
            calibration.images, arch.auto_class, checkpoint.folder, str(checkpoint.source), checkpoint.config
        )
        images = ImageStream(checkpoint, seeing, prompts, device, calibration.seed)
        yield from _kept(
            images.records(layers, keep_activations=calibration.keeps_text, attention_stats=not target.exact),
            checkpoint,
            calibration,
        )
        return
    progress.note(f"Reading {calibration.amount} of {calibration.text} through the parent, layer by layer.")
    if arch.reads_pairs:
        encoder_decoder = find_architecture(target.parent_config, checkpoint.tensors)
        pairs = read_pair_corpus(checkpoint, encoder_decoder, calibration, device, progress, cache)
        stats = PairStream(checkpoint, encoder_decoder, pairs, device)
        yield from _kept(
            stats.records(keep_activations=calibration.keeps_text, layers=layers), checkpoint, calibration
        )
        return
    blocks, _ = read_corpus(checkpoint, calibration, device, progress, cache)
    stream = LayerStream(checkpoint, arch, blocks, device, target.parent_config)

    def normed(layer: int) -> NormedProjections:
        source = {name: checkpoint.read(name) for name in arch.tensor_names(target.parent_config, layer)}
        weights = arch.read_layer(target.parent_config, layer, source).to(torch.float32).to_device(device)
        return NormedProjections(weights, float(arch.stock_config(target.parent_config).rms_norm_eps))

    unread: list[int] = []

    def read() -> Iterator[int]:
        for layer in layers:
            if not target.layouts[layer].on_text:  # these are the last layers
                unread.append(layer)
            else:
                yield layer

    records = stream.records(
        keep_activations=calibration.keeps_text,
        attention_stats=not target.exact,
        layers=read(),
        normed=normed if target.regresses_norms else None,
    )
    yield from _kept(records, checkpoint, calibration)
    yield from ((None, layer) for layer in unread)


def _kept(
    records: Iterator[LayerRecord], checkpoint: Checkpoint, calibration: CalibrationPlan
) -> Iterator[tuple[LayerRecord, int]]:
    """Yield records with their indices, and save their moments where the calibration keeps them."""
    keep = Moments.create(calibration.keep, checkpoint, calibration) if calibration.keep else None
    for record in records:
        if keep:
            keep.write(record)
        yield record, record.index
        del record  # free its memory before the next layer runs


def keep_text(
    checkpoint: Checkpoint,
    target: Target,
    calibration: CalibrationPlan,
    device: torch.device,
    progress: Progress,
    cache: Path,
) -> None:
    """Read the calibration text, or the pairs of an encoder-decoder, and keep it in a folder for other processes.

    Args:
        checkpoint: the source.
        target: the decided conversion.
        calibration: what is measured.
        device: where text is sampled.
        progress: receives the tokens that are sampled.
        cache: the folder.
    """
    if find_attention_model(target.parent_config, checkpoint.tensors).reads_pairs:
        arch = find_architecture(target.parent_config, checkpoint.tensors)
        read_pair_corpus(checkpoint, arch, calibration, device, progress, cache)
    else:
        read_corpus(checkpoint, calibration, device, progress, cache)


def text_folder(checkpoint: Checkpoint, calibration: CalibrationPlan, writer: Writer) -> Path:
    """Return the folder that keeps the calibration text: that of the moments, or else the work folder.

    Args:
        checkpoint: the source.
        calibration: what is measured.
        writer: of the output folder.
    """
    if calibration.keep is not None:
        return Moments.create(calibration.keep, checkpoint, calibration).folder
    return writer.work.folder


def check_finite(
    checkpoint: Checkpoint,
    target: Target,
    layer: int,
    tensors: Mapping[str, Tensor],
    record: LayerRecord | None,
    allow_nan: bool,
) -> None:
    """Refuse a layer with values that are not finite, naming the tensor.

    Args:
        checkpoint: the source.
        target: the decided conversion.
        layer: index of the layer.
        tensors: of the layer, by name.
        record: what was measured on the layer; None if nothing was.
        allow_nan: accept weights that are not finite, if the method can convert them.

    Raises:
        HeadwiseError: a weight is not finite and `allow_nan` is not set, the layer's inputs are not finite, or the
            method needs a decomposition of such a weight.
    """
    bad = next((name for name, tensor in tensors.items() if has_nonfinite(tensor)), None)
    moments = record.moments().values() if record else ()
    unread = bad is None and not all(bool(moment.isfinite().all()) for moment in moments)
    if unread and not allow_nan:
        bad = next((name for name in checkpoint.tensors if has_nonfinite(checkpoint.read(name))), None)
    if bad is not None and not allow_nan:
        raise HeadwiseError(
            f"Tensor {bad} holds NaN or infinite values.", "Pass `allow_nan` to convert the model all the same."
        )
    if unread:
        raise HeadwiseError(
            f"The inputs of layer {layer} are NaN or infinite on the calibration text.", "Pass `calibrate` none."
        )
    if bad is not None and target.calibrated:
        raise HeadwiseError(
            f"Tensor {bad} holds NaN or infinite values, which only mean, first and random can merge.",
            "Pass `method` mean beside `allow_nan`.",
        )
