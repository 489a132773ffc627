"""Forecast the memory and the time of a whole conversion from the forecasts of its stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.convert.base import Target
from headwise.convert.calibration.calibrate import CalibrationPlan, plan_loss
from headwise.convert.calibration.corpus import SAMPLED, loss_seconds, sampling_seconds
from headwise.convert.forecast.peak_memory import peak_memory, whole_model_memory
from headwise.convert.forecast.stage_seconds import (
    FILE_RATE,
    calibration_seconds,
    closed_form_seconds,
    indexer_seconds,
    output_seconds,
    refit_seconds,
)
from headwise.convert.refit.joint import joint_seconds
from headwise.convert.settings import ConvertSettings
from headwise.convert.verify.layer_damage import damage_seconds, damage_shape
from headwise.convert.verify.whole_model import WHOLE_BYTES
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture
from headwise.train.recovery import JointPlan


def conversion_memory(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    settings: ConvertSettings,
    calibration: CalibrationPlan | None,
    work_devices: Sequence[torch.device],
    device: torch.device,
) -> int:
    """Return the forecast of the peak: of the layers, or of the stages that load a model whole.

    Processes that share the CPU add up. With GPUs it is the peak of one process and its GPU.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        settings: of the conversion.
        calibration: what is measured on the parent; None: nothing.
        work_devices: those that the layers are spread over.
        device: where everything else runs.
    """
    peak = peak_memory(checkpoint, arch, target, calibration, device)
    if work_devices[0].type == "cpu":
        peak *= len(work_devices)
    heldback = plan_loss(checkpoint, arch, target, settings, calibration)
    measured = heldback is not None and loss_seconds(checkpoint, heldback, device) is not None
    sampled = calibration is not None and calibration.reuse is None and calibration.text == SAMPLED
    damage = measured and calibration is not None and calibration.reuse is None
    damage = damage and damage_seconds(checkpoint, device) is not None
    whole = whole_model_memory(
        checkpoint,
        arch,
        target,
        loss_tokens=heldback.length if measured and heldback else int(sampled),
        damage_tokens=damage_shape(device)[1] if damage else 0,
        loaded=settings.verify and sum(tensor.nbytes for tensor in target.outputs) <= WHOLE_BYTES,
        bytes_per_parameter=2 if device.type == "cuda" else 4,
        fused=device.type != "cuda",
    )
    if damage and work_devices[0].type == "cpu":
        whole *= len(work_devices)
    return max(peak, whole)


def conversion_seconds(
    checkpoint: Checkpoint,
    arch: Architecture,
    target: Target,
    settings: ConvertSettings,
    calibration: CalibrationPlan | None,
    joint: JointPlan | None,
    work_devices: Sequence[torch.device],
    device: torch.device,
) -> dict[str, float]:
    """Return the forecast of the time by stage, in seconds.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        settings: of the conversion.
        calibration: what is measured on the parent; None: nothing.
        joint: the joint refit; None: there is none.
        work_devices: those that the layers are spread over.
        device: where everything else runs.
    """
    stages: dict[str, float] = {}
    share = 1 / len(work_devices)
    stages["layers"] = share * closed_form_seconds(checkpoint, arch, target, device)
    if calibration and calibration.reuse is None:
        text = (calibration.tokens, calibration.length, device)
        if calibration.text == SAMPLED and not joint:  # a joint refit has text of its own, and shares it
            stages["sampling"] = sampling_seconds(checkpoint, calibration.tokens, device, calibration.length)
        stages["calibration"] = calibration_seconds(checkpoint, arch, *text)
        if calibration.fitted:
            stages["layers"] += share * output_seconds(checkpoint, arch, target, *text)
        if calibration.indexers:
            steps = (calibration.index_steps, calibration.length, device)
            stages["indexers"] = share * indexer_seconds(arch, target, *steps)
        if calibration.steps:
            steps = (calibration.steps, calibration.length, device)
            stages["refit"] = share * refit_seconds(checkpoint, arch, target, *steps)
    if joint:
        stages["joint refit"] = joint_seconds(checkpoint, arch, target, joint, device)
    stages["files"] = checkpoint.nbytes / FILE_RATE
    heldback = plan_loss(checkpoint, arch, target, settings, calibration)
    if heldback and (losses := loss_seconds(checkpoint, heldback, device)) is not None:
        damage = damage_seconds(checkpoint, device) if calibration and calibration.reuse is None else None
        stages["losses"] = losses + share * (damage or 0.0)
    return {stage: round(seconds, 1) for stage, seconds in stages.items()}
