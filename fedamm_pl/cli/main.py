"""The program ``fedamm``: runs a federation, or one of the sub-commands ``compare``, ``report`` and ``methods``."""

import contextlib
import os
import sys
from collections.abc import Sequence

from fedamm_pl.cli.run import run
from fedamm_pl.cli.signals import StopSignal, stop_signals
from fedamm_pl.terminal import plain_log, prepare_streams, say, silence


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: The command line without the program's name; by default that of the process.
    """
    with contextlib.suppress(OSError):  # the folder that one is in may have been removed
        if (here := os.getcwd()) not in sys.path:
            sys.path.append(here)  # your own networks, data and algorithms, wherever the program itself lies
    words = list(sys.argv[1:] if args is None else args)
    prepare_streams()
    try:
        with stop_signals(), plain_log():
            dispatch(words)
    except StopSignal as stop:
        say("; ".join(filter(None, [f"\nstopped by {stop.signal.name}", stop.hint])), sys.stderr)
        sys.exit(stop.code)
    finally:
        flush_output()


def dispatch(words: list[str]) -> None:
    """Run what the first word names."""
    if words[:1] == ["compare"]:
        from fedamm_pl.cli.compare import compare  # only here: drawing takes its time to import

        compare(words[1:])
    elif words[:1] == ["report"]:
        from fedamm_pl.cli.report import report

        report(words[1:])
    elif words[:1] == ["methods"]:
        from fedamm_pl.cli.methods import methods

        methods(words[1:])
    else:
        run(words)


def flush_output() -> None:
    """Flush the standard output now, where an error can be handled: its reader may have gone."""
    try:
        sys.stdout.flush()
    except (OSError, ValueError):  # else the interpreter would report it at its end
        silence(sys.stdout)


if __name__ == "__main__":
    main()
