"""Clients that train side by side keep apart: what their hooks change, what differs between them, and what goes wrong with one."""

import dataclasses
import random
from typing import Any, ClassVar

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from lightning_fabric.utilities import registry
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule
from fedamm_pl.federation.executors import Sequential, Vectorized
from fedamm_pl.federation.executors.isolation import Differing
from fedamm_pl.protocol.messages import State
from tests.federation.executors.test_vectorized import Uneven, assert_near, run
from tests.federation.small import federation, make, spec
from tests.tiny import NUM_CLASSES, tiny_data


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


def one(algorithm: type[FederatedModule], executor: Any, failed: int = 0, **options: Any) -> Any:
    """Three rounds in float64, of six clients of very different size, of whom so many fail."""
    torch.manual_seed(3)
    found = run(algorithm, executor, failed=failed, num_rounds=3, model=options.pop("model", mlp)(), **options)
    return found.state


def assert_same(algorithm: type[FederatedModule], failed: int = 0, **options: Any) -> None:
    """Check that a run is that of one client after the other, to rounding in float64."""
    found, expected = (one(algorithm, executor, failed, **options) for executor in (Vectorized(4), Sequential()))
    assert_near(found.shared, expected.shared, 1e-9)


class Keeping(FedAvg):
    """Clients pull towards their own last model, which they keep as an attribute; none has one in the first round."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        self.last = self.session.kept.get("bias")

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits if self.last is None else logits + self.last.to(logits), labels)

    def client_payload(self) -> State:
        assert self.session is not None
        payload = super().client_payload()
        self.session.kept = {"bias": payload["model.3.bias"]}
        return payload


class OwnHead(FedAvg):
    """Clients that write a head of their own into the network, from their second round on."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        if "head" in self.session.kept:
            self.model[3].weight.data.copy_(self.session.kept["head"])  # type: ignore[index,union-attr,operator]

    def client_payload(self) -> State:
        assert self.session is not None
        payload = super().client_payload()
        self.session.kept = {"head": payload["model.3.weight"]}
        return payload


class PersonalWeights(FedAvg):
    """A personal buffer that a client changes in place, beside the network, and its objective reads."""

    personal: ClassVar[tuple[str, ...]] = ("weights",)
    weights: Tensor

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("weights", torch.ones(NUM_CLASSES))

    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits, labels) * self.weights[labels]

    def client_payload(self) -> State:
        assert self.session is not None
        self.weights += self.session.data.class_counts(NUM_CLASSES) / 10
        return super().client_payload()


class HalfWay(FedAvg):
    """Client 0 has changed the network when it fails."""

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        if self.session.task.client_id == 0 and self.session.broadcast.round_num == 2:
            self.model[1].weight.data.mul_(5)  # type: ignore[index,union-attr,operator]
            raise RuntimeError("half way")


class WrongLabels(Uneven):
    """One client has a label that does not exist."""

    def client(self, client_id: int) -> Any:
        data = super().client(client_id)
        return dataclasses.replace(data, labels=data.labels + NUM_CLASSES) if client_id == 4 else data


@pytest.mark.parametrize("algorithm", [Keeping, OwnHead, PersonalWeights])
def test_what_a_client_has_to_itself_reaches_no_other(algorithm: type[FederatedModule]) -> None:
    assert_same(algorithm)


def test_a_client_that_fails_costs_its_own_result() -> None:
    assert_same(HalfWay, failed=1)
    assert_same(FedAvg, failed=3, kind=WrongLabels)


class Broken(Uneven):
    """The longest-running client cannot read its last batches, in round 2."""

    def client(self, client_id: int) -> Any:
        data = super().client(client_id)
        if client_id != 2:
            return data
        loader = data.train_loader

        def breaking(seed: int) -> Any:
            class Loader:
                def __len__(self) -> int:
                    return len(loader(seed))

                def __iter__(self) -> Any:
                    for step, batch in enumerate(loader(seed)):
                        if step > 5:
                            raise OSError("disk")
                        yield batch

            return Loader()

        object.__setattr__(data, "train_loader", breaking)
        return data


