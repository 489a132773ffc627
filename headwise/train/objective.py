"""A recipe's loss as a whole: the weighted sum of its terms, over what student and teacher say of a batch."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from headwise.recipes.settings import Loss
from headwise.train import losses
from headwise.train.teacher import ANSWERS, Said


def total_loss(
    loss: Loss,
    ours: Said,
    labels: Tensor,
    theirs: Said | None = None,
    answers: dict[str, Tensor] | None = None,
    scales: tuple[float, float] = (1.0, 1.0),
    *,
    compiled: bool = False,
) -> Tensor:
    """The weighted sum of a recipe's losses.

    Args:
        labels: (batch, tokens); a token that is not to be predicted has -100, and so the divergences leave it out.
        theirs: what the teacher says. answers: its most likely tokens (batch, tokens, k) instead.
        scales: see `trainer.Task`.
    """
    following = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), losses.IGNORED)], 1).flatten()
    counted = (following != losses.IGNORED).float()
    others = [following]
    if answers:
        others += [answers[name].flatten(0, 1) for name in ANSWERS]
    elif theirs is not None:
        others.append(theirs.logits.flatten(0, 1))
    logits = ours.logits.flatten(0, 1)
    per_token = _per_token(loss, compiled)
    whole = losses.over_tokens(per_token, logits, *others, weights=counted / counted.sum().clamp_min(1))
    if theirs is not None and loss.hidden_states:
        error = losses.relative_error(ours.hidden_states, theirs.hidden_states, scales[0])
        whole = whole + loss.hidden_states * error
    if theirs is not None and loss.attention_outputs:
        error = losses.relative_error(ours.attention_outputs, theirs.attention_outputs, scales[1])
        whole = whole + loss.attention_outputs * error
    return whole


@cache  # what is compiled must be the same function at every step
def _per_token(loss: Loss, compiled: bool) -> Callable[..., Tensor]:
    def per_token(student: Tensor, labels: Tensor, *teacher: Tensor) -> Tensor:
        found = torch.zeros(len(student), device=student.device)
        if loss.cross_entropy:
            found = found + loss.cross_entropy * losses.cross_entropy(student, labels)
        if loss.kl and len(teacher) == 2:
            found = found + loss.kl * losses.topk_kl(student, *teacher, temperature=loss.temperature)
        elif loss.kl:
            found = found + loss.kl * losses.forward_kl(student, teacher[0], loss.temperature)
        if loss.reverse_kl:
            found = found + loss.reverse_kl * losses.reverse_kl(student, teacher[0], loss.temperature)
        if loss.jsd:
            found = found + loss.jsd * losses.jsd(student, teacher[0], loss.temperature)
        return found

    return torch.compile(per_token) if compiled else per_token
