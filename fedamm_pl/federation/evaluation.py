"""``Evaluator``: measures the global model on the test and validation sets and at the clients; detects divergence."""

import logging
import math
from collections.abc import Callable, Mapping

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.checkpoint import RunState
from fedamm_pl.federation.local_test import local_accuracies, over_clients
from fedamm_pl.federation.summary import divergence, validated
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule

log = logging.getLogger(__name__)


class Evaluator:
    """Measures server states on the test set, on the validation set if there is one, and on clients' held-out examples.

    Args:
        module: The module, on the trainer's device; its state is overwritten.
        data: Provides these sets.
        trainer: Device and precision.

    Attributes:
        calibration: Run state and whether this is the last evaluation -> the costs of the calibration; it adds the
            entries that are evaluated in place of the trained ones to the state.
        personal: Run state -> metrics of the clients' own models, measured while the module holds the deployed state.
        ended_at: Round of the latest evaluation that was made as the last of the run; None before.
    """

    def __init__(self, module: FederatedModule, data: FederatedDataModule, trainer: TrainerConfig) -> None:
        self.module = module
        self.data = data
        self.trainer = trainer
        self.calibration: Callable[[RunState, bool], dict[str, float]] = lambda state, last: {}
        self.personal: Callable[[RunState], dict[str, float]] = lambda state: {}
        self.ended_at: int | None = None
        labels = data.images.test_labels
        self._chance = float(labels.bincount().max()) / len(labels)  # accuracy of the best constant guess
        self._error = math.sqrt(self._chance * (1 - self._chance) / len(labels))

    def measure(self, state: State) -> tuple[dict[str, float], list[list[int]] | None]:
        """Measure a server state; afterwards the module holds its deployed entries.

        Returns:
            ``test/loss``, ``test/acc``, ``test/acc_<group>``, ``test/acc_class_<c>``, and the same as ``val/...`` if
            there is a validation set; and the confusion matrix, test images by true class (row) and predicted class, or
            None with many classes.
        """
        self.module.load_shared_state(self.module.deployed(state))
        on_validation: Mapping[str, float] = {}
        with quiet():
            (metrics,) = self.trainer.build().test(self.module, self.data.test_dataloader(), verbose=False)
            if self.data.has_validation:
                loader = self.data.val_dataloader()
                (on_validation,) = self.trainer.build().validate(self.module, loader, verbose=False)
        confusion = self.module.test_confusion
        return {**metrics, **on_validation}, None if confusion is None else confusion.compute().tolist()

    def evaluate(self, state: RunState, last: bool) -> dict[str, float]:
        """Calibrate and measure the model of a run's state.

        The confusion matrix and the accuracies at the clients are stored in the state.

        Args:
            state: The state.
            last: Whether it is the run's last evaluation.

        Returns:
            The metrics, including those of the clients' own models, and the costs of the calibration.
        """
        if last:
            self.ended_at = state.round_num
        cost = self.calibration(state, last)
        measured, state.confusion = self.measure(state.shared)
        if accuracies := local_accuracies(self.module, self.data, self.trainer):
            state.client_accuracies = {**state.client_accuracies, "latest": accuracies}
        return {**cost, **measured, **over_clients(accuracies), **self.personal(state)}

    def note_best(self, state: RunState) -> None:
        """Store the latest accuracies at the clients as those of the best round, if this round is the best."""
        if state.client_accuracies and is_best(state):
            state.client_accuracies["best"] = state.client_accuracies["latest"]

    def evaluate_again(self, state: RunState) -> None:
        """Evaluate a round once more, as the run's last, and replace its metrics."""
        if is_best(state):
            state.client_accuracies.pop("best", None)
        state.history[-1] = {**state.history[-1], **self.evaluate(state, True)}

    def watch(self, state: RunState) -> None:
        """Record and log, once, if the global model has diverged."""
        if state.diverged is None and (reason := divergence(state.history, self._chance, self._error)):
            state.diverged = {"round": state.round_num, "reason": reason}
            log.warning("round %d: the global model has diverged: %s", state.round_num, reason)


def is_best(state: RunState) -> bool:
    """Return whether the round of a state is the best one by validation."""
    best = validated(state.history)
    return best is not None and best["round"] == state.round_num
