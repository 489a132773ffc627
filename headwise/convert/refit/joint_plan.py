"""Decide the joint refit of a conversion: its stages by the free memory, its steps, their time and their memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

from headwise.convert.base import Target
from headwise.convert.calibration.corpus import sampling_seconds
from headwise.convert.forecast.amounts import REFIT_SECONDS
from headwise.convert.forecast.stage_seconds import forward_seconds, trained_seconds
from headwise.convert.settings import ConvertSettings
from headwise.environment import available_memory
from headwise.errors import SettingError
from headwise.format import size
from headwise.io.reader import Checkpoint
from headwise.models.protocol import AttentionModel, is_latent
from headwise.models.stock import stock_config
from headwise.train.memory import ModelShape, forecast_memory
from headwise.train.recovery import WINDOW, JointPlan

# What the amount of text and steps is where a GPU makes it affordable, and otherwise.
GPU_PLAN = JointPlan(tokens=4_000_000, regression_steps=1000, kl_steps=1000)
CPU_PLAN = JointPlan(tokens=262_144, regression_steps=60, kl_steps=20, sequences=2, length=1024, sampled_length=512)
# Steps on a GPU are this much larger with more than the usual text.
LARGER_STEP = 4 / 3
# A stage reads less text than the plan's at most so many times.
MOST_READS = 3.1
# Sustained rates on one H200 in bfloat16: of models of 135M parameters (width 576), on the low side of what was
# measured, and of a 7B. Between them they grow with the width.
TRAINING_FLOPS, SAMPLING_FLOPS = (5e13, 3.5e14), (2.5e13, 1.3e14)
NARROW = 576
# Bytes of a trained parameter beside those of Adam: the scale of its steps, and its value before the stage.
EXTRA_PER_TRAINED = 8
# Bytes of a trained parameter in the buckets of torch's wrapper for several processes.
BYTES_OF_BUCKETS = 4
# Blocks of held-out text in one pass, and the bytes of a logit there: as computed, in float32, as log-probability.
MEASURED_AT_ONCE, BYTES_PER_MEASURED = 8, {"cpu": 4 + 4, "cuda": 2 + 4 + 4}


def plan_joint(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    target: Target,
    settings: ConvertSettings,
    devices: Sequence[torch.device],
    before: Mapping[str, Any] | None = None,
) -> JointPlan | None:
    """Decide whether the layers are recovered together, and how. Where memory is short, windows replace KL.

    Args:
        checkpoint: the source.
        arch: its row.
        target: the decided conversion.
        settings: `refit` "joint" or "windows" requires a joint refit. "auto" selects one on a GPU if its forecast
            time is short and its forecast memory is free.
        devices: of the conversion; they share the sequences of a step.
        before: the plan of the run that this one continues, as recorded: it stays; empty: that run had none.

    Returns:
        The steps and tokens; None: no joint refit.

    Raises:
        SettingError: a joint refit is required, and the source has no language-model head or has MLA already, or
            the memory does not even hold windows.
    """
    tower = any(not target.layouts[i].on_text for i in range(len(target.layouts)) if target.converted_names(i))
    if not arch.is_decoder or tower:
        if settings.refits_jointly:
            raise SettingError(
                "refit",
                f"`refit` {settings.refit} trains on text, which does not run all layers that change."
                if tower
                else f"`refit` {settings.refit} trains decoder-only models, and {checkpoint.source} is none.",
                "Give `refit` layers or off.",
            )
        return None
    if settings.cache_dtype == "fp8":
        if settings.refits_jointly:
            raise SettingError(
                "cache_dtype",
                f"`cache_dtype` fp8 writes a basis of the latent in which `refit` {settings.refit} trains badly.",
                "Give `refit` layers or off, or leave out `cache_dtype`.",
            )
        return None
    if is_latent(checkpoint.config):
        if settings.refits_jointly:
            raise SettingError(
                "refit",
                f"`refit` {settings.refit} trains queries too, and a smaller cache keeps those of "
                f"{checkpoint.source}.",
                "Give `refit` layers or off.",
            )
        return None
    device = devices[0]
    plan = scaled_plan(GPU_PLAN if device.type == "cuda" else CPU_PLAN, settings.refit_tokens)
    context = _context(checkpoint, arch) or plan.length
    if (settings.refit_length or 0) > context:
        raise SettingError(
            "refit_length",
            f"`refit_length` is {settings.refit_length:,} tokens, and the context of {checkpoint.source} is "
            f"{context:,}.",
            f"Give at most {context}.",
        )
    plan = with_length(plan, settings.refit_length or min(plan.length, context))
    if settings.refit_repeats is not None:
        plan = replace(plan, repeats=settings.refit_repeats)
    # Each device reads as many sequences of a step; an interrupted run keeps its steps on other devices.
    sequences = (before or {}).get("sequences", math.ceil(plan.sequences / len(devices)) * len(devices))
    if isinstance(sequences, int) and sequences > plan.sequences:
        plan = shared_plan(plan, sequences)
    if settings.refits_jointly:
        if checkpoint.headless:
            raise SettingError(
                "refit",
                f"`refit` {settings.refit} trains towards the parent's text, and {checkpoint.source} has no head.",
                "Give `refit` layers or off.",
            )
        return _plan_that_fits(checkpoint, target, settings, plan, devices, before)
    changed = target.exact or settings.context is not None or settings.sliding_window is not None
    # Whoever wants no text read wants none sampled.
    textless = settings.calibrate == "none" or settings.moments is not None
    chosen = settings.refit == "auto" and device.type == "cuda" and target.calibrated and _allowed(settings)
    without = before is not None and not before  # the run that this one continues had none
    if not chosen or changed or textless or checkpoint.headless or without:
        return None
    try:
        plan = _plan_that_fits(checkpoint, target, settings, plan, devices, before)
    except SettingError:
        return None
    short = joint_seconds(checkpoint, arch, target, plan, devices) <= REFIT_SECONDS
    return plan if short or _kept([plan], before) else None


def _kept(plans: list[JointPlan], before: Mapping[str, Any] | None) -> list[JointPlan]:
    """Return the plan of the run that this one continues, if it is among these."""
    return [plan for plan in plans if asdict(plan) == before]


def _plan_that_fits(
    checkpoint: Checkpoint,
    target: Target,
    settings: ConvertSettings,
    plan: JointPlan,
    devices: Sequence[torch.device],
    before: Mapping[str, Any] | None,
) -> JointPlan:
    """Return a plan with the best stage after the regression that the device's free memory holds."""
    windows = replace(plan, windows_steps=plan.kl_steps, kl_steps=0)
    stages = [windows] if settings.refit == "windows" else [plan, windows]
    plans = [replace(each, one_by_one=alone) for each in stages for alone in (False, True)]
    sharing = training_processes(plan, devices) if devices[0].type == "cpu" else 1
    needed = [sharing * joint_memory(checkpoint, target, each, devices) for each in plans]
    free = min((free for free in map(available_memory, devices) if free is not None), default=None)
    fitting = [each for each, nbytes in zip(plans, needed, strict=True) if free is None or nbytes <= free]
    for each in _kept(plans, before) + fitting:
        return each
    raise SettingError(
        "refit",
        f"`refit` {settings.refit} takes about {size(needed[-1])} of memory even in windows of {WINDOW} layers. "
        f"{size(free or 0)} are free on {', '.join(map(str, devices))}.",
        "Give a smaller `refit_length`, or `refit` layers or off.",
    )


