"""Format of the messages: records of plain values, and tensors as one array of bytes. Reading them executes no code."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, RecordDict

from fedamm_pl.terminal import line

HELLO, BEGIN, FINISH = "query.hello", "train.begin", "train.finish"
"""Types of messages to a client: identify yourself; start a round and return the result or a question; finish the round
with the answer to the question and return the result."""
PLAIN, BYTES = "plain", "bytes"
LOST = (3, 5, 8)
"""Flower's error codes for a lost message or node, and for a process that has died."""
INFO, ERROR, AGAIN, RUN, ROUND, TASK = "info", "error", "again", "run", "round", "task"
BROADCAST, ANSWER, KEPT, OUTCOME = "broadcast", "answer", "kept", "outcome"
"""Names of plain values, and of parts of bytes."""


def record(plain: Mapping[str, Any], **parts: bytes) -> RecordDict:
    """Return the content of a message, with one array for each part, since Flower transfers each array separately."""
    arrays = {name: ArrayRecord([np.frombuffer(content, dtype=np.uint8)]) for name, content in parts.items()}
    return RecordDict(
        {PLAIN: ConfigRecord(dict(plain)), **{f"{BYTES}.{name}": value for name, value in arrays.items()}}
    )


def plain_part(content: RecordDict) -> dict[str, Any]:
    """Return the plain values of a message.

    Raises:
        ValueError: If there are none.
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
        content: Content of the message.
        name: Name of the part.
        most: Largest number of bytes; None: no limit.

    Raises:
        ValueError: If the part is missing, is not an array of bytes, or is too large.
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
    """Return whether a message has the part of bytes with this name."""
    return f"{BYTES}.{name}" in content.array_records
