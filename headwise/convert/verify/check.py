"""Reload what was written with stock classes, and prove it.

Whatever the size of the model, only a few layers are ever in memory: names, shapes and the cache are checked on
stock models without weights, the function on single layers. A model that fits is also loaded whole.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.convert.gqa.merge import merge_heads
from headwise.convert.verify import factored as verify_latent
from headwise.convert.verify.verification import Verification
from headwise.format import layout_names
from headwise.io.reader import Checkpoint, as_bytes, has_nonfinite, open_checkpoint
from headwise.models.architecture import Architecture, find
from headwise.models.layout import AttentionLayout
from headwise.models.protocol import LatentModel
from headwise.models.stock import attempt, attend, empty_model
from headwise.models.stock_match import fit
from headwise.progress import SILENT, Progress
from headwise.records.manifest import changed_files, check_hashes, read_record

# Weights up to this size are also loaded whole, with `from_pretrained`.
WHOLE = 1 << 30
TOKENS = 24
# Float64 evaluations of the same weights differ by rounding alone; some stock classes round inside to float32.
TOLERANCE = 1e-5
# Config fields that a conversion's arguments may change, by argument.
MOVED = {
    "context": (
        "max_position_embeddings",
        "original_max_position_embeddings",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
    ),
    "sliding_window": ("layer_types", "max_window_layers", "model_type", "sliding_window", "use_sliding_window"),
}


Stock = Architecture | LatentModel


def verify_model(
    out: str | Path,
    against: str | Path | None = None,
    *,
    hashes: bool = False,
    revision: str | None = None,
    token: str | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Check a converted folder, and, with `against`, compare it with its parent.

    Args:
        out: the folder.
        against: the model it was converted from; `revision` and `token` are for it.
        hashes: compare every tensor and file with the hashes in headwise.json, and do nothing else.

    Raises:
        HeadwiseError: a checkpoint cannot be opened at all.
    """
    checkpoint = open_checkpoint(out, progress=progress)
    if hashes:
        return Verification((("hashes", *check_hashes(checkpoint, progress)),))
    parent = None
    if against is not None:
        parent = open_checkpoint(against, revision=revision, token=token, progress=progress)
    record = read_record(checkpoint.folder)
    arguments = record["arguments"] if record else None
    return check_folder(checkpoint, parent, arguments=arguments, record=record, finite=True, progress=progress)


def check_folder(
    checkpoint: Checkpoint,
    parent: Checkpoint | None,
    *,
    promised: Sequence[AttentionLayout] | None = None,
    arguments: Mapping[str, Any] | None = None,
    record: Mapping[str, Any] | None = None,
    finite: bool = False,
    progress: Progress = SILENT,
) -> Verification:
    """Every check on an opened folder.

    Args:
        parent: the source, to compare functions with.
        promised: the layouts the plan promised; None: those of the folder's own config.
        arguments: what the conversion was asked for, which says how the folder may differ from its parent.
        record: headwise.json, whose hashes of tensors and files are compared if `finite`.
        finite: read every tensor and look for NaN and infinities (the writer has done so already).
    """
    arguments = arguments or {}
    latent = LatentModel.of(checkpoint.config) if "kv_lora_rank" in checkpoint.config else None
    arch = None if latent else find(checkpoint.config, checkpoint.tensors)
    stock = latent or arch
    assert stock is not None
    checks: list[tuple[str, bool, str]] = []
    progress.stage("Verifying", unit="checks")

    def add(name: str, check: Callable[..., tuple[bool, str]], *given: Any, **more: Any) -> None:
        checks.append((name, *attempt(check, *given, **more)))
        progress.advance(1)

    own = latent.layouts if latent else arch.layouts(checkpoint.config) if arch else []
    layouts = list(promised) if promised is not None else own
    add("tensors", _tensors_fit, checkpoint, stock)
    if not checks[-1][1]:
        return Verification(tuple(checks))
    add("promise", _keeps_promise, layouts, arguments)
    add("cache", _cache_is, checkpoint, stock, layouts)
    if finite:
        bad, changed = _read_through(checkpoint, record["sha256"] if record else {})
        said = f"NaN or infinity in {', '.join(bad[:3])}" if bad else "every weight is finite"
        add("finite", lambda: (not bad, said))
        if record:
            changed += changed_files(checkpoint.folder, record)
            detail = f"{', '.join(changed[:3])} not as written" if changed else "every tensor is as it was written"
            add("record", lambda: (not changed, detail))
    chosen = _few(len(layouts))
    moved = frozenset(field for what in arguments.keys() & MOVED.keys() for field in MOVED[what])
    trained = bool(record and record.get("uptraining"))
    if latent:
        add("function", verify_latent.layers_compute_their_factors, checkpoint, latent, chosen, TOKENS)
        if parent is not None:
            add("parent", verify_latent.against_parent, checkpoint, parent, latent, chosen, TOKENS, moved, trained)
    elif arch:
        add("function", _layers_compute_their_weights, checkpoint, arch, chosen)
        if parent is not None:
            how = {"compare": finite, "moved": moved, "trained": trained}
            add("parent", _against_parent, checkpoint, parent, arch, chosen, **how)
    if checkpoint.nbytes <= WHOLE:
        add("loading", _loads_whole, checkpoint, stock, layouts, allow_nan="allow_nan" in arguments)
    return Verification(tuple(checks))


