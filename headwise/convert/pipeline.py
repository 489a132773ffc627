"""The one file that wires a conversion: open, decide, plan, measure, convert, refit, copy, verify, publish."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from headwise.convert import forecast
from headwise.convert.base import Target
from headwise.convert.calibration import calibrate as measure
from headwise.convert.choose import choose_target
from headwise.convert.layers import convert_layers, place
from headwise.convert.plan import Plan, make_plan
from headwise.convert.verify.check import Verification, check_folder
from headwise.errors import GateFailed, HeadwiseError
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.io.writer import Writer
from headwise.models.architecture import find
from headwise.models.stock_match import check_complete
from headwise.progress import SILENT, Progress
from headwise.records.card import make_card, make_record, source_name
from headwise.records.manifest import hash_files
from headwise.records.push import Push, find_target, push_finished


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion.

    Attributes:
        out: the folder.
        plan: what was decided.
        layers: per converted layer, its expected errors and its refit.
        verification: None if it was not asked for.
        pushed: None if it was not asked for.
    """

    out: Path
    plan: Plan
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    verification: Verification | None = None
    pushed: Push | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "plan": self.plan.to_dict(),
            "layers": {str(i): report for i, report in self.layers.items()},
            "verification": self.verification.to_dict() if self.verification else None,
            "pushed": self.pushed.to_dict() if self.pushed else None,
        }


