"""The parts of a model that a conversion changes, and models whose parts convert exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM

from headwise import bench_model, convert_model, evaluate_model, inspect_model, sample_text, verify_model
from headwise.convert.gqa.merge import replicate_heads
from headwise.convert.pipeline import ConvertResult
from headwise.convert.verify.grouped import RepeatedAttention
from headwise.errors import HeadwiseError, SettingError
from headwise.format import size
from headwise.io.reader import open_checkpoint
from headwise.io.source import EMBEDDED_MODEL
from headwise.models import table
from headwise.models.architecture import Architecture, find_architecture
from headwise.models.layout import LINEAR
from headwise.text.pairs import PairMarks, encode_pairs
from tests import small_parents, tiny_models
from tests.models.test_architecture import random_gauge

# Models with attention that text does not run.
UNREAD = ["exaone4_5", "molmo2", "lfm3_vl", "dia", "canary", "moonshine_streaming"]
WEIGHTS_ALONE: dict[str, Any] = {"calibrate": "none", "refit": "off"}
TO_GQA = {"to": "gqa", "calibrate": "none", "refit": "off"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny_models.save("t5gemma", tmp_path / "model", num_attention_heads=12, num_key_value_heads=6)


@pytest.fixture
def merged_model(tmp_path: Path) -> Path:
    """Self- and cross-attention are one: 12 query heads and 6 KV heads; the encoder has 6 and 3."""
    folder = small_parents.tiny_parent(tmp_path / "merged", "t5gemma2", num_key_value_heads=6)
    small_parents.pairs(tmp_path / "pairs.jsonl")
    return folder


def counts_of(folder: Path) -> tuple[int, int]:
    config = json.loads((folder / "config.json").read_text())
    encoder = config["encoder"].get("text_config", config["encoder"])
    return encoder["num_key_value_heads"], config["decoder"]["num_key_value_heads"]


@pytest.mark.parametrize(
    ("settings", "counts"),
    [
        ({"groups": 2}, (3, 2)),
        ({"groups": 3, "part": "cross"}, (3, 3)),
        ({"part": ["decoder=2", "encoder=1"]}, (1, 2)),
        ({"groups": 1, "part": ["encoder", "decoder=3"]}, (1, 3)),
    ],
)
def test_each_part_gets_its_number(model: Path, tmp_path: Path, settings: dict[str, Any], counts: Any) -> None:
    result = convert_model(model, tmp_path / "out", **TO_GQA, **settings)
    assert counts_of(tmp_path / "out") == counts
    assert result.verification is not None and result.verification.passed
    assert verify_model(tmp_path / "out", model).passed
    lines = str(result.plan).splitlines()
    assert any(line.startswith("encoder: ") and "no cache to save" in line for line in lines)
    assert any(line.startswith("decoder: ") and "cache per decoder token" in line for line in lines)
    assert any(line.startswith("cross: ") and "cache per encoder token" in line for line in lines)


@pytest.mark.parametrize(
    ("settings", "counts"), [({"groups": 2}, (3, 2)), ({"part": ["decoder=1", "encoder=1"]}, (1, 1))]
)
def test_attention_to_both_sides_at_once_gets_its_number(
    merged_model: Path, tmp_path: Path, settings: dict[str, Any], counts: Any
) -> None:
    """Every layer of the decoder caches tokens of both kinds, and calibration reads both."""
    result = convert_model(
        merged_model,
        tmp_path / "out",
        to="gqa",
        calibrate=str(tmp_path / "pairs.jsonl"),
        calibration_tokens=2048,
        refit=2,
        **settings,
    )
    assert isinstance(result, ConvertResult) and counts_of(tmp_path / "out") == counts
    assert result.verification is not None and result.verification.passed
    assert verify_model(tmp_path / "out", merged_model).passed
    lines = str(result.plan).splitlines()
    each = 3 * 2 * 8 * 4  # layers, keys and values, head dim, bytes
    assert any(line.startswith("encoder: ") and "no cache to save" in line for line in lines)
    assert any(
        line.startswith("decoder: ")
        and f"cache per decoder or encoder token {size(6 * each)} -> {size(counts[1] * each)}" in line
        for line in lines
    )
    assert result.plan.cache_after.bytes_per_token == 2 * counts[1] * each
    assert all("refit" in result.layers[layer] for layer in (2, 3, 4))
    network = loaded_whole(tmp_path / "out").float().eval()
    cache = network(**tiny_models.inputs_of(network), use_cache=True).past_key_values
    for side in (cache.self_attention_cache, cache.cross_attention_cache):
        assert {layer.keys.shape[1] for layer in side.layers} == {counts[1]}


def test_joint_moments_lose_less_than_the_mean(merged_model: Path, tmp_path: Path) -> None:
    """And as many KV heads as before are the same bytes."""
    given = {"to": "gqa", "refit": "off", "verify": False}
    joint = {"calibrate": str(tmp_path / "pairs.jsonl"), "calibration_tokens": 4096}
    marks = PairMarks.of(
        {},
        find_architecture(tiny_models.read_config(merged_model)).stock_config(
            tiny_models.read_config(merged_model)
        ),
    )
    held = encode_pairs(
        [(f"def g{n}(y): return y + {n}", f"adds {n}") for n in range(16)],
        transformers.AutoTokenizer.from_pretrained(merged_model),
        marks,
        32,
    )

    def outputs(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return loaded_whole(folder).float().eval()(**held.model_inputs()).logits[held.target_mask]

    before, errors = outputs(merged_model), {}
    for method, calibration in (("mean", {"calibrate": "none"}), ("optimal", joint)):
        convert_model(merged_model, tmp_path / method, groups=3, method=method, **given, **calibration)
        errors[method] = float((outputs(tmp_path / method) - before).square().mean())
    assert errors["optimal"] < 0.8 * errors["mean"], errors
    convert_model(merged_model, tmp_path / "same", groups=6, **given)
    same, source = (load_file(folder / "model.safetensors") for folder in (tmp_path / "same", merged_model))
    assert same.keys() == source.keys() and all(torch.equal(same[name], source[name]) for name in source)


@pytest.mark.parametrize(
    ("settings", "field", "message"),
    [
        ({"groups": 2, "part": "text"}, "part", "t5gemma has encoder, decoder, cross"),
        ({"part": ["decoder=2", "cross=3"]}, "part", "one number for both"),
        ({"groups": 2, "context": 4096}, "context", "acts on decoder-only models"),
        ({"groups": 2, "sliding_window": 4}, "sliding_window", "acts on decoder-only models"),
        ({"groups": 4}, "groups", "Layer 2 has 6 key-value heads, which cannot become 4"),
    ],
)
def test_what_the_parts_do_not_allow_is_refused(
    model: Path, tmp_path: Path, settings: dict[str, Any], field: str, message: str
) -> None:
    with pytest.raises(SettingError, match=message) as caught:
        convert_model(model, tmp_path / "out", **TO_GQA, **settings)
    assert caught.value.field == field and not (tmp_path / "out").exists()


def test_a_joint_refit_and_mla_are_refused(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="trains decoder-only models"):
        convert_model(model, tmp_path / "out", to="mqa", refit="joint")
    with pytest.raises(HeadwiseError, match="cannot become MLA"):
        convert_model(model, tmp_path / "out", to="mla", cache=0.5)


def test_the_other_verbs_refuse_an_encoder_decoder_before_any_work(model: Path, tmp_path: Path) -> None:
    calls = [
        lambda: bench_model(model, model, context=8),
        lambda: sample_text(model, tmp_path / "out.jsonl", tokens=64),
    ]
    for call in calls:
        with pytest.raises(HeadwiseError, match="is an encoder-decoder model"):
            call()
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_decoder_only_model_has_the_part_text(tmp_path: Path) -> None:
    llama = tiny_models.save("llama", tmp_path / "llama")
    convert_model(llama, tmp_path / "out", to="mqa", part="text", calibrate="none", refit="off")
    assert tiny_models.read_config(tmp_path / "out")["num_key_value_heads"] == 1
    with pytest.raises(SettingError, match="llama has text"):
        convert_model(llama, tmp_path / "out", to="mqa", part="cross", calibrate="none")


def logits(folder: Path) -> torch.Tensor:
    loaded = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad(), tiny_models.float64_throughout():
        return loaded(**tiny_models.inputs_of(loaded)).logits


def test_an_encoder_has_no_cache_to_save(tmp_path: Path) -> None:
    folder = tiny_models.save("eurobert", tmp_path / "model", num_attention_heads=12, num_key_value_heads=6)
    inspection = inspect_model(folder)
    assert inspection.cache.bytes_per_token == 0 and {o.saved for o in inspection.options} == {0.0}
    result = convert_model(folder, tmp_path / "out", **TO_GQA, groups=3)
    assert "encoder: GQA, 6 KV heads -> GQA, 3 KV heads; no cache to save" in str(result.plan)
    assert result.plan.parameters_after < result.plan.parameters_before
    assert result.verification is not None and result.verification.passed
    assert verify_model(tmp_path / "out", folder).passed
    assert convert_model(tmp_path / "out", tmp_path / "back", to="mha").verification.passed  # type: ignore[union-attr]
    with pytest.raises(SettingError, match="trains decoder-only models"):
        convert_model(folder, tmp_path / "no", to="mqa", refit="joint")
    with pytest.raises(HeadwiseError, match="cannot be evaluated"):
        evaluate_model(tmp_path / "out", folder)


def test_cross_attention_to_an_image_is_merged_without_moments(tmp_path: Path) -> None:
    folder = tiny_models.save("mllama", tmp_path / "model", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    result = convert_model(folder, tmp_path / "out", to="mqa", calibration_tokens=512, refit=2)
    assert isinstance(result, ConvertResult)
    lines = str(result.plan).splitlines()
    assert any(line.startswith("text: ") and "cache per token" in line for line in lines)
    assert any(line.startswith("cross: ") and "cache per encoder token" in line for line in lines)
    assert any("No images are read" in line for line in lines)
    assert "refit" in result.layers[0] and "refit" not in result.layers[1]
    assert verify_model(tmp_path / "out", folder).passed


def test_moments_of_an_encoder_decoder_are_saved_and_used_again(tmp_path: Path) -> None:
    folder = tiny_models.save("t5gemma", tmp_path / "model", vocab_size=2048)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((EMBEDDED_MODEL / name).read_bytes())
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"source": f"def f{n}(x): return x * {n}", "target": f"multiplies by {n}"} for n in range(40)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"to": "mqa", "refit": "off", "method": "aligned"}
    first = convert_model(
        folder,
        tmp_path / "a",
        **given,
        calibrate=str(pairs),
        calibration_tokens=4096,
        save_moments=tmp_path / "moments",
    )
    second = convert_model(folder, tmp_path / "b", **given, moments=tmp_path / "moments")
    assert isinstance(first, ConvertResult) and isinstance(second, ConvertResult)
    for layer in (2, 3):
        assert first.layers[layer]["value_error"] == pytest.approx(second.layers[layer]["value_error"], rel=1e-4)
        assert first.layers[layer]["value_error"] > 0


def double_heads(folder: Path) -> dict[str, Any]:
    """Give every part twice the KV heads, each second one the first in other coordinates, and return the config.

    A part with as many KV heads as query heads stays as it is.
    """
    config = tiny_models.read_config(folder)
    tensors = {name: tensor.double() for name, tensor in load_file(folder / "model.safetensors").items()}
    arch = find_architecture(config, tensors)
    layouts = arch.layouts(config)
    doubled = {i: layout for i, layout in enumerate(layouts) if layout.part != LINEAR and layout.kind != "mha"}
    twice = arch.with_groups(config, {x.part: 2 * x.num_key_value_heads for x in doubled.values()})
    for layer in doubled:
        gauged = random_gauge(replicate_heads(arch.read_layer(config, layer, tensors), 2), seed=layer)
        tensors |= arch.write_layer(twice, layer, gauged, torch.float64)
    rounded = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(twice))
    return config


@pytest.mark.parametrize(
    "model_type", [*sorted(table.load_table().wrappers), "mllama", "exaone4_5", "molmo2", "t5gemma2"]
)
def test_an_image_in_the_prompt_gives_the_same_logits(tmp_path: Path, model_type: str) -> None:
    """Half the heads are copies in other coordinates: a conversion to half changes nothing, with an image too."""
    heads = {"num_attention_heads": 12, "num_key_value_heads": 3}
    if model_type.startswith("qwen"):
        heads |= (
            {"head_dim": 8} if model_type == "qwen3_vl" else {"num_attention_heads": 14, "num_key_value_heads": 7}
        )
    folder = tiny_models.save(model_type, tmp_path / "model", **heads)
    double_heads(folder)

    before, moved = image_logits(loaded_whole(folder))
    assert float((moved - before).abs().max()) > 1e-3, "the image has no effect"
    result = convert_model(folder, tmp_path / "out", **TO_GQA, groups=heads["num_key_value_heads"])
    after = image_logits(loaded_whole(tmp_path / "out"))[0]
    assert float((after - before).abs().max() / before.abs().max()) < 1e-4
    assert result.verification is not None and result.verification.passed


def loaded_whole(path: Path) -> Any:
    auto_class = find_architecture(tiny_models.read_config(path)).auto_class
    return getattr(transformers, auto_class).from_pretrained(
        path, dtype=torch.float64, experts_implementation="eager"
    )


def image_logits(network: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of a prompt with an image, and with the image's numbers in another order."""
    given = tiny_models.image_inputs(network)
    given["pixel_values"] = given["pixel_values"].double()
    other = given | {"pixel_values": given["pixel_values"].flip(-1)}
    return logits_of(network, given), logits_of(network, other)


