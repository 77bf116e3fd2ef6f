"""The meta mapping of several clients at once is that of each by itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl.algorithms.meta import meta_gradient, virtual_step
from fedamm_pl.algorithms.meta.together import meta_gradients, unstacked, virtual_steps
from fedamm_pl.algorithms.meta.virtual_steps import Differentiation, Tensors
from fedamm_pl.data.client import Batch
from fedamm_pl.models import SmallCNN, WeightNet
from fedamm_pl.models.masked import padded
from tests.tiny import tiny_resnet

LR = 0.1
SIZES = [8, 5, 1, 8, 3]


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


def frozen() -> nn.Module:
    """A ResNet whose first layer does not train, and one of whose BatchNorm layers is in evaluation mode."""
    model = tiny_resnet(4, 1)
    model.conv1.weight.requires_grad_(False)
    model.bn1.eval()
    return model


def problem(
    network: Callable[[], nn.Module], sizes: list[int]
) -> tuple[nn.Module, nn.Module, list[Batch], list[Batch]]:
    """A float64 network in training mode, a weight net, and support and meta batches of clients."""
    torch.manual_seed(0)
    model, weight_net = network().double(), WeightNet(8).double()
    with torch.no_grad():  # away from the flat start, so that h is not tiny
        for parameter in weight_net.parameters():
            parameter.mul_(2)
        for part in model.modules():
            if isinstance(part, nn.BatchNorm2d) and part.running_var is not None:
                part.running_var.uniform_(0.5, 2)

    def batch(size: int) -> Batch:
        return torch.randn(size, 1, 8, 8, dtype=torch.float64), torch.randint(4, (size,))

    return model, weight_net, [batch(size) for size in sizes], [batch(8) for _ in sizes]


def together(
    model: nn.Module, weight_net: nn.Module, supports: list[Batch], metas: list[Batch]
) -> list[tuple[Tensors, Tensors, Tensor, Tensors]]:
    images, labels, present, _ = padded(supports)
    steps = virtual_steps(model, weight_net, images, labels, present, LR)
    gradients, losses = meta_gradients(model, steps.params, *(torch.stack(part) for part in zip(*metas, strict=True)))
    found = steps.weight_net_gradients(gradients)
    return list(zip(unstacked(steps.params), unstacked(gradients), losses, unstacked(found), strict=True))


@pytest.mark.parametrize("sizes", [SIZES, [6, 6, 6], [1, 1], [4]], ids=str)
@pytest.mark.parametrize("differentiation", ["functional", "forward"])
@pytest.mark.parametrize("network", [lambda: tiny_resnet(4, 1), lambda: SmallCNN(4, 1), frozen, mlp])
def test_each_client_gets_what_it_would_get_alone(
    network: Callable[[], nn.Module], differentiation: Differentiation, sizes: list[int]
) -> None:
    model, weight_net, supports, metas = problem(network, sizes)
    found = together(model, weight_net, supports, metas)
    for (params, gradient, loss, h), support, meta in zip(found, supports, metas, strict=True):
        step = virtual_step(model, weight_net, support, LR, differentiation)
        expected, expected_loss = meta_gradient(model, step.params, meta)
        expected_h = step.weight_net_gradient(expected)
        torch.testing.assert_close(params, step.params, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(h, expected_h, rtol=1e-9, atol=1e-9)
        # the one weight of a single example is 1, whatever v is
        assert len(support[1]) == 1 or max(float(value.abs().max()) for value in expected_h.values()) > 1e-5
