"""The report of runs, and the command that writes it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedamm_pl.cli.main import main
from fedamm_pl.results.report import report, write_report
from fedamm_pl.results.runs import load
from tests.results.handmade import a_run
from tests.results.pages import Page


def test_the_same_runs_give_the_same_page(fedavg_run: Path) -> None:
    assert report([load(fedavg_run)]) == report([load(fedavg_run)])


def test_no_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected `runs` to hold a run, got none"):
        report([])


def test_the_page_of_a_run_goes_to_its_folder(copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("FedAvg", "run")
    main(["report", str(folder)])
    assert capsys.readouterr().out == f"report in {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text() == report([load(folder)])


@pytest.mark.parametrize("several", [False, True])
def test_the_page_of_one_folder_goes_into_it_and_that_of_several_into_the_working_folder(
    several: bool, six: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    main(["report", *(map(str, six) if several else [".."])])
    page = Path("report.html" if several else "../report.html")
    assert capsys.readouterr().out == f"report in {page}\n"
    assert Page(page.read_text()).texts["h1"] == ["6 runs, tiny"]


def test_the_page_goes_where_it_is_told(fedavg_run: Path, tmp_path: Path) -> None:
    main(["report", str(fedavg_run), "--output", str(tmp_path / "page.html")])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{tmp}/nowhere"], ["Expected RUN to be the folder of a run, with metrics.csv, got", "nowhere"]),
        (["{tmp}"], ["Expected RUN to be the folder of a run", "got {tmp}"]),
        ([], ["required, but not given: RUN"]),
        (["{run}", "--output", "{tmp}"], ["Expected --output to be a file that can be written, got {tmp}"]),
        (["{run}", "--output", "/proc/page.html"], ["Expected --output to be a file", "got /proc/page.html"]),
        (["{run}", "--outptu", "x"], ["unknown option outptu"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    words: list[str], parts: list[str], fedavg_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def filled(text: str) -> str:
        return text.format(tmp=tmp_path, run=fedavg_run)

    with pytest.raises(SystemExit) as stop:
        main(["report", *map(filled, words)])
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("fedamm: error: ")
    assert shown.err.count("\n") == 1
    for part in parts:
        assert filled(part) in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_mangled_file_is_named(copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("FedAvg", "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    assert f"fedamm: error: Expected {folder / 'summary.json'} to be " in capsys.readouterr().err


def test_help_is_useful(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for word in ("RUN", "--output", "report.html", "comparison"):
        assert word in shown


def test_no_page_needs_pyplot(tmp_path: Path) -> None:
    """It would choose a backend for the whole process, and keep each figure."""
    folders = [str(a_run(tmp_path / name)) for name in "ab"]
    code = f"""
import sys
import fedamm_pl  # torchmetrics imports it
sys.modules["matplotlib.pyplot"] = None
from fedamm_pl.results.report import report
from fedamm_pl.results.runs import load_all
assert report(load_all({folders})).count("<img ") == 2 + 2 * 3
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("name", ["report.html", ".report.html.tmp"])
def test_the_page_is_written_to_no_link(name: str, tmp_path: Path) -> None:
    folder, target = a_run(tmp_path / "run"), tmp_path / "outside"
    target.write_text("precious")
    (folder / name).symlink_to(target)
    write_report([load(folder)], folder / "report.html")
    assert target.read_text() == "precious"
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("link", [True, False])
def test_a_file_that_leads_elsewhere_is_one_line(
    link: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = a_run(tmp_path / "run")
    path = folder / "config.yaml"
    path.unlink()
    if link:
        path.symlink_to("/etc/passwd")
    else:
        os.mkfifo(path)
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"fedamm: error: Expected {path} to be ")
    assert printed.count("\n") == 1
    assert not (folder / "report.html").exists()
