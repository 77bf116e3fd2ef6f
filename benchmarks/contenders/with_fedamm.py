"""FedAvg with this package."""

from typing import Any

import torch

from benchmarks.contenders.given import Clock, Given
from fedamm_pl import FedAvg, FederatedDataModule, Orchestrator
from fedamm_pl.federation import executors
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.executors import Executor
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig


class EndOfRound(FederationCallback):
    """Tells the clock when a round has ended.

    Args:
        clock: The clock.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Tell the clock, except after round 0, which evaluates the initial model."""
        if run.state.round_num:
            self._clock.end_of_round()


def data_module(given: Given) -> FederatedDataModule:
    """Return the data module of a job; it also makes the partition that all other contenders use."""
    job = given.job
    return FederatedDataModule(
        "data",
        str(given.folder),
        num_clients=job.num_clients,
        partition="iid",
        imbalance_factor=1.0,
        imbalance_profile="none",
        num_meta_per_class=0,
        batch_size=job.batch_size,
        augmentation="none",
    )


def executor(given: Given) -> Executor:
    """Return the executor that the job names; ``Processes`` gets one worker."""
    name = given.job.executor
    return executors.Processes(1, given.job.threads) if name == "Processes" else getattr(executors, name)()


def main() -> None:
    """Run the job with this package."""
    given = Given.here()
    job, data, clock = given.job, data_module(given), Clock(given)
    mine = torch.stack([data.client(client).indices for client in range(job.num_clients)])
    assert torch.equal(mine, given.indices), "not the partition of the others"
    options: dict[str, Any] = {"lr": job.lr, "momentum": job.momentum, "weight_decay": job.weight_decay}
    module = FedAvg(data.num_classes, data.in_channels, given.network(), info=data.info, **options)
    run = Orchestrator(
        module,
        data,
        num_rounds=1 + job.rounds,
        client_fraction=1.0,
        local_epochs=job.local_epochs,
        eval_interval=10**6,  # evaluates in the first and last round only, on the ten test images of data.npz
        callbacks=[EndOfRound(clock)],
        trainer=TrainerConfig("cpu", precision="32-true"),
        executor=executor(given),
    )
    run.run()
    clock.report(module.model.state_dict(), "pytorch-lightning")


if __name__ == "__main__":
    main()
