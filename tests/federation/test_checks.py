"""What would fail, or go wrong unseen, in the middle of a run is said before the first round."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.algorithms import (
    CCVR,
    CRT,
    FEDIC,
    LWS,
    RUCR,
    BalanceFL,
    CReFF,
    FedETF,
    FedLoGe,
    FedNH,
    FedNPC,
    FedRoD,
    FedYoYo,
    Moon,
    RatioLoss,
    TauNormalized,
)
from fedamm_pl.federation.executors import Executor, Runner, RunSpec
from fedamm_pl.federation.orchestrator import Orchestrator
from tests.federation.small import federation, make
from tests.tiny import NUM_CLASSES, tiny_data

USES_FEATURES = [
    CCVR,
    CRT,
    FEDIC,
    LWS,
    RUCR,
    BalanceFL,
    CReFF,
    FedETF,
    FedLoGe,
    FedNH,
    FedNPC,
    FedRoD,
    FedYoYo,
    Moon,
    RatioLoss,
    TauNormalized,
]


def test_state_that_does_not_travel_is_refused() -> None:
    class Private(FedAvg):
        shared = ("model.conv1.",)

    with pytest.raises(
        ValueError, match=r"`shared` and `personal` of Private to cover the whole state, .* without model.bn1"
    ):
        federation(Private)


def test_state_that_stays_at_a_client_on_purpose_is_taken() -> None:
    class Personal(FedAvg):
        shared = ("model.conv1.",)
        personal = ("model.",)

    federation(Personal)


def test_module_without_normalisation_is_refused() -> None:
    data = tiny_data()
    with pytest.raises(ValueError, match=r"Expected `info` of the module to be data\.info"):
        Orchestrator(FedAvg(NUM_CLASSES, 1, "tests.tiny.tiny_resnet"), data, num_rounds=1)


def test_client_of_one_example_is_refused_where_batchnorm_cannot_train() -> None:
    data = tiny_data(partition="by_dirichlet", dirichlet_alpha=0.2, min_client_size=1, num_clients=25, seed=1)
    assert any(data.client_size(client) == 1 for client in range(25))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"Expected `min_client_size` to be 2 or more .* got client \d+ with one"):
        federation(data=data, method={"model": network})
    data = tiny_data(partition="by_dirichlet_blocks", dirichlet_alpha=0.5, num_clients=60, seed=1)
    assert any(data.client_size(client) == 1 for client in range(60))
    with pytest.raises(
        ValueError, match=r"`partition` to give each client 2 or more examples .* got client \d+ with one"
    ):
        federation(data=data, method={"model": network})


def test_network_that_does_not_fit_is_refused() -> None:
    colour = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, NUM_CLASSES))
    with pytest.raises(ValueError, match=r"Expected `model` to take images of shape \(1, 8, 8\) .*, got Sequential"):
        federation(method={"model": colour})
    three_classes = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ValueError, match=r"logits of shape \(B, 4\), got Sequential with \(1, 3\)"):
        federation(method={"model": three_classes})


def test_method_that_needs_a_meta_set_is_refused_without_one() -> None:
    data = tiny_data(num_meta_per_class=0)
    with pytest.raises(ValueError, match="`num_meta_per_class` to be 1 or more for FedAMM, got 0"):
        federation(FedAMM, data)
    federation(FedAvg, data, num_rounds=0).run()


@pytest.mark.parametrize("aggregation", ["median", "trimmed_mean"])
def test_a_robust_aggregation_needs_clients_to_outvote(aggregation: str) -> None:
    message = (
        f"`client_fraction` to give 3 or more clients a round for the aggregation {aggregation}, got 0.5 of 4 clients"
    )
    with pytest.raises(ValueError, match=message):
        federation(aggregation=aggregation)
    federation(aggregation=aggregation, client_fraction=0.75)


def test_sums_that_a_robust_aggregation_cannot_protect_are_refused_by_name() -> None:
    message = r"`aggregation` to be num_examples or uniform for CReFF, got median: .* \(class_gradients, present\)"
    with pytest.raises(ValueError, match=message):
        federation(CReFF, aggregation="median", client_fraction=1.0)


def test_an_executor_that_cannot_answer_in_mid_fit_is_refused_for_methods_that_ask_then() -> None:
    class Deaf(Executor):
        can_ask = False

        def open(self, spec: RunSpec) -> Runner:
            raise AssertionError

    synchronous: dict[str, Any] = {"meta_update": "synchronous"}
    with pytest.raises(
        ValueError, match=r"`executor` to be one that answers clients during local training for FedAMM .* got Deaf"
    ):
        federation(FedAMM, method=synchronous, executor=Deaf())
    federation(FedAMM, executor=Deaf())  # asks before the fit


def test_checks_leave_the_mode_of_the_module_alone() -> None:
    data = tiny_data()
    for training in (True, False):
        module = make(FedAvg, data).train(training)
        Orchestrator(module, data, num_rounds=1)
        assert module.training == training


# Networks of one's own


class Plain(nn.Module):
    """A perceptron with BatchNorm; subclasses say what it returns."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(8, NUM_CLASSES)

    def logits(self, images: Tensor) -> Tensor:
        result: Tensor = self.head(self.body(images))
        return result

    def forward(self, images: Tensor) -> Any:
        return self.logits(images)


