"""Run image-text pairs through a vision-language model, and measure its attention.

The whole model is in memory: what happens between its layers, such as features of the image that are added after
some of them, is in no layer. Visual and text tokens are weighted so that both count as much in all, because their
statistics differ (MHA2MLA-VLM, arXiv 2601.11464).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headwise.convert.base import Target
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.layer_stream import AttentionRecorder, LayerRecord
from headwise.convert.forecast.amounts import choose_refit
from headwise.convert.settings import ConvertSettings
from headwise.environment import available_memory
from headwise.errors import SettingError
from headwise.io.reader import Checkpoint
from headwise.measure.image_prompts import ImagePrompt, ImagePrompts, open_prompts
from headwise.models.architecture import Architecture
from headwise.models.protocol import AttentionModel
from headwise.models.stock import load_model

# The share of the free memory that the records of layers measured together may take.
SHARE_OF_RECORDS = 0.3
# The argument of a stock model that names the tiles of images that each token reads, (1, tokens, images, tiles).
CROSS_MASK = "cross_attention_mask"
# Moments of a record that are as wide as its inputs: of inputs, keys, values, and what cross-attention reads.
NUM_MOMENTS = 4


def reading_order(count: int, seed: int) -> list[int]:
    """Return the order in which pairs are read; attention weights are measured on the first of them.

    Args:
        count: number of pairs.
        seed: of the choice.
    """
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    return order


def cross_masks(prompt: ImagePrompt) -> tuple[Tensor | None, Tensor | None]:
    """Return which tokens read an image by cross-attention, and which tiles are read.

    Text before an image reads none, and the tiles that an image does not fill are padding.

    Args:
        prompt: of a model with or without cross-attention.

    Returns:
        bool (tokens,) and bool (images * tiles,); None for all.
    """
    mask = prompt.inputs.get(CROSS_MASK)
    if mask is None:
        return None, None
    read = mask[0].flatten(1) > 0
    return read.any(1), read.any(0)


def balanced_weights(visual: Sequence[Tensor], text: Sequence[Tensor]) -> list[Tensor]:
    """Return the weight of every token: visual and text tokens count as much in all, and a token 1 on average.

    The other tokens are the template's. They repeat in every prompt, so they do not count as text. The model
    attends to them too, so they are not left out. Each has the weight 1.

    Args:
        visual: bool (tokens,) for each sequence.
        text: bool (tokens,) for each sequence; no token is both.
    """
    counts = [int(torch.cat(list(kind)).sum()) for kind in (visual, text)]
    weights = [torch.ones(len(each)) for each in visual]
    if all(counts):
        for kind, count in zip((visual, text), counts, strict=True):
            for each, chosen in zip(weights, kind, strict=True):
                each[chosen] = sum(counts) / 2 / count
    return weights


@dataclass(frozen=True)
class RecordSize:
    """The memory that the record of a layer takes.

    Attributes:
        moments: bytes of the sums.
        kept: bytes of each tensor that is kept of one pair, by the identity of the tensor: layers share arguments.
    """

    moments: int
    kept: dict[int, int]


class ImageStream:
    """Run image-text pairs through a checkpoint.

    Args:
        checkpoint: the source.
        architecture: its row.
        prompts: of the pairs.
        device: where the model runs.
        seed: of the order in which the pairs are read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        prompts: ImagePrompts,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        self._checkpoint, self._architecture, self._prompts = checkpoint, architecture, prompts
        self._device = torch.device(device)
        self._layouts = architecture.layouts(checkpoint.config)
        self._order = reading_order(len(prompts), seed)

    @torch.no_grad()
    def records(
        self, layers: Iterable[int], *, keep_activations: bool, attention_stats: bool = True
    ) -> Iterator[LayerRecord]:
        """Yield one record per attention module, in the order of the layers; its sequences are in reading order.

        Args:
            layers: indices of the modules to record, ascending.
            keep_activations: also keep the inputs and outputs of the attention, and its arguments.
            attention_stats: also measure `value_moment` and `key_moment` of layers that text runs.
        """
        model = load_model(self._checkpoint, self._architecture.auto_class, torch.float32, self._device).eval()
        # Cross-attention reads the image, and no token holds a part of it.
        apart = bool(self._architecture.cross_states(self._checkpoint.config))
        visual, text, amounts = list[Tensor](), list[Tensor](), list[int]()
        for prompt in self._in_order():
            visual.append(prompt.visual & (not apart))
            text.append(prompt.text)
            amounts.append(sum(value.nbytes for value in prompt.inputs.values()))
        weights = [each.to(self._device) for each in balanced_weights(visual, text)]
        largest = self._prompts[self._order[amounts.index(max(amounts))]]
        sizes = self._sizes(model, largest, keep_activations)
        for chosen in self._groups(layers, sizes):
            recorders = [
                AttentionRecorder(
                    layer,
                    model.get_submodule(self._architecture.attention_path(layer)),
                    len(weights),
                    self._device,
                    keep_activations=keep_activations,
                    attention_stats=attention_stats and self._layouts[layer].on_text,
                    states=self._architecture.at(layer)[0].states,
                    separate=True,
                )
                for layer in chosen
            ]
            for number, prompt in enumerate(self._in_order()):
                model.base_model(**prompt.model_inputs(model), use_cache=False)
                reading, tiles = (each if each is None else each.to(self._device) for each in cross_masks(prompt))
                for recorder, layer in zip(recorders, chosen, strict=True):
                    valid = weights[number][None] if self._layouts[layer].on_text else None
                    read = None
                    if reading is not None and self._architecture.at(layer)[0].states is not None:
                        valid, read = weights[number][None] * reading, tiles
                    recorder.add(slice(number, number + 1), valid, read)
            while recorders:
                yield recorders.pop(0).result()

    def _in_order(self) -> Iterator[ImagePrompt]:
        return (self._prompts[number] for number in self._order)

    def _sizes(self, model: nn.Module, prompt: ImagePrompt, keep_activations: bool) -> dict[int, RecordSize]:
        """Return the size of every layer's record, where each pair takes as much as a given one."""
        sizes: dict[int, RecordSize] = {}
        alive: list[Any] = []  # until all are measured, so that no two tensors have one identity

        def note(layer: int, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
            tensors = list(_tensors((kwargs, inputs, output[0] if isinstance(output, tuple) else output)))
            if keep_activations and self._device.type == "cpu":  # elsewhere every layer copies its own
                alive.append(tensors)
            kept = {id(tensor): tensor.nbytes for tensor in tensors} if keep_activations else {}
            sizes[layer] = RecordSize(8 * NUM_MOMENTS * (inputs.shape[-1] + 1) ** 2, kept)

        handles = [
            model.get_submodule(self._architecture.attention_path(layer)).register_forward_hook(
                lambda _, args, kwargs, output, layer=layer: note(layer, args, kwargs, output), with_kwargs=True
            )
            for layer, layout in enumerate(self._layouts)
            if layout.attends
        ]
        base: Any = model.base_model
        base(**prompt.model_inputs(model), use_cache=False)
        for handle in handles:
            handle.remove()
        return sizes

    def _groups(self, layers: Iterable[int], sizes: Mapping[int, RecordSize]) -> Iterator[list[int]]:
        """Yield the layers whose records are in memory at once."""
        group: list[int] = []
        for layer in layers:
            if group and not self._fit([sizes[each] for each in (*group, layer)]):
                yield group
                group = []
            group.append(layer)
        if group:
            yield group

    def _fit(self, sizes: Sequence[RecordSize]) -> bool:
        """Return whether records fit at once: the sums on the device, all else on the CPU."""
        on_cpu = self._device.type == "cpu"
        moments = sum(size.moments for size in sizes)
        # A GPU's tensors are copied for every layer.
        shared = {identity: nbytes for size in sizes for identity, nbytes in size.kept.items()}
        kept = sum(shared.values()) if on_cpu else sum(sum(size.kept.values()) for size in sizes)
        needed = {"cpu": len(self._order) * kept}
        needed[self._device.type] = needed.get(self._device.type, 0) + moments
        return all(
            nbytes
            <= SHARE_OF_RECORDS * (available_memory(torch.device("cpu") if kind == "cpu" else self._device) or 0)
            for kind, nbytes in needed.items()
        )


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the tensors inside dictionaries and tuples."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def plan_images(
    checkpoint: Checkpoint, arch: AttentionModel, target: Target, settings: ConvertSettings
) -> CalibrationPlan:
    """Decide what is measured on image-text pairs.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        settings: of the conversion, with `images`.

    Returns:
        The pairs. The mean length of the prompts stands for that of each.

    Raises:
        SettingError: nothing is measured.
        HeadwiseError: the pairs cannot be read, a prompt exceeds the context, or the model has no processor.
    """
    assert settings.images is not None
    refit = "off" if settings.refit in (None, "auto") else settings.refit
    if target.exact:
        raise SettingError(
            "images",
            "`images` has no effect: an exact conversion measures nothing.",
            "Leave out `images`, or choose fewer KV heads.",
        )
    if refit == "off" and not target.calibrated and settings.save_moments is None:
        raise SettingError(
            "images",
            f"`images` has no effect: `method` {settings.method} measures nothing without a refit.",
            "Leave out `images`, or give `refit` layers.",
        )
    prompts = open_prompts(
        settings.images, arch.auto_class, checkpoint.folder, checkpoint.source, checkpoint.config
    )
    # Each prompt is checked as it is made, before any output starts.
    lengths = [prompt.tokens.shape[1] for prompt in prompts]
    length = sum(lengths) // len(lengths)
    steps = choose_refit(checkpoint, arch, target, refit, length, torch.device("cpu")).steps
    return CalibrationPlan(
        str(settings.images),
        len(prompts),
        length,
        steps,
        settings.seed,
        refit_reason="beside `images` it runs on request alone" if settings.refit in (None, "auto") else None,
        fitted=target.fitted,
        keep=settings.save_moments,
        images=settings.images,
    )
