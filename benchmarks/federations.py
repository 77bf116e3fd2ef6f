"""The measured federations, on noise images with the shape of CIFAR-10, and a function that runs one more round."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from fedamm_pl import FedAMM, FederatedDataModule, Orchestrator
from fedamm_pl.data import ImageData
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig

LR = 0.01


class Noise(FederatedDataModule):
    """A data set of noise: ``dataset`` is ``noise-<images per class>-<size>-<channels>-<test images>``."""

    def load_images(self) -> ImageData:
        """Draw the images."""
        per_class, size, channels, tests = map(int, self.hparams["dataset"].split("-")[1:])
        generator = torch.Generator().manual_seed(0)
        shape = (10 * per_class + tests, channels, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.arange(len(images)) % 10
        cut = 10 * per_class
        return ImageData(images[:cut], labels[:cut], images[cut:], labels[cut:], [str(label) for label in range(10)])


def cifar10(num_test: int = 100, **options: Any) -> Noise:
    """Return noise with the shape of CIFAR-10-LT, imbalance factor 0.01, 20 clients."""
    defaults: dict[str, Any] = {"imbalance_factor": 0.01, "num_clients": 20, "batch_size": 64}
    return Noise(f"noise-5000-32-3-{num_test}", **{**defaults, **options})


class Rounds(FederationCallback):
    """Records the seconds of the last round for :func:`advance`."""

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Record the seconds without the evaluation."""
        self.seconds = sum(seconds for kind, seconds in record.seconds.items() if kind != "evaluate")


def federation(data: FederatedDataModule, **options: Any) -> Orchestrator:
    """Return FedAMM with ResNet-32 and one client per round, which is a tenth of a round of the paper."""
    trainer = TrainerConfig(**options.pop("trainer", {}))
    differentiation = options.pop("differentiation", "forward")
    torch.manual_seed(0)
    module = FedAMM(10, data.in_channels, "resnet32", LR, info=data.info, differentiation=differentiation)
    defaults: dict[str, Any] = {"num_rounds": 0, "client_fraction": 0.05, "local_epochs": 5, "eval_interval": 10**6}
    return Orchestrator(module, data, **{**defaults, "callbacks": [Rounds()], "trainer": trainer, **options})


def advance(run: Orchestrator) -> float:
    """Run one more round and return its seconds without the evaluation."""
    run.config = replace(run.config, num_rounds=run.config.num_rounds + 1)
    run.run()
    (rounds,) = (callback for callback in run.callbacks if isinstance(callback, Rounds))
    return rounds.seconds


@contextmanager
def arithmetic(run: Orchestrator) -> Iterator[None]:
    """Use the precision of a run for plain torch code."""
    enabled = run.trainer.resolved_precision == "bf16-mixed"
    # without the cache, which would reuse the bfloat16 weights of the first step in all later steps
    with torch.autocast(run.server.module.device.type, torch.bfloat16, enabled, cache_enabled=False):
        yield
