"""Compile the decode kernels for cards that this machine need not have, and print the resources they use as JSON.

A separate program, because Triton must not be in interpreter mode:
`python tests/kernels/decode/compile_kernels.py NAMES`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from headwise.kernels.decode import hopper, hopper_fp8, hopper_wide, portable
from headwise.kernels.decode.latent_fp8 import BLOCK
from headwise.kernels.decode.tiling import Card, choose_tiles, chunks, latent_chunks

CARDS = {90: Card((9, 0), 132, 232448), 89: Card((8, 9), 128, 101376), 80: Card((8, 0), 108, 166912)}
# Capability, query rows, key, rotary and value width, MLA, page size; FP8: a latent in e4m3.
SHAPES: dict[str, tuple[Any, ...]] = {
    "sm_90 MLA 32 heads 512+64": (90, 32, 512, 64, 512, True, 0),
    "sm_90 MLA 28 heads 448+64, pages": (90, 28, 448, 64, 448, True, 16),
    "sm_90 MLA 9 heads 192+64": (90, 9, 192, 64, 192, True, 0),
    "sm_90 MLA 32 heads 128+64": (90, 32, 128, 64, 128, True, 0),
    "sm_90 MLA 12 heads 160+64": (90, 12, 160, 64, 160, True, 0),
    "sm_90 MLA 6 heads 96+32, pages": (90, 6, 96, 32, 96, True, 16),
    "sm_90 MLA 64 heads 208+48": (90, 64, 208, 48, 208, True, 0),
    "sm_90 MLA 128 heads 256+64, pages": (90, 128, 256, 64, 256, True, 16),
    "sm_90 MLA 128 heads 512+64": (90, 128, 512, 64, 512, True, 0),
    "sm_90 MLA 40 heads 320+64, pages": (90, 40, 320, 64, 320, True, 16),
    "sm_90 MLA 100 heads 448+48": (90, 100, 448, 48, 448, True, 0),
    "sm_90 GQA groups of 7 x64": (90, 7, 64, 0, 64, False, 0),
    "sm_90 GQA groups of 4 x128, pages": (90, 4, 128, 0, 128, False, 16),
    "sm_90 MLA 32 heads 208+48": (90, 32, 208, 48, 208, True, 0),
    "sm_89 MLA 14 heads 256+32, pages": (89, 14, 256, 32, 256, True, 16),
    "sm_90 MLA 32 heads 512+64, FP8": (90, 32, 512, 64, 512, True, 0, True),
    "sm_90 MLA 14 heads 256+64, FP8, pages": (90, 14, 256, 64, 256, True, 64, True),
    "sm_90 MLA 32 heads 384+32, FP8": (90, 32, 384, 32, 384, True, 0, True),
    "sm_90 MLA 32 heads 256+64, FP8": (90, 32, 256, 64, 256, True, 0, True),
    "sm_90 MLA 9 heads 128+64, FP8": (90, 9, 128, 64, 128, True, 0, True),
    "sm_90 MLA 32 heads 512+96, FP8": (90, 32, 512, 96, 512, True, 0, True),
    "sm_89 MLA 14 heads 256+32, FP8": (89, 14, 256, 32, 256, True, 16, True),
    "sm_80 MLA 14 heads 512+64": (80, 14, 512, 64, 512, True, 0),
    "sm_80 GQA groups of 5 x128, pages": (80, 5, 128, 0, 128, False, 16),
}


def map_type(name: str, box: list[int], kind: Any) -> str:
    """Return the type of a map of the copy engine, as Triton writes it in a signature."""
    return f"tensordesc<{name}{box},{gl.NVMMASharedLayout.get_default_for(box, kind)}>"


def compile_kernel(
    capability: int, rows: int, head: int, rope: int, value: int, latent: bool, page: int, fp8: bool = False
) -> tuple[Any, bool]:
    """Return a compiled kernel, and whether it is the one for Hopper."""
    # The copy engine has boxes of these rotary widths.
    boxes = rope in (0, 16, 32, 64)
    config = choose_tiles(CARDS[capability], rows, head, rope, value, latent, fp8, boxes)
    kernel = portable.attend
    if config.hopper:
        kernel = hopper_fp8.attend if fp8 else hopper_wide.attend if config.wide else hopper.attend
    widest = BLOCK if fp8 else None
    columns: tuple[Any, Any] = (chunks(head, widest), chunks(value, widest))
    if config.hopper and latent and not fp8:
        columns = (latent_chunks(head), latent_chunks(value))
    constants: dict[str, Any] = dict(
        HEAD=columns[0], ROPE=chunks(rope), VALUE=columns[1], VALUE_IS_KEY=latent,
        ROWS=config.rows, KEYS=config.keys, PAGE=page, STAGES=config.stages, Starts=None,
    )  # fmt: skip
    if config.hopper:
        constants["CONSUMERS"] = config.consumers
    maps: dict[str, str] = {}
    if config.hopper and fp8:
        # The cache is one of rows, in which the scales of a key begin at 16 bytes.
        box = min(page or config.keys, config.keys) if boxes else 0
        constants |= dict(BOX=box, QUAD=head > BLOCK, KeyBoxes=None, RopeBoxes=None)
        if box:
            maps["KeyBoxes"] = map_type("fp8e4nv", [box, BLOCK], gl.float8e4nv)
        if box and rope:
            maps["RopeBoxes"] = map_type("bf16", [box, rope], gl.bfloat16)
        constants = {name: constant for name, constant in constants.items() if name not in maps}
    if not rope:
        constants |= dict(QRope=None, KRope=None)
    if not fp8:
        constants["KScale"] = None
    if not page:
        constants["Table"] = None
    types = dict.fromkeys(("Q", "QRope", "K", "KRope", "V"), "*bf16") | dict.fromkeys(("Out", "Lse"), "*fp32")
    if fp8:
        types |= dict(K="*fp8e4nv", V="*fp8e4nv", KScale="*fp32")
    types |= dict.fromkeys(("Lengths", "Starts", "Table"), "*i32") | {"scale": "fp32"} | maps
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As at run time: pointers and the strides of queries and caches are multiples of sixteen.
    aligned = re.compile(r"(q|qr|k|v|out)_" if fp8 and config.hopper else r"(q|qr|k|kr|v|out)_")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and aligned.match(name))
    }
    source = (GluonASTSource if config.hopper else ASTSource)(
        kernel, signature, {(names.index(name),): constant for name, constant in constants.items()}, attributes
    )
    options = dict(num_warps=config.warps, maxnreg=config.registers)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options), config.hopper


def measure(kernel: Any, on_hopper: bool) -> dict[str, int]:
    """Return registers, bytes of stack (spills), shared memory and matrix instructions of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    ptx = kernel.asm["ptx"]
    return {
        "hopper": on_hopper,
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "copies": ptx.count("cp.async.cg"),
    }


if __name__ == "__main__":
    print(json.dumps({name: measure(*compile_kernel(*SHAPES[name])) for name in sys.argv[1:]}))
