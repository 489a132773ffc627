"""Find the models of an evaluation, describe them, identify them by their content, and load them."""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise.compat import no_progress_bars
from headwise.convert.inspect import inspect_model
from headwise.errors import HeadwiseError
from headwise.eval.result import Subject
from headwise.format import layout_names
from headwise.io.quantized.quantization import quantization_of
from headwise.io.reader import Checkpoint, read_gguf, read_headers
from headwise.io.source import Source, find_gguf, find_source
from headwise.io.tokenizer import load_tokenizer
from headwise.models.config import dtype_of, has_stock_class
from headwise.models.protocol import AttentionModel, find_attention_model, reads_pairs
from headwise.models.stock import load_model, stock_config
from headwise.models.stock_match import require_head
from headwise.models.table import require_decoder
from headwise.progress import SILENT, Progress
from headwise.records.manifest import hash_file

# Text on which two tokenizers with the same vocabulary can still differ: spaces, digits, case, other scripts.
PROBE = 'def f(x):\n\treturn [x**2 for x in range(10)]  # Übung, 測試 <s> </s>\n\n"It\'s 3.14."'
# Files that change nothing that is measured.
LICENCES = ("LICEN", "NOTICE", "COPYING", "USE_POLICY")


@dataclass(frozen=True)
class EvalModel:
    """A model of an evaluation.

    Attributes:
        source: its files; of a GGUF file, a temporary folder with its config and tokenizer.
        subject: its description for the report.
        checkpoint: a GGUF file or a quantised folder, whose tensors headwise dequantises; None: stock transformers
            loads the folder.
    """

    source: Source
    subject: Subject
    checkpoint: Checkpoint | None = None

    @property
    def is_gguf(self) -> bool:
        """Return whether the model is a GGUF file."""
        return self.checkpoint is not None and self.checkpoint.gguf is not None

    @property
    def folder(self) -> str:
        """Return the folder of the files."""
        return str(self.source.folder)

    @property
    def name(self) -> str:
        """Return the repository, or the last part of the path, which does not show private folders."""
        return self.subject.model

    @property
    def context(self) -> int | None:
        """Return `max_position_embeddings` of the stock class; None if there is no such class or field."""
        return self._stock_size("max_position_embeddings")

    @property
    def vocabulary(self) -> int | None:
        """Return `vocab_size` of the stock class; None if there is no such class or field."""
        return self._stock_size("vocab_size")

    def _stock_size(self, name: str) -> int | None:
        config = self.source.config
        if not has_stock_class(str(config.get("model_type"))):
            return None
        size = getattr(self.text_config, name, None)
        return size if isinstance(size, int) and size > 0 else None

    @property
    def text_config(self) -> Any:
        """Return the stock config object of the language model, or of an encoder-decoder's decoder."""
        return stock_config(self.source.config).get_text_config(decoder=True)

    @property
    def architecture(self) -> AttentionModel | None:
        """Return where the decoder layers and their attention are; None for an unknown model type."""
        try:
            return find_attention_model(self.source.config)
        except HeadwiseError:
            return None

    @property
    def auto_class(self) -> str:
        """Return the transformers class that loads the model; an unknown model type is a causal language model."""
        return "AutoModelForCausalLM" if self.architecture is None else self.architecture.auto_class

    @property
    def reads_pairs(self) -> bool:
        """Return whether the model is an encoder-decoder, which reads a source and a target."""
        return self.architecture is not None and self.architecture.reads_pairs

    def load_tokenizer(self) -> Any:
        """Load the tokenizer.

        Raises:
            HeadwiseError: there is no tokenizer.
        """
        return load_tokenizer(self.folder, self.source.name)

    def load(self, *, dtype: str, device: str, eager: bool = False) -> Any:
        """Load the stock model for measurements.

        Args:
            dtype: "float32", "bfloat16", "float16" or "auto" (as config.json).
            device: "cpu" or "cuda:N".
            eager: whether the attention returns its weights.
        """
        import torch
        import transformers

        attention = {"attn_implementation": "eager"} if eager else {}
        if self.checkpoint is not None:
            precision = dtype_of(self.checkpoint.config) if dtype == "auto" else getattr(torch, dtype)
            return load_model(self.checkpoint, self.auto_class, precision, device, **attention).eval()
        with no_progress_bars():
            loaded: Any = getattr(transformers, self.auto_class).from_pretrained(
                self.folder,
                dtype=dtype,
                device_map={"": torch.device(device)},  # no second copy on the CPU
                trust_remote_code=False,
                **attention,
            )
        return loaded.eval()


