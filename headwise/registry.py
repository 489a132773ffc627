"""List the methods of a conversion with their papers and needs, without importing torch.

A method is one pure function and one entry here. The choices of the command line, the reference pages and the
citations of model cards are made from these entries. `Method.load` imports the function.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args

from headwise.errors import SettingError

Kind = Literal["merge", "latent", "grouping", "rope"]


@dataclass(frozen=True)
class Method:
    """One way to do one step of a conversion.

    Attributes:
        kind: the step: "merge" makes one KV head out of several, "latent" finds the latent of MLA, "grouping"
            chooses which KV heads share, "rope" rescales the rotary frequencies.
        name: what users type and records hold.
        title: the name in the field.
        summary: one sentence for help pages.
        paper: author, year and arXiv number; None for a method without a publication.
        needs: what the method uses: "moments" (second moments of the attention input, from calibration
            text), "text" (the calibration text itself), "rope" (rotary positions in every layer).
        function: the implementation, as "module:name".
        planes: of a latent method: the rotary planes that every KV head keeps (`mla/frequencies.py`); None: the
            method accepts any list of frequencies.
    """

    kind: Kind
    name: str
    title: str
    summary: str
    function: str
    paper: str | None = None
    needs: tuple[str, ...] = ()
    planes: str | None = None

    def load(self) -> Callable[..., Any]:
        """Import and return the implementation."""
        module, _, name = self.function.partition(":")
        function: Callable[..., Any] = getattr(importlib.import_module(module), name)
        return function


_METHODS = "headwise.convert.gqa.methods"
_POOLING = "headwise.convert.gqa.pooling"
_GROUPING = "headwise.convert.gqa.grouping"
_MLA = "headwise.convert.mla"
_ROPE = "headwise.models.rope"

METHODS: tuple[Method, ...] = (
    Method(
        "merge",
        "optimal",
        "weighted PCA",
        "Minimize the expected error of scores and outputs in closed form; then solve for the output matrices.",
        f"{_METHODS}:optimal",
        needs=("moments", "text"),
    ),
    Method(
        "merge",
        "aligned",
        "generalized Procrustes",
        "Align the heads of a group with each other, then average them.",
        f"{_METHODS}:aligned",
        "Jin et al. 2024, arXiv 2412.20677",
        needs=("moments",),
    ),
    Method(
        "merge",
        "mean",
        "mean pooling",
        "Average the heads of a group.",
        f"{_POOLING}:mean_head",
        "Ainslie et al. 2023, arXiv 2305.13245",
    ),
    Method("merge", "first", "first head", "Take the first head of each group.", f"{_POOLING}:first_head"),
    Method("merge", "random", "random head", "Take a random head of each group.", f"{_POOLING}:random_head"),
    Method(
        "latent",
        "optimal",
        "score-weighted alternating least squares",
        "Minimize the expected error of scores and outputs; then solve for the output matrices.",
        f"{_MLA}.alternating:alternating_least_squares",
        needs=("moments", "text"),
    ),
    Method(
        "latent",
        "transmla",
        "RoRoPE, FreqFold and joint PCA",
        "TransMLA: rotate the rotary planes of all heads into one key, then reduce the rest by a joint PCA.",
        f"{_MLA}.published:transmla",
        "Meng et al. 2025, arXiv 2502.07864",
        needs=("moments", "rope"),
    ),
    *(
        Method(
            "latent",
            name,
            "partial RoPE and joint SVD",
            f"MHA2MLA: each KV head keeps the rotary planes {choice}.",
            f"{_MLA}.published:partial_rope",
            "Ji et al. 2025, arXiv 2502.14837",
            needs=("moments", "rope"),
            planes=planes,
        )
        for name, planes, choice in (
            ("partial-rope", "norm", "of the largest 2-norm"),
            ("partial-rope-high", "high", "of the highest frequencies"),
            ("partial-rope-low", "low", "of the lowest frequencies"),
            ("partial-rope-uniform", "uniform", "at equal distances"),
        )
    ),
    Method(
        "grouping",
        "optimal",
        "least residual energy",
        "Search groups of equal size with the least residual energy.",
        f"{_GROUPING}:optimal_groups",
        needs=("moments",),
    ),
    Method(
        "grouping",
        "contiguous",
        "neighbouring heads",
        "Neighbouring heads share, as in the published methods.",
        f"{_GROUPING}:contiguous_groups",
        "Ainslie et al. 2023, arXiv 2305.13245",
    ),
    Method("rope", "base", "given base", "Set the base to `rope_theta`.", f"{_ROPE}:rescale"),
    Method(
        "rope",
        "ntk",
        "NTK-aware base",
        "Increase the base so that the slowest plane is interpolated.",
        f"{_ROPE}:rescale",
    ),
    Method(
        "rope",
        "linear",
        "position interpolation",
        "Divide every frequency by the factor.",
        f"{_ROPE}:rescale",
        "Chen et al. 2023, arXiv 2306.15595",
    ),
    Method("rope", "dynamic", "dynamic NTK", "Increase the base with the length of the input.", f"{_ROPE}:rescale"),
    Method(
        "rope",
        "yarn",
        "YaRN",
        "Interpolate slow planes, keep fast planes, and sharpen the attention.",
        f"{_ROPE}:rescale",
        "Peng et al. 2023, arXiv 2309.00071",
    ),
    Method("rope", "llama3", "Llama 3 scaling", "Interpolate slow planes with a smooth ramp.", f"{_ROPE}:rescale"),
    Method(
        "rope",
        "longrope",
        "LongRoPE",
        "Divide each frequency by a factor of its own, from two sets by length.",
        f"{_ROPE}:rescale",
        "Ding et al. 2024, arXiv 2402.13753",
    ),
)

_TABLE = {(method.kind, method.name): method for method in METHODS}


def method_names(kind: Kind) -> tuple[str, ...]:
    """Return the names of all methods of a kind, in the order of their entries.

    Args:
        kind: the step.

    Raises:
        ValueError: there is no such kind.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"`kind` is {kind!r}, which is not one of {', '.join(get_args(Kind))}")
    return tuple(method.name for method in METHODS if method.kind == kind)


def find_method(kind: Kind, name: str, *, field: str = "method") -> Method:
    """Return one method by its name.

    Args:
        kind: the step.
        name: of the method.
        field: the setting with the name, for the error.

    Raises:
        SettingError: there is no such method; the hint is the nearest name.
    """
    legal = method_names(kind)
    if name not in legal:
        close = get_close_matches(str(name), legal, 1)
        hint = f"Did you mean {close[0]!r}?" if close else None
        raise SettingError(field, f"`{field}` is {name!r}, which is not one of {', '.join(legal)}.", hint)
    return _TABLE[kind, name]
