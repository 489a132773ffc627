"""Give every tensor of a checkpoint its place in the stock class, from headers alone, before any work.

The plan, a dry run, `inspect` and a conversion use the same match. A tensor that the class ignores is dropped with
a note. What stock transformers loads is converted. Anything else is refused in one sentence.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from headwise.compat import places_of
from headwise.errors import HeadwiseError
from headwise.format import dtype_name
from headwise.io.quantized.quantization import CONVERT_ORIGINAL
from headwise.io.reader import Checkpoint, make_buffers
from headwise.io.source import ADAPTER_CONFIG, adapter_error
from headwise.models.config import EXPERT_COUNTS, check_labels, stored_dtype
from headwise.models.protocol import AttentionModel, find_attention_model
from headwise.models.stock import empty_model, load_into

# Buffers that old releases of transformers saved and no release reads.
STALE_BUFFERS = re.compile(r"(^|\.)(rotary_emb\.inv_freq|attention\.(masked_bias|bias)|position_ids)$")
LORA = re.compile(r"\.(lora_[AB]|lora_embedding_[AB]|base_layer|modules_to_save)\.")
# Config fields that count the layers behind `num_hidden_layers`.
EXTRA_LAYERS = ("num_nextn_predict_layers",)
DEFAULT_LABELS = 2  # every stock config has them
FOREIGN = (
    "Download the folder again: its files and its config.json do not belong together, or a file is incomplete."
)
# One expert of several, in the name of a tensor.
EXPERT = re.compile(r"\.experts\.(\d+)\.")
# Layers that predict several tokens ahead, beside the model's own.
MULTI_TOKEN = re.compile(r"(^|\.)mtp\.")


@dataclass(frozen=True)
class StockMatch:
    """A stock model without weights, and the differences between its tensors and a checkpoint's.

    Attributes:
        model: the stock model.
        places: parameter of the class by the name in the checkpoint; None: the class has no place for the tensor.
        tied: parameters that share another's weights.
        missing: names that only the class has.
        mismatched: name, shape in the checkpoint, shape in the class.
    """

    model: Any
    places: Mapping[str, str | None]
    tied: dict[str, str]
    missing: list[str]
    mismatched: list[tuple[str, tuple[int, ...], tuple[int, ...]]]

    @property
    def count(self) -> int:
        """Number of tensors with a place."""
        return sum(place is not None for place in self.places.values())

    @property
    def unexpected(self) -> list[str]:
        """Names of the tensors without a place, except buffers that no release reads."""
        return sorted(n for n, place in self.places.items() if place is None and not STALE_BUFFERS.search(n))

    @property
    def wrong(self) -> list[str]:
        """Names of all missing, unexpected and mismatched tensors."""
        return [*self.missing, *self.unexpected, *(name for name, _, _ in self.mismatched)]


def match_stock_class(checkpoint: Checkpoint, auto_class: str) -> StockMatch:
    """Load a checkpoint's shapes into its stock class, with transformers' own loader.

    Args:
        checkpoint: the checkpoint.
        auto_class: name of the transformers auto class.

    Returns:
        The model without weights, and its differences from the checkpoint.

    Raises:
        HeadwiseError: the class cannot build a model, or config.json has more labels than any tensor has rows.
    """
    rows = max((size for entry in checkpoint.tensors.values() for size in entry.shape), default=0)
    for config in (checkpoint.config, checkpoint.config.get("text_config")):
        if isinstance(config, dict):
            check_labels(config, max(rows, DEFAULT_LABELS))
    # A config may name more layers or experts than there are files for. Each takes its time to make, so the
    # class gets as many parameters as the checkpoint could fill, were its tensors fused by the dozen.
    model = empty_model(checkpoint.config, auto_class, most=1000 + 12 * len(checkpoint.tensors))
    places = places_of(model, checkpoint.tensors)
    tied = dict(model.all_tied_weights_keys or {})
    shapes = {
        name: torch.empty(entry.shape, dtype=entry.dtype, device="meta")
        for name, entry in checkpoint.tensors.items()
        if places[name] is not None
    }
    info = load_into(model, shapes, "meta")
    # Of two tied parameters the checkpoint needs one.
    absent = {name for pair in tied.items() if not info.missing_keys.issuperset(pair) for name in pair}
    return StockMatch(
        model,
        places,
        tied,
        sorted(info.missing_keys - tied.keys() - absent),
        sorted((name, tuple(here), tuple(there)) for name, here, there in info.mismatched_keys),
    )


def match_source(checkpoint: Checkpoint) -> Checkpoint:
    """Return a source with only the tensors that its stock class reads, by the names of its architecture's row.

    Args:
        checkpoint: the source, as it was opened.

    Returns:
        The source. Its config holds what the stock class makes of it: the class, the dtype, and whether the head is
        tied. Its notes and warnings name every difference from the files.

    Raises:
        HeadwiseError: stock transformers does not load the checkpoint, or a file beside it changes its weights.
    """
    config = checkpoint.config
    arch = find_attention_model(config, checkpoint.tensors)
    if checkpoint.gguf is None and (checkpoint.folder / ADAPTER_CONFIG).is_file():
        raise adapter_error(checkpoint.folder, "has a LoRA adapter beside the weights")
    found = match_stock_class(checkpoint, arch.auto_class)
    if headless := _lacks_a_head(checkpoint, found):
        config = _tied(config, arch)
        found = match_stock_class(replace(checkpoint, config=config), arch.auto_class)
    _refuse_unloadable(checkpoint, arch, found)
    placed = {name: entry for name, entry in checkpoint.tensors.items() if found.places[name] is not None}
    dropped = {name: entry for name, entry in checkpoint.tensors.items() if found.places[name] is None}
    new = copy.deepcopy(config)
    notes = [*_name_class(new, found.model), *_name_dtype(new, checkpoint)]
    if headless:
        notes.append(
            "A base model without a language-model head: tie_word_embeddings: true is written, so that the stock "
            "class has a head without weights of its own. AutoModel reads no head."
        )
    names = _canonical_names(config, placed, found)
    if changed := [(old, name) for old, name in names.items() if old != name]:
        notes.append(f"{len(changed)} tensors get the names of the stock class, such as {changed[0][1]}.")
    tensors = {names[name]: entry for name, entry in placed.items()}
    source = replace(checkpoint, tensors=tensors, dropped=dropped, config=new, headless=headless)
    notes += _untie(source, arch, found)
    drop_notes, warnings = _explain_dropped(new, arch, found.model, dropped)
    return replace(source, notes=[*checkpoint.notes, *notes, *drop_notes], warnings=warnings)


def require_head(checkpoint: Checkpoint, purpose: str) -> None:
    """Refuse a model without a language-model head, from headers alone: its logits mean nothing.

    Args:
        checkpoint: the model; an MLA model has a head.
        purpose: what needs the head, for the message.

    Raises:
        HeadwiseError: it has no head.
    """
    found = match_stock_class(checkpoint, find_attention_model(checkpoint.config, checkpoint.tensors).auto_class)
    if checkpoint.headless or not _heads(found.model) or _lacks_a_head(checkpoint, found):
        raise HeadwiseError(
            f"{checkpoint.source} is a model without a language-model head, and {purpose}.",
            "Name a model with a head.",
        )


def _refuse_unloadable(checkpoint: Checkpoint, arch: AttentionModel, found: StockMatch) -> None:
    """Raise HeadwiseError if the stock class misses a tensor or reads one of another shape or kind."""
    for name, place in found.places.items():
        dtype = checkpoint.tensors[name].dtype
        if place is not None and place.endswith(".weight") and not (dtype.is_floating_point and dtype.itemsize > 1):
            raise HeadwiseError(
                f"{checkpoint.source} has quantised weights: tensor {name} is {dtype_name(dtype)}.",
                CONVERT_ORIGINAL,
            )
    if found.missing:
        _explain_missing(checkpoint, arch, found)
    if any(".experts." in name for name in (*found.missing, *(name for name, _, _ in found.mismatched))):
        _refuse_experts(checkpoint, arch, found)
    for place, here, there in found.mismatched:
        stored = [name for name in found.places if found.places[name] == place]
        which = f"tensor {stored[0]}" if len(stored) == 1 else f"the stack of {stored[0]} and others"
        file = checkpoint.tensors[stored[0]].file
        raise HeadwiseError(f"{which} has shape {here} in {file}; by config.json it is {there}.", FOREIGN)
    for place in found.missing:
        name = _file_name(found, place)
        raise HeadwiseError(
            f"tensor {name} is missing in {_files(checkpoint)}; the model of config.json has it.", FOREIGN
        )


def _refuse_experts(checkpoint: Checkpoint, arch: AttentionModel, found: StockMatch) -> None:
    """Raise HeadwiseError if experts are incomplete, differ in shape, or are not as many as config.json counts."""
    # By the module with stars for layers, and by the end of the name: the name for each module and expert.
    stacks: dict[str, dict[str, dict[tuple[str, int], str]]] = {}
    for name, place in found.places.items():
        if place is not None and (match := EXPERT.search(name)):
            module, end = name[: match.start()], name[match.end() :]
            stack = stacks.setdefault(re.sub(r"[.][0-9]+(?=[.])", ".*", module), {}).setdefault(end, {})
            stack[module, int(match[1])] = name
    for stack in (stack for module in stacks.values() for stack in module.values()):
        usual = Counter(checkpoint.tensors[name].shape for name in stack.values()).most_common(1)[0][0]
        for name in stack.values():
            entry = checkpoint.tensors[name]
            if entry.shape != usual:
                raise HeadwiseError(
                    f"tensor {name} has shape {entry.shape} in {entry.file}, and other experts have {usual}.",
                    "Download the folder again, or save its experts again.",
                )
    for ends in stacks.values():
        places = dict.fromkeys(place for stack in ends.values() for place in stack)
        modules = dict.fromkeys(module for module, _ in places)
        count = max(expert for _, expert in places) + 1
        for end, stack in ends.items():
            lacking = ((m, e) for m in modules for e in range(count) if (m, e) not in stack)
            if (first := next(lacking, None)) is not None:
                raise HeadwiseError(
                    f"tensor {first[0]}.experts.{first[1]}.{end} is missing in {_files(checkpoint)}, and other "
                    "experts have it.",
                    "Download the folder again: a file is incomplete.",
                )
    for place, here, there in found.mismatched:
        if ".experts." in place and here[1:] == there[1:]:
            fields = arch.stock_config(checkpoint.config).to_dict()
            field = next((name for name in EXPERT_COUNTS if fields.get(name) == there[0]), "the number of experts")
            raise HeadwiseError(
                f"config.json has {field}: {there[0]}, and the files of {checkpoint.source} hold {here[0]} experts "
                f"({_file_name(found, place)}).",
                "Give the folder the config.json that belongs to its weights, or download it again.",
            )


def _file_name(found: StockMatch, place: str) -> str:
    """Return the first tensor that fills a place of the class, by the names that the files have in any layer."""
    number = re.compile(r"(?<=\.)\d+(?=\.)")
    layer = number.search(place)
    for name, other in found.places.items():
        if other == place:
            return name
    for name, other in found.places.items():
        if layer and other and number.sub("*", other, count=1) == number.sub("*", place, count=1):
            return number.sub(layer[0], name, count=1)
    return place


def _files(checkpoint: Checkpoint) -> str:
    """Return the names of the files of weights, in words."""
    names = sorted({entry.file for entry in checkpoint.tensors.values()})
    return names[0] if len(names) == 1 else f"the {len(names)} files {names[0]} to {names[-1]}"


def _explain_missing(checkpoint: Checkpoint, arch: AttentionModel, found: StockMatch) -> None:
    """Raise HeadwiseError if the names of a checkpoint show why the class misses tensors."""
    source, names = checkpoint.source, checkpoint.tensors
    if name := next(filter(LORA.search, names), None):
        raise adapter_error(source, f"has the tensors of a LoRA adapter ({name})")
    expected = arch.first_names(checkpoint.config)[0]
    bare = expected.removeprefix(f"{found.model.base_model_prefix}.")
    for name in names if not names.keys() & {expected, bare} else ():
        prefix = next((name.removesuffix(end) for end in (expected, bare) if name.endswith(f".{end}")), "")
        if prefix:
            raise HeadwiseError(
                f"the tensor names of {source} begin with {prefix!r}, and stock transformers does not load such "
                "names.",
                "Save the model that the wrapper holds, or rename its tensors.",
            )
    if _heads(found.model).issuperset(found.missing):
        raise HeadwiseError(
            f"{source} has no {found.missing[0]}, and config.json names a class with a language-model head.",
            f"A shard may be missing. For a base model, name its class in `architectures`: "
            f"{type(found.model.base_model).__name__}.",
        )


def _heads(model: Any) -> set[str]:
    """Return the name of the weight of a model's language-model head, also where it is tied."""
    head = model.get_output_embeddings()
    return {f"{name}.weight" for name, module in model.named_modules() if head is not None and module is head}


