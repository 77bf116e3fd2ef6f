"""Every kind of network: the gradients are right in all three ways, or the way is refused by name."""

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.meta import meta_gradient, virtual_step
from fedamm_pl.algorithms.meta.suited import fault
from fedamm_pl.algorithms.meta.virtual_steps import Differentiation
from fedamm_pl.models import WeightNet
from tests.algorithms.networks import NETWORKS, NUM_CLASSES, REFUSED, SIZE

LR, EPSILON, SEED = 0.5, 1e-5, 5
WAYS: list[Differentiation] = ["higher", "functional", "forward"]
Batch = tuple[Tensor, Tensor]


@pytest.fixture(autouse=True)
def old_parametrizations() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*weight_norm.* is deprecated")
        yield


def batch(seed: int, size: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 1, SIZE, SIZE, generator=generator, dtype=torch.float64)
    return images, torch.arange(size) % NUM_CLASSES


SUPPORT, META = batch(1, 6), batch(2, 8)


def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, WeightNet]:
    torch.manual_seed(0)
    model, weight_net = make().double(), WeightNet(2).double()
    for parameter in weight_net.parameters():
        parameter.data.copy_(torch.rand_like(parameter))  # no dead unit
    return model, weight_net


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def seed_all() -> None:
    torch.manual_seed(SEED)
    random.seed(SEED)
    np.random.seed(SEED)  # noqa: NPY002  the global state is what networks draw from


@contextmanager
def from_one_state(model: nn.Module) -> Iterator[None]:
    """Let all passes start from the same random numbers and buffers, and leave these as they are."""
    seed_all()
    before = [(part, name, value) for part in model.modules() for name, value in part._buffers.items()]
    for part, name, value in before:
        part._buffers[name] = None if value is None else value.clone()
    yield
    for part, name, value in before:
        part._buffers[name] = value


