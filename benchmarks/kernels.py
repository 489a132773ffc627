"""The decode kernels against their rivals on one GPU: `python benchmarks/kernels.py [--json FILE] [--decode]`.

Every time is the median of CUDA-graph replays and is printed as percent of the larger of two floors, bytes over
the copy rate and operations over the matrix rate, both measured first in the same run. An implementation whose
output is wrong reports its error in place of a time. `--decode` adds whole-model decoding: a Llama-2-7B-shaped
parent and its MLA 512+64 child, random weights, each at the largest batch that fits 24 GiB.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from headwise.kernels.attend import launch
from headwise.kernels.gqa_decode import reference as gqa_reference
from headwise.kernels.gqa_decode.triton import gqa_decode
from headwise.kernels.mla_decode.triton import mla_decode
from headwise.kernels.rope_cache import reference as rope_reference
from headwise.kernels.rope_cache.triton import rope_cache

TOLERANCE = 1e-2  # of bfloat16 outputs, relative to a float64 reference on the same inputs
SCALE = 0.05


@dataclass(frozen=True)
class Case:
    """One decode step. `rope` 0: grouped cache with keys and values of `width`; else MLA of rank `width`."""

    name: str
    heads: int
    width: int
    rope: int = 0
    groups: int = 1
    batch: int = 64
    context: int = 8192
    page: int = 0
    queries: int = 1

    @property
    def numbers(self) -> int:
        return self.width + self.rope if self.rope else 2 * self.groups * self.width

    @property
    def bytes(self) -> int:
        return 2 * self.batch * self.context * self.numbers

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.context * self.heads * self.queries * (2 * self.width + self.rope)


CASES = [
    Case("MLA 32 heads 512+64", 32, 512, 64),
    Case("MLA 28 heads 448+64", 28, 448, 64),
    Case("MLA 32 heads 320+64", 32, 320, 64),
    Case("MLA 14 heads 256+64", 14, 256, 64),
    Case("MLA 32 heads 256+32", 32, 256, 32),
    Case("MLA 9 heads 192+64", 9, 192, 64),
    Case("MLA 32 heads 128+64", 32, 128, 64),
    Case("MLA 32 heads 512+128", 32, 512, 128),
    Case("MLA 128 heads 512+64", 128, 512, 64),
    Case("MLA 32 heads 512+64, batch 1, 32,768", 32, 512, 64, batch=1, context=32768),
    Case("MLA 32 heads 512+64, pages of 64", 32, 512, 64, page=64),
    Case("MLA 32 heads 512+64, 2 queries", 32, 512, 64, queries=2),
    Case("MQA 32/1 x128", 32, 128),
    Case("GQA 14/2 x64", 14, 64, groups=2),
    Case("GQA 32/8 x128", 32, 128, groups=8),
    Case("GQA 28/4 x128", 28, 128, groups=4),
    Case("MHA 32/32 x128, batch 16", 32, 128, groups=32, batch=16),
    Case("GQA 32/8 x128, pages of 16", 32, 128, groups=8, page=16),
    Case("GQA 28/4 x128, pages of 16", 28, 128, groups=4, page=16),
]


def time_of(call: Callable[[int], Any], calls: int = 8, repeats: int = 7) -> float:
    """Seconds of one call: `calls` of them in a CUDA graph, the median of `repeats` replays."""
    for index in range(2):
        call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / calls)
    return statistics.median(times)


def ceilings() -> tuple[float, float]:
    """Bytes per second of a large copy (read and written counted) and operations per second of a large product."""
    source = torch.randn(2**29, device="cuda")
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    copy = time_of(lambda _: target.copy_(source), 4)
    product = time_of(lambda _: a @ b, 4)
    # A graph copies through another engine on some drivers; the plain launch is the kernel's rate.
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(8):
        target.copy_(source)
    end.record()
    end.synchronize()
    copy = min(copy, start.elapsed_time(end) / 8e3)
    return 2 * source.nbytes / copy, 2 * 8192**3 / product


def inputs(case: Case, seed: int) -> dict[str, Tensor | None]:
    """Random queries and a random cache; a paged one in random page order."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    rows: tuple[int, int] = (case.batch, case.context)
    table = None
    if case.page:
        pages = case.context // case.page
        order = torch.randperm(case.batch * pages, device="cuda", generator=generator)
        table = order.int().view(case.batch, pages)
        rows = (case.batch * pages, case.page)
    if case.rope:
        q = noise(case.batch, case.queries, case.heads, case.width + case.rope)
        return {"q": q, "cache": noise(*rows, case.width + case.rope), "table": table}
    q = noise(case.batch, case.queries, case.heads, case.width)
    k, v = (noise(*rows, case.groups, case.width) for _ in range(2))
    return {"q": q, "k": k, "v": v, "table": table}


