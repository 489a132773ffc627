"""Compute the training losses: torch tensors in, one number out.

Losses over tokens are computed in chunks of logits: a chunk is converted to float32, its loss and its gradient are
computed, and only the gradient is kept, in the precision of the logits. So the float32 logits of two models are
never in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Elements of a chunk of logits: 128 MiB in float32.
CHUNK = 1 << 25
IGNORED = -100


@dataclass(frozen=True)
class ModelOutputs:
    """The outputs of a model on a batch.

    Attributes:
        logits: (batch, tokens, vocabulary).
        hidden_states: the output of every layer, (batch, tokens, D) each; empty if not needed.
        attention_outputs: the output of every attention module, (batch, tokens, D) each; empty if not needed.
    """

    logits: Tensor
    hidden_states: Sequence[Tensor] = ()
    attention_outputs: Sequence[Tensor] = ()


def total_loss(
    weights: Mapping[str, float],
    student: ModelOutputs,
    labels: Tensor,
    teacher: ModelOutputs | None = None,
    teacher_topk: Sequence[Tensor] | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    *,
    temperature: float = 1.0,
    compiled: bool = False,
) -> Tensor:
    """Return the weighted sum of the terms of a loss, a mean over the predicted tokens.

    Args:
        weights: of the terms, by the names of `headwise.train.settings.Loss`: kl, reverse_kl, jsd, cross_entropy,
            hidden_states and attention_outputs.
        student: its outputs.
        labels: (batch, tokens); IGNORED for a token that is not predicted, which the divergences leave out too.
        teacher: the teacher's outputs, where it runs beside the student.
        teacher_topk: instead, its most likely tokens and their log-probabilities, (batch, tokens, k) each.
        scales: of the student's residual stream and attention outputs over the teacher's.
        temperature: of both distributions in the divergences.
        compiled: compile the loss of a chunk with torch.compile.

    Returns:
        A scalar, float32.
    """
    targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), IGNORED)], 1).flatten()
    predicted = (targets != IGNORED).float()
    others = [targets]
    if teacher_topk:
        others += [tensor.flatten(0, 1) for tensor in teacher_topk]
    elif teacher is not None:
        others.append(teacher.logits.flatten(0, 1))
    logits = student.logits.flatten(0, 1)
    per_token = _per_token(tuple(weights.items()), temperature, compiled)
    total = over_tokens(per_token, logits, *others, weights=predicted / predicted.sum().clamp_min(1))
    if teacher is not None and weights.get("hidden_states"):
        error = relative_squared_error(student.hidden_states, teacher.hidden_states, scales[0])
        total = total + weights["hidden_states"] * error
    if teacher is not None and weights.get("attention_outputs"):
        error = relative_squared_error(student.attention_outputs, teacher.attention_outputs, scales[1])
        total = total + weights["attention_outputs"] * error
    return total


@cache  # torch.compile needs the same function at every step
def _per_token(weights: tuple[tuple[str, float], ...], temperature: float, compiled: bool) -> Callable[..., Tensor]:
    weight = {"cross_entropy": 0.0, "kl": 0.0, "reverse_kl": 0.0, "jsd": 0.0, **dict(weights)}

    def per_token(student: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        total = torch.zeros(len(student), device=student.device)
        if weight["cross_entropy"]:
            total = total + weight["cross_entropy"] * cross_entropy(student, labels)
        if weight["kl"] and len(teacher) == 2:
            total = total + weight["kl"] * topk_kl(student, *teacher, temperature=temperature)
        elif weight["kl"]:
            total = total + weight["kl"] * forward_kl(student, teacher[0], temperature)
        if weight["reverse_kl"]:
            total = total + weight["reverse_kl"] * reverse_kl(student, teacher[0], temperature)
        if weight["jsd"]:
            total = total + weight["jsd"] * jsd(student, teacher[0], temperature)
        return total

    return torch.compile(per_token) if compiled else per_token


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(teacher || student) of every token, times temperature squared.

    Args:
        student: logits, float32 (tokens, vocabulary).
        teacher: logits, float32 (tokens, vocabulary).
        temperature: of both distributions.

    Returns:
        (tokens,) in nats. Source: Hinton et al. 2015 (arXiv 1503.02531).
    """
    return _kl(_log_softmax(teacher, temperature), _log_softmax(student, temperature)) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return KL(student || teacher) of every token, times temperature squared.

    Args:
        student: logits, float32 (tokens, vocabulary).
        teacher: logits, float32 (tokens, vocabulary).
        temperature: of both distributions.

    Returns:
        (tokens,) in nats.
    """
    return _kl(_log_softmax(student, temperature), _log_softmax(teacher, temperature)) * temperature**2


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the Jensen-Shannon divergence of every token, times temperature squared.

    Args:
        student: logits, float32 (tokens, vocabulary).
        teacher: logits, float32 (tokens, vocabulary).
        temperature: of both distributions.

    Returns:
        (tokens,) in nats; at most log 2 at temperature 1.
    """
    s, t = _log_softmax(student, temperature), _log_softmax(teacher, temperature)
    middle = torch.logaddexp(s, t) - torch.log(torch.tensor(2.0, device=s.device, dtype=s.dtype))
    return 0.5 * (_kl(s, middle) + _kl(t, middle)) * temperature**2


