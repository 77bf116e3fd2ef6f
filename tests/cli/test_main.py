"""The program: dispatch, signals, exit status."""

import pkgutil
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl import __version__
from fedamm_pl.cli.main import main
from fedamm_pl.cli.signals import StopSignal, stop_signals
from fedamm_pl.federation.executors.worker import Worker

ROOT = Path(__file__).parent.parent.parent


def test_installed_program_is_this_one() -> None:
    (name,) = re.findall(r'^fedamm = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert pkgutil.resolve_name(name) is main


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_ends_the_run_and_says_how_to_continue(
    number: signal.Signals,
    status: int,
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Worker, "train", lambda *_: signal.raise_signal(number))
    before = signal.signal(number, signal.SIG_DFL)  # the tests may run under nohup
    try:
        with pytest.raises(SystemExit) as stop:
            main(command("FedAvg", tmp_path))
    finally:
        signal.signal(number, before)
    assert stop.value.code == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}; ")
    assert f"--output.dir {tmp_path}" in last


def hang_up_twice() -> None:
    with stop_signals():
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)  # the process would end here if this were another one


def test_a_closed_terminal_may_say_so_twice() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(StopSignal) as stop:
            hang_up_twice()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop.value.signal == signal.SIGHUP


def test_what_ignores_hang_ups_goes_on_ignoring_them() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with stop_signals():
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
