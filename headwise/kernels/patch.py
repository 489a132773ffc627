"""Put the decode kernels into a stock transformers model, and remove them again.

Three extension points of transformers are enough, and no model code is copied:

- the attention interface: "headwise" is an attention function like "sdpa". It calls the function that the model had
  before (sdpa, FlexAttention) for everything except decode;
- the mask interface: for decode it passes the visible range of each sequence to the attention function, in place of
  a (batch, 1, queries, capacity) mask. The range has four dimensions, so that `generate` does not change it;
- a model with indexers passes the keys that they select to the attention function, which decodes on these alone;
- `expand_kv`: stock DeepSeek attention keeps the latent cache compressed, and expands all of it at every step
  through this method. The replacement returns the latents unchanged, and the attention function expands them for
  prefill only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function

from headwise.errors import HeadwiseError
from headwise.kernels import dispatch
from headwise.kernels.gqa_decode import gqa_decode
from headwise.kernels.mla_decode import mla_decode

NAME, SELECTED = "headwise", "headwise_selected"
MAX_QUERIES = 8
# Attribute of the model with its attention implementation before `enable`, for `disable`.
BEFORE = "_headwise_attention_before"


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Make a stock model decode with these kernels: latent attention absorbed, grouped attention unchanged.

    It works with `generate`, dynamic and static caches, left-padded batches, torch.compile and CUDA graphs.
    Training and prefill use the attention that the model was loaded with: sdpa, FlexAttention, or one that was
    registered with transformers. In place of "eager" and of FlashAttention they use sdpa, and with indexers always.
    `HEADWISE_KERNELS` (auto, triton, sdpa, reference) chooses the backend of decode; on a CPU it is the reference.
    A model with indexers decodes one token at a time with the kernels, and several with sdpa.

    Args:
        model: any model that transformers runs with `attn_implementation="sdpa"`.

    Returns:
        The same model.

    Raises:
        HeadwiseError: the model does not support sdpa, or a latent up-projection is not a plain matrix (it is
            quantized, or an adapter wraps it).
    """
    dispatch.choose_backend(None)
    if enabled(model):
        return model
    if not model._supports_sdpa:
        raise HeadwiseError(
            f"{type(model).__name__} cannot use the decode kernels: it does not run on torch's attention.",
            "Use a model that loads with attn_implementation='sdpa'.",
        )
    latent = [(name, module) for name, module in model.named_modules() if hasattr(module, "expand_kv")]
    for name, module in latent:
        if type(module.kv_b_proj) is not nn.Linear or module.kv_b_proj.bias is not None:
            raise HeadwiseError(
                f"{name}.kv_b_proj is a {type(module.kv_b_proj).__name__}, which cannot be absorbed.",
                "Merge the adapter or load the model unquantized, then enable the kernels.",
            )
    before = model.config._attn_implementation
    selects = any(hasattr(module, "indexer") for module in model.modules())
    model.set_attn_implementation(_registered_selected() if selects else _registered(before))
    setattr(model, BEFORE, before)
    for _, module in latent:
        module.expand_kv = _keep_latent
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`.

    Args:
        model: the model; one without the kernels stays as it is.

    Returns:
        The same model.
    """
    if enabled(model):
        model.set_attn_implementation(getattr(model, BEFORE))
        delattr(model, BEFORE)
        for module in model.modules():
            module.__dict__.pop("expand_kv", None)
    return model


def _registered(before: str) -> str:
    """Register the attention function over another implementation, and return its name for transformers."""
    interfaces: tuple[Any, Any] = (AttentionInterface, AttentionMaskInterface)  # their constructors are untyped
    functions, masks = (interface() for interface in interfaces)
    # Eager attention is not registered, and FlashAttention's function needs its own name in the model's config.
    usable = before in functions and before in masks and "flash" not in before
    ordinary = before if usable else "sdpa"
    name = NAME if ordinary == "sdpa" else f"{NAME}_{ordinary}"
    AttentionInterface.register(name, partial(attention, functions[ordinary]))
    AttentionMaskInterface.register(name, partial(visible_range, masks[ordinary]))
    return name


def _registered_selected() -> str:
    """Register the attention function of models with indexers, and return its name for transformers.

    Their indexers read the mask of sdpa also in decode.
    """
    AttentionInterface.register(SELECTED, selected_attention)
    AttentionMaskInterface.register(SELECTED, AttentionMaskInterface()["sdpa"])
    return SELECTED


def enabled(model: PreTrainedModel) -> bool:
    """Return whether the kernels are in a model.

    Args:
        model: any model.
    """
    return hasattr(model, BEFORE)


def _keep_latent(latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """Replace `expand_kv`: pass (batch, 1, tokens, rank) and (batch, 1, tokens, rope dim) to `attention`."""
    return latent, k_rope


def visible_range(
    ordinary: Callable[..., Any],
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Any:
    """Return the mask of a step: for decode the visible range, else the ordinary mask.

    Decode means up to `MAX_QUERIES` new tokens after older ones, with a causal or sliding-window mask.

    Args:
        ordinary: the mask function of the implementation before; the other arguments are those of
            `transformers.AttentionMaskInterface`.
        batch_size: sequences.
        q_length: new tokens.
        kv_length: tokens of the cache.
        q_offset: position of the first new token.
        kv_offset: position of the first token of the cache.
        mask_function: of the model.
        attention_mask: (batch, tokens), 0 for padding; None: no padding.
        local_size: sliding window in tokens; None: no window.
        device: of the mask.
        **options: for `ordinary`.

    Returns:
        For decode (batch, 1, 1, 2) int32 [first visible key, number of keys].

    Raises:
        HeadwiseError: padding is on the right or in the middle, which a range cannot express.
    """
    plain = mask_function is causal_mask_function or local_size is not None
    if q_length > MAX_QUERIES or kv_length <= q_length or not plain or options.get("use_vmap"):
        return ordinary(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            local_size=local_size, device=device, **options,
        )  # fmt: skip
    # The two columns are contiguous in memory, so that no layer copies them.
    bounds = torch.zeros(2, batch_size, dtype=torch.int32, device=device).T[:, None, None]
    bounds[..., 1] = q_offset + q_length - kv_offset
    if attention_mask is not None:
        if not _is_recording():
            _check_left_padded(attention_mask[:, : int(q_offset + q_length)])
        first = attention_mask.to(torch.int32).argmax(-1).view(-1, 1, 1) - kv_offset
        bounds[..., 0] = first.clamp(min=0)
    return bounds


def _is_recording() -> bool:
    """Return whether a compiler or a CUDA graph is recording, so that the values of tensors cannot be read."""
    return torch.compiler.is_compiling() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _check_left_padded(attention_mask: Tensor) -> None:
    if (attention_mask.int().diff(dim=-1) < 0).any():
        raise HeadwiseError(
            "attention_mask hides tokens after visible ones; the decode kernels need padding on the left.",
            "Tokenize with padding_side='left'.",
        )


def attention(
    ordinary: Callable[..., Any],
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float,
    sliding_window: int | None = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Attend with the kernels for decode, and with the ordinary function otherwise; transformers calls it.

    Args:
        ordinary: the attention function of the implementation before.
        module: the attention module.
        query: (batch, heads, queries, head_dim).
        key: (batch, groups, tokens, head_dim), or the latents of `_keep_latent`.
        value: (batch, groups, tokens, v_head_dim), or the rotary keys of `_keep_latent`.
        attention_mask: the result of `visible_range`.
        scaling: of the scores.
        sliding_window: in tokens; None: no window.
        **options: for `ordinary`.

    Returns:
        The output (batch, queries, heads, v_head_dim), and the weights or None.
    """
    latent = module.__dict__.get("expand_kv") is _keep_latent
    decode = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if not decode or differentiable or options.get("softcap") is not None:
        if decode:
            attention_mask = _as_mask(attention_mask, query.shape[2], key.shape[2], sliding_window)
            ordinary = sdpa_attention_forward
        if latent:
            key, value = type(module).expand_kv(module, key, value)
        result: tuple[Tensor, Any] = ordinary(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **options
        )
        return result
    starts, lengths = (attention_mask[:, 0, 0, side].contiguous() for side in (0, 1))
    limits: dict[str, Any] = dict(starts=starts, lengths=lengths, window=sliding_window)
    query = query.transpose(1, 2)
    if latent:
        return _absorbed(module, query, key[:, 0], value[:, 0], scaling, limits), None
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    return gqa_decode(query, key, value, scale=scaling, **limits)[0], None


def selected_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    indices: Tensor,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Attend to the keys that an indexer selects, with the kernels for decode; transformers calls it.

    Args:
        module: the attention module.
        query: (batch, heads, queries, head_dim).
        key: (batch, 1, tokens, rank), the latents of `_keep_latent`.
        value: (batch, 1, tokens, rope_dim), the rotary keys of `_keep_latent`.
        attention_mask: (batch, 1, queries, tokens), of sdpa: bool, or added to the scores.
        scaling: of the scores.
        indices: (batch, queries, count) int32, visible keys first.
        **options: for sdpa.

    Returns:
        The output (batch, queries, heads, v_head_dim), and the weights or None.
    """
    tokens, capacity = query.shape[2], key.shape[2]
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if attention_mask.dtype != torch.bool:
        attention_mask = attention_mask == 0
    # Several queries may be a tree of drafts, whose mask is no prefix for each of them.
    if tokens > 1 or capacity == 1 or differentiable:
        selected = torch.zeros_like(attention_mask.expand(len(query), -1, -1, -1))
        selected = selected.scatter(-1, indices.long()[:, None], True) & attention_mask
        key, value = type(module).expand_kv(module, key, value)
        return sdpa_attention_forward(module, query, key, value, selected, scaling=scaling, **options)
    # Indices are absolute: of the mask, only the number of visible keys is needed.
    limits = {"lengths": attention_mask[:, 0, -1].sum(-1, dtype=torch.int32), "indices": indices}
    return _absorbed(module, query.transpose(1, 2), key[:, 0], value[:, 0], scaling, limits), None


def _absorbed(
    module: Any, query: Tensor, latent: Tensor, k_rope: Tensor, scaling: float, limits: dict[str, Any]
) -> Tensor:
    """Attend with queries (batch, S, heads, nope + rope) to the latent cache: (batch, S, heads, v_head_dim)."""
    batch, tokens, heads, _ = query.shape
    rank, rope = latent.shape[-1], k_rope.shape[-1]
    nope = query.shape[-1] - rope
    up = module.kv_b_proj.weight.view(heads, -1, rank)
    by_head = query[..., :nope].flatten(0, 1).transpose(0, 1)
    q_latent = torch.bmm(by_head, up[:, :nope]).transpose(0, 1).reshape(batch, tokens, heads, rank)
    mixed, _ = mla_decode(q_latent, query[..., nope:], latent, k_rope, scale=scaling, **limits)
    out = torch.bmm(mixed.flatten(0, 1).transpose(0, 1), up[:, nope:].transpose(1, 2))
    return out.transpose(0, 1).reshape(batch, tokens, heads, -1)


def _as_mask(bounds: Tensor, queries: int, capacity: int, window: int | None) -> Tensor:
    """Return a visible range as sdpa's boolean mask (batch, 1, queries, capacity)."""
    key = torch.arange(capacity, device=bounds.device)
    last = bounds[..., 1:] - queries + torch.arange(queries, device=bounds.device)[:, None]
    visible = (key <= last) & (key >= bounds[..., :1])
    return visible if window is None else visible & (key > last - window)
