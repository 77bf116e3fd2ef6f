"""The three ways to take FedAMM's virtual step; :mod:`fedamm_pl.algorithms.meta` has the mathematics and chooses one.

With ``joint``, the support batch is divided among the ranks of a training. The weights are normalised over the whole
batch, so the step depends on the losses of all ranks. Given these, each rank differentiates its own part, and the parts
are added.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import higher
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedamm_pl.algorithms.meta.ranks import gathered, summed
from fedamm_pl.algorithms.meta.weighing import PLAIN, Weighing
from fedamm_pl.data.client import Batch
from fedamm_pl.models import logits_of
from fedamm_pl.models.holding import holding
from fedamm_pl.seeding import drawing_as, global_state

Differentiation = Literal["higher", "functional", "forward"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class VirtualStep:
    """The result of a virtual step. It holds the graph, if there is one; the call for the gradient frees it.

    Attributes:
        params: The stepped parameters w_hat by name, detached.
        weight_net_gradient: Maps g = d meta loss / d w_hat, by the same names, to h = d meta loss / d v by the names of
            the weight net's parameters. Call it once: it frees the graph.
    """

    params: Tensors
    weight_net_gradient: Callable[[Mapping[str, Tensor]], Tensors]


def with_higher(
    model: nn.Module, weight_net: nn.Module, support: Batch, lr: float, joint: bool, weighing: Weighing = PLAIN
) -> VirtualStep:
    """Unroll the step with the library ``higher``, which runs a patched copy of the network without its hooks."""
    images, labels = support
    optimizer = torch.optim.SGD(trainable(model).values(), lr=lr)
    with higher.innerloop_ctx(model, optimizer) as (functional_model, inner_optimizer):
        losses = weighing.losses(logits_of(functional_model(images)), labels)
        before = list(functional_model.parameters())
        inner_optimizer.step(
            _support_loss(losses, labels, weight_net, weighing, joint),
            grad_callback=(lambda found: _added(found, before)) if joint else None,
        )
        stepped = {
            name: value
            for (name, own), value in zip(model.named_parameters(), functional_model.parameters(), strict=True)
            if own.requires_grad
        }

    def gradient_at(gradient: Mapping[str, Tensor]) -> Tensors:
        return _backward(stepped, weight_net, gradient, joint)

    return VirtualStep({name: value.detach() for name, value in stepped.items()}, gradient_at)


def with_double_backward(
    model: nn.Module, weight_net: nn.Module, support: Batch, lr: float, joint: bool, weighing: Weighing = PLAIN
) -> VirtualStep:
    """Unroll the step with ``functional_call`` and differentiate through its gradient."""
    images, labels = support
    params = leaves(trainable(model))
    held = {**params, **copied_buffers(model)}

    def step() -> Tensors:
        losses = weighing.losses(logits_of(model(images)), labels)
        loss = _support_loss(losses, labels, weight_net, weighing, joint)
        found = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
        gradients = _added(found, params.values()) if joint else found
        return {name: value - lr * grad for (name, value), grad in zip(params.items(), gradients, strict=True)}

    stepped = holding(model, held, step)

    def gradient_at(gradient: Mapping[str, Tensor]) -> Tensors:
        found = holding(model, held, lambda: _backward(stepped, weight_net, gradient, joint))
        held.clear()
        return found

    return VirtualStep({name: value.detach() for name, value in stepped.items()}, gradient_at)


def with_forward_mode(
    model: nn.Module, weight_net: nn.Module, support: Batch, lr: float, joint: bool, weighing: Weighing = PLAIN
) -> VirtualStep:
    """Replace the double backward by one directional derivative."""
    images, labels = support
    params = leaves(trainable(model))
    random_state = global_state(images.device)

    def slopes_and_gradients() -> tuple[Tensor, tuple[Tensor, ...]]:
        losses = weighing.losses(logits_of(model(images)), labels)
        slopes = slopes_of(losses, labels, weight_net, weighing, joint)
        # differentiated with respect to w here, by one backward pass, and with respect to v below
        return slopes, torch.autograd.grad(losses, list(params.values()), slopes.detach(), materialize_grads=True)

    slopes, found = holding(model, {**params, **copied_buffers(model)}, slopes_and_gradients)
    gradients = summed(found) if joint else found

    def gradient_at(gradient: Mapping[str, Tensor]) -> Tensors:
        with drawing_as(random_state, images.device):  # dropout as in the losses above
            inner = _directional_derivative(model, params, gradient, support, weighing)  # <grad_w l_i, g>, shape (B,)
        mapped = trainable(weight_net)
        values = torch.autograd.grad(
            -lr * (slopes * inner.to(slopes.dtype)).sum(), list(mapped.values()), materialize_grads=True
        )
        return dict(zip(mapped, summed(values) if joint else values, strict=True))

    stepped = {
        name: (value - lr * grad).detach() for (name, value), grad in zip(params.items(), gradients, strict=True)
    }
    return VirtualStep(stepped, gradient_at)


WAYS: dict[str, Callable[..., VirtualStep]] = {
    "higher": with_higher,
    "functional": with_double_backward,
    "forward": with_forward_mode,
}


def _support_loss(losses: Tensor, labels: Tensor, weight_net: nn.Module, weighing: Weighing, joint: bool) -> Tensor:
    """Return the loss that the virtual step minimises, with its graph to w and v."""
    if not joint:
        return weighing.support_loss(weight_net, losses, labels)
    # this has the same gradient: the losses of other ranks depend on w, but not through this rank's graph
    return (losses * slopes_of(losses, labels, weight_net, weighing, joint)).sum()


def slopes_of(
    losses: Tensor, labels: Tensor, weight_net: nn.Module, weighing: Weighing = PLAIN, joint: bool = False
) -> Tensor:
    """Return d L_S / d l_i of this rank's examples as a function of v, shape (B,)."""
    constant, mine = gathered(losses) if joint else (losses.detach(), slice(None))
    if joint and weighing.families is not None:
        labels, _ = gathered(labels)
    constant.requires_grad_()
    (slopes,) = torch.autograd.grad(weighing.support_loss(weight_net, constant, labels), constant, create_graph=True)
    return slopes[mine] if joint else slopes


