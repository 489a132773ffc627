"""Whom `kernels.py` times: our two kernels, torch's attentions, and the attention libraries that can be imported.

A rival is a function of a case and its inputs. What it would keep between decode steps in a server (an execution
plan, a block table, split queries) it makes on its first call and keeps beside the inputs, outside of the timing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial
from importlib.util import find_spec
from typing import Any

import torch
from kernel_cases import SCALE, Case
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from headwise.kernels.decode.attend import launch_attend
from headwise.kernels.decode.tiling import Card, card_of, choose_tiles
from headwise.kernels.gqa_decode.triton import gqa_decode
from headwise.kernels.mla_decode.triton import mla_decode

Inputs = dict[str, Any]
Rival = Callable[[Case, Inputs], Tensor]


def ours(case: Case, x: Inputs) -> Tensor:
    if case.rope:
        q, cache, r = x["q"], x["cache"], case.width
        parts = (q[..., :r], q[..., r:], cache[..., :r], cache[..., r:])
        return mla_decode(*parts, scale=SCALE, block_table=x["table"], indices=x["indices"])[0]
    return gqa_decode(x["q"], x["k"], x["v"], scale=SCALE, block_table=x["table"])[0]


def gathered(case: Case, x: Inputs) -> Tensor:
    """The selected tokens copied, and then absorbed attention as two batched products."""
    index = x["indices"].flatten(1).long()[..., None].expand(-1, -1, x["cache"].shape[-1])
    return eager(case, {**x, "cache": x["cache"].gather(1, index)})


def portable(case: Case, x: Inputs) -> Tensor:
    """The kernel for other cards, on this one."""
    card = card_of(0)
    old = Card((8, 0), card.multiprocessors, card.shared_memory)
    rows = case.queries * case.heads // case.groups
    config = choose_tiles(old, rows, case.width, case.rope, case.width, bool(case.rope))
    if case.rope:
        q, cache, r = x["q"], x["cache"][:, :, None], case.width
        arguments = (q[..., :r], q[..., r:], cache[..., :r], cache[..., r:], None)
    else:
        arguments = (x["q"], None, x["k"], None, x["v"])
    return launch_attend(*arguments, SCALE, None, None, x["table"], None, config=config)[0]


def eager(case: Case, x: Inputs) -> Tensor:
    """Absorbed attention as two batched products."""
    scores = torch.matmul(x["q"].flatten(1, 2), x["cache"].transpose(1, 2)) * SCALE
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(torch.bfloat16)
    return torch.matmul(weights, x["cache"][..., : case.width]).unflatten(1, (case.queries, case.heads))


def torch_attention(backend: SDPBackend, case: Case, x: Inputs) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    grouped = case.groups < case.heads
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=grouped).transpose(1, 2)


@cache
def compiled_flex() -> Callable[..., Any]:
    # One compiled version a shape; past its usual limit of eight torch would silently run none.
    torch._dynamo.config.recompile_limit = 256
    return torch.compile(flex_attention, dynamic=False)


def flex(options: dict[str, Any] | None, case: Case, x: Inputs) -> Tensor:
    """The heads that share a key as the query tokens of one head: one query token sees every key, so no mask is
    needed, every group size is allowed, and the latent cache is both key and value."""
    q = x["q"].unflatten(2, (case.groups, -1))[:, 0]
    if case.rope:
        k = x["cache"][:, None]
        v = k[..., : case.width]
    else:
        k, v = x["k"].transpose(1, 2), x["v"].transpose(1, 2)
    out = compiled_flex()(q, k, v, scale=SCALE, kernel_options=options)
    return out.flatten(1, 2)[:, None]


def flex_options(case: Case) -> dict[str, Any]:
    """More warps than FlexAttention starts with, which are two, and as deep a pipeline as shared memory holds."""
    if not case.rope:
        return dict(BLOCK_N=64, num_warps=4, num_stages=3)
    return dict(BLOCK_N=32, num_warps=8, num_stages=2 if case.width <= 256 else 1)


def pages_of(case: Case, x: Inputs, page: int) -> tuple[list[Tensor], Tensor]:
    """The caches as (pages, page, ...) and the block table (batch, pages); a contiguous cache is cut into pages."""
    caches = [x["cache"]] if case.rope else [x["k"], x["v"]]
    if case.page:
        return caches, x["table"]
    count = case.context // page
    table = torch.arange(case.batch * count, dtype=torch.int32, device=x["q"].device).view(case.batch, count)
    return [t.unflatten(1, (count, page)).flatten(0, 1) for t in caches], table


def flash_mla(case: Case, x: Inputs) -> Tensor:
    """FlashMLA: pages of 64, one cache tensor."""
    from flash_mla import flash_mla_with_kvcache, get_mla_metadata

    if "flash_mla" not in x:
        (rows,), table = pages_of(case, x, 64)
        lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
        plan = get_mla_metadata(lengths, case.queries * case.heads, 1)
        x["flash_mla"] = rows[:, :, None], table, lengths, case.width, *plan
    # Builds that carry several generations of kernels ask for the one with Hopper's dense decode by this name.
    legacy = "use_legacy" in inspect.signature(flash_mla_with_kvcache).parameters
    options = {"use_legacy": True} if legacy else {}
    return flash_mla_with_kvcache(x["q"], *x["flash_mla"], softmax_scale=SCALE, causal=case.queries > 1, **options)[
        0
    ]


def flashinfer_mla(case: Case, x: Inputs) -> Tensor:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper

    if "flashinfer" not in x:
        (rows,), table = pages_of(case, x, 64)
        page = rows.shape[1]
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda")
        lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device="cuda")
        wrapper = BatchMLAPagedAttentionWrapper(torch.empty(2**27, dtype=torch.int8, device="cuda"))
        wrapper.plan(
            indptr * case.queries, indptr * table.shape[1], table.flatten(), lengths, case.heads, case.width,
            case.rope, page, case.queries > 1, SCALE, torch.bfloat16, torch.bfloat16,
        )  # fmt: skip
        parts = [t.contiguous() for t in x["q"].flatten(0, 1).split([case.width, case.rope], -1)]
        x["flashinfer"] = partial(wrapper.run, *parts, *rows.split([case.width, case.rope], -1))
    return x["flashinfer"]().unflatten(0, (case.batch, case.queries))


def flashinfer_gqa(case: Case, x: Inputs) -> Tensor:
    """FlashInfer's decode on tensor cores, with its kernels for every card (`fa2`), which serve all group sizes."""
    from flashinfer import BatchDecodeWithPagedKVCacheWrapper

    if "flashinfer" not in x:
        caches, table = pages_of(case, x, 16)
        page = caches[0].shape[1]
        indptr = torch.arange(case.batch + 1, dtype=torch.int32, device="cuda") * table.shape[1]
        full = torch.full((case.batch,), page, dtype=torch.int32, device="cuda")
        workspace = torch.empty(2**30, dtype=torch.int8, device="cuda")
        wrapper = BatchDecodeWithPagedKVCacheWrapper(workspace, use_tensor_cores=True, backend="fa2")
        wrapper.plan(
            indptr, table.flatten(), full, case.heads, case.groups, case.width, page,
            q_data_type=torch.bfloat16, kv_data_type=torch.bfloat16, sm_scale=SCALE,
        )  # fmt: skip
        x["flashinfer"] = partial(wrapper.run, x["q"][:, 0], tuple(caches))
    return x["flashinfer"]()[:, None]


