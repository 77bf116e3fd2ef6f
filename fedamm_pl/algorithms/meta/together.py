"""FedAMM's meta mapping for several clients at once; :mod:`fedamm_pl.algorithms.meta` has the mathematics.

All clients start from the same w and v; each has its own support batch and meta batch. Forward passes run under
``torch.func.vmap`` over parameters of G clients, stacked in a first dimension. The weight-net gradient is always
computed in forward mode, which agrees with the other ways up to rounding. Forward mode must work for the network
(:func:`fedamm_pl.algorithms.meta.suited.fault`), and the network must be in training mode.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedamm_pl.algorithms.meta.virtual_steps import Tensors, copied_buffers, leaves, trainable
from fedamm_pl.algorithms.meta.weighing import PLAIN, Weighing
from fedamm_pl.models import logits_of
from fedamm_pl.models.holding import holding
from fedamm_pl.models.masked import masked_batch_norm

Losses = Callable[[Mapping[str, Tensor], Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


@dataclass(frozen=True)
class VirtualSteps:
    """The result of virtual steps. It holds the graph, which the call for the gradients frees.

    Attributes:
        params: The stepped parameters w_hat_k by name, detached, of shapes (G, ...).
        weight_net_gradients: Maps the g_k, by the same names and of the same shapes, to the h_k by the names of the weight
            net's parameters, of shapes (G, ...). Call it once: it frees the graph.
    """

    params: Tensors
    weight_net_gradients: Callable[[Mapping[str, Tensor]], Tensors]


def virtual_steps(
    model: nn.Module,
    weight_net: nn.Module,
    images: Tensor,
    labels: Tensor,
    present: Tensor | None,
    lr: float,
    weighing: Weighing = PLAIN,
) -> VirtualSteps:
    """Take :func:`fedamm_pl.algorithms.meta.virtual_step` for each client, on support batches from ``padded``.

    Args:
        model: The classifier f_w; neither its parameters nor its buffers change.
        weight_net: V, maps losses (B,), and families (B,) if the weighing has any, to weights (B,).
        images: Images prepared for the model, shape (G, B, ...).
        labels: Classes of shape (G, B).
        present: Which examples are not padding, shape (G, B); None: all.
        lr: Step size.
        weighing: Which loss is weighted, and the inputs of V; its class counts and families are of shape (G, C).

    Raises:
        RuntimeError: If ``vmap`` cannot trace the network, for example because it draws random numbers.
    """
    support = (images, labels, present, weighing.class_counts)
    dims = tuple(None if part is None else 0 for part in support)
    params, mapped = expanded(model, len(labels)), expanded(weight_net, len(labels))
    with losses_of(model, weighing) as function:
        losses = vmap(function, in_dims=(0, *dims))(params, *support)  # (G, B)
        slopes = _slopes(weight_net, mapped, losses, labels, present, weighing)
        gradients = torch.autograd.grad(losses, list(params.values()), slopes.detach(), materialize_grads=True)

    def gradients_at(directions: Mapping[str, Tensor]) -> Tensors:
        at = {name: value.detach() for name, value in trainable(model).items()}
        along = {name: directions[name].to(value.dtype) for name, value in at.items()}
        with losses_of(model, weighing) as function, warnings.catch_warnings(), torch.no_grad():
            # torch registers its own forward-mode rules through the deprecated torch.jit.script
            warnings.filterwarnings("ignore", message=r".*torch\.jit\.script")

            def derivative(direction: Tensors, *support: Tensor | None) -> Tensor:
                inner: Tensor = jvp(lambda params: function(params, *support), (at,), (direction,))[1]  # type: ignore[arg-type]
                return inner

            inner = vmap(derivative, in_dims=(0, *dims))(along, *support)  # <grad_w l_i, g_k>, (G, B)
        total = -lr * (slopes * inner.to(slopes.dtype)).sum()
        found = torch.autograd.grad(total, list(mapped.values()), materialize_grads=True)
        return dict(zip(mapped, found, strict=True))

    stepped = {
        name: (value - lr * grad).detach() for (name, value), grad in zip(params.items(), gradients, strict=True)
    }
    return VirtualSteps(stepped, gradients_at)


def meta_gradients(
    model: nn.Module, params: Mapping[str, Tensor], images: Tensor, labels: Tensor
) -> tuple[Tensors, Tensor]:
    """Compute :func:`fedamm_pl.algorithms.meta.meta_gradient` for each client, on its own meta batch.

    Args:
        model: The classifier; its parameters and buffers do not change.
        params: The w_hat_k by name, of shapes (G, ...).
        images: Images prepared for the model, shape (G, M, ...).
        labels: Classes of shape (G, M).

    Returns:
        The g_k by name, of shapes (G, ...), and the meta losses, shape (G,).

    Raises:
        RuntimeError: If ``vmap`` cannot trace the network.
    """
    moved = leaves(params)
    with torch.enable_grad(), losses_of(model, PLAIN) as function:
        losses = vmap(function, in_dims=(0, 0, 0, None, None))(moved, images, labels, None, None).mean(1)
        gradients = torch.autograd.grad(losses.sum(), list(moved.values()), materialize_grads=True)
    return dict(zip(moved, gradients, strict=True)), losses.detach()


def expanded(module: nn.Module, count: int) -> Tensors:
    """Return a module's trainable parameters for each client, of shapes (G, ...), as leaves that share their memory."""
    params = trainable(module).items()
    return {name: value.detach().expand(count, *value.shape).requires_grad_() for name, value in params}


