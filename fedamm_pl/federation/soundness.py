"""Checks of a client's result: kind and range of every field, before any part of it is used."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, get_args

import torch
from torch import Tensor, nn

from fedamm_pl.federation.aggregation import float64, update_norm
from fedamm_pl.protocol.codec import sendable
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, Question, Stage, State, payload_bytes
from fedamm_pl.terminal import line

MAX_WHOLE = 2**53
"""The largest number of examples, and the largest tally: up to it all integers are exact in float64."""
MAX_BYTES = 2**40
"""The largest number of bytes that a client can have sent or received in a round: a tebibyte."""
MAX_SECONDS = 366 * 24 * 3600.0
"""The longest time in seconds that a client's round may have taken: a year."""
MAX_METRICS = 1024
"""Maximum number of metrics of a client: enough for two metrics for each of five hundred classes."""
MAX_NAME = 200
"""Maximum number of characters in the name of a metric, or of an entry of a client's private state."""
MAX_METRIC = torch.finfo(torch.float32).max
"""The largest absolute value of a metric: the largest number of float32."""
OWN_METRICS = ("loss_std", "nan_metrics", "bytes_received", "bytes_sent")
"""Names of metrics that the server computes itself."""
KEPT_MODELS, KEPT_ROOM = 10, 2**30
"""Size limit of a client's private state: this many times the size of what it sends back, plus this many bytes."""
MAX_KEPT = 100_000
"""Maximum number of entries of a client's private state."""
MAX_EXTRA = 1000
"""Maximum number of unexpected entries that are read; a result with more is refused without reading them all."""


@dataclass(frozen=True)
class Expected:
    """What each client of a round must return.

    Attributes:
        payload: The names, shapes and types that its payload must have.
        shared: Prefixes of the entries that are the model; a client's update is the difference from the values in
            ``payload``.
        tallies: The names, shapes and types that its tallies must have.
        nonnegative: Entries of the payload that cannot be below 0, see :func:`nonnegative`.
    """

    payload: State = field(default_factory=dict)
    shared: tuple[str, ...] = ("",)
    tallies: State = field(default_factory=dict)
    nonnegative: tuple[str, ...] = ()

    @cached_property
    def sent(self) -> State:
        """The values from which updates are measured, in float64."""
        shared = {name: value for name, value in self.payload.items() if name.startswith(self.shared)}
        return {name: float64(value) if value.is_floating_point() else value for name, value in shared.items()}


def nonnegative(module: nn.Module) -> tuple[str, ...]:
    """Return the entries of a module's state that cannot be below 0: running variances and batch counters.

    They belong to torch's BatchNorm and InstanceNorm, and to all other layers that keep a running mean and variance as
    buffers.
    """
    found = []
    for name, layer in module.named_modules(remove_duplicate=False):
        buffers = dict(layer.named_buffers(recurse=False))
        if {"running_mean", "running_var"} <= buffers.keys():
            found += [f"{name}.{own}" for own in ("running_var", "num_batches_tracked") if own in buffers]
    return tuple(found)


def check_result(result: ClientResult, expected: Expected) -> tuple[ClientResult, float]:
    """Check what a client returned.

    Args:
        result: The result. Its fields may be of any kind; it is not changed.
        expected: What the result must contain.

    Returns:
        The result in plain types with detached tensors, and the Euclidean length of the update.

    Raises:
        ValueError: If a field is of another kind or out of its range; the message says which. Other exceptions that an
            unusual result raises are passed on to the caller.
    """
    if type(result.num_examples) is not int or not 1 <= result.num_examples <= MAX_WHOLE:
        raise ValueError(f"it reports {shown(result.num_examples)} examples")
    for name in ("bytes_received", "bytes_sent"):
        if type(value := getattr(result, name)) is not int or not 0 <= value <= MAX_BYTES:
            raise ValueError(f"its {name} is {shown(value)}, not a whole number from 0 to 2**40")
    seconds = [_seconds(name, getattr(result, name)) for name in ("train_seconds", "meta_seconds")]
    payload, tallies = (
        _tensors(part, getattr(result, part), len(getattr(expected, part)) + MAX_EXTRA)
        for part in ("payload", "tallies")
    )
    metrics = _metrics(result.metrics)
    check_tensors(payload, expected.payload)
    check_tensors(tallies, expected.tallies)
    kept = _kept(result.kept, KEPT_MODELS * payload_bytes(expected.payload) + KEPT_ROOM)
    norm = _check_values(payload, expected)
    if tally := next((name for name, value in tallies.items() if not (value.abs() <= MAX_WHOLE).all()), None):
        raise ValueError(f"its tally {tally} is NaN or larger than 2**53")
    result = replace(result, payload=payload, metrics=metrics, kept=kept, tallies=tallies)
    return replace(result, train_seconds=seconds[0], meta_seconds=seconds[1]), norm


