"""Windows as the stock classes really apply them: attention weights, not config fields."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from headwise.convert.pipeline import convert_model
from headwise.convert.plan import Plan
from headwise.convert.positions import windows
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.models import architecture
from headwise.models.layout import CacheSize
from tests import tiny_models

WINDOW = 4
BARE = {"llama": {"attention_bias": False}}


def windowed(model_type: str, window: int | None, layers: str = "all") -> tuple[Any, Any, dict[str, Any]]:
    """The source model, the same weights under the new config, and that config."""
    model, config = tiny_models.build(model_type, **BARE.get(model_type, {}))
    new = windows.with_window(config, architecture.find_architecture(config), window, layers)
    arch = architecture.find_architecture(new)
    stock = transformers.AutoConfig.for_model(**new)
    other = getattr(transformers, arch.auto_class).from_config(stock, attn_implementation="eager").eval()
    other.load_state_dict(model.state_dict())
    return model, other, new


def attended_tokens(model: Any) -> list[int]:
    """How many tokens the last position attends to, layer by layer."""
    with torch.no_grad():
        attentions = model(tiny_models.tokens(12), output_attentions=True).attentions
    return [int((weights[0, 0, -1] > 0).sum()) for weights in attentions]


def expressible(layers: str) -> list[str]:
    found = []
    for model_type in sorted(tiny_models.CONFIGS):
        config = tiny_models.config_of(model_type, **BARE.get(model_type, {}))
        try:
            windows.with_window(config, architecture.find_architecture(config), WINDOW, layers)
        except HeadwiseError:
            continue
        found.append(model_type)
    return found


@pytest.mark.parametrize("model_type", expressible("all"))
def test_all_layers(model_type: str) -> None:
    _, other, new = windowed(model_type, WINDOW)
    assert set(attended_tokens(other)) == {WINDOW}
    layouts = architecture.find_architecture(new).layouts(new)
    cache, per_token = CacheSize.of(layouts, torch.int8), sum(a.cache_elements_per_token for a in layouts)
    assert cache.bytes_per_token == per_token
    assert set(cache.at.values()) == {per_token * WINDOW}


@pytest.mark.parametrize("model_type", expressible("alternate"))
def test_alternate_layers(model_type: str) -> None:
    _, other, _ = windowed(model_type, WINDOW, "alternate")
    attended = attended_tokens(other)
    assert attended == [WINDOW if layer % 2 == 0 else 12 for layer in range(len(attended))]


@pytest.mark.parametrize("model_type", ["mistral", "ministral", "qwen2", "gemma2", "starcoder2"])
def test_the_inverse(model_type: str) -> None:
    config = tiny_models.config_of(model_type)
    arch = architecture.find_architecture(config)
    if not any(layout.sliding_window for layout in arch.layouts(config)):
        config = windows.with_window(config, arch, WINDOW)
    new = windows.with_window(config, arch, None)
    stock = transformers.AutoConfig.for_model(**new)
    model = transformers.AutoModelForCausalLM.from_config(stock, attn_implementation="eager").eval()
    assert set(attended_tokens(model)) == {12}


def test_mistral_as_ministral_computes_the_same_outside_its_windows() -> None:
    model, other, new = windowed("mistral", WINDOW, "1")
    assert new["architectures"] == ["MinistralForCausalLM"]
    with torch.no_grad():
        short = tiny_models.tokens(WINDOW)
        torch.testing.assert_close(other(short).logits, model(short).logits, rtol=0, atol=1e-6)


@pytest.mark.parametrize("layers", [[0], [0, 2], [1, 2, 3], [0, 2, 3, 4, 7, 9]])
def test_layers_are_written_as_they_are_read(layers: list[int]) -> None:
    assert windows.parse_layers(windows.format_layers(layers), 10) == layers
    assert len(windows.format_layers(layers)) <= 9


def test_types_without_a_window_per_layer_are_refused_with_those_that_have_one() -> None:
    config = tiny_models.config_of("starcoder2")
    with pytest.raises(HeadwiseError, match="the stock starcoder2 class has no window per layer") as refused:
        windows.require_choice(config, architecture.find_architecture(config))
    named = refused.value.message.partition("these types have one: ")[2].rstrip(".").split(", ")
    assert set(named) >= {"llama", "mistral", "qwen2", "qwen3", "gemma2", "gpt_oss", "smollm3"}
    assert not set(named) & {"mixtral", "starcoder2", "gpt_neox", "cohere2"}
    for model_type in ("llama", "mistral", "qwen3"):
        config = tiny_models.config_of(model_type)
        windows.require_choice(config, architecture.find_architecture(config))


def test_llama_as_mistral_computes_llama_with_a_mask() -> None:
    model, other, new = windowed("llama", WINDOW)
    assert new["model_type"] == "mistral" and new["architectures"] == ["MistralForCausalLM"]
    tokens = tiny_models.tokens(12)
    distance = torch.arange(12)[:, None] - torch.arange(12)
    allowed = (distance >= 0) & (distance < WINDOW)
    mask = torch.zeros(12, 12).masked_fill(~allowed, torch.finfo(torch.float32).min).expand(2, 1, 12, 12)
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask).logits
        torch.testing.assert_close(other(tokens).logits, expected, rtol=0, atol=1e-5)
        assert (model(tokens).logits - expected).abs().max() > 1e-2


def test_the_source_config_is_not_touched() -> None:
    config = tiny_models.config_of("qwen2")
    before = copy.deepcopy(config)
    windows.with_window(config, architecture.find_architecture(config), WINDOW, "1")
    assert config == before


@pytest.mark.parametrize(
    ("text", "layers"),
    [("all", [0, 1, 2, 3]), ("alternate", [0, 2]), ("3", [3]), ("0,2-3", [0, 2, 3]), (" 1 , 1 ", [1])],
)
def test_layer_lists(text: str, layers: list[int]) -> None:
    assert windows.parse_layers(text, 4) == layers


@pytest.mark.parametrize("text", ["", "some", "1,,2", "-1", "3-1", "4", "0-4", "1.5"])
def test_bad_layer_lists(text: str) -> None:
    with pytest.raises(HeadwiseError, match="window_layers"):
        windows.parse_layers(text, 4)


@pytest.mark.parametrize(
    ("model_type", "window", "layers", "message"),
    [
        ("llama", WINDOW, "all", "attention_bias: true"),
        ("gpt_neox", WINDOW, "all", "the stock gpt_neox class has no sliding window"),
        ("mixtral", WINDOW, "alternate", "one window for all layers"),
        ("gemma3_text", WINDOW, "all", "decides how its positions rotate"),
        ("qwen2", 0, "all", "is not between 1 and"),
        ("qwen2", 128, "all", "is not between 1 and"),
        ("qwen3", None, "all", "no layer of this model has a window"),
    ],
)
def test_refusals(model_type: str, window: int | None, layers: str, message: str) -> None:
    config = tiny_models.config_of(model_type)
    with pytest.raises(HeadwiseError, match=message):
        windows.with_window(config, architecture.find_architecture(config), window, layers)


@pytest.mark.parametrize(
    ("layers", "stock_class", "engine"),
    [
        ("all", "MistralForCausalLM", "llama.cpp: loads, and computes another function"),
        ("alternate", "MinistralForCausalLM", "vllm: does not load"),
    ],
)
def test_the_plan_names_the_new_class_and_the_engines_without_its_window(
    tmp_path: Path, layers: str, stock_class: str, engine: str
) -> None:
    model = tiny_models.save("llama", tmp_path / "model", attention_bias=False)
    plan = convert_model(model, tmp_path / "out", sliding_window=WINDOW, window_layers=layers, dry_run=True)
    assert isinstance(plan, Plan)
    assert f"The stock class becomes {stock_class}" in " ".join(plan.notes)
    assert any(verdict.line.startswith(engine) for verdict in plan.engines)


@pytest.mark.parametrize("model_type", ["mistral", "qwen2"])
def test_windows_are_removed_and_heads_become_mla_in_one_conversion(tmp_path: Path, model_type: str) -> None:
    model = tiny_models.save(model_type, tmp_path / "model")
    with pytest.raises(HeadwiseError, match="no stock MLA model has a sliding window"):
        convert_model(model, tmp_path / "out", to="mla", exact=True)
    convert_model(model, tmp_path / "out", to="mla", exact=True, sliding_window=0)
    assert verify_model(tmp_path / "out", model).passed


def test_a_window_of_no_layer_does_not_hinder_mla(tmp_path: Path) -> None:
    model = tiny_models.save("qwen2", tmp_path / "model", max_window_layers=2)
    convert_model(model, tmp_path / "out", to="mla", exact=True)
