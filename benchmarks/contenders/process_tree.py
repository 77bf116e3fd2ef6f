"""Processor time and memory of a process and its descendants, read from /proc on Linux."""

import os
from pathlib import Path

PROC = Path("/proc")
TICK = os.sysconf("SC_CLK_TCK")


def tree(root: int) -> list[int]:
    """Return the ids of a process and all its descendants."""
    children: dict[int, list[int]] = {}
    for path in PROC.iterdir():
        if path.name.isdigit() and (fields := _stat(int(path.name))):
            children.setdefault(int(fields[1]), []).append(int(path.name))
    found = [root]
    for process in found:  # the list grows
        found += children.get(process, [])
    return found


def processor_seconds(root: int) -> float:
    """Return the processor time so far of a process and its descendants, including ended ones that were waited for."""
    ticks = sum(int(value) for process in tree(root) for value in _stat(process)[11:15])
    return ticks / TICK


def memory(root: int) -> float:
    """Return the current memory (PSS) of a process and its descendants in MiB; shared memory counts once."""
    return sum(_pss(process) for process in tree(root)) / 2**10


def _stat(process: int) -> list[str]:
    """Return the fields of /proc/<process>/stat from the state on; empty if the process has ended."""
    try:
        return (PROC / str(process) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _pss(process: int) -> int:
    """Return the PSS of a process in KiB; 0 if it has ended."""
    try:
        lines = (PROC / str(process) / "smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
