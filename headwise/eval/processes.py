"""The processes of `accelerate launch` or torchrun: each answers its share of the tasks' questions, and the first
does everything else.
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

from headwise.errors import HeadwiseError

# The others wait while the first measures text and continuations.
PATIENCE = timedelta(weeks=1)


def count() -> int:
    """How many there are."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is the one that gets the results."""
    return os.environ.get("RANK", "0") == "0"


def join(device: str) -> None:
    """Meet the others, over gloo where the device is the CPU: accelerate by itself, and so lm-eval, would not."""
    if count() > 1:
        from accelerate import PartialState

        PartialState(cpu=device == "cpu", timeout=PATIENCE)


def agreed(decision: bool) -> bool:
    """What the first process decided."""
    if count() == 1:
        return decision
    from accelerate.utils import broadcast_object_list

    decided: bool = broadcast_object_list([decision])[0]
    return decided


def check_shares(tasks: Iterable[Any], limit: float | None) -> None:
    """lm-eval fails in a process that no question is left for.

    Args:
        tasks: lm-eval's tasks and groups.
        limit: questions of each, or a share below 1.

    Raises:
        HeadwiseError: a task has fewer questions than there are processes.
    """
    from lm_eval.evaluator_utils import get_sample_size

    if count() == 1:
        return
    for task in tasks:
        if hasattr(task, "get_all_tasks"):
            check_shares(task.get_all_tasks(), limit)
            continue
        there = len(task.eval_docs)
        asked = min(there, get_sample_size(task, limit) or there)
        if asked < count():
            raise HeadwiseError(
                f"Task {task.task_name} asks {asked} questions, too few for {count()} processes.",
                "Launch fewer of them, or raise --limit.",
            )


def set_padding_aside(requests: list[Any]) -> None:
    """A process with fewer requests than another repeats its last: on a copy, or these answers would count too."""
    asked: Counter[int] = Counter()
    for place, request in enumerate(requests):
        asked[id(request)] += 1
        if asked[id(request)] > request.repeats:
            requests[place] = replace(request, resps=[])


@contextmanager
def together() -> Iterator[None]:
    """End as one and leave nothing behind: SIGTERM, by which launchers and schedulers end a process, is a Ctrl-C.

    Raises:
        HeadwiseError: another process is gone.
    """
    told: list[int] = []

    def stop(number: int, _: Any) -> None:
        told.append(number)
        raise KeyboardInterrupt

    hears = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, stop) if hears else None
    try:
        yield
    except KeyboardInterrupt:
        if told and count() > 1:
            raise HeadwiseError("The launcher ended this process, as it does when another fails.", WHY) from None
        raise
    except RuntimeError as error:
        if count() > 1 and any(words in str(error) for words in GONE):
            raise HeadwiseError("Another process ended too early, and so this one ends too.", WHY) from error
        raise
    finally:
        if hears:
            signal.signal(signal.SIGTERM, before)


WHY = "What the other one said is why. If it said nothing, it was killed, as a system short of memory does."
# How gloo and NCCL say it.
GONE = ("Connection closed by peer", "Connection reset by peer", "remote process exited", "Broken pipe")
