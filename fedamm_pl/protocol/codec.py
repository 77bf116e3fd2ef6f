"""Encode messages as bytes and decode them: tensors with safetensors, the rest as JSON. Decoding executes nothing."""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fedamm_pl.protocol.messages import Answer, Broadcast, ClientFailure, ClientResult, ClientTask, Question, State

Message = Broadcast | ClientTask | ClientResult | ClientFailure | Question | Answer
TENSORS: dict[type, tuple[str, ...]] = {
    Broadcast: ("payload",),
    ClientTask: (),
    ClientResult: ("payload", "kept", "tallies"),
    ClientFailure: (),
    Question: ("payload",),
    Answer: ("payload", "metrics"),
}
"""The fields of each message that hold tensors by name."""


def encode(message: Message) -> bytes:
    """Return a message as bytes; :func:`decode` returns an equal message with its tensors on the CPU.

    Raises:
        ValueError: If a tensor cannot be sent because it is sparse, has no values, or has a type that safetensors
            lacks.
    """
    parts = TENSORS[type(message)]
    tensors = {f"{part}/{name}": value for part in parts for name, value in getattr(message, part).items()}
    plain = {
        field.name: getattr(message, field.name) for field in dataclasses.fields(message) if field.name not in parts
    }
    return pack(tensors, {"kind": type(message).__name__, **plain})


def decode(content: bytes) -> Message:
    """Return the message that was encoded as bytes.

    Raises:
        ValueError: If the bytes are not a message.
    """
    tensors, plain = unpack(content)
    kind = next((kind for kind in TENSORS if kind.__name__ == plain.get("kind")), None)
    if kind is None:
        raise ValueError(f"Expected a message, got one of the kind {plain.get('kind')!r:.40}.")
    states: dict[str, State] = {part: {} for part in TENSORS[kind]}
    try:
        for name, value in tensors.items():
            part, _, key = name.partition("/")
            states[part][key] = value
        message: Message = kind(**{name: value for name, value in plain.items() if name != "kind"}, **states)
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected a {kind.__name__}, got other fields ({error}).") from error
    return message


def pack(tensors: Mapping[str, Tensor], plain: Mapping[str, Any] | None = None) -> bytes:
    """Return tensors, and additional values that JSON can hold, as bytes in the format of safetensors.

    Raises:
        ValueError: If a tensor cannot be written.
    """
    # a single entry: the format does not keep the order of several, so the same tensors could give different bytes
    header = {"message": json.dumps({"names": list(tensors), "plain": dict(plain or {})})}
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    try:
        for place, value in enumerate(tensors.values()):  # named by number, because the format reserves a name
            value = value.detach().cpu().contiguous()
            storage = value.untyped_storage().data_ptr()
            written[str(place)] = value.clone() if storage in seen else value  # the format allows no shared memory
            seen.add(storage)
        return bytes(safetensors.torch.save(written, header))
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"Expected tensors that can be sent, got {' '.join(str(error).split()):.200}.") from error


@functools.cache
def sendable(dtype: torch.dtype) -> bool:
    """Whether tensors of this type can be packed."""
    try:
        pack({"": torch.empty(0, dtype=dtype)})
    except (ValueError, RuntimeError, NotImplementedError):
        return False
    return True


def unpack(content: bytes) -> tuple[State, dict[str, Any]]:
    """Return the packed tensors, in their original order, and the additional values.

    Raises:
        ValueError: If the bytes are damaged, or are something else.
    """
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header = json.loads(metadata["message"])
        tensors = safetensors.torch.load(content)
        return {name: tensors[str(place)] for place, name in enumerate(header["names"])}, dict(header["plain"])
    except Exception as error:  # damaged bytes may raise any error
        raise ValueError(f"Expected packed tensors, got bytes that cannot be read ({error!s:.100}).") from error
