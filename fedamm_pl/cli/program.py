"""Setup that all commands share: the working directory on the path, signals, the log, and flushed output."""

import contextlib
import os
import sys
from collections.abc import Callable

from fedamm_pl.cli.signals import StopSignal, stop_signals
from fedamm_pl.terminal import plain_log, prepare_streams, say, silence


def run_program(answer: Callable[[list[str]], None], words: list[str]) -> None:
    """Run a command line.

    Args:
        answer: Function that runs the command line.
        words: The command line without the program's name.
    """
    with contextlib.suppress(OSError):  # the working directory may have been removed
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # for the user's networks, data and algorithms
    prepare_streams()
    try:
        with stop_signals(), plain_log():
            answer(words)
    except StopSignal as stop:
        say("; ".join(filter(None, [f"\nstopped by {stop.signal.name}", stop.hint])), sys.stderr)
        sys.exit(stop.code)
    finally:
        flush_output()


def flush_output() -> None:
    """Flush the standard output now, while an error can be handled: the reading end of a pipe may be closed."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # otherwise the interpreter would report it at exit
        silence(sys.stdout)
