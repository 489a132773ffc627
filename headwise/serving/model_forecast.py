"""Forecast and judge every layout of one model, by the settings of a serving forecast."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch

from headwise.errors import HeadwiseError
from headwise.io.header import TensorEntry
from headwise.models.config import is_routed, selected_share
from headwise.models.layout import AttentionLayout
from headwise.models.protocol import find_attention_model
from headwise.models.stock import count_stock_parameters
from headwise.serving.engines import SERVING_OPTIONS, EngineVerdict, engine_verdicts, refused, with_options
from headwise.serving.planner import (
    DEFAULT_CONTEXT,
    ModelSize,
    ServingForecast,
    forecast,
    refuse_parallelism,
    serving_notes,
)
from headwise.serving.settings import ServingSettings

NO_ENTRIES: Mapping[str, TensorEntry] = MappingProxyType({})
FP8_NOTE = (
    "`cache_dtype` fp8 counts one byte for each element and one scale, as vLLM and SGLang store it. It costs "
    "about 0.05 nats per token with MLA (docs/results/serving.md). The blocks of `headwise convert --cache-dtype "
    "fp8` take 656 bytes at 512+64, and only headwise's own kernel reads them."
)
UNKNOWN_SIZE = (
    "The number of parameters is not known, so weights, sequences and times are left out: the weights are "
    "quantised, or the class cannot be built from config.json."
)


class ModelForecast:
    """Forecast and judge the layouts of one model.

    Args:
        settings: of the forecast, and the engines.
        context: tokens of a sequence; None: the planner's default, or the model's maximum if that is less.
        longest: the tokens for which the model has positions; None: not known.
        tokenizer: the kind of the vocabulary.
    """

    def __init__(self, settings: ServingSettings, context: int | None, longest: int | None, tokenizer: str) -> None:
        self.settings, self.tokenizer = settings, tokenizer
        self._given, self._longest = context, longest
        self.context = context or min(DEFAULT_CONTEXT, longest or DEFAULT_CONTEXT)
        self._hidden_size, self._itemsize, self._kind = 0, 0, ""
        self._sizes: dict[str, ModelSize | None] = {}
        self._source_row: int | None = None

    def measure(
        self,
        parameters: int | None,
        layouts: Sequence[AttentionLayout],
        config: Mapping[str, Any],
        hidden_size: int,
        dtype: torch.dtype,
        entries: Mapping[str, TensorEntry] = NO_ENTRIES,
    ) -> None:
        """Set the size of the model itself.

        Args:
            parameters: of the whole model; None: not known.
            layouts: of its layers.
            config: its config.json.
            hidden_size: width of the residual stream.
            dtype: of the weights.
            entries: its tensors by name; empty: no headers are at hand, and the class counts routed experts.
        """
        self._hidden_size, self._itemsize = hidden_size, dtype.itemsize
        self._kind = _kind(layouts)
        self._source_row = max(layout.cache_elements_per_token for layout in layouts)
        self._sizes[self._kind] = None
        if parameters is not None and self.settings.forecasts:
            self._sizes[self._kind] = self._size_of(parameters, _routed(config, entries), layouts, config)

    def _size_of(
        self, parameters: int, routed: int, layouts: Sequence[AttentionLayout], config: Mapping[str, Any]
    ) -> ModelSize:
        selected = selected_share(_stock_config(config)) if routed else 1.0
        return ModelSize.of(
            parameters, layouts, self._hidden_size, self._itemsize, config, routed=routed, selected=selected
        )

    def _size(self, layouts: Sequence[AttentionLayout], config: Mapping[str, Any]) -> ModelSize | None:
        """Return the size of the model's class for heads, or of the class for MLA, which has other tensors."""
        kind = _kind(layouts)
        if kind not in self._sizes:
            self._sizes[kind] = None
            if self._sizes[self._kind] is not None:
                parameters, routed = count_parameters_of(config)
                if parameters is not None:
                    self._sizes[kind] = self._size_of(parameters, routed, layouts, config)
        return self._sizes[kind]

    def forecast(self, layouts: Sequence[AttentionLayout], config: Mapping[str, Any]) -> ServingForecast | None:
        """Return what a layout costs on each GPU; None without a forecast.

        Args:
            layouts: of every layer.
            config: its config.json.

        Raises:
            SettingError: `tp` does not divide the query heads or the width of the MLP.
        """
        if not self.settings.forecasts:
            return None
        return forecast(layouts, self._size(layouts, config), self.settings, self.context, config)

    def verdicts(
        self,
        config: Mapping[str, Any],
        layouts: Sequence[AttentionLayout],
        folder: str = "OUT",
    ) -> tuple[EngineVerdict, ...]:
        """Return the verdicts of the engines that the settings name; of all engines, if they name none.

        An engine whose server does not start with the settings of the forecast is refused, with the reason.

        Args:
            config: the config.json of a layout.
            layouts: of every layer.
            folder: the folder that the commands name.
        """
        window = any(layout.sliding_window for layout in layouts)
        verdicts = engine_verdicts(
            config,
            window=window,
            tokenizer=self.tokenizer,
            engines=self.settings.engines,
            folder=folder,
            source_row=self._source_row,
        )
        settings, reachable = self.settings, self._longest is None or self.context <= self._longest
        options = {
            "tp": settings.tp if (settings.tp or 1) > 1 else None,
            "dcp": settings.dcp if (settings.dcp or 1) > 1 else None,
            "cache_dtype": settings.cache_dtype if settings.cache_dtype != "bf16" else None,
            "context": self._given if settings.forecasts and reachable else None,
        }
        refusals = {
            name: refuse_parallelism(layouts, replace(settings, engines=[name]))
            for name in SERVING_OPTIONS
            if settings.forecasts
        }
        return tuple(
            refused(verdict, reason) if (reason := refusals.get(verdict.name)) else with_options(verdict, options)
            for verdict in verdicts
        )

    def notes(
        self, layouts: Sequence[AttentionLayout], cost: ServingForecast | None, latents: Sequence[tuple[str, float]]
    ) -> Iterator[str]:
        """Yield what the user should know about the forecast.

        Args:
            layouts: of the model itself.
            cost: its forecast.
            latents: name and cache bytes per token on each GPU of every MLA layout that it can become.
        """
        if cost is None:
            return
        if self._longest is not None and self.context > self._longest:
            yield (
                f"The model has positions for {self._longest:,} tokens, and `context` is {self.context:,}: "
                "engines refuse longer sequences. `headwise convert --context` rescales RoPE of decoder-only "
                "models without MLA."
            )
        if self.settings.cache_dtype == "fp8":
            yield FP8_NOTE
        if self._sizes[self._kind] is None:
            yield UNKNOWN_SIZE
        if cost.cache_bytes_per_token is not None and layouts[0].kind != "mla":
            yield from serving_notes(layouts[0], latents, cost.cache_bytes_per_token, self.settings)


