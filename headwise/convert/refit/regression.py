"""Regress a converted attention layer on its parent's output (mathematics, section 4c).

The closed forms minimise an expected error of keys and values; what matters is the layer's output. The layer is
trained alone for a few hundred steps: its inputs are the parent's inputs of that layer, its targets the parent's
outputs. No pass through the whole model is needed, so one layer and its optimizer are all that is in memory. The
stock attention class defines the function, with its norms, biases and soft-caps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.environment import available_memory
from headwise.models.stock import move_to_device
from headwise.train.optimizer import RelativeAdam

# Sequences per step on a GPU. On a CPU a step has two of 512 tokens or more, or so many shorter ones that they have
# as many tokens. There 300 steps of 2 took half the time of 100 steps of 12, and left less error
# (docs/results/convert-speed.md).
SEQUENCES_PER_STEP, SEQUENCES_PER_STEP_ON_CPU, TOKENS_PER_STEP_ON_CPU = 12, 2, 1024
# The share of sequences that are not trained on: they decide what is kept.
HELD_BACK = 0.1
# Bounds of the peak learning rate, as a share of a weight's size (see `RelativeAdam`), and the rate for an error of
# 1. A good closed form gets a lower rate, since large steps only lead away from it (docs/decisions/0007). So does a
# run shorter than ANNEALED steps: it is too short to settle from large steps.
HIGHEST_RATE, LOWEST_RATE, RATE_PER_ERROR = 0.1, 0.005, 0.35
ANNEALED = 300
# In the first half of a run, the error on held-back sequences is measured after every tenth of the steps. Where it
# is above that of the closed form, the rest of the steps begin anew at a smaller rate. CHECKED is the time of a run
# with these measurements over that without them.
CHECKS, SMALLER, CHECKED = 10, 1 / 3, 1.1
WARMUP = 0.1
DEFAULT_STEPS = 300


@dataclass(frozen=True)
class RefitReport:
    """Relative squared error of a layer's output on held-back sequences.

    Attributes:
        steps: of training.
        before: the error of the closed form.
        after: the error of the trained layer.
        kept: whether the trained layer is used; False where it is not better than the closed form.
        restarts: how often the steps began anew at a smaller rate.
    """

    steps: int
    before: float
    after: float
    kept: bool
    restarts: int


def refit(
    attention: nn.Module,
    parameters: list[nn.Parameter],
    record: LayerRecord,
    *,
    steps: int = DEFAULT_STEPS,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tick: Callable[[float], None] = lambda loss: None,
) -> RefitReport:
    """Train the parameters of a converted attention module in place.

    The parameters keep their old values if the error on held-back sequences did not fall. Where it has risen early
    in the run, the steps that are left begin anew at a smaller rate.

    Args:
        attention: the target's stock attention module, float32 on `device`; MLA without its latent norm.
        parameters: which of its parameters are trained.
        record: the parent layer's inputs and outputs, from `LayerStream.records(keep_activations=True)`.
        steps: of Adam, on `sequences_per_step` sequences each. The rate falls from `peak_rate` along a cosine.
        seed: of the order of sequences; the layer's index is added.
        device: where `attention` is.
        tick: called with the training loss after every step.

    Returns:
        The errors before and after, whether the training is kept, and its restarts.

    Raises:
        ValueError: the record holds no inputs and outputs, or fewer than two sequences.
    """
    inputs, outputs, train, heldout = split_sequences(record, device)
    size_of_step = sequences_per_step(device, inputs.shape[1])
    generator = torch.Generator().manual_seed(seed + record.index)

    start = [p.detach().clone() for p in parameters]
    before = output_error(attention, record, heldout, device)
    scale = float(outputs[train].square().mean())
    # On a GPU products are in bfloat16, of weights that stay float32; both errors are measured in float32.
    on_gpu = torch.device(device).type == "cuda"
    order = torch.empty(0, dtype=torch.long)

    def loss_of_batch() -> Tensor:
        nonlocal order
        while len(order) < min(size_of_step, len(train)):
            order = torch.cat([order, train[torch.randperm(len(train), generator=generator)]])
        batch, order = order[:size_of_step], order[size_of_step:]
        with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
            output = apply_attention(attention, record, inputs[batch].to(device), batch)
        return (output.float() - outputs[batch].to(device)).square().mean() / scale

    peak = peak_rate(before, steps)
    between, done, restarts = math.ceil(steps / CHECKS), 0, 0
    for p in parameters:
        p.requires_grad_(True)
    while done < steps:
        first, left, adam = done, steps - done, RelativeAdam(parameters)
        while done < steps:
            adam.param_groups[0]["lr"] = peak * schedule(done - first, left)
            loss = loss_of_batch()
            loss.backward()
            adam.step()
            adam.zero_grad()
            done += 1
            tick(float(loss.detach()))
            early = done % between == 0 and done <= steps // 2
            if early and not output_error(attention, record, heldout, device) <= before:  # NaN is not below either
                _restore(parameters, start)
                peak, restarts = peak * SMALLER, restarts + 1
                break
    for p in parameters:
        p.requires_grad_(False)

    after = output_error(attention, record, heldout, device)
    kept = after < before  # False for NaN
    if not kept:
        _restore(parameters, start)
    return RefitReport(steps, before, after, kept, restarts)


@torch.no_grad()
def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    for p, value in zip(parameters, values, strict=True):
        p.copy_(value)


def peak_rate(error: float, steps: int) -> float:
    """Return the peak learning rate of a run, relative to each weight's size.

    Args:
        error: of the closed form, relative to the energy of the output.
        steps: of the run.
    """
    rate = min(HIGHEST_RATE, max(LOWEST_RATE, RATE_PER_ERROR * error))
    return rate * min(1.0, math.sqrt(steps / ANNEALED))


@torch.no_grad()
def output_error(
    attention: nn.Module, record: LayerRecord, sequences: Tensor, device: torch.device | str = "cpu"
) -> float:
    """Return the squared error of a module's output, relative to the energy of the parent's.

    Args:
        attention: the module, on `device`.
        record: the parent layer's inputs and outputs.
        sequences: indices of the sequences to use, (n,).
        device: where `attention` is.
    """
    assert record.inputs is not None and record.outputs is not None
    lost = total = 0.0
    for batch in sequences.split(SEQUENCES_PER_STEP):
        wanted = record.outputs[batch].to(device)
        output = apply_attention(attention, record, record.inputs[batch].to(device), batch)
        lost += float((output - wanted).square().sum())
        total += float(wanted.square().sum())
    return lost / total if total else 0.0


def sequences_per_step(device: torch.device | str, length: int) -> int:
    """Return the sequences of one step of the regression.

    Args:
        device: where the layer is.
        length: tokens in a sequence.
    """
    if torch.device(device).type != "cpu":
        return SEQUENCES_PER_STEP
    return min(SEQUENCES_PER_STEP, max(SEQUENCES_PER_STEP_ON_CPU, TOKENS_PER_STEP_ON_CPU // length))


def forecast_flops(parameters: int, heads: int, head_dim: int, tokens: int, length: int) -> float:
    """Return the floating-point operations of a forward and a backward pass of one layer's attention.

    A token takes 6 per weight, and 6 per causal score and head dim.

    Args:
        parameters: number of trained parameters.
        heads: number of query heads.
        head_dim: elements of a head.
        tokens: of all sequences.
        length: tokens in a sequence.
    """
    return tokens * (6.0 * parameters + 6.0 * heads * head_dim * length)


def split_sequences(record: LayerRecord, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Split the sequences of a record into those that train and those that only measure.

    Args:
        record: a layer's record with inputs and outputs.
        device: where the layer is; inputs and outputs are moved there if it is a GPU with room to spare.

    Returns:
        Inputs and outputs, (sequences, length, D) each, the training indices and the held-back indices.

    Raises:
        ValueError: the record holds no inputs and outputs, or fewer than two sequences.
    """
    if record.inputs is None or record.outputs is None or len(record.inputs) < 2:
        raise ValueError("a refit needs the inputs and outputs of two sequences or more")
    inputs, outputs, count = record.inputs, record.outputs, len(record.inputs)
    device = torch.device(device)
    if device.type == "cuda" and (available_memory(device) or 0) > 8 * inputs.nbytes:
        inputs, outputs = inputs.to(device), outputs.to(device)
    held = max(1, round(HELD_BACK * count))
    return inputs, outputs, torch.arange(count - held), torch.arange(count - held, count)


