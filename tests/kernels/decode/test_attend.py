"""The decode kernels against their float64 references: under the interpreter on CPU, compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from hypothesis import given, settings
from hypothesis import strategies as st

from headwise.kernels.decode.attend import card_for, copyable, launch_attend
from headwise.kernels.decode.latent_fp8 import DTYPE, dequantize_latent, quantize_latent
from headwise.kernels.decode.tiling import Card, card_of, choose_tiles
from headwise.kernels.gqa_decode.reference import gqa_decode as reference

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
SCALE = 0.1
# Half precision rounds the probabilities and the output; the sums between them stay in float32.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


@pytest.fixture(scope="module", autouse=True)
def poisoned():
    """Fill fresh memory with NaN, so that an element that no kernel wrote fails the test."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


class Problem:
    """Random queries and a random cache; pages in random order with `page`; NaN in every invisible entry."""

    def __init__(self, heads, groups, head, rope, value, lengths, *, queries=1, page=0, window=None, starts=None,
                 dtype=torch.float32, device="cpu", seed=0, fp8=False, latent_size=1.0):  # fmt: skip
        generator = torch.Generator(device).manual_seed(seed)
        batch = len(lengths)
        capacity = -(-max(*lengths, 1) // max(page, 1)) * max(page, 1)

        def noise(*shape):
            return torch.randn(*shape, device=device, dtype=torch.float32, generator=generator).to(dtype)

        self.q, self.cache = noise(batch, queries, heads, head + rope), noise(batch, capacity, groups, head + rope)
        self.values = None if rope else noise(batch, capacity, groups, value)
        self.head, self.rope, self.window, self.scale = head, rope, window, SCALE
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.starts = None if starts is None else torch.tensor(starts, dtype=torch.int32, device=device)
        self.table = self.latent = self.scales = None
        if fp8:
            # Blocks of different size: a scale that is read from another block is then wrong by a factor.
            self.cache[..., :head] *= latent_size * torch.linspace(0.25, 2, head, device=device).to(dtype)
            self.latent, self.scales = quantize_latent(self.cache[:, :, 0, :head])
            self.cache = self.cache.float()
            self.cache[:, :, 0, :head] = dequantize_latent(self.latent, self.scales)
        for row, length in enumerate(lengths):
            for cache in self.caches():
                cache[row, length:] = torch.nan
                if starts is not None:
                    cache[row, : starts[row]] = torch.nan
        if page:
            order = torch.randperm(batch * capacity // page, device=device, generator=generator)
            self.table = order.int().view(batch, -1)

    def caches(self):
        caches = [self.cache, self.values, self.scales]
        return [cache for cache in caches if cache is not None]

    def paged(self, cache: Tensor) -> Tensor:
        """The contiguous cache as pages, in the order of the block table."""
        if self.table is None:
            return cache
        pages = cache.unflatten(1, (self.table.shape[1], -1)).flatten(0, 1)
        shuffled = torch.empty_like(pages)
        shuffled[self.table.flatten().long()] = pages
        return shuffled

    def run(self, **options) -> tuple[Tensor, Tensor]:
        cache = self.paged(self.cache)
        v = None if self.values is None else self.paged(self.values)
        q_rope = self.q[..., self.head :] if self.rope else None
        k, k_rope = cache[..., : self.head], cache[..., self.head :] if self.rope else None
        scales = None
        if self.latent is not None:
            k_rope = k_rope.to(self.q.dtype)
            k, scales = self.paged(self.latent.view(torch.uint8)).view(DTYPE)[:, :, None], self.paged(self.scales)
        return launch_attend(
            self.q[..., : self.head], q_rope, k, k_rope, v, self.scale,
            self.lengths, self.starts, self.table, self.window, scales, **options,
        )  # fmt: skip

    def expected(self) -> tuple[Tensor, Tensor]:
        k = self.cache.double()
        v = k[..., : self.head] if self.values is None else self.values.double()
        return reference(
            self.q.double(), k, v, scale=self.scale, lengths=self.lengths, starts=self.starts, window=self.window
        )

    def raise_scores(self, heights: str) -> None:
        """Add a height of `HEIGHTS` to the score of every head, or of one, with the last rotary column."""
        one = self.q.shape[2] // 3
        self.q[..., -1] = 8
        if heights == "one row":
            self.q[..., -1] = 0
            self.q[:, :, one, -1] = 8
        height = HEIGHTS[heights](torch.arange(self.cache.shape[1], device=self.q.device)) / (8 * self.scale)
        rounded = height.to(self.q.dtype).to(self.cache.dtype)
        self.cache[..., -1] = torch.where(self.cache[..., -1].isnan(), torch.nan, rounded[None, :, None])

    def check(self, tolerance: float, **options) -> None:
        out, lse = self.run(**options)
        expected, expected_lse = self.expected()
        empty = expected_lse.isinf()
        assert torch.equal(lse.isinf(), empty)
        assert (out[empty] == 0).all()
        error = (out.double() - expected).norm() / expected.norm().clamp(min=1e-9)
        assert error < tolerance, f"output wrong by {error:.2e}"
        torch.testing.assert_close(lse[~empty].double(), expected_lse[~empty], rtol=0, atol=2 * tolerance)


@interpreted
@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize(
    "heads, groups, head, rope, value",
    [(9, 1, 48, 16, 48), (14, 1, 80, 32, 80), (6, 1, 64, 0, 64), (10, 2, 32, 0, 48)],
    ids=["mla 48+16", "mla 80+32", "mqa", "gqa of five"],
)
def test_shapes(heads, groups, head, rope, value, num_splits) -> None:
    Problem(heads, groups, head, rope, value, [63, 100, 1, 0]).check(1e-5, num_splits=num_splits)


@interpreted
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_long_cache_beside_short_ones(dtype) -> None:
    Problem(9, 1, 48, 16, 48, [8191, 33], dtype=dtype).check(TOLERANCE[dtype])


@interpreted
@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 70), min_size=1, max_size=3),
    queries=st.integers(1, 8),
    page=st.sampled_from([0, 16, 32]),
    window=st.sampled_from([None, 1, 20]),
    padded=st.booleans(),
    latent=st.sampled_from(["", "latent", "fp8"]),
    num_splits=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_any_mask(lengths, queries, page, window, padded, latent, num_splits, dtype) -> None:
    shape = (3, 1, 32, 16, 32) if latent else (6, 2, 16, 0, 32)
    starts = [length // 3 for length in lengths] if padded else None
    where = dict(queries=queries, page=page, window=window, starts=starts)
    problem = Problem(*shape, lengths, **where, dtype=dtype, seed=len(lengths), fp8=latent == "fp8")
    problem.check(TOLERANCE[dtype], num_splits=num_splits)


@interpreted
@pytest.mark.parametrize("scale", [SCALE, 0.0, -SCALE])
def test_the_choice_of_tiles_gets_the_sign_of_the_scale(scale, monkeypatch) -> None:
    signs = []

    def choose(*shape, positive_scale):
        signs.append(positive_scale)
        return choose_tiles(*shape, positive_scale=positive_scale)

    monkeypatch.setattr("headwise.kernels.decode.attend.choose_tiles", choose)
    problem = Problem(3, 1, 48, 16, 48, [63, 1, 0])
    problem.scale = scale
    problem.check(1e-5, num_splits=2)
    assert signs == [scale > 0]


@interpreted
@pytest.mark.parametrize("head, rope", [(144, 16), (256, 32), (48, 16)], ids=str)
def test_fp8_latents(head, rope) -> None:
    Problem(9, 1, head, rope, head, [63, 100, 1, 0], fp8=True).check(1e-5, num_splits=3)


def test_queries_are_copied_only_where_their_rows_are_not_aligned() -> None:
    q = torch.randn(2, 3, 4, 192).bfloat16()
    assert copyable(q) is q and copyable(q[..., :128]).data_ptr() == q.data_ptr()
    for odd in (torch.randn(2, 3, 4, 136).bfloat16()[..., :128], q[..., 4:132], q.transpose(1, 2)[:, :, :, 1:]):
        assert torch.equal(copyable(odd), odd) and copyable(odd).is_contiguous()


def test_caches_whose_rows_are_not_aligned_run_the_portable_kernel() -> None:
    """Triton cannot compile copies of 16 bytes from such rows."""
    hopper, older = Card((9, 0), 132, 232448), Card((8, 9), 132, 232448)
    cache = torch.zeros(2, 5, 1, 256).bfloat16()
    latent, k_rope = cache[..., :192], cache[..., 192:]
    assert card_for(hopper, latent, k_rope, None, fp8=False) is hopper
    padded = torch.zeros(2, 5, 1, 264).bfloat16()
    for k, rope, v in [
        (padded[..., :192], None, None), (latent, padded[..., :64], None), (latent, None, padded[..., :192]),
        (cache[..., 4:196], k_rope, None),
    ]:  # fmt: skip
        assert card_for(hopper, k, rope, v, fp8=False) == older


GPU_SHAPES = [
    (32, 1, 512, 64, 512), (9, 1, 192, 64, 192), (14, 1, 256, 16, 256), (28, 1, 448, 48, 448),
    (40, 1, 128, 64, 128), (12, 1, 160, 64, 160), (6, 1, 96, 32, 96),
    (32, 1, 208, 64, 208), (9, 1, 48, 32, 48), (32, 1, 320, 128, 320), (128, 1, 512, 64, 512),
    (64, 1, 512, 128, 512), (64, 1, 512, 64, 512), (40, 1, 320, 64, 320), (100, 1, 448, 48, 448),
    (14, 2, 64, 0, 64), (32, 1, 128, 0, 128), (48, 1, 128, 0, 128), (32, 8, 128, 0, 128), (20, 4, 96, 0, 96),
    (24, 4, 256, 0, 256), (9, 3, 64, 0, 64), (32, 32, 128, 0, 128), (12, 2, 192, 0, 128),
]  # fmt: skip
GPU_MASKS = {
    "long": dict(lengths=[8191, 100, 63, 1, 0]),
    "pages of 16": dict(lengths=[8191, 100, 63, 1, 0], page=16),
    "two tokens": dict(lengths=[3000, 77, 2, 1], queries=2),
    "three tokens, window, padded, pages of 64": dict(
        lengths=[700, 100, 64, 5, 2], queries=3, page=64, window=100, starts=[0, 30, 0, 1, 0]
    ),
    "eight tokens, padded, pages of 256": dict(
        lengths=[300, 100, 63, 8, 3], queries=8, page=256, starts=[0, 30, 0, 2, 0]
    ),
}


@gpu
@needs_gpu
@pytest.mark.parametrize("mask", GPU_MASKS)
@pytest.mark.parametrize("shape", GPU_SHAPES, ids=str)
def test_on_a_gpu(shape, mask) -> None:
    dtype = torch.float16 if "three" in mask else torch.bfloat16
    problem = Problem(*shape, **GPU_MASKS[mask], dtype=dtype, device="cuda")
    problem.check(8e-3)
    problem.check(8e-3, num_splits=1)


HEIGHTS = {
    "grow": lambda key: key / 5,
    "jump": lambda key: 13.0 * (key * 7919 % 12) * (key * 104729 % 50 == 0),
    "a large first one": lambda key: 60.0 * (key == 0),
    "all small": lambda key: -400.0 - key / 4,
    "one row": lambda key: 90.0 * (key == 1003),
    "few lanes": lambda key: 30.0 * (key // 300) * (key % 300 == key // 300 * 2),
    "plateau": lambda key: 12.0 * (key >= 64),
}


@gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("heights", HEIGHTS)
@pytest.mark.parametrize(
    "shape",
    [(128, 1, 512, 64, 512), (128, 1, 320, 64, 320), (128, 1, 256, 64, 256), (128, 1, 128, 64, 128),
     (32, 1, 512, 64, 512), (32, 1, 128, 64, 128), (9, 1, 192, 64, 192), (28, 4, 128, 0, 128)],
    ids=str,
)  # fmt: skip
def test_scores_of_any_height_on_a_gpu(shape, heights, dtype) -> None:
    """The reference moves where a score is far above it; with many rows, two groups of warps agree on one."""
    problem = Problem(*shape, [2048, 500, 65, 1], dtype=dtype, device="cuda")
    problem.raise_scores(heights)
    problem.check(8e-3)
    problem.check(8e-3, num_splits=1)


@gpu
@needs_gpu
@pytest.mark.parametrize("scale", [0.0, -SCALE])
def test_a_scale_that_is_not_positive_on_a_gpu(scale) -> None:
    problem = Problem(128, 1, 512, 64, 512, [300, 70, 0], dtype=torch.bfloat16, device="cuda")
    problem.scale = scale
    problem.check(8e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", [(8, 1, 512, 64, 512), (8, 1, 128, 0, 128)], ids=str)
def test_rows_whose_first_tiles_are_hidden_on_a_gpu(shape) -> None:
    problem = Problem(
        *shape, [700, 100, 330], queries=80, window=60, starts=[0, 50, 290],
        dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    problem.check(8e-3)


@gpu
@needs_gpu
def test_many_rows_of_queries_that_are_not_aligned_on_a_gpu() -> None:
    problem = Problem(128, 1, 512, 64, 512, [300, 70], dtype=torch.bfloat16, device="cuda")
    wide = torch.nn.functional.pad(problem.q, (3, 2))
    problem.q = wide[..., 3:-2]
    problem.check(8e-3)


FP8_SHAPES = [
    (32, 1, 512, 64, 512), (14, 1, 256, 64, 256), (9, 1, 128, 64, 128), (32, 1, 384, 32, 384), (5, 1, 256, 16, 256),
    (128, 1, 512, 64, 512), (9, 1, 192, 64, 192), (32, 1, 208, 48, 208),
]  # fmt: skip


@gpu
@needs_gpu
@pytest.mark.parametrize("mask", GPU_MASKS)
@pytest.mark.parametrize("shape", FP8_SHAPES, ids=str)
def test_fp8_latents_on_a_gpu(shape, mask) -> None:
    """Ranks that are no multiple of 128 run the portable kernel."""
    problem = Problem(*shape, **GPU_MASKS[mask], dtype=torch.bfloat16, device="cuda", fp8=True)
    problem.check(8e-3)
    problem.check(8e-3, num_splits=1)
    problem.check(8e-3, num_splits=5)


# Where the copy engine takes boxes, the first and the last tile of a split are copied row by row.
FP8_EDGES = {
    "window": dict(lengths=[900, 333, 64, 1], window=150),
    "two tokens, window": dict(lengths=[900, 90, 2], queries=2, window=150),
    "two tokens, window, pages of 16": dict(lengths=[900, 90, 2], queries=2, window=150, page=16),
    "padded": dict(lengths=[900, 333, 65], starts=[5, 300, 64]),
    "padded, pages of 64": dict(lengths=[900, 333, 65], starts=[5, 300, 64], page=64),
    "four tokens": dict(lengths=[1000, 129, 4], queries=4),
}


@gpu
@needs_gpu
@pytest.mark.parametrize("mask", FP8_EDGES)
@pytest.mark.parametrize("heads", [32, 14])
@pytest.mark.parametrize("rank, rope", [(512, 64), (384, 32), (256, 64), (128, 64)])
def test_edges_of_fp8_latents_on_a_gpu(rank, rope, heads, mask) -> None:
    problem = Problem(heads, 1, rank, rope, rank, **FP8_EDGES[mask], dtype=torch.bfloat16, device="cuda", fp8=True)
    problem.check(8e-3)
    problem.check(8e-3, num_splits=1)
    problem.check(8e-3, num_splits=3)


@gpu
@needs_gpu
@pytest.mark.parametrize("heights", HEIGHTS)
@pytest.mark.parametrize(
    "heads, rank, rope", [(32, 512, 64), (32, 384, 32), (32, 256, 64), (14, 256, 64), (9, 128, 64)]
)
def test_fp8_scores_of_any_height_on_a_gpu(heads, rank, rope, heights) -> None:
    """The reference of the weights moves where a product of weight and scale would leave float16."""
    problem = Problem(heads, 1, rank, rope, rank, [2048, 500, 65, 1], dtype=torch.bfloat16, device="cuda", fp8=True)
    problem.raise_scores(heights)
    problem.check(8e-3)
    problem.check(8e-3, num_splits=1)


@gpu
@needs_gpu
@pytest.mark.parametrize("scale", [0.0, -SCALE])
def test_fp8_latents_and_a_scale_that_is_not_positive_on_a_gpu(scale) -> None:
    problem = Problem(14, 1, 256, 64, 256, [300, 70, 0], dtype=torch.bfloat16, device="cuda", fp8=True)
    problem.scale = scale
    problem.check(8e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("size", [1e-5, 1e4])
def test_small_and_large_fp8_latents_on_a_gpu(size) -> None:
    problem = Problem(
        9, 1, 256, 64, 256, [3000, 63], dtype=torch.bfloat16, device="cuda", fp8=True, latent_size=size
    )
    problem.q[..., :256] /= size
    problem.check(8e-3)


@gpu
@needs_gpu
def test_fp8_latents_with_large_rotary_queries_on_a_gpu() -> None:
    """In float16 a rotary part that is a thousand times the rest stays in range."""
    problem = Problem(9, 1, 256, 64, 256, [3000, 63], dtype=torch.float16, device="cuda", fp8=True)
    problem.q[..., :256] *= 1e-3
    problem.check(8e-3)


@gpu
@needs_gpu
@pytest.mark.parametrize("shape", GPU_SHAPES[::3], ids=str)
def test_the_portable_kernel_on_a_gpu(shape) -> None:
    heads, groups, head, rope, value = shape
    card = Card((8, 0), 132, card_of(0).shared_memory)
    config = choose_tiles(card, heads // groups, head, rope, value, bool(rope))
    Problem(*shape, [3000, 63, 0], dtype=torch.bfloat16, device="cuda").check(8e-3, config=config)
