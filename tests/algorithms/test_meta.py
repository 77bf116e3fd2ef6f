"""The three ways to the weight-net gradient agree with each other and with finite differences."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedamm_pl.algorithms.meta import meta_gradient, virtual_step
from fedamm_pl.algorithms.meta.virtual_steps import Differentiation
from fedamm_pl.models import ResNetCIFAR, SmallCNN, WeightNet

LR = 0.1
Problem = tuple[nn.Module, WeightNet, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


def make_problem(network: str = "resnet") -> Problem:
    """Build a float64 network with BatchNorm, 6 support and 8 meta images of 8x8 pixels in 4 classes."""
    torch.manual_seed(0)
    model = ResNetCIFAR(4, 2, depth=8, width=4) if network == "resnet" else SmallCNN(4, 2)
    weight_net = WeightNet(8)
    with torch.no_grad():  # away from the flat start, so that h is not tiny
        for parameter in weight_net.parameters():
            parameter.mul_(2)
    support = torch.randn(6, 2, 8, 8, dtype=torch.float64), torch.randint(4, (6,))
    meta = torch.randn(8, 2, 8, 8, dtype=torch.float64), torch.arange(8) % 4
    return model.double(), weight_net.double(), support, meta


def weight_net_gradient(problem: Problem, differentiation: Differentiation) -> tuple[dict[str, Tensor], float]:
    model, weight_net, support, meta = problem
    step = virtual_step(model, weight_net, support, LR, differentiation)
    gradient, loss = meta_gradient(model, step.params, meta)
    return step.weight_net_gradient(gradient), float(loss)


def meta_loss_after_virtual_step(problem: Problem) -> Tensor:
    """The meta loss as a function of v, written with torch alone."""
    model, weight_net, (images, labels), (meta_images, meta_labels) = problem
    params = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    losses = nn.functional.cross_entropy(
        functional_call(model, {**params, **buffers}, images), labels, reduction="none"
    )
    weights = weight_net(losses)
    loss = (weights / weights.sum() * losses).sum()
    grads = torch.autograd.grad(loss, list(params.values()))
    stepped = {name: value - LR * grad for (name, value), grad in zip(params.items(), grads, strict=True)}
    return nn.functional.cross_entropy(functional_call(model, {**stepped, **buffers}, meta_images), meta_labels)


@pytest.mark.parametrize("network", ["resnet", "cnn"])
@pytest.mark.parametrize("differentiation", ["functional", "forward"])
def test_modes_agree_with_higher(differentiation: Differentiation, network: str) -> None:
    expected, expected_loss = weight_net_gradient(make_problem(network), "higher")
    actual, loss = weight_net_gradient(make_problem(network), differentiation)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    assert max(value.abs().max() for value in expected.values()) > 1e-4
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bias", [-20.0, -30.0, -45.0, -60.0, -80.0, -110.0])
@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_a_weight_net_that_has_gone_to_0_gives_no_nan(differentiation: Differentiation, bias: float) -> None:
    """Weights from 1e-9 to 1e-48: in float32 the square of their sum is 0 long before they are."""
    model, weight_net, (images, labels), (meta_images, meta_labels) = make_problem("cnn")
    nn.init.constant_(weight_net.last.bias, bias)
    small = model.float(), weight_net.float(), (images.float(), labels), (meta_images.float(), meta_labels)
    actual, loss = weight_net_gradient(small, differentiation)
    assert math.isfinite(loss)
    assert all(value.isfinite().all() for value in actual.values())
    if bias == -20.0:  # still normalised
        assert max(value.abs().max() for value in actual.values()) > 1e-4


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_gradient_equals_finite_differences(differentiation: Differentiation) -> None:
    problem = make_problem()
    actual, _ = weight_net_gradient(problem, differentiation)
    epsilon = 1e-5
    for name, parameter in problem[1].named_parameters():
        expected = torch.zeros_like(parameter)
        for index in range(parameter.numel()):
            values = []
            for sign in (1, -1):
                with torch.no_grad():
                    parameter.view(-1)[index] += sign * epsilon
                values.append(float(meta_loss_after_virtual_step(problem).detach()))
                with torch.no_grad():
                    parameter.view(-1)[index] -= sign * epsilon
            expected.view(-1)[index] = (values[0] - values[1]) / (2 * epsilon)
        torch.testing.assert_close(actual[name], expected, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_model_and_statistics_stay_untouched(differentiation: Differentiation) -> None:
    problem = make_problem()
    before = {name: value.clone() for name, value in problem[0].state_dict().items()}
    weight_net_gradient(problem, differentiation)
    torch.testing.assert_close(problem[0].state_dict(), before, rtol=0, atol=0)
    assert all(parameter.grad is None for part in problem[:2] for parameter in part.parameters())


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_params_are_one_plain_sgd_step(differentiation: Differentiation) -> None:
    model, weight_net, support, _ = make_problem()
    step = virtual_step(model, weight_net, support, LR, differentiation)
    losses = nn.functional.cross_entropy(model(support[0]), support[1], reduction="none")
    weights = weight_net(losses).detach()
    # V sees the losses with their graph: its slope is part of the gradient
    (slope,) = torch.autograd.grad((n := weight_net(x := losses.detach().requires_grad_())) @ x / n.sum(), x)
    assert not torch.allclose(slope, weights / weights.sum())
    losses.backward(slope)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    optimizer.step()
    torch.testing.assert_close(step.params, {name: value.detach() for name, value in model.named_parameters()})
    assert not any(value.requires_grad for value in step.params.values())


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_frozen_parameters_stay_out_of_the_step(differentiation: Differentiation) -> None:
    problem = make_problem()
    problem[0].conv1.weight.requires_grad_(False)
    step = virtual_step(problem[0], problem[1], problem[2], LR, differentiation)
    assert set(step.params) == {name for name, _ in problem[0].named_parameters()} - {"conv1.weight"}
    gradient, _ = meta_gradient(problem[0], step.params, problem[3])
    assert any(value.abs().max() > 1e-6 for value in step.weight_net_gradient(gradient).values())


def test_meta_gradient_uses_training_mode_and_restores_the_mode() -> None:
    model, _, _, meta = make_problem()
    params = dict(model.named_parameters())
    expected, _ = meta_gradient(model, params, meta)
    model.eval()
    actual, _ = meta_gradient(model, params, meta)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert not any(part.training for part in model.modules())


@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_constant_weight_net_has_no_effect_on_the_step(differentiation: Differentiation) -> None:
    model, weight_net, support, _ = make_problem()
    for parameter in weight_net.parameters():
        parameter.data.zero_()  # V = 1/2 everywhere
    step = virtual_step(model, weight_net, support, LR, differentiation)
    nn.functional.cross_entropy(model(support[0]), support[1]).backward()
    torch.optim.SGD(model.parameters(), lr=LR).step()
    torch.testing.assert_close(step.params, {name: value.detach() for name, value in model.named_parameters()})


class Attention(nn.Module):
    """One transformer layer over the rows of the images, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=8, dropout=0.3, batch_first=True)
        self.classifier = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.layer(images.transpose(1, 2).flatten(2)).mean(1))


def test_modes_agree_with_dropout_and_attention() -> None:
    _, weight_net, support, meta = make_problem()
    model = Attention().double()
    gradients = []
    for differentiation in ("higher", "functional", "forward"):
        torch.manual_seed(1)
        step = virtual_step(model, weight_net, support, LR, differentiation)  # type: ignore[arg-type]
        torch.manual_seed(2)
        gradient, _ = meta_gradient(model, step.params, meta)
        after = torch.random.get_rng_state()
        gradients.append(step.weight_net_gradient(gradient))
        assert torch.equal(torch.random.get_rng_state(), after)
    assert max(value.abs().max() for value in gradients[0].values()) > 1e-5
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=1e-9, atol=1e-9)


def test_unknown_mode_is_refused() -> None:
    model, weight_net, support, _ = make_problem()
    with pytest.raises(ValueError, match="`differentiation` to be higher, functional or forward, got 'backward'"):
        virtual_step(model, weight_net, support, LR, "backward")  # type: ignore[arg-type]
