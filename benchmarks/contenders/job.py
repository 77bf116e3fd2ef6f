"""``Job``: the federation that all contenders run, and the three jobs of the benchmark."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """A federation with FedAvg and plain SGD; all clients have the same size and train in each round.

    Attributes:
        name: Name of the job.
        network: A name in :data:`benchmarks.contenders.networks.NETWORKS`.
        images: The images: fashion_mnist or cifar10, or generated ones of their shape.
        num_clients: Number of clients.
        client_size: Number of images of each client.
        batch_size: Number of images per step; the last batch of an epoch may be smaller.
        rounds: Number of timed rounds, which follow one that is not timed.
        lr: Learning rate.
        momentum: Nesterov momentum; it is reset for each client and round.
        weight_decay: Weight decay.
        local_epochs: Epochs of a client in a round.
        num_test: Largest number of test images.
        threads: Number of threads of a client.
        mean: Channel means of the training images, in [0, 1].
        std: Channel standard deviations.
        executor: For this package: name of the executor.
        channels_last: For the bare loop: whether images have the memory layout that our trainer uses for networks that
            ask for it.
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
        """Whether a client takes a single step over all its images, so that their order makes no difference."""
        return self.local_epochs == 1 and self.batch_size >= self.client_size

    @property
    def sgd(self) -> dict[str, Any]:
        """The options of ``torch.optim.SGD``, without the learning rate."""
        return {"momentum": self.momentum, "nesterov": self.momentum > 0, "weight_decay": self.weight_decay}

    def write(self, path: Path) -> None:
        """Write the job as JSON."""
        path.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> "Job":
        """Read a job from JSON."""
        return cls(**json.loads(path.read_text()))


JOBS = {
    job.name: job
    for job in (
        Job("small", "mlp", "fashion_mnist", num_clients=200, client_size=32, batch_size=32, rounds=10, lr=0.05),
        Job("medium", "cnn", "fashion_mnist", num_clients=20, client_size=600, batch_size=50, rounds=3, lr=0.05),
        Job("large", "resnet32", "cifar10", num_clients=10, client_size=1238, batch_size=64, rounds=1, lr=0.01),
    )
}
