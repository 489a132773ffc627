"""Local refit: regress a converted attention layer on its parent's output (mathematics, section 4c).

The closed forms minimise an expected error of keys and values; what matters is what the layer says. So each
converted layer is trained, alone and for a few hundred steps, to answer the parent's own inputs with the
parent's own outputs. There is no pass through the model: one layer and its optimizer are all that is in memory,
and the stock attention class defines the function, whatever norms, biases or soft-caps it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from headwise.convert.calibration import LayerRecord

# Sequences per step, and the share of sequences that only judge the result.
SEQUENCES_PER_STEP = 12
HELD_BACK = 0.1
# Peak learning rate as a share of each tensor's root-mean-square: one setting fits weights of any size. A run
# shorter than ANNEALED steps gets less: it has no time to settle from large steps.
LEARNING_RATE = 0.1
ANNEALED = 300
WARMUP = 0.1
DEFAULT_STEPS = 300


@dataclass(frozen=True)
class RefitReport:
    """Relative squared error of the layer's output on held-back sequences, before and after; `kept` is False
    where the refit did not help and the layer keeps its closed form."""

    steps: int
    before: float
    after: float
    kept: bool


def refit(
    attention: nn.Module,
    parameters: list[nn.Parameter],
    record: LayerRecord,
    *,
    steps: int = DEFAULT_STEPS,
    learning_rate: float = LEARNING_RATE,
    seed: int = 0,
    device: torch.device | str = "cpu",
    tick: Callable[[float], None] = lambda loss: None,
) -> RefitReport:
    """Train `parameters` of a converted attention module in place; they are left as they were if it did not help.

    Args:
        attention: the target's stock attention module, in float32 on `device`, in natural coordinates.
        parameters: which of its parameters are free.
        record: the parent layer's inputs and outputs, as `LayerStream.records(keep=True)` gives them.
        steps: of Adam, on 12 sequences each.
        learning_rate: at its peak, relative to each tensor's root-mean-square; cosine to zero.
        seed: of the order of sequences; the layer's index is added.
        tick: called with the training loss after every step.

    Raises:
        ValueError: the record holds no inputs and outputs, or fewer than two sequences.
    """
    if record.inputs is None or record.outputs is None or len(record.inputs) < 2:
        raise ValueError("a refit needs the inputs and outputs of two sequences or more")
    held = max(1, round(HELD_BACK * len(record.inputs)))
    train = torch.arange(len(record.inputs) - held)
    judge = torch.arange(len(record.inputs) - held, len(record.inputs))
    generator = torch.Generator().manual_seed(seed + record.index)

    start = [p.detach().clone() for p in parameters]
    before = output_error(attention, record, judge, device)
    peak = learning_rate * min(1.0, math.sqrt(steps / ANNEALED))
    groups = [{"params": [p], "lr": peak * float(p.detach().square().mean().sqrt())} for p in parameters]
    optimizer = torch.optim.Adam(groups, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    scale = float(record.outputs[train].square().mean())
    order = torch.empty(0, dtype=torch.long)
    for p in parameters:
        p.requires_grad_(True)
    for _ in range(steps):
        while len(order) < min(SEQUENCES_PER_STEP, len(train)):
            order = torch.cat([order, train[torch.randperm(len(train), generator=generator)]])
        batch, order = order[:SEQUENCES_PER_STEP], order[SEQUENCES_PER_STEP:]
        output = _apply(attention, record, batch, device)
        loss = (output - record.outputs[batch].to(device)).square().mean() / scale
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        tick(float(loss.detach()))
    for p in parameters:
        p.requires_grad_(False)
        p.grad = None

    after = output_error(attention, record, judge, device)
    kept = after < before  # False for NaN
    if not kept:
        for p, old in zip(parameters, start, strict=True):
            p.copy_(old)
    return RefitReport(steps, before, after, kept)


@torch.no_grad()
def output_error(
    attention: nn.Module, record: LayerRecord, sequences: Tensor, device: torch.device | str = "cpu"
) -> float:
    """Relative squared error of the module's output against the parent's, over some sequences."""
    assert record.outputs is not None
    lost = total = 0.0
    for batch in sequences.split(SEQUENCES_PER_STEP):
        wanted = record.outputs[batch].to(device)
        lost += float((_apply(attention, record, batch, device) - wanted).square().sum())
        total += float(wanted.square().sum())
    return lost / total if total else 0.0


def forecast_flops(parameters: int, heads: int, head_dim: int, length: int, steps: int) -> float:
    """Floating-point operations of refitting one layer: 6 per weight and token, 6 per causal score and dim."""
    tokens = SEQUENCES_PER_STEP * length
    return steps * tokens * (6.0 * parameters + 6.0 * heads * head_dim * length)


def _apply(attention: nn.Module, record: LayerRecord, batch: Tensor, device: torch.device | str) -> Tensor:
    assert record.inputs is not None
    output = attention(hidden_states=record.inputs[batch].to(device), **record.arguments)
    return output[0] if isinstance(output, tuple) else output


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