def topk_kl(student: Tensor, ids: Tensor, log_probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the forward KL over the teacher's k most likely tokens and one bucket for all other tokens.

    It is a lower bound of the whole KL, and equal to it where k is the size of the vocabulary.

    Args:
        student: logits (tokens, vocabulary).
        ids: the teacher's most likely tokens, (tokens, k).
        log_probabilities: the teacher's, at this temperature, (tokens, k).
        temperature: of both distributions.

    Returns:
        (tokens,) in nats.
    """
    s = _log_softmax(student, temperature)
    t = log_probabilities.to(s.dtype)
    s_topk = s.gather(-1, ids.long())
    t_other, s_other = _log_remainder(t), _log_remainder(s_topk)
    return (_kl(t, s_topk) + t_other.exp() * (t_other - s_other)) * temperature**2


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """Return -log p(label) of every token; 0 where the label is IGNORED.

    Args:
        student: logits (tokens, vocabulary).
        labels: (tokens,).
    """
    return functional.cross_entropy(student, labels, ignore_index=IGNORED, reduction="none")


def relative_squared_error(student: Sequence[Tensor], teacher: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Return the mean over layers of the squared error relative to the teacher's square.

    Args:
        student: one (batch, tokens, D) for each layer.
        teacher: one (batch, tokens, D) for each layer.
        scale: factor of the student's activations over the teacher's (an MLA student's residual stream is scaled).
    """
    errors = []
    for actual, expected in zip(student, teacher, strict=True):
        reference = expected.float()
        errors.append((actual.float() / scale - reference).square().sum() / reference.square().sum())
    return torch.stack(errors).mean()


def over_tokens(
    per_token: Callable[..., Tensor], logits: Tensor, *others: Tensor, weights: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Return the weighted sum of a loss over tokens, computed chunk by chunk.

    Args:
        per_token: (student logits in float32, *others) -> (tokens,). It gets chunks; floating `others` are
            converted to float32.
        logits: (tokens, vocabulary), in any precision; the gradient has the same.
        others: tensors with one row for each token.
        weights: (tokens,) float32, of each token in the sum.
        chunk: elements of `logits` that are in float32 at once.

    Returns:
        A scalar, float32.
    """
    apply: Callable[..., Tensor] = _OverTokens.apply
    return apply(per_token, chunk, weights, logits, *others)


class _OverTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, per_token: Callable[..., Tensor], chunk: int, weights: Tensor, logits: Tensor, *others: Tensor
    ) -> Tensor:
        needs_gradient = context.needs_input_grad[3]
        gradient = torch.empty_like(logits) if needs_gradient else None
        total = torch.zeros((), device=logits.device, dtype=torch.float32)
        num_rows = max(1, chunk // logits.shape[-1])
        for start in range(0, len(logits), num_rows):
            rows = slice(start, start + num_rows)
            with torch.enable_grad():
                student = logits[rows].detach().float().requires_grad_(needs_gradient)
                beside = [other[rows].float() if other.is_floating_point() else other[rows] for other in others]
                loss = (per_token(student, *beside) * weights[rows]).sum()
            if gradient is not None:
                gradient[rows] = torch.autograd.grad(loss, student)[0]
            total += loss.detach()
        if gradient is not None:
            context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        # In place: the gradient is as large as the logits, and nothing else uses it.
        return (None, None, None, gradient.mul_(upstream[0]), *(None for _ in context.needs_input_grad[4:]))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """Return the KL divergence of log-probabilities, (tokens, vocabulary) each."""
    return (p.exp() * (p - q)).sum(-1)


def _log_remainder(log_probabilities: Tensor) -> Tensor:
    """Return the log of 1 minus the sum of some probabilities, at least a rounding error so that it is finite."""
    remainder = -torch.expm1(torch.logsumexp(log_probabilities, -1))
    return remainder.clamp_min(torch.finfo(remainder.dtype).eps).log()
