"""Load whole models with stock classes: generate, look at the cache, compare logits with the parent's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from headwise.compat import cache_layers, cache_of, cached_elements, no_progress_bars
from headwise.convert.calibration.layer_stream import LayerStream
from headwise.convert.verify.layer_inputs import (
    TOKENS,
    check_pairs,
    check_tokens,
    relative_error,
    within_budget,
)
from headwise.io.quantized.quantization import PLAIN_DTYPE
from headwise.io.reader import Checkpoint
from headwise.models.architecture import find_architecture
from headwise.models.layout import CROSS, AttentionLayout, caches
from headwise.models.protocol import AttentionModel
from headwise.models.stock import eager_if_capped, empty_model, load_model, stock_config
from headwise.text.pairs import PairMarks

# Weights up to this size are loaded whole.
WHOLE_BYTES = 1 << 30
# Largest difference of logits in float32 between models of equal weights. Weights that were computed anew
# and rounded may differ by a multiple of the parent's own rounding.
LOGITS_TOLERANCE, ROUNDINGS = 1e-4, 4.0
# Largest difference of logits in float32 from those of the same weights in float64. The rounding of float32 alone
# makes 2e-5 on a converted SmolLM2-135M.
FLOAT64_TOLERANCE = 1e-3


def check_loading(
    checkpoint: Checkpoint,
    stock: AttentionModel,
    layouts: Sequence[AttentionLayout],
    *,
    allow_nan: bool,
    attention: Any = None,
    device: torch.device | str = "cpu",
) -> tuple[bool, str]:
    """Load a folder with `from_pretrained`, generate a few tokens, and compare the cache and the logits.

    Args:
        checkpoint: the folder.
        stock: names of its stock class.
        layouts: of every layer.
        allow_nan: whether logits may be NaN or infinite.
        attention: computes the attention of a layer from the folder's weights in float64, from its index and input;
            the logits are compared with a float64 evaluation of the whole model that uses it. For an
            encoder-decoder, its `whole_model` is that evaluation. None: they are not compared.
        device: where the model runs.
    """
    import transformers

    with no_progress_bars():
        # Quantised weights are compared as they are read here, rounded to bfloat16.
        dtype = torch.float32 if checkpoint.quantized is None else PLAIN_DTYPE
        model, info = getattr(transformers, stock.auto_class).from_pretrained(
            checkpoint.folder,
            dtype=dtype,
            output_loading_info=True,
            trust_remote_code=False,
            **eager_if_capped(stock_config(checkpoint.config)),
        )
    model = model.to(device, torch.float32)
    wrong = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if wrong:
        return False, f"from_pretrained reports {wrong}"
    # A loaded model forgets the ties that its weights broke; one on the meta device knows them.
    ties = empty_model(checkpoint.config, stock.auto_class).all_tied_weights_keys or {}
    for name, target in ties.items():
        if model.get_parameter(name).data_ptr() != model.get_parameter(target).data_ptr():
            return False, f"{name} is not tied to {target}"
    if not any(layout.on_text for layout in layouts):
        return True, f"{type(model).__name__}.from_pretrained loads it whole; text does not run it"
    tokens = torch.arange(TOKENS, device=device)[None] % model.get_input_embeddings().num_embeddings
    detail = f"{type(model).__name__}.from_pretrained loads it whole"
    if model.can_generate():
        passed, words = _generates(model, tokens, checkpoint, stock, layouts, allow_nan)
        if not passed:
            return False, words
        detail += " and generates"
    if attention is None:
        return True, detail
    tokens = within_budget(check_tokens(checkpoint, model.get_input_embeddings().num_embeddings), layouts)
    with torch.inference_mode():
        logits = _run_whole(model, checkpoint, stock, tokens, device)
        del model
        if stock.reads_pairs:
            own = _run_whole(attention.whole_model(), checkpoint, stock, tokens, "cpu")
        else:
            own = LayerStream(checkpoint, stock, tokens, device, dtype=torch.float64, attention=attention).logits()
    error = relative_error(logits, own)
    return error < FLOAT64_TOLERANCE, (
        f"{detail}; its logits are within {error:.1e} of a float64 evaluation of its weights, "
        f"limit {FLOAT64_TOLERANCE:.0e}"
    )


def _generates(
    model: Any,
    tokens: Tensor,
    checkpoint: Checkpoint,
    stock: AttentionModel,
    layouts: Sequence[AttentionLayout],
    allow_nan: bool,
) -> tuple[bool, str]:
    """Generate a few tokens, and compare the cache with the layouts."""
    import transformers

    # Not the folder's generation_config.json: its beams, penalties and stop words are for users.
    model.generation_config = transformers.GenerationConfig()
    start = {"decoder_start_token_id": _start(checkpoint)} if stock.reads_pairs else {}
    with torch.inference_mode():
        generated = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=4, do_sample=False, use_cache=True,
            eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True, **start,
        )  # fmt: skip
    if not allow_nan and not all(bool(step.isfinite().all()) for step in generated.logits):
        return False, "the logits are not finite"
    # Without an image, a decoder skips its cross-attention, which then has an empty cache.
    cache = [layer for layer in cache_layers(cache_of(generated)) if layer.keys is not None and layer.keys.numel()]
    cached = [x for x in caches(layouts) if stock.reads_pairs or x.part != CROSS]
    elements = [cached_elements(layer) for layer in cache]
    if elements != [layout.cache_elements_per_token for layout in cached]:
        return False, f"after generate() the cache holds {elements} elements per token and layer"
    return True, ""


def _start(checkpoint: Checkpoint) -> int:
    """Return the token that starts a target of an encoder-decoder."""
    arch = find_architecture(checkpoint.config, checkpoint.tensors)
    return PairMarks.of(checkpoint.config, arch.stock_config(checkpoint.config)).start


def _run_whole(
    model: Any, checkpoint: Checkpoint, stock: AttentionModel, tokens: Tensor, device: torch.device | str
) -> Tensor:
    """Return a loaded model's logits in float64 on the CPU: of `tokens`, or of the targets made from them."""
    given = {"input_ids": tokens.to(device)}
    if stock.reads_pairs:
        given = check_pairs(tokens, _start(checkpoint)).model_inputs(device)
    logits: Tensor = model(**given, use_cache=False).logits.cpu().double()
    return logits