def convert_model(
    model: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    groups: int | None = None,
    method: str = "optimal",
    grouping: str | None = None,
    rank: int | None = None,
    rope_dim: int | None = None,
    cache: float | None = None,
    exact: bool = False,
    rope_frequencies: str = "default",
    pad_values: bool = False,
    context: int | None = None,
    rope: str = "auto",
    rope_theta: float | None = None,
    sliding_window: int | None = None,
    window_layers: str = "all",
    calibrate: str = "builtin",
    calibration_tokens: int | None = None,
    moments: str | Path | None = None,
    save_moments: str | Path | None = None,
    refit: str | int = "auto",
    dtype: str | None = None,
    max_shard_size: int | str = "5GB",
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    verify: bool = True,
    allow_nan: bool = False,
    allow_pickle: bool = False,
    seed: int = 0,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    push_to_hub: str | None = None,
    private: bool = False,
    progress: Progress = SILENT,
) -> ConvertResult | Plan:
    """Convert a checkpoint into a folder that stock transformers loads.

    Args:
        model: a folder, or `org/name[@revision]` on the Hub.
        out: the folder to make; it appears when it is complete and verified.
        to: "gqa" (with `groups`), "mqa", "mha" or "mla"; None leaves the layout.
        groups: key-value heads afterwards.
        method: how heads are merged ("optimal", "aligned", "mean", "first", "random") or, for "mla", how the
            latent is found ("optimal", "transmla", "partial-rope").
        grouping: which heads share: "optimal" (by least residual energy) or "contiguous". None: optimal for the
            method "optimal", contiguous for the published methods, which are defined on neighbours.
        rank, rope_dim, cache, exact, rope_frequencies, pad_values: of an MLA target.
        context, rope, rope_theta: rescale RoPE to this many tokens, by this rule.
        sliding_window, window_layers: let layers look this many tokens back.
        calibrate: text to measure the parent on: "builtin", "none", a file, or `hf:DATASET`.
        calibration_tokens: how much of it; None: as the model's size allows.
        moments, save_moments: a folder of measured moments to use, or to keep them in.
        refit: "auto" (when the forecast is under ten minutes), "off", or a number of steps per layer.
        dtype: of the output; None keeps each tensor's.
        dry_run: return the `Plan` and write nothing.
        force, resume: replace OUT; finish an interrupted run.
        verify: check the result before it is published.
        device: None: a GPU if there is one.
        push_to_hub, private: upload the result to this repository, as `push` does; `token` is for both ends.

    Raises:
        HeadwiseError: the input, the options or the disk do not allow it.
        GateFailed: the result failed its verification; nothing is published.
    """
    checkpoint = open_checkpoint(
        model, revision=revision, token=token, allow_pickle=allow_pickle, progress=progress
    )
    arch = find(checkpoint.config, checkpoint.tensors)
    check_complete(checkpoint, arch.auto_class)
    wanted = _device(device)
    target = choose_target(
        checkpoint,
        arch,
        to=to,
        groups=groups,
        method=method,
        grouping=grouping,
        rank=rank,
        rope_dim=rope_dim,
        cache=cache,
        exact=exact,
        rope_frequencies=rope_frequencies,
        pad_values=pad_values,
        context=context,
        rope=rope,
        rope_theta=rope_theta,
        sliding_window=sliding_window,
        window_layers=window_layers,
        dtype=dtype,
        seed=seed,
        measured=isinstance(refit, int) or moments is not None or save_moments is not None,
    )
    calibration = measure.decide(
        checkpoint, arch, target, calibrate, calibration_tokens, moments, save_moments, refit, wanted, seed
    )
    where = place(target, calibration, wanted)
    # In the words of the command line, which refuses what would have no effect.
    lossy = to in ("gqa", "mqa", "mla") and not exact
    arguments = {
        "to": to,
        "groups": groups,
        "method": method if lossy else None,
        "grouping": getattr(target, "grouping", None) if lossy else None,
        "rank": rank,
        "rope_dim": rope_dim,
        "cache": cache,
        "exact": exact or None,
        "rope_frequencies": rope_frequencies if to == "mla" else None,
        "pad_values": pad_values or None,
        "context": context,
        "rope": ("base" if rope_theta else rope) if context else None,
        "rope_theta": rope_theta,
        "sliding_window": sliding_window,
        "window_layers": window_layers if sliding_window else None,
        "calibration": calibration.described() if calibration else None,
        "dtype": dtype,
        "max_shard_size": max_shard_size if max_shard_size != "5GB" else None,
        "allow_nan": allow_nan or None,
        "allow_pickle": allow_pickle or None,
        "seed": seed,
    }
    plan = make_plan(
        checkpoint,
        arch,
        target.outputs,
        config=target.config,
        layouts=target.layouts,
        arguments={k: v for k, v in arguments.items() if v is not None},
        peak_memory=forecast.peak_memory(checkpoint, arch, target, calibration),
        max_shard_size=max_shard_size,
        engines=target.engines,
        warnings=target.warnings,
        notes=[*target.notes, *measure.notes(target, calibration, refit)],
    )
    if push_to_hub:  # what would stop the push at the end stops the conversion before it begins
        find_target(push_to_hub, source_name(plan), private=private, token=token, need_token=not dry_run)
    if dry_run:
        return plan
    forecast.check_memory(plan.peak_memory, where)

    identity = {
        "source": checkpoint.fingerprint(),
        "arguments": plan.arguments,
        "moments": str(calibration.reuse) if calibration and calibration.reuse else None,
        "device": where.type,
        "torch": torch.__version__,
    }
    with Writer(
        out,
        target.outputs,
        identity=identity,
        source=checkpoint.folder if checkpoint.revision is None else None,
        max_shard_size=max_shard_size,
        resume=resume,
        force=force,
        allow_nan=allow_nan,
    ) as writer:
        layers = convert_layers(checkpoint, arch, target, calibration, writer, where, progress)
        _carry_rest(checkpoint, target, writer, progress)
        checkpoint.check_unchanged()
        verification: list[Verification] = []

        def check(folder: Path) -> None:
            if verify:
                found = check_folder(
                    open_checkpoint(folder),
                    checkpoint,
                    promised=target.layouts,
                    arguments=plan.arguments,
                    progress=progress,
                )
                verification.append(found)
                if not found.passed:
                    raise GateFailed(f"The result failed its verification: {found.failures}.")
            record = make_record(
                plan,
                checkpoint,
                out=Path(out).name,
                hashes=writer.hashes,
                files=hash_files(folder),
                layers=layers,
                device=where.type,
                verification=verification[0].to_dict() if verification else None,
            )
            writer.add_text("headwise.json", json.dumps(record, indent=2) + "\n")
            writer.add_text("README.md", make_card(plan, record, checkpoint.folder / "README.md"))

        writer.add_text("config.json", json.dumps(target.config, indent=2) + "\n")
        published = writer.publish(check)
    pushed = push_finished(published, push_to_hub, private, token, progress) if push_to_hub else None
    progress.finish()
    return ConvertResult(published, plan, layers, verification[0] if verification else None, pushed)


def _carry_rest(checkpoint: Checkpoint, target: Target, writer: Writer, progress: Progress) -> None:
    """Copy or adapt every tensor that no layer conversion gave, then the sidecar files."""
    rest = [tensor for tensor in target.outputs if tensor.name not in writer.done]
    progress.stage("Copying", total=sum(tensor.nbytes for tensor in rest), unit="bytes")
    for tensor in rest:
        if tensor.source is not None:
            writer.copy(tensor.name, checkpoint)
        else:
            writer.write(tensor.name, target.carry(tensor.name, checkpoint))
        progress.advance(tensor.nbytes)
    for path in checkpoint.sidecars:
        writer.add_file(path, path.relative_to(checkpoint.folder).as_posix())


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise HeadwiseError(f"--device {name} is not to be had here.", "Name cpu, cuda or cuda:N.") from error
    return device
