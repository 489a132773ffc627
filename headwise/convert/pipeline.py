"""The one file that wires a conversion: open, decide, plan, measure, convert, refit, copy, verify, publish."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headwise.convert import forecast
from headwise.convert.base import Target
from headwise.convert.calibration import calibrate as measure
from headwise.convert.choose import choose_target
from headwise.convert.layers import convert_layers, place
from headwise.convert.plan import Plan, make_plan
from headwise.convert.refit.joint import joint_notes, plan_joint, refit_jointly
from headwise.convert.settings import SHARD_SIZE, ConvertSettings
from headwise.convert.verify.check import Verification, check_folder
from headwise.errors import GateFailed, SettingError
from headwise.fields import settings_of
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.io.writer import Writer
from headwise.models.architecture import find_architecture
from headwise.models.stock_match import check_source_complete
from headwise.progress import SILENT, Progress
from headwise.records.card import render_card
from headwise.records.manifest import hash_files, make_manifest, source_name
from headwise.records.push import PushResult, check_repository, push_converted


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion.

    Attributes:
        out: the folder.
        plan: what was decided.
        layers: per converted layer, its expected errors and its refit.
        refit: the stages of a joint refit.
        verification: None if it was not asked for.
        pushed: None if it was not asked for.
    """

    out: Path
    plan: Plan
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    refit: list[dict[str, Any]] = field(default_factory=list)
    verification: Verification | None = None
    pushed: PushResult | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "out": str(self.out),
            "plan": self.plan.to_dict(),
            "layers": {str(i): report for i, report in self.layers.items()},
            "refit": self.refit,
            "verification": self.verification.to_dict() if self.verification else None,
            "pushed": self.pushed.to_dict() if self.pushed else None,
        }


