"""Recorded work: what a CUDA graph repeats is what the call itself does. Tensors are read ahead before a GPU."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from headwise.cuda import ReadAhead, record

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def count_up(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Record "add one, then draw a number", repeat it three times, and return the count and the numbers."""
    count = torch.zeros(1, dtype=torch.long, device=device)
    drawn = torch.zeros(5, device=device)
    generator = torch.Generator(device=device).manual_seed(3)

    def work() -> None:
        drawn.index_copy_(0, count, torch.empty(1, device=device).exponential_(generator=generator))
        count.add_(1)

    repeat = record(work, torch.device(device), [generator])
    assert count.item() == 2
    for _ in range(3):
        repeat()
    return count.cpu(), drawn.cpu()


def test_recording_does_the_work_twice_and_each_call_once_more():
    count, drawn = count_up("cpu")
    assert count.item() == 5
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(drawn, torch.cat([torch.empty(1).exponential_(generator=generator) for _ in range(5)]))


@pytest.mark.gpu
@needs_gpu
def test_a_graph_draws_new_numbers_each_time():
    count, drawn = count_up("cuda")
    generator = torch.Generator(device="cuda").manual_seed(3)
    alone = [torch.empty(1, device="cuda").exponential_(generator=generator).cpu() for _ in range(5)]
    assert count.item() == 5
    assert torch.equal(drawn, torch.cat(alone))


@pytest.mark.gpu
@needs_gpu
def test_work_that_reads_a_value_on_the_host_is_repeated_without_a_graph():
    total = torch.zeros(1, device="cuda")

    def work() -> None:
        total.add_(1 if total.item() < 4 else 10)

    repeat = record(work, torch.device("cuda"))
    for _ in range(3):
        repeat()
    assert total.item() == 14


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_what_is_needed_next_is_read_ahead_before_a_gpu_alone(device, monkeypatch):
    monkeypatch.setattr("headwise.cuda.current", lambda _: nullcontext())
    read = []

    def note(name, pinned=False):
        read.append((name, pinned))
        if name == "x":
            raise OSError("gone")
        return torch.tensor(ord(name))

    ahead, gpu = ReadAhead(note, torch.device(device)), device != "cpu"
    ahead.begin("abx")
    assert ahead.take("bc") == {"b": torch.tensor(98), "c": torch.tensor(99)}
    assert ahead.take("a") == {"a": torch.tensor(97)}
    assert sorted(read) == [(name, gpu) for name in ("abcx" if gpu else "abc")]
    with pytest.raises(OSError, match="gone"):
        ahead.take("x")