def ours(case: Case, x: dict[str, Any]) -> Tensor:
    if case.rope:
        q, cache, r = x["q"], x["cache"], case.width
        parts = (q[..., :r], q[..., r:], cache[..., :r], cache[..., r:])
        return mla_decode(*parts, scale=SCALE, block_table=x["table"])[0]
    return gqa_decode(x["q"], x["k"], x["v"], scale=SCALE, block_table=x["table"])[0]


def portable(case: Case, x: dict[str, Any]) -> Tensor:
    """The kernel for other cards, on this one."""
    card = launch.card_of(0)
    old = launch.Card((8, 0), card.multiprocessors, card.shared_memory)
    rows = case.queries * case.heads // case.groups
    config = launch.choose(old, rows, case.width, case.rope, case.width, bool(case.rope))
    if case.rope:
        q, cache, r = x["q"], x["cache"][:, :, None], case.width
        arguments = (q[..., :r], q[..., r:], cache[..., :r], cache[..., r:], None)
    else:
        arguments = (x["q"], None, x["k"], None, x["v"])
    return launch.run(*arguments, SCALE, None, None, x["table"], None, config=config)[0]


def eager(case: Case, x: dict[str, Any]) -> Tensor:
    """Absorbed attention as two batched products."""
    scores = torch.matmul(x["q"].flatten(1, 2), x["cache"].transpose(1, 2)) * SCALE
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(torch.bfloat16)
    return torch.matmul(weights, x["cache"][..., : case.width]).unflatten(1, (case.queries, case.heads))


def torch_attention(case: Case, x: dict[str, Any], backend: SDPBackend) -> Tensor:
    q, k, v = (x[name].transpose(1, 2) for name in "qkv")
    with sdpa_kernel(backend):
        return scaled_dot_product_attention(q, k, v, scale=SCALE, enable_gqa=case.groups < case.heads).transpose(
            1, 2
        )


def rivals(case: Case) -> dict[str, Callable[[Case, dict[str, Any]], Tensor]]:
    """Everything here that can compute the case."""
    found: dict[str, Callable[[Case, dict[str, Any]], Tensor]] = {"headwise": ours, "headwise portable": portable}
    if case.rope and not case.page and case.queries == 1:
        found["eager bmm"] = eager
    if not case.rope and not case.page:
        found["torch cuDNN"] = lambda c, x: torch_attention(c, x, SDPBackend.CUDNN_ATTENTION)
        found["torch flash"] = lambda c, x: torch_attention(c, x, SDPBackend.FLASH_ATTENTION)
    return found


def wrong_by(case: Case, call: Callable[[Case, dict[str, Any]], Tensor]) -> float:
    """The largest relative error over the sequences of a small batch against float64."""
    small = Case(case.name, case.heads, case.width, case.rope, case.groups, 4, 1024, case.page, case.queries)
    x = inputs(small, 7)
    out = call(small, x).double()
    if case.rope:
        cache = x["cache"].double()[:, :, None]
        k, v = cache, cache[..., : case.width]
    else:
        k, v = x["k"].double(), x["v"].double()
    expected, _ = gqa_reference.gqa_decode(x["q"].double(), k, v, scale=SCALE, block_table=x["table"])
    return max(((o - e).norm() / e.norm()).item() for o, e in zip(out, expected, strict=True))


def _turn_by_turn(call: Callable, case: Case, data: list[dict[str, Any]], index: int) -> Tensor:
    """Several inputs in turn, so that a small cache is not served from the L2."""
    return call(case, data[index % len(data)])


def decode_table(copy: float, product: float) -> list[dict[str, Any]]:
    rows = []
    for case in CASES:
        floor = max(case.bytes / copy, case.operations / product)
        sets = 1 if case.bytes > 2**28 else 4
        data = [inputs(case, seed) for seed in range(sets)]
        row: dict[str, Any] = {"case": case.name, "floor_us": floor * 1e6, "us": {}, "error": {}}
        for name, call in rivals(case).items():
            try:
                error = wrong_by(case, call)
                row["error"][name] = error
                if not error < TOLERANCE:
                    print(f"{case.name}: {name} is wrong by {error}")
                    continue
                row["us"][name] = time_of(partial(_turn_by_turn, call, case, data)) * 1e6
            except RuntimeError as problem:
                print(f"{case.name}: {name} cannot: {str(problem).splitlines()[0][:90]}")
        rows.append(row)
        shown = ", ".join(f"{name} {us:.1f} us {100 * floor * 1e6 / us:.0f}%" for name, us in row["us"].items())
        print(f"{case.name}: floor {floor * 1e6:.1f} us; {shown}", flush=True)
        torch.cuda.empty_cache()
    return rows