class Pair(Plain):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images), None


class AuxInTraining(Plain):
    def forward(self, images: Tensor) -> Any:
        logits = self.logits(images)
        return {"logits": logits, "aux": logits} if self.training else logits


class TwoLogits(Plain):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images), self.logits(images)


class TwoInTraining(TwoLogits):
    def forward(self, images: Tensor) -> Any:
        return super().forward(images) if self.training else self.logits(images)


class Asserts(Plain):
    def forward(self, images: Tensor) -> Any:
        assert images.shape[-1] == 224, "wrong\nimage size"


class RaisesInTraining(Plain):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images) if not self.training else {}["none"]


class RaisesBackwards(Plain):
    def forward(self, images: Tensor) -> Any:
        hidden = self.body(images).sigmoid()
        logits = self.head(hidden)
        hidden.add_(1)
        return logits


class Labels(Plain):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images).long()


class Half(Plain):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images).half()


class Open(Plain):
    """Holds an open file, which cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.file = io.BytesIO().getbuffer()


class Nan(Plain):
    def forward(self, images: Tensor) -> Any:
        return self.logits(images) / 0


class Complex(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.ones(NUM_CLASSES, dtype=torch.complex64))

    def forward(self, images: Tensor) -> Any:
        return (self.logits(images) * self.turn).real


def frozen() -> nn.Module:
    return Plain().requires_grad_(False)


REFUSED: list[tuple[Callable[[], nn.Module], str]] = [
    (TwoLogits, r"to return logits .* got tuple of float32 \(1, 4\), float32 \(1, 4\)"),
    (TwoInTraining, r"to return logits .* got tuple of float32 \(2, 4\), float32 \(2, 4\)"),
    (
        Asserts,
        r"to take images .* got Asserts, which raises AssertionError: wrong image size .*\(.*test_checks\.py:\d+\)",
    ),
    (
        RaisesInTraining,
        r"to train on images .* got RaisesInTraining, which raises KeyError: 'none' \(.*test_checks\.py:\d+\)",
    ),
    (RaisesBackwards, "to train on images .* got RaisesBackwards, which raises RuntimeError: .* inplace operation"),
    (Labels, r"to give logits as precise as the examples' torch\.float32, got Labels with torch\.int64"),
    (Half, r"to give logits as precise as the examples' torch\.float32, got Half with torch\.float16"),
    (Nan, "to give finite logits, got Nan with NaN or infinity"),
    (Complex, "to have real parameters, got Complex with turn of complex64"),
    (frozen, "to have parameters that train, got Plain with 6, none of them"),
    (
        lambda: nn.Sequential(nn.Flatten(), nn.AdaptiveAvgPool1d(NUM_CLASSES)),
        "to have parameters that train, got Sequential with 0",
    ),
]


@pytest.mark.parametrize(("network", "message"), REFUSED)
def test_a_network_that_cannot_be_right_is_refused_in_a_line(network: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^Expected `model` {message}") as refused:
        federation(method={"model": network()})
    assert len(str(refused.value).splitlines()) == 1


def test_networks_that_cannot_be_copied_or_have_no_weights_are_refused_too() -> None:
    with pytest.raises(
        ValueError, match="Expected FedAvg to be a module that can be copied, got one that raises TypeError"
    ):
        federation(method={"model": Open()})
    with pytest.raises(
        ValueError, match=r"Expected `model` to have weights, got Plain with model\..* on the meta device"
    ):
        federation(method={"model": Plain().to("meta")})


class Caches(Plain):
    """Keeps what it has computed, as ``torch.nn.utils.spectral_norm`` does: a plain copy would be refused by torch."""

    def forward(self, images: Tensor) -> Any:
        self.last = self.logits(images)
        return self.last


@pytest.mark.parametrize("algorithm", [FedAvg, Moon])
def test_networks_that_keep_what_they_have_computed_are_copied(algorithm: Any) -> None:
    network = Caches()
    network(torch.zeros(2, 1, 8, 8))
    run = federation(algorithm, method={"model": network}, client_fraction=1.0)
    run.run()
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
@pytest.mark.parametrize("network", [Pair, AuxInTraining])
def test_networks_that_wrap_their_logits_train_as_those_that_do_not(network: type[Plain], differentiation: str) -> None:
    rows = []
    for kind in (Plain, network):
        torch.manual_seed(0)
        run = federation(FedAMM, method={"model": kind(), "differentiation": differentiation})
        rows.append(run.run())
        assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    assert rows[0] == rows[1]


@pytest.mark.parametrize("algorithm", USES_FEATURES)
def test_methods_that_use_features_take_wrapped_logits_too(algorithm: Any) -> None:
    run = federation(algorithm, method={"model": AuxInTraining()}, client_fraction=1.0)
    run.run()
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)


class Scaled(Plain):
    def forward(self, images: Tensor) -> Any:
        return 3 * self.logits(images)


@pytest.mark.parametrize("algorithm", USES_FEATURES)
def test_methods_that_use_features_refuse_logits_that_no_linear_layer_gives(algorithm: Any) -> None:
    with pytest.raises(
        ValueError, match=r"the output of a linear layer, got Scaled, whose .*\(its linear layers: body\.1, head\)"
    ):
        federation(algorithm, method={"model": Scaled()})


class HeadFirst(Plain):
    """Registers its head before a layer of the same shape, which training alone uses."""

    def __init__(self) -> None:
        super().__init__()
        self.aux = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor) -> Any:
        hidden = self.body(images)
        return {"logits": self.head(hidden), "aux": self.aux(hidden)}


def test_the_classifier_is_not_the_layer_that_was_registered_last() -> None:
    run = federation(CReFF, method={"model": HeadFirst()}, client_fraction=1.0)
    run.run()
    deployed = run.server.module.deployed(run.state.shared)
    assert torch.equal(deployed["model.head.weight"], run.state.shared["retrained.weight"])
    assert torch.equal(deployed["model.aux.weight"], run.state.shared["model.aux.weight"])
    module = make(FedETF, tiny_data(), model=HeadFirst())
    assert type(module.model.head).__name__ == "ETFHead"
    assert isinstance(module.model.aux, nn.Linear)


def tied() -> nn.Module:
    network = Plain()
    network.body[1], network.body[2], network.head = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, NUM_CLASSES)
    network.body[2].weight = network.body[1].weight
    return network


def partly_frozen() -> nn.Module:
    network = Plain()
    network.body[1].requires_grad_(False)
    return network


def lazy() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.Linear(8, NUM_CLASSES))


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
@pytest.mark.parametrize("network", [tied, partly_frozen, lazy])
def test_tied_partly_frozen_and_lazy_networks_train(network: Callable[[], nn.Module], algorithm: Any) -> None:
    run = federation(algorithm, method={"model": network(), "lr": 0.05})
    before = dict(run.state.shared)
    run.run()
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    after = run.state.shared
    assert all(not torch.equal(after[name], before[name]) for name in list(after)[-2:])
    if network is tied:
        assert torch.equal(after["model.body.1.weight"], after["model.body.2.weight"])
    if network is partly_frozen:
        assert torch.equal(after["model.body.1.weight"], before["model.body.1.weight"])


def test_checks_leave_buffers_attributes_and_random_numbers_alone() -> None:
    class Counts(Plain):
        calls = 0

        def forward(self, images: Tensor) -> Any:
            self.calls += 1
            return super().forward(images)

    data, network = tiny_data(), Counts()
    data.setup()
    module = make(FedAvg, data, model=network)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random = torch.get_rng_state()
    run = Orchestrator(module, data, num_rounds=1)
    assert torch.equal(torch.get_rng_state(), random)
    assert network.calls == 0
    for held in (module, run.server.module):
        assert all(torch.equal(value, before[name]) for name, value in held.state_dict().items())
        assert all(value.grad is None for value in held.parameters())
        assert held.model.calls == 0


def test_a_network_that_was_given_compiled_has_the_names_of_the_network_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []

    class Compiled(nn.Module):
        """As torch's is: a module around the network."""

        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self._orig_mod = network
            compiled.append(network)

        def forward(self, images: Tensor) -> Any:
            return self._orig_mod(images)

    monkeypatch.setattr(torch, "compile", Compiled)
    network = Plain()
    module = make(FedAvg, tiny_data(), model=torch.compile(network))
    assert module.model is network
    assert module.compiled is not None
    assert [name for name in module.state_dict() if "_orig_mod" in name] == []
    run = Orchestrator(module, tiny_data(), num_rounds=1, local_epochs=1)
    assert run.server.module.compiled is not None
    run.run()
    assert len(compiled) > 1  # its copies too
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
