"""The models of an evaluation: found, described, identified by content, loaded."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.convert.inspect import inspect_model
from headwise.errors import HeadwiseError
from headwise.eval.result import Subject
from headwise.format import layout_names
from headwise.io.source import Source, locate
from headwise.io.tokenizer import load_tokenizer
from headwise.models import architecture
from headwise.models.protocol import LatentModel
from headwise.progress import SILENT, Progress
from headwise.records.manifest import hash_file

PROBE = 'def f(x):\n\treturn [x**2 for x in range(10)]  # Übung, 測試 <s> </s>\n\n"It\'s 3.14."'


@dataclass(frozen=True)
class Model:
    """A model's files and what is said of it."""

    source: Source
    subject: Subject

    @property
    def folder(self) -> str:
        return str(self.source.folder)

    @property
    def name(self) -> str:
        """The repository, or the last part of a folder's path: the rest of it is nobody's business."""
        return self.source.name if self.source.revision else self.source.folder.resolve().name

    @property
    def context(self) -> int | None:
        """The positions that the model knows, max_position_embeddings."""
        text = self.source.config.get("text_config") or self.source.config
        return text.get("max_position_embeddings") or text.get("n_positions")

    @property
    def stock(self) -> architecture.Architecture | LatentModel | None:
        """Where the decoder layers and their attention are; None where headwise does not know the type."""
        config = self.source.config
        if LatentModel.wrote(config):
            return LatentModel(config)
        try:
            return architecture.find(config)
        except HeadwiseError:
            return None


def find(model: str | Path, *, token: str | None = None, progress: Progress = SILENT) -> Model:
    """Find a model and read what its config and headers say.

    Raises:
        HeadwiseError: there is no such model.
    """
    source = locate(model, token=token, progress=progress)
    attention = cache = parameters = None
    try:
        found = inspect_model(source.folder)
        attention, cache = layout_names(found.layouts), found.cache.bytes_per_token
        parameters = found.parameters
    except HeadwiseError:  # a type that headwise cannot convert can be evaluated all the same
        pass
    subject = Subject(
        model=str(model),
        revision=source.revision,
        model_type=str(source.config.get("model_type")),
        attention=attention,
        cache_bytes_per_token=cache,
        parameters=parameters,
        sha256=content_hash(source),
    )
    return Model(source, subject)


def content_hash(source: Source) -> str:
    """SHA-256 over the names and contents of config, weights and tokenizer."""
    total = hashlib.sha256()
    paths = {source.folder / name for name in ("config.json", *source.weights)} | set(source.sidecars)
    for path in sorted(paths, key=lambda path: path.name):
        if path.name.startswith(("LICEN", "NOTICE", "COPYING", "USE_POLICY")):
            continue
        total.update(f"{path.name}\0{_file_hash(path)}\n".encode())
    return total.hexdigest()


def _file_hash(path: Path) -> str:
    # In the Hub's cache a large file is named by its hash, which the client has checked.
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    return hash_file(path)


def tokenizer_of(model: Model) -> Any:
    """The tokenizer of a model; HeadwiseError where it has none."""
    return load_tokenizer(model.folder, model.subject.model)


def same_tokenizer(child: Any, parent: Any) -> bool:
    """Whether two tokenizers make the same tokens of the same text."""
    return child.get_vocab() == parent.get_vocab() and child(PROBE)["input_ids"] == parent(PROBE)["input_ids"]


def load(model: Model, *, dtype: str, device: str, eager: bool = False) -> Any:
    """The stock model, ready to be measured; `eager` attention gives its weights."""
    from transformers import AutoModelForCausalLM

    attention = {"attn_implementation": "eager"} if eager else {}
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        model.folder, dtype=dtype, trust_remote_code=False, **attention
    )
    return loaded.to(device).eval()
