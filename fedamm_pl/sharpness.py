"""Sharpness-aware SGD (Foret et al., ICLR 2021) and its adaptive form (Kwon et al., ICML 2021), for FedSAM and FedASAM.

The federated methods: Caldarola, Caputo, Ciccone, *Improving Generalization in Federated Learning by Seeking Flat
Minima*, ECCV 2022.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fedamm_pl.precision import at_least_float32

ETA = 0.2
"""Added to the absolute weights that scale distances in the adaptive form."""


def worst_point_nearby(
    weights: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rho: float, *, adaptive: bool
) -> dict[str, Tensor]:
    """Return eps, the step from the weights w to the point nearby with the highest loss, to first order.

    ``eps = rho G / |G|`` with one Euclidean norm over all tensors. In the adaptive form ``eps = rho T^2 G / |T G|``
    with ``T = |w| + 0.2`` for tensors whose name ends in ``weight`` and T = 1 for the others. eps is 0 where the
    gradient is 0.

    Args:
        weights: w by name.
        gradients: G by the same names.
        rho: Length of the step.
        adaptive: Whether distances are relative to the weights.

    Returns:
        eps by name, in float32 or more.

    Example:
        >>> worst_point_nearby({"a": torch.zeros(2)}, {"a": torch.tensor([3.0, 4.0])}, 1.0, adaptive=False)
        {'a': tensor([0.6000, 0.8000])}
    """
    slopes = {name: at_least_float32(gradient) for name, gradient in gradients.items()}
    scales = {
        name: at_least_float32(weights[name]).abs() + ETA
        for name in slopes
        if adaptive and name.rpartition(".")[2] == "weight"
    }
    scaled = {name: slope * scales.get(name, 1.0) for name, slope in slopes.items()}
    length = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(value) for value in scaled.values()]))
    return {name: rho * value * scales.get(name, 1.0) / (length + 1e-16) for name, value in scaled.items()}


class SharpnessAwareSGD(torch.optim.SGD):
    """SGD that steps from w with the gradient at w + eps on the same batch; a step has two forward and backward passes.

    Momentum and weight decay are applied at w. See :func:`worst_point_nearby` for eps.

    Args:
        parameters: Parameters by name.
        lr: Learning rate.
        momentum: Nesterov momentum; 0 for none.
        weight_decay: Weight decay.
        rho: Length of eps; 0 gives plain SGD with one pass per step.
        adaptive: Whether distances are relative to the weights.
        first_pass: Returns the context of the first of two passes.
        second_pass: Returns the context of the second pass.
    """

    def __init__(
        self,
        parameters: Mapping[str, torch.nn.Parameter],
        lr: float,
        momentum: float,
        weight_decay: float,
        rho: float,
        adaptive: bool,
        first_pass: Callable[[], AbstractContextManager[None]],
        second_pass: Callable[[], AbstractContextManager[None]],
    ) -> None:
        super().__init__(
            parameters.values(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=weight_decay
        )
        self._parameters = dict(parameters)
        self._rho, self._adaptive = rho, adaptive
        self._first_pass, self._second_pass = first_pass if rho > 0 else nullcontext, second_pass

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take a step.

        Args:
            closure: Clears the gradients, computes the loss and its gradients, and returns the loss.

        Raises:
            ValueError: If there is no closure; with the precision 16-mixed, Lightning passes none.
        """
        if closure is None:
            raise ValueError("Expected a `closure` for sharpness-aware steps, got none: 16-mixed cannot train by them.")
        with self._first_pass(), torch.enable_grad():
            loss = closure()
        moved = {name: value for name, value in self._parameters.items() if value.grad is not None}
        if self._rho > 0 and moved:
            before = {name: value.detach().clone() for name, value in moved.items()}
            gradients = {name: value.grad for name, value in moved.items() if value.grad is not None}
            for name, eps in worst_point_nearby(before, gradients, self._rho, adaptive=self._adaptive).items():
                moved[name].add_(eps)  # rounded once, if the weights have half precision
            try:
                with self._second_pass(), torch.enable_grad():
                    closure()
            finally:
                for name, value in before.items():
                    moved[name].copy_(value)
        super().step()
        return loss
