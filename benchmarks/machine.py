"""Facts about the machine and about this process."""

import platform
import resource
from pathlib import Path
from typing import Any

import torch

from fedamm_pl.federation.fingerprint import versions
from fedamm_pl.federation.trainer import TrainerConfig


def hardware() -> dict[str, Any]:
    """Return the hardware, the number of threads and the versions of libraries."""
    return {
        "processor": _found("/proc/cpuinfo", "model name") or platform.processor(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision chosen by auto": TrainerConfig().resolved_precision,
        "versions": versions(),
    }


def peak_memory() -> float:
    """Return the peak memory of this process in MiB."""
    if peak := _found("/proc/self/status", "VmHWM"):
        return int(peak.split()[0]) / 2**10
    # not for Linux, where this value includes the memory of the parent when it started this process
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def bytes_written() -> int:
    """Return the number of bytes that this process has written so far; 0 if the system does not count them."""
    return int(_found("/proc/self/io", "wchar") or 0)


def _found(path: str, name: str) -> str:
    """Return the first value of a name in a file with lines ``name: value``; empty if there is none."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
