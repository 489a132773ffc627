"""Forecast the memory and the time of a whole conversion from the forecasts of its stages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from headwise.convert.base import Target
from headwise.convert.calibration.calibrate import plan_loss
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.corpus import NUM_HELDBACK, SAMPLED, loss_seconds, sampling_seconds
from headwise.convert.forecast.peak_memory import peak_memory, whole_model_memory
from headwise.convert.forecast.stage_seconds import (
    FILE_RATE,
    calibration_seconds,
    closed_form_seconds,
    indexer_seconds,
    output_seconds,
    refit_seconds,
)
from headwise.convert.refit.joint_plan import joint_memory, joint_seconds, training_processes
from headwise.convert.settings import ConvertSettings
from headwise.convert.verify.layer_damage import damage_seconds, damage_shape
from headwise.convert.verify.whole_model import WHOLE_BYTES
from headwise.io.reader import Checkpoint
from headwise.models.protocol import AttentionModel
from headwise.train.recovery import JointPlan


def forecast_conversion(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    target: Target,
    settings: ConvertSettings,
    calibration: CalibrationPlan | None,
    joint: JointPlan | None,
    work_devices: Sequence[torch.device],
    device: torch.device,
) -> tuple[int, dict[str, float]]:
    """Return the forecast of the peak of the memory, in bytes, and of the time by stage, in seconds.

    The peak is that of the layers, or of the stages that load a model whole. Processes that share the CPU add up.
    With GPUs it is the peak of one process and its GPU.

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
    measured = calibration if calibration is not None and calibration.reuse is None else None
    heldback = plan_loss(checkpoint, arch, target, settings, calibration)
    losses = loss_seconds(checkpoint, heldback, device) if heldback else None
    damage = damage_seconds(checkpoint, device) if losses is not None and measured else None
    images = measured is not None and measured.images is not None

    peak = peak_memory(checkpoint, arch, target, calibration, device)
    whole = whole_model_memory(
        checkpoint,
        arch,
        target,
        loss_tokens=(
            heldback.length
            if heldback and losses is not None
            else int(images or (measured is not None and measured.text == SAMPLED))
        ),
        damage_tokens=damage_shape(device)[1] if damage is not None else 0,
        loaded=settings.verify and sum(tensor.nbytes for tensor in target.outputs) <= WHOLE_BYTES,
        bytes_per_parameter=2 if device.type == "cuda" and not images else 4,
        fused=device.type != "cuda",
        streamed=device.type == "cuda" and checkpoint.gguf is None and checkpoint.quantized is None,
    )
    if images:  # they run through the whole model, which is in memory while the layers are converted
        peak += 4 * checkpoint.num_parameters
    if work_devices[0].type == "cpu":
        peak *= len(work_devices)
        whole *= len(work_devices) if damage is not None else 1
    trained_on = work_devices if len(work_devices) > 1 else [device]
    if joint:
        processes = training_processes(joint, trained_on) if device.type == "cpu" else 1
        whole = max(whole, processes * joint_memory(checkpoint, target, joint, trained_on))

    stages: dict[str, float] = {}
    share = 1 / len(work_devices)
    stages["layers"] = share * closed_form_seconds(checkpoint, arch, target, device)
    if measured:
        text = (measured.tokens, measured.length, device)
        if measured.text == SAMPLED and not joint:  # a joint refit has text of its own, and shares it
            drawn = measured.tokens + NUM_HELDBACK * measured.length
            stages["sampling"] = sampling_seconds(checkpoint, drawn, device, measured.length)
        stages["calibration"] = calibration_seconds(checkpoint, arch, *text)
        if measured.fitted:
            stages["layers"] += share * output_seconds(checkpoint, arch, target, *text)
        if measured.index_heads:
            steps = (measured.index_steps, measured.length, device)
            stages["indexers"] = share * indexer_seconds(arch, target, *steps)
        if measured.steps:
            steps = (measured.steps, measured.length, device)
            stages["refit"] = share * refit_seconds(checkpoint, arch, target, *steps)
    if joint:
        stages["joint refit"] = joint_seconds(checkpoint, arch, target, joint, trained_on)
    stages["files"] = checkpoint.nbytes / FILE_RATE
    if device.type == "cuda":  # most tensors are copied by the host while the GPU converts layers
        beside = sum(stages.get(name, 0.0) for name in ("layers", "indexers", "refit"))
        stages["files"] = max(0.0, stages["files"] - beside)
    if losses is not None:
        stages["losses"] = losses + share * (damage or 0.0)
    return max(peak, whole), {stage: round(seconds, 1) for stage, seconds in stages.items()}
