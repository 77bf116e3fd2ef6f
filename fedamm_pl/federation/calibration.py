"""Before an evaluation: the model that is evaluated in place of the trained one, if the method makes one."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from fedamm_pl.federation.checkpoint import RunState
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors.base import Kept, Runner
from fedamm_pl.federation.intake import Intake, RoundFailedError, require_sound
from fedamm_pl.federation.server import Server, takes_statistics
from fedamm_pl.protocol.messages import ClientResult, ClientTask

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Has the server calibrate the model, with statistics of all clients if the method takes them.

    Attributes:
        server: Of the run.
        runner: Where clients compute.
        config: How many clients must succeed.
        tasks: A round -> the tasks of all clients that hold examples.
        kept: What each client kept to itself, as the state has it.
    """

    server: Server
    runner: Runner
    config: FederationConfig
    tasks: Callable[[int], list[ClientTask]]
    kept: Callable[[RunState], Kept]

    def __call__(self, state: RunState, last: bool) -> dict[str, float]:
        """Put into a state what is evaluated in place of the trained model; if that fails, it is said, and nothing is put there.

        Returns:
            ``calibration/bytes_received`` and ``calibration/bytes_sent``, means over the clients that sent statistics.
        """
        server, module, round_num = self.server, self.server.module, state.round_num
        if round_num == 0 or not module.calibrates(last):
            return {}
        broadcast = server.broadcast(state.shared, round_num, 0)
        tasks = self.tasks(round_num) if takes_statistics(module) else []
        intake = Intake(round_num, tasks, server.expected_statistics(), module, self.config)
        outcomes = self.runner.run(broadcast, tasks, self.kept(state)) if tasks else ()
        results: Iterator[ClientResult] = iter(())
        if tasks:
            results = intake.accept(outcomes, lambda result: result, lambda result: None)
        try:
            state.shared = require_sound(server.calibrated(state.shared, results))
        except RoundFailedError as error:
            log.warning(
                "round %d: the model is evaluated as it was trained, its calibration failed: %s", round_num, error
            )
        if not intake.results:
            return {}
        received = sum(result.bytes_received for result in intake.results) / len(intake.results)
        sent = sum(result.bytes_sent for result in intake.results) / len(intake.results)
        return {"calibration/bytes_received": received, "calibration/bytes_sent": sent}
