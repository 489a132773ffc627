"""Configs: both rope spellings, old and new names, refusals, hostile values."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForSpeechSeq2Seq

from headwise.errors import HeadwiseError
from headwise.io.quantized.quantization import quantization_of
from headwise.models import architecture, table
from headwise.models.config import stock_text_config
from headwise.models.stock import stock_config
from tests import tiny_models

SHARED_CONFIGS = Path(__file__).parents[3] / "shared" / "configs"
LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}
LONG = {"max_position_embeddings": 512}
ROPES = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128},
    "llama3": {
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 128,
    },
}
OLD_ROPE_KEYS = ("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor")
OLD_ROPE_KEYS += ("rotary_pct", "rotary_emb_base")


def stock_rope(config):
    return architecture.find_architecture(config).stock_config(config).rope_parameters


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def check_both_spellings(config, text_config):
    """Each spelling alone, and both together, are the same rotation to the stock class."""
    wanted = stock_rope(config)
    spelled = table.both_rope_spellings(text_config)
    assert spelled["rope_parameters"] == wanted
    assert stock_rope(spelled) == wanted
    assert stock_rope(without(spelled, *OLD_ROPE_KEYS)) == wanted
    old = stock_rope(without(spelled, "rope_parameters"))
    if "type" in (spelled["rope_scaling"] or {}):
        old = without(old, "type")
    assert old == wanted
    return spelled


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("spelling", ["old", "new"])
def test_every_rope_type_is_written_in_both_spellings(kind, spelling):
    rope = ROPES[kind]
    if spelling == "old":
        config = LLAMA | LONG | {"rope_theta": 5e5, "rope_scaling": rope if kind != "default" else None}
    else:
        config = LLAMA | LONG | {"rope_parameters": {"rope_theta": 5e5, **rope}}
    spelled = check_both_spellings(config, config)
    assert spelled["rope_theta"] == 5e5
    assert spelled["rope_scaling"] == (None if kind == "default" else rope)


@pytest.mark.parametrize("model_type", sorted(set(tiny_models.CONFIGS) - set(table.load_table().wrappers)))
def test_every_row_is_written_in_both_spellings(model_type):
    config = tiny_models.config_of(model_type)
    check_both_spellings(config, config)


def test_rope_parameters_beat_a_stale_old_spelling():
    config = LLAMA | LONG | {"rope_theta": 1e4, "rope_scaling": ROPES["linear"]}
    config["rope_parameters"] = {"rope_theta": 5e5, **ROPES["yarn"]}
    spelled = table.both_rope_spellings(config)
    assert spelled["rope_theta"] == 5e5
    assert spelled["rope_scaling"] == ROPES["yarn"]


def test_partial_rotary_keeps_its_old_names():
    neox = {"model_type": "gpt_neox", "hidden_size": 64, "num_attention_heads": 2, "rotary_pct": 0.5}
    spelled = check_both_spellings(neox, neox)
    assert (spelled["rotary_pct"], spelled["rotary_emb_base"]) == (0.5, 10000.0)
    phi = {"model_type": "phi", "hidden_size": 64, "num_attention_heads": 2, "partial_rotary_factor": 0.25}
    assert check_both_spellings(phi, phi)["rope_parameters"]["partial_rotary_factor"] == 0.25
    assert architecture.find_architecture(phi).layouts(phi)[0].rotary_dim == 8


def test_phi3_longrope_has_the_three_old_keys_and_no_other():
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = LLAMA | LONG | {"model_type": "phi3", "rope_scaling": scaling, "original_max_position_embeddings": 128}
    spelled = table.both_rope_spellings(config)
    assert spelled["rope_scaling"] == scaling
    assert spelled["original_max_position_embeddings"] == 128
    assert stock_rope(spelled) == stock_rope(config)
    assert stock_rope(without(spelled, *OLD_ROPE_KEYS)) == without(stock_rope(config), "type") | {
        "type": "longrope"
    }


def test_gemma3_spells_a_base_per_layer_type():
    config = LLAMA | {"model_type": "gemma3_text", "rope_theta": 2e6, "rope_local_base_freq": 3e4}
    config |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    spelled = check_both_spellings(config, config)
    assert spelled["rope_parameters"]["full_attention"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6}
    assert spelled["rope_parameters"]["sliding_attention"] == {"rope_type": "default", "rope_theta": 3e4}
    old = without(spelled, "rope_parameters")
    assert {k: old[k] for k in OLD_ROPE_KEYS if k in config} == {k: config[k] for k in OLD_ROPE_KEYS if k in config}


def test_a_type_without_a_row_is_spelled_too():
    config = {"model_type": "deepseek_v3", "rope_parameters": {"rope_type": "default", "rope_theta": 7e4}}
    assert table.both_rope_spellings(config)["rope_theta"] == 7e4


def test_with_groups_is_a_clean_copy():
    source = LLAMA | {"torch_dtype": "bfloat16", "auto_map": {"AutoModel": "x.Y"}, "quantization_config": None}
    source |= {"rope_theta": 5e5, "num_key_value_heads": 4, "custom": [1]}
    before = copy.deepcopy(source)
    new = architecture.find_architecture(source).with_groups(source, 2)
    assert source == before
    assert new["num_key_value_heads"] == 2
    assert new["head_dim"] == 8
    assert new["dtype"] == new["torch_dtype"] == "bfloat16"
    assert new["rope_theta"] == new["rope_parameters"]["rope_theta"] == 5e5
    assert new["custom"] == [1]
    assert not {"auto_map", "quantization_config"} & set(new)


def test_defaults_that_a_config_leaves_out_are_the_stock_class_s():
    arch = architecture.find_architecture({"model_type": "mistral"})
    layout = arch.layouts({"model_type": "mistral"})[0]
    assert (layout.num_attention_heads, layout.num_key_value_heads, layout.sliding_window) == (32, 8, 4096)
    gemma = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 7}}
    layouts = architecture.find_architecture(gemma).layouts(gemma)
    assert [layout.sliding_window for layout in layouts] == [4096] * 5 + [None, 4096]
    assert layouts[0].num_key_value_heads == 4
    text = architecture.find_architecture(gemma).with_groups(gemma, 2)["text_config"]
    assert (text["num_attention_heads"], text["num_key_value_heads"], text["head_dim"]) == (8, 2, 256)


def test_a_refused_type_has_no_row():
    data = table.load_table()
    assert not set(data.refused) & (set(data.rows) | set(data.wrappers) | set(data.composites))


WRAPPERS = table.load_table().wrappers


@pytest.mark.parametrize("model_type", [w for w in sorted(WRAPPERS) if len(WRAPPERS[w]["layers"]) > 1])
def test_wrappers_are_read_and_written_under_either_naming(model_type):
    model, config = tiny_models.build(model_type)
    tensors = tiny_models.checkpoint(model)
    first, second = WRAPPERS[model_type]["layers"]
    assert architecture.find_architecture(config).layers == (first,)
    arch = architecture.find_architecture(config, tensors)
    assert set(arch.tensor_names(config, 0)) <= set(tensors)
    here = arch.layers[0].split("{")[0]
    there = (second if arch.layers[0] == first else first).split("{")[0]
    renamed = {name.replace(here, there): tensor for name, tensor in tensors.items()}
    other = architecture.find_architecture(config, renamed)
    assert other.layers != arch.layers
    weights = other.read_layer(config, 1, renamed)
    assert torch.equal(weights.k, arch.read_layer(config, 1, tensors).k)
    for name, tensor in other.write_layer(config, 1, weights, torch.float32).items():
        assert torch.equal(tensor, renamed[name])


def test_a_flat_qwen2_vl_config_is_read_like_a_nested_one():
    nested = tiny_models.config_of("qwen2_vl")
    flat = without(nested, "text_config") | without(nested["text_config"], "model_type", "rope_parameters")
    flat |= {"rope_theta": 1e4, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}
    arch = architecture.find_architecture(flat)
    assert arch.text_key is None
    assert arch.layouts(flat) == architecture.find_architecture(nested).layouts(nested)
    new = arch.with_groups(flat, 1)
    assert new["num_key_value_heads"] == 1
    assert new["rope_scaling"]["mrope_section"] == [1, 1, 2]
    built = tiny_models.from_config(new).config.get_text_config()
    assert built.num_key_value_heads == 1
    assert built.rope_parameters["mrope_section"] == [1, 1, 2]


@pytest.mark.parametrize("model_type", sorted(WRAPPERS))
@pytest.mark.parametrize("missing", [{}, {"text_config": None}])
def test_a_language_model_that_the_config_leaves_out_is_the_stock_default(model_type, missing):
    config = {"model_type": model_type, **missing}
    expected = AutoConfig.for_model(model_type).get_text_config()
    arch = architecture.find_architecture(config)
    layouts = arch.layouts(config)
    assert (len(layouts), layouts[0].num_key_value_heads) == (
        expected.num_hidden_layers,
        expected.num_key_value_heads,
    )
    new = arch.with_groups(config, 1)
    built = AutoConfig.for_model(**new).get_text_config()
    assert (built.num_key_value_heads, built.hidden_size) == (1, expected.hidden_size)


def test_the_stock_class_that_is_said_to_fail_with_fewer_kv_heads_fails() -> None:
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 40}
    for side in ("encoder", "decoder"):
        sizes |= {f"{side}_num_hidden_layers": 1, f"{side}_num_attention_heads": 4}
    given = {"input_values": torch.randn(1, 16000), "decoder_input_ids": torch.tensor([[1, 2, 3]])}
    for count in (4, 2):
        counts = {f"{side}_num_key_value_heads": count for side in ("encoder", "decoder")}
        model = AutoModelForSpeechSeq2Seq.from_config(AutoConfig.for_model("moonshine", **sizes, **counts)).eval()
        if count == 4:
            assert model(**given).logits.shape == (1, 3, 61)
        else:
            with pytest.raises(RuntimeError):
                model(**given)


def test_a_part_inside_a_part_may_be_left_out():
    """The stock class fills it in, and the new config holds it whole."""
    for given in ({}, {"encoder": None}, {"encoder": {"text_config": None}}):
        config = {"model_type": "t5gemma2", "decoder": tiny_models.config_of("t5gemma2")["decoder"], **given}
        config["decoder"] |= {"hidden_size": 2304, "vocab_size": 262_208}
        arch = architecture.find_architecture(config)
        assert arch.parts[0].text_config(config)["num_key_value_heads"] == 4
        new = arch.with_groups(config, {"encoder": 2})
        assert new["encoder"]["text_config"]["num_key_value_heads"] == 2
        assert new["decoder"]["num_key_value_heads"] == config["decoder"]["num_key_value_heads"]


def test_types_are_listed_by_family():
    families = table.supported_types()
    assert "llama" in families["language models"]
    assert "llava" in families["vision-language models (the text model)"]
    assert sorted(name for types in families.values() for name in types) == table.supported_model_types()


def test_a_head_on_top_chooses_the_class_that_loads_it():
    config = LLAMA | {"architectures": ["LlamaForSequenceClassification"]}
    assert architecture.find_architecture(config).auto_class == "AutoModelForSequenceClassification"
    assert architecture.find_architecture(LLAMA).auto_class == "AutoModelForCausalLM"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "lama"}, "lama: transformers has no class.*Did you mean llama.*inspect --types"),
        ({"model_type": "bert"}, "bert: its stock class stores no number of KV heads"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "stores no number of KV heads.*cache in 8 bits"),
        ({"model_type": "whisper", "is_encoder_decoder": True}, "stores no number of KV heads.*cache in 8 bits"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "stores no number of KV heads.*no KV cache"),
        ({"model_type": "moonshine", "is_encoder_decoder": True}, "splits queries into.*in 8 bits"),
        (
            {"model_type": "t5gemma2", "encoder": 5},
            "encoder.text_config: 5, and the config of a part belongs there",
        ),
        (
            {"model_type": "t5gemma2", "encoder": {"text_config": [1]}},
            r"encoder.text_config: \[1\], and the config",
        ),
        ({"model_type": "t5gemma2", "decoder": {"model_type": [1]}}, r"model_type: \[1\] in decoder, and a name"),
        ({"model_type": "t5gemma", "encoder": 5}, "encoder: 5, and the config of a part belongs there"),
        ({"model_type": "hunyuan_vl"}, "its vision tower reads no number of KV heads"),
        ({"model_type": "nemotron_h"}, "nemotron_h: it has no row in the table[^?]*$"),
        ({"model_type": "nemotron-nas"}, "transformers has no class for it, and headwise never runs code[^?]*$"),
        ({"model_type": "glm_moe_dsa"}, "latent attention.*cache in 8 bits"),
        ({"model_type": "qwen4", "architectures": ["Qwen4Model"]}, "qwen4: transformers has no.*Did you mean qwen"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "no number of KV heads.*It has no KV cache"),
        ({"model_type": "qwen"}, "transformers has no class for it, and headwise never runs code"),
        ({"model_type": "gpt2"}, "no num_key_value_heads"),
        ({"model_type": "deepseek_v3"}, "has MLA already"),
        ({"model_type": "llava", "text_config": {"model_type": "gpt2"}}, "gpt2: its positions are learned"),
        ({"model_type": "stablelm", "qk_layernorm": True}, "qk_layernorm: true.*subtracts the mean"),
        ({"model_type": "cohere", "use_qk_norm": True}, "use_qk_norm: true.*subtracts the mean"),
        ({"model_type": "falcon", "multi_query": True}, "new_decoder_architecture: false"),
        ({"model_type": "olmo", "clip_qkv": 8.0}, "clip_qkv: 8.0.*clamps"),
        (LLAMA | {"per_layer_config": {"0": {"num_key_value_heads": 2}}}, "per_layer_config"),
    ],
)
def test_what_cannot_be_converted_is_refused_with_the_reason(config, message):
    with pytest.raises(HeadwiseError, match=message):
        architecture.find_architecture(config)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"num_attention_heads": -8}, "num_attention_heads: -8"),
        ({"num_attention_heads": "8"}, 'num_attention_heads: "8"'),
        ({"num_attention_heads": True}, "num_attention_heads: true"),
        ({"num_attention_heads": 7}, "num_attention_heads|7"),
        ({"num_key_value_heads": 3}, "num_key_value_heads: 3, which does not divide num_attention_heads: 8"),
        ({"num_key_value_heads": 16}, "num_key_value_heads: 16"),
        ({"num_key_value_heads": [4, 2]}, r"num_key_value_heads: \[4, 2\]"),
        ({"hidden_size": 64.5}, "hidden_size: 64.5"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers: 1000000000000000"),
        ({"head_dim": 0}, "head_dim: 0"),
        ({"head_dim": 7}, "`?head_dim`?(=|: )7"),
        ({"rope_parameters": "fast"}, "rope_parameters"),
        ({"rope_scaling": [1]}, "llama class refuses config.json"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": "half"}},
            "partial_rotary_factor: 'half'",
        ),
        ({"attention_bias": "no"}, "attention_bias"),
        ({"model_type": None}, "model_type: null"),
        ({"model_type": ["llama"]}, "model_type: "),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "1 layer_types, and num_hidden_layers: 2"),
        ({"model_type": "smollm3", "no_rope_layers": [1]}, "1 no_rope_layers, and num_hidden_layers: 2"),
        ({"model_type": "llava", "text_config": "llama"}, 'text_config: "llama"'),
    ],
)
def test_a_hostile_config_is_refused_by_its_field(change, field):
    with pytest.raises(HeadwiseError, match=field):
        architecture.find_architecture(LLAMA | change)


@pytest.mark.parametrize("config", [None, [], "llama", 3])
def test_a_config_that_is_no_object_is_refused(config):
    with pytest.raises(HeadwiseError, match="JSON object"):
        architecture.find_architecture(config)


def test_tensors_that_do_not_fit_the_config_are_named_with_both_shapes():
    model, config = tiny_models.build("qwen3")
    tensors = tiny_models.checkpoint(model)
    arch = architecture.find_architecture(config)
    name = "model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(HeadwiseError, match=rf"{name} has shape \(3, 36\).* it is \(16, 36\)"):
        arch.read_layer(config, 0, tensors | {name: tensors[name][:3]})
    with pytest.raises(HeadwiseError, match=rf"{name} is missing.*\(16, 36\)"):
        arch.read_layer(config, 0, without(tensors, name))


def test_writing_refuses_what_the_stock_class_has_no_room_for():
    model, config = tiny_models.build("qwen3")
    arch = architecture.find_architecture(config)
    weights = arch.read_layer(config, 0, tiny_models.checkpoint(model))
    norms = weights.k_norm.clone()
    norms[0] += 1
    with pytest.raises(ValueError, match="heads share the weight of k_norm"):
        arch.write_layer(config, 0, replace(weights, k_norm=norms), torch.float32)
    column = torch.zeros(*weights.q.shape[:2], 1)
    written = arch.write_layer(config, 0, replace(weights, q=torch.cat([weights.q, column], 2)), torch.float32)
    assert set(written) == set(arch.tensor_names(config, 0))
    with pytest.raises(ValueError, match="no room"):
        arch.write_layer(config, 0, replace(weights, q=torch.cat([weights.q, column + 1], 2)), torch.float32)


def test_an_unknown_or_missing_key_in_the_table_is_an_error():
    text = (Path(table.__file__).parent / "architectures.yaml").read_text()
    assert table.parse_table(text) == table.load_table()
    with pytest.raises(ValueError, match=r"llama: unknown keys \['fussion'\], missing \['fusion'\]"):
        table.parse_table(text.replace("fusion: none", "fussion: none"))
    with pytest.raises(ValueError, match=r"norms: unknown keys \['ofset'\]"):
        table.parse_table(text.replace("offset:", "ofset:", 1))
    with pytest.raises(ValueError, match=r"llava: unknown keys \['prefix'\]"):
        table.parse_table(text.replace("    text_key:", "    prefix: x\n    text_key:", 1))
    with pytest.raises(ValueError, match=r"the table: unknown keys \['more'\]"):
        table.parse_table(text + "\nmore: {}\n")


@pytest.mark.skipif(not SHARED_CONFIGS.is_dir(), reason="needs the shared test configs")
def test_every_shared_config_has_layouts_or_a_reason():
    accepted, refused = set(), set()
    for path in sorted(SHARED_CONFIGS.glob("*/config.json")):
        config = json.loads(path.read_text())
        index = path.with_name("model.safetensors.index.json")
        names = json.loads(index.read_text())["weight_map"] if index.exists() else {}
        try:
            arch = architecture.find_architecture(config, names)
            quantization_of(config)
        except HeadwiseError:
            refused.add(config["model_type"])
            continue
        accepted.add(config["model_type"])
        for layer in range(len(arch.layouts(config)) if names else 0):
            assert set(arch.tensor_names(config, layer)) <= set(names)
    assert accepted >= {"llama", "mistral", "mixtral", "qwen3", "qwen3_moe", "phi3", "gemma", "gpt_neox", "gpt_oss"}
    assert refused >= {
        "gpt2",
        "deepseek_v3",
        "llama4",
        "qwen",
        "mimo",
        "mixformer-sequential",
    }


@pytest.mark.parametrize(
    "change", [{"num_labels": 20_000_000}, {"id2label": {str(i): "x" for i in range(10_001)}}, {"num_labels": 1e9}]
)
def test_more_labels_than_any_model_has_are_refused(change):
    with pytest.raises(HeadwiseError, match="labels, and the most is 10,000"):
        stock_config({"model_type": "llama"} | change)
    with pytest.raises(HeadwiseError, match="labels, and the most is 10,000"):
        stock_text_config("llama", {"model_type": "llama"} | change)


@pytest.mark.parametrize("model_type", sorted(tiny_models.CONFIGS))
def test_no_row_has_a_class_that_reads_a_number_of_kv_heads_for_each_layer(model_type: str) -> None:
    """`per_layer_config` of transformers: the classes read one number, and the config then refuses to give it."""
    config = tiny_models.config_of(model_type)
    arch = architecture.find_architecture(config)
    text = arch.text_config(config)
    if arch.num_key_value_heads is None:
        pytest.skip("the class reads no number of KV heads at all")
    layout = arch.layouts(config)[0]
    other = layout.num_attention_heads if layout.num_key_value_heads == 1 else 1
    text["per_layer_config"] = {"0": {arch.num_key_value_heads: other}}
    with pytest.raises(HeadwiseError, match="per_layer_config"):
        architecture.find_architecture(config)
    with pytest.raises(RuntimeError, match="per-layer attribute"), torch.device("meta"):
        getattr(transformers, arch.auto_class).from_config(stock_config(config))


@pytest.mark.parametrize(
    ("model_type", "config", "remedy"),
    [
        ("qwen3_moe", {"norm_topk_prob": "no"}, "Correct the field"),
        ("olmoe", {"clip_qkv": 8.0}, "Leave the model as it is"),
    ],
)
def test_a_refused_field_has_a_remedy(model_type: str, config: dict[str, object], remedy: str) -> None:
    whole = tiny_models.config_of(model_type) | config
    with pytest.raises(HeadwiseError, match=next(iter(config))) as refusal:
        architecture.find_architecture(whole).layouts(whole)
    assert remedy in (refusal.value.hint or "")


@pytest.mark.parametrize(
    ("model_type", "field"),
    [("mixtral", "num_local_experts"), ("qwen3_moe", "num_experts"), ("deepseek_v3", "n_routed_experts")],
)
def test_more_experts_for_a_token_than_a_layer_has_are_refused(model_type, field):
    sizes = {field: 5, "num_experts_per_tok": 5}
    assert stock_text_config(model_type, sizes).num_experts_per_tok == 5
    for experts in (0, 1):  # a dense model
        stock_text_config(model_type, sizes | {field: experts})
    with pytest.raises(HeadwiseError, match=rf"num_experts_per_tok: 6, and {field}: 5: .* more experts than"):
        stock_text_config(model_type, sizes | {"num_experts_per_tok": 6})
