"""SIGINT, SIGTERM and SIGHUP as an exception that ends the program."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

STOPPING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
"""Windows has no SIGHUP, which says that the terminal was closed."""


class StopSignal(SystemExit):
    """The program was told to stop.

    Attributes:
        hint: What the program can say about going on, if anything.
    """

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        self.hint = ""
        super().__init__(128 + number)  # as a shell reports a process that a signal has ended


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the first SIGINT, SIGTERM or SIGHUP into a :class:`StopSignal`; a second one ends the process at once.

    A closed terminal may say so twice, by the system and by the shell, which counts once; under ``nohup`` it is ignored.
    Lightning would turn Ctrl-C in a fit into exit status 1 and ignore a second one.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals can be handled
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
