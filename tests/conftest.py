"""One thread for every test and child process, and a tiny data set with finished runs for the tests of the program."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: tiny networks gain nothing from more

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from fedamm_pl.cli.main import main

NUM_CLASSES, SIZE = 6, 12
ALGORITHM_OPTIONS = {"FedAMM": ["--algorithm.differentiation", "forward"], "FedAvg": []}

Command = Callable[..., list[str]]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with what waits for minutes: at the end the other workers would wait for it too."""
    items.sort(key=lambda item: item.path.name != "test_flower_processes.py")


@pytest.fixture(scope="session")
def data_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``tiny.npz``: 6 classes of noisy 12x12 colour images, 60 to train and 20 to test of each."""
    rng = np.random.default_rng(0)
    prototypes = rng.integers(0, 256, (NUM_CLASSES, SIZE, SIZE, 3))
    arrays = {}
    for part, per_class in (("train", 60), ("test", 20)):
        labels = np.repeat(np.arange(NUM_CLASSES), per_class)
        noise = rng.integers(0, 256, (len(labels), SIZE, SIZE, 3))
        arrays[f"x_{part}"] = ((prototypes[labels] + noise) // 2).astype(np.uint8)
        arrays[f"y_{part}"] = labels
    root = tmp_path_factory.mktemp("data")
    np.savez(root / "tiny.npz", **arrays)
    return root


@pytest.fixture(scope="session")
def command(data_root: Path) -> Command:
    """A function (algorithm, folder, *more options) -> the command line of a run of about a second.

    Four clients of 34 images, two of them a round, five steps a client; rounds 0, 2, 4 and 5 are evaluated.
    """

    def command(algorithm: str, folder: Path | str, *more: str) -> list[str]:
        options = {
            "data.dataset": "tiny",
            "data.root": data_root,
            "data.num_clients": 4,
            "data.imbalance_factor": 0.1,
            "data.num_meta_per_class": 5,
            "data.batch_size": 8,
            "algorithm": algorithm,
            "algorithm.model": "small_cnn",
            "algorithm.lr": 0.05,
            "federation.num_rounds": 5,
            "federation.local_epochs": 1,
            "federation.eval_interval": 2,
            "trainer.accelerator": "cpu",
            "output.dir": folder,
            "output.figures": "false",  # a second a run
        }
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        return [*words, *ALGORITHM_OPTIONS[algorithm], *more]

    return command


@pytest.fixture(scope="session")
def fedamm_run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of FedAMM; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "fedamm"
    main(command("FedAMM", folder, "--output.figures", "true"))
    return folder


@pytest.fixture(scope="session")
def fedavg_run(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of FedAvg; to be read only."""
    folder = tmp_path_factory.mktemp("runs") / "fedavg"
    main(command("FedAvg", folder, "--output.figures", "true"))
    return folder


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Forget what torch has compiled: after some networks it would compile no more of the same code."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()