def _lacks_a_head(checkpoint: Checkpoint, found: StockMatch) -> bool:
    """Return whether a checkpoint is a base model, as `AutoModel` saves it: without a head, and known as one.

    It is known by the base class in `architectures`, or by tensor names without the prefix of the base model. A
    folder that was converted from one ties its head to the embeddings.
    """
    heads = _heads(found.model)
    if not heads or not heads.issuperset(found.missing) or not heads.isdisjoint(found.places.values()):
        return False
    if checkpoint.config.get("architectures") == [type(found.model.base_model).__name__]:
        return True
    prefix = f"{found.model.base_model_prefix}."
    return bool(found.missing) and not any(name.startswith(prefix) for name in checkpoint.tensors)


def _tied(config: dict[str, Any], arch: AttentionModel) -> dict[str, Any]:
    """Return a config whose head is tied to the embeddings."""
    new = copy.deepcopy(config)
    for part in (new, arch.text_config(new)):
        part["tie_word_embeddings"] = True
    return new


def _canonical_names(config: dict[str, Any], placed: Collection[str], found: StockMatch) -> dict[str, str]:
    """Return the name of every placed tensor in its architecture's row, by its name in the checkpoint."""
    prefix, parameters = f"{found.model.base_model_prefix}.", found.model.state_dict().keys()
    names = {name: name for name in placed}
    row = find_attention_model(config, placed)
    if not names.keys() >= set(row.first_names(config)):
        bare = {n: n if n in parameters or n.startswith(prefix) else prefix + n for n in placed}
        row = find_attention_model(config, bare.values())
        if set(bare.values()) >= set(row.first_names(config)):
            names = bare
    # A head that stands for the embeddings tied to it.
    present = {place for name in placed if (place := found.places[name])}
    twins = {name: twin for name, twin in found.tied.items() if name in present and twin not in present}
    return {old: twins.get(name, name) for old, name in names.items()}


