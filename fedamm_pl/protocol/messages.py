"""What crosses the border between server and clients: frozen dataclasses with flat, detached tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

State = dict[str, Tensor]
"""Tensors by the module's own ``state_dict`` keys."""

Stage = Literal["data", "training", "meta step", "lost", "update"]


@dataclass(frozen=True)
class Broadcast:
    """What the server sends to all clients of a round alike.

    Attributes:
        round_num: The round, from 1.
        local_epochs: Passes E of a client over its data.
        payload: The shared state, and what else a method sends along.
        lr_factor: What the clients' learning rate is multiplied by in this round.
    """

    round_num: int
    local_epochs: int
    payload: State
    lr_factor: float = 1.0


@dataclass(frozen=True)
class ClientTask:
    """Which client is to train, beside the :class:`Broadcast` of the round.

    Attributes:
        client_id: The client, 0..K - 1.
        seed: Seed of all the client's draws in this round.
    """

    client_id: int
    seed: int


@dataclass(frozen=True)
class ClientResult:
    """What a client returns.

    Attributes:
        client_id: The client.
        num_examples: The number n_k of its examples.
        payload: Its trained state, and what else the method sends.
        metrics: Means over the last local epoch, for example ``loss``.
        bytes_received: Tensor bytes that the client received in the round, answers included.
        bytes_sent: Tensor bytes that it sent, questions included.
        train_seconds: Wall time of the fit without the meta steps.
        meta_seconds: Wall time of the meta steps, the server's answers included.
        kept: What the client keeps to itself for its next round; no part of the messages and of their bytes.
        tallies: Sums that the server adds up over the clients of a round, for figures; no part of the update.
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
    """What comes back in place of a result.

    Attributes:
        client_id: The client.
        stage: Where it failed: data, training, meta step; lost: its worker died or its time was over; or update: it returned
            something, and the server refused it.
        reason: Why, in one line.
    """

    client_id: int
    stage: Stage
    reason: str

    def __str__(self) -> str:
        return self.told_of(str(self.client_id))

    def told_of(self, name: str) -> str:
        """Say what happened to a client, by its name."""
        if self.stage == "update":
            return f"the update of client {name} is refused: {self.reason}"
        return f"client {name} failed ({self.stage}): {self.reason}"


@dataclass(frozen=True)
class Question:
    """What a client asks the server, before its fit or in the middle of it.

    Attributes:
        round_num: The round.
        client_id: Who asks.
        step: The local step at which it asks; 0 before the fit.
        payload: For FedAMM the virtual weights w_hat.
    """

    round_num: int
    client_id: int
    step: int
    payload: State


@dataclass(frozen=True)
class Answer:
    """What the server answers.

    Attributes:
        payload: For FedAMM the meta gradient g, by the keys of the question.
        metrics: Scalars for the logs, for example ``meta_loss``; tensors of shape ().
    """

    payload: State
    metrics: State = field(default_factory=dict)


def payload_bytes(payload: Mapping[str, Tensor]) -> int:
    """Return the size of the tensors of a payload in bytes."""
    return sum(value.nbytes for value in payload.values())
