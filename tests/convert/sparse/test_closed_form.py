"""The directions of the latent that an index key keeps: no other ones have a smaller error of the scores."""

from __future__ import annotations

from itertools import pairwise

import torch

from headwise.convert.mla.exact import exact_mla
from headwise.convert.sparse.closed_form import constant_direction, initial_indexer
from headwise.models.deepseek import default_grid
from headwise.models.layout import IndexerShape
from tests.convert.mla.samples import THETA, random_source

HIDDEN = 24


def test_the_constant_is_regressed() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 7, generator=generator, dtype=torch.float64) + 2
    one = torch.cat([x, torch.ones(500, 1, dtype=torch.float64)], 1)
    direction = constant_direction(one.T @ one / 500)
    expected = torch.linalg.lstsq(x, torch.ones(500, 1, dtype=torch.float64)).solution[:, 0]
    assert torch.allclose(direction, expected, rtol=1e-2) and float((x @ direction).mean()) > 0.9


def test_the_kept_directions_lose_least_of_the_scores() -> None:
    weights, _ = random_source(4, 2, 6, HIDDEN, rotary=2)
    latent = exact_mla(weights, default_grid(THETA, 2), scale=6**-0.5)
    factor = torch.randn(HIDDEN + 1, HIDDEN + 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    moment = factor @ factor.T
    rope = latent.k_rope.shape[0]

    def errors(width: int) -> torch.Tensor:
        """Expected squared errors of the position-free scores, summed over heads."""
        shape = IndexerShape(3, 4, rope + 1 + width)
        indexer = initial_indexer(latent, shape, moment, partition=torch.zeros(4).double(), offset=1.0, size=1.0)
        own = moment[:-1, :-1]
        exact = latent.scale * torch.einsum("hni,hnr,rj->hij", latent.q_nope, latent.k_up, latent.kv_down)
        kept = torch.einsum("hei,ej->hij", indexer.queries[:, rope:-1], indexer.keys[rope:-1])
        missing = exact - kept
        return torch.einsum("hij,jk,hlk,li->", missing, own, missing, own)

    # The latent has 2 KV heads of 4 position-free key rows.
    values = [float(errors(width)) for width in range(10)]
    assert all(a >= b - 1e-9 * values[0] for a, b in pairwise(values))
    assert values[8] < 1e-12 * values[0] < values[7]
    # The optimum of rank 3 by the singular values of all heads' scores on whitened inputs.
    root = torch.linalg.cholesky(moment[:-1, :-1])
    scores = torch.einsum("hni,hnr,rj->hij", latent.q_nope, latent.k_up, latent.kv_down)
    stacked = latent.scale * (root.T @ scores @ root).flatten(0, 1)
    best = torch.linalg.svdvals(stacked)[3:].square().sum()
    assert values[3] / float(best) - 1 < 1e-4
