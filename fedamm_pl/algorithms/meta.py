"""FedAMM's meta mapping: the virtual step, the meta gradient and the weight-net gradient, as pure functions.

Qian, Lu, Wang, *Long-Tailed Federated Learning via Aggregated Meta Mapping*; the bilevel step is that of
Shu et al., *Meta-Weight-Net*, NeurIPS 2019. With support losses l_i(w) and weights omega_i(v),

    virtual step          w_hat(v) = w - lr * grad_w sum_i omega_i(v) l_i(w)        at the client
    meta gradient         g = grad_{w_hat} of the mean cross-entropy on the meta set    at the server
    weight-net gradient   h = grad_v <w_hat(v), g>                                      at the client

h equals the gradient of the meta loss with respect to v, through the virtual step, though neither side sees the other's
data. Three ways to compute it: ``higher`` unrolls the step with the library of that name, ``functional`` with
``torch.func.functional_call`` and a double backward, ``forward`` replaces the double backward by one directional
derivative:

    h = -lr * grad_v sum_i (d L_S / d l_i) * <grad_w l_i, g>,    L_S = sum_i omega_i l_i,    inner products held constant.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import higher
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedamm_pl.data.client import Batch
from fedamm_pl.losses import example_losses, weighted_loss

Differentiation = Literal["higher", "functional", "forward"]
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class VirtualStep:
    """The outcome of a virtual step. Its graph, if any, lives in here and is spent by the one gradient.

    Attributes:
        params: The stepped parameters w_hat by name, detached.
        weight_net_gradient: Maps g = d meta loss / d w_hat, by the same names, to h = d meta loss / d v by the names of
            the weight net's parameters. Call it once: it frees the graph.
    """

    params: Tensors
    weight_net_gradient: Callable[[Mapping[str, Tensor]], Tensors]


def virtual_step(
    model: nn.Module, weight_net: nn.Module, support: Batch, lr: float, differentiation: Differentiation = "higher"
) -> VirtualStep:
    """Take one plain SGD step on the weighted support loss, differentiable with respect to the weight net.

    The weight net sees the losses with their graph attached. Neither the model's parameters nor its buffers (BatchNorm
    statistics) change. The model is used in the mode it is in: training mode for FedAMM.

    Args:
        model: The classifier f_w; parameters that require no gradient stay out of the step.
        weight_net: V, maps losses (B,) to weights (B,).
        support: Images as the model takes them, and labels.
        lr: Step size.
        differentiation: ``higher``, ``functional`` or ``forward``; equal up to rounding.

    Returns:
        w_hat and the function from g to h.

    Raises:
        ValueError: If ``differentiation`` is none of the three.
    """
    with sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no second derivative
        match differentiation:
            case "higher":
                return _with_higher(model, weight_net, support, lr)
            case "functional":
                return _with_double_backward(model, weight_net, support, lr)
            case "forward":
                return _with_forward_mode(model, weight_net, support, lr)
    raise ValueError(f"Expected `differentiation` to be higher, functional or forward, got {differentiation!r}.")


def meta_gradient(model: nn.Module, params: Mapping[str, Tensor], meta: Batch) -> tuple[Tensors, Tensor]:
    """Gradient of the mean cross-entropy on the meta set at the given parameters, in training mode.

    Args:
        model: The classifier; its parameters and buffers do not change.
        params: w_hat by name; what is missing is taken from the model.
        meta: The whole meta set: images as the model takes them, and labels.

    Returns:
        g by name, and the meta loss, a scalar.
    """
    leaves = {name: value.detach().requires_grad_() for name, value in params.items()}
    images, labels = meta
    with torch.enable_grad(), _training_mode(model):
        loss = example_losses(functional_call(model, (leaves, _buffers(model)), (images,)), labels).mean()
        gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return dict(zip(leaves, gradients, strict=True)), loss.detach()


def _with_higher(model: nn.Module, weight_net: nn.Module, support: Batch, lr: float) -> VirtualStep:
    images, labels = support
    optimizer = torch.optim.SGD(_trainable(model).values(), lr=lr)
    with higher.innerloop_ctx(model, optimizer) as (functional_model, inner_optimizer):
        losses = example_losses(functional_model(images), labels)
        inner_optimizer.step(weighted_loss(losses, weight_net(losses)))
        stepped = {
            name: value
            for (name, before), value in zip(model.named_parameters(), functional_model.parameters(), strict=True)
            if before.requires_grad
        }
    return _backward_step(stepped, weight_net)


def _with_double_backward(model: nn.Module, weight_net: nn.Module, support: Batch, lr: float) -> VirtualStep:
    params = {name: value.detach().requires_grad_() for name, value in _trainable(model).items()}
    losses = _functional_losses(model, params, support)
    loss = weighted_loss(losses, weight_net(losses))
    gradients = torch.autograd.grad(loss, list(params.values()), create_graph=True, materialize_grads=True)
    stepped = {name: value - lr * grad for (name, value), grad in zip(params.items(), gradients, strict=True)}
    return _backward_step(stepped, weight_net)


def _backward_step(stepped: Tensors, weight_net: nn.Module) -> VirtualStep:
    """Compute h by back-propagation of g through the unrolled step."""

    def weight_net_gradient(gradient: Mapping[str, Tensor]) -> Tensors:
        reached = {name: value for name, value in stepped.items() if value.grad_fn is not None}
        params = _trainable(weight_net)
        values = torch.autograd.grad(
            list(reached.values()),
            list(params.values()),
            [gradient[name].to(value.dtype) for name, value in reached.items()],
            materialize_grads=True,
        )
        stepped.clear()  # ends the life of the graph
        return dict(zip(params, values, strict=True))

    return VirtualStep({name: value.detach() for name, value in stepped.items()}, weight_net_gradient)


def _with_forward_mode(model: nn.Module, weight_net: nn.Module, support: Batch, lr: float) -> VirtualStep:
    params = {name: value.detach().requires_grad_() for name, value in _trainable(model).items()}
    devices = [support[0].device] if support[0].is_cuda else []
    random_states = torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in devices)
    losses = _functional_losses(model, params, support)
    constant = losses.detach().requires_grad_()
    # d L_S / d l_i as a function of v: differentiated with respect to w by one backward pass, to v in the closure
    (slopes,) = torch.autograd.grad(weighted_loss(constant, weight_net(constant)), constant, create_graph=True)
    gradients = torch.autograd.grad(losses, list(params.values()), slopes.detach(), materialize_grads=True)

    def weight_net_gradient(gradient: Mapping[str, Tensor]) -> Tensors:
        with torch.random.fork_rng(devices):  # dropout as in the losses above
            torch.set_rng_state(random_states[0])
            for device, state in zip(devices, random_states[1:], strict=True):
                torch.cuda.set_rng_state(state, device)
            inner = _directional_derivative(model, params, gradient, support)  # <grad_w l_i, g>, shape (B,)
        values = torch.autograd.grad(
            -lr * (slopes * inner.to(slopes.dtype)).sum(), list(_trainable(weight_net).values()), materialize_grads=True
        )
        return dict(zip(_trainable(weight_net), values, strict=True))

    stepped = {
        name: (value - lr * grad).detach() for (name, value), grad in zip(params.items(), gradients, strict=True)
    }
    return VirtualStep(stepped, weight_net_gradient)


def _directional_derivative(
    model: nn.Module, params: Tensors, direction: Mapping[str, Tensor], support: Batch
) -> Tensor:
    """Derivative of the per-example losses at ``params`` in a direction, by dual numbers, shape (B,).

    ``torch.func.jvp`` refuses networks that update a buffer in place, as BatchNorm does; dual numbers do not.
    """
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
            _functional_losses(model, duals, support)
        )
    return torch.zeros_like(losses) if tangents is None else tangents


def _functional_losses(model: nn.Module, params: Mapping[str, Tensor], batch: Batch) -> Tensor:
    images, labels = batch
    logits = functional_call(model, ({**params, **_buffers(model)},), (images,))
    return example_losses(logits, labels)


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in module.named_parameters() if value.requires_grad}


def _buffers(module: nn.Module) -> Tensors:
    """Copies, so that BatchNorm moves nobody's statistics."""
    return {name: value.clone() for name, value in module.named_buffers()}


@contextmanager
def _training_mode(module: nn.Module) -> Iterator[None]:
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
