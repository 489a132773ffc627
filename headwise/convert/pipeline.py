"""Run a conversion: open, decide, plan, calibrate, convert, refit, copy, verify, publish."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from headwise.convert.background_copy import BackgroundCopy
from headwise.convert.calibration.calibrate import keep_text, plan_calibration, plan_loss, text_folder
from headwise.convert.calibration.calibration_plan import plan_notes, plan_warnings
from headwise.convert.calibration.corpus import (
    CalibrationLoss,
    is_measured,
    measure_converted,
    measure_text,
    read_corpus,
)
from headwise.convert.choose import check_source, choose_target
from headwise.convert.encode import encode_outputs
from headwise.convert.forecast.peak_memory import require_free_memory
from headwise.convert.forecast.whole_conversion import forecast_conversion
from headwise.convert.layers import LayerJob, RemainingLayers, choose_device
from headwise.convert.plan import Plan, make_plan
from headwise.convert.positions.window_choice import WindowChoice, choose_windows, recorded_choice
from headwise.convert.refit.joint import JointTraining, refit_jointly, share_text
from headwise.convert.refit.joint_plan import joint_notes, joint_warnings, plan_joint
from headwise.convert.settings import SHARD_SIZE, ConvertSettings
from headwise.convert.sparse.sharing import choose_sharing
from headwise.convert.spread import DevicePool, device_notes
from headwise.convert.verify.check import check_folder
from headwise.convert.verify.layer_damage import LayerDamage, plan_damage
from headwise.convert.verify.verification import Verification
from headwise.environment import find_devices
from headwise.errors import SettingError
from headwise.fields import settings_of
from headwise.io.reader import open_checkpoint
from headwise.io.tokenizer import TOKENIZER_CONFIG, raised_max_length, tokenizer_kind
from headwise.io.writer import Writer, unfinished_identity
from headwise.models.protocol import find_attention_model
from headwise.models.stock_match import match_source
from headwise.progress import SILENT, Progress
from headwise.records.card import render_card
from headwise.records.manifest import hash_files, make_manifest, source_record
from headwise.records.parent import PARENT
from headwise.records.push import PushResult, check_repository, push_converted
from headwise.serving.engines import engine_verdicts, require_engines

# The stages of the forecast that run layer by layer.
LAYER_STAGES = ("calibration", "layers", "indexers", "refit")


@dataclass(frozen=True)
class ConvertResult:
    """A finished conversion.

    Attributes:
        out: the converted folder.
        plan: the plan that was carried out.
        layers: the errors and the refit of every converted layer, by its index.
        refit: the stages of the joint refit.
        text_loss: losses of parent and result on calibration text that was held back; None: not measured.
        verification: the checks; None without `verify`.
        pushed: the upload; None without `push_to_hub`.
    """

    out: Path
    plan: Plan
    layers: dict[int, dict[str, Any]] = field(default_factory=dict)
    refit: list[dict[str, Any]] = field(default_factory=list)
    text_loss: CalibrationLoss | None = None
    verification: Verification | None = None
    pushed: PushResult | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {
            "out": str(self.out),
            "plan": self.plan.to_dict(),
            "layers": {str(i): report for i, report in self.layers.items()},
            "refit": self.refit,
            "text_loss": asdict(self.text_loss) if self.text_loss else None,
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
    part: str | Sequence[str] = (),
    rank: int | None = None,
    rope_dim: int | None = None,
    cache: float | str | None = None,
    exact: bool = False,
    rope_frequencies: str | None = None,
    cache_dtype: str | None = None,
    pad_values: bool = False,
    sparse: str | None = None,
    index_topk: int | None = None,
    index_heads: int | None = None,
    index_head_dim: int | None = None,
    index_steps: int | None = None,
    index_layers: str | int | None = None,
    index_loss: float | None = None,
    engines: str | Sequence[str] = (),
    calibrate: str | None = None,
    calibration_tokens: int | str | None = None,
    images: str | Path | None = None,
    save_moments: str | Path | None = None,
    moments: str | Path | None = None,
    refit: str | int | None = None,
    refit_tokens: int | str | None = None,
    refit_length: int | str | None = None,
    refit_repeats: float | None = None,
    context: int | str | None = None,
    rope: str | None = None,
    rope_theta: float | None = None,
    sliding_window: int | str | None = None,
    window_layers: str | None = None,
    window_loss: float | None = None,
    dtype: str | None = None,
    requantize: str | None = None,
    max_shard_size: int | str = SHARD_SIZE,
    dry_run: bool = False,
    force: bool = False,
    resume: bool = False,
    verify: bool = True,
    accept: str | Sequence[str] = (),
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

    `ConvertSettings` holds the rules of the settings.

    Args:
        model: a folder, a GGUF file, or `org/name[@revision]` on the Hub.
        out: the folder to make; it does not exist until it is complete and verified.
        to: "gqa" (with `groups`), "mqa", "mha" or "mla"; None leaves the layout.
        groups: number of KV heads after the conversion (`num_key_value_heads`).
        method: the method that merges heads ("optimal", "aligned", "mean", "first", "random") or, for "mla", finds
            the latent ("optimal", "transmla", "partial-rope", ...); None: "optimal".
        grouping: the method that chooses the heads of a group: "optimal" (least residual energy) or "contiguous".
            None: "optimal" for the method "optimal", "contiguous" for the published methods.
        part: the attention to convert, of "text", "encoder", "decoder", "cross" and "vision"; "decoder=2" gives a
            part a number of KV heads of its own. Empty: what is cached.
        rank: width of the latent (`kv_lora_rank`).
        rope_dim: width of the shared rotary key (`qk_rope_head_dim`).
        cache: fraction of the source's cache to keep, in place of `rank` and `rope_dim`.
        exact: MLA of the full rank, which computes the parent's function.
        rope_frequencies: "default", the grid that every engine computes, or "free", frequencies of the source with
            the least error.
        cache_dtype: element type of the cache that will be served; "fp8" writes the latent in the basis in which
            rounding costs least, which `refit` "joint" and `uptrain` train more slowly.
        pad_values: pad value heads with zeros for engines that need it.
        sparse: "dsa" adds an indexer to every MLA layer, so that a query attends to a budget of keys. Without `to`
            and a size, MLA is exact.
        index_topk: keys that a query attends to; None: 2048, and an eighth of the context at most.
        index_heads: queries of an indexer; None: as many as attention heads, and 32 at most.
        index_head_dim: width of the index key; None: 64 or 128, by the rotary key.
        index_steps: training steps of each indexer; 0: the closed form alone; None: 300 if their forecast is under
            ten minutes, else 0.
        index_layers: layers of a sparse source that keep an indexer: their number, or "auto" (the fewest whose
            measured loss is within `index_loss`). The others share the one before them.
        index_loss: nats per token that sharing indexers may cost with "auto"; None: 0.01.
        engines: the engines to serve, of "transformers", "vllm", "sglang" and "llama.cpp"; empty: the plan gives
            the verdict of each, and no shape is chosen for one.
        calibrate: calibration text: "sampled" from the parent, "mixture", "builtin", "none", a file, `hf:DATASET`,
            or "auto": sampled if that is affordable, else the mixture; None: "auto".
        calibration_tokens: number of calibration tokens; None: by the model's size.
        images: a `.jsonl` file of pairs, with the path of an "image" and a "text" in every line, that calibrates a
            vision-language model in place of text: its text model, its vision tower and its cross-attention.
        save_moments: a folder to save the second moments of the attention inputs in.
        moments: a folder of saved moments to use.
        refit: "auto" (when the forecast is under ten minutes on a GPU, 25 seconds on a CPU), "off", "layers",
            "joint", "windows" (joint, in less memory), or a number of steps per layer.
        refit_tokens: distinct tokens of the joint refit's text; None: by the device.
        refit_length: tokens in a sequence of the joint refit; None: by the device, and at most the context.
        refit_repeats: share of these sequences that repeat earlier passages; None: 0.2.
        context: rescale RoPE to this many tokens, such as 131072 or "128K".
        rope: the RoPE rule; None: "auto".
        rope_theta: the base of the rule "base".
        sliding_window: attention window in tokens; 0 removes every window.
        window_layers: the layers with a window: "all", "alternate", "auto" (those where it costs least, by the loss
            measured on text) or a list such as "0,2,4-7".
        window_loss: nats per token that the windows of "auto" may cost together; None: 0.01.
        dtype: of the output; None: the dtype of each tensor.
        requantize: "fp8" stores the matrices of the layers as block FP8, in the stock format.
        max_shard_size: the largest weight file, such as "5GB".
        dry_run: return the `Plan` and write nothing.
        force: replace `out` when the new folder is complete.
        resume: continue an interrupted run.
        verify: check the result before it is published.
        accept: names of checks whose failure does not stop the publication; the record keeps it.
        push_to_hub: a repository to upload the result to, as `push_model` does.
        private: make a new repository private.
        allow_nan: convert weights that are not finite.
        allow_pickle: read `.bin` files (weights only, no code).
        seed: random seed.
        device: "cpu", "cuda" or "cuda:N", or a list of one kind such as "cuda:0,cuda:1", which spreads the layers
            and shares the joint refit; None: a GPU if there is one.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub, for the source and for `push_to_hub`.
        progress: gets stages, notes and warnings.

    Returns:
        The finished conversion, or its plan under `dry_run`.

    Raises:
        SettingError: a setting is not legal, has no effect or contradicts another one.
        HeadwiseError: the input or the disk does not allow the conversion.
        GateFailed: the result failed a check that is not in `accept`. It is complete and stays in the work folder,
            and a call with `resume` and `accept` publishes it.
    """
    given = locals()
    settings = ConvertSettings(**{name: given[name] for name in settings_of(ConvertSettings)})
    opened = open_checkpoint(
        model, revision=revision, token=token, allow_pickle=settings.allow_pickle, progress=progress
    )
    checkpoint = match_source(opened)
    arch = find_attention_model(checkpoint.config, checkpoint.tensors)
    check_source(checkpoint, arch, settings)
    devices = find_devices(settings.device)
    requested = devices[0]
    before = unfinished_identity(out).get("arguments") if settings.resume else None
    # A work folder that was changed by hand may hold anything.
    earlier = {k: v for k, v in before.items() if isinstance(v, dict)} if isinstance(before, dict) else {}
    windows = choose_windows(checkpoint, arch, settings, requested, progress, earlier.get("windows"))
    if isinstance(windows, WindowChoice):
        settings = windows.resolved(settings)
    sharing = choose_sharing(checkpoint, arch, settings, requested, progress, earlier.get("indexers"))
    if sharing:
        settings = sharing.resolved(settings)
    target = choose_target(checkpoint, arch, settings, sharing.layers if sharing else ())
    target.outputs, config, storage = encode_outputs(
        target.outputs, target.config, target.auto_class, checkpoint, settings
    )
    verdicts = engine_verdicts(
        config,
        window=any(layout.sliding_window for layout in target.layouts),
        tokenizer=tokenizer_kind(checkpoint.folder),
        engines=settings.engines,
    )
    require_engines(verdicts, settings.engines)
    planned = earlier.get("joint", {}) if earlier else None
    joint = plan_joint(checkpoint, arch, target, settings, devices, planned)
    if joint and not settings.refits_jointly:
        settings = replace(settings, refit="joint")
    calibration = plan_calibration(checkpoint, arch, target, settings, requested, earlier.get("calibration"))
    work_device = choose_device(target, calibration, requested)
    # Layers and the joint refit are spread: everything else is done by the first device.
    work_devices = devices if work_device == requested else [work_device]
    joint_devices = work_devices if len(work_devices) > 1 else [requested]
    if joint and len(joint_devices) < len(devices):  # the layers need none of the others
        joint = plan_joint(checkpoint, arch, target, settings, joint_devices, planned)
    if len(work_devices) > 1 and checkpoint.in_memory:
        raise SettingError(
            "device",
            f"`device` names {len(devices)} devices; .bin weights such as those of {checkpoint.source} take one.",
            "Name one device, or save the weights as safetensors.",
        )
    recorded = settings.recorded() | recorded_choice(windows) | (sharing.recorded() if sharing else {})
    if calibration:
        recorded["calibration"] = calibration.described() | {"reason": calibration.reason}
    if joint:
        recorded["joint"] = asdict(joint)
    longer = raised_max_length(checkpoint.folder, settings.context) if settings.context else None
    if longer:
        target.notes.append(f"{TOKENIZER_CONFIG}: model_max_length {longer[0]} becomes {settings.context}.")
    memory, seconds = forecast_conversion(
        checkpoint, arch, target, settings, calibration, joint, work_devices, requested
    )
    plan = make_plan(
        checkpoint,
        arch,
        target.outputs,
        config=config,
        layouts=target.layouts,
        arguments=recorded,
        peak_memory=memory,
        seconds=seconds,
        exact=target.exact
        and not (settings.context or settings.sliding_window is not None or settings.requantize or settings.sparse)
        and sharing is None,
        explain=target.explain,
        max_shard_size=settings.max_shard_size,
        engines=verdicts,
        warnings=[
            *target.warnings,
            *(windows.warnings() if windows else ()),
            *plan_warnings(calibration),
            *joint_warnings(checkpoint, arch, joint),
        ],
        notes=[
            *target.notes,
            *(windows.notes() if windows else ()),
            *(sharing.notes() if sharing else ()),
            *storage,
            *plan_notes(arch, target, calibration, settings),
            *joint_notes(checkpoint, target, settings, joint, joint_devices),
            *device_notes(devices, work_devices, joint=joint is not None),
        ],
    )
    if settings.push_to_hub:  # a reason against the push at the end stops the conversion before it begins
        check_repository(
            settings.push_to_hub,
            source_record(plan, checkpoint),
            private=settings.private,
            token=token,
            need_token=not settings.dry_run,
        )
    if settings.dry_run:
        return plan
    require_free_memory(plan.peak_memory, work_device)

    identity = {
        "source": checkpoint.fingerprint(),
        # The reason holds a forecast, and the text that it chose is there already.
        "arguments": plan.arguments | ({"calibration": calibration.described()} if calibration else {}),
        "moments": str(calibration.reuse) if calibration and calibration.reuse else None,
        "device": work_device.type,
        "torch": torch.__version__,
    }
    writer = Writer(
        out,
        target.outputs,
        identity=identity,
        source=checkpoint.path if checkpoint.revision is None else None,
        max_shard_size=settings.max_shard_size,
        resume=settings.resume,
        force=settings.force,
        allow_nan=settings.allow_nan,
    )
    processes = DevicePool(work_devices, (LayerJob, LayerDamage, *([JointTraining] if joint else ())))
    with writer, processes as pool, BackgroundCopy(checkpoint, target, writer) as copy:
        measured = calibration if calibration and calibration.reuse is None else None
        texts = text_folder(checkpoint, measured, writer) if measured else writer.work.folder
        heldback = plan_loss(checkpoint, arch, target, settings, calibration)
        job = LayerJob(checkpoint, arch, target, calibration, texts if measured else None, settings.allow_nan)
        remaining = RemainingLayers(target, writer)
        if joint and measured:
            share_text(writer, checkpoint, joint, measured, texts, requested, progress)
        if measured and measured.images is None and remaining.indices:
            keep_text(checkpoint, target, measured, requested, progress, texts)
        # The other devices convert while this process measures the parent.
        converted = pool.begin(job, remaining.indices, progress)
        if heldback:
            measure_text(checkpoint, heldback, writer, requested, progress, texts)
        expected = sum(plan.seconds.get(stage, 0.0) for stage in LAYER_STAGES)
        # A CPU has no time to spare for it, and less memory.
        layers = remaining.write(converted, progress, expected, beside=work_device.type == "cuda")
        copy.finish(progress)
        if longer:
            writer.add_text(TOKENIZER_CONFIG, longer[1])
        checkpoint.check_unchanged()
        verification: list[Verification] = []
        stages: list[dict[str, Any]] = []
        text_loss: list[CalibrationLoss | None] = []

        def check(folder: Path) -> None:
            if joint:
                names = {n for i in range(len(target.layouts)) for n in target.converted_names(i)}
                stages.extend(
                    refit_jointly(
                        writer,
                        checkpoint,
                        names,
                        joint,
                        seed=settings.seed,
                        devices=joint_devices,
                        pool=pool,
                        progress=progress,
                    )
                )
            damage = None
            if heldback and measured and is_measured(writer):
                text = read_corpus(checkpoint, measured, requested, progress, texts)[0]
                damage = plan_damage(open_checkpoint(folder), checkpoint, text, requested)
            if damage:  # the other devices estimate it while this process makes the checks
                estimated = pool.begin(damage, range(len(damage.tokens)), processes=damage.processes(requested))
            if settings.verify:
                checked = check_folder(
                    open_checkpoint(folder),
                    checkpoint,
                    planned=target.layouts,
                    arguments=plan.arguments,
                    device=requested,
                    progress=progress,
                )
                verification.append(checked.accepting(settings.accept))
            if heldback and (not verification or verification[0].passed):
                text_loss.append(
                    measure_converted(folder, checkpoint, heldback, writer, requested, progress, texts)
                )
                for layer, nats in enumerate(damage.total(estimated, progress) if damage else ()):
                    layers.setdefault(layer, {})["damage"] = nats
            manifest = make_manifest(
                plan,
                checkpoint,
                out=Path(out).name,
                hashes=writer.hashes,
                files=hash_files(folder),
                layers=layers,
                device=work_device.type,
                verification=verification[0].to_dict() if verification else None,
                refit=stages,
                text_loss=asdict(text_loss[0]) if text_loss and text_loss[0] else None,
            )
            writer.add_text("headwise.json", json.dumps(manifest, indent=2) + "\n")
            writer.add_text("README.md", render_card(manifest, checkpoint.folder / "README.md"))
            if checkpoint.revision is None:
                writer.add_text(PARENT, f"{checkpoint.path.resolve()}\n")
            if verification:
                verification[0].require(folder)

        writer.add_text("config.json", json.dumps(config, indent=2) + "\n")
        published = writer.publish(check)
    pushed = None
    if settings.push_to_hub:
        pushed = push_converted(published, settings.push_to_hub, settings.private, token, progress)
    progress.finish()
    return ConvertResult(
        published,
        plan,
        layers,
        stages,
        text_loss[0] if text_loss else None,
        verification[0] if verification else None,
        pushed,
    )