def losses_of(model: nn.Module, batch: Batch) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def dot(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    return sum(float((left[name].conj() * right[name]).real.sum()) for name in left)


def stepped(model: nn.Module, weight_net: nn.Module) -> dict[str, Tensor]:
    """w_hat as a training step with torch alone would take it."""
    params = trainable(model)
    with from_one_state(model):
        losses = losses_of(model, SUPPORT)
        weights = weight_net(losses)
        loss = (weights / weights.sum() * losses).sum()
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return {name: (value - LR * grad).detach() for (name, value), grad in zip(params.items(), grads, strict=True)}


def made_up_gradient(model: nn.Module) -> dict[str, Tensor]:
    """A meta gradient at w, with the zeros that the network's own has."""
    params = trainable(model)
    with from_one_state(model):
        loss = losses_of(model, META).mean()
        grads = torch.autograd.grad(loss, list(params.values()), materialize_grads=True)
    return dict(zip(params, grads, strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", NETWORKS)
def test_weight_net_gradient_is_right_or_the_way_is_refused(name: str, way: Differentiation) -> None:
    make, unsuited = NETWORKS[name]
    model, weight_net = built(make)
    states = torch.get_rng_state(), copy.deepcopy(dict(model.state_dict())), getattr(model, "calls", None)
    if way in unsuited:
        with pytest.raises(ValueError, match=f"that differentiation {way} is right for, got {type(model).__name__}: "):
            virtual_step(model, weight_net, SUPPORT, LR, way)
        assert fault(model, SUPPORT, way)
    assert fault(model, SUPPORT, way if way not in unsuited else "functional") is None
    assert torch.equal(torch.get_rng_state(), states[0])
    assert getattr(model, "calls", None) == states[2]
    chosen = "functional" if way in unsuited else way

    seed_all()
    step = virtual_step(model, weight_net, SUPPORT, LR, chosen)
    expected = stepped(model, weight_net)
    torch.testing.assert_close(step.params, expected, rtol=1e-9, atol=1e-9)
    gradient = made_up_gradient(model)
    actual = step.weight_net_gradient(gradient)
    largest = 0.0
    for key, parameter in weight_net.named_parameters():
        for index in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                parameter.data.view(-1)[index] += sign * EPSILON
                values.append(dot(stepped(model, weight_net), gradient))
                parameter.data.view(-1)[index] -= sign * EPSILON
            difference = (values[0] - values[1]) / (2 * EPSILON)
            largest = max(largest, abs(difference))
            assert float(actual[key].view(-1)[index]) == pytest.approx(difference, rel=1e-4, abs=1e-9)
    assert largest > 1e-6
    torch.testing.assert_close(dict(model.state_dict()), states[1], rtol=0, atol=0)


@pytest.mark.parametrize("name", sorted(set(NETWORKS) - {"backward hook"}))  # which makes it no derivative
def test_meta_gradient_is_right_at_other_parameters_than_the_network_has(name: str) -> None:
    model, weight_net = built(NETWORKS[name][0])
    own = {key: value.detach().clone() for key, value in trainable(model).items()}
    # the vectors of a spectral norm are those of its own weight
    at = own if "spectral" in name else stepped(model, weight_net)
    before = copy.deepcopy(dict(model.state_dict()))
    seed_all()
    gradient, loss = meta_gradient(model, at, META)
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)

    def loss_at(params: dict[str, Tensor]) -> float:
        for key, parameter in trainable(model).items():
            parameter.data.copy_(params[key])
        with from_one_state(model), torch.no_grad():
            return float(losses_of(model, META).mean())

    assert float(loss) == pytest.approx(loss_at(at), rel=1e-12)
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = {key: torch.randn(value.shape, generator=generator, dtype=value.dtype) for key, value in at.items()}
        if name == "embedding":
            direction["words.weight"][0] = 0  # the padding has no gradient, by definition
        values = [
            loss_at({key: value + sign * EPSILON * direction[key] for key, value in at.items()}) for sign in (1, -1)
        ]
        assert dot(direction, gradient) == pytest.approx((values[0] - values[1]) / (2 * EPSILON), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_differentiated_twice_is_refused_in_one_line(name: str, way: Differentiation) -> None:
    make, reason = REFUSED[name]
    model, weight_net = built(make)
    with pytest.raises(
        ValueError, match=f"Expected `model` to be a network that differentiation {way} is right for"
    ) as caught:
        virtual_step(model, weight_net, SUPPORT, LR, way)
    assert re.search(reason, str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["weight norm, hooks", "checkpointed, BatchNorm and dropout", "attention", "forward hook"]
)
def test_ways_are_told_apart_in_short_precision_too(name: str, precision: torch.dtype) -> None:
    make, unsuited = NETWORKS[name]
    torch.manual_seed(0)
    model = make().to(precision)
    support = SUPPORT[0].to(precision), SUPPORT[1]
    assert {way for way in WAYS if fault(model, support, way)} == unsuited


def test_a_single_example_tells_too() -> None:
    one = SUPPORT[0][:1], SUPPORT[1][:1]
    assert fault(built(NETWORKS["plain"][0])[0], one, "higher") is None
    assert fault(built(NETWORKS["forward hook"][0])[0], one, "higher")


def test_a_network_that_has_diverged_tells_nothing_and_is_examined_again() -> None:
    model, _ = built(NETWORKS["forward hook"][0])
    bias = next(model.parameters()).data
    before = bias.clone()
    bias.fill_(float("nan"))
    assert fault(model, SUPPORT, "higher") is None
    bias.copy_(before)
    assert fault(model, SUPPORT, "higher")


def test_a_network_is_examined_once_unless_asked_anew() -> None:
    model, _ = built(NETWORKS["plain"][0])
    calls: list[int] = []
    assert fault(model, SUPPORT, "forward") is None
    model.body.register_forward_hook(lambda *_: calls.append(1))
    assert fault(model, SUPPORT, "forward") is None
    assert not calls
    assert fault(model, SUPPORT, "forward", anew=True) is None
    assert calls
