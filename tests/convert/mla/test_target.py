"""MLA folders from end to end: exact ones compute the parent's logits, lossy ones have the planned cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM, Phi3Config

from headwise.compat import cache_of
from headwise.convert import layers
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.plan import Plan
from headwise.convert.refit.regression import refit
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError, SettingError
from headwise.io.source import EMBEDDED_MODEL
from headwise.io.workdir import Interrupted
from headwise.models import deepseek
from headwise.models.layout import AttentionLayout, LatentWeights
from headwise.models.norm_free import from_norm_free_state, norm_free_attention
from tests import tiny_models
from tests.convert.speaking import TEXT, contents, save_speaking

PLAIN = {"mistral": {"sliding_window": None}, "qwen2": {"use_sliding_window": False}}
TYPES = ["llama", "mistral", "qwen2", "phi3", "granite", "smollm3"]


def passed(result: Any) -> Any:
    """The result of a conversion whose own checks passed."""
    assert isinstance(result, ConvertResult) and result.verification
    assert result.verification.passed, result.verification.failures
    return result


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model, as a user loads it."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(tiny_models.tokens()).logits


def cached(model: Any) -> list[int]:
    """Cache elements per token of every layer, after generation."""
    output = model.generate(
        tiny_models.tokens()[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    return [x.keys[0, :, 0].numel() + x.values[0, :, 0].numel() for x in cache_of(output).layers]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Every type as it comes; every kind of sharing once with rotation in all layers and once without it in some.
@pytest.mark.parametrize(
    ("model_type", "shared"),
    [*((t, "gqa") for t in TYPES), *((t, s) for t in ("llama", "smollm3") for s in ("mha", "mqa"))],
)
def test_an_exact_folder_computes_the_parents_logits(model_type: str, shared: str, tmp_path: Path) -> None:
    heads = tiny_models.CONFIGS[model_type]["num_attention_heads"]
    own = tiny_models.CONFIGS[model_type]["num_key_value_heads"]
    groups = {"mha": heads, "gqa": own, "mqa": 1}[shared]
    more = PLAIN.get(model_type, {}) | {"num_key_value_heads": groups}
    parent = tiny_models.save(model_type, tmp_path / "parent", **more)
    result = passed(convert_model(parent, tmp_path / "out", to="mla", exact=True, dtype="float32"))
    child, source = load(tmp_path / "out"), load(parent)
    assert type(child) is DeepseekV3ForCausalLM
    assert relative(logits(child), logits(source)) < 1e-5
    assert "exact" in {name: detail for name, _, detail in result.verification.checks}["parent"]
    assert cached(child) == [layout.cache_elements_per_token for layout in result.plan.layouts_after]
    # SmolLM3's layers without RoPE keep keys in the latent, and all layers share one shape.
    if shared == "mqa" and model_type != "smollm3":
        assert max(cached(child)) <= max(cached(source))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight KV heads of 8 dimensions: 128 cache elements per token and layer."""
    return save_speaking(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def folders(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An exact and a lossy conversion of the model."""
    folders = tmp_path_factory.mktemp("mla")
    convert_model(model, folders / "exact", to="mla", exact=True, verify=False)
    convert_model(model, folders / "lossy", to="mla", rank=24, rope_dim=8, calibrate="none", verify=False)
    return folders


@pytest.mark.parametrize("rope_frequencies", ["default", "free"])
@pytest.mark.parametrize("method", ["optimal", "transmla"])
@pytest.mark.parametrize("shape", [{"rank": 20, "rope_dim": 4}, {"cache": 0.25}], ids=["shape", "share"])
def test_a_lossy_folder_has_the_planned_cache(
    model: Path, tmp_path: Path, shape: dict[str, Any], method: str, rope_frequencies: str
) -> None:
    options = {"method": method, "rope_frequencies": rope_frequencies, "calibrate": "none"}
    result = passed(convert_model(model, tmp_path / "out", to="mla", **shape, **options))
    wanted = 32 if "cache" in shape else 24
    assert cached(load(tmp_path / "out")) == [wanted] * 2
    assert [layout.cache_elements_per_token for layout in result.plan.layouts_after] == [wanted] * 2
    written = config(tmp_path / "out")
    assert written["kv_lora_rank"] + written["qk_rope_head_dim"] == wanted
    if rope_frequencies == "default":
        assert written["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_an_exact_plan_has_no_notes_on_approximations(model: Path, tmp_path: Path) -> None:
    words = ("Not calibrated", "A smaller `rank`")
    for settings, number in (({"exact": True}, 0), ({"cache": 0.5, "calibrate": "none"}, 2)):
        plan = convert_model(model, tmp_path / "out", to="mla", dry_run=True, **settings)  # type: ignore[arg-type]
        assert isinstance(plan, Plan) and any("weights grow" in note for note in plan.notes)
        assert sum(word in note for word in words for note in plan.notes) == number


def test_a_cache_row_of_engines_is_taken_only_where_heads_fit(tmp_path: Path) -> None:
    shape = {"hidden_size": 768, "num_attention_heads": 3, "num_key_value_heads": 3, "attention_bias": False}
    for head_dim, row in ((64, 288), (128, 512)):
        source = tiny_models.save("llama", tmp_path / f"{head_dim}", head_dim=head_dim, **shape)
        arguments: dict[str, Any] = {"to": "mla", "cache": 0.75 if head_dim == 64 else 0.7, "calibrate": "none"}
        plan = convert_model(source, tmp_path / "out", dry_run=True, **arguments)
        assert isinstance(plan, Plan)
        assert plan.layouts_after[0].cache_elements_per_token == row
        assert any("for which engines have kernels" in note for note in plan.notes) == (head_dim == 128)
    for cache, row, command in ((0.125, 48, "pip install path/to/headwise"), (0.8, 320, "vllm serve OUT")):
        plan = convert_model(
            tmp_path / "64", tmp_path / "out", to="mla", cache=cache, engines="vllm", dry_run=True, calibrate="none"
        )
        assert isinstance(plan, Plan) and plan.layouts_after[0].cache_elements_per_token == row
        assert plan.engines[0].commands[0] == command, "a row that vLLM alone serves is chosen if it is near"
    shape |= {"hidden_size": 160, "num_attention_heads": 2, "num_key_value_heads": 2}
    source = tiny_models.save("llama", tmp_path / "320", head_dim=80, **shape)
    with pytest.raises(SettingError, match="is not longer than it") as caught:
        convert_model(source, tmp_path / "out", to="mla", cache=0.05, engines="vllm", dry_run=True)
    assert caught.value.hint == "Leave out the engine.", "a row of 320 is the whole cache of this model"


def test_partial_rope_keeps_whole_planes_of_every_head(model: Path, tmp_path: Path) -> None:
    options = {"method": "partial-rope", "calibrate": "none"}
    plan = convert_model(model, tmp_path / "plan", to="mla", cache=0.5, dry_run=True, **options)
    assert isinstance(plan, Plan) and plan.config["qk_rope_head_dim"] % 16 == 0
    passed(convert_model(model, tmp_path / "out", to="mla", rank=32, rope_dim=16, **options))
    assert cached(load(tmp_path / "out")) == [48] * 2
    with pytest.raises(HeadwiseError, match="8 KV heads needs a rope_dim that is a multiple of 16"):
        convert_model(model, tmp_path / "no", to="mla", rank=32, rope_dim=8, **options)


@pytest.mark.parametrize("method", ["transmla", "partial-rope"])
def test_the_published_methods_refuse_layers_without_rope(tmp_path: Path, method: str) -> None:
    parent = tiny_models.save("smollm3", tmp_path / "parent")
    with pytest.raises(HeadwiseError, match="layer 1 does not"):
        convert_model(parent, tmp_path / "no", to="mla", rank=12, rope_dim=4, method=method, calibrate="none")
    passed(convert_model(parent, tmp_path / "out", to="mla", rank=12, rope_dim=4, calibrate="none"))


def test_a_larger_shape_comes_closer_and_the_full_one_reaches_the_parent(model: Path, tmp_path: Path) -> None:
    wanted, errors = logits(load(model)), []
    for rank, rope_dim in ((8, 4), (32, 16), (48, 64)):
        out = tmp_path / str(rank)
        options = {"rope_frequencies": "free", "calibrate": "none", "verify": False}
        convert_model(model, out, to="mla", rank=rank, rope_dim=rope_dim, **options)
        errors.append(float((logits(load(out)) - wanted).norm() / wanted.norm()))
    assert errors[0] > 1.2 * errors[1] and errors[2] < 1e-4, errors


def test_a_refit_lowers_the_error_on_text_it_did_not_learn_from(model: Path, tmp_path: Path) -> None:
    options = {"to": "mla", "rank": 24, "rope_dim": 8, **TEXT, "calibration_tokens": 32 * 96, "refit": 100}
    result = passed(convert_model(model, tmp_path / "a" / "out", **options))
    for layer in (0, 1):
        solved, found = result.layers[layer]["output"], result.layers[layer]["refit"]
        assert solved["kept"] and solved["after"] < solved["before"]
        assert found["kept"] and found["steps"] == 100 and found["after"] < 0.95 * found["before"]
    convert_model(model, tmp_path / "b" / "out", **options)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")
    convert_model(model, tmp_path / "c", **options, seed=1, verify=False)
    name = "model.layers.0.self_attn.kv_b_proj.weight"
    first, other = (load_file(f / "model.safetensors")[name] for f in (tmp_path / "a" / "out", tmp_path / "c"))
    assert not torch.equal(first, other)


@pytest.mark.parametrize("biased", [False, True])
def test_the_norm_free_module_and_back_give_the_same_tensors(folders: Path, biased: bool) -> None:
    heads, rank, rope_dim, nope, value, hidden = 8, 24, 8, 8, 8, 48
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = hidden + biased
    latent = LatentWeights(
        layout=AttentionLayout(heads, heads, nope + rope_dim, value, rope_dim, None, rank, rope_dim),
        q_nope=random(heads, nope, inputs),
        q_rope=random(heads, rope_dim, inputs),
        kv_down=random(rank, inputs),
        k_rope=random(rope_dim, inputs),
        k_up=random(heads, nope, rank),
        v_up=random(heads, value, rank),
        o=random(heads, hidden, value),
        frequencies=deepseek.default_grid(1e4, rope_dim),
        scale=0.3,
    )
    o_bias = random(hidden) if biased else None
    module = norm_free_attention(config(folders / "lossy"), 0, latent, o_bias, torch.device("cpu"))
    again, bias_again = from_norm_free_state(module.state_dict(), latent)
    options = {"q_lora_rank": hidden + 1 if biased else None, "dtype": torch.float64}
    direct = deepseek.attention_tensors(latent, "a", o_bias=o_bias, **options)
    through = deepseek.attention_tensors(again, "a", o_bias=bias_again, **options)
    assert direct.keys() == through.keys()
    if biased:  # two factors are only determined up to a sign: their product is
        for tensors in (direct, through):
            down = [tensors.pop(f"a.q_a_proj.{part}") for part in ("weight", "bias")]
            tensors["product"] = tensors.pop("a.q_b_proj.weight") @ torch.cat([down[0], down[1][:, None]], 1)
    for name, tensor in direct.items():
        assert relative(through[name], tensor) < 1e-6, name


def test_bfloat16_is_as_close_to_float64_as_the_parents_own(tmp_path: Path) -> None:
    parent = tiny_models.save("phi3", tmp_path / "parent", torch.bfloat16)
    passed(convert_model(parent, tmp_path / "out", to="mla", exact=True))
    with tiny_models.float64_throughout():
        truth = logits(load(parent, torch.float64))

    def error(folder: Path) -> float:
        return float((logits(load(folder, torch.bfloat16)).double() - truth).square().mean().sqrt())

    assert error(tmp_path / "out") < 1.5 * error(parent)


@pytest.mark.parametrize("rule", ["ntk", "base", "linear", "yarn", "llama3"])
def test_a_longer_context_has_the_frequencies_of_the_rule(model: Path, tmp_path: Path, rule: str) -> None:
    positions = {"context": 128, "rope": rule} | ({"rope_theta": 5e4} if rule == "base" else {})
    convert_model(model, tmp_path / "long", **positions, verify=False)
    passed(convert_model(model, tmp_path / "exact", to="mla", exact=True, **positions))
    long = config(tmp_path / "long")
    assert config(tmp_path / "exact")["max_position_embeddings"] == long["max_position_embeddings"] == 128
    assert relative(logits(load(tmp_path / "exact")), logits(load(tmp_path / "long"))) < 1e-5
    plan = convert_model(model, tmp_path / "plan", to="mla", cache=0.25, dry_run=True, **positions)
    assert isinstance(plan, Plan) and any("default grid" in w for w in plan.warnings) == (
        rule not in ("ntk", "base")
    )
    if rule in ("ntk", "base"):
        convert_model(model, tmp_path / "lossy", to="mla", cache=0.25, calibrate="none", verify=False, **positions)
        lossy = config(tmp_path / "lossy")
        assert lossy["rope_parameters"] == {"rope_type": "default", "rope_theta": long["rope_theta"]}
        assert lossy["rope_theta"] == long["rope_theta"] > 10000


@pytest.mark.parametrize("rule", ["dynamic", "longrope"])
def test_frequencies_that_change_with_the_length_are_refused(model: Path, tmp_path: Path, rule: str) -> None:
    with pytest.raises(HeadwiseError, match=f"{rule} frequencies change with the length"):
        convert_model(model, tmp_path / "out", to="mla", exact=True, context=128, rope=rule)
    assert list(tmp_path.iterdir()) == []


Tensors = dict[str, Tensor]
UP = "model.layers.1.self_attn.kv_b_proj.weight"


def change_up(tensors: Tensors) -> None:
    tensors[UP] *= 1.01


def drop_up(tensors: Tensors) -> None:
    del tensors[UP]


def break_norm(tensors: Tensors) -> None:
    tensors["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"] *= 1e6


def change_mlp(tensors: Tensors) -> None:
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.01


@pytest.mark.parametrize(
    ("kind", "change", "checks"),
    [
        ("exact", change_up, {"record", "parent"}),
        ("lossy", change_up, {"record"}),
        ("lossy", break_norm, {"record", "function", "loading"}),
        ("lossy", change_mlp, {"record", "parent"}),
        ("lossy", drop_up, {"tensors"}),
    ],
)
def test_verify_finds_changed_tensors(
    model: Path, folders: Path, tmp_path: Path, kind: str, change: Callable[[Tensors], None], checks: set[str]
) -> None:
    out = shutil.copytree(folders / kind, tmp_path / "out")
    assert verify_model(out, model).passed
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    found = verify_model(out, model)
    assert {name for name, passed, _ in found.checks if not passed} == checks, found.failures


@pytest.mark.parametrize("kind", ["exact", "lossy"])
def test_verify_finds_another_base(model: Path, folders: Path, tmp_path: Path, kind: str) -> None:
    out = shutil.copytree(folders / kind, tmp_path / "out")
    changed = config(out)
    changed["rope_theta"] = changed["rope_parameters"]["rope_theta"] = 12000.0
    (out / "config.json").write_text(json.dumps(changed))
    found = verify_model(out, model)
    assert "parent: config.json differs from the parent's in rope_theta" in found.failures


@pytest.mark.parametrize("heads", [8, 2], ids=["mha", "gqa"])
def test_queries_in_two_factors_have_the_parents_logits(tmp_path: Path, heads: int) -> None:
    shape = {"hidden_size": 40, "num_attention_heads": 10 if heads == 2 else 8, "num_key_value_heads": heads}
    parent = save_speaking(tmp_path / "parent", num_hidden_layers=3, head_dim=6, **shape)
    options = {"to": "mla", "rank": 16, "rope_dim": 6, "calibrate": "none", "engines": "llama.cpp"}
    result = passed(convert_model(parent, tmp_path / "out", **options))
    plain = passed(convert_model(parent, tmp_path / "plain", **options | {"engines": ()}))
    assert config(tmp_path / "out")["q_lora_rank"] == 40 and config(tmp_path / "plain")["q_lora_rank"] is None
    assert relative(logits(load(tmp_path / "out")), logits(load(tmp_path / "plain"))) < 1e-5
    assert [verdict.name for verdict in result.plan.engines] == ["llama.cpp"] and len(plain.plan.engines) == 4
    assert "--engine llama.cpp" in json.loads((tmp_path / "out" / "headwise.json").read_text())["command"]


def test_two_factors_of_trained_weights(tmp_path: Path) -> None:
    """The first layer of the embedded model."""
    model = AutoModelForCausalLM.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32, num_hidden_layers=1)
    model.save_pretrained(tmp_path / "model")
    options = {"to": "mla", "rank": 192, "rope_dim": 32, "calibrate": "none", "dtype": "float32", "verify": False}
    for name in ("plain", "factored"):
        convert_model(
            tmp_path / "model", tmp_path / name, **options, engines=["llama.cpp"] if name == "factored" else ()
        )
    tokens = torch.arange(2 * 40).reshape(2, 40)
    plain, factored = (load(tmp_path / name)(tokens).logits.detach() for name in ("plain", "factored"))
    assert relative(factored, plain) < 1e-5


def test_queries_have_one_factor_where_llama_cpp_reads_one(tmp_path: Path) -> None:
    parent = save_speaking(tmp_path / "parent", num_hidden_layers=26)
    options = {"to": "mla", "rank": 16, "rope_dim": 8, "calibrate": "none", "engines": "llama.cpp"}
    plan = convert_model(parent, tmp_path / "out", **options, dry_run=True)
    assert isinstance(plan, Plan) and plan.config["q_lora_rank"] is None


def test_heads_are_padded_for_vllm(tmp_path: Path) -> None:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 48}
    parent = save_speaking(tmp_path / "parent", hidden_size=256, **heads)
    options = {"to": "mla", "rank": 256, "rope_dim": 64, "calibrate": "none"}
    convert_model(parent, tmp_path / "plain", verify=False, **options)
    result = passed(convert_model(parent, tmp_path / "out", engines=["vllm"], **options))
    written = config(tmp_path / "out")
    assert [written[f"{part}_head_dim"] for part in ("qk_nope", "qk_rope", "v")] == [64, 64, 128]
    assert relative(logits(load(tmp_path / "out")), logits(load(tmp_path / "plain"))) < 1e-5
    assert result.plan.engines[0].serves


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 20, "rope_dim": 6, "engines": "vllm"}, "multiple of 8 up to 256"),
        ({"exact": True, "engines": "vllm"}, "rope type"),
        ({"exact": True, "engines": "llama.cpp"}, "longrope"),
    ],
)
def test_a_shape_that_a_named_engine_cannot_serve(
    model: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(SettingError, match=words) as caught:
        convert_model(model, tmp_path / "out", to="mla", **options)
    assert caught.value.field == "engines" and not list(tmp_path.iterdir())
    assert str(caught.value.hint).startswith("Leave out what keeps" if "exact" in options else "Give a `rope_dim`")


def test_a_shape_that_vllm_serves_with_the_plugin(model: Path, tmp_path: Path) -> None:
    commands = ("pip install path/to/headwise", "vllm serve OUT")
    for shape in ({"rank": 20, "rope_dim": 8}, {"cache": 0.25}):
        options = {"calibrate": "none", "engines": "vllm", "dry_run": True}
        plan = convert_model(model, tmp_path / "out", to="mla", **shape, **options)
        assert isinstance(plan, Plan) and plan.engines[0].commands == commands


def test_padded_heads_can_be_refitted(model: Path, tmp_path: Path) -> None:
    options = {"to": "mla", "rank": 24, "rope_dim": 8, **TEXT, "refit": 2}
    plain = passed(convert_model(model, tmp_path / "plain", **options))
    padded = passed(convert_model(model, tmp_path / "padded", pad_values=True, **options))
    assert config(tmp_path / "padded")["v_head_dim"] == 128
    assert padded.layers.keys() == plain.layers.keys()
    assert relative(logits(load(tmp_path / "padded")), logits(load(tmp_path / "plain"))) < 1e-3


def test_saved_moments_replace_the_text(model: Path, tmp_path: Path) -> None:
    options = {"to": "mla", "rank": 24, "rope_dim": 8, "refit": "off", "verify": False}
    convert_model(model, tmp_path / "direct", save_moments=tmp_path / "moments", **TEXT, **options)
    convert_model(model, tmp_path / "reused", moments=tmp_path / "moments", **options)
    convert_model(model, tmp_path / "blind", calibrate="none", **options)
    models = {name: load(tmp_path / name) for name in ("direct", "reused", "blind")}
    for ours, fitted in zip(models["reused"].model.layers, models["direct"].model.layers, strict=True):
        # Output matrices are fitted on the text itself, which moments do not keep.
        ours.self_attn.o_proj.load_state_dict(fitted.self_attn.o_proj.state_dict())
    direct, reused, blind = map(logits, models.values())
    # Moments are kept in float32, and the alternation carries their rounding on.
    assert relative(reused, direct) < 1e-3 < relative(blind, direct)


def test_resuming_gives_the_same_bytes(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"to": "mla", "rank": 24, "rope_dim": 8, **TEXT, "refit": 2}
    convert_model(model, tmp_path / "whole" / "out", **options)

    def second(attention: Any, parameters: Any, record: Any, **more: Any) -> Any:
        if record.index:
            raise KeyboardInterrupt
        return refit(attention, parameters, record, **more)

    out = tmp_path / "cut" / "out"
    with monkeypatch.context() as patch:
        patch.setattr(layers, "refit_layer", second)
        with pytest.raises(Interrupted, match="`resume`"):
            convert_model(model, out, **options)
    assert not out.exists()
    convert_model(model, out, **options, resume=True)
    assert contents(out) == contents(tmp_path / "whole" / "out")


def test_a_field_that_the_config_leaves_out_has_the_default_of_its_class(tmp_path: Path) -> None:
    model = tiny_models.save("phi3", tmp_path / "model", rms_norm_eps=1e-5, partial_rotary_factor=1.0)
    path = model / "config.json"
    fields = json.loads(path.read_text())
    assert Phi3Config().rms_norm_eps == fields.pop("rms_norm_eps") == 1e-5
    path.write_text(json.dumps(fields))
    convert_model(model, tmp_path / "out", to="mla", exact=True)
    logits = [
        AutoModelForCausalLM.from_pretrained(folder)(tiny_models.tokens()).logits
        for folder in (model, tmp_path / "out")
    ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)


NORMED = {"model_type": "qwen3", "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 10}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("refit_steps", ["off", 2])
def test_norms_on_queries_and_keys_become_linear_maps(tmp_path: Path, bias: bool, refit_steps: Any) -> None:
    parent = save_speaking(tmp_path / "parent", **NORMED, attention_bias=bias)
    options = {"to": "mla", "rank": 24, "rope_dim": 8, **TEXT, "refit": refit_steps}
    plan = convert_model(parent, tmp_path / "out", dry_run=True, **options)
    assert isinstance(plan, Plan) and not plan.exact
    assert any("Approximate: the source normalises queries and keys" in warning for warning in plan.warnings)
    assert any("measured in every layer during calibration" in note for note in plan.notes)
    result = passed(convert_model(parent, tmp_path / "out", **options))
    child = load(tmp_path / "out")
    assert type(child) is DeepseekV3ForCausalLM and cached(child) == [32, 32]
    assert not any("q_norm" in name or "k_norm" in name for name in child.state_dict())
    for report in result.layers.values():
        assert 0 < report["key_residual"] < 1 and 0 < report["query_residual"] < 1
        assert report["key_scale_variance"] > 0 and report["query_scale_variance"] > 0
    assert verify_model(tmp_path / "out", against=parent).passed
    again = json.loads((tmp_path / "out" / "headwise.json").read_text())
    assert again["layers"]["1"]["key_residual"] == result.layers[1]["key_residual"]
    card = (tmp_path / "out" / "README.md").read_text()
    residuals = [report["key_residual"] for report in result.layers.values()]
    assert "Linear maps replace these norms" in card
    assert f"Key residual of the 2 layers: smallest {min(residuals):.4f}, median {median(residuals):.4f}" in card
    assert f"largest {max(residuals):.4f}." in card


def test_moments_hold_the_norms_on_queries_and_keys(tmp_path: Path) -> None:
    parent = save_speaking(tmp_path / "parent", **NORMED)
    options = {"to": "mla", "rank": 24, "rope_dim": 8, "method": "transmla", "refit": "off", "verify": False}
    convert_model(parent, tmp_path / "direct", save_moments=tmp_path / "moments", **TEXT, **options)
    convert_model(parent, tmp_path / "reused", moments=tmp_path / "moments", **options)
    direct, reused = (logits(load(tmp_path / name)) for name in ("direct", "reused"))
    assert relative(reused, direct) < 1e-3
    convert_model(
        parent, tmp_path / "gqa", to="mqa", save_moments=tmp_path / "old", verify=False, **TEXT, refit="off"
    )
    with pytest.raises(HeadwiseError, match="nothing about the norms"):
        convert_model(parent, tmp_path / "no", moments=tmp_path / "old", **options)
    assert not (tmp_path / "no").exists()
