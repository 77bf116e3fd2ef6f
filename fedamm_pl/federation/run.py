"""``Run``: a run as seen by callbacks, and the two ways in which they may change it."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.checkpoint import RunState, latest_checkpoint
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.fingerprint import differences, fingerprint, options
from fedamm_pl.federation.store import ClientStore
from fedamm_pl.federation.summary import STALLED, stalled
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.module import FederatedModule

log = logging.getLogger(__name__)
OWN = ("test/", "val/", "local/", "client/", "personal/", "calibration/")
"""Prefixes of metric names that are reserved for the run itself."""


@dataclass(eq=False)
class Run:
    """A run as seen by callbacks. They may read it, add to it by :meth:`log`, and end it by :meth:`stop`.

    Attributes:
        config: How the federation runs.
        seed: The seed of the run.
        module: The server's module; after an evaluation it holds the deployed state.
        data: The data.
        trainer: Hardware and precision, resolved.
        state: The state after the last completed round.
        environment: The environment of the workers: hashes of the data, threads and versions.
        output_dir: Folder of the run, if it writes one.
        rows: The rows in which the metrics of the current round are collected.
        busy: Returns the number of workers that are training a client or starting, and the number of all workers; both
            are 0 if clients train in this process.
    """

    config: FederationConfig
    seed: int
    module: FederatedModule
    data: FederatedDataModule
    trainer: TrainerConfig
    state: RunState
    environment: dict[str, Any] = field(default_factory=dict)
    output_dir: Path | None = None
    rows: list[dict[str, float]] = field(default_factory=lambda: [{}])
    busy: Callable[[], tuple[int, int]] = lambda: (0, 0)

    @property
    def options(self) -> dict[str, Any]:
        """All options by their names on the command line."""
        return options(self.module, self.data, self.config, self.trainer, self.seed)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What determines the result; a run can only be continued with the same fingerprint."""
        return fingerprint(self.options, self.environment["content_hash"], self.environment.get("partition_hash"))

    def log(self, name: str, value: float) -> None:
        """Add a number to the row of the round, for later callbacks and, if the round is evaluated, for metrics.csv.

        Raises:
            ValueError: If the row already has a number of this name, or the name is reserved by the run.
        """
        if name == "round" or name.startswith(OWN) or any(name in row for row in self.rows):
            raise ValueError(f"Expected `name` to be new in the row of the round, got {name}.")
        for row in self.rows:
            row[name] = float(value)

    def stop(self, reason: str) -> None:
        """End the run normally after this round: it is evaluated, and all files are written.

        Args:
            reason: The reason, for summary.json.
        """
        self.state.ended = reason

    def resume(self, store: ClientStore) -> None:
        """Load the state of an earlier run in the folder, if there is one.

        Args:
            store: The private state of the clients.

        Raises:
            ValueError: If it belongs to a run with other options, data or clients or with more rounds, or cannot be
                read.
        """
        assert self.output_dir is not None
        saved = latest_checkpoint(self.output_dir / "checkpoints", store.holds)
        if saved is None:
            return
        if differing := differences(saved.fingerprint, self.fingerprint):
            raise ValueError(
                f"Expected `output_dir` {self.output_dir} to hold a run with the same options, got others: "
                f"{'; '.join(differing)}. Choose another folder, or the old options."
            )
        if self.config.num_rounds < saved.state.round_num:
            raise ValueError(
                f"Expected `num_rounds` to be {saved.state.round_num} or more, the rounds that {self.output_dir} holds, "
                f"got {self.config.num_rounds}."
            )
        if any(len(part) != self.data.num_clients for part in saved.state.client_accuracies.values()):
            raise ValueError(
                f"Expected `output_dir` {self.output_dir} to hold the accuracy at each of {self.data.num_clients} clients, got "
                "another number of them: choose another folder."
            )
        own, shared = self.module.shared_state(), saved.state.shared
        kinds = {name: (value.shape, value.is_floating_point()) for name, value in shared.items()}
        if other := [
            name for name, value in own.items() if kinds.get(name) != (value.shape, value.is_floating_point())
        ]:
            raise ValueError(
                f"Expected `output_dir` {self.output_dir} to hold the state of {type(self.module).__name__}, got one in which "
                f"{other[0]} is missing or of another shape or kind: choose another folder."
            )
        for difference in differences(saved.environment, self.environment):
            log.warning("%s; from here on results may differ in their last digits", difference)
        self.state = saved.state
        self.state.shared = {name: value.to(self.module.device) for name, value in self.state.shared.items()}
        if self.state.round_num < self.config.num_rounds and (
            self.state.ended is None or self.state.ended.startswith(STALLED)
        ):
            self.state.ended = stalled(self.state.history, self.config.early_stopping)  # the patience may have changed
        if self.state.round_num < self.config.num_rounds and not self.state.ended:
            self.state.counts["resumes"] += 1
