"""Signals that stop the program, SIGINT, SIGTERM and SIGHUP, as an exception."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Windows has no SIGHUP, the signal for a closed terminal."""


class StopSignal(SystemExit):
    """Raised when a signal tells the program to stop.

    Attributes:
        hint: How to continue; empty if there is nothing to say.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.hint = ""
        super().__init__(128 + number)  # the exit status that a shell reports for a process ended by a signal


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a :class:`StopSignal`; a second one ends the process at once.

    When a terminal is closed, the system and the shell may both send SIGHUP; the second one is ignored. Under ``nohup``
    SIGHUP has no effect. Lightning would turn Ctrl-C during a fit into exit status 1 and ignore a second one.
    """
    if threading.current_thread() is not threading.main_thread():  # signals can be handled in the main thread only
        yield
        return
    stopping = False

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        if stopping and number == getattr(signal, "SIGHUP", None):
            return
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise StopSignal(number)

    ignored = [number for number in STOPPING if number != signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in STOPPING if number not in ignored}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if stopping else handler)
