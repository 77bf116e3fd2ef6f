"""A network that a way to differentiate is not right for, in a federation: seen before the first round, the same everywhere."""

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from fedamm_pl import FedAMM
from fedamm_pl.federation.executors import Processes
from tests.federation.small import assert_equal, federation
from tests.one_round import Round
from tests.tiny import tiny_data


class Reentrant(nn.Module):
    """Blocks whose backward pass knows no other leaves."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64 * in_channels, 8), nn.Linear(8, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        return checkpoint(self.last, self.first(images.flatten(1)), use_reentrant=True)


def new_weight_norm(num_classes: int, in_channels: int) -> nn.Module:
    """Right for higher, and without forward mode."""
    layer = parametrizations.weight_norm(nn.Linear(64 * in_channels, 8))
    return nn.Sequential(nn.Flatten(), layer, nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, num_classes))


def hooked(num_classes: int, in_channels: int) -> nn.Module:
    """Right for forward mode, and without its hook for higher."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64 * in_channels, 8), nn.ReLU(), nn.Linear(8, num_classes))
    network[1].register_forward_hook(lambda part, inputs, output: output * part.weight.sum().exp())
    return network


def run(network: str, way: str, meta_update: str = "asynchronous", **options: Any) -> dict[str, Tensor]:
    method = {"model": f"tests.federation.test_differentiation.{network}", "differentiation": way, "meta_lr": 1.0}
    orchestrator = federation(FedAMM, method={**method, "meta_update": meta_update}, **options)
    orchestrator.run()
    return orchestrator.state.shared


@pytest.mark.parametrize("meta_update", ["asynchronous", "synchronous"])
@pytest.mark.parametrize(("network", "way"), [("new_weight_norm", "forward"), ("hooked", "higher")])
def test_functional_is_taken_and_said_once(
    network: str, way: str, meta_update: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "fedamm_pl"):
        actual = run(network, way, meta_update)
    said = [record.getMessage() for record in caplog.records if "is not right for" in record.getMessage()]
    assert len(said) == 1
    assert said[0].startswith(f"differentiation {way} is not right for Sequential (")
    assert said[0].endswith("): functional is taken instead")
    assert_equal(actual, run(network, "functional", meta_update))


def test_another_process_makes_the_same_choice() -> None:
    expected = run("new_weight_norm", "functional")
    assert_equal(run("new_weight_norm", "forward", executor=Processes(1, threads_per_worker=1)), expected)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # in a pass without gradients
@pytest.mark.parametrize("way", ["higher", "functional", "forward"])
def test_a_network_that_no_way_is_right_for_is_refused_before_the_first_round(way: str) -> None:
    with pytest.raises(ValueError, match=f"differentiation {way} is right for, got Reentrant: When use_reentrant=True"):
        federation(FedAMM, method={"model": "tests.federation.test_differentiation.Reentrant", "differentiation": way})


@pytest.mark.parametrize("way", ["higher", "functional", "forward"])
def test_the_check_leaves_module_and_draws_as_they_were(way: str) -> None:
    module = federation(FedAMM, method={"model": "tests.federation.test_differentiation.new_weight_norm"}).module
    module.model.eval()
    module.hparams["differentiation"] = way
    before, states = module.shared_state(), torch.get_rng_state()
    module.check((torch.zeros(8, 1, 8, 8, dtype=torch.uint8).random_(generator=torch.Generator()), torch.arange(8) % 4))
    assert_equal(module.shared_state(), before)
    assert torch.equal(torch.get_rng_state(), states)
    assert not any(part.training for part in module.model.modules())
    assert all(parameter.grad is None for parameter in module.parameters())


class Scheduled(FedAMM):
    """Adds a scheduler, as one would to another method."""

    def configure_optimizers(self) -> Any:
        optimizers = super().configure_optimizers()
        return optimizers, [torch.optim.lr_scheduler.StepLR(optimizers[0], 1)]


def test_a_scheduler_that_nothing_would_step_is_refused() -> None:
    data = tiny_data()
    here = Round(Scheduled(4, 1, hooked(4, 1), info=data.info), data)
    with pytest.raises(ValueError, match="to return no LR scheduler, which nothing would step, got StepLR"):
        here.train(0)
