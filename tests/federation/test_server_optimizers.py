"""Server optimisers: their formulas by hand, whole runs against plain numpy, what they leave alone, state, resume, and refusals."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import CReFF, FedNova, MetaFineTune, Scaffold
from fedamm_pl.cli.main import main
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Executor, Processes, Vectorized
from fedamm_pl.federation.server_optimizers import ServerOptimizer, first_moment, second_moment
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.session import ServerSession
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, tiny_data

CPU = TrainerConfig(accelerator="cpu", precision="32-true")
KINDS: Any = ["momentum", "adagrad", "adam", "yogi"]
every_kind = pytest.mark.parametrize("kind", KINDS)
M, V = "server_optimizer.m.", "server_optimizer.v."


def linear(num_classes: int, in_channels: int) -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, num_classes))


def make(algorithm: type[FederatedModule] = FedAvg, model: Any = None, **options: Any) -> Any:
    torch.manual_seed(0)
    model = model or "tests.federation.test_server_optimizers.linear"
    return algorithm(NUM_CLASSES, 1, model, **{"lr": 0.05, "info": tiny_data().info, **options})


def federate(module: FederatedModule, num_rounds: int = 3, **options: Any) -> Orchestrator:
    options = {"client_fraction": 0.5, "local_epochs": 1, "eval_interval": num_rounds, "trainer": CPU, **options}
    run = Orchestrator(module, tiny_data(), num_rounds=num_rounds, **options)
    run.run()
    return run


def optimizer(kind: Any, **options: Any) -> ServerOptimizer:
    made = ServerOptimizer.of(FederationConfig(1, server_optimizer=kind, **options))
    assert made is not None
    return made


# The formulas


def test_two_steps_by_hand() -> None:
    """From w = 1 with averages 1.5 and then 1 beyond it, so Delta = 0.5 and 1; lr 0.1, b1 0.5, b2 0.75, tau 0.1 (v starts at 0.01)."""
    first = {"momentum": 0.5, "adagrad": 0.25, "adam": 0.25, "yogi": 0.25}  # m: 0.5, otherwise 0.5 * 0.5
    second = {"momentum": 1.25, "adagrad": 0.625, "adam": 0.625, "yogi": 0.625}  # 0.5 * 0.5 + 1; 0.5 * 0.25 + 0.5 * 1
    # v: 0.01 + 0.25; 0.75 * 0.01 + 0.25 * 0.25; 0.01 + 0.25 * 0.25, since 0.01 < 0.25
    v1 = {"adagrad": 0.26, "adam": 0.07, "yogi": 0.0725}
    # 0.26 + 1; 0.75 * 0.07 + 0.25; 0.0725 + 0.25, since 0.0725 < 1
    v2 = {"adagrad": 1.26, "adam": 0.3025, "yogi": 0.3225}
    for kind in KINDS:
        made, state = optimizer(kind, server_lr=0.1, server_momentum=0.5, server_beta2=0.75, server_tau=0.1), {}
        state = {"model.w": torch.tensor([1.0], dtype=torch.float64)}
        for delta, m, v in ((0.5, first, v1), (1.0, second, v2)):
            before = state["model.w"].item()
            state |= made.step(state, {"model.w": state["model.w"] + delta}, {"model.w"})
            assert state[M + "model.w"].item() == pytest.approx(m[kind])
            assert (V + "model.w" in state) == (kind in v)
            root = 1.0 if kind == "momentum" else math.sqrt(v[kind]) + 0.1
            assert state["model.w"].item() == pytest.approx(before + 0.1 * m[kind] / root)


def test_second_moment_of_yogi_falls_by_the_square_and_no_further() -> None:
    """v = 4, b2 = 0.5: towards 1 by 0.5 * 1, towards 9 by 0.5 * 9, at 4 it stays; Adam goes half of the way."""
    update = torch.tensor([1.0, 3.0, 2.0])
    assert second_moment("yogi", torch.full((3,), 4.0), update, 0.5).tolist() == [3.5, 8.5, 4.0]
    assert second_moment("adam", torch.full((3,), 4.0), update, 0.5).tolist() == [2.5, 6.5, 4.0]
    assert second_moment("adagrad", torch.full((3,), 4.0), update, 0.5).tolist() == [5.0, 13.0, 8.0]
    assert first_moment("momentum", torch.ones(1), torch.ones(1), 0.9).item() == pytest.approx(1.9)


def test_defaults_are_those_of_the_papers() -> None:
    for kind in KINDS:
        made = optimizer(kind)
        assert made.lr == (1.0 if kind == "momentum" else 0.01)
        assert made.momentum == (0.0 if kind == "adagrad" else 0.9)
        assert (made.beta2, made.tau) == (0.99, 1e-3)
    assert ServerOptimizer.of(FederationConfig(1)) is None


# Runs


def by_numpy(kind: str, updates: list[Any], start: Any) -> Any:
    """The papers' algorithms on given averaged updates, which is what makes the expected numbers."""
    w, m, v = start.copy(), np.zeros_like(start), np.full_like(start, 1e-6)
    b1, b2, lr, tau = 0.0 if kind == "adagrad" else 0.9, 0.99, 1.0 if kind == "momentum" else 0.01, 1e-3
    for update in updates:
        if kind == "momentum":
            m = b1 * m + update
            w = w + lr * m
            continue
        m = b1 * m + (1 - b1) * update
        if kind == "adagrad":
            v = v + update**2
        elif kind == "adam":
            v = b2 * v + (1 - b2) * update**2
        else:
            v = v - (1 - b2) * update**2 * np.sign(v - update**2)
        w = w + lr * m / (np.sqrt(v) + tau)
    return w


