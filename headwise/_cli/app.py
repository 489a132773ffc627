"""How every verb behaves: help in sections, sentences instead of tracebacks, exit codes, quiet libraries."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from difflib import get_close_matches
from typing import Any

import click
import click.shell_completion

from headwise._cli import console as ui
from headwise.convert.settings import methods_of
from headwise.errors import HeadwiseError, SettingError
from headwise.fields import Setting, settings_of
from headwise.io.fs import REASONS


class Choice(click.Choice):
    """A choice that guesses what was meant."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        close = get_close_matches(str(value), self.choices, 1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        return f"{value!r} is not one of {', '.join(self.choices)}.{meant}"


class Parsed(click.ParamType):
    """A value read by a function that raises ValueError."""

    def __init__(self, name: str, parse: Callable[[str], Any], wanted: str) -> None:
        self.name, self.parse, self.wanted = name, parse, wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.parse(value)
        except ValueError:
            self.fail(f"{value!r} is not {self.wanted}.", param, ctx)


class Option(click.Option):
    """An option with its section of the help and the `--to` layouts it acts on (none: it does not matter).

    `name` holds the spellings, and the parameter's name where it differs, separated by spaces.
    """

    def __init__(self, name: str, help: str, to: Sequence[str] = (), **more: Any) -> None:
        self.section, self.to = "Options", to
        super().__init__(name.split(), help=help, **{"default": None, **more})

    def get_help_extra(self, ctx: click.Context) -> Any:
        return {}  # the help text says the default and the range where they matter


class Word(click.ParamType):
    """A word that a settings object judges: what `parse` cannot read is passed on as it was typed."""

    def __init__(self, setting: Setting) -> None:
        self.setting, self.name = setting, setting.metavar

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return self.setting.parse(value)
        except (ValueError, OverflowError):
            return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[click.shell_completion.CompletionItem]:
        legal = self.setting.choices
        if param.name == "method":
            legal = methods_of(ctx.params.get("to")) or legal
        return [click.shell_completion.CompletionItem(c) for c in legal if c.startswith(incomplete)]


def options_of(kind: type) -> list[Option]:
    """Return the options of a settings class: spellings, help, sections and completion come from its fields."""
    return [_option(name, field.default, setting) for name, (field, setting) in settings_of(kind).items()]


def _option(name: str, default: Any, setting: Setting) -> Option:
    spelling = flag_of(name, setting)
    more: dict[str, Any] = {"is_flag": True, "flag_value": not default} if setting.is_flag else {}
    if not setting.is_flag:
        more = {"type": Word(setting), "metavar": setting.metavar, "multiple": setting.multiple}
    option = Option(f"{spelling} {name}", setting.help, **more)
    option.section = setting.section
    return option


def flag_of(name: str, setting: Setting | None = None) -> str:
    """Return the spelling of a field on the command line: rope_dim -> "--rope-dim"."""
    return (setting and setting.flag) or "--" + name.replace("_", "-")


def with_flags(text: str, command: click.Command | None) -> str:
    """Put the flags of a command in place of the field names that a message of the library has in backquotes."""
    flags = {
        param.name: (param.opts or param.secondary_opts)[0]
        for param in (command.params if command else ())
        if isinstance(param, click.Option)
    }
    return re.sub(r"`(\w+)`", lambda match: flags.get(match[1], match[0]), text)


def section(name: str, *options: Option, to: Sequence[str] = ()) -> list[Option]:
    """Put options under one heading of the help; `to` holds for those that say nothing else."""
    for option in options:
        option.section, option.to = name, option.to or to
    return list(options)


