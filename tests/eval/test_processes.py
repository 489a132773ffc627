"""Several processes of `accelerate launch`: the results of one process, and one message if a process ends."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from headwise._cli import console
from headwise.errors import HeadwiseError
from headwise.eval import processes
from headwise.eval.evaluate import evaluate_model
from headwise.eval.report.publish import published
from headwise.eval.result import Evaluation
from headwise.eval.tasks.samples import read_results
from headwise.io.workdir import Interrupted
from tests.convert.speaking import save_speaking

pytest.importorskip("lm_eval")
REPOSITORY = Path(__file__).parents[2]
RECIPE = """
about: Two tasks and a little text.
tasks: [headwise_cloze_code, headwise_cloze_prose]
limit: 7
perplexity: {length: 64, blocks: 130, stretches: 4}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("models")
    save_speaking(home / "parent", max_position_embeddings=128)
    save_speaking(home / "child", max_position_embeddings=128, rope_theta=500.0, initializer_range=0.5)
    (home / "recipe.yaml").write_text(RECIPE)
    return home


@pytest.fixture
def launched(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Start two processes that share the CPU."""
    monkeypatch.setenv("HEADWISE_CACHE", str(tmp_path / "cache"))
    processes_started: list[subprocess.Popen[str]] = []

    def launch(out: Path, *more: str) -> subprocess.Popen[str]:
        words = ["--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m", "headwise", "eval"]
        words += [str(home / "child"), "--baseline", str(home / "parent"), "--recipe", str(home / "recipe.yaml")]
        processes_started.append(
            subprocess.Popen(
                [sys.executable, "-m", "accelerate.commands.launch", *words, "--report", str(out), *more],
                env={**os.environ, "PYTHONPATH": str(REPOSITORY), "CUDA_VISIBLE_DEVICES": ""},
                cwd=out.parent,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return processes_started[-1]

    yield launch
    for process in processes_started:
        if process.poll() is None:
            process.terminate()
            process.wait()


@pytest.mark.full
def test_two_processes_have_the_results_of_one(home: Path, tmp_path: Path, launched: Any) -> None:
    started = launched(tmp_path / "two", "--json")
    output, errors = started.communicate()
    assert started.returncode == 0, errors
    two = Evaluation.from_dict(json.loads(output))  # one object: the result is printed once
    one = evaluate_model(
        home / "child", home / "parent", recipe=home / "recipe.yaml", report=tmp_path / "one", device="cpu"
    )
    assert one is not None and one.reused  # the cache of two processes, which had the same questions
    for single, shared in zip(one.comparisons, two.comparisons, strict=True):
        assert (single.task, single.samples, single.child.value) == (
            shared.task,
            shared.samples,
            shared.child.value,
        )
        assert single.paired == shared.paired
    for role in ("child", "parent"):
        results, wanted = (
            read_results(tmp_path / name / of.logs[role]) for name, of in (("two", two), ("one", one))
        )
        assert {task: [row["doc_id"] for row in rows] for task, rows in results.samples.items()} == {
            task: list(range(7)) for task in ("headwise_cloze_code", "headwise_cloze_prose")
        }
        assert answers(results) == pytest.approx(answers(wanted), rel=1e-5)  # batches differ
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "cache"}
    # Each process answered four choices of three or four questions of each task, and the first one measured the
    # first and the last of three batches of text.
    assert "child: tasks: 32 requests" in errors and "git" not in errors
    assert "child: text: 66 blocks" in errors, errors
    assert two.positions == one.positions

    again = launched(tmp_path / "reused")
    _, errors = again.communicate()
    assert again.returncode == 0 and "parent: tasks" not in errors, errors


def answers(results: Any) -> list[float]:
    """Return every answer of every request, as often as it was logged."""
    rows = [row for task in sorted(results.samples) for row in results.samples[task]]
    return [float(likelihood) for row in rows for request in row["resps"] for likelihood, _ in request]


@pytest.mark.full
def test_the_end_of_one_process_has_one_message(tmp_path: Path, launched: Any) -> None:
    started = launched(tmp_path / "out", "--limit", "90")
    second = _second(started.pid, tmp_path)
    os.kill(second, signal.SIGKILL)
    output, errors = started.communicate()
    assert started.returncode != 0 and not output
    messages = re.findall("Error: (Another process ended|The launcher ended this process)", errors)
    assert len(messages) == 1 and "it was probably killed" in errors
    assert "This is a bug" not in errors
    # The folder of the killed process, and nothing of the other.
    assert len(list(tmp_path.glob(".out.*"))) == 1 and not (tmp_path / "out").exists()


def _second(launcher: int, home: Path) -> int:
    """Return the process of rank 1, once both are running."""
    while len(list(home.glob(".out.*"))) < 2:
        time.sleep(0.1)
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    (second,) = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    return int(second)


def test_a_task_with_too_few_questions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    task = SimpleNamespace(task_name="fruit", eval_docs=range(6))
    group = SimpleNamespace(get_all_tasks=lambda: [task])
    processes.check_questions([group], 1)  # one process answers anything
    monkeypatch.setenv("WORLD_SIZE", "4")
    processes.check_questions([task], None)
    processes.check_questions([task], 0.5 + 1 / 6)
    for limit in (3, 0.5):
        with pytest.raises(HeadwiseError, match="Task fruit has 3 questions, too few for 4 processes"):
            processes.check_questions([group], limit)
    monkeypatch.setenv("WORLD_SIZE", "8")
    with pytest.raises(HeadwiseError, match="has 6 questions"):
        processes.check_questions([task], 100)


def test_one_gpu_for_several_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    processes.check_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for device in (None, "cpu", "cuda"):
        processes.check_device(device)
    with pytest.raises(HeadwiseError, match="`device` is 'cuda:1', and each of 2 processes"):
        processes.check_device("cuda:1")


def test_shares_cover_a_list_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.gather_shares({place: place**2 for place in processes.our_share(4)}) == [0, 1, 4, 9]
    monkeypatch.setenv("WORLD_SIZE", "3")
    shares = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(processes.our_share(5)))
    assert shares == [[0, 3], [1, 4], [2]]


def test_a_padding_request_gets_its_own_answers() -> None:
    from lm_eval.api.instance import Instance

    twice, once = (
        Instance("generate_until", {}, ("ask",), 0, metadata=("fruit", place, repeats))
        for place, repeats in enumerate((2, 1))
    )
    requests = [twice, twice, once, once, once]
    processes.copy_padding(requests)
    assert [request is twice for request in requests[:2]] == [True, True] and requests[2] is once
    for place, padding in enumerate(requests[3:]):
        assert padding is not once and padding.args == once.args and padding.doc_id == 1
        padding.resps.append(place)
    assert once.resps == []


def test_other_errors_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="shapes"), processes.end_together():
        raise RuntimeError("shapes cannot be multiplied")
    with pytest.raises(HeadwiseError, match="Another process"), processes.end_together():
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:40392")


def test_sigterm_ends_the_work_as_ctrl_c_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)
    for count, raised in (("1", KeyboardInterrupt), ("2", HeadwiseError)):
        monkeypatch.setenv("WORLD_SIZE", count)
        with pytest.raises(raised), processes.end_together(), published(tmp_path / "out", force=False):
            os.kill(os.getpid(), signal.SIGTERM)
        assert not list(tmp_path.iterdir()) and signal.getsignal(signal.SIGTERM) is before


def test_an_interrupted_evaluation_says_how_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(Interrupted, match="Run the same command again"), processes.end_together(keeps_answers=True):
        raise KeyboardInterrupt


def test_the_first_process_prints_before_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setattr(time, "sleep", waited.append)
    for rank, waits in (("0", []), ("1", [console.OTHERS_WAIT])):
        monkeypatch.setenv("RANK", rank)
        assert processes.is_main() == (rank == "0")
        console.configure()
        console.error("No such model.")
        assert waited == waits and "No such model." in capsys.readouterr().err
