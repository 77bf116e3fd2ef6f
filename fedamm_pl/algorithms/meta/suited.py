"""Which ways of computing the weight-net gradient work for a network.

``higher`` runs a patched copy of the network, which ignores forward hooks and tensors or modules in plain attributes.
Forward mode needs a derivative that not every operator has. Where an operator can be differentiated only once, a double
backward pass may silently leave out its part. Such faults would go unnoticed or stop a run in the middle, and no list
of causes is complete. So each way is compared once, on a few examples, with first derivatives of the network itself: h
can be computed from the gradients of the single examples.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy

from fedamm_pl.algorithms.meta.virtual_steps import (
    WAYS,
    Differentiation,
    Tensors,
    copied_buffers,
    slopes_of,
    trainable,
)
from fedamm_pl.data.client import Batch
from fedamm_pl.losses import example_losses
from fedamm_pl.models import logits_of
from fedamm_pl.models.holding import holding
from fedamm_pl.seeding import drawing_from, torch_generator

NUM_EXAMPLES = 4
"""Number of examples in the comparison."""
LR = 1e3
"""Step size in the comparison; it is large so that w_hat - w keeps the digits of the gradient."""

UNKNOWN = "unknown"
"""Outcome for a network that has diverged: nothing can be concluded, and the network is examined again."""

_faults: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def suited(
    model: nn.Module, batch: Batch, wanted: Differentiation, anew: bool = False
) -> tuple[Differentiation, str | None]:
    """Return a way that works for a network and, if it is not the wanted one, the reason.

    Args:
        model: The classifier.
        batch: Images prepared for the model, and labels; a few are used.
        wanted: One of the three ways; if it does not work, functional and then forward are tried.
        anew: Whether to examine a network again that was examined before.

    Raises:
        ValueError: If no way works.
    """
    reasons: dict[Differentiation, str] = {}
    ways: tuple[Differentiation, ...] = (wanted, "functional", "forward")
    for way in dict.fromkeys(ways):
        reason = fault(model, batch, way, anew)
        if reason is None:
            return way, reasons.get(wanted)
        reasons[way] = reason
    raise unsuited(model, wanted, reasons[wanted])


def unsuited(model: nn.Module, way: str, reason: str) -> ValueError:
    """Return the error for a way that does not work for a network."""
    return ValueError(
        f"Expected `model` to be a network that differentiation {way} is right for, got {type(model).__name__}: {reason}."
    )


def fault(model: nn.Module, batch: Batch, way: str, anew: bool = False) -> str | None:
    """Return why a way does not work for a network, or None if it works; see :func:`suited`.

    Each network is examined once, in the mode that it is in at that time. The network and the random state are not
    changed.
    """
    found = _faults.setdefault(model, {})
    if anew or way not in found:
        reason = _examined(model, batch, way)
        if reason == UNKNOWN:
            return None
        found[way] = reason
    return found[way]


def _examined(model: nn.Module, batch: Batch, way: str) -> str | None:
    images, labels = (part[:NUM_EXAMPLES] for part in batch)
    if any(is_lazy(parameter) for parameter in model.parameters()):
        return "it has lazy layers: call it once on a batch of images first"
    with _apart(model, images.device):
        try:
            moves, directions, expected = _reference(model, (images, labels))
            if not all(value.isfinite().all() for value in (*moves.values(), expected)):
                return UNKNOWN
        except Exception as error:  # whatever a network raises
            return _line(error)
    with _apart(model, images.device):
        try:
            weight_net = _OneWeightEach(len(images)).to(images.device)
            step = WAYS[way](model, weight_net, (images, labels), LR, False)
            actual = step.weight_net_gradient(directions)["weights"]
        except Exception as error:
            return _line(error)
    before = trainable(model)
    scale = max((float(move.norm()) for move in moves.values()), default=0.0)
    steps = ((step.params[name] - before[name].detach(), move, scale) for name, move in moves.items())
    if not all(_close(*step) for step in (*steps, (actual, expected, 1.0))):
        return "its gradient differs from the network's own"
    return None


def _reference(model: nn.Module, batch: Batch) -> tuple[Tensors, Tensors, Tensor]:
    """Return w_hat - w, an artificial meta gradient, and h, from first derivatives of the network itself."""
    images, labels = batch
    weight_net, params = _OneWeightEach(len(images)).to(images.device), trainable(model)

    def gradients() -> tuple[Tensors, Tensors, Tensor]:
        losses = example_losses(logits_of(model(images)), labels)
        slopes = slopes_of(losses, labels, weight_net)

        def gradient(values: Tensor, weights: Tensor | None = None) -> Tensors:
            found = torch.autograd.grad(
                values, list(params.values()), weights, retain_graph=True, materialize_grads=True
            )
            return dict(zip(params, found, strict=True))

        moves = {name: -LR * value for name, value in gradient(losses, slopes.detach()).items()}
        directions = _directions(moves)
        inner = [_dot(gradient(loss), directions) for loss in losses]
        (h,) = torch.autograd.grad(-LR * (slopes * torch.stack(inner).to(slopes.dtype)).sum(), weight_net.weights)
        return moves, directions, h

    return holding(model, copied_buffers(model), gradients)


def _dot(left: Tensors, right: Tensors) -> Tensor:
    parts = [(left[name].conj() * right[name]).real.sum() for name in left]
    return torch.stack([part.double() if part.device.type != "mps" else part for part in parts]).sum()


class _OneWeightEach(nn.Module):
    """Weight net with one parameter per example: the weight is this parameter times the loss."""

    def __init__(self, num_examples: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(1.0, 2.0, num_examples))

    def forward(self, losses: Tensor) -> Tensor:
        return self.weights * losses


def _directions(moves: Tensors) -> Tensors:
    """Draw a meta gradient with parts of similar size for all parameters; it is 0 where the network's gradient is 0."""
    generator = torch_generator(0)
    norms = {name: float(move.norm()) for name, move in moves.items()}
    floor = max(1e-2 * max(norms.values(), default=0.0), torch.finfo(torch.float32).tiny)
    return {
        name: torch.randn(move.shape, generator=generator, dtype=move.dtype).to(move.device)
        * (move != 0)
        / (norms[name] + floor)
        for name, move in moves.items()
    }


def _close(actual: Tensor, expected: Tensor, scale: float) -> bool:
    """Compare by length: the tolerance covers rounding, also of reduced-precision GPU products, but no real error."""
    tolerance = max(0.05, 10 * torch.finfo(expected.dtype).eps ** 0.5)
    return bool((actual - expected).norm() <= tolerance * (expected.norm() + 1e-3 * scale))


def _line(error: Exception) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__).rstrip(".")


@contextmanager
def _apart(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo all side effects: random draws, and changes of plain attributes by forward passes, for example counters."""
    before = [(part, dict(vars(part))) for part in model.modules()]
    with (
        warnings.catch_warnings(),
        drawing_from(0, device),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
    ):
        warnings.simplefilter("ignore")  # the step itself will give the same warnings
        try:
            yield
        finally:
            for part, attributes in before:
                vars(part).clear()
                vars(part).update(attributes)
