"""Run pairs of source and target through an encoder-decoder with one layer's weights in memory at a time.

The encoder's layers run first, then the decoder's on the encoder's output. Before each stack, the model's own
forward runs with stubs in place of layers. The stubs record what each layer gets: masks, rotary tables and the
encoder's states.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import TOKENS_AT_ONCE, AttentionRecorder, LayerRecord
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture
from headwise.models.stock import StopForward, capture_layer_calls, empty_model, load_into
from headwise.text.pairs import Pairs


@dataclass
class _Stack:
    """The layers of an encoder or a decoder, and how far they have run.

    Attributes:
        layers: the modules.
        inputs: of layer `number`, for each part of the pairs.
        outputs: of layer `number`; empty: it has not run.
        arguments: further arguments of every layer, for each part of the pairs.
        number: the next layer.
        tuples: whether the layers return tuples.
    """

    layers: nn.ModuleList
    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    arguments: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = field(default_factory=list)
    number: int = 0
    tuples: bool = False


class PairStream:
    """Run pairs through an encoder-decoder, layer by layer.

    Args:
        checkpoint: the source.
        architecture: its row, of several attention stacks.
        pairs: sources and targets.
        device: where a layer is computed.
        dtype: in which layers are computed.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        pairs: Pairs,
        device: torch.device | str = "cpu",
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self._checkpoint, self._architecture, self._pairs = checkpoint, architecture, pairs
        self._device = torch.device(device)
        self._model = empty_model(checkpoint.config, architecture.auto_class, dtype)
        self._stacks = {part.module: part.layers[0] for part in architecture.parts}  # naming in the checkpoint
        self._paths = list(self._stacks)
        prefixes = tuple(naming.split("{")[0] for naming in self._stacks.values())
        self._other = [name for name in checkpoint.tensors if not name.startswith(prefixes)]
        longest = max(pairs.sources.shape[1], pairs.targets.shape[1])
        step = max(1, TOKENS_AT_ONCE // longest)
        self._parts = [slice(start, start + step) for start in range(0, len(pairs), step)]

    @torch.no_grad()
    def records(
        self,
        *,
        keep_activations: bool = False,
        attention_stats: bool = True,
        layers: Iterable[int] | None = None,
    ) -> Iterator[LayerRecord]:
        """Yield one record per attention module, in the order in which the modules run.

        Args:
            keep_activations: also keep the inputs and outputs of the attention, and its arguments.
            attention_stats: also measure `value_moment` and `key_moment`, on some of the sequences.
            layers: indices of the modules to record, ascending; None: all. Each is drawn when the one before it is
                done.
        """
        self._load(self._other)
        self._model.tie_weights()
        for module in self._model.modules():  # rotary tables are buffers, made where the model was
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        self._ran: list[_Stack] = []
        running = self._enter(0)
        for index in range(len(self._architecture.order)) if layers is None else layers:
            part, number = self._architecture.at(index)
            while self._paths[len(self._ran)] != part.module:
                running = self._leave(running)
            while running.number < number:
                self._pass(running)
            recorder = AttentionRecorder(
                index,
                self._model.get_submodule(self._architecture.attention_path(index)),
                len(self._pairs),
                self._device,
                keep_activations=keep_activations,
                attention_stats=attention_stats,
                states=part.states,
                merged=part.merged,
            )
            self._run(running, recorder)
            record = recorder.result()
            yield record
            del record  # free its memory before the next layer runs

    def _run(self, stack: _Stack, recorder: AttentionRecorder | None = None) -> None:
        """Run the layer that a stack is at, and keep its outputs beside its inputs: a layer has several modules."""
        naming = self._stacks[self._paths[len(self._ran)]]
        prefix = f"{naming.format(layer=stack.number)}."
        self._load([name for name in self._checkpoint.tensors if name.startswith(prefix)])
        layer = stack.layers[stack.number].to(self._device)
        stack.outputs = []
        for i, part in enumerate(self._parts):
            args, kwargs = stack.arguments[i][stack.number]
            output = layer(stack.inputs[i].to(self._device), *args, **kwargs)
            stack.tuples = isinstance(output, tuple)
            stack.outputs.append((output[0] if isinstance(output, tuple) else output).cpu())
            if recorder is not None:
                encoder = not self._ran and len(self._paths) > 1
                valid = self._pairs.source_mask if encoder else self._pairs.target_mask
                recorder.add(part, valid[part].to(self._device), self._pairs.source_mask[part].to(self._device))
        layer.to("meta")

    def _pass(self, stack: _Stack) -> None:
        """Go on to the next layer of a stack."""
        if not stack.outputs:
            self._run(stack)
        stack.inputs, stack.outputs, stack.number = stack.outputs, [], stack.number + 1

    def _leave(self, stack: _Stack) -> _Stack:
        """Run the rest of a stack, and enter the next one."""
        while stack.number < len(stack.layers):
            self._pass(stack)
        self._ran.append(stack)
        return self._enter(len(self._ran))

    def _enter(self, position: int) -> _Stack:
        """Return a stack with the hidden states before it and its layers' further arguments."""
        layers: nn.ModuleList = self._model.get_submodule(self._paths[position].rpartition(".")[0])
        entered = _Stack(layers)
        for i, part in enumerate(self._parts):
            with ExitStack() as context:
                for ran in self._ran:
                    last = ran.inputs[i].to(self._device)
                    output = (last,) if ran.tuples else last
                    for stub in context.enter_context(capture_layer_calls(ran.layers, stop=False)):
                        stub.register_forward_hook(lambda *_, output=output: output)
                stubs = context.enter_context(capture_layer_calls(layers))
                with suppress(StopForward):
                    self._model.base_model(**self._pairs[part].model_inputs(self._device), use_cache=False)
                entered.inputs.append(stubs[0].hidden.cpu())
                entered.arguments.append([(stub.args, stub.kwargs) for stub in stubs])
        return entered

    def _load(self, names: Collection[str]) -> None:
        """Load tensors of the checkpoint into the model."""
        load_into(self._model, {name: self._checkpoint.read(name) for name in names}, self._device)