def convert_model(
    model: str | Path,
    out: str | Path,
    *,
    to: str | None = None,
    groups: int | None = None,
    method: str | None = None,
    grouping: str | None = None,
    rank: int | None = None,
    rope_dim: int | None = None,
    cache: float | None = None,
    exact: bool = False,
    rope_frequencies: str | None = None,
    pad_values: bool = False,
    calibrate: str | None = None,
    calibration_tokens: int | None = None,
    save_moments: str | Path | None = None,
    moments: str | Path | None = None,
    refit: str | int | None = None,
    context: int | None = None,
    rope: str | None = None,
    rope_theta: float | None = None,
    sliding_window: int | None = None,
    window_layers: str | None = None,
    dtype: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    verify: bool = True,
    push_to_hub: str | None = None,
    private: bool = False,
    allow_nan: bool = False,
    allow_pickle: bool = False,
    seed: int = 0,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> ConvertResult | Plan:
    """Convert a checkpoint into a folder that stock transformers loads.

    Args:
        model: a folder, or `org/name[@revision]` on the Hub.
        out: the folder to make; it appears when it is complete and verified.
        to: "gqa" (with `groups`), "mqa", "mha" or "mla"; None leaves the layout.
        groups: KV heads afterwards.
        method: how heads are merged ("optimal", "aligned", "mean", "first", "random") or, for "mla", how the
            latent is found ("optimal", "transmla", "partial-rope", ...); None: "optimal".
        grouping: which heads share: "optimal" (by least residual energy) or "contiguous". None: optimal for the
            method "optimal", contiguous for the published methods, which are defined on neighbours.
        rank: width of the latent (`kv_lora_rank`).
        rope_dim: width of the shared rotary key (`qk_rope_head_dim`).
        cache: share of the source's cache to keep, in place of `rank` and `rope_dim`.
        exact: MLA of the full rank, which computes the parent's function.
        rope_frequencies: "default", the grid that every engine computes, or "free", the source's most useful ones.
        pad_values: pad value heads with zeros for engines that need it.
        calibrate: text to measure the parent on: "builtin", "none", a file, or `hf:DATASET`; None: "builtin".
        calibration_tokens: how much of it; None: as the model's size allows.
        save_moments: a folder to keep the measured moments in.
        moments: a folder of measured moments to use.
        refit: "auto" (when the forecast is under ten minutes), "off", or a number of steps per layer.
        context: rescale RoPE to this many tokens.
        rope: the rule; None: "auto".
        rope_theta: the base of the rule "base".
        sliding_window: let layers look this many tokens back; 0 removes every window.
        window_layers: "all", "alternate" or a list such as "0,2,4-7".
        dtype: of the output; None keeps each tensor's.
        max_shard_size: the largest weight file, such as "5GB".
        dry_run: return the `Plan` and write nothing.
        force: replace OUT once the new folder is complete.
        resume: finish an interrupted run.
        verify: check the result before it is published.
        push_to_hub: upload the result to this repository, as `push_model` does.
        private: make a new repository private.
        allow_nan: convert weights that are not finite.
        allow_pickle: read `.bin` files (weights only, no code).
        seed: of everything random.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub, for the source and for `push_to_hub`.
        progress: what is told about the work.

    Returns:
        The finished conversion, or its plan under `dry_run`.

    Raises:
        SettingError: a setting is not legal, has no effect or contradicts another one.
        HeadwiseError: the input or the disk does not allow the conversion.
        GateFailed: the result failed its verification; nothing is published.
    """
    given = locals()
    settings = ConvertSettings(**{name: given[name] for name in settings_of(ConvertSettings)})
    checkpoint = open_checkpoint(
        model, revision=revision, token=token, allow_pickle=settings.allow_pickle, progress=progress
    )
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    check_source_complete(checkpoint, arch.auto_class)
    wanted = _device(settings.device)
    target = choose_target(checkpoint, arch, settings)
    joint = plan_joint(checkpoint, arch, target, settings, wanted)
    if joint:
        settings = replace(settings, refit="joint")
    calibration = measure.plan_calibration(checkpoint, arch, target, settings, wanted)
    where = place(target, calibration, wanted)
    recorded = settings.recorded()
    if calibration:
        recorded["calibration"] = calibration.described()
    if joint:
        recorded["joint"] = asdict(joint)
    plan = make_plan(
        checkpoint,
        arch,
        target.outputs,
        config=target.config,
        layouts=target.layouts,
        arguments=recorded,
        peak_memory=forecast.peak_memory(checkpoint, arch, target, calibration),
        max_shard_size=settings.max_shard_size,
        engines=target.engines,
        warnings=target.warnings,
        notes=[*target.notes, *measure.plan_notes(target, calibration, settings), *joint_notes(joint)],
    )
    if settings.push_to_hub:  # what would stop the push at the end stops the conversion before it begins
        check_repository(
            settings.push_to_hub,
            source_name(plan),
            private=settings.private,
            token=token,
            need_token=not settings.dry_run,
        )
    if settings.dry_run:
        return plan
    forecast.require_free_memory(plan.peak_memory, where)

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
        max_shard_size=settings.max_shard_size,
        resume=settings.resume,
        force=settings.force,
        allow_nan=settings.allow_nan,
    ) as writer:
        layers = convert_layers(checkpoint, arch, target, calibration, writer, where, progress)
        _carry_rest(checkpoint, target, writer, progress)
        checkpoint.check_unchanged()
        verification: list[Verification] = []
        stages: list[dict[str, Any]] = []

        def check(folder: Path) -> None:
            if joint:
                names = {n for i in range(len(target.layouts)) for n in target.converted_names(i)}
                stages.extend(
                    refit_jointly(
                        writer, checkpoint, names, joint, seed=settings.seed, device=wanted, progress=progress
                    )
                )
            if settings.verify:
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
            manifest = make_manifest(
                plan,
                checkpoint,
                out=Path(out).name,
                hashes=writer.hashes,
                files=hash_files(folder),
                layers=layers,
                device=where.type,
                verification=verification[0].to_dict() if verification else None,
                refit=stages,
            )
            writer.add_text("headwise.json", json.dumps(manifest, indent=2) + "\n")
            writer.add_text("README.md", render_card(manifest, checkpoint.folder / "README.md"))

        writer.add_text("config.json", json.dumps(target.config, indent=2) + "\n")
        published = writer.publish(check)
    pushed = None
    if settings.push_to_hub:
        pushed = push_converted(published, settings.push_to_hub, settings.private, token, progress)
    progress.finish()
    return ConvertResult(published, plan, layers, stages, verification[0] if verification else None, pushed)


def _carry_rest(checkpoint: Checkpoint, target: Target, writer: Writer, progress: Progress) -> None:
    """Copy or adapt every tensor that no layer conversion gave, then the sidecar files."""
    rest = [tensor for tensor in target.outputs if tensor.name not in writer.done]
    progress.stage("Copying", total=sum(tensor.nbytes for tensor in rest), unit="bytes")
    for tensor in rest:
        if tensor.source is not None:
            writer.copy(tensor.name, checkpoint)
        else:
            writer.write(tensor.name, target.transform_other(tensor.name, checkpoint))
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
        raise SettingError(
            "device", f"`device` is {name!r}, which this machine does not have.", "Name cpu, cuda or cuda:N."
        ) from error
    return device
