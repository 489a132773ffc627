"""Write text that a model samples from itself: `headwise sample`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from headwise.convert.calibration.sample_settings import SampleSettings
from headwise.environment import find_device
from headwise.errors import HeadwiseError, SettingError
from headwise.io.fs import os_errors
from headwise.io.reader import Checkpoint, open_checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.io.workdir import write_file_atomically
from headwise.models.protocol import find_attention_model
from headwise.models.stock_match import match_source, require_head
from headwise.models.table import require_decoder
from headwise.progress import SILENT, Progress
from headwise.text.sampled import documents_of, sample_tokens
from headwise.train.student import load_for_sampling

LENGTH = 1024


@dataclass(frozen=True)
class SampleResult:
    """Text that was sampled from a model.

    Attributes:
        out: the file: JSON lines with a "text" each.
        documents: number of lines.
        tokens: number of sampled tokens.
        seed: of the samples.
    """

    out: Path
    documents: int
    tokens: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return asdict(self) | {"out": str(self.out)}


def sample_text(
    model: str | Path,
    out: str | Path | None = None,
    *,
    tokens: int = SampleSettings.tokens,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    force: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> SampleResult:
    """Write text sampled from a model at temperature 1, as calibration and training text that needs no data.

    Sequences of up to 1,024 tokens begin at the start of a document; where the model has a chat template, a quarter
    begins at a user's turn. The file appears when it is complete.

    Args:
        model: a folder, a GGUF file, or `org/name[@revision]` on the Hub.
        out: the file to write, `.jsonl`; None: MODEL-samples.jsonl in the working directory.
        tokens: number of tokens to sample, about.
        seed: of the samples.
        device: "cpu", "cuda" or "cuda:N"; None: a GPU if there is one.
        dtype: precision of the weights, "bfloat16", "float16" or "float32"; None: bfloat16 on a GPU, else float32.
        force: replace an existing file.
        revision: branch, tag or commit of a Hub repository.
        token: of the Hub.
        progress: receives the tokens that are sampled.

    Returns:
        The file and the amount of text in it.

    Raises:
        SettingError: a setting is not legal, or the file exists.
        HeadwiseError: the model cannot be loaded whole or sampled from.
    """
    settings = SampleSettings(tokens=tokens, out=out, force=force, seed=seed, device=device, dtype=dtype)  # type: ignore[arg-type]
    path = settings.out or Path(f"{_name_of(model)}-samples.jsonl")
    if path.exists() and not force:
        raise SettingError("out", f"{path} exists already.", "Name another file, or pass `force` to replace it.")
    if not path.parent.is_dir():
        raise SettingError("out", f"The folder {path.parent} does not exist.", "Make the folder first.")
    where = find_device(device)
    checkpoint = match_source(open_checkpoint(model, revision=revision, token=token, progress=progress))
    require_decoder(checkpoint.source, checkpoint.config, "sampled from")
    require_head(checkpoint, "text is sampled from its logits")
    precision = None if settings.dtype is None else getattr(torch, settings.dtype)
    result = write_samples(checkpoint, path, tokens, seed=seed, device=where, dtype=precision, progress=progress)
    progress.finish()
    return result


def write_samples(
    checkpoint: Checkpoint,
    path: Path,
    tokens: int,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype | None = None,
    progress: Progress = SILENT,
) -> SampleResult:
    """Sample about that many tokens, in sequences as long as the model allows up to 1,024, and write them.

    Args:
        checkpoint: the model.
        path: the file; it appears when it is complete.
        tokens: how many.
        seed: of the samples.
        device: where the model runs.
        dtype: of its weights; None: bfloat16 on a GPU, else float32.
        progress: receives the tokens that are sampled.

    Returns:
        The file and the amount of text in it.

    Raises:
        HeadwiseError: the model cannot be loaded, or gives logits that are not finite.
    """
    stock = find_attention_model(checkpoint.config, checkpoint.tensors).stock_config(checkpoint.config)
    longest = getattr(stock, "max_position_embeddings", None) or LENGTH
    length = min(LENGTH, longest, tokens)
    if length < 2:
        raise HeadwiseError(f"{checkpoint.source} has positions for {longest} tokens, which holds no text.")
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.source)
    network = load_for_sampling(checkpoint, device, dtype)
    sequences = max(1, round(tokens / length))
    rows = sample_tokens(network, tokenizer, sequences=sequences, length=length, seed=seed, progress=progress)
    documents = documents_of(rows, tokenizer)
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
    with os_errors(path):
        write_file_atomically(path, lines.encode())
    return SampleResult(path, len(documents), rows.numel(), seed)


def _name_of(model: str | Path) -> str:
    """Return the last part of a folder, file or repository, without a revision."""
    folder = Path(model)
    if folder.exists():
        return folder.resolve().stem if folder.is_file() else folder.resolve().name
    return str(model).partition("@")[0].rpartition("/")[2]
