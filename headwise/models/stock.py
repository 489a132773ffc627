"""Stock models without weights: built in no time from a config, filled tensor by tensor, asked what they would do.

Everything that depends on a model's own code (masks, rotary tables, the order of its parts) is taken from the
stock class itself, so that no model type has to be known here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from headwise.errors import HeadwiseError
from headwise.io.reader import Checkpoint


def stock_config(config: dict[str, Any]) -> Any:
    """The stock configuration object of a config.json; never remote code."""
    import transformers

    plain = {k: v for k, v in config.items() if k != "auto_map"}
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain)


def empty_model(
    config: dict[str, Any], auto_class: str, dtype: torch.dtype = torch.float32, most: int | None = None
) -> Any:
    """The stock model of a config.json with buffers but no weights (parameters on the meta device).

    Args:
        most: parameters that it may have.

    Raises:
        HeadwiseError: the class cannot make a model of this config.
    """
    import transformers
    from transformers.initialization import no_init_weights

    try:
        stock = stock_config(config)
        # Only the eager form knows soft-capped scores.
        capped = getattr(stock.get_text_config(), "attn_logit_softcapping", None)
        # Drawing random numbers for weights that are not there would be most of the time that this takes.
        with init_empty_weights(include_buffers=False), no_init_weights(), _at_most(most):
            model = getattr(transformers, auto_class).from_config(
                stock, dtype=dtype, attn_implementation="eager" if capped else "sdpa"
            )
    except (HeadwiseError, MemoryError):
        raise
    # The classes raise whatever their arithmetic on an odd value raises; sizes beyond any memory are among that.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise HeadwiseError(
            f"no stock {config['model_type']} model can be made from config.json: {reason}.",
            "The checkpoint and its config.json do not belong together.",
        ) from error
    return model.eval().requires_grad_(False)


@contextmanager
def _at_most(most: int | None) -> Iterator[None]:
    """Stop the making of a model that gets more parameters than that."""
    made = 0

    def count(*_: Any) -> None:
        nonlocal made
        made += 1
        if most is not None and made > most:
            raise HeadwiseError(
                f"config.json describes a model of more than {most:,} tensors, far more than its files hold.",
                "The checkpoint and its config.json do not belong together.",
            )

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def load_model(checkpoint: Checkpoint, auto_class: str, dtype: torch.dtype, **arguments: Any) -> Any:
    """Load a whole stock model with its weights, on the CPU.

    Args:
        checkpoint: a folder, or a GGUF file, whose tensors are in memory twice for a moment.
        auto_class: the transformers class.
        dtype: of the weights.
        arguments: more arguments of `from_pretrained`.
    """
    import transformers

    if checkpoint.gguf is None:
        return getattr(transformers, auto_class).from_pretrained(
            checkpoint.folder, dtype=dtype, trust_remote_code=False, **arguments
        )
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    # The auto classes take no weights without a folder.
    stock_class = type(empty_model(checkpoint.config, auto_class))
    config = stock_config(checkpoint.config)
    return stock_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **arguments)


def load_into(model: Any, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """Give checkpoint tensors to an empty stock model, through transformers' own renaming and fusing.

    Returns:
        transformers' account of missing, unexpected and mismatched keys.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(
            model,
            dict(tensors),
            LoadStateDictConfig(
                device_map={"": torch.device(device)},
                dtype=next(model.parameters()).dtype,
                weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
            ),
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    return info


def layer_arguments(model: Any, layer_path: str, length: int, dtype: torch.dtype) -> list[dict[str, Any]]:
    """What each layer's attention is called with besides its input, for sequences of `length`.

    Args:
        model: may be empty; no weight takes part.
        layer_path: of its decoder layers, "model.layers.{layer}".
    """
    path = layer_path.rpartition(".")[0]
    text, layers = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    with torch.no_grad(), capture_layer_calls(layers) as stubs, suppress(StopForward):
        text(inputs_embeds=torch.zeros(1, length, text.config.hidden_size, dtype=dtype), use_cache=False)
    return [_attention_arguments(stub) for stub in stubs]


def move_to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors inside dictionaries and tuples, such as the arguments of a layer.

    Args:
        value: a tensor, a dictionary, a tuple, or anything else, which stays as it is.
        device: of the result.
    """
    if isinstance(value, dict):
        return {key: move_to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(move_to_device(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def run_attention(
    config: dict[str, Any], stock: Any, attention_path: str, layer: int, tensors: dict[str, Tensor], length: int
) -> tuple[Tensor, Tensor]:
    """Random inputs, and what a layer's stock attention says to them, in float64: (2, length, D) each.

    Args:
        stock: has the `auto_class` and the path `module` of the decoder layers.
        tensors: the layer's attention, by the checkpoint's names.
    """
    model = empty_model(config, stock.auto_class, torch.float64)
    load_into(model, tensors)
    arguments = layer_arguments(model, stock.module, length, torch.float64)[layer]
    generator = torch.Generator().manual_seed(layer)
    width = model.config.get_text_config().hidden_size
    x = torch.randn(2, length, width, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        output = model.get_submodule(attention_path)(hidden_states=x, **arguments)
    return x, output[0] if isinstance(output, tuple) else output


def _attention_arguments(stub: LayerStub) -> dict[str, Any]:
    """A decoder layer hands its keyword arguments on to its attention; positional ones are matched by name."""
    names = list(inspect.signature(type(stub.layer).forward).parameters)[2:]
    given = {**dict(zip(names, stub.args, strict=False)), **stub.kwargs}
    return {name: value for name, value in given.items() if name not in ("use_cache", "past_key_values")}


@contextmanager
def capture_layer_calls(layers: nn.ModuleList) -> Iterator[list[LayerStub]]:
    """Stubs in the place of decoder layers, for the time of a run."""
    real = list(layers)
    stubs = [LayerStub(layer, last=layer is real[-1]) for layer in real]
    for i, stub in enumerate(stubs):
        layers[i] = stub
    try:
        yield stubs
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer


def run_check(check: Callable[..., tuple[bool, str]], *given: Any, **more: Any) -> tuple[bool, str]:
    """A check of a stock model, which a config that its class accepts may still make fail, with any error."""
    try:
        return check(*given, **more)
    except (HeadwiseError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".")
        return False, f"the stock class fails with {type(error).__name__}: {reason}"


class StopForward(Exception):
    """Ends the recording run before the model needs weights that come after its layers."""


class LayerStub(nn.Module):
    """Stands for a decoder layer, and notes what it is called with."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self._layer, self._last = (layer,), last  # in a tuple: not a submodule

    @property
    def layer(self) -> nn.Module:
        return self._layer[0]

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for facts, such as which kind of attention they have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        self.hidden, self.args, self.kwargs = hidden_states, args, kwargs
        if self._last:
            raise StopForward
        return hidden_states
