"""SIGINT and SIGTERM end a run at once, in one line, with the last completed round on disk."""

import functools
import itertools
import os
import pkgutil
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from pytorch_lightning.strategies import SingleDeviceStrategy

from fedamm_pl import FedAMM
from fedamm_pl.cli.main import main
from fedamm_pl.federation.checkpoint import load_checkpoint
from tests.faults.test_kills import (
    DEADLINE,
    PROGRAM,
    assert_each_round_is_logged_once,
    assert_same_run,
    checkpoints,
    ended,
    fork,
    wait_for,
    wait_for_another_second,
)

SIGNALS = [signal.SIGINT, signal.SIGTERM]
ROUNDS = ["--federation.num_rounds", "6"]
SHORT = ["--federation.num_rounds", "2", "--federation.eval_interval", "1", "--federation.client_fraction", "0.25"]


@pytest.fixture(scope="module")
def expected(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was not interrupted."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    main(command("FedAMM", folder, *ROUNDS))
    return folder


@pytest.fixture(scope="module")
def short_expected(command: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a shorter one, of one client a round."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "short"
    main(command("FedAMM", folder, *SHORT))
    return folder


def assert_stopped(number: int, errors: str, folder: Path | None) -> None:
    """One line that names the signal and how to go on."""
    (line,) = filter(None, errors.splitlines())
    assert line.startswith(f"stopped by {signal.Signals(number).name}")
    assert (f"--output.dir {folder} continues" in line) == (folder is not None)


# The real program


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_signal_in_mid_round_costs_that_round_only(
    number: int, expected: Path, command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = command("FedAMM", folder, *ROUNDS)
    with subprocess.Popen([*PROGRAM, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        wait_for(lambda: len(checkpoints(folder)) > 1)
        time.sleep(0.05)  # less than a round
        child.send_signal(number)
        sent = time.monotonic()
        _, errors = child.communicate(timeout=DEADLINE)
        assert time.monotonic() - sent < 10
    assert child.returncode == 128 + number
    assert_stopped(number, errors, folder)
    newest = checkpoints(folder)[-1]
    assert load_checkpoint(folder / f"checkpoints/round_{newest:06d}.ckpt").state.round_num == newest
    assert not (folder / "final.ckpt").exists()
    main(arguments)
    assert f"continuing after round {newest}\n" in capsys.readouterr().out
    assert_same_run(folder, expected)
    assert_each_round_is_logged_once(folder)


def test_ctrl_c_reaches_a_pipeline(command: Any, tmp_path: Path) -> None:
    """A terminal sends it to all of ``program | cat``: the output has nowhere to go any more."""
    folder = tmp_path / "run"
    arguments = [*PROGRAM, *command("FedAMM", folder, *ROUNDS, "--output.progress", "none")]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with (
        subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as cat,
        subprocess.Popen(arguments, stdout=cat.stdin, stderr=subprocess.PIPE, text=True, env=buffered) as child,
    ):
        assert cat.stdin
        cat.stdin.close()
        wait_for(lambda: len(checkpoints(folder)) > 1)
        for process in (cat, child):
            process.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=DEADLINE)
    assert_stopped(signal.SIGINT, errors, folder)
    assert child.returncode == 130


# The program in a process that has its imports already

STAGES = {
    "the parser is built": "fedamm_pl.cli.run:build_parser",
    "data are loaded": "fedamm_pl.data.datamodule:load_images",
    "checkpoints are read": "fedamm_pl.federation.run:latest_checkpoint",
    "the run is described": "fedamm_pl.cli.run:describe",
    "the server answers": "fedamm_pl.algorithms.meta.exchange:meta_gradient",
    "the model is evaluated": "fedamm_pl.algorithms:FedAMM.test_step",
    "a round is logged": "pytorch_lightning.loggers:TensorBoardLogger.log_metrics",
    "a file is flushed": "os:fsync",
    "final.ckpt is written": "pytorch_lightning:Trainer.save_checkpoint",
}
MORE_STAGES = {
    "configuration files are read": "fedamm_pl.cli.parser:check_config_files",
    "the tail is cut": "fedamm_pl.data.datamodule:long_tail_split",
    "the network is made": "fedamm_pl.protocol.classifier:build_model",
    "the folder is locked": "fedamm_pl.federation.orchestrator:lock_folder",
    "config.yaml is written": "fedamm_pl.cli.run:write_atomically",
    "a client trains": "fedamm_pl.algorithms:FedAMM.training_step",
    "a client does its meta step": "fedamm_pl.algorithms.fedamm:virtual_step",
    "clients are averaged": "fedamm_pl.federation.aggregation:WeightedAverage.compute",
    "a row is appended": "fedamm_pl.federation.callbacks.files:append_whole",
    "summary.json is written": "fedamm_pl.federation.callbacks.files:summary",
    "the table is shown": "fedamm_pl.cli.run:table",
}
BEFORE_THE_FOLDER_IS_KNOWN = ("the parser is built", "configuration files are read")


def signal_in(place: str, number: int) -> None:
    """Have this process send itself a signal whenever it comes to a function, ``module:name``."""
    module, _, name = place.partition(":")
    owner, _, attribute = name.rpartition(".")
    target = pkgutil.resolve_name(f"{module}:{owner}" if owner else module)
    original = getattr(target, attribute)

    @functools.wraps(original)
    def signalled(*args: Any, **options: Any) -> Any:
        os.kill(os.getpid(), number)
        return original(*args, **options)

    setattr(target, attribute, signalled)


@pytest.mark.parametrize("stage", [*STAGES, *(pytest.param(stage, marks=pytest.mark.slow) for stage in MORE_STAGES)])
def test_a_signal_at_any_stage_ends_in_one_line(
    stage: str, command: Any, short_expected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = {**STAGES, **MORE_STAGES}
    folder, number = tmp_path / "run", SIGNALS[list(stages).index(stage) % 2]
    arguments = command("FedAMM", folder, *SHORT)
    process = fork(arguments, tmp_path / "stopped", functools.partial(signal_in, stages[stage], number))
    assert ended(process) == 128 + number
    errors = (tmp_path / "stopped.err").read_text()
    assert_stopped(number, errors, None if stage in BEFORE_THE_FOLDER_IS_KNOWN else folder)
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
    wait_for_another_second(folder)
    main(arguments)
    assert capsys.readouterr().err == ""
    assert_same_run(folder, short_expected)
    assert_each_round_is_logged_once(folder)


def stop_slowly(marker: Path, number: int) -> None:
    """Have this process send itself a signal in the second round, and take a minute to end the fit."""
    training_step, steps = FedAMM.training_step, itertools.count()

    def signalled(module: FedAMM, batch: Any, batch_idx: int) -> None:
        if next(steps) == 8:
            os.kill(os.getpid(), number)
        training_step(module, batch, batch_idx)

    def on_exception(strategy: SingleDeviceStrategy, exception: BaseException) -> None:
        marker.touch()
        for _ in range(600):  # a signal just before a sleep does not end it
            time.sleep(0.1)

    FedAMM.training_step = signalled  # type: ignore[method-assign]
    SingleDeviceStrategy.on_exception = on_exception  # type: ignore[method-assign]


@pytest.mark.parametrize("second", SIGNALS)
@pytest.mark.parametrize("first", SIGNALS)
def test_a_second_signal_ends_a_slow_shutdown_at_once(first: int, second: int, command: Any, tmp_path: Path) -> None:
    marker, folder = tmp_path / "shutting down", tmp_path / "run"
    process = fork(command("FedAMM", folder, *SHORT), tmp_path / "log", functools.partial(stop_slowly, marker, first))
    wait_for(marker.exists)
    assert process.pid is not None
    os.kill(process.pid, second)
    sent = time.monotonic()
    assert ended(process) == 128 + second
    assert time.monotonic() - sent < 5
    assert (tmp_path / "log.err").read_text() == ""
    assert load_checkpoint(folder / "checkpoints/round_000001.ckpt").state.round_num == 1


@pytest.mark.slow
def test_a_signal_at_any_instant_ends_in_one_line(command: Any, fedamm_run: Path, tmp_path: Path) -> None:
    instants, failed = random.Random(0), []
    folder, log, arguments = tmp_path / "run", tmp_path / "log", command("FedAMM", tmp_path / "run")
    start = time.monotonic()
    assert ended(fork(arguments, log)) == 0
    seconds = time.monotonic() - start
    for _ in range(100):
        shutil.rmtree(folder)
        delay, number = instants.uniform(0.05, seconds), instants.choice(SIGNALS)
        process = fork(arguments, log)
        time.sleep(delay)
        assert process.pid is not None
        os.kill(process.pid, number)
        status, errors = ended(process), log.with_suffix(".err").read_text()
        folder.mkdir(exist_ok=True)
        try:
            if status != 0 and not (status == -number and errors == ""):  # it had ended, or main had not begun
                assert status == 128 + number
                (line,) = filter(None, errors.splitlines())
                assert line.startswith("stopped by")
            wait_for_another_second(folder)
            assert ended(fork(arguments, log)) == 0
            assert_same_run(folder, fedamm_run)
            assert_each_round_is_logged_once(folder)
        except AssertionError as error:
            failed.append(f"{signal.Signals(number).name} after {delay:.3f} s, status {status}: {errors}{error}")
    assert not failed, "\n".join(failed)
