"""The program ``fedamm`` with the commands ``run`` (default), ``compare``, ``report``, ``methods``, ``completion``."""

import sys
from collections.abc import Sequence

from fedamm_pl.cli.program import run_program
from fedamm_pl.cli.run import run


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: The command line without the program's name; by default that of this process.
    """
    run_program(dispatch, list(sys.argv[1:] if args is None else args))


def dispatch(words: list[str]) -> None:
    """Run the command that the first word names."""
    if words[:1] == ["compare"]:
        from fedamm_pl.cli.compare import compare  # here, since the modules for drawing are slow to import

        compare(words[1:])
    elif words[:1] == ["report"]:
        from fedamm_pl.cli.report import report

        report(words[1:])
    elif words[:1] == ["methods"]:
        from fedamm_pl.cli.methods import methods

        methods(words[1:])
    elif words[:1] == ["completion"]:
        from fedamm_pl.cli.completion import completion

        completion(words[1:])
    else:
        run(words[1:] if words[:1] == ["run"] else words)


if __name__ == "__main__":
    main()