@every_kind
def test_a_run_is_the_algorithm_on_the_clients_averages(kind: Any) -> None:
    """What clients send is averaged by hand from what the run's own broadcasts make of them."""
    data, module, name = tiny_data(partition="by_dirichlet"), make(), "model.1.weight"
    state = module.shared_state()
    updates, start = [], state[name].double().numpy()
    for round_num in (1, 2, 3):
        round_ = Round(module, data, state=state, round_num=round_num, server_optimizer=kind)
        assert set(round_.broadcast.payload) == set(module.shared_state())
        results = [round_.train(client) for client in range(4)]
        total = sum(result.num_examples for result in results)
        mean = sum(result.num_examples / total * result.payload[name].double().numpy() for result in results)
        updates.append(mean - state[name].double().numpy())
        state = round_.update(results)
        np.testing.assert_allclose(state[name].numpy(), by_numpy(kind, updates, start), rtol=1e-4, atol=2e-6)
    assert {key for key in state if key.startswith(("model.", M))} == {*module.shared_state()} | {
        M + key for key in module.shared_state()
    }
    assert any(key.startswith(V) for key in state) == (kind != "momentum")
    assert {value.dtype for key, value in state.items() if key.startswith("server_optimizer.")} == {torch.float32}


LIMITS: dict[str, dict[str, Any]] = {
    "momentum": {"server_momentum": 0.0},
    "adam": {"server_momentum": 0.0, "server_beta2": 1.0, "server_lr": 2e-3},  # v stays tau^2
    "yogi": {"server_momentum": 0.0, "server_beta2": 1.0, "server_lr": 2e-3},
}


@pytest.mark.parametrize(("kind", "options"), LIMITS.items())
def test_limit_case_is_fedavg_to_rounding(kind: Any, options: dict[str, Any]) -> None:
    theirs = federate(make(model="tests.tiny.tiny_resnet"))
    mine = federate(make(model="tests.tiny.tiny_resnet"), server_optimizer=kind, **options)
    for name, value in theirs.state.shared.items():
        torch.testing.assert_close(mine.state.shared[name], value, rtol=1e-4, atol=1e-5)


