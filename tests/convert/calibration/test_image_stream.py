"""Moments of visual and text tokens, against the whole model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from headwise import convert_model, verify_model
from headwise.convert.calibration import image_stream
from headwise.convert.calibration.calibration_plan import CalibrationPlan, plan_notes
from headwise.convert.calibration.image_stream import ImageStream, balanced_weights, reading_order
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.choose import choose_target
from headwise.convert.refit.regression import apply_attention
from headwise.convert.settings import ConvertSettings
from headwise.errors import HeadwiseError, SettingError
from headwise.io.reader import open_checkpoint
from headwise.measure.image_prompts import ImagePrompt, ImagePrompts, read_image_pairs
from headwise.models.architecture import find_architecture
from headwise.models.stock import load_model
from tests import small_parents, tiny_models
from tests.convert.speaking import SHAPE, save_speaking

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 6}
SEED = 1  # reads two prompts in the other order


def random_prompts(model_type: str, folder: Path) -> list[ImagePrompt]:
    """Two prompts of other lengths and images, for a model without a processor."""
    model: Any = load_model(open_checkpoint(folder), "AutoModelForImageTextToText", torch.float32)
    prompts = []
    for row, length in enumerate((None, -3)):
        given = tiny_models.image_inputs(model)
        if model_type == "mllama":  # one of its two rows, with padding tiles
            given = {name: value[row : row + 1] for name, value in given.items()}
        for name in ("input_ids", "attention_mask", "mm_token_type_ids", "cross_attention_mask"):
            if name in given:
                given[name] = given[name][:, :length]
        given["pixel_values"] = given["pixel_values"] * (1 if length is None else -1)
        visual = given["input_ids"][0] == 60
        prompts.append(ImagePrompt(given, visual, ~visual))
    return prompts


def compare(folder: Path, prompts: Any) -> list[LayerRecord]:
    """Compare what is recorded with what the modules of the whole model get and give."""
    source = open_checkpoint(folder)
    arch = find_architecture(source.config, source.tensors)
    whole = load_model(source, arch.auto_class, torch.float32).eval()
    attending = [i for i, layout in enumerate(arch.layouts(source.config)) if layout.attends]
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {layer: [] for layer in attending}
    prompts_read = [prompts[number] for number in reading_order(len(prompts), SEED)]

    def note(layer: int) -> Any:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            output = output[0] if isinstance(output, tuple) else output
            seen[layer].append((inputs.flatten(0, -2), output.flatten(0, -2)))

        return hook

    for layer in attending:
        whole.get_submodule(arch.attention_path(layer)).register_forward_hook(note(layer), with_kwargs=True)
    with torch.no_grad():
        for prompt in prompts_read:
            whole(**prompt.inputs, use_cache=False)
    stream = ImageStream(source, arch, prompts, seed=SEED)
    records = list(stream.records(attending, keep_activations=True))
    assert [record.index for record in records] == attending
    visual = [prompt.visual for prompt in prompts_read]
    text = [prompt.text for prompt in prompts_read]
    weights = balanced_weights([each & (not arch.cross_states(source.config)) for each in visual], text)
    for record in records:
        assert record.inputs is not None and record.outputs is not None
        total, expected = 0.0, torch.zeros(())
        of_text = arch.layouts(source.config)[record.index].on_text
        for i, (x, y) in enumerate(seen[record.index]):
            w = weights[i] if of_text else torch.ones(len(x))
            if arch.at(record.index)[0].states is not None:  # the text before the image reads none
                w = w * (torch.arange(len(x)) > 1)
            torch.testing.assert_close(record.inputs[i, : len(x)], x)
            torch.testing.assert_close(record.outputs[i, : len(y)], y * w.sqrt()[:, None])
            assert not record.outputs[i, len(y) :].any()
            x, w = x[1:].double(), w[1:].double()
            total, expected = total + float(w.sum()), expected + x.mT @ (w[:, None] * x)
        torch.testing.assert_close(record.moment[:-1, :-1], expected / total, rtol=1e-4, atol=1e-5)
        chosen = torch.tensor([1, 0])
        module = whole.get_submodule(arch.attention_path(record.index))
        with torch.no_grad():
            again = apply_attention(module, record, record.inputs[chosen], chosen)
        torch.testing.assert_close(again, record.outputs[chosen])
    return records


def cross_moments(folder: Path, prompts: list[ImagePrompt], layer: int) -> dict[str, torch.Tensor]:
    """Compute the moments of a cross-attention of mllama from its projections, without padding tiles or masks."""
    source = open_checkpoint(folder)
    arch = find_architecture(source.config, source.tensors)
    whole = load_model(source, arch.auto_class, torch.float32).eval()
    module: Any = whole.get_submodule(arch.attention_path(layer))
    calls: list[dict[str, torch.Tensor]] = []
    module.register_forward_hook(lambda _, __, kwargs, ___: calls.append(kwargs), with_kwargs=True)
    read, averages, received = [], [], []
    with torch.no_grad():
        for prompt in prompts:
            whole(**prompt.inputs, use_cache=False)
            tiles = calls[-1]["cross_attention_states"][prompt.inputs["aspect_ratio_mask"][0, 0] > 0]
            states, x = tiles.flatten(0, 1), calls[-1]["hidden_states"][0, 2:]
            queries = module.q_norm(module.q_proj(x).unflatten(1, (9, 8)))
            keys = module.k_norm(module.k_proj(states).unflatten(1, (3, 8))).repeat_interleave(3, 1)
            p = (torch.einsum("qhd,nhd->hqn", queries, keys) * 8**-0.5).softmax(-1).double()
            read.append(torch.cat([states, torch.ones(len(states), 1)], 1).double())
            averages.append((p @ read[-1]).flatten(0, 1))
            received.append(p.sum((0, 1)))
    x, y, share = torch.cat(read), torch.cat(averages), torch.cat(received)
    return {
        "states_moment": x.mT @ x / len(x),
        "value_moment": y.mT @ y / len(y),
        "key_moment": x.mT @ (share[:, None] * x) / share.sum(),
    }


def test_both_kinds_of_tokens_count_as_much() -> None:
    # Image, text and template.
    kinds = [torch.tensor([2, 0, 0, 0, 0, 0, 0, 2, 1]), torch.tensor([0, 1, 2, 1])]
    visual, text = [each == 0 for each in kinds], [each == 1 for each in kinds]
    weights, joined = torch.cat(balanced_weights(visual, text)), torch.cat(kinds)
    assert float(weights[joined == 0].sum()) == pytest.approx(float(weights[joined == 1].sum()))
    assert bool((weights[joined == 2] == 1).all())
    assert float(weights.mean()) == pytest.approx(1)
    nothing = [torch.zeros_like(each) for each in visual]
    assert all(bool((each == 1).all()) for each in balanced_weights(nothing, text))


def test_a_processor_feeds_the_text_model(tmp_path: Path) -> None:
    folder = small_parents.seeing_parent(tmp_path / "model", **HEADS)
    part = "{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}"
    (folder / "chat_template.jinja").write_text(f"{{% for m in messages %}}{{{{ m.role }}}}:{part} {{% endfor %}}")
    pairs = read_image_pairs(small_parents.image_pairs(tmp_path / "pairs", 5))
    prompts = ImagePrompts(pairs, folder, "model", tiny_models.read_config(folder))
    records = compare(folder, prompts)
    assert all(record.value_moment is not None for record in records)


@pytest.mark.parametrize("model_type", ["exaone4_5", "molmo2", "lfm3_vl", "qwen3_vl", "mllama"])
def test_towers_and_cross_attention_are_measured(tmp_path: Path, model_type: str) -> None:
    folder = tiny_models.save(model_type, tmp_path / "model")
    prompts = random_prompts(model_type, folder)
    records = compare(folder, prompts)
    crossing = [record for record in records if record.states_moment is not None]
    assert len(crossing) == (2 if model_type == "mllama" else 0)
    for record in crossing:
        expected = cross_moments(folder, prompts, record.index)
        for name, moment in expected.items():
            torch.testing.assert_close(getattr(record, name), moment, rtol=1e-4, atol=1e-5, msg=name)


class Counted(list[ImagePrompt]):
    """Prompts that count how often one is read."""

    read = 0

    def __getitem__(self, number: Any) -> Any:
        self.read += 1
        return super().__getitem__(number)


def test_what_is_kept_of_the_pairs_bounds_the_layers_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_models.save("mllama", tmp_path / "model")
    source = open_checkpoint(folder)
    prompts = random_prompts("mllama", folder)
    arch = find_architecture(source.config, source.tensors)

    def passes(free: float, keep: bool) -> int:
        monkeypatch.setattr(image_stream, "available_memory", lambda _: free / image_stream.SHARE_OF_RECORDS + 1)
        counted: Any = Counted(prompts)
        assert len(list(ImageStream(source, arch, counted).records(range(4), keep_activations=keep))) == 4
        return (counted.read - 1) // len(prompts) - 1  # beside the tokens of all, and the size of the largest

    moments = 4 * 4 * 8 * 73**2
    inputs_and_outputs = 4 * len(prompts) * 2 * 4 * 12 * 72
    states = len(prompts) * 4 * 4 * 5 * 72  # four tiles of five patches
    assert passes(0, keep=True) == 4
    assert passes(moments, keep=False) == 1
    assert passes(moments + inputs_and_outputs, keep=True) > 1
    assert passes(moments + inputs_and_outputs + 2 * states, keep=True) == 1


def test_pairs_are_read_in_an_order_of_the_seed() -> None:
    order = reading_order(200, 1)
    assert sorted(order) == list(range(200))
    assert order == reading_order(200, 1) != reading_order(200, 2)
    assert max(order[:16]) > 100  # those whose attention weights are measured


def test_the_plan_names_the_pairs_that_are_measured(tmp_path: Path) -> None:
    parent = open_checkpoint(tiny_models.save("llava", tmp_path / "model"))
    arch = find_architecture(parent.config, parent.tensors)
    settings = ConvertSettings(to="mqa")
    target = choose_target(parent, arch, settings)
    pairs = CalibrationPlan("pairs.jsonl", 20, 24, 0, 0, images=Path("pairs.jsonl"))
    notes = list(plan_notes(arch, target, pairs, settings))
    assert any("measured on 16 of the pairs" in note for note in notes)
    assert not any(
        "of the pairs" in note for note in plan_notes(arch, target, replace(pairs, sequences=16), settings)
    )


def test_images_calibrate_a_conversion(tmp_path: Path) -> None:
    folder = small_parents.seeing_parent(tmp_path / "model", **HEADS)
    pairs = small_parents.image_pairs(tmp_path / "pairs")
    moments = tmp_path / "moments"
    result = convert_model(
        folder, tmp_path / "out", to="gqa", groups=3, images=pairs, refit=5, save_moments=moments
    )
    assert verify_model(tmp_path / "out", folder).passed
    assert all(report["output"]["after"] < report["output"]["before"] for report in result.layers.values())
    assert any("12 image-text pairs" in line for line in str(result.plan).splitlines())
    assert not result.plan.warnings
    again = convert_model(folder, tmp_path / "again", to="gqa", groups=3, moments=moments)
    assert [r["groups"] for r in again.layers.values()] == [r["groups"] for r in result.layers.values()]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"groups": 6}, "`images` has no effect: an exact conversion measures nothing"),
        ({"groups": 3, "method": "mean"}, "`images` has no effect: `method` mean measures nothing without a refit"),
    ],
)
def test_images_that_nothing_reads_are_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    folder = small_parents.seeing_parent(tmp_path / "model", **HEADS)
    with pytest.raises(SettingError, match=message) as caught:
        convert_model(folder, tmp_path / "out", to="gqa", images=tmp_path / "none.jsonl", **more)
    assert caught.value.field == "images"


@pytest.mark.parametrize("text", ["word " * 600, "<image> and <image>"])
def test_a_faulty_pair_stops_before_any_output(tmp_path: Path, text: str) -> None:
    folder = small_parents.seeing_parent(tmp_path / "model", **HEADS)
    pairs = small_parents.image_pairs(tmp_path / "pairs", 3)
    pairs.write_text(pairs.read_text() + json.dumps({"image": "0.png", "text": text}) + "\n")
    with pytest.raises(HeadwiseError, match="line 4"):
        convert_model(folder, tmp_path / "out", to="gqa", groups=3, images=pairs, save_moments=tmp_path / "moments")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "pairs"]


def test_images_of_several_tiles_calibrate_cross_attention(tmp_path: Path) -> None:
    folder = small_parents.tiled_parent(tmp_path / "model")
    pairs = small_parents.image_pairs(tmp_path / "pairs", 4)
    lines = pairs.read_text().replace('"text": "', '"text": "before <|image|> ')
    pairs.write_text(lines)
    prompt = ImagePrompts(read_image_pairs(pairs), folder, "model", tiny_models.read_config(folder))[0]
    assert prompt.inputs["pixel_values"].shape[2] == 4 and not prompt.inputs["cross_attention_mask"][0, 0].any()
    result = convert_model(folder, tmp_path / "out", to="mqa", images=pairs, refit=5)
    assert verify_model(tmp_path / "out", folder).passed
    assert len(result.layers) == 4 and all("output" in report for report in result.layers.values())


def test_a_tower_is_calibrated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_models.save("exaone4_5", tmp_path / "model")
    prompts = random_prompts("exaone4_5", folder)

    class Given(list[ImagePrompt]):
        """In place of a processor's prompts."""

    for module in ("image_stream", "calibrate"):
        monkeypatch.setattr(f"headwise.convert.calibration.{module}.open_prompts", lambda *_: Given(prompts))
    result = convert_model(
        folder, tmp_path / "out", to="gqa", part=["text=1", "vision=2"], images=tmp_path / "x.jsonl"
    )
    assert verify_model(tmp_path / "out", folder).passed
    assert not result.plan.warnings
    assert all("output" in report for report in result.layers.values()) and len(result.layers) == 5

    tower: dict[str, Any] = {"to": "gqa", "part": "vision=2", "verify": False}
    moments = tmp_path / "moments"
    first = convert_model(folder, tmp_path / "first", images=tmp_path / "x.jsonl", save_moments=moments, **tower)
    again = convert_model(folder, tmp_path / "again", moments=moments, **tower)
    assert not again.plan.warnings
    for ours, theirs in zip(again.layers.values(), first.layers.values(), strict=True):
        assert ours["groups"] == theirs["groups"] and ours["key_error"] == pytest.approx(theirs["key_error"])
    # Moments of text hold nothing of a tower.
    for layer in first.layers:
        (moments / f"layer-{layer:05d}.safetensors").unlink()
    with pytest.raises(SettingError, match="`moments` acts on layers that text runs"):
        convert_model(folder, tmp_path / "none", moments=moments, **tower)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"to": "mla", "exact": True}, "`images` acts only with `to` gqa or `to` mqa"),
        ({"to": "mqa", "calibrate": "mixture"}, "`images` and `calibrate` contradict"),
        ({"to": "mqa", "refit": "joint"}, "`refit` joint trains on text alone"),
        ({"to": "mqa"}, "reads no images"),
    ],
)
def test_what_images_do_not_allow_is_refused(tmp_path: Path, more: dict[str, Any], message: str) -> None:
    folder = save_speaking(tmp_path / "model", **SHAPE)
    with pytest.raises(SettingError, match=message):
        convert_model(folder, tmp_path / "out", images=tmp_path / "pairs.jsonl", **more)
