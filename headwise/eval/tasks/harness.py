"""lm-eval at work on one model: tasks found and loaded once, run by its own evaluator, logged in its own layout.

What is compared later is read back from those files (`samples.py`), so that every figure can be had again from
what lies in the report's folder.
"""

from __future__ import annotations

import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from headwise.errors import HeadwiseError
from headwise.eval import processes
from headwise.progress import SILENT, Progress

OWN_TASKS = Path(__file__).parent
INSTALL = "pip install 'headwise[eval]'"
BACKENDS = ("hf", "vllm")
# Of figures without a closed form; lm-eval's own 100,000 take minutes, and the comparison does not use them.
BOOTSTRAPS = 1000


@dataclass(frozen=True)
class Options:
    """How lm-eval is called: its own arguments, under its own names."""

    num_fewshot: int | None
    limit: float | None
    batch_size: int | str
    backend: str
    dtype: str
    device: str
    seed: int


class Harness:
    """Tasks, loaded.

    Args:
        tasks: names that lm-eval knows, patterns such as "mmlu_*", or YAML files.
        include: more folders with tasks.
        tokenizer: for tasks that measure their prompts in tokens.
        metadata: arguments for tasks that make their own data.

    Raises:
        HeadwiseError: lm-eval is not installed; there is no such task; its data cannot be had.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        include: Sequence[Path] = (),
        tokenizer: Any = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        try:
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise HeadwiseError("The recipe's tasks are run by lm-eval, which is not installed.", INSTALL) from None
        folders = [OWN_TASKS, *include]
        with ExitStack() as stack:
            stack.enter_context(quiet())
            clean = stack.enter_context(tempfile.TemporaryDirectory())
            if tokenizer is not None:
                # Saved anew: some tasks would run code that a tokenizer's files name.
                tokenizer.init_kwargs.pop("auto_map", None)
                tokenizer.save_pretrained(clean)
                metadata = {**(metadata or {}), "tokenizer": clean}
            # lm-eval's own fourteen thousand tasks take it seconds to list.
            manager = TaskManager(include_path=folders, include_defaults=False, metadata=metadata)
            if not all(_known(manager, name) for name in tasks):
                manager = TaskManager(include_path=folders, metadata=metadata)
            self.tasks = [task for name in tasks for task in _load(manager, name)]
            self._manager = manager

    def run(
        self,
        folder: str,
        name: str,
        options: Options,
        into: Path,
        progress: Progress = SILENT,
        label: str = "tasks",
    ) -> float:
        """Evaluate one model.

        Args:
            folder: of the model.
            name: what its results call it.
            into: where lm-eval's result and sample files go; made if it is not there.
            label: of the stage that `progress` hears of.

        Returns:
            Seconds inside lm-eval's evaluator.

        Raises:
            HeadwiseError: a task has fewer questions than there are processes.
        """
        from lm_eval import simple_evaluate
        from lm_eval.loggers import EvaluationTracker

        processes.check_shares(self.tasks, options.limit)
        with quiet(), tempfile.TemporaryDirectory(dir=into.parent) as scratch:
            lm = _model(folder, options)
            _watch(lm, progress, label)
            tracker = EvaluationTracker(output_path=scratch)
            start = time.perf_counter()
            found = simple_evaluate(
                lm,
                # Read by the tracker and the result file; the model itself is made already.
                model_args={"pretrained": name, "dtype": options.dtype},
                tasks=self.tasks,
                task_manager=self._manager,  # without it lm-eval lists its own tasks again
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=options.batch_size,
                device=options.device,
                bootstrap_iters=BOOTSTRAPS,
                evaluation_tracker=tracker,
                random_seed=options.seed,
                numpy_random_seed=1234 + options.seed,
                torch_random_seed=1234 + options.seed,
                fewshot_random_seed=1234 + options.seed,
            )
            if found is not None:  # the other processes of `accelerate launch` have no results
                samples = found.pop("samples")
                tracker.save_results_aggregated(results=found, samples=samples)
                for task, logged in samples.items():
                    tracker.save_results_samples(task_name=task, samples=logged)
            seconds = time.perf_counter() - start
            into.mkdir(parents=True, exist_ok=True)
            for path in Path(scratch).rglob("*.json*"):
                path.replace(into / path.name)
        return seconds


class quiet(ExitStack):
    """lm-eval and what it calls print and draw bars of their own; none of it is a result."""

    def __enter__(self) -> quiet:
        super().__enter__()
        for redirect in (redirect_stdout, redirect_stderr):
            self.enter_context(redirect(io.StringIO()))
        from lm_eval import evaluator

        ask = evaluator.get_git_commit_hash
        self.callback(setattr, evaluator, "get_git_commit_hash", ask)
        evaluator.get_git_commit_hash = lambda: _unheard(ask)
        return self


def _unheard(ask: Callable[[], Any]) -> Any:
    """Ask git, whose complaint that a folder is in no repository goes past Python's streams."""
    own = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
    try:
        return ask()
    finally:
        os.dup2(own, 2)
        os.close(own)


