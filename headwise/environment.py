"""What a bug report must say about the machine: versions, devices, and where the Hub's cache lies."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version

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
    facts |= {package: _version(package) for package in PACKAGES}
    facts["threads"] = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    facts["devices"] = ", ".join(f"{d.name} ({d.total_memory / 2**30:.0f} GiB)" for d in devices) or "no GPU"
    facts["offline"] = (
        "yes" if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on") else "no"
    )
    return facts


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