def apply_attention(attention: nn.Module, record: LayerRecord, inputs: Tensor, sequences: Tensor) -> Tensor:
    """Return the output of an attention module for inputs (sequences, length, D), times the roots of token weights.

    Args:
        attention: the module.
        record: the parent layer's record, for the further arguments of the module.
        inputs: (sequences, length, D).
        sequences: the indices of these sequences in the record.
    """
    if record.calls:
        parts = []
        for row, sequence in zip(inputs, sequences.tolist(), strict=True):
            shape, arguments = record.calls[sequence]
            arguments = move_to_device(arguments, inputs.device)
            output = attention(hidden_states=row[: shape[-2]].reshape(shape), **arguments)
            parts.append(padded(output[0] if isinstance(output, tuple) else output, inputs.shape[1]))
        result = torch.cat(parts)
    else:
        rows = {name: value[sequences.cpu()].to(inputs.device) for name, value in record.rows.items()}
        output = attention(hidden_states=inputs, **record.arguments, **rows)
        result = output[0] if isinstance(output, tuple) else output
    if record.roots is not None:
        result = result * record.roots[sequences.cpu()].to(inputs.device)[..., None]
    return result


def padded(rows: Tensor, length: int) -> Tensor:
    """Return the rows of sequences with zeros behind them, (sequences, length, width).

    Args:
        rows: (sequences, tokens, width), or (tokens, width) of one sequence.
        length: tokens in a sequence afterwards.
    """
    rows = rows if rows.ndim > 2 else rows[None]
    return nn.functional.pad(rows, (0, 0, 0, length - rows.shape[1]))


def schedule(step: int, steps: int) -> float:
    """Return the learning rate of a step over its peak: a linear warm-up, then a cosine to zero.

    Args:
        step: from 0.
        steps: of the training.
    """
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