def logits_of(network: Any, given: dict[str, torch.Tensor] | None = None) -> torch.Tensor:
    with torch.no_grad(), tiny_models.float64_throughout():
        return network.eval()(**(given or tiny_models.inputs_of(network))).logits


def unread_layers(arch: Architecture, config: dict[str, Any]) -> list[int]:
    layouts = arch.layouts(config)
    return [layer for layer, layout in enumerate(layouts) if layout.attends and not layout.on_text]


@pytest.mark.parametrize("model_type", UNREAD)
def test_what_text_does_not_run_takes_fewer_kv_heads(tmp_path: Path, model_type: str) -> None:
    folder = tiny_models.save(model_type, tmp_path / "model")
    config = tiny_models.read_config(folder)
    tensors = load_file(folder / "model.safetensors")
    arch = find_architecture(config, tensors)
    unread = unread_layers(arch, config)
    layouts = arch.layouts(config)
    counts = {layouts[layer].part: layouts[layer].num_key_value_heads for layer in unread}
    before = logits_of(loaded_whole(folder))
    # As many groups as there are KV heads: the same bytes.
    same = convert_model(folder, tmp_path / "same", to="gqa", part=[f"{p}={n}" for p, n in counts.items()])
    assert same.verification is not None and same.verification.passed
    assert all(torch.equal(t, tensors[n]) for n, t in load_file(tmp_path / "same" / "model.safetensors").items())
    # Fewer of them: the stock class computes what the merged heads compute, repeated for every query head.
    fewer = {part: count // (2 if count % 2 == 0 else 3) for part, count in counts.items()}
    parts = [f"{part}={count}" for part, count in fewer.items()]
    result = convert_model(folder, tmp_path / "out", to="gqa", part=parts, **WEIGHTS_ALONE, verify=False)
    assert verify_model(tmp_path / "out", folder).passed
    assert any("the weights alone decide" in line for line in result.plan.warnings)
    after = logits_of(loaded_whole(tmp_path / "out"))
    assert float((after - before).abs().max() / before.abs().max()) > 1e-4
    repeated = logits_of(RepeatedAttention(open_checkpoint(tmp_path / "out")).whole_model())
    assert float((after - repeated).abs().max() / after.abs().max()) < 1e-9
    merged = load_file(tmp_path / "out" / "model.safetensors")
    unchanged = {name for name, tensor in merged.items() if torch.equal(tensor, tensors[name])}
    names = {n for layer in unread for n in arch.tensor_names(config, layer) if "norm" not in n}
    assert names == tensors.keys() - unchanged
    # Back to as many as query heads: nothing is lost.
    back = convert_model(tmp_path / "out", tmp_path / "back", to="mha", part=list(fewer))
    assert back.verification is not None and back.verification.passed
    torch.testing.assert_close(logits_of(loaded_whole(tmp_path / "back")), after)


def test_a_tower_under_its_old_name_converts(tmp_path: Path) -> None:
    """Published molmo2 configs count more layers than there are, from the last one, and the class counts anew."""
    variant = {"qk_norm_type": "olmo", "norm_after": True, "rope_scaling_layers": [1]}
    folder = tiny_models.save("molmo2", tmp_path / "model", **variant)
    before = logits_of(loaded_whole(folder))
    config = tiny_models.read_config(folder)
    config["vit_config"] = config.pop("vision_config") | {"num_hidden_layers": 4}
    config["adapter_config"]["vit_layers"] = [-3, -4]
    del config["adapter_config"]["vision_feature_layer"]
    (folder / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(loaded_whole(folder)), before)
    parts = ["text=1", "vision=2"]
    result = convert_model(folder, tmp_path / "out", to="gqa", part=parts, **WEIGHTS_ALONE, verify=False)
    assert verify_model(tmp_path / "out", folder).passed
    assert [layout.part for layout in result.plan.layouts_after] == ["text"] * 2 + ["vision"] * 2
    written = tiny_models.read_config(tmp_path / "out")
    assert "vision_config" not in written
    assert [written[key]["num_key_value_heads"] for key in ("text_config", "vit_config")] == [1, 2]
    after = logits_of(loaded_whole(tmp_path / "out"))
    repeated = logits_of(RepeatedAttention(open_checkpoint(tmp_path / "out")).whole_model())
    assert float((after - repeated).abs().max() / after.abs().max()) < 1e-9
    assert float((after - before).abs().max() / before.abs().max()) > 1e-4
    with pytest.raises(HeadwiseError, match=r"rope_scaling_layers: \[1\], and no scaling reaches"):
        convert_model(folder, tmp_path / "longer", context=256)


def test_a_kind_with_a_number_of_its_own_changes_alone(tmp_path: Path) -> None:
    folder = tiny_models.save("dia", tmp_path / "model")
    convert_model(folder, tmp_path / "cross", to="gqa", part="cross=1", **WEIGHTS_ALONE)
    decoder = tiny_models.read_config(tmp_path / "cross")["decoder_config"]
    assert (decoder["cross_num_key_value_heads"], decoder["num_key_value_heads"]) == (1, 3)
    # By default, what is cached: the decoder and its cross-attention, each at one KV head.
    result = convert_model(folder, tmp_path / "out", to="mqa", **WEIGHTS_ALONE)
    config = tiny_models.read_config(tmp_path / "out")
    assert config["encoder_config"]["num_key_value_heads"] == 6
    assert [config["decoder_config"][f"{kind}num_key_value_heads"] for kind in ("", "cross_")] == [1, 1]
    lines = [str(part) for part in result.plan.parts]
    assert any("cache per encoder token" in line for line in lines if line.startswith("cross"))
    network = loaded_whole(tmp_path / "out").float().eval()
    cache = network(**tiny_models.inputs_of(network), use_cache=True).past_key_values
    assert cache.self_attention_cache.layers[0].keys.shape[1] == 1
    assert cache.cross_attention_cache.layers[0].keys.shape[1] == 1


@pytest.mark.parametrize("model_type", UNREAD)
def test_a_gauge_of_what_text_does_not_run_moves_no_logit(tmp_path: Path, model_type: str) -> None:
    folder = tiny_models.save(model_type, tmp_path / "model")
    before = logits_of(loaded_whole(folder))
    config, tensors = tiny_models.read_config(folder), load_file(folder / "model.safetensors")
    arch = find_architecture(config, tensors)
    gauged = {n: t.double() for n, t in tensors.items()}
    for layer in unread_layers(arch, config):
        weights = arch.read_layer(config, layer, gauged)
        gauged |= arch.write_layer(config, layer, random_gauge(weights, seed=layer), torch.float64)
    rounded = {n: t.float().contiguous() for n, t in gauged.items()}
    save_file(rounded, folder / "model.safetensors", {"format": "pt"})
    moved = logits_of(loaded_whole(folder))
    assert float((moved - before).abs().max() / before.abs().max()) < 1e-5
    assert any(not torch.equal(gauged[n].float(), tensors[n]) for n in tensors)


@pytest.mark.parametrize("model_type", ["exaone4_5", "molmo2"])
def test_text_and_tower_change_in_one_command(tmp_path: Path, model_type: str) -> None:
    """The text is calibrated, and the tower is not."""
    folder = small_parents.tiny_parent(tmp_path / "model", model_type)
    text = small_parents.text(tmp_path / "text.txt")
    result = convert_model(
        folder,
        tmp_path / "out",
        to="gqa",
        part=["text=1", "vision=2"],
        calibrate=str(text),
        calibration_tokens=2048,
        refit="off",
    )
    assert isinstance(result, ConvertResult) and result.verification is not None and result.verification.passed
    config = tiny_models.read_config(tmp_path / "out")
    assert [config[key]["num_key_value_heads"] for key in ("text_config", "vision_config")] == [1, 2]
    for layer, layout in enumerate(result.plan.layouts_after):
        assert ("output" in result.layers[layer]) == layout.on_text
    assert verify_model(tmp_path / "out", folder).passed
    longer = convert_model(folder, tmp_path / "longer", context=256, verify=False)
    assert isinstance(longer, ConvertResult) and longer.plan.layouts_after == longer.plan.layouts_before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refit": "layers"}, "acts on layers that text runs"),
        ({"refit": "joint"}, "does not run all layers that change"),
        ({"save_moments": "moments"}, "acts on layers that text runs"),
        ({"part": "cross", "groups": 2}, "exaone4_5 has text, vision"),
    ],
)
def test_what_a_vision_tower_does_not_allow_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    folder = tiny_models.save("exaone4_5", tmp_path / "model")
    with pytest.raises(SettingError, match=message):
        convert_model(folder, tmp_path / "out", **{"to": "gqa", "part": "vision=2", **settings})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("model_type", ["t5gemma", "t5gemma2"])
@pytest.mark.parametrize("grouping", ["optimal", "contiguous"])
def test_heads_that_compute_the_same_merge_without_loss(tmp_path: Path, grouping: str, model_type: str) -> None:
    """Every second KV head is the first one in other coordinates, in all parts: half the heads are enough."""
    folder = tiny_models.save(model_type, tmp_path / "model")
    double_heads(folder)
    before = logits(folder)
    convert_model(
        folder, tmp_path / "out", **TO_GQA, part=["encoder=3", "decoder=3"], method="optimal", grouping=grouping
    )
    assert counts_of(tmp_path / "out") == (3, 3)
    assert float((logits(tmp_path / "out") - before).abs().max() / before.abs().max()) < 1e-4
