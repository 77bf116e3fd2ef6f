"""What surrounds whatever the program does: your folder on the path, signals, the log, and output that is flushed."""

import contextlib
import os
import sys
from collections.abc import Callable

from fedamm_pl.cli.signals import StopSignal, stop_signals
from fedamm_pl.terminal import plain_log, prepare_streams, say, silence


def run_program(answer: Callable[[list[str]], None], words: list[str]) -> None:
    """Do what a command line says.

    Args:
        answer: Does it.
        words: The command line without the program's name.
    """
    with contextlib.suppress(OSError):  # the folder that one is in may have been removed
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # your own networks, data and algorithms, wherever the program itself lies
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
    """Flush the standard output now, where an error can be handled: its reader may have gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # else the interpreter would report it at its end
        silence(sys.stdout)
