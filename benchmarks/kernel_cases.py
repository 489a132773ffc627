"""What `kernels.py` computes: decode steps, the least that each must move and multiply, and their random inputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALE = 0.05


@dataclass(frozen=True)
class Case:
    """One decode step. `rope` 0: grouped cache with keys and values of `width`; else MLA of rank `width`.

    `selected`: the tokens of the context that each query attends to; 0: all.
    """

    name: str
    heads: int
    width: int
    rope: int = 0
    groups: int = 1
    batch: int = 64
    context: int = 8192
    page: int = 0
    queries: int = 1
    selected: int = 0

    @property
    def keys(self) -> int:
        return self.selected or self.context

    @property
    def numbers(self) -> int:
        return self.width + self.rope if self.rope else 2 * self.groups * self.width

    @property
    def bytes(self) -> int:
        return self.batch * self.keys * (2 * self.numbers + (4 if self.selected else 0))

    @property
    def operations(self) -> int:
        return 2 * self.batch * self.keys * self.heads * self.queries * (2 * self.width + self.rope)


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
    Case("MLA 128 heads 448+64", 128, 448, 64),
    Case("MLA 128 heads 384+64", 128, 384, 64),
    Case("MLA 128 heads 320+64", 128, 320, 64),
    Case("MLA 128 heads 256+64", 128, 256, 64),
    Case("MLA 128 heads 128+64", 128, 128, 64),
    Case("MLA 64 heads 512+64", 64, 512, 64),
    Case("MLA 32 heads 512+64, batch 1, 32,768", 32, 512, 64, batch=1, context=32768),
    Case("MLA 32 heads 512+64, batch 1, 4,096", 32, 512, 64, batch=1, context=4096),
    Case("MLA 32 heads 512+64, batch 4", 32, 512, 64, batch=4),
    Case("MLA 32 heads 512+64, batch 16", 32, 512, 64, batch=16),
    Case("MLA 32 heads 512+64, pages of 64", 32, 512, 64, page=64),
    Case("MLA 32 heads 512+64, 2 queries", 32, 512, 64, queries=2),
    Case("MLA 32 heads 512+64, 2 queries, pages of 64", 32, 512, 64, page=64, queries=2),
    Case("MLA 28 heads 448+64, 2 queries", 28, 448, 64, queries=2),
    Case("MLA 32 heads 512+64, 4 queries", 32, 512, 64, queries=4),
    Case("MLA 32 heads 512+64, 8 queries", 32, 512, 64, queries=8),
    Case("MLA odd shape: 24 heads 384+32", 24, 384, 32),
    Case("MLA odd shape: 12 heads 160+64", 12, 160, 64),
    Case("MLA odd shape: 40 heads 320+64", 40, 320, 64),
    Case("MLA odd shape: 6 heads 96+32", 6, 96, 32),
    *(
        Case(
            f"selection, MLA 32 heads {rank}+64: {named} of {context:,}",
            32,
            rank,
            64,
            batch=16,
            context=context,
            selected=selected,
        )
        for rank in (512, 192)
        for context in (32768, 131072)
        for named, selected in (("all", 0), ("2,048", 2048))
    ),
    Case("MQA 32/1 x128", 32, 128),
    Case("GQA 14/2 x64", 14, 64, groups=2),
    Case("GQA 32/8 x128", 32, 128, groups=8),
    Case("GQA 28/4 x128", 28, 128, groups=4),
    Case("MHA 32/32 x128, batch 16", 32, 128, groups=32, batch=16),
    Case("GQA 32/8 x128, pages of 16", 32, 128, groups=8, page=16),
    Case("GQA 28/4 x128, pages of 16", 28, 128, groups=4, page=16),
]


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
        scores = torch.rand(case.batch, case.queries, case.context if case.selected else 0, device="cuda")
        indices = scores.topk(case.selected, dim=-1).indices.int() if case.selected else None
        cache = noise(*rows, case.width + case.rope)
        return {"q": q, "cache": cache, "table": table, "indices": indices}
    q = noise(case.batch, case.queries, case.heads, case.width)
    k, v = (noise(*rows, case.groups, case.width) for _ in range(2))
    return {"q": q, "k": k, "v": v, "table": table}
