"""Sliding windows: which layers of a model look only so far back, as its config says it. No weight changes.

What a stock class can express is read off its config class: `sliding_window` alone is one window for all layers,
`layer_types` beside it is a choice per layer.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from headwise.errors import HeadwiseError
from headwise.models import architecture as architectures
from headwise.models.architecture import Architecture, both_rope_spellings
from headwise.models.layout import AttentionLayout

# Classes without windows, and the stock class that computes the same function with them: for all layers alike,
# and for some. Those have no room for biases.
STAND_INS = {"llama": {"all": "mistral", "some": "ministral"}}
FORBIDDEN_BIASES = ("attention_bias", "mlp_bias")
CAUSAL_LM = {"mistral": "MistralForCausalLM", "ministral": "MinistralForCausalLM"}


def parse_layers(text: str, num_hidden_layers: int) -> list[int]:
    """`all`, `alternate` (every second layer, the first one included), or a list such as `0,2,5-7`.

    Raises:
        HeadwiseError: not a list, or a layer that does not exist.
    """
    if text == "all":
        return list(range(num_hidden_layers))
    if text == "alternate":
        return list(range(0, num_hidden_layers, 2))
    chosen: set[int] = set()
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise HeadwiseError(
                f"--window-layers {text} is neither all, alternate nor a list of layers.",
                "Write it as 0,2,5-7.",
            )
        chosen.update(range(int(first), int(last or first) + 1))
    if not chosen or max(chosen) >= num_hidden_layers:
        raise HeadwiseError(f"--window-layers {text} leaves the {num_hidden_layers} layers, which count from 0.")
    return sorted(chosen)


def with_window(
    config: dict[str, Any], architecture: Architecture, window: int | None, layers: str = "all"
) -> dict[str, Any]:
    """A new config in which the chosen layers see `window` tokens and the others all of them.

    Args:
        config: the source's config.json.
        architecture: its row.
        window: tokens a layer sees, itself included; None removes every window.
        layers: as `parse_layers` reads it.

    Raises:
        HeadwiseError: the window is no window, or no stock class holds this choice.
    """
    layouts = architecture.layouts(config)
    stock = architecture.stock_config(config)
    wanted = [] if window is None else parse_layers(layers, len(layouts))
    if window is None and not any(layout.sliding_window for layout in layouts):
        raise HeadwiseError("--sliding-window none: no layer of this model has a window.")
    if window is not None and not 0 < window < stock.max_position_embeddings:
        raise HeadwiseError(
            f"--sliding-window {window} is not between 1 and the model's context, max_position_embeddings: "
            f"{stock.max_position_embeddings}.",
            "A window as long as the context changes nothing.",
        )
    new = copy.deepcopy(config)
    text = architecture.text_config(new)
    if not hasattr(stock, "sliding_window"):
        _stand_in(new, architecture, stock, "all" if len(wanted) == len(layouts) else "some")
        stock = architectures.find(new).stock_config(new)
    if hasattr(stock, "layer_types"):
        _refuse_moved_positions(architecture, stock, layouts, wanted)
        text["layer_types"] = [
            "sliding_attention" if layer in wanted else "full_attention" for layer in range(len(layouts))
        ]
    elif 0 < len(wanted) < len(layouts):
        raise HeadwiseError(
            f"the stock {architecture.model_type} class has one window for all layers, and --window-layers "
            f"{layers} names {len(wanted)} of {len(layouts)}.",
            "Use --window-layers all.",
        )
    # Some classes with layer_types build the mask of a window that no layer uses: they keep the number.
    if window is not None or not hasattr(stock, "layer_types"):
        text["sliding_window"] = window
    if hasattr(stock, "use_sliding_window"):
        text["use_sliding_window"] = window is not None
    if hasattr(stock, "max_window_layers"):
        # Readers without layer_types window the layers from this one on.
        text["max_window_layers"] = min(wanted, default=len(layouts))
    result = architectures.find(new).layouts(new)
    assert [layout.sliding_window for layout in result] == [
        window if layer in wanted else None for layer in range(len(layouts))
    ]
    return new


def _stand_in(config: dict[str, Any], architecture: Architecture, stock: Any, choice: str) -> None:
    """Turn `config` into one of the class that computes the same with windows."""
    other = STAND_INS.get(architecture.model_type)
    if other is None or architecture.text_key:
        raise HeadwiseError(
            f"the stock {architecture.wrapper or architecture.model_type} class has no sliding window.",
            "Leave out --sliding-window.",
        )
    for key in FORBIDDEN_BIASES:
        if getattr(stock, key, False):
            raise HeadwiseError(
                f"config.json has {key}: true, and {other[choice]}, the stock class with windows for "
                f"{architecture.model_type}, has no such bias.",
                "Leave out --sliding-window.",
            )
    config["model_type"] = other[choice]
    config["architectures"] = [CAUSAL_LM[other[choice]]]
    config["num_key_value_heads"] = stock.num_key_value_heads
    config["head_dim"] = stock.head_dim
    config["rope_parameters"] = copy.deepcopy(stock.rope_parameters)
    config.update(both_rope_spellings(config))


def _refuse_moved_positions(
    architecture: Architecture, stock: Any, layouts: Sequence[AttentionLayout], wanted: Sequence[int]
) -> None:
    present = [layer for layer, layout in enumerate(layouts) if layout.sliding_window]
    per_type = any(isinstance(value, dict) for value in stock.rope_parameters.values())
    if (architecture.rope_layer_types or per_type) and present != list(wanted):
        raise HeadwiseError(
            f"in {architecture.model_type} a layer's window decides how its positions rotate, so another choice of "
            "layers would change more than the window.",
            f"Only --window-layers {','.join(map(str, present))}, those that have one now, can be changed.",
        )
