"""Reload a written folder with stock classes, and check it.

Whatever the size of the model, one layer is in memory at a time: names, shapes and the cache are checked on the
meta device, the function layer by layer on the inputs that the model itself computes on text. A model of up to
`WHOLE_BYTES` bytes is also loaded whole.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headwise.compat import cache_layers, cache_of, cached_elements
from headwise.convert.positions.moved import POSITION_SETTINGS, with_positions
from headwise.convert.settings import ConvertSettings
from headwise.convert.verify.factored import check_factors, compare_with_parent, latent_reference
from headwise.convert.verify.grouped import RepeatedAttention, check_groups, compare_grouped, shares_heads
from headwise.convert.verify.layer_inputs import TOKENS
from headwise.convert.verify.normed import compare_expanded
from headwise.convert.verify.selection import check_selection
from headwise.convert.verify.settings import VerifySettings
from headwise.convert.verify.verification import Check, Verification
from headwise.convert.verify.whole_model import WHOLE_BYTES, check_loading
from headwise.environment import find_device
from headwise.errors import HeadwiseError, SettingError, is_out_of_memory
from headwise.format import layout_names
from headwise.io.reader import Checkpoint, as_bytes, has_nonfinite, open_checkpoint
from headwise.io.source import find_gguf
from headwise.models import mla_source
from headwise.models.architecture import find_architecture
from headwise.models.config import dtype_of
from headwise.models.deepseek import ROTATED
from headwise.models.layout import AttentionLayout, caches
from headwise.models.protocol import AttentionModel, find_attention_model, is_latent
from headwise.models.rope import rope_type, unscaled
from headwise.models.stock import empty_model, run_check, stock_config
from headwise.models.stock_match import match_source, match_stock_class
from headwise.progress import SILENT, Progress
from headwise.records.manifest import accepted_checks, changed_files, check_hashes, read_record

# Sizes that a conversion keeps, as fields of the stock config of a language model.
KEPT_SIZES = ("num_hidden_layers", "hidden_size", "vocab_size")
# Tensors that tell at once whether a model of the same sizes is the parent.
NUM_COMPARED = 16
# Rope types whose frequencies depend on the length of the input.
READS_LENGTH = ("dynamic", "longrope")


def verify_model(
    out: str | Path,
    against: str | Path | None = None,
    *,
    hashes: bool = False,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Check a converted folder, and, with `against`, compare it with its parent.

    Args:
        out: the folder.
        against: the folder, GGUF file or repository it was converted from; None: no comparison.
        hashes: compare every tensor and file with the hashes in headwise.json, and do nothing else.
        device: where models and their layers run, "cpu", "cuda" or "cuda:N"; None: the CPU. Single attention layers
            are computed in float64, there or on the CPU.
        revision: branch, tag or commit of `against`, if it is a Hub repository.
        token: of the Hub, for `against`.
        progress: gets the stages.

    Returns:
        The checks, each with its result.

    Raises:
        SettingError: a setting is not legal or contradicts another one.
        HeadwiseError: a checkpoint cannot be opened at all, or `against` is a model of other sizes or weights.
    """
    settings = VerifySettings(against=against, hashes=hashes, device=device)
    where = find_device(settings.device or "cpu")
    if find_gguf(out) is not None:
        raise HeadwiseError(
            f"{out} is a GGUF file, and `headwise verify` checks converted folders.",
            f"Compare a folder with it: `headwise verify OUT --against {out}`.",
        )
    checkpoint = open_checkpoint(out, progress=progress)
    if hashes:
        return Verification((Check("hashes", *check_hashes(checkpoint, progress)),))
    parent = None
    if against is not None:
        parent = open_checkpoint(against, revision=revision, token=token, progress=progress)
        _require_same_sizes(checkpoint, parent)
        parent = match_source(parent)
    record = read_record(checkpoint.folder)
    if parent is not None and record is not None and not record.get("uptraining"):
        _require_same_weights(checkpoint, parent, record["sha256"])
    arguments = record["arguments"] if record else None
    verification = check_folder(
        checkpoint, parent, arguments=arguments, record=record, finite=True, device=where, progress=progress
    )
    return verification.accepting(accepted_checks(record or {}))


