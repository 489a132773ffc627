"""A stock model of which one decoder layer at a time is real.

The model is built from its stock class without weights. One run over a single sequence, with every decoder layer
replaced by a stub that notes what it is given, yields the embedding's output and the arguments (masks, rotary
tables) of each layer exactly as the model's own forward makes them. From then on only one layer's weights are in
memory: they are loaded by transformers' own loader, the layer is run over all sequences, its attention's inputs
and outputs are noted, and the weights are let go.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from headwise.convert.architecture import Architecture
from headwise.convert.checkpoint import Checkpoint

# Tokens run through a layer at once: bounds the memory of the widest intermediate, not the result.
TOKENS_AT_ONCE = 4096
# Sequences whose attention weights are looked at (each costs heads x length^2 numbers), and of how many queries,
# evenly spread, the averaged input is worked out.
SEQUENCES_LOOKED_AT = 16
QUERIES_LOOKED_AT = 64


@dataclass
class LayerRecord:
    """What one layer's attention saw and did, over all calibration tokens.

    Attributes:
        index: of the decoder layer.
        moment: E[x x^T] of the attention input with a constant 1 appended, (D + 1, D + 1), float64.
        value_moment: E[y y^T] of y = [sum_n p_n x_n; 1], the inputs averaged by the attention weights p of a head,
            over queries and heads, (D + 1, D + 1), float64: what values are read through. None unless asked for.
        distances: attention weight by distance per head, (heads, length), each row summing to one; None unless
            asked for.
        inputs, outputs: (sequences, length, D) float32 on the CPU; None unless asked for.
        arguments: what else the attention module is called with, for a batch of any size.
        tokens: how many were seen.
    """

    index: int
    moment: Tensor
    value_moment: Tensor | None = None
    distances: Tensor | None = None
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0


def stock_config(config: dict[str, Any]) -> Any:
    """The stock configuration object of a config.json; never remote code."""
    import transformers

    plain = {k: v for k, v in config.items() if k != "auto_map"}
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(plain)


def empty_model(config: dict[str, Any], auto_class: str, dtype: torch.dtype = torch.float32) -> Any:
    """The stock model of a config.json with buffers but no weights (parameters on the meta device)."""
    import transformers

    stock = stock_config(config)
    # Only the eager form knows soft-capped scores.
    capped = getattr(stock.get_text_config(), "attn_logit_softcapping", None)
    with init_empty_weights(include_buffers=False):
        model = getattr(transformers, auto_class).from_config(
            stock, dtype=dtype, attn_implementation="eager" if capped else "sdpa"
        )
    return model.eval().requires_grad_(False)


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


class LayerStream:
    """Runs token sequences through a checkpoint, layer by layer.

    Args:
        checkpoint: the source.
        architecture: its row.
        tokens: (sequences, length), integers below the vocabulary size.
        device: where a layer is computed.
    """

    def __init__(
        self, checkpoint: Checkpoint, architecture: Architecture, tokens: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self._device = torch.device(device)
        self._model = empty_model(checkpoint.config, architecture.auto_class)
        self._layers: nn.ModuleList = self._model.get_submodule(architecture.module.rpartition(".")[0])
        self._names: list[list[str]] = [[] for _ in self._layers]
        self._other: list[str] = []
        prefixes = {architecture.layers[0].format(layer=i) + ".": i for i in range(len(self._layers))}
        depth = architecture.layers[0].count(".") + 1
        for name in checkpoint.tensors:
            head = ".".join(name.split(".")[:depth]) + "."
            (self._names[prefixes[head]] if head in prefixes else self._other).append(name)
        self._hidden, self._arguments = self._embed(tokens)

    def __iter__(self) -> Iterator[LayerRecord]:
        return self.records()

    def records(
        self, *, keep: bool = False, look: bool = True, only: Collection[int] | None = None
    ) -> Iterator[LayerRecord]:
        """One record per layer, in order; the next layer's inputs are this layer's outputs.

        Args:
            keep: also keep the attention's inputs and outputs of the layer.
            look: also take `value_moment` and `distances` from the attention weights of some sequences.
            only: layers to record. Those before them are run and passed over, those after the last are not run.
        """
        wanted = set(range(len(self._layers)) if only is None else only)
        for index in range(max(wanted, default=-1) + 1):
            with self._real_layer(index) as layer:
                if index in wanted:
                    yield self._run(index, layer, keep, look)
                else:
                    self._pass(index, layer)

    @torch.no_grad()
    def _pass(self, index: int, layer: nn.Module) -> None:
        """Run a layer without looking at it."""
        args, kwargs = self._arguments[index]
        for part in self._parts():
            self._hidden[part] = _first(layer(self._hidden[part].to(self._device), *args, **kwargs)).cpu()

    def _parts(self) -> list[slice]:
        sequences, length, _ = self._hidden.shape
        step = max(1, TOKENS_AT_ONCE // length)
        return [slice(start, start + step) for start in range(0, sequences, step)]

    @torch.no_grad()
    def _run(self, index: int, layer: nn.Module, keep: bool, look: bool) -> LayerRecord:
        attention = layer.get_submodule(self._architecture.attention)
        args, kwargs = self._arguments[index]
        sequences, length, width = self._hidden.shape
        moment = torch.zeros(width + 1, width + 1, dtype=torch.float64, device=self._device)
        record = LayerRecord(index, moment, tokens=sequences * length)
        if keep:
            record.inputs, record.outputs = torch.empty_like(self._hidden), torch.empty_like(self._hidden)
        seen: dict[str, Any] = {}
        view = _View()

        def note(module: nn.Module, call_args: tuple, call_kwargs: dict, output: Any) -> None:
            seen["x"] = call_kwargs.get("hidden_states", call_args[0] if call_args else None)
            seen["y"] = _first(output)
            seen["kwargs"] = {k: v for k, v in call_kwargs.items() if k != "hidden_states"}

        handle = attention.register_forward_hook(note, with_kwargs=True)
        for part in self._parts():
            out = layer(self._hidden[part].to(self._device), *args, **kwargs)
            x = seen["x"]
            flat = torch.cat([x, torch.ones_like(x[..., :1])], -1).flatten(0, 1)
            moment += (flat.mT @ flat).double()
            if record.inputs is not None and record.outputs is not None:
                record.inputs[part], record.outputs[part] = x.cpu(), seen["y"].cpu()
            if look and part.start < SEQUENCES_LOOKED_AT:
                view.add(attention, x[: SEQUENCES_LOOKED_AT - part.start], seen["kwargs"])
            self._hidden[part] = _first(out).cpu()
        handle.remove()
        moment /= record.tokens
        if look:
            record.value_moment, record.distances = view.result()
        record.arguments = seen["kwargs"]
        return record

    @contextmanager
    def _real_layer(self, index: int) -> Iterator[nn.Module]:
        layer = self._layers[index]
        load_into(self._model, {n: self._checkpoint.read(n) for n in self._names[index]}, self._device)
        try:
            yield layer.to(self._device)  # buffers follow the weights
        finally:
            layer.to("meta")

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> tuple[Tensor, list[tuple[tuple, dict[str, Any]]]]:
        """Hidden states before the first layer, and what each layer is called with besides them."""
        output_weights = self._model.get_output_embeddings()
        skipped = {id(p) for p in output_weights.parameters()} if output_weights is not None else set()
        inputs = self._model.get_input_embeddings()
        skipped -= {id(p) for p in inputs.parameters()}
        names = {n for n, p in self._model.named_parameters() if id(p) in skipped}
        load_into(self._model, {n: self._checkpoint.read(n) for n in self._other if n not in names}, self._device)
        base = self._model.base_model
        for module in base.modules():  # rotary tables are buffers, made where the model was
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        hidden = []
        with _recorded(self._layers) as stubs:
            for row in tokens.split(1):
                with suppress(_Stop):
                    base(input_ids=row.to(self._device), use_cache=False)
                hidden.append(stubs[0].hidden.cpu())
        for name, parameter in self._model.named_parameters():
            if parameter.device.type != "meta":
                owner, _, leaf = name.rpartition(".")
                setattr(self._model.get_submodule(owner), leaf, nn.Parameter(parameter.to("meta"), False))
        return torch.cat(hidden), [(stub.args, stub.kwargs) for stub in stubs]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def layer_arguments(
    model: Any, architecture: Architecture, length: int, dtype: torch.dtype
) -> list[dict[str, Any]]:
    """What each layer's attention is called with besides its input, for sequences of `length`.

    `model` may be empty: no weight takes part.
    """
    path = architecture.module.rpartition(".")[0]
    text, layers = model.get_submodule(path.rpartition(".")[0]), model.get_submodule(path)
    with torch.no_grad(), _recorded(layers) as stubs, suppress(_Stop):
        text(inputs_embeds=torch.zeros(1, length, text.config.hidden_size, dtype=dtype), use_cache=False)
    return [_attention_arguments(stub) for stub in stubs]


def _attention_arguments(stub: _Stub) -> dict[str, Any]:
    """A decoder layer hands its keyword arguments on to its attention; positional ones are matched by name."""
    names = list(inspect.signature(type(stub.layer).forward).parameters)[2:]
    given = {**dict(zip(names, stub.args, strict=False)), **stub.kwargs}
    return {name: value for name, value in given.items() if name not in ("use_cache", "past_key_values")}


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[_Stub]]:
    """Stubs in the place of decoder layers, for the time of a run."""
    real = list(layers)
    stubs = [_Stub(layer, last=layer is real[-1]) for layer in real]
    for i, stub in enumerate(stubs):
        layers[i] = stub
    try:
        yield stubs
    finally:
        for i, layer in enumerate(real):
            layers[i] = layer


class _View:
    """Attention weights, summed up: over distances, and over the inputs they average."""

    def __init__(self) -> None:
        self._moment: Tensor | None = None
        self._distances: Tensor | None = None
        self._count = 0

    def add(self, attention: Any, inputs: Tensor, arguments: dict[str, Any]) -> None:
        """Look at (sequences, length, D) inputs through the module's own eager attention."""
        length = inputs.shape[1]
        index = torch.arange(length, device=inputs.device)
        distance = (index[:, None] - index[None]).clamp_min(0).flatten()
        queries = index[:: max(1, length // QUERIES_LOOKED_AT)]
        arguments = {**arguments, "attention_mask": _additive_mask(arguments.get("attention_mask"), inputs)}
        before = attention.config._attn_implementation
        attention.config._attn_implementation = "eager"
        try:
            for row in inputs.split(1):
                weights = attention(hidden_states=row, **arguments)[1][0]  # (heads, length, length)
                found = weights.new_zeros(weights.shape[0], length, dtype=torch.float64)
                found.index_add_(1, distance, weights.tril().flatten(1).double())
                averaged = (weights[:, queries] @ row[0]).flatten(0, 1)
                averaged = torch.cat([averaged, torch.ones_like(averaged[:, :1])], 1)
                moment = (averaged.mT @ averaged).double()
                self._moment = moment if self._moment is None else self._moment + moment
                self._distances = found if self._distances is None else self._distances + found
                self._count += len(averaged)
        finally:
            attention.config._attn_implementation = before

    def result(self) -> tuple[Tensor, Tensor]:
        assert self._moment is not None and self._distances is not None
        return self._moment / self._count, (self._distances / self._distances.sum(-1, keepdim=True)).cpu()


def _additive_mask(mask: Tensor | None, inputs: Tensor) -> Tensor:
    """The mask eager attention adds to the scores, from whichever form the model made for its own attention."""
    least = torch.finfo(inputs.dtype).min
    if mask is None:
        length = inputs.shape[1]
        return torch.full((1, 1, length, length), least, device=inputs.device).triu(1)
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=inputs.dtype).masked_fill(~mask, least)
    return mask


class _Stop(Exception):
    """Ends the recording run before the model needs weights that come after its layers."""


class _Stub(nn.Module):
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
            raise _Stop
        return hidden_states
