"""A latent of lower rank with its norm, and a narrower rotary key: exact where the layer has no more in it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from headwise.convert.from_mla.reduction import LatentStatistics, reduce_latent
from headwise.models.layout import AttentionLayout, NormedLatent

HEADS, NOPE, ROPE, VALUE, RANK, WIDTH, THETA = 3, 6, 8, 5, 10, 16, 100.0


def random_layer(seed: int = 0) -> NormedLatent:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return NormedLatent(
        layout=AttentionLayout(HEADS, HEADS, NOPE + ROPE, VALUE, ROPE, None, RANK, ROPE),
        kv_down=random(RANK, WIDTH),
        norm=1 + 0.3 * random(RANK),
        k_rope=random(ROPE, WIDTH),
        k_up=random(HEADS, NOPE, RANK),
        v_up=random(HEADS, VALUE, RANK),
        q_nope=random(HEADS, NOPE, WIDTH),
        q_rope=random(HEADS, ROPE, WIDTH),
        o=random(HEADS, WIDTH, VALUE),
    )


def inputs(seed: int = 1, count: int = 400) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.linspace(0.2, 2, WIDTH, dtype=torch.float64)
    return torch.randn(count, WIDTH, generator=generator, dtype=torch.float64) * sizes


def statistics(weights: NormedLatent, x: Tensor) -> LatentStatistics:
    latent, keys = weights.normed(x @ weights.kv_down.T), x @ weights.k_rope.T
    queries = torch.cat([weights.q_nope, weights.q_rope], 1)
    return LatentStatistics(
        latent.mean(0),
        latent.T.cov(correction=0),
        queries @ (x.T @ x / len(x)) @ queries.mT,
        keys.T @ keys / len(x),
    )


def rotated(rows: Tensor, distance: int) -> Tensor:
    """Rows (tokens, P), half-split, turned by a distance."""
    half = rows.shape[-1] // 2
    turns = distance * THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = rows[..., :half], rows[..., half:]
    return torch.cat([a * turns.cos() - b * turns.sin(), b * turns.cos() + a * turns.sin()], -1)


def function(weights: NormedLatent, x: Tensor, distance: int = 5) -> tuple[Tensor, Tensor]:
    """The scores of all tokens on all tokens at one distance, and what each head makes of a value."""
    latent = weights.normed(x @ weights.kv_down.T) * weights.norm
    scores = torch.einsum("hni,ti,hnr,sr->hts", weights.q_nope, x, weights.k_up, latent)
    turned, keys = rotated(torch.einsum("hpi,ti->htp", weights.q_rope, x), distance), x @ weights.k_rope.T
    scores = (scores + turned @ keys.T) / weights.layout.head_dim**0.5
    return scores, torch.einsum("hdv,hvr,tr->htd", weights.o, weights.v_up, latent)


def reduced(weights: NormedLatent, rank: int, rope_dim: int = ROPE) -> tuple[NormedLatent, float]:
    new, report = reduce_latent(
        weights, statistics(weights, inputs()), rank, rope_dim, scale=(NOPE + ROPE) ** -0.5, theta=THETA
    )
    return new, report.key_error + report.value_error


def test_a_latent_that_fills_fewer_dimensions_is_reduced_exactly() -> None:
    layer = random_layer()
    within = torch.linalg.qr(random_layer(3).kv_down[:, :6])[0]
    layer = replace(layer, kv_down=within @ layer.kv_down[:6])
    new, error = reduced(layer, 6)
    assert error < 1e-12 and new.kv_down.shape == (6, WIDTH) and new.layout.kv_lora_rank == 6
    x = inputs(7)
    for before, after in zip(function(layer, x), function(new, x), strict=True):
        assert (after - before).norm() < 1e-6 * before.norm()


def test_the_reduction_is_better_than_dropping_elements_and_improves_with_the_rank() -> None:
    layer, x = random_layer(), inputs(7)
    values = function(layer, x)[1]
    errors = []
    for rank in (4, 6, 8):
        after = function(reduced(layer, rank)[0], x)[1]
        errors.append(float((after - values).norm() / values.norm()))
        kept = layer.norm.clone()
        kept[rank:] = 0
        dropped = function(replace(layer, norm=kept), x)[1]
        assert errors[-1] < 0.8 * float((dropped - values).norm() / values.norm())
    assert errors == sorted(errors, reverse=True)


def test_the_expected_error_is_that_of_the_values() -> None:
    """Without queries there are no scores, and the rest is what is lost of the values under attention."""
    layer = random_layer()
    layer = replace(layer, q_nope=0 * layer.q_nope, q_rope=0 * layer.q_rope)
    errors = [reduced(layer, rank)[1] for rank in (2, 5, 9, 10)]
    assert errors == sorted(errors, reverse=True) and errors[0] < 1 and errors[-1] == 0


def test_planes_without_scores_are_left_out_exactly() -> None:
    layer = random_layer()
    k_rope = layer.k_rope.clone()
    k_rope[[1, 3, 5, 7]] = 0  # planes 1 and 3; planes 0 and 2 have the frequencies of the narrower key
    layer = replace(layer, k_rope=k_rope)
    new, error = reduced(layer, RANK, 4)
    assert error < 1e-12 and new.layout.head_dim == NOPE + 4 and new.layout.rotary_dim == 4
    for before, after in zip(function(layer, inputs(7)), function(new, inputs(7)), strict=True):
        assert (after - before).norm() < 1e-6 * before.norm()


def test_neighbouring_planes_share_one() -> None:
    layer, x = random_layer(), inputs(7)
    new, error = reduced(layer, RANK, 4)
    assert 0.05 < error < 1
    before, after = (function(each, x, 0)[0] for each in (layer, new))
    dropped = layer.k_rope.clone()
    dropped[[1, 3, 5, 7]] = 0
    assert (after - before).norm() < (function(replace(layer, k_rope=dropped), x, 0)[0] - before).norm()


@pytest.mark.parametrize("level", [1.0, 3e-6])
def test_a_linear_norm_stays_linear(level: float) -> None:
    """Where epsilon outweighs the mean square, as headwise writes MLA, the reduced latent is linear too."""
    layer = random_layer()
    layer = replace(layer, kv_down=layer.kv_down * level, norm=torch.full_like(layer.norm, 1e-3 / level))
    new, _ = reduced(layer, 6)
    x = inputs(7)
    one, two = (function(new, scale * x)[1] for scale in (1.0, 2.0))
    linear = float((two - 2 * one).norm() / one.norm())
    assert (linear < 0.01) == (level < 1)
