"""Messages as bytes and back: tensors by safetensors, the rest as JSON. Reading them executes nothing."""

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
    """Return a message as bytes; :func:`decode` gives an equal one, on the CPU.

    Raises:
        ValueError: If a tensor is of a kind that cannot be sent: sparse, without values, or of a type that safetensors lacks.
    """
    parts = TENSORS[type(message)]
    tensors = {f"{part}/{name}": value for part in parts for name, value in getattr(message, part).items()}
    plain = {
        field.name: getattr(message, field.name) for field in dataclasses.fields(message) if field.name not in parts
    }
    return pack(tensors, {"kind": type(message).__name__, **plain})


def decode(content: bytes) -> Message:
    """Read a message back.

    Raises:
        ValueError: If the bytes are no message.
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
    """Return tensors, and what JSON can hold beside them, as bytes in the format of safetensors.

    Raises:
        ValueError: If a tensor cannot be written.
    """
    # one entry: of several the format does not keep the order, and the same tensors would give other bytes
    header = {"message": json.dumps({"names": list(tensors), "plain": dict(plain or {})})}
    written: dict[str, Tensor] = {}
    seen: set[int] = set()
    try:
        for place, value in enumerate(tensors.values()):  # by number: the format reserves a name
            value = value.detach().cpu().contiguous()
            storage = value.untyped_storage().data_ptr()
            written[str(place)] = value.clone() if storage in seen else value  # the format shares no memory
            seen.add(storage)
        return bytes(safetensors.torch.save(written, header))
    except (RuntimeError, ValueError, TypeError, KeyError, NotImplementedError) as error:
        raise ValueError(f"Expected tensors that can be sent, got {' '.join(str(error).split()):.200}.") from error


@functools.cache
def sendable(dtype: torch.dtype) -> bool:
    """Whether tensors of a type can be packed."""
    try:
        pack({"": torch.empty(0, dtype=dtype)})
    except (ValueError, RuntimeError, NotImplementedError):
        return False
    return True


def unpack(content: bytes) -> tuple[State, dict[str, Any]]:
    """Read tensors, in the order in which they were packed, and what was beside them.

    Raises:
        ValueError: If the bytes are damaged, or of something else.
    """
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        header = json.loads(metadata["message"])
        tensors = safetensors.torch.load(content)
        return {name: tensors[str(place)] for place, name in enumerate(header["names"])}, dict(header["plain"])
    except Exception as error:  # mangled bytes may raise anything
        raise ValueError(f"Expected packed tensors, got bytes that cannot be read ({error!s:.100}).") from error
