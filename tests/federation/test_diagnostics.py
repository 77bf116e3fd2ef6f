"""What figures show beside the metrics: tallies of clients, added up by the server, and what the method makes of them."""

import numpy as np
import pytest
import torch
from torch import nn

from fedamm_pl import FedAMM
from fedamm_pl.algorithms.fedamm import LOSS_GRID
from fedamm_pl.federation.executors import RunSpec, Sequential
from fedamm_pl.protocol.messages import Broadcast, ClientResult, ClientTask
from fedamm_pl.seeding import derive_seed
from tests.federation.small import federation, make, spec
from tests.tiny import tiny_data


def results(epochs: int = 2) -> tuple[RunSpec, list[ClientResult]]:
    """What the clients of the first round of a federation return."""
    data = tiny_data()
    described = spec(make(FedAMM, data, differentiation="forward"), data)
    tasks = [ClientTask(client, derive_seed(0, "client", 1, client)) for client in range(4)]
    with Sequential().open(described) as runner:
        found = list(runner.run(Broadcast(1, epochs, described.module.shared_state()), tasks, lambda client: {}))
    assert all(isinstance(one, ClientResult) for one in found)
    return described, found  # type: ignore[return-value]


def test_tallies_count_each_example_of_the_last_epoch_once() -> None:
    described, found = results()
    for result in found:
        assert result.tallies["examples"].tolist() == described.data.client_class_counts[result.client_id].tolist()
        assert float(result.tallies["losses"].sum()) == result.num_examples
        # relative weights have mean 1 in each batch, whatever the weight net
        assert float(result.tallies["weights"].sum()) == pytest.approx(result.num_examples)
        assert not torch.allclose(result.tallies["weights"], result.tallies["examples"])


def test_diagnostics_are_sums_over_the_clients() -> None:
    _, found = results(epochs=1)
    run = federation(FedAMM, num_rounds=1, client_fraction=1.0)
    run.run()
    weights, examples, losses = (
        sum(result.tallies[name] for result in found) for name in ("weights", "examples", "losses")
    )
    row = run.state.diagnostics[-1]
    expected = [float(w / n) if n else None for w, n in zip(weights, examples, strict=True)]  # type: ignore[arg-type]
    assert row["weight_per_class"] == pytest.approx(expected)
    assert row["loss_histogram"] == pytest.approx((losses / losses.sum()).tolist())  # type: ignore[union-attr]
    assert isinstance(run.module, FedAMM)
    with torch.no_grad():
        assert row["weight_curve"] == pytest.approx(run.module.weight_net(torch.tensor(LOSS_GRID)).tolist())


def test_a_constant_weight_net_gives_every_class_the_weight_1() -> None:
    run = federation(FedAMM, num_rounds=1)
    assert isinstance(run.server.module, FedAMM)
    nn.init.zeros_(run.server.module.weight_net.layers[2].weight)  # type: ignore[arg-type]
    run.state.shared = run.server.module.shared_state()
    run.run()
    seen = [weight for weight in run.state.diagnostics[-1]["weight_per_class"] if weight is not None]
    assert seen == pytest.approx([1.0] * len(seen))


def test_losses_fall_into_the_bins_of_numpy() -> None:
    module = make(FedAMM, tiny_data())
    losses = torch.tensor([0.0, 0.2499, 0.25, 0.26, 3.0, 9.99, 10.0, 25.0])
    module._seen = [(torch.zeros(8, dtype=torch.int64), losses, torch.ones(8))]
    edges = [*LOSS_GRID, np.inf]
    assert module.tallies()["losses"].tolist() == np.histogram(losses.numpy(), edges)[0].tolist()


def test_a_class_that_no_client_holds_has_no_weight() -> None:
    module = make(FedAMM, tiny_data())
    tallies = {
        "weights": torch.tensor([2.0, 0, 3, 0]),
        "examples": torch.tensor([1.0, 0, 2, 0]),
        "losses": torch.ones(len(LOSS_GRID)),
    }
    assert module.diagnostics(tallies)["weight_per_class"] == [2.0, None, 1.5, None]
    assert set(module.diagnostics({})) == {"weight_curve"}