def _allowed(settings: ConvertSettings) -> bool:
    """Return whether the rules of the settings allow a joint refit beside the others."""
    try:
        replace(settings, refit="joint")
    except SettingError:
        return False
    return True


def _context(checkpoint: Checkpoint, arch: AttentionModel) -> int | None:
    context: int | None = getattr(arch.stock_config(checkpoint.config), "max_position_embeddings", None)
    return context


def _attention_parameters(checkpoint: Checkpoint, arch: AttentionModel, target: Target) -> int:
    width = arch.stock_config(checkpoint.config).hidden_size
    return sum(layout.num_parameters(width) for layout in target.layouts)


def scaled_plan(plan: JointPlan, tokens: int | None) -> JointPlan:
    """Return a plan with another number of tokens.

    More text takes larger steps in both stages, and more of them in the KL stage, which reads every token about
    once. Less text takes fewer steps only where it would be read more than `MOST_READS` times.

    Args:
        plan: the usual plan of a device.
        tokens: distinct tokens of text; None: the plan's.
    """
    if tokens is None:
        return plan
    if tokens < plan.tokens:
        most = max(1, round(MOST_READS * tokens / (plan.sequences * plan.length)))
        regression, kl = min(plan.regression_steps, most), min(plan.kl_steps, most)
        return replace(plan, tokens=tokens, regression_steps=regression, kl_steps=kl)
    factor = tokens / plan.tokens
    larger = LARGER_STEP if factor > 1 else 1.0
    return replace(
        plan,
        tokens=tokens,
        sequences=round(larger * plan.sequences),
        kl_steps=round(factor / larger * plan.kl_steps),
    )


