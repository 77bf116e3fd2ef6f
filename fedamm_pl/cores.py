"""How many processor cores this process may use, and how many of them are free: torch takes all that it sees."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Variables by which a user has chosen. The last three bind the first thread to one core, which then seems to be all there is."""

SPARE = 0.5
"""Cores that others must take from torch's threads before it is said: something always runs for a moment."""


def usable_cores(proc: Path = Path("/proc")) -> int:
    """Return how many cores this process may use: those of its affinity mask, fewer where a control group limits its time.

    The time of 2.7 cores counts as two: threads wait for each other, and where more run than the limit allows, all are stopped.

    Args:
        proc: Where Linux says so; on other systems there is nothing.
    """
    if sys.version_info >= (3, 13):
        cores = os.process_cpu_count()
    else:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    limits = [cores or 1]
    with contextlib.suppress(OSError, ValueError):
        limits += map(int, _limits(proc))
    return max(1, min(limits))


def _limits(proc: Path) -> Iterator[float]:
    """Yield how many cores' time each control group allows that this process is in, from its own up to the outermost seen."""
    mounts, groups = ((proc / "self" / name).read_text().splitlines() for name in ("mountinfo", "cgroup"))
    paths: dict[str, str] = {}  # of version 1 by controller, that of version 2 by the empty name
    for line in groups:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, place = before.split(" ")[3:5]
        kind, _, options = after.split(" ")[:3]
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # a container may see the path on its host, but only its own group, at the place itself
        path = paths.get("cpu" if kind == "cgroup" else "", "/").removeprefix(root.rstrip("/"))
        group = Path(place, *Path(path).parts[1:])
        for folder in (group, *group.parents):
            yield from _limit(folder)
            if folder == Path(place):
                break


def _limit(group: Path) -> Iterator[float]:
    """Yield quota / period of a control group, if it has a quota: version 2 says ``max`` where it has none, version 1 -1."""
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int(number) for name in names for number in (group / name).read_text().split())
            if quota > 0 and period > 0:
                yield quota / period


def shared_out(threads: int, processes: int) -> int:
    """Return how many threads each of several processes has, so that all together have no more than there are cores.

    Example:
        >>> shared_out(1, 2)
        1
    """
    return max(1, min(threads, usable_cores()) // processes)


def too_many(threads: int, processes: int = 1) -> str | None:
    """Say that threads that wait for each other are more than the cores they may use; None if not, or if the user has chosen.

    Args:
        threads: Of each process.
        processes: How many have as many.
    """
    cores, of_each = usable_cores(), f" in each of {processes} processes" if processes > 1 else ""
    if threads == 1 or threads * processes <= cores or _chosen():
        return None
    return f"torch has {threads} threads{of_each}, but may use {cores} of {os.cpu_count()} cores"


def follow_cores() -> str | None:
    """Let torch compute with no more threads than cores that this process may use, unless the user has chosen.

    Returns:
        What was done, None for nothing.
    """
    if not (found := too_many(torch.get_num_threads())):
        return None
    torch.set_num_threads(usable_cores())
    return f"{found}: it computes with {torch.get_num_threads()} (OMP_NUM_THREADS sets another number)"


def crowded() -> str | None:
    """Say that other programs leave fewer cores than torch has threads, and what helps; None if not, or if the user has chosen."""
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    most = cores - threads + SPARE
    if threads == 1 or _chosen("OMP_WAIT_POLICY") or not hasattr(os, "getloadavg") or os.getloadavg()[0] < most:
        return None
    # the load of the last minute still holds a run that has just ended
    if (others := busy_cores()) < most:
        return None
    return (
        f"other programs keep {others:.1f} of {cores} cores busy, and threads that wait for each other are slow then: "
        f"OMP_WAIT_POLICY=passive, or OMP_NUM_THREADS={max(1, int(cores - others))}, helps"
    )


def busy_cores(proc: Path = Path("/proc"), seconds: float = 0.5) -> float:
    """Return how many cores are busy while this process sleeps; 0 where the system does not say so as Linux does.

    Args:
        proc: Where Linux says so.
        seconds: How long to sleep.
    """

    def busy() -> float:
        user, nice, system, _, _, *others = (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]
        return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")  # others: steal among them

    try:
        before, start = busy(), time.monotonic()
        time.sleep(seconds)
        return (busy() - before) / (time.monotonic() - start)
    except (OSError, ValueError):
        return 0.0


def _chosen(*more: str) -> bool:
    return any(name in os.environ for name in (*CHOSEN, *more))
