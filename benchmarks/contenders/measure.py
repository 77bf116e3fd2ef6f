"""Measurement of one contender at a job, once, in a separate process."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.contenders.environments import last_line
from benchmarks.contenders.given import FOLDER, State, read_state
from benchmarks.contenders.job import Job
from benchmarks.contenders.material import Material
from benchmarks.contenders.process_tree import memory, tree

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # Ray listens on this machine only
    "WANDB_MODE": "disabled",
}
SECONDS_BETWEEN_SAMPLES = 0.25


class FailedError(RuntimeError):
    """Raised when a contender does not finish a job."""


@dataclass(frozen=True)
class Contender:
    """A framework, or way of running FedAvg, that is measured.

    Attributes:
        name: Name in the table.
        environment: Name of its environment.
        module: Its module in this folder.
        options: Fields of the job that it overrides.
        jobs: The jobs that it does; all if empty.
        ours: Whether it is this package.
        notes: Job, or * for all jobs -> note for the table.
    """

    name: str
    environment: str
    module: str
    options: dict[str, Any] = field(default_factory=dict)
    jobs: tuple[str, ...] = ()
    ours: bool = False
    notes: dict[str, str] = field(default_factory=dict)

    def note(self, job: str) -> str:
        """Return the notes for a job."""
        return "; ".join(self.notes[key] for key in ("*", job) if key in self.notes)

    def does(self, job: str) -> bool:
        """Return whether the contender does a job."""
        return not self.jobs or job in self.jobs


@dataclass(frozen=True)
class Measured:
    """Time and memory of a contender for the timed rounds of a job, and its final weights.

    Attributes:
        wall: Seconds of each timed round.
        processor: Total processor seconds of the timed rounds, of all processes.
        peak: Peak memory of all its processes together, in MiB.
        versions: Versions of its packages.
        state: The final weights.
    """

    wall: list[float]
    processor: float
    peak: float
    versions: dict[str, str]
    state: State


def measure(contender: Contender, python: Path, material: Material, timeout: float) -> Measured:
    """Measure a contender at a job.

    Args:
        contender: The contender.
        python: The Python of its environment.
        material: The job and its files.
        timeout: Seconds after which the contender is stopped.

    Raises:
        FailedError: If the contender fails, with the last line of its output, or takes too long.
    """
    with tempfile.TemporaryDirectory(prefix="contender-") as name:
        folder = Path(name)
        for file in ("data.npz", "clients.npz", "initial.npz"):
            shutil.copy(material.folder / file, folder)
        job: Job = replace(material.job, **contender.options)
        job.write(folder / "job.json")
        peak = run(python, contender.module, folder, job, timeout)
        result = json.loads((folder / "result.json").read_text())
        return Measured(**result, peak=peak, state=read_state(folder / "final.npz"))


def run(python: Path, module: str, folder: Path, job: Job, timeout: float) -> float:
    """Run the module of a contender, and return the peak memory of all its processes together, in MiB.

    Raises:
        FailedError: If the contender fails or takes too long.
    """
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(job.threads))
    own = {"PYTHONPATH": str(REPOSITORY), FOLDER: str(folder), "FLWR_HOME": str(folder / "flwr")}
    command = [str(python), "-m", f"benchmarks.contenders.{module}"]
    log, peak, end = folder / "log.txt", 0.0, time.monotonic() + timeout
    with log.open("w") as output:
        environment = {**os.environ, **threads, **QUIET, **own}
        child = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        while child.poll() is None:
            time.sleep(SECONDS_BETWEEN_SAMPLES)
            peak = max(peak, memory(child.pid))
            if time.monotonic() > end:
                for process in reversed(tree(child.pid)):
                    os.kill(process, signal.SIGKILL)
                child.wait()
                raise FailedError(f"given up after {timeout:g} s")
    if child.returncode or not (folder / "result.json").exists():
        raise FailedError(f"failed: {last_line(log.read_text(errors='replace'))[:300]}")
    return peak
