"""The accuracy of what clients have of their own: the numbers by hand, when they are there, and what goes wrong."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.algorithms import FedRoD
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.personal import class_accuracies, expected_accuracy
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.store import ClientStore
from fedamm_pl.federation.trainer import TrainerConfig
from tests.federation.small import federation
from tests.tiny import TinyData, tiny_data

NAMES = ("personal/acc", "personal/acc_global")


def skewed(**options: Any) -> TinyData:
    """Clients of one or two classes."""
    return tiny_data(num_clients=5, partition="by_shards", shards_per_client=1, **options)


def test_accuracies_by_hand() -> None:
    """Class 0: one of two, class 1: one of one, class 2: no image, class 3: none of two."""
    predicted, labels = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 0, 1, 3, 3])
    found = class_accuracies(torch.eye(4)[predicted], labels)
    torch.testing.assert_close(found, torch.tensor([0.5, 1, torch.nan, 0]).double(), equal_nan=True)
    # 6 of class 0, 2 of class 1, 2 of class 3; those of class 2 have no test images
    mean = expected_accuracy(torch.stack([found, torch.ones(4).double()]), torch.tensor([6, 2, 100, 2]))
    torch.testing.assert_close(mean, torch.tensor([0.5, 1.0]).double())
    assert expected_accuracy(found, torch.tensor([0, 0, 3, 0])).isnan()


def by_hand(run: Orchestrator) -> tuple[float, float]:
    """Weigh each test image by the client's share of its class over the test images of the class."""
    module, data = run.server.module.eval(), run.data
    images, labels = data.images.test_images, data.images.test_labels
    with torch.no_grad():
        network = module.model
        features: list[Tensor] = []
        handle = network.classifier.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        logits = network(module.prepare(images))
        handle.remove()
    own, everyone = [], []
    for client in range(data.num_clients):
        counts = data.client_class_counts[client]
        share = [counts[c] / counts.sum() / int((labels == c).sum()) for c in labels.tolist()]
        version = run.state.kept.get(client)
        head = {} if version is None else run._store.read(client, version)
        q = logits + features[0] @ head["own.weight"].T + head["own.bias"] if head else logits
        hits = (q.argmax(1) == labels).tolist()
        own.append(sum(weight for weight, hit in zip(share, hits, strict=True) if hit))
        hits = (logits.argmax(1) == labels).tolist()
        everyone.append(sum(weight for weight, hit in zip(share, hits, strict=True) if hit))
    return sum(own) / len(own), sum(everyone) / len(everyone)


def test_each_row_has_them_and_they_are_what_one_computes_by_hand() -> None:
    data = skewed()
    run = federation(FedRoD, data, {"lr": 0.05}, num_rounds=3, client_fraction=0.4, local_epochs=2)
    history = run.run()
    assert len(run.state.kept) < 5  # who has not taken part has the shared logits
    assert all(set(NAMES) <= row.keys() for row in history)
    assert history[0]["personal/acc"] == history[0]["personal/acc_global"]
    assert [history[-1][name] for name in NAMES] == pytest.approx(by_hand(run), abs=1e-12)
    assert history[-1]["personal/acc"] > history[-1]["personal/acc_global"]
    assert not any(value.any() for value in run.server.module.personal_state().values())


def test_methods_without_such_clients_have_none() -> None:
    assert not any(name.startswith("personal/") for row in federation(FedAvg).run() for name in row)


def test_on_a_resume_they_are_the_same(tmp_path: Path) -> None:
    data = skewed()

    def run(num_rounds: int, **options: Any) -> Any:
        return federation(FedRoD, data, num_rounds=num_rounds, client_fraction=0.4, **options).run()

    whole = run(3)
    run(1, output_dir=tmp_path / "run")
    assert run(3, output_dir=tmp_path / "run") == whole
    header = (tmp_path / "run/metrics.csv").read_text().splitlines()[0]
    assert set(NAMES) <= set(header.split(","))


class Spoiling(FederationCallback):
    """Spoils, before the evaluation, what a client has kept in the round; ``store`` has it."""

    store: ClientStore

    def __init__(self, kind: str) -> None:
        self.kind, self.spoiled = kind, False

    def on_client_end(self, run: Run, result: Any) -> None:
        if self.spoiled:
            return
        self.spoiled, read = True, self.store.read
        if self.kind == "odd":
            odd = {"own.weight": torch.zeros(1), "own.bias": torch.zeros(1)}
            self.store.write(result.client_id, run.state.round_num + 1, odd)
            return

        def without(client: int, version: int) -> dict[str, Tensor]:
            if client == result.client_id:
                raise OSError("it is gone")
            return read(client, version)

        self.store.read = without  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", ["lost", "odd"])
def test_a_client_whose_state_cannot_be_used_is_left_out_and_named(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    spoiling = Spoiling(kind)
    run = federation(FedRoD, skewed(), num_rounds=1, callbacks=[spoiling])
    spoiling.store = run._store
    with caplog.at_level(logging.WARNING):
        row = run.run()[-1]
    assert set(NAMES) <= row.keys()
    assert sum("is left out of personal/acc: " in record.getMessage() for record in caplog.records) == 1


def test_a_callback_cannot_take_their_names() -> None:
    class Claiming(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            run.log("personal/mine", 1.0)

    with pytest.raises(ValueError, match="Expected `name` to be new in the row of the round, got personal/mine"):
        federation(FedAvg, callbacks=[Claiming()]).run()


def test_they_are_measured_in_half_precision_too() -> None:
    for precision in ("bf16-mixed", "bf16-true"):
        trainer = TrainerConfig(accelerator="cpu", precision=precision)  # type: ignore[arg-type]
        row = federation(FedRoD, skewed(), trainer=trainer).run()[-1]
        assert 0 < row["personal/acc"] <= 1