def test_what_is_no_trained_parameter_of_the_network_stays_averaged() -> None:
    class Frozen(nn.Module):
        """A layer that does not train, BatchNorm's statistics, and two layers of one weight."""

        def __init__(self) -> None:
            super().__init__()
            self.frozen, self.norm = nn.Linear(64, 64).requires_grad_(False), nn.BatchNorm1d(64)
            self.one, self.two = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.two.weight = self.one.weight
            self.last = nn.Linear(64, NUM_CLASSES)

        def forward(self, images: Tensor) -> Tensor:
            hidden = self.two(self.one(self.norm(self.frozen(images.flatten(1)))))
            logits: Tensor = self.last(hidden)
            return logits

    torch.manual_seed(0)
    module = make(FedAMM, Frozen(), meta_lr=0.5)
    data = tiny_data()
    averaged, stepped = (Round(module, data, **options) for options in ({}, {"server_optimizer": "adam"}))  # type: ignore[arg-type]
    results = [averaged.train(client) for client in range(2)]
    before, average, after = module.shared_state(), averaged.update(results), stepped.update(results)
    trained = {"one.weight", "two.weight", "norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert {name.removeprefix(M) for name in after if name.startswith(M)} == {f"model.{name}" for name in trained}
    for name, value in average.items():
        if name.removeprefix("model.") in trained:
            assert not torch.equal(after[name], value)
            assert (
                after[name] - before[name]
            ).abs().max() <= 0.0101 / 0.99  # |m| <= 0.1 |Delta|, sqrt v >= 0.1 |Delta|
        else:
            assert torch.equal(after[name], value)
    assert any(
        name.startswith("weight_net.") and not torch.equal(value, before[name]) for name, value in average.items()
    )
    assert torch.equal(after["model.one.weight"], after["model.two.weight"])


def test_the_update_is_that_of_the_aggregation() -> None:
    data, module = tiny_data(partition="by_dirichlet"), make()
    rounds = [
        Round(module, data, aggregation="median", **options)
        for options in ({}, {"server_optimizer": "momentum", "server_lr": 2.0})
    ]
    results = [rounds[0].train(client) for client in range(4)]
    median, stepped = (round_.update(results) for round_ in rounds)
    for name, start in module.shared_state().items():
        torch.testing.assert_close(stepped[name], start + 2 * (median[name] - start))


COMBINED: dict[str, tuple[type[FederatedModule], dict[str, Any]]] = {
    "FedAMM": (FedAMM, {"meta_lr": 0.1}),
    "FedNova": (FedNova, {}),
    "MetaFineTune": (MetaFineTune, {"finetune_steps": 0}),
    "Scaffold": (Scaffold, {"momentum": 0.0}),
    "CReFF": (CReFF, {"num_features": 4, "match_steps": 2, "retrain_steps": 2}),
}


@pytest.mark.parametrize("name", COMBINED)
def test_it_steps_along_each_methods_own_average(name: str) -> None:
    algorithm, options = COMBINED[name]
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))
    data, module = tiny_data(partition="by_dirichlet"), make(algorithm, network, **options)
    plain, doubled = (
        Round(module, data, **more)
        for more in ({}, {"server_optimizer": "momentum", "server_lr": 2.0})  # type: ignore[arg-type]
    )
    results = [plain.train(client) for client in range(4)]
    average, stepped = plain.update(results), doubled.update(results)
    for key, start in module.shared_state().items():
        factor = 2 if key.startswith("model.") else 1
        torch.testing.assert_close(stepped[key], start + factor * (average[key] - start), rtol=1e-4, atol=1e-6)
    others = {key for key in average if not key.startswith("model.")}
    assert {key for key in stepped if not key.startswith(("model.", M))} == others
    for key in others:
        torch.testing.assert_close(stepped[key], average[key])


def test_metafinetune_tunes_what_the_optimizer_gives() -> None:
    data, module = tiny_data(), make(MetaFineTune, finetune_lr=1e-3)
    tuned = Round(module, data, server_optimizer="adam")
    results = [tuned.train(0)]
    found = tuned.update(results)
    untuned = Round(make(MetaFineTune, finetune_steps=0), data, server_optimizer="adam").update(results)
    assert torch.equal(found[M + "model.1.weight"], untuned[M + "model.1.weight"])
    distance = (found["model.1.weight"] - untuned["model.1.weight"]).abs().max()
    assert 0 < distance < 1e-2


@pytest.mark.parametrize(
    ("kind", "algorithm"), [("momentum", FedAvg), ("adagrad", FedAvg), ("adam", FedAMM), ("yogi", CReFF)]
)
def test_resumed_run_equals_uninterrupted_run(kind: Any, algorithm: type[FederatedModule], tmp_path: Path) -> None:
    def run(num_rounds: int, folder: str) -> Orchestrator:
        torch.manual_seed(0)
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))
        options: dict[str, Any] = {"output_dir": tmp_path / folder, "eval_interval": 2}
        return federate(make(algorithm, network), num_rounds, server_optimizer=kind, **options)

    whole = run(4, "whole")
    run(2, "halves")
    halves = run(4, "halves")
    assert halves.state.counts["resumes"] == 1
    assert halves.state.shared.keys() == whole.state.shared.keys()
    assert all(torch.equal(value, whole.state.shared[name]) for name, value in halves.state.shared.items())
    assert halves.state.history == whole.state.history
    with pytest.raises(ValueError, match=r"got others: federation\.server_optimizer is 'none' but was"):
        federate(halves.module, 5, output_dir=tmp_path / "halves")


