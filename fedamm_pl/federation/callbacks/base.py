"""``FederationCallback``: the base class of observers, which can add metrics to a run but never change its results."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedamm_pl.federation.run import Run
from fedamm_pl.protocol.messages import ClientFailure, ClientResult


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round.

    Attributes:
        round_num: The round; 0 for the evaluation of the initial model.
        metrics: ``client/...`` means over the clients, ``test/...`` if the round was evaluated, and metrics logged by
            callbacks.
        evaluated: Whether the round was evaluated.
        results: The clients' results, without payloads.
        seconds: Wall time by kind: clients (waiting for them), evaluate, other.
        client_seconds: Time of the clients, summed over them: train, meta. With several workers it may exceed the wall
            time.
        failures: The clients that failed and those whose update was refused.
        failed: Why the round failed, so that the server kept its state; None if it did not fail.
    """

    round_num: int
    metrics: Mapping[str, float]
    evaluated: bool
    results: Sequence[ClientResult]
    seconds: Mapping[str, float]
    client_seconds: Mapping[str, float] = field(default_factory=dict)
    failures: Sequence[ClientFailure] = ()
    failed: str | None = None


class FederationCallback:
    """Base class of the observers; override what you need. ``run.log`` adds to the round's row, ``run.stop`` ends the run."""

    def on_run_start(self, run: Run) -> None:
        """Called once, after an earlier run has been loaded; ``run.state.round_num`` is the last completed round."""

    def on_client_end(self, run: Run, result: ClientResult) -> None:
        """Called after each client of a round, in the order of the clients; the result is without its payload."""

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Called after each round, and once for round 0; ``run.state`` is the state after it."""

    def on_run_end(self, run: Run) -> None:
        """Called after the last round, with the final weights in ``run.module``.

        The final files have already been written: an exception here only causes a warning.
        """
