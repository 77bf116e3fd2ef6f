"""FedAvg with fluke (https://github.com/makgyver/fluke): its ``FedAVG`` with its loaders and without evaluation."""

from typing import Any

from fluke import FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver

from benchmarks.contenders.given import Clock, Given


class EndOfRound(FederationObserver):  # type: ignore[misc]
    """Tells the clock when a round has ended.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def end_round(self, round: int) -> None:
        """Tell the clock."""
        self._clock.end_of_round()


def main() -> None:
    """Run the job with fluke."""
    given = Given.here()
    job, clock = given.job, Clock(given)
    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_eval_cfg(pre_fit=False, post_fit=False, locals=False, server=False)
    loader: dict[str, Any] = {"num_labels": 10, "batch_size": job.batch_size, "shuffle": True}
    clients = [FastDataLoader(images, labels, **loader) for images, labels in given.clients]
    data = DummyDataContainer(clients, [None] * len(clients), None, 10)
    options = {
        "model": given.network(),
        "client": {
            "batch_size": job.batch_size,
            "local_epochs": job.local_epochs,
            "loss": "CrossEntropyLoss",
            "optimizer": {"name": "SGD", "lr": job.lr, **job.sgd},
            "scheduler": {"name": "StepLR", "step_size": 1, "gamma": 1},
            "persistency": False,  # otherwise a client would keep its momentum from its last round
        },
        "server": {"weighted": True},
    }
    federation = FedAVG(len(clients), DataSplitter(data), options)
    federation.set_callbacks([EndOfRound(clock)])
    federation.run(n_rounds=1 + job.rounds, eligible_perc=1)
    clock.report(federation.server.model.state_dict(), "fluke-fl")


if __name__ == "__main__":
    main()
