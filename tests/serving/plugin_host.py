"""What the tests of the plugins share: modules in the place of an engine's, and a paged cache."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import headwise


def install_modules(monkeypatch: pytest.MonkeyPatch, modules: Mapping[str, tuple[Any, ...]]) -> None:
    """Put modules with the given classes and functions in the place of an engine's for one test."""
    for name, contents in modules.items():
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in sys.modules or not hasattr(sys.modules[path], "stand_in"):
                module = ModuleType(path)
                module.stand_in = True  # type: ignore[attr-defined]
                module.__path__ = []
                monkeypatch.setitem(sys.modules, path, module)
                if end > 1:
                    setattr(sys.modules[".".join(parts[: end - 1])], parts[end - 1], module)
        for content in contents:
            setattr(sys.modules[name], content.__name__, content)


def entry_point(group: str) -> Any:
    """Return the function that pyproject.toml declares for a group of entry points."""
    project = Path(headwise.__file__).parents[1] / "pyproject.toml"
    section = project.read_text(encoding="utf-8").partition(f'[project.entry-points."{group}"]\n')[2]
    module, _, function = section.partition("\n")[0].removeprefix("headwise = ").strip('"').partition(":")
    return getattr(importlib.import_module(module), function)


def paged(cache: Tensor, page_size: int) -> tuple[Tensor, Tensor]:
    """Return (sequences, tokens, row) as pages in reverse order, and the block table."""
    sequences, tokens, row = cache.shape
    count = tokens // page_size
    table = torch.arange(sequences * count).flip(0).int().view(sequences, count)
    pages = torch.empty(sequences * count, page_size, row, dtype=cache.dtype)
    pages[table.flatten().long()] = cache.reshape(-1, page_size, row)
    return pages, table


def noise(*shape: int) -> Tensor:
    """Return random numbers that depend on the shape only."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))
