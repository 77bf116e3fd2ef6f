"""Networks of all kinds, small and in float64: what people build that a way to the weight-net gradient may not see."""

import random
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

NUM_CLASSES, SIZE, WIDTH = 4, 4, 6


class Block(nn.Module):
    """A body between two linear layers, checkpointed if ``reentrant`` is not None."""

    def __init__(self, body: nn.Module, reentrant: bool | None = None) -> None:
        super().__init__()
        self.first, self.body, self.last = nn.Linear(SIZE * SIZE, WIDTH), body, nn.Linear(WIDTH, NUM_CLASSES)
        self.reentrant = reentrant

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.first(images.flatten(1)).tanh()
        if self.reentrant is None:
            return self.last(self.body(hidden))
        return self.last(checkpoint(self.body, hidden, use_reentrant=self.reentrant))


def wide(*parts: nn.Module, reentrant: bool | None = None) -> Block:
    """A block whose body has a layer before and after some parts."""
    return Block(nn.Sequential(nn.Linear(WIDTH, WIDTH), *parts, nn.Linear(WIDTH, WIDTH), nn.Tanh()), reentrant)


def layer() -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH)


class Drawn(nn.Module):
    """Scales what it gets by a number that is drawn elsewhere than from torch."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * (1 + self.draw())


def with_hook() -> Block:
    network = Block(layer())
    network.body.register_forward_hook(lambda part, inputs, output: output.tanh() * part.weight.sum())
    return network


def with_pre_hook() -> Block:
    network = Block(layer())
    network.body.register_forward_pre_hook(lambda part, inputs: (inputs[0] * 2 * part.bias,))
    return network


def with_keyword_hook() -> Block:
    network = Block(layer())
    network.body.register_forward_pre_hook(
        lambda part, inputs, options: ((), {"input": inputs[0] * part.bias}), with_kwargs=True
    )
    return network


def with_backward_hook() -> Block:
    network = Block(layer())
    network.body.register_full_backward_hook(lambda part, before, after: (before[0] * 3,))
    return network


def with_parameter_hook() -> Block:
    network = Block(part := layer())
    part.weight.register_hook(lambda gradient: gradient * 0.5)
    return network


def with_own_forward() -> Block:
    network = Block(part := layer())
    part.forward = lambda hidden: nn.functional.linear(hidden, part.weight, part.bias) * 2  # type: ignore[method-assign]
    return network


class Listed(nn.Module):
    """Reaches a layer through a plain list."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIZE * SIZE, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)
        self.parts = [self.first]

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.parts[0](images.flatten(1)).tanh())


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(SIZE * SIZE, WIDTH), nn.Linear(SIZE * SIZE, WIDTH)
        self.two.weight = self.one.weight
        self.last = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        images = images.flatten(1)
        return self.last(self.one(images).tanh() * self.two(images))


class Complex(nn.Module):
    """A complex weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(SIZE * SIZE, WIDTH, dtype=torch.complex128) * 0.3)
        self.last = nn.Linear(WIDTH, NUM_CLASSES).double()

    def forward(self, images: Tensor) -> Tensor:
        return self.last((images.flatten(1).to(self.weight.dtype) @ self.weight).abs().square())

    def double(self) -> "Complex":
        return self


class Counting(nn.Module):
    """Buffers that training uses and moves, in place and by assignment, and a plain counter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(SIZE * SIZE, WIDTH), nn.Linear(WIDTH, NUM_CLASSES)
        self.register_buffer("in_place", torch.ones(1))
        self.register_buffer("assigned", torch.ones(1))
        self.calls = 0

    def forward(self, images: Tensor) -> Tensor:
        if self.training:
            self.in_place *= 0.9
            self.assigned = self.assigned + 0.5
            self.calls += 1
        return self.last((self.first(images.flatten(1)) * self.in_place).tanh() * self.assigned)


class Recurrent(nn.Module):
    """A recurrent layer over the rows."""

    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.rows, self.last = kind(SIZE, WIDTH, batch_first=True), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.rows(images.flatten(1).unflatten(1, (SIZE, SIZE)))[0].mean(1))


class Words(nn.Module):
    """An embedding with padding, of pixels as words."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.last = nn.Embedding(8, WIDTH, padding_idx=0), nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.words((images.flatten(1).abs() * 2).long().clamp(max=7)).mean(1))


class Attention(nn.Module):
    """A transformer layer over the rows, with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = nn.TransformerEncoderLayer(SIZE, 2, 8, dropout=0.3, batch_first=True)
        self.last = nn.Linear(SIZE, NUM_CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.rows(images.flatten(1).unflatten(1, (SIZE, SIZE))).mean(1))


