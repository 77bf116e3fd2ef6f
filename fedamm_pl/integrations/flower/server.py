"""The server side of the Flower app: the loop of the orchestrator, with clients on the nodes of a federation."""

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
"""Settings of ``--run-config`` with their defaults."""


def server_app(config: str | Path) -> ServerApp:
    """Return the ServerApp of a federation: it does the same as ``fedamm --config``, with clients on other machines.

    ``--run-config`` takes these settings of a run:

    - ``output-dir``: folder of the run at the server, an absolute path; with the folder of an earlier run, it is
      continued.
    - ``options``: further options of the run, as on the command line, for server and clients.
    - ``own-data``: true if each client has its own data; false if server and clients make the same partition of the
      same data, and each client takes its part.
    - ``clients``: names of the clients, separated by commas, or their number; only if they have their own data.
    - ``class-counts``: true if these clients shall report their number of examples of each class.
    - ``start-with``: number of clients that is enough to start, 0 for all.
    - ``wait``: seconds to wait for the clients.
    - ``client-timeout``: seconds for each message to a client and its answer.
    - ``max-retries``: how often a client is asked again after its process or node died.
    - ``rejoin-timeout``: seconds that such a node has to come back.
    - ``window``: largest number of clients that train at the same time.

    Args:
        config: Configuration file of the run, in the folder of the app.
    """
    app = ServerApp()

    @app.main()  # type: ignore[untyped-decorator]
    def main(grid: Grid, context: Context) -> None:
        serve(grid, Path(config), context.run_config)

    return app


class NotMetError(BaseException):
    """Raised when too few clients join; not an ``Exception``, since the parser would reword its message."""


def serve(grid: Grid, config: Path, told: Mapping[str, Any]) -> None:
    """Run a federation.

    Args:
        grid: Flower's grid.
        config: Configuration file of the run.
        told: Settings of ``--run-config``, see :func:`server_app`.

    Raises:
        ValueError: If a setting is wrong, or too few clients join.
        RuntimeError: If the run ends with an error; its log has the reason.
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
    except SystemExit as error:  # Flower would take it for the end of a successful run
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
