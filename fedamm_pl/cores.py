"""The number of processor cores that this process may use, and how many are free. By default torch uses all it sees."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

CHOSEN = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
"""Environment variables with which users choose the number of threads or their cores.

The last three bind the first thread to one core; the process then appears to have only that core.
"""

SPARE = 0.5
"""Cores that other programs must take from torch's threads before :func:`crowded` warns; short activity is normal."""


def usable_cores(proc: Path = Path("/proc")) -> int:
    """Return how many cores this process may use: those in its affinity mask, or fewer if a control group limits it.

    A limit of 2.7 cores counts as two cores: threads wait for each other, and if more of them run than the limit
    allows, the system stops all of them for a while.

    Args:
        proc: The folder ``/proc`` of Linux; other systems have none, and no limits are found there.
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
    """Yield the CPU limits, in cores, of this process's control groups, from its own to the outermost visible one."""
    mounts, groups = ((proc / "self" / name).read_text().splitlines() for name in ("mountinfo", "cgroup"))
    paths: dict[str, str] = {}  # version 1: by controller; version 2: under the empty name
    for line in groups:
        _, controllers, path = line.split(":", 2)
        paths |= dict.fromkeys(controllers.split(","), path)
    for line in mounts:
        before, _, after = line.partition(" - ")
        root, place = before.split(" ")[3:5]
        kind, _, options = after.split(" ")[:3]
        if kind not in ("cgroup", "cgroup2") or (kind == "cgroup" and "cpu" not in options.split(",")):
            continue
        # a container may be told its path on the host, although it sees only its own group, at the mount point itself
        path = paths.get("cpu" if kind == "cgroup" else "", "/").removeprefix(root.rstrip("/"))
        group = Path(place, *Path(path).parts[1:])
        for folder in (group, *group.parents):
            yield from _limit(folder)
            if folder == Path(place):
                break


def _limit(group: Path) -> Iterator[float]:
    """Yield quota / period of a control group, if it has a quota.

    Without a quota, version 2 reports ``max`` and version 1 reports -1.
    """
    for names in (["cpu.max"], ["cpu.cfs_quota_us", "cpu.cfs_period_us"]):
        with contextlib.suppress(OSError, ValueError):
            quota, period = (int(number) for name in names for number in (group / name).read_text().split())
            if quota > 0 and period > 0:
                yield quota / period


def shared_out(threads: int, processes: int) -> int:
    """Return the number of threads for each of several processes, so that the total does not exceed the usable cores.

    Example:
        >>> shared_out(1, 2)
        1
    """
    return max(1, min(threads, usable_cores()) // processes)


def too_many(threads: int, processes: int = 1) -> str | None:
    """Return a message if there are more threads than usable cores, unless the user has chosen the number; else None.

    Args:
        threads: Number of threads of each process.
        processes: Number of processes.
    """
    cores, of_each = usable_cores(), f" in each of {processes} processes" if processes > 1 else ""
    if threads == 1 or threads * processes <= cores or _chosen():
        return None
    return f"torch has {threads} threads{of_each}, but may use {cores} of {os.cpu_count()} cores"


def follow_cores() -> str | None:
    """Limit torch's threads to the number of usable cores, unless the user has chosen the number.

    Returns:
        A message about the change, or None if nothing was changed.
    """
    if not (found := too_many(torch.get_num_threads())):
        return None
    torch.set_num_threads(usable_cores())
    return f"{found}: it computes with {torch.get_num_threads()} (OMP_NUM_THREADS sets another number)"


def crowded() -> str | None:
    """Return a message with advice if other programs leave fewer cores than torch has threads.

    It returns None if they do not, or if the user has chosen the number of threads.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    most = cores - threads + SPARE
    if threads == 1 or _chosen("OMP_WAIT_POLICY") or not hasattr(os, "getloadavg") or os.getloadavg()[0] < most:
        return None
    # the load average covers the last minute and may include a run that has just ended
    if (others := busy_cores()) < most:
        return None
    return (
        f"other programs keep {others:.1f} of {cores} cores busy, and threads that wait for each other are slow then: "
        f"OMP_WAIT_POLICY=passive, or OMP_NUM_THREADS={max(1, int(cores - others))}, helps"
    )


def busy_cores(proc: Path = Path("/proc"), seconds: float = 0.5) -> float:
    """Return how many cores are busy while this process sleeps; 0 on systems that do not report it in the way of Linux.

    Args:
        proc: The folder ``/proc`` of Linux.
        seconds: How long to sleep.
    """

    def busy() -> float:
        user, nice, system, _, _, *others = (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]
        return sum(map(int, (user, nice, system, *others))) / os.sysconf("SC_CLK_TCK")  # others: irq, softirq, steal

    try:
        before, start = busy(), time.monotonic()
        time.sleep(seconds)
        return (busy() - before) / (time.monotonic() - start)
    except (OSError, ValueError):
        return 0.0


def _chosen(*more: str) -> bool:
    return any(name in os.environ for name in (*CHOSEN, *more))
