"""Linear maps in place of norms on queries and keys."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from headwise.convert.calibration.norm_stats import CrossMoment, NormedProjections
from headwise.convert.mla import stand_in
from headwise.convert.mla.stand_in import linear_stand_in, unit_scale
from headwise.models.layout import LayerWeights
from tests.convert.mla.samples import random_source, rotate

EPS = 1e-6
SCOPES = ("head", "all")


def normed_source(scope: str, *, bias: bool = False) -> tuple[LayerWeights, Tensor]:
    weights, frequencies = random_source(6, 3, 10, 28, bias=bias)
    generator = torch.Generator().manual_seed(5)
    q_norm, k_norm = (torch.rand(n, 10, generator=generator, dtype=torch.float64) + 0.5 for n in (6, 3))
    if scope == "head":
        q_norm, k_norm = q_norm[:1].expand(6, -1), k_norm[:1].expand(3, -1)
    return replace(weights, q_norm=q_norm, k_norm=k_norm, norm_scope=scope), frequencies


def inputs_of(hidden: int, tokens: int = 700) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64).exp() - 1.2
    return torch.cat([x, torch.ones(tokens, 1, dtype=torch.float64)], 1)


def measured(weights: LayerWeights, x: Tensor, attention: Tensor) -> dict[str, Any]:
    projections = NormedProjections(weights, EPS)
    queries, keys = CrossMoment(), CrossMoment()
    for part in range(0, len(x), 300):
        rows, weight = x[part : part + 300], attention[part : part + 300]
        queries.add(rows, projections.queries(rows))
        keys.add(rows, projections.keys(rows), weight)
    query_cross, query_scales = queries.result()
    key_cross, key_scales = keys.result()
    return {
        "moment": x.T @ x / len(x),
        "key_moment": (x.T * attention) @ x / attention.sum(),
        "query_cross": query_cross,
        "key_cross": key_cross,
        "query_scales": query_scales,
        "key_scales": key_scales,
    }


def attend(weights: LayerWeights, q: Tensor, k: Tensor, x: Tensor, frequencies: Tensor) -> Tensor:
    """Causal attention from queries and keys (heads, tokens, head_dim) before RoPE."""
    r = weights.layout.queries_per_group
    v = torch.einsum("gdi,ti->gtd", weights.v, x[:, : weights.v.shape[2]]).repeat_interleave(r, 0)
    scores = rotate(q, frequencies) @ rotate(k, frequencies).mT.repeat_interleave(r, 0) / math.sqrt(q.shape[2])
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    return torch.einsum("htd,hod->to", scores.masked_fill(future, -torch.inf).softmax(-1) @ v, weights.o)


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_constant_scale_leaves_nothing_out(scope: str, bias: bool) -> None:
    """With orthogonal rows, and inputs of one length in their span, the norm divides by one number."""
    weights, _ = normed_source(scope, bias=bias)
    hidden = weights.hidden_size
    x = torch.randn(700, hidden, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x[:, 10:] = 0
    x = torch.cat([x / x.norm(dim=1, keepdim=True), torch.ones(700, 1, dtype=torch.float64)], 1)
    basis = torch.linalg.qr(torch.randn(10, 10, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]

    def orthogonal(rows: Tensor) -> Tensor:
        new = torch.zeros_like(rows)
        new[:, :, :10] = basis * torch.linspace(0.5, 2, len(rows), dtype=torch.float64)[:, None, None]
        return new

    weights = replace(weights, q=orthogonal(weights.q), k=orthogonal(weights.k))
    linear, report = linear_stand_in(weights, **measured(weights, x, torch.rand(700, dtype=torch.float64)))
    assert linear.q_norm is linear.k_norm is linear.norm_scope is None
    assert max(report.query_scale_variance, report.key_scale_variance) < 1e-9
    assert max(report.query_residual, report.key_residual) < 1e-9
    projections = NormedProjections(weights, EPS)
    for rows, (_, normed) in ((linear.q, projections.queries(x)), (linear.k, projections.keys(x))):
        torch.testing.assert_close(torch.einsum("hdi,ti->thd", rows, x[:, : rows.shape[2]]), normed)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_regression_is_nearer_than_the_mean_scale(scope: str) -> None:
    weights, frequencies = normed_source(scope)
    x = inputs_of(weights.hidden_size)
    figures = measured(weights, x, torch.linspace(0.1, 2, len(x), dtype=torch.float64))
    mean, worse = linear_stand_in(weights, **figures, regress=False)
    best, report = linear_stand_in(weights, **figures)
    assert report.key_residual < worse.key_residual and report.query_residual < worse.query_residual
    assert report.key_scale_variance == worse.key_scale_variance > 0.01
    projections, window = NormedProjections(weights, EPS), x[:90]
    normed = (projections.queries(window)[1].transpose(0, 1), projections.keys(window)[1].transpose(0, 1))
    want = attend(weights, *normed, window, frequencies)

    def error(linear: LayerWeights) -> float:
        rows = [torch.einsum("hdi,ti->htd", w, window[:, :-1]) for w in (linear.q, linear.k)]
        return float((attend(weights, rows[0], rows[1], window, frequencies) - want).square().sum())

    assert error(best) < 0.9 * error(mean)


def test_the_mean_scale_decides_where_there_is_little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many tokens as inputs, a regression without a prior fits them and no others."""
    weights, _ = normed_source("head")
    x = inputs_of(weights.hidden_size)
    figures = measured(weights, x[:30], torch.ones(30, dtype=torch.float64))
    keys = NormedProjections(weights, EPS).keys(x)[1]

    def lost(prior: float) -> float:
        monkeypatch.setattr(stand_in, "PRIOR", prior)
        linear = linear_stand_in(weights, **figures)[0]
        return float((torch.einsum("gdi,ti->tgd", linear.k, x[:, :-1]) - keys).square().mean())

    assert lost(stand_in.PRIOR) < 0.5 * lost(1e-9)


@pytest.mark.parametrize("scope", SCOPES)
def test_the_scale_of_unit_inputs(scope: str) -> None:
    weights, _ = normed_source(scope)
    folded = unit_scale(weights)
    assert weights.k_norm is not None and folded.k_norm is None
    energy = (folded.k / weights.k_norm[..., None]).square().sum(-1)
    torch.testing.assert_close((energy.mean(-1) if scope == "head" else energy.mean()).flatten()[0].item(), 1.0)
    plain = random_source(6, 3, 10, 28)[0]
    assert torch.equal(unit_scale(plain).q, plain.q)
