"""Decide what a conversion does, from the config and the headers, before any tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from headwise.convert.settings import ConvertSettings
from headwise.fields import flag_of, settings_of
from headwise.format import dtype_name, duration, layout_names, plain_fields, size
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor, Shard, plan_shards
from headwise.models.config import dtype_of
from headwise.models.layout import AttentionLayout, CacheSize, cached_tokens, describe
from headwise.models.protocol import AttentionModel, context_length
from headwise.serving.engines import EngineVerdict
from headwise.serving.tensor_parallel import GpuCache, gpu_caches, unpaid_degree


@dataclass(frozen=True)
class TensorAction:
    """What the conversion does with one tensor.

    Attributes:
        name: of the output tensor, or of the dropped source tensor.
        action: "copy" (byte for byte), "convert" (computed) or "drop".
        before: dtype and shape in the source; None for a tensor that is new.
        after: dtype and shape in the output; None for a dropped tensor.
        reason: why it is converted or dropped; empty for a copy.
    """

    name: str
    action: str
    before: tuple[torch.dtype, tuple[int, ...]] | None
    after: tuple[torch.dtype, tuple[int, ...]] | None
    reason: str = ""


@dataclass(frozen=True)
class PartPlan:
    """What the conversion does with one part of a model, such as its cross-attention.

    Attributes:
        part: "text", "encoder", "decoder", "cross" or "vision".
        before: name of its layouts in the source.
        after: name of its layouts in the output.
        cached: whether its keys and values are kept from one step to the next.
        counts: the tokens that its cache counts, such as "encoder token"; of merged attention, both kinds.
        bytes_before: KV cache of the source for one such token.
        bytes_after: KV cache of the output for one such token.
    """

    part: str
    before: str
    after: str
    cached: bool
    counts: str
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        cache = f"cache per {self.counts} {size(self.bytes_before)} -> {size(self.bytes_after)}"
        without = "no cache to save; fewer KV heads save weights and time"
        return f"{self.part}: {self.before} -> {self.after}; {cache if self.cached else without}"


@dataclass(frozen=True)
class Plan:
    """A decided conversion: `dry_run` returns it, the pipeline carries it out.

    Attributes:
        model: the source, as the user named it.
        revision: the commit of a Hub repository; None for a local folder.
        arguments: the settings in force, as headwise.json records them.
        config: the new config.json.
        layouts_before: of every layer of the source.
        layouts_after: of every layer of the output.
        actions: the action for every tensor, dropped ones last.
        outputs: every tensor to write, in order; `source` names the tensor that it copies, or is None.
        shards: the weight files.
        cache_before: KV cache of the source.
        cache_after: KV cache of the output.
        gpu_caches: KV cache per token on each GPU, by tensor parallelism; empty for a model of several parts.
        bytes_before: weights of the source, as its files hold them.
        parameters_before: number of parameters of the source.
        dtype_before: of the source.
        peak_memory: forecast in bytes.
        seconds: forecast by stage, on this machine; empty: not forecast.
        exact: whether the output computes the parent's function.
        sidecars: files copied beside the weights.
        left_out: files of the source that are not copied.
        engines: for each engine whether it loads the output, with which command, and why not.
        warnings: lines that the user must not miss.
        notes: lines about the decisions.
    """

    model: str
    revision: str | None
    arguments: dict[str, Any]
    config: dict[str, Any]
    layouts_before: tuple[AttentionLayout, ...]
    layouts_after: tuple[AttentionLayout, ...]
    actions: tuple[TensorAction, ...]
    outputs: tuple[OutputTensor, ...]
    shards: tuple[Shard, ...]
    cache_before: CacheSize
    cache_after: CacheSize
    bytes_before: int
    parameters_before: int
    dtype_before: torch.dtype
    peak_memory: int
    sidecars: tuple[str, ...]
    left_out: tuple[str, ...]
    seconds: dict[str, float] = field(default_factory=dict)
    exact: bool = False
    gpu_caches: tuple[GpuCache, ...] = ()
    engines: tuple[EngineVerdict, ...] = ()
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def flags(self) -> dict[str, str]:
        """Return the spelling of every setting on the command line."""
        return {name: flag_of(name, setting) for name, (_, setting) in settings_of(ConvertSettings).items()}

    @property
    def parts(self) -> tuple[PartPlan, ...]:
        """Return every part of a model of several, or of one without a cache; else none."""
        before = [layout for layout in self.layouts_before if layout.attends]
        names = list(dict.fromkeys(layout.part for layout in before))
        if len(names) == 1 and all(layout.cached for layout in before):
            return ()
        return tuple(self._part(name) for name in names)

    def _part(self, part: str) -> PartPlan:
        old, new = ([x for x in side if x.part == part] for side in (self.layouts_before, self.layouts_after))
        sizes = [
            sum(layout.cache_elements_per_token for layout in side) * dtype.itemsize
            for side, dtype in ((old, self.dtype_before), (new, dtype_of(self.config)))
        ]
        cached = any(layout.cached for layout in old)
        return PartPlan(part, layout_names(old), layout_names(new), cached, cached_tokens(old[0]), *sizes)

    @property
    def bytes_after(self) -> int:
        """Return the bytes of the output's weights."""
        return sum(tensor.nbytes for tensor in self.outputs)

    @property
    def parameters_after(self) -> int:
        """Return the number of parameters of the output."""
        return sum(math.prod(tensor.shape) for tensor in self.outputs)

    @property
    def disk(self) -> int:
        """Return the bytes of the weight files, headers included."""
        return sum(shard.nbytes for shard in self.shards)

    def __str__(self) -> str:
        """Return the plan in a few lines; `to_dict` has every tensor."""
        counts = Counter(action.action for action in self.actions)
        return "\n".join(
            [
                f"Plan for {self.model}: {layout_names(self.layouts_before)} -> {layout_names(self.layouts_after)}",
                *(
                    map(str, self.parts)
                    if self.parts
                    else [
                        f"KV cache per token: {size(self.cache_before.bytes_per_token)} -> "
                        f"{size(self.cache_after.bytes_per_token)}"
                    ]
                ),
                f"Parameters: {self.parameters_before:,} -> {self.parameters_after:,}",
                f"Weights: {size(self.bytes_before)} -> {size(self.bytes_after)}",
                f"Tensors: {counts['copy']} copied, {counts['convert']} converted, {counts['drop']} dropped",
                f"Forecast: {duration(sum(self.seconds.values()))}, {size(self.peak_memory)} of memory, "
                f"{size(self.disk)} on disk",
                *(f"Engine: {verdict.line}" for verdict in self.engines),
                *(f"Note: {note}" for note in self.notes),
                *(f"Warning: {warning}" for warning in self.warnings),
            ]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        hidden = (
            "config",
            "dtype_before",
            "layouts_before",
            "layouts_after",
            "actions",
            "outputs",
            "shards",
            "engines",
            "gpu_caches",
        )
        return {
            **plain_fields(self, *hidden),
            "cache_before": asdict(self.cache_before),
            "cache_after": asdict(self.cache_after),
            "gpu_caches": [asdict(each) for each in self.gpu_caches],
            "bytes_after": self.bytes_after,
            "parameters_after": self.parameters_after,
            "disk": self.disk,
            "parts": [asdict(part) for part in self.parts],
            "engines": [verdict.to_dict() for verdict in self.engines],
            "layers": [
                {"before": describe(before), "after": describe(after)}
                for before, after in zip(self.layouts_before, self.layouts_after, strict=True)
            ],
            "tensors": [
                {
                    "name": a.name,
                    "action": a.action,
                    "before": _to_plain(a.before),
                    "after": _to_plain(a.after),
                    "reason": a.reason,
                }
                for a in self.actions
            ],
            "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in self.shards],
        }


def grouped_outputs(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    computed: Collection[str] | None = None,
) -> list[OutputTensor]:
    """Return the tensors of a conversion that keeps the architecture, in the source's order.

    Args:
        checkpoint: the source.
        arch: its architecture.
        config: the new config, which gives the attention tensors their shapes.
        dtype: of all floating tensors; None: the dtype of each tensor.
        computed: names that the conversion computes; None: all attention tensors.
    """
    layers = range(len(arch.layouts(config)))
    shapes = {n: s for layer in layers for n, s in arch.tensor_shapes(config, layer).items()}
    changed = shapes.keys() if computed is None else computed
    outputs = []
    for name, entry in checkpoint.tensors.items():
        new = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
        copied = name not in changed and new == entry.dtype
        outputs.append(OutputTensor(name, new, shapes.get(name, entry.shape), name if copied else None))
    return outputs


def make_plan(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    outputs: Iterable[OutputTensor],
    *,
    config: dict[str, Any],
    layouts: Sequence[AttentionLayout],
    arguments: dict[str, Any],
    peak_memory: int,
    seconds: dict[str, float] | None = None,
    exact: bool = False,
    explain: Callable[[str], str] = lambda name: "",
    max_shard_size: int | str = "5GB",
    engines: Iterable[EngineVerdict] = (),
    warnings: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Plan:
    """Return the plan of a decided conversion.

    Args:
        checkpoint: the source.
        arch: its architecture.
        outputs: every tensor to write (`grouped_outputs`, or those of an MLA conversion).
        config: the new config.
        layouts: the new layout of every layer.
        arguments: the settings in force; a resumed run must have the same.
        peak_memory: forecast in bytes.
        seconds: forecast by stage.
        exact: whether the output computes the parent's function.
        explain: returns why a tensor is converted or dropped.
        max_shard_size: the largest weight file.
        engines: verdicts of the engines on the output.
        warnings: lines that the user must not miss.
        notes: lines about the decisions.
    """
    outputs = tuple(outputs)
    before = arch.layouts(checkpoint.config)
    longest = max(filter(None, map(context_length, (checkpoint.config, config))), default=None)
    dtypes = dtype_of(checkpoint.config), dtype_of(config)
    cached, result = ([layout for layout in side if layout.cached] for side in (before, layouts))
    unpaid = unpaid_degree(cached[0], result[0]) if len({layout.part for layout in cached}) == 1 else None
    single = bool(cached) and len({layout.part for layout in before if layout.attends}) == 1
    return Plan(
        model=checkpoint.source,
        revision=checkpoint.revision,
        arguments=arguments,
        config=config,
        layouts_before=tuple(before),
        layouts_after=tuple(layouts),
        actions=tuple(_tensor_actions(checkpoint, outputs, explain)),
        outputs=outputs,
        shards=tuple(plan_shards(outputs, max_shard_size)),
        cache_before=CacheSize.of(before, dtypes[0], longest),
        cache_after=CacheSize.of(layouts, dtypes[1], longest),
        bytes_before=checkpoint.stored_bytes,
        parameters_before=checkpoint.num_parameters,
        dtype_before=dtypes[0],
        peak_memory=peak_memory,
        seconds=dict(seconds or {}),
        exact=exact,
        gpu_caches=tuple(gpu_caches(before, layouts, *(each.itemsize for each in dtypes)) if single else ()),
        sidecars=tuple(path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.sidecars),
        left_out=tuple(checkpoint.left_out),
        engines=tuple(engines),
        warnings=(*checkpoint.warnings, *warnings),
        notes=(*checkpoint.notes, *notes, *filter(None, [unpaid])),
    )


def _tensor_actions(
    checkpoint: Checkpoint, outputs: Sequence[OutputTensor], explain: Callable[[str], str]
) -> Iterator[TensorAction]:
    stored_entries = checkpoint.tensors | checkpoint.dropped

    def stored(name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        entry = stored_entries.get(name)
        return (entry.dtype, entry.shape) if entry else None

    for tensor in outputs:
        codes = tensor.stored[-1] if tensor.stored else tensor
        rounded = bool(tensor.stored) and codes.source is None
        reasons = [
            "" if tensor.source else explain(tensor.name),
            "rounded to blocks of FP8" if rounded else "",
            f"stored times 2^{tensor.exponent}" if tensor.exponent else "",
        ]
        yield TensorAction(
            tensor.name,
            "copy" if tensor.source and not rounded and not tensor.exponent else "convert",
            stored(tensor.source or tensor.name),
            (codes.dtype if rounded else tensor.dtype, tensor.shape),
            "; ".join(filter(None, reasons)),
        )
    kept = {tensor.source or tensor.name for tensor in outputs}
    for name in stored_entries:
        if name not in kept:
            reason = "the stock class does not read it" if name in checkpoint.dropped else explain(name)
            yield TensorAction(name, "drop", stored(name), None, reason)


def _to_plain(tensor: tuple[torch.dtype, tuple[int, ...]] | None) -> dict[str, Any] | None:
    return {"dtype": dtype_name(tensor[0]), "shape": list(tensor[1])} if tensor else None
