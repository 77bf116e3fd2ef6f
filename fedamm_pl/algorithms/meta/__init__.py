"""FedAMM's meta mapping: the virtual step, the meta gradient and the weight-net gradient, as pure functions.

Qian, Lu, Wang, *Long-Tailed Federated Learning via Aggregated Meta Mapping*; the bilevel step is that of
Shu et al., *Meta-Weight-Net*, NeurIPS 2019. With support losses l_i(w) and weights omega_i(v),

    virtual step          w_hat(v) = w - lr * grad_w sum_i omega_i(v) l_i(w)        at the client
    meta gradient         g = grad_{w_hat} of the mean cross-entropy on the meta set    at the server
    weight-net gradient   h = grad_v <w_hat(v), g>                                      at the client

h equals the gradient of the meta loss with respect to v, through the virtual step, although neither side sees the
other's data. There are three ways to compute it: ``higher`` unrolls the step with the library of that name;
``functional`` unrolls it with ``torch.func.functional_call`` and a double backward pass; ``forward`` replaces the
double backward pass by one directional derivative:

    h = -lr * grad_v sum_i (d L_S / d l_i) * <grad_w l_i, g>,    L_S = sum_i omega_i l_i,    inner products held constant.

Not every way works for every network; :mod:`fedamm_pl.algorithms.meta.suited` checks this.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedamm_pl.algorithms.meta.ranks import summed
from fedamm_pl.algorithms.meta.suited import fault, unsuited
from fedamm_pl.algorithms.meta.virtual_steps import (
    WAYS,
    Differentiation,
    Tensors,
    VirtualStep,
    copied_buffers,
    leaves,
)
from fedamm_pl.algorithms.meta.weighing import PLAIN, Weighing
from fedamm_pl.data.client import Batch
from fedamm_pl.losses import example_losses
from fedamm_pl.models import logits_of
from fedamm_pl.models.holding import holding


@torch.compiler.disable  # type: ignore[untyped-decorator]  # second derivatives are not compiled
def virtual_step(
    model: nn.Module,
    weight_net: nn.Module,
    support: Batch,
    lr: float,
    differentiation: Differentiation = "higher",
    joint: bool = False,
    weighing: Weighing = PLAIN,
) -> VirtualStep:
    """Take one plain SGD step on the weighted support loss, differentiable with respect to the weight net.

    The weight net sees the losses with their graph attached. Neither the model's parameters nor its buffers (BatchNorm
    statistics) change. The model is used in the mode it is in: training mode for FedAMM.

    Args:
        model: The classifier f_w; parameters that require no gradient are left out of the step.
        weight_net: V, maps losses (B,), and families (B,) if the weighing has any, to weights (B,).
        support: Images prepared for the model, and labels.
        lr: Step size.
        differentiation: ``higher``, ``functional`` or ``forward``; equal up to rounding.
        joint: Whether the support batches of all ranks of the process group form one batch.
        weighing: Which loss is weighted, and the inputs of the weight net.

    Returns:
        The stepped parameters w_hat, and the function that maps g to h.

    Raises:
        ValueError: If ``differentiation`` is not one of the three ways, or does not work for the network.
    """
    if differentiation not in WAYS:
        raise ValueError(f"Expected `differentiation` to be higher, functional or forward, got {differentiation!r}.")
    if reason := fault(model, support, differentiation):
        raise unsuited(model, differentiation, reason)
    with sdpa_kernel(SDPBackend.MATH):  # attention's other kernels have no second derivative
        return WAYS[differentiation](model, weight_net, support, lr, joint, weighing)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def meta_gradient(
    model: nn.Module, params: Mapping[str, Tensor], meta: Batch, joint: bool = False
) -> tuple[Tensors, Tensor]:
    """Return the gradient of the mean cross-entropy on the meta set at the given parameters, in training mode.

    Args:
        model: The classifier; its parameters and buffers do not change. If the whole is in training mode, parts that
            are in evaluation mode stay so.
        params: w_hat by name; missing parameters are taken from the model.
        meta: The whole meta set: images prepared for the model, and labels.
        joint: Whether the meta batches of all ranks of the process group form one batch.

    Returns:
        g by name, and the meta loss, a scalar.
    """
    images, labels = meta
    moved = leaves(params)
    size = int(summed([torch.tensor(len(labels), device=labels.device)])[0]) if joint else len(labels)

    def loss_and_gradients() -> list[Tensor]:
        losses = example_losses(logits_of(model(images)), labels)
        loss = losses.sum() / size if joint else losses.mean()
        return [loss.detach(), *torch.autograd.grad(loss, list(moved.values()), materialize_grads=True)]

    with torch.enable_grad(), nullcontext() if model.training else training_mode(model):
        found = holding(model, {**moved, **copied_buffers(model)}, loss_and_gradients)
    loss, *gradients = summed(found) if joint else found
    return dict(zip(moved, gradients, strict=True)), loss


@contextmanager
def training_mode(module: nn.Module) -> Iterator[None]:
    """Set all parts of a module to training mode, and restore the mode of each part afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.train()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
