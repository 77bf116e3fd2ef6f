"""FedRS against NumPy and a bare torch loop, and where it must be FedAvg."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fedamm_pl.algorithms import FedAvg, FedRS
from fedamm_pl.algorithms.fedrs import Scaling, restricted_scales
from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.seeding import derive_seed
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
LR, DECAY = 0.1, 5e-4
SCALINGS: list[Scaling] = ["missing", "frequency"]


def make(algorithm: Any, data: TinyData, **options: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, NUM_CLASSES))
    return algorithm(NUM_CLASSES, 1, network, lr=LR, momentum=0.0, weight_decay=DECAY, info=data.info, **options)


class FewClasses(TinyData):
    """Each client has examples of the first classes alone."""

    num_held = 2

    def client(self, client_id: int) -> ClientData:
        found = super().client(client_id)
        return dataclasses.replace(found, indices=found.indices[found.labels[found.indices] < self.num_held])


class OneClass(FewClasses):
    """Of the first alone."""

    num_held = 1


def few_classes(kind: type[FewClasses] = FewClasses) -> TinyData:
    return kind("tiny", num_clients=2, num_meta_per_class=2, partition="iid", imbalance_factor=0.5, batch_size=16)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("counts", [[9, 3, 0, 1], [0, 0, 7, 0], [2, 2, 2, 2]])
def test_scales_equal_numpy(counts: list[int], alpha: float) -> None:
    n = np.array(counts)
    expected = {"missing": np.where(n > 0, 1.0, alpha), "frequency": alpha + (1 - alpha) * n / n.max()}
    for scaling in SCALINGS:
        found = restricted_scales(torch.tensor(counts), alpha, scaling)
        assert found.dtype == torch.float32
        assert found.tolist() == pytest.approx(expected[scaling].tolist(), rel=1e-6)


def test_scales_without_any_example_are_finite() -> None:
    for scaling in SCALINGS:
        assert restricted_scales(torch.zeros(3, dtype=torch.int64), 0.5, scaling).tolist() == [0.5] * 3


@pytest.mark.parametrize("scaling", SCALINGS)
def test_a_client_takes_the_steps_of_a_bare_loop(scaling: Scaling) -> None:
    data, alpha = few_classes(), 0.25
    one = Round(make(FedRS, data, alpha=alpha, scaling=scaling), data, DOUBLE, local_epochs=2)
    for client in range(data.num_clients):
        module = make(FedAvg, data).double()
        n = data.client(client).class_counts(NUM_CLASSES).numpy()
        assert (n == 0).sum() == 2
        scales = np.where(n > 0, 1.0, alpha) if scaling == "missing" else alpha + (1 - alpha) * n / n.max()
        optimizer = torch.optim.SGD(module.model.parameters(), LR, weight_decay=DECAY)
        loader = data.client(client).train_loader(derive_seed(0, "client", 1, client))
        for _ in range(2):
            for images, labels in loader:
                optimizer.zero_grad()
                functional.cross_entropy(torch.from_numpy(scales) * module(images), labels).backward()
                optimizer.step()
        torch.testing.assert_close(one.train(client).payload, module.shared_state(), rtol=1e-6, atol=1e-8)


def moved(alpha: float, data: TinyData) -> Tensor:
    """How far a client moves each row of the classifier, without weight decay."""
    module = make(FedRS, data, alpha=alpha)
    module.hparams["weight_decay"] = 0.0
    one = Round(module, data, DOUBLE)
    before, after = one.broadcast.payload["model.3.weight"], one.train(0).payload["model.3.weight"]
    return (after - before).norm(dim=1)


def test_the_rows_of_missing_classes_move_less_and_with_alpha_0_not_at_all() -> None:
    data = few_classes()
    held = data.client(0).class_counts(NUM_CLASSES) > 0
    full, half, none = (moved(alpha, data) for alpha in (1.0, 0.5, 0.0))
    assert (full > 0).all()
    assert (half[~held] < 0.7 * full[~held]).all()
    assert not none[~held].any()
    assert (none[held] > 0).all()


def test_a_client_with_all_classes_is_fedavg_bit_for_bit_under_missing_alone() -> None:
    data = tiny_data(partition="iid", imbalance_factor=0.5)
    payloads = [
        Round(make(algorithm, data, **options), data).train(0).payload
        for algorithm, options in ((FedAvg, {}), (FedRS, {}), (FedRS, {"scaling": "frequency"}))
    ]
    assert all(torch.equal(payloads[1][name], value) for name, value in payloads[0].items())
    assert not torch.equal(payloads[2]["model.3.weight"], payloads[0]["model.3.weight"])


def test_a_client_of_one_class_still_learns() -> None:
    data = few_classes(OneClass)
    one = Round(make(FedRS, data), data)
    payload = one.train(0).payload
    assert all(value.isfinite().all() for value in payload.values())
    assert not torch.equal(payload["model.3.weight"], one.broadcast.payload["model.3.weight"])


def test_it_is_evaluated_without_scales() -> None:
    data = few_classes()
    module = make(FedRS, data, alpha=0.0)
    plain = make(FedAvg, data)
    module.scales = torch.zeros(NUM_CLASSES)  # as a fit leaves them
    images = data.images.test_images[:5]
    assert torch.equal(module(images), plain(images))