def flash_attention_3(case: Case, x: Inputs) -> Tensor:
    from flash_attn_interface import flash_attn_with_kvcache

    options = dict(page_table=x["table"], softmax_scale=SCALE, causal=case.queries > 1)
    if case.rope:
        q_latent, q_rope = x["q"].split([case.width, case.rope], -1)
        latent, k_rope = x["cache"][:, :, None].split([case.width, case.rope], -1)
        return flash_attn_with_kvcache(q_rope, k_rope, latent, qv=q_latent, **options)
    return flash_attn_with_kvcache(x["q"], x["k"], x["v"], **options)


def rivals(case: Case) -> dict[str, Rival]:
    """Everything here that can compute the case."""
    if case.selected:
        return {"headwise": ours, "gather, eager bmm": gathered}
    found: dict[str, Rival] = {"headwise": ours, "headwise portable": portable}
    contiguous = not case.page
    if contiguous and case.queries == 1:
        if case.rope:
            found["eager bmm"] = eager
        else:
            found["torch cuDNN"] = partial(torch_attention, SDPBackend.CUDNN_ATTENTION)
            found["torch flash"] = partial(torch_attention, SDPBackend.FLASH_ATTENTION)
        found["FlexAttention"] = partial(flex, None)
        found["FlexAttention, more warps"] = partial(flex, flex_options(case))
    deepseek = (case.width, case.rope) == (512, 64)
    if find_spec("flash_mla") and deepseek and case.page in (0, 64):
        found["FlashMLA"] = flash_mla
    if find_spec("flashinfer") and (deepseek or not case.rope):
        found["FlashInfer"] = flashinfer_mla if case.rope else flashinfer_gqa
    if find_spec("flash_attn_interface") and (deepseek or not case.rope):
        found["FlashAttention 3"] = flash_attention_3
    return found
