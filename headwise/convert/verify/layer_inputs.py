"""Give every attention layer of a checkpoint the inputs that the model itself gives it on text.

A check on random inputs tests a regime that the model never enters: on SmolLM2-135M the inputs of layer 0 have a
twentieth of unit size, and unit-normal inputs leave the linear range of the latent norm (mathematics, section 7c).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.calibration.layer_stream import LayerStream
from headwise.convert.calibration.pair_stream import PairStream
from headwise.io.reader import Checkpoint
from headwise.io.tokenizer import load_tokenizer
from headwise.models.architecture import Architecture, find_architecture
from headwise.models.layout import AttentionLayout
from headwise.models.protocol import AttentionModel
from headwise.models.stock import empty_model, for_rows, layer_arguments, load_into, move_to_device
from headwise.text.pairs import PairMarks, Pairs

SEQUENCES, TOKENS, TARGET_TOKENS = 2, 24, 17
# One sequence of prose and one of code; each is longer than TOKENS in every tokenizer.
TEXTS = (
    "The quality of a converted model shows in its predictions. A smaller cache holds fewer numbers for each "
    "token, and every layer reads the outputs of the layers below, so an error in one layer reaches all others.",
    "def moving_average(values, width):\n    total = sum(values[:width])\n    for i in range(width, len(values)):\n"
    "        yield total / width\n        total += values[i] - values[i - width]\n",
)


def check_tokens(checkpoint: Checkpoint, vocab_size: int) -> Tensor:
    """Return the token ids that a model is checked on, (SEQUENCES, TOKENS).

    Args:
        checkpoint: its tokenizer encodes prose and code; without one, the ids are random.
        vocab_size: of the model; ids beyond it are replaced by random ones.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (SEQUENCES, TOKENS), generator=generator)
    if not any(path.name.startswith("tokenizer") for path in checkpoint.sidecars):
        return tokens
    try:
        tokenizer = load_tokenizer(checkpoint.folder, checkpoint.source)
        encoded = [tokenizer(text)["input_ids"][:TOKENS] for text in TEXTS]
    except Exception:  # the tokenizer's files are checked elsewhere; random ids serve as well
        return tokens
    for row, ids in zip(tokens, encoded, strict=True):
        known = torch.tensor([token for token in ids if token < vocab_size], dtype=torch.long)
        row[: len(known)] = known
    return tokens


def within_budget(tokens: Tensor, layouts: Iterable[AttentionLayout]) -> Tensor:
    """Return the tokens up to which attention with indexers is dense; all of them without an indexer.

    Args:
        tokens: from `check_tokens`.
        layouts: of every layer.
    """
    return tokens[:, : min((x.indexer.index_topk for x in layouts if x.indexer), default=TOKENS)]


def tokens_of_text(checkpoint: Checkpoint, arch: Architecture) -> Tensor:
    """Return the token ids that a model is checked on, as `check_tokens`; none if text runs no layer.

    Args:
        checkpoint: the model.
        arch: its architecture.
    """
    if not any(layout.on_text for layout in arch.layouts(checkpoint.config)):
        return torch.empty(0, TOKENS, dtype=torch.long)
    return check_tokens(checkpoint, arch.stock_config(checkpoint.config).vocab_size)


def check_pairs(tokens: Tensor, start: int) -> Pairs:
    """Return the pairs that an encoder-decoder is checked on: each text is the source of the other.

    Args:
        tokens: from `check_tokens`.
        start: the token that starts a target.
    """
    targets = torch.cat([torch.full_like(tokens[:, :1], start), tokens.flip(0)], 1)[:, :TARGET_TOKENS]
    every = (torch.ones_like(rows, dtype=torch.bool) for rows in (tokens, targets))
    return Pairs(tokens, next(every), targets, next(every))


def attention_inputs(
    checkpoint: Checkpoint, stock: AttentionModel, tokens: Tensor, device: torch.device | str = "cpu"
) -> Iterator[tuple[int, Tensor, dict[str, Any] | None, dict[str, Tensor]]]:
    """Yield every layer's index, the inputs of its attention, its further arguments, and its tensors.

    Args:
        checkpoint: the model.
        stock: names of its stock class.
        tokens: from `check_tokens`.
        device: where the layers run.

    Yields:
        The index; the inputs, (SEQUENCES, TOKENS, D) float64, on the CPU or a GPU; the arguments of the module in
        float64, None for those of a decoder; all tensors of the attention, by the checkpoint's names, where the
        inputs are. The inputs of layers that text does not run are random.
    """
    if stock.reads_pairs:
        arch = find_architecture(checkpoint.config, checkpoint.tensors)
        pairs = check_pairs(tokens, PairMarks.of(checkpoint.config, arch.stock_config(checkpoint.config)).start)
        for record in PairStream(checkpoint, arch, pairs, device).records(
            keep_activations=True, attention_stats=False
        ):
            assert record.inputs is not None
            more = _in_float64({**record.arguments, **record.rows})
            x = _double(record.inputs, device)
            yield record.index, x, more, stock.tensors(checkpoint, record.index, x.device)
        return
    layouts = stock.layouts(checkpoint.config)
    if any(layout.on_text for layout in layouts):
        stream = LayerStream(checkpoint, stock, tokens, device, states=random_states(stock, checkpoint.config))
        for record in stream.records(keep_activations=True, attention_stats=False):
            assert record.inputs is not None
            x = _double(record.inputs, device)
            yield record.index, x, None, move_to_device(record.weights, x.device)
    if unread := [layer for layer, layout in enumerate(layouts) if layout.attends and not layout.on_text]:
        arch = find_architecture(checkpoint.config, checkpoint.tensors)
        model = empty_model(checkpoint.config, stock.auto_class)
        for layer in unread:
            attention = model.get_submodule(stock.attention_path(layer))
            x, more = random_inputs(attention, arch, checkpoint.config, layer)
            yield layer, x, more, stock.tensors(checkpoint, layer)


