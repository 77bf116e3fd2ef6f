"""Aggregation of many states into one: the weighted mean, robust means, sums, and bounds on a single update."""

import math
from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.protocol.messages import State
from fedamm_pl.protocol.reduction import Reduction, reduction_of


class Aggregate(Protocol):
    """Interface: combines states, added one at a time, into one."""

    def add(self, state: State, weight: float) -> None:
        """Add a state; names and shapes must be those of the earlier states."""
        ...

    def compute(self) -> State:
        """Return the aggregate in the types of the first state.

        Raises:
            ValueError: If no state with a weight above 0 was added.
        """
        ...


class WeightedAverage:
    """A running weighted mean of states (McMahan et al., AISTATS 2017, algorithm 1).

    Its memory does not depend on the number of states. Sums are in float64 and are cast back at the end; integer
    tensors become the weighted mean rounded to nearest.

    Example:
        >>> average = WeightedAverage()
        >>> average.add({"w": torch.tensor([1.0])}, weight=3)
        >>> average.add({"w": torch.tensor([5.0])}, weight=1)
        >>> average.compute()
        {'w': tensor([2.])}
    """

    def __init__(self) -> None:
        self.total = 0.0
        self._sums: State = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, state: State, weight: float) -> None:
        """Add a state.

        Args:
            state: Tensors by name; names and shapes must be those of the earlier states.
            weight: Its weight, 0 or more; weights are normalised at the end.
        """
        if not self._sums:
            self._dtypes = {name: value.dtype for name, value in state.items()}
            self._sums = {name: torch.zeros_like(float64(value)) for name, value in state.items()}
        for name, total in self._sums.items():
            total.add_(state[name].to(total.device, torch.float64), alpha=weight)
        self.total += weight

    def compute(self) -> State:
        """Return the mean in the types of the first state.

        Raises:
            ValueError: If no state with a weight above 0 was added.
        """
        if self.total <= 0:
            raise ValueError(f"Expected states of a total weight above 0, got {self.total}.")
        return {name: _cast(total / self.total, self._dtypes[name]) for name, total in self._sums.items()}


class Sum(WeightedAverage):
    """A running sum of states, in float64; weights are ignored.

    Example:
        >>> total = Sum()
        >>> total.add({"n": torch.tensor([1])}, weight=3)
        >>> total.add({"n": torch.tensor([5])}, weight=1)
        >>> total.compute()
        {'n': tensor([6])}
    """

    def add(self, state: State, weight: float = 1.0) -> None:
        """Add a state."""
        super().add(state, 1.0)

    def compute(self) -> State:
        """Return the sum in the types of the first state."""
        return {name: _cast(total, self._dtypes[name]) for name, total in self._sums.items()}


class TrimmedMean:
    """Coordinate-wise trimmed mean of states (Yin et al., ICML 2018); with a fraction of 0.5, the median.

    In each coordinate the smallest and the largest values are dropped, ``ceil(trim_fraction * n)`` of n at each end,
    and the rest is averaged without weights. Holds all the states of a round.

    Args:
        trim_fraction: Share of the states dropped at each end, in [0, 0.5]. The middle value, or the two middle values
            of an even number, are always kept.

    Example:
        >>> median = TrimmedMean(0.5)
        >>> for value in (1.0, 2.0, 1e9):
        ...     median.add({"w": torch.tensor([value])})
        >>> median.compute()
        {'w': tensor([2.])}
    """

    def __init__(self, trim_fraction: float) -> None:
        if not 0 <= trim_fraction <= 0.5:
            raise ValueError(f"Expected `trim_fraction` to be in [0, 0.5], got {trim_fraction}.")
        self.trim_fraction = trim_fraction
        self._states: list[State] = []

    def add(self, state: State, weight: float = 1.0) -> None:
        """Add a state, unless its weight is 0; apart from that, weights make no difference."""
        if weight > 0:
            self._states.append(state)

    def compute(self) -> State:
        """Return the trimmed mean in the types of the first state.

        Raises:
            ValueError: If no state with a weight above 0 was added.
        """
        if not self._states:
            raise ValueError("Expected states of a total weight above 0, got none.")
        cut = num_trimmed(len(self._states), self.trim_fraction)
        means = {}
        for name, first in self._states[0].items():
            device = float64(first).device
            values = torch.stack([float64(state[name]).to(device) for state in self._states])
            kept = values.sort(dim=0).values[cut : len(self._states) - cut]
            means[name] = _cast(kept.mean(0), first.dtype)
        return means


