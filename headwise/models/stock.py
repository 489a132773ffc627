"""Build stock models on the meta device, load tensors into them, and capture layer inputs.

Masks, rotary tables and the order of a model's parts come from the stock class itself. So no code here names a
model type.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.overrides import TorchFunctionMode

from headwise.compat import CACHE_ARGUMENTS, no_progress_bars
from headwise.errors import HeadwiseError, is_out_of_memory
from headwise.io.quantized.powers import exponent_of
from headwise.io.reader import Checkpoint
from headwise.models.config import check_labels, is_routed, with_special_floats

# The argument by which a layer gets the keys that an indexer before it selects.
SELECTION = "prev_topk_indices"


def stock_config(config: dict[str, Any]) -> Any:
    """Return the stock configuration object of a config.json. Remote code never runs.

    Args:
        config: the config.json.
    """
    import transformers

    check_labels(config)
    plain = with_special_floats(json.dumps({k: v for k, v in config.items() if k != "auto_map"}))
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain)


# The largest number of parameter tensors of a model that is built to count its parameters.
MOST_COUNTED = 10_000


def stock_class_name(config: dict[str, Any], auto_class: str) -> str | None:
    """Return the name of the stock class of a config.json, which is not built: a config may have any size.

    Args:
        config: the config.json.
        auto_class: name of the transformers auto class.

    Returns:
        The name; None if the auto class has none for it, or transformers refuses the config.
    """
    import transformers

    try:
        stock = stock_config(config)
    except Exception:  # of any type: the classes check their fields themselves
        return None
    found = getattr(transformers, auto_class)._model_mapping.get(type(stock), None)
    stock_class = found[0] if isinstance(found, tuple) and found else found
    return getattr(stock_class, "__name__", None)


def count_stock_parameters(config: dict[str, Any], auto_class: str, stock_text: Any) -> tuple[int, int]:
    """Return the number of parameters of a stock model, tied ones once, and of its routed experts.

    Args:
        config: the config.json.
        auto_class: name of the transformers auto class.
        stock_text: the stock config object of the language model.

    Raises:
        HeadwiseError: the class cannot build a model from this config.
    """
    model = empty_model(config, auto_class, most=MOST_COUNTED)
    tied = model.all_tied_weights_keys or {}
    counted = {name: parameter for name, parameter in model.named_parameters() if name not in tied}
    routed = (p.numel() for name, p in counted.items() if is_routed(name, p.shape, stock_text))
    return sum(parameter.numel() for parameter in counted.values()), sum(routed)


def empty_model(
    config: dict[str, Any], auto_class: str, dtype: torch.dtype = torch.float32, most: int | None = None
) -> Any:
    """Build the stock model of a config.json with buffers but no weights (parameters on the meta device).

    Args:
        config: the config.json.
        auto_class: name of the transformers auto class.
        dtype: dtype of the parameters.
        most: maximum number of parameter tensors, or None.

    Returns:
        The model, in evaluation mode and without gradients.

    Raises:
        HeadwiseError: the class cannot build a model from this config.
    """
    import transformers
    from transformers.initialization import no_init_weights

    try:
        stock = stock_config(config)
        attention = eager_if_capped(stock).get("attn_implementation", "sdpa")
        # Drawing random numbers for weights that are not there would be most of the time that this takes.
        with init_empty_weights(include_buffers=False), no_init_weights(), _at_most(most), _without_memory():
            model = _from_config(getattr(transformers, auto_class), stock, dtype, attention)
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


def eager_if_capped(stock: Any) -> dict[str, str]:
    """Return the argument of `from_pretrained` that computes soft-capped scores: only the eager form does.

    Args:
        stock: the stock config object.
    """
    capped = getattr(stock.get_text_config(), "attn_logit_softcapping", None)
    return {"attn_implementation": "eager"} if capped else {}


def _from_config(auto_class: Any, stock: Any, dtype: torch.dtype, attention: str) -> Any:
    """Return a stock model with this attention, or with eager attention where its class has no other."""
    try:
        return auto_class.from_config(stock, dtype=dtype, attn_implementation=attention)
    except ValueError as error:
        if attention not in str(error) and "scaled_dot_product_attention" not in str(error):
            raise
    return auto_class.from_config(stock, dtype=dtype, attn_implementation="eager")


@contextmanager
def _at_most(most: int | None) -> Iterator[None]:
    """Raise HeadwiseError when a model under construction registers more parameters than `most`."""
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


class _EmptyOnMeta(TorchFunctionMode):
    """Makes uninitialised tensors on the meta device: the experts of one layer alone can exceed the memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.empty:
            kwargs = {"device": "meta"} | {k: v for k, v in (kwargs or {}).items() if v is not None}
        return func(*args, **(kwargs or {}))