def check_folder(
    checkpoint: Checkpoint,
    parent: Checkpoint | None,
    *,
    planned: Sequence[AttentionLayout] | None = None,
    arguments: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    finite: bool = False,
    device: torch.device | str = "cpu",
    progress: Progress = SILENT,
) -> Verification:
    """Run every check on an opened folder.

    Args:
        checkpoint: the folder.
        parent: the source, to compare functions with; it gets the context and the window of `arguments`. None: no
            comparison.
        planned: the layouts of the plan; None: those of the folder's own config.
        arguments: settings of the conversion, which determine how the folder may differ from its parent.
        record: headwise.json, whose hashes of tensors and files are compared if `finite`.
        finite: read every tensor, look for NaN and infinities, and compare copies with the parent. The writer of a
            new folder has checked the values and copied the bytes.
        device: where models and their layers run.
        progress: gets one stage.

    Returns:
        The checks, each with its result.
    """
    arguments = arguments or {}
    model = find_attention_model(checkpoint.config, checkpoint.tensors)
    own_layouts = model.layouts(checkpoint.config)
    checks: list[Check] = []
    progress.stage("Verifying", unit="checks")

    def add(name: str, check: Callable[..., tuple[bool, str]], *given: Any, **more: Any) -> None:
        checks.append(Check(name, *run_check(check, *given, **more)))
        progress.advance(1)

    def compute(name: str, check: Callable[..., tuple[bool, str]], *given: Any, **more: Any) -> None:
        """Add a check that computes on the device. The CPU repeats what fails on a GPU, and its result counts."""
        again = torch.device(device).type != "cpu"
        try:
            passed, detail = run_check(check, *given, **more, device=device)
        except Exception as error:
            if not again or not is_out_of_memory(error):
                raise
            passed, detail = False, "too little memory"
        if again and not passed:
            progress.warn(f"The check {name} fails on {device} ({detail}). The CPU repeats it and decides.")
            passed, on_cpu = run_check(check, *given, **more, device="cpu")
            detail = f"{on_cpu}, on the CPU; {device} found: {detail}"
        checks.append(Check(name, passed, detail))
        progress.advance(1)

    layouts = list(planned) if planned is not None else own_layouts
    add("tensors", _tensors_fit, checkpoint, model)
    if not checks[-1][1]:
        return Verification(tuple(checks))
    add("layout", _layouts_are_recorded, layouts, arguments)
    add("cache", _cache_is, checkpoint, model, layouts)
    if finite:
        bad, changed = _read_through(checkpoint, record["sha256"] if record else {})
        finiteness = f"NaN or infinity in {', '.join(bad[:3])}" if bad else "every weight is finite"
        add("finite", lambda: (not bad, finiteness))
        if record:
            changed += changed_files(checkpoint.folder, record)
            detail = f"{', '.join(changed[:3])} not as written" if changed else "every tensor is as it was written"
            add("record", lambda: (not changed, detail))
    parent = _with_same_positions(parent, arguments) if parent is not None else None
    trained = bool(record and record.get("uptraining"))
    if own_layouts[0].kind == "mla":
        compute("function", check_factors, checkpoint, model)
        if own_layouts[0].indexer is not None:
            compute("selection", check_selection, checkpoint, model)
        if parent is not None:
            compute("parent", compare_with_parent, checkpoint, parent, model, compare=finite, trained=trained)
    else:
        compute("function", check_groups, checkpoint, model)
        if parent is not None and is_latent(parent.config):
            compute("parent", compare_expanded, checkpoint, parent, model, trained)
        elif parent is not None:
            compute("parent", compare_grouped, checkpoint, parent, model, compare=finite, trained=trained)
    if checkpoint.nbytes <= WHOLE_BYTES:
        latent = own_layouts[0].kind == "mla"
        compute("loading", _loads, checkpoint, model, layouts, latent, "allow_nan" in arguments)
    return Verification(tuple(checks))


def _loads(
    checkpoint: Checkpoint,
    model: AttentionModel,
    layouts: Sequence[AttentionLayout],
    latent: bool,
    allow_nan: bool,
    device: torch.device | str,
) -> tuple[bool, str]:
    """Load the folder whole; where its attention was computed, compare the logits with float64."""
    attention: Any = None
    if latent:
        attention = latent_reference(checkpoint)
    elif shares_heads(checkpoint):
        attention = RepeatedAttention(checkpoint)
    return check_loading(checkpoint, model, layouts, allow_nan=allow_nan, attention=attention, device=device)


