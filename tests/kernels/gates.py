"""Compile the decode kernels for cards that are not here, and print what the compiler made of them as JSON.

A program of its own, because Triton must not be in interpreter mode: `python tests/kernels/gates.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from headwise.kernels.decode import hopper, portable
from headwise.kernels.decode.launch import Card, choose, chunks

CARDS = {90: Card((9, 0), 132, 232448), 89: Card((8, 9), 128, 101376), 80: Card((8, 0), 108, 166912)}
# capability, query rows, key, rotary and value width, MLA, page size
SHAPES = [
    (90, 32, 512, 64, 512, True, 0),
    (90, 28, 448, 64, 448, True, 16),
    (90, 9, 192, 64, 192, True, 0),
    (90, 32, 128, 64, 128, True, 0),
    (90, 128, 512, 64, 512, True, 0),
    (90, 7, 64, 0, 64, False, 0),
    (90, 4, 128, 0, 128, False, 16),
    (90, 32, 208, 48, 208, True, 0),
    (89, 14, 256, 32, 256, True, 16),
    (80, 14, 512, 64, 512, True, 0),
    (80, 5, 128, 0, 128, False, 16),
]


def compiled(capability, rows, head, rope, value, latent, page) -> Any:
    config = choose(CARDS[capability], rows, head, rope, value, latent)
    kernel = hopper.attend if config.hopper else portable.attend
    constants: dict[str, Any] = dict(
        HEAD=chunks(head), ROPE=chunks(rope), VALUE=chunks(value), VALUE_IS_KEY=latent, ROWS=config.rows,
        KEYS=config.keys, PAGE=page, STAGES=config.stages, Starts=None,
    )  # fmt: skip
    if config.hopper:
        constants["CONSUMERS"] = config.consumers
    if not rope:
        constants |= dict(QRope=None, KRope=None)
    if not page:
        constants["Table"] = None
    types = dict.fromkeys(("Q", "QRope", "K", "KRope", "V"), "*bf16") | dict.fromkeys(("Out", "Lse"), "*fp32")
    types |= dict.fromkeys(("Lengths", "Starts", "Table"), "*i32") | {"scale": "fp32"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    # As at run time: pointers and the strides of queries and caches are multiples of sixteen.
    aligned = re.compile(r"(q|qr|k|kr|v|out)_")
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and aligned.match(name))
    }
    source = (GluonASTSource if config.hopper else ASTSource)(
        kernel, signature, {(names.index(name),): constant for name, constant in constants.items()}, attributes
    )
    options = dict(num_warps=config.warps, maxnreg=config.registers)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def report(kernel: Any) -> dict[str, int]:
    """Registers, bytes of stack (spills), shared memory and matrix instructions of one compiled kernel."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    ptx = kernel.asm["ptx"]
    return {
        "registers": registers,
        "stack": stack,
        "shared": kernel.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync", ptx)),
        "copies": ptx.count("cp.async.cg"),
    }


if __name__ == "__main__":
    print(json.dumps([report(compiled(*shape)) for shape in SHAPES]))
