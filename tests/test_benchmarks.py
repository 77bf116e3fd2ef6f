"""The benchmark: its command runs and writes what it prints; its yardstick does what a round does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import small_clients
from benchmarks.bare import bare_round, prepare
from benchmarks.federations import Noise, Rounds, advance, arithmetic
from fedamm_pl import FedAMM, Orchestrator
from fedamm_pl.federation.executors import Sequential
from fedamm_pl.federation.trainer import TrainerConfig

PROGRAM = Path(__file__).parent.parent / "benchmarks/run.py"


def test_the_command_prints_and_writes_its_rows(tmp_path: Path) -> None:
    command = [sys.executable, str(PROGRAM), "--rows", "data", "--repeats", "1", "--output", str(tmp_path / "r.json")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    content = json.loads((tmp_path / "r.json").read_text())
    (row,) = content["rows"]
    assert row["measured"] == pytest.approx(100 * row["seconds"]["data"][0] / row["seconds"]["step"][0], rel=0.05)
    assert row["what"] in printed
    assert content["hardware"]["threads"] == torch.get_num_threads()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_bare_loop_has_the_arithmetic_of_a_round(precision: str) -> None:
    data = Noise("noise-20-8-3-10", num_clients=2, imbalance_factor=0.5, num_meta_per_class=2, batch_size=16)
    torch.manual_seed(0)
    module = FedAMM(10, 3, "tests.tiny.tiny_resnet", 0.01, info=data.info, differentiation="forward")
    own = FedAMM(10, 3, "tests.tiny.tiny_resnet", 0.01, info=data.info)
    run = Orchestrator(
        module,
        data,
        num_rounds=0,
        client_fraction=1.0,
        local_epochs=2,
        callbacks=[Rounds()],
        trainer=TrainerConfig("cpu", precision=precision),  # type: ignore[arg-type]
    )
    own.load_shared_state(run.state.shared)
    start = run.state.shared
    assert advance(run) > 0
    with arithmetic(run):
        averages = bare_round(own.model, own.weight_net, prepare(run, 1))
    assert averages.keys() == run.state.shared.keys()
    for name, value in run.state.shared.items():
        assert not torch.equal(value, start[name]), name
        torch.testing.assert_close(value.double(), averages[name].double(), rtol=1e-4, atol=1e-6)


def test_small_clients_end_in_the_weights_of_the_bare_loop() -> None:
    torch.manual_seed(0)
    run = small_clients.federation(small_clients.small(3, 8), small_clients.linear(), Sequential())
    network = small_clients.linear()
    network.load_state_dict({name.removeprefix("model."): value for name, value in run.state.shared.items()})
    _, expected = small_clients.bare_round(run, network)
    advance(run)
    for name, value in expected.items():
        torch.testing.assert_close(run.state.shared[f"model.{name}"].double(), value, rtol=1e-5, atol=1e-7)
