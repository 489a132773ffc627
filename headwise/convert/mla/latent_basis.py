"""The basis of the latent in which rounding costs least: mathematics, section 4f.

The elements of a latent may be any invertible linear map of it: the down-projection takes the map, and the
up-projections its inverse. The linear norm between them commutes with both. A cache in bfloat16 or FP8 rounds each
element by a fraction of its size, so the basis decides what that costs at the output.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from headwise.models.layout import LatentWeights

# Inputs that the calibration text lacks still count, by this fraction of the mean energy of an input.
RIDGE = 1e-4
# Eigenvalues below this fraction of the largest are rounding errors of float64.
ZERO = 1e-13
# A direction of the latent that contributes less than this fraction of the largest is treated as if it did.
LEAST_SHARE = 1e-6


def balanced_basis(latent: LatentWeights, moment: Tensor | None = None) -> LatentWeights:
    """Return the same layer with the basis of its latent in which relative rounding errors cost least.

    In coordinates where the latent is white and its contributions `mu` are uncorrelated, the expected cost is least
    for the elements `flat_rotation @ diag(mu^(1/4))`: all elements then have equal size and equal weight.

    Args:
        latent: the layer, float64.
        moment: (inputs, inputs) second moment of the inputs; None: inputs are uncorrelated and of unit size.

    Returns:
        The layer with new `kv_down`, `k_up` and `v_up`.
    """
    inputs = latent.kv_down.shape[1]
    eye = torch.eye(inputs, dtype=latent.kv_down.dtype, device=latent.kv_down.device)
    moment = eye if moment is None else moment.to(eye) + RIDGE * moment.diagonal().mean().to(eye) * eye
    energy, vectors = torch.linalg.eigh(latent.kv_down @ moment @ latent.kv_down.T)
    present = energy > ZERO * energy[-1]
    if not present.any():
        return latent
    size, vectors = energy[present].sqrt(), vectors[:, present]
    share, directions = torch.linalg.eigh((vectors * size).T @ rounding_cost(latent, moment) @ (vectors * size))
    fourth_root = share.clamp(min=LEAST_SHARE * float(share[-1])).pow(0.25)
    rotation = flat_rotation(len(energy)).to(eye)[:, : len(share)]
    into = rotation @ ((directions * fourth_root).T / size) @ vectors.T
    back = (vectors * size) @ (directions / fourth_root) @ rotation.T
    return replace(latent, kv_down=into @ latent.kv_down, k_up=latent.k_up @ back, v_up=latent.v_up @ back)


def unit_rotary_key(latent: LatentWeights, moment: Tensor | None = None) -> LatentWeights:
    """Return the same layer with planes of the rotary key of about unit size, each by a power of two.

    An FP8 cache with one scale holds numbers up to 448. The planes of a model differ by factors of a hundred.

    Args:
        latent: the layer.
        moment: as of `balanced_basis`.
    """
    rows = latent.k_rope
    energy = ((rows if moment is None else rows @ moment.to(rows)) * rows).sum(1).view(2, -1).mean(0)
    exponent = torch.where(energy > 0, energy, 1.0).log2().div(2).round().repeat(2)
    factor = torch.exp2(exponent)[:, None]
    return replace(latent, k_rope=rows / factor, q_rope=latent.q_rope * factor)


def rounding_cost(latent: LatentWeights, moment: Tensor) -> Tensor:
    """Return the quadratic form (rank, rank) that gives the squared output error of an error of one latent.

    An error `n` changes the scores of head h by `scale q^T k_up n`, which moves attention between values of the
    energy `V_h`, and the values by `v_up n`. Both reach the output through `o`. The squared attention weight of the
    token is a common factor, and left out.

    Args:
        latent: the layer.
        moment: (inputs, inputs) second moment of the inputs.
    """
    read = latent.o @ latent.v_up
    content = latent.kv_down @ moment @ latent.kv_down.T
    energies = torch.einsum("hdr,rs,hds->h", read, content, read)
    queries = latent.q_nope @ moment @ latent.q_nope.mT
    keys = latent.k_up.mT @ queries @ latent.k_up * (latent.scale**2 * energies)[:, None, None]
    return (read.mT @ read + keys).sum(0)


def flat_rotation(order: int) -> Tensor:
    """Return an orthogonal matrix of elements of nearly equal size.

    It is the Kronecker product of a Hadamard matrix and a Hartley matrix (cosine plus sine) of an odd order.

    Args:
        order: number of rows, float64.
    """
    odd = order
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    while odd % 2 == 0:
        odd //= 2
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    angle = torch.arange(odd, dtype=torch.float64) * (2 * math.pi / odd)
    angle = torch.outer(angle, torch.arange(odd, dtype=torch.float64))
    # Columns vary in the odd factor first, so neighbours in a sorted spectrum go to different rows of it.
    return torch.kron(hadamard, angle.cos() + angle.sin()) / math.sqrt(order)
