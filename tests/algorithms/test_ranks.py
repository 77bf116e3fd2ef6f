"""Two ranks of a training together do what one does with both batches: the same batches, weights and measures."""

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.algorithms.on_two_ranks import train

ROOT = Path(__file__).parents[2]


def on_two_ranks(method: str, folder: Path) -> list[dict[str, Any]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests/algorithms/on_two_ranks.py"), method, str(folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def check(method: str, folder: Path) -> None:
    first, second = on_two_ranks(method, folder)
    torch.testing.assert_close(first["state"], second["state"], rtol=0, atol=0)
    assert first["metrics"] == second["metrics"]
    _, alone = train(method, 1, "auto")
    torch.testing.assert_close(first["state"], alone["state"], rtol=1e-9, atol=1e-9)
    assert first["metrics"] == pytest.approx(alone["metrics"], rel=1e-6)
    assert first["steps"] == second["steps"] == alone["steps"] == 30
    together = [mine + theirs for mine, theirs in zip(first["seen"], second["seen"], strict=True)]
    assert together == alone["seen"]
    assert first["predicted"] + second["predicted"] == alone["predicted"] == 80


def test_two_ranks_train_as_one_with_the_joint_batch(tmp_path: Path) -> None:
    check("functional", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["higher", "forward", "families", "fedavg", "fedavg-sam"])
def test_two_ranks_train_as_one_with_the_joint_batch_in_other_ways_too(method: str, tmp_path: Path) -> None:
    check(method, tmp_path)
