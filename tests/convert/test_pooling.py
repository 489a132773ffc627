"""The published poolings: the members' own rows, and every tensor they do not touch copied byte for byte."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from headwise.convert.gqa.merge import POOLS, merge, pool
from headwise.convert.gqa.target import GroupedTarget
from headwise.convert.pipeline import convert_model
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.models.architecture import find
from tests import tiny_models
from tests.reference import random_layer

# Plain, with biases, norms of a head, norms of all heads, interleaved rows.
APART = ["llama", "qwen2", "qwen3", "olmo2", "cohere"]


def targets(checkpoint: Checkpoint, groups: int, method: str) -> tuple[GroupedTarget, GroupedTarget]:
    """The same conversion tensor by tensor, and layer by layer."""
    arch = find(checkpoint.config, checkpoint.tensors)
    config = arch.with_groups(checkpoint.config, groups)
    make = partial(
        GroupedTarget,
        checkpoint,
        arch,
        config,
        checkpoint.config,
        groups=groups,
        method=method,
        grouping="contiguous",
    )
    return make(measured=False), make(measured=True)


@pytest.mark.parametrize("model_type", APART)
@pytest.mark.parametrize("method", [*POOLS, "replicas"])
def test_a_tensor_at_a_time_gives_what_a_layer_at_a_time_gives(
    model_type: str, method: str, tmp_path: Path
) -> None:
    more = {} if method != "replicas" else {"num_key_value_heads": 1}
    checkpoint = open_checkpoint(tiny_models.save(model_type, tmp_path / "model", **more))
    arch = find(checkpoint.config, checkpoint.tensors)
    before = arch.layouts(checkpoint.config)[0]
    groups = before.num_attention_heads if method == "replicas" else 1
    apart, whole = targets(checkpoint, groups, "optimal" if method == "replicas" else method)
    written = {t.name for t in apart.outputs if t.source is None}
    for layer in range(len(apart.layouts)):
        names = arch.tensor_names(checkpoint.config, layer)
        weights = arch.read_layer(checkpoint.config, layer, {n: checkpoint.read(n) for n in names})
        made, report = whole.convert_layer(layer, weights, None)
        assert not apart.computed(layer) and whole.computed(layer) == names
        if method in POOLS:
            assert report["key_error"] is report["value_error"] is None
        for name, tensor in whole.tensors(layer, made, None).items():
            found = apart.carry(name, checkpoint)
            assert torch.equal(found, tensor), name
            assert (name in written) == (tensor.shape != checkpoint.tensors[name].shape), name


@pytest.mark.parametrize("method", POOLS)
def test_queries_and_outputs_keep_their_bytes(method: str, tmp_path: Path) -> None:
    source = tiny_models.save("llama", tmp_path / "model")
    convert_model(source, tmp_path / "out", to="mqa", method=method, calibrate="none")
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    changed = {n for n in before if after[n].shape != before[n].shape or not torch.equal(after[n], before[n])}
    assert changed == {n for n in before if ".k_proj." in n or ".v_proj." in n}


@pytest.mark.parametrize("method", POOLS)
def test_a_fused_matrix_keeps_its_queries_and_pools_its_heads(method: str, tmp_path: Path) -> None:
    source = tiny_models.save("phi3", tmp_path / "model")
    convert_model(source, tmp_path / "out", to="mqa", method=method, calibrate="none", seed=4)
    parts = []
    for folder in (source, tmp_path / "out"):
        checkpoint = open_checkpoint(folder)
        arch = find(checkpoint.config, checkpoint.tensors)
        names = arch.tensor_names(checkpoint.config, 1)
        parts.append(arch.read_layer(checkpoint.config, 1, {n: checkpoint.read(n) for n in names}))
    old, new = parts
    assert torch.equal(new.q, old.q) and torch.equal(new.o, old.o)
    group = [list(range(old.layout.num_key_value_heads))]
    for name in ("k", "v"):
        wanted = pool(getattr(old, name), group, method, 4 + 1)
        assert torch.equal(getattr(new, name), wanted.float().double()), name


def test_a_pool_is_the_mean_the_first_or_one_of_its_members() -> None:
    heads = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(pool(heads, groups, "mean"), heads.double().unflatten(0, (2, 3)).mean(1))
    assert torch.equal(pool(heads, groups, "first"), heads.double()[[0, 3]])
    seen = set()
    for seed in range(20):
        found = pool(heads, groups, "random", seed)
        assert torch.equal(found, pool(heads, groups, "random", seed))
        picks = [[torch.equal(f, heads[j].double()) for j in group] for f, group in zip(found, groups, strict=True)]
        assert all(sum(p) == 1 for p in picks)
        seen.add(tuple(p.index(True) for p in picks))
    assert len(seen) > 4


@pytest.mark.parametrize("scope", [None, "head", "all"])
def test_a_pooling_reports_its_errors_where_they_are_measured(scope: str | None) -> None:
    layer = random_layer(4, 4, 8, 24, norm_scope=scope)
    x = torch.randn(300, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pooled, report = merge(layer, 2, method="mean", grouping="contiguous", moment=x.mT @ x / len(x))
    spread = layer.v.unflatten(0, (2, 2)) - pooled.v[:, None]
    got, all_of_it = (torch.einsum("hvi,ti,hdv->htd", v, x, layer.o) for v in (spread.flatten(0, 1), layer.v))
    assert report.value_error == pytest.approx(float(got.square().sum() / all_of_it.square().sum()), rel=1e-9)
    assert report.key_error is not None and report.key_error > 0
    best = merge(layer, 2, method="optimal", grouping="contiguous", moment=x.mT @ x / len(x))[1]
    assert best.value_error is not None and best.value_error < report.value_error
    twins, _ = merge(merge(layer, 2, method="first", grouping="contiguous")[0], 4)
    nothing = merge(twins, 2, method="mean", grouping="contiguous", moment=x.mT @ x / len(x))[1]
    assert nothing.key_error == pytest.approx(0, abs=1e-12) == nothing.value_error
