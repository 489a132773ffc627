"""The MLA conversion as mathematics: laws that hold for random layers, in float64, with no model around them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from headwise.convert.mla import components, latent
from headwise.models import deepseek
from headwise.models.layout import AttentionLayout, LayerWeights, planes, rows

THETA = 100.0


def make(heads, groups, head_dim, hidden, *, rotary=None, bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rotary = head_dim if rotary is None else rotary
    inputs = hidden + bias

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * hidden**-0.5

    layout = AttentionLayout(heads, groups, head_dim, head_dim, rotary)
    weights = LayerWeights(
        layout,
        2 * random(heads, head_dim, inputs),
        2 * random(groups, head_dim, inputs),
        random(groups, head_dim, inputs),
        random(heads, hidden, head_dim),
    )
    return weights, deepseek.default_grid(THETA, rotary) if rotary else torch.ones(4, dtype=torch.float64)


def moment(hidden, seed=1):
    """E[x x^T] with correlated inputs, a mean, and the constant 1."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, hidden, generator=generator, dtype=torch.float64) * torch.linspace(2, 0.1, hidden) + 0.2
    x = torch.cat([x, torch.ones(400, 1, dtype=torch.float64)], 1)
    return x.T @ x / 400


def rotate(vectors, frequencies):
    """(..., tokens, 2F) half-split vectors turned by their position."""
    angles = torch.arange(vectors.shape[-2], dtype=torch.float64)[:, None] * frequencies
    turned = torch.complex(*vectors.chunk(2, -1)) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], -1)


def attend(scores, values, o):
    length = scores.shape[-1]
    mask = torch.ones(length, length, dtype=torch.bool).triu(1)
    return torch.einsum("hij,hjv,hDv->iD", scores.masked_fill(mask, -torch.inf).softmax(-1), values, o)


def run_source(weights, frequencies, x, scale):
    layout, r = weights.layout, weights.layout.rotary_dim
    q, k, v = (torch.einsum("hdi,ti->htd", w, x) for w in (weights.q, weights.k, weights.v))
    if r:
        q = torch.cat([rotate(q[..., :r], frequencies), q[..., r:]], -1)
        k = torch.cat([rotate(k[..., :r], frequencies), k[..., r:]], -1)
    k, v = (t.repeat_interleave(layout.queries_per_group, 0) for t in (k, v))
    return attend(scale * q @ k.mT, v, weights.o)


def run_latent(layer, x):
    c = x @ layer.kv_down.T
    rotary = rotate(torch.einsum("hdi,ti->htd", layer.q_rope, x), layer.frequencies)
    key = rotate(x @ layer.k_rope.T, layer.frequencies)
    nope = torch.einsum("hdi,ti->htd", layer.q_nope, x) @ (layer.k_up @ c.T)
    return attend(layer.scale * (nope + rotary @ key.T), c @ layer.v_up.mT, layer.o)


