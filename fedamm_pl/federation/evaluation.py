"""The global model on the test set: what it reaches, and whether it has diverged."""

import logging
import math
from collections.abc import Callable

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.checkpoint import RunState
from fedamm_pl.federation.summary import divergence
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule

log = logging.getLogger(__name__)


class Evaluator:
    """Measures server states on the test set.

    Args:
        module: On the trainer's device; its state is overwritten.
        data: Has the test set.
        trainer: In which arithmetic.

    Attributes:
        calibration: Puts into a run's state what is evaluated in place of the trained model, told whether it is the last time;
            returns what that has cost.
        personal: Measures what clients have of their own, while the module holds what is deployed.
        ended_at: The round of which it was last told that it is the last; None before.
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
        """Measure a server state; afterwards the module holds what of it is deployed.

        Returns:
            ``test/loss``, ``test/acc``, ``test/acc_<group>``, ``test/acc_class_<c>``; and the confusion matrix, test images by
            true class (row) and predicted class, or None with many classes.
        """
        self.module.load_shared_state(self.module.deployed(state))
        with quiet():
            (metrics,) = self.trainer.build().test(self.module, self.data.test_dataloader(), verbose=False)
        confusion = self.module.test_confusion
        return dict(metrics), None if confusion is None else confusion.compute().tolist()

    def evaluate(self, state: RunState, last: bool) -> dict[str, float]:
        """Calibrate and measure the model of a run's state; its confusion matrix is noted there.

        Args:
            state: The state.
            last: Whether it is the run's last evaluation.

        Returns:
            The measures, those of the clients' own models among them, and what the calibration has cost.
        """
        if last:
            self.ended_at = state.round_num
        cost = self.calibration(state, last)
        measured, state.confusion = self.measure(state.shared)
        return {**cost, **measured, **self.personal(state)}

    def watch(self, state: RunState) -> None:
        """Note and say once if the global model has diverged."""
        if state.diverged is None and (reason := divergence(state.history, self._chance, self._error)):
            state.diverged = {"round": state.round_num, "reason": reason}
            log.warning("round %d: the global model has diverged: %s", state.round_num, reason)