def with_length(plan: JointPlan, length: int) -> JointPlan:
    """Return a plan whose sequences have another length, with as many tokens in a step.

    Args:
        plan: the usual plan of a device.
        length: tokens in a sequence; it is rounded down to whole sampled pieces.
    """
    sampled = min(plan.sampled_length, length)
    length -= length % sampled
    sequences = max(1, round(plan.sequences * plan.length / length))
    return replace(plan, length=length, sampled_length=sampled, sequences=sequences)


def joint_memory(checkpoint: Checkpoint, target: Target, plan: JointPlan, devices: Sequence[torch.device]) -> int:
    """Return the forecast bytes of a device at the peak of a joint refit's training, held-out text included.

    Args:
        checkpoint: the source.
        target: the decided conversion.
        plan: steps and tokens.
        devices: where the models are trained.
    """
    cpu, count = devices[0].type == "cpu", training_processes(plan, devices)
    text = stock_config(target.config).get_text_config(decoder=True)
    student = ModelShape.of(text, sum(math.prod(tensor.shape) for tensor in target.outputs))
    trained = sum(layout.num_parameters(text.hidden_size) for layout in target.layouts)
    rows = plan.sequences // count
    alone = cpu or (plan.one_by_one and rows > 1)  # a single sequence is recorded as one step
    forecast = forecast_memory(
        student,
        num_trained=trained,
        tokens=plan.length * (1 if alone else rows),
        teacher=ModelShape.of(
            stock_config(checkpoint.config).get_text_config(decoder=True), checkpoint.num_parameters
        ),
        bf16=not cpu,
        accumulates=True,  # a recorded step keeps its gradients too
        window=None if plan.kl_steps else WINDOW,
    )
    logits = MEASURED_AT_ONCE * plan.sampled_length * student.vocab_size
    measured = logits * BYTES_PER_MEASURED["cpu" if cpu else "cuda"]
    if alone:  # a step is freed before the loss is measured; a recorded one keeps its memory
        measured = max(0, measured - forecast.activations - forecast.logits)
    extra = EXTRA_PER_TRAINED + (BYTES_OF_BUCKETS if count > 1 else 0)
    return forecast.total + extra * trained + measured