def compare_logits(
    checkpoint: Checkpoint,
    parent: Checkpoint,
    stock: AttentionModel,
    parent_stock: AttentionModel,
    *,
    recomputed: bool,
    device: torch.device | str = "cpu",
) -> tuple[bool, str]:
    """Compare the logits of an exact conversion with its parent's, in float32 on the same text.

    Models of up to `WHOLE_BYTES` and encoder-decoders are loaded whole by `from_pretrained`. Larger models run
    layer by layer through all layers.

    Args:
        checkpoint: the folder.
        parent: the model that it was converted from, with the folder's positions.
        stock: names of the folder's stock class.
        parent_stock: names of the parent's.
        recomputed: whether attention weights were computed anew and rounded to the folder's dtype. The limit is
            then `ROUNDINGS` times what rounding to that dtype does to the parent's own logits. Otherwise a folder
            of another dtype is compared with the parent's weights rounded to it.
        device: where the models run.

    Returns:
        Whether they agree, and the end of a sentence about it.
    """
    if not any(layout.on_text for layout in stock.layouts(checkpoint.config)):
        return True, ""
    dtype, parent_dtype = _dtype(checkpoint), _dtype(parent)
    stored = dtype if dtype != parent_dtype and not recomputed else torch.float32
    tokens = check_tokens(parent, _vocab_size(parent, parent_stock))
    tokens = within_budget(tokens, stock.layouts(checkpoint.config))
    expected = _logits(parent, parent_stock, tokens, device, stored=stored)
    error = relative_error(_logits(checkpoint, stock, tokens, device), expected)
    limit = LOGITS_TOLERANCE
    if recomputed and dtype != torch.float32:
        limit = max(
            limit, ROUNDINGS * relative_error(_logits(parent, parent_stock, tokens, device, dtype), expected)
        )
    return error < limit, f"; logits of the whole model within {error:.1e} of the parent's, limit {limit:.1e}"


def _dtype(checkpoint: Checkpoint) -> torch.dtype:
    return next(entry.dtype for entry in checkpoint.tensors.values() if entry.dtype.is_floating_point)


def _vocab_size(checkpoint: Checkpoint, stock: AttentionModel) -> int:
    return empty_model(checkpoint.config, stock.auto_class).get_input_embeddings().num_embeddings  # type: ignore[no-any-return]


def _logits(
    source: Checkpoint,
    stock: AttentionModel,
    tokens: Tensor,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    *,
    stored: torch.dtype = torch.float32,
) -> Tensor:
    """Return logits computed in `dtype`, of weights that were rounded to `stored` before."""
    rounded = stored if stored != torch.float32 else None
    if source.nbytes > WHOLE_BYTES and not stock.reads_pairs:
        return LayerStream(source, stock, tokens, device, dtype=dtype, stored=rounded).logits().double()
    model = load_model(source, stock.auto_class, rounded or dtype).to(device, dtype)
    with torch.inference_mode():
        return _run_whole(model, source, stock, tokens, device)
