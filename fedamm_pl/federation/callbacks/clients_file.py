"""``ClientsCSV``: writes clients.csv, the accuracy of the global model at each client."""

import csv
import io
import math
from pathlib import Path
from typing import Any

from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.run import Run
from fedamm_pl.files import write_atomically
from fedamm_pl.terminal import as_csv


class ClientsCSV(FederationCallback):
    """Rewrites clients.csv at each evaluation, one row per client, if clients hold out a local test.

    Args:
        folder: Where to write it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "clients.csv"

    def on_run_start(self, run: Run) -> None:
        """Rewrite the file as of the round from which the run starts."""
        self._write(run)

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Write the file if the round was evaluated."""
        if record.evaluated:
            self._write(run)

    def on_run_end(self, run: Run) -> None:
        """Write the file again, since the run may have been evaluated once more at its end."""
        self._write(run)

    def _write(self, run: Run) -> None:
        if not run.state.client_accuracies:
            return
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(client_table(run))
        write_atomically(self.path, text.getvalue().encode())


def client_table(run: Run) -> list[list[Any]]:
    """Return the rows of clients.csv: a header, then the name, examples and accuracies of each client.

    A missing accuracy is an empty string.
    """
    data, found = run.data, run.state.client_accuracies
    columns = {"latest": "accuracy", "best": "accuracy_best_round", "own": "accuracy_own"}
    kinds = [kind for kind in columns if kind in found]
    lines: list[list[Any]] = [["client", "examples", "local_test_examples", *(columns[kind] for kind in kinds)]]
    names = data.client_names
    for client, (name, held) in enumerate(zip(names, data.local_test, strict=True)):
        values = [found[kind][client] for kind in kinds]
        accuracies = ["" if math.isnan(value) else value for value in values]
        lines.append([as_csv(name), data.client_size(client), len(held), *accuracies])
    return lines