def joint_seconds(
    checkpoint: Checkpoint, arch: AttentionModel, target: Target, plan: JointPlan, devices: Sequence[torch.device]
) -> float:
    """Return the forecast seconds of a joint refit, sampling included.

    Args:
        checkpoint: the source.
        arch: its row.
        target: the decided conversion.
        plan: steps and tokens.
        devices: where the models are trained.
    """
    device = devices[0]
    # Processes on one CPU share its cores.
    tokens = plan.sequences * plan.length / (1 if device.type == "cpu" else training_processes(plan, devices))
    if device.type != "cuda":
        forward = forward_seconds(checkpoint, 1, device)
        attention_step = trained_seconds(target, plan.length)
        # Both stages measure the held-out loss before and after; a backward pass costs two forward passes.
        measured = 4 * plan.heldout * plan.sampled_length * forward
        regressed = plan.regression_steps * tokens * (forward + attention_step)
        distilled = (plan.kl_steps + plan.windows_steps) * tokens * (4 * forward + attention_step)
        sampled = (plan.num_sampled + plan.heldout) * plan.sampled_length
        return measured + regressed + distilled + sampling_seconds(checkpoint, sampled, device, plan.sampled_length)
    parameters, attention = checkpoint.num_parameters, _attention_parameters(checkpoint, arch, target)
    regression = plan.regression_steps * tokens * (2.0 * parameters + 6.0 * attention)
    distillation = (plan.kl_steps + plan.windows_steps) * tokens * (2.0 + 2.0 + 4.0) * parameters
    sampling = plan.tokens * 2.0 * parameters
    hidden_size: int = stock_config(checkpoint.config).get_text_config(decoder=True).hidden_size
    wider = max(1.0, hidden_size / NARROW)
    training_rate, sampling_rate = (min(rates[1], rates[0] * wider) for rates in (TRAINING_FLOPS, SAMPLING_FLOPS))
    return (regression + distillation) / training_rate + sampling / sampling_rate


def joint_notes(
    checkpoint: Checkpoint,
    target: Target,
    settings: ConvertSettings,
    plan: JointPlan | None,
    devices: Sequence[torch.device],
) -> list[str]:
    """Return the lines of the plan about a joint refit.

    Args:
        checkpoint: the source.
        target: the decided conversion.
        settings: of the conversion.
        plan: steps and tokens; None: no joint refit.
        devices: where the models are trained.
    """
    if plan is None:
        return []
    second = f"{plan.kl_steps:,} of KL to the parent"
    if plan.windows_steps:
        whole = replace(plan, kl_steps=plan.windows_steps, windows_steps=0, one_by_one=True)
        needed = joint_memory(checkpoint, target, whole, devices)
        reason = (
            "as `refit` sets"
            if settings.refit == "windows"
            else f"because a backward pass through the whole model takes about {size(needed)} of memory"
        )
        second = f"{plan.windows_steps:,} in windows of {WINDOW} layers, {reason}"
    count = training_processes(plan, devices)
    shared = f" {count} processes share the sequences of a step." if count > 1 else ""
    shared += " For lack of memory they are read one after the other." if plan.one_by_one else ""
    return [
        f"Joint refit: {plan.regression_steps:,} steps of regression and {second}, on "
        f"{plan.tokens:,} tokens sampled from the parent. Sequences have {plan.length:,} tokens, and "
        f"{plan.repeats:.0%} of them repeat earlier passages.{shared}"
    ]


def joint_warnings(checkpoint: Checkpoint, arch: AttentionModel, plan: JointPlan | None) -> list[str]:
    """Return the warning about prompts that are longer than the sequences of the training.

    Args:
        checkpoint: the source.
        arch: its row.
        plan: steps and tokens; None: no joint refit.
    """
    context = _context(checkpoint, arch)
    if plan is None or context is None or context <= plan.length:
        return []
    return [
        f"The joint refit trains on sequences of {plan.length:,} tokens, and the context has {context:,}: in "
        "longer prompts the model may not find a passage again. "
        f"`refit_length` {context} trains on all of it; `headwise "
        "eval` with the recipe retrieval measures it."
    ]


def training_processes(plan: JointPlan, devices: Sequence[torch.device]) -> int:
    """Return how many processes train: each reads as many sequences of a step.

    Args:
        plan: steps and tokens.
        devices: of the conversion.
    """
    return max(count for count in range(1, len(devices) + 1) if plan.sequences % count == 0)


def shared_plan(plan: JointPlan, sequences: int) -> JointPlan:
    """Return a plan with more sequences in a step, and as many tokens in fewer steps.

    Args:
        plan: the usual plan of one device.
        sequences: in a step.
    """
    share = plan.sequences / sequences
    return replace(
        plan,
        sequences=sequences,
        regression_steps=round(share * plan.regression_steps),
        kl_steps=round(share * plan.kl_steps),
        windows_steps=round(share * plan.windows_steps),
    )