def _require_same_sizes(checkpoint: Checkpoint, parent: Checkpoint) -> None:
    """Refuse the folder itself, and a model of other sizes, before anything is computed.

    Raises:
        SettingError: `parent` cannot be what the folder was converted from.
    """
    remedy = "Name the model that the folder was converted from."
    if parent.folder.resolve() == checkpoint.folder.resolve() and parent.gguf is None:
        raise SettingError("against", f"`against` is {parent.source}, the folder that is checked.", remedy)
    model = find_attention_model(checkpoint.config, checkpoint.tensors)
    if not run_check(_tensors_fit, checkpoint, model)[0]:
        return  # its config was changed: the checks name what does not fit
    configs = [stock_config(each.config).get_text_config(decoder=True) for each in (parent, checkpoint)]
    for name in KEPT_SIZES:
        expected, actual = (getattr(config, name, None) for config in configs)
        if expected != actual and isinstance(expected, int) and isinstance(actual, int):
            raise SettingError(
                "against",
                f"`against` is {parent.source}, which is not the parent of {checkpoint.source}: {name} is "
                f"{expected} there and {actual} here.",
                remedy,
            )


def _require_same_weights(checkpoint: Checkpoint, parent: Checkpoint, recorded: Mapping[str, str]) -> None:
    """Refuse another model of the same sizes, such as a fine-tune of the parent, before anything is computed.

    The smallest tensors that a conversion copies are compared. They are evidence while the folder has them as the
    record does. Where they are equal, the check `parent` compares all of them.

    Raises:
        SettingError: a copied tensor of the folder is not the one of `parent`.
    """
    for name in _copied(checkpoint, parent)[:NUM_COMPARED]:
        own = checkpoint.read(name)
        written = hashlib.sha256(as_bytes(own).numpy().data).hexdigest() == recorded.get(name)
        if written and not torch.equal(own, parent.read(name)):
            raise SettingError(
                "against",
                f"`against` is {parent.source}, which has the sizes of the parent of {checkpoint.source} and other "
                f"weights: {name} differs.",
                "Name the model that the folder was converted from.",
            )


def _copied(checkpoint: Checkpoint, parent: Checkpoint) -> list[str]:
    """Return the tensors outside attention that a conversion copies, the smallest first."""
    arch, tensors = find_attention_model(parent.config, parent.tensors), parent.tensors
    layers = range(len(arch.layouts(parent.config)))
    names = set(tensors).difference(*(arch.tensor_names(parent.config, layer) for layer in layers))
    names = {name for name in names if not name.endswith(ROTATED)}  # indexers are not attention, and may turn
    model = find_attention_model(checkpoint.config, checkpoint.tensors)
    if model.layouts(checkpoint.config)[0].kind == "mla" and not is_latent(parent.config):
        rule = mla_source.find_mla_source(arch.text_config(parent.config), dtype_of(checkpoint.config))
        carried = mla_source.plan_scaled_copies(rule, names, [n for n in names if f".{arch.attention}." in n])
        names = {each.name for each in carried if each == mla_source.ScaledCopy(each.name, each.name)}
    kept = checkpoint.tensors
    same = [
        n for n in names & kept.keys() if (kept[n].dtype, kept[n].shape) == (tensors[n].dtype, tensors[n].shape)
    ]
    return sorted(same, key=lambda name: (tensors[name].nbytes, name))


def _with_same_positions(parent: Checkpoint, arguments: Mapping[str, Any]) -> Checkpoint:
    """Return a parent with the context and the window that a conversion gave its result."""
    given = {name: arguments[name] for name in POSITION_SETTINGS if name in arguments}
    if not given:
        return parent
    arch = find_architecture(parent.config, parent.tensors)
    config = arch.with_groups(parent.config, arch.layouts(parent.config)[0].num_key_value_heads)
    return replace(parent, config=with_positions(config, arch, ConvertSettings(**given))[0])


def _layouts_are_recorded(layouts: Sequence[AttentionLayout], arguments: Mapping[str, Any]) -> tuple[bool, str]:
    """Compare the layouts of a folder with the settings that its record holds."""
    to, index_layers = arguments.get("to"), sum(layout.own_indexer is not None for layout in layouts)
    if arguments.get("index_layers", index_layers) != index_layers:
        recorded = arguments["index_layers"]
        return False, f"headwise.json records {recorded} indexers, and {index_layers} layers have one"
    named = dict(each.partition("=")[::2] for each in arguments.get("part") or ())
    cached = any(layout.cached for layout in layouts)
    for layer, layout in enumerate(layouts):
        heads = layout.num_attention_heads
        own = int(named[layout.part]) if named.get(layout.part) else arguments.get("groups")
        targets: dict[str, dict[str, Any]] = {
            "gqa": {"num_key_value_heads": own},
            "mqa": {"num_key_value_heads": 1},
            "mha": {"num_key_value_heads": heads},
            "mla": {"kv_lora_rank": arguments.get("rank"), "qk_rope_head_dim": arguments.get("rope_dim")},
        }
        chosen = layout.part in named if named else layout.cached or not cached
        recorded = targets.get(str(to), {}) if chosen else {}
        if to is not None and (arguments.get("sparse") is None) != (layout.indexer is None):
            return False, f"headwise.json and layer {layer} disagree on an indexer"
        if to == "mla" and layout.kv_lora_rank is None:
            return False, f"headwise.json records MLA, and layer {layer} has {layout.num_key_value_heads} KV heads"
        for name, value in recorded.items():
            if value is not None and getattr(layout, name) != value:
                return False, f"headwise.json records {name} {value}, and layer {layer} has {getattr(layout, name)}"
    return True, f"{layout_names(layouts)}, as recorded" if to else layout_names(layouts)