@contextmanager
def _without_memory() -> Iterator[None]:
    """Allocate no parameter of a model under construction, not even for the moment of its registration."""

    def allocate(module: nn.Module, name: str, buffer: Tensor | None) -> Tensor | None:
        return torch.empty_like(buffer, device="cpu") if buffer is not None and buffer.is_meta else None

    handle = register_module_buffer_registration_hook(allocate)  # type: ignore[arg-type]
    try:
        with _EmptyOnMeta():
            yield
    finally:
        handle.remove()


def load_model(
    checkpoint: Checkpoint,
    auto_class: str,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    **arguments: Any,
) -> Any:
    """Load a whole stock model with its weights.

    Args:
        checkpoint: a folder, or a GGUF file. Loading a GGUF file or a quantised folder temporarily holds its
            tensors in memory twice.
            The model has the checkpoint's config, which may differ from the folder's.
        auto_class: name of the transformers auto class.
        dtype: dtype of the weights.
        device: where they are loaded. The tensors of a plain folder go there one by one.
        arguments: more arguments of `from_pretrained`.

    Returns:
        The model.
    """
    import transformers

    config = stock_config(checkpoint.config)
    arguments = eager_if_capped(config) | arguments
    if checkpoint.gguf is None and checkpoint.quantized is None:
        if torch.device(device).type != "cpu":
            arguments["device_map"] = {"": torch.device(device)}
        with no_progress_bars():
            plain = getattr(transformers, auto_class).from_pretrained(
                checkpoint.folder, config=config, dtype=dtype, trust_remote_code=False, **arguments
            )
        for name, parameter in plain.named_parameters() if checkpoint.powers else ():
            parameter.data.mul_(2.0 ** -exponent_of(name, checkpoint.powers))
        return plain
    tensors = {name: checkpoint.read(name) for name in checkpoint.tensors}
    # The auto classes take no weights without a folder.
    stock_class = type(empty_model(checkpoint.config, auto_class))
    with no_progress_bars():
        model = stock_class.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype, **arguments)
    return model.to(device)


