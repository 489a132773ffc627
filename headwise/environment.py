"""What a bug report must say about the machine: versions, devices, and where the Hub's cache lies."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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


def environment() -> dict[str, str]:
    """Names to values, in reading order. Tokens and user names are not among them."""
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


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python, and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def free_memory() -> int:
    """Return the bytes of main memory that a process may still take, within the limit of its container."""
    import psutil

    free: int = psutil.virtual_memory().available
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = ((group / name).read_text().strip() for name in ("memory.max", "memory.current"))
        if limit != "max":
            free = min(free, int(limit) - int(used))
    except (OSError, ValueError):  # not in a control group, or in one of version 1
        pass
    return max(0, free)
