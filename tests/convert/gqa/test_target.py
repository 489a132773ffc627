"""Every row of the table with another number of KV heads, through the stock class."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from headwise import registry
from headwise.convert.gqa.merge import merge_heads, replicate_heads
from headwise.convert.gqa.target import GroupedTarget
from headwise.convert.pipeline import convert_model
from headwise.convert.settings import ConvertSettings
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.models import architecture
from headwise.models.architecture import find_architecture
from tests import tiny_models
from tests.convert.rows import ROWS, load, row

POOLING = [method.name for method in registry.METHODS if method.kind == "merge" and not method.needs]


def reachable(model_type: str) -> list[int]:
    """Every smaller number of KV heads, and the next larger one."""
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


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad(), tiny_models.float64_throughout():
        return model.double()(input_ids=tiny_models.tokens()).logits


def written_out(source: Path, parent: torch.nn.Module, groups: int, method: str) -> torch.nn.Module:
    """The parent's stock class with one KV head per query head: the merged heads, repeated."""
    tensors, config = load_file(source / "model.safetensors"), tiny_models.read_config(source)
    arch = architecture.find_architecture(config, tensors)
    heads = arch.layouts(config)[0].num_attention_heads
    model = tiny_models.from_config(arch.with_groups(config, heads))
    state = dict(parent.state_dict())
    file_prefix, module_prefix = (path.split("{")[0] for path in (arch.layers[0], arch.module))
    for layer in (n for n, layout in enumerate(arch.layouts(config)) if layout.attends):
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
    arch = architecture.find_architecture(config)
    wanted = logits(load(tmp_path / "model", arch, attn_implementation="eager"))
    found = logits(load(tmp_path / "out", arch, attn_implementation="eager"))
    assert float((found - wanted).norm() / wanted.norm()) < 1e-5


# Plain, with biases, norms of a head, norms of all heads, interleaved rows.
TENSORWISE = ["llama", "qwen2", "qwen3", "olmo2", "cohere"]


def targets(checkpoint: Checkpoint, groups: int, method: str) -> tuple[GroupedTarget, GroupedTarget]:
    """The same conversion one tensor at a time, and one layer at a time."""
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    config = arch.with_groups(checkpoint.config, groups)
    make = partial(
        GroupedTarget,
        checkpoint,
        arch,
        config,
        checkpoint.config,
        changed={"text"},
    )
    given = partial(ConvertSettings, to="gqa", groups=groups, method=method, grouping="contiguous", refit="off")
    return make(given()), make(given(save_moments="moments"))


@pytest.mark.parametrize("model_type", TENSORWISE)
@pytest.mark.parametrize("method", [*POOLING, "replicas"])
def test_a_tensor_at_a_time_gives_what_a_layer_at_a_time_gives(
    model_type: str, method: str, tmp_path: Path
) -> None:
    more = {} if method != "replicas" else {"num_key_value_heads": 1}
    checkpoint = open_checkpoint(tiny_models.save(model_type, tmp_path / "model", **more))
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    before = arch.layouts(checkpoint.config)[0]
    groups = before.num_attention_heads if method == "replicas" else 1
    tensorwise, layerwise = targets(checkpoint, groups, "optimal" if method == "replicas" else method)
    written = {t.name for t in tensorwise.outputs if t.source is None}
    for layer in range(len(tensorwise.layouts)):
        names = arch.tensor_names(checkpoint.config, layer)
        weights = arch.read_layer(checkpoint.config, layer, {n: checkpoint.read(n) for n in names})
        converted, report = layerwise.convert_layer(layer, weights, None)
        assert not tensorwise.converted_names(layer) and layerwise.converted_names(layer) == names
        if method in POOLING:
            assert report["key_error"] is report["value_error"] is None
        for name, tensor in layerwise.export_layer(layer, converted, None).items():
            found = tensorwise.transform_other(name, checkpoint)
            assert torch.equal(found, tensor), name
            assert (name in written) == (tensor.shape != checkpoint.tensors[name].shape), name


