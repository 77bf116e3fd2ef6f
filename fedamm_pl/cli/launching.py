"""Runs of a comparison in parallel, each in a process that is forked from one that has already imported the package."""

import contextlib
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver, get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Protocol

import torch

from fedamm_pl.cli.program import run_program
from fedamm_pl.cli.run import run
from fedamm_pl.cores import shared_out, usable_cores
from fedamm_pl.files import NO_FOLLOW, write_atomically
from fedamm_pl.results.comparison import PlannedRun
from fedamm_pl.results.tables import averaged
from fedamm_pl.terminal import printable, say

FORKS = "forkserver" in get_all_start_methods()
"""Whether the system has a fork server; without one, as on Windows, each run imports everything again."""
CONTEXT: Any = get_context("forkserver" if FORKS else "spawn")


class Job(Protocol):
    """A run in a separate process, on this or another machine."""

    @property
    def exitcode(self) -> int | None:
        """Exit status of the run; None while it runs."""
        ...

    def terminate(self) -> None:
        """Stop the run."""
        ...

    def join(self) -> None:
        """Wait for the end of the run."""
        ...


Start = Callable[[PlannedRun, int], Job]
"""Function that starts a run, given the run and the number of runs that share the cores."""


def execute(
    runs: Sequence[PlannedRun], jobs: int, metric: str = "test/acc", begin: Start | None = None
) -> list[PlannedRun]:
    """Run all unfinished runs, several in parallel, each in a separate process.

    If this process is stopped, it stops the runs too.

    Args:
        runs: The runs.
        jobs: Number of runs at the same time; 0: start none.
        metric: The accuracy to print when a run is done.
        begin: Function that starts a run; by default :func:`start`.

    Returns:
        The runs that failed, or with ``jobs`` 0 those that are not finished. The output of a run is in
        ``<folder>.log``.
    """
    waiting = [planned for planned in runs if not planned.finished]
    say(f"{len(runs)} runs, {len(runs) - len(waiting)} finished before")
    if not jobs:
        return waiting
    begin = begin or start
    running: dict[Job, tuple[PlannedRun, float]] = {}
    failed, done = [], len(runs) - len(waiting)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                planned = waiting.pop(0)
                running[begin(planned, jobs)] = planned, time.monotonic()
            time.sleep(0.1)
            for process in [process for process in running if process.exitcode is not None]:
                planned, began = running.pop(process)
                done += 1
                if process.exitcode or not planned.finished:
                    failed.append(planned)
                    why = getattr(process, "lost", "") or last_words(planned.log)
                    say(printable(f"[{done}/{len(runs)}] {planned}: failed, see {planned.log}{why}"))
                    continue
                summary, seconds = planned.summary or {}, time.monotonic() - began
                mean, last = summary["mean_last_10"].get(metric), averaged([summary.get("num_averaged")])
                reached = f"{100 * (math.nan if mean is None else mean):.1f}"
                where = "" if metric == "test/acc" else f"{metric}, "
                say(
                    printable(
                        f"[{done}/{len(runs)}] {planned}: {reached} ({where}mean of last {last}), {seconds:.0f} s"
                    )
                )
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.join()
    return failed


def last_words(log: Path) -> str:
    """Return the last line of a run's output in brackets, which says why it failed; empty if there is no output."""
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    found = [line for line in lines if line.strip()]
    return f" ({found[-1].strip():.300})" if found else ""


def start(planned: PlannedRun, jobs: int) -> BaseProcess:
    """Start a run in a separate process."""
    return launch(written(planned), planned.folder, planned.log, jobs)


def written(planned: PlannedRun) -> Path:
    """Write the configuration of a run, and return the path of the file."""
    planned.folder.parent.mkdir(parents=True, exist_ok=True)
    path = planned.folder.with_name(planned.folder.name + ".yaml")
    write_atomically(path, planned.config.encode())
    return path


def launch(config: Path, folder: Path, log: Path, jobs: int) -> BaseProcess:
    """Start a run.

    Args:
        config: Configuration file of the run.
        folder: Folder of the run.
        log: File to which the output of the run is appended.
        jobs: Number of runs that share the cores.

    Raises:
        OSError: If the log cannot be written, or is a link.
    """
    os.close(_opened(log))
    if FORKS:
        with _package_on_path():
            CONTEXT.set_forkserver_preload(["fedamm_pl.cli.launching"])
            forkserver.ensure_running()
    threads = None if "OMP_NUM_THREADS" in os.environ else shared_out(usable_cores(), jobs)
    arguments = (str(config), str(folder), log, threads, dict(os.environ))
    process: BaseProcess = CONTEXT.Process(target=_run, args=arguments, name=str(folder))
    process.start()
    return process


def _run(config: str, folder: str, log: Path, threads: int | None, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)  # the fork server may be older than some of these values
    follow(config, folder, log, threads)


def follow(config: str, folder: str, log: Path, threads: int | None) -> None:
    """Run in this process, and from then on redirect its output to a file.

    Args:
        config: Configuration file of the run.
        folder: Folder of the run.
        log: File to which the output is appended.
        threads: Number of threads; None: leave the number as it is.
    """
    output = _opened(log)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.close(output)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    run_program(run, ["--config", config, "--output.dir", folder])


def _opened(log: Path) -> int:
    return os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | NO_FOLLOW, 0o666)


@contextlib.contextmanager
def _package_on_path() -> Iterator[None]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), before]))
    try:
        yield
    finally:
        del os.environ["PYTHONPATH"]
        if before is not None:
            os.environ["PYTHONPATH"] = before
