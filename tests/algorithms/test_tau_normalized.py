"""tau-normalisation: the rows, the limit of tau 0, and tau chosen on the server's balanced images."""

from typing import Any

import pytest
import torch
from torch import nn

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.algorithms import TauNormalized
from fedamm_pl.algorithms.tau_normalized import normalized_rows
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data


def make(data: TinyData, kind: type[Any] = TauNormalized, **options: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))
    return kind(NUM_CLASSES, 1, network, lr=0.05, info=data.info, **options)


def test_rows_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.25], [0.0, 0.0]], dtype=torch.float64)
    assert normalized_rows(weight, 1.0).tolist() == [[0.6, 0.8], [0.0, 1.0], [0.0, 0.0]]
    assert normalized_rows(weight, 2.0).tolist() == [[0.12, 0.16], [0.0, 4.0], [0.0, 0.0]]
    half = [[3 / 5**0.5, 4 / 5**0.5], [0.0, 0.5], [0.0, 0.0]]
    torch.testing.assert_close(normalized_rows(weight, 0.5), torch.tensor(half).double(), rtol=1e-7, atol=0)
    assert torch.equal(normalized_rows(weight, 0.0), weight)


def test_with_tau_0_it_is_fedavg_without_the_bias() -> None:
    data = tiny_data()
    runs = []
    for kind, options in ((TauNormalized, {"tau": 0.0}), (FedAvg, {})):
        runs.append(Orchestrator(make(data, kind, **options), data, num_rounds=2, local_epochs=1, trainer=CPU))
        runs[-1].run()
    mine, theirs = (run.module.shared_state() for run in runs)
    assert theirs["model.3.bias"].all()
    assert not mine.pop("model.3.bias").any()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


class Columns(nn.Module):
    """The mean of each class's column, and a classifier whose first row is longer than the others, as of a frequent class."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(NUM_CLASSES, NUM_CLASSES)
        with torch.no_grad():
            self.head.weight.copy_(torch.diag(torch.tensor([10.0, 1.0, 1.0, 1.0])))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.head(self.features(images))
        return result

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return 4 + images[:, 0, :, ::2].mean(1)


def test_tau_is_the_one_that_is_best_on_the_balanced_images() -> None:
    data = tiny_data(num_meta_per_class=10)
    one = Round(TauNormalized(NUM_CLASSES, 1, Columns(), info=data.info, tau=None), data)
    state = one.server.calibrated(one.state, [])
    module, right = one.module(), []
    for tau in range(21):
        rows = torch.stack([row / row.norm() ** (tau / 10) for row in module.model.head.weight.detach()])
        found = 0
        for draw in range(10):
            images, labels = one.server.session.meta(draw)
            features = module.model.features(module.prepare(images))
            found += int(((features @ rows.T).argmax(1) == labels).sum())
        right.append(found)
    best = right.index(max(right))
    assert best > 0
    assert max(right) > right[0]
    torch.testing.assert_close(
        state["calibrated.model.head.weight"], normalized_rows(one.state["model.head.weight"], best / 10)
    )
    assert not state["calibrated.model.head.bias"].any()


def test_balanced_images_are_needed_to_choose_alone() -> None:
    data = tiny_data(num_meta_per_class=0)
    assert not make(data).uses_meta_set
    Orchestrator(make(data), data, num_rounds=1, trainer=CPU)
    with pytest.raises(ValueError, match="`num_meta_per_class` to be 1 or more for TauNormalized"):
        Orchestrator(make(data, tau=None), data, num_rounds=1, trainer=CPU)


def test_rows_beyond_float32_leave_the_trained_model(caplog: pytest.LogCaptureFixture) -> None:
    data = tiny_data()
    module = make(data, tau=10.0)
    with torch.no_grad():
        module.model[3].weight *= 1e-5
    run = Orchestrator(module, data, num_rounds=1, local_epochs=1, trainer=CPU)
    module.hparams["lr"] = 1e-9
    run.server.module.hparams["lr"] = 1e-9
    run.run()
    assert "its calibration failed: the server's update made calibrated.model.3.weight NaN or infinite" in caplog.text
    assert torch.equal(run.module.shared_state()["model.3.weight"], run.state.shared["model.3.weight"])
