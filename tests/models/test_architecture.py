"""Every row of architectures.yaml against the stock class: round trip, gauge law, exact lift, windows, shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from headwise.errors import HeadwiseError
from headwise.models import architecture, table
from headwise.models.architecture import Architecture
from headwise.models.layout import LayerWeights, from_planes, to_planes
from tests import tiny_models

ROWS = sorted(tiny_models.CONFIGS)
ALL = sorted([*ROWS, *tiny_models.OTHERS])
Tensors = dict[str, torch.Tensor]


def random_gauge(weights: LayerWeights, seed: int) -> LayerWeights:
    """The layer in other coordinates that compute the same (mathematics, section 1).

    Values get any invertible matrix per key-value head. Keys get a complex scalar per plane, and position-free
    keys any invertible matrix; under norms with equal weights only the rotations among them; under other norms
    only signs.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    layout = weights.layout
    groups, turning = layout.num_key_value_heads, layout.rotary_dim
    still = layout.head_dim - turning
    group = torch.arange(layout.num_attention_heads) // layout.queries_per_group

    mix = noise(groups, layout.v_head_dim, layout.v_head_dim) + 2 * torch.eye(layout.v_head_dim)
    if weights.gate is not None:  # it multiplies every element by a factor of its own
        mix = torch.diag_embed(mix.diagonal(dim1=1, dim2=2))
    v, o = mix @ weights.v, weights.o @ torch.linalg.inv(mix)[group]

    free = noise(groups, still, still) + 2 * torch.eye(still)
    angles, sizes = noise(groups, turning // 2), 0.5 + noise(groups, turning // 2).abs()
    norms = [n for n in (weights.q_norm, weights.k_norm) if n is not None]
    if norms:
        sizes = torch.ones_like(sizes)
        free = torch.linalg.qr(free).Q
    if any(n.unique().numel() > 1 for n in norms):
        angles = torch.pi * (angles > 0).double()
        free = torch.diag_embed(noise(groups, still).sign())
    scalar = torch.polar(sizes, angles)[..., None]
    k = torch.cat([from_planes(scalar * to_planes(weights.k, turning)), free @ weights.k[:, turning:]], dim=1)
    q_turning = from_planes(to_planes(weights.q, turning) / scalar.conj()[group])
    q_still = torch.linalg.inv(free).mT[group] @ weights.q[:, turning:]
    return replace(weights, q=torch.cat([q_turning, q_still], dim=1), k=k, v=v, o=o)


def attending(arch: Architecture, config: dict) -> list[int]:
    """The layers with attention: all but those of a hybrid model that are linear."""
    return [layer for layer, layout in enumerate(arch.layouts(config)) if layout.attends]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), tiny_models.float64_throughout():
        return model(**tiny_models.inputs_of(model)).logits


def distance(after: torch.Tensor, before: torch.Tensor) -> float:
    return float((after - before).abs().max() / before.abs().max())


