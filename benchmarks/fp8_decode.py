"""Decode on FP8 latents beside decode on bfloat16 latents, on one GPU: `python benchmarks/fp8_decode.py`.

Batch 64, context 8,192, one query token. The FP8 cache is stored in rows, as FlashMLA's, and in three tensors
("apart"). Prints one JSON line for the card and one for each case: the times in microseconds (medians of CUDA-graph
replays), the ratio of bytes, the ratios of times, and the relative errors against float64 on the same cache. A
kernel that is wrong by more than 1e-2 is not timed. Each case is a process, so that a kernel that fails or does not
end costs its own case only. All compile at once, and one is timed at a time. `--stages 2 3 4` times other numbers
of tiles in flight.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headwise.kernels.decode.attend import launch_attend
from headwise.kernels.decode.latent_fp8 import (
    cache_views,
    dequantize_latent,
    num_blocks,
    quantize_latent,
    row_bytes,
)
from headwise.kernels.decode.tiling import Config, card_of, choose_tiles
from headwise.kernels.mla_decode import reference

# Heads, rank, rotary width.
CASES = ((32, 512, 64), (32, 256, 64), (14, 256, 64), (32, 128, 64), (32, 384, 32), (32, 512, 64, 64))
SCALE = 0.05
TOLERANCE = 1e-2
TARGET = 0.9
SECONDS = 80.0


class Problem:
    """Random queries, and a random cache in bfloat16 and in FP8, of pages in random order where `page` is not 0."""

    def __init__(self, heads: int, rank: int, rope: int, page: int, batch: int, context: int) -> None:
        generator = torch.Generator("cuda").manual_seed(batch)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16, generator=generator)

        self.rank = rank
        rows, self.table = (batch, context), None
        if page:
            rows = (batch * context // page, page)
            order = torch.randperm(rows[0], device="cuda", generator=generator)
            self.table = order.int().view(batch, -1)
        self.q = noise(batch, 1, heads, rank + rope)
        self.cache = noise(*rows, rank + rope)
        self.rows = torch.zeros(*rows, row_bytes(rank, rope), dtype=torch.uint8, device="cuda")
        views = cache_views(self.rows, rank)
        for one, *into in zip(self.cache, *views, strict=True):
            for view, content in zip(into, (*quantize_latent(one[:, :rank]), one[:, rank:]), strict=True):
                view.copy_(content)

        self.caches: dict[str, Any] = {
            "bf16": (self.cache[..., :rank], None, self.cache[..., rank:]),
            "fp8_rows": views,
            "fp8_apart": tuple(view.contiguous() for view in views),
        }

    def run(self, cache: str, config: Config | None = None, _index: int = 0) -> Tensor:
        """Decode on one of the caches."""
        rank = self.rank
        latent, scales, k_rope = self.caches[cache]
        return launch_attend(
            self.q[..., :rank], self.q[..., rank:], latent[:, :, None], k_rope[:, :, None], None, SCALE,
            None, None, self.table, None, scales, config,
        )[0]  # fmt: skip

    def error(self, name: str, config: Config | None = None) -> float:
        """Return the largest relative error of a sequence."""
        rank, cache = self.rank, self.cache.double()
        latent, scales, _ = self.caches[name]
        if scales is not None:
            cache[..., :rank] = dequantize_latent(latent, scales).double()
        q = self.q.double()
        expected, _ = reference.mla_decode(
            q[..., :rank], q[..., rank:], cache[..., :rank], cache[..., rank:], scale=SCALE, block_table=self.table
        )
        pairs = zip(self.run(name, config).double(), expected, strict=True)
        return max(((got - wanted).norm() / wanted.norm()).item() for got, wanted in pairs)


def time_case(case: tuple[int, ...], stages: int, lock: Path) -> dict[str, Any]:
    """Return the row of one case."""
    from kernels import time_of

    heads, rank, rope, page = (*case, 0)[:4]
    name = f"MLA {heads} heads {rank}+{rope}" + (f", pages of {page}" if page else "")
    config = choose_tiles(card_of(0), heads, rank, rope, rank, True, True)
    if stages:
        config = replace(config, stages=stages)
    row: dict[str, Any] = {"case": name, "tiles": asdict(config)}
    small = Problem(heads, rank, rope, page, 4, 1024)
    tiles = {"bf16": None, "fp8_rows": config, "fp8_apart": config}
    row["error"] = {cache: small.error(cache, of_cache) for cache, of_cache in tiles.items()}
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        problem = Problem(heads, rank, rope, page, 64, 8192)
        row["us"] = {
            cache: time_of(partial(problem.run, cache, of_cache)) * 1e6
            for cache, of_cache in tiles.items()
            if row["error"][cache] < TOLERANCE
        }
    numbers = 2 * (rank + rope), rank + 4 * num_blocks(rank) + 2 * rope
    row["bytes_ratio"] = numbers[0] / numbers[1]
    row["times_ratio"] = {cache: row["us"]["bf16"] / time for cache, time in row["us"].items() if cache != "bf16"}
    row["met"] = {cache: ratio >= TARGET * row["bytes_ratio"] for cache, ratio in row["times_ratio"].items()}
    row["tb_per_s"] = {cache: 64 * 8192 * numbers[cache != "bf16"] / us / 1e6 for cache, us in row["us"].items()}
    return row


def main() -> None:
    """Time every case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="*", default=[0], help="tiles in flight [the library's choice]")
    parser.add_argument("--only", default="", metavar="TEXT", help="only the cases with this in RANK+ROPE")
    parser.add_argument("--case", type=int, nargs="*", help=argparse.SUPPRESS)
    parser.add_argument("--lock", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print(json.dumps(time_case(tuple(options.case), options.stages[0], options.lock)), flush=True)
        return
    import triton

    started = time.monotonic()
    card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(json.dumps(card), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--lock", str(Path(folder) / "lock"), "--case"]
        children = [
            (case, stages, subprocess.Popen(
                [*command, *map(str, case), "--stages", str(stages)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            ))
            for stages in options.stages for case in CASES if options.only in f"{case[1]}+{case[2]}"
        ]  # fmt: skip
        for case, stages, child in children:
            try:
                printed, errors = child.communicate(timeout=max(1.0, SECONDS - (time.monotonic() - started)))
            except subprocess.TimeoutExpired:
                child.kill()
                printed, errors = "", f"no result after {SECONDS:.0f} s"
            failed = {"case": case, "stages": stages, "failed": errors.strip().splitlines()[-3:]}
            print(printed.strip() or json.dumps(failed), flush=True)


if __name__ == "__main__":
    main()
