"""Coordinate the processes of `accelerate launch` or torchrun.

Each process computes a share of the tasks' requests and measures a share of the text. The first process does
everything else.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any

from headwise import compat
from headwise.errors import HeadwiseError, SettingError
from headwise.io.workdir import Interrupted

# The others wait while the first process measures text and continuations.
TIMEOUT = timedelta(weeks=1)
LOOK_AT_OUTPUT = (
    "See the first failing process's output. If there is none, it was probably killed for lack of memory."
)
# Messages of gloo and NCCL when the connection to a process is lost.
LOST_CONNECTION = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")


def num_processes() -> int:
    """Return the number of processes."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Return whether this process gets the results."""
    return rank() == 0


def join(device: str) -> None:
    """Connect the processes, over gloo if the device is the CPU, which neither accelerate nor lm-eval does.

    Args:
        device: where the models run.
    """
    if num_processes() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=TIMEOUT)


def broadcast_decision(decision: bool) -> bool:
    """Return the decision of the first process in every process.

    Args:
        decision: the decision of this process.
    """
    if num_processes() == 1:
        return decision
    from accelerate.utils import broadcast_object_list

    decided: bool = broadcast_object_list([decision])[0]
    return decided


def our_share(count: int) -> range:
    """Return the places of a list that this process computes: every n-th of n processes.

    Args:
        count: length of the list.
    """
    return range(rank(), count, num_processes())


def gather_shares(shares: dict[int, Any]) -> list[Any]:
    """Return the whole list, in every process.

    Args:
        shares: what this process computed, by place.
    """
    everything = shares
    if num_processes() > 1:
        from accelerate.utils import gather_object

        everything = {place: item for part in gather_object([shares]) for place, item in part.items()}
    return [item for _, item in sorted(everything.items())]


def check_device(device: str | None) -> None:
    """Refuse a single GPU for several processes.

    Args:
        device: the setting.

    Raises:
        SettingError: every process would use that GPU.
    """
    if num_processes() > 1 and device is not None and ":" in device:
        raise SettingError(
            "device",
            f"`device` is {device!r}, and each of {num_processes()} processes uses a GPU of its own.",
            "Leave out `device`.",
        )


def check_questions(tasks: Iterable[Any], limit: float | None) -> None:
    """Check that every process gets a question of every task; lm-eval fails in a process without one.

    Args:
        tasks: lm-eval's tasks and groups.
        limit: questions of each task, a number or a share below 1; None: all.

    Raises:
        HeadwiseError: a task has fewer questions than there are processes.
    """
    if num_processes() == 1:
        return
    for task in tasks:
        if hasattr(task, "get_all_tasks"):
            check_questions(task.get_all_tasks(), limit)
            continue
        num_questions = compat.lm_eval_num_questions(task, limit)
        if num_questions < num_processes():
            raise HeadwiseError(
                f"Task {task.task_name} has {num_questions} questions, too few for {num_processes()} processes.",
                "Launch fewer processes, or raise `limit`.",
            )


def copy_padding(requests: list[Any]) -> None:
    """Replace padding requests by copies, in place.

    A process with fewer requests than another one repeats its last request. On the original, the answers to the
    padding would count too.

    Args:
        requests: lm-eval's requests of this process.
    """
    occurrences: Counter[int] = Counter()
    for place, request in enumerate(requests):
        occurrences[id(request)] += 1
        if occurrences[id(request)] > request.repeats:
            requests[place] = replace(request, resps=[])


@contextmanager
def end_together(*, keeps_answers: bool = False) -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C and name the loss of another process, so that temporary files are removed.

    Launchers and schedulers end a process by SIGTERM.

    Args:
        keeps_answers: whether the results so far are cached, so that the same command continues.

    Raises:
        HeadwiseError: another process ended.
        Interrupted: in place of a KeyboardInterrupt, with the way to continue.
    """
    received: list[int] = []

    def stop(number: int, _: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if in_main_thread else None
    try:
        yield
    except KeyboardInterrupt:
        if received and num_processes() > 1:
            raise HeadwiseError(
                "The launcher ended this process, as it does when another process fails.", LOOK_AT_OUTPUT
            ) from None
        if keeps_answers:
            raise Interrupted(
                "Interrupted; the results so far are in the cache.", "Run the same command again to continue."
            ) from None
        raise
    except RuntimeError as error:
        if num_processes() > 1 and any(words in str(error) for words in LOST_CONNECTION):
            raise HeadwiseError(
                "Another process ended too early, so this process ends too.", LOOK_AT_OUTPUT
            ) from error
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, before)
