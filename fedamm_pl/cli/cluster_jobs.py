"""Runs of a comparison on the machines of a Ray cluster, one a task: a GPU each, or several on one."""

import contextlib
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fedamm_pl.cli.launching import Start, follow, written
from fedamm_pl.federation.executors.cluster import connected, environment, reason, require_ray, room
from fedamm_pl.results.comparison import PlannedRun


@contextlib.contextmanager
def on_cluster(address: str, cpus: float, gpus: float) -> Iterator[tuple[Start, int]]:
    """Join a cluster, or start one here, for a while.

    Args:
        address: Of the cluster; ``local``: one is started.
        cpus: Cores that a run takes.
        gpus: GPUs that a run takes.

    Yields:
        What starts a run, and how many the cluster has room for.

    Raises:
        ValueError: If Ray is not installed, or there is no such cluster or no room in it for a run.
    """
    require_ray(address)
    needed = {"CPU": cpus, "GPU": gpus}
    with connected(address, 1, needed):
        yield partial(_start, needed), int(room(needed))


def _start(needed: dict[str, float], planned: PlannedRun, _: int) -> "ClusterJob":
    return ClusterJob(planned, needed)


class ClusterJob:
    """A run as a task. A lost one is not started again by Ray: the same command goes on with it.

    Args:
        planned: The run.
        needed: The CPUs and GPUs that it takes.

    Attributes:
        lost: In brackets, why it ended without a word of its own; empty if it did not.
    """

    def __init__(self, planned: PlannedRun, needed: dict[str, float]) -> None:
        import ray

        threads = max(1, int(needed["CPU"]))
        # a process of its own for each run, so that nothing of it stays on a GPU
        task: Any = ray.remote(max_calls=1)(run_on_machine).options(
            num_cpus=needed["CPU"],
            num_gpus=needed["GPU"],
            max_retries=0,
            scheduling_strategy="SPREAD",
            runtime_env=environment(threads, on_gpu=bool(needed["GPU"])),
        )
        places = [str(path.absolute()) for path in (written(planned), planned.folder, planned.log)]
        self._reference = task.remote(planned.config, *places, os.getcwd(), threads)
        self.lost = ""

    @property
    def exitcode(self) -> int | None:
        """The run's exit status; None while it runs or waits, 1 if it is lost."""
        import ray

        if not ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            return int(ray.get(self._reference))
        except ray.exceptions.RayError as error:
            self.lost = f" ({reason(error):.300})"
            return 1

    def terminate(self) -> None:
        """Stop it, wherever it is."""
        import ray

        ray.cancel(self._reference, force=True)

    def join(self) -> None:
        """Wait until it has ended, for a few seconds."""
        import ray

        ray.wait([self._reference], timeout=10)


def run_on_machine(content: str, config: str, folder: str, log: str, here: str, threads: int) -> int:
    """Run in this process, a task's, and return the exit status.

    Raises:
        ValueError: If the machine does not see the comparison's folder.
    """
    import ray

    try:
        os.chdir(here)
        seen = Path(config).read_text()
    except OSError as error:
        seen = str(error)
    if seen != content:
        raise ValueError(
            f"Expected machine {ray.util.get_node_ip_address()} to see {here} and {config}, in folders that all machines share, got none."
        )
    try:
        follow(config, folder, Path(log), threads)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
