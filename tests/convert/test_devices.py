"""Closed forms on another device: they create nothing elsewhere, and find what they find on the CPU."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from headwise.convert.calibration.calibrate import Calibration
from headwise.convert.gqa import merge as heads
from headwise.convert.gqa import methods
from headwise.convert.layers import place
from headwise.convert.mla import components, latent
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.factored import evaluate
from headwise.demo.demo import MODEL
from headwise.models.layout import LayerWeights
from tests.reference import attend, frequencies, random_layer

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

SHAPES = [  # heads, key-value heads, head_dim, rotary_dim, hidden size, bias
    (9, 9, 64, 32, 40, True),  # so many rows of keys and values that their low rank is found by iteration
    (14, 2, 8, 8, 36, False),
    (14, 14, 8, 4, 44, True),
]
MLA = [
    *((shape, method) for shape in SHAPES for method in latent.METHODS),
    ((9, 3, 8, 0, 40, False), "optimal"),
]
MERGES = [*methods.METHODS, *heads.POOLS]
NORMS = [None, "head", "all"]


def made(shape: tuple[int, int, int, int, int, bool], **more: Any) -> LayerWeights:
    num_heads, groups, head_dim, rotary, hidden, bias = shape
    return random_layer(num_heads, groups, head_dim, hidden, rotary_dim=rotary, bias=bias, **more)


def tokens(weights: LayerWeights, count: int = 200, seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(count, weights.hidden_size, generator=g).double() * torch.linspace(
        2, 0.2, weights.hidden_size
    )


def moments(weights: LayerWeights) -> dict[str, Tensor]:
    """What calibration would know: tokens, those attended to, and means of two; distances of every head."""
    x = torch.nn.functional.pad(tokens(weights), (0, 1), value=1.0)
    attended, read = x[::2], (x[::2] + x[1::2]) / 2
    found = {"moment": x, "key_moment": attended, "value_moment": read}
    weight = torch.rand(weights.layout.num_attention_heads, 32, generator=torch.Generator().manual_seed(2)).double()
    return {n: y.T @ y / len(y) for n, y in found.items()} | {"distances": weight / weight.sum(1, keepdim=True)}


def asked(weights: LayerWeights, method: str, measured: bool) -> dict[str, Any]:
    """What `latent.convert` is given besides a layer."""
    layout, own = weights.layout, frequencies(weights.layout.rotary_dim)
    grid = own[:1].repeat(layout.num_key_value_heads) if method == "partial-rope" else frequencies(8)
    known = moments(weights) if measured else {}
    return {"frequencies": own, "rope_frequencies": grid, "rank": 12, "scale": 0.3, "method": method, **known}


def merging(weights: LayerWeights, measured: bool) -> dict[str, Tensor]:
    inputs = weights.q.shape[2]
    names = ("moment", "value_moment") if measured else ()
    return {n: moments(weights)[n][:inputs, :inputs] for n in names}


def on(device: str, given: dict[str, Any]) -> dict[str, Any]:
    return {n: v.to(device) if isinstance(v, Tensor) else v for n, v in given.items()}


def apart(ours: Any, theirs: Any, weights: LayerWeights) -> float:
    """How much two conversions of a layer differ in what they compute, whatever their gauge."""
    x = tokens(weights, 24, seed=3)
    if isinstance(ours, LayerWeights):
        a, b = (attend(made, x, frequencies(weights.layout.rotary_dim)) for made in (ours, theirs))
    else:
        a, b = (evaluate(made, x[None]) for made in (ours, theirs))
    return float((a - b).norm() / b.norm())


# A tensor created without a device is then on "meta" and holds nothing: it fails, or makes another result, wherever
# it meets one that does.
nowhere = torch.device("meta")


@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize(("shape", "method"), MLA, ids=str)
def test_mla_creates_nothing_on_another_device(shape: Any, method: str, measured: bool) -> None:
    weights = made(shape)
    given = asked(weights, method, measured)
    wanted, expected = latent.convert(weights, **given)
    with nowhere:
        got, report = latent.convert(weights, **given)
    assert apart(got, wanted, weights) < 1e-9
    assert report.key_error == pytest.approx(expected.key_error)


@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", MERGES)
def test_merging_creates_nothing_on_another_device(method: str, norm: str | None, measured: bool) -> None:
    weights = made((8, 8, 8, 4, 36, norm is None), norm_scope=norm)
    given = merging(weights, measured)
    wanted, _ = heads.merge(weights, 2, method=method, **given)
    with nowhere:
        got, _ = heads.merge(weights, 2, method=method, **given)
    assert apart(got, wanted, weights) < 1e-9


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_neither_do_the_lift_and_the_choice_of_frequencies(shape: Any) -> None:
    weights = made(shape)
    own, groups = frequencies(weights.layout.rotary_dim), weights.layout.num_key_value_heads
    whole = weights if weights.has_bias else latent.with_constant(weights)
    with nowhere:
        lifted = latent.lift(weights, own, scale=0.3)
        known = latent.statistics(whole)
        components.free_frequencies(own, components.rotary_gains(whole, own, known), 8).tolist()
        norms = components.plane_norms(whole, known)
        for choice in ("high", "low", "uniform", "norm"):
            components.partial_frequencies(own, groups, 2 * groups, choice, norms).tolist()
    assert apart(lifted, latent.lift(weights, own, scale=0.3), weights) == 0


@pytest.mark.parametrize(
    ("device", "measured", "calibrated", "exact", "wanted"),
    [
        ("cuda:1", True, True, False, "cuda:1"),
        ("cuda:1", False, True, False, "cuda:1"),
        ("cuda:1", False, True, True, "cpu"),
        ("cuda:1", False, False, False, "cpu"),
        ("mps", False, True, False, "cpu"),  # has no float64
    ],
)
def test_where_layers_are_converted(
    device: str, measured: bool, calibrated: bool, exact: bool, wanted: str
) -> None:
    target: Any = SimpleNamespace(calibrated=calibrated, exact=exact)
    calibration = Calibration("builtin", 2, 32, 0, 0) if measured else None
    assert place(target, calibration, torch.device(device)) == torch.device(wanted)


# Rounding differs, and alternating carries it on.
SAME = 1e-5


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize(("shape", "method"), MLA, ids=str)
def test_mla_is_the_same_on_a_gpu(shape: Any, method: str, measured: bool) -> None:
    weights = made(shape)
    given = asked(weights, method, measured)
    wanted, expected = latent.convert(weights, **given)
    got, report = latent.convert(weights.to_device("cuda"), **on("cuda", given))
    assert {t.device.type for t in vars(got).values() if isinstance(t, Tensor)} == {"cuda"}
    assert apart(got.to_device("cpu"), wanted, weights) < SAME
    assert (report.key_error, report.value_error) == pytest.approx((expected.key_error, expected.value_error))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("measured", [False, True], ids=["blind", "measured"])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", MERGES)
def test_merging_is_the_same_on_a_gpu(method: str, norm: str | None, measured: bool) -> None:
    weights = made((8, 8, 8, 4, 36, norm is None), norm_scope=norm)
    given = merging(weights, measured)
    wanted, _ = heads.merge(weights, 2, method=method, **given)
    got, _ = heads.merge(weights.to_device("cuda"), 2, method=method, **on("cuda", given))
    assert got.k.device.type == "cuda"
    assert apart(got.to_device("cpu"), wanted, weights) < SAME


def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 131)[None] % model.config.vocab_size).logits


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("to", [{"to": "mla", "rank": 48, "rope_dim": 16}, {"to": "gqa", "groups": 1}], ids=str)
def test_the_demo_model_becomes_the_same_on_a_gpu(to: dict[str, Any], tmp_path: Path) -> None:
    """Without text, from text to fitted output matrices and a refit, and by moments that the CPU took."""
    text = {"calibration_tokens": 8192, "refit": "off"}
    ways: dict[str, tuple[dict[str, Any], float]] = {
        "blind": ({"calibrate": "none"}, 1e-5),
        "text": (text, 1e-3),
        "refit": ({**text, "refit": 3}, 5e-2),  # where a gradient is next to nothing, rounding turns Adam's step
        "moments": ({"moments": tmp_path / "moments", "refit": "off"}, 1e-5),
    }
    convert_model(
        MODEL, tmp_path / "taken", **to, **text, save_moments=tmp_path / "moments", device="cpu", verify=False
    )
    for way, (options, close) in ways.items():
        for device in ("cpu", "cuda"):
            out = tmp_path / f"{way}-{device}"
            convert_model(MODEL, out, **to, **options, dtype="float32", device=device, verify=False)
        ours, theirs = (logits(tmp_path / f"{way}-{device}") for device in ("cuda", "cpu"))
        assert float((ours - theirs).norm() / theirs.norm()) < close, way
