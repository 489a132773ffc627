"""Estimate what the error of each converted layer costs the whole model (mathematics, section 7a).

The relative error of a layer's output does not rank layers by the loss that they cause. Half the Fisher norm of the
same error does, and its unit is nats per token.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

from headwise.convert.calibration.corpus import LOSS_SECONDS, MEMORY_SHARE
from headwise.convert.forecast.stage_seconds import forward_seconds
from headwise.cuda import ReadAhead
from headwise.environment import available_memory
from headwise.io.reader import Checkpoint
from headwise.models.mla_source import find_mla_source
from headwise.models.protocol import find_attention_model, is_latent
from headwise.models.stock import empty_model, layer_arguments, load_into, load_model, move_to_device
from headwise.progress import SILENT, Progress

# Text that the damage is estimated on: sequences and tokens in each.
SHAPE = {"cuda": (32, 1024)}
CPU_SHAPE = (8, 256)
# Bytes for each parameter of the parent: its weights (bfloat16 on a GPU, else float32), the child's attention as it
# is stored, and activations of one sequence.
BYTES_PER_PARAMETER, BYTES_PER_PARAMETER_ON_CPU = 4, 10
# A backward pass costs twice a forward pass.
PASSES = 3
# Sustained rate of both in bfloat16 on one H200, loading included: 13 s for 32,768 tokens of a model of 7B.
CUDA_FLOPS = 1e14


class RecomputedAttention(TorchFunctionMode):
    """Compute attention again in the backward pass, in place of keeping its weights.

    Plain attention keeps heads x tokens^2 weights of every layer: 5 GB for 1,024 tokens of a model of 7B. Use it as
    a context manager around the forward pass.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch, attention so that its intermediate results are not kept.

        Args:
            func: the function.
            types: classes of the arguments that override functions.
            args: positional arguments.
            kwargs: keyword arguments.
        """
        if func is nn.functional.scaled_dot_product_attention and torch.is_grad_enabled():
            return recompute(func, *args, use_reentrant=False, preserve_rng_state=False, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class LayerDamage:
    """The estimate of what each layer costs, on sequences that do not depend on each other.

    d is the error of a layer's output on the parent's own inputs of that layer, and g the gradient of the parent's
    loss by that output, with labels sampled from the parent's predictions. The estimate is E[(g . d)^2] / 2, the
    second-order term of the KL divergence that the layer's error alone causes, without the terms between tokens.

    Every sequence has a random generator of its own, and attention whose gradient has a fixed order of sums. The
    estimate is therefore the same on one device and on several of the same kind.

    Attributes:
        checkpoint: the converted folder.
        parent: the model that it was converted from.
        tokens: text, a list of token ids for each sequence; all have one length.
        seed: of the sampled labels.
    """

    checkpoint: Checkpoint
    parent: Checkpoint
    tokens: list[list[int]]
    seed: int = 0

    def processes(self, device: torch.device) -> int:
        """Return how many processes may estimate at once by the memory of the host, one at least.

        Args:
            device: where the models run. A GPU's models are loaded through the memory of the host, one by one.
        """
        free = available_memory(torch.device("cpu"))
        needed = (BYTES_PER_PARAMETER_ON_CPU if device.type == "cpu" else 2) * self.parent.num_parameters
        return max(1, int(MEMORY_SHARE * free / needed)) if free is not None else 1

    def results(
        self, items: Iterable[int], device: torch.device, progress: Progress
    ) -> Iterator[tuple[int, list[float]]]:
        """Yield sequences with the sum over their tokens of (g . d)^2 for every layer.

        Args:
            items: indices of sequences. The parent and the child's attention are loaded when there is a first one.
            device: where the models run.
            progress: receives nothing.
        """
        drawn = iter(items)
        for first in drawn:
            yield from self._measure(chain([first], drawn), device)

    def total(self, results: Iterable[tuple[int, list[float]]], progress: Progress = SILENT) -> list[float]:
        """Return half the Fisher norm of every attention layer's error, in nats per token.

        Args:
            results: of all sequences, in any order.
            progress: receives a stage that counts sequences.
        """
        progress.stage("Layer damage", total=len(self.tokens), unit="sequences")
        sums: dict[int, list[float]] = {}
        for sequence, by_layer in results:
            sums[sequence] = by_layer
            progress.advance(1)
        tokens = sum(map(len, self.tokens))
        ordered = (sums[sequence] for sequence in sorted(sums))
        return [sum(each) / (2 * tokens) for each in zip(*ordered, strict=True)]

    def _measure(self, sequences: Iterable[int], device: torch.device) -> Iterator[tuple[int, list[float]]]:
        checkpoint, parent = self.checkpoint, self.parent
        stock, arch = (
            find_attention_model(checkpoint.config, checkpoint.tensors),
            find_attention_model(parent.config, parent.tensors),
        )
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        network = load_model(parent, arch.auto_class, dtype, device).eval().requires_grad_(False)
        layers = [i for i, layout in enumerate(stock.layouts(checkpoint.config)) if layout.attends]
        names = [[n for n in checkpoint.tensors if n.startswith(stock.prefix(layer))] for layer in layers]
        # The child's attention alone is loaded, as it is stored, and computes in float32.
        dtypes = {checkpoint.tensors[name].dtype for each in names for name in each}
        child = empty_model(
            checkpoint.config, stock.auto_class, dtypes.pop() if len(dtypes) == 1 else torch.float32
        )
        arguments = [
            move_to_device(each, device)
            for each in layer_arguments(child, stock.module, len(self.tokens[0]), torch.float32)
        ]
        reader = ReadAhead(checkpoint.read, device)
        for layer, own, following in zip(layers, names, [*names[1:], []], strict=True):
            tensors = move_to_device(reader.take(own), device)
            reader.begin(following)
            load_into(child, tensors, device)
            child.get_submodule(stock.attention_path(layer)).to(device)
        scale = 1.0
        if is_latent(checkpoint.config) and not is_latent(parent.config):
            stored = next(iter(checkpoint.tensors.values())).dtype
            scale = find_mla_source(arch.text_config(parent.config), stored).factors["residual"]
        total = torch.zeros(len(arguments), dtype=torch.float64, device=device)

        def measure(layer: int) -> Any:
            attention = child.get_submodule(stock.attention_path(layer))

            def hook(module: nn.Module, args: Any, options: dict[str, Any], output: Any) -> None:
                inputs = options["hidden_states"] if "hidden_states" in options else args[0]
                expected = output[0] if isinstance(output, tuple) else output
                with torch.no_grad():
                    weights = {name: weight.float() for name, weight in attention.named_parameters()}
                    given = {"hidden_states": inputs.float(), **arguments[layer]}
                    actual = functional_call(attention, weights, (), given)
                    error = (actual[0] if isinstance(actual, tuple) else actual) / scale - expected.float()

                def add(gradient: Tensor) -> None:
                    total[layer] += (gradient.float() * error).sum(-1).double().square().sum()

                expected.register_hook(add)

            return hook

        for layer in layers:
            module = network.get_submodule(arch.attention_path(layer))
            module.register_forward_hook(measure(layer), with_kwargs=True)
        # The weights need no gradient, so the embeddings begin the graph.
        network.get_input_embeddings().register_forward_hook(lambda _, __, out: out.requires_grad_())
        for sequence in sequences:
            total.zero_()
            generator = torch.Generator(device=device).manual_seed(self.seed + sequence)
            with _arithmetic(device):
                row = torch.tensor(self.tokens[sequence], device=device)
                with _sparing_attention(device):
                    logits = network(input_ids=row[None], use_cache=False).logits[0].float()
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
            yield sequence, total.tolist()


def plan_damage(
    checkpoint: Checkpoint, parent: Checkpoint, blocks: Tensor, device: torch.device
) -> LayerDamage | None:
    """Return the estimate on a part of a text; None where time or memory is forecast not to suffice.

    Args:
        checkpoint: the converted folder.
        parent: the model that it was converted from.
        blocks: text, int64 (sequences, length).
        device: where the models run.
    """
    sequences, length = damage_shape(device)
    tokens = blocks[:sequences, :length]
    if damage_seconds(parent, device, tokens.numel()) is None:
        return None
    return LayerDamage(checkpoint, parent, tokens.tolist())


def damage_shape(device: torch.device) -> tuple[int, int]:
    """Return the sequences of the text of `layer_damage`, and the tokens in each.

    Args:
        device: where the models run.
    """
    return SHAPE.get(device.type, CPU_SHAPE)


def damage_seconds(parent: Checkpoint, device: torch.device, tokens: int | None = None) -> float | None:
    """Return the forecast seconds of `layer_damage`; None where time or memory is forecast not to suffice.

    Args:
        parent: the model that is converted.
        device: where the models run.
        tokens: of the text; None: as many as the device takes.
    """
    free = available_memory(device)
    size = BYTES_PER_PARAMETER if device.type == "cuda" else BYTES_PER_PARAMETER_ON_CPU
    if free is not None and size * parent.num_parameters > MEMORY_SHARE * free:
        return None
    sequences, length = damage_shape(device)
    tokens = sequences * length if tokens is None else tokens
    if device.type == "cuda":
        seconds = PASSES * 2.0 * parent.num_parameters * tokens / CUDA_FLOPS
    else:
        seconds = PASSES * forward_seconds(parent, tokens, device)
    return seconds if seconds <= LOSS_SECONDS else None


@contextmanager
def _arithmetic(device: torch.device) -> Iterator[None]:
    """Choose attention whose gradient is the same in every run, and products of float32 in TF32.

    The fused kernels of a GPU add the parts of a gradient in the order in which they are done. TF32 rounds the
    factors of a product to 10 bits, bfloat16, in which the parent computes, to 7.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _sparing_attention(device: torch.device) -> AbstractContextManager[Any]:
    """Choose attention that keeps no weights for the gradient; the fused kernels of a CPU keep none anyway."""
    return RecomputedAttention() if device.type == "cuda" else nullcontext()
