"""What a conversion will do, decided from config and headers before any tensor is read."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from headwise.format import dtype_name, plain_fields
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor, Shard, plan_shards
from headwise.models.architecture import Architecture
from headwise.models.config import dtype_of
from headwise.models.layout import AttentionLayout, Cache, describe
from headwise.models.stock_match import LEFTOVERS

SAME_ARCHITECTURE = "every engine that loads the source: the architecture is the same"


@dataclass(frozen=True)
class Fate:
    """What becomes of one tensor: "copy" (byte for byte), "rewrite" (computed) or "drop"."""

    name: str
    fate: str
    before: tuple[torch.dtype, tuple[int, ...]] | None
    after: tuple[torch.dtype, tuple[int, ...]] | None


@dataclass(frozen=True)
class Plan:
    """A conversion, decided: what `--dry-run` prints and `convert` executes.

    Attributes:
        outputs: every tensor to write, in order; its `source` is the tensor it is copied from, or None.
        fates: the same seen from both sides, the dropped source tensors at the end.
        config: the new config.json.
        layouts_before, layouts_after: of every layer.
        peak_memory, disk: forecasts, in bytes.
        engines: what loads the result.
    """

    model: str
    revision: str | None
    arguments: dict[str, Any]
    config: dict[str, Any]
    layouts_before: tuple[AttentionLayout, ...]
    layouts_after: tuple[AttentionLayout, ...]
    fates: tuple[Fate, ...]
    outputs: tuple[OutputTensor, ...]
    shards: tuple[Shard, ...]
    cache_before: Cache
    cache_after: Cache
    bytes_before: int
    parameters_before: int
    peak_memory: int
    sidecars: tuple[str, ...]
    left_out: tuple[str, ...]
    engines: tuple[str, ...] = (SAME_ARCHITECTURE,)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def bytes_after(self) -> int:
        return sum(tensor.nbytes for tensor in self.outputs)

    @property
    def parameters_after(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.outputs)

    @property
    def disk(self) -> int:
        return sum(shard.nbytes for shard in self.shards)

    def to_dict(self) -> dict[str, Any]:
        hidden = ("config", "layouts_before", "layouts_after", "fates", "outputs", "shards")
        return {
            **plain_fields(self, *hidden),
            "cache_before": asdict(self.cache_before),
            "cache_after": asdict(self.cache_after),
            "bytes_after": self.bytes_after,
            "parameters_after": self.parameters_after,
            "disk": self.disk,
            "layers": [
                {"before": describe(before), "after": describe(after)}
                for before, after in zip(self.layouts_before, self.layouts_after, strict=True)
            ],
            "tensors": [
                {"name": f.name, "fate": f.fate, "before": _spell(f.before), "after": _spell(f.after)}
                for f in self.fates
            ],
            "shards": [{"file": s.file, "bytes": s.nbytes, "tensors": len(s.tensors)} for s in self.shards],
        }


def grouped_outputs(
    checkpoint: Checkpoint,
    arch: Architecture,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None = None,
    computed: Collection[str] | None = None,
) -> list[OutputTensor]:
    """The tensors of a conversion that keeps the architecture, in the source's order.

    Args:
        config: the new config, which gives the attention tensors their shapes.
        dtype: of all floating tensors; None keeps each as it is.
        computed: names that the conversion computes; None: all attention tensors.
    """
    layers = range(len(arch.layouts(config)))
    shapes = {n: s for layer in layers for n, s in arch.tensor_shapes(config, layer).items()}
    changed = shapes.keys() if computed is None else computed
    outputs = []
    for name, entry in checkpoint.tensors.items():
        if LEFTOVERS.search(name) and name not in shapes:
            continue
        new = dtype if dtype and entry.dtype.is_floating_point else entry.dtype
        copied = name not in changed and new == entry.dtype
        outputs.append(OutputTensor(name, new, shapes.get(name, entry.shape), name if copied else None))
    return outputs


def make_plan(
    checkpoint: Checkpoint,
    arch: Architecture,
    outputs: Iterable[OutputTensor],
    *,
    config: dict[str, Any],
    layouts: Sequence[AttentionLayout],
    arguments: dict[str, Any],
    peak_memory: int,
    max_shard_size: int | str = "5GB",
    engines: Iterable[str] = (SAME_ARCHITECTURE,),
    warnings: Iterable[str] = (),
    notes: Iterable[str] = (),
) -> Plan:
    """Put a decided conversion into a `Plan`.

    Args:
        outputs: every tensor to write (`grouped_outputs`, or an MLA conversion's own).
        config, layouts: the new config, and the new layout of every layer.
        arguments: what the user asked for, as it is to be shown and compared on `--resume`.
        peak_memory: forecast in bytes.
    """
    outputs = tuple(outputs)
    before = arch.layouts(checkpoint.config)
    return Plan(
        model=checkpoint.source,
        revision=checkpoint.revision,
        arguments=arguments,
        config=config,
        layouts_before=tuple(before),
        layouts_after=tuple(layouts),
        fates=tuple(_fates(checkpoint, outputs)),
        outputs=outputs,
        shards=tuple(plan_shards(outputs, max_shard_size)),
        cache_before=Cache.of(before, dtype_of(checkpoint.config)),
        cache_after=Cache.of(layouts, dtype_of(config)),
        bytes_before=checkpoint.nbytes,
        parameters_before=sum(math.prod(entry.shape) for entry in checkpoint.tensors.values()),
        peak_memory=peak_memory,
        sidecars=tuple(path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.sidecars),
        left_out=tuple(checkpoint.left_out),
        engines=tuple(engines),
        warnings=tuple(warnings),
        notes=tuple(notes),
    )


def _fates(checkpoint: Checkpoint, outputs: Sequence[OutputTensor]) -> Iterator[Fate]:
    def stored(name: str) -> tuple[torch.dtype, tuple[int, ...]] | None:
        entry = checkpoint.tensors.get(name)
        return (entry.dtype, entry.shape) if entry else None

    for tensor in outputs:
        fate = "copy" if tensor.source else "rewrite"
        yield Fate(tensor.name, fate, stored(tensor.source or tensor.name), (tensor.dtype, tensor.shape))
    kept = {tensor.source or tensor.name for tensor in outputs}
    for name in checkpoint.tensors:
        if name not in kept:
            yield Fate(name, "drop", stored(name), None)


def _spell(kind: tuple[torch.dtype, tuple[int, ...]] | None) -> dict[str, Any] | None:
    return {"dtype": dtype_name(kind[0]), "shape": list(kind[1])} if kind else None
