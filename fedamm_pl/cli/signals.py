"""SIGINT and SIGTERM as an exception that ends the program."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


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
    """Turn the first SIGINT or SIGTERM into a :class:`StopSignal`; a second one ends the process at once.

    Lightning would turn Ctrl-C in a fit into exit status 1 and ignore a second one.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals can be handled
        yield
        return
    stopping = False

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise StopSignal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if stopping else handler)