def test_a_client_whose_data_end_after_the_others_have_finished_is_lost_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert_same(FedAvg, failed=3, kind=Broken)
    assert "client 2 failed (data): OSError: disk" in caplog.text


def test_clients_that_cannot_train_side_by_side_in_a_round_are_said(caplog: pytest.LogCaptureFixture) -> None:
    one(Keeping, Vectorized(4))
    assert "round 1: " not in caplog.text
    assert caplog.text.count("round 2: ") == 1
    assert (
        "round 2: clients train one after the other, by a Trainer: AttributeError: last is not the same" in caplog.text
    )


class WarmUp(FedAvg):
    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits, labels) * (0.1 if self.current_epoch == 0 else 1.0)


class OfTheBatch(FedAvg):
    def objective(self, logits: Tensor, labels: Tensor) -> Tensor:
        return super().objective(logits - logits.mean(0), labels)


class Drops(nn.Sequential):
    """Leaves out a layer at times."""

    def forward(self, images: Tensor) -> Tensor:
        factor = 2 if np.random.random() + random.random() < 0.1 else 1  # noqa: NPY002
        return super().forward(images) * factor  # type: ignore[no-any-return]


class Tiny(Uneven):
    SIZES = (5, 2, 4, 5, 3, 4)


@pytest.mark.parametrize(
    ("algorithm", "options", "reason"),
    [
        (WarmUp, {}, "current_epoch"),
        (OfTheBatch, {"kind": Tiny}, "is not what a Trainer makes of it"),
        (FedAvg, {"model": lambda: Drops(*mlp())}, "draws random numbers .* by Python's random or NumPy"),
    ],
)
def test_what_would_go_wrong_unseen_is_refused(
    algorithm: type[FederatedModule], options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        one(algorithm, Vectorized(4), **options)


class TwoNames(nn.Module):
    """A layer that is in the network under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.classifier = self.net[3]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


class Unused(nn.Module):
    """A layer that is never used: a Trainer does not even let it decay."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.unused = mlp(), nn.Linear(3, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.net(images)
        return logits


@pytest.mark.parametrize("algorithm", [FedAvg, FedAMM])
@pytest.mark.parametrize("model", [TwoNames, Unused])
def test_networks_of_odd_shape(algorithm: type[FederatedModule], model: Any) -> None:
    assert_same(algorithm, model=model)


@pytest.mark.parametrize("use", [bool, len, iter, lambda x: x == 1, lambda x: x[0], lambda x: x.scale, lambda x: 2 * x])
def test_what_differs_between_clients_cannot_be_used(use: Any) -> None:
    with pytest.raises((AttributeError, TypeError)):
        use(Differing("scale"))


def test_nothing_to_compare_is_said(caplog: pytest.LogCaptureFixture) -> None:
    class Unreadable(Uneven):
        def client(self, client_id: int) -> Any:
            raise OSError("unreadable")

    data = Unreadable("tiny", num_clients=6, num_meta_per_class=2, imbalance_factor=0.5, batch_size=4)
    Vectorized().open(spec(make(FedAvg, data), data))
    assert "parallel clients could not be compared with a Trainer, which fails: OSError: unreadable" in caplog.text


def test_callbacks_that_another_package_plugs_in_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        name = "plug"

        @staticmethod
        def load() -> type[pl.Callback]:
            return pl.Callback

    monkeypatch.setattr(registry, "entry_points", lambda group: [Entry])
    data = tiny_data()
    with pytest.raises(ValueError, match="Callback, which another package has plugged into Lightning"):
        Vectorized().open(spec(make(FedAvg, data), data))


class StopsEarly(FedAvg):
    """Reads what it has measured, by Lightning's own means."""

    def on_train_epoch_end(self) -> None:
        super().on_train_epoch_end()
        assert float(self.trainer.callback_metrics["train/loss"]) > 0

    def configure_callbacks(self) -> Any:
        return [pl.callbacks.EarlyStopping("train/loss", check_on_train_epoch_end=True, min_delta=10.0, patience=1)]


def test_lightning_s_own_callbacks_read_the_means_of_a_client() -> None:
    found = federation(StopsEarly, local_epochs=5)
    found.run()
    assert found.state.counts["failed_clients"] == 0
