"""Clients side by side: the contract to rounding, each method and kind of layer that it takes, and what it refuses."""

import copy
import dataclasses
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import (
    CCVR,
    CRT,
    FEDIC,
    LWS,
    ClassBalanced,
    Climb,
    CReFF,
    FedETF,
    FedFocal,
    FedLC,
    FedNova,
    FedNPC,
    FedProx,
    FedReLa,
    FedRS,
    LogitAdjusted,
    MetaFineTune,
    Moon,
    RatioLoss,
    Scaffold,
    TauNormalized,
)
from fedamm_pl.data.client import BatchLoader, ClientData
from fedamm_pl.federation.estimate import estimate
from fedamm_pl.federation.executors import Executor, Outcome, Sequential, Vectorized
from fedamm_pl.federation.executors.side_by_side import masked_batch_norm, padded
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.session import ClientSession
from tests.federation.executors import methods
from tests.federation.executors.contract import ExecutorContract
from tests.federation.small import CPU, federation, make, spec
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet

DOUBLE = TrainerConfig("cpu", precision="64-true")
TAKEN: list[type[FederatedModule]] = [
    FedAvg,
    FedProx,
    FedFocal,
    ClassBalanced,
    LogitAdjusted,
    FedLC,
    FedRS,
    FedETF,
    FedNova,
    FedReLa,
    RatioLoss,
    Climb,
    CReFF,
    MetaFineTune,
    FEDIC,
    FedAMM,
    TauNormalized,
    FedNPC,
    CCVR,
    CRT,
    LWS,
]


def assert_near(found: State, expected: State, tolerance: float = 1e-4) -> None:
    """Check that two states are the same but for rounding."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, msg=name)


class TestVectorized(ExecutorContract):
    window = 3
    method = methods.Obedient
    bits: ClassVar[list[tuple[type[FederatedModule], dict[str, Any]]]] = [
        (FedAMM, {}),
        (LogitAdjusted, {"counts": "local"}),
        (CReFF, {"match_steps": 3, "retrain_steps": 3}),
    ]

    def executor(self) -> Executor:
        return Vectorized(group_size=3)

    def compare(self, found: Iterable[Outcome], expected: Iterable[Outcome]) -> None:
        for one, other in zip(found, expected, strict=True):
            assert isinstance(one, ClientResult), one
            assert isinstance(other, ClientResult), other
            for part in ("payload", "kept", "tallies"):
                assert_near(getattr(one, part), getattr(other, part))
            assert dict(one.metrics) == pytest.approx(dict(other.metrics), rel=1e-4)
            exact = [(r.client_id, r.num_examples, r.bytes_received, r.bytes_sent) for r in (one, other)]
            assert exact[0] == exact[1]

    def compare_runs(self, found: Orchestrator, expected: Orchestrator) -> None:
        assert_near(found.state.shared, expected.state.shared, 1e-3)
        assert found.state.kept == expected.state.kept
        assert [row.keys() for row in found.state.history] == [row.keys() for row in expected.state.history]

    def compare_states(self, found: State, expected: State) -> None:
        assert_near(found, expected)


class Uneven(TinyData):
    """Clients of 2 to 30 examples."""

    SIZES = (7, 2, 30, 14, 9, 3)

    def client_size(self, client_id: int) -> int:
        return self.SIZES[client_id]

    def client(self, client_id: int) -> ClientData:
        indices = torch.arange(self.SIZES[client_id]) * (client_id + 1)  # some hold two classes, or one
        return dataclasses.replace(super().client(client_id), indices=indices)


def run(
    algorithm: type[FederatedModule],
    executor: Executor,
    *,
    failed: int = 0,
    num_rounds: int = 2,
    kind: type[Uneven] = Uneven,
    **options: Any,
) -> Orchestrator:
    """Rounds of two epochs in float64, of six clients of very different size, of whom so many fail."""
    data = kind("tiny", num_clients=6, num_meta_per_class=2, imbalance_factor=0.5, batch_size=4)
    more: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 2, "eval_interval": 2}
    one = federation(algorithm, data, options, executor=executor, trainer=DOUBLE, num_rounds=num_rounds, **more)
    one.run()
    assert one.state.counts == {**dict.fromkeys(one.state.counts, 0), "failed_clients": failed}
    return one


def assert_same_run(algorithm: type[FederatedModule], **options: Any) -> None:
    """Check that clients side by side give the run of one client after the other, to rounding in float64."""
    found, expected = (run(algorithm, executor, **copy.deepcopy(options)) for executor in (Vectorized(4), Sequential()))
    assert_near(found.state.shared, expected.state.shared, 1e-9)
    for row, other in zip(found.state.history, expected.state.history, strict=True):
        assert row == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("algorithm", TAKEN)
def test_a_method_is_that_of_one_client_after_the_other(algorithm: type[FederatedModule]) -> None:
    assert_same_run(algorithm, model=with_norm(nn.BatchNorm2d(4)))


@pytest.mark.parametrize("algorithm", [LogitAdjusted, FedLC])
@pytest.mark.parametrize("absent", ["mask", "one"])
def test_clients_that_lack_classes_or_have_one_alone(algorithm: type[FederatedModule], absent: str) -> None:
    own = {"counts": "local"} if algorithm is LogitAdjusted else {}
    assert_same_run(algorithm, model=with_norm(nn.BatchNorm2d(4)), absent=absent, **own)


@pytest.mark.parametrize("algorithm", [LogitAdjusted, ClassBalanced])
def test_estimated_class_counts_first_equal_then_those_sent(algorithm: type[FederatedModule]) -> None:
    assert_same_run(algorithm, model=with_norm(nn.BatchNorm2d(4)), counts="estimated")


@pytest.mark.parametrize("options", [{"momentum": 0.0}, {"weight_decay": 0.0}, {"momentum": 0.0, "weight_decay": 0.0}])
def test_each_form_of_sgd(options: dict[str, float]) -> None:
    assert_same_run(FedAvg, model=with_norm(nn.BatchNorm2d(4)), **options)


class Tied(nn.Module):
    """Two layers with the same weight, one of them under two names; a third is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, NUM_CLASSES)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(64, 64)
        self.frozen.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = self.second(self.first(images.flatten(1)).relu() + self.frozen(images.flatten(1)))
        return self.last(hidden.relu())  # type: ignore[no-any-return]


