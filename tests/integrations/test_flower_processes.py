"""The example's federation in Flower's own processes: a node is killed in the middle of a round, and the bits stay the simulation's."""

import importlib.util
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("flwr", reason="Flower is not installed; it needs Python 3.11")

from fedamm_pl.cli.main import main
from tests.federation.small import assert_equal
from tests.integrations.test_flower import final, rows, summary

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation"
spec = importlib.util.spec_from_file_location("run_federation", EXAMPLE / "run.py")
assert spec is not None
example: Any = importlib.util.module_from_spec(spec)
sys.modules["run_federation"] = example
spec.loader.exec_module(example)  # type: ignore[union-attr]

OPTIONS = (
    "--data.num_clients 2 --federation.num_rounds 3 --federation.local_epochs 1 --output.figures false --logger false"
)


def until(happens: Callable[[], Any], seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not happens():
        assert time.monotonic() < deadline, "it has not happened in time"
        time.sleep(0.2)


def stays(federation: Any, number: int, **told: Any) -> bool:
    """Start a node; return whether it still runs a moment later."""
    federation.start_client(number, **told)
    time.sleep(8)
    if federation.processes[f"client_{number}"].poll() is None:
        return True
    federation.stop(f"client_{number}")
    return False


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="ends groups of processes")
def test_three_rounds_in_the_second_of_which_a_node_is_killed(tmp_path: Path) -> None:
    run, checkpoint = tmp_path / "run", tmp_path / "run" / "checkpoints" / "round_000001.ckpt"
    with example.LocalFederation(tmp_path / "flower", secure=True) as federation:
        for client in range(2):
            federation.start_client(client, client=str(client), state=str(tmp_path / "state"))
        run_id = federation.submit(options=OPTIONS, output_dir=str(run))
        until(checkpoint.exists)
        time.sleep(2)
        federation.stop("client_1", signal.SIGKILL)
        # with its key it is the same node, which is not taken until the dead one is missed
        until(lambda: stays(federation, 1, client="1", state=str(tmp_path / "state")))
        found = federation.wait(run_id, 420)
        log = federation.flwr("log", str(run_id), "here", "--show")
    assert found["status"] == "finished:completed", log
    assert not list(tmp_path.rglob("core.*"))
    main(
        [
            "--config",
            str(EXAMPLE / "app" / "federation" / "config.yaml"),
            *OPTIONS.split(),
            "--output.dir",
            str(tmp_path / "simulation"),
        ]
    )
    assert_equal(final(run), final(tmp_path / "simulation"))
    assert rows(run) == rows(tmp_path / "simulation")
    assert summary(run)["failed_clients"] == 0
