"""The server's half: the orchestrator's own loop, with clients on the nodes of a federation."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedamm_pl.cli.run import run
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.integrations.flower.executor import Flower
from fedamm_pl.integrations.flower.nodes import Nodes
from fedamm_pl.terminal import plain_log

DEFAULTS: dict[str, Any] = {
    "options": "",
    "output-dir": "",
    "own-data": False,
    "clients": "",
    "class-counts": False,
    "start-with": 0,
    "wait": 600.0,
    "client-timeout": 3600.0,
    "max-retries": 1,
    "rejoin-timeout": 180.0,
    "window": 32,
}
"""What ``--run-config`` may say, and what holds where it does not."""


def server_app(config: str | Path) -> ServerApp:
    """Return the ServerApp of a federation: it runs what ``fedamm --config`` runs, with clients on other machines.

    What a run is told by ``--run-config``:

    - ``output-dir``: the run's folder at the server, an absolute path; the same one continues a run.
    - ``options``: more options of the run, as on the command line, for server and clients.
    - ``own-data``: true where each client has data of its own; false where server and clients make the same partition of the same data, and
      each client takes its part.
    - ``clients``: with data of their own, the names of the clients with commas between them, or how many there are.
    - ``class-counts``: true has these clients tell how many examples of each class they have.
    - ``start-with``: how many clients suffice to start, 0 for all.
    - ``wait``: seconds that the clients have to come.
    - ``client-timeout``: seconds for each message to a client and its answer.
    - ``max-retries``: how often a client is asked again whose process or node died.
    - ``rejoin-timeout``: seconds that such a node has to come back.
    - ``window``: how many clients are at work at once.

    Args:
        config: The configuration of the run, a file beside the app.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        serve(grid, Path(config), context.run_config)

    return app


class NotMetError(BaseException):
    """The clients have not come; no ``Exception``, which the parser would reword."""


def serve(grid: Grid, config: Path, told: Mapping[str, Any]) -> None:
    """Run a federation.

    Args:
        grid: Flower's.
        config: The configuration.
        told: By ``--run-config``, see :func:`server_app`.

    Raises:
        ValueError: If something that was told cannot be used, or the clients do not come.
        RuntimeError: If the run ends with an error; its log has said which.
    """
    options = {**DEFAULTS, **told}
    folder = Path(str(options["output-dir"])).expanduser()
    if not options["output-dir"] or not folder.is_absolute():
        raise ValueError(
            f"Expected `output-dir` to be an absolute path, since the server app runs in a folder of Flower's, got {options['output-dir']!r}."
        )
    own = bool(options["own-data"])
    nodes = Nodes(
        grid, own, _clients(options["clients"], own), bool(options["class-counts"]), int(options["start-with"])
    )
    executor = Flower(
        nodes,
        float(options["client-timeout"]),
        int(options["max-retries"]),
        float(options["rejoin-timeout"]),
        str(folder),
        int(options["window"]),
    )
    met: list[FederatedDataModule] = []

    def view(data: FederatedDataModule) -> Any:
        if not met:
            met.append(data)
            try:
                nodes.meet(data, float(options["wait"]))
            except ValueError as error:
                raise NotMetError(str(error)) from error
        return nodes.view

    words = ["--config", str(config), *shlex.split(str(options["options"])), "--output.dir", str(folder)]
    try:
        with plain_log():
            run(words, executor, view)
    except NotMetError as error:
        raise ValueError(str(error)) from error
    except SystemExit as error:  # which Flower would take for the end of a run that went well
        if error.code:
            raise RuntimeError(f"the run ended with status {error.code}; the log says why") from error


def _clients(told: object, own: bool) -> list[str] | int:
    if not own:
        if told != "":
            raise ValueError(
                f"Expected `clients` to be empty without `own-data`, got {told!r}: the partition has names."
            )
        return 0
    names = [name.strip() for name in str(told).split(",")]
    if len(names) == 1 and names[0].isdigit() and int(names[0]):
        return int(names[0])
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"Expected `clients` to be the names of clients, or how many there are, got {told!r}.")
    return names