def _name_class(config: dict[str, Any], model: Any) -> Iterator[str]:
    """Fill in `architectures`, from which engines choose their class, and yield a note about it."""
    named = config.get("architectures")
    if not (isinstance(named, list) and named and all(isinstance(name, str) for name in named)):
        config["architectures"] = [type(model).__name__]
        yield f"config.json names no `architectures`: {type(model).__name__} is written."


def _name_dtype(config: dict[str, Any], checkpoint: Checkpoint) -> Iterator[str]:
    """Fill in the dtype of most of the weights where the config names none, and yield a note about it."""
    if stored_dtype(config) is None:
        sizes: dict[torch.dtype, int] = {}
        for entry in checkpoint.tensors.values():
            if entry.dtype.is_floating_point:
                sizes[entry.dtype] = sizes.get(entry.dtype, 0) + entry.nbytes
        config["dtype"] = str(max(sizes, key=lambda dtype: sizes[dtype])).removeprefix("torch.")
        yield f"config.json names no dtype: {config['dtype']} is written, that of the tensors."


def _untie(source: Checkpoint, arch: AttentionModel, found: StockMatch) -> Iterator[str]:
    """Untie a head that differs from the embeddings, as stock transformers loads it, and yield a note."""
    stored = {place: name for name, place in found.places.items() if place is not None}
    by_file_name = {entry.name: name for name, entry in source.tensors.items()}
    for name, twin in found.tied.items():
        if name not in stored or twin not in stored:
            continue
        if _equal(source, by_file_name[stored[name]], by_file_name[stored[twin]]):
            continue
        for part in (source.config, arch.text_config(source.config)):
            if part is source.config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"] = False
        yield (
            f"{name} differs from {twin}, and config.json ties them: tie_word_embeddings: false is written, as "
            "stock transformers loads the checkpoint."
        )


