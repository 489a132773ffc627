"""Format the cells and lines that several results have in common."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from headwise._cli import console
from headwise.format import dtype_name, size

if TYPE_CHECKING:
    from headwise.models.layout import AttentionLayout, CacheSize
    from headwise.serving.engines import EngineVerdict


def format_cache(cache: CacheSize) -> list[str]:
    """Return the size per token and at each context."""
    return [size(cache.bytes_per_token), *(size(total) for total in cache.at.values())]


def format_saving(saved: float) -> str:
    """Return "75.0%" for 0.75, and "grows 2x" for -1.0, a cache that doubles."""
    return f"{saved:.1%}" if saved > 0 else f"grows {1 - saved:.3g}x" if saved < 0 else "none"


def format_heads(layout: AttentionLayout) -> tuple[object, ...]:
    """Return the cells of a layer's heads; empty ones for a layer without attention."""
    heads = (layout.num_attention_heads, layout.num_key_value_heads, layout.head_dim, _format_rotary(layout))
    return heads if layout.attends else ("",) * len(heads)


def _format_rotary(layout: AttentionLayout) -> str:
    """Return how many dimensions of a head are rotary."""
    if layout.rotary_dim == 0:
        return "none"
    return "all" if layout.rotary_dim == layout.head_dim else f"{layout.rotary_dim} of {layout.head_dim}"


def format_ranges(layers: Sequence[int], max_length: int = 36) -> str:
    """Return layer numbers as ranges: [0, 1, 2, 5] -> "0-2, 5".

    Args:
        layers: ascending layer numbers.
        max_length: of the text; a longer list is cut and begins with the number of layers.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    text = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
    if len(text) <= max_length:
        return text
    return f"{len(layers)} layers: {text[: max_length - 12].rsplit(',', 1)[0]}, ..."


def flatten_report(report: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield the numbers and words of a layer's report; lists are left out."""
    for name, value in report.items():
        if isinstance(value, Mapping):
            yield from flatten_report(value, f"{prefix}{name} ")
        elif isinstance(value, float):
            yield f"{prefix}{name}", f"{value:.4g}"
        elif not isinstance(value, list | tuple):
            yield f"{prefix}{name}", str(value)


def format_count(number: int) -> str:
    """Return "1.1 billion" or "4.54 million"."""
    for scale, unit in ((1e9, "billion"), (1e6, "million")):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return f"{number:,}"


def format_tensor(tensor: tuple[Any, tuple[int, ...]] | None) -> str:
    """Return "bfloat16 64x64" for a dtype and a shape."""
    return f"{dtype_name(tensor[0])} {'x'.join(map(str, tensor[1]))}" if tensor else ""


def detail_layers(layers: Mapping[int, Mapping[str, Any]]) -> None:
    """Print the report of each layer with --verbose."""
    for layer, report in layers.items():
        console.detail(f"layer {layer}: {', '.join(f'{name} {value}' for name, value in flatten_report(report))}")


def engine_commands(verdicts: Iterable[EngineVerdict]) -> tuple[str, ...]:
    """Return the commands that serve a layout, of all engines."""
    return tuple(command for verdict in verdicts for command in verdict.commands)


def print_commands(layout: str, commands: Sequence[str]) -> None:
    """Print the commands that serve a layout, each on a line of its own, so that they can be copied.

    Args:
        layout: the name of what they serve.
        commands: of the engines; nothing is printed without one.
    """
    if commands:
        console.print_line()
        console.print_line(f"To serve {layout}:")
    for command in commands:
        console.print_line(f"  {command}")
