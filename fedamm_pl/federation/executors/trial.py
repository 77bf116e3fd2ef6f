"""Whether parallel clients give the same result as a Trainer: two are compared before the first round."""

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.client import attempt
from fedamm_pl.federation.executors.base import Outcome, RunSpec
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.trainer import PrecisionName
from fedamm_pl.protocol.messages import ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ClientSession

log = logging.getLogger(__name__)

PRECISIONS: tuple[PrecisionName, ...] = ("64-true", "32-true")
"""In which clients are compared, the second for networks that do not take the first. A step of a deep network can magnify rounding
by a million and more: only in the first are mistakes larger than that."""
TOLERANCE = {"64-true": 1e-3, "32-true": 2e-2}
"""Largest difference of an update, relative to its length."""
ROUNDING = 1e3
"""What moves by rounding alone, because its gradient is 0, may differ by so many times the rounding of the whole update."""
FEW = 8
"""Examples of a batch on which they are compared."""


class Trains(Protocol):
    """Trains clients in parallel, see :class:`~fedamm_pl.federation.executors.vectorized.VectorizedRunner`."""

    module: FederatedModule
    fault: str | None

    def train(self, sessions: list[ClientSession]) -> tuple[dict[int, Outcome], dict[int, str]]:
        """Return outcomes, and why other clients must train alone."""
        ...


def check(spec: RunSpec, make: Callable[[RunSpec], Trains]) -> None:
    """Train two clients on a few batches, and compare each with what a Trainer makes of it.

    Args:
        spec: Of the run.
        make: Builds what trains in parallel.

    Raises:
        ValueError: If they cannot be trained in parallel, or differ by more than rounding explains.
    """
    reason = ""
    for precision in PRECISIONS[spec.trainer.kind == "mps" :]:  # which has no float64
        probe = replace(spec, trainer=replace(spec.trainer, precision=precision))
        reason = _compared(probe, make(probe))
        if not reason:
            return
    log.warning("parallel clients could not be compared with a Trainer, which fails: %s", reason)


def _compared(spec: RunSpec, together: Trains) -> str:
    """Compare two clients; return why a Trainer fails with each, empty if it does not."""
    worker, data, precision = Worker(spec), spec.data, spec.trainer.precision
    for module in (worker.module, together.module):
        module.to(torch.float64 if precision == "64-true" else torch.float32)  # it may have been trained in another
    by_size = sorted(range(data.num_clients), key=lambda client: -data.client_size(client))
    clients = [client for client in by_size if data.client_size(client)][:2]
    start, own = worker.module.shared_state(), worker.module.personal_state()
    broadcast = worker.server.broadcast(start, 1, 2)
    worker.begin(broadcast)
    few: dict[int, ClientData] = {}

    def open_session(client: int) -> ClientSession:
        return ClientSession(broadcast, ClientTask(client, client), few.__getitem__, worker.answer, own)

    for place, client in enumerate(clients):
        try:
            few[client] = _some(data.client(client), place)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    outcomes, alone = together.train([open_session(client) for client in clients])
    failures = []
    for client in clients:
        expected = attempt(worker.module, open_session(client), spec.trainer)
        if isinstance(expected, ClientFailure):
            failures.append(expected.reason)
            continue
        found = outcomes.get(client)
        if isinstance(found, ClientResult):
            reason = _difference(expected, found, start, TOLERANCE[precision])
        else:
            reason = found.reason if found else alone[client]
            if "randomness" in reason:  # in a long message of vmap's
                reason = "its network draws random numbers while it trains, as dropout does"
        if reason:
            name = f"{type(worker.module).__name__} with {worker.module.network_name}"
            raise ValueError(f"Expected `executor` to suit {name}, got Vectorized: {reason}.")
    if together.fault and len(failures) < len(clients):
        log.warning("clients ask the server one after the other, because they cannot ask together: %s", together.fault)
    return failures[0] if len(failures) == len(clients) else ""


def _some(data: ClientData, place: int) -> ClientData:
    """Return a client with a few small batches of its examples, taken from all over them.

    The first has more of them than the second: the numbers of steps differ, or the batches are not equally large.
    """
    size = min(data.batch_size, max(2, min(data.num_examples // 3, FEW)))
    count = min(data.num_examples - (place and data.num_examples > 2), int((2.5 - place) * size))
    chosen = torch.linspace(0, data.num_examples - 1, max(1, count)).long()
    return replace(data, batch_size=size, indices=data.indices[chosen])


def _difference(expected: ClientResult, found: ClientResult, start: State, tolerance: float) -> str | None:
    """Return in what two results differ, if they do by more than rounding explains."""
    for part in ("payload", "metrics", "kept", "tallies"):
        if other := sorted(getattr(expected, part).keys() ^ getattr(found, part).keys()):
            return f"its {part} has or lacks {other[0]}"
    results = [
        {name: value.long() if value.dtype == torch.bool else value for name, value in values.items()}
        for values in ({**result.payload, **result.kept, **result.tallies} for result in (expected, found))
    ]
    whole = math.hypot(*(_moved(value, start[name]) for name, value in expected.payload.items() if name in start))
    for name, value in results[0].items():
        now, before = results[1][name].to(value), start[name].to(value) if name in start else torch.zeros_like(value)
        moved, gap, length = (float(part.double().norm()) for part in (value - before, value - now, value))
        noise = ROUNDING * torch.finfo(value.dtype).eps * whole if value.is_floating_point() and name in start else 0.0
        if math.isfinite(length) and not gap <= tolerance * (moved + tolerance * length) + noise:
            by = gap / moved if moved else gap
            return f"after a few steps {name} is not what a Trainer makes of it, by {by:.2g} of the change"
    for name, number in expected.metrics.items():
        if math.isfinite(number) and not abs(number - found.metrics[name]) <= tolerance * max(1, abs(number)):
            return f"its {name} is {found.metrics[name]:.4g}, a Trainer's {number:.4g}"
    return None


def _moved(value: Tensor, before: Tensor) -> float:
    """Return how far an entry has moved; 0 for one of integers, or that is not finite."""
    length = float((value - before.to(value)).double().norm()) if value.is_floating_point() else 0.0
    return length if math.isfinite(length) else 0.0