def _kind(layouts: Sequence[AttentionLayout]) -> str:
    return "latent" if any(layout.kind == "mla" for layout in layouts) else "heads"


def _stock_config(config: Mapping[str, Any]) -> Any:
    """Return the stock config object of the language model of a config.json."""
    return find_attention_model(dict(config)).stock_config(dict(config))


def _routed(config: Mapping[str, Any], entries: Mapping[str, TensorEntry]) -> int:
    """Return the number of parameters of routed experts; 0 for a dense model."""
    stock = _stock_config(config)
    if selected_share(stock) == 1:
        return 0
    if not entries:
        return count_parameters_of(config)[1]
    return sum(math.prod(entry.shape) for name, entry in entries.items() if is_routed(name, entry.shape, stock))


def count_parameters_of(config: Mapping[str, Any]) -> tuple[int | None, int]:
    """Return the number of parameters of the stock model of a config.json, and of its routed experts.

    Args:
        config: the config.json.

    Returns:
        The numbers; (None, 0) if the class cannot be built.
    """
    try:
        return _count(json.dumps(dict(config), sort_keys=True))
    except HeadwiseError:
        return None, 0


@lru_cache(maxsize=4)
def _count(config: str) -> tuple[int, int]:
    """Return what `count_stock_parameters` does; two rows of a table may need the same count."""
    plain: dict[str, Any] = json.loads(config)
    model = find_attention_model(plain)
    return count_stock_parameters(plain, model.auto_class, model.stock_config(plain))
