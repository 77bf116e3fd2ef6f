"""Checks before the first round, with two clients, that parallel training gives the same results as a Trainer."""

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
"""Precisions of the comparison; the second is for networks that do not support the first. A step of a deep network can
amplify rounding errors by a factor of a million or more: only in the first precision are mistakes larger than that."""
TOLERANCE = {"64-true": 1e-3, "32-true": 2e-2}
"""Precision -> largest difference allowed in an update, relative to its length."""
ROUNDING = 1e3
"""Entries with gradient 0 change by rounding alone; they may differ by this many times the rounding of the update."""
FEW = 8
"""Maximum number of examples per batch in the comparison."""


class Trains(Protocol):
    """Interface for parallel training, see :class:`~fedamm_pl.federation.executors.vectorized.VectorizedRunner`."""

    module: FederatedModule
    fault: str | None

    def train(self, sessions: list[ClientSession]) -> tuple[dict[int, Outcome], dict[int, str]]:
        """Return the outcomes by client, and for the other clients the reason why they must train alone."""
        ...


def check(spec: RunSpec, make: Callable[[RunSpec], Trains]) -> None:
    """Train two clients in parallel on a few batches, and compare each result with that of a Trainer.

    Args:
        spec: Specification of the run.
        make: Builds the runner that trains in parallel.

    Raises:
        ValueError: If they cannot be trained in parallel, or differ by more than rounding explains.
    """
    reason = ""
    for precision in PRECISIONS[spec.trainer.kind == "mps" :]:  # MPS has no float64
        probe = replace(spec, trainer=replace(spec.trainer, precision=precision))
        reason = _compared(probe, make(probe))
        if not reason:
            return
    log.warning("parallel clients could not be compared with a Trainer, which fails: %s", reason)


def _compared(spec: RunSpec, together: Trains) -> str:
    """Compare two clients; if the Trainer itself fails with all of them, return the reason, else an empty string."""
    worker, data, precision = Worker(spec), spec.data, spec.trainer.precision
    for module in (worker.module, together.module):
        module.to(torch.float64 if precision == "64-true" else torch.float32)  # the module may have another precision
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
            if "randomness" in reason:  # part of a long message of vmap
                reason = "its network draws random numbers while it trains, as dropout does"
        if reason:
            name = f"{type(worker.module).__name__} with {worker.module.network_name}"
            raise ValueError(f"Expected `executor` to suit {name}, got Vectorized: {reason}.")
    if together.fault and len(failures) < len(clients):
        log.warning("clients ask the server one after the other, because they cannot ask together: %s", together.fault)
    return failures[0] if len(failures) == len(clients) else ""


def _some(data: ClientData, place: int) -> ClientData:
    """Return a client's data reduced to a few small batches of evenly spaced examples.

    The first client gets more examples than the second, so that their numbers of steps or their batch sizes differ.
    """
    size = min(data.batch_size, max(2, min(data.num_examples // 3, FEW)))
    count = min(data.num_examples - (place and data.num_examples > 2), int((2.5 - place) * size))
    chosen = torch.linspace(0, data.num_examples - 1, max(1, count)).long()
    return replace(data, batch_size=size, indices=data.indices[chosen])


def _difference(expected: ClientResult, found: ClientResult, start: State, tolerance: float) -> str | None:
    """Return how two results differ, or None if rounding explains the difference."""
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
    """Return the Euclidean length of an entry's change; 0 for integer types, or if it is not finite."""
    length = float((value - before.to(value)).double().norm()) if value.is_floating_point() else 0.0
    return length if math.isfinite(length) else 0.0
