"""Run the demo: convert a language model to fewer key-value heads by several methods, and measure the loss."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from headwise.compat import no_progress_bars
from headwise.demo.picture import Measurement, draw_costs
from headwise.demo.settings import DemoSettings
from headwise.environment import find_device
from headwise.errors import HeadwiseError
from headwise.io.source import EMBEDDED_MODEL, find_source
from headwise.io.workdir import write_file_atomically
from headwise.progress import SILENT, Progress

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_LENGTH = 512


@dataclass(frozen=True)
class Effort:
    """The amount of work of a demo.

    A refit with the defaults of `convert` gives a lower loss and takes several times as long.

    Attributes:
        num_blocks: of held-out text.
        calibration_tokens: of a calibration.
        refit: steps of a refit.
        uptraining_tokens: of the uptraining; 0: there is none.
    """

    num_blocks: int
    calibration_tokens: int
    refit: int
    uptraining_tokens: int


FULL, QUICK = Effort(24, 16_384, 16, 98_304), Effort(8, 8_192, 6, 0)
# Changes of the recipe distill for a minute on two cores; docs/results/uptraining.md has runs of real length.
UPTRAINING = {
    "data.length": BLOCK_LENGTH,
    "data.heldout_blocks": 2,
    "train.batch_tokens": 4 * BLOCK_LENGTH,
    "train.learning_rate": 5e-4,
    "train.log_every": 2,
    "train.save_every": 0,
}


@dataclass(frozen=True)
class Trial:
    """One conversion of the demo.

    Attributes:
        target: attention layout, such as GQA-4.
        method: of the conversion.
        arguments: of `convert_model`.
        cost: time, relative to the other trials.
        uptraining_tokens: above 0, the trial uptrains the result of the trial before it instead.
    """

    target: str
    method: str
    arguments: dict[str, Any]
    cost: int
    uptraining_tokens: int = 0


@dataclass(frozen=True)
class DemoResult:
    """The result of a demo.

    Attributes:
        model: the model that was converted.
        tokens: held-out tokens that were predicted.
        parent: its cache and loss.
        measured: those of every conversion.
        picture: the PNG.
    """

    model: str
    tokens: int
    parent: Measurement
    measured: tuple[Measurement, ...]
    picture: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self) | {"picture": str(self.picture)}


def demo(
    out: str | Path = "headwise-demo",
    *,
    quick: bool = False,
    model: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> DemoResult:
    """Convert a model to fewer and fewer KV heads, method by method, and measure each on held-out text.

    Args:
        out: folder for the converted models, `demo.png` and `demo.json`; earlier results in it are replaced.
        quick: fewer targets, less text, a shorter refit.
        model: the model to convert; None: the embedded one.
        seed: of the calibration and the choice of text.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        token: of the Hub.
        progress: gets a note for every model.

    Raises:
        SettingError: a setting is not legal, or this machine does not have the device.
        HeadwiseError: the model has one KV head.
    """
    from transformers import AutoTokenizer

    from headwise.convert.inspect import inspect_model
    from headwise.convert.pipeline import convert_model
    from headwise.recipes.uptrain import uptrain_model
    from headwise.text.blocks import blocks_from

    settings = DemoSettings(out=Path(out), quick=quick, model=model, seed=seed, device=device)
    where = find_device(settings.device)
    out, model = Path(out), settings.model or EMBEDDED_MODEL
    inspection = inspect_model(model, token=token)
    first = inspection.layouts[0]
    legal = {option.num_key_value_heads for option in inspection.options}
    possible = {"gqa": lambda t: t.arguments["groups"] in legal, "mla": lambda t: inspection.mla is None}
    planned = [t for t in trials(first.num_key_value_heads, quick) if possible[t.arguments["to"]](t)]
    if not planned:
        raise HeadwiseError(f"{model} has {first.num_key_value_heads} KV head: fewer are not possible.")

    out.mkdir(parents=True, exist_ok=True)
    source = find_source(model, token=token, progress=progress).folder
    progress.stage("Demo", total=1 + sum(trial.cost for trial in planned), unit="steps")
    progress.advance(0, now="the parent")
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    count = (QUICK if quick else FULL).num_blocks
    blocks = blocks_from("builtin", tokenizer, split="heldout", length=BLOCK_LENGTH, count=count, seed=seed)

    def measure(folder: str | Path, target: str, method: str, start: float, cost: int = 1) -> Measurement:
        cache, nats = inspect_model(folder).cache.bytes_per_token, loss(folder, blocks, where)
        progress.note(f"{target:>6}  {method:16} {nats:.3f} nats per token")
        progress.advance(cost)
        return Measurement(target, method, cache, nats, time.monotonic() - start)

    parent_name = target_name(first.num_key_value_heads, first.num_attention_heads)
    parent = measure(source, parent_name, "parent", time.monotonic())
    common: dict[str, Any] = {
        "seed": seed, "device": str(where), "token": token, "force": True, "verify": False
    }  # fmt: skip
    results = []
    moments, folder = out / "moments", Path(model)
    shutil.rmtree(moments, ignore_errors=True)
    for trial in planned:
        start = time.monotonic()
        before = folder
        folder = out / f"{trial.target}-{trial.method}".lower().replace(" + ", "-")
        now = _NestedProgress(progress, f"{trial.target} {trial.method}")
        if trial.uptraining_tokens:
            uptrain_model(
                before,
                folder,
                teacher=model,
                tokens=trial.uptraining_tokens,
                settings=[f"{key}={value}" for key, value in UPTRAINING.items()],
                device=where.type,
                force=True,
                token=token,
                progress=now,
            )
            results.append(measure(folder, trial.target, trial.method, start, trial.cost))
            continue
        arguments = dict(trial.arguments)
        if arguments["refit"] == "off" and arguments["calibrate"] != "none":
            # The parent is measured once for all closed forms.
            arguments["moments" if moments.exists() else "save_moments"] = moments
            if "moments" in arguments:
                del arguments["calibration_tokens"], arguments["calibrate"]
        convert_model(model, folder, **arguments, **common, progress=now)
        results.append(measure(folder, trial.target, trial.method, start, trial.cost))

    result = DemoResult(str(model), blocks[:, 1:].numel(), parent, tuple(results), out / "demo.png")
    draw_costs(
        parent,
        results,
        result.picture,
        title="Loss against the size of the KV cache, by method",
        ylabel="nats per token on held-out Python source",
    )
    write_file_atomically(out / "demo.json", (json.dumps(result.to_dict(), indent=2) + "\n").encode())
    return result


def trials(num_key_value_heads: int, quick: bool = False) -> Iterator[Trial]:
    """Yield the conversions of a demo: half the KV heads, a quarter, one (mean and optimal merge); then MLA.

    Args:
        num_key_value_heads: of the model.
        quick: fewer targets, less text, a shorter refit.
    """
    effort = QUICK if quick else FULL
    # Losses are measured on Python source, so the text is Python source too.
    text = {"calibrate": "builtin", "calibration_tokens": effort.calibration_tokens}
    counts = (num_key_value_heads // 2, 1) if quick else (num_key_value_heads // 2, num_key_value_heads // 4, 1)
    for groups in dict.fromkeys(count for count in counts if 0 < count < num_key_value_heads):
        target = {"to": "gqa", "groups": groups}
        yield Trial(
            target_name(groups), "mean", {**target, "method": "mean", "calibrate": "none", "refit": "off"}, 1
        )
        yield Trial(target_name(groups), "optimal", {**target, "refit": "off", **text}, 2)
        if groups == num_key_value_heads // 4:
            # For one target only: these two take longer than all other trials together.
            yield Trial(target_name(groups), "optimal + refit", {**target, "refit": effort.refit, **text}, 12)
            if effort.uptraining_tokens:
                yield Trial(target_name(groups), "refit + uptrain", target, 16, effort.uptraining_tokens)
    shares = (0.25,) if quick else (0.3125, 0.25, 0.125)
    for share in shares if num_key_value_heads > 1 else ():
        target = {"to": "mla", "cache": share}
        yield Trial(f"MLA -{100 * (1 - share):.3g}%", "MLA", {**target, "refit": "off", **text}, 4)


def target_name(num_key_value_heads: int, num_attention_heads: int = 0) -> str:
    """Return "MHA", "GQA-4" or "MQA".

    Args:
        num_key_value_heads: of the layers.
        num_attention_heads: of the layers; 0: not MHA.
    """
    if num_key_value_heads == num_attention_heads:
        return "MHA"
    return "MQA" if num_key_value_heads == 1 else f"GQA-{num_key_value_heads}"


def loss(folder: str | Path, blocks: Tensor, device: torch.device) -> float:
    """Return the nats per token of a saved model, computed in float32.

    Args:
        folder: the model.
        blocks: held-out text, (blocks, length).
        device: where the model runs.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from headwise.measure.loss import nats_per_token

    with no_progress_bars():
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=False)
    return nats_per_token(model.to(device), blocks).nats


class _NestedProgress(Progress):
    """Show the progress of a conversion as a field of the demo's progress."""

    def __init__(self, outer: Progress, label: str) -> None:
        self.outer, self.label = outer, label

    def stage(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.name, self.total, self.done = name, total, 0
        self.advance(0)

    def advance(self, amount: int = 1, **fields: object) -> None:
        self.done += amount
        share = f" {self.done / self.total:.0%}" if self.total else ""
        self.outer.advance(0, now=f"{self.label}: {self.name}{share}")

    def warn(self, text: str) -> None:
        self.outer.warn(text)
