"""Put the decode kernels into a stock transformers model, and take them out again.

Three of transformers' own extension points are enough, and no model code is copied:

- the attention interface: "headwise" is an attention function like "sdpa", and calls the one that the model had
  before (sdpa, FlexAttention) for everything that is not decode;
- the mask interface: for decode it hands the attention function each sequence's visible range, four-dimensional
  so that it passes through `generate` untouched, in place of a (batch, 1, queries, capacity) mask;
- `expand_kv`: stock DeepSeek attention keeps the latent cache compressed and expands all of it at every step
  through this method. Here it hands the latents on unexpanded, and the attention function expands them only
  for prefill.
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

NAME = "headwise"
MAX_QUERIES = 8
# The attention implementation a model had before, kept on the model for `disable`.
BEFORE = "_headwise_attention_before"


def enable(model: PreTrainedModel) -> PreTrainedModel:
    """Let a stock model decode through these kernels: latent attention absorbed, grouped attention as it is.

    Works with `generate`, dynamic and static caches, left-padded batches, torch.compile and CUDA graphs. Training
    and prefill go through the attention that the model was loaded with: sdpa, FlexAttention, any that was
    registered with transformers. For "eager" and for FlashAttention sdpa serves. Which kernel serves decode is
    `HEADWISE_KERNELS` (auto, triton, sdpa, reference); on CPU the reference does.

    Args:
        model: any model that transformers runs with `attn_implementation="sdpa"`.

    Returns:
        The same model.

    Raises:
        HeadwiseError: a model without sdpa support, or a latent up-projection that is no plain matrix
            (quantised, or wrapped by an adapter).
    """
    dispatch.requested(None)
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
                "Merge the adapter or load the model unquantised, then enable the kernels.",
            )
    before = model.config._attn_implementation
    model.set_attn_implementation(_registered(before))
    setattr(model, BEFORE, before)
    for _, module in latent:
        module.expand_kv = _keep_latent
    return model


def disable(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `enable`: the model is stock again."""
    if enabled(model):
        model.set_attn_implementation(getattr(model, BEFORE))
        delattr(model, BEFORE)
        for module in model.modules():
            module.__dict__.pop("expand_kv", None)
    return model


def _registered(before: str) -> str:
    """The name under which transformers finds our decode, over the implementation of before for all else."""
    functions, masks = AttentionInterface(), AttentionMaskInterface()
    # Eager attention is no registered function, and FlashAttention's asks the model's config for its own name.
    kept = before in functions and before in masks and "flash" not in before
    ordinary = before if kept else "sdpa"
    name = NAME if ordinary == "sdpa" else f"{NAME}_{ordinary}"
    AttentionInterface.register(name, partial(attention, functions[ordinary]))
    AttentionMaskInterface.register(name, partial(visible_range, masks[ordinary]))
    return name


def enabled(model: PreTrainedModel) -> bool:
    """Whether `enable` is in force."""
    return hasattr(model, BEFORE)


def _keep_latent(latent: Tensor, k_rope: Tensor) -> tuple[Tensor, Tensor]:
    """What `expand_kv` becomes: `attention` sees (batch, 1, tokens, rank) and (batch, 1, tokens, rope dim)."""
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
    """The mask of a step: for decode, (batch, 1, 1, 2) int32 [first visible key, keys]; else the ordinary one.

    Decode is up to 8 new tokens after older ones, under a causal or sliding-window mask.

    Raises:
        HeadwiseError: padding on the right or in the middle, which no range can express.
    """
    plain = mask_function is causal_mask_function or local_size is not None
    if q_length > MAX_QUERIES or kv_length <= q_length or not plain or options.get("use_vmap"):
        return ordinary(
            batch_size, q_length, kv_length, q_offset, kv_offset, mask_function, attention_mask,
            local_size=local_size, device=device, **options,
        )  # fmt: skip
    # The two sides lie apart in memory, so that no layer has to copy them.
    bounds = torch.zeros(2, batch_size, dtype=torch.int32, device=device).T[:, None, None]
    bounds[..., 1] = q_offset + q_length - kv_offset
    if attention_mask is not None:
        if not _recording():
            _check_left_padded(attention_mask[:, : int(q_offset + q_length)])
        first = attention_mask.to(torch.int32).argmax(-1).view(-1, 1, 1) - kv_offset
        bounds[..., 0] = first.clamp(min=0)
    return bounds


def _recording() -> bool:
    """Whether the values of tensors may not be looked at: a compiler or a CUDA graph is recording."""
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
    """The attention function that transformers calls: the kernels for decode, the ordinary one for all else."""
    latent = module.__dict__.get("expand_kv") is _keep_latent
    decode = isinstance(attention_mask, Tensor) and attention_mask.dtype == torch.int32
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    if not decode or differentiable or options.get("softcap") is not None:
        if decode:
            attention_mask = _as_mask(attention_mask, query.shape[2], key.shape[2], sliding_window)
            ordinary = sdpa_attention_forward
        if latent:
            key, value = type(module).expand_kv(module, key, value)
        return ordinary(
            module, query, key, value, attention_mask, scaling=scaling, sliding_window=sliding_window, **options
        )
    starts, lengths = (attention_mask[:, 0, 0, side].contiguous() for side in (0, 1))
    limits: dict[str, Any] = dict(starts=starts, lengths=lengths, window=sliding_window)
    query = query.transpose(1, 2)
    if latent:
        return _absorbed(module, query, key[:, 0], value[:, 0], scaling, limits), None
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    return gqa_decode(query, key, value, scale=scaling, **limits)[0], None


def _absorbed(
    module: Any, query: Tensor, latent: Tensor, k_rope: Tensor, scaling: float, limits: dict[str, Any]
) -> Tensor:
    """(batch, S, heads, nope + rope) on the latent cache -> (batch, S, heads, v_head_dim)."""
    batch, tokens, heads, _ = query.shape
    rank, rope = latent.shape[-1], k_rope.shape[-1]
    nope = query.shape[-1] - rope
    up = module.kv_b_proj.weight.view(heads, -1, rank)
    by_head = query[..., :nope].flatten(0, 1).transpose(0, 1)
    q_latent = torch.bmm(by_head, up[:, :nope]).transpose(0, 1).unflatten(0, (batch, tokens))
    mixed, _ = mla_decode(q_latent, query[..., nope:], latent, k_rope, scale=scaling, **limits)
    out = torch.bmm(mixed.flatten(0, 1).transpose(0, 1), up[:, nope:].transpose(1, 2))
    return out.transpose(0, 1).reshape(batch, tokens, heads, -1)


def _as_mask(bounds: Tensor, queries: int, capacity: int, window: int | None) -> Tensor:
    """A visible range as sdpa's boolean mask (batch, 1, queries, capacity)."""
    key = torch.arange(capacity, device=bounds.device)
    last = bounds[..., 1:] - queries + torch.arange(queries, device=bounds.device)[:, None]
    seen = (key <= last) & (key >= bounds[..., :1])
    return seen if window is None else seen & (key > last - window)
