"""``fedamm report``: where the page goes, and what is said where there is none."""

from pathlib import Path

import pytest

from fedamm_pl.cli.main import main


def test_page_goes_to_the_folder_of_the_run_or_where_it_is_told(
    fedavg_run: Path,
    fedamm_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["report", str(fedavg_run), str(fedamm_run)])
    main(["report", str(fedavg_run), "--output", "page.html"])
    assert capsys.readouterr().out == "report in report.html\nreport in page.html\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "report.html"]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "required: runs"),
        (["nowhere"], "Expected RUN to be the folder of a run"),
        (["nowhere", "--outputs", "x"], "unknown option outputs; did you mean --output?"),
    ],
)
def test_mistake_is_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", *words])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("fedamm: error: ")
    assert part in printed.err


def test_help_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for name in ("RUN", "--output", "report.html"):
        assert name in shown
