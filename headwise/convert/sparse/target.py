"""The target of shared indexers: the same sparse model in the stock class whose layers may share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from headwise.convert.base import NONE_SCALED, Refittable
from headwise.convert.calibration.layer_stream import LayerRecord
from headwise.io.reader import Checkpoint
from headwise.io.writer import OutputTensor
from headwise.models.deepseek import ROTATED, interleaved_rows
from headwise.models.mla_source import StockMla
from headwise.models.protocol import AttentionModel


class SharedIndexerTarget:
    """A sparse model whose layers share the indexers of some.

    Every tensor is copied, except those of the indexers: layers that share have none, and RoPE rotates neighbouring
    elements of the others, where it rotated the two halves.

    Args:
        checkpoint: the source, with an indexer in every layer.
        model: its stock class.
        stock: the class whose layers may share an indexer.
        own: indices of the layers that keep theirs.
        dtype: of the output; None keeps each tensor's own.
    """

    exact, calibrated, fitted, regresses_norms = True, False, False, False
    scaled = NONE_SCALED

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: AttentionModel,
        stock: StockMla,
        own: Sequence[int],
        *,
        dtype: torch.dtype | None = None,
    ) -> None:
        layouts = model.layouts(checkpoint.config)
        self.layouts = [replace(layout, shares_indexer=i not in own) for i, layout in enumerate(layouts)]
        self.auto_class, self.parent_config = stock.auto_class, checkpoint.config
        name = {} if dtype is None else dict.fromkeys(("dtype", "torch_dtype"), str(dtype).removeprefix("torch."))
        self.config = {
            **checkpoint.config,
            **stock.config,
            **name,
            "architectures": [stock.architecture],
            "model_type": stock.model_type,
            "indexer_types": ["shared" if layout.shares_indexer else "full" for layout in self.layouts],
            # For vLLM, which loads the class and reads these in place of `indexer_types`.
            "index_topk_pattern": "".join("S" if layout.shares_indexer else "F" for layout in self.layouts),
            "indexer_rope_interleave": stock.interleaved,
        }
        self.notes: list[str] = []
        self.warnings: list[str] = []
        self._heads, self._rotary = checkpoint.config["index_n_heads"], layouts[0].rotary_dim
        shared = tuple(
            f"{model.attention_path(i)}.indexer." for i, layout in enumerate(self.layouts) if layout.shares_indexer
        )
        self.outputs = []
        for tensor, entry in checkpoint.tensors.items():
            if not tensor.startswith(shared):
                copied = not tensor.endswith(ROTATED) and dtype in (None, entry.dtype)
                self.outputs.append(
                    OutputTensor(tensor, dtype or entry.dtype, entry.shape, tensor if copied else None)
                )
        self._dtypes = {tensor.name: tensor.dtype for tensor in self.outputs}

    def explain(self, name: str) -> str:
        """See `Target`."""
        if name not in self._dtypes:
            return "the layer shares an indexer"
        return "rotary rows side by side" if name.endswith(ROTATED) else "another dtype"

    def transform_other(self, name: str, checkpoint: Checkpoint) -> Tensor:
        """See `Target`."""
        tensor = checkpoint.read(name)
        if name.endswith(ROTATED):
            tensor = interleaved_rows(name, tensor, self._heads, self._rotary)
        return tensor.to(self._dtypes[name]).contiguous()

    def converted_names(self, layer: int) -> tuple[str, ...]:
        """Return none: see `Target`."""
        return ()

    def convert_layer(self, layer: int, weights: Any, record: LayerRecord | None) -> tuple[Any, dict[str, Any]]:
        """Raise NotImplementedError: no layer is converted."""
        raise NotImplementedError

    def export_layer(self, layer: int, converted: Any, record: LayerRecord | None) -> dict[str, Tensor]:
        """Raise NotImplementedError: no layer is converted."""
        raise NotImplementedError

    def trainable_layer(self, layer: int, converted: Any, device: torch.device, length: int) -> Refittable:
        """Raise NotImplementedError: no layer is converted."""
        raise NotImplementedError
