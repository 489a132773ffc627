"""The best features and the best readings of them, in turn: the error that a latent attention layer is expected
to make, and alternating least squares on it (mathematics, section 4).

Pure. Every key row of the source is a complex number that turns with its frequency: a rotary plane z with w and
its conjugate with -w, a position-free row with 0. A feature of the MLA layer is the same: a rotary key plane (and
its conjugate) or a latent. With E over keys and attention distances D taken independently,

    E[(a e^{-i w D}) conj(b e^{-i w' D})] = E[a conj(b)] m(w - w'),   m(w) = E[e^{-i w D}],

so second moments and the characteristic function m of the distances give every expectation needed. In these the
error is quadratic in the readings for given features, and quadratic in the features for given readings.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.convert.gqa.methods import solve
from headwise.models.layout import LayerWeights, planes, rows

# Added to the unit diagonal of every normal equation: features may be redundant. It is what rounding to bfloat16
# does to a feature (2^-16 / 12); with less, readings grow until that rounding is what they read.
RIDGE = 1e-6


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of a layer's attention inputs x, each with a constant 1 appended.

    - `inputs` (n, n): E[x x^T] over tokens.
    - `keys` (n, n): the same over keys, weighted by the attention they get (mean over heads).
    - `values` (n, n): E[m m^T] over queries, m the attention-weighted mean of the inputs that a head reads.
    - `distances` (H, length): attention weight by distance, rows summing to one.
    """

    inputs: Tensor
    keys: Tensor
    values: Tensor
    distances: Tensor


@dataclass(frozen=True)
class Features:
    """What is cached: `turning` (P / 2, n) complex rows with `frequencies` (P / 2,), `latent` (R, n) real rows."""

    turning: Tensor
    frequencies: Tensor
    latent: Tensor

    @property
    def rows(self) -> Tensor:
        """(P + R, n) real: real parts, imaginary parts, latents."""
        return torch.cat([rows(self.turning), self.latent])

    @property
    def pairs(self) -> Tensor:
        """(P + R, P + R) complex: what makes turning rows, their conjugates and latents of `rows`."""
        return _pairs(2 * len(self.frequencies), len(self.latent), 1.0, self.latent.device)

    @property
    def turns(self) -> Tensor:
        return torch.cat([self.frequencies, -self.frequencies, self.latent.new_zeros(len(self.latent))])


@dataclass(frozen=True)
class Readings:
    """How heads see the source's rows in the features, and what that is expected to cost.

    `keys` (H, key rows, features) complex: head h takes its key rows to be `keys[h] @ features`.
    `values` (G, v_head_dim, R). `score_errors` (H,): expected squared error of a head's scores. `errors`: that
    of the layer's output, by scores and by values.
    """

    keys: Tensor
    values: Tensor
    score_errors: Tensor
    errors: tuple[float, float]


