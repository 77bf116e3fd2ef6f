"""Benchmark rows on the memory of a run."""

import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from torch import nn

from benchmarks.federations import Noise
from benchmarks.machine import peak_memory
from benchmarks.timing import Row
from fedamm_pl import FedAMM, FederatedDataModule, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Moon
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.run import Run


def many_clients(num_clients: int) -> list[float]:
    """Return the peak memory after each of 40 rounds of FedAMM on 60,000 images."""
    data = Noise("noise-6010-28-1-1000", num_clients=num_clients, imbalance_factor=1.0, partition="iid")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))  # small, so that the cost of the clients is visible
    return peaks(FedAMM(10, 1, network, info=data.info, differentiation="forward"), data, 40)


def kept_models(num_clients: int) -> list[float]:
    """Return the peak memory after each of 30 rounds of MOON, in which each client keeps a model of 3.1 MiB."""
    data = Noise("noise-210-28-1-250", num_clients=num_clients, imbalance_factor=1.0, partition="iid")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 10))
    return peaks(Moon(10, 1, network, info=data.info, projection=None), data, 30)


def peaks(module: FederatedModule, data: FederatedDataModule, num_rounds: int) -> list[float]:
    """Return the peak memory in MiB after each round, starting with round 0, with ten clients per round."""
    found: list[float] = []

    class Peak(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            found.append(peak_memory())

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"client_fraction": 10 / data.num_clients, "local_epochs": 1, "output_dir": folder}
        Orchestrator(module, data, num_rounds=num_rounds, callbacks=[Peak()], **options).run()
    return found


def alone(function: Callable[[int], list[float]], argument: int) -> list[float]:
    """Call a function in a new process, since the peak memory of a process never falls."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, argument).result()


def row_memory(repeats: int) -> list[Row]:
    """Compare memory with many and with few clients, and late and early in a run; repeats are not needed."""
    few, many, kept = alone(many_clients, 100), alone(many_clients, 10_000), alone(kept_models, 100)
    note = f"{many[-1]:.0f} / {few[-1]:.0f} MiB, the same 60,000 images"
    kept_note = f"{kept[30]:.0f} / {kept[5]:.0f} MiB, 100 clients with a model of 3.1 MiB each in files"
    return [
        Row("peak memory, 10,000 clients / 100", many[-1] / few[-1], 1.1, note=note),
        Row("peak memory after 40 rounds / after 10", few[40] / few[10], 1.05, note="100 clients"),
        Row("peak memory of MOON after 30 rounds / after 5", kept[30] / kept[5], 1.1, note=kept_note),
    ]