def separate_operations(
    q: Tensor, compressed: Tensor, weight: Tensor, positions: Tensor, frequencies: Tensor,
    latent_cache: Tensor, k_rope_cache: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """`rope_cache` as a model writes it: norm, cosine and sine, two rotations, two cache writes."""
    rank = weight.shape[0]
    latent = compressed[:, :rank].float()
    latent = weight * (latent * torch.rsqrt(latent.pow(2).mean(-1, keepdim=True) + 1e-6)).to(compressed.dtype)
    angle = positions[:, None].float() * frequencies
    cos, sin = angle.cos().to(q.dtype), angle.sin().to(q.dtype)
    k1, k2 = compressed[:, rank:].chunk(2, -1)
    q1, q2 = q.chunk(2, -1)
    latent_cache.view(-1, rank)[slots] = latent
    k_rope_cache.view(-1, k1.shape[1] * 2)[slots] = torch.cat([k1 * cos - k2 * sin, k2 * cos + k1 * sin], -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([q1 * cos - q2 * sin, q2 * cos + q1 * sin], -1)


def rope_table(copy: float) -> list[dict[str, Any]]:
    """rope_cache against the same operations under torch.compile."""
    rows = []
    heads, rank, rope = 32, 512, 64
    compiled = torch.compile(separate_operations, dynamic=False)
    for tokens in (64, 4096, 65536):
        q = torch.randn(tokens, heads, 192, device="cuda", dtype=torch.bfloat16)[..., 128:]
        arguments = (
            q,
            torch.randn(tokens, rank + rope, device="cuda", dtype=torch.bfloat16),
            torch.randn(rank, device="cuda", dtype=torch.bfloat16),
            torch.arange(tokens, device="cuda") % 8192,
            10000 ** -torch.linspace(0, 1, rope // 2, device="cuda"),
        )
        slots = torch.randperm(2 * tokens, device="cuda")[:tokens]
        caches = [torch.zeros(2 * tokens // 64, 64, n, device="cuda", dtype=torch.bfloat16) for n in (rank, rope)]
        expected_caches = [cache.clone() for cache in caches]
        expected = rope_reference.rope_cache(*arguments, *expected_caches, slots, eps=1e-6)
        got = rope_cache(*arguments, *caches, slots, eps=1e-6)
        pairs = [(got, expected), *zip(caches, expected_caches, strict=True)]
        error = max(((a.double() - b.double()).norm() / b.double().norm()).item() for a, b in pairs)
        assert error < TOLERANCE, f"rope_cache is wrong by {error}"
        bytes_moved = 2 * tokens * (2 * heads * rope + 2 * (rank + rope))
        row = {"tokens": tokens, "floor_us": bytes_moved / copy * 1e6, "error": error}
        everything = (*arguments, *caches, slots)
        row["headwise_us"] = time_of(lambda _, x=everything: rope_cache(*x, eps=1e-6)) * 1e6
        row["compiled_us"] = time_of(lambda _, x=everything: compiled(*x)) * 1e6
        rows.append(row)
        print(f"rope_cache {row}", flush=True)
    return rows


def models() -> list[tuple[str, Any]]:
    """A Llama-2-7B-shaped parent and its MLA 512+64 child, as configurations."""
    from transformers import DeepseekV3Config, LlamaConfig

    common = dict(
        vocab_size=32000, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=16384,
    )  # fmt: skip
    latent = dict(
        kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=128, v_head_dim=128, q_lora_rank=None,
        first_k_dense_replace=32,
    )  # fmt: skip
    return [("MHA parent", LlamaConfig(**common)), ("MLA 512+64", DeepseekV3Config(**common, **latent))]


def whole_models(context: int, memory: int) -> list[dict[str, Any]]:
    from dataclasses import asdict

    from transformers import AutoModelForCausalLM

    from headwise.eval.bench import largest_batch, measure

    rows = []
    for name, config in models():
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = AutoModelForCausalLM.from_config(config).eval()
            torch.set_default_dtype(torch.float32)
        batch = largest_batch(model, name, context, memory)
        speed = asdict(measure(model, name, context, batch))
        rows.append(speed)
        print(speed, flush=True)
        del model
        torch.cuda.empty_cache()
    gain = rows[1]["decode_tokens_per_second"] / rows[0]["decode_tokens_per_second"]
    print(f"decode throughput at {memory / 2**30:.0f} GiB, child over parent: {gain:.2f}")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--decode", action="store_true", help="whole-model decoding too")
    options = parser.parse_args()
    copy, product = ceilings()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy": copy, "product": product}
    result["decode"] = decode_table(copy, product)
    result["rope_cache"] = rope_table(copy)
    if options.decode:
        result["models"] = whole_models(8192, 24 * 2**30)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
