"""Conversions from end to end: what stays identical, what repeats itself, and what the folder says of itself."""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, MistralForCausalLM

from headwise.cli import cli
from headwise.convert import layers, pipeline
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.convert.pipeline import ConvertResult, convert_model
from headwise.convert.plan import Plan
from headwise.convert.refit import regression
from headwise.convert.refit.output_projection import solve_output_projection
from headwise.convert.refit.regression import refit
from headwise.convert.verify.check import check_folder, verify_model
from headwise.convert.verify.verification import Verification
from headwise.errors import HeadwiseError
from headwise.io.reader import open_checkpoint
from headwise.io.workdir import Interrupted
from headwise.progress import Progress
from headwise.records.parent import PARENT
from tests.convert.speaking import TEXT, contents, save_speaking

QUICK = {"calibrate": "none", "verify": False}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_speaking(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bfloat16, two key-value heads, an output matrix of its own."""
    folder = tmp_path_factory.mktemp("source") / "grouped"
    return save_speaking(folder, torch.bfloat16, num_key_value_heads=2, tie_word_embeddings=False)


def tensors(folder: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(folder)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def logits(folder: Path, count: int = 20) -> Tensor:
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return network(torch.arange(5, 5 + count)[None]).logits


def test_the_same_number_of_heads_changes_no_byte(model: Path, tmp_path: Path) -> None:
    result = convert_model(model, tmp_path / "out", to="gqa", groups=8)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    assert result.layers == {} and same(tensors(tmp_path / "out"), tensors(model))


def test_more_heads_are_exact_and_lead_back(grouped: Path, tmp_path: Path) -> None:
    lifted = convert_model(grouped, tmp_path / "mha", to="mha")
    assert isinstance(lifted, ConvertResult) and lifted.verification and lifted.verification.passed
    assert "exact" in dict((name, detail) for name, _, detail in lifted.verification.checks)["parent"]
    assert config(tmp_path / "mha")["num_key_value_heads"] == 8
    assert float((logits(tmp_path / "mha") - logits(grouped)).abs().max()) < 1e-5
    back = {"to": "gqa", "groups": 2, "method": "first", "grouping": "contiguous"}
    convert_model(tmp_path / "mha", tmp_path / "back", **back, **QUICK)
    assert same(tensors(tmp_path / "back"), tensors(grouped))


def test_a_tied_head_stays_tied(model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path / "out", to="mqa", **QUICK)
    assert "lm_head.weight" not in tensors(tmp_path / "out") and config(tmp_path / "out")["tie_word_embeddings"]
    network = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert network.lm_head.weight.data_ptr() == network.model.embed_tokens.weight.data_ptr()


def test_the_dtype_is_kept(grouped: Path, tmp_path: Path) -> None:
    convert_model(grouped, tmp_path / "out", to="mqa", **QUICK)
    assert {t.dtype for t in tensors(tmp_path / "out").values()} == {torch.bfloat16}
    assert config(tmp_path / "out")["dtype"] == config(tmp_path / "out")["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("to", [{}, {"to": "mqa", "calibrate": "none"}])
def test_another_dtype_is_written_and_declared(grouped: Path, tmp_path: Path, to: dict[str, Any]) -> None:
    result = convert_model(grouped, tmp_path / "out", dtype="float32", **to)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    found, before = tensors(tmp_path / "out"), tensors(grouped)
    assert {t.dtype for t in found.values()} == {torch.float32}
    assert torch.equal(found["lm_head.weight"], before["lm_head.weight"].float())
    assert config(tmp_path / "out")["dtype"] == config(tmp_path / "out")["torch_dtype"] == "float32"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32


def test_shards_hold_the_same_tensors_as_one_file(model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path / "one", to="mqa", **QUICK)
    convert_model(model, tmp_path / "many", to="mqa", max_shard_size="30KB", **QUICK)
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert same(one, many)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == one.keys() and len(set(index["weight_map"].values())) > 2
    assert index["metadata"] == {
        "total_parameters": sum(t.numel() for t in one.values()),
        "total_size": sum(t.nbytes for t in one.values()),
    }
    assert torch.equal(logits(tmp_path / "one"), logits(tmp_path / "many"))


def test_sidecars_travel_byte_for_byte(model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path / "out", to="mqa", **QUICK)
    before, after = contents(model), contents(tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert after[name] == before[name]
    assert after.keys() == before.keys() | {"README.md", "headwise.json", PARENT}


def test_calibration_reads_a_text_file(model: Path, tmp_path: Path) -> None:
    """Both halves of the difference: calibrated and not, and one text and another."""
    other = tmp_path / "other.txt"
    other.write_text("0123456789 " * 400)
    actions = {"none": {"calibrate": "none"}, "this": TEXT, "that": {**TEXT, "calibrate": str(other)}}
    found = {}
    for name, options in actions.items():
        convert_model(model, tmp_path / name, to="gqa", groups=2, refit="off", verify=False, **options)
        found[name] = tensors(tmp_path / name)["model.layers.0.self_attn.v_proj.weight"]
    assert not torch.equal(found["none"], found["this"]) and not torch.equal(found["this"], found["that"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"calibrate": "nowhere.txt"}, "no text file nowhere.txt"),
        ({"calibration_tokens": 40}, "`calibration_tokens` is 40, which is less than two sequences of 32"),
        ({"calibration_tokens": 10**6}, "holds .* blocks of 32 tokens"),
        ({"to": "gqa", "groups": 8, "refit": 9}, "nothing to refit"),
        (
            {"calibrate": None, "calibration_tokens": None, "moments": "nowhere"},
            "`moments` nowhere holds no moments",
        ),
        ({"device": "cuda:77"}, "`device` is 'cuda:77'"),
        ({"device": "cpu,cuda:77"}, "of one kind that names each GPU once"),
        ({"device": "cuda:1,cuda:1"}, "`device` is 'cuda:1,cuda:1'"),
        ({"device": "meteor,meteor:1"}, "`device` is 'meteor', which this machine does not have"),
        ({"device": "cpu,"}, "`device` is 'cpu,'"),
    ],
)
def test_options_that_cannot_be_met(model: Path, tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(HeadwiseError, match=words):
        convert_model(model, tmp_path / "out", **{"to": "mqa", **TEXT, **options})
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_tokenizer_can_only_go_without_text(tmp_path: Path) -> None:
    silent = save_speaking(tmp_path / "model")
    for path in silent.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(HeadwiseError, match=r"no tokenizer.*`calibrate` none"):
        convert_model(silent, tmp_path / "out", to="mqa", **TEXT)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    convert_model(silent, tmp_path / "out", to="mqa", **QUICK)


def test_saved_moments_serve_instead_of_the_text(model: Path, tmp_path: Path) -> None:
    kept = {"refit": "off", "verify": False, "method": "aligned"}
    convert_model(model, tmp_path / "direct", to="gqa", groups=2, save_moments=tmp_path / "moments", **TEXT, **kept)
    convert_model(model, tmp_path / "reused", to="gqa", groups=2, moments=tmp_path / "moments", **kept)
    direct, reused = tensors(tmp_path / "direct"), tensors(tmp_path / "reused")
    for name, tensor in direct.items():  # kept in float32: closer than that they cannot be
        torch.testing.assert_close(reused[name], tensor, rtol=1e-3, atol=1e-5)
    # One calibration serves other targets of the same model, and no other model.
    convert_model(model, tmp_path / "mqa", to="mqa", moments=tmp_path / "moments", **kept)
    other = save_speaking(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(HeadwiseError, match="was taken from another model"):
        convert_model(other, tmp_path / "no", to="mqa", moments=tmp_path / "moments", **kept)


def test_a_refit_lowers_the_error_on_text_it_did_not_learn_from(model: Path, tmp_path: Path) -> None:
    options = {"to": "gqa", "groups": 2, **TEXT, "calibration_tokens": 32 * 96, "refit": 100}
    result = convert_model(model, tmp_path / "a" / "out", **options)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    for layer in (0, 1):
        found = result.layers[layer]["refit"]
        assert found["kept"] and found["steps"] == 100 and found["after"] < 0.9 * found["before"]
    convert_model(model, tmp_path / "b" / "out", **options)
    assert contents(tmp_path / "a" / "out") == contents(tmp_path / "b" / "out")
    convert_model(model, tmp_path / "c", **options, seed=1, verify=False)
    assert not same(tensors(tmp_path / "c"), tensors(tmp_path / "a" / "out"))


def test_a_refit_that_does_not_help_keeps_the_closed_form(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As before a refit, also where none follows.
    monkeypatch.setattr(
        layers,
        "solve_output_projection",
        lambda *given, **how: solve_output_projection(*given, **how | {"spare": True}),
    )
    convert_model(model, tmp_path / "closed", to="mqa", **TEXT, refit="off", verify=False)
    monkeypatch.setattr(regression, "peak_rate", lambda *given: 50.0)
    result = convert_model(model, tmp_path / "refitted", to="mqa", **TEXT, refit=3, verify=False)
    assert isinstance(result, ConvertResult)
    assert not any(report["refit"]["kept"] for report in result.layers.values())
    assert same(tensors(tmp_path / "closed"), tensors(tmp_path / "refitted"))


def test_output_matrices_are_solved_for(model: Path, tmp_path: Path) -> None:
    text = TEXT | {"calibration_tokens": 32 * 96, "refit": "off"}
    result = convert_model(model, tmp_path / "out", to="gqa", groups=2, **text)
    assert isinstance(result, ConvertResult)
    for report in result.layers.values():
        assert report["output"]["kept"] and report["output"]["after"] < 0.9 * report["output"]["before"]
    convert_model(model, tmp_path / "again", to="gqa", groups=2, **text, verify=False)
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "again"))
    # Published methods are compared for what they are.
    aligned = convert_model(model, tmp_path / "aligned", to="gqa", groups=2, method="aligned", **text, verify=False)
    assert isinstance(aligned, ConvertResult) and not any("output" in r for r in aligned.layers.values())


class Mixed(nn.Module):
    """Heads that say something of the input, and a projection of them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.heads, self.o_proj = nn.Tanh(), nn.Linear(4, 4)
        with torch.no_grad():
            self.o_proj.weight.copy_(weight)
        self.requires_grad_(False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.o_proj(self.heads(hidden_states))


def test_the_least_squares_output_is_found_on_much_text() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(20, 600, 4, generator=generator), torch.randn(4, 4, generator=generator)
    parent = Mixed(weight)
    record = LayerRecord(0, torch.eye(5), inputs=inputs, outputs=parent(inputs))
    module = Mixed(torch.zeros(4, 4))
    module.o_proj.bias.copy_(parent.o_proj.bias)
    found = solve_output_projection(module, module.o_proj, record)
    assert found.kept and found.after < 1e-4 < found.before
    torch.testing.assert_close(module.o_proj.weight, weight, rtol=1e-2, atol=1e-2)


def test_an_output_that_other_sequences_do_not_confirm_is_left_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(4, 40, 4, generator=generator), torch.randn(4, 4, generator=generator)
    parent = Mixed(weight)
    exact = parent(inputs)
    # What one sequence misses, the others miss in the opposite direction.
    sign = torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    record = LayerRecord(0, torch.eye(5), inputs=inputs, outputs=exact + sign * parent.heads(inputs))
    found = solve_output_projection(parent, parent.o_proj, record)
    assert not found.kept and found.after > found.before and torch.equal(parent.o_proj.weight, weight)


class Stops(Progress):
    """Interrupts the work at the n-th thing it hears."""

    def __init__(self, at: int | None = None) -> None:
        self.at, self.heard = at, []  # type: ignore[var-annotated]

    def _hear(self, what: str) -> None:
        if len(self.heard) == self.at:
            raise KeyboardInterrupt
        self.heard.append(what)

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.name = name
        self._hear(name)

    def advance(self, amount: int = 1, **fields: object) -> None:
        self._hear(f"{self.name} +{amount}")


def test_resuming_after_an_interrupt_anywhere_gives_the_same_bytes(model: Path, tmp_path: Path) -> None:
    options = {"to": "gqa", "groups": 2, **TEXT, "refit": 3, "max_shard_size": "30KB"}
    listener = Stops()
    convert_model(
        model, tmp_path / "whole" / "out", save_moments=tmp_path / "whole" / "m", progress=listener, **options
    )
    wanted, moments = contents(tmp_path / "whole" / "out"), contents(tmp_path / "whole" / "m")
    layers = [number for number, what in enumerate(listener.heard) if what.startswith("Converting")]
    copying = listener.heard.index("Copying")
    checks = listener.heard.index("Verifying")
    for number in (layers[1], layers[2], copying + 4, checks + 2):
        home = tmp_path / str(number)
        out = home / "out"
        with pytest.raises(Interrupted, match="`resume`"):
            convert_model(model, out, save_moments=home / "m", progress=Stops(number), **options)
        assert not out.exists()
        convert_model(model, out, save_moments=home / "m", resume=True, **options)
        assert contents(out) == {
            name: data.replace(str(tmp_path / "whole" / "m").encode(), str(home / "m").encode())
            for name, data in wanted.items()
        }
        assert contents(home / "m") == moments
        assert {path.name for path in home.iterdir()} == {"out", "m"}


@pytest.mark.parametrize("damaged", [False, True])
def test_resuming_does_not_compute_a_finished_layer_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Unless the journal holds something else in place of the layer's report."""
    options = {"to": "gqa", "groups": 2, **TEXT, "refit": 2, "verify": False}
    computed: list[int] = []

    def counting(attention: nn.Module, parameters: list[nn.Parameter], record: LayerRecord, **more: Any) -> Any:
        computed.append(record.index)
        if len(computed) == 2:
            raise KeyboardInterrupt
        return refit(attention, parameters, record, **more)

    monkeypatch.setattr(layers, "refit_layer", counting)
    with pytest.raises(Interrupted):
        convert_model(model, tmp_path / "out", **options)
    if damaged:
        journal = tmp_path / ".out.headwise-work" / "journal.jsonl"
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        lines = [line | {"value": [1]} if line.get("note") == "layer 0" else line for line in lines]
        journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = convert_model(model, tmp_path / "out", resume=True, **options)
    assert computed == ([0, 1, 0, 1] if damaged else [0, 1, 1])
    assert isinstance(result, ConvertResult) and list(result.layers) == [0, 1]
    assert all("refit" in report for report in result.layers.values())


def test_a_dry_run_writes_nothing_and_says_what_will_be_done(model: Path, tmp_path: Path) -> None:
    options = {"to": "gqa", "groups": 2, **TEXT, "refit": 2, "max_shard_size": "30KB"}
    plan = convert_model(model, tmp_path / "out", dry_run=True, **options)
    assert isinstance(plan, Plan) and list(tmp_path.iterdir()) == []
    result = convert_model(model, tmp_path / "out", **options)
    assert isinstance(result, ConvertResult) and result.plan == plan
    written = tensors(tmp_path / "out")
    assert {(t.name, t.dtype, t.shape) for t in plan.outputs} == {
        (name, t.dtype, tuple(t.shape)) for name, t in written.items()
    }
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")}
    assert {shard.file: shard.nbytes for shard in plan.shards} == sizes
    before = tensors(model)
    for action in plan.actions:
        assert (action.action == "copy") == torch.equal(
            written[action.name].flatten(), before[action.name].flatten()
        )


def test_the_config_is_read_alike_in_both_spellings(model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path / "out", to="mqa", context=64, rope="linear", **QUICK)
    whole = config(tmp_path / "out")
    new = {k: v for k, v in whole.items() if k not in ("rope_theta", "rope_scaling")}
    old = {k: v for k, v in whole.items() if k != "rope_parameters"}
    assert old["rope_scaling"] == {"rope_type": "linear", "factor": 2.0}
    found = [LlamaConfig.from_dict(spelling) for spelling in (whole, new, old)]
    assert {json.dumps(c.rope_parameters, sort_keys=True) for c in found} == {
        '{"factor": 2.0, "rope_theta": 10000.0, "rope_type": "linear"}'
    }
    assert {c.num_key_value_heads for c in found} == {1}


@pytest.mark.parametrize(("present", "after"), [(32, 64), (1000, 1000)])
def test_a_longer_context_raises_the_length_of_the_tokenizer(
    model: Path, tmp_path: Path, present: int, after: int
) -> None:
    source = shutil.copytree(model, tmp_path / "source")
    (source / "tokenizer_config.json").write_text(json.dumps({"model_max_length": present, "eos_token": "é"}))
    convert_model(source, tmp_path / "out", context=64, rope="ntk")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written == {"model_max_length": after, "eos_token": "é"}


def test_a_longer_context_keeps_every_weight_and_passes_its_checks(model: Path, tmp_path: Path) -> None:
    result = convert_model(model, tmp_path / "out", context=128, rope="ntk")
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    assert same(tensors(tmp_path / "out"), tensors(model))
    assert config(tmp_path / "out")["max_position_embeddings"] == 128
    assert config(tmp_path / "out")["rope_theta"] > 10000
    assert not torch.allclose(logits(tmp_path / "out"), logits(model))


@pytest.mark.parametrize("more", [{}, {"to": "mqa", "calibrate": "none"}])
def test_a_sliding_window_passes_its_checks(model: Path, tmp_path: Path, more: dict[str, Any]) -> None:
    result = convert_model(model, tmp_path / "out", sliding_window=6, **more)
    assert isinstance(result, ConvertResult) and result.verification and result.verification.passed
    assert config(tmp_path / "out")["model_type"] == "mistral"
    network = MistralForCausalLM.from_pretrained(tmp_path / "out")
    assert network.config.sliding_window == 6 and {a.sliding_window for a in result.plan.layouts_after} == {6}


def test_the_folder_says_where_it_comes_from(model: Path, tmp_path: Path) -> None:
    convert_model(model, tmp_path / "out", to="gqa", groups=2, **TEXT, refit=2)
    record = json.loads((tmp_path / "out" / "headwise.json").read_text())
    assert record["source"]["model"] == "model" and record["source"]["files"].keys() == {"model.safetensors"}
    assert record["arguments"]["calibration"]["text"] == Path(TEXT["calibrate"]).name
    assert record["verification"]["passed"] and record["layers"].keys() == {"0", "1"}
    assert record["layers"]["0"].keys() == {"groups", "key_error", "value_error", "output", "refit"}
    for name, tensor in tensors(tmp_path / "out").items():
        assert record["sha256"][name] == hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()
    card = (tmp_path / "out" / "README.md").read_text()
    assert "GQA, 2 KV heads" in card and record["command"] in card and "value error" in card


COMMANDS: list[dict[str, Any]] = [
    {"to": "gqa", "groups": 2, "refit": 2, "seed": 3, **TEXT},
    {"to": "mqa", "method": "random", "seed": 5, "calibrate": "none", "verify": False},
    {"to": "mha"},
    {"context": 64, "rope": "base", "rope_theta": 5e4, "dtype": "bfloat16"},
    {"sliding_window": 6, "window_layers": "alternate"},
]


@pytest.mark.parametrize("options", COMMANDS, ids=lambda o: "-".join(map(str, list(o)[:2])))
def test_the_command_on_record_makes_the_folder_again(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    convert_model(model, tmp_path / "first" / "out", **options)
    record = json.loads((tmp_path / "first" / "out" / "headwise.json").read_text())
    (tmp_path / "second").mkdir()
    (tmp_path / "second" / "model").symlink_to(model)
    # Of files elsewhere the record holds the name alone.
    text = Path(TEXT["calibrate"])
    (tmp_path / "second" / text.name).symlink_to(text)
    monkeypatch.chdir(tmp_path / "second")
    program, *words = shlex.split(record["command"])
    assert program == "headwise"
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.stderr
    assert contents(tmp_path / "second" / "out") == contents(tmp_path / "first" / "out")


def test_a_failed_last_check_keeps_the_folder_until_it_is_accepted(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check(*arguments: Any, **more: Any) -> Verification:
        checks = check_folder(*arguments, **more).checks
        return Verification(
            tuple((n, p and n != "cache", "5, limit 3" if n == "cache" else d) for n, p, d in checks)
        )

    words = ["convert", str(model), str(tmp_path / "out"), "--to", "mqa", "--calibrate", "none"]
    kept = tmp_path / ".out.headwise-work" / "output"
    monkeypatch.setattr(pipeline, "check_folder", check)
    refused = CliRunner().invoke(cli, words)
    assert refused.exit_code == 1 and "cache: 5, limit 3" in refused.stderr
    assert f"headwise verify {kept}" in " ".join(refused.stderr.split())
    assert "--resume and --accept cache" in " ".join(refused.stderr.split())
    assert verify_model(kept, against=model).passed and not (tmp_path / "out").exists()

    assert CliRunner().invoke(cli, [*words, "--resume", "--accept", "loading"]).exit_code == 1
    with monkeypatch.context() as patch:
        patch.setattr(layers.LayerJob, "results", None)
        done = CliRunner().invoke(cli, [*words, "--resume", "--accept", "loading", "--accept", "cache"])
    assert done.exit_code == 0 and "The check cache failed, and the failure was accepted" in done.stderr
    record = json.loads((tmp_path / "out" / "headwise.json").read_text())
    assert record["verification"]["accepted"] == ["cache"], "a check that passed needs no acceptance"
    assert record["command"].endswith("--accept cache")
    assert "- cache: **FAILED**, accepted by the user. 5, limit 3" in (tmp_path / "out" / "README.md").read_text()

    monkeypatch.setattr("headwise.convert.verify.check.check_folder", check)
    again = CliRunner().invoke(cli, ["verify", str(tmp_path / "out")])
    assert again.exit_code == 1 and "FAILED, accepted" in again.stdout
    assert "accepted when the folder was written" in " ".join(again.stderr.split())