@pytest.mark.parametrize("method", POOLING)
def test_queries_and_outputs_keep_their_bytes(method: str, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model")
    convert_model(source, tmp_path / "out", to="mqa", method=method, calibrate="none")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {n for n in before if after[n].shape != before[n].shape or not torch.equal(after[n], before[n])}
    assert changed == {n for n in before if ".k_proj." in n or ".v_proj." in n}


@pytest.mark.parametrize("method", POOLING)
def test_a_fused_matrix_keeps_its_queries_and_pools_its_heads(method: str, tmp_path: Path) -> None:
    source = tiny_models.save("phi3", tmp_path / "model")
    convert_model(source, tmp_path / "out", to="mqa", method=method, calibrate="none", seed=4)
    parts = []
    for folder in (source, tmp_path / "out"):
        checkpoint = open_checkpoint(folder)
        arch = find_architecture(checkpoint.config, checkpoint.tensors)
        names = arch.tensor_names(checkpoint.config, 1)
        parts.append(arch.read_layer(checkpoint.config, 1, {n: checkpoint.read(n) for n in names}))
    old, new = parts
    assert torch.equal(new.q, old.q) and torch.equal(new.o, old.o)
    group = [list(range(old.layout.num_key_value_heads))]
    for name in ("k", "v"):
        wanted = registry.find_method("merge", method).load()(getattr(old, name), group, 4 + 1)
        assert torch.equal(getattr(new, name), wanted.float().double()), name


@pytest.mark.parametrize("model_type", ["gpt_oss", "qwen3_5_text", "lfm2", "granitemoehybrid"])
def test_equal_heads_far_apart_are_merged_without_loss(model_type: str, tmp_path: Path) -> None:
    """Query heads move to their group, and their sinks and gates with them; values may differ by a scale."""
    more = {"head_dim": 16, "hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4}
    if model_type in ("lfm2", "granitemoehybrid"):
        more = {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 4}
    source = tiny_models.save(model_type, tmp_path / "model", **more)
    tensors = load_file(source / "model.safetensors")
    for name in [n for n in tensors if "self_attn.k_proj." in n or "self_attn.v_proj." in n]:
        heads = tensors[name].unflatten(0, (4, -1))
        scale = 1.5 if ".v_proj." in name else 1.0
        tensors[name] = torch.cat([heads[:2], scale * heads[:2]]).flatten(0, 1).contiguous()
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    convert_model(source, tmp_path / "out", to="gqa", groups=2, calibrate="none")
    models = [
        transformers.AutoModelForCausalLM.from_pretrained(f, experts_implementation="eager").eval()
        for f in (source, tmp_path / "out")
    ]
    assert models[1].config.num_key_value_heads == 2
    with torch.inference_mode():
        before, after = (model(input_ids=tiny_models.tokens()).logits for model in models)
    assert (after - before).abs().max() < 1e-4 * before.abs().max()


@pytest.mark.parametrize("model_type", ["phi3", "gpt_oss", "lfm3_vl", "molmo2"])
def test_a_layer_that_is_not_trained_exports_what_was_written(model_type: str, tmp_path: Path) -> None:
    """Also where the class splits or renames the tensors of a checkpoint."""
    source = open_checkpoint(tiny_models.save(model_type, tmp_path))
    arch = find_architecture(source.config, source.tensors)
    layouts = arch.layouts(source.config)
    parts = {layout.part for layout in layouts if layout.attends}
    config = arch.with_groups(source.config, dict.fromkeys(parts, 1))
    settings = ConvertSettings(to="mqa")
    target = GroupedTarget(source, arch, config, source.config, settings, changed=parts)
    for layer in (n for n, layout in enumerate(layouts) if layout.attends):
        tensors = {name: source.read(name) for name in arch.tensor_names(source.config, layer)}
        converted, _ = target.convert_layer(layer, arch.read_layer(source.config, layer, tensors), None)
        module = target.trainable_layer(layer, converted, torch.device("cpu"), 8)
        written, exported = target.export_layer(layer, converted, None), module.export({})
        assert sum(p.numel() for p in module.parameters) == sum(t.numel() for t in written.values())
        assert exported.keys() == written.keys()
        assert all(torch.equal(tensor, written[name]) for name, tensor in exported.items())
