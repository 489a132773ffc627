"""Set or remove the sliding window of a model's layers in its config; no weight changes.

The fields of the stock config class show what it can express: `sliding_window` alone is one window for all layers,
`layer_types` beside it is a choice per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from headwise.errors import HeadwiseError, SettingError
from headwise.models import architecture as architectures
from headwise.models.architecture import Architecture
from headwise.models.config import has_stock_class
from headwise.models.layout import AttentionLayout, text_layouts
from headwise.models.stock import stock_config
from headwise.models.table import both_rope_spellings, load_table


def parse_layers(text: str, num_hidden_layers: int) -> list[int]:
    """Parse a choice of layers.

    Args:
        text: `all`, `alternate` (every second layer, the first one included), or a list such as `0,2,5-7`.
        num_hidden_layers: of the model.

    Returns:
        Ascending layer indices.

    Raises:
        SettingError: the text is not a list, or a layer does not exist.
    """
    if text == "all":
        return list(range(num_hidden_layers))
    if text == "alternate":
        return list(range(0, num_hidden_layers, 2))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise SettingError(
                "window_layers",
                f"`window_layers` {text} is neither all, alternate nor a list of layers.",
                "Write it as 0,2,5-7.",
            )
        chosen.update(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= num_hidden_layers:
        raise SettingError(
            "window_layers",
            f"`window_layers` {text} names a layer that does not exist.",
            f"The model has {num_hidden_layers} layers; the first one is 0.",
        )
    return sorted(chosen)


def format_layers(layers: Sequence[int]) -> str:
    """Return ascending layer indices as `parse_layers` reads them, such as 0,2,5-7.

    Args:
        layers: the indices; at least one.
    """
    runs: list[list[int]] = []
    for layer in layers:
        if runs and runs[-1][-1] == layer - 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def require_choice(config: dict[str, Any], architecture: Architecture) -> None:
    """Refuse a model whose stock class cannot hold a window per layer, and name the types that can.

    Args:
        config: the source's config.json.
        architecture: its row.

    Raises:
        SettingError: no stock class of the model's function has a window per layer.
    """
    if _is_replaced(architecture) or _has_choice(architecture.stock_config(config)):
        return
    name = architecture.wrapper or architecture.model_type
    raise SettingError(
        "window_layers",
        f"the stock {name} class has no window per layer; these types have one: {', '.join(_types_with_choice())}.",
        "Leave out `window_layers` auto.",
    )


def _is_replaced(architecture: Architecture) -> bool:
    """Return whether another class with the same function has windows for this one."""
    return architecture.model_type in load_table().windowed_classes and not architecture.text_key


def _has_choice(stock: Any) -> bool:
    return hasattr(stock, "sliding_window") and hasattr(stock, "layer_types")


def _types_with_choice() -> list[str]:
    """Return the model types whose windows can be chosen by layer and change nothing else."""
    table = load_table()
    types = {name for name in table.windowed_classes if name in table.rows}
    for name, row in table.rows.items():
        if has_stock_class(name) and not row.rope_layer_types:
            stock = stock_config({"model_type": name})
            rope = getattr(stock, "rope_parameters", None) or {}
            per_type = any(isinstance(value, dict) for value in rope.values())
            types |= {name} if _has_choice(stock) and not per_type else set()
    return sorted(types)


def with_window(
    config: dict[str, Any], architecture: Architecture, window: int | None, layers: str = "all"
) -> dict[str, Any]:
    """Return a config in which the chosen layers attend to `window` tokens and the others to all.

    Args:
        config: the source's config.json.
        architecture: its row.
        window: tokens that a layer attends to, the query's own included; None removes every window.
        layers: the choice of layers, as for `parse_layers`.

    Raises:
        SettingError: the window is not within the context, or a layer does not exist.
        HeadwiseError: no stock class can express this choice.
    """
    layouts = text_layouts(architecture.layouts(config))
    stock = architecture.stock_config(config)
    wanted = [] if window is None else parse_layers(layers, len(layouts))
    if window is None and not any(layout.sliding_window for layout in layouts):
        raise SettingError(
            "sliding_window",
            "`sliding_window` 0 removes windows, and no layer of this model has a window.",
            "Leave out `sliding_window`.",
        )
    if window is not None and not 0 < window < stock.max_position_embeddings:
        raise SettingError(
            "sliding_window",
            f"`sliding_window` {window} is not between 1 and the model's context, max_position_embeddings: "
            f"{stock.max_position_embeddings}.",
            "Give less: a window as long as the context changes nothing.",
        )
    new = copy.deepcopy(config)
    text = architecture.text_config(new)
    some = 0 < len(wanted) < len(layouts)
    swapped = some and _is_replaced(architecture) and not hasattr(stock, "layer_types")
    if swapped or not hasattr(stock, "sliding_window"):
        _stand_in(new, architecture, stock, "all" if len(wanted) == len(layouts) else "some")
        stock = architectures.find_architecture(new).stock_config(new)
    if hasattr(stock, "layer_types"):
        _refuse_moved_positions(architecture, stock, layouts, wanted)
        text["layer_types"] = [
            "sliding_attention" if layer in wanted else "full_attention" for layer in range(len(layouts))
        ]
    elif some:
        raise SettingError(
            "window_layers",
            f"the stock {architecture.model_type} class has one window for all layers, and `window_layers` "
            f"{layers} names {len(wanted)} of {len(layouts)}.",
            "Give `window_layers` all.",
        )
    # Some classes with layer_types build the mask of a window even if no layer uses it: they keep the number.
    if window is not None or not hasattr(stock, "layer_types"):
        text["sliding_window"] = window
    if hasattr(stock, "use_sliding_window"):
        text["use_sliding_window"] = window is not None
    if hasattr(stock, "max_window_layers"):
        # Software that does not read layer_types applies the window from this layer on.
        text["max_window_layers"] = min(wanted, default=len(layouts))
    result = text_layouts(architectures.find_architecture(new).layouts(new))
    assert [layout.sliding_window for layout in result] == [
        window if layer in wanted else None for layer in range(len(layouts))
    ]
    return new


def _stand_in(config: dict[str, Any], architecture: Architecture, stock: Any, choice: str) -> None:
    """Change `config` to the stock class that computes the same function and has windows."""
    windowed = load_table().windowed_classes.get(architecture.model_type)
    if windowed is None or architecture.text_key:
        raise HeadwiseError(
            f"the stock {architecture.wrapper or architecture.model_type} class has no sliding window.",
            "Leave out `sliding_window`.",
        )
    other = windowed[choice]
    for key in windowed["without"]:
        if getattr(stock, key, False):
            raise HeadwiseError(
                f"config.json has {key}: true, and {other['model_type']}, the stock class with windows for "
                f"{architecture.model_type}, has no such bias.",
                "Leave out `sliding_window`.",
            )
    config["model_type"] = other["model_type"]
    config["architectures"] = [other["architecture"]]
    config["num_key_value_heads"] = stock.num_key_value_heads
    config["head_dim"] = stock.head_dim
    config["rope_parameters"] = copy.deepcopy(stock.rope_parameters)
    config.update(both_rope_spellings(config))


def _refuse_moved_positions(
    architecture: Architecture, stock: Any, layouts: Sequence[AttentionLayout], wanted: Sequence[int]
) -> None:
    """Raise SettingError if other layers would get windows in a class whose windows decide the rotary base."""
    present = [layer for layer, layout in enumerate(layouts) if layout.sliding_window]
    per_type = any(isinstance(value, dict) for value in stock.rope_parameters.values())
    if (architecture.rope_layer_types or per_type) and present != list(wanted):
        raise SettingError(
            "window_layers",
            f"in {architecture.model_type} a layer's window decides how its positions rotate, so another choice of "
            "layers would change more than the window.",
            f"Give `window_layers` {','.join(map(str, present))}, the layers that have a window now.",
        )