def _known(manager: Any, name: str) -> bool:
    return name in manager.all_tasks or Path(name).is_file()


def _load(manager: Any, name: str) -> list[Any]:
    """The task, group or tag of that name, its data at hand."""
    if any(character in name for character in "*?["):
        names = [found for found in manager.all_subtasks if fnmatch(found, name)]
    else:
        names = [name] if _known(manager, name) else []
    if not names:
        near = get_close_matches(name, manager.all_tasks, 1)
        raise HeadwiseError(
            f"lm-eval has no task {name!r}.",
            (f"Did you mean {near[0]}? " if near else "")
            + "`lm-eval ls tasks` lists them; --include-path adds yours.",
        )
    loaded: list[Any] = []
    for one in names:
        try:
            found = manager.load([one])
        except HeadwiseError:
            raise
        except ImportError as error:
            raise HeadwiseError(f"Task {one} needs more packages: {_line(error)}.") from error
        except Exception as error:  # whatever reading a stranger's files or the network raises
            if _is_connection(error):
                raise HeadwiseError(
                    f"Task {one} downloads its questions, and the Hub cannot be reached.",
                    "Run it once with a connection, or use --recipe quick, which needs none.",
                ) from error
            raise HeadwiseError(f"Task {one} cannot be loaded: {_line(error)}.") from error
        groups = found.get("groups", {})
        loaded += [groups[one]] if one in groups else found["tasks"].values()
    return loaded


def _is_connection(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")


def _model(folder: str, options: Options) -> Any:
    """lm-eval's model. It loads the weights itself, so that several processes share the work."""
    from lm_eval.api.registry import get_model

    arguments: dict[str, Any] = {"pretrained": folder, "dtype": options.dtype, "trust_remote_code": False}
    if options.backend == "vllm":
        try:
            import vllm  # noqa: F401
        except ImportError:
            raise HeadwiseError("--backend vllm needs vLLM, which is not installed.", "pip install vllm") from None
    more = {"batch_size": options.batch_size, "device": options.device}
    processes.join(options.device)
    lm = get_model(options.backend).create_from_arg_obj(arguments, more)
    if (accelerator := getattr(lm, "accelerator", None)) is not None:
        # lm-eval shares the work out only where it sees several GPUs, and numbers each machine's processes anew.
        lm._rank, lm._world_size = accelerator.process_index, accelerator.num_processes
    return lm


def _watch(lm: Any, progress: Progress, label: str) -> None:
    """Report every answered request, and ask each once."""
    from lm_eval.api.model import CacheHook

    class Answered(CacheHook):
        def add_partial(self, *_: Any) -> None:
            progress.advance(1)

    def told(ask: Any) -> Any:
        def wrapper(requests: list[Any], *more: Any, **options: Any) -> Any:
            processes.set_padding_aside(requests)
            progress.stage(label, total=len(requests), unit="requests")
            return ask(requests, *more, **options)

        return wrapper

    lm.set_cache_hook(Answered(None))
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):
        setattr(lm, kind, told(getattr(lm, kind)))
