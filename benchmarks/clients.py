"""Benchmark rows on the clients of a round: their number, their data, and several at the same time."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.bare import sgd
from benchmarks.federations import LR, Noise, Rounds, advance, arithmetic, cifar10, federation
from benchmarks.timing import Row, pairs, timed
from fedamm_pl import FedAMM, FedAvg, Orchestrator
from fedamm_pl.federation.executors import Executor, Processes, Sequential
from fedamm_pl.federation.trainer import TrainerConfig


def row_clients(repeats: int) -> list[Row]:
    """Measure the time per client as the number of sampled clients grows."""
    data = Noise("noise-6010-8-1-100", num_clients=1000, imbalance_factor=1.0, partition="iid")
    trainer = TrainerConfig("cpu", precision="32-true")

    def run(sampled: int) -> Orchestrator:
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        module = FedAvg(10, 1, network, info=data.info)
        options: dict[str, Any] = {"client_fraction": sampled / 1000, "local_epochs": 1, "eval_interval": 10**6}
        return Orchestrator(module, data, num_rounds=0, callbacks=[Rounds()], trainer=trainer, **options)

    few, more, many = run(10), run(100), run(1000)

    def one_client(run: Orchestrator, sampled: int) -> Callable[[], float]:
        return lambda: advance(run) / sampled

    names = ("more", "10 clients")
    what = "time of a client with {} sampled / with 10 (60 images, a linear network)"
    return [
        pairs(what.format("100"), one_client(more, 100), one_client(few, 10), repeats, bar=1.1, names=names),
        pairs(what.format("1,000"), one_client(many, 1000), one_client(few, 10), repeats, bar=1.1, names=names),
    ]


def row_data(repeats: int) -> list[Row]:
    """Compare the time of crop, flip and normalisation with that of the training step."""
    run = federation(cifar10())
    client = max(range(run.data.num_clients), key=run.data.client_size)
    data = run.data.client(client)
    module, network = run.server.module, run.server.module.model.train()
    optimizer = sgd(network.parameters(), LR)
    batches = [(module.prepare(images), labels.to(module.device)) for images, labels in data.train_loader(0)]

    def read() -> None:
        for images, _ in data.train_loader(0):
            module.prepare(images)

    def train() -> None:
        with arithmetic(run):
            for images, labels in batches:
                optimizer.zero_grad()
                cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    row = pairs(
        "crop, flip and normalisation / training step", timed(read), timed(train), repeats, names=("data", "step")
    )
    row.measured, row.bar, row.unit = 100 * row.measured, 3, " %"
    return [row]


def row_processes(repeats: int) -> list[Row]:
    """Compare a round of eight clients in two processes with one client at a time, with one thread for each client."""
    data = Noise("noise-250-28-1-250", num_clients=8, imbalance_factor=1.0, partition="iid", batch_size=32)
    threads = torch.get_num_threads()

    def eight_clients(executor: Executor) -> Orchestrator:
        torch.manual_seed(0)
        module = FedAMM(10, 1, "small_cnn", LR, info=data.info, differentiation="forward")
        options: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 2, "eval_interval": 10**6}
        return Orchestrator(module, data, num_rounds=0, callbacks=[Rounds()], executor=executor, **options)

    one, two = eight_clients(Sequential()), eight_clients(Processes(2, threads_per_worker=1))
    torch.set_num_threads(1)
    with ExitStack() as stack:
        stack.enter_context(one.opened())
        opening = timed(lambda: stack.enter_context(two.opened()))()
        what, names = "a round of 8 clients, one after the other / in two processes", ("one", "two processes")
        row = pairs(what, lambda: advance(one), lambda: advance(two), repeats, bar=1.5, at_least=True, names=names)
    torch.set_num_threads(threads)
    row.note += f"; small CNN, a thread for each client; the processes are opened in {opening:.2g} s"
    return [row]
