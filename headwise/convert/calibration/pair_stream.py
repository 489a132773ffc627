"""Run pairs of source and target through an encoder-decoder with one layer's weights in memory at a time.

The encoder's layers run first, then the decoder's on the encoder's output. Before each stack, the model's own
forward runs with stubs in place of layers. The stubs record what each layer gets: masks, rotary tables and the
encoder's states.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import TOKENS_AT_ONCE, AttentionRecorder, LayerRecord
from headwise.io.reader import Checkpoint
from headwise.models.architecture import Architecture
from headwise.models.stock import StopForward, capture_layer_calls, empty_model, load_into
from headwise.text.pairs import Pairs


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
        # Every stack with its naming in the checkpoint, and the attention modules of each of its layers.
        self._stacks: dict[str, str] = {}
        self._modules: dict[tuple[str, int], list[int]] = {}
        for index, (part, number) in enumerate(architecture.at(i) for i in range(len(architecture.order))):
            self._stacks[part.module] = part.layers[0]
            self._modules.setdefault((part.module, number), []).append(index)
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
        layers: Collection[int] | None = None,
    ) -> Iterator[LayerRecord]:
        """Yield one record per attention module, in the order in which the modules run.

        Args:
            keep_activations: also keep the inputs and outputs of the attention, and its arguments.
            attention_stats: also measure `value_moment` and `key_moment`, on some of the sequences.
            layers: indices of the modules to record; None: all.
        """
        wanted = set(range(len(self._architecture.order)) if layers is None else layers)
        self._load(self._other)
        self._model.tie_weights()
        for module in self._model.modules():  # rotary tables are buffers, made where the model was
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))
        before: list[tuple[nn.ModuleList, list[Tensor], bool]] = []
        for path, naming in self._stacks.items():
            stack: nn.ModuleList = self._model.get_submodule(path.rpartition(".")[0])
            hidden, arguments = self._enter(stack, before)
            tuples = False
            for number in range(len(stack)):
                indices = [i for i in self._modules.get((path, number), []) if i in wanted]
                prefix = f"{naming.format(layer=number)}."
                self._load([name for name in self._checkpoint.tensors if name.startswith(prefix)])
                layer = stack[number].to(self._device)
                recorders = [
                    AttentionRecorder(
                        index,
                        self._model.get_submodule(self._architecture.attention_path(index)),
                        len(self._pairs),
                        self._device,
                        keep_activations=keep_activations,
                        attention_stats=attention_stats,
                        states=self._architecture.at(index)[0].states,
                    )
                    for index in indices
                ]
                for i, part in enumerate(self._parts):
                    args, kwargs = arguments[i][number]
                    output = layer(hidden[i].to(self._device), *args, **kwargs)
                    tuples = isinstance(output, tuple)
                    hidden[i] = (output[0] if isinstance(output, tuple) else output).cpu()
                    for recorder, index in zip(recorders, indices, strict=True):
                        recorder.add(part, self._valid(index, part), self._source_mask(part))
                layer.to("meta")
                yield from (recorder.result() for recorder in recorders)
            before.append((stack, hidden, tuples))

    def _source_mask(self, part: slice) -> Tensor:
        return self._pairs.source_mask[part].to(self._device)

    def _valid(self, index: int, part: slice) -> Tensor:
        """Return which tokens of a module's input are no padding."""
        encoder = not self._architecture.at(index)[0].cached
        return (self._pairs.source_mask if encoder else self._pairs.target_mask)[part].to(self._device)

    def _enter(
        self, stack: nn.ModuleList, before: list[tuple[nn.ModuleList, list[Tensor], bool]]
    ) -> tuple[list[Tensor], list[list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
        """Return the hidden states before a stack and its layers' further arguments, for each part of the pairs.

        Args:
            stack: the layers.
            before: the stacks that have run, their outputs, and whether their layers return tuples.
        """
        hidden, arguments = [], []
        for i, part in enumerate(self._parts):
            with ExitStack() as context:
                for ran, outputs, tuples in before:
                    stubs = context.enter_context(capture_layer_calls(ran, stop=False))
                    last = outputs[i].to(self._device)
                    output = (last,) if tuples else last
                    for stub in stubs:
                        stub.register_forward_hook(lambda *_, output=output: output)
                stubs = context.enter_context(capture_layer_calls(stack))
                with suppress(StopForward):
                    self._model.base_model(**self._pairs[part].model_inputs(self._device), use_cache=False)
                hidden.append(stubs[0].hidden.cpu())
                arguments.append([(stub.args, stub.kwargs) for stub in stubs])
        return hidden, arguments

    def _load(self, names: Collection[str]) -> None:
        """Load tensors of the checkpoint into the model."""
        load_into(self._model, {name: self._checkpoint.read(name) for name in names}, self._device)