def tokens(hidden, bias, length=12, seed=2):
    x = torch.randn(length, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.cat([x, torch.ones(length, 1, dtype=torch.float64)], 1) if bias else x


SHAPES = [
    (4, 4, 8, None),
    (9, 3, 8, None),
    (14, 2, 4, None),
    (28, 4, 4, None),
    (6, 1, 8, None),
    (4, 2, 8, 4),
    (4, 2, 8, 0),
]


@pytest.mark.parametrize(("heads", "groups", "head_dim", "rotary"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_lift_is_exact_and_its_cache_does_not_grow(heads, groups, head_dim, rotary, bias):
    weights, frequencies = make(heads, groups, head_dim, 24, rotary=rotary, bias=bias)
    x, scale = tokens(24, bias), 0.4
    lifted = latent.lift(weights, frequencies, scale=scale)
    torch.testing.assert_close(
        run_latent(lifted, x), run_source(weights, frequencies, x, scale), rtol=1e-11, atol=1e-12
    )
    assert lifted.layout.cache_elements_per_token == weights.layout.cache_elements_per_token


def test_lift_into_a_larger_shape_is_exact_and_into_a_smaller_one_refused():
    weights, frequencies = make(4, 2, 8, 24, rotary=0)
    x = tokens(24, False)
    lifted = latent.lift(weights, frequencies, scale=0.4, rank=40, rope_dim=16)
    torch.testing.assert_close(run_latent(lifted, x), run_source(weights, frequencies, x, 0.4))
    with pytest.raises(ValueError, match="needs 32"):
        latent.lift(weights, frequencies, scale=0.4, rank=31)


def optimal(weights, frequencies, rank, rope, **options):
    rope = deepseek.default_grid(THETA, rope) if isinstance(rope, int) else rope
    options = {"moment": moment(weights.hidden_size), "scale": weights.layout.head_dim**-0.5, **options}
    return latent.convert(weights, frequencies, rank=rank, rope_frequencies=rope, **options)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("heads", "groups", "rotary"), [(4, 4, 8), (6, 2, 8), (4, 2, 4), (4, 2, 0)])
def test_with_every_frequency_and_full_rank_nothing_is_lost(heads, groups, rotary, bias):
    weights, frequencies = make(heads, groups, 8, 40, rotary=rotary, bias=bias)
    rank, rope = latent.lift_shape(weights.layout)
    every = frequencies.repeat_interleave(groups) if rope else deepseek.default_grid(THETA, 8)
    got, report = optimal(weights, frequencies, rank, every, foldings=(1,), iterations=3)
    x = tokens(40, bias)
    wanted = run_source(weights, frequencies, x, got.scale)
    assert report.key_error + report.value_error < 1e-9
    # What keeps redundant features from being read by their rounding costs so much; `lift` is exact.
    torch.testing.assert_close(run_latent(got, x), wanted, rtol=1e-3, atol=1e-4)


def test_a_gauge_of_the_source_changes_nothing():
    """Section 1: M on values, a complex scalar per plane and head on keys, with the inverses on the other side."""
    weights, frequencies = make(6, 2, 8, 24)
    generator = torch.Generator().manual_seed(5)
    m = torch.randn(2, 8, 8, generator=generator, dtype=torch.float64) + 3 * torch.eye(8, dtype=torch.float64)
    c = torch.randn(2, 4, 1, 2, generator=generator, dtype=torch.float64)
    c = torch.view_as_complex(c) + 1
    of = torch.arange(6) // 3
    turned = replace(
        weights,
        k=rows(c * planes(weights.k, 8)),
        q=rows(planes(weights.q, 8) / c.conj()[of]),
        v=m @ weights.v,
        o=weights.o @ torch.linalg.inv(m)[of],
    )
    x = tokens(24, False)
    torch.testing.assert_close(run_source(turned, frequencies, x, 0.4), run_source(weights, frequencies, x, 0.4))
    plain, report = optimal(weights, frequencies, 16, 8, iterations=2)
    other, turned_report = optimal(turned, frequencies, 16, 8, iterations=2)
    torch.testing.assert_close(run_latent(other, x), run_latent(plain, x), rtol=1e-5, atol=1e-6)
    assert turned_report.errors == pytest.approx(report.errors, rel=1e-6)


def test_every_alternation_lowers_the_expected_error_and_so_does_every_rank():
    weights, frequencies = make(8, 4, 8, 32)
    ends = []
    for rank in (4, 12, 24, 32):
        _, report = optimal(weights, frequencies, rank, 8, iterations=4)
        assert all(
            later <= sooner * (1 + 1e-9) for sooner, later in zip(report.errors, report.errors[1:], strict=False)
        )
        assert report.errors[-1] < report.errors[0]
        ends.append(report.errors[-1])
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize(("rank", "head_dim"), [(192, 64), (448, 128)])
def test_ranks_that_are_no_powers_of_two(rank, head_dim):
    weights, frequencies = make(4, 4, head_dim, 4 * head_dim)
    got, report = optimal(weights, frequencies, rank, 32, iterations=0, foldings=(2,))
    assert got.kv_down.shape == (rank, 4 * head_dim)
    assert 0 <= report.value_error < 1 and 0 < report.key_error < 1


def test_optimal_expects_less_damage_than_the_baselines():
    weights, frequencies = make(8, 4, 8, 32)
    _, best = optimal(weights, frequencies, 24, 8)
    _, transmla = optimal(weights, frequencies, 24, 8, method="transmla")
    norms = torch.ones(4)
    kept = components.partial_frequencies(frequencies, 4, 8, "high", norms)
    _, partial = optimal(weights, frequencies, 24, kept, method="partial-rope")
    ours = best.key_error + best.value_error
    assert ours < 0.8 * (transmla.key_error + transmla.value_error)
    assert ours < 0.8 * (partial.key_error + partial.value_error)


@pytest.mark.parametrize("method", ["transmla", "partial-rope"])
def test_baselines_that_drop_nothing_are_exact(method):
    """One KV head, all its frequencies, full rank: both published methods are then mere changes of basis."""
    weights, frequencies = make(3, 1, 8, 24)
    got, report = optimal(weights, frequencies, 8, frequencies, method=method, foldings=(1,))
    x = tokens(24, False)
    torch.testing.assert_close(run_latent(got, x), run_source(weights, frequencies, x, got.scale))
    assert report.key_error + report.value_error < 1e-12


def test_expected_error_is_the_error_of_random_keys_at_random_distances():
    """The characteristic function against a Monte Carlo of what it stands for."""
    weights, _ = make(2, 1, 8, 12)
    distances = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64).expand(2, -1)
    known = latent.statistics(latent.with_constant(weights), moment(12), distances=distances)
    frequency = torch.tensor([0.3, 1.7], dtype=torch.float64)
    m = components.mean_phase(distances[0], frequency)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(distances[0], 200_000, replacement=True, generator=generator)
    torch.testing.assert_close(m, torch.exp(-1j * frequency[:, None] * drawn).mean(1), rtol=0.02, atol=0.01)
    assert known.distances.sum(1).tolist() == pytest.approx([1, 1])


def test_free_frequencies_follow_the_largest_losses():
    frequencies = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    gains = torch.tensor([[5.0, 4.0], [9.0, 0.1], [0.2, 0.0]])
    assert components.free_frequencies(frequencies, gains, 6).tolist() == [1.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("choice", "kept"), [("high", [0, 1]), ("low", [2, 3]), ("uniform", [0, 2]), ("norm", [1, 3])]
)
def test_partial_frequencies(choice, kept):
    frequencies = deepseek.default_grid(THETA, 8)
    norms = torch.tensor([1.0, 5.0, 2.0, 3.0])
    got = components.partial_frequencies(frequencies, 3, 12, choice, norms)
    assert got.tolist() == frequencies[kept].repeat_interleave(3).tolist()
    with pytest.raises(ValueError, match="multiple of 6"):
        components.partial_frequencies(frequencies, 3, 8, choice, norms)
