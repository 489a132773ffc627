"""Run calibration text through the parent with one decoder layer's weights in memory at a time.

The model is built from its stock class on the meta device. One run over a single sequence, with every decoder layer
replaced by a stub, records the embedding's output and the arguments (masks, rotary tables) that the model's own
forward passes to each layer. After that the layers run one by one: transformers' own loader fills a layer, the
layer runs over all sequences, hooks record its attention's inputs and outputs, and the weights are freed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from headwise.convert.calibration.attention_stats import TINY, AttentionStats, first_position
from headwise.convert.calibration.norm_stats import CrossMoment, NormedProjections
from headwise.cuda import ReadAhead
from headwise.environment import available_memory
from headwise.io.reader import Checkpoint
from headwise.models.protocol import AttentionModel
from headwise.models.stock import StopForward, capture_layer_calls, empty_model, for_rows, load_into, move_to_device

# Tokens run through a layer at once: bounds the memory of the widest intermediate, not the result.
TOKENS_AT_ONCE = 4096
# Hidden states, and the inputs and outputs of a layer, stay on a GPU if each take no more than this share of its
# free memory. Copied to fresh memory of the host, those of a 7B layer (32,768 tokens) took 1.5 s.
SHARE_OF_HIDDEN = 0.1
# Sequences whose attention weights are measured; each takes heads x length^2 numbers.
NUM_ATTENTION_SEQUENCES = 16


@dataclass
class LayerRecord:
    """Statistics of one layer's attention over all calibration tokens but the first of each sequence.

    Attributes:
        index: of the decoder layer.
        moment: E[x x^T] of the attention input with a constant 1 appended, (D + 1, D + 1), float64. It is the
            identity where the model skips the layer.
        value_moment: E[y y^T] of y = [sum_n p_n x_n; 1], the inputs averaged by the attention weights p of a head,
            over queries and heads, (D + 1, D + 1), float64: the moment that errors of values are weighted by. None
            without attention statistics.
        key_moment: E[x x^T] over tokens, each weighted by the attention it gets, of the shape of `moment`. None
            without attention statistics.
        distances: attention weight by distance per head, (heads, length), without position 0; each row sums to one.
            None without attention statistics.
        query_cross: E[q x^T] of the normed queries of each head, before RoPE, over tokens, (H, head_dim, D + 1),
            float64. None without norms, or where the target has no use for it.
        key_cross: E[k x^T] of the normed keys, each token weighted by the attention it gets as in `key_moment`,
            (G, head_dim, D + 1).
        query_scales: means of the norm's scale s, of s^2 and of |q|^2 for each head, and the number of tokens (the
            effective number, where they are weighted), (4, H), like `query_cross`.
        key_scales: the same of the keys, (4, G), like `key_cross`.
        states_moment: E[x x^T] of the encoder's output with a constant 1 appended, float64: the keys and values of
            cross-attention are made from it. In merged attention, the same of its input and the encoder's output
            together, each token weighted by the attention it gets. None for other attention.
        inputs: of the attention, (sequences, length, D) float32, on the CPU or a GPU with room; None unless kept.
        outputs: of the attention, like `inputs`; zero at padding.
        arguments: further arguments of the attention module, for a batch of any size.
        rows: further arguments with an entry for every sequence, on the CPU.
        calls: for sequences of different lengths, the shape and the further arguments of each, on the CPU.
        roots: (sequences, length) the root of each token's weight, 0 for padding; None: all tokens count alike.
        tokens: number of tokens measured.
        weights: tensors of the attention as the checkpoint has them, by name, where the layer ran; none: not kept.
    """

    index: int
    moment: Tensor
    value_moment: Tensor | None = None
    key_moment: Tensor | None = None
    distances: Tensor | None = None
    query_cross: Tensor | None = None
    key_cross: Tensor | None = None
    query_scales: Tensor | None = None
    key_scales: Tensor | None = None
    states_moment: Tensor | None = None
    inputs: Tensor | None = None
    outputs: Tensor | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Tensor] = field(default_factory=dict)
    calls: list[tuple[torch.Size, dict[str, Any]]] = field(default_factory=list)
    roots: Tensor | None = None
    tokens: int = 0
    weights: dict[str, Tensor] = field(default_factory=dict)

    def moments(self) -> dict[str, Tensor]:
        """Return the second moments that were measured, by name."""
        names = ("moment", "key_moment", "value_moment", "states_moment")
        return {name: moment for name in names if (moment := getattr(self, name)) is not None}

    def norm_moments(self) -> dict[str, Tensor]:
        """Return what was measured of the norms on queries and keys, by name; empty if nothing was."""
        names = ("query_cross", "key_cross", "query_scales", "key_scales")
        return {name: moment for name in names if (moment := getattr(self, name)) is not None}


class AttentionRecorder:
    """Measure one attention module while its layer runs.

    Args:
        index: of the layer.
        module: the attention module.
        sequences: number of sequences.
        device: where the module runs.
        keep_activations: keep the inputs and outputs.
        attention_stats: measure attention weights, on some of the sequences.
        normed: the layer's normed queries and keys, whose moments are also taken; None: they are not.
        states: the argument that keys and values are made from in cross-attention; None: from the input.
        separate: whether every sequence is a call of its own, of its own length.
        merged: the mask argument of merged attention, which also makes keys and values from the input.
    """

    def __init__(
        self,
        index: int,
        module: nn.Module,
        sequences: int,
        device: torch.device,
        *,
        keep_activations: bool,
        attention_stats: bool,
        normed: NormedProjections | None = None,
        states: str | None = None,
        separate: bool = False,
        merged: str | None = None,
    ) -> None:
        self._index, self._module, self._sequences, self._device = index, module, sequences, device
        self._separate, self._kept = separate, list[tuple[Tensor, Tensor, Tensor]]()
        self._keep, self._stats, self._normed, self._states = keep_activations, attention_stats, normed, states
        self._view, self._queries = AttentionStats(normed, states, merged), CrossMoment()
        self._merged = merged is not None
        self._moment: Tensor | None = None
        self._states_moment: Tensor | None = None
        self._tokens, self._weight, self._states_tokens = 0, 0.0, 0
        self._record = LayerRecord(index, torch.empty(0))
        self._seen: dict[str, Any] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._roots: list[Tensor] = []
        self._handle = module.register_forward_hook(self._note, with_kwargs=True)

    def _note(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._seen = {
            "x": kwargs.get("hidden_states", args[0] if args else None),
            "y": _first(output),
            "kwargs": {k: v for k, v in kwargs.items() if k != "hidden_states"},
        }

    def add(self, part: slice, valid: Tensor | None = None, states_valid: Tensor | None = None) -> None:
        """Add the call that the module just had.

        Args:
            part: the sequences of that call.
            valid: (sequences, length) how much each token counts, 0 or False for padding; None: all count alike.
            states_valid: true where a token, or a tile of tokens, that cross-attention reads is no padding.
        """
        # The patches of images are one sequence, in a tensor without sequences.
        x, y = (t if t.ndim > 2 else t[None] for t in (self._seen["x"], self._seen["y"]))
        kwargs = self._seen["kwargs"]
        first = first_position(x.shape[1])
        flat = _with_one(x)[:, first:]
        if valid is None:
            flat, weight = flat.flatten(0, 1), None
        else:
            weight = valid[:, first:][valid[:, first:] > 0].to(flat)
            flat = flat[valid[:, first:] > 0]
        self._moment = _added(self._moment, flat if weight is None else flat * weight.sqrt()[:, None])
        self._tokens += len(flat)
        self._weight += len(flat) if weight is None else float(weight.double().sum())
        if self._normed is not None:
            self._queries.add(flat, self._normed.queries(flat))
        states = kwargs[self._states] if self._states and not self._merged else None
        if states is not None:
            read = _with_one(states if states_valid is None else states[states_valid]).flatten(0, -2)
            self._states_moment = _added(self._states_moment, read)
            self._states_tokens += len(read)
        if self._keep:
            self._store(part, x, y, kwargs, valid)
        if self._stats and part.start < NUM_ATTENTION_SEQUENCES:
            self._view.add(self._module, x, kwargs, valid=valid, most=NUM_ATTENTION_SEQUENCES - part.start)

    def _store(self, part: slice, x: Tensor, y: Tensor, kwargs: dict[str, Any], valid: Tensor | None) -> None:
        record = self._record
        roots = torch.ones_like(y[..., 0]) if valid is None else valid.to(y).sqrt()
        if self._separate:
            record.calls.append((self._seen["x"].shape, move_to_device(kwargs, torch.device("cpu"))))
            self._kept.append((x[0].cpu(), (y * roots[..., None])[0].cpu(), roots[0].cpu()))
            return
        if record.inputs is None or record.outputs is None:
            size = sum(self._sequences * math.prod(t.shape[1:]) * t.element_size() for t in (x, y))
            device = self._device if _has_room(self._device, size) else torch.device("cpu")
            record.inputs, record.outputs = (
                t.new_empty(self._sequences, *t.shape[1:], device=device) for t in (x, y)
            )
        if valid is not None:
            y = y * roots[..., None]
            self._roots.append(roots.cpu())
            for name, value in kwargs.items():
                if isinstance(value, Tensor) and value.ndim > 2 and len(value) == len(x):
                    self._rows.setdefault(name, []).append(value.cpu())
        record.inputs[part], record.outputs[part] = x, y

    def result(self) -> LayerRecord:
        """Return what was measured, and stop measuring."""
        self._handle.remove()
        record = self._record
        assert self._moment is not None
        record.moment, record.tokens = self._moment / max(self._weight, TINY), self._tokens
        if self._states_moment is not None:
            record.states_moment = self._states_moment / max(self._states_tokens, 1)
        if self._stats:
            record.value_moment, record.key_moment, record.distances = self._view.result()
            if self._merged:
                record.states_moment = record.key_moment
        if self._normed is not None:
            record.query_cross, record.query_scales = self._queries.result()
            if self._stats:
                record.key_cross, record.key_scales = self._view.keys.result()
        if self._kept:
            padded = (pad_sequence(list(each), batch_first=True) for each in zip(*self._kept, strict=True))
            record.inputs, record.outputs, record.roots = padded
            return record
        record.rows = {name: torch.cat(values) for name, values in self._rows.items()}
        record.roots = torch.cat(self._roots) if self._roots else None
        record.arguments = {k: v for k, v in self._seen["kwargs"].items() if k not in record.rows}
        return record


class LayerStream:
    """Run token sequences through a checkpoint, layer by layer.

    Args:
        checkpoint: the source.
        architecture: its row.
        tokens: (sequences, length), integers below the vocabulary size.
        device: where a layer is computed.
        config: a config that gives the same weights other positions, in place of the checkpoint's own;
            `architecture` is then the row of that config.
        dtype: in which layers are computed.
        stored: round the weights to this dtype first; None: they stay as they are.
        states: what cross-attention reads, (1, tokens, width) by the name of the argument; none: its layers are
            skipped, as the model skips them without an image.
        attention: computes the output of a layer's attention from the layer's index and the attention's input, both
            on the CPU, in place of the stock module; None: the stock module does.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: AttentionModel,
        tokens: Tensor,
        device: torch.device | str = "cpu",
        config: dict[str, Any] | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        stored: torch.dtype | None = None,
        states: Mapping[str, Tensor] = MappingProxyType({}),
        attention: Callable[[int, Tensor], Tensor] | None = None,
    ) -> None:
        self._checkpoint, self._architecture = checkpoint, architecture
        self._device = torch.device(device)
        self._tokens, self._stored, self._attention = tokens, stored, attention
        self._states = {name: value.to(device, dtype) for name, value in states.items()}
        self._more: tuple[Any, ...] | None = None  # what a layer returns beside the hidden states, in a tuple
        self._reader = ReadAhead(checkpoint.read, self._device)
        self._weights: dict[str, Tensor] = {}  # of the present layer's attention
        self._model = empty_model(config or checkpoint.config, architecture.auto_class, dtype)
        if dtype == torch.float64:  # the usual grouped experts compute in no such dtype
            self._model.set_experts_implementation("eager")
        self._layers: nn.ModuleList = self._model.get_submodule(architecture.module.rpartition(".")[0])
        self._names: list[list[str]] = [[] for _ in self._layers]
        self._other: list[str] = []
        prefixes = {architecture.layers[0].format(layer=i) + ".": i for i in range(len(self._layers))}
        depth = architecture.layers[0].count(".") + 1
        for name in checkpoint.tensors:
            head = ".".join(name.split(".")[:depth]) + "."
            (self._names[prefixes[head]] if head in prefixes else self._other).append(name)
        hidden, self._arguments = self._embed(tokens)
        self._hidden = hidden.to(self._device) if _has_room(self._device, hidden.nbytes) else hidden

    def __iter__(self) -> Iterator[LayerRecord]:
        return self.records()

    def records(
        self,
        *,
        keep_activations: bool = False,
        attention_stats: bool = True,
        layers: Iterable[int] | None = None,
        normed: Callable[[int], NormedProjections] | None = None,
    ) -> Iterator[LayerRecord]:
        """Yield one record per layer, in order; each layer's outputs are the next one's inputs.

        Args:
            keep_activations: also keep the inputs and outputs of the layer's attention.
            attention_stats: also measure `value_moment`, `key_moment` and `distances`, on some of the sequences.
            layers: layers to record, ascending; None: all with attention. Each is drawn when the one before it is
                done. Layers between them run without a record, layers after the last do not run.
            normed: returns a layer's normed queries and keys, whose moments are then measured too.
        """
        at = 0
        attending = filter(self._attends, range(len(self._layers)))
        for index in attending if layers is None else layers:
            for between in range(at, index):
                with self._real_layer(between) as layer:
                    self._pass(between, layer)
            with self._real_layer(index) as layer:
                rows = normed(index) if normed else None
                record = self._run(index, layer, keep_activations, attention_stats, rows)
            at = index + 1
            yield record  # outside the context: the layer's weights are freed
            del record  # free its memory before the next layer runs

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Run all layers and return the model's logits, (sequences, length, vocabulary)."""
        for index in range(len(self._layers)):
            with self._real_layer(index) as layer:
                self._pass(index, layer)
        self._load(self._other)
        self._model.tie_weights()
        logits = []
        with capture_layer_calls(self._layers, stop=False) as stubs:
            for row, hidden in zip(self._tokens.split(1), self._hidden.split(1), strict=True):
                last = hidden.to(self._device)
                output = last if self._more is None else (last, *self._more)
                handles = [stub.register_forward_hook(lambda *_, output=output: output) for stub in stubs]
                logits.append(self._model(input_ids=row.to(self._device), use_cache=False).logits.cpu())
                for handle in handles:
                    handle.remove()
        self._unload()
        return torch.cat(logits)

    def _attends(self, index: int) -> bool:
        """Return whether a layer has attention: the linear layers of a hybrid model have none."""
        try:
            return self._model.get_submodule(self._architecture.attention_path(index)) is not None
        except AttributeError:
            return False

    @torch.no_grad()
    def _pass(self, index: int, layer: nn.Module) -> None:
        """Run a layer without recording it."""
        called = self._arguments[index]
        for part in self._parts() if called else ():
            output = self._call(layer, called, part)
            self._more = output[1:] if isinstance(output, tuple) else None
            self._hidden[part] = _first(output)

    def _parts(self) -> list[slice]:
        sequences, length, _ = self._hidden.shape
        step = max(1, TOKENS_AT_ONCE // length)
        return [slice(start, start + step) for start in range(0, sequences, step)]

    @torch.no_grad()
    def _run(
        self,
        index: int,
        layer: nn.Module,
        keep_activations: bool,
        attention_stats: bool,
        normed: NormedProjections | None,
    ) -> LayerRecord:
        called = self._arguments[index]
        if called is None:
            return LayerRecord(
                index, torch.eye(self._hidden.shape[2] + 1, dtype=torch.float64, device=self._device)
            )
        recorder = AttentionRecorder(
            index,
            self._model.get_submodule(self._architecture.attention_path(index)),
            len(self._hidden),
            self._device,
            keep_activations=keep_activations,
            attention_stats=attention_stats,
            normed=normed,
        )
        for part in self._parts():
            out = self._call(layer, called, part)
            recorder.add(part)
            self._hidden[part] = _first(out)
        record = recorder.result()
        record.weights, self._weights = self._weights, {}
        return record

    def _call(self, layer: nn.Module, called: tuple[tuple[Any, ...], dict[str, Any]] | None, part: slice) -> Any:
        """Return the output of a layer for some of the sequences."""
        assert called is not None
        args, kwargs = called
        hidden = self._hidden[part].to(self._device)
        return layer(hidden, *args, **for_rows(kwargs, self._states, len(hidden)))

    @contextmanager
    def _real_layer(self, index: int) -> Iterator[nn.Module]:
        layer = self._layers[index]
        tensors, own = self._load(self._names[index]), self._architecture.prefix(index)
        self._weights = {name: tensor for name, tensor in tensors.items() if name.startswith(own)}
        del tensors
        if index + 1 < len(self._names):
            self._reader.begin(self._names[index + 1])
        with self._replaced_attention(index):
            try:
                yield layer.to(self._device)  # buffers follow the weights
            finally:
                layer.to("meta")

    @contextmanager
    def _replaced_attention(self, index: int) -> Iterator[None]:
        attend = self._attention
        if attend is None or not self._attends(index):
            yield
            return

        def replace(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            new = attend(index, inputs.cpu()).to(inputs.device)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        module = self._model.get_submodule(self._architecture.attention_path(index))
        handle = module.register_forward_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def _embed(self, tokens: Tensor) -> tuple[Tensor, list[tuple[tuple[Any, ...], dict[str, Any]] | None]]:
        """Return the hidden states before the first layer and each layer's arguments; None: it is skipped."""
        output_weights = self._model.get_output_embeddings()
        skipped = {id(p) for p in output_weights.parameters()} if output_weights is not None else set()
        inputs = self._model.get_input_embeddings()
        skipped -= {id(p) for p in inputs.parameters()}
        names = {n for n, p in self._model.named_parameters() if id(p) in skipped}
        self._load([name for name in self._other if name not in names])
        base = self._model.base_model
        for module in base.modules():  # rotary tables are buffers, made where the model was
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        hidden = []
        with capture_layer_calls(self._layers) as stubs:
            for row in tokens.split(1):
                with suppress(StopForward):
                    base(input_ids=row.to(self._device), **self._states, use_cache=False)
                hidden.append(stubs[0].hidden.cpu())
        self._unload()
        return torch.cat(hidden), [(stub.args, stub.kwargs) if stub.was_called else None for stub in stubs]

    def _load(self, names: Collection[str]) -> dict[str, Tensor]:
        """Load tensors of the checkpoint into the model, and return them as they are there, on the device."""
        read, gpu = self._reader.take(names), self._device.type == "cuda"
        # Moved first: the device changes their dtype, and fewer bytes are moved.
        tensors = {name: read.pop(name).to(self._device, non_blocking=gpu) for name in names}
        stored = tensors
        if self._stored is not None:
            stored = {n: t.to(self._stored) if t.is_floating_point() else t for n, t in tensors.items()}
        load_into(self._model, stored, self._device)
        return tensors

    def _unload(self) -> None:
        """Free all weights."""
        for name, parameter in list(self._model.named_parameters(remove_duplicate=False)):
            if parameter.device.type != "meta":
                owner, _, leaf = name.rpartition(".")
                setattr(self._model.get_submodule(owner), leaf, nn.Parameter(parameter.to("meta"), False))


def _has_room(device: torch.device, nbytes: int) -> bool:
    """Return whether a device is a GPU on which states of all tokens leave most of the memory free."""
    return device.type == "cuda" and SHARE_OF_HIDDEN * (available_memory(device) or 0) > nbytes


def _with_one(x: Tensor) -> Tensor:
    """Return inputs with a constant 1 appended."""
    return torch.cat([x, torch.ones_like(x[..., :1])], -1)


def _added(moment: Tensor | None, flat: Tensor) -> Tensor:
    """Return a sum of second moments, float64, with those of more inputs (tokens, D)."""
    more = (flat.mT @ flat).double()
    return more if moment is None else moment + more


def _first(output: Any) -> Tensor:
    result: Tensor = output[0] if isinstance(output, tuple) else output
    return result
