"""Training on several processes: `headwise.recipes.worker` under accelerate, with one of the configurations here.

The same by hand, and over several machines:

    accelerate launch --config_file .../recipes/accelerate/fsdp2.yaml --num_processes 8 -m headwise.recipes.worker
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

from headwise.errors import HeadwiseError

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
KINDS = tuple(sorted(path.stem for path in CONFIGS.glob("*.yaml")))
TRAIN = "headwise.recipes.worker"
INTERRUPTED = 130


def launch(kind: str, processes: int | None, arguments: Sequence[str]) -> int:
    """Train on `processes` processes of this machine and wait for them.

    Args:
        kind: one of KINDS: `single`, `ddp` or `fsdp2`.
        processes: None: one for each accelerator.
        arguments: what `python -m headwise.recipes.worker` is to get.

    Returns:
        0, the exit code of the process that failed first, or 130 after SIGTERM or SIGINT.

    Raises:
        HeadwiseError: no such kind, or the machine does not have that many accelerators.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(launch_arguments(kind, processes, arguments))
    # It would repeat, with a traceback of its own, what the process that failed has said.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode
    except SignalException:  # passed on to the processes, which have written a checkpoint
        return INTERRUPTED
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def launch_arguments(kind: str, processes: int | None, arguments: Sequence[str]) -> list[str]:
    """What follows `accelerate launch`; see `launch`."""
    if kind not in KINDS:
        raise HeadwiseError(f"There is no launch {kind!r}.", f"There are: {', '.join(KINDS)}.")
    devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    count = processes if processes is not None else 1 if kind == "single" else max(devices, 1)
    if count < 1 or (kind == "single" and count > 1):
        raise HeadwiseError(f"{kind} cannot run {count} processes.", "Take --launch ddp or fsdp2 for several.")
    if kind == "fsdp2" and not devices:
        raise HeadwiseError("FSDP2 shards over accelerators, and this machine has none.", "Take --launch ddp.")
    if count > devices > 0:
        raise HeadwiseError(f"{count} processes need {count} accelerators, and this machine has {devices}.")
    config = ["--config_file", str(CONFIGS / f"{kind}.yaml"), "--num_processes", str(count)]
    port = [] if kind == "single" else ["--main_process_port", "0"]  # a free one
    return [*config, *port, "-m", TRAIN, *arguments]