class Cube(torch.autograd.Function):
    """An operator of one's own, with derivatives but without forward mode."""

    @staticmethod
    def forward(context: Any, values: Tensor) -> Tensor:
        context.save_for_backward(values)
        return values**3

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (values,) = context.saved_tensors
        return gradient * 3 * values**2


class Once(Cube):
    """The same, but differentiable only once."""

    backward: ClassVar[Any] = staticmethod(torch.autograd.function.once_differentiable(Cube.backward))


class Applied(nn.Module):
    """Applies an operator."""

    def __init__(self, operator: type[Cube]) -> None:
        super().__init__()
        self.operator = operator

    def forward(self, values: Tensor) -> Tensor:
        return self.operator.apply(values)


def frozen() -> Block:
    network = Block(layer())
    network.body.requires_grad_(False)
    return network


def lazy() -> nn.Module:
    network = nn.Sequential(nn.Flatten(), nn.LazyLinear(WIDTH), nn.Tanh(), nn.LazyLinear(NUM_CLASSES))
    network(torch.randn(2, 1, SIZE, SIZE))
    return network


def settled(part: nn.Linear) -> Block:
    """A block whose spectral norm has found its vectors, so that they are constants up to second order."""
    network = Block(part)
    for _ in range(300):
        network(torch.ones(1, 1, SIZE, SIZE))
    return network


def partly_in_evaluation() -> Block:
    network = wide(nn.BatchNorm1d(WIDTH))
    network.body[1].eval()
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "plain": (lambda: Block(layer()), set()),
    "weight norm, hooks": (lambda: Block(nn.utils.weight_norm(layer())), {"higher", "forward"}),
    "spectral norm, hooks": (lambda: settled(nn.utils.spectral_norm(layer())), {"higher", "forward"}),
    "weight norm": (lambda: Block(parametrizations.weight_norm(layer())), {"forward"}),
    "spectral norm": (lambda: settled(parametrizations.spectral_norm(layer())), {"forward"}),
    "orthogonal": (lambda: Block(parametrizations.orthogonal(layer())), set()),
    "tied": (Tied, set()),
    "frozen": (frozen, set()),
    "lazy, initialised": (lazy, set()),
    "complex": (Complex, set()),
    "buffers": (Counting, set()),
    "dropout": (lambda: wide(nn.Dropout(0.4)), set()),
    "draws of random": (lambda: wide(Drawn(random.random)), set()),
    "draws of NumPy": (lambda: wide(Drawn(np.random.random)), set()),
    "forward hook": (with_hook, {"higher"}),
    "forward pre-hook": (with_pre_hook, {"higher"}),
    "hook with keywords": (with_keyword_hook, {"higher"}),
    "backward hook": (with_backward_hook, {"higher", "forward"}),
    "forward of an instance": (with_own_forward, {"higher"}),
    "layers in a list": (Listed, {"higher"}),
    "checkpointed": (lambda: wide(nn.Tanh(), reentrant=False), set()),
    "checkpointed, BatchNorm and dropout": (
        lambda: wide(nn.BatchNorm1d(WIDTH), nn.Dropout(0.4), reentrant=False),
        set(),
    ),
    "checkpointed, weight norm": (
        lambda: Block(parametrizations.weight_norm(layer()), reentrant=False),
        {"forward"},
    ),
    "BatchNorm": (lambda: wide(nn.BatchNorm1d(WIDTH)), set()),
    "BatchNorm, cumulative": (lambda: wide(nn.BatchNorm1d(WIDTH, momentum=None)), set()),
    "BatchNorm without statistics": (lambda: wide(nn.BatchNorm1d(WIDTH, track_running_stats=False)), set()),
    "BatchNorm, frozen": (partly_in_evaluation, set()),
    "LayerNorm": (lambda: wide(nn.LayerNorm(WIDTH)), set()),
    "GroupNorm": (lambda: wide(nn.GroupNorm(3, WIDTH)), set()),
    "attention": (Attention, set()),
    "LSTM": (lambda: Recurrent(nn.LSTM), set()),
    "GRU": (lambda: Recurrent(nn.GRU), set()),
    "RNN": (lambda: Recurrent(nn.RNN), set()),
    "embedding": (Words, set()),
    "in place": (lambda: wide(nn.ELU(inplace=True)), set()),
    "operator without forward mode": (lambda: wide(Applied(Cube)), {"forward"}),
}
"""Name -> how to build it, and the ways that are not right for it."""

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "checkpointed, reentrant": (lambda: wide(nn.Tanh(), reentrant=True), "use_reentrant=True"),
    "operator without second derivative": (lambda: wide(Applied(Once)), "(gradient differs|jvp function)"),
    "hook of a parameter": (with_parameter_hook, "gradient differs"),
    "lazy": (lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(NUM_CLASSES)), "lazy layers"),
}
"""Name -> how to build it, and what is said of it."""
