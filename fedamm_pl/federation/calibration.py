"""``Calibration``: computes the model that is evaluated in place of the trained one, if the method has such a model."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedamm_pl.federation.checkpoint import RunState
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors.base import Kept, Runner
from fedamm_pl.federation.intake import Intake, RoundFailedError, require_sound
from fedamm_pl.federation.server import Server, takes_statistics, trained
from fedamm_pl.protocol.messages import ClientResult, ClientTask
from fedamm_pl.protocol.module import CALIBRATED
from fedamm_pl.terminal import line

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Lets the server calibrate the model before an evaluation, with statistics of all clients if the method uses them.

    Attributes:
        server: The server of the run.
        runner: Where clients compute.
        config: How many clients must succeed.
        tasks: A round -> the tasks of all clients that hold examples.
        kept: A run's state -> a function that returns the private state of a client at that time.
    """

    server: Server
    runner: Runner
    config: FederationConfig
    tasks: Callable[[int], list[ClientTask]]
    kept: Callable[[RunState], Kept]

    def __call__(self, state: RunState, last: bool) -> dict[str, float]:
        """Add the calibrated entries, which are evaluated in place of the trained ones, to a state.

        If the calibration fails, this is logged and nothing is added. The clients that computed statistics, and those
        that failed to, count in the accounts of the run.

        Returns:
            ``calibration/bytes_received`` and ``calibration/bytes_sent``, means over the clients that sent statistics.
        """
        server, module, round_num = self.server, self.server.module, state.round_num
        # after a failed round the state still has the calibrated entries of an earlier evaluation
        state.shared = trained(state.shared)
        if round_num == 0 or not module.calibrates(last):
            return {}
        broadcast = server.broadcast(state.shared, round_num, 0)
        measures = takes_statistics(module)
        tasks = self.tasks(round_num) if measures else []
        names = server.data.client_names
        intake = Intake(round_num, tasks, server.expected_statistics(), module, self.config, names)
        results: Iterator[ClientResult] = iter(())
        if measures:
            outcomes = self.runner.run(broadcast, tasks, self.kept(state))
            results = intake.accept(outcomes, server.accepted_statistics, lambda result: None)
        try:
            made = server.calibrated(state.shared, results)
            state.shared = require_sound(made, [CALIBRATED + name for name in intake.expected.nonnegative])
        except (RoundFailedError, ArithmeticError) as error:
            text = "round %d: the model is evaluated as it was trained, its calibration failed: %s"
            log.warning(text, round_num, line(str(error)))
        state.count_clients(intake.failures)
        state.account(intake.results, {}, {"train": sum(result.train_seconds for result in intake.results)})
        if not intake.results:
            return {}
        received = sum(result.bytes_received for result in intake.results) / len(intake.results)
        sent = sum(result.bytes_sent for result in intake.results) / len(intake.results)
        return {"calibration/bytes_received": received, "calibration/bytes_sent": sent}
