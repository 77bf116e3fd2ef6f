"""Benchmark rows on the program: its start, and the cost of logging, figures and progress."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.timing import Row, pairs, timed

REPOSITORY = Path(__file__).resolve().parent.parent


FIRST_STEP = """
import os, sys
from fedamm_pl import FedAMM
from fedamm_pl.cli.main import main
FedAMM.training_step = lambda *_: os._exit(0)
main(sys.argv[1:])
"""


def row_start(repeats: int) -> list[Row]:
    """Compare the start of the program with the import of the libraries that it needs."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    bare = [sys.executable, "-c", "import pytorch_lightning, torchvision"]
    bare_without_end = [sys.executable, "-c", "import os, pytorch_lightning, torchvision; os._exit(0)"]
    program, quickstart = [sys.executable, "orchestrate.py"], ["--config", "configs/quickstart.yaml"]

    def start(command: list[str], status: int = 0) -> Callable[[], float]:
        def call() -> None:
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=False)
            assert done.returncode == status, done.stderr

        return timed(call)

    names = ("program", "import pytorch_lightning, torchvision")
    rows = [
        pairs(
            "fedamm --help / import of Lightning and torchvision",
            start([*program, "--help"]),
            start(bare),
            repeats,
            bar=1.2,
            names=names,
        ),
        pairs(
            "a configuration error / import",
            start([*program, *quickstart, "--data.num_clients", "many"], 2),
            start(bare),
            repeats,
            bar=1.2,
            names=names,
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(1000))

        def first_step() -> float:
            output = ["--output.dir", f"{folder}/{next(count)}"]
            return start([sys.executable, "-c", FIRST_STEP, *quickstart, *output])()

        what = "first training step of the quickstart / import"
        return [*rows, pairs(what, first_step, start(bare_without_end), repeats, bar=1.5, names=names)]


OBSERVED = """
import collections, json, sys, time
from fedamm_pl import Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.federation.callbacks import LogTo, Progress
from fedamm_pl.results.drawing import FigureFiles, LogFigures

seconds = collections.Counter()


def timed(name, function):
    def call(*args):
        start = time.perf_counter()
        result = function(*args)
        seconds[name] += time.perf_counter() - start
        return result

    return call


for watcher in (LogTo, LogFigures, FigureFiles, Progress):
    for hook in ("on_run_start", "on_client_end", "on_round_end", "on_run_end"):
        setattr(watcher, hook, timed(watcher.__name__, getattr(watcher, hook)))
Orchestrator.run = timed("run", Orchestrator.run)
main(sys.argv[1:])
print(json.dumps(seconds))
"""
WATCHERS = {
    "LogTo": "TensorBoard's numbers",
    "LogFigures": "its figures",
    "FigureFiles": "figures/",
    "Progress": "progress",
}


def row_watching(repeats: int) -> list[Row]:
    """Compare the quickstart with all logs, figures and progress with the same run minus the time that these take."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(min(repeats, 3)):
            options = ["--config", "configs/quickstart.yaml", "--output.dir", f"{folder}/{number}"]
            command = [sys.executable, "-c", OBSERVED, *options]
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    seconds = {name: [round(run[name], 4) for run in runs] for name in (*WATCHERS, "run")}
    note = ", ".join(f"{what} {statistics.median(seconds[name]):.2g} s" for name, what in WATCHERS.items())
    note += f" of {statistics.median(seconds['run']):.3g} s"
    ratios = [run["run"] / (run["run"] - sum(run[name] for name in WATCHERS)) for run in runs]
    what = "quickstart with TensorBoard, figures and progress / without"
    return [Row(what, statistics.median(ratios), 1.02, seconds=seconds, note=note)]
