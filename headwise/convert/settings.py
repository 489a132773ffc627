"""Everything that a user decides about a conversion: defaults, legal values, once.

`ConvertSettings` validates itself. The command line, `convert_model`, headwise.json, the identity of a resumed run
and the reference page are made from it. Rules that need the model, such as legal group counts, are in `choose.py`
and the targets; they raise the same `SettingError`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from headwise import fields, registry
from headwise.convert.verify.verification import CHECKS
from headwise.errors import SettingError
from headwise.fields import Setting, check_fields, declare, is_given, settings_of
from headwise.format import parse_bytes
from headwise.schema import parse_count
from headwise.serving.engines import ENGINES, require_cache_dtype

PARTS = ("text", "encoder", "decoder", "cross", "vision")
LAYOUTS = ("gqa", "mqa", "mha", "mla")
MERGED, LOSSY = ("gqa", "mqa"), ("gqa", "mqa", "mla")
ROPE_RULES = ("auto", *registry.method_names("rope"))
DTYPES = ("bfloat16", "float16", "float32")
SHARD_SIZE = "5GB"
DEFAULT_TEXT = "auto"
JOINT_REFITS = ("joint", "windows")
REFITS = ("auto", "off", "layers", *JOINT_REFITS)
SPARSE = ("dsa",)
AUTO_LAYERS = "auto"
# The record holds the decided calibration in place of its settings.
CALIBRATION: dict[str, Any] = {"section": "Calibration", "acts_with": LOSSY, "recorded": False}
# Nats per token that the windows of `window_layers` auto may cost together, and the sharing of `index_layers` auto.
WINDOW_LOSS = 0.01

# A field, and the field that it needs to have an effect.
NEEDS = {
    "rank": "rope_dim",
    "rope_dim": "rank",
    "rope": "context",
    "rope_theta": "rope",
    "window_layers": "sliding_window",
    "window_loss": "window_layers",
    "private": "push_to_hub",
    **dict.fromkeys(("index_topk", "index_heads", "index_head_dim", "index_steps"), "sparse"),
    "index_loss": "index_layers",
}
# A field, and the fields that contradict it.
CLASHES = {
    "cache": ("rank", "rope_dim"),
    "exact": ("cache", "rank", "rope_dim", "method", "calibrate", "calibration_tokens", "moments", "refit"),
    "moments": ("save_moments", "calibrate", "calibration_tokens", "images"),
    "images": ("calibrate", "calibration_tokens"),
    "index_layers": ("sparse", "to", "context", "sliding_window"),
}
JOINT_TEXT = ("refit_tokens", "refit_length", "refit_repeats")
# A field, and why a joint refit excludes it.
NOT_JOINT = {
    "context": "trains towards the parent's own positions: leave out `context`.",
    "sliding_window": "trains towards the parent's own positions: leave out `sliding_window`.",
    "images": "trains on text alone: leave out `images`, or give `refit` layers.",
    "sparse": "changes the attention that the indexers of `sparse` learn from.",
}


def methods_of(to: str | None) -> tuple[str, ...]:
    """Return the names of the methods for a layout; none for a layout that every conversion reaches exactly.

    Args:
        to: the layout; None: it is not given.
    """
    if to not in LOSSY:
        return ()
    return registry.method_names("latent" if to == "mla" else "merge")


def _check_layers(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"auto|all|alternate|\d+(-\d+)?(, *\d+(-\d+)?)*", value):
        raise ValueError
    return value


def _check_parts(value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else tuple(value)
    if not all(
        isinstance(each, str) and re.fullmatch(rf"({'|'.join(PARTS)})(=[1-9]\d*)?", each) for each in values
    ):
        raise ValueError
    if len({each.partition("=")[0] for each in values}) < len(values):
        raise ValueError
    return values


def _check_shard_size(value: Any) -> int | str:
    size: int | str = value
    if isinstance(size, bool) or parse_bytes(size) < 1:
        raise ValueError
    return size


@dataclass(frozen=True)
class ConvertSettings:
    """The settings of a conversion.

    None means that a field was not given. When the object is made, such fields get their defaults where they have
    an effect, so that the object holds all values in force.

    Raises:
        SettingError: a value is not legal, has no effect, or contradicts another one.
    """

    # Attention
    to: str | None = fields.choice("The new layout.", LAYOUTS, section="Attention", acts_with=LAYOUTS)
    groups: int | None = fields.number(
        "Number of KV heads after the conversion (num_key_value_heads).", section="Attention", acts_with=("gqa",)
    )
    method: str | None = fields.choice(
        f"Method: {', '.join(registry.method_names('merge'))}; for mla: "
        f"{', '.join(registry.method_names('latent'))} [optimal].",
        (*registry.method_names("merge"), *registry.method_names("latent")),
        metavar="METHOD",
        section="Attention",
        acts_with=LOSSY,
    )
    grouping: str | None = fields.choice(
        "Which heads share one KV head [optimal; contiguous for the published methods].",
        registry.method_names("grouping"),
        section="Attention",
        acts_with=MERGED,
    )
    part: Sequence[str] = declare(
        (),
        Setting(
            f"Attention to convert: {', '.join(PARTS)}; with a number of its own as in decoder=2; may be repeated "
            "[what is cached].",
            wanted=f"one or several of {', '.join(PARTS)}, each once, alone or with a number as in decoder=2",
            check=_check_parts,
            choices=PARTS,
            metavar="PART[=N]",
            multiple=True,
            section="Attention",
            acts_with=("gqa", "mqa", "mha"),
        ),
    )
    # Latent attention
    rank: int | None = fields.number(
        "Width of the latent (kv_lora_rank).", section="Latent attention (MLA)", acts_with=("mla",)
    )
    rope_dim: int | None = fields.number(
        "Width of the shared rotary key (qk_rope_head_dim).",
        section="Latent attention (MLA)",
        acts_with=("mla",),
    )
    cache: float | None = fields.fraction(
        "Fraction of the cache to keep, such as 12.5%, in place of the two widths.",
        section="Latent attention (MLA)",
        acts_with=("mla",),
    )
    exact: bool = fields.flag(
        "Full rank: the same function as the parent.", section="Latent attention (MLA)", acts_with=("mla",)
    )
    rope_frequencies: str | None = fields.choice(
        "Rotary frequencies; free: less error, and few engines support it [default].",
        ("default", "free"),
        section="Latent attention (MLA)",
        acts_with=("mla",),
    )
    cache_dtype: str | None = fields.choice(
        "Cache that will be served; fp8: the basis of the latent in which rounding costs least [bf16].",
        ("bf16", "fp8"),
        section="Latent attention (MLA)",
        acts_with=("mla",),
    )
    pad_values: bool = fields.flag(
        "Pad value heads with zeros for engines that need it.",
        section="Latent attention (MLA)",
        acts_with=("mla",),
    )
    # Sparse attention
    sparse: str | None = fields.choice(
        "Add an indexer to MLA, so that every query attends to a budget of keys; without a size, MLA is exact.",
        SPARSE,
        section="Sparse attention",
        acts_with=("mla",),
    )
    index_topk: int | None = fields.number(
        "Keys that a query attends to [2048, and an eighth of the context at most].", section="Sparse attention"
    )
    index_heads: int | None = fields.number(
        "Queries of an indexer [as many as attention heads, and 32 at most].", section="Sparse attention"
    )
    index_head_dim: int | None = fields.number("Width of the index key [64 or 128].", section="Sparse attention")
    index_steps: int | None = fields.number(
        "Training steps of each indexer; 0: the closed form alone [300, or 0 if they take over ten minutes].",
        minimum=0,
        section="Sparse attention",
    )
    index_layers: str | int | None = fields.word_or_number(
        "Share indexers of a sparse model: the number of layers that keep one, or auto (by measured loss).",
        (AUTO_LAYERS,),
        wanted="auto or a number of layers",
        metavar="LAYERS",
        section="Sparse attention",
    )
    index_loss: float | None = fields.positive(
        f"Nats per token that sharing indexers may cost with auto [{WINDOW_LOSS}].",
        metavar="NATS",
        section="Sparse attention",
    )
    # Engines
    engines: Sequence[str] = fields.several(
        f"Choose shapes that this engine serves: {', '.join(ENGINES)}; may be repeated.",
        ENGINES,
        metavar="ENGINE",
        flag="--engine",
        section="Output",
    )
    # Calibration
    calibrate: str | None = fields.text(
        "Calibration text: auto, sampled, mixture, builtin, none, a FILE (txt, jsonl) or hf:DATASET [auto].",
        metavar="TEXT",
        **CALIBRATION,
    )
    calibration_tokens: int | None = fields.number(
        "Number of calibration tokens, such as 40K (40,000) [by the model's size].",
        parse=parse_count,
        **CALIBRATION,
    )
    images: Path | None = fields.folder(
        'Calibrate on a .jsonl file of pairs with "image" (a path) and "text", for a vision-language model.',
        metavar="FILE",
        wanted="the path of a file",
        **CALIBRATION | {"acts_with": MERGED},
    )
    save_moments: Path | None = fields.folder(
        "Save the second moments of the attention inputs in a folder.", metavar="DIR", **CALIBRATION
    )
    moments: Path | None = fields.folder(
        "Use saved moments in place of calibration text.", metavar="DIR", **CALIBRATION
    )
    refit: str | int | None = fields.word_or_number(
        "Recover quality: auto, off, layers (each alone; or a number of steps), joint, windows (of layers) [auto].",
        REFITS,
        wanted="auto, off, layers, joint, windows or a number of steps",
        metavar="STEPS",
        **CALIBRATION,
    )
    refit_tokens: int | None = fields.number(
        "Tokens of the joint refit's text, such as 16M (16,000,000); more take more steps [4M on a GPU].",
        parse=parse_count,
        **CALIBRATION,
    )
    refit_length: int | None = fields.length(
        "Tokens in a sequence of the joint refit, such as 8K (8,192), at most the context [4,096 on a GPU].",
        **CALIBRATION,
    )
    refit_repeats: float | None = fields.fraction(
        "Share of the joint refit's sequences that repeat passages [0.2]; 0: the least loss, poor retrieval.",
        zero=True,
        **CALIBRATION,
    )
    # Positions
    context: int | None = fields.length(
        "Rescale RoPE to this many tokens, such as 128K (131,072).", section="Positions"
    )
    rope: str | None = fields.choice(
        f"RoPE rule: {', '.join(ROPE_RULES)} [auto].", ROPE_RULES, metavar="RULE", section="Positions"
    )
    rope_theta: float | None = fields.positive("RoPE base of the rule base.", metavar="THETA", section="Positions")
    sliding_window: int | None = fields.length(
        "Attention window in tokens; 0: no window.", minimum=0, section="Positions"
    )
    window_layers: str | None = fields.other(
        "Layers with the window: all, alternate, auto (by measured loss), or a list such as 0,2,4-7 [all].",
        check=_check_layers,
        parse=str,
        wanted="auto, all, alternate or a list of layers such as 0,2,5-7",
        metavar="LAYERS",
        section="Positions",
    )
    window_loss: float | None = fields.positive(
        f"Nats per token that the windows of auto may cost together [{WINDOW_LOSS}].",
        metavar="NATS",
        section="Positions",
    )
    # Output
    dtype: str | None = fields.choice("Precision of the weights [the source's].", DTYPES, section="Output")
    requantize: str | None = fields.choice(
        "Store the matrices of the layers as block FP8.", ("fp8",), section="Output"
    )
    max_shard_size: int | str = declare(
        SHARD_SIZE,
        Setting(
            f"Largest weight file [{SHARD_SIZE}].",
            wanted="a size such as 5GB",
            check=_check_shard_size,
            metavar="SIZE",
            section="Output",
        ),
    )
    dry_run: bool = fields.flag("Print the plan and write nothing.", section="Output", recorded=False)
    force: bool = fields.flag("Replace OUT when the new folder is complete.", section="Output", recorded=False)
    resume: bool = fields.flag("Continue an interrupted run.", section="Output", recorded=False)
    verify: bool = fields.flag(
        "Do not check the result.", default=True, flag="--no-verify", section="Output", recorded=False
    )
    accept: Sequence[str] = fields.several(
        f"Publish although this check fails, and record it: {', '.join(CHECKS)}; may be repeated.",
        CHECKS,
        metavar="CHECK",
        section="Output",
        recorded=False,
    )
    push_to_hub: str | None = fields.text(
        "Upload the result to a Hub repository.", metavar="REPO", section="Output", recorded=False
    )
    private: bool = fields.flag("Make a new repository private.", section="Output", recorded=False)
    allow_nan: bool = fields.flag("Convert weights with NaN or infinite values.")
    allow_pickle: bool = fields.flag("Read .bin files (weights only, no code).")
    seed: int = fields.number("Random seed [0].", minimum=0, default=0)
    device: str | None = fields.devices()

    def __post_init__(self) -> None:
        check_fields(self)
        self._complete_sparse()
        self._check_effect()
        self._check_target()
        self._check_contradictions()
        require_cache_dtype(self.engines, self.cache_dtype or "bf16")
        for name, value in self._defaults().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def lossy(self) -> bool:
        """Return whether the conversion may change the function of the model within the budget of keys."""
        return self.to in LOSSY and not self.exact

    @property
    def reads_text(self) -> bool:
        """Return whether the conversion makes use of calibration text."""
        return self.lossy or self.sparse is not None

    @property
    def refits_layers(self) -> bool:
        """Return whether `refit` is a regression of single layers."""
        return self.refit == "layers" or isinstance(self.refit, int)

    @property
    def refits_jointly(self) -> bool:
        """Return whether `refit` trains all layers on text sampled from the parent."""
        return self.refit in JOINT_REFITS

    @property
    def measured(self) -> bool:
        """Return whether the layers are measured for more than the needs of the method."""
        return self.refits_layers or self.refits_jointly or bool(self.moments or self.save_moments)

    def _complete_sparse(self) -> None:
        """Set the layout that sparse attention needs, where the settings name none."""
        if self.sparse and self.to is None:
            object.__setattr__(self, "to", "mla")
        if self.sparse and self.to == "mla" and not any(map(self._given, ("cache", "rank", "rope_dim"))):
            object.__setattr__(self, "exact", True)

    @property
    def parts(self) -> dict[str, int | None]:
        """Return the parts that the settings name, with the numbers of KV heads of their own."""
        pairs = (each.partition("=") for each in self.part)
        return {name: int(count) if count else None for name, _, count in pairs}

    def recorded(self) -> dict[str, Any]:
        """Return the settings for headwise.json and for the identity of a resumed run.

        The settings of the calibration are left out: the record holds the decided calibration.
        """
        declared = settings_of(self)
        values = {name: getattr(self, name) for name, (_, setting) in declared.items() if setting.recorded}
        recorded = {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value is not None and value is not False and value != ()
        }
        if self.max_shard_size == SHARD_SIZE:
            recorded.pop("max_shard_size")
        return recorded | {"seed": self.seed}

    def _given(self, name: str) -> bool:
        return is_given(self, name)

    def _check_effect(self) -> None:
        changes = ("to", "sparse", "index_layers", "context", "sliding_window", "dtype", "requantize")
        if not any(map(self._given, changes)):
            raise SettingError(
                "to", f"There is nothing to change: give {', '.join(f'`{name}`' for name in changes)}."
            )
        for name, (_, setting) in settings_of(self).items():
            if name == "calibrate" and (self.sliding_window or self.index_layers):
                continue  # the loss of the change is measured on it
            if setting.acts_with and self._given(name) and self.to not in setting.acts_with:
                layouts = " or ".join(f"`to` {layout}" for layout in setting.acts_with)
                raise SettingError(name, f"`{name}` acts only with {layouts}.")

    def _check_target(self) -> None:
        counts = self.parts.values()
        if any(counts) and self.to != "gqa":
            raise SettingError("part", f"`to` {self.to} sets the number of KV heads: name `part` without a number.")
        if self.groups is not None and counts and all(counts):
            raise SettingError("groups", "Every `part` has a number of its own, so that `groups` has no effect.")
        if self.to == "gqa" and self.groups is None and not (counts and all(counts)):
            raise SettingError(
                "groups", "`to` gqa needs `groups`; `headwise inspect MODEL` lists the legal numbers."
            )
        if self.to == "mla" and not any(map(self._given, ("exact", "cache", "rank", "rope_dim"))):
            raise SettingError("cache", "`to` mla needs `cache`, or `rank` and `rope_dim`, or `exact`.")
        legal = methods_of(self.to)
        if self.method is not None and self.method not in legal:
            reason = f"`to` {self.to} has no method {self.method!r}; it has {', '.join(legal)}."
            raise SettingError("method", reason)

    def _check_contradictions(self) -> None:
        for name, others in CLASHES.items():
            for against in others:
                if name == "exact" and self.sparse and against in ("calibrate", "calibration_tokens"):
                    continue  # for the indexers
                if self._given(name) and self._given(against):
                    raise SettingError(name, f"`{name}` and `{against}` contradict each other: give one of them.")
        for name, needed in NEEDS.items():
            if self._given(name) and not self._given(needed):
                raise SettingError(name, f"`{name}` needs `{needed}`.")
        if self.to == "mla" and self.sliding_window:
            raise SettingError(
                "sliding_window",
                "no stock MLA class has a sliding window: leave out `sliding_window`, or `to` mla.",
            )
        for loss, chosen in (("window_loss", "window_layers"), ("index_loss", "index_layers")):
            if getattr(self, loss) is not None and getattr(self, chosen) != AUTO_LAYERS:
                raise SettingError(loss, f"`{loss}` acts only with `{chosen}` {AUTO_LAYERS}.")
        if self.index_layers is not None and self.calibrate == "none":
            raise SettingError("index_layers", "`index_layers` measures losses: leave out `calibrate` none.")
        if self.window_layers == AUTO_LAYERS:
            if not self.sliding_window:
                reason = f"`sliding_window` 0 removes every window: leave out `window_layers` {AUTO_LAYERS}."
                raise SettingError("window_layers", reason)
            if self.calibrate == "none":
                reason = f"`window_layers` {AUTO_LAYERS} measures losses on text: leave out `calibrate` none."
                raise SettingError("window_layers", reason)
        if self.calibrate == "none":
            for name in filter(self._given, ("calibration_tokens", "save_moments")):
                reason = f"`calibrate` none reads no text, so that `{name}` has no effect: leave one out."
                raise SettingError(name, reason)
        for name, without in (("calibrate", self.calibrate == "none"), ("moments", self._given("moments"))):
            if without and self.refits_layers:
                reason = f"`refit` {self.refit} needs calibration text: leave out `{name}` or `refit`."
                raise SettingError("refit", reason)
        for name in filter(self._given, NOT_JOINT if self.refits_jointly else JOINT_TEXT):
            if self.refits_jointly:
                raise SettingError("refit", f"`refit` {self.refit} {NOT_JOINT[name]}")
            raise SettingError(name, f"`{name}` is of the text of a joint refit: give `refit` joint.")
        if self.sparse and (self.calibrate == "none" or self.moments is not None):
            reason = "`sparse` makes indexers from calibration text: leave out `calibrate` none and `moments`."
            raise SettingError("sparse", reason)
        if self.requantize and self.dtype not in (None, "bfloat16"):
            raise SettingError(
                "requantize", f"`requantize` {self.requantize} stores bfloat16 weights: leave out `dtype`."
            )
        if self.push_to_hub and not self.verify:
            raise SettingError("verify", "`push_to_hub` uploads verified folders only: leave out `verify`.")
        if self.accept and not self.verify:
            raise SettingError("accept", "Without `verify` no check is made, so that `accept` has no effect.")
        if (self.rope_theta is not None) != (self.rope == "base"):
            raise SettingError("rope_theta", "`rope` base and `rope_theta` belong together.")

    def _defaults(self) -> dict[str, Any]:
        """Return the value of every field that acts and need not be given."""
        defaults: dict[str, Any] = {}
        if self.lossy:
            defaults |= {"method": "optimal", "refit": "auto"}
        if self.reads_text and self.moments is None and self.images is None:
            defaults["calibrate"] = DEFAULT_TEXT
        if self.to in MERGED:
            method = self.method or "optimal"
            defaults["grouping"] = "optimal" if method == "optimal" else "contiguous"
        if self.to == "mla":
            defaults["rope_frequencies"] = "default"
        if self.context is not None:
            defaults["rope"] = "auto"
        if self.sliding_window:
            defaults["window_layers"] = "all"
        for chosen, loss in (("window_layers", "window_loss"), ("index_layers", "index_loss")):
            if getattr(self, chosen) == AUTO_LAYERS:
                defaults[loss] = WINDOW_LOSS
        return defaults
