"""What training minimises. Pure: torch tensors in, one number out.

Losses on tokens are formed in pieces: each piece is brought to float32, its loss and its gradient are worked out
and only the gradient is kept, in the precision of the logits. So two models' logits never exist in float32 whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

# Numbers of a piece of logits: 128 MiB in float32.
PIECE = 1 << 25
IGNORED = -100


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(teacher || student) of every token, times temperature squared (Hinton et al. 2015).

    Args:
        student, teacher: logits, float32 (tokens, vocabulary).
    """
    return _kl(_log(teacher, temperature), _log(student, temperature)) * temperature**2


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(student || teacher) of every token, times temperature squared."""
    return _kl(_log(student, temperature), _log(teacher, temperature)) * temperature**2


def jsd(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Jensen-Shannon divergence of every token, times temperature squared: at most log 2 at temperature 1."""
    s, t = _log(student, temperature), _log(teacher, temperature)
    middle = torch.logaddexp(s, t) - torch.log(torch.tensor(2.0, device=s.device, dtype=s.dtype))
    return 0.5 * (_kl(s, middle) + _kl(t, middle)) * temperature**2


def topk_kl(student: Tensor, ids: Tensor, log_probabilities: Tensor, temperature: float = 1.0) -> Tensor:
    """Forward KL over the teacher's k most likely tokens and one bucket for all the others.

    A lower bound of the whole KL, and equal to it where k is the vocabulary.

    Args:
        student: logits (tokens, vocabulary).
        ids, log_probabilities: (tokens, k) of the teacher, at this temperature.
    """
    s = _log(student, temperature)
    t = log_probabilities.to(s.dtype)
    named = s.gather(-1, ids.long())
    rest_t, rest_s = _rest(t), _rest(named)
    return (_kl(t, named) + rest_t.exp() * (rest_t - rest_s)) * temperature**2


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log p(label) of every token; 0 where the label is ignored."""
    return functional.cross_entropy(student, labels, ignore_index=IGNORED, reduction="none")


def relative_error(student: Sequence[Tensor], teacher: Sequence[Tensor], scale: float = 1.0) -> Tensor:
    """Mean over layers of the squared error as a share of the teacher's square.

    Args:
        student, teacher: one (batch, tokens, D) each per layer.
        scale: what the student's are multiples of the teacher's by (an MLA student's residual stream is scaled).
    """
    errors = []
    for ours, theirs in zip(student, teacher, strict=True):
        wanted = theirs.float()
        errors.append((ours.float() / scale - wanted).square().sum() / wanted.square().sum())
    return torch.stack(errors).mean()


def over_tokens(
    per_token: Callable[..., Tensor], logits: Tensor, *others: Tensor, weights: Tensor, piece: int = PIECE
) -> Tensor:
    """The weighted sum of a loss over tokens, formed piece by piece.

    Args:
        per_token: (student logits float32, *others) -> (tokens,); pieces of `others` arrive as they are, but for
            floating ones, which arrive in float32.
        logits: (tokens, vocabulary), in any precision; the gradient has the same.
        weights: (tokens,) float32, of each token in the sum.
    """
    return _OverTokens.apply(per_token, piece, weights, logits, *others)


class _OverTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, per_token: Callable[..., Tensor], piece: int, weights: Tensor, logits: Tensor, *others: Tensor
    ) -> Tensor:
        wanted = context.needs_input_grad[3]
        gradient = torch.empty_like(logits) if wanted else None
        total = torch.zeros((), device=logits.device, dtype=torch.float32)
        rows = max(1, piece // logits.shape[-1])
        for start in range(0, len(logits), rows):
            here = slice(start, start + rows)
            with torch.enable_grad():
                student = logits[here].detach().float().requires_grad_(wanted)
                beside = [other[here].float() if other.is_floating_point() else other[here] for other in others]
                loss = (per_token(student, *beside) * weights[here]).sum()
            if gradient is not None:
                gradient[here] = torch.autograd.grad(loss, student)[0]
            total += loss.detach()
        if gradient is not None:
            context.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(context: Any, *given: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = context.saved_tensors
        # In place: it is as large as the logits, and nobody else reads it.
        return (None, None, None, gradient.mul_(given[0]), *(None for _ in context.needs_input_grad[4:]))


def _log(logits: Tensor, temperature: float) -> Tensor:
    return functional.log_softmax(logits if temperature == 1 else logits / temperature, dim=-1)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL of log-probabilities (tokens, vocabulary)."""
    return (p.exp() * (p - q)).sum(-1)


def _rest(log_probabilities: Tensor) -> Tensor:
    """Log of what some probabilities leave of 1; at least a rounding error, so that it is finite."""
    left = -torch.expm1(torch.logsumexp(log_probabilities, -1))
    return left.clamp_min(torch.finfo(left.dtype).eps).log()