class Verb(click.Command):
    """A command that knows --json, -q and -v and passes on only what was typed."""

    def __init__(self, name: str | None, **more: Any) -> None:
        super().__init__(name, **more)
        # Not in place: two commands may share one list.
        self.params = [
            *self.params,
            Option("--json", "One JSON object on stdout, all else on stderr.", is_flag=True),
            Option("-q --quiet", "No progress and no notes.", is_flag=True),
            Option("-v --verbose", "More notes, and the libraries' own warnings.", is_flag=True),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        json, quiet, verbose = (bool(ctx.params.pop(name)) for name in ("json", "quiet", "verbose"))
        ui.configure(json=json, quiet=quiet, verbose=verbose)
        if json:
            ctx.with_resource(redirect_stdout(sys.stderr))
        _hush_libraries(verbose)
        global _running
        _running = ctx
        ctx.params = {name: value for name, value in ctx.params.items() if value is not None}
        return super().invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
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
        return list(self.commands)  # in the order of a user's work, not of the alphabet

    def main(self, *args: Any, standalone_mode: bool = True, **more: Any) -> Any:
        run: Any = super().main
        if not standalone_mode:
            return run(*args, standalone_mode=False, **more)
        ui.configure()
        try:
            code = run(*args, standalone_mode=False, **more) or 0
        except (BrokenPipeError, SystemExit):  # the reader, such as `head`, has seen enough; rich and click exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 0
        except BaseException as problem:
            code = explain(problem)
        sys.exit(code)


# The verb that runs, for the flags of its messages.
_running: click.Context | None = None


def explain(problem: BaseException) -> int:
    """Say what went wrong in a sentence, and return the exit code."""
    if isinstance(problem, click.Abort) and problem.__cause__:
        problem = problem.__cause__  # an interrupted conversion says how to go on
    if os.environ.get("HEADWISE_DEBUG"):
        ui.traceback(problem)
    match problem:
        case HeadwiseError():
            context = click.get_current_context(silent=True) or _running
            command = context.command if context else None
            hint = problem.hint
            if hint is None and isinstance(problem, SettingError) and context:
                hint = f"`{context.command_path} --help` lists what it takes."
            ui.error(with_flags(problem.message, command), with_flags(hint, command) if hint else None)
            return problem.exit_code
        case click.exceptions.NoArgsIsHelpError():
            for line in problem.format_message().splitlines():
                ui.note(line)
        case click.UsageError():
            verb = problem.ctx.command_path if problem.ctx else "headwise"
            ui.error(problem.format_message(), f"`{verb} --help` lists what it takes.")
        case click.ClickException():
            ui.error(problem.format_message())
        case click.Abort() | KeyboardInterrupt():
            ui.error("Interrupted.")
            return 130
        case MemoryError():
            ui.error("There is not enough memory.", OTHER_MEMORY)
        case RuntimeError() if any(words in str(problem) for words in NO_MEMORY):
            ui.error(f"There is not enough memory: {str(problem).strip().splitlines()[0]}", OTHER_MEMORY)
        case OSError(filename=str(name), strerror=str(reason)):
            ui.error(f"{name}: {reason}.")
        case OSError(errno=int(number)) if number in REASONS:
            # A library had the file open: which one it was, it does not say.
            reason, hint = REASONS[number]
            ui.error(f"A file cannot be read or written: {reason}.", hint)
        case _:
            ui.error(
                f"headwise failed: {type(problem).__name__}: {problem}",
                "This is a bug: run it again with HEADWISE_DEBUG=1 and report the traceback.",
            )
    return 2


# How torch says it, on the CPU and on a GPU.
NO_MEMORY = ("can't allocate memory", "out of memory")
OTHER_MEMORY = "`--dry-run` forecasts what a conversion needs; what was done before is kept for --resume."


def _hush_libraries(verbose: bool) -> None:
    """Our progress is the only one on the screen, and advice meant for a library's callers is not shown."""
    ui.clean_logs()
    if not verbose:
        import warnings

        warnings.simplefilter("ignore")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def flag(name: str, help: str, **more: Any) -> Option:
    """An option that is given or not."""
    return Option(name, help, is_flag=True, **more)


def number(name: str, help: str, minimum: int = 1, **more: Any) -> Option:
    """An option that takes a whole number."""
    return Option(name, help, type=click.IntRange(min=minimum), metavar="N", **more)


def choice(name: str, choices: Sequence[str], help: str, **more: Any) -> Option:
    """An option that takes one of `choices`."""
    return Option(name, help, type=Choice(list(dict.fromkeys(choices))), **more)


def parsed(name: str, parse: Callable[[str], Any], wanted: str, help: str, metavar: str) -> Option:
    """An option whose value `parse` reads; `wanted` ends the sentence "'x' is not ..."."""
    return Option(name, help, type=Parsed(metavar, parse, wanted), metavar=metavar)
