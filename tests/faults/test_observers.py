"""What watches a run cannot spoil it: at the end it is complete before anybody else is told, in the middle it can go on."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.federation.callbacks import FederationCallback
from fedamm_pl.federation.run import Run
from fedamm_pl.results.drawing import FigureFiles
from tests.faults.faulty import CPU, raising
from tests.faults.test_kills import assert_same_run
from tests.tiny import NUM_CLASSES, tiny_data

HOOKS = ["on_run_start", "on_client_end", "on_round_end", "on_run_end"]


class Fails(FederationCallback):
    """Fails at the end of a run."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def on_run_end(self, run: Run) -> None:
        raise self.error


class Notes(FederationCallback):
    """Notes what is there at the end of a run."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def on_run_end(self, run: Run) -> None:
        assert run.output_dir is not None
        self.found = sorted(path.name for path in run.output_dir.iterdir() if path.is_file())


def federation(folder: Path, *callbacks: FederationCallback) -> Orchestrator:
    data = tiny_data()
    torch.manual_seed(0)
    module = FedAvg(NUM_CLASSES, 1, "tests.faults.faulty.network", info=data.info)
    options: dict[str, Any] = {"num_rounds": 3, "local_epochs": 1, "eval_interval": 1, "trainer": CPU}
    return Orchestrator(module, data, callbacks=callbacks, output_dir=folder, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    federation(folder).run()
    return folder


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_an_observer_that_fails_at_the_end_costs_a_warning(
    undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    last = Notes()
    run = federation(tmp_path, Fails(RuntimeError("no such font")), Fails(KeyError("axis")), last)
    history = run.run()
    assert warnings_in(caplog) == [
        "Fails failed at the end of the run, which is complete without it (RuntimeError: no such font)",
        "Fails failed at the end of the run, which is complete without it (KeyError: 'axis')",
    ]
    assert {"final.ckpt", "summary.json", "metrics.csv", "diagnostics.json"} <= set(last.found)
    assert history[-1]["round"] == 3
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), SystemExit(3)])
def test_a_full_disk_and_the_wish_to_stop_are_no_warnings_but_the_run_is_complete(
    error: BaseException, undisturbed: Path, tmp_path: Path
) -> None:
    with pytest.raises(type(error)):
        federation(tmp_path, Fails(error)).run()
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize("hook", HOOKS[:-1])
def test_after_an_observer_that_fails_in_the_middle_a_run_can_go_on(
    hook: str, undisturbed: Path, tmp_path: Path
) -> None:
    calls: list[None] = []

    def fail(*_: Any) -> None:
        calls.append(None)
        if len(calls) == (1 if hook == "on_run_start" else 3):
            raise RuntimeError("injected")

    watcher = FederationCallback()
    setattr(watcher, hook, fail)
    with pytest.raises(RuntimeError, match="injected"):
        federation(tmp_path, watcher).run()
    assert not (tmp_path / "final.ckpt").exists()
    federation(tmp_path).run()
    assert_same_run(tmp_path, undisturbed)


def test_figures_that_cannot_be_drawn_at_the_end_cost_the_program_a_line(
    command: Any,
    fedavg_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(FigureFiles, "on_run_end", lambda *_: raising(ValueError("no such font"))())
    main(command("FedAvg", tmp_path, "--output.figures", "true", "--output.progress", "none"))
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1] == f"results in {tmp_path}"
    lines = [line for line in printed.err.splitlines() if "end of the run" in line]
    assert lines == [
        "FigureFiles failed at the end of the run, which is complete without it (ValueError: no such font)"
    ]
    assert "Traceback" not in printed.err
    assert json.loads((tmp_path / "summary.json").read_text())["stopped"] is None
    assert_same_run(tmp_path, fedavg_run)


def test_a_logger_among_the_files_of_a_run_is_one_line_and_no_file(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "name": "", "version": ""}}]
    with pytest.raises(SystemExit) as ended:
        main(command("FedAvg", folder, "--logger", json.dumps(loggers)))
    assert ended.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    assert line.startswith("fedamm: error: Expected --logger to write into a folder of its own, got CSVLogger in ")
    assert not folder.exists()


def test_a_logger_beside_the_files_of_a_run_changes_none_of_them(
    command: Any, fedavg_run: Path, tmp_path: Path
) -> None:
    loggers = [{"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": "csv", "version": ""}}]
    main(command("FedAvg", tmp_path, "--logger", json.dumps(loggers), "--output.progress", "none"))
    rows = (tmp_path / "csv/metrics.csv").read_text().splitlines()
    assert len(rows) == 7  # a heading, and rounds 0 to 5
    assert_same_run(tmp_path, fedavg_run)
