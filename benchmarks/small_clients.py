"""Benchmark rows on federations of many small clients: the overhead of a fit, and clients trained side by side."""

import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.bare import prepare, sgd
from benchmarks.federations import LR, Noise, Rounds, advance
from benchmarks.timing import Row, pairs
from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.executors import Executor, Sequential, Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import SmallCNN
from fedamm_pl.protocol.messages import State

IMAGES = 32
"""Images of a client, all in one batch."""


def mlp() -> nn.Module:
    """Return an MLP with about 51,000 parameters for images of 28x28 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def linear() -> nn.Module:
    """Return a linear network with 650 parameters for images of 8x8 pixels."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def small(num_clients: int, size: int) -> Noise:
    """Return data with clients of 32 images and a meta set."""
    per_class = num_clients * IMAGES // 10 + 11
    options: dict[str, Any] = {"imbalance_factor": 1.0, "partition": "iid", "augmentation": "none"}
    return Noise(f"noise-{per_class}-{size}-1-100", num_clients=num_clients, batch_size=2 * IMAGES, **options)


def federation(
    data: Noise, network: nn.Module, executor: Executor, algorithm: type[FederatedModule] = FedAvg
) -> Orchestrator:
    """Return a federation in which all clients train one epoch in each round, in float32."""
    method: dict[str, Any] = {"differentiation": "forward"} if algorithm is FedAMM else {}
    module = algorithm(10, 1, network, LR, info=data.info, **method)
    options: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "eval_interval": 10**6}
    trainer = TrainerConfig(precision="32-true")
    return Orchestrator(module, data, num_rounds=0, callbacks=[Rounds()], trainer=trainer, executor=executor, **options)


def bare_round(run: Orchestrator, network: nn.Module) -> tuple[float, State]:
    """Do the arithmetic of the next round on batches prepared beforehand; return the seconds and the average."""
    clients = prepare(run, run.state.round_num + 1)
    start = time.perf_counter()
    sent, sums = {name: value.clone() for name, value in network.state_dict().items()}, dict[str, Any]()
    total = sum(client.num_examples for client in clients)
    for client in clients:
        network.load_state_dict(sent)
        optimizer = sgd(network.parameters(), LR)
        for images, labels in client.batches:
            optimizer.zero_grad()
            cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        for name, value in network.state_dict().items():
            sums[name] = sums.get(name, 0) + client.num_examples / total * value.double()
    return time.perf_counter() - start, sums


def row_fit(repeats: int) -> list[Row]:
    """Measure the time of a client in addition to its arithmetic."""
    count = 200
    torch.manual_seed(0)
    network = mlp()
    run = federation(small(count, 28), network, Sequential())
    advance(run)
    seconds: dict[str, list[float]] = {"orchestrated": [], "bare loop": []}
    for _ in range(repeats):
        network.load_state_dict({name.removeprefix("model."): value for name, value in run.state.shared.items()})
        bare, expected = bare_round(run, network)
        seconds["bare loop"].append(bare)
        seconds["orchestrated"].append(advance(run))
        gap = max(float((run.state.shared[f"model.{name}"] - value).abs().max()) for name, value in expected.items())
    each = {name: [1e3 * value / count for value in values] for name, values in seconds.items()}
    beside = [one - other for one, other in zip(*each.values(), strict=True)]
    note = ", ".join(f"{name} {statistics.median(values):.2f} ms" for name, values in each.items())
    what = f"a client of {IMAGES} images, one step of an MLP, beside the bare loop"
    note += f"; weights differ by at most {gap:.0e}"
    return [Row(what, statistics.median(beside), 5, unit=" ms", seconds=seconds, note=note)]


def row_together(repeats: int) -> list[Row]:
    """Compare clients trained side by side with clients trained one after the other."""
    jobs: list[tuple[str, int, int, Callable[[], nn.Module], type[FederatedModule], float | None]] = [
        ("a linear network on 8x8", 1000, 8, linear, FedAvg, 10),
        ("an MLP on 28x28", 1000, 28, mlp, FedAvg, 10),
        ("an MLP on 28x28, FedAMM", 200, 28, mlp, FedAMM, None),
        ("the small CNN on 28x28", 32, 28, lambda: SmallCNN(10, 1), FedAvg, None),
    ]
    return [compared(repeats, *job) for job in jobs]


def compared(
    repeats: int,
    name: str,
    count: int,
    size: int,
    network: Callable[[], nn.Module],
    algorithm: type[FederatedModule],
    bar: float | None,
) -> Row:
    """Compare training one after the other with training side by side, for one federation."""
    data = small(count, size)
    torch.manual_seed(0)
    one, together = (federation(data, network(), executor, algorithm) for executor in (Sequential(), Vectorized()))
    what, sides = f"{count:,} clients, {name}: one after the other / side by side", ("one", "side by side")
    row = pairs(what, lambda: advance(one), lambda: advance(together), repeats, bar=bar, at_least=True, names=sides)
    each = ", ".join(f"{side} {1e3 * statistics.median(row.seconds[side]) / count:.2f} ms" for side in sides)
    row.note = f"a client: {each}"
    return row


PARTS = {
    "a Trainer": ("federation/trainer.py", "build"),
    "Lightning's fit": ("pytorch_lightning/trainer/trainer.py", "fit"),
    "forward pass and loss": ("protocol/classifier.py", "training_step"),
    "backward pass": ("torch/_tensor.py", "backward"),
    "optimizer": ("torch/optim/sgd.py", "step"),
    "reading the batch": ("data/client.py", "__iter__"),
    "received state": ("protocol/module.py", "load_shared_state"),
    "returned state": ("protocol/module.py", "client_payload"),
    "check of the result": ("federation/intake.py", "_checked"),
    "average": ("federation/aggregation.py", "add"),
    "a round": ("federation/orchestrator.py", "run"),
}
WITHIN_FIT = ("forward pass and loss", "backward pass", "optimizer", "reading the batch")


def profile_small() -> dict[str, float]:
    """Return part of the work -> its share of the time of small clients in percent, as measured by cProfile."""
    torch.manual_seed(0)
    run = federation(small(200, 28), mlp(), Sequential())
    advance(run)
    with cProfile.Profile() as profiler:
        advance(run)
    stats: Any = pstats.Stats(profiler)
    seconds = dict.fromkeys(PARTS, 0.0)
    for (file, _, name), (*_, cumulative, _) in stats.stats.items():
        for part, (path, function) in PARTS.items():
            if file.endswith(path) and name == function:
                seconds[part] = max(seconds[part], cumulative)
    seconds["optimizer"] -= seconds["forward pass and loss"] + seconds["backward pass"]  # it calls both
    whole = seconds.pop("a round")
    seconds["Lightning's fit"] -= sum(seconds[part] for part in WITHIN_FIT)
    seconds["the rest"] = whole - sum(seconds.values())
    return {part: 100 * value / whole for part, value in sorted(seconds.items(), key=lambda item: -item[1])}
