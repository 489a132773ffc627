"""`headwise eval` from end to end, on tiny models and without a network."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
import socket
import typing
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import headwise
from headwise.cli import cli
from headwise.convert.pipeline import convert_model
from headwise.errors import HeadwiseError
from headwise.eval.result import Evaluation
from headwise.eval.tasks.resume import AnswerLog
from headwise.eval.tasks.samples import read_results
from headwise.measure.image_prompts import open_prompts
from headwise.records.manifest import read_record
from headwise.records.parent import recorded_source
from tests import small_parents, tiny_models
from tests.convert.speaking import save_speaking
from tests.io.gguf_files import write_gguf

pytest.importorskip("lm_eval")

RECIPE = """
about: A little of everything.
tasks: [headwise_cloze_code]
limit: 8
perplexity: {length: 64, blocks: 8, stretches: 4}
diagnostics: {blocks: 4, layer_blocks: 1}
generation: {prompts: 6, prompt_tokens: 16, new_tokens: 12}
acceptance: {prompts: 2, new_tokens: 8, draft_tokens: 3}
"""
OWN_TASK = """
task: fruit
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: ["apple", "pear"]
doc_to_target: "{{answer}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Use no network, a new cache, and none of the facts that lm-eval collects about the machine."""

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda _: None)
    monkeypatch.setattr("lm_eval.evaluator.get_git_commit_hash", lambda: None)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a parent, its copy, and a model that is worse in every figure."""
    home = tmp_path_factory.mktemp("models")
    parent = save_speaking(home / "parent", max_position_embeddings=128)
    shutil.copytree(parent, home / "twin")
    worse: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    with torch.no_grad():
        worse.model.layers[0].self_attn.v_proj.weight.mul_(20)
        worse.model.norm.weight.mul_(3)
    shutil.copytree(parent, home / "worse")
    worse.save_pretrained(home / "worse")
    (home / "recipe.yaml").write_text(RECIPE)
    return {path.stem: path for path in home.iterdir()}


@pytest.mark.parametrize("place", ["/dev/null/x", "link"])
def test_a_cache_that_cannot_be_written_costs_no_report(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    cache = Path(place) if place.startswith("/") else tmp_path / "cache"
    if place == "link":
        cache.mkdir()
        (cache / "eval").symlink_to(tmp_path / "nowhere")
    monkeypatch.setenv("HEADWISE_CACHE", str(cache))
    (tmp_path / "text.yaml").write_text("about: Text.\nperplexity: {length: 32, blocks: 2, stretches: 2}\n")
    out = tmp_path / "report"
    result = run(
        folders["twin"], "--baseline", folders["parent"], "--recipe", tmp_path / "text.yaml", "--report", out
    )
    assert result.exit_code == 0, result.stderr
    assert (out / "report.json").is_file() and "cannot be written" in result.stderr
    assert not (tmp_path / "nowhere").exists()


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["eval", *map(str, arguments)])


def test_equal_models_do_not_differ(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "report"
    result = run(
        folders["twin"], "--baseline", folders["parent"], "--recipe", folders["recipe"], "--report", out,
        "--fail-above", "0", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    data = json.loads(result.stdout)
    evaluation = Evaluation.from_dict(data)
    assert {comparison.task for comparison in evaluation.headlines} == {"heldout", "headwise_cloze_code"}
    for comparison in evaluation.comparisons:
        assert comparison.paired is not None and comparison.damage == 0
        # Eight equal answers do not prove that others are equal; equal likelihoods do.
        bound = 0 if comparison.task == "heldout" else 1.959964**2 / (7 + 1.959964**2)
        assert (comparison.paired.difference, comparison.paired.p_value) == (0, 1)
        assert (comparison.paired.low, comparison.paired.high) == pytest.approx((-bound, bound))
        assert comparison.paired.gained in (None, 0) and comparison.paired.lost in (None, 0)
    divergence, generation, drafts = evaluation.diagnostics, evaluation.generation, evaluation.acceptance
    assert divergence and (divergence.top1, divergence.top5, divergence.kl) == (1, 1, 0)
    assert (
        all((layer.hidden, layer.attention) == (0, 0) for layer in divergence.layers)
        and len(divergence.layers) == 2
    )
    assert (
        divergence.entropy
        and divergence.entropy.child == divergence.entropy.parent
        and not divergence.entropy.changed
    )
    assert generation and (generation.agreement, generation.identical, generation.complaints) == (1, 1, ())
    assert drafts and drafts.rate == 1
    assert evaluation.positions and evaluation.positions.child == evaluation.positions.parent
    assert (
        evaluation.passed
        and data["passed"]
        and all(gate.passed for gate in evaluation.gates)
        and len(evaluation.gates) == 3
    )
    assert evaluation.child.sha256 == evaluation.parent.sha256  # type: ignore[union-attr]
    assert not evaluation.reused and evaluation.lm_eval_seconds > 0

    # The output equals the file; lm-eval's own files are beside it, in its layout.
    assert json.loads((out / "report.json").read_text()) == data
    for role, name in (("child", "twin"), ("parent", "parent")):
        logs = out / evaluation.logs[role]
        assert logs.name == name and len(list(logs.glob("results_*.json"))) == 1
        (logged,) = logs.glob("samples_headwise_cloze_code_*.jsonl")
        assert len(logged.read_text().splitlines()) == 8
        assert ("headwise_cloze_code", "acc", None) in read_results(logs).figures
    assert {path.name for path in tmp_path.iterdir()} == {"report"}

    # The folder is not replaced, and the message says what to do.
    again = run(folders["twin"], "--report", out)
    assert again.exit_code == 2 and "exists" in again.stderr and "--force" in again.stderr


def test_damage_is_found_and_fails_the_gate_and_the_parent_is_reused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"recipe": folders["recipe"], "report": tmp_path / "one"}
    first = headwise.evaluate_model(folders["twin"], folders["parent"], **arguments)
    assert first is not None and not first.reused
    result = run(
        folders["worse"], "--baseline", folders["parent"], "--recipe", folders["recipe"], "--report",
        tmp_path / "two", "--fail-above", "1%",
    )  # fmt: skip
    assert result.exit_code == 1, result.stderr
    assert "heldout perplexity" in result.stdout and "FAILED" in result.stdout
    evaluation = Evaluation.from_dict(json.loads((tmp_path / "two" / "report.json").read_text()))
    assert evaluation.reused and "parent: tasks" not in evaluation.seconds and "child: tasks" in evaluation.seconds
    (text,) = [comparison for comparison in evaluation.headlines if comparison.task == "heldout"]
    assert text.paired and text.damage is not None and text.damage > 0.01 and text.paired.p_holm < 0.05  # type: ignore[operator]
    assert text.paired.low > 0 and text.paired.test == "bootstrap"
    before = next(comparison for comparison in first.headlines if comparison.task == "heldout")
    assert text.parent == before.parent
    assert (tmp_path / "two" / evaluation.logs["parent"]).is_dir()


@pytest.mark.parametrize("model", ["child", "parent"])
def test_a_killed_evaluation_asks_no_question_twice(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    answered: list[Any] = []
    add = AnswerLog.add
    stop = {"child": 5, "parent": 37}[model]  # of 32 requests for each model

    def interrupted(self: AnswerLog, *answer: Any) -> None:
        if len(answered) == stop:
            raise KeyboardInterrupt
        answered.append(answer[1])
        add(self, *answer)

    monkeypatch.setattr(AnswerLog, "add", interrupted)
    arguments = [
        folders["worse"], "--baseline", folders["parent"], "--tasks", "headwise_cloze_code", "--limit", 8,
        "--report", tmp_path / "report", "--batch-size", 2, "--json",
    ]  # fmt: skip
    assert run(*arguments).exit_code == 130 and not (tmp_path / "report").exists()
    stop = 10**6
    resumed = run(*arguments)
    assert resumed.exit_code == 0, resumed.stderr
    assert "answers are from an interrupted run" in resumed.stderr and "Forecast: about" in resumed.stderr
    assert ("The child's results are from an interrupted run" in resumed.stderr) == (model == "parent")
    assert len(answered) == 64
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "other"))
    whole = run(*arguments, "--force")
    figures = [json.loads(result.stdout)["comparisons"][0] for result in (resumed, whole)]
    assert figures[0] == figures[1]
    # The child is measured again by the next evaluation, whose parent is cached.
    assert len(answered) == 128 and run(*arguments, "--force").exit_code == 0 and len(answered) == 160
    assert not list((tmp_path / "other").rglob("*-answers"))


def test_own_tasks_are_compared_and_measured_again_after_a_change(folders: dict[str, Path], tmp_path: Path) -> None:
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    data = tmp_path / "fruit.jsonl"
    rows = [{"question": f"What is {i}? ", "answer": i % 2} for i in range(6)]
    data.write_text("\n".join(map(json.dumps, rows)))
    (tasks / "fruit.yaml").write_text(OWN_TASK.replace("DATA", str(data)))
    arguments: dict[str, Any] = {
        "tasks": ["fruit"],
        "include_path": [tasks],
        "force": True,
        "report": tmp_path / "out",
    }
    first = headwise.evaluate_model(folders["worse"], folders["parent"], **arguments)
    assert first is not None and first.recipe is None and first.diagnostics is None and not first.reused
    assert first.parent is not None and (first.child.model, first.parent.model) == ("worse", "parent")
    assert_publishable(tmp_path / "out", tmp_path, folders["parent"].parent)
    (comparison,) = first.headlines
    assert comparison.task == "fruit" and comparison.samples == 6 and comparison.paired is not None
    assert comparison.paired.difference == pytest.approx(comparison.child.value - comparison.parent.value)  # type: ignore[union-attr]
    gained, lost = comparison.paired.gained, comparison.paired.lost
    assert (
        gained is not None
        and lost is not None
        and comparison.paired.difference == pytest.approx((gained - lost) / 6)
    )
    again = headwise.evaluate_model(folders["worse"], folders["parent"], **arguments)
    assert again is not None and again.reused and again.headlines == first.headlines
    data.write_text("\n".join(json.dumps(row | {"question": "Which? "}) for row in rows))
    changed = headwise.evaluate_model(folders["worse"], folders["parent"], **arguments)
    assert changed is not None and not changed.reused


def assert_publishable(report: Path, *private: Path) -> None:
    """No file of a report names a folder of the user."""
    for path in (path for path in report.rglob("*") if path.is_file()):
        assert not [folder for folder in private if str(folder).encode() in path.read_bytes()], path


def test_both_models_get_questions_in_the_chat_template(folders: dict[str, Path], tmp_path: Path) -> None:
    template = "{% for message in messages %}<{{ message.role }}>{{ message.content }}</>{% endfor %}<reply>"
    for name in ("parent", "worse"):
        shutil.copytree(folders[name], tmp_path / name)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    (tmp_path / "questions").mkdir()
    rows = [{"goal": f"Cut {i}", "sol1": "Use a saw.", "sol2": "Use soap.", "label": i % 2} for i in range(3)]
    (tmp_path / "questions" / "piqa.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = run(
        tmp_path / "worse", "--baseline", tmp_path / "parent", "--tasks", "headwise_piqa", "--apply-chat-template",
        "--task-data", tmp_path / "questions", "--report", tmp_path / "out", "--json",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    prompts = {}
    for file in (tmp_path / "out" / "lm-eval").rglob("samples_*.jsonl"):
        lines = map(json.loads, file.read_text().splitlines())
        prompts[file.parent.name] = [line["arguments"]["gen_args_0"]["arg_0"] for line in lines]
    expected = [f"<user>Question: Cut {i}\nAnswer:</><reply>" for i in range(3)]
    assert prompts == {"worse": expected, "parent": expected}
    report = json.loads(result.stdout)
    assert report["settings"]["apply_chat_template"] is True and "--apply-chat-template" in report["command"]
    assert "apply chat template" in (tmp_path / "out" / "report.md").read_text()
    assert_publishable(tmp_path / "out", tmp_path)


def test_a_task_keeps_its_own_number_of_examples_with_a_warning(folders: dict[str, Path], tmp_path: Path) -> None:
    data = tmp_path / "fruit.jsonl"
    data.write_text("\n".join(json.dumps({"question": f"What is {i}? ", "answer": i % 2}) for i in range(3)))
    task = tmp_path / "fruit.yaml"
    task.write_text(OWN_TASK.replace("DATA", str(data)) + "num_fewshot: 0\n")
    result = run(folders["parent"], "--tasks", task, "--num-fewshot", 2, "--report", tmp_path / "out", "--json")
    assert result.exit_code == 0, result.stderr
    assert re.search("num.fewshot`? has no effect on fruit", result.stderr)
    assert [comparison["num_fewshot"] for comparison in json.loads(result.stdout)["comparisons"]] == [0]


def test_without_a_baseline_nothing_is_compared(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = save_speaking(tmp_path / "long", max_position_embeddings=768)
    recipe = tmp_path / "passkey.yaml"
    recipe.write_text(
        "about: The long-context recipe in small.\ntasks: [headwise_passkey]\n"
        "positions: {stretches: 4, windows: 3}\npasskey: {lengths: [0.5, 1.0], depths: [0.0, 1.0], samples: 1}\n"
    )
    evaluation = headwise.evaluate_model(folder, recipe=recipe, report=tmp_path / "out")
    assert evaluation is not None and evaluation.parent is None and evaluation.diagnostics is None
    assert evaluation.positions and evaluation.positions.child.length == 768 and evaluation.positions.trained == 768
    assert [(cell.length, cell.depth) for cell in evaluation.passkey] == [
        (384, 0.0),
        (384, 1.0),
        (768, 0.0),
        (768, 1.0),
    ]
    assert all(
        cell.child == 0 and cell.parent is None for cell in evaluation.passkey
    )  # random weights find nothing
    assert set(evaluation.figures) >= {"positions", "passkey"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tasks", "headwise_cloze_cod"], "Did you mean headwise_cloze_code?"),
        (["--recipe", "quik"], "Did you mean quick?"),
        (["--online"], "but the recipe quick has none"),
        (["--limit", "1.5"], "a number of questions or a share below 1"),
        (["--fail-above", "1%"], "--fail-above is 0.01, which needs a parent: give --baseline"),
        (["--device", "cuda:7"], "--device is 'cuda:7', which this machine does not have"),
        (["--tasks", "headwise_cloze_code", "--include-path", "nowhere"], "There is no folder nowhere"),
        (["--backend", "vllm", "--tasks", "headwise_cloze_code"], "vLLM, which is not installed"),
    ],
)
def test_a_mistake_gets_one_sentence(
    arguments: list[str], words: str, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    # All of lm-eval's own tasks take long to list.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    result = run(folders["parent"], *arguments, "--report", tmp_path / "out")
    assert result.exit_code == 2 and words in result.stderr and "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())


def test_vllm_does_not_run_in_several_processes(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(HeadwiseError, match="which distributes its work itself, in 2 processes"):
        headwise.evaluate_model(
            folders["parent"], tasks=["headwise_cloze_code"], backend="vllm", report=tmp_path / "out"
        )


def test_a_gguf_file_is_the_parent_of_its_conversion(tmp_path: Path) -> None:
    """The record names the file. All figures equal those of the folder that holds the same weights."""
    file = write_gguf(tmp_path / "model.gguf")
    convert_model(file, tmp_path / "same", to="gqa", groups=2, calibrate="none")
    assert recorded_source(read_record(tmp_path / "same"), tmp_path / "same") == file
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    result = run(
        tmp_path / "same", "--recipe", tmp_path / "recipe.yaml", "--report", tmp_path / "report", "--json",
        "--limit", "2", "--fail-above", "1%", "--no-cache",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    evaluation = Evaluation.from_dict(json.loads(result.stdout))
    assert evaluation.parent and evaluation.parent.model == file.name and evaluation.parent.parameters
    assert evaluation.parent.attention == evaluation.child.attention
    assert {c.task for c in evaluation.headlines} == {"heldout", "headwise_cloze_code"}
    assert all(c.paired and c.paired.difference == 0 for c in evaluation.comparisons)
    assert evaluation.diagnostics and evaluation.diagnostics.kl == pytest.approx(0, abs=1e-6)
    refused = run(tmp_path / "same", "--baseline", file, "--tasks", "headwise_cloze_code", "--backend", "vllm")
    assert refused.exit_code == 2 and "takes no GGUF file such as model.gguf" in refused.stderr


def test_a_different_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folders["parent"], other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(HeadwiseError, match="different tokenizers"):
        headwise.evaluate_model(other, folders["parent"], report=tmp_path / "out")


def without_questions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a task whose questions are on the Hub, fruit.yaml, and go offline."""
    for module in ("datasets.config", "huggingface_hub.constants"):
        monkeypatch.setattr(f"{module}.HF_HUB_OFFLINE", True)
    (folder / "fruit.yaml").write_text(
        re.sub("dataset_kwargs.*", "", OWN_TASK.replace("dataset_path: json", "dataset_path: someone/fruit"))
    )