def check_failure(failure: ClientFailure) -> ClientFailure:
    """Return a failure with a reason that fits on one line.

    Raises:
        ValueError: If its stage or its reason is of another kind.
    """
    if type(failure.stage) is not str or failure.stage not in get_args(Stage):
        raise ValueError(f"it reports a failure at the stage {shown(failure.stage)}, which does not exist")
    if not isinstance(failure.reason, str):
        raise ValueError(f"it reports a failure whose reason is {shown(failure.reason)}, not a text")
    return ClientFailure(failure.client_id, failure.stage, line(failure.reason))


def check_question(question: Question, broadcast: Broadcast, client_id: int) -> None:
    """Check a question that a client on another machine asks before its fit: broadcast entries with other values.

    Args:
        question: The question.
        broadcast: The broadcast of the round.
        client_id: The client from which it should come.

    Raises:
        ValueError: If it is of another round or client, or holds entries that were not sent, of another shape or type,
            or NaN.
    """
    found = question.round_num, question.client_id, question.step
    if found != (broadcast.round_num, client_id, 0):
        raise ValueError(f"it asks as client {shown(found[1])} in round {shown(found[0])}, step {shown(found[2])}")
    payload = _tensors("question", question.payload, len(broadcast.payload) + MAX_EXTRA)
    if not payload:
        raise ValueError("it asks nothing")
    if extra := sorted(payload.keys() - broadcast.payload.keys()):
        raise ValueError(f"it asks with what was not sent to it: {_some(extra)}")
    # FedAMM may send w_hat - w rounded to bfloat16
    check_tensors(
        {
            name: value.to(broadcast.payload[name].dtype) if value.dtype == torch.bfloat16 else value
            for name, value in payload.items()
        },
        {name: broadcast.payload[name] for name in payload},
    )
    if name := first_nonfinite(payload):
        raise ValueError(f"its question holds NaN or infinity in {name}")


def check_tensors(payload: Mapping[str, Any], expected: State) -> None:
    """Check names, shapes and types of the tensors that a client returned.

    Raises:
        ValueError: If an entry is missing, unknown or of another shape or type.
    """
    if missing := sorted(expected.keys() - payload.keys()):
        raise ValueError(f"it lacks {_some(missing)}")
    if extra := sorted(map(str, payload.keys() - expected.keys())):
        raise ValueError(f"it holds what was not asked for: {_some(extra)}")
    for name, value in payload.items():
        wanted = expected[name]
        if value.shape != wanted.shape:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {tuple(wanted.shape)}")
        if value.dtype != wanted.dtype:
            raise ValueError(f"{name} is of type {value.dtype}, expected {wanted.dtype}")


def first_nonfinite(state: Mapping[str, Tensor]) -> str | None:
    """Return the name of the first tensor that holds NaN or infinity, or None."""
    finite = [value.isfinite().all() for value in state.values()]
    if not finite or torch.stack([flag.to(finite[0].device) for flag in finite]).all():  # one wait on a GPU
        return None
    return next(name for name, flag in zip(state, finite, strict=True) if not flag)


def first_negative(state: Mapping[str, Tensor], names: Iterable[str]) -> str | None:
    """Return the name of the first of the given tensors that holds a number below 0, or None."""
    return next((name for name in names if (state[name] < 0).any()), None)


