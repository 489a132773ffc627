"""Prefill of converted MLA on one GPU: torch's attention beside FlashAttention 3: `python benchmarks/prefill.py`.

headwise has no prefill kernel: the model's own attention reads prompts. This shows what that costs at the head
widths that conversions write, for whole prompts and for chunks (the last queries of a longer one). FlashAttention
3 comes from `flash_attn_interface`, or from vLLM. One JSON line for each case: the median time of a call in
microseconds. An implementation that is wrong by more than 1e-2 against float32, or that does not serve a case,
prints that in place of a time.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

# Heads, width of queries and keys, width of values, queries, keys.
CASES = (
    (32, 192, 128, 8192, 8192),
    (32, 128, 64, 8192, 8192),
    (32, 128, 128, 8192, 8192),
    (9, 112, 64, 8192, 8192),
    (32, 192, 128, 2048, 8192),
    (32, 128, 64, 2048, 8192),
)
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
TOLERANCE = 1e-2
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_attention(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend with one backend of torch; tensors are (batch, tokens, heads, width)."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    square = q.shape[2] == k.shape[2]
    mask: Any = None if square else causal_lower_right(q.shape[2], k.shape[2])
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=square).transpose(1, 2)


def flash_attention_3() -> Call | None:
    """Return FlashAttention 3 of the library that is installed; None: no library has it."""
    try:
        from flash_attn_interface import flash_attn_func

        return partial(flash_attn_func, causal=True)
    except ImportError:
        pass
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ends = [torch.tensor([0, x.shape[1]], device="cuda", dtype=torch.int32) for x in (q, k)]
        lengths = dict(cu_seqlens_q=ends[0], cu_seqlens_k=ends[1], max_seqlen_q=q.shape[1], max_seqlen_k=k.shape[1])
        return flash_attn_varlen_func(q[0], k[0], v[0], causal=True, fa_version=3, **lengths)[None]

    return attend


def microseconds(call: Callable[[], Tensor]) -> float:
    """Median time of a call on the device."""
    for _ in range(3):
        call()
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end))
    return statistics.median(times)


def wrong_by(out: Tensor, q: Tensor, k: Tensor, v: Tensor) -> float:
    """Relative error on the last 256 queries of the first two heads, against float32."""
    q, k, v, out = (each[:, :, :2].transpose(1, 2).float() for each in (q, k, v, out))
    q, out = q[:, :, -256:], out[:, :, -256:]
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    visible = torch.ones_like(scores, dtype=torch.bool).tril(k.shape[2] - q.shape[2])
    expected = scores.masked_fill(~visible, float("-inf")).softmax(-1) @ v
    return float((out - expected).norm() / expected.norm())


def main() -> None:
    """Measure every case with every implementation."""
    calls: dict[str, Call] = {name: partial(torch_attention, backend) for name, backend in BACKENDS.items()}
    rival = flash_attention_3()
    if rival is not None:
        calls["FlashAttention 3"] = rival
    for heads, width, value, queries, keys in CASES:
        q = torch.randn(1, queries, heads, width, device="cuda", dtype=torch.bfloat16)
        k = torch.randn(1, keys, heads, width, device="cuda", dtype=torch.bfloat16)
        v = torch.randn(1, keys, heads, value, device="cuda", dtype=torch.bfloat16)
        result: dict[str, Any] = {"heads": heads, "widths": [width, value], "tokens": [queries, keys]}
        for name, call in calls.items():
            try:
                error = wrong_by(call(q, k, v), q, k, v)
                fails = error > TOLERANCE or error != error
                result[name] = f"wrong by {error:.1e}" if fails else round(microseconds(partial(call, q, k, v)), 1)
            except Exception as problem:  # each library has errors of its own for shapes that it does not serve
                result[name] = f"{type(problem).__name__}: {str(problem).splitlines()[0][:100]}"
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
