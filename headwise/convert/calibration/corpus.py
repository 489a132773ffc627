"""Choose and read the calibration text, keep it beside the work, and measure how well it fits the parent."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from headwise.convert.forecast.machine import clock, product_rate
from headwise.convert.forecast.stage_seconds import CALIBRATION_LENGTH, forward_seconds
from headwise.environment import available_memory
from headwise.errors import HeadwiseError
from headwise.format import duration
from headwise.io.fs import DiskError
from headwise.io.reader import Checkpoint, has_nonfinite, open_checkpoint
from headwise.io.tokenizer import load_tokenizer, tokenizer_errors
from headwise.io.workdir import write_file_atomically
from headwise.io.writer import Writer
from headwise.measure.loss import nats_per_token
from headwise.models.protocol import AttentionModel, find_attention_model
from headwise.progress import SILENT, Progress
from headwise.schema import restore
from headwise.text.blocks import blocks_from
from headwise.text.sampled import MAX_SEQUENCES, sample_tokens, seconds_per_token
from headwise.train.student import load_for_sampling

SAMPLED, MIXTURE, BUILTIN = "sampled", "mixture", "builtin"
# The value of `calibrate` for text of long documents: indexers learn which distant keys matter.
LONG_TEXT = "auto long"
# `auto` samples no less than this: on 32,768 tokens the mixture was better on every text measured (decision 0026).
FEWEST_SAMPLED = 65_536
FILE = "text.safetensors"
# Forecast seconds up to which `auto` samples text, and up to which losses on the text are measured.
SAMPLING_SECONDS, LOSS_SECONDS = 600.0, 120.0
# Sustained rate of sampling on one H200, on the low side of what was measured on 135M parameters.
CUDA_SAMPLING_FLOPS = 1e13
# Rows of a product at a step of sampling on a CPU: the most sequences at once.
ROWS = MAX_SEQUENCES["cpu"]
MEMORY_SHARE = 0.6
# Sequences of calibration length that no moment contains, and pieces for the comparison with samples.
NUM_HELDBACK, NUM_PIECES, PIECE_LENGTH = 2, 8, 128
# Nats per token by which the parent's loss on the text may exceed its loss on its own samples.
FAR_ABOVE = 1.0
NOTE = "text loss"


@dataclass(frozen=True)
class TextChoice:
    """Which text is read, and why.

    Attributes:
        text: as `calibrate` names it.
        reason: why `auto` chose it; None if the settings named it.
    """

    text: str
    reason: str | None = None


@dataclass(frozen=True)
class CalibrationLoss:
    """Losses on the calibration text, in nats per token; None: not measured.

    Attributes:
        tokens: predicted tokens of the held-back part.
        source: the text, as `calibrate` names it; a file by its name alone.
        before: the parent's loss on it.
        after: the converted model's loss on it.
        text: the parent's loss on short pieces of the calibration text.
        samples: the parent's loss on its own samples of the same length; None for sampled text.
    """

    tokens: int
    before: float | None
    after: float | None = None
    text: float | None = None
    samples: float | None = None
    source: str = "the calibration text"


def choose_text(
    checkpoint: Checkpoint,
    arch: AttentionModel,
    calibrate: str,
    tokens: int,
    device: torch.device,
    allow_nan: bool = False,
    length: int = CALIBRATION_LENGTH,
) -> TextChoice:
    """Decide which text is read.

    Args:
        checkpoint: the source.
        arch: its architecture.
        calibrate: the setting; "auto" samples text from the parent if that is affordable, else takes the mixture.
            `LONG_TEXT` takes the longest documents at hand.
        tokens: number of calibration tokens.
        device: where text is sampled.
        allow_nan: whether the weights may hold NaN.
        length: tokens in a sequence.
    """
    if calibrate == LONG_TEXT:
        return TextChoice(BUILTIN, "indexers learn from long documents")
    if calibrate != "auto":
        return TextChoice(calibrate)
    if checkpoint.headless:
        return TextChoice(MIXTURE, "a model without a language-model head is not sampled from")
    if allow_nan:
        return TextChoice(MIXTURE, "a model whose weights may hold NaN is not sampled from")
    if arch.reads_pairs:
        return TextChoice(SAMPLED, "the targets are the model's own outputs on sources of the mixture")
    if not arch.cached:
        return TextChoice(MIXTURE, "an encoder writes no text")
    if arch.auto_class != "AutoModelForCausalLM":
        return TextChoice(MIXTURE, "the model reads more than text, and is not sampled from")
    if tokens < FEWEST_SAMPLED:
        return TextChoice(MIXTURE, f"sampled text is better from {FEWEST_SAMPLED:,} tokens on")
    seconds, limit = sampling_seconds(checkpoint, tokens, device, length), duration(SAMPLING_SECONDS)
    if seconds > SAMPLING_SECONDS:
        return TextChoice(MIXTURE, f"sampling is forecast at {duration(seconds)}, over the limit of {limit}")
    if not fits_whole(checkpoint, device):
        return TextChoice(MIXTURE, "the whole parent does not fit into the free memory")
    return TextChoice(SAMPLED, f"sampling is forecast at {duration(seconds)}, within the limit of {limit}")


def sampling_seconds(
    checkpoint: Checkpoint, tokens: int, device: torch.device, length: int = CALIBRATION_LENGTH
) -> float:
    """Return the forecast seconds of sampling.

    On a CPU a few steps are timed, unless the products alone take too long.

    Args:
        checkpoint: the model.
        tokens: how many are sampled.
        device: where the model runs.
        length: tokens in a sequence.
    """
    least = _least_sampling_seconds(checkpoint, tokens, device)
    if device.type == "cuda" or least > SAMPLING_SECONDS or not fits_whole(checkpoint, device):
        return least
    each = _timed_sampling(checkpoint, max(1, tokens // length), length)
    return least if each is None else max(least, tokens * each)


def _least_sampling_seconds(checkpoint: Checkpoint, tokens: int, device: torch.device) -> float:
    """Return the forecast seconds of the products of sampling; on a GPU of sampling as a whole."""
    flops = 2.0 * checkpoint.num_parameters * tokens
    if device.type == "cuda":
        return flops / CUDA_SAMPLING_FLOPS
    width = find_attention_model(checkpoint.config, checkpoint.tensors).stock_config(checkpoint.config).hidden_size
    return flops / product_rate(torch.float32, ROWS, width, 4 * width)


_TIMED: dict[tuple[str, int, int, int], float | None] = {}


def _timed_sampling(checkpoint: Checkpoint, sequences: int, length: int) -> float | None:
    """Return the measured seconds for one token on the CPU; None for a model that cannot be sampled from."""
    key = (checkpoint.fingerprint(), sequences, length, torch.get_num_threads())
    if key not in _TIMED:
        try:
            network = load_for_sampling(checkpoint, torch.device("cpu"))
            tokenizer = load_tokenizer(checkpoint.folder, checkpoint.source)
            shape = {"sequences": sequences, "length": length}
            _TIMED[key] = seconds_per_token(network, tokenizer, **shape, clock=clock)
        except Exception:  # of a stock class, or of a tokenizer of another model; the run itself reports it
            _TIMED[key] = None
    return _TIMED[key]


def keep_corpus(cache: Path, calibration: Any, blocks: Tensor) -> None:
    """Keep a text, so that `read_corpus` returns it.

    Args:
        cache: the folder.
        calibration: has text, sequences, length and seed.
        blocks: int64 (sequences, length): the text and its held-back part.
    """
    keep_tokens(cache, calibration, {"tokens": blocks.to(torch.int32)})


def keep_tokens(cache: Path, calibration: Any, tensors: Mapping[str, Tensor]) -> None:
    """Keep the tensors of a text, so that `kept_tokens` returns them.

    Args:
        cache: the folder.
        calibration: has text, sequences, length and seed.
        tensors: by name.
    """
    kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_file_atomically(cache / FILE, lambda to: save_file(kept, to, {"made": _identity(calibration)}))


def kept_tokens(cache: Path | None, calibration: Any, names: Collection[str]) -> dict[str, Tensor] | None:
    """Return the tensors that an earlier run kept of the same text; None if there are none.

    Args:
        cache: the folder; None: nothing is kept.
        calibration: has text, sequences, length and seed.
        names: of the tensors.
    """
    if cache is None or not (path := cache / FILE).exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made") != _identity(calibration):
                return None
            return {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError):
        return None


def require_known_tokens(checkpoint: Checkpoint, vocab_size: int, *tokens: Tensor) -> None:
    """Refuse text with a token that the model does not have.

    Args:
        checkpoint: the model.
        vocab_size: of the model.
        tokens: token ids.

    Raises:
        HeadwiseError: the tokenizer belongs to another model.
    """
    largest = max(int(each.max()) for each in tokens)
    if largest >= vocab_size:
        raise HeadwiseError(
            f"The tokenizer of {checkpoint.source} gives token {largest}; the vocabulary has {vocab_size}.",
            "Its files belong to another model: replace them, or pass `calibrate` none.",
        )


def read_corpus(
    checkpoint: Checkpoint,
    calibration: Any,
    device: torch.device | None = None,
    progress: Progress = SILENT,
    cache: Path | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the calibration text and its held-back part as token ids, (sequences, length) each.

    Args:
        checkpoint: the source, from which the text "sampled" is drawn.
        calibration: has text, sequences, length and seed.
        device: where text is sampled; None: the CPU.
        progress: receives the tokens that are sampled.
        cache: folder that keeps the tokens; a run that was interrupted reads them again.

    Returns:
        The text, and sequences behind it; these are missing where a source has no more text.

    Raises:
        HeadwiseError: the tokenizer is missing or fails, or gives a token outside the vocabulary.
    """
    count = calibration.sequences
    kept = kept_tokens(cache, calibration, ("tokens",))
    if kept is not None:
        blocks = kept["tokens"].long()
    else:
        blocks = _read(checkpoint, calibration, device or torch.device("cpu"), progress)
        if cache is not None:
            keep_corpus(cache, calibration, blocks)
    return blocks[:count], blocks[count:]


