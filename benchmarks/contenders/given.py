"""``Given``: the files that a contender reads and writes. This module needs nothing but torch and NumPy."""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.contenders.job import Job
from benchmarks.contenders.networks import NETWORKS
from benchmarks.contenders.process_tree import processor_seconds

FOLDER = "FEDERATION_BENCHMARK_FOLDER"
"""Environment variable with the folder of the files; workers inherit it."""

State = dict[str, Tensor]


class Given:
    """The job and its files.

    Args:
        folder: Folder with job.json, data.npz (x_train, y_train), clients.npz (clients: indices), initial.npz
            (weights).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = Job.read(folder / "job.json")

    @classmethod
    def here(cls) -> "Given":
        """Return the files of this process, and set its number of threads and its seed."""
        given = cls(Path(os.environ[FOLDER]))
        torch.set_num_threads(given.job.threads)
        torch.manual_seed(0)
        return given

    def network(self) -> nn.Module:
        """Return the network with the initial weights."""
        network = NETWORKS[self.job.network]()
        network.load_state_dict(read_state(self.folder / "initial.npz"))
        return network

    @cached_property
    def indices(self) -> Tensor:
        """Indices of the images of each client, shape (clients, images)."""
        with np.load(self.folder / "clients.npz") as stored:
            return torch.from_numpy(stored["clients"])

    @cached_property
    def clients(self) -> list[tuple[Tensor, Tensor]]:
        """Normalised images (n, C, H, W) and labels (n,) of each client."""
        with np.load(self.folder / "data.npz") as stored:
            images, labels = normalized(stored["x_train"], self.job), torch.from_numpy(stored["y_train"])
        return [(images[mine], labels[mine]) for mine in self.indices]


def normalized(images: np.ndarray, job: Job) -> Tensor:
    """Turn uint8 images (N, H, W) or (N, H, W, C) into normalised float32 ones (N, C, H, W)."""
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    mean, std = (torch.tensor(values)[:, None, None] for values in (job.mean, job.std))
    return (torch.from_numpy(np.ascontiguousarray(channels_first)).float() / 255 - mean) / std


def train(network: nn.Module, images: Tensor, labels: Tensor, job: Job) -> None:
    """Train a client; used by the bare loop, and by frameworks that leave local training to the user."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), job.lr, **job.sgd)
    for batch in batches(len(labels), job):
        optimizer.zero_grad()
        cross_entropy(network(images[batch]), labels[batch]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def batches(size: int, job: Job) -> Iterator[Tensor]:
    """Yield the indices of the batches of all epochs, shuffled anew in each epoch."""
    for _ in range(job.local_epochs):
        yield from torch.split(torch.randperm(size), job.batch_size)


class Clock:
    """Measures the rounds after the first, for this process and its descendants, and writes the results.

    Args:
        given: The job and its folder.
    """

    def __init__(self, given: Given) -> None:
        self._given = given
        self._ends: list[float] = []
        self._processor: list[float] = []

    def end_of_round(self) -> None:
        """Record the end of a round, after its average and before any evaluation."""
        rounds = len(self._ends)
        if rounds == 0:
            self._processor.append(processor_seconds(os.getpid()))
            self._ends.append(time.perf_counter())
        elif rounds <= self._given.job.rounds:
            self._ends.append(time.perf_counter())
            if rounds == self._given.job.rounds:
                self._processor.append(processor_seconds(os.getpid()))

    def report(self, state: Mapping[str, Tensor], *packages: str) -> None:
        """Write result.json and final.npz.

        Args:
            state: The final weights, by their names in the network.
            packages: Packages whose versions are recorded.
        """
        if len(self._processor) != 2:
            sys.exit(f"Expected {self._given.job.rounds + 1} rounds, got {len(self._ends)}.")
        write_state(self._given.folder / "final.npz", state)
        wall = [after - before for before, after in zip(self._ends, self._ends[1:], strict=False)]
        result = {
            "wall": wall,
            "processor": self._processor[1] - self._processor[0],
            "versions": {name: version(name) for name in (*packages, "torch", "numpy")},
        }
        (self._given.folder / "result.json").write_text(json.dumps(result))


def write_state(path: Path, state: Mapping[str, Tensor]) -> None:
    """Write tensors to a file by name."""
    np.savez(path, allow_pickle=False, **{name: value.detach().cpu().numpy() for name, value in state.items()})


def read_state(path: Path) -> State:
    """Read tensors from a file by name."""
    with np.load(path) as stored:
        return {name: torch.from_numpy(stored[name]) for name in stored.files}
