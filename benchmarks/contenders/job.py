"""``Job``: what all contenders do, and the three jobs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A federation: FedAvg by plain SGD, all clients in each round, all clients equally large.

    Attributes:
        name: What it is called.
        network: A name in :data:`benchmarks.contenders.networks.NETWORKS`.
        images: Which images: fashion_mnist or cifar10, or generated ones of their shape.
        num_clients: Clients.
        client_size: Images of each.
        batch_size: Images a step; the last batch of an epoch holds what is left.
        rounds: Rounds that are timed, after one that is not.
        lr: Learning rate.
        momentum: Nesterov momentum; it begins anew for each client and round.
        weight_decay: Weight decay.
        local_epochs: Epochs of a client in a round.
        num_test: Test images, at most.
        threads: Threads of a client.
        mean: Channel means of the training images, in [0, 1].
        std: Channel standard deviations.
        executor: Ours: where clients train.
        channels_last: Bare loop: whether the images are laid out as our trainer does for networks that ask for it.
    """

    name: str
    network: str
    images: str
    num_clients: int
    client_size: int
    batch_size: int
    rounds: int
    lr: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    local_epochs: int = 1
    num_test: int = 2000
    threads: int = 1
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    executor: str = "Sequential"
    channels_last: bool = False

    @property
    def one_full_step(self) -> bool:
        """Whether a client takes one step over all its images, so that no order of images can make a difference."""
        return self.local_epochs == 1 and self.batch_size >= self.client_size

    @property
    def sgd(self) -> dict[str, Any]:
        """The options of ``torch.optim.SGD``, without the learning rate."""
        return {"momentum": self.momentum, "nesterov": self.momentum > 0, "weight_decay": self.weight_decay}

    def write(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read it."""
        return cls(**json.loads(path.read_text()))


JOBS = {
    job.name: job
    for job in (
        Job("small", "mlp", "fashion_mnist", num_clients=200, client_size=32, batch_size=32, rounds=10, lr=0.05),
        Job("medium", "cnn", "fashion_mnist", num_clients=20, client_size=600, batch_size=50, rounds=3, lr=0.05),
        Job("large", "resnet32", "cifar10", num_clients=10, client_size=1238, batch_size=64, rounds=1, lr=0.01),
    )
}