def measure_text(
    checkpoint: Checkpoint,
    calibration: Any,
    writer: Writer,
    device: torch.device,
    progress: Progress,
    cache: Path,
) -> None:
    """Measure the parent's loss on the text before the conversion, and warn if the text does not fit.

    Nothing is measured where the parent has no head, does not fit into memory, or the forecast is too long.

    Args:
        checkpoint: the source.
        calibration: has text, sequences, length and seed.
        writer: its journal keeps the losses.
        device: where the parent runs.
        progress: receives a warning.
        cache: folder that keeps the text.
    """
    if is_measured(writer) or loss_seconds(checkpoint, calibration, device) is None:
        return
    try:
        blocks, heldback = read_corpus(checkpoint, calibration, device, progress, cache)
    except HeadwiseError as error:
        if calibration.sequences or isinstance(error, DiskError):
            raise
        return  # a conversion without calibration needs no tokenizer
    if not len(heldback):
        return
    progress.stage("Measuring the parent on the calibration text")
    network = load_for_sampling(checkpoint, device)
    before = nats_per_token(network, heldback, batch_size=1)
    loss: dict[str, Any] = {"tokens": before.tokens, "before": _number(before.nats)}
    if calibration.text != SAMPLED and len(blocks):
        length = min(PIECE_LENGTH, calibration.length)
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.source)
        try:
            drawn = sample_tokens(network, tokenizer, sequences=NUM_PIECES, length=length, seed=calibration.seed)
        except HeadwiseError:  # a model that cannot be sampled from is converted all the same
            drawn = None
        if drawn is not None:
            loss["text"] = _number(nats_per_token(network, blocks[:NUM_PIECES, :length]).nats)
            loss["samples"] = _number(nats_per_token(network, drawn).nats)
    writer.note(NOTE, loss)
    text, samples = loss.get("text"), loss.get("samples")
    # The plan has a warning about foreign text already.
    if not calibration.foreign and text is not None and samples is not None and text > samples + FAR_ABOVE:
        progress.warn(
            f"The parent's loss on {calibration.text} is {text:.2f} nats per token, and {samples:.2f} on its own "
            "samples: this text does not fit the model. Pass `calibrate` sampled, or text like the model's own."
        )


