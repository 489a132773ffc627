"""Work on a GPU: make it the current one, read ahead, and repeat work without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

# Threads that read ahead. One fills memory at a few gigabytes in a second, which is less than a GPU takes.
READERS = 4


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one for a while, if it is a GPU: Triton and CUDA graphs run on the current one.

    Args:
        device: of the tensors.
    """
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


class ReadAhead:
    """Read named tensors into the memory of the host.

    Before a GPU that memory is page-locked, which is copied several times as fast, and threads read what is needed
    next: Python and the GPU wait for no file. Before a CPU nothing is read ahead, because it would take memory.

    Args:
        read: reads a tensor, with an argument `pinned` for page-locked memory (`Checkpoint.read`).
        device: where the tensors will be used.
    """

    def __init__(self, read: Callable[..., torch.Tensor], device: torch.device) -> None:
        self._read, self._device = read, device
        self._threads = ThreadPoolExecutor(READERS, "read") if device.type == "cuda" else None
        self._begun: dict[str, Future[torch.Tensor]] = {}

    def begin(self, names: Collection[str]) -> None:
        """Begin to read tensors, before a GPU.

        Args:
            names: of the tensors.
        """
        if self._threads is not None:
            self._begun |= {name: self._threads.submit(self._read_pinned, name) for name in names}

    def take(self, names: Collection[str]) -> dict[str, torch.Tensor]:
        """Return tensors by name, after a wait for those that are being read.

        Args:
            names: of the tensors.
        """
        if self._threads is None:
            return {name: self._read(name) for name in names}
        self.begin([name for name in names if name not in self._begun])
        return {name: self._begun.pop(name).result() for name in names}

    def _read_pinned(self, name: str) -> torch.Tensor:
        with current(self._device):
            return self._read(name, pinned=True)


def record(
    work: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator] = ()
) -> Callable[[], Any]:
    """Run some work twice, and return a function that repeats it.

    On a GPU the function replays a CUDA graph. Small kernels then follow each other without waiting for Python.
    Work that a graph cannot hold (it reads a value on the host) and other devices repeat the call itself.

    Args:
        work: reads and writes tensors that stay where they are; it takes no arguments.
        device: of the tensors.
        generators: random generators on the device that the work draws from.

    Returns:
        A function without arguments that does the work once more.
    """
    work()
    if device.type != "cuda":
        work()
        return work
    with current(device):
        return _recorded(work, device, generators)


def _recorded(
    work: Callable[[], Any], device: torch.device, generators: Sequence[torch.Generator]
) -> Callable[[], Any]:
    """Run some work once and record it as a graph; return the replay, or the work if no graph can hold it."""
    import torch

    stream = torch.cuda.Stream(device)  # a graph must not depend on what the main stream set up lazily
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return work
    return graph.replay
