"""An evaluation in the model card: for readers, for the Hub, and never in the card of another model."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from huggingface_hub import ModelCard, parse_eval_result_entries

from headwise.cli import cli
from headwise.convert.pipeline import convert_model
from headwise.convert.verify.check import verify_model
from headwise.errors import HeadwiseError
from headwise.eval.model import content_hash
from headwise.eval.report.card_section import update_card
from headwise.eval.report.report import write_report
from headwise.io.source import source_in_folder
from tests.convert.speaking import save_speaking
from tests.eval.evaluations import alone, full

GSM8K = ("gsm8k", "openai/gsm8k", "main")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A converted folder, and the report of it with lm-eval's result file beside it."""
    home = tmp_path_factory.mktemp("made")
    save_speaking(home / "model")
    convert_model(home / "model", home / "out", to="gqa", groups=4, calibrate="none")
    child = replace(full().child, sha256=content_hash(source_in_folder("out", home / "out")))
    (home / "report" / "child").mkdir(parents=True)
    config = {
        "dataset_path": "allenai/ai2_arc",
        "dataset_name": "ARC-Easy",
        "test_split": "test",
        "doc_to_text": "x",
    }
    results = {"configs": {"arc_easy": config, "gsm8k": {"dataset_path": "gsm8k"}}}
    (home / "report" / "child" / "results_2026-01-01.json").write_text(json.dumps(results))
    command = full().command.replace("out/gqa-4", str(home / "out")) + " --include-path /home/somebody/tasks"
    write_report(replace(full(), child=child, command=command, logs={"child": "child"}), home / "report")
    return home


@pytest.fixture
def out(folders, tmp_path) -> Path:
    return shutil.copytree(folders / "out", tmp_path / "out")


def _front_matter(out: Path, text: str) -> None:
    (out / "README.md").write_text(f"---\n{text}\n---\n# x\n")


def test_a_base_60_number_of_a_card_is_kept_as_text(folders, out):
    number = "1" + ":59" * 3000
    _front_matter(out, f"time: {number}\nmodel-index: 7\ntags: [a]")
    update_card(out, folders / "report")
    data = ModelCard((out / "README.md").read_text()).data
    assert data["time"] == number and data["tags"] == ["a"] and data["eval_results"]


def test_the_card_gets_the_figures_and_keeps_its_text(folders, out):
    before = (out / "README.md").read_text()
    update = update_card(out, folders / "report")
    text = (out / "README.md").read_text()
    assert text.index("## Evaluation") < text.index("## Errors") < text.index("## Command")
    assert before.split("## Errors")[1] == text.split("## Errors")[1]
    assert (
        "a significant loss in 2 of 8" in text
        and "| arc_easy | acc_norm, 1,000 samples | 43.1% | 40.2% | **−2.9** |" in text
    )
    assert "mmlu_anatomy" not in text, "only the main figures"
    command = "headwise eval out --baseline org/parent@c0ffee --recipe standard --seed 0 --include-path tasks"
    assert command in text and str(folders) not in text, "folders of the user are not published"
    assert "same next token: 91.23%" in text and "Limits of these figures" in text
    assert update.figures == 6 and update.eval_results == ()
    assert verify_model(out).passed, "verification leaves out the card"
    update_card(out, folders / "report")
    assert (out / "README.md").read_text() == text, "a second update changes nothing"


def test_the_hub_reads_the_figures(folders, out):
    old = ModelCard((out / "README.md").read_text()).data.to_dict()
    update_card(out, folders / "report")
    data = ModelCard((out / "README.md").read_text()).data
    assert {key: value for key, value in data.to_dict().items() if key != "model-index"} == old
    assert data.model_name == "out"
    figures = {figure.dataset_name: figure for figure in data.eval_results}
    assert set(figures) == {
        "held-out",
        "arc_easy",
        "hellaswag",
        "a_task_with_a_remarkably_long_name",
        "mmlu",
        "gsm8k",
    }
    arc = figures["arc_easy"]
    assert (arc.dataset_type, arc.dataset_config, arc.dataset_split) == ("allenai/ai2_arc", "ARC-Easy", "test")
    assert (arc.metric_type, arc.metric_name, arc.metric_value) == ("acc_norm", "acc_norm (0-shot)", 0.402)
    assert figures["held-out"].metric_value == pytest.approx(6.106, abs=1e-3)