def test_a_task_that_downloads_is_refused_offline(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_questions(tmp_path, monkeypatch)
    with pytest.raises(HeadwiseError, match="downloads its questions, and the Hub cannot be reached"):
        headwise.evaluate_model(
            folders["parent"], tasks=["fruit"], include_path=[tmp_path], report=tmp_path / "out"
        )


def test_tasks_of_a_recipe_read_the_folder_of_questions_and_the_rest_is_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_questions(tmp_path, monkeypatch)
    questions = tmp_path / "questions"
    questions.mkdir()
    (questions / "piqa.jsonl").write_text('{"goal": "Go?", "sol1": "Yes", "sol2": "No", "label": 1}\n' * 3)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("about: Two tasks.\ntasks: [piqa, fruit]\n")
    options = {"recipe": recipe, "include_path": [tmp_path], "report": tmp_path / "out"}
    with pytest.raises(HeadwiseError, match="cannot be reached"):
        headwise.evaluate_model(folders["parent"], **options)
    with pytest.raises(HeadwiseError, match=r"There is no folder .*nowhere"):
        headwise.evaluate_model(folders["parent"], **options, task_data=tmp_path / "nowhere")
    result = headwise.evaluate_model(folders["parent"], **options, task_data=questions)
    assert result is not None and {each.task for each in result.comparisons} == {"headwise_piqa"}
    assert [note for note in result.notes if note.startswith("Not run") and note.endswith(": fruit.")]
    with pytest.raises(HeadwiseError, match="cannot be reached"):  # a task that the user names is not left out
        headwise.evaluate_model(folders["parent"], tasks=["fruit"], **options, task_data=questions, force=True)


def test_without_lm_eval_the_extra_is_named_and_the_rest_works(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval.tasks", None)
    with pytest.raises(HeadwiseError, match="not installed") as caught:
        headwise.evaluate_model(folders["parent"], report=tmp_path / "out")
    assert "headwise[eval]" in str(caught.value)
    recipe = tmp_path / "text.yaml"
    recipe.write_text("about: No tasks.\nperplexity: {length: 64, blocks: 4, stretches: 4}\n")
    evaluation = headwise.evaluate_model(folders["parent"], recipe=recipe, report=tmp_path / "out")
    assert evaluation is not None and [comparison.task for comparison in evaluation.comparisons] == ["heldout"]


def test_the_documentation_names_every_key() -> None:
    documented = set(re.findall(r"^\| `([\w.\[\]]+)`", DOCUMENTATION.read_text(encoding="utf-8"), re.MULTILINE))
    assert set(keys(Evaluation)) | {"passed", "summary[]"} == documented


DOCUMENTATION = Path(headwise.__file__).parents[1] / "docs" / "reference" / "evaluation-json.md"


def keys(kind: Any, prefix: str = "") -> Any:
    """Yield dotted paths of all fields, with `[]` behind lists."""
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        hint, path = hints[item.name], f"{prefix}{item.name}"
        while typing.get_origin(hint) is not None and typing.get_origin(hint) is not dict:
            path += "[]" if typing.get_origin(hint) is tuple else ""
            hint = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(hint):
            yield from keys(hint, f"{path}.")
        else:
            yield path


@pytest.mark.parametrize("kind", ["t5gemma", "t5gemma2"])
def test_targets_of_an_encoder_decoder_are_compared_with_the_parent(tmp_path: Path, kind: str) -> None:
    parent = small_parents.tiny_parent(tmp_path / "parent", kind)
    child = small_parents.converted(parent, tmp_path / "child", to="mqa")
    pairs, out = small_parents.pairs(tmp_path / "pairs.jsonl"), tmp_path / "report"
    result = run(child, "--baseline", parent, "--pairs", pairs, "--report", out, "--json")
    assert result.exit_code == 0, result.stderr
    evaluation = Evaluation.from_dict(json.loads(result.stdout))
    (targets,) = evaluation.comparisons
    assert (targets.task, targets.metric, targets.samples) == ("targets", "perplexity", 60)
    assert targets.paired is not None and targets.paired.difference != 0
    assert f"--pairs {pairs.name}" in evaluation.command and "--recipe" not in evaluation.command
    assert "targets perplexity" in (out / "report.md").read_text()
    same = headwise.evaluate_model(parent, parent, pairs=pairs, report=tmp_path / "same")
    assert same is not None and same.reused
    (equal,) = same.comparisons
    assert equal.parent is not None and targets.parent is not None
    assert equal.parent.value == targets.parent.value and equal.damage == 0


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("t5gemma", {}, "is an encoder-decoder, which is measured by the perplexity of targets"),
        ("t5gemma", {"recipe": "quick", "pairs": "pairs.jsonl"}, "`recipe` has no effect with `pairs`"),
        ("t5gemma", {"pairs": "none.jsonl"}, "There is no file"),
        ("t5gemma", {"pairs": "text.jsonl"}, "holds no pairs"),
        ("t5gemma", {"pairs": "one.jsonl"}, "holds 1 pair, and two are needed"),
        ("llama", {"pairs": "pairs.jsonl"}, "reads no pairs"),
    ],
)
def test_pairs_that_do_not_match_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = (small_parents.parent if kind == "llama" else small_parents.tiny_parent)(tmp_path / "model", kind)
    small_parents.pairs(tmp_path / "pairs.jsonl")
    small_parents.pairs(tmp_path / "one.jsonl", lines=1)
    (tmp_path / "text.jsonl").write_text('{"text": "prose"}\n')
    with pytest.raises(HeadwiseError, match=re.escape(words)):
        headwise.evaluate_model(model, report="report", **options)
    assert not (tmp_path / "report").exists()


