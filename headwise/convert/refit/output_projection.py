"""Solve for the output matrices of a converted layer by ridge regression on its parent's output.

A closed form (mathematics, section 4c): the error of the layer's output is regressed on the inputs of its output
projection. The projection's weight is the mean of a prior that counts as much as `PRIOR` tokens per input.
Cross-validation decides whether the new matrices are used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import TOKENS_AT_ONCE, LayerRecord
from headwise.convert.linalg import solve_positive
from headwise.convert.refit.regression import apply_attention, padded, split_sequences
from headwise.train.optimizer import TINY

# The weight of the present output matrices in tokens per input, and the folds of the cross-validation
# (docs/decisions/0013).
PRIOR = 8
FOLDS = 8


@dataclass(frozen=True)
class OutputReport:
    """Relative squared error of a layer's output.

    Attributes:
        before: the error of the closed form.
        after: the cross-validated error with new output matrices.
        kept: whether the new matrices are used; False where they are not better.
    """

    before: float
    after: float
    kept: bool


@torch.no_grad()
def solve_output_projection(
    attention: nn.Module,
    projection: Any,
    record: LayerRecord,
    *,
    spare: bool = False,
    device: torch.device | str = "cpu",
) -> OutputReport:
    """Replace the output matrices of a converted layer in place, if cross-validation finds the new ones better.

    Each fold of neighbouring sequences is measured with the solution of the other folds; the matrices in use come
    from all of them.

    Args:
        attention: the target's stock attention module, float32 on `device`; MLA without its latent norm.
        projection: its last step, `output = projection(heads)`; a linear layer, whose bias stays.
        record: the parent layer's inputs and outputs, from `LayerStream.records(keep_activations=True)`.
        spare: leave out the sequences that the regression is measured on, because one follows.
        device: where `attention` is.

    Returns:
        The errors before and after.

    Raises:
        ValueError: the record holds no inputs and outputs, or fewer than two sequences.
    """
    inputs, outputs, train, heldout = split_sequences(record, device)
    used = train if spare else torch.cat([train, heldout])
    folds = used.tensor_split(min(FOLDS, len(used)))
    length = inputs.shape[1]
    tokens = len(used) * length
    heads: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda module, given: heads.append(given[0]))
    grams, crosses, errors, total = [], [], [], 0.0
    for fold in folds:
        gram = cross = torch.zeros((), device=device)
        error = energy = torch.zeros((), dtype=torch.float64, device=device)
        for batch in fold.split(max(1, TOKENS_AT_ONCE // length)):
            wanted = outputs[batch].to(device)
            missing = (wanted - apply_attention(attention, record, inputs[batch].to(device), batch)).flatten(0, -2)
            rows = [padded(each, length) for each in heads] if record.calls else heads
            features = torch.cat([each.flatten(0, -2) for each in rows])
            heads.clear()
            if record.roots is not None:
                features = features * record.roots[batch.cpu()].to(device).flatten()[:, None]
            gram, cross = gram + features.mT @ features, cross + features.mT @ missing
            error, energy = error + missing.square().sum(), energy + wanted.square().sum()
        grams.append(gram)
        crosses.append(cross)
        errors.append(float(error))
        total += float(energy)
    hook.remove()
    gram, cross = sum(grams[1:], grams[0]), sum(crosses[1:], crosses[0])

    def change(fold: int) -> float:
        """Return the change of a fold's squared error by the solution of the others."""
        known = tokens - len(folds[fold]) * length
        step = _output_step(gram - grams[fold], cross - crosses[fold], known)
        return float((step * (grams[fold] @ step - 2 * crosses[fold])).sum())

    before = sum(errors)
    after = before + sum(change(fold) for fold in range(len(folds)))
    kept = after < before  # False for NaN
    if kept:
        step = _output_step(gram, cross, tokens)
        projection.weight += step if _transposed(projection) else step.mT
    return OutputReport(before / total if total else 0.0, after / total if total else 0.0, kept)


def _output_step(gram: Tensor, cross: Tensor, tokens: int) -> Tensor:
    """Return the ridge solution; its condition number is at most `tokens / PRIOR`, fit for float32."""
    prior = PRIOR * float(gram.diagonal().sum()) / max(tokens, 1)
    system = gram + torch.eye(len(gram), device=gram.device) * max(prior, TINY)
    return solve_positive(system, cross)


def _transposed(projection: Any) -> bool:
    """Return whether the weight has the shape (inputs, outputs), as in transformers' Conv1D (GPT-2)."""
    return not isinstance(projection, nn.Linear)