def test_a_benchmark_result_is_written_on_request(folders, out):
    update = update_card(out, folders / "report", eval_results=[GSM8K])
    assert update.eval_results == (out / ".eval_results" / "gsm8k.yaml",)
    (entry,) = parse_eval_result_entries(yaml.safe_load(update.eval_results[0].read_text()))
    assert (entry.dataset_id, entry.task_id, entry.value) == ("openai/gsm8k", "main", 5.0)
    assert entry.notes == "exact_match, 5-shot, lm-eval 0.4.13"


def test_a_report_without_a_parent_is_written_too(folders, out, tmp_path):
    child = replace(full().child, sha256=content_hash(source_in_folder("out", out)))
    write_report(replace(alone(), child=child), tmp_path / "alone")
    assert update_card(out, tmp_path / "alone").figures == 1
    assert "No parent was measured" in (out / "README.md").read_text()


def test_a_part_of_the_samples_is_no_benchmark_result(folders, out, tmp_path):
    child = replace(full().child, sha256=content_hash(source_in_folder("out", out)))
    write_report(replace(alone(), child=child, settings={"limit": 10}), tmp_path / "part")
    with pytest.raises(HeadwiseError, match="used a part of the samples"):
        update_card(out, tmp_path / "part", eval_results=[("arc_easy", "allenai/ai2_arc", "ARC-Easy")])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: (out / "README.md").unlink(), r"has no README\.md"),
        (lambda out: shutil.rmtree(out), "There is no folder .*out"),
        (lambda out: (out / "README.md").write_text("---\na: [\n---\n"), "front matter .* cannot be read"),
        (lambda out: _front_matter(out, "a: " + "[" * 4000 + "]" * 4000), "front matter .* cannot be read"),
        (lambda out: _front_matter(out, f"a: {'x' * 100_000}"), "longer than 100,000 characters"),
        (lambda out: _front_matter(out, "[1, 2]"), "is not a mapping"),
        (lambda out: _front_matter(out, "1: 2"), "is not a mapping"),
        (lambda out: (out / "README.md").write_text("x" * 1_000_001), "larger than 1,000,000 bytes"),
        (
            lambda out: (out / "config.json").write_text((out / "config.json").read_text() + " "),
            "not of .* as it is now",
        ),
    ],
)
def test_a_refusal_leaves_the_folder_unchanged(folders, out, spoil, words):
    spoil(out)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(HeadwiseError, match=words):
        update_card(out, folders / "report", eval_results=[GSM8K])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def with_logs(folders: Path, into: Path, logs: object) -> Path:
    shutil.copytree(folders / "report", into)
    content = json.loads((into / "report.json").read_text()) | {"logs": {"child": logs}}
    (into / "report.json").write_text(json.dumps(content))
    return into


@pytest.mark.parametrize("logs", ["/", "../elsewhere", 7])
def test_nothing_outside_the_report_is_read(folders, out, tmp_path, logs):
    with pytest.raises(HeadwiseError, match=r"not a folder of the report|`logs.child` is 7, which is not str"):
        update_card(out, with_logs(folders, tmp_path / "report", logs))


def test_a_pipe_in_place_of_a_result_file_is_refused(folders, out, tmp_path):
    report = with_logs(folders, tmp_path / "report", "l")
    (report / "l").mkdir()
    os.mkfifo(report / "l" / "results_1.json")
    with pytest.raises(HeadwiseError, match="is not a file"):
        update_card(out, report)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("nothing=a/b:c", "has no task 'nothing'"),
        ("heldout=a/b:c", "is not a share from 0 to 1"),
        ("gsm8k", "is not TASK=DATASET:TASK_ID"),
        ("gsm8k=openai:main", "is not TASK=DATASET:TASK_ID"),
    ],
)
def test_a_refused_benchmark_gets_one_sentence(folders, out, argument, words):
    result = CliRunner(env={"HEADWISE_DEBUG": ""}).invoke(
        cli, ["card", str(out), str(folders / "report"), "--eval-result", argument]
    )
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert "[!WARNING]" in (out / "README.md").read_text() and not (out / ".eval_results").exists()


def test_the_command(folders, out):
    words = ["card", str(out), str(folders / "report"), "--eval-result", "gsm8k=openai/gsm8k:main", "--json"]
    result = CliRunner(env={"HEADWISE_DEBUG": ""}).invoke(cli, words)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["figures"] == 6


def test_half_a_surrogate_pair_in_a_report_is_replaced(folders, out, tmp_path):
    report = shutil.copytree(folders / "report", tmp_path / "report")
    content = json.loads((report / "report.json").read_text())
    content["comparisons"][0]["task"] = "half \ud800"
    (report / "report.json").write_text(json.dumps(content))
    update_card(out, report)
    assert "half ?" in (out / "README.md").read_text()
