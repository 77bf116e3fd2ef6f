"""The program ``fedamm``: runs a federation, or one of the sub-commands ``compare`` and ``report``."""

import os
import sys
from collections.abc import Sequence

from fedamm_pl.cli.run import run
from fedamm_pl.cli.signals import StopSignal, stop_signals


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: The command line without the program's name; by default that of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # your own networks, data and algorithms, wherever the program itself lies
    words = list(sys.argv[1:] if args is None else args)
    try:
        with stop_signals():
            dispatch(words)
    except StopSignal as stop:
        print("; ".join(filter(None, [f"\nstopped by {stop.signal.name}", stop.hint])), file=sys.stderr)
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
    else:
        run(words)


def flush_output() -> None:
    """Flush the standard output now, where an error can be handled: its reader may have gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # else the interpreter would report it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
