"""The choice of tiles and splits: rules that hold for every shape."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from hypothesis import given
from hypothesis import strategies as st

from headwise.kernels.decode.tiling import (
    Card,
    Config,
    card_of,
    choose_merge,
    choose_splits,
    choose_tiles,
    chunks,
    latent_chunks,
    padded,
)

HOPPER = Card((9, 0), 132, 232448)
CARDS = [HOPPER, Card((8, 0), 108, 166912), Card((8, 9), 128, 101376), Card((12, 0), 170, 101376)]
widths = st.integers(1, 36).map(lambda n: 16 * n)


@given(widths)
def test_chunks_cover_a_width_exactly(width: int) -> None:
    pieces = chunks(width)
    assert sum(piece for _, piece in pieces) == width
    assert [start for start, _ in pieces] == [sum(p for _, p in pieces[:i]) for i in range(len(pieces))]
    assert all(piece & (piece - 1) == 0 for _, piece in pieces)


def test_an_amd_card_is_not_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """AMD has numbers of its own: an MI300 is 9.4."""
    card = SimpleNamespace(major=9, minor=4, multi_processor_count=304, shared_memory_per_block_optin=65536)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    amd = card_of.__wrapped__(0)
    assert (amd.multiprocessors, amd.shared_memory) == (304, 65536)
    assert not choose_tiles(amd, 32, 512, 64, 512, True).hopper


@given(widths)
def test_chunks_of_a_latent_are_padded_to_64_columns(width: int) -> None:
    pieces = latent_chunks(width)
    assert sum(piece[1] for piece in pieces) == padded(width) < width + 64
    assert all(piece[1] >= 64 for piece in pieces)
    exist = [piece[2] if len(piece) == 3 else piece[1] for piece in pieces]
    assert sum(exist) == width
    assert all(len(piece) == 2 for piece in pieces[:-1])
    assert (len(pieces[-1]) == 3) == (width % 64 != 0)


def test_chunks_of_448_have_no_padding() -> None:
    assert chunks(448) == ((0, 256), (256, 128), (384, 64))


@given(st.sampled_from(CARDS), st.integers(1, 256), widths, st.integers(0, 8).map(lambda n: 16 * n), st.booleans())
def test_tiles_fit_the_card(card: Card, rows: int, width: int, rope: int, latent: bool) -> None:
    config = choose_tiles(card, rows, width, rope, width, latent)
    assert config.rows & (config.rows - 1) == 0
    exact = card is HOPPER and (latent or width % 64 == 0)
    assert exact or not config.hopper
    columns = padded(width) if latent and config.hopper else width
    # Separate keys and values wider than this leave no room for two tiles of 64 keys.
    assert config.hopper or not exact or (not latent and width > 256)
    if config.hopper:
        row_bytes = 2 * (columns + rope + (0 if latent else width))
        queries = config.consumers * config.rows * 2 * (columns + rope + config.keys)
        if config.wide:
            # A stage is a tile of half of the keys; its weights take the place of its rotary keys, or their own.
            queries = config.rows * 2 * (columns + rope)
            row_bytes = columns + rope + (0 if rope == 64 else 64)
        assert config.resident * (config.stages * config.keys * row_bytes + queries) <= card.shared_memory
        assert config.rows * columns <= (64 if config.wide else 32) * 512


@pytest.mark.parametrize(
    "rows, rank, rope, wide",
    [
        (128, 512, 64, True), (64, 512, 64, True), (33, 512, 64, True), (32, 512, 64, False), (32, 320, 64, False),
        (33, 320, 64, True), (40, 384, 64, True), (256, 128, 64, True), (128, 64, 32, False),
        (128, 576, 64, False), (128, 208, 48, False), (100, 448, 48, True), (128, 512, 128, False),
        (64, 512, 48, False), (64, 512, 80, False), (64, 448, 96, True), (64, 448, 112, False),
        (64, 384, 160, True), (64, 384, 176, False), (64, 320, 224, True), (64, 320, 240, False),
        (64, 256, 288, True), (64, 256, 304, False),
    ],
)  # fmt: skip
def test_many_rows_of_a_latent_share_a_tile(rows: int, rank: int, rope: int, wide: bool) -> None:
    assert choose_tiles(HOPPER, rows, rank, rope, rank, True).wide == wide
    assert not choose_tiles(HOPPER, rows, rank, rope, rank, False).wide
    assert not choose_tiles(HOPPER, rows, rank, rope, rank, True, True).wide
    # It masks scores before it scales them: -inf times a negative scale is +inf, times 0 it is NaN.
    assert not choose_tiles(HOPPER, rows, rank, rope, rank, True, positive_scale=False).wide


@pytest.mark.parametrize("rank, stages", [(128, 8), (256, 4), (320, 3), (384, 2), (448, 2), (512, 2)])
def test_the_ring_of_many_rows_decides_their_order_of_products(rank: int, stages: int) -> None:
    """`hopper_wide` hands weights over early with three tiles or fewer: faster at 320 and 512, slower below."""
    assert choose_tiles(HOPPER, 64, rank, 64, rank, True).stages == stages


@given(st.integers(1, 256), widths, st.integers(0, 8).map(lambda n: 16 * n))
def test_fp8_tiles_fit_the_card(rows: int, width: int, rope: int) -> None:
    config = choose_tiles(HOPPER, rows, width, rope, width, True, True)
    assert config.hopper == (width in (128, 256, 384, 512))
    if config.hopper:
        stage = config.keys * (width + 4 * -(-width // 128) + 2 * rope)
        queries = config.rows * (2 * width + 2 * rope + 2 * config.consumers * config.keys)
        assert config.stages >= 2 and config.stages % config.consumers == 0
        # CUDA takes 1 KiB of each of the programs that share a multiprocessor.
        room = HOPPER.shared_memory + 1024
        assert config.resident * (config.stages * stage + queries + 1024) <= room
        # Partial results of 4 bytes must fit into the ring of keys, block by block.
        assert config.consumers == 1 or 4 * config.rows <= config.stages * config.keys
        # A warp for 16 keys, and the registers of all warps that compute.
        assert config.keys == 16 * config.warps


@pytest.mark.parametrize(
    "rows, rank, rope, tiles",
    [
        (32, 512, 64, (128, 8, 2, 1, 1, None)), (32, 384, 32, (64, 4, 6, 2, 1, None)),
        (32, 256, 64, (64, 4, 6, 2, 1, None)), (14, 256, 64, (64, 4, 3, 1, 2, 128)),
        (32, 128, 64, (64, 4, 8, 2, 1, None)),
    ],
)  # fmt: skip
def test_fp8_tiles_are_those_that_were_measured(
    rows: int, rank: int, rope: int, tiles: tuple[int | None, ...]
) -> None:
    """Keys, warps of a group, stages, groups, programs, registers."""
    config = choose_tiles(HOPPER, rows, rank, rope, rank, True, True)
    assert config == Config(True, 32 if rows > 16 else 16, *tiles)  # type: ignore[arg-type]
    # It masks scores before it scales them, as `hopper_wide`.
    assert not choose_tiles(HOPPER, rows, rank, rope, rank, True, True, positive_scale=False).hopper
    # Copies row by row ran with two groups.
    by_row = choose_tiles(HOPPER, rows, rank, rope, rank, True, True, boxes=False)
    assert by_row.consumers == 2 and by_row.keys == 64


@given(st.integers(1, 5000), st.integers(1, 100_000))
def test_splits_are_never_more_than_tiles(programs: int, keys: int) -> None:
    config = choose_tiles(HOPPER, 32, 512, 64, 512, True)
    assert 1 <= choose_splits(programs, keys, config, 132) <= max(1, -(-keys // config.keys))


def test_splits_fill_the_multiprocessors() -> None:
    config = choose_tiles(HOPPER, 32, 512, 64, 512, True)
    assert choose_splits(64, 8192, config, 132) == 2
    assert choose_splits(1, 32768, config, 132) == 128
    assert choose_splits(132, 8192, config, 132) == 1


@pytest.mark.parametrize(
    "rows, width, num_splits, tile",
    [
        (32, 512, 128, (128, 32)), (2048, 512, 2, (2, 512)), (2048, 448, 3, (4, 512)), (32, 512, 4, (4, 128)),
        (2048, 64, 2, (2, 64)), (8, 512, 256, (256, 16)), (2048, 1024, 2, (2, 1024)),
    ],
)  # fmt: skip
def test_the_merge_holds_all_splits_of_its_columns(
    rows: int, width: int, num_splits: int, tile: tuple[int, int]
) -> None:
    assert choose_merge(rows, width, num_splits, 132) == tile


@given(st.integers(1, 10**6), st.integers(1, 2048), st.integers(2, 256))
def test_tiles_of_the_merge_are_small_powers_of_two(rows: int, width: int, num_splits: int) -> None:
    splits, columns = choose_merge(rows, width, num_splits, 132)
    assert num_splits <= splits < 2 * num_splits and splits & (splits - 1) == columns & (columns - 1) == 0
    assert splits * columns <= 4096 and columns >= 16
