"""Run image-text pairs through a vision-language model, and measure its attention.

The whole model is in memory: what happens between its layers, such as features of the image that are added after
some of them, is in no layer. Visual and text tokens are weighted so that both count as much in all, because their
statistics differ (MHA2MLA-VLM, arXiv 2601.11464).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from headwise.convert.base import Target
from headwise.convert.calibration.calibration_plan import CalibrationPlan
from headwise.convert.calibration.layer_stream import AttentionRecorder, LayerRecord
from headwise.convert.forecast.amounts import choose_refit
from headwise.convert.settings import ConvertSettings
from headwise.environment import available_memory
from headwise.io.reader import Checkpoint
from headwise.measure.image_prompts import ImagePrompts, open_prompts
from headwise.models.architecture import Architecture
from headwise.models.protocol import AttentionModel
from headwise.models.stock import load_model

# The share of the free memory that the records of layers measured together may take.
SHARE_OF_RECORDS = 0.3


def balanced_weights(visual: Sequence[Tensor]) -> list[Tensor]:
    """Return the weight of every token: visual and text tokens count as much in all, and a token 1 on average.

    Args:
        visual: bool (tokens,) for each sequence.
    """
    every = torch.cat(list(visual))
    share = every.double().mean()
    if share in (0, 1):
        return [torch.ones(len(each)) for each in visual]
    return [torch.where(each, 0.5 / share, 0.5 / (1 - share)).float() for each in visual]


class ImageStream:
    """Run image-text pairs through a checkpoint.

    Args:
        checkpoint: the source.
        architecture: its row.
        prompts: of the pairs.
        device: where the model runs.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        architecture: Architecture,
        prompts: ImagePrompts,
        device: torch.device | str = "cpu",
    ) -> None:
        self._checkpoint, self._architecture, self._prompts = checkpoint, architecture, prompts
        self._device = torch.device(device)
        self._layouts = architecture.layouts(checkpoint.config)

    @torch.no_grad()
    def records(
        self, layers: Iterable[int], *, keep_activations: bool, attention_stats: bool = True
    ) -> Iterator[LayerRecord]:
        """Yield one record per attention module, in the order of the layers.

        Args:
            layers: indices of the modules to record, ascending.
            keep_activations: also keep the inputs and outputs of the attention, and its arguments.
            attention_stats: also measure `value_moment` and `key_moment` of layers that text runs.
        """
        model = load_model(self._checkpoint, self._architecture.auto_class, torch.float32, self._device).eval()
        # Cross-attention reads the image, and no token holds a part of it.
        apart = bool(self._architecture.cross_states(self._checkpoint.config))
        visual = [prompt.visual & (not apart) for prompt in self._prompts]
        weights = [each.to(self._device) for each in balanced_weights(visual)]
        width = self._architecture.stock_config(self._checkpoint.config).hidden_size
        each = 8 * 3 * (width + 1) ** 2 + 8 * width * sum(map(len, weights)) * keep_activations
        at_once = max(1, int(SHARE_OF_RECORDS * (available_memory(self._device) or 0) / each))
        remaining = iter(layers)
        while chosen := list(islice(remaining, at_once)):
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
            for number, prompt in enumerate(self._prompts):
                model.base_model(**prompt.model_inputs(model), use_cache=False)
                for recorder, layer in zip(recorders, chosen, strict=True):
                    of_text = self._layouts[layer].on_text
                    recorder.add(slice(number, number + 1), weights[number][None] if of_text else None)
            while recorders:
                yield recorders.pop(0).result()


def plan_images(
    checkpoint: Checkpoint, arch: AttentionModel, target: Target, settings: ConvertSettings
) -> CalibrationPlan | None:
    """Decide what is measured on image-text pairs.

    Args:
        checkpoint: the source.
        arch: its architecture.
        target: the decided conversion.
        settings: of the conversion, with `images`.

    Returns:
        The pairs; None if nothing is measured. The length of the first prompt stands for that of all.

    Raises:
        HeadwiseError: the pairs cannot be read, or the model has no processor.
    """
    assert settings.images is not None
    prompts = open_prompts(
        settings.images, arch.auto_class, checkpoint.folder, checkpoint.source, checkpoint.config
    )
    length = prompts[0].tokens.shape[1]
    refit = "off" if settings.refit in (None, "auto") else settings.refit
    steps = choose_refit(checkpoint, arch, target, refit, length, torch.device("cpu")).steps
    if not steps and not target.calibrated and settings.save_moments is None:
        return None
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