def _keeps_promise(layouts: Sequence[AttentionLayout], arguments: Mapping[str, Any]) -> tuple[bool, str]:
    """Compare the layouts of a folder with the settings that its record holds."""
    to = arguments.get("to")
    for layer, layout in enumerate(layouts):
        heads = layout.num_attention_heads
        promised: dict[str, Any] = {
            "gqa": {"num_key_value_heads": arguments.get("groups")},
            "mqa": {"num_key_value_heads": 1},
            "mha": {"num_key_value_heads": heads},
            "mla": {"kv_lora_rank": arguments.get("rank"), "qk_rope_head_dim": arguments.get("rope_dim")},
        }.get(str(to), {})
        if to == "mla" and layout.kv_lora_rank is None:
            return False, f"the record says mla, and layer {layer} has {layout.num_key_value_heads} KV heads"
        for name, value in promised.items():
            if value is not None and getattr(layout, name) != value:
                return False, f"the record says {name} {value}, and layer {layer} has {getattr(layout, name)}"
    return True, f"{layout_names(layouts)}, as recorded" if to else layout_names(layouts)


def _read_through(checkpoint: Checkpoint, recorded: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """Names of the tensors that are not finite, and of those that are not the recorded ones."""
    bad, changed = [], []
    for name in checkpoint.tensors:
        tensor = checkpoint.read(name)
        if has_nonfinite(tensor):
            bad.append(name)
        if recorded and hashlib.sha256(as_bytes(tensor).numpy().data).hexdigest() != recorded.get(name):
            changed.append(name)
    return bad, changed


def _tensors_fit(checkpoint: Checkpoint, stock: Stock) -> tuple[bool, str]:
    """The stock class has a place for every tensor, and a tensor for every place."""
    found = fit(checkpoint, stock.auto_class)
    stock_class, wrong = type(found.model).__name__, found.wrong
    if wrong:
        return False, f"{stock_class} and the folder disagree on {', '.join(wrong[:3])} ({len(wrong)} in all)"
    for name, twin in found.tied.items():
        both = {name, twin} <= checkpoint.tensors.keys()
        if both and not torch.equal(checkpoint.read(name), checkpoint.read(twin)):
            return False, f"{name} is not tied to {twin}: their values differ"
    ties = f", {len(found.tied)} tied" if found.tied else ""
    return True, f"{found.count} tensors, each with its place in {stock_class}{ties}"


def _cache_is(checkpoint: Checkpoint, stock: Stock, layouts: Sequence[AttentionLayout]) -> tuple[bool, str]:
    """The stock model's own cache holds what the layouts promise; read off a run without weights."""
    model = empty_model(checkpoint.config, stock.auto_class).to("meta")
    # The usual grouped experts want sizes that only real models have.
    model.set_experts_implementation("batched_mm")
    with torch.no_grad():
        text = model.get_submodule(stock.module.rpartition(".")[0].rpartition(".")[0])
        width = text.config.hidden_size
        cache = text(inputs_embeds=torch.empty(1, TOKENS, width, device="meta"), use_cache=True).past_key_values
    found = [layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in cache.layers]
    wanted = [layout.cache_elements_per_token for layout in layouts]
    if found != wanted:
        return False, f"per token and layer the cache holds {found}, promised are {wanted}"
    return True, f"{sum(found):,} numbers per token over {len(found)} layers"


def _layers_compute_their_weights(
    checkpoint: Checkpoint, arch: Architecture, chosen: Sequence[int]
) -> tuple[bool, str]:
    """The stock grouped attention gives what the same heads written out in full give, in float64."""
    full = arch.legal_groups(checkpoint.config)[-1]
    if full == arch.layouts(checkpoint.config)[0].num_key_value_heads:
        return True, "every query head has its own keys and values"
    lifted = arch.with_groups(checkpoint.config, full)
    worst = 0.0
    for layer in chosen:
        tensors = _layer_tensors(checkpoint, arch, layer)
        names = arch.tensor_names(checkpoint.config, layer)
        weights, _ = merge_heads(arch.read_layer(checkpoint.config, layer, {n: tensors[n] for n in names}), full)
        wide = {**tensors, **arch.write_layer(lifted, layer, weights, torch.float64)}
        worst = max(
            worst, _difference(_attend(checkpoint.config, arch, layer, tensors), _attend(lifted, arch, layer, wide))
        )
    detail = (
        f"attention of layers {', '.join(map(str, chosen))} within {worst:.1e} of its heads written out, in float64"
    )
    return worst < TOLERANCE, detail


def _against_parent(
    checkpoint: Checkpoint,
    parent: Checkpoint,
    arch: Architecture,
    chosen: Sequence[int],
    *,
    compare: bool,
    moved: Collection[str],
    trained: bool,
) -> tuple[bool, str]:
    """Nothing but the converted attention differs; and that neither, where the conversion is exact.

    Where positions were moved (a longer context, a window), which may change the config fields `moved`, the parent
    is compared as it is with the same ones.
    What was `trained` since differs everywhere, and only its shape is compared.
    """
    old = find(parent.config, parent.tensors)
    before, after = old.layouts(parent.config), arch.layouts(checkpoint.config)
    if len(before) != len(after):
        return False, f"the parent has {len(before)} layers, and the folder {len(after)}"
    fields = _changed_fields(old, parent.config, arch, checkpoint.config, moved)
    if fields:
        return False, f"config.json differs from the parent's in {', '.join(fields)}"
    converted = {
        name
        for layer, (a, b) in enumerate(zip(before, after, strict=True))
        if a.num_key_value_heads != b.num_key_value_heads
        for name in arch.tensor_names(checkpoint.config, layer)
    }
    rest = [n for n in checkpoint.tensors if n not in converted]
    lost = [n for n in rest if n not in parent.tensors]
    changed = [
        n
        for n in rest
        if compare
        and not trained
        and n in parent.tensors
        and not torch.equal(_read_as(parent, n, checkpoint), checkpoint.read(n))
    ]
    if lost or changed:
        return False, f"outside the converted attention {', '.join([*lost, *changed][:3])} differ from the parent's"
    if trained:
        return True, "the parent's names and configuration; its weights were trained since"
    if any(b.num_key_value_heads < a.num_key_value_heads for a, b in zip(before, after, strict=True)):
        return True, f"{len(rest)} tensors outside the converted attention are the parent's"
    worst = 0.0
    for layer in chosen:
        ours = _attend(checkpoint.config, arch, layer, _layer_tensors(checkpoint, arch, layer))
        rounded = {
            name: tensor.to(checkpoint.tensors[name].dtype)
            for name, tensor in _layer_tensors(parent, old, layer).items()
        }
        if moved:
            config = arch.with_groups(checkpoint.config, before[layer].num_key_value_heads)
            theirs = _attend(config, arch, layer, rounded)
        else:
            theirs = _attend(parent.config, old, layer, rounded)
        worst = max(worst, _difference(ours, theirs))
    return (
        worst < TOLERANCE,
        f"exact: attention of the chosen layers within {worst:.1e} of the parent's, in float64",
    )


def _loads_whole(
    checkpoint: Checkpoint,
    stock: Stock,
    layouts: Sequence[AttentionLayout],
    *,
    allow_nan: bool,
) -> tuple[bool, str]:
    """`from_pretrained` takes the folder, the model speaks, and its cache has the promised shape."""
    import transformers

    model, info = getattr(transformers, stock.auto_class).from_pretrained(
        checkpoint.folder, dtype=torch.float32, output_loading_info=True, trust_remote_code=False
    )
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        return False, f"from_pretrained reports {wrong}"
    # Asked of a model without weights: a loaded one forgets the ties that its weights broke.
    ties = empty_model(checkpoint.config, stock.auto_class).all_tied_weights_keys or {}
    for name, target in ties.items():
        if model.get_parameter(name).data_ptr() != model.get_parameter(target).data_ptr():
            return False, f"{name} is not tied to {target}"
    tokens = torch.arange(TOKENS)[None] % model.get_input_embeddings().num_embeddings
    with torch.inference_mode():
        said = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False,
            eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
    if not allow_nan and not all(bool(step.isfinite().all()) for step in said.logits):
        return False, "the logits are not finite"
    numbers = [layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in said.past_key_values.layers]
    if numbers != [layout.cache_elements_per_token for layout in layouts]:
        return False, f"after generate() the cache holds {numbers} numbers per token and layer"
    return True, f"{type(model).__name__}.from_pretrained loads it whole and generates"


def _attend(config: dict[str, Any], arch: Architecture, layer: int, tensors: dict[str, Tensor]) -> Tensor:
    path = f"{arch.module.format(layer=layer)}.{arch.attention}"
    return attend(config, arch, path, layer, tensors, TOKENS)[1]


def _layer_tensors(checkpoint: Checkpoint, arch: Architecture, layer: int) -> dict[str, Tensor]:
    """Everything of a layer's attention, what a conversion does not touch included."""
    prefix = f"{arch.layers[0].format(layer=layer)}.{arch.attention}."
    return {name: checkpoint.read(name) for name in checkpoint.tensors if name.startswith(prefix)}


def _read_as(parent: Checkpoint, name: str, like: Checkpoint) -> Tensor:
    return parent.read(name).to(like.tensors[name].dtype)


def _difference(a: Tensor, b: Tensor) -> float:
    """Relative, and infinite where only one of them is NaN."""
    same = a.isnan() & b.isnan()
    a, b = a.masked_fill(same, 0), b.masked_fill(same, 0)
    error = float((a - b).norm() / b.norm().clamp_min(1e-300))
    return math.inf if math.isnan(error) else error


def _changed_fields(
    old: Architecture, before: dict[str, Any], arch: Architecture, after: dict[str, Any], moved: Collection[str]
) -> list[str]:
    """Fields that both stock configs of the language model know and disagree on."""
    a, b = old.stock_config(before).to_dict(), arch.stock_config(after).to_dict()
    free = {arch.num_key_value_heads, "dtype", "torch_dtype", "transformers_version", "architectures"}
    return sorted(name for name in a.keys() & b.keys() - free - {*moved} if a[name] != b[name])


def _few(layers: int) -> list[int]:
    """The first, the middle and the last."""
    return sorted({0, layers // 2, layers - 1})
