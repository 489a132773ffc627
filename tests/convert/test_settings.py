"""ConvertSettings: every rule holds from Python and from the command line, with the same sentence."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from headwise import convert_model, registry
from headwise._cli.app import with_flags
from headwise.cli import cli
from headwise.convert import pipeline
from headwise.convert.settings import CLASHES, NEEDS, ConvertSettings
from headwise.errors import SettingError
from headwise.fields import flag_of, settings_of

DECLARED = settings_of(ConvertSettings)
VERB = cli.commands["convert"]


class Reached(Exception):
    """The settings were accepted."""


@pytest.fixture(autouse=True)
def accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stop every conversion at the first step after its settings."""

    def reached(*_: Any, **__: Any) -> None:
        raise Reached

    monkeypatch.setattr(pipeline, "open_checkpoint", reached)


def from_python(values: dict[str, Any]) -> str | None:
    """Return the message of a refusal, None if the settings are accepted."""
    try:
        convert_model("model", "out", **values)
    except SettingError as error:
        return with_flags(error.message, VERB)
    except Reached:
        return None
    raise AssertionError("convert_model neither refused nor went on")


def from_shell(values: dict[str, Any]) -> str | None:
    """Return the message of a refusal, None if the command line is accepted."""
    words = ["convert", "model", "out"]
    for name, value in values.items():
        spelling = flag_of(name, DECLARED[name][1])
        repeated = value if isinstance(value, tuple) else [value]
        words += [spelling] if DECLARED[name][1].is_flag else [f"{spelling}={word}" for word in repeated]
    result = CliRunner().invoke(cli, words)
    if isinstance(result.exception, Reached) or "headwise failed: Reached" in result.stderr:
        return None
    assert result.exit_code == 2, result.output
    return result.stderr.removeprefix("Error: ").splitlines()[0]


def same_verdict(values: dict[str, Any]) -> str | None:
    """Return the one message that both ways give."""
    messages = {from_python(values), from_shell(values)}
    assert len(messages) == 1, values
    return messages.pop()