def random_inputs(
    attention: nn.Module, arch: Architecture, config: dict[str, Any], layer: int
) -> tuple[Tensor, dict[str, Any]]:
    """Return random inputs of an attention that text does not run, in float64, and its further arguments.

    Args:
        attention: the module. With an argument `cu_seqlens` it takes the patches of all images in one sequence.
        arch: the architecture.
        config: config.json of the model.
        layer: index of the layer, and seed of the random numbers.
    """
    part, _ = arch.at(layer)
    stock, generator = part.stock_config(config), torch.Generator().manual_seed(layer)

    def draw(tokens: int, width: int) -> Tensor:
        return torch.randn(1, tokens, width, generator=generator, dtype=torch.float64)

    inputs = draw(TOKENS, stock.hidden_size)
    arguments: dict[str, Any] = {}
    if half := arch.layouts(config)[layer].rotary_dim // 2:
        angles = 3 * draw(TOKENS, half).repeat(1, 1, 2)
        arguments["position_embeddings"] = (angles.cos(), angles.sin())
    if part.states is not None:
        arguments[part.states] = draw(TARGET_TOKENS, getattr(stock, part.sizes["inputs"]))
    if "cu_seqlens" in inspect.signature(attention.forward).parameters:
        arguments = {name: tuple(value[0] for value in pair) for name, pair in arguments.items()}
        return inputs[0], arguments | {"cu_seqlens": torch.tensor([0, TOKENS // 2, TOKENS])}
    return inputs, arguments | {"attention_mask": None}


def random_states(stock: AttentionModel, config: dict[str, Any]) -> dict[str, Tensor]:
    """Return what cross-attention reads in a check, (1, TARGET_TOKENS, width) by the name of the argument.

    Args:
        stock: names of the stock class.
        config: config.json of the model.
    """
    generator = torch.Generator().manual_seed(1)
    widths = stock.cross_states(config)
    return {name: torch.randn(1, TARGET_TOKENS, width, generator=generator) for name, width in widths.items()}


def _double(inputs: Tensor, device: torch.device | str) -> Tensor:
    """Return inputs in float64, on a GPU or else on the CPU: other devices may not have it."""
    return inputs.to(device if torch.device(device).type == "cuda" else "cpu").double()


def _in_float64(value: Any) -> Any:
    """Return arguments with their floating tensors in float64 on the CPU; the largest negative number stays one."""
    if isinstance(value, dict):
        return {key: _in_float64(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(_in_float64(item) for item in value)
    if isinstance(value, Tensor):
        return value.cpu().double() if value.is_floating_point() else value.cpu()
    return value


class StockAttention:
    """Evaluate the stock attention of single layers in float64, where their inputs are.

    Args:
        config: config.json of the model.
        stock: names of its stock class.
    """

    def __init__(self, config: dict[str, Any], stock: AttentionModel) -> None:
        self._stock = stock
        self._model = empty_model(config, stock.auto_class, torch.float64)
        self._states = {name: value.double() for name, value in random_states(stock, config).items()}
        self._arguments: list[dict[str, Any]] | None = None

    def module(self, layer: int) -> torch.nn.Module:
        """Return the stock attention module of a layer, whose weights are there during a call only.

        Args:
            layer: its index.
        """
        return self._model.get_submodule(self._stock.attention_path(layer))  # type: ignore[no-any-return]

    def __call__(
        self, layer: int, tensors: Mapping[str, Tensor], inputs: Tensor, arguments: dict[str, Any] | None = None
    ) -> Tensor:
        """Return the outputs of one layer, (sequences, tokens, D) float64.

        Args:
            layer: its index.
            tensors: of its attention, by the checkpoint's names.
            inputs: (sequences, tokens, D) float64.
            arguments: further arguments of the module; None: those of the model's own forward.
        """
        device = inputs.device
        load_into(self._model, move_to_device(dict(tensors), device), device)
        if arguments is None and self._arguments is None:
            self._arguments = layer_arguments(
                self._model, self._stock.module, inputs.shape[1], torch.float64, self._states
            )
        attention = self.module(layer).to(device)  # buffers follow the weights
        given = arguments if arguments is not None else (self._arguments or [])[layer]
        given = move_to_device(for_rows(given, self._states, len(inputs)), device)
        with torch.no_grad():
            output = attention(hidden_states=inputs, **given)
        for name, parameter in list(attention.named_parameters()):
            owner, _, leaf = name.rpartition(".")
            setattr(attention.get_submodule(owner), leaf, torch.nn.Parameter(parameter.to("meta"), False))
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of the expected values; infinite where only one is NaN.

    Args:
        actual: the computed values.
        expected: the values to compare with, of the same shape.
    """
    both = actual.isnan() & expected.isnan()
    actual, expected = actual.masked_fill(both, 0), expected.masked_fill(both, 0)
    error = float((actual - expected).norm() / expected.norm().clamp_min(1e-300))
    return float("inf") if error != error else error
