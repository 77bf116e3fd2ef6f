"""Starts runs side by side, each in a process of its own, which is forked from one that has imported the package already."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from multiprocessing import forkserver, get_all_start_methods, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from fedamm_pl.cores import shared_out, usable_cores
from fedamm_pl.files import NO_FOLLOW

FORKS = "forkserver" in get_all_start_methods()
"""Whether the system knows such forks; on Windows each run imports everything anew."""
CONTEXT: Any = get_context("forkserver" if FORKS else "spawn")


def launch(config: Path, folder: Path, log: Path, jobs: int) -> BaseProcess:
    """Start a run.

    Args:
        config: Its configuration.
        folder: Where it writes.
        log: File to which its output is added.
        jobs: How many such runs share the cores.

    Raises:
        OSError: If the log cannot be written, or is a link.
    """
    os.close(_opened(log))
    if FORKS:
        with _package_on_path():
            CONTEXT.set_forkserver_preload(["fedamm_pl.cli.run"])
            forkserver.ensure_running()
    threads = None if "OMP_NUM_THREADS" in os.environ else shared_out(usable_cores(), jobs)
    arguments = (str(config), str(folder), log, threads, dict(os.environ))
    process: BaseProcess = CONTEXT.Process(target=_run, args=arguments, name=str(folder))
    process.start()
    return process


def _run(config: str, folder: str, log: Path, threads: int | None, environment: dict[str, str]) -> None:
    output = _opened(log)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(output, stream.fileno())
    os.close(output)
    os.environ.clear()
    os.environ.update(environment)  # the process that was forked may be older than some of it
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
    importlib.import_module("fedamm_pl.cli.main").main(["--config", config, "--output.dir", folder])


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