class Twice(nn.Module):
    """A network that uses one BatchNorm twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.layer = nn.BatchNorm2d(1), nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.norm(self.norm(images).relu() + images).flatten(1))
        return logits


class InEvaluation(nn.Sequential):
    """A network that keeps its BatchNorm in evaluation mode."""

    def train(self, mode: bool = True) -> "InEvaluation":
        super().train(mode)
        for part in self:
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        return self


def with_norm(norm: nn.Module, kind: Callable[..., nn.Sequential] = nn.Sequential) -> nn.Sequential:
    """A convolution, a norm, and a linear layer."""
    return kind(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(144, NUM_CLASSES))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a ResNet": lambda: tiny_resnet(NUM_CLASSES, 1),
    "tied and frozen": Tied,
    "BatchNorm of a cumulative mean": lambda: with_norm(nn.BatchNorm2d(4, momentum=None)),
    "BatchNorm without running statistics": lambda: with_norm(nn.BatchNorm2d(4, track_running_stats=False)),
    "BatchNorm without scale": lambda: with_norm(nn.BatchNorm2d(4, affine=False)),
    "BatchNorm used twice": Twice,
    "BatchNorm in evaluation mode": lambda: with_norm(nn.BatchNorm2d(4), InEvaluation),
    "BatchNorm1d": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, NUM_CLASSES)),
    "the layer itself": lambda: nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(64, NUM_CLASSES)),
    "GroupNorm": lambda: with_norm(nn.GroupNorm(2, 4)),
    "LayerNorm": lambda: with_norm(nn.LayerNorm((6, 6))),
}


@pytest.mark.filterwarnings("ignore:.*in eval mode at the start")  # one of them is so on purpose
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_that_of_one_client_after_the_other(name: str) -> None:
    torch.manual_seed(1)
    assert_same_run(FedAvg, model=NETWORKS[name]())


def test_the_size_of_a_group_changes_no_more_than_rounding() -> None:
    network = with_norm(nn.BatchNorm2d(4))
    states = [run(FedAvg, Vectorized(size), model=copy.deepcopy(network)).state.shared for size in (1, 2, 100)]
    for state in states[1:]:
        assert_near(state, states[0], 1e-9)


# Masks


def test_what_is_not_there_is_a_copy_of_the_first_example() -> None:
    images, labels = torch.arange(5.0).reshape(5, 1), torch.arange(5)
    whole, classes, present, sizes = padded([(images[:2], labels[:2]), (images[2:], labels[2:]), None])
    assert whole[..., 0].tolist() == [[0, 1, 0], [2, 3, 4], [0, 0, 0]]
    assert classes.tolist() == [[0, 1, 0], [2, 3, 4], [0, 0, 0]]
    assert present is not None
    assert present.tolist() == [[True, True, False], [True, True, True], [False, False, False]]
    assert sizes == [2, 3, 0]


def test_batches_of_one_size_need_no_mask() -> None:
    batch = torch.ones(2, 1), torch.zeros(2, dtype=torch.int64)
    whole, _, present, sizes = padded([batch, batch])
    assert whole.shape == (2, 2, 1)
    assert present is None
    assert sizes == [2, 2]


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4), (5, 3, 4, 2)])
def test_masked_batch_norm_is_torch_s_on_the_examples_that_are_there(shape: tuple[int, ...]) -> None:
    kinds: dict[int, type[nn.Module]] = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d}
    model = nn.Sequential(kinds[len(shape)](3)).double()
    reference = copy.deepcopy(model)
    inputs = torch.randn(shape, dtype=torch.float64)
    with masked_batch_norm(model) as mask:
        mask.present = torch.tensor([True, True, False, True, False])
        found = model(inputs)
    expected = reference(inputs[mask.present])
    torch.testing.assert_close(found[mask.present], expected)
    for name, value in reference.named_buffers():
        torch.testing.assert_close(mask.moved[name].to(value.dtype), value)
    assert all(torch.equal(value, value * 0 + ("var" in name)) for name, value in model.named_buffers())  # unmoved
    model(inputs)  # torch's own again
    assert int(model[0].num_batches_tracked) == 1  # type: ignore[arg-type]


# What it refuses


class OwnStep(FedAvg):
    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        return super().training_step(batch, batch_idx)


class Adam(FedAvg):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.model.parameters())


class SgdOfItsOwn(FedAvg):
    def local_sgd(self, module: nn.Module) -> torch.optim.SGD:
        return self.sgd(module, 1.0)


class StepsOfFedAMM(FedAMM):
    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)


class Unbuffered(FedAvg):
    """A method that keeps what differs between clients out of sight."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        self.scale = float(self.session.data.num_examples)

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits, labels) * self.scale


