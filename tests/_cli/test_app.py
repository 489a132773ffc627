"""What all verbs share: help, usage errors, exceptions as one sentence and an exit code."""

from __future__ import annotations

import signal
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import click
import click.shell_completion
import pytest
import torch

from headwise._cli.app import with_flags
from headwise.cli import cli
from headwise.errors import HeadwiseError
from headwise.format import token_count
from tests.command_line import CONVERT, SCRIPT, library, run, run_script

__all__ = ["library"]

TO_MQA = [*CONVERT, "--to", "mqa"]


def all_verbs(group: click.Group = cli, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    return [
        verb
        for name, command in group.commands.items()
        for verb in (all_verbs(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)])
    ]


def test_sigterm_ends_a_verb_as_ctrl_c_does(library: SimpleNamespace) -> None:
    """The handler of pytest itself is kept apart."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    library.action = lambda **_: signal.raise_signal(signal.SIGTERM)
    try:
        result = run(*TO_MQA)
        again = signal.getsignal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert (result.exit_code, result.stderr.strip()) == (130, "Error: Interrupted.")
    assert again is signal.SIG_DFL


def test_numbers_of_tokens_name_their_short_forms() -> None:
    for verb in (["uptrain", "X"], ["sample", "X", "--out", "x.jsonl"]):
        result = run(*verb, "--tokens", "8kk")
        assert "such as 40000, 40K or 21M" in result.stderr and result.exit_code == 2


@pytest.mark.parametrize(
    ("verb", "words"), [("convert", ["OUT"]), ("inspect", []), ("bench", ["--baseline", "PARENT"])]
)
def test_a_context_has_the_form_that_tables_print(verb: str, words: list[str]) -> None:
    context = next(param for param in cli.commands[verb].params if param.name == "context")
    for number in (1000, 8192, 131_072):
        assert context.type.convert(token_count(number).replace(",", ""), context, None) == number
    for word in ("8KK", "0K", "K", "-8K", "8.5K"):
        result = run(verb, "MODEL", *words, "--context", word)
        assert result.exit_code == 2 and "such as 8192 or 8K" in result.stderr


@pytest.mark.parametrize(
    ("typed", "suggestion"),
    [(["convrt"], "convert"), (["convert", "--grops", "2"], "--groups"), (["recipes", "lst"], "list")],
)
def test_a_misspelt_word_gets_a_suggestion(typed: list[str], suggestion: str) -> None:
    result = run(*typed)
    assert result.exit_code == 2 and suggestion in result.stderr and "--help` lists the options." in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("verb", all_verbs(), ids=" ".join)
def test_every_verb_has_help_with_each_option_once(verb: tuple[str, ...]) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0
    command: Any = cli
    for name in verb:
        command = command.commands[name]
    assert command.help
    words = ["headwise", *verb]
    assert any(line.split()[: len(words)] == words for line in result.stdout.splitlines()), "an example"
    assert max(map(len, result.stdout.splitlines())) <= 100
    listed = [line.strip().split("  ")[0].replace(",", " ").split() for line in result.stdout.splitlines()]
    for param in command.params:
        if isinstance(param, click.Option):
            flag = (param.opts or param.secondary_opts)[-1]
            assert sum(words[:1] != [] and words[0].startswith("-") and flag in words for words in listed) == 1, (
                flag
            )


@pytest.mark.parametrize(
    ("words", "incomplete", "expected"),
    [
        (["uptrain", "m", "--recipe"], "di", "distill"),
        (["eval", "m", "--recipe"], "qu", "quick"),
        (["recipes", "show"], "lay", "layerwise"),
        (["convert", "m", "out", "--to", "mla", "--method"], "trans", "transmla"),
    ],
)
def test_recipes_and_methods_are_completed(words: list[str], incomplete: str, expected: str) -> None:
    completion = click.shell_completion.ShellComplete(cli, {}, "headwise", "_HEADWISE_COMPLETE")
    assert [item.value for item in completion.get_completions(words, incomplete)] == [expected]


@pytest.mark.parametrize(
    ("instruction", "printed"), [("bash_source", "complete -o nosort"), ("bash_complete", "plain,distill\n")]
)
def test_completion_prints_nothing_else(instruction: str, printed: str) -> None:
    words = {"COMP_WORDS": "headwise uptrain m --recipe di", "COMP_CWORD": "4"}
    done = run_script(_HEADWISE_COMPLETE=instruction, **words)
    assert (done.returncode, done.stderr) == (0, "") and printed in done.stdout


@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (HeadwiseError("config.json has no heads.", "Give it some."), 2, "Give it some."),
        (KeyboardInterrupt(), 130, "Interrupted"),
        (PermissionError(13, "Permission denied", "/nowhere"), 2, "/nowhere: Permission denied."),
        (OSError(5, "Input/output error"), 2, "the disk reports an error"),
        (MemoryError(), 2, "not enough memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate"), 2, "not enough memory"),
        (torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2 GiB"), 2, "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), 2, "not enough memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"), 2, "not enough memory"),
        (OSError(12, "Cannot allocate memory"), 2, "not enough memory"),
        (KeyError("q_proj"), 2, "HEADWISE_DEBUG=1"),
    ],
)
def test_an_exception_becomes_a_sentence_and_a_code(
    problem: BaseException, code: int, message: str, library: SimpleNamespace
) -> None:
    def fail(**_: Any) -> None:
        raise problem

    library.action = fail
    result = run(*TO_MQA, HEADWISE_DEBUG="")
    assert (result.exit_code, result.stdout) == (code, "")
    assert message in result.stderr and "Traceback" not in result.stderr
    assert "Traceback" in run(*TO_MQA, HEADWISE_DEBUG="1").stderr


def test_the_hint_for_memory_names_the_option_that_needs_less(monkeypatch: pytest.MonkeyPatch) -> None:
    from headwise.eval import evaluate

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(evaluate, "evaluate_model", fail)
    assert "Give --batch-size a smaller number" in run("eval", "child", HEADWISE_DEBUG="").stderr


def test_the_hint_of_an_interrupted_conversion_is_printed(library: SimpleNamespace) -> None:
    from headwise.io.workdir import Interrupted

    def interrupt(**_: Any) -> None:
        raise Interrupted("Interrupted; the work is kept.", "Continue with `resume`.")

    library.action = interrupt
    result = run(*TO_MQA)
    assert result.exit_code == 130 and "Continue with --resume." in result.stderr


def test_flags_replace_the_field_names_of_a_message() -> None:
    convert = cli.commands["convert"]
    assert with_flags("`rope_dim` needs `rank`; `verify` and `moment`", convert) == (
        "--rope-dim needs --rank; --no-verify and `moment`"
    )
    assert with_flags("`settings` is wrong", cli.commands["uptrain"]) == "--set is wrong"


def test_a_closed_pipe_does_not_change_the_exit_code_of_a_failure() -> None:
    with subprocess.Popen(
        [*SCRIPT, "inspect", "nowhere"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        process.stderr.close()
        assert process.wait() == 2


def test_a_closed_pipe_is_not_an_error() -> None:
    with subprocess.Popen(
        [*SCRIPT, "recipes", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == "" and process.wait() == 0


def test_a_second_interrupt_ends_the_process_without_a_traceback() -> None:
    """The first one ends the verb; the second comes while the interpreter shuts down."""
    program = (
        "import atexit, os, signal, time\n"
        "from headwise.cli import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "atexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))\n"
        "cli.commands['recipes'].commands['list'].callback = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "cli.main(['recipes', 'list'])\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGINT
    assert "Interrupted" in done.stderr and "Traceback" not in done.stderr
