"""Local refit: regress a converted attention layer on its parent's output (mathematics, section 4c).

The closed forms minimise an expected error of keys and values; what matters is what the layer says. So its output
matrices are solved for by least squares (`fit_output`); then the layer is trained (`refit`), alone and for a few
hundred steps, to answer the parent's own inputs with the parent's own outputs. There is no pass through the model:
one layer and its optimizer are all that is in memory, and the stock attention class defines the function, whatever
norms, biases or soft-caps it has.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.calibration import LayerRecord
from headwise.convert.methods import solve

# Sequences per step, and the share of sequences that only judge the result.
SEQUENCES_PER_STEP = 12
HELD_BACK = 0.1
# Peak learning rate as a share of a weight's size (see `_sizes`): one setting fits weights of any scale. A run
# shorter than ANNEALED steps gets less: it has no time to settle from large steps.
LEARNING_RATE = 0.1
ANNEALED = 300
WARMUP = 0.1
DEFAULT_STEPS = 300
# How strongly output matrices are held to what they were, relative to the mean energy of what they read.
RIDGE = 1e-3
TINY = 1e-30


@dataclass(frozen=True)
class RefitReport:
    """Relative squared error of the layer's output on held-back sequences, before and after; `kept` is False
    where the refit did not help and the layer keeps its closed form."""

    steps: int
    before: float
    after: float
    kept: bool


@dataclass(frozen=True)
class OutputReport:
    """The same for `fit_output`."""

    before: float
    after: float
    kept: bool


@torch.no_grad()
def fit_output(
    attention: nn.Module, projection: Any, record: LayerRecord, *, device: torch.device | str = "cpu"
) -> OutputReport:
    """The output matrices that make the most of what a converted layer's heads say: ordinary least squares.

    A closed form: the parent's outputs are regressed on the inputs of `projection`, over all calibration tokens but
    the held-back ones. It is left as it was if it does not help on those.

    Args:
        attention: as for `refit`.
        projection: its last step, `output = projection(heads)`; a linear layer, whose bias stays.
        record: as for `refit`.

    Raises:
        ValueError: as `refit`.
    """
    inputs, outputs, train, judge = _sequences(record, device)
    weight = projection.weight.T if _transposed(projection) else projection.weight
    start, bias = weight.clone(), 0.0 if projection.bias is None else projection.bias
    before = output_error(attention, record, judge, device)
    heads: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, given: heads.append(given[0].flatten(0, -2)))
    gram = cross = torch.zeros((), dtype=torch.float64, device=device)
    for batch in train.split(SEQUENCES_PER_STEP):
        _apply(attention, record, inputs[batch].to(device))
        said = heads.pop()
        wanted = outputs[batch].to(device).flatten(0, -2) - bias
        gram, cross = gram + (said.mT @ said).double(), cross + (said.mT @ wanted).double()
    hook.remove()
    ridge = RIDGE * gram.diagonal().mean()
    gram.diagonal().add_(ridge)
    cross += ridge * start.double().T
    weight.copy_(solve(lambda left: torch.linalg.solve(left, cross), gram).T)
    after = output_error(attention, record, judge, device)
    kept = after < before  # False for NaN
    if not kept:
        weight.copy_(start)
    return OutputReport(before, after, kept)


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
        learning_rate: at its peak, relative to each weight's size (`_sizes`); cosine to zero.
        seed: of the order of sequences; the layer's index is added.
        tick: called with the training loss after every step.

    Raises:
        ValueError: the record holds no inputs and outputs, or fewer than two sequences.
    """
    inputs, outputs, train, judge = _sequences(record, device)
    generator = torch.Generator().manual_seed(seed + record.index)

    start = [p.detach().clone() for p in parameters]
    sizes = [_sizes(p) for p in start]
    units = [(p / size.clamp_min(TINY)).requires_grad_() for p, size in zip(start, sizes, strict=True)]
    before = output_error(attention, record, judge, device)
    peak = learning_rate * min(1.0, math.sqrt(steps / ANNEALED))
    optimizer = torch.optim.Adam(units, lr=peak, betas=(0.9, 0.95), eps=1e-12)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _schedule(step, steps))
    scale = float(outputs[train].square().mean())
    order = torch.empty(0, dtype=torch.long)
    for p in parameters:
        p.requires_grad_(True)
    for _ in range(steps):
        while len(order) < min(SEQUENCES_PER_STEP, len(train)):
            order = torch.cat([order, train[torch.randperm(len(train), generator=generator)]])
        batch, order = order[:SEQUENCES_PER_STEP], order[SEQUENCES_PER_STEP:]
        output = _apply(attention, record, inputs[batch].to(device))
        loss = (output - outputs[batch].to(device)).square().mean() / scale
        loss.backward()
        for p, unit, size in zip(parameters, units, sizes, strict=True):
            unit.grad = None if p.grad is None else p.grad * size
            p.grad = None
        optimizer.step()
        with torch.no_grad():
            for p, unit, size in zip(parameters, units, sizes, strict=True):
                p.copy_(unit * size)
        schedule.step()
        tick(float(loss.detach()))
    for p in parameters:
        p.requires_grad_(False)

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
    assert record.inputs is not None and record.outputs is not None
    lost = total = 0.0
    for batch in sequences.split(SEQUENCES_PER_STEP):
        wanted = record.outputs[batch].to(device)
        lost += float((_apply(attention, record, record.inputs[batch].to(device)) - wanted).square().sum())
        total += float(wanted.square().sum())
    return lost / total if total else 0.0


def forecast_flops(parameters: int, heads: int, head_dim: int, length: int, steps: int) -> float:
    """Floating-point operations of refitting one layer: 6 per weight and token, 6 per causal score and dim."""
    tokens = SEQUENCES_PER_STEP * length
    return steps * tokens * (6.0 * parameters + 6.0 * heads * head_dim * length)


def _sequences(record: LayerRecord, device: torch.device | str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and outputs, on a GPU if there is plenty of room, and which sequences train and which only judge."""
    if record.inputs is None or record.outputs is None or len(record.inputs) < 2:
        raise ValueError("a refit needs the inputs and outputs of two sequences or more")
    inputs, outputs, count = record.inputs, record.outputs, len(record.inputs)
    if torch.device(device).type == "cuda" and torch.cuda.mem_get_info(device)[0] > 8 * inputs.nbytes:
        inputs, outputs = inputs.to(device), outputs.to(device)
    held = max(1, round(HELD_BACK * count))
    return inputs, outputs, torch.arange(count - held), torch.arange(count - held, count)


def _sizes(weight: Tensor) -> Tensor:
    """What steps are relative to: the root-mean-square of a weight's row times its column's, over the matrix's.

    Rows and columns of one matrix may belong to different things: a latent and a rotary key, keys and values, loud
    and quiet heads. With steps relative to the whole matrix the small ones are lost in the steps of the large ones:
    an MLA layer got worse by being trained.
    """
    energy = weight.square()
    if weight.ndim < 2:
        return energy.mean().sqrt()
    return (energy.mean(1, keepdim=True) * energy.mean(0, keepdim=True) / energy.mean().clamp_min(TINY)).sqrt()


def _transposed(projection: Any) -> bool:
    """transformers' Conv1D (GPT-2) keeps its weight as (inputs, outputs)."""
    return not isinstance(projection, nn.Linear)


def _apply(attention: nn.Module, record: LayerRecord, inputs: Tensor) -> Tensor:
    output = attention(hidden_states=inputs, **record.arguments)
    return output[0] if isinstance(output, tuple) else output


def _schedule(step: int, steps: int) -> float:
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