class OfTheBatch(FedAvg):
    """A method whose losses depend on the other examples."""

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits - logits.mean(0), labels)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layer(images.flatten(1))
        return logits if logits.sum() > 0 else 2 * logits


@pytest.mark.parametrize(
    ("algorithm", "options", "reason"),
    [
        (
            FedAMM,
            {"meta_update": "synchronous"},
            "FedAMM, got Vectorized: its clients ask the server in the middle of a fit",
        ),
        (Moon, {}, "Moon, got Vectorized: .* it has training_step of its own"),
        (Scaffold, {}, "Scaffold, got Vectorized: .* it has on_before_optimizer_step of its own"),
        (OwnStep, {}, "it has training_step of its own"),
        (Adam, {}, "it has configure_optimizers of its own"),
        (SgdOfItsOwn, {}, "it has local_sgd of its own"),
        (FedAvg, {"local_optimizer": "sam"}, "its steps are more than SGD on an objective of each example"),
        (StepsOfFedAMM, {}, "it has training_step of its own"),
        (Unbuffered, {}, "Unbuffered .*: scale is not the same for all clients; a buffer of the module may differ"),
        (OfTheBatch, {}, "after a few steps .* is not what a Trainer makes of it"),
        (
            FedAvg,
            {"model": "tests.federation.executors.methods.dropout"},
            "dropout, got Vectorized: its network draws random numbers",
        ),
        (FedAvg, {"model": Branching()}, "Branching, got Vectorized: RuntimeError: vmap: .*control flow"),
    ],
)
def test_what_cannot_train_side_by_side_is_refused_by_name(
    algorithm: type[FederatedModule], options: dict[str, Any], reason: str
) -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=reason):
        Vectorized().open(spec(make(algorithm, data, **options), data))


def test_compiled_networks_are_refused() -> None:
    data = tiny_data()
    module = make(FedAvg, data)
    with pytest.raises(ValueError, match="a compiled network"):
        Vectorized().open(spec(module, data, dataclasses.replace(CPU, compile=True)))


def test_convolutions_on_a_cpu_are_said_to_be_slow(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_data()
    Vectorized().open(spec(make(FedAvg, data), data))
    assert "convolutions of parallel clients are slow on a CPU" in caplog.text
    caplog.clear()
    Vectorized().open(spec(make(FedAvg, data, model=nn.Sequential(nn.Flatten(), nn.Linear(64, NUM_CLASSES))), data))
    assert "convolutions" not in caplog.text


def test_a_group_has_a_client_or_more() -> None:
    with pytest.raises(ValueError, match="`group_size` to be a whole number of 1 or more, got 0"):
        Vectorized(0)


# What goes wrong later


class ShortLoader(BatchLoader):
    """Has one batch less than it says."""

    def __iter__(self) -> Any:
        yield from list(super().__iter__())[:-1]


class Short(FedAvg):
    """A client of it has a loader that ends early, from round 2 on."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        if self.session.broadcast.round_num > 1 and self.session.task.client_id == 1:
            loader = _short(self.session)
            self.session.train_loader = lambda: loader  # type: ignore[method-assign,assignment,return-value]


def _short(session: ClientSession) -> ShortLoader:
    data = session.data
    return ShortLoader(data.images, data.labels, data.indices, data.batch_size, data.augmentation, 0)


def test_a_loader_that_ends_early_costs_its_client() -> None:
    one = federation(Short, tiny_data(), executor=Vectorized(), num_rounds=2, client_fraction=1.0)
    one.run()
    assert one.state.counts["failed_clients"] == 1


def test_a_run_that_goes_on_elsewhere_says_that_digits_may_differ(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federation(executor=Vectorized(8), num_rounds=1, output_dir=tmp_path).run()
    with caplog.at_level(logging.WARNING, "fedamm_pl"):
        federation(executor=Sequential(), output_dir=tmp_path).run()
    assert "clients is None but was '8 side by side'; from here on results may differ" in caplog.text


def test_the_cost_of_a_round_is_measured_on_a_group() -> None:
    one = federation(data=tiny_data(num_clients=8), executor=Vectorized(4), client_fraction=1.0)
    expected = federation(data=tiny_data(num_clients=8), client_fraction=1.0)
    found, plain = estimate(one), estimate(expected)
    assert found.sent == pytest.approx(plain.sent)
    assert found.train > 0
