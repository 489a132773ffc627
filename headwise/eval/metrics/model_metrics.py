"""Measure one model by itself: tasks, perplexity, loss by position, continuations.

Everything lies in one folder, lm-eval's own files and `metrics.json`, so that the results of a parent can be kept
and read again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headwise.eval import processes
from headwise.eval.metrics.generation import write_continuations
from headwise.eval.metrics.inputs import EvalInputs
from headwise.eval.model import EvalModel
from headwise.eval.settings import EvalSettings
from headwise.eval.tasks.harness import Harness
from headwise.eval.tasks.samples import TaskResults, read_results
from headwise.io.workdir import publish_folder, scratch_folder, write_file_atomically
from headwise.measure.loss import pair_nats, prompt_nats, token_nats
from headwise.measure.positions import PositionLoss, average_by_position
from headwise.progress import Progress
from headwise.schema import restore

METRICS = "metrics.json"
# Tokens in one forward pass.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class ModelMetrics:
    """Figures of one model.

    Attributes:
        nats: sum of nats of each block of text, of each target, or of each text of an image.
        tokens: predicted tokens in each of them.
        curve: loss by position, of the windows if there are any, else of the blocks.
        written: greedy continuations, as token ids; None: not measured.
        seconds: wall clock by stage.
        lm_eval_seconds: the part of `seconds` spent inside lm-eval.
        results: figures of the tasks; None without tasks.
    """

    nats: tuple[float, ...] = ()
    tokens: tuple[int, ...] = ()
    curve: PositionLoss | None = None
    written: tuple[tuple[int, ...], ...] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    lm_eval_seconds: float = 0.0
    results: TaskResults | None = None


def measure_model(
    model: EvalModel,
    role: str,
    harness: Harness | None,
    settings: EvalSettings,
    inputs: EvalInputs,
    into: Path,
    progress: Progress,
    answers: Path | None = None,
) -> ModelMetrics | None:
    """Measure a model, write everything into a new folder, and read it from there.

    Args:
        model: the model.
        role: "child" or "parent", for the stages of `progress`.
        harness: the tasks; None without tasks.
        settings: resolved settings.
        inputs: text and prompts.
        into: the folder to make.
        progress: receives the stages.
        answers: folder of the answers to tasks that an interrupted run has already; None: none.

    Returns:
        The figures; None in a process that only computes its share.
    """
    seconds: dict[str, float] = {}
    lm_eval_seconds, start = 0.0, time.perf_counter()
    into.mkdir(parents=True)
    if harness is not None:
        lm_eval_seconds = harness.run(model, settings, into, progress, f"{role}: tasks", answers)
        seconds["tasks"] = time.perf_counter() - start
        _free_memory()
    metrics = ModelMetrics(lm_eval_seconds=lm_eval_seconds, seconds=seconds)
    if inputs.has_text or (processes.is_main() and inputs.prompts is not None):
        start = time.perf_counter()
        loaded = model.load(dtype=str(settings.dtype), device=str(settings.device))
        metrics = replace(metrics, **_measure_text(loaded, inputs, role, progress))
        if processes.is_main() and inputs.prompts is not None:
            progress.stage(f"{role}: continuations", total=len(inputs.prompts), unit="prompts")
            continuations = write_continuations(loaded, inputs.prompts, inputs.new_tokens)
            progress.advance(len(continuations))
            metrics = replace(metrics, written=tuple(map(tuple, continuations)))
        seconds["text"] = time.perf_counter() - start
        del loaded
        _free_memory()
    if not processes.is_main():
        return None
    plain = {key: value for key, value in asdict(metrics).items() if key != "results"}
    write_file_atomically(into / METRICS, json.dumps(plain).encode())
    return read_metrics(into, tasks=harness is not None)


def read_metrics(folder: Path, *, tasks: bool) -> ModelMetrics:
    """Read what `measure_model` wrote into a folder.

    Args:
        folder: the folder.
        tasks: whether it holds results of tasks.

    Raises:
        OSError: a file is missing.
        ValueError: a file is not JSON.
    """
    metrics = restore(ModelMetrics, json.loads((folder / METRICS).read_text(encoding="utf-8")))
    return replace(metrics, results=read_results(folder) if tasks else None)


def _measure_text(model: Any, inputs: EvalInputs, role: str, progress: Progress) -> dict[str, Any]:
    """Measure this process's share of the batches, and return the figures of all of them."""
    measured: dict[str, Any] = {}
    texts = [text for text in (inputs.blocks, inputs.windows) if text is not None]
    for text in texts:
        rows = max(1, TOKENS_AT_ONCE // text.shape[1])
        batches = text.split(rows)  # the same ones in any number of processes, so that rounding is the same
        share = processes.our_share(len(batches))
        progress.stage(f"{role}: text", total=sum(len(batches[place]) for place in share), unit="blocks")
        parts = {}
        for place in share:
            parts[place] = token_nats(model, batches[place], batch_size=rows)
            progress.advance(len(batches[place]))
        nats = torch.cat(processes.gather_shares(parts))
        if text is inputs.blocks:
            measured |= {"nats": tuple(nats.double().sum(1).tolist()), "tokens": (nats.shape[1],) * len(nats)}
        if inputs.width and text is texts[-1]:
            measured["curve"] = average_by_position(nats, inputs.width)
    if (pairs := inputs.pairs) is not None:
        rows = max(1, TOKENS_AT_ONCE // max(pairs.sources.shape[1], pairs.targets.shape[1]))
        share = processes.our_share(-(-len(pairs) // rows))
        progress.stage(f"{role}: pairs", total=sum(len(pairs[_rows(place, rows)]) for place in share), unit="pairs")
        parts = {}
        for place in share:
            batch = pairs[_rows(place, rows)]
            parts[place] = pair_nats(model, batch, batch_size=rows)
            progress.advance(len(batch))
        nats = torch.cat(processes.gather_shares(parts)).double().sum(1)
        measured |= {"nats": tuple(nats.tolist()), "tokens": tuple(pairs.predicted.sum(1).tolist())}
    if (images := inputs.images) is not None:
        share = processes.our_share(len(images))
        progress.stage(f"{role}: images", total=len(share), unit="pairs")
        parts = {}
        for place in share:
            parts[place] = prompt_nats(model, images[place])
            progress.advance(1)
        every = processes.gather_shares(parts)
        measured |= {"nats": tuple(float(n.double().sum()) for n in every), "tokens": tuple(map(len, every))}
    return measured


def _rows(place: int, rows: int) -> slice:
    return slice(place * rows, (place + 1) * rows)


class ResultCache:
    """Results of earlier runs, each under a hash of everything that they depend on.

    Attributes:
        folder: of complete results.
        answers: folder of the answers to tasks of a run that is not complete.

    Args:
        identity: plain data: content of the model, tasks, settings, versions.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        root = os.environ.get("HEADWISE_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "headwise"
        )
        self.folder = Path(root) / "eval" / key
        self.answers = self.folder.with_name(f"{key}-answers")

    def copy_to(self, into: Path, *, tasks: bool) -> ModelMetrics | None:
        """Copy the cached results into a new folder and read them.

        Args:
            into: the folder to make.
            tasks: whether results of tasks are needed.

        Returns:
            The figures; None if there are no readable results, and then `into` does not exist.
        """
        try:
            if not self.folder.is_dir():
                return None
            shutil.copytree(self.folder, into)
            return read_metrics(into, tasks=tasks)
        except Exception:  # an interrupted run or another program wrote it: measure again
            shutil.rmtree(into, ignore_errors=True)
            return None

    def store(self, folder: Path) -> None:
        """Keep the content of a folder and replace what was cached before.

        Args:
            folder: the folder that `measure_model` made.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(self.folder.parent, "store") as scratch:
            new = scratch / "new"
            shutil.copytree(folder, new)
            publish_folder(new, self.folder, replaced=scratch / "old")
        shutil.rmtree(self.answers, ignore_errors=True)

    def discard(self) -> None:
        """Remove the results and the answers."""
        for folder in (self.folder, self.answers):
            shutil.rmtree(folder, ignore_errors=True)


def _free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
