"""The record of a run: what a card, a table or a plot may state."""

import platform
import resource
import sys
from importlib import metadata
from typing import Any

import torch

PACKAGES = ("zoo", "torch", "torchvision", "lightning", "timm", "torchmetrics", "datasets", "numpy", "safetensors")


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware; no host or user name."""
    hardware = {"processor": _processor(), "cores": torch.get_num_threads(), "device": str(device.type)}
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    versions = {name: metadata.version(name) for name in PACKAGES} | {"python": platform.python_version()}
    return {"hardware": hardware, "versions": versions}


def peak_memory_mb() -> float:
    """Highest resident memory of this process so far, in MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


def peak_device_memory(device: torch.device) -> dict[str, float]:
    """{"peak_gpu_memory_mb": most that this process has had on a GPU so far, in MiB}; {} for a CPU."""
    if device.type != "cuda":
        return {}
    return {"peak_gpu_memory_mb": round(torch.cuda.max_memory_allocated(device) / 2**20, 1)}


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
