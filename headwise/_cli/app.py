"""Define how every verb behaves: sections in its help, one sentence for an error, exit codes, quiet libraries."""

from __future__ import annotations

import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from typing import Any

import click
import click.shell_completion

from headwise._cli import console
from headwise.convert.settings import methods_of
from headwise.errors import HeadwiseError, SettingError, is_out_of_memory
from headwise.fields import Setting, flag_of, settings_of, whole_number
from headwise.io.fs import REASONS

# The messages of torch for a failed allocation, on the CPU and on a GPU.
RESUME_HINT = "`--dry-run` forecasts the memory of a conversion; --resume continues from the work that is done."


class ParsedType(click.ParamType[Any]):
    """A value that a function reads from a word.

    Args:
        name: of the type, in upper case in the help.
        parse: returns the value, or raises ValueError.
        wanted: ends the sentence "'x' is not ...".
    """

    def __init__(self, name: str, parse: Callable[[str], Any], wanted: str) -> None:
        self.name, self.parse, self.wanted = name, parse, wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value, or fail with a usage error."""
        try:
            return self.parse(value)
        except ValueError:
            self.fail(f"{value!r} is not {self.wanted}.", param, ctx)


class SettingType(click.ParamType[Any]):
    """The value of a field of a settings class.

    A word that `Setting.parse` cannot read is passed on unchanged: the settings object refuses it, with the same
    message as in Python.

    Args:
        setting: the field.
    """

    def __init__(self, setting: Setting) -> None:
        self.setting, self.name = setting, setting.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the parsed value, or the word itself."""
        try:
            return self.setting.parse(value)
        except (ValueError, OverflowError):
            return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        """Return the legal values that begin with a word; of `--method`, those of the given `--to`."""
        legal = self.setting.choices
        if param.name == "method":
            legal = methods_of(ctx.params.get("to")) or legal
        return [click.shell_completion.CompletionItem(c) for c in legal if c.startswith(incomplete)]


class Option(click.Option):
    """An option with its section of the help.

    Args:
        names: the spellings, and the name of the parameter where it differs, separated by spaces.
        help: one sentence.
        section: the heading in the help.
        **more: as click.Option.
    """

    def __init__(self, names: str, help: str, section: str = "Options", **more: Any) -> None:
        self.section = section
        super().__init__(names.split(), help=help, **{"default": None, **more})

    def get_help_extra(self, ctx: click.Context) -> Any:
        """Return nothing: the help text names the default and the range where they matter."""
        return {}


def flag_option(names: str, help: str, **more: Any) -> Option:
    """Return an option without a value."""
    return Option(names, help, is_flag=True, **more)


def length_option(names: str, help: str, **more: Any) -> Option:
    """Return an option with the tokens of a sequence, at least 1, such as 8192 or 8K."""
    wanted = "a whole number of at least 1, such as 8192 or 8K"
    return Option(names, help, type=ParsedType("NUMBER", whole_number, wanted), metavar="N", **more)


def options_of(kind: type) -> list[Option]:
    """Return the options of a settings class: spellings, help, sections and completion come from its fields."""
    return [_option(name, field.default, setting) for name, (field, setting) in settings_of(kind).items()]


def _option(name: str, default: Any, setting: Setting) -> Option:
    names = f"{flag_of(name, setting)} {name}"
    if setting.is_flag:
        return Option(names, setting.help, setting.section, is_flag=True, flag_value=not default)
    return Option(
        names,
        setting.help,
        setting.section,
        type=SettingType(setting),
        metavar=setting.metavar,
        multiple=setting.multiple,
    )


def check_options(kind: type, options: dict[str, Any]) -> None:
    """Make a settings object of the options of a verb, so that a wrong value fails before the heavy imports.

    Args:
        kind: the settings class.
        options: what was typed, by the name of the field; other names are passed over.

    Raises:
        SettingError: a value is not legal.
    """
    kind(**{name: value for name, value in options.items() if name in settings_of(kind)})


def with_flags(text: str, command: click.Command) -> str:
    """Replace the field names in backquotes, in a message of the library, with the flags of a command.

    Args:
        text: the message.
        command: the verb that runs.
    """
    flags = {
        param.name: (param.opts or param.secondary_opts)[0]
        for param in command.params
        if isinstance(param, click.Option)
    }
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), text)


