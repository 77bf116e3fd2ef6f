"""What the program shows: lines or a bar while it runs, a table at the end."""

import fcntl
import json
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl.cli.main import main
from fedamm_pl.federation.executors import SequentialExecutor

ROOT = Path(__file__).parent.parent.parent
COLUMNS = {"all": "test/acc", "many": "test/acc_many", "medium": "test/acc_medium", "few": "test/acc_few"}
GROUPS = r"all [01]\.\d{3}  many [01]\.\d{3}  medium [01]\.\d{3}  few [01]\.\d{3}"


def closing_table(text: str) -> dict[str, dict[str, float]]:
    """Return row -> column -> percent of the table that ends a run's output."""
    *_, head, final, best, mean, _ = text.splitlines()
    assert head.startswith("test accuracy, %")
    columns = head.removeprefix("test accuracy, %").split()
    table = {}
    for line in (final, best, mean):
        row, numbers = re.fullmatch(r"(\D+(?:10)?) +((?: *\d+\.\d\d)+)", line).groups()  # type: ignore[union-attr]
        table[row.strip()] = dict(zip(columns, map(float, numbers.split()), strict=True))
    return table


def assert_table_of(text: str, folder: Path) -> None:
    """Require the closing table to show summary.json."""
    summary = json.loads((folder / "summary.json").read_text())
    best = {metric: entry["value"] for metric, entry in summary["best"].items()}
    expected = {"final": summary["final"], "best (on test)": best, "mean of last 10": summary["mean_last_10"]}
    assert closing_table(text) == {
        row: {column: pytest.approx(100 * metrics[metric], abs=0.0051) for column, metric in COLUMNS.items()}
        for row, metrics in expected.items()
    }


def test_elsewhere_than_on_a_terminal_each_evaluation_is_a_line(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command("FedAMM", tmp_path))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "\r" not in printed.out
    lines = [line for line in printed.out.splitlines() if line.startswith("round ")]
    patterns = [
        rf"round 0/5  {GROUPS}",
        rf"round 2/5  {GROUPS}  client_loss \d\.\d{{3}}  [\d,]+ images/s  \d+ s left",
        rf"round 4/5  {GROUPS}  client_loss \d\.\d{{3}}  [\d,]+ images/s  \d+ s left",
        rf"round 5/5  {GROUPS}  client_loss \d\.\d{{3}}  [\d,]+ images/s",
    ]
    assert len(lines) == len(patterns)
    assert all(re.fullmatch(pattern, line) for pattern, line in zip(patterns, lines, strict=True)), lines


def test_a_run_says_what_it_is_about(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command("FedAvg", tmp_path, "--federation.num_rounds", "0"))
    head = capsys.readouterr().out.split("round 0/0")[0]
    parts = ["FedAvg with small_cnn (94,246 parameters) on cpu", "tiny: 136 training images", "IF 10", "4 clients"]
    parts += ["55 34 21 13 8 5", "share", "many [0, 1]; medium [2, 3]; few [4, 5]"]
    assert not [part for part in parts if part not in head]


def test_the_closing_table_shows_the_summary(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command("FedAMM", tmp_path))
    text = capsys.readouterr().out
    assert_table_of(text, tmp_path)
    assert text.splitlines()[-1] == f"results in {tmp_path}"


def test_without_progress_only_head_and_table_are_shown(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(command("FedAvg", tmp_path, "--output.progress", "none"))
    printed = capsys.readouterr()
    assert printed.err == ""
    assert "round" not in printed.out
    assert_table_of(printed.out, tmp_path)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_run_and_says_how_to_continue(
    number: signal.Signals,
    status: int,
    command: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SequentialExecutor, "_train", lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    try:
        with pytest.raises(SystemExit) as stop:
            main(command("FedAvg", tmp_path))
    finally:
        signal.signal(number, before)
    assert stop.value.code == status
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"stopped by {number.name}; ")
    assert f"--output.dir {tmp_path}" in last


@pytest.mark.parametrize("configured", [True, False])
def test_the_default_folder_is_named_by_configuration_or_algorithm_and_time(
    configured: bool, fedavg_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text((fedavg_run / "config.yaml").read_text())
    arguments = ["--config", "mine.yaml"] if configured else command("FedAvg", "null")
    main([*arguments, "--federation.num_rounds", "0"])
    (folder,) = (path.parent for path in tmp_path.rglob("summary.json"))
    assert folder.parent == tmp_path / "runs" / ("mine" if configured else "FedAvg")
    assert re.match(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)


def on_a_terminal(arguments: list[str], folder: Path) -> tuple[int, str]:
    """Run a command with a terminal as its standard output and error; return its exit status and what it showed."""
    terminal, child_end = pty.openpty()
    fcntl.ioctl(child_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 140, 0, 0))  # rows, columns
    environment = {
        name: value for name, value in os.environ.items() if name != "COLUMNS"
    }  # it would hide the terminal's
    with subprocess.Popen(arguments, cwd=folder, stdout=child_end, stderr=child_end, env=environment) as child:
        os.close(child_end)
        shown = b""
        while chunk := read_until_closed(terminal):
            shown += chunk
    os.close(terminal)
    return child.returncode, shown.decode()


def read_until_closed(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # Linux ends so when the last process has closed its end
        return b""


def test_on_a_terminal_a_bar_moves(command: Any, tmp_path: Path) -> None:
    arguments = [str(ROOT / "orchestrate.py"), *command("FedAMM", tmp_path / "run")]
    status, shown = on_a_terminal([sys.executable, *arguments], tmp_path)
    assert status == 0, shown
    *_, last = re.findall(r"\r[^\r\n]*round[^\r\n]*", shown)
    assert re.search(r"5/5 .*<00:00, all \d+% many \d+% medium \d+% few \d+% loss \d\.\d\d [\d,]+ images/s", last)
    assert len(last.strip()) < 110
    assert re.search(r"client 1/2", shown)
    assert not re.search(r"^round \d/5", shown, re.MULTILINE)
    assert_table_of(shown, tmp_path / "run")
    assert "Warning" not in shown
    command_line = json.loads((tmp_path / "run/summary.json").read_text())["command"]
    assert shlex.split(command_line) == ["python", *arguments]
