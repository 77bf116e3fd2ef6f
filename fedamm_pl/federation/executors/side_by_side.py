"""Local SGD of several clients in one program, by ``torch.func.vmap`` over their stacked parameters, buffers and batches."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.optim.sgd import sgd

from fedamm_pl.data.client import Batch
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.module import FederatedModule


@dataclass
class Member:
    """A client among those that train side by side.

    Attributes:
        loader: Its batches of one epoch.
        steps_per_epoch: How many these are.
        epochs: How often it goes through them.
        constants: What the fit's start has put into the method's own buffers, class counts for example.
        own: Entries of the network's state in which it differs from what was sent to all.
        error: What the loader has raised; then it goes on with nothing, and its numbers mean nothing.
        loss_sum: Sum of the objective over the last epoch.
        num_seen: Examples of the last epoch.
        seen: Labels and losses of the last epoch's batches.
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
        """Steps of the fit."""
        return self.epochs * self.steps_per_epoch

    def batches(self) -> Iterator[Batch]:
        """Yield the batches of the fit; a loader that raises is noted."""
        try:
            yield from itertools.chain.from_iterable(itertools.repeat(self.loader, self.epochs))
        except Exception as error:
            self.error = error


class Step(nn.Module):
    """A method's step as a call, so that ``functional_call`` swaps all tensors of the method for the time of it."""

    def __init__(self, method: FederatedModule) -> None:
        super().__init__()
        self.method = method

    def forward(self, images: Tensor, labels: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return what a step minimises, a scalar, and the losses of the examples, shape (B,)."""
        losses = self.method.objective(self.method.logits(images), labels)
        return self.method.batch_loss(losses, present), losses


def train(
    module: FederatedModule, members: Sequence[Member], arithmetic: Callable[[], AbstractContextManager[Any]]
) -> list[State]:
    """Train clients from the state that a module holds, each with its own batches and its own number of steps.

    Args:
        module: Holds what was sent to all, and is in training mode. Its state does not change.
        members: The clients.
        arithmetic: The context of forward passes.

    Returns:
        What of each client's network may have changed, by the module's names: its parameters and buffers.

    Raises:
        RuntimeError: If the network or the method cannot be traced by ``vmap``.
    """
    # those with most steps first: at each step the clients that still train are the first ones
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
    options: dict[str, Any] = {name: module.hparams[name] for name in ("lr", "momentum", "weight_decay")}
    momenta: list[Tensor | None] = [None] * len(trained)  # torch's SGD makes them at the first step
    step = Step(module)
    streams = [member.batches() for member in queue]
    with masked_batch_norm(module.model) as mask:

        def losses_of(varying: State, images: Tensor, labels: Tensor, present: Tensor | None) -> Any:
            mask.present, mask.moved = present, {}
            held = {f"method.{name}": value for name, value in varying.items()}
            return (*functional_call(step, held, (images, labels, present)), mask.moved)

        for number in range(queue[0].num_steps):
            active = [member for member in queue if member.num_steps > number]
            count = len(active)
            batches = [next(stream, None) for stream in streams[:count]]
            images, labels, present, sizes = padded(batches)
            images = module.prepare(images.flatten(0, 1)).view(*images.shape)
            labels = labels.to(images.device)
            now = {name: value[:count] for name, value in stacks.items()}
            params = {name: now[name].detach().requires_grad_() for name in trained}
            given = {**now, **{name: value[:count] for name, value in constants.items()}, **params}
            with arithmetic():
                total, losses, moved = vmap(losses_of, in_dims=(0, 0, 0, None if present is None else 0))(
                    given, images, labels, present
                )
            gradients = torch.autograd.grad(total.sum(), list(params.values()), materialize_grads=True)
            with torch.no_grad():
                for name, value in moved.items():
                    now[f"model.{name}"].copy_(value)
                moving = [None if value is None else value[:count] for value in momenta]
                sgd(
                    list(params.values()),
                    list(gradients),
                    moving,
                    foreach=True,
                    dampening=0.0,
                    nesterov=options["momentum"] > 0,
                    maximize=False,
                    **options,
                )
            momenta = moving if number == 0 else momenta
            _note(
                active,
                number,
                labels,
                losses.detach(),
                sizes,
                keeps=type(module).observe is not FederatedModule.observe,
            )
    first_names = {id(value): f"model.{name}" for name, value in (*parameters.items(), *buffers.items())}
    for name, value in module.model.named_parameters(remove_duplicate=False):
        if (first := first_names[id(value)]) in stacks:
            stacks[f"model.{name}"] = stacks[first]  # tied parameters
    rows = {place: row for row, place in enumerate(order)}
    return [{name: value[rows[place]] for name, value in stacks.items()} for place in range(len(members))]


def padded(batches: Sequence[Batch | None]) -> tuple[Tensor, Tensor, Tensor | None, list[int]]:
    """Put the batches of several clients into one tensor.

    Args:
        batches: Of each client; None: it has none.

    Returns:
        Images (G, B, ...), labels (G, B), which of them are there (G, B) or None if all are, and how many each client has. What is
        not there is a copy of the client's first example, so that nothing in it is out of range.
    """
    found = [batch for batch in batches if batch is not None]
    like_images, like_labels = found[0] if found else (torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64))
    sizes = [0 if batch is None else len(batch[1]) for batch in batches]
    most = max(1, *sizes)
    if min(sizes) == most:
        images, labels = (torch.stack(parts) for parts in zip(*found, strict=True))
        return images, labels, None, sizes
    images = like_images.new_zeros(len(batches), most, *like_images.shape[1:])
    labels = like_labels.new_zeros(len(batches), most)
    for place, batch in enumerate(batches):
        if batch is not None:
            for whole, part in zip((images, labels), batch, strict=True):
                whole[place, : len(part)] = part
                whole[place, len(part) :] = part[0]
    present = torch.arange(most) < torch.tensor(sizes)[:, None]
    return images, labels, present.to(images.device), sizes


def _stacked(sent: Tensor, own: Sequence[Tensor | None]) -> Tensor:
    if all(value is None for value in own):
        return sent.expand(len(own), *sent.shape).clone(memory_format=torch.contiguous_format)
    return torch.stack([sent if value is None else value.to(sent) for value in own])


def _note(
    active: Sequence[Member], number: int, labels: Tensor, losses: Tensor, sizes: Sequence[int], *, keeps: bool
) -> None:
    """Add a step to the means of those clients that are in their last epoch."""
    last = [row for row, member in enumerate(active) if number >= member.num_steps - member.steps_per_epoch]
    if not last:
        return
    whole = min(sizes) == losses.shape[1]
    present = (
        None
        if whole
        else torch.arange(losses.shape[1], device=losses.device) < torch.tensor(sizes).to(losses.device)[:, None]
    )
    sums = (losses if present is None else losses.where(present, 0)).sum(1).unbind()
    for row in last:
        member = active[row]
        member.loss_sum += sums[row]
        member.num_seen += sizes[row]
        if keeps:
            member.seen.append((labels[row, : sizes[row]], losses[row, : sizes[row]]))


# BatchNorm


@dataclass
class Mask:
    """What BatchNorm layers are told in a step, and what they tell.

    Attributes:
        present: Which examples of the batch are there, shape (B,); None: all.
        moved: Their running statistics after the step, by the network's names.
    """

    present: Tensor | None = None
    moved: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def masked_batch_norm(model: nn.Module) -> Iterator[Mask]:
    """Let BatchNorm layers in training mode take their statistics over the examples that are there, and return what has moved.

    torch's own moves its running statistics in place, and counts every example.
    """
    mask, layers = Mask(), [(name, part) for name, part in model.named_modules() if type(part) in BATCH_NORMS]
    for name, layer in layers:
        layer.forward = _Masked(name, layer, mask)
    try:
        yield mask
    finally:
        for _, layer in layers:
            del layer.forward


BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class _Masked:
    """The forward pass of a BatchNorm layer over the examples that are there."""

    name: str
    layer: Any
    mask: Mask

    def __call__(self, inputs: Tensor) -> Tensor:
        """Normalise inputs (B, C, ...)."""
        layer = self.layer
        if not layer.training and layer.running_mean is not None:
            return cast(Tensor, type(layer).forward(layer, inputs))
        wide = inputs if inputs.dtype == torch.float64 else inputs.float()
        dims = [0, *range(2, inputs.ndim)]
        shape = [1, -1] + [1] * (inputs.ndim - 2)
        if self.mask.present is None:
            count: float | Tensor = float(inputs.numel() // inputs.shape[1])
            weight: float | Tensor = 1.0
        else:
            weight = self.mask.present.to(wide.dtype).reshape(-1, *[1] * (inputs.ndim - 1))
            count = weight.sum() * (inputs.numel() // (inputs.shape[0] * inputs.shape[1]))
        mean = (wide * weight).sum(dims) / count
        centred = wide - mean.reshape(shape)
        variance = (centred.square() * weight).sum(dims) / count
        if layer.training and layer.running_mean is not None:
            self._move(mean.detach(), variance.detach() * (count / (count - 1)))
        scaled = centred * (variance + layer.eps).rsqrt().reshape(shape)
        if layer.affine:
            scaled = scaled * layer.weight.to(wide.dtype).reshape(shape) + layer.bias.to(wide.dtype).reshape(shape)
        return cast(Tensor, scaled.to(inputs.dtype))

    def _move(self, mean: Tensor, variance: Tensor) -> None:
        layer, prefix = self.layer, f"{self.name}." if self.name else ""
        seen = layer.num_batches_tracked + 1
        share = 1 / seen if layer.momentum is None else layer.momentum
        self.mask.moved |= {
            f"{prefix}num_batches_tracked": seen,
            f"{prefix}running_mean": layer.running_mean + share * (mean.to(layer.running_mean) - layer.running_mean),
            f"{prefix}running_var": layer.running_var + share * (variance.to(layer.running_var) - layer.running_var),
        }