def test_bytes_are_those_of_fedavg() -> None:
    theirs, mine = federate(make()), federate(make(), server_optimizer="yogi")
    assert mine.state.bytes_total == theirs.state.bytes_total


@pytest.mark.parametrize("executor", [Processes(2), Vectorized()], ids=lambda made: type(made).__name__)
def test_wherever_clients_train_it_is_the_same(executor: Executor) -> None:
    alone, other = (
        federate(make(), server_optimizer="momentum", **more)
        for more in ({}, {"executor": executor})  # type: ignore[arg-type]
    )
    for name, value in alone.state.shared.items():
        torch.testing.assert_close(other.state.shared[name], value, rtol=1e-4, atol=1e-5)


def test_a_failed_round_leaves_weights_and_moments() -> None:
    class FailsInTheSecond(FedAvg):
        def contribution(self, result: ClientResult, server: ServerSession) -> State:
            if server.round_num == 2:
                raise ValueError("nothing is taken")
            return result.payload

    one, two, three = (
        federate(make(FailsInTheSecond), rounds, client_fraction=1.0, server_optimizer="adam") for rounds in (1, 2, 3)
    )
    assert two.state.counts["failed_rounds"] == 1
    assert one.state.shared.keys() == two.state.shared.keys()
    assert all(torch.equal(value, two.state.shared[name]) for name, value in one.state.shared.items())
    assert not torch.equal(three.state.shared[M + "model.1.weight"], two.state.shared[M + "model.1.weight"])


# Precision


@pytest.mark.parametrize(("precision", "dtype"), [("bf16-true", torch.bfloat16), ("64-true", torch.float64)])
def test_weights_keep_their_type_and_moments_are_float32(precision: Any, dtype: torch.dtype) -> None:
    run = federate(make(), 2, server_optimizer="adam", trainer=TrainerConfig("cpu", precision=precision))
    assert {value.dtype for name, value in run.state.shared.items() if name.startswith("model.")} == {dtype}
    moments = [value for name, value in run.state.shared.items() if name.startswith("server_optimizer.")]
    assert {(value.dtype, value.device.type) for value in moments} == {(torch.float32, "cpu")}


# Refusals


class OwnAverage(FedAvg):
    """Makes the next state by itself, and does not say so."""

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        return {**state, **reduced}


class OwnAverageSaid(OwnAverage):
    optimizable = False


def test_a_method_that_makes_its_own_model_is_refused_by_name() -> None:
    options: dict[str, Any] = {"num_rounds": 1, "server_optimizer": "adam", "trainer": CPU}
    message = "Expected `server_optimizer` to be none for {}, got adam: its server makes the next model by itself"
    with pytest.raises(ValueError, match=message.format("OwnAverageSaid")):
        Orchestrator(make(OwnAverageSaid), tiny_data(), **options)
    run = Orchestrator(make(OwnAverage), tiny_data(), **options)
    with pytest.raises(ValueError, match=message.format("OwnAverage")):
        run.run()
    federate(make(OwnAverage), 1)


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "--data.num_clients",
        "2",
        "--data.imbalance_factor",
        "0.1",
        "--algorithm.model",
        "small_cnn",
        "--logger",
        "false",
    ]
    words += ["--federation.num_rounds", "2", "--federation.local_epochs", "1", "--trainer.accelerator", "cpu"]
    words += [
        "--algorithm",
        "tests.federation.test_server_optimizers.OwnAverage",
        "--output.dir",
        str(tmp_path / "run"),
    ]
    with pytest.raises(SystemExit) as stop:
        main([*words, "--federation.server_optimizer", "adam"])
    assert stop.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert line.startswith("fedamm: error: Expected --federation.server_optimizer to be none for OwnAverage, got adam")