def find_model(model: str | Path, *, token: str | None = None, progress: Progress = SILENT) -> EvalModel:
    """Find a model and read its config and its file headers.

    Args:
        model: a folder, a GGUF file, or `org/name[@revision]`.
        token: token of the Hub.
        progress: receives the download.

    Raises:
        HeadwiseError: there is no such model, it is no language model, a tensor is missing, or it has no
            language-model head.
    """
    checkpoint = None
    if (path := find_gguf(model)) is not None:
        checkpoint = read_gguf(path)
        source = Source(
            str(model), checkpoint.folder, None, checkpoint.config, [], {}, checkpoint.sidecars, checkpoint.left_out
        )
    else:
        source = find_source(model, token=token, progress=progress)
    if not reads_pairs(source.config):
        require_decoder(str(model), source.config, "evaluated")
    attention = cache_bytes = parameters = None
    with suppress(HeadwiseError):  # a model that headwise cannot convert can still be evaluated
        if quantization_of(source.config) is not None:
            checkpoint = read_headers(source)
        attention = layout_names(find_attention_model(source.config).layouts(source.config))
    if attention is not None:  # stock transformers fills a missing tensor with random values
        inspection = inspect_model(source.folder if path is None else path)
        cache_bytes, parameters = inspection.cache.bytes_per_token, inspection.parameters
        if inspection.layouts[0].kind != "mla":
            require_head(checkpoint or read_headers(source), "its text is scored by its logits")
    subject = Subject(
        model=_public_name(source, checkpoint),
        revision=source.revision,
        model_type=str(source.config.get("model_type")),
        attention=attention,
        cache_bytes_per_token=cache_bytes,
        parameters=parameters,
        sha256=content_hash(source, checkpoint),
    )
    return EvalModel(source, subject, checkpoint)


def _public_name(source: Source, checkpoint: Checkpoint | None) -> str:
    """Return the repository, or the last part of the path: its folders may be private."""
    if checkpoint is not None and checkpoint.gguf is not None:
        return checkpoint.path.name
    return source.name if source.revision else source.folder.resolve().name


def content_hash(source: Source, checkpoint: Checkpoint | None = None) -> str:
    """Compute the SHA-256 of names and contents of config, weights and tokenizer.

    Args:
        source: the files of a model.
        checkpoint: as in `EvalModel`; a GGUF file is hashed itself.
    """
    total = hashlib.sha256()
    every = {source.folder / name for name in ("config.json", *source.weights)} | set(source.sidecars)
    if checkpoint is not None and checkpoint.gguf is not None:
        every = {checkpoint.path.parent / name for name in checkpoint.files}
    paths = sorted((path for path in every if not path.name.startswith(LICENCES)), key=lambda path: path.name)
    with ThreadPoolExecutor() as pool:
        for path, content in zip(paths, pool.map(_file_hash, paths), strict=True):
            total.update(f"{path.name}\0{content}\n".encode())
    return total.hexdigest()


def _file_hash(path: Path) -> str:
    # The Hub's cache names a large file by its hash, which huggingface_hub has checked.
    real = path.resolve()
    if real.parent.name == "blobs" and re.fullmatch("[0-9a-f]{64}", real.name):
        return real.name
    return hash_file(path)


def same_tokenizer(child: Any, parent: Any) -> bool:
    """Return whether two tokenizers have the same vocabulary and the same tokens for a probe text.

    Args:
        child: tokenizer of the child.
        parent: tokenizer of the parent.
    """
    return bool(child.get_vocab() == parent.get_vocab() and child(PROBE)["input_ids"] == parent(PROBE)["input_ids"])
