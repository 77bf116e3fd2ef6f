"""FedAMM's meta mapping for several clients at once; :mod:`fedamm_pl.algorithms.meta` has the mathematics.

All start from the same w and v; each has a support and a meta batch of its own. Forward passes run under ``torch.func.vmap``,
over parameters that are stacked in a first dimension, G of them. The weight-net gradient is always computed the forward way:
with the others it agrees up to rounding. The network must be one that this way is right for
(:func:`fedamm_pl.algorithms.meta.suited.fault`), and in training mode.
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
    """The outcome of virtual steps. The graph lives in here and is spent by the one call for gradients.

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
    """Take :func:`fedamm_pl.algorithms.meta.virtual_step` for each client, on supports as ``padded`` gives them.

    Args:
        model: The classifier f_w; neither its parameters nor its buffers change.
        weight_net: V, maps losses (B,), and families (B,) if the weighing has any, to weights (B,).
        images: As the model takes them, shape (G, B, ...).
        labels: Of shape (G, B).
        present: Which examples are there, shape (G, B); None: all.
        lr: Step size.
        weighing: Which loss is weighted, and what V sees; its class counts and families are of shape (G, C).

    Raises:
        RuntimeError: If ``vmap`` cannot trace the network, for example because it draws.
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
    """Compute :func:`fedamm_pl.algorithms.meta.meta_gradient` for each client, on a meta batch of its own.

    Args:
        model: The classifier; its parameters and buffers do not change.
        params: The w_hat_k by name, of shapes (G, ...).
        images: As the model takes them, shape (G, M, ...).
        labels: Of shape (G, M).

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
    """Return a module's trainable parameters once for each client, shapes (G, ...), as leaves that share their memory."""
    params = trainable(module).items()
    return {name: value.detach().expand(count, *value.shape).requires_grad_() for name, value in params}


def stacked(states: Sequence[Mapping[str, Tensor]], prefix: str, device: torch.device) -> Tensors:
    """Put states of the same names into one on a device, without the names' prefix, and with a first dimension more."""
    return {name.removeprefix(prefix): torch.stack([state[name] for state in states]).to(device) for name in states[0]}


def unstacked(tensors: Mapping[str, Tensor], prefix: str = "") -> list[Tensors]:
    """Return the states that :func:`stacked` makes this of, as detached views."""
    rows = zip(*(value.detach().unbind() for value in tensors.values()), strict=True)
    return [{prefix + name: value for name, value in zip(tensors, row, strict=True)} for row in rows]


@contextmanager
def losses_of(model: nn.Module, weighing: Weighing) -> Iterator[Losses]:
    """Give the losses (B,) of one client, to call under ``vmap``: a function of parameters, images, labels, which are there, counts."""
    with sdpa_kernel(SDPBackend.MATH), masked_batch_norm(model) as mask:

        def losses(
            params: Mapping[str, Tensor],
            images: Tensor,
            labels: Tensor,
            present: Tensor | None,
            class_counts: Tensor | None,
        ) -> Tensor:
            mask.present, mask.moved = present, {}  # BatchNorm's moved statistics are nobody's
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
    """Return d L_S / d l_i of each client as a function of its v, shape (G, B); 0 for what is not there."""
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
