"""Extended configs, read by the stock classes of every row."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from headwise.convert.positions import context
from headwise.errors import HeadwiseError, SettingError
from headwise.models import architecture, rope
from tests import tiny_models

LENGTH = 512


def tiny(model_type: str, **overrides: Any) -> tuple[dict[str, Any], architecture.Architecture]:
    config = tiny_models.config_of(model_type, **overrides)
    return config, architecture.find_architecture(config)


def extended(config: dict[str, Any], rule: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    theta = 5e7 if rule == "base" else None
    return context.extend_context(
        config, architecture.find_architecture(config), context=LENGTH, rule=rule, rope_theta=theta, **options
    )


@pytest.mark.parametrize("model_type", sorted(tiny_models.CONFIGS))
def test_every_rule_on_every_row_gives_the_frequencies_of_the_stock_class(model_type: str) -> None:
    config, arch = tiny(model_type)
    if model_type == "gpt_oss":  # the stock default reaches 131,072 tokens by yarn
        config, arch = tiny(model_type, rope_parameters={"rope_type": "default", "rope_theta": 1e4})
    before = copy.deepcopy(config)
    expressed = 0
    for rule in rope.RULES:
        try:
            new, notes = extended(config, rule)
        except HeadwiseError as error:
            assert "cannot" in error.message, error
            continue
        expressed += 1
        assert notes
        assert context.verify_frequencies(new, arch, LENGTH) <= 1e-6
        kept = arch.stock_config(new).max_position_embeddings
        assert kept == (arch.stock_config(config).max_position_embeddings if rule == "dynamic" else LENGTH)
    assert config == before
    assert expressed >= 1


@pytest.mark.parametrize("rule", rope.RULES)
@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("llama", {"head_dim": 64, "max_position_embeddings": 128}),
        ("gpt_neox", {"hidden_size": 9 * 64, "max_position_embeddings": 128}),
    ],
)
def test_a_reloaded_model_rotates_by_the_pure_frequencies(
    rule: str, model_type: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """No code is shared with `verify_frequencies`: a whole model, from a file, in either spelling."""
    config, arch = tiny(model_type, **overrides)
    new, _ = extended(config, rule)
    (layers,) = context.rope_sets(new, arch)
    for spelling in ("rope_parameters", "rope_scaling"):
        (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in new.items() if k != spelling}))
        stock = AutoConfig.from_pretrained(tmp_path)
        model = AutoModelForCausalLM.from_config(stock)
        base = getattr(model, model.base_model_prefix)
        model(torch.arange(8)[None] + 3)
        short, scale = rope.frequencies(layers.parameters, layers.rotary_dim, stock.max_position_embeddings, 8)
        torch.testing.assert_close(base.rotary_emb.inv_freq.double(), short, rtol=1e-6, atol=0)
        assert base.rotary_emb.attention_scaling == pytest.approx(scale, rel=1e-7)
        model(torch.full((1, LENGTH), 5))
        long, _ = rope.frequencies(layers.parameters, layers.rotary_dim, stock.max_position_embeddings, LENGTH)
        torch.testing.assert_close(base.rotary_emb.inv_freq.double(), long, rtol=1e-6, atol=0)


def test_only_layers_with_a_longer_window_are_extended() -> None:
    config, _ = tiny("gemma3_text")
    new, notes = extended(config, "ntk")
    before, after = config["rope_parameters"], new["rope_parameters"]
    assert after["sliding_attention"] == before["sliding_attention"]
    assert after["full_attention"]["rope_theta"] > before["full_attention"]["rope_theta"]
    assert any("sliding_attention" in note for note in notes)


def test_windows_within_the_present_context_need_no_new_frequencies() -> None:
    config, _ = tiny("mistral")
    new, notes = extended(config, "auto")
    assert new["rope_parameters"]["rope_theta"] == 10000.0
    assert new["max_position_embeddings"] == LENGTH
    assert "their frequencies stay" in notes[0]


def test_the_language_model_inside_a_wrapper_is_extended() -> None:
    config, _ = tiny("gemma3")
    new, _ = extended(config, "yarn")
    assert new["text_config"]["rope_parameters"]["full_attention"]["rope_type"] == "yarn"
    assert new["text_config"]["max_position_embeddings"] == LENGTH


def test_a_config_with_other_frequencies_in_the_stock_class_is_refused() -> None:
    config, arch = tiny("llama")
    new, _ = extended(config, "yarn")
    for key, value in (("rope_theta", 7.0), ("rope_scaling", {"rope_type": "linear", "factor": 2.0})):
        with pytest.raises(HeadwiseError, match="the stock llama class has frequencies that differ"):
            context.verify_frequencies(new | {key: value}, arch, LENGTH)


def test_scaled_sources_of_real_models_compose() -> None:
    llama3 = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config, arch = tiny("llama", head_dim=128, max_position_embeddings=131072, rope_parameters=llama3)
    new, notes = context.extend_context(config, arch, context=524288)
    assert new["rope_parameters"] == llama3 | {"factor": 32.0}
    assert "auto chose llama3" in notes[0]
    with pytest.raises(HeadwiseError, match="only llama3 composes"):
        context.extend_context(config, arch, context=524288, rule="ntk")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 128}, "`context` 128 is not larger than the present max_position_embeddings: 128"),
        ({"context": 64}, "is not larger"),
        ({"context": 512, "rule": "base"}, "`rope` base needs the new base"),
        ({"context": 512, "rule": "ntk", "rope_theta": 1e6}, "`rope` ntk takes no `rope_theta`"),
        ({"context": 512, "rope_theta": 100.0}, "above the present 10000"),
        ({"context": 512, "rule": "nkt"}, "`rope` is 'nkt', which is not one of base, ntk"),
    ],
)
def test_bad_requests(options: dict[str, Any], message: str) -> None:
    config, arch = tiny("llama")
    with pytest.raises(HeadwiseError, match=message):
        context.extend_context(config, arch, **options)


def test_a_rule_the_stock_class_cannot_hold_is_refused() -> None:
    config, arch = tiny("phi3")
    with pytest.raises(HeadwiseError, match="phi3 cannot express yarn scaling"):
        context.extend_context(config, arch, context=512, rule="yarn")


@pytest.mark.parametrize("model_type", ["gpt2", "mpt", "bloom"])
def test_models_without_rope_are_refused(model_type: str) -> None:
    config = AutoConfig.for_model(model_type).to_dict()
    with pytest.raises(HeadwiseError):
        context.extend_context(config, architecture.find_architecture(config), context=10**6)


@pytest.mark.parametrize(
    ("rope_parameters", "trained", "reached"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 128, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512, 512),
        ({"rope_type": "linear", "factor": 4.0}, 128, 512),
        ({"rope_type": "dynamic", "factor": 4.0}, 128, 512),
    ],
)
def test_the_factor_of_a_scaled_source_is_counted_once(
    rope_parameters: dict[str, Any], trained: int, reached: int
) -> None:
    theta = {"rope_theta": 10000.0}
    config, arch = tiny("llama", max_position_embeddings=trained, rope_parameters=rope_parameters | theta)
    with pytest.raises(SettingError, match=f"`context` {reached} is not larger than .*{reached}"):
        context.extend_context(config, arch, context=reached)
    kind = rope_parameters["rope_type"]
    new, _ = context.extend_context(config, arch, context=2 * reached, rule=kind)
    assert new["rope_parameters"]["factor"] == 2 * reached / 128
    again, _ = context.extend_context(new, arch, context=4 * reached, rule=kind)
    assert again["rope_parameters"]["factor"] == 4 * reached / 128


def test_a_linear_source_that_may_state_its_whole_length_is_named() -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config, arch = tiny("llama", max_position_embeddings=512, rope_parameters=linear)
    with pytest.raises(SettingError, match="2048 tokens that its linear scaling reaches") as refused:
        context.extend_context(config, arch, context=1024, rule="linear")
    assert "add original_max_position_embeddings: 128 to config.json" in str(refused.value.hint)
    _, notes = context.extend_context(config, arch, context=4096, rule="linear")
    assert "taken as the length before the linear factor 4" in notes[0]
    stated = config | {"original_max_position_embeddings": 128}
    new, notes = context.extend_context(stated, arch, context=1024, rule="linear")
    assert new["rope_parameters"]["factor"] == 8.0 and not any("taken as" in note for note in notes)


def test_a_larger_base_on_a_linear_source_counts_from_what_it_reaches() -> None:
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    config, arch = tiny("llama", max_position_embeddings=128, rope_parameters=linear)
    new, _ = context.extend_context(config, arch, context=1024, rule="ntk")
    assert new["rope_parameters"]["rope_theta"] == pytest.approx(rope.ntk_base(10000.0, 2.0, 8))
    assert new["original_max_position_embeddings"] * new["rope_parameters"]["factor"] == 1024


def test_a_config_with_frequencies_by_layer_type_states_its_whole_length() -> None:
    config, arch = tiny("gemma3_text")
    config["rope_parameters"]["full_attention"] |= {"rope_type": "linear", "factor": 8.0}
    new, _ = context.extend_context(config, arch, context=256, rule="linear")
    assert new["rope_parameters"]["full_attention"]["factor"] == 16.0