def refusals() -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield every rule: the field that the error names, a call that breaks the rule, words of the message."""
    mla = {"to": "mla", "cache": 0.5}
    examples: dict[str, Any] = {
        "groups": 2,
        "method": "mean",
        "grouping": "optimal",
        "part": ("text",),
        "rank": 4,
        "rope_dim": 4,
        "cache": 0.5,
        "exact": True,
        "rope_frequencies": "free",
        "cache_dtype": "fp8",
        "pad_values": True,
        "sparse": "dsa",
        "index_topk": 8,
        "index_heads": 2,
        "index_head_dim": 64,
        "index_steps": 5,
        "index_layers": 2,
        "index_loss": 0.05,
        "context": 99,
        "sliding_window": 0,
        "to": "mqa",
        "calibrate": "builtin",
        "calibration_tokens": 4096,
        "images": "pairs.jsonl",
        "save_moments": "folder",
        "moments": "folder",
        "refit": "off",
        "refit_tokens": 4096,
        "refit_length": 2048,
        "refit_repeats": 0.1,
        "private": True,
        "rope": "ntk",
        "rope_theta": 1e6,
        "window_layers": "all",
        "window_loss": 0.05,
    }
    yield "to", {}, "nothing to change"
    yield "to", {"to": "GQA", "groups": 4}, "'GQA', which is not one of gqa, mqa, mha, mla"
    yield "to", {"to": "mq"}, "'mq', which is not one of"
    yield "grouping", {"to": "mqa", "grouping": "contigous"}, "'contigous', which is not one of"
    yield "method", {"to": "mqa", "method": "optimum"}, "'optimum', which is not one of"
    yield "rope_frequencies", mla | {"rope_frequencies": "fre"}, "'fre', which is not one of default, free"
    yield "groups", {"to": "gqa"}, "needs --groups"
    yield "cache", {"to": "mla"}, "needs --cache"
    yield "method", {"to": "mqa", "method": "transmla"}, "has no method 'transmla'"
    yield "method", mla | {"method": "mean"}, "has no method 'mean'"
    for name, (_, setting) in DECLARED.items():
        for other in {"gqa", "mqa", "mha", "mla", None} - set(setting.acts_with) if setting.acts_with else ():
            if name == "to":
                continue
            if name == "sparse" and other is None:
                continue  # it sets the layout
            base = {"gqa": {"to": "gqa", "groups": 2}, "mla": mla, None: {"dtype": "float32"}}.get(
                other, {"to": other}
            )
            yield name, {**base, name: examples[name]}, f"{flag_of(name)} acts only with"
    lossy: dict[str, dict[str, Any]] = {
        "cache": {"to": "mla"},
        "exact": {"to": "mla"},
        "moments": {"to": "mqa"},
        "images": {"to": "mqa"},
        "index_layers": {},
    }
    for name, others in CLASHES.items():
        for against in others:
            partner = {"rank": {"rope_dim": 4}, "rope_dim": {"rank": 4}}.get(against, {})
            example = "transmla" if against == "method" else examples[against]
            call = {**lossy[name], name: examples[name], **partner, against: example}
            yield name, call, f"{flag_of(name)} and {flag_of(against)} contradict" if not partner else "contradict"
    for name, needed in NEEDS.items():
        base = {"rank": {"to": "mla"}, "rope_dim": {"to": "mla"}}.get(name, {"context": 99})
        if needed in ("context", "sparse", "index_layers"):
            base = {"dtype": "float32"}
        yield name, {**base, name: examples[name]}, f"{flag_of(name)} needs {flag_of(needed)}"
    yield "calibration_tokens", {"to": "mqa", "calibrate": "none", "calibration_tokens": 9}, "--calibrate none"
    yield "refit", {"to": "mqa", "images": "pairs.jsonl", "refit": "joint"}, "trains on text alone"
    yield "save_moments", {"to": "mqa", "calibrate": "none", "save_moments": "folder"}, "--calibrate none"
    yield "refit", {"to": "mqa", "calibrate": "none", "refit": 5}, "needs calibration text"
    yield "refit", {"to": "mqa", "moments": "folder", "refit": 5}, "needs calibration text"
    yield "sparse", {"sparse": "dsa", "calibrate": "none"}, "makes indexers from calibration text"
    yield "sparse", mla | {"sparse": "dsa", "moments": "folder"}, "makes indexers from calibration text"
    yield "index_loss", {"index_layers": 2, "index_loss": 0.1}, "acts only with --index-layers auto"
    yield "index_layers", {"index_layers": "auto", "calibrate": "none"}, "measures losses: leave out --calibrate"
    yield "refit", mla | {"sparse": "dsa", "refit": "joint"}, "changes the attention that the indexers"
    yield "refit_tokens", {"to": "mqa", "refit": "layers", "refit_tokens": 4096}, "give --refit joint"
    yield "refit_length", {"to": "mqa", "refit": "layers", "refit_length": 4096}, "give --refit joint"
    yield "refit_repeats", {"to": "mqa", "refit": 10, "refit_repeats": 0.0}, "give --refit joint"
    yield "accept", {"to": "mqa", "accept": ("layuot",)}, "which is not one or several of"
    yield "engines", {"to": "mqa", "engines": ("vLMM",)}, "which is not one or several of"
    yield "accept", {"to": "mqa", "accept": ("layout",), "verify": False}, "has no effect"
    yield "part", {"to": "mqa", "part": ("decodr",)}, "which is not one or several of text, encoder, decoder"
    yield "part", {"to": "gqa", "part": ("decoder=0",)}, "each once, alone or with a number"
    yield "part", {"to": "gqa", "part": ("decoder=2", "decoder=3")}, "which is not one or several of"
    yield "part", {"to": "mqa", "part": ("decoder=2",)}, "--to mqa sets the number of KV heads"
    yield "groups", {"to": "gqa", "groups": 2, "part": ("decoder=2", "cross=2")}, "--groups has no effect"
    yield "groups", {"to": "gqa", "part": ("decoder=2", "encoder")}, "needs --groups"
    yield "verify", {"to": "mqa", "push_to_hub": "a/b", "verify": False}, "leave out --no-verify"
    yield "rope_theta", {"context": 99, "rope": "base"}, "belong together"
    yield "rope_theta", {"context": 99, "rope": "ntk", "rope_theta": 1e6}, "belong together"


@pytest.mark.parametrize(
    ("field", "values", "words"), [pytest.param(*r, id=f"{i}-{r[0]}") for i, r in enumerate(refusals())]
)
def test_every_rule_holds_from_both_sides(field: str, values: dict[str, Any], words: str) -> None:
    message = same_verdict(values)
    assert message is not None and words in message
    with pytest.raises(SettingError) as caught:
        ConvertSettings(**values)
    assert caught.value.field == field
    assert "--" not in caught.value.message, "the library names fields, not flags"


WRONG: dict[str, list[Any]] = {
    "to": ["GQA", ""],
    "groups": [0, -1],
    "method": ["optimum"],
    "grouping": ["contigous"],
    "rank": [0],
    "rope_dim": [-2],
    "cache": [0.0, 1.5, float("nan")],
    "sparse": ["nsa"],
    "index_topk": [0],
    "index_heads": [-1],
    "index_head_dim": [0],
    "index_steps": [-1],
    "index_layers": [0, -1, "all"],
    "index_loss": [0.0, -0.1],
    "rope_frequencies": ["fre"],
    "calibration_tokens": [0],
    "refit": [0, "never", -3],
    "refit_tokens": [0, -5],
    "refit_length": [0, -1],
    "refit_repeats": [-0.1, 1.1],
    "context": [0],
    "rope": ["yarrn"],
    "rope_theta": [0.0, -1.0, float("inf")],
    "sliding_window": [-1],
    "window_layers": ["none", "0,,2", "1-"],
    "window_loss": [0.0, -0.1],
    "dtype": ["bf16"],
    "requantize": ["int8"],
    "max_shard_size": ["five", "0GB"],
    "seed": [-1],
}
RIGHT: dict[str, list[Any]] = {
    "to": ["gqa", "mqa", "mha", "mla"],
    "groups": [1, 2],
    "method": [*registry.method_names("merge"), *registry.method_names("latent")],
    "grouping": ["optimal", "contiguous"],
    "part": [("text",), ("decoder", "encoder"), ("decoder=2", "cross=3")],
    "rank": [4],
    "rope_dim": [4],
    "cache": [0.125, 1.0],
    "exact": [True],
    "rope_frequencies": ["default", "free"],
    "cache_dtype": ["bf16", "fp8"],
    "pad_values": [True],
    "sparse": ["dsa"],
    "index_topk": [64],
    "index_heads": [3],
    "index_head_dim": [64],
    "index_steps": [0, 5],
    "index_layers": [1, 5, "auto"],
    "index_loss": [0.05],
    "engines": [("vllm",), ("llama.cpp", "transformers")],
    "calibrate": ["builtin", "none", "text.jsonl"],
    "calibration_tokens": [4096],
    "images": ["pairs.jsonl"],
    "save_moments": ["folder"],
    "moments": ["folder"],
    "refit": ["auto", "off", 5],
    "refit_tokens": [4096],
    "refit_length": [2048],
    "refit_repeats": [0.0, 0.5],
    "context": [4096],
    "rope": ["auto", *registry.method_names("rope")],
    "rope_theta": [1e6],
    "sliding_window": [0, 16],
    "window_layers": ["all", "alternate", "auto", "0,2-3"],
    "window_loss": [0.05],
    "dtype": ["bfloat16"],
    "requantize": ["fp8"],
    "max_shard_size": ["1GB", "500mb"],
    "dry_run": [True],
    "force": [True],
    "resume": [True],
    "verify": [False],
    "accept": [("layout",), ("cache", "function")],
    "push_to_hub": ["org/name"],
    "private": [True],
    "allow_nan": [True],
    "allow_pickle": [True],
    "seed": [7],
    "device": ["cpu", "cpu,cpu", "cuda:0,cuda:1"],
}


def test_every_field_has_examples() -> None:
    assert RIGHT.keys() == DECLARED.keys()


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in WRONG.items() for v in values])
def test_a_value_that_is_not_legal_names_field_and_value(name: str, value: Any) -> None:
    message = same_verdict({"to": "mqa", name: value} if name != "to" else {"to": value})
    assert message is not None and message.startswith(flag_of(name))
    assert repr(value) in message


@pytest.mark.parametrize(
    ("name", "value"),
    [("groups", "4"), ("groups", True), ("groups", 2.0), ("exact", 1), ("to", 7), ("seed", None)],
)
def test_a_value_of_another_type_is_refused(name: str, value: Any) -> None:
    with pytest.raises(SettingError) as caught:
        ConvertSettings(**{"to": "gqa", "groups": 2} | {name: value})
    assert caught.value.field == name and repr(value) in caught.value.message


@pytest.mark.parametrize(
    ("given", "tokens"),
    [
        ({"context": "8K"}, {"context": 8192}),
        ({"context": "131072"}, {"context": 131_072}),
        ({"sliding_window": "4k"}, {"sliding_window": 4096}),
        (
            {"refit": "joint", "refit_length": "2K", "refit_tokens": "4M"},
            {"refit_length": 2048, "refit_tokens": 4 * 10**6},
        ),
        ({"calibration_tokens": "40K"}, {"calibration_tokens": 40_000}),
    ],
)
def test_k_is_1024_in_a_length_and_1000_in_a_budget(given: dict[str, Any], tokens: dict[str, int]) -> None:
    made = ConvertSettings(to="mqa", **given)
    assert {name: getattr(made, name) for name in tokens} == tokens
    assert same_verdict({"to": "mqa", **given}) is None
    for name in tokens:
        for wrong in ("8KK", "K", "", "8.5", "-8K"):
            with pytest.raises(SettingError, match=f"`{name}` is '{wrong}', which is not a whole number"):
                ConvertSettings(**{"to": "mqa", **given, name: wrong})


def test_a_fraction_is_a_number_or_a_text() -> None:
    assert [ConvertSettings(to="mla", cache=given).cache for given in ("12.5%", "0.125", 0.125)] == [0.125] * 3
    for wrong in ("", "%", "150%", "half", "nan"):
        with pytest.raises(SettingError, match="`cache` is "):
            ConvertSettings(to="mla", cache=wrong)


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.fixed_dictionaries(
        {},
        optional={name: st.sampled_from([*values, *WRONG.get(name, [])]) for name, values in RIGHT.items()},
    )
)
def test_random_combinations_get_the_same_verdict(values: dict[str, Any]) -> None:
    same_verdict(values)


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {"to": st.sampled_from(["gqa", "mqa", "mla"])},
        optional={name: st.sampled_from(values) for name, values in RIGHT.items() if name != "to"},
    )
)
def test_accepted_settings_are_complete_and_stable(values: dict[str, Any]) -> None:
    try:
        made = ConvertSettings(**values)
    except SettingError:
        return
    assert made.recorded()["to"] == values["to"] and made.recorded()["seed"] == values.get("seed", 0)
    if made.lossy:
        assert made.method and (made.calibrate or made.moments or made.images) and made.refit
    again = ConvertSettings(**{f.name: getattr(made, f.name) for f in fields(made)})
    assert again == made


def test_settings_are_frozen() -> None:
    made = ConvertSettings(to="mqa")
    with pytest.raises(FrozenInstanceError):
        made.to = "mha"  # type: ignore[misc]


def test_the_function_takes_every_field_with_its_default() -> None:
    parameters = inspect.signature(convert_model).parameters
    places = {"model", "out", "revision", "token", "progress"}
    assert parameters.keys() - places == DECLARED.keys()
    for name, (declared, _) in DECLARED.items():
        assert parameters[name].default == declared.default


def test_paths_become_paths() -> None:
    assert ConvertSettings(to="mqa", save_moments="folder").save_moments == Path("folder")  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["llama.cpp", "transformers"])
def test_an_engine_without_an_fp8_cache_is_refused(engine: str) -> None:
    values = {"to": "mla", "cache": 0.5, "cache_dtype": "fp8"}
    assert f"{engine} has no FP8 cache" in str(from_python(values | {"engines": (engine,)}))
    assert from_python(values | {"engines": ("vllm",)}) is None
