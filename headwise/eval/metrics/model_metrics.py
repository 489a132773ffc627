"""What is measured of one model by itself: tasks, perplexity, loss by position, continuations.

It all lies in one folder (lm-eval's own files and `alone.json`), so that a parent's can be kept and read again.
"""

from __future__ import annotations

import gc
import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwise.eval import model as models
from headwise.eval import processes
from headwise.eval.metrics.generation import continuations
from headwise.eval.metrics.inputs import Material
from headwise.eval.model import Model
from headwise.eval.plain import restore
from headwise.eval.tasks import samples
from headwise.eval.tasks.harness import Harness, Options
from headwise.measure.curve import Curve
from headwise.measure.loss import token_nats
from headwise.measure.positions import curve_of
from headwise.progress import Progress

# Tokens in one forward pass.
TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Alone:
    """One model's figures.

    Attributes:
        nats: of each block of text; `tokens` are predicted in each.
        curve: loss by position, of the windows or else of the blocks.
        written: greedy continuations.
        seconds: by stage.
        lm_eval_seconds: of these, inside lm-eval.
    """

    nats: tuple[float, ...] = ()
    tokens: int = 0
    curve: Curve | None = None
    written: tuple[tuple[int, ...], ...] | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    lm_eval_seconds: float = 0.0
    results: samples.Results | None = None


def measure(
    model: Model, name: str, harness: Harness | None, options: Options, material: Material, into: Path,
    progress: Progress,
) -> Alone | None:  # fmt: skip
    """Measure a model, leave everything in a new folder, and read it from there.

    Returns:
        None in a process that only helps with the tasks.
    """
    seconds: dict[str, float] = {}
    inside, start = 0.0, time.perf_counter()
    into.mkdir(parents=True)
    if harness is not None:
        inside = harness.run(model.folder, model.name, options, into, progress, f"{name}: tasks")
        seconds["tasks"] = time.perf_counter() - start
        _free()
    if not processes.is_main():
        return None
    found = Alone(lm_eval_seconds=inside, seconds=seconds)
    if not material.empty:
        start = time.perf_counter()
        loaded = models.load(model, dtype=options.dtype, device=options.device)
        found = Alone(**{**found.__dict__, **_read(loaded, material, name, progress)})
        seconds["text"] = time.perf_counter() - start
        del loaded
        _free()
    plain = {key: value for key, value in asdict(found).items() if key != "results"}
    (into / "alone.json").write_text(json.dumps(plain), encoding="utf-8")
    return read(into, tasks=harness is not None)


def read(folder: Path, *, tasks: bool) -> Alone:
    """What `measure` left in a folder."""
    found = restore(Alone, json.loads((folder / "alone.json").read_text(encoding="utf-8")))
    return Alone(**{**found.__dict__, "results": samples.read(folder) if tasks else None})


def _read(model: Any, material: Material, name: str, progress: Progress) -> dict[str, Any]:
    found: dict[str, Any] = {}
    texts = [text for text in (material.blocks, material.windows) if text is not None]
    for text in texts:
        progress.stage(f"{name}: text", total=len(text), unit="blocks")
        rows = max(1, TOKENS_AT_ONCE // text.shape[1])
        parts = []
        for batch in text.split(rows):
            parts.append(token_nats(model, batch, batch_size=rows))
            progress.advance(len(batch))
        nats = torch.cat(parts)
        if text is material.blocks:
            found |= {"nats": tuple(nats.double().sum(1).tolist()), "tokens": nats.shape[1]}
        if material.stretch and text is texts[-1]:
            found["curve"] = curve_of(nats, material.stretch)
    if material.prompts is not None:
        progress.stage(f"{name}: continuations", total=len(material.prompts), unit="prompts")
        written = continuations(model, material.prompts, material.new_tokens)
        progress.advance(len(written))
        found["written"] = tuple(map(tuple, written))
    return found


class Kept:
    """Results kept from earlier runs, each under a hash of all that they depend on.

    Args:
        identity: plain data: content of the model, tasks, settings, versions.
    """

    def __init__(self, identity: dict[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
        home = os.environ.get("HEADWISE_CACHE") or os.path.join(
            os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "headwise"
        )
        self.folder = Path(home) / "eval" / key

    def take(self, into: Path, *, tasks: bool) -> Alone | None:
        """The kept results, copied into a new folder; None where there are none that can be read."""
        if not self.folder.is_dir():
            return None
        shutil.copytree(self.folder, into)
        try:
            return read(into, tasks=tasks)
        except Exception:  # of an interrupted or a strange writer: measured anew
            shutil.rmtree(into)
            return None

    def put(self, folder: Path) -> None:
        """Keep a folder's content, in place of what was kept before."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as scratch:
            new = Path(scratch) / "new"
            shutil.copytree(folder, new)
            if self.folder.exists():
                self.folder.replace(Path(scratch) / "old")
            new.replace(self.folder)


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
