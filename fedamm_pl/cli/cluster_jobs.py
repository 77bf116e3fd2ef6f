"""Runs of a comparison on the machines of a Ray cluster: each run is a task with its share of CPUs and GPUs."""

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
    """Connect to a Ray cluster, or start one on this machine, for the length of the context.

    Args:
        address: Address of the cluster; ``local`` starts one.
        cpus: Number of cores that a run takes.
        gpus: Number of GPUs that a run takes.

    Yields:
        A function that starts a run, and the number of runs that the cluster has room for.

    Raises:
        ValueError: If Ray is not installed, there is no such cluster, or it has no room for a run.
    """
    require_ray(address)
    needed = {"CPU": cpus, "GPU": gpus}
    with connected(address, 1, needed):
        yield partial(_start, needed), int(room(needed))


def _start(needed: dict[str, float], planned: PlannedRun, _: int) -> "ClusterJob":
    return ClusterJob(planned, needed)


class ClusterJob:
    """A run as a Ray task. Ray does not restart a lost task; repeating the command continues its run.

    Args:
        planned: The run.
        needed: Numbers of CPUs and GPUs that it takes.

    Attributes:
        lost: Why the task was lost, in brackets; empty if it was not.
    """

    def __init__(self, planned: PlannedRun, needed: dict[str, float]) -> None:
        import ray

        threads = max(1, int(needed["CPU"]))
        # a new process for each run, so that no GPU memory stays in use afterwards
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
        """Exit status of the run; None while it runs or waits, 1 if the task was lost."""
        import ray

        if not ray.wait([self._reference], timeout=0)[0]:
            return None
        try:
            return int(ray.get(self._reference))
        except ray.exceptions.RayError as error:
            self.lost = f" ({reason(error):.300})"
            return 1

    def terminate(self) -> None:
        """Stop the run, whether it runs or waits."""
        import ray

        ray.cancel(self._reference, force=True)

    def join(self) -> None:
        """Wait for the end of the run, but for 10 seconds at most."""
        import ray

        ray.wait([self._reference], timeout=10)


def run_on_machine(content: str, config: str, folder: str, log: str, here: str, threads: int) -> int:
    """Run in the process of the task, and return the exit status.

    Raises:
        ValueError: If this machine does not see the folder of the comparison.
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