def module_names(arch: Architecture, tensors: Tensors, state: Tensors) -> Tensors:
    """Checkpoint tensors under the names of the stock modules, whose shapes are in `state`."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        part = next(
            part
            for part in arch.parts or (arch,)
            if name.startswith(part.layers[0].split("{")[0]) and f".{part.attention}." in name
        )
        start, module = (path.split("{")[0] for path in (part.layers[0], part.module))
        number, attention, own = name.removeprefix(start).split(".", 2)
        layer = f"{module}{number}.{part.stock_names(attention)[0]}."
        places = [layer + place for place in part.stock_names(own)]
        found |= zip(places, tensor.split([len(state[place]) for place in places]), strict=True)
    return found


def double_model(model_type: str, flat_norms: bool = False):
    """A float64 model, its config, row and checkpoint tensors."""
    model, config = tiny_models.build(model_type)
    arch = architecture.find_architecture(config)
    if flat_norms:
        for name, parameter in model.named_parameters():
            if any(part in name for part in (f".{arch.norms.q}.", f".{arch.norms.k}.")):
                torch.nn.init.constant_(parameter, 0.75)
    model.double()
    return model, config, arch, tiny_models.checkpoint(model)


def rewrite(model, config, arch: Architecture, tensors: Tensors, change) -> None:
    """Change every layer and put it back into the stock model."""
    for layer in attending(arch, config):
        weights = change(layer, arch.read_layer(config, layer, tensors))
        written = module_names(arch, arch.write_layer(config, layer, weights, torch.float64), model.state_dict())
        assert not model.load_state_dict(written, strict=False).unexpected_keys


def test_every_row_has_a_tiny_model_and_every_tiny_model_a_row():
    proven = set()
    for model_type in ALL:
        arch = architecture.find_architecture({"model_type": model_type, **tiny_models.config_of(model_type)})
        proven |= {arch.wrapper} if arch.parts else {arch.model_type, arch.wrapper} - {None}
    assert proven | set(tiny_models.LATENTS) == set(table.supported_model_types())


def has_fixed_groups(model_type: str) -> bool:
    return bool(architecture.find_architecture(tiny_models.config_of(model_type)).fixed_groups)


@pytest.mark.parametrize("model_type", ALL)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reading_and_writing_a_layer_changes_no_bit(model_type, dtype, tmp_path):
    tiny_models.save(model_type, tmp_path, dtype)
    tensors = load_file(tmp_path / "model.safetensors")
    config = tiny_models.read_config(tmp_path)
    arch = architecture.find_architecture(config, tensors)
    for layer in attending(arch, config):
        back = arch.write_layer(config, layer, arch.read_layer(config, layer, tensors), dtype)
        assert set(back) == set(arch.tensor_names(config, layer))
        for name, tensor in back.items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, tensors[name]), name


@pytest.mark.parametrize("model_type", ALL)
def test_a_random_gauge_moves_no_logit(model_type):
    model, config, arch, tensors = double_model(model_type)
    before = logits(model)
    rewrite(model, config, arch, tensors, lambda layer, weights: random_gauge(weights, seed=layer))
    assert 0 < distance(logits(model), before) <= 1e-10


NORMED = [m for m in ROWS if architecture.find_architecture(tiny_models.config_of(m)).norms]


@pytest.mark.parametrize("model_type", NORMED)
def test_a_norm_multiplies_by_what_was_read(model_type):
    model, config, arch, tensors = double_model(model_type)
    first = attending(arch, config)[0]
    weights = arch.read_layer(config, first, tensors)
    attention = model.get_submodule(f"{arch.module.format(layer=first)}.{arch.attention}")
    for name, multiplier in ((arch.norms.q, weights.q_norm), (arch.norms.k, weights.k_norm)):
        # Large, so that the norm's epsilon is nothing beside it.
        rows_in = 1e6 * torch.randn(multiplier.shape, dtype=torch.float64)
        seen = rows_in if weights.norm_scope == "head" else rows_in.flatten()
        with torch.no_grad(), tiny_models.float64_throughout():
            out = attention.get_submodule(name)(seen).view_as(rows_in)
        size = seen.pow(2).mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(out, rows_in / size * multiplier, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("model_type", NORMED)
def test_norms_with_equal_weights_leave_rotations_free(model_type):
    model, config, arch, tensors = double_model(model_type, flat_norms=True)
    before = logits(model)
    rewrite(model, config, arch, tensors, lambda layer, weights: random_gauge(weights, seed=layer))
    assert 0 < distance(logits(model), before) <= 1e-10


@pytest.mark.parametrize("model_type", ALL)
def test_rotary_dimensions_are_no_freer_than_the_row_says(model_type):
    """Mixing a layer's planes as if it had no RoPE moves the logits, in every layer that is said to have it."""
    has_norms = bool(architecture.find_architecture(tiny_models.config_of(model_type)).norms)
    model, config, arch, tensors = double_model(model_type, flat_norms=has_norms)
    before = logits(model)
    turning = [layer for layer, layout in enumerate(arch.layouts(config)) if layout.rotary_dim]
    assert turning or model_type in ("canary", "moonshine_streaming")  # their positions are learned or relative
    for only in turning:

        def free(layer: int, weights: LayerWeights, only: int = only) -> LayerWeights:
            if layer != only:
                return weights
            freed = replace(weights, layout=replace(weights.layout, rotary_dim=0))
            return replace(random_gauge(freed, seed=layer), layout=weights.layout)

        rewrite(model, config, arch, tensors, free)
        assert distance(logits(model), before) > 1e-7


