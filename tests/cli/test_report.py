"""``fedamm report``: what is said where there is no page; the page itself is tested beside its code."""

import pytest

from fedamm_pl.cli.main import main


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "required, but not given: RUN\n"),
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
