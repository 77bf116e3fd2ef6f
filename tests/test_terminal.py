"""What is said shows, and nothing more; who has gone is not waited for."""

import io
import logging
import os
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedamm_pl.terminal import HIDDEN, PlainFormatter, prepare_streams, printable, say


@given(st.text(st.characters() | st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp"))))
def test_a_printable_text_has_no_control_characters(text: str) -> None:
    shown = printable(text)
    assert not [character for character in shown if unicodedata.category(character) in HIDDEN]
    assert len(shown.splitlines()) <= 1
    assert printable(shown) == shown


def test_what_shows_stays() -> None:
    assert printable("FedAMM † 61.0 ± 1.4 é 中 😀") == "FedAMM † 61.0 ± 1.4 é 中 😀"
    assert printable("a\u00a0b") == "a\u00a0b"  # a space of another kind


def a_broken_pipe() -> io.TextIOWrapper:
    reader, writer = os.pipe()
    os.close(reader)
    return os.fdopen(writer, "w")


def test_a_broken_pipe_is_passed_over() -> None:
    stream = a_broken_pipe()
    say("once", stream)
    say("and again", stream)
    stream.close()  # flushes what it holds


def test_a_closed_stream_is_passed_over() -> None:
    stream = a_broken_pipe()
    say("once", stream)
    stream.close()
    say("and again", stream)


def test_lines_stay_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("a\x1b[31m\nb")
    assert capsys.readouterr().out == "a\\x1b[31m\nb\n"


def test_missing_streams_are_made_and_odd_ones_show_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    monkeypatch.setattr(sys, "stderr", None)
    prepare_streams()
    say("±")
    say("nobody", sys.stderr)
    sys.stderr.close()
    assert narrow.buffer.getvalue() == b"\\xb1\n"  # type: ignore[attr-defined]


def test_a_log_record_is_one_line() -> None:
    record = logging.LogRecord("a", logging.WARNING, "", 0, "client %s", ("x\n\x1b[2J",), None)
    assert PlainFormatter().format(record) == r"client x\n\x1b[2J"