@pytest.mark.parametrize("model_type", [m for m in ALL if not has_fixed_groups(m)])
def test_repeating_key_value_heads_keeps_the_logits(model_type):
    model, config, arch, tensors = double_model(model_type)
    layouts = arch.layouts(config)
    heads = layouts[0].num_attention_heads
    assert heads in arch.legal_groups(config)
    new_config = arch.with_groups(config, {layout.part: layout.num_attention_heads for layout in layouts})
    lifted = tiny_models.from_config(new_config).double()
    state = dict(model.state_dict())
    for layer in attending(arch, config):
        weights = arch.read_layer(config, layer, tensors)
        repeats = weights.layout.queries_per_group
        many = replace(
            weights,
            layout=weights.layout.with_groups(heads),
            k=weights.k.repeat_interleave(repeats, 0),
            v=weights.v.repeat_interleave(repeats, 0),
            k_norm=None if weights.k_norm is None else weights.k_norm.repeat_interleave(repeats, 0),
        )
        written = arch.write_layer(config, layer, many, torch.float64)
        assert {n: tuple(t.shape) for n, t in written.items()} == arch.tensor_shapes(new_config, layer)
        state |= module_names(arch, written, lifted.state_dict())
    lifted.load_state_dict(state)
    assert distance(logits(lifted), logits(model)) <= 1e-10


@pytest.mark.parametrize("model_type", ALL)
def test_the_stock_class_builds_every_legal_group_count_with_our_shapes(model_type):
    config = tiny_models.config_of(model_type)
    arch = architecture.find_architecture(config)
    heads = arch.layouts(config)[0].num_attention_heads
    for groups in arch.legal_groups(config):
        new_config = arch.with_groups(config, groups)
        with torch.device("meta"):
            state = tiny_models.from_config(new_config).state_dict()
        for layer, layout in enumerate(arch.layouts(new_config)):
            old = arch.layouts(config)[layer]
            usual = not arch.parts or old.cached or not any(each.cached for each in arch.layouts(config))
            assert layout == (old.with_groups(groups) if usual else old)
            shapes = arch.tensor_shapes(new_config, layer)
            empty = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
            for name, tensor in module_names(arch, empty, state).items():
                assert state[name].shape == tensor.shape, name
    with pytest.raises(HeadwiseError, match=f"cannot have {heads + 1} key-value heads.*Legal: "):
        arch.with_groups(config, heads + 1)


@pytest.mark.parametrize("model_type", ROWS)
def test_the_mask_of_each_layer_is_the_window_of_its_layout(model_type):
    model, config = tiny_models.build(model_type)
    arch = architecture.find_architecture(config)
    seen = {}

    def look(layer):
        def hook(module, args, kwargs):
            # A position that the mask forbids holds a huge negative number, one that it allows a zero.
            seen[layer] = int((kwargs["attention_mask"][0, 0, -1] == 0).sum())

        return hook

    layouts = arch.layouts(config)
    for layer in attending(arch, config):
        attention = model.get_submodule(f"{arch.module.format(layer=layer)}.{arch.attention}")
        attention.register_forward_pre_hook(look(layer), with_kwargs=True)
    logits(model)
    length = tiny_models.tokens().shape[1]
    assert seen == {n: min(layouts[n].sliding_window or length, length) for n in attending(arch, config)}
