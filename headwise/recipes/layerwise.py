"""Regress every converted attention layer on its parent's output, one layer at a time (mathematics, section 4c).

The same as the refit of `convert`, but the layers come from a folder that is converted already.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from headwise.convert.calibration.layer_stream import LayerStream
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.convert.refit.regression import refit
from headwise.errors import HeadwiseError
from headwise.models.stock import empty_model, layer_arguments, move_to_device
from headwise.progress import SILENT, Progress
from headwise.recipes.settings import Layerwise
from headwise.train.student import ModelFolder, Student


def check_layerwise(student: ModelFolder, teacher: ModelFolder, record: Mapping[str, Any] | None) -> None:
    """Refuse a teacher whose layers are not comparable with the student's.

    Args:
        student: the folder that is trained.
        teacher: the parent.
        record: the headwise.json of the student's folder.

    Raises:
        HeadwiseError: the teacher has MLA layers, or the conversion changed positions.
    """
    if teacher.is_latent:
        raise HeadwiseError("layerwise needs a teacher with MHA, GQA or MQA layers, and this one has MLA layers.")
    changed = sorted({"context", "sliding_window"} & set((record or {}).get("arguments", {})))
    if changed:
        raise HeadwiseError(
            f"layerwise would train the layers to undo the conversion's {changed[0]}.", "Use the recipe distill."
        )


def train_layers(
    student: Student,
    teacher: ModelFolder,
    layerwise: Layerwise,
    blocks: Tensor,
    device: torch.device,
    *,
    seed: int = 0,
    progress: Progress = SILENT,
) -> dict[int, dict[str, Any]]:
    """Refit every attention layer of a student in place.

    Args:
        student: the model in training.
        teacher: the parent.
        layerwise: the settings.
        blocks: text, (sequences, length).
        device: where a layer is trained.
        seed: of the batches.
        progress: gets every layer's errors.

    Returns:
        For each layer, the errors of the output solution and of the refit.
    """
    stock = student.folder.stock
    scale = student.scales(teacher)[1]
    stream = LayerStream(teacher.checkpoint, teacher.stock, blocks.long(), device)
    arguments = None
    if student.folder.is_latent:
        skeleton = empty_model(student.folder.checkpoint.config, stock.auto_class)
        arguments = layer_arguments(skeleton, stock.module, blocks.shape[1], torch.float32)
    progress.stage("Layer by layer", total=len(student.folder.attention_paths), unit="layers")
    reports = {}
    for record in stream.records(keep_activations=True, attention_stats=False):
        attention = student.network.get_submodule(student.folder.attention_paths[record.index]).to(device)
        parameters = [p for name, p in attention.named_parameters() if name != "o_proj.bias"]
        trainable = [p.requires_grad for p in parameters]
        assert record.outputs is not None
        record.outputs *= scale
        if arguments is not None:
            record.arguments = move_to_device(arguments[record.index], device)
        solved = solve_output_projection(
            attention, attention.get_submodule(stock.output_projection), record, spare=True, device=device
        )
        report = refit(
            attention,
            parameters,
            record,
            steps=layerwise.steps,
            seed=seed,
            device=device,
        )
        for parameter, trained in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(trained)
        attention.to("cpu")
        reports[record.index] = {"output": asdict(solved), "refit": asdict(report)}
        progress.advance(1, layer=record.index, error=f"{solved.before:.4f} -> {report.after:.4f}")
    return reports
