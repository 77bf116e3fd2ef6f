"""FedAvg with pfl-research (https://github.com/apple/pfl-research): ``FederatedAveraging`` on its simulated backend."""

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.pytorch import PyTorchTensorDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders.given import Clock, Given


class EndOfRound(TrainingProcessCallback):  # type: ignore[misc]
    """Tells the clock when a round has ended.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def after_central_iteration(
        self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int
    ) -> tuple[bool, Metrics]:
        """Tell the clock, and continue."""
        self._clock.end_of_round()
        return False, Metrics()


class Learner(nn.Module):
    """The network with the two methods that pfl requires.

    Args:
        network: The network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of a training batch."""
        self.train()
        return cross_entropy(self.network(images), labels)

    @torch.no_grad()
    def metrics(self, images: Tensor, labels: Tensor) -> dict[str, Weighted]:
        """Return the loss of a batch; pfl evaluates the clients in its first round, which is not timed."""
        self.eval()
        return {"loss": Weighted(cross_entropy(self.network(images), labels, reduction="sum").item(), len(labels))}


def main() -> None:
    """Run the job with pfl-research."""
    given = Given.here()
    job, clock, learner = given.job, Clock(given), Learner(given.network())
    model = PyTorchModel(
        learner,
        local_optimizer_create=lambda parameters, lr: torch.optim.SGD(parameters, lr, **job.sgd),
        central_optimizer=torch.optim.SGD(learner.parameters(), 1.0),
    )
    clients = [PyTorchTensorDataset(mine) for mine in given.clients]
    users = FederatedDataset(lambda user: clients[user], get_user_sampler("minimize_reuse", list(range(len(clients)))))
    backend = SimulatedBackend(training_data=users, val_data=users, postprocessors=[WeightByDatapoints()])
    FederatedAveraging().run(
        NNAlgorithmParams(
            central_num_iterations=1 + job.rounds,
            evaluation_frequency=10**6,
            train_cohort_size=len(clients),
            val_cohort_size=None,
        ),
        backend,
        model,
        NNTrainHyperParams(
            local_num_epochs=job.local_epochs, local_learning_rate=job.lr, local_batch_size=job.batch_size
        ),
        NNEvalHyperParams(local_batch_size=500),
        [EndOfRound(clock)],
        send_metrics_to_platform=False,
    )
    clock.report(learner.network.state_dict(), "pfl")


if __name__ == "__main__":
    main()
