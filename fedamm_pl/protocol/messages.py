"""The messages between server and clients: frozen dataclasses with flat, detached tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

State = dict[str, Tensor]
"""Tensors by the keys of the module's ``state_dict``."""

Stage = Literal["data", "training", "meta step", "lost", "update"]


@dataclass(frozen=True)
class Broadcast:
    """The message that the server sends to all clients of a round.

    Attributes:
        round_num: The round, from 1.
        local_epochs: Number E of passes of a client over its data.
        payload: The shared state, and any other tensors that the method sends.
        lr_factor: Factor by which the clients' learning rate is multiplied in this round.
    """

    round_num: int
    local_epochs: int
    payload: State
    lr_factor: float = 1.0


@dataclass(frozen=True)
class ClientTask:
    """The task of one client in a round, in addition to the :class:`Broadcast` of the round.

    Attributes:
        client_id: The client that trains, 0..K - 1.
        seed: Seed of all draws of the client in this round.
    """

    client_id: int
    seed: int


@dataclass(frozen=True)
class ClientResult:
    """The result that a client returns.

    Attributes:
        client_id: The client.
        num_examples: Number n_k of its examples.
        payload: Its trained state, and any other tensors that the method sends.
        metrics: Means over the last local epoch, for example ``loss``.
        bytes_received: Tensor bytes that the client received in the round, including answers.
        bytes_sent: Tensor bytes that it sent, including questions.
        train_seconds: Wall time of the fit without the meta steps.
        meta_seconds: Wall time of the meta steps, including the server's answers.
        kept: State that stays at the client for its next round; it is not part of the messages or their bytes.
        tallies: Sums that the server adds up over the clients of a round, for figures; they are not part of the update.
    """

    client_id: int
    num_examples: int
    payload: State
    metrics: Mapping[str, float] = field(default_factory=dict)
    bytes_received: int = 0
    bytes_sent: int = 0
    train_seconds: float = 0.0
    meta_seconds: float = 0.0
    kept: State = field(default_factory=dict)
    tallies: State = field(default_factory=dict)


@dataclass(frozen=True)
class ClientFailure:
    """The failure of a client, returned in place of a result.

    Attributes:
        client_id: The client.
        stage: Where it failed: data, training or meta step; lost, if its worker died or its time was over; or update,
            if the server refused what it returned.
        reason: The reason, in one line.
    """

    client_id: int
    stage: Stage
    reason: str

    def __str__(self) -> str:
        return self.told_of(str(self.client_id))

    def told_of(self, name: str) -> str:
        """Return a sentence about the failure that uses the given name of the client."""
        if self.stage == "update":
            return f"the update of client {name} is refused: {self.reason}"
        return f"client {name} failed ({self.stage}): {self.reason}"


@dataclass(frozen=True)
class Question:
    """A question that a client sends to the server, before or during its fit.

    Attributes:
        round_num: The round.
        client_id: The client that asks.
        step: The local step at which it asks; 0 before the fit.
        payload: For FedAMM, the virtual weights w_hat.
    """

    round_num: int
    client_id: int
    step: int
    payload: State


@dataclass(frozen=True)
class Answer:
    """The server's answer to a question.

    Attributes:
        payload: For FedAMM, the meta gradient g, by the keys of the question.
        metrics: Scalars for the logs, for example ``meta_loss``; tensors of shape ().
    """

    payload: State
    metrics: State = field(default_factory=dict)


def payload_bytes(payload: Mapping[str, Tensor]) -> int:
    """Return the size in bytes of the tensors of a payload."""
    return sum(value.nbytes for value in payload.values())
