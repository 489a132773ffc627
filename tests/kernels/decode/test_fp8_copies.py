"""How a cache of FP8 latents can be copied: boxes of the copy engine, or rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from headwise.kernels.decode import attend as launcher
from headwise.kernels.decode.latent_fp8 import DTYPE, cache_views, num_blocks, row_bytes
from headwise.kernels.decode.tiling import Card

# Gluon changes between Triton releases.
copies: Any = pytest.importorskip("headwise.kernels.decode.fp8_copies", exc_type=ImportError)
PAGES, PAGE, KEYS = 6, 64, 128


def rows_of(rank: int, rope: int, page: int = PAGE, extra: int = 0, shift: int = 0) -> tuple[Tensor, ...]:
    """Return the views of a cache in rows, with bytes between rows, and with its start moved."""
    width = row_bytes(rank, rope)
    store = torch.zeros(PAGES * page * (width + extra) + shift, dtype=torch.uint8)[shift:]
    store = store.view(PAGES, page, width + extra)[..., :width]
    latent, scale, k_rope = cache_views(store, rank)
    return latent[:, :, None], scale, k_rope[:, :, None, :rope]


def apart(rank: int, rope: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, ...]:
    """Return a cache of three tensors."""
    latent = torch.zeros(PAGES, PAGE, 1, rank).to(DTYPE)
    return latent, torch.zeros(PAGES, PAGE, num_blocks(rank)), torch.zeros(PAGES, PAGE, 1, rope, dtype=dtype)


def options(cache: tuple[Tensor, ...], page: int, keys: int = KEYS) -> dict[str, Any]:
    latent, scale, k_rope = cache
    found: dict[str, Any] = copies.copy_options(latent, k_rope if k_rope.shape[3] else None, scale, page, keys)
    return found


@pytest.mark.parametrize("rank, rope", [(512, 64), (384, 32), (256, 64), (256, 16), (128, 64)])
@pytest.mark.parametrize("page, keys, box", [(0, 128, 128), (0, 64, 64), (64, 128, 64), (64, 64, 64), (16, 64, 16)])
def test_boxes_of_rows(rank: int, rope: int, page: int, keys: int, box: int) -> None:
    cache = rows_of(rank, rope, page or PAGE)
    found = options(cache, page, keys)
    assert found["BOX"] == box
    # The maps take the cache as one matrix.
    pitch = row_bytes(rank, rope)
    for part, one, width in ((cache[0], "KeyBoxes", 128), (cache[2], "RopeBoxes", rope)):
        size = part.element_size()
        assert found[one].shape == [PAGES * (page or PAGE), part.shape[3]]
        assert found[one].strides == [pitch // size, 1] and found[one].block_shape == [box, width]
        assert found[one].base.data_ptr() == part.data_ptr()
    # One block has one scale; more blocks have four numbers, which begin at 16 bytes.
    assert found["QUAD"] == (rank > 128)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_boxes_of_three_tensors(dtype: torch.dtype) -> None:
    found = options(apart(256, 64, dtype), 0)
    assert found["BOX"] == KEYS and found["RopeBoxes"].base.dtype == dtype
    assert not found["QUAD"]
    # Four scales stand side by side in a tensor of their own, too.
    assert options(apart(512, 64), 0)["QUAD"]


def test_no_rotary_part() -> None:
    found = options(apart(256, 0), 0)
    assert found["BOX"] == KEYS and found["RopeBoxes"] is None


@pytest.mark.parametrize("page", [1, 4, 24, 40, 48])
def test_pages_that_do_not_divide_a_tile_are_copied_row_by_row(page: int) -> None:
    found = options(rows_of(256, 64, page), page)
    assert found["BOX"] == 0 and found["KeyBoxes"] is None and found["RopeBoxes"] is None


def test_pages_of_several_tiles() -> None:
    assert options(rows_of(256, 64, 256), 256, 64)["BOX"] == 64
    assert options(rows_of(256, 64, 96), 96, 64)["BOX"] == 0


@pytest.mark.parametrize("rope", [48, 96, 128])
def test_other_rotary_widths_are_copied_row_by_row(rope: int) -> None:
    assert options(rows_of(256, rope), 0)["BOX"] == 0


def test_pages_that_are_no_multiple_of_a_row_apart_are_copied_row_by_row() -> None:
    """A page may hold more than its rows: then its rows are no rows of one matrix."""
    pitch = row_bytes(256, 64)
    store = torch.zeros(PAGES, PAGE * pitch + 16, dtype=torch.uint8)
    latent, scale, k_rope = cache_views(store.as_strided((PAGES, PAGE, pitch), (PAGE * pitch + 16, pitch, 1)), 256)
    found = options((latent[:, :, None], scale, k_rope[:, :, None]), PAGE)
    assert found["BOX"] == 0 and found["QUAD"]
    # A whole row more is one.
    store = torch.zeros(PAGES, (PAGE + 1) * pitch, dtype=torch.uint8)
    latent, scale, k_rope = cache_views(store.view(PAGES, PAGE + 1, pitch)[:, :PAGE], 256)
    found = options((latent[:, :, None], scale, k_rope[:, :, None]), PAGE)
    assert found["BOX"] == PAGE and found["KeyBoxes"].shape == [PAGES * (PAGE + 1) - 1, 256]


def test_pages_of_latent_and_rotary_keys_must_have_as_many_rows() -> None:
    latent, scale, _ = apart(256, 64)
    k_rope = torch.zeros(PAGES, PAGE + 1, 1, 64, dtype=torch.bfloat16)[:, :PAGE]
    assert options((latent, scale, k_rope), 0)["BOX"] == 0


@pytest.mark.parametrize("extra, shift", [(8, 0), (0, 8), (4, 0), (4, 4)])
def test_rows_that_do_not_begin_at_16_bytes_run_the_portable_kernel(
    monkeypatch: pytest.MonkeyPatch, extra: int, shift: int
) -> None:
    cache = rows_of(256, 64, extra=extra, shift=shift)
    assert options(cache, 0)["BOX"] == 0
    ((name, found),) = launch(monkeypatch, cache)
    assert name == "portable" and "BOX" not in found


def test_the_launcher_passes_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    ((name, found),) = launch(monkeypatch, rows_of(256, 64))
    assert name == "hopper" and found["BOX"] == 64 and found["QUAD"] and found["CONSUMERS"] == 1
    assert found["KeyBoxes"].block_shape == [64, 128] and found["RopeBoxes"].block_shape == [64, 64]


def test_caches_without_boxes_have_tiles_of_64_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies row by row ran with two groups of warps, which have tiles of 64 keys."""
    latent, scale, _ = apart(256, 64)
    k_rope = torch.zeros(PAGES, PAGE + 1, 1, 64, dtype=torch.bfloat16)[:, :PAGE]
    ((name, found),) = launch(monkeypatch, (latent, scale, k_rope))
    assert name == "hopper" and found["BOX"] == 0 and found["CONSUMERS"] == 2 and found["KEYS"] == 64


