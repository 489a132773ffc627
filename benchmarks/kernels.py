"""The decode kernels against their rivals on one GPU: `python benchmarks/kernels.py [--json FILE] [--decode]`.

Every time is the median of CUDA-graph replays and is printed as percent of the larger of two floors, bytes over
the copy rate and operations over the matrix rate, both measured first in the same run. An implementation whose
output is wrong reports its error in place of a time. `--decode` adds whole-model decoding: a Llama-2-7B-shaped
parent and its MLA 512+64 child, random weights, each at the largest batch that fits 24 GiB. Libraries that can be
imported take part (`kernel_rivals.py`); those that compile on first use do so before they are timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from kernel_cases import CASES, SCALE, Case, inputs
from kernel_rivals import Rival, rivals
from torch import Tensor

from headwise.kernels.gqa_decode import reference as gqa_reference
from headwise.kernels.mla_decode import reference as mla_reference
from headwise.kernels.rope_cache import reference as rope_reference
from headwise.kernels.rope_cache.triton import rope_cache

TOLERANCE = 1e-2  # of bfloat16 outputs, relative to a float64 reference on the same inputs
LIBRARIES = ("torch", "triton", "transformers", "flashinfer", "flash_mla", "flash_attn_interface")


def time_of(call: Callable[[int], Any], calls: int = 8, repeats: int = 7) -> float:
    """Seconds of one call: `calls` of them in a CUDA graph, the median of `repeats` replays."""
    for index in range(calls):
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


def wrong_by(case: Case, call: Rival) -> float:
    """The largest relative error over the sequences of a small batch against float64."""
    small = replace(case, batch=4, context=1024, selected=min(case.selected, 256))
    x = inputs(small, 7)
    out = call(small, x).double()
    if case.selected:
        q, cache, r = x["q"].double(), x["cache"].double(), case.width
        parts = (q[..., :r], q[..., r:], cache[..., :r], cache[..., r:])
        expected, _ = mla_reference.mla_decode(*parts, scale=SCALE, indices=x["indices"])
        return max(((o - e).norm() / e.norm()).item() for o, e in zip(out, expected, strict=True))
    if case.rope:
        cache = x["cache"].double()[:, :, None]
        k, v = cache, cache[..., : case.width]
    else:
        k, v = x["k"].double(), x["v"].double()
    expected, _ = gqa_reference.gqa_decode(x["q"].double(), k, v, scale=SCALE, block_table=x["table"])
    return max(((o - e).norm() / e.norm()).item() for o, e in zip(out, expected, strict=True))


def _turn_by_turn(call: Rival, case: Case, data: list[dict[str, Any]], index: int) -> Tensor:
    """Several inputs in turn, so that a small cache is not served from the L2."""
    return call(case, data[index % len(data)])


def decode_table(copy: float, product: float, only: str) -> list[dict[str, Any]]:
    rows = []
    for case in (case for case in CASES if only in case.name):
        floor = max(case.bytes / copy, case.operations / product)
        sets = 1 if case.bytes > 2**28 else 4
        data = [inputs(case, seed) for seed in range(sets)]
        row: dict[str, Any] = {"case": case.name, "floor_us": floor * 1e6, "us": {}, "error": {}, "cannot": {}}
        for name, call in rivals(case).items():
            try:
                error = wrong_by(case, call)
                row["error"][name] = error
                if not error < TOLERANCE:
                    print(f"{case.name}: {name} is wrong by {error}")
                    continue
                row["us"][name] = time_of(partial(_turn_by_turn, call, case, data)) * 1e6
            except Exception as problem:  # a rival's own error types, unknown here; it only loses its place
                reason = next(iter(str(problem).splitlines()), type(problem).__name__)[:150]
                row["cannot"][name] = reason
                print(f"{case.name}: {name} cannot: {reason}")
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

    from headwise.eval.bench import largest_batch, time_decoding

    rows = []
    for name, config in models():
        with torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            model = AutoModelForCausalLM.from_config(config).eval()
            torch.set_default_dtype(torch.float32)
        batch = largest_batch(model, name, context, memory)
        speed = asdict(time_decoding(model, name, context, batch))
        rows.append(speed)
        print(speed, flush=True)
        del model
        torch.cuda.empty_cache()
    gain = rows[1]["decode_tokens_per_second"] / rows[0]["decode_tokens_per_second"]
    print(f"decode throughput at {memory / 2**30:.0f} GiB, child over parent: {gain:.2f}")
    return rows


def versions() -> dict[str, str]:
    """Of the libraries here; why one that is installed cannot be imported."""
    found = {}
    for name in filter(find_spec, LIBRARIES):
        try:
            found[name] = getattr(import_module(name), "__version__", "unknown")
        except (ImportError, OSError) as problem:
            found[name] = f"cannot be imported: {problem}"
    print(", ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="also write everything to this file")
    parser.add_argument("--decode", action="store_true", help="whole-model decoding too")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases with this in their name")
    options = parser.parse_args()
    copy, product = ceilings()
    torch.cuda.empty_cache()
    print(f"{torch.cuda.get_device_name()}: copy {copy / 1e12:.2f} TB/s, bf16 product {product / 1e12:.0f} TFLOP/s")
    result: dict[str, Any] = {"device": torch.cuda.get_device_name(), "copy": copy, "product": product}
    result["versions"] = versions()
    result["decode"] = decode_table(copy, product, options.only)
    if options.only in "rope_cache":
        result["rope_cache"] = rope_table(copy)
    if options.decode:
        result["models"] = whole_models(8192, 24 * 2**30)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