class Layer:
    """One source layer prepared for the iteration; weights have an input column for the constant.

    Products with inputs are taken in real rows and turned into conjugate pairs afterwards: a quarter of the work.
    """

    def __init__(self, weights: LayerWeights, frequencies: Tensor, statistics: Statistics, scale: float) -> None:
        layout, half, device = weights.layout, weights.layout.rotary_dim // 2, weights.q.device
        self.queries_per_group = layout.queries_per_group
        self.group_of = torch.arange(layout.num_attention_heads, device=device) // layout.queries_per_group
        self.statistics, self.k, self.v = statistics, weights.k, weights.v
        free = layout.head_dim - layout.rotary_dim
        self.turns = torch.cat([frequencies[:half], -frequencies[:half], frequencies.new_zeros(free)])
        # Half the sum of products over pairs is the product of the real rows: hence the square root.
        self.pairs = _pairs(layout.rotary_dim, free, math.sqrt(2), device)
        self.query_moment = _paired(weights.q @ statistics.inputs @ weights.q.mT, self.pairs, self.pairs)
        self.output = torch.einsum("hia,hib->hab", weights.o, weights.o)
        # A score error moves the output by as much as the values under attention differ from their mean.
        within = self.v @ (statistics.keys - statistics.values) @ self.v.mT
        self.spread = torch.einsum("hab,hba->h", self.output, within[self.group_of]).clamp_min(0)
        # A score is half the sum over rows and their conjugates.
        self.scale = scale / 2
        self.value_gram = self.v @ statistics.values @ self.v.mT
        self.key_gram = self._seen(
            self.k @ statistics.keys @ self.k.mT,
            self.k @ statistics.values @ self.k.mT,
            (self.pairs, self.turns),
            (self.pairs, self.turns),
        )

    def kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """(H, a, b): m(a - b) of every head."""
        (ua, ia), (ub, ib) = a.unique(return_inverse=True), b.unique(return_inverse=True)
        distances = self.statistics.distances.to(torch.complex128)
        turned = distances[:, None] * turn(ua, distances.shape[1])
        return (turned @ turn(ub, distances.shape[1]).mH)[:, ia][:, :, ib]

    def _seen(self, moment: Tensor, mean: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> Tensor:
        """(H, a, b): moments of real rows (G or none, a, b) as softmax sees them.

        That is: under every head's distances, and without what a query's mean over its keys contributes, which
        shifts all its scores alike. `a` and `b` hold the pairs and the turns of either side.
        """
        (pairs_a, turns_a), (pairs_b, turns_b) = a, b
        seen, unseen = _paired(moment, pairs_a, pairs_b), _paired(mean, pairs_a, pairs_b)
        if seen.ndim == 3:
            seen, unseen = seen[self.group_of], unseen[self.group_of]
        zero = turns_a.new_zeros(1)
        means = self.kernel(turns_a, zero) @ self.kernel(turns_b, zero).mH
        return seen * self.kernel(turns_a, turns_b) - unseen * means

    def read(self, features: Features, keys: Tensor | None = None, values: Tensor | None = None) -> Readings:
        """Readings of the features (None: the best there are) with what they are expected to cost."""
        count, real = 2 * len(features.frequencies), features.rows
        ours, theirs = (self.pairs, self.turns), (features.pairs, features.turns)
        by_key, by_mean = self.statistics.keys @ real.T, self.statistics.values @ real.T
        gram = self._seen(real @ by_key, real @ by_mean, theirs, theirs)
        cross = self._seen(self.k @ by_key, self.k @ by_mean, ours, theirs)
        keys = solve_right(gram, cross) if keys is None else keys
        shared = keys @ cross.mH
        left = self.key_gram - shared - shared.mH + keys @ gram @ keys.mH

        value_gram, value_cross = real[count:] @ by_mean[:, count:], self.v @ by_mean[:, count:]
        values = solve_right(value_gram, value_cross) if values is None else values
        shared = values @ value_cross.mT
        value_left = self.value_gram - shared - shared.mT + values @ value_gram @ values.mT
        scores = self._score_energy(left)
        return Readings(keys, values, scores, (self._key_error(scores), self._value_error(value_left)))

    def _score_energy(self, gram: Tensor) -> Tensor:
        return self.scale**2 * torch.einsum("hab,hba->h", self.query_moment, gram).real.clamp_min(0)

    def _key_error(self, scores: Tensor) -> float:
        # Small errors of scores act in proportion to their square; large ones cannot do more than move
        # attention elsewhere altogether.
        return float((self.spread * scores.log1p()).sum())

    def _value_error(self, gram: Tensor) -> float:
        return float(torch.einsum("hab,hba->", self.output, gram[self.group_of]).clamp_min(0))

    @property
    def energies(self) -> tuple[float, float]:
        """What the errors of `read` would be with no features at all."""
        return self._key_error(self._score_energy(self.key_gram)), self._value_error(self.value_gram)

    def improve(self, features: Features, readings: Readings) -> Features:
        """Better features for given readings: pointwise in x, so that no moment of x enters.

        The logarithm of `_key_error` is replaced by its tangent, which lies above it: what lowers the one lowers
        the other.
        """
        turns, count = features.turns, len(features.frequencies)
        asked = readings.keys.mH @ self.query_moment
        weight = (self.scale**2 * self.spread / (1 + readings.score_errors))[:, None, None]
        normal = (weight * (asked @ readings.keys) * self.kernel(turns, turns).conj()).sum(0)
        wanted = weight * asked * self.kernel(self.turns, turns).mT
        wanted = wanted.unflatten(0, (-1, self.queries_per_group)).sum(1)
        wanted = wanted @ self.pairs
        target = torch.complex(*(torch.einsum("gnf,gfi->ni", part, self.k) for part in (wanted.real, wanted.imag)))
        output = self.output.unflatten(0, (-1, self.queries_per_group)).sum(1)
        normal[2 * count :, 2 * count :] += torch.einsum(
            "gar,gab,gbs->rs", readings.values, output, readings.values
        )
        target[2 * count :] += torch.einsum("gar,gab,gbi->ri", readings.values, output, self.v)
        best = solve_right(normal, target.mH).mH
        return Features(best[:count], features.frequencies, best[2 * count :].real)


def alternate(layer: Layer, features: Features, iterations: int) -> tuple[Features, Readings, list[float]]:
    """Alternating least squares from given features; also the relative error after each step."""
    readings = layer.read(features)
    total = sum(layer.energies) or 1.0
    errors = [sum(readings.errors) / total]
    for _ in range(iterations):
        features = layer.improve(features, readings)
        readings = layer.read(features)
        errors.append(sum(readings.errors) / total)
    return features, readings, errors


def _pairs(rotary: int, free: int, free_scale: float, device: torch.device) -> Tensor:
    """Half-split real rows -> rotary planes, their conjugates, and `free_scale` times the position-free rows."""
    eye = torch.eye(rotary // 2, dtype=torch.complex128, device=device)
    turning = torch.cat([torch.cat([eye, 1j * eye], 1), torch.cat([eye, -1j * eye], 1)])
    return torch.block_diag(turning, free_scale * torch.eye(free, dtype=torch.complex128, device=device))


def _paired(moment: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return a @ moment.to(torch.complex128) @ b.mH


def conjugate_pairs(rows: Tensor, rotary_dim: int) -> Tensor:
    """Real rows (heads, head_dim, n) as rotary planes, their conjugates, and position-free rows times sqrt(2)."""
    turning = planes(rows, rotary_dim)
    free = math.sqrt(2) * rows[:, rotary_dim:].to(torch.complex128)
    return torch.cat([turning, turning.conj(), free], dim=1)


def turn(frequencies: Tensor, length: int) -> Tensor:
    """(frequencies, length): e^{-i w D} for every distance D."""
    distances = torch.arange(length, dtype=torch.float64, device=frequencies.device)
    return torch.exp(-1j * frequencies[:, None] * distances)


def solve_right(gram: Tensor, cross: Tensor) -> Tensor:
    """X with `X @ gram ~ cross`, gram Hermitian and positive semidefinite, perhaps singular."""
    size = gram.diagonal(dim1=-2, dim2=-1).real.clamp_min(1e-200).sqrt()
    scaled = gram / size[..., :, None] / size[..., None, :]
    scaled = scaled + RIDGE * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    right = (cross / size[..., None, :]).mH
    return solve(lambda left: torch.linalg.solve(left, right), scaled).mH / size[..., None, :]