def shown(value: Any) -> str:
    """Return a short text that shows a value of any kind."""
    try:
        return line(repr(value), 40)
    except Exception:  # whatever it raises, the value cannot be shown
        return f"<{type(value).__name__}>"


def _check_values(payload: State, expected: Expected) -> float:
    """Check the numbers of a payload, and return the length of its update.

    Raises:
        ValueError: If an entry is NaN or infinite, or below 0 where it cannot be.
    """
    norm = update_norm(payload, expected.sent)
    beside = [value for name, value in payload.items() if not name.startswith(expected.shared)]
    found = [norm, *(value.isfinite().all().to(norm) for value in beside)]
    bounded: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for name in expected.nonnegative:
        if (value := payload.get(name)) is not None:
            bounded.setdefault((value.dtype, value.device), []).append(value.reshape(-1))
    found += [(torch.cat(values) >= 0).all().to(norm) for values in bounded.values()]
    length, *sound = torch.stack(found).tolist()  # one wait on a GPU, not one for each entry
    if not math.isfinite(length) or not all(sound):
        if entry := first_nonfinite(payload):
            raise ValueError(f"{entry} is NaN or infinite")
        if entry := first_negative(payload, (name for name in expected.nonnegative if name in payload)):
            raise ValueError(f"{entry} holds a number below 0, which is impossible for a variance or count")
        raise ValueError("its length is NaN or infinite")
    return float(length)


def _tensors(part: str, given: Any, most: int) -> State:
    """Return tensors by name as a dict, detached.

    Raises:
        ValueError: If they are not a mapping, have more than ``most`` entries, or are not all plain, dense tensors.
    """
    entries = _entries(part, given, most)
    for name, value in entries.items():
        if type(value) is not Tensor and type(value) is not nn.Parameter:
            raise ValueError(f"{name} of its {part} is of type {type(value).__name__}, not a tensor")
        if value.layout is not torch.strided or value.is_meta or value.is_nested:
            raise ValueError(f"{name} is not a dense tensor")
        if value.requires_grad or type(value) is not Tensor:
            entries[name] = value.detach()
    return entries


def _metrics(given: Any) -> dict[str, float]:
    metrics = {}
    for name, value in _entries("metrics", given, MAX_METRICS).items():
        _check_name("metric", name)
        if name in OWN_METRICS:
            raise ValueError(f"its metric {name} has a name that the server uses itself")
        if not isinstance(value, Real):
            raise ValueError(f"its metric {name} is {shown(value)}, not a number")
        metrics[name] = number = _float(value)
        if not math.isnan(number) and not abs(number) <= MAX_METRIC:  # NaN: could not be measured
            raise ValueError(f"its metric {name} is {shown(value)}, beyond the largest number of float32")
    return metrics


def _seconds(name: str, value: Any) -> float:
    number = _float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not 0 <= number <= MAX_SECONDS:
        raise ValueError(f"its {name} is {shown(value)}, not a number of seconds from 0 to a year")
    return number


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer too large for float64
        return math.inf


def _kept(given: Any, most: int) -> State:
    kept = _tensors("kept", given, MAX_KEPT)
    for name, value in kept.items():
        _check_name("kept entry", name)
        if not sendable(value.dtype):
            raise ValueError(f"its kept entry {name} is of type {value.dtype}, which cannot be stored")
    if (size := payload_bytes(kept)) > most:
        raise ValueError(f"it keeps {size} bytes, more than {most}")
    return kept


def _entries(part: str, given: Any, most: int) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise ValueError(f"its {part} is of type {type(given).__name__}, not a mapping")
    entries = dict(itertools.islice(given.items(), most + 1))
    if len(entries) > most:
        raise ValueError(f"its {part} has more than {most} entries")
    return entries


def _check_name(kind: str, name: Any) -> None:
    if type(name) is not str or not name.isprintable() or not 0 < len(name) <= MAX_NAME:
        raise ValueError(f"its {kind} {shown(name)} has no name of 1 to {MAX_NAME} printable characters")


def _some(names: Sequence[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
