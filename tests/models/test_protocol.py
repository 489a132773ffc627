"""One protocol for grouped and MLA models: the paths exist in the stock model, the tensors are the layer's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.models.protocol import find_attention_model, latent_model, read_latent_layer
from headwise.models.stock import empty_model
from tests import small_parents

ARGUMENTS = {"gqa": {"to": "gqa", "groups": 2}, "mla": {"to": "mla", "rank": 12, "rope_dim": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("protocol")
    parent = small_parents.parent(home / "mha")
    out = {"mha": parent}
    for kind, arguments in ARGUMENTS.items():
        out[kind] = small_parents.converted(parent, home / kind, **arguments)
    return out


@pytest.mark.parametrize("kind", ["mha", "gqa", "mla"])
def test_paths_and_tensors_are_those_of_the_stock_model(folders: dict[str, Path], kind: str) -> None:
    checkpoint = open_checkpoint(folders[kind])
    model = find_attention_model(checkpoint.config, checkpoint.tensors)
    layouts = model.layouts(checkpoint.config)
    assert {layout.kind for layout in layouts} == {kind} and len(layouts) == 2
    network = empty_model(checkpoint.config, model.auto_class)
    for layer in range(len(layouts)):
        attention = network.get_submodule(model.attention_path(layer))
        assert attention.get_submodule(model.output_projection).out_features == 32
        names = {f"{model.attention_path(layer)}.{name}" for name in attention.state_dict()}
        tensors = model.tensors(checkpoint, layer)
        assert set(tensors) == names
        assert all(torch.equal(tensor, checkpoint.read(name)) for name, tensor in tensors.items())
    assert model.text_config(checkpoint.config)["hidden_size"] == 32


def test_an_mla_layer_is_read_without_its_norm(folders: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(folders["mla"])
    weights, o_bias = read_latent_layer(checkpoint, 1)
    assert o_bias is None and weights.kv_down.shape == (12, 32) and weights.kv_down.dtype == torch.float64
    config = checkpoint.config
    width = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    assert weights.scale == pytest.approx(width**-0.5)


def test_an_mla_model_of_other_origin_has_norms(folders: dict[str, Path]) -> None:
    config = json.loads((folders["mla"] / "config.json").read_text())
    assert latent_model(config).linear and not latent_model(config | {"first_k_dense_replace": 1}).linear
    with pytest.raises(HeadwiseError, match=r"glm_moe_dsa: .*\(MLA\) already"):
        other = {"model_type": "glm_moe_dsa", "architectures": ["GlmMoeDsaForCausalLM"], "first_k_dense_replace": 1}
        find_attention_model(config | other)
    with pytest.raises(HeadwiseError, match="kv_lora_rank"):
        find_attention_model(config).layouts(config | {"kv_lora_rank": "12"})


def test_a_stray_field_does_not_make_a_model_latent(folders: dict[str, Path]) -> None:
    config = json.loads((folders["mha"] / "config.json").read_text()) | {"kv_lora_rank": 12}
    assert find_attention_model(config).layouts(config)[0].kind == "mha"
