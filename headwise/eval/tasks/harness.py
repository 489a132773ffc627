"""Run lm-eval on one model: load tasks once, evaluate with lm-eval's own evaluator, log in lm-eval's own files.

`samples.py` reads the figures back from these files, so every figure can be recomputed from the report's folder.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from headwise import compat
from headwise.errors import HeadwiseError, SettingError
from headwise.eval import processes
from headwise.eval.model import EvalModel
from headwise.eval.settings import EvalSettings
from headwise.eval.tasks.answers import count_answers, write_counts
from headwise.eval.tasks.resume import AnswerLog
from headwise.format import public_data
from headwise.io.workdir import write_file_atomically
from headwise.progress import SILENT, Progress

OWN_TASKS = Path(__file__).parent
INSTALL = "pip install 'headwise[eval]'"
# Resamples of lm-eval's standard errors without a closed form. Its default of 100,000 takes minutes, and the
# comparison does not use them.
BOOTSTRAP_RESAMPLES = 1000
REQUEST_TYPES = ("loglikelihood", "loglikelihood_rolling", "generate_until")


class UnreachableQuestions(HeadwiseError):
    """A task downloads its questions, and the Hub cannot be reached."""


class Harness:
    """Loaded tasks of lm-eval.

    Attributes:
        tasks: the loaded tasks.
        not_run: names of the optional tasks whose questions cannot be reached.

    Args:
        tasks: names that lm-eval knows, patterns such as "mmlu_*", or YAML files.
        include: more folders with tasks.
        tokenizer: for tasks that measure their prompts in tokens.
        metadata: arguments of tasks that generate their own questions.
        optional: names of tasks that are left out if their questions cannot be reached.

    Raises:
        HeadwiseError: lm-eval is not installed; there is no such task; its data cannot be loaded.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include: Sequence[Path] = (),
        tokenizer: Any = None,
        metadata: dict[str, Any] | None = None,
        optional: Collection[str] = (),
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise HeadwiseError(
                "The tasks of an evaluation need lm-eval, which is not installed.", INSTALL
            ) from None
        folders = [OWN_TASKS, *include]
        with silenced(), tempfile.TemporaryDirectory() as scratch:
            if tokenizer is not None:
                # Saved without `auto_map`: some tasks would run the code that a tokenizer's files name.
                tokenizer.init_kwargs.pop("auto_map", None)
                tokenizer.save_pretrained(scratch)
                metadata = {**(metadata or {}), "tokenizer": scratch}
            # Listing lm-eval's own fourteen thousand tasks takes seconds.
            manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
            if not all(_is_known(manager, name) for name in tasks):
                manager = TaskManager(include_path=folders, metadata=metadata)
            self.tasks: list[Any] = []
            self.not_run: list[str] = []
            for name in tasks:
                try:
                    self.tasks += _load_tasks(manager, name)
                except UnreachableQuestions:
                    if name not in optional:
                        raise
                    self.not_run.append(name)
            if not self.tasks:
                raise UnreachableQuestions(
                    f"`task_data` has no questions of {', '.join(self.not_run)}, and the Hub cannot be reached.",
                    "Write files such as hellaswag.jsonl into that folder, or use the recipe quick.",
                )
            self._manager = manager

    def run(
        self,
        model: EvalModel,
        settings: EvalSettings,
        into: Path,
        progress: Progress = SILENT,
        label: str = "tasks",
        answers: Path | None = None,
    ) -> float:
        """Evaluate one model.

        Args:
            model: the model.
            settings: resolved settings.
            into: folder for lm-eval's result and sample files; made if it does not exist.
            progress: receives a stage for each type of request.
            label: name of these stages.
            answers: folder of the answers that an interrupted run has already; they are added to it. None: none.

        Returns:
            Seconds inside lm-eval's evaluator.

        Raises:
            HeadwiseError: a task has fewer questions than there are processes.
        """
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        processes.check_questions(self.tasks, settings.limit)
        with silenced(), in_one_process(), tempfile.TemporaryDirectory(dir=into.parent) as scratch:
            lm = _make_lm(model, settings)
            log = None if answers is None else AnswerLog(answers, processes.rank())
            _report_requests(lm, progress, label, log)
            tracker = EvaluationTracker(output_path=scratch)
            start = time.perf_counter()
            results = simple_evaluate(
                lm,
                # For the tracker and the result file; the model itself exists already.
                model_args={"pretrained": model.name, "dtype": settings.dtype},
                tasks=self.tasks,
                task_manager=self._manager,  # otherwise lm-eval lists its own tasks again
                num_fewshot=settings.num_fewshot,
                limit=settings.limit,
                apply_chat_template=settings.apply_chat_template,
                batch_size=settings.batch_size,
                device=settings.device,
                bootstrap_iters=BOOTSTRAP_RESAMPLES,
                evaluation_tracker=tracker,
                random_seed=settings.seed,
                numpy_random_seed=1234 + settings.seed,
                torch_random_seed=1234 + settings.seed,
                fewshot_random_seed=1234 + settings.seed,
            )
            counts = {}
            if results is not None:  # only the first process of `accelerate launch` has results
                samples = results.pop("samples")
                tracker.save_results_aggregated(results=results, samples=samples)
                counts = {task: count_answers(logged, lm) for task, logged in samples.items()}
                for task, logged in samples.items():
                    tracker.save_results_samples(task_name=task, samples=logged)
            seconds = time.perf_counter() - start
            into.mkdir(parents=True, exist_ok=True)
            for path in Path(scratch).rglob("*.json*"):
                if path.suffix == ".json":  # lm-eval records where tasks, tokenizer and questions were
                    content = public_data(json.loads(path.read_bytes()))
                    write_file_atomically(into / path.name, json.dumps(content).encode())
                else:
                    path.replace(into / path.name)
            write_counts(counts, into)
        return seconds


