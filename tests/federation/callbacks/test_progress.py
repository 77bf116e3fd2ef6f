"""How far a run is, on a terminal and in a file."""

import re
import sys
from typing import Any

import pytest

from fedamm_pl.federation.callbacks import Progress
from fedamm_pl.federation.executors import Runner
from tests.federation.executors.methods import HalfReadable
from tests.federation.small import federation


def data() -> HalfReadable:
    return HalfReadable("tiny", num_clients=8, num_meta_per_class=2, imbalance_factor=0.2, partition="iid")


def test_a_file_gets_a_line_for_each_evaluation(capsys: pytest.CaptureFixture[str]) -> None:
    federation(num_rounds=3, eval_interval=2, callbacks=[Progress()]).run()
    out, errors = capsys.readouterr()
    assert errors == ""
    lines = out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["round 0/3", "round 2/3", "round 3/3"]
    share = r"\d+\.\d%"
    assert re.fullmatch(rf"round 0/3  all {share}  many {share}  medium {share}  few {share}", lines[0])
    assert re.search(r"  client_loss \d\.\d{3}  [\d,]+ examples/s  \d+ s left$", lines[1])
    assert not lines[2].endswith("left")


def test_failures_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    federation(data=data(), client_fraction=1.0, callbacks=[Progress()]).run()
    lines = capsys.readouterr().out.splitlines()
    assert ["failures" in line for line in lines] == [False, True, True]
    assert "  2 failures" in lines[2]


@pytest.mark.parametrize("columns", [40, 200])
def test_a_terminal_gets_a_bar(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    federation(data=data(), client_fraction=1.0, callbacks=[Progress()]).run()
    out, errors = capsys.readouterr()
    assert out == ""
    frames = [frame for frame in re.split(r"[\r\n]+", errors) if frame.strip()]
    assert max(map(len, frames)) <= columns
    assert frames[-1].startswith("round 2/2 |")
    if columns == 200:
        assert any("client 3/8" in frame for frame in frames)
        assert re.search(
            r"all \d+% many \d+% medium \d+% few \d+% 2 failures loss \d\.\d\d [\d,]+ examples/s", frames[-1]
        )


def test_a_continued_run_goes_on_counting(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for num_rounds in (1, 3):
        federation(num_rounds=num_rounds, output_dir=tmp_path, callbacks=[Progress()]).run()
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  ")[0] for line in lines] == ["round 0/1", "round 1/1", "round 2/3", "round 3/3"]


def test_a_bar_shows_how_many_workers_are_busy(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(Runner, "busy", property(lambda runner: (1, 2)))
    federation(callbacks=[Progress()]).run()
    assert re.search(r"client \d/\d 1/2 workers busy all ", capsys.readouterr().err)