def load_into(model: Any, tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> Any:
    """Load checkpoint tensors into an empty stock model, with transformers' own renaming and fusing.

    Args:
        model: the empty stock model.
        tensors: tensors by their names in the checkpoint.
        device: device of the loaded parameters.

    Returns:
        transformers' account of missing, unexpected and mismatched keys.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    with no_progress_bars():
        info, _ = convert_and_load_state_dict_in_model(
            model,
            dict(tensors),
            LoadStateDictConfig(
                device_map={"": torch.device(device)},
                dtype=next(model.parameters()).dtype,
                weight_mapping=get_model_conversion_mapping(model),  # type: ignore[arg-type]
            ),
        )
    return info


def layer_arguments(
    model: Any,
    layer_path: str,
    length: int,
    dtype: torch.dtype,
    states: Mapping[str, Tensor] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Return the arguments of each layer's attention besides its input, for sequences of `length`.

    Args:
        model: the stock model; it may be empty, because the result does not depend on weights.
        layer_path: path of its decoder layers, "model.layers.{layer}".
        length: number of tokens.
        dtype: dtype of the hidden states.
        states: what cross-attention reads, by the name of the argument.
    """
    path = layer_path.rpartition(".")[0]
    text, layers = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    with torch.no_grad(), capture_layer_calls(layers) as stubs, suppress(StopForward):
        embedded = torch.zeros(1, length, text.config.hidden_size, dtype=dtype)
        text(inputs_embeds=embedded, **states, use_cache=False)
    return [_attention_arguments(stub) for stub in stubs]


def for_rows(arguments: Mapping[str, Any], names: Collection[str], rows: int) -> dict[str, Any]:
    """Return arguments with those of one sequence repeated for several.

    Args:
        arguments: of a layer or of its attention.
        names: of the arguments that a module takes with a row for each sequence, such as the encoder's states.
        rows: number of sequences.
    """
    each = {*names, SELECTION}
    return {k: v.expand(rows, *v.shape[1:]) if k in each and v is not None else v for k, v in arguments.items()}


def move_to_device(value: Any, device: torch.device) -> Any:
    """Move the tensors inside dictionaries and tuples, such as the arguments of a layer.

    Args:
        value: a tensor, a dictionary or a tuple. Any other value is returned unchanged.
        device: device of the result.

    Returns:
        The value, with its tensors on `device`.
    """
    if isinstance(value, dict):
        return {key: move_to_device(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(move_to_device(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _attention_arguments(stub: LayerStub) -> dict[str, Any]:
    """Return the keyword arguments of a layer's attention, with positional arguments of the layer by name."""
    names = list(inspect.signature(type(stub.layer).forward).parameters)[2:]
    given = {**dict(zip(names, stub.args, strict=False)), **stub.kwargs}
    return {name: value for name, value in given.items() if name not in ("use_cache", *CACHE_ARGUMENTS)}


@contextmanager
def capture_layer_calls(layers: nn.ModuleList, *, stop: bool = True) -> Iterator[list[LayerStub]]:
    """Replace decoder layers by stubs that record their arguments, until the context ends.

    Args:
        layers: the decoder layers of a model, replaced in place.
        stop: raise StopForward in the last layer.

    Yields:
        The stubs, in the order of the layers.
    """
    real = list(layers)
    stubs = [LayerStub(layer, last=stop and layer is real[-1]) for layer in real]
    for i, stub in enumerate(stubs):
        layers[i] = stub
    try:
        yield stubs
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer


def run_check(check: Callable[..., tuple[bool, str]], *given: Any, **more: Any) -> tuple[bool, str]:
    """Run a check of a stock model, and report any error of the stock class as a failure.

    A stock class can accept a config and still fail on it with any kind of error.

    Args:
        check: a function that returns whether the check passed, and a detail.
        given: positional arguments of `check`.
        more: keyword arguments of `check`.

    Returns:
        The result of `check`, or False and the error.

    Raises:
        HeadwiseError: `check` raised it.
        MemoryError: `check` raised it, or torch's own error of this kind.
    """
    try:
        return check(*given, **more)
    except Exception as error:
        if isinstance(error, HeadwiseError) or is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split()).rstrip(".")
        return False, f"the stock class fails with {type(error).__name__}: {reason}"


class StopForward(Exception):
    """Ends a recording run before the model needs weights that come after its layers."""


class LayerStub(nn.Module):
    """Replaces a decoder layer, and records the arguments of its call."""

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self._layer, self._last = (layer,), last  # in a tuple: not a submodule
        self.was_called = False

    @property
    def layer(self) -> nn.Module:
        """The decoder layer that this stub replaces."""
        return self._layer[0]

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the decoder layer, such as its attention type, which some models read."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Record the arguments and return the hidden states unchanged.

        A layer that passes on the keys that its indexer selects passes on all of them.

        Args:
            hidden_states: the input of the layer.
            args: further positional arguments of the layer.
            kwargs: keyword arguments of the layer.

        Raises:
            StopForward: this is the last layer.
        """
        self.hidden, self.args, self.kwargs, self.was_called = hidden_states, args, kwargs, True
        if self._last:
            raise StopForward
        if SELECTION in kwargs:
            rows, tokens = hidden_states.shape[:2]
            return hidden_states, torch.arange(tokens, device=hidden_states.device).expand(rows, tokens, tokens)
        return hidden_states
