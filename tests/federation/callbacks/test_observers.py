"""Callbacks among themselves: in which order they are called, and whom an error harms."""

import errno
import json
from pathlib import Path

import pytest

from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.observers import Observers
from fedamm_pl.federation.run import Run
from tests.federation.small import Recorder, federation


class Fails(FederationCallback):
    def __init__(self, error: Exception) -> None:
        self.error = error

    def on_run_end(self, run: Run) -> None:
        raise self.error


def test_the_base_class_does_nothing() -> None:
    federation(num_rounds=1, callbacks=[FederationCallback()]).run()


def test_files_come_last_in_a_round_and_first_at_the_end(tmp_path: Path) -> None:
    there: list[list[str]] = []

    class Watch(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            there.append(sorted(path.stem for path in (tmp_path / "checkpoints").glob("*.ckpt")))

        def on_run_end(self, run: Run) -> None:
            assert {"final.ckpt", "summary.json"} <= {path.name for path in tmp_path.iterdir()}
            there.append(["end"])

    federation(callbacks=[Watch()], output_dir=tmp_path).run()
    assert there == [[], ["round_000000"], ["round_000000", "round_000001"], ["end"]]


def test_an_error_at_the_end_costs_a_warning_when_all_files_are_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recorder = Recorder()
    run = federation(callbacks=[Fails(KeyError("x")), recorder], output_dir=tmp_path)
    history = run.run()
    assert len(history) == 3
    assert "Fails failed at the end of the run, which is complete without it (KeyError: 'x')" in caplog.text
    assert recorder.calls[-1] == "run_end"
    assert json.loads((tmp_path / "summary.json").read_text())["num_rounds"] == 2
    assert (tmp_path / "final.ckpt").exists()


def test_a_full_disk_at_the_end_is_no_warning(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space"):
        federation(callbacks=[Fails(OSError(errno.ENOSPC, "No space left"))], output_dir=tmp_path).run()


def test_an_error_in_a_round_ends_the_run() -> None:
    class FailsInARound(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        federation(callbacks=[FailsInARound()]).run()


def test_without_a_folder_nobody_writes() -> None:
    assert Observers([], None, 3).files == []