@contextmanager
def silenced() -> Iterator[None]:
    """Discard what lm-eval and its dependencies print, progress bars included."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), compat.silent_lm_eval_git():
        yield


@contextmanager
def in_one_process() -> Iterator[None]:
    """Keep lm-eval's bootstrap of perplexities in this process.

    Its pool forks a process in which torch already runs threads. A fork that happens while a thread holds a lock
    never ends: an evaluation of LAMBADA hung that way.
    """
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before


def _is_known(manager: Any, name: str) -> bool:
    return name in manager.all_tasks or Path(name).is_file()


def _load_tasks(manager: Any, name: str) -> list[Any]:
    """Load the tasks, group or tag of a name, or of a pattern, with their data."""
    if any(character in name for character in "*?["):
        names = [task for task in manager.all_subtasks if fnmatch(task, name)]
    else:
        names = [name] if _is_known(manager, name) else []
    if not names:
        near = get_close_matches(name, manager.all_tasks, 1)
        raise SettingError(
            "tasks",
            f"`tasks` names {name!r}, which lm-eval does not have.",
            (f"Did you mean {near[0]}? " if near else "")
            + "`lm-eval ls tasks` lists its tasks; `include_path` adds yours.",
        )
    tasks: list[Any] = []
    for task in names:
        loaded = _load_task(manager, task)
        groups = loaded.get("groups", {})
        tasks += [groups[task]] if task in groups else loaded["tasks"].values()
    return tasks


def _load_task(manager: Any, task: str) -> Any:
    try:
        return manager.load([task])
    except HeadwiseError:
        raise
    except ImportError as error:
        raise HeadwiseError(f"Task {task} needs more packages: {_first_line(error)}.") from error
    except Exception as error:  # the task's own files, its data and the network can raise anything
        if _is_connection_error(error):
            raise UnreachableQuestions(
                f"Task {task} downloads its questions, and the Hub cannot be reached.",
                "Run it once with a connection, give `task_data`, or use the recipe quick, which needs neither.",
            ) from error
        raise HeadwiseError(f"Task {task} cannot be loaded: {_first_line(error)}.") from error


def _is_connection_error(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _make_lm(model: EvalModel, settings: EvalSettings) -> Any:
    """Make lm-eval's model, which loads the weights itself so that several processes can share the requests."""
    import transformers
    from lm_eval.api.registry import get_model

    arguments: dict[str, Any] = {"pretrained": model.folder, "dtype": settings.dtype, "trust_remote_code": False}
    if settings.backend == "vllm":
        try:
            import vllm  # noqa: F401
        except ImportError:
            raise SettingError(
                "backend", "`backend` is 'vllm', which needs vLLM, which is not installed.", "pip install vllm"
            ) from None
    more = {"batch_size": settings.batch_size, "device": settings.device}
    processes.join(str(settings.device))
    kind = get_model(settings.backend)
    if settings.backend == "hf" and model.auto_class != "AutoModelForCausalLM":
        # lm-eval takes a language model inside another model for a causal one, and finds no context in its config.
        kind = type(kind.__name__, (kind,), {"AUTO_MODEL_CLASS": getattr(transformers, model.auto_class)})
        arguments |= {"backend": "causal", "max_length": model.context}
    if settings.backend == "hf" and model.checkpoint is not None:
        kind = compat.load_lm_eval_weights(
            kind, lambda device: model.load(dtype=str(settings.dtype), device=device)
        )
    lm = kind.create_from_arg_obj(arguments, more)
    compat.set_lm_eval_ranks(lm)
    return lm


def _report_requests(lm: Any, progress: Progress, label: str, log: AnswerLog | None) -> None:
    """Report every answered request to `progress` and to the log, and give padding requests a copy of their own."""
    if log is not None and log.resumed:
        progress.note(f"{label}: {log.resumed:,} answers are from an interrupted run.")

    def reported(request_type: str, answer: Any) -> Any:
        def ask(requests: list[Any], *more: Any, **options: Any) -> Any:
            progress.stage(label, total=len(requests), unit="requests")
            return answer(requests, *more, **options)

        def wrapper(requests: list[Any], *more: Any, **options: Any) -> Any:
            processes.copy_padding(requests)
            if log is None:
                return ask(requests, *more, **options)
            return log.answer(request_type, requests, lambda missing: ask(missing, *more, **options))

        return wrapper

    def on_answer(request_type: str, arguments: Any, answer: Any) -> None:
        progress.advance(1)
        if log is not None:
            log.add(request_type, arguments, answer)

    compat.on_lm_eval_answer(lm, on_answer)
    for request_type in REQUEST_TYPES:
        setattr(lm, request_type, reported(request_type, getattr(lm, request_type)))
