"""Local SGD of several clients in one program: ``torch.func.vmap`` over stacked parameters, buffers and batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.func import vmap
from torch.optim.sgd import sgd

from fedamm_pl.data.client import Batch
from fedamm_pl.models.holding import holding
from fedamm_pl.models.masked import masked_batch_norm, padded
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule


@dataclass
class Member:
    """One of the clients that train in parallel.

    Attributes:
        loader: The client's batches of one epoch.
        steps_per_epoch: Number of these batches.
        epochs: Number of local epochs.
        constants: Values that the start of the fit has set in the method's own buffers, for example class counts.
        own: Entries of the client's network that differ from the state sent to all clients.
        error: The exception that the loader raised; the client then continues without data, and its numbers are
            invalid.
        loss_sum: Sum of the objective over the last epoch.
        num_seen: Number of examples in the last epoch.
        seen: Labels and losses of the batches in the last epoch.
    """

    loader: Iterable[Batch]
    steps_per_epoch: int
    epochs: int
    constants: State
    own: State
    error: Exception | None = None
    loss_sum: float | Tensor = 0.0
    num_seen: int = 0
    seen: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Number of steps of the fit."""
        return self.epochs * self.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the fit; if the loader raises or ends too early, this is recorded in ``error``."""
        try:
            yield from itertools.chain.from_iterable(itertools.repeat(self.loader, self.epochs))
            self.error = ValueError("its loader has fewer batches than it says")
        except Exception as error:
            self.error = error


def train(
    module: FederatedModule, members: Sequence[Member], arithmetic: Callable[[], AbstractContextManager[Any]]
) -> list[State]:
    """Train clients from the state that a module holds, each with its own batches and its own number of steps.

    Args:
        module: Holds the state sent to all clients, and is in training mode. Its state does not change.
        members: The clients.
        arithmetic: Returns the context for forward passes, which sets their precision.

    Returns:
        For each client the parameters and buffers of its network that may have changed, by the module's names.

    Raises:
        RuntimeError: If the network or the method cannot be traced by ``vmap``.
    """
    # sorted by steps, most first, so that at each step the clients that still train come first
    order = sorted(range(len(members)), key=lambda place: -members[place].num_steps)
    queue = [members[place] for place in order]
    parameters, buffers = dict(module.model.named_parameters()), dict(module.model.named_buffers())
    trained = [f"model.{name}" for name, value in parameters.items() if value.requires_grad]
    varying = {*trained, *(f"model.{name}" for name in buffers), *queue[0].own}
    stacks = {
        name: _stacked(value.detach(), [member.own.get(name) for member in queue])
        for own, value in (*parameters.items(), *buffers.items())
        if (name := f"model.{own}") in varying
    }
    constants = {name: torch.stack([member.constants[name] for member in queue]) for name in queue[0].constants}
    options: dict[str, Any] = {"lr": module.local_lr}
    options |= {name: module.hparams[name] for name in ("momentum", "weight_decay")}
    momenta: list[Tensor | None] = [None] * len(trained)  # torch's SGD creates them at the first step
    streams = [member.batches() for member in queue]
    keeps = type(module).observe is not FederatedModule.observe
    with masked_batch_norm(module.model) as mask:

        def losses_of(varying: State, images: Tensor, labels: Tensor, present: Tensor | None) -> Any:
            mask.present, mask.moved = present, {}

            def step() -> tuple[Tensor, Tensor]:
                return module.step_loss(module.logits(images), labels, present)

            return (*holding(module, varying, step), mask.moved)

        for number in range(queue[0].num_steps):
            active = [member for member in queue if member.num_steps > number]
            count = len(active)
            batches = [next(stream, None) for stream in streams[:count]]
            if not any(batches):  # all clients that still train have failed
                break
            images, labels, present, sizes = padded(batches)
            prepared = module.prepare(images.flatten(0, 1))
            images = prepared.view(*images.shape[:2], *prepared.shape[1:])
            labels, present = labels.to(images.device), None if present is None else present.to(images.device)
            now = {name: value[:count] for name, value in stacks.items()}
            params = {name: now[name].detach().requires_grad_() for name in trained}
            given = {**now, **{name: value[:count] for name, value in constants.items()}, **params}
            with arithmetic():
                total, losses, moved = vmap(losses_of, in_dims=(0, 0, 0, None if present is None else 0))(
                    given, images, labels, present
                )
            found = torch.autograd.grad(total.sum(), list(params.values()), allow_unused=True)
            used = [place for place, value in enumerate(found) if value is not None]  # others get no weight decay
            with torch.no_grad():
                for name, value in moved.items():
                    now[f"model.{name}"].copy_(value)
                _descend(
                    [params[trained[place]] for place in used], [found[place] for place in used], momenta, used, options
                )
            _note(active, number, labels, losses.detach(), sizes, present, keeps)
    first = {id(value): f"model.{name}" for name, value in parameters.items()}
    for name, value in module.model.named_parameters(remove_duplicate=False):
        if first[id(value)] in stacks:
            stacks[f"model.{name}"] = stacks[first[id(value)]]  # tied parameters
    rows = {place: row for row, place in enumerate(order)}
    return [{name: value[rows[place]] for name, value in stacks.items()} for place in range(len(members))]


def _stacked(sent: Tensor, own: Sequence[Tensor | None]) -> Tensor:
    if all(value is None for value in own):
        return sent.expand(len(own), *sent.shape).clone(memory_format=torch.contiguous_format)
    return torch.stack([sent if value is None else value.to(sent) for value in own])


def _descend(
    params: list[Tensor],
    gradients: list[Tensor],
    momenta: list[Tensor | None],
    places: Sequence[int],
    options: dict[str, Any],
) -> None:
    """Take a step of torch's SGD in place, for the clients that still train.

    Args:
        params: Parameters, of shapes (G, ...) with G the number of clients that still train.
        gradients: Their gradients, of the same shapes.
        momenta: Momenta of all parameters, each for as many clients as trained at its first step; None before that.
        places: Indices of the momenta that belong to ``params``.
        options: ``lr``, ``momentum`` and ``weight_decay``.
    """
    count = len(params[0]) if params else 0
    moving = [None if (value := momenta[place]) is None else value[:count] for place in places]
    nesterov = options["momentum"] > 0
    sgd(params, gradients, moving, foreach=True, dampening=0.0, nesterov=nesterov, maximize=False, **options)
    for place, value in zip(places, moving, strict=True):
        if momenta[place] is None:
            momenta[place] = value


def _note(
    active: Sequence[Member],
    number: int,
    labels: Tensor,
    losses: Tensor,
    sizes: Sequence[int],
    present: Tensor | None,
    keeps: bool,
) -> None:
    """Add the losses of a step to the sums of the clients that are in their last epoch."""
    last = [row for row, member in enumerate(active) if number >= member.num_steps - member.steps_per_epoch]
    if not last:
        return
    sums = (losses if present is None else losses.where(present, 0)).sum(1).unbind()
    for row in last:
        member = active[row]
        member.loss_sum += sums[row]
        member.num_seen += sizes[row]
        if keeps:
            member.seen.append((labels[row, : sizes[row]], losses[row, : sizes[row]]))
