"""What crosses the wire: records of plain values, and tensors as one array of bytes. Reading them executes nothing."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedamm_pl.terminal import line

HELLO, BEGIN, FINISH = "query.hello", "train.begin", "train.finish"
"""Who are you; take up a round, and return your result or a question; here is the answer, return your result."""
PLAIN, BYTES = "plain", "bytes"
LOST = (3, 5, 8)
"""Flower's codes for a message or a node that is gone, and for a process that has died."""
INFO, ERROR, AGAIN, RUN, ROUND, TASK = "info", "error", "again", "run", "round", "task"
BROADCAST, ANSWER, KEPT, OUTCOME = "broadcast", "answer", "kept", "outcome"
"""What plain values and parts of bytes are called."""


def record(plain: Mapping[str, Any], **parts: bytes) -> RecordDict:
    """Return a message's content: one array for each part, since each costs Flower an object of its own to push and pull."""
    arrays = {name: ArrayRecord([np.frombuffer(content, dtype=np.uint8)]) for name, content in parts.items()}
    return RecordDict(
        {PLAIN: ConfigRecord(dict(plain)), **{f"{BYTES}.{name}": value for name, value in arrays.items()}}
    )


def plain_part(content: RecordDict) -> dict[str, Any]:
    """Return the plain values of a message.

    Raises:
        ValueError: If it has none.
    """
    found = content.config_records.get(PLAIN)
    if found is None:
        raise ValueError(
            f"Expected a message of fedamm, got one with {line(' '.join(map(str, content)), 60) or 'nothing'}."
        )
    return dict(found)


def bytes_part(content: RecordDict, name: str, most: int | None = None) -> bytes:
    """Return a part of a message that holds bytes.

    Args:
        content: Of the message.
        name: Which part.
        most: How many bytes it may have; None: any number.

    Raises:
        ValueError: If it is not there, is no array of bytes, or is larger.
    """
    found = content.array_records.get(f"{BYTES}.{name}")
    arrays = [] if found is None else list(found.values())
    if len(arrays) != 1 or arrays[0].dtype != "uint8" or len(arrays[0].shape) != 1:
        raise ValueError(
            f"Expected a message with {name} as bytes, got {'none' if found is None else 'something else'}."
        )
    size = len(arrays[0].data)
    if most is not None and size > most:
        raise ValueError(f"Expected {name} to have at most {most:,} bytes, got {size:,}.")
    return bytes(arrays[0].numpy().tobytes())


def has_part(content: RecordDict, name: str) -> bool:
    """Return whether a message has a part of bytes."""
    return f"{BYTES}.{name}" in content.array_records
