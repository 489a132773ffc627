"""Build an MLA layer in the norm-free parametrization: stock DeepSeek attention without its latent norm.

The stock tensors hold weights near 1e-9 (mathematics, section 4a), which an optimizer step would destroy. Here the
norm is an identity and every weight has its unscaled size. The module is built from `LatentWeights` and converted
back to them; `deepseek.py` builds stock tensors from the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from headwise.models.deepseek import ATTENTION, LAYERS, half_split, interleave
from headwise.models.layout import LatentWeights
from headwise.models.mla_source import written_class
from headwise.models.stock import empty_model

# The name under which transformers finds `padded_attention`.
PADDED = "headwise_padded"


def norm_free_attention(
    config: dict[str, Any], layer: int, latent: LatentWeights, o_bias: Tensor | None, device: torch.device
) -> Any:
    """Build the layer as a float32 module.

    Args:
        config: the MLA config.json. Its `q_lora_rank` is ignored: the module has one query projection.
        layer: index of the decoder layer.
        latent: the layer's weights.
        o_bias: (D,) the output bias, or None.
        device: device of the module.

    Returns:
        The attention module.
    """
    plain = {**copy.deepcopy(config), "q_lora_rank": None}
    stock = written_class(config)
    assert stock is not None
    model = empty_model(plain, stock.auto_class)
    attention = model.get_submodule(f"{LAYERS.format(layer=layer)}.{ATTENTION}")
    to_norm_free_module(attention, latent, o_bias)
    if torch.device(device).type == "cpu":
        pad_values(attention)
    return attention.to(device)


def pad_values(attention: Any) -> None:
    """Make a module on the CPU use `padded_attention` where its stock form uses torch's own kernels.

    Args:
        attention: the attention module; its config changes.
    """
    import transformers

    if attention.config._attn_implementation == "sdpa":
        transformers.AttentionInterface.register(PADDED, padded_attention)
        attention.config._attn_implementation = PADDED


def padded_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Return torch's fused attention with values padded to the width of the queries.

    The fused kernel of a CPU takes one width. Without it, 9 heads of 96 and 64 dimensions took 4.4 times as long
    forward, and 2.2 times forward and backward, and the attention weights of all heads were in memory.

    Args:
        module: the attention module.
        query: (sequences, heads, tokens, head_dim).
        key: like `query`.
        value: (sequences, heads, tokens, v_head_dim).
        attention_mask: as the module passes it.
        options: further arguments of the attention function.

    Returns:
        The output, (sequences, tokens, heads, v_head_dim), and no attention weights.
    """
    import transformers

    width = value.shape[-1]
    padded = nn.functional.pad(value, (0, max(0, query.shape[-1] - width)))
    attend = transformers.AttentionInterface()["sdpa"]
    return attend(module, query, key, padded, attention_mask, **options)[0][..., :width], None


def to_norm_free_module(attention: Any, latent: LatentWeights, o_bias: Tensor | None) -> None:
    """Convert a stock attention module to the norm-free parametrization, in place.

    The module becomes float32, with one query projection.

    Args:
        attention: the stock attention module.
        latent: the layer's weights.
        o_bias: (D,) the output bias, or None.
    """
    hidden, layout = latent.hidden_size, latent.layout
    attention.q_lora_rank = attention.q_a_proj = attention.q_a_layernorm = attention.q_b_proj = None
    queries = torch.cat([latent.q_nope, interleave(latent.q_rope)], 1).flatten(0, 1)
    queries = queries * (latent.scale * math.sqrt(layout.head_dim))
    attention.q_proj = _linear(queries, hidden)
    attention.kv_a_proj_with_mqa = _linear(torch.cat([latent.kv_down, interleave(latent.k_rope)]), hidden)
    attention.kv_a_layernorm = nn.Identity()
    attention.kv_b_proj = _linear(torch.cat([latent.k_up, latent.v_up], 1).flatten(0, 1))
    o = latent.o.transpose(0, 1).flatten(1)
    attention.o_proj = _linear(o if o_bias is None else torch.cat([o, o_bias[:, None].to(o)], 1), o.shape[1])


def from_norm_free_state(
    state: Mapping[str, Tensor], latent: LatentWeights, prefix: str = ""
) -> tuple[LatentWeights, Tensor | None]:
    """Return the float64 weights and the output bias of a module in the norm-free parametrization.

    Args:
        state: the module's tensors, by their names after `prefix`.
        latent: weights with the module's shapes; tensors on the meta device are enough.
        prefix: prefix of the names in `state`.
    """

    def matrix(name: str) -> Tensor:
        bias = state.get(f"{prefix}{name}.bias")
        weight = state[f"{prefix}{name}.weight"]
        return torch.cat([weight] if bias is None else [weight, bias[:, None]], 1).detach().double().cpu()

    layout, heads = latent.layout, latent.q_nope.shape[0]
    nope, rank = latent.q_nope.shape[1], latent.kv_down.shape[0]
    queries = matrix("q_proj").unflatten(0, (heads, -1)) / (latent.scale * math.sqrt(layout.head_dim))
    down = matrix("kv_a_proj_with_mqa")
    up = matrix("kv_b_proj").unflatten(0, (heads, -1))
    o, bias = state[f"{prefix}o_proj.weight"].detach().double().cpu(), state.get(f"{prefix}o_proj.bias")
    learned = replace(
        latent,
        q_nope=queries[:, :nope],
        q_rope=half_split(queries[:, nope:]),
        kv_down=down[:rank],
        k_rope=half_split(down[rank:]),
        k_up=up[:, :nope],
        v_up=up[:, nope:],
        o=o.unflatten(1, (heads, -1)).transpose(0, 1),
    )
    return learned, None if bias is None else bias.detach().double().cpu()


def _linear(matrix: Tensor, inputs: int | None = None) -> nn.Linear:
    """Return a float32 projection; a column beyond `inputs` is its bias."""
    inputs = inputs or matrix.shape[1]
    # Without the random numbers that a new layer starts from: drawing them took longer than the rest.
    made: nn.Linear = nn.utils.skip_init(
        nn.Linear,
        inputs,
        matrix.shape[0],
        bias=matrix.shape[1] > inputs,
        device=matrix.device,
        dtype=torch.float32,
    )
    with torch.no_grad():
        made.weight.copy_(matrix[:, :inputs])
        if made.bias is not None:
            made.bias.copy_(matrix[:, inputs])
    return made.requires_grad_(False)