def test_one_stride_for_all_rows_is_no_matrix() -> None:
    latent, scale, k_rope = apart(256, 64)
    assert options((latent[:, :1].expand(-1, PAGE, -1, -1), scale, k_rope), 0)["BOX"] == 0


def launch(monkeypatch: pytest.MonkeyPatch, cache: tuple[Tensor, ...]) -> list[tuple[str, dict[str, Any]]]:
    """Return which kernels a launch on a Hopper card starts, and the options of copies."""
    launched: list[tuple[str, dict[str, Any]]] = []

    class Kernel:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            named = ("BOX", "QUAD", "KeyBoxes", "RopeBoxes", "CONSUMERS", "KEYS")
            return lambda *_, **given: launched.append((self.name, {n: given[n] for n in named if n in given}))

    monkeypatch.setattr(launcher, "card_of", lambda index: Card((9, 0), 132, 232448))
    monkeypatch.setattr(launcher.hopper_fp8, "attend", Kernel("hopper"))
    monkeypatch.setattr(launcher.portable, "attend", Kernel("portable"))
    latent, scale, k_rope = cache
    q = torch.zeros(PAGES, 1, 9, 256 + 64, dtype=torch.bfloat16)
    launcher.launch_attend(
        q[..., :256], q[..., 256:], latent, k_rope, None, 1.0, None, None, None, None, scale, num_splits=1
    )
    return launched
