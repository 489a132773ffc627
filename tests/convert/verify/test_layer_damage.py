"""The estimated damage of a layer against the KL divergence that its error causes."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel

from headwise.convert.inspect import inspect_model
from headwise.convert.pipeline import convert_model
from headwise.convert.verify import layer_damage
from headwise.convert.verify.layer_damage import LayerDamage, RecomputedAttention
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.models.stock import load_model
from headwise.progress import SILENT
from tests.convert.speaking import save_speaking

CPU = torch.device("cpu")


def estimate(child: Checkpoint, parent: Checkpoint, tokens: torch.Tensor) -> list[float]:
    """Estimate the damage of every layer in this process."""
    work = LayerDamage(child, parent, tokens.tolist())
    return work.total(work.results(range(len(tokens)), CPU, SILENT))


@pytest.mark.parametrize("settings", [{"to": "mha"}, {"to": "mla", "exact": True, "dtype": "float32"}])
def test_an_exact_conversion_damages_no_layer(tmp_path: Path, settings: dict[str, str]) -> None:
    parent = save_speaking(tmp_path / "parent")
    convert_model(parent, tmp_path / "out", **settings)
    tokens = torch.arange(24).view(2, 12)
    found = estimate(open_checkpoint(tmp_path / "out"), open_checkpoint(parent), tokens)
    assert len(found) == 2
    assert max(found) < 1e-9


def test_the_damage_of_the_last_layer_is_its_divergence(tmp_path: Path) -> None:
    """An error in the last layer reaches no other token, so the estimate has no missing terms."""
    parent = open_checkpoint(save_speaking(tmp_path / "parent"))
    convert_model(parent.path, tmp_path / "out", to="mha")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    weight = tensors["model.layers.1.self_attn.o_proj.weight"]
    weight += 0.05 * weight.std() * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    save_file(tensors, file, metadata={"format": "pt"})
    child = open_checkpoint(tmp_path / "out")
    tokens = torch.randint(250, (96, 16), generator=torch.Generator().manual_seed(2))

    found = estimate(child, parent, tokens)

    before, after = (
        load_model(each, "AutoModelForCausalLM", torch.float32)(tokens).logits.log_softmax(-1).detach()
        for each in (parent, child)
    )
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert found[0] == 0.0
    assert found[1] == pytest.approx(divergence, rel=0.25)
    assert estimate(child, parent, tokens) == found


def test_sequences_may_be_estimated_apart_and_in_any_order(tmp_path: Path) -> None:
    parent = save_speaking(tmp_path / "parent")
    convert_model(parent, tmp_path / "out", to="gqa", groups=2, method="mean", calibrate="none", verify=False)
    tokens = torch.arange(60).view(5, 12).tolist()
    work = LayerDamage(open_checkpoint(tmp_path / "out"), open_checkpoint(parent), tokens)
    together = work.total(work.results(range(5), CPU, SILENT))
    apart = [next(work.results([sequence], CPU, SILENT)) for sequence in (3, 0, 4, 2, 1)]
    assert work.total(apart) == together and all(nats > 0 for nats in together)
    assert list(work.results([], CPU, SILENT)) == []


def test_a_conversion_records_the_damage_and_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("headwise.convert.calibration.corpus.LOSS_SECONDS", 60.0)
    parent = save_speaking(tmp_path / "parent", num_key_value_heads=4)
    done = convert_model(
        parent, tmp_path / "out", to="mqa", calibrate="builtin", calibration_tokens=256, refit="off"
    )
    damage = [done.layers[layer]["damage"] for layer in range(2)]
    assert all(0 < nats < 1 for nats in damage)
    assert inspect_model(tmp_path / "out").damage == tuple(damage)
    assert "Estimated damage of each layer alone" in (tmp_path / "out" / "README.md").read_text()
    assert inspect_model(parent).damage == ()


def test_recomputed_attention_gives_the_same_gradient_and_keeps_no_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(3, 1, 2, 40, 8, generator=generator).requires_grad_()
    found = []
    for way in (nullcontext(), RecomputedAttention()):
        kept: list[int] = []
        noted = saved_tensors_hooks(lambda x, kept=kept: (kept.append(x.numel()), x)[1], lambda x: x)
        with sdpa_kernel(SDPBackend.MATH):
            with way, noted:
                output = torch.nn.functional.scaled_dot_product_attention(*given, is_causal=True)
            (gradient,) = torch.autograd.grad(output.square().sum(), given)
        found.append((output, gradient, max(kept, default=0)))
    (plain, expected, most), (output, gradient, least) = found
    assert torch.equal(output, plain) and torch.equal(gradient, expected)
    assert most >= 2 * 40 * 40 > given[0].numel() >= least


def test_the_damage_on_a_gpu_is_that_of_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the attention that a GPU computes, of a model whose weights are stored in two dtypes and in one."""
    parent = open_checkpoint(save_speaking(tmp_path / "parent", torch.bfloat16))
    convert_model(parent.path, tmp_path / "out", to="gqa", groups=2, method="mean", calibrate="none", verify=False)
    file, tokens = tmp_path / "out" / "model.safetensors", torch.arange(60).view(5, 12)
    wanted = estimate(open_checkpoint(tmp_path / "out"), parent, tokens)
    monkeypatch.setattr(layer_damage, "_sparing_attention", lambda _: RecomputedAttention())
    monkeypatch.setattr(layer_damage, "_arithmetic", lambda _: sdpa_kernel(SDPBackend.MATH))
    assert estimate(open_checkpoint(tmp_path / "out"), parent, tokens) == pytest.approx(wanted, rel=1e-4)
    tensors = load_file(file)
    tensors["model.layers.0.self_attn.o_proj.weight"] = tensors["model.layers.0.self_attn.o_proj.weight"].float()
    save_file(tensors, file, metadata={"format": "pt"})
    assert estimate(open_checkpoint(tmp_path / "out"), parent, tokens) == pytest.approx(wanted, rel=1e-4)


def test_the_arithmetic_of_a_gpu_ends_with_the_damage() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(ZeroDivisionError), layer_damage._arithmetic(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high" and not torch.backends.cuda.flash_sdp_enabled()
        raise ZeroDivisionError
    assert torch.get_float32_matmul_precision() == before and torch.backends.cuda.flash_sdp_enabled()