class Reducer:
    """Reduces what clients send; the prefix of an entry's name decides whether it is averaged, a plain mean or a sum.

    Args:
        reductions: Prefix -> reduction.
        config: Says how averages are weighted, or which robust mean replaces both averages and plain means.
    """

    def __init__(self, reductions: Mapping[str, Reduction], config: FederationConfig) -> None:
        self.reductions = dict(reductions)
        self.uniform = config.aggregation != "num_examples"
        self._trim = {"median": 0.5, "trimmed_mean": config.trim_fraction}.get(config.aggregation)
        self._parts: dict[Reduction, Aggregate] = {}
        self._names: dict[str, Reduction] = {}

    def add(self, state: State, num_examples: int) -> None:
        """Add what a client sends.

        Args:
            state: Tensors by name; names and shapes must be those of the earlier states.
            num_examples: The number n_k of the client's examples.
        """
        if not self._names:
            self._names = {name: reduction_of(name, self.reductions) for name in state}
            self._parts = {kind: self._aggregate(kind) for kind in dict.fromkeys(self._names.values())}
        for kind, part in self._parts.items():
            weight = num_examples if kind == "average" and not self.uniform else 1.0
            part.add({name: value for name, value in state.items() if self._names[name] == kind}, weight)

    def compute(self) -> State:
        """Return the reduced state.

        Raises:
            ValueError: If no state with a weight above 0 was added.
        """
        if not self._parts:
            raise ValueError("Expected states of a total weight above 0, got none.")
        return {name: value for part in self._parts.values() for name, value in part.compute().items()}

    def _aggregate(self, kind: Reduction) -> Aggregate:
        if kind == "sum":
            return Sum()
        return WeightedAverage() if self._trim is None else TrimmedMean(self._trim)


def num_trimmed(num_states: int, trim_fraction: float) -> int:
    """Return how many of the states a trimmed mean drops at each end.

    Example:
        >>> num_trimmed(10, 0.1), num_trimmed(9, 0.1), num_trimmed(10, 0.3), num_trimmed(10, 0.5), num_trimmed(2, 0.1)
        (1, 1, 3, 4, 0)
    """
    return min(math.ceil(trim_fraction * num_states - 1e-9), (num_states - 1) // 2)


def update_norm(payload: State, sent: State) -> Tensor:
    """Return the Euclidean length of an update over all floating-point entries; NaN or infinite if an entry is.

    Args:
        payload: What a client returned.
        sent: What it received, by the same names.

    Returns:
        A scalar in float64 on the device of the update, without waiting for the device. A tied parameter counts once
        for each of its names.
    """
    lengths = []
    for name, before in sent.items():
        if before.is_floating_point():
            after = float64(payload[name])
            lengths.append(torch.linalg.vector_norm(after - float64(before).to(after.device)))
    length: Tensor = torch.linalg.vector_norm(torch.stack(lengths)) if lengths else torch.zeros((), dtype=torch.float64)
    return length


def clip_update(payload: State, sent: State, scale: float) -> State:
    """Shorten an update to ``sent + scale * (payload - sent)``; entries that are not floating-point are unchanged.

    Norm clipping (Sun et al., *Can You Really Backdoor Federated Learning?*, 2019) takes
    ``scale = min(1, max_norm / norm)``.

    Args:
        payload: What a client returned.
        sent: What it received, by the same names.
        scale: In (0, 1].
    """
    return {
        name: sent[name].to(value.device).lerp(value, scale) if value.is_floating_point() else value
        for name, value in payload.items()
    }


def float64(value: Tensor) -> Tensor:
    """Return a tensor in float64, on a device that supports it."""
    return value.to("cpu" if value.is_mps else value.device, torch.float64)  # MPS has no float64


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return (value if dtype.is_floating_point else value.round()).to(dtype)
