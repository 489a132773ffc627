"""Forecast and judge every layout of one model, by the settings of a serving forecast."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from headwise.errors import HeadwiseError
from headwise.io.quantized.powers import POWERS
from headwise.models.config import is_routed, selected_share
from headwise.models.layout import AttentionLayout
from headwise.models.protocol import find_attention_model
from headwise.models.stock import count_stock_parameters, stock_class_name
from headwise.serving.engines import SERVING_OPTIONS, EngineVerdict, engine_verdicts, refused, with_options
from headwise.serving.planner import (
    DEFAULT_CONTEXT,
    ModelSize,
    ServingForecast,
    attention_parameters,
    deployment_of,
    forecast,
    refuse_parallelism,
    serving_notes,
)
from headwise.serving.settings import ServingSettings
from headwise.serving.weight_files import WeightFiles

NO_FILES = WeightFiles()
FP8_NOTE = (
    "`cache_dtype` fp8 counts one byte for each element and one scale, as vLLM and SGLang store it. It costs "
    "about 0.05 nats per token with MLA (docs/results/serving.md). The blocks of `headwise convert --cache-dtype "
    "fp8` take 656 bytes at 512+64, and only headwise's own kernel reads them."
)
UNKNOWN_SIZE = (
    "The number of parameters is not known, so weights, sequences and times are left out: the class cannot be "
    "built from config.json."
)
UNKNOWN_QUANTISED = (
    "The weights are quantised ({method}), and no headers of files are at hand that show their bytes: weights, "
    "sequences and times of {rows} are left out."
)
QUANTISED_ROWS = (
    "The weights are quantised ({method}). The row of the model itself counts them as its files store them. The "
    "other rows count what a conversion writes: {written}."
)
PLAIN = "plain weights in 16 bits; `requantize` fp8 stores the matrices of the layers in 8"
CARRIED = "quantised weights outside attention as they are stored, and all others plain"


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
        self._own: ModelSize | None = None
        self._files = NO_FILES

    def measure(
        self,
        parameters: int | None,
        layouts: Sequence[AttentionLayout],
        config: Mapping[str, Any],
        hidden_size: int,
        dtype: torch.dtype,
        files: WeightFiles = NO_FILES,
    ) -> None:
        """Set the size of the model itself, and of those that it can become.

        Args:
            parameters: of the whole model; None: not known.
            layouts: of its layers.
            config: its config.json, without an entry of a quantisation.
            hidden_size: width of the residual stream.
            dtype: of the plain weights.
            files: its weights as they are stored. Without headers the class counts routed experts.
        """
        self._hidden_size, self._itemsize, self._files = hidden_size, dtype.itemsize, files
        self._kind = _kind(layouts)
        self._sizes[self._kind] = None
        if not self.settings.forecasts:
            return
        if files.entries:
            names = _attention_names(config, layouts)
            self._own = self._size_in(files, files.stored, names, layouts, config)
            self._sizes[self._kind] = self._size_in(files, files.converted(names), names, layouts, config)
        elif parameters is not None:
            routed = 0 if selected_share(_stock_config(config)) == 1 else count_parameters_of(config)[1]
            size = self._size_of(parameters, routed, layouts, config)
            if files.method is None or not files.carried:
                self._sizes[self._kind] = size
            if files.method is None:
                self._own = size
            elif files.total is not None:  # without headers all tensors count alike
                self._own = size.scaled(files.total / (parameters * self._itemsize))

    def _size_in(
        self,
        files: WeightFiles,
        sizes: Mapping[str, int],
        names: Collection[str],
        layouts: Sequence[AttentionLayout],
        config: Mapping[str, Any],
    ) -> ModelSize:
        """Return the size of a model with the source's kind of attention, from the bytes of its tensors."""
        stock = _stock_config(config)
        share = selected_share(stock)
        shapes = files.entries.items()
        routed = sum(sizes[name] for name, entry in shapes if share < 1 and is_routed(name, entry.shape, stock))
        bytes_each = files.bytes_per_element(sizes, names)
        attention = sum(attention_parameters(layout, self._hidden_size, 1, config) for layout in layouts)
        other = max(sum(sizes.values()) - round(attention * bytes_each), 0)
        return ModelSize(self._hidden_size, other, bytes_each, min(routed, other), share)

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
            parameters, routed = count_parameters_of(config)
            self._sizes[kind] = None if parameters is None else self._size_of(parameters, routed, layouts, config)
        return self._sizes[kind]

    def forecast(
        self, layouts: Sequence[AttentionLayout], config: Mapping[str, Any], *, own: bool = False
    ) -> ServingForecast | None:
        """Return what a layout costs on each GPU; None without a forecast.

        Args:
            layouts: of every layer.
            config: its config.json.
            own: whether it is the model itself, with its weights as they are stored.

        Raises:
            SettingError: `tp` does not divide the query heads or the width of the MLP.
        """
        if not self.settings.forecasts:
            return None
        size = self._own if own else self._size(layouts, config)
        return forecast(layouts, size, self.settings, self.context, config)

    def verdicts(
        self,
        config: Mapping[str, Any],
        layouts: Sequence[AttentionLayout],
        *,
        own: bool = False,
    ) -> tuple[EngineVerdict, ...]:
        """Return the verdicts of the engines that the settings name; of all engines, if they name none.

        An engine whose server does not start with the settings of the forecast is refused, with the reason.

        Args:
            config: the config.json of a layout.
            layouts: of every layer.
            own: whether it is the model itself, which the commands name MODEL. Its quantisation counts.
        """
        window = any(layout.sliding_window for layout in layouts)
        files = self._files
        quantised = files.method and (own or (files.carried and _kind(layouts) == "heads"))
        stored: dict[str, Any] = {"quantization_config": {"quant_method": files.method}} if quantised else {}
        if own and files.powers:
            stored[POWERS] = files.powers
        if not own and not config.get("architectures"):  # a conversion fills it in
            auto_class = find_attention_model(dict(config)).auto_class
            stored["architectures"] = [stock_class_name(dict(config), auto_class)]
        verdicts = engine_verdicts(
            {**config, **stored},
            window=window,
            tokenizer=self.tokenizer,
            engines=self.settings.engines,
            folder="MODEL" if own else "OUT",
            deployment=deployment_of(self.settings),
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
            for name, spellings in SERVING_OPTIONS.items()
            if settings.forecasts and "tp" in spellings
        }
        return tuple(
            refused(verdict, reason) if (reason := refusals.get(verdict.name)) else with_options(verdict, options)
            for verdict in verdicts
        )

    def notes(
        self,
        layouts: Sequence[AttentionLayout],
        cost: ServingForecast | None,
        latents: Sequence[tuple[str, float]] = (),
        fewer_heads: Sequence[tuple[str, float]] = (),
    ) -> Iterator[str]:
        """Yield what the user should know about the forecast.

        Args:
            layouts: of the model itself.
            cost: its forecast.
            latents: name and cache bytes per token on each GPU of every MLA layout that it can become.
            fewer_heads: likewise of every layout of fewer KV heads.
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
        method = self._files.method
        if self._own is None:
            rows = "all rows" if self._files.carried else "the model itself"
            yield UNKNOWN_SIZE if method is None else UNKNOWN_QUANTISED.format(method=method, rows=rows)
        elif method is not None and self._files.are_encoded:
            written = CARRIED if self._files.carried else PLAIN
            yield QUANTISED_ROWS.format(method=method, written=written)
        if cost.cache_bytes_per_token is not None and layouts[0].kind != "mla":
            per_token = cost.cache_bytes_per_token
            yield from serving_notes(layouts[0], latents, per_token, self.settings, fewer_heads)


def _kind(layouts: Sequence[AttentionLayout]) -> str:
    return "latent" if any(layout.kind == "mla" for layout in layouts) else "heads"


def _stock_config(config: Mapping[str, Any]) -> Any:
    """Return the stock config object of the language model of a config.json."""
    return find_attention_model(dict(config)).stock_config(dict(config))


def _attention_names(config: Mapping[str, Any], layouts: Sequence[AttentionLayout]) -> set[str]:
    """Return the names of the tensors of all layers that a conversion changes."""
    model = find_attention_model(dict(config))
    return {name for layer in range(len(layouts)) for name in model.tensor_names(dict(config), layer)}


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
