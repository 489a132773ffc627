"""Alternating least squares for the MLA factorization: latent features and per-head readouts.

Mathematics, section 4. The expected error of an MLA layer is quadratic in the readouts for given features, and
quadratic in the features for given readouts (features.py has the expectations).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from headwise.convert.linalg import solve_from_right
from headwise.convert.mla.components import initial_features, value_cost_root
from headwise.convert.mla.features import Features, LayerStatistics, pair_map, phase_table
from headwise.models.layout import LayerWeights

# Added to the unit diagonal of every normal equation, because features may be redundant. It is the energy that
# rounding to bfloat16 adds to a feature (2^-16 / 12). With less, readouts grow until they amplify that rounding.
RIDGE = 1e-6


@dataclass(frozen=True)
class Readout:
    """How heads reconstruct the source's rows from the features, and the expected error of that.

    Attributes:
        keys: (H, key rows, features) complex: head h reconstructs its key rows as `keys[h] @ features`.
        values: (G, v_head_dim, R).
        score_errors: (H,) expected squared error of a head's scores.
        errors: expected squared error of the layer's output, caused by scores and by values.
    """

    keys: Tensor
    values: Tensor
    score_errors: Tensor
    errors: tuple[float, float]


class LatentObjective:
    """The expected error of one layer as a function of features and readouts.

    Products with inputs are taken in real rows and changed to conjugate pairs afterwards: a quarter of the work.

    Args:
        weights: the source layer, float64, with an input column for the constant.
        frequencies: (F,) radians per token of the source's rotary planes.
        statistics: of its attention inputs.
        scale: the factor on the source's scores.
    """

    def __init__(
        self, weights: LayerWeights, frequencies: Tensor, statistics: LayerStatistics, scale: float
    ) -> None:
        layout, half, device = weights.layout, weights.layout.rotary_dim // 2, weights.q.device
        self.queries_per_group = layout.queries_per_group
        self.group_of = torch.arange(layout.num_attention_heads, device=device) // layout.queries_per_group
        self.statistics, self.k, self.v = statistics, weights.k, weights.v
        free = layout.head_dim - layout.rotary_dim
        self.rotary_frequencies = torch.cat([frequencies[:half], -frequencies[:half], frequencies.new_zeros(free)])
        # Half the sum of products over pairs is the product of the real rows: hence the square root.
        self.to_pairs = pair_map(layout.rotary_dim, free, math.sqrt(2), device)
        self.query_moment = _in_pairs(weights.q @ statistics.inputs @ weights.q.mT, self.to_pairs, self.to_pairs)
        self.output = torch.einsum("hia,hib->hab", weights.o, weights.o)
        # A score error changes the output by as much as the values under attention differ from their mean.
        within = self.v @ (statistics.keys - statistics.values) @ self.v.mT
        self.spread = torch.einsum("hab,hba->h", self.output, within[self.group_of]).clamp_min(0)
        # A score is half the sum over rows and their conjugates.
        self.scale = scale / 2
        self.value_gram = self.v @ statistics.values @ self.v.mT
        self.key_gram = self._score_moment(
            self.k @ statistics.keys @ self.k.mT,
            self.k @ statistics.values @ self.k.mT,
            (self.to_pairs, self.rotary_frequencies),
            (self.to_pairs, self.rotary_frequencies),
        )

    @property
    def energies(self) -> tuple[float, float]:
        """Return the errors of a readout that reconstructs nothing, by scores and by values."""
        return self._key_error(self._score_energy(self.key_gram)), self._value_error(self.value_gram)

    def phase_kernel(self, a: Tensor, b: Tensor) -> Tensor:
        """Return the characteristic function of every head's distances at all differences of two frequency lists.

        Args:
            a: (A,) radians per token.
            b: (B,) radians per token.

        Returns:
            (H, A, B) complex: m(a - b).
        """
        (ua, ia), (ub, ib) = a.unique(return_inverse=True), b.unique(return_inverse=True)
        distances = self.statistics.distances.to(torch.complex128)
        weighted = distances[:, None] * phase_table(ua, distances.shape[1])
        return (weighted @ phase_table(ub, distances.shape[1]).mH)[:, ia][:, :, ib]

    def solve_readout(
        self, features: Features, keys: Tensor | None = None, values: Tensor | None = None
    ) -> Readout:
        """Solve for the readout of least expected error.

        Args:
            features: what is read.
            keys: the key part of a given readout; None solves for it.
            values: the value part of a given readout; None solves for it.
        """
        count, real = 2 * len(features.frequencies), features.rows
        ours = (self.to_pairs, self.rotary_frequencies)
        theirs = (features.to_pairs, features.rotary_frequencies)
        by_key, by_mean = self.statistics.keys @ real.T, self.statistics.values @ real.T
        gram = self._score_moment(real @ by_key, real @ by_mean, theirs, theirs)
        cross = self._score_moment(self.k @ by_key, self.k @ by_mean, ours, theirs)
        keys = solve_from_right(gram, cross, RIDGE) if keys is None else keys
        shared = keys @ cross.mH
        key_rest = self.key_gram - shared - shared.mH + keys @ gram @ keys.mH

        value_gram, value_cross = real[count:] @ by_mean[:, count:], self.v @ by_mean[:, count:]
        values = solve_from_right(value_gram, value_cross, RIDGE) if values is None else values
        shared = values @ value_cross.mT
        value_rest = self.value_gram - shared - shared.mT + values @ value_gram @ values.mT
        scores = self._score_energy(key_rest)
        return Readout(keys, values, scores, (self._key_error(scores), self._value_error(value_rest)))

    def solve_features(self, features: Features, readout: Readout) -> Features:
        """Solve for the features of least expected error under a given readout.

        The solution holds for every input x separately, so no moment of x enters. The logarithm of `_key_error` is
        replaced by its tangent, which lies above it: what lowers the tangent lowers the logarithm.

        Args:
            features: the present features, for their frequencies.
            readout: how heads read them.
        """
        frequencies, count = features.rotary_frequencies, len(features.frequencies)
        queries = readout.keys.mH @ self.query_moment
        weight = (self.scale**2 * self.spread / (1 + readout.score_errors))[:, None, None]
        normal = (weight * (queries @ readout.keys) * self.phase_kernel(frequencies, frequencies).conj()).sum(0)
        wanted = weight * queries * self.phase_kernel(self.rotary_frequencies, frequencies).mT
        wanted = wanted.unflatten(0, (-1, self.queries_per_group)).sum(1)
        wanted = wanted @ self.to_pairs
        parts = (wanted.real, wanted.imag)
        cross = torch.complex(*(torch.einsum("gnf,gfi->ni", part, self.k) for part in parts))
        output = self.output.unflatten(0, (-1, self.queries_per_group)).sum(1)
        normal[2 * count :, 2 * count :] += torch.einsum("gar,gab,gbs->rs", readout.values, output, readout.values)
        cross[2 * count :] += torch.einsum("gar,gab,gbi->ri", readout.values, output, self.v)
        solution = solve_from_right(normal, cross.mH, RIDGE).mH
        return Features(solution[:count], features.frequencies, solution[2 * count :].real)

    def _score_moment(
        self, by_key: Tensor, by_mean: Tensor, a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]
    ) -> Tensor:
        """Return the moments of real rows (G or none, a, b) that count for a softmax, (H, a, b) complex.

        They are taken under every head's distances, without the part that a query's mean over its keys contributes:
        that part shifts all scores of the query alike. `a` and `b` hold the pair map and the frequencies of a side.
        """
        (to_pairs_a, frequencies_a), (to_pairs_b, frequencies_b) = a, b
        total, mean = _in_pairs(by_key, to_pairs_a, to_pairs_b), _in_pairs(by_mean, to_pairs_a, to_pairs_b)
        if total.ndim == 3:
            total, mean = total[self.group_of], mean[self.group_of]
        zero = frequencies_a.new_zeros(1)
        phases = self.phase_kernel(frequencies_a, zero) @ self.phase_kernel(frequencies_b, zero).mH
        return total * self.phase_kernel(frequencies_a, frequencies_b) - mean * phases

    def _score_energy(self, gram: Tensor) -> Tensor:
        return self.scale**2 * torch.einsum("hab,hba->h", self.query_moment, gram).real.clamp_min(0)

    def _key_error(self, scores: Tensor) -> float:
        # Small errors of scores act in proportion to their square. Large ones can at most move all attention.
        return float((self.spread * scores.log1p()).sum())

    def _value_error(self, gram: Tensor) -> float:
        return float(torch.einsum("hab,hba->", self.output, gram[self.group_of]).clamp_min(0))


@dataclass(frozen=True)
class LatentProblem:
    """What a latent method is given for one layer.

    Attributes:
        weights: the source layer, float64, with an input column for the constant.
        frequencies: (F,) radians per token of its rotary planes.
        rope_frequencies: (P / 2,) radians per token of the MLA layer's rotary planes.
        rank: of the latent.
        statistics: of its attention inputs.
        objective: the expected error.
        foldings: numbers of neighbouring frequencies to try as one.
        num_iterations: alternations of least squares.
    """

    weights: LayerWeights
    frequencies: Tensor
    rope_frequencies: Tensor
    rank: int
    statistics: LayerStatistics
    objective: LatentObjective
    foldings: Sequence[int] = (1,)
    num_iterations: int = 0


@dataclass(frozen=True)
class LatentSolution:
    """What a latent method returns.

    Attributes:
        features: what the MLA layer caches.
        readout: how its heads read them.
        folding: the number of neighbouring frequencies that were taken as one.
        errors: the relative expected error after each alternation; empty for a method without alternations.
    """

    features: Features
    readout: Readout
    folding: int = 1
    errors: tuple[float, ...] = ()

    @property
    def error(self) -> float:
        """Return the expected squared error of the layer's output."""
        return sum(self.readout.errors)


LatentMethod = Callable[[LatentProblem], LatentSolution]


def alternating_least_squares(problem: LatentProblem) -> LatentSolution:
    """Solve in turn for features and readouts, from the score-weighted components of the best folding.

    Args:
        problem: one layer.
    """
    objective = problem.objective
    total = sum(objective.energies) or 1.0
    source = (problem.weights, problem.frequencies, problem.rope_frequencies, problem.rank, problem.statistics)
    root = value_cost_root(problem.weights)
    starts = [(folding, initial_features(*source, folding, root)) for folding in problem.foldings]
    folding, features = min(starts, key=lambda start: sum(objective.solve_readout(start[1]).errors))
    readout = objective.solve_readout(features)
    errors = [sum(readout.errors) / total]
    for _ in range(problem.num_iterations):
        features = objective.solve_features(features, readout)
        readout = objective.solve_readout(features)
        errors.append(sum(readout.errors) / total)
    return LatentSolution(features, readout, folding, tuple(errors))


def _in_pairs(moment: Tensor, to_pairs_a: Tensor, to_pairs_b: Tensor) -> Tensor:
    """Return a real moment as the moment of the conjugate pairs of its rows."""
    return to_pairs_a @ moment.to(torch.complex128) @ to_pairs_b.mH
