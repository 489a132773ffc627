"""Measure the pair of an evaluation: the child, its parent (or the parent's cached results), and both together."""

from __future__ import annotations

import hashlib
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from headwise import environment
from headwise.errors import HeadwiseError
from headwise.eval import processes
from headwise.eval.compare import same_questions
from headwise.eval.metrics.acceptance import measure_acceptance
from headwise.eval.metrics.inputs import EvalInputs
from headwise.eval.metrics.model_metrics import ModelMetrics, ResultCache, measure_model
from headwise.eval.metrics.seconds import forecast_seconds
from headwise.eval.model import EvalModel
from headwise.eval.result import DraftAcceptance
from headwise.eval.settings import EvalRecipe, EvalSettings
from headwise.eval.tasks.harness import Harness
from headwise.format import duration
from headwise.measure.divergence import Divergence, measure_divergence
from headwise.progress import Progress

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "numpy", "scipy", "statsmodels", "vllm")


@dataclass
class EvalPair:
    """Child and parent of one evaluation, and how they are measured.

    Attributes:
        recipe: what is measured.
        settings: resolved settings.
        harness: the tasks; None without tasks.
        inputs: text and prompts.
        child: the converted model.
        baseline: the parent; None without one.
        work: the folder that becomes the report's folder.
        progress: receives the stages.
        seconds: wall clock by stage, filled by the measurements.
    """

    recipe: EvalRecipe
    settings: EvalSettings
    harness: Harness | None
    inputs: EvalInputs
    child: EvalModel
    baseline: EvalModel | None
    work: Path
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    def folder(self, role: str) -> Path:
        """Return the folder for the files of a model.

        Args:
            role: "child" or "parent".
        """
        model = self.child if role == "child" else self.baseline
        assert model is not None
        same_name = self.baseline is not None and self.baseline.name == self.child.name
        return self.work / "lm-eval" / (model.name.replace("/", "__") + (f"-{role}" if same_name else ""))

    def announce(self, tokenizer: Any) -> None:
        """Report to `progress` how long the measurements take; cached results of the parent take no time.

        Args:
            tokenizer: of child and parent.
        """
        models = [self.child]
        cached = self.settings.cache and self.baseline and self._cache("parent", self.baseline).folder.is_dir()
        if self.baseline is not None and not cached:
            models.append(self.baseline)
        tasks = self.harness.tasks if self.harness else ()
        seconds = forecast_seconds(self.recipe, self.settings, tasks, self.inputs, models, tokenizer)
        if seconds is not None:
            more = ", the parent's results are cached" if cached else ""
            self.progress.note(f"Forecast: about {duration(seconds)} at the present speed of the device{more}.")

    def measure_child(self) -> ModelMetrics | None:
        """Measure the child, or take the results of an interrupted run; None in a process without the results."""
        metrics, resumed = self._measure_once("child", self.child)
        if resumed:
            self.progress.note("The child's results are from an interrupted run.")
        return metrics

    def measure_parent(self, child: ModelMetrics | None) -> tuple[ModelMetrics | None, bool]:
        """Measure the parent or take its cached results.

        Args:
            child: figures of the child; None in a process that only computes its share.

        Returns:
            The figures, None without a parent, and whether they come from the cache.
        """
        return (None, False) if self.baseline is None else self._measure_once("parent", self.baseline, child)

    def discard_child(self) -> None:
        """Remove the child's results from the cache: they are for an interrupted run only."""
        if self.settings.cache and processes.is_main():
            self._cache("child", self.child).discard()

    def _measure_once(
        self, role: str, model: EvalModel, child: ModelMetrics | None = None
    ) -> tuple[ModelMetrics | None, bool]:
        """Measure a model and cache the results, or take the cached ones."""
        cache, into = self._cache(role, model), self.folder(role)
        # Of several processes only the first has the child's questions.
        cached = self._cached(cache, child, into) if self.settings.cache and processes.is_main() else None
        if processes.broadcast_decision(cached is not None):
            return cached, True
        metrics = self._measure(role, model, into, cache.answers if self.settings.cache else None)
        if metrics is not None and self.settings.cache:
            try:
                cache.store(into)
            except (OSError, HeadwiseError) as error:  # the cache only saves time
                reason = getattr(error, "strerror", None) or str(error)
                self.progress.note(f"The cache {cache.folder.parent} cannot be written: {reason.rstrip('.')}.")
        return metrics, False

    def measure_together(self) -> tuple[Divergence | None, DraftAcceptance | None]:
        """Measure what needs both models in memory.

        Returns:
            Divergence and acceptance; None for a part that the recipe does not have, or without a parent.
        """
        images = self.inputs.images
        if self.baseline is None or not (self.recipe.needs_both_models or images):
            return None, None
        options: dict[str, Any] = {"dtype": self.settings.dtype, "device": self.settings.device}
        options["eager"] = images is None
        start = time.perf_counter()
        child, parent = self.child.load(**options), self.baseline.load(**options)
        divergence = None
        if images is not None:
            divergence = measure_divergence(child, parent, images, progress=self.progress)
            self.seconds["diagnostics"] = time.perf_counter() - start
        elif (part := self.recipe.diagnostics) is not None and self.inputs.blocks is not None:
            divergence = measure_divergence(
                child,
                parent,
                self.inputs.blocks[: part.blocks],
                num_layer_blocks=part.layer_blocks,
                child_architecture=self.child.architecture,
                parent_architecture=self.baseline.architecture,
                progress=self.progress,
            )
            self.seconds["diagnostics"] = time.perf_counter() - start
        return divergence, self._measure_acceptance(child, parent)

    def _measure_acceptance(self, child: Any, parent: Any) -> DraftAcceptance | None:
        part = self.recipe.acceptance
        if part is None or self.inputs.prompts is None:
            return None
        start = time.perf_counter()
        self.progress.stage("acceptance", total=part.prompts, unit="prompts")
        prompts = self.inputs.prompts[: part.prompts]
        acceptance = measure_acceptance(
            child, parent, prompts, new_tokens=part.new_tokens, draft_tokens=part.draft_tokens
        )
        self.progress.advance(part.prompts)
        self.seconds["acceptance"] = time.perf_counter() - start
        return acceptance

    def _measure(self, role: str, model: EvalModel, into: Path, answers: Path | None) -> ModelMetrics | None:
        metrics = measure_model(model, role, self.harness, self.settings, self.inputs, into, self.progress, answers)
        if metrics is not None:
            self.seconds |= {f"{role}: {stage}": seconds for stage, seconds in metrics.seconds.items()}
        return metrics

    def _cached(self, cache: ResultCache, child: ModelMetrics | None, into: Path) -> ModelMetrics | None:
        """Return the parent's cached results, if their questions are the child's."""
        cached = cache.copy_to(into, tasks=self.harness is not None)
        ours, theirs = child and child.results, cached and cached.results
        if ours and theirs and not same_questions(ours, theirs):
            shutil.rmtree(into)
            return None
        return cached

    def _cache(self, role: str, model: EvalModel) -> ResultCache:
        # A child that equals its parent is measured all the same.
        return ResultCache(self._identity(model) | ({"role": role} if role == "child" else {}))

    def _identity(self, model: EvalModel) -> dict[str, Any]:
        """Return everything that the figures depend on; questions that tasks download are compared one by one."""
        more = self.settings.task_data
        folders = [*self.settings.include_path, *([more] if more else [])]
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        return {
            "model": model.subject.sha256,
            "recipe": self.recipe.recorded(),
            "options": self.settings.harness_options(),
            "material": self.inputs.content_hash(),
            "tasks": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            "context": self.child.context,
            "versions": package_versions(),
        }


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the figures."""
    return {"headwise": environment.HEADWISE_VERSION} | environment.versions(PACKAGES)
