"""Which ways to the weight-net gradient are right for a network.

``higher`` runs a patched copy of the network that knows no forward hooks and none of the tensors or modules that lie in
plain attributes; forward mode needs a derivative that not every operator has. Both would go wrong unseen or fail in the
middle of a run, and no list of causes is complete. So each is compared with ``functional``, which runs the network itself,
on a few examples, once.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedamm_pl.algorithms.virtual_steps import WAYS, Tensors, trainable
from fedamm_pl.data.client import Batch
from fedamm_pl.seeding import drawing_from, torch_generator

NUM_EXAMPLES = 8
"""So many examples tell whether two ways differ."""
LR = 1e3
"""Step size of the comparison: large, so that w_hat - w keeps the digits of the gradient."""

_faults: WeakKeyDictionary[nn.Module, dict[str, str | None]] = WeakKeyDictionary()


def fault(model: nn.Module, batch: Batch, differentiation: str, anew: bool = False) -> str | None:
    """Return why a way is not right for a network, or None.

    Each network is examined once, in the mode it is in. It stays as it is, random numbers too.

    Args:
        model: The classifier.
        batch: Images as the model takes them, and labels; a few are used.
        differentiation: One of the three ways.
        anew: Whether to examine a network that was examined before.

    Raises:
        ValueError: If not even ``functional`` can differentiate the network.
    """
    found = _faults.setdefault(model, {})
    if anew or differentiation not in found:
        found[differentiation] = _examined(model, batch, differentiation)
    return found[differentiation]


def _examined(model: nn.Module, batch: Batch, differentiation: str) -> str | None:
    images, labels = (part[:NUM_EXAMPLES] for part in batch)
    try:
        expected = _outcome(model, (images, labels), "functional")
    except Exception as error:  # whatever the network raises
        raise ValueError(
            f"Expected `model` to be a network with second derivatives, got {type(model).__name__}: {_line(error)}"
        ) from error
    if differentiation == "functional" or not all(value.isfinite().all() for value in expected):
        return None
    try:
        actual = _outcome(model, (images, labels), differentiation)
    except Exception as error:
        return _line(error)
    steps = zip(actual[:-1], expected[:-1], strict=True)
    scale = max(float(value.norm()) for value in expected[:-1])
    if not all(_close(step, value, scale) for step, value in steps) or not _close(actual[-1], expected[-1], 1.0):
        return "it computes another gradient than the network's own"
    return None


def _outcome(model: nn.Module, batch: Batch, differentiation: str) -> list[Tensor]:
    """Return the virtual step of each parameter, and h of a made-up meta gradient for a weight of its own each example."""
    images, _ = batch
    weight_net = _OneWeightEach(len(images)).to(images.device)
    before = trainable(model)
    with (
        warnings.catch_warnings(),
        drawing_from(0, images.device),
        torch.enable_grad(),
        torch.autocast(images.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        _as_it_was(model),
    ):
        warnings.simplefilter("ignore")  # the step itself will say it
        step = WAYS[differentiation](model, weight_net, batch, LR, False)
        moves = {name: value - before[name].detach() for name, value in step.params.items()}
        weights = step.weight_net_gradient(_directions(moves))
    return [*moves.values(), weights["weights"]]


class _OneWeightEach(nn.Module):
    """Weights that depend on a number of each example's own and on its loss."""

    def __init__(self, num_examples: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.linspace(1.0, 2.0, num_examples))

    def forward(self, losses: Tensor) -> Tensor:
        return self.weights * losses


def _directions(moves: Tensors) -> Tensors:
    """Draw a meta gradient in which each parameter has about the same part; where the network's own is 0, it is 0 too."""
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
    """Compare by length. What is wrong is far off; rounding, also of a GPU's shortened products, is not."""
    tolerance = max(0.05, 10 * torch.finfo(expected.dtype).eps ** 0.5)
    return bool((actual - expected).norm() <= tolerance * (expected.norm() + 1e-3 * scale))


def _line(error: Exception) -> str:
    return (next(iter(str(error).splitlines()), "") or type(error).__name__).rstrip(".")


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Undo what forward passes leave in plain attributes, counters for example."""
    before = [(part, dict(vars(part))) for part in model.modules()]
    try:
        yield
    finally:
        for part, attributes in before:
            vars(part).clear()
            vars(part).update(attributes)
