"""Server optimisers: FedAvgM (Hsu et al., 2019), FedAdagrad, FedAdam, FedYogi (Reddi et al., ICLR 2021).

The averaged update Delta = sum_k p_k (w_k - w), from any aggregation, takes the place of the gradient in an optimizer:
the server takes a step along it from the last weights w. A step of length 1 gives the average itself.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from fedamm_pl.federation.config import FederationConfig, ServerOptimizerName
from fedamm_pl.protocol.messages import State

FIRST, SECOND = "server_optimizer.m.", "server_optimizer.v."
"""Prefixes of the first and second moments in the server's state."""


def first_moment(kind: ServerOptimizerName, moment: Tensor, update: Tensor, momentum: float) -> Tensor:
    """Return ``m <- b m + Delta`` for momentum, ``m <- b m + (1 - b) Delta`` for the others.

    Args:
        kind: Which optimizer.
        moment: m, of any shape.
        update: Delta, of the same shape.
        momentum: b.
    """
    return momentum * moment + (1.0 if kind == "momentum" else 1 - momentum) * update


def second_moment(kind: ServerOptimizerName, moment: Tensor, update: Tensor, beta2: float) -> Tensor:
    """Return the next second moment v, element by element.

    adagrad: ``v + Delta^2``; adam: ``b v + (1 - b) Delta^2``; yogi: ``v - (1 - b) Delta^2 sign(v - Delta^2)``.

    Args:
        kind: Which optimizer, one of these.
        moment: v, of any shape.
        update: Delta, of the same shape.
        beta2: b.

    Example:
        >>> second_moment("yogi", torch.tensor([1.0, 9.0]), torch.tensor([2.0, 2.0]), 0.75)
        tensor([2., 8.])
    """
    square = update**2
    match kind:
        case "adagrad":
            return moment + square
        case "adam":
            return beta2 * moment + (1 - beta2) * square
        case "yogi":
            return moment - (1 - beta2) * square * (moment - square).sign()
        case _:
            raise ValueError(f"Expected `kind` to be adagrad, adam or yogi, got {kind}.")


@dataclass(frozen=True)
class ServerOptimizer:
    """A step from the server's last state towards the average of a round.

    There is no bias correction; m starts at 0 and v at tau^2. Moments are float32, on the CPU, and part of the server's
    state.

    Attributes:
        kind: Which optimizer.
        lr: Step size.
        momentum: b of the first moment.
        beta2: b of the second moment.
        tau: Added to the square root of the second moment.
    """

    kind: ServerOptimizerName
    lr: float
    momentum: float
    beta2: float
    tau: float

    @classmethod
    def of(cls, config: FederationConfig) -> "ServerOptimizer | None":
        """Return the optimizer that a configuration names, or None if the average is used unchanged."""
        kind = config.server_optimizer
        if kind == "none":
            return None
        lr, momentum = config.server_lr, config.server_momentum
        return cls(
            kind,
            (1.0 if kind == "momentum" else 0.01) if lr is None else lr,
            (0.0 if kind == "adagrad" else 0.9) if momentum is None else momentum,
            config.server_beta2,
            config.server_tau,
        )

    def step(self, state: State, average: State, trained: Collection[str]) -> State:
        """Return the average, in which some entries are replaced by a step from the last state, and the moments.

        Args:
            state: The last state of the server, with the moments of the last step if there was one.
            average: The averaged shared entries of the round.
            trained: Names of the entries for which a step is taken; the others stay averaged.
        """
        stepped: State = {}
        for name in (name for name in average if name in trained):
            last, update = state[name], (average[name] - state[name]).to("cpu", torch.float32)
            moment = first_moment(self.kind, _moment(state, FIRST + name, update, 0.0), update, self.momentum)
            stepped[FIRST + name], direction = moment, moment
            if self.kind != "momentum":
                second = _moment(state, SECOND + name, update, self.tau**2)
                second = second_moment(self.kind, second, update, self.beta2)
                stepped[SECOND + name], direction = second, moment / (second.sqrt() + self.tau)
            stepped[name] = last + (self.lr * direction).to(last)
        return {name: stepped.get(name, value) for name, value in {**average, **stepped}.items()}


def _moment(state: State, name: str, like: Tensor, start: float) -> Tensor:
    return state[name].cpu() if name in state else torch.full_like(like, start)
