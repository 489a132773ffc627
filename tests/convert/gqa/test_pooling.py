"""The pooling methods: one of the members, or their mean."""

from __future__ import annotations

import torch

from headwise.convert.gqa.pooling import first_head, mean_head, random_head


def test_a_pooled_head_is_the_mean_the_first_or_a_random_member() -> None:
    heads = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    groups = [[0, 1, 2], [3, 4, 5]]
    assert torch.equal(mean_head(heads, groups), heads.double().unflatten(0, (2, 3)).mean(1))
    assert torch.equal(first_head(heads, groups), heads.double()[[0, 3]])
    seen = set()
    for seed in range(20):
        found = random_head(heads, groups, seed)
        assert torch.equal(found, random_head(heads, groups, seed))
        picks = [[torch.equal(f, heads[j].double()) for j in group] for f, group in zip(found, groups, strict=True)]
        assert all(sum(p) == 1 for p in picks)
        seen.add(tuple(p.index(True) for p in picks))
    assert len(seen) > 4
