"""Every row of the table, converted and loaded again, against its merged heads written out in full."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from headwise.convert.calibration.attention_stats import NUM_ATTENTION_QUERIES
from headwise.convert.calibration.layer_stream import LayerRecord, LayerStream
from headwise.convert.gqa.merge import merge_heads, replicate_heads
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.models import architecture
from headwise.models.architecture import Architecture
from headwise.models.layout import LayerWeights
from tests import tiny_models

ROWS = sorted(tiny_models.CONFIGS)


@cache
def row(model_type: str) -> tuple[Architecture, dict, int, int]:
    """The row, the config, and its query and key-value heads."""
    config = tiny_models.config_of(model_type)
    arch = architecture.find(config)
    layout = arch.layouts(config)[0]
    return arch, config, layout.num_attention_heads, layout.num_key_value_heads


def reachable(model_type: str) -> list[int]:
    """Every smaller number of key-value heads, and the next larger one."""
    arch, config, _, source = row(model_type)
    legal = arch.legal_groups(config)
    smaller = [groups for groups in legal if groups < source and source % groups == 0]
    larger = [groups for groups in legal if groups > source and groups % source == 0]
    return smaller + larger[:1]


MERGES = [
    (model_type, groups, method)
    for model_type in ROWS
    for number, groups in enumerate(reachable(model_type))
    for method in (("optimal", "mean") if number == 0 else ("optimal",))
]


def load(folder: Path, arch: Architecture, **options) -> torch.nn.Module:
    """The folder through the stock class, which must miss nothing and leave nothing over."""
    model, info = getattr(transformers, arch.auto_class).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, experts_implementation="eager", **options
    )
    assert not any(info.values()), info
    return model.eval()


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), tiny_models.float64_throughout():
        return model.double()(input_ids=tiny_models.tokens()).logits


def written_out(source: Path, parent: torch.nn.Module, groups: int, method: str) -> torch.nn.Module:
    """The parent's stock class with a key-value head for every query head, the merged heads repeated in it."""
    tensors, config = load_file(source / "model.safetensors"), tiny_models.read_config(source)
    arch = architecture.find(config, tensors)
    heads = arch.layouts(config)[0].num_attention_heads
    model = tiny_models.from_config(arch.with_groups(config, heads))
    state = dict(parent.state_dict())
    file_prefix, module_prefix = (path.split("{")[0] for path in (arch.layers[0], arch.module))
    for layer in range(len(arch.layouts(config))):
        weights = arch.read_layer(config, layer, tensors)
        grouping = "optimal" if method == "optimal" else "contiguous"
        merged, _ = merge_heads(weights, groups, method=method, grouping=grouping, seed=layer)
        wide = replicate_heads(merged, heads // groups)
        for name, tensor in arch.write_layer(config, layer, wide, torch.float32).items():
            state[module_prefix + name.removeprefix(file_prefix)] = tensor
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize(("model_type", "groups", "method"), MERGES)
def test_a_converted_row_computes_what_its_merged_heads_do(model_type, groups, method, tmp_path):
    source = tiny_models.save(model_type, tmp_path / "model")
    arch, _, _, before = row(model_type)
    out = tmp_path / "out"
    convert_model(source, out, to="gqa", groups=groups, method=method, calibrate="none", verify=False)
    if method == "mean":
        found = verify_model(out, source)
        assert found.passed, found.failures
    converted, parent = load(out, arch, attn_implementation="eager"), tiny_models.build(model_type)[0]
    found, wanted = logits(converted), logits(written_out(source, parent, groups, method))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-10
    original = logits(parent)
    moved = float((found - original).norm() / original.norm())
    assert (moved < 1e-10) if groups > before else (moved > 1e-4)


@pytest.mark.parametrize("model_type", [m for m in ROWS if not reachable(m)])
def test_a_class_without_room_for_fewer_heads_is_refused(model_type, tmp_path):
    source = tiny_models.save(model_type, tmp_path / "model")
    arch, _, heads, groups = row(model_type)
    assert arch.fixed_groups
    with pytest.raises(HeadwiseError, match=f"with {heads} query heads cannot have 7.*Legal: {groups}"):
        convert_model(source, tmp_path / "out", to="gqa", groups=7, calibrate="none")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_mean_is_the_mean_of_the_rows(tmp_path):
    source = tiny_models.save("llama", tmp_path / "model")
    convert_model(source, tmp_path / "out", to="mqa", method="mean", calibrate="none", verify=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    for name, tensor in before.items():
        if ".k_proj." in name or ".v_proj." in name:
            tensor = tensor.double().unflatten(0, (3, 8)).mean(0).float()
        assert torch.equal(after[name], tensor), name


def test_optimal_groups_may_differ_between_layers_and_follow_their_queries(tmp_path):
    """Heads that are each other's replicas, in another order in every layer, merge without loss."""
    model, config = tiny_models.build("mistral", num_key_value_heads=14)
    orders = [torch.randperm(14, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    with torch.no_grad():
        for layer, order in zip(model.model.layers, orders, strict=True):
            for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                heads = projection.weight.view(14, 6, -1)
                heads[order[1::2]] = heads[order[::2]]
    model.save_pretrained(tmp_path / "model")
    result = convert_model(tmp_path / "model", tmp_path / "out", to="gqa", groups=7, calibrate="none", verify=False)
    for layer, order in enumerate(orders):
        pairs = {frozenset(pair) for pair in order.view(7, 2).tolist()}
        assert {frozenset(group) for group in result.layers[layer]["groups"]} == pairs
    arch = architecture.find(config)
    wanted = logits(load(tmp_path / "model", arch, attn_implementation="eager"))
    found = logits(load(tmp_path / "out", arch, attn_implementation="eager"))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


def seen_whole(source: Path, arch: Architecture, tokens: torch.Tensor, **options) -> list[dict]:
    """What hooks see on the stock model loaded whole: each layer's attention input, output, weights and o input."""
    model = load(source, arch, **options)
    seen: list[dict] = []
    for layer in range(len(arch.layouts(tiny_models.read_config(source)))):
        attention = model.get_submodule(f"{arch.module.format(layer=layer)}.{arch.attention}")
        here: dict = {}

        def note(module, args, kwargs, output, here=here):
            here |= {"x": kwargs.get("hidden_states", args[0] if args else None), "y": output[0], "p": output[1]}

        def note_values(module, args, here=here):
            here["z"] = args[0]

        attention.register_forward_hook(note, with_kwargs=True)
        attention.get_submodule(arch.projections["o"]).register_forward_pre_hook(note_values)
        seen.append(here)
    with torch.no_grad():
        model(input_ids=tokens, use_cache=False)
    return seen


def stream(source: Path, tokens: torch.Tensor, **options) -> list[LayerRecord]:
    checkpoint = open_checkpoint(source)
    arch = architecture.find(checkpoint.config, checkpoint.tensors)
    return list(LayerStream(checkpoint, arch, tokens).records(**options))


@pytest.mark.parametrize("model_type", ROWS)
def test_a_layer_at_a_time_sees_what_the_whole_model_sees(model_type, tmp_path, monkeypatch):
    monkeypatch.setattr("headwise.convert.calibration.layer_stream.TOKENS_AT_ONCE", 20)
    source = tiny_models.save(model_type, tmp_path / "model")
    tokens = torch.randint(3, tiny_models.VOCABULARY, (3, 10), generator=torch.Generator().manual_seed(2))
    arch, config, _, _ = row(model_type)
    capped = getattr(arch.stock_config(config), "attn_logit_softcapping", None)
    whole = seen_whole(source, arch, tokens, attn_implementation="eager" if capped else "sdpa")
    records = stream(source, tokens, keep_activations=True)
    assert [record.index for record in records] == list(range(len(whole)))
    for record, here in zip(records, whole, strict=True):
        x = torch.cat([here["x"], torch.ones(3, 10, 1)], -1).flatten(0, 1).double()
        pairs = ((record.inputs, here["x"]), (record.outputs, here["y"]), (record.moment, x.T @ x / 30))
        for found, wanted in pairs:
            assert float((found - wanted).abs().max()) < 1e-5 * float(wanted.abs().max())
        assert record.tokens == 30


def test_layers_passed_over_change_nothing(tmp_path):
    source = tiny_models.save("gemma2", tmp_path / "model")
    every = stream(source, tiny_models.tokens(), keep_activations=True)
    (last,) = stream(source, tiny_models.tokens(), keep_activations=True, layers=[2])
    assert last.index == 2
    for name in ("inputs", "outputs", "moment", "value_moment", "distances"):
        assert torch.equal(getattr(last, name), getattr(every[2], name))


def test_what_a_query_reads_varies_by_no_less_than_nothing(tmp_path):
    """Also where only some queries are looked at: the closed form of MLA diverges otherwise."""
    source = tiny_models.save("llama", tmp_path / "model")
    for record in stream(source, tiny_models.tokens(4 * NUM_ATTENTION_QUERIES)):
        assert record.key_moment is not None and record.value_moment is not None
        spread = torch.linalg.eigvalsh(record.key_moment - record.value_moment)
        assert spread[0] > -1e-5 * spread[-1]


@pytest.mark.parametrize("model_type", ["llama", "gemma2", "qwen3", "smollm3"])
def test_attention_is_looked_at_as_it_is(model_type, tmp_path):
    """Distances and the keys' moment from the weights themselves; the values' from what the output matrix is given.

    With one key-value head, every head's values are `V y` with y the averaged input, so E[(V y)(V y)^T] must be
    `V value_moment V^T`.
    """
    source = tiny_models.save(model_type, tmp_path / "model", num_key_value_heads=1)
    tensors, config = load_file(source / "model.safetensors"), tiny_models.read_config(source)
    arch = architecture.find(config, tensors)
    tokens = tiny_models.tokens(15)
    whole = seen_whole(source, arch, tokens, attn_implementation="eager")
    for record, here in zip(stream(source, tokens), whole, strict=True):
        weights: LayerWeights = arch.read_layer(config, record.index, tensors)
        assert record.value_moment is not None and record.distances is not None
        x = torch.cat([here["x"], torch.ones(2, 15, 1)], -1).double()
        attended = torch.einsum("bhqn,bni,bnj->ij", here["p"].double(), x, x) / here["p"].sum()
        torch.testing.assert_close(record.key_moment, attended, rtol=1e-4, atol=1e-6)
        values = here["z"].double().unflatten(-1, (-1, weights.v.shape[1])).flatten(0, 2)
        v = weights.v[0]
        moment = record.value_moment[: v.shape[1], : v.shape[1]]
        torch.testing.assert_close(v @ moment @ v.T, values.T @ values / len(values), rtol=1e-4, atol=1e-6)
        p = here["p"].double().mean(0)
        share = torch.stack([p.diagonal(-d, 1, 2).sum(-1) for d in range(15)], -1) / 15
        torch.testing.assert_close(record.distances, share, rtol=1e-5, atol=1e-7)
        window = weights.layout.sliding_window
        if window:
            assert float(record.distances[:, window:].abs().max()) == 0.0
