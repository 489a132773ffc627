"""Tokens per second of vLLM's decode for the shape of Llama-2-7B, MHA or MLA, at a context in a given memory.

    python -m benchmarks.vllm_throughput WORK                         the parent with 32 KV heads
    python -m benchmarks.vllm_throughput WORK --rank 384              its MLA child, with a rotary key of 64
    python -m benchmarks.vllm_throughput FOLDER --given --memory 24   a checkpoint, with its weights

WORK gets a config.json; vLLM draws random weights. The memory is for weights, 2.5 GB of all else, and the cache. As
many sequences as the cache holds get prompts of random tokens, of such a length that they reach the context at the
end. When all decode, the steps are timed. Prints one JSON line. vLLM is no dependency; `--small` tries it on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.make_checkpoint import llama_2
from headwise.models.layout import AttentionLayout
from headwise.serving.latent_shape import latent_config
from headwise.serving.model_forecast import count_parameters_of

REST, MOST = 2.5e9, 224
# Batches for which CUDA graphs are recorded.
RECORDED = [1, 2, 4, 5, 6, 8, *range(16, MOST + 1, 8)]


def write_config(folder: Path, rank: int | None, small: bool) -> dict[str, Any]:
    """Write the config.json of the parent, or of its MLA child, and return it."""
    shape = llama_2("7b", layers=2 if small else None)
    shape.max_position_embeddings = 16384
    if small:
        shape.hidden_size, shape.intermediate_size, shape.head_dim = 256, 512, 64
        shape.num_attention_heads = shape.num_key_value_heads = 4
    config: dict[str, Any] = json.loads(json.dumps(shape.to_dict(), default=str))
    if rank:
        heads, width = shape.num_attention_heads, shape.hidden_size // shape.num_attention_heads
        layout = AttentionLayout(heads, heads, width + 64, width, 64, kv_lora_rank=rank, qk_rope_head_dim=64)
        config = latent_config(config, layout, ["vllm"], biased=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return config


def measure(
    folder: Path,
    rank: int | None,
    memory: float,
    context: int,
    steps: int,
    *,
    small: bool = False,
    given: bool = False,
) -> dict[str, Any]:
    """Fill the cache with sequences, and time steps in which all of them decode."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from vllm import LLM, SamplingParams

    config = json.loads((folder / "config.json").read_text()) if given else write_config(folder, rank, small)
    parameters = count_parameters_of(config)[0] or 0
    rank = config.get("kv_lora_rank")
    if rank:  # vLLM keeps the up-projections of MLA twice: for prefill, and absorbed
        heads = config["num_attention_heads"]
        again = rank * heads * (config["qk_nope_head_dim"] + config["v_head_dim"])
        parameters += config["num_hidden_layers"] * again
    on_gpu = torch.cuda.is_available()
    model = LLM(
        model=str(folder), load_format="auto" if given else "dummy", skip_tokenizer_init=True, dtype="bfloat16",
        seed=0,
        max_model_len=context + (0 if given else 64), max_num_seqs=256, max_num_batched_tokens=context,
        kv_cache_memory_bytes=int(memory - 2 * parameters - REST), enable_prefix_caching=False,
        **({"compilation_config": {"cudagraph_capture_sizes": RECORDED}} if on_gpu else {"enforce_eager": True}),
    )  # fmt: skip
    engine = model.llm_engine
    cache = engine.vllm_config.cache_config
    tokens = cache.num_gpu_blocks * cache.block_size
    count = min(tokens // context, 4 if small else MOST)
    options = SamplingParams(temperature=0, max_tokens=steps + 2 * count + 36, ignore_eos=True, detokenize=False)
    length = context - options.max_tokens
    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    for i in range(count):
        prompt = torch.randint(3, config["vocab_size"], (length,), generator=generator).tolist()
        engine.add_request(str(i), {"prompt_token_ids": prompt}, options)
    written: dict[str, int] = {}

    def advance() -> int:
        before = sum(written.values())
        written.update({each.request_id: len(each.outputs[0].token_ids) for each in engine.step()})
        return sum(written.values()) - before

    while len(written) < count:
        advance()
    prefill = time.perf_counter() - start
    for _ in range(4):
        advance()
    if on_gpu:
        torch.cuda.synchronize()
    start = time.perf_counter()
    made = sum(advance() for _ in range(steps))
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    return {
        "rank": rank,
        "sequences": count,
        "prompt": length,
        "prefill, tokens/s": round(count * length / prefill),
        "decode, tokens/s": round(made / seconds, 1),
        "step, ms": round(1e3 * seconds / steps, 2),
    }


def main() -> None:
    """Measure one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--rank", type=int, help="of the latent; without it, the parent")
    parser.add_argument("--memory", type=float, default=40, help="GB of 10^9 bytes")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="a tiny shape")
    parser.add_argument("--given", action="store_true", help="WORK is a checkpoint")
    options = parser.parse_args()
    if options.given and (options.rank or options.small):
        parser.error("--given measures the checkpoint as it is: leave out --rank and --small")
    memory, kinds = options.memory * 1e9, {"small": options.small, "given": options.given}
    print(json.dumps(measure(options.work, options.rank, memory, options.context, options.steps, **kinds)))


if __name__ == "__main__":
    main()