def test_texts_of_images_are_compared_with_the_parent(tmp_path: Path) -> None:
    parent = small_parents.seeing_parent(tmp_path / "parent", num_attention_heads=12, num_key_value_heads=6)
    part = "{% for c in m.content %}{{ c.text or '<image>' }}{% endfor %}"
    template = f"{{% for m in messages %}}{{{{ m.role }}}}:{part} {{% endfor %}}"
    (parent / "chat_template.jinja").write_text(template)
    child = small_parents.converted(parent, tmp_path / "child", to="mqa")
    pairs, out = small_parents.image_pairs(tmp_path / "pairs"), tmp_path / "report"
    result = run(child, "--baseline", parent, "--images", pairs, "--report", out, "--json")
    assert result.exit_code == 0, result.stderr
    evaluation = Evaluation.from_dict(json.loads(result.stdout))
    (images,) = evaluation.comparisons
    assert (images.task, images.metric, images.samples) == ("images", "perplexity", 12)
    assert images.paired is not None and images.paired.difference != 0
    assert f"--images {pairs.name}" in evaluation.command and "--recipe" not in evaluation.command
    agreement = evaluation.diagnostics
    assert agreement is not None and agreement.kl > 0 and agreement.kl_standard_error and agreement.top1 < 1
    # Text alone: the tokens of images and of the template are not predicted.
    prompts = open_prompts(pairs, "AutoModelForImageTextToText", parent, "parent", tiny_models.read_config(parent))
    assert agreement.tokens == sum(int(prompt.text.sum()) for prompt in prompts)
    assert all((~prompt.text & ~prompt.visual).any() for prompt in prompts)
    model = transformers.AutoModelForImageTextToText.from_pretrained(parent, dtype=torch.float32).eval()
    nats = []
    with torch.no_grad():
        for prompt in prompts:
            scores = model(**prompt.inputs).logits[0, :-1].log_softmax(-1)
            own = scores.gather(1, prompt.tokens[0, 1:, None])[:, 0]
            nats += (-own[prompt.text[1:]]).tolist()
    assert images.parent is not None
    assert images.parent.value == pytest.approx(math.exp(sum(nats) / len(nats)), rel=1e-4)
    assert "images perplexity" in (out / "report.md").read_text()
    same = headwise.evaluate_model(parent, parent, images=pairs, report=tmp_path / "same")
    assert same is not None and same.reused and same.diagnostics is not None
    assert (same.comparisons[0].damage, same.diagnostics.kl, same.diagnostics.top1) == (0, 0, 1)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("llama", {"images": "pairs/pairs.jsonl"}, "reads no images"),
        ("llava", {"images": "pairs/pairs.jsonl"}, "has no processor of images"),
        ("llava", {"images": "none.jsonl"}, "none.jsonl cannot be read"),
        ("llava", {"images": "pairs/pairs.jsonl", "recipe": "quick"}, "`recipe` has no effect with `images`"),
        ("llava", {"pairs": "pairs/pairs.jsonl"}, "which reads no pairs. Give `images` in place of `pairs`."),
        ("t5gemma", {"images": "pairs/pairs.jsonl"}, "Give `pairs` in place of `images`."),
        ("llava", {"images": "a.jsonl", "pairs": "b.jsonl"}, "`images` has no effect with `pairs`"),
    ],
)
def test_images_that_do_not_match_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any], words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    model = (small_parents.parent if kind == "llama" else small_parents.tiny_parent)(tmp_path / "model", kind)
    small_parents.image_pairs(tmp_path / "pairs", 2)
    with pytest.raises(HeadwiseError, match=re.escape(words)):
        headwise.evaluate_model(model, report="report", **options)
    assert not (tmp_path / "report").exists()


@pytest.mark.parametrize("kind", ["llava", "mllama", "qwen2_5_vl"])
def test_text_metrics_of_vision_language_models(tmp_path: Path, kind: str) -> None:
    parent = small_parents.tiny_parent(tmp_path / "parent", kind)
    child = small_parents.converted(parent, tmp_path / "child", to="mqa")
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("limit: 8", "limit: 3"))
    evaluation = headwise.evaluate_model(child, parent, recipe=tmp_path / "recipe.yaml", report=tmp_path / "report")
    assert evaluation is not None
    assert {comparison.task for comparison in evaluation.headlines} == {"heldout", "headwise_cloze_code"}
    heldout = next(each for each in evaluation.comparisons if each.task == "heldout")
    assert heldout.paired is not None and heldout.paired.difference != 0
    assert evaluation.diagnostics and evaluation.diagnostics.kl > 0 and evaluation.generation
    layers = [layer.layer for layer in evaluation.diagnostics.layers]
    assert layers == ([0, 3] if kind == "mllama" else [0, 1])  # without an image, cross-attention does not run