class Verb(click.Command):
    """A command with --json, -q and -v, whose function gets only the options that were typed."""

    def __init__(self, name: str | None, **more: Any) -> None:
        super().__init__(name, **more)
        # A new list: two commands may share one.
        self.params = [
            *self.params,
            flag_option("--json", "One JSON object on stdout, all else on stderr."),
            flag_option("-q --quiet", "No progress and no notes."),
            flag_option("-v --verbose", "More notes, and the warnings of libraries."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        """Configure the output, then call the function of the verb."""
        json, quiet, verbose = (bool(ctx.params.pop(name)) for name in ("json", "quiet", "verbose"))
        console.configure(
            json=json, quiet=quiet, verbose=verbose, translate=partial(with_flags, command=ctx.command)
        )
        if json:
            ctx.with_resource(redirect_stdout(sys.stderr))
        _quiet_libraries(verbose)
        global _running
        _running = ctx
        # A repeatable option that was not typed is an empty tuple.
        ctx.params = {name: value for name, value in ctx.params.items() if value is not None and value != ()}
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options under the headings of their sections."""
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            if isinstance(param, click.Option) and (record := param.get_help_record(ctx)):
                sections.setdefault(getattr(param, "section", "Options"), []).append(record)
        for name, records in sorted(sections.items(), key=lambda item: item[0] == "Options"):
            with formatter.section(name):
                formatter.write_dl(records, col_max=26)


class Verbs(click.Group):
    """The group of verbs, and the one place where an exception becomes a sentence and an exit code."""

    command_class = Verb
    group_class = type

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order in which a user needs them."""
        return list(self.commands)

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        """Run a command line and exit with its code."""
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **more)
        console.configure()
        # Schedulers end a process by SIGTERM: what is kept, and how to go on, is the same as after Ctrl-C.
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            code = run(*args, standalone_mode=False, **more) or 0
        except BrokenPipeError:  # a reader such as `head` closed the pipe of a help text, which click writes
            console.discard(sys.stdout)
            code = 0 if _running is None else 2
        except BaseException as problem:
            if isinstance(problem, SystemExit) and _running is None:  # shell completion
                raise
            if isinstance(problem, click.Abort | KeyboardInterrupt):
                for number in (signal.SIGINT, signal.SIGTERM):  # another one ends the process without a traceback
                    signal.signal(number, signal.SIG_DFL)
            code = report_error(problem)
        console.flush()
        sys.exit(code)


# The verb that runs, for the hint of its errors.
_running: click.Context | None = None


def report_error(problem: BaseException) -> int:
    """Print an exception as one sentence, and return the exit code."""
    if isinstance(problem, click.Abort) and problem.__cause__:
        problem = problem.__cause__  # the message of an interrupted conversion names --resume
    if os.environ.get("HEADWISE_DEBUG"):
        console.traceback(problem)
    match problem:
        case HeadwiseError():
            context = click.get_current_context(silent=True) or _running
            hint = problem.hint
            if hint is None and isinstance(problem, SettingError) and context:
                hint = _help_hint(context)
            console.error(problem.message, hint)
            return problem.exit_code
        case click.exceptions.NoArgsIsHelpError():
            for line in problem.format_message().splitlines():
                console.note(line)
        case click.UsageError():
            console.error(problem.format_message(), _help_hint(problem.ctx))
        case click.ClickException():
            console.error(problem.format_message())
        case click.Abort() | KeyboardInterrupt():
            console.error("Interrupted.")
            return 130
        case _ if is_out_of_memory(problem):
            detail = next(iter(str(problem).strip().splitlines()), "").rstrip(".")
            console.error(f"There is not enough memory{detail and f': {detail}'}.", _memory_hint())
        case OSError(filename=str(name), strerror=str(reason)):
            console.error(f"{name}: {reason}.")
        case OSError(errno=int(number)) if number in REASONS:
            # A library had the file open, and its exception does not name the file.
            reason, hint = REASONS[number]
            console.error(f"A file cannot be read or written: {reason}.", hint)
        case _:
            console.error(
                f"headwise failed: {type(problem).__name__}: {problem}",
                "This is a bug: run it again with HEADWISE_DEBUG=1 and report the traceback.",
            )
    return 2


def _memory_hint() -> str:
    """Return what to do without memory; only some verbs have a forecast and can resume, or a size of batches."""
    options = {option.name for option in _running.command.params} if _running else set()
    if {"dry_run", "resume"} <= options:
        return RESUME_HINT
    smaller = "Give --batch-size a smaller number, or free" if "batch_size" in options else "Free"
    return f"{smaller} memory that other processes use."


def _help_hint(context: click.Context | None) -> str:
    return f"`{context.command_path if context else 'headwise'} --help` lists the options."


def _quiet_libraries(verbose: bool) -> None:
    """Turn off the progress bars of libraries, and their advice to callers."""
    console.clean_logs()
    if not verbose:
        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