def is_measured(writer: Writer) -> bool:
    """Return whether `measure_text` measured the parent, in this run or in the one that it resumes.

    Args:
        writer: its journal keeps the losses.
    """
    return NOTE in writer.notes


def measure_converted(
    folder: Path,
    checkpoint: Checkpoint,
    calibration: Any,
    writer: Writer,
    device: torch.device,
    progress: Progress,
    cache: Path,
) -> CalibrationLoss | None:
    """Measure the converted model's loss on the held-back text.

    Args:
        folder: the converted model.
        checkpoint: the source.
        calibration: has text, sequences, length and seed.
        writer: its journal has the parent's losses.
        device: where the model runs.
        progress: receives a stage.
        cache: folder that keeps the text.

    Returns:
        All losses; None if the parent's were not measured.
    """
    measured = writer.notes.get(NOTE)
    if measured is None:
        return None
    try:
        loss = restore(CalibrationLoss, measured)
    except TypeError as error:
        raise HeadwiseError(
            f"The journal in {writer.work.folder} holds another loss than headwise wrote: {error}.",
            "Pass `force` to begin again.",
        ) from None
    progress.stage("Measuring the result on held-back text")
    heldback = read_corpus(checkpoint, calibration, device, progress, cache)[1]
    after = nats_per_token(load_for_sampling(open_checkpoint(folder), device), heldback, batch_size=1)
    source = Path(calibration.text).name if Path(calibration.text).is_absolute() else calibration.text
    return replace(loss, after=_number(after.nats), source=source)


