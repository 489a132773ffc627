"""Attention entropy, against attention weights of known entropy."""

from __future__ import annotations

import math

import pytest
import torch

from headwise.measure.entropy import HeadIndex, compare_entropy, relative_entropy


def test_entropy_of_known_attention() -> None:
    length = 32
    causal = torch.ones(length, length).tril()
    uniform = causal / causal.sum(-1, keepdim=True)
    first = torch.zeros(length, length)
    first[:, 0] = 1
    half = torch.zeros(length, length)
    half[:, :2] = 0.5
    entropy = relative_entropy(torch.stack([uniform, first, half]))
    by_hand = sum(math.log(2) / math.log(seen) for seen in range(17, 33)) / 16
    assert entropy.tolist() == pytest.approx([1.0, 0.0, by_hand], abs=1e-6)


def test_a_window_bounds_the_visible_keys() -> None:
    band = torch.ones(32, 32).tril().triu(-3)
    assert float(relative_entropy((band / band.sum(-1, keepdim=True))[None])) == pytest.approx(1.0)


def test_heads_beyond_the_bounds_are_listed_once() -> None:
    parent = torch.tensor([[0.5, 0.01, 0.5], [0.99, 0.5, 0.5]])
    child = torch.tensor([[0.01, 0.01, 0.55], [0.99, 0.99, 0.35]])
    entropy = compare_entropy(child, parent)
    assert entropy.collapsed == (HeadIndex(0, 0),) and entropy.parent_collapsed == (HeadIndex(0, 1),)
    assert entropy.uniform == (HeadIndex(1, 1),) and entropy.parent_uniform == (HeadIndex(1, 0),)
    assert entropy.changed == (HeadIndex(0, 0), HeadIndex(1, 1), HeadIndex(1, 2))
