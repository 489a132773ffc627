"""Describe the machine: package versions, devices, available memory."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from headwise.errors import SettingError

if TYPE_CHECKING:
    import torch

# The version of this package, as in pyproject.toml.
HEADWISE_VERSION = "0.1.0"
PACKAGES = (
    "headwise",
    "torch",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "triton",
    "datasets",
    "peft",
    "lm_eval",
)
_CONTROL_GROUPS = Path("/sys/fs/cgroup")


def environment() -> dict[str, str]:
    """Return what a bug report needs: versions, platform, threads, devices, offline mode.

    Returns:
        Names to values, in display order, without tokens and user names.
    """
    import torch

    facts = {"python": platform.python_version(), "platform": platform.platform()}
    facts |= dict.fromkeys(PACKAGES, "not installed") | versions(PACKAGES)
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["devices"] = ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices) or "no GPU"
    facts["offline"] = (
        "yes" if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on") else "no"
    )
    return facts


def find_device(name: str | None) -> torch.device:
    """Return the device of that name; None: a GPU if there is one.

    Args:
        name: "cpu", "cuda" or "cuda:N".

    Raises:
        SettingError: this machine does not have it.
    """
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise SettingError(
            "device", f"`device` is {name!r}, which this machine does not have.", "Give cpu, cuda or cuda:N."
        ) from error
    return device


def find_devices(names: str | None) -> list[torch.device]:
    """Return the devices of a list such as "cuda:0,cuda:1"; None: a GPU if there is one.

    Args:
        names: "cpu", "cuda" or "cuda:N", or several of them with commas.

    Raises:
        SettingError: this machine does not have one of them.
    """
    return [find_device(name) for name in names.split(",")] if names else [find_device(None)]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of Python and of those packages that are installed.

    Args:
        packages: names of distributions.
    """
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def available_memory(device: torch.device) -> int | None:
    """Return the bytes of a device's memory that this process can still allocate.

    Args:
        device: for the CPU, the result respects the memory limit of the process's control groups. Page cache counts
            as available there.

    Returns:
        The bytes; None for devices that do not report them.
    """
    if device.type == "cuda":
        import torch

        # What torch keeps for later allocations is free to this process.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    if device.type != "cpu":
        return None
    import psutil

    try:
        membership = Path("/proc/self/cgroup").read_text()
    except OSError:  # not Linux
        membership = ""
    result: int = max(0, min([psutil.virtual_memory().available, *_group_memory(membership, _CONTROL_GROUPS)]))
    return result


def _group_memory(membership: str, root: Path) -> Iterator[int]:
    """Yield the bytes left in each control group above this process that has a limit.

    Args:
        membership: the content of /proc/self/cgroup, a line `id:controllers:path` for each hierarchy.
        root: where the control groups are mounted.
    """
    for line in membership.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, limit, usage, cached = root, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            top, limit, usage = root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            cached = "total_inactive_file"
        else:
            continue
        # In a container the path may be the host's; the container's own group is then mounted at the top.
        group = top / path.lstrip("/")
        for folder in [group, *group.parents][: len(group.relative_to(top).parts) + 1]:
            try:
                most, used = (int((folder / name).read_text()) for name in (limit, usage))
                counters = dict(counter.split() for counter in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):  # no such group, or its limit is "max"
                continue
            yield most - used + int(counters.get(cached, 0))