def _read(checkpoint: Checkpoint, calibration: Any, device: torch.device, progress: Progress) -> Tensor:
    hint = "Add the tokenizer's files to the folder, or pass `calibrate` none."
    tokenizer = load_tokenizer(checkpoint.folder, checkpoint.source, hint)
    count = calibration.sequences + NUM_HELDBACK
    if calibration.text == SAMPLED:
        network = load_for_sampling(checkpoint, device)
        shape = {"sequences": count, "length": calibration.length}
        try:
            return sample_tokens(network, tokenizer, **shape, seed=calibration.seed, progress=progress)
        except HeadwiseError:
            bad = next((name for name in checkpoint.tensors if has_nonfinite(checkpoint.read(name))), None)
            if bad is None:
                raise
            raise HeadwiseError(
                f"Tensor {bad} holds NaN or infinite values, and no text can be sampled from the model.",
                "Pass `allow_nan`, and `calibrate` mixture or none, to convert the model all the same.",
            ) from None
    options = {"split": "calibration", "length": calibration.length, "seed": calibration.seed}
    with tokenizer_errors(f"The tokenizer of {checkpoint.source} fails on the calibration text", hint):
        try:
            blocks = blocks_from(calibration.text, tokenizer, count=count, **options)
        except HeadwiseError:  # enough for the calibration, perhaps, and nothing to hold back
            least = getattr(calibration, "least", None)
            count = calibration.sequences
            blocks = blocks_from(calibration.text, tokenizer, count=count, minimum=least, **options)
    config = find_attention_model(checkpoint.config).stock_config(checkpoint.config)
    require_known_tokens(checkpoint, config.vocab_size, blocks)
    return blocks


def _identity(calibration: Any) -> str:
    return f"{calibration.text} {calibration.sequences} {calibration.length} {calibration.seed}"


def loss_seconds(checkpoint: Checkpoint, calibration: Any, device: torch.device) -> float | None:
    """Return the forecast seconds of the losses: two models on held-back text, the parent on two sets of pieces.

    Args:
        checkpoint: the source.
        calibration: has text, sequences, length and seed, and the number of index queries as `index_heads`.
        device: where the models run.

    Returns:
        None where nothing is measured: the parent has no head, does not fit, or takes too long.
    """
    if checkpoint.headless:
        return None
    tokens = 2 * NUM_HELDBACK * calibration.length + 2 * NUM_PIECES * PIECE_LENGTH
    seconds = forward_seconds(checkpoint, tokens, device)
    drawn = NUM_PIECES * PIECE_LENGTH if calibration.text != SAMPLED and calibration.sequences else 0
    least = _least_sampling_seconds(checkpoint, drawn, device)
    # The stock class holds the scores of all index queries on all tokens, before and after ReLU.
    scores = 3 * 4 * getattr(calibration, "index_heads", 0) * calibration.length**2
    if seconds + least > LOSS_SECONDS or not fits_whole(checkpoint, device, scores):
        return None
    # A step of sampling waits more than it computes: it is timed where a measurement is planned.
    return seconds + (sampling_seconds(checkpoint, drawn, device, PIECE_LENGTH) if drawn else 0.0)


def whole_model_bytes(checkpoint: Checkpoint, device: torch.device) -> int:
    """Return the bytes of the whole model, as `load_for_sampling` loads it.

    Args:
        checkpoint: the model.
        device: where it runs.
    """
    return (2 if device.type == "cuda" else 4) * checkpoint.num_parameters


def fits_whole(checkpoint: Checkpoint, device: torch.device, more: int = 0) -> bool:
    """Return whether a device has memory for the whole model, as `load_for_sampling` loads it.

    Args:
        checkpoint: the model.
        device: where it runs.
        more: bytes that it needs beside its weights.
    """
    free = available_memory(device)
    return free is None or whole_model_bytes(checkpoint, device) + more < MEMORY_SHARE * free


def _number(nats: float) -> float | None:
    """Return a loss as JSON can hold it."""
    return nats if math.isfinite(nats) else None
