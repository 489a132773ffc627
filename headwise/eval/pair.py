"""One evaluation under way: the child, its parent (or what an earlier run kept of it), and both together."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headwise import __version__, environment
from headwise.eval import model as models
from headwise.eval import processes
from headwise.eval import settings as recipe
from headwise.eval.compare import same_questions
from headwise.eval.metrics.acceptance import acceptance
from headwise.eval.metrics.inputs import Material
from headwise.eval.metrics.model_metrics import Alone, Kept, measure
from headwise.eval.model import Model
from headwise.eval.result import Acceptance, Diagnostics
from headwise.eval.settings import Recipe
from headwise.eval.tasks.harness import Harness, Options
from headwise.measure.divergence import diagnose
from headwise.progress import Progress

PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "numpy", "vllm")


@dataclass
class Run:
    """One evaluation under way."""

    recipe: Recipe
    options: Options
    harness: Harness | None
    material: Material
    child: Model
    baseline: Model | None
    work: Path
    progress: Progress
    seconds: dict[str, float]

    def folder(self, role: str) -> Path:
        """Where lm-eval's files of a model are: LM-EVAL'S OUTPUT PATH / MODEL."""
        model = self.child if role == "child" else self.baseline
        assert model is not None
        same = self.baseline is not None and self.baseline.name == self.child.name
        return self.work / "lm-eval" / (model.name.replace("/", "__") + (f"-{role}" if same else ""))

    def alone(self, role: str, model: Model) -> Alone | None:
        found = measure(model, role, self.harness, self.options, self.material, self.folder(role), self.progress)
        if found is not None:
            self.seconds |= {f"{role}: {stage}": seconds for stage, seconds in found.seconds.items()}
        return found

    def parent(self, child: Alone | None, folders: Sequence[Path], cache: bool) -> tuple[Alone | None, bool]:
        """The parent's figures, and whether they were kept from an earlier run."""
        if self.baseline is None:
            return None, False
        kept = Kept(self._identity(self.baseline, folders))
        into, tasks = self.folder("parent"), self.harness is not None
        # Of several processes only the first has seen the child's questions.
        found = self._taken(kept, child, into) if cache and processes.is_main() else None
        reuse = found is not None
        if processes.agreed(reuse) if tasks else reuse:
            return found, True
        found = self.alone("parent", self.baseline)
        if found is not None and cache:
            kept.put(into)
        return found, False

    def _taken(self, kept: Kept, child: Alone | None, into: Path) -> Alone | None:
        """What was kept of the parent, if it was asked what the child was."""
        found = kept.take(into, tasks=self.harness is not None)
        ours, theirs = child and child.results, found and found.results
        if ours and theirs and not same_questions(ours, theirs):
            shutil.rmtree(into)
            return None
        return found

    def together(self) -> tuple[Diagnostics | None, Acceptance | None]:
        """What needs both models in memory."""
        wanted, drafts = self.recipe.diagnostics, self.recipe.acceptance
        if not self.recipe.together or self.baseline is None:
            return None, None
        how: dict[str, Any] = {"dtype": self.options.dtype, "device": self.options.device, "eager": True}
        start = time.perf_counter()
        ours, theirs = models.load(self.child, **how), models.load(self.baseline, **how)
        found = accepted = None
        if wanted and self.material.blocks is not None:
            found = diagnose(
                ours,
                theirs,
                self.material.blocks[: wanted.blocks],
                layer_blocks=wanted.layer_blocks,
                child_stock=self.child.stock,
                parent_stock=self.baseline.stock,
                progress=self.progress,
            )
            self.seconds["diagnostics"] = time.perf_counter() - start
        if drafts and self.material.prompts is not None:
            start = time.perf_counter()
            self.progress.stage("acceptance", total=drafts.prompts, unit="prompts")
            try:
                accepted = acceptance(
                    ours,
                    theirs,
                    self.material.prompts[: drafts.prompts],
                    new_tokens=drafts.new_tokens,
                    draft_tokens=drafts.draft_tokens,
                )
            except ValueError as error:
                self.progress.warn(f"transformers cannot use one of the two for assisted generation: {error}")
            self.progress.advance(drafts.prompts)
            self.seconds["acceptance"] = time.perf_counter() - start
        return found, accepted

    def _identity(self, model: Model, folders: Sequence[Path]) -> dict[str, Any]:
        """All that a model's figures depend on. Data that tasks download is checked question by question."""
        files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
        return {
            "model": model.subject.sha256,
            "recipe": recipe.settings_of(self.recipe),
            "options": asdict(self.options),
            "material": self.material.content_hash(),
            "tasks": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files},
            "context": self.child.context,
            "versions": versions(),
        }


def versions() -> dict[str, str]:
    """Of what decides the figures."""
    return {"headwise": __version__} | environment.versions(PACKAGES)
