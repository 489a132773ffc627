"""Count the bytes that the weights of a model take: in its files, and after a conversion."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from headwise.io.gguf import GgufModel
from headwise.io.header import TensorEntry
from headwise.io.quantized.forms import FORMS
from headwise.io.reader import Checkpoint

# More bytes or parameters than any model has.
MAX_SIZE = 1 << 63


def known_size(value: object) -> int | None:
    """Return a size that the index of a model names; None if it is no possible size.

    Args:
        value: a field of the index.
    """
    return value if type(value) is int and 0 < value < MAX_SIZE else None


@dataclass(frozen=True)
class WeightFiles:
    """What the headers of a model, or its index, show about its weights.

    Attributes:
        entries: the plain tensors, by the names of the stock class; empty: no headers are at hand.
        stored: bytes in the files of each of them.
        total: bytes of all of them, from the index; None: not known.
        method: by which they are quantised; None: they are plain.
        carried: whether a conversion carries quantised weights that it does not change over as they are stored.
        powers: the powers of two that they are stored with, see `Checkpoint`.
    """

    entries: Mapping[str, TensorEntry] = field(default_factory=dict)
    stored: Mapping[str, int] = field(default_factory=dict)
    total: int | None = None
    method: str | None = None
    carried: bool = False
    powers: Mapping[str, int] = field(default_factory=dict)

    @property
    def are_encoded(self) -> bool:
        """Return whether the files store fewer bytes than the plain tensors have; true without headers."""
        plain = sum(entry.nbytes for entry in self.entries.values())
        return not plain or sum(self.stored.values()) < plain

    @classmethod
    def of_method(cls, method: str, total: object) -> WeightFiles:
        """Return what is known of quantised weights without their headers.

        Args:
            method: the `quant_method` of config.json.
            total: bytes of all tensors, as the index has them.
        """
        return cls(total=known_size(total), method=method, carried=all(form.carried for form in FORMS[method]))

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> WeightFiles:
        """Return what the headers of a folder show.

        Args:
            checkpoint: the folder, with the tensors that its stock class reads.
        """
        entries, quantized = checkpoint.tensors, checkpoint.quantized
        if quantized is None:
            stored = {name: entry.nbytes for name, entry in entries.items()}
            return cls(entries, stored, powers=checkpoint.powers)
        stored = {}
        for name, entry in entries.items():
            weight = quantized.tensors.get(entry.name)
            stored[name] = sum(part.nbytes for part in weight.parts.values()) if weight else entry.nbytes
        carried = all(form.carried for form in FORMS[quantized.method])
        return cls(entries, stored, None, quantized.method, carried)

    @classmethod
    def of_gguf(cls, model: GgufModel) -> WeightFiles:
        """Return what the header of a GGUF file shows.

        Args:
            model: the file.
        """
        stored = {name: model.tensors[place.source].nbytes for name, place in model.placements.items()}
        return cls(model.entries, stored, None, "gguf")

    def converted(self, attention: Collection[str]) -> Mapping[str, int]:
        """Return the bytes of each tensor after a conversion that keeps the architecture and the heads' number.

        Args:
            attention: the names of the tensors that a conversion changes.
        """
        plain = {name: entry.nbytes for name, entry in self.entries.items()}
        kept = {name: size for name, size in self.stored.items() if size != plain[name]}
        return plain | kept if self.carried and kept.keys().isdisjoint(attention) else plain

    def bytes_per_element(self, sizes: Mapping[str, int], names: Collection[str]) -> float:
        """Return the mean bytes of an element of some tensors; of all of them, if there are none of these.

        Args:
            sizes: bytes of every tensor.
            names: of the tensors.
        """
        counted = [name for name in names if name in self.entries] or list(self.entries)
        elements = sum(math.prod(self.entries[name].shape) for name in counted)
        return sum(sizes[name] for name in counted) / max(elements, 1)