def _equal(source: Checkpoint, a: str, b: str) -> bool:
    """Return whether two tensors of a checkpoint are equal, with little of them in memory."""
    if source.tensors[a].dtype != source.tensors[b].dtype:
        return torch.equal(source.read(a).float(), source.read(b).float())
    pairs = zip(source.chunks(a, make_buffers(1)), source.chunks(b, make_buffers(1)), strict=True)
    return all(torch.equal(*pair) for pair in pairs)


def _explain_dropped(
    config: dict[str, Any], arch: AttentionModel, model: Any, dropped: Collection[str]
) -> tuple[list[str], list[str]]:
    """Return notes on the tensors that the class is known to ignore, and warnings about others without a place."""
    num_layers = arch.stock_config(config).num_hidden_layers
    layer = re.compile(rf"(^|\.){re.escape(arch.layers[0].split('.')[-2])}\.(\d+)\.")
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    buffers: list[str] = []
    known: list[str] = []
    ahead: list[str] = []
    unknown: list[str] = []
    extra: dict[int, int] = {}
    for name in dropped:
        index = layer.search(name)
        if STALE_BUFFERS.search(name):
            buffers.append(name)
        elif index and int(index[2]) >= num_layers:
            extra[int(index[2])] = extra.get(int(index[2]), 0) + 1
        elif MULTI_TOKEN.search(name):
            ahead.append(name)
        else:
            (known if any(pattern.search(name) for pattern in ignored) else unknown).append(name)
    notes = []
    if buffers:
        notes.append(f"{len(buffers)} buffers of old releases are dropped, such as {buffers[0]}.")
    if extra:
        layers = f"layer {min(extra)}" if len(extra) == 1 else f"layers {min(extra)} to {max(extra)}"
        notes.append(
            f"{sum(extra.values())} tensors of {layers} are dropped: the stock class has num_hidden_layers: "
            f"{num_layers}."
        )
        text = arch.text_config(config)
        text.update({key: 0 for key in EXTRA_LAYERS if text.get(key)})
    stock_class = type(model).__name__
    if known:
        notes.append(f"{len(known)} tensors that {stock_class} ignores are dropped, such as {known[0]}.")
    warnings = []
    if ahead:
        warnings.append(
            f"{len(ahead)} tensors of multi-token prediction have no place in {stock_class}: they are dropped, "
            f"such as {ahead[0]}. Engines draft no tokens with the result."
        )
    if unknown:
        warnings.append(
            f"{len(unknown)} tensors have no place in {stock_class}, and stock transformers ignores them: they are "
            f"dropped, such as {', '.join(unknown[:2])}."
        )
    return notes, warnings