def _added(found: Iterable[Tensor | None], params: Iterable[Tensor]) -> list[Tensor]:
    """Add the gradients of all ranks; only this rank's part has a graph."""
    own = [torch.zeros_like(at) if grad is None else grad for grad, at in zip(found, params, strict=True)]
    return [part - part.detach() + total for part, total in zip(own, summed(own), strict=True)]


def _backward(stepped: Tensors, weight_net: nn.Module, gradient: Mapping[str, Tensor], joint: bool) -> Tensors:
    """Compute h by back-propagation of g through the unrolled step."""
    reached = {name: value for name, value in stepped.items() if value.grad_fn is not None}
    params = trainable(weight_net)
    values = torch.autograd.grad(
        list(reached.values()),
        list(params.values()),
        [gradient[name].to(value.dtype) for name, value in reached.items()],
        materialize_grads=True,
    )
    stepped.clear()  # frees the graph
    return dict(zip(params, summed(values) if joint else values, strict=True))


def _directional_derivative(
    model: nn.Module, params: Tensors, direction: Mapping[str, Tensor], support: Batch, weighing: Weighing
) -> Tensor:
    """Return the derivative of the per-example losses at ``params`` in a direction, by dual numbers, shape (B,).

    ``torch.func.jvp`` does not accept networks that update a buffer in place, as BatchNorm does; dual numbers do.
    """
    images, labels = support
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        forward_ad.dual_level(),
    ):
        # torch registers its own forward-mode rules through the deprecated torch.jit.script
        warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")
        duals = {
            name: forward_ad.make_dual(value.detach(), direction[name].to(value.dtype))  # type: ignore[no-untyped-call]
            for name, value in params.items()
        }
        losses, tangents = forward_ad.unpack_dual(  # type: ignore[no-untyped-call]
            holding(
                model, {**duals, **copied_buffers(model)}, lambda: weighing.losses(logits_of(model(images)), labels)
            )
        )
    return torch.zeros_like(losses) if tangents is None else tangents


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require a gradient, by name."""
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def leaves(tensors: Mapping[str, Tensor]) -> Tensors:
    """Return detached tensors of the same values that require a gradient."""
    return {name: value.detach().requires_grad_() for name, value in tensors.items()}


def copied_buffers(module: nn.Module) -> Tensors:
    """Return copies of the buffers, so that BatchNorm does not change the module's statistics."""
    return {name: value.clone() for name, value in module.named_buffers()}