def _read_through(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Return the names of the tensors that are not finite, and of those that are not the recorded ones."""
    bad, changed = [], []
    for name, entry in checkpoint.stored.items():
        tensor = checkpoint.read_stored(entry)
        if has_nonfinite(tensor):
            bad.append(name)
        if recorded and hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest() != recorded.get(name):
            changed.append(name)
    return bad, changed


def _tensors_fit(checkpoint: Checkpoint, model: AttentionModel) -> tuple[bool, str]:
    """Check that the tensors of the folder and those of the stock class are the same."""
    match = match_stock_class(checkpoint, model.auto_class)
    stock_class, wrong = type(match.model).__name__, match.wrong
    if wrong:
        return False, f"{stock_class} and the folder disagree on {', '.join(wrong[:3])} ({len(wrong)} in all)"
    for name, twin in match.tied.items():
        both = {name, twin} <= checkpoint.tensors.keys()
        if both and not torch.equal(checkpoint.read(name), checkpoint.read(twin)):
            return False, f"{name} is not tied to {twin}: their values differ"
    ties = f", {len(match.tied)} tied" if match.tied else ""
    return True, f"{match.count} tensors, each with its place in {stock_class}{ties}"


def _cache_is(
    checkpoint: Checkpoint, model: AttentionModel, layouts: Sequence[AttentionLayout]
) -> tuple[bool, str]:
    """Compare the cache of the stock model, from a run without weights, with the layouts."""
    cached = caches(layouts)
    if not cached:
        return True, "the model has no KV cache"
    if not any(layout.on_text for layout in cached):
        return True, "not measured: text does not run the layers that have it"
    network = empty_model(_without_scaling(checkpoint.config, model), model.auto_class).to("meta")
    # The usual grouped experts need sizes that only real models have.
    network.set_experts_implementation("batched_mm")
    with torch.no_grad():
        text = network.get_submodule(model.module.rpartition(".")[0].rpartition(".")[0])
        widths = {"inputs_embeds": text.config.hidden_size} | model.cross_states(checkpoint.config)
        given = {name: torch.empty(1, TOKENS, width, device="meta") for name, width in widths.items()}
        layers = cache_layers(cache_of(text(**given, use_cache=True)))
    measured = [cached_elements(layer) for layer in layers]
    expected = [layout.cache_elements_per_token for layout in cached]
    if measured != expected:
        return False, f"per token and layer the cache holds {measured} numbers, and the layouts need {expected}"
    return True, f"{sum(measured):,} numbers per token over {len(measured)} layers"


def _without_scaling(config: dict[str, Any], model: AttentionModel) -> dict[str, Any]:
    """Return a config whose RoPE does not depend on the length of the input; the size of the cache does not either.

    Some rules read the length of the input from its positions, which have no values on the meta device.
    """
    parameters = getattr(stock_config(config).get_text_config(), "rope_parameters", None)
    if not parameters:
        return config
    nested = {kind: _plain_rope(own) for kind, own in parameters.items() if isinstance(own, dict)}
    new = copy.deepcopy(config)
    text = model.text_config(new)
    text["rope_parameters"] = nested or _plain_rope(parameters)
    text.pop("rope_scaling", None)
    return new


def _plain_rope(parameters: dict[str, Any]) -> dict[str, Any]:
    """Return rope parameters that scale nothing, in a type that all stock classes take, if theirs reads lengths."""
    if rope_type(parameters) not in READS_LENGTH:
        return parameters
    original = {key: parameters[key] for key in ("original_max_position_embeddings",) if key in parameters}
    return {**unscaled(parameters), **original, "rope_type": "linear", "factor": 1.0}
