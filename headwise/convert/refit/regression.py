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

from headwise.convert.calibration.layer_stream import TOKENS_AT_ONCE, LayerRecord
from headwise.convert.gqa.methods import solve

# Sequences per step, and the share of sequences that only judge the result.
SEQUENCES_PER_STEP = 12
HELD_BACK = 0.1
# Peak learning rate as a share of a weight's size (see `_sizes`): one setting fits weights of any scale. A run
# shorter than ANNEALED steps gets less: it has no time to settle from large steps.
LEARNING_RATE = 0.1
ANNEALED = 300
WARMUP = 0.1
DEFAULT_STEPS = 300
# How many tokens per input the output matrices count for that a solve for new ones starts from, and the folds that
# judge it (docs/decisions/037).
PRIOR = 8
FOLDS = 8
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
    """The same for `fit_output`; `after` is cross-validated."""

    before: float
    after: float
    kept: bool


@torch.no_grad()
def fit_output(
    attention: nn.Module,
    projection: Any,
    record: LayerRecord,
    *,
    spare: bool = False,
    device: torch.device | str = "cpu",
) -> OutputReport:
    """The output matrices that make the most of what a converted layer's heads say: least squares with a prior.

    A closed form: what the layer misses of the parent's outputs is regressed on the inputs of `projection`, which
    starts as the mean of a prior that weighs as much as `PRIOR` tokens per input. Whether that helps is judged by
    cross-validation, each fold of neighbouring sequences by the solution of the others; if it does, all are used.

    Args:
        attention: as for `refit`.
        projection: its last step, `output = projection(heads)`; a linear layer, whose bias stays.
        record: as for `refit`.
        spare: leave out the sequences that a refit is judged on, because one follows.

    Raises:
        ValueError: as `refit`.
    """
    inputs, outputs, train, judge = _sequences(record, device)
    used = train if spare else torch.cat([train, judge])
    folds = used.tensor_split(min(FOLDS, len(used)))
    length = inputs.shape[1]
    tokens = len(used) * length
    heads: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, given: heads.append(given[0].flatten(0, -2)))
    grams, crosses, lost, total = [], [], [], 0.0
    for fold in folds:
        gram = cross = torch.zeros((), device=device)
        missing = 0.0
        for batch in fold.split(max(1, TOKENS_AT_ONCE // length)):
            wanted = outputs[batch].to(device)
            missed = (wanted - _apply(attention, record, inputs[batch].to(device))).flatten(0, -2)
            said = heads.pop()
            gram, cross = gram + said.mT @ said, cross + said.mT @ missed
            missing, total = missing + float(missed.square().sum()), total + float(wanted.square().sum())
        grams.append(gram)
        crosses.append(cross)
        lost.append(missing)
    hook.remove()
    gram, cross = sum(grams[1:], grams[0]), sum(crosses[1:], crosses[0])

    def change(fold: int) -> float:
        """Of the squared error of a fold, by what the others know."""
        known = tokens - len(folds[fold]) * length
        step = _output_step(gram - grams[fold], cross - crosses[fold], known)
        return float((step * (grams[fold] @ step - 2 * crosses[fold])).sum())

    before = sum(lost)
    after = before + sum(change(fold) for fold in range(len(folds)))
    kept = after < before  # False for NaN
    if kept:
        step = _output_step(gram, cross, tokens)
        projection.weight += step if _transposed(projection) else step.mT
    return OutputReport(before / total if total else 0.0, after / total if total else 0.0, kept)


def _output_step(gram: Tensor, cross: Tensor, tokens: int) -> Tensor:
    """Ridge regression; the condition number is at most `tokens / PRIOR`, which float32 is enough for."""
    prior = PRIOR * float(gram.diagonal().sum()) / max(tokens, 1)
    system = gram + torch.eye(len(gram), device=gram.device) * max(prior, TINY)
    return solve(lambda left: torch.linalg.solve(left, cross), system)


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
    if torch.device(device).type == "cuda" and _room(device) > 8 * inputs.nbytes:
        inputs, outputs = inputs.to(device), outputs.to(device)
    held = max(1, round(HELD_BACK * count))
    return inputs, outputs, torch.arange(count - held), torch.arange(count - held, count)


def _room(device: torch.device | str) -> int:
    """Bytes that are free on a GPU, those among them that torch keeps of earlier work."""
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept


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
