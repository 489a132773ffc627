"""An inspection as text for a reader."""

from __future__ import annotations

import json
import re
from itertools import takewhile
from pathlib import Path

import pytest

from headwise._cli import console, render
from headwise.convert.inspect import inspect_model
from headwise.io.source import EMBEDDED_MODEL
from headwise.serving.engines import ENGINES
from tests import tiny_models
from tests.convert.test_plan import llama_config


def test_an_inspection_has_a_word_for_each_engine_or_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    inspection = inspect_model(EMBEDDED_MODEL)
    render.render_inspection(inspection)
    table = [line.split("  ") for line in capsys.readouterr().out.splitlines() if "llama.cpp" in line]
    assert [word.strip() for word in table[0] if word.strip()][1:] == list(ENGINES) and len(table) == 1
    render.render_inspection(inspection, reasons=True)
    printed = capsys.readouterr().out
    layouts = [inspection.engines, *(option.engines for option in inspection.options)]
    for place, name in enumerate(ENGINES):
        assert printed.count(f"{name}: ") == len({verdicts[place].line for verdicts in layouts})


def test_the_guide_has_what_inspect_prints(capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    render.render_inspection(inspect_model(EMBEDDED_MODEL))
    guide = (Path(__file__).parents[3] / "docs" / "guide" / "convert.md").read_text(encoding="utf-8")
    shown = guide.partition("$ headwise inspect headwise/demo/model\n")[2].partition("```")[0].splitlines()
    printed = capsys.readouterr().out.splitlines()
    assert shown[0].endswith(printed[0].partition(": ")[2]) and shown[1:] == printed[1 : len(shown)]


def test_a_forecast_names_its_limits_and_what_does_not_fit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure(quiet=True)
    shape = {"hidden_size": 1280, "num_attention_heads": 40, "num_key_value_heads": 40}
    (tmp_path / "config.json").write_text(json.dumps(llama_config(**shape).to_dict()))
    render.render_inspection(inspect_model(tmp_path, tp=4, card="h100"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "Not served with these options (GQA-5, GQA-10): tensor parallel 4 does not divide" not in printed
    assert "(GQA-5): tensor parallel 4 does not divide 5 KV heads, and is no multiple of it." in printed
    assert "(GQA-10): tensor parallel 4 does not divide 10 KV heads" in printed
    # The words of a heading stand in rows of the table, which is as narrow as the terminal.
    assert "least" in printed and "take 92% of the memory" in printed and "real steps take longer" in printed


def test_a_refused_row_has_its_refusal_in_place_of_a_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure(quiet=True)
    shape = {"hidden_size": 1280, "num_attention_heads": 40, "num_key_value_heads": 40}
    config = llama_config(**shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    render.render_inspection(inspect_model(tmp_path, tp=4, memory="80GB"))
    words = next(line for line in capsys.readouterr().out.splitlines() if "GQA-5" in line and "loads" in line)
    assert words.split()[-4:] == ["loads", "refused", "refused", "loads"], "two of the engines take no `tp`"
    render.render_inspection(inspect_model(tmp_path, engines="sglang", tp=4, memory="80GB"), reasons=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert "GQA-5 sglang: is not served with these options (tensor parallel 4 does not divide 5 KV" in printed


@pytest.mark.parametrize("engine", ["llama.cpp", "sglang", "vllm"])
def test_the_memory_is_an_assumption_where_the_engine_is_another(
    engine: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure(quiet=True)
    config = llama_config().to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    render.render_inspection(inspect_model(tmp_path, engines=engine, memory="80GB", context=512), reasons=True)
    printed = " ".join(capsys.readouterr().out.split())
    assert ("vLLM's default, which is assumed for this engine too." in printed) == (engine != "vllm")
    assert {"llama.cpp": "--ctx-size 512", "sglang": "--context-length 512", "vllm": "--max-model-len 512"}[
        engine
    ] in (printed)


def test_every_refusal_has_its_reason_under_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = llama_config(**shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    render.render_inspection(inspect_model(tmp_path, card="a100-80gb", cache_dtype="fp8"))
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"Refused by vllm \(MLA [^)]*MLA 512\+64[^)]*\): vLLM.s MLA has an FP8 cache from", printed)
    render.render_inspection(inspect_model(tmp_path, tp=4, dcp=2))
    printed = " ".join(capsys.readouterr().out.split())
    assert "vLLM 0.33 divides" in printed and "Refused by vllm" not in printed, "the forecast has this reason"
    assert "Refused by sglang (unchanged): SGLang 0.5.23 divides the cache only among" in printed


def test_a_forecast_of_a_mixture_names_the_share_of_its_experts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    console.configure(quiet=True)
    render.render_inspection(inspect_model(tiny_models.save("qwen3_moe", tmp_path / "model"), card="l4"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "select, if routing is uniform: 100% of them. With one sequence, a step of the unchanged" in printed


def test_the_default_context_is_at_most_the_model_s_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    config = llama_config(max_position_embeddings=512, hidden_size=4096, num_attention_heads=32)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    found = inspect_model(tmp_path, memory="1GB")
    assert found.serving and found.serving.context == 512
    render.render_inspection(inspect_model(tmp_path, memory="1GB", context=65_536))
    printed = " ".join(capsys.readouterr().out.split())
    assert "no sequence fits beside them: " in printed and "positions for 512 tokens, and `context` is" in printed
    config = llama_config(hidden_size=16384, num_attention_heads=32, num_hidden_layers=1)
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict()))
    render.render_inspection(inspect_model(tmp_path, memory="1GB"))
    assert "The weights do not fit into the memory of a GPU: all layouts." in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["80", "100"])
def test_a_forecast_of_what_does_not_fit_is_as_wide_as_the_terminal(
    columns: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    console.configure(quiet=True)
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "num_hidden_layers": 16}
    (tmp_path / "config.json").write_text(json.dumps(llama_config(**shape).to_dict()))
    for memory, words in (("4GB", ("no sequence fits beside", "tokens/s")), ("1GB", ("sequences",))):
        render.render_inspection(inspect_model(tmp_path, memory=memory, card="l4", context=2**17))
        lines = capsys.readouterr().out.splitlines()
        start = next(place for place, line in enumerate(lines) if line.startswith("On each GPU"))
        table = lines[start + 1 : lines.index(next(line for line in lines[start:] if "The weights" in line))]
        assert max(map(len, table)) <= int(columns)
        assert all(word in " ".join(lines) for word in words)
        heading = list(takewhile(lambda line: not line.startswith("unchanged"), table))
        assert 0 < len(heading) < len(table), "the heading, and then the layouts"
        shown = " ".join(heading)
        assert ("tokens/s" in shown) == (memory == "4GB"), "columns that are empty in every row are left out"


def test_equal_verdicts_of_an_engine_are_one_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console.configure(quiet=True)
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = llama_config(**shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    render.render_inspection(inspect_model(tmp_path, engines=["vllm", "sglang"]), reasons=True)
    lines = capsys.readouterr().out.splitlines()
    equal = [line for line in lines if line.startswith("unchanged, MQA, GQA-2, GQA-4, GQA-16, MHA")]
    assert len(equal) == 2 and "vllm: loads" in equal[0] and "sglang: loads" in equal[1]


def test_commands_have_the_options_of_the_forecast(tmp_path: Path) -> None:
    shape = {"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 48}
    config = llama_config(**shape).to_dict() | {"architectures": ["LlamaForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = inspect_model(
        tmp_path, engines=["vllm", "sglang"], tp=16, dcp=2, cache_dtype="fp8", context=1024, memory="80GB"
    )
    assert [verdict.commands for verdict in found.engines] == [
        (
            "vllm serve MODEL --tensor-parallel-size 16 --decode-context-parallel-size 2 --kv-cache-dtype fp8 "
            "--max-model-len 1024",
        ),
        (
            "python -m sglang.launch_server --model-path MODEL --attention-backend triton --tp 16 --dcp-size 2 "
            "--kv-cache-dtype fp8_e4m3 --context-length 1024",
        ),
    ]
    latent = next(option for option in found.options if option.to == "mla")
    command = latent.engines[0].commands[0]
    assert command.startswith("vllm serve OUT ") and command.endswith("--kv-cache-dtype fp8 --max-model-len 1024")
    assert any("one byte for each element" in note for note in found.notes)
    alone = inspect_model(tmp_path, engines=["vllm"], tp=16, dcp=2, cache_dtype="fp8", context=1024, memory="80GB")
    two = ["vllm", "sglang"]
    for result, names, refuses in ((found, two, False), (alone, ["vllm"], True)):  # one engine speaks for itself
        heads = next(option for option in result.options if option.num_key_value_heads == 32)
        assert heads.serving and (heads.serving.refusal is not None) == refuses
        assert [(v.name, v.verdict) for v in heads.engines] == [(name, "refused") for name in names]
    longer = inspect_model(tmp_path, engines=["vllm"], tp=16, context=65_536)
    assert "--max-model-len" not in longer.engines[0].commands[0]
    plain = inspect_model(tmp_path, engines=["vllm"])
    assert plain.engines[0].commands == ("vllm serve MODEL",)
