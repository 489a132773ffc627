"""Train on several processes of this machine: start them through accelerate, or join those that are there.

`launch_processes` takes one of the configurations of recipes.

By hand, and over several machines, accelerate or torchrun start the command itself:

    accelerate launch --config_file .../recipes/accelerate/fsdp2.yaml --num_processes 8 -m headwise uptrain ...
"""

from __future__ import annotations

import json
import logging
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from headwise.errors import SettingError

CONFIGS = Path(__file__).parents[1] / "recipes" / "accelerate"
# The module that every process runs. Its argument is a JSON object: the keyword arguments of `uptrain_model`.
PROCESS_MODULE = "headwise._cli.worker"
INTERRUPTED = 130


def launch_processes(kind: str, num_processes: int | None, arguments: Mapping[str, Any]) -> int:
    """Start processes that train, and wait for them.

    Args:
        kind: one of `LAUNCH_KINDS`.
        num_processes: None: one for each accelerator.
        arguments: keyword arguments of `uptrain_model` in every process.

    Returns:
        0, the exit code of the process that failed first, or 130 after SIGTERM or SIGINT.

    Raises:
        SettingError: the machine does not have that many accelerators.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    options = launch_command_parser().parse_args(launch_arguments(kind, num_processes, arguments))
    # It would repeat the message of the process that failed, with a traceback of its own.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    try:
        launch_command(options)
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return int(failure.exitcode)
    except SignalException:  # passed on to the processes, which have written a checkpoint
        return INTERRUPTED
    except subprocess.CalledProcessError as error:
        return error.returncode
    return 0


def launch_arguments(kind: str, num_processes: int | None, arguments: Mapping[str, Any]) -> list[str]:
    """Return the arguments of `accelerate launch`.

    Args:
        kind: one of `LAUNCH_KINDS`.
        num_processes: None: one for each accelerator.
        arguments: keyword arguments of `uptrain_model` in every process.

    Raises:
        SettingError: the machine does not have that many accelerators.
    """
    num_devices = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    count = num_processes if num_processes is not None else 1 if kind == "single" else max(num_devices, 1)
    if kind == "fsdp2" and not num_devices:
        raise SettingError(
            "launch", "`launch` fsdp2 shards over accelerators, and this machine has none.", "Give ddp."
        )
    if count > num_devices > 0:
        raise SettingError(
            "processes", f"{count} processes need {count} accelerators, and this machine has {num_devices}."
        )
    config = ["--config_file", str(CONFIGS / f"{kind}.yaml"), "--num_processes", str(count)]
    port = [] if kind == "single" else ["--main_process_port", "0"]  # a free one
    return [*config, *port, "-m", PROCESS_MODULE, json.dumps(arguments)]


@contextmanager
def joined(place: int, count: int, device: torch.device, port: int) -> Iterator[None]:
    """Make this process one of several of this machine that train together; accelerate reads the environment.

    Args:
        place: of this process, from 0.
        count: of the processes; 1: nothing is changed.
        device: of this process.
        port: a free one, on which the first process listens.
    """
    if count == 1:
        yield
        return
    from accelerate.state import AcceleratorState

    threads = torch.get_num_threads()
    given = {
        "RANK": place,
        "LOCAL_RANK": place if device.index is None else device.index,  # the number of the GPU
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": threads,  # else accelerate divides the cores
    }
    before = {name: os.environ.get(name) for name in given}
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.update({name: str(value) for name, value in given.items()})
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        torch.set_num_threads(threads)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def free_port() -> int:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Average the gradients of parameters over the processes that train together, if there are several.

    Args:
        parameters: all of those that are trained, in the same order everywhere.
    """
    if not torch.distributed.is_initialized():
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for gradient in gradients:
        torch.distributed.all_reduce(gradient)
    torch._foreach_div_(gradients, torch.distributed.get_world_size())


def same_everywhere(value: Any) -> Any:
    """Return the first process's value in every process that trains.

    Args:
        value: can be pickled.
    """
    if not torch.distributed.is_initialized():
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values)
    return values[0]
