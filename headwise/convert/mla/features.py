"""Features of an MLA layer and what calibration measured of its source: mathematics, section 4.

Every key row of the source is a complex number that rotates with its frequency: a rotary plane z with w and its
conjugate with -w, a position-free row with 0. A feature of the MLA layer is the same: a rotary key plane (and its
conjugate) or a latent. With E over keys and attention distances D taken independently,

    E[(a e^{-i w D}) conj(b e^{-i w' D})] = E[a conj(b)] m(w - w'),   m(w) = E[e^{-i w D}],

so second moments and the characteristic function m of the distances give every expectation needed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from headwise.models.layout import LayerWeights, from_planes, to_planes

# Without calibration: the longest attention distance, with a weight of 1 / (1 + distance).
DEFAULT_LENGTH = 1024
# Without calibration: the number of independent tokens that a query averages.
DEFAULT_TOKENS_READ = 2


@dataclass(frozen=True)
class LayerStatistics:
    """What calibration measured of a layer's attention inputs x, each with a constant 1 appended.

    Attributes:
        inputs: (n, n) E[x x^T] over tokens.
        keys: (n, n) the same over keys, weighted by the attention they get (mean over heads).
        values: (n, n) E[m m^T] over queries, m the attention-weighted mean of a head's inputs.
        distances: (H, length) attention weight by distance, rows summing to one.
    """

    inputs: Tensor
    keys: Tensor
    values: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Features:
    """What an MLA layer caches.

    Attributes:
        rotary_rows: (P / 2, n) complex: the rotary key, one row per plane.
        frequencies: (P / 2,) radians per token of its planes.
        latent: (R, n) real: the latent.
    """

    rotary_rows: Tensor
    frequencies: Tensor
    latent: Tensor

    @property
    def rows(self) -> Tensor:
        """Return real parts, imaginary parts and latents, (P + R, n) real."""
        return torch.cat([from_planes(self.rotary_rows), self.latent])

    @property
    def to_pairs(self) -> Tensor:
        """Return the map from `rows` to rotary rows, their conjugates and latents, (P + R, P + R) complex."""
        return pair_map(2 * len(self.frequencies), len(self.latent), 1.0, self.latent.device)

    @property
    def rotary_frequencies(self) -> Tensor:
        """Return the frequencies of rotary rows, of their conjugates and of latents (0), (P + R,)."""
        return torch.cat([self.frequencies, -self.frequencies, self.latent.new_zeros(len(self.latent))])


def layer_statistics(
    weights: LayerWeights,
    moment: Tensor | None = None,
    key_moment: Tensor | None = None,
    value_moment: Tensor | None = None,
    distances: Tensor | None = None,
) -> LayerStatistics:
    """Return what was measured of a layer, with a neutral choice for what was not.

    Args:
        weights: the source layer, for its shapes and its device.
        moment: (D + 1, D + 1) E[x x^T]; None: the identity.
        key_moment: the same weighted by attention; None: `moment`.
        value_moment: of attention-weighted means; None: of the mean of `DEFAULT_TOKENS_READ` independent tokens.
        distances: (H, length) attention weight by distance; None: 1 / (1 + distance).
    """
    device = weights.q.device
    inputs = (torch.eye(weights.hidden_size + 1, device=device) if moment is None else moment).double()
    if distances is None:
        decay = 1 / torch.arange(1, DEFAULT_LENGTH + 1, device=device).double()
        distances = (decay / decay.sum()).expand(weights.layout.num_attention_heads, -1)
    keys = inputs if key_moment is None else key_moment.double()
    # The variance of the mean of k independent tokens is 1 / k of theirs.
    constant = torch.outer(keys[-1], keys[-1])
    default = constant + (keys - constant) / DEFAULT_TOKENS_READ
    values = default if value_moment is None else value_moment.double()
    return LayerStatistics(inputs, keys, values, distances.double())


def with_constant(weights: LayerWeights) -> LayerWeights:
    """Return a layer without biases as one whose biases are zero: one more input column.

    Args:
        weights: the source layer.
    """

    def pad(tensor: Tensor) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, 1))

    return replace(weights, q=pad(weights.q), k=pad(weights.k), v=pad(weights.v))


def phase_table(frequencies: Tensor, length: int) -> Tensor:
    """Return e^{-i w D} for every frequency w and every distance D below `length`.

    Args:
        frequencies: (F,) radians per token.
        length: the number of distances.

    Returns:
        (F, length) complex.
    """
    distances = torch.arange(length, dtype=torch.float64, device=frequencies.device)
    return torch.exp(-1j * frequencies[:, None] * distances)


def mean_phase(distances: Tensor, frequencies: Tensor) -> Tensor:
    """Return m(w) = E[e^{-i w D}], the characteristic function of the distances.

    Args:
        distances: (length,) the weight of every distance, summing to one.
        frequencies: (F,) radians per token.

    Returns:
        (F,) complex.
    """
    return phase_table(frequencies, len(distances)) @ distances.to(torch.complex128)


def conjugate_pairs(stack: Tensor, rotary_dim: int) -> Tensor:
    """Return real rows as rotary planes, their conjugates, and position-free rows times sqrt(2).

    Half the sum of products over these is the product of the real rows: hence the square root.

    Args:
        stack: (heads, head_dim, n) real.
        rotary_dim: the number of leading rows that are rotary.

    Returns:
        (heads, head_dim, n) complex.
    """
    rotary = to_planes(stack, rotary_dim)
    free = math.sqrt(2) * stack[:, rotary_dim:].to(torch.complex128)
    return torch.cat([rotary, rotary.conj(), free], dim=1)


def pair_map(rotary_dim: int, num_free: int, free_scale: float, device: torch.device) -> Tensor:
    """Return the matrix that maps half-split real rows to rotary planes, their conjugates and position-free rows.

    Args:
        rotary_dim: the number of rotary rows.
        num_free: the number of position-free rows.
        free_scale: the factor on position-free rows.
        device: of the result.

    Returns:
        (rotary_dim + num_free, rotary_dim + num_free) complex.
    """
    eye = torch.eye(rotary_dim // 2, dtype=torch.complex128, device=device)
    rotary = torch.cat([torch.cat([eye, 1j * eye], 1), torch.cat([eye, -1j * eye], 1)])
    free = free_scale * torch.eye(num_free, dtype=torch.complex128, device=device)
    whole: Tensor = torch.block_diag(rotary, free)
    return whole
