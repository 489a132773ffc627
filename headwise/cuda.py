"""Work on a GPU: make it the current one, and repeat work without Python between its kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Make a device the current one for a while, if it is a GPU: Triton and CUDA graphs run on the current one.

    Args:
        device: of the tensors.
    """
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


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