def stacked(states: Sequence[Mapping[str, Tensor]], prefix: str, device: torch.device) -> Tensors:
    """Stack states with the same names along a new first dimension, on a device; the names lose their prefix."""
    return {name.removeprefix(prefix): torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def unstacked(tensors: Mapping[str, Tensor], prefix: str = "") -> list[Tensors]:
    """Undo :func:`stacked`: return the single states, as detached views."""
    rows = zip(*(value.detach().unbind() for value in tensors.values()), strict=True)
    return [{prefix + name: value for name, value in zip(tensors, row, strict=True)} for row in rows]


@contextmanager
def losses_of(model: nn.Module, weighing: Weighing) -> Iterator[Losses]:
    """Yield a function for the losses (B,) of one client, to be called under ``vmap``.

    It takes the parameters, the images, the labels, which examples are present, and the class counts.
    """
    with sdpa_kernel(SDPBackend.MATH), masked_batch_norm(model) as mask:

        def losses(
            params: Mapping[str, Tensor],
            images: Tensor,
            labels: Tensor,
            present: Tensor | None,
            class_counts: Tensor | None,
        ) -> Tensor:
            mask.present, mask.moved = present, {}  # the updated BatchNorm statistics are discarded
            held = {**params, **copied_buffers(model)}
            mine = replace(weighing, class_counts=class_counts)
            return holding(model, held, lambda: mine.losses(logits_of(model(images)), labels))

        yield losses


def _slopes(
    weight_net: nn.Module,
    mapped: Tensors,
    losses: Tensor,
    labels: Tensor,
    present: Tensor | None,
    weighing: Weighing,
) -> Tensor:
    """Return d L_S / d l_i of each client as a function of its v, shape (G, B); 0 for padding."""
    constant = losses.detach().requires_grad_()

    def support_loss(
        mapped: Tensors, losses: Tensor, labels: Tensor, present: Tensor | None, families: Tensor | None
    ) -> Tensor:
        def net(*inputs: Tensor) -> Tensor:
            weights: Tensor = functional_call(weight_net, mapped, inputs)
            return weights

        return replace(weighing, families=families).support_loss(net, losses, labels, present)

    dims = tuple(None if part is None else 0 for part in (present, weighing.families))
    totals = vmap(support_loss, in_dims=(0, 0, 0, *dims))(mapped, constant, labels, present, weighing.families)
    (slopes,) = torch.autograd.grad(totals.sum(), constant, create_graph=True)
    return slopes
