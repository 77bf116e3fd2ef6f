"""Nodes of a federation in this process: what Flower does between server app and client apps, and what goes wrong with it."""

import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from fedamm_pl.integrations.flower.client import client_app
from fedamm_pl.seeding import global_state, set_global_state

Fault = Callable[[Message], Any]
"""A message that goes out -> None: it is handled; "silence"; an error code; or what makes another reply of the reply."""


class Machines(Grid):
    """A grid whose nodes answer when their replies are pulled."""

    def __init__(self, config: Path, options: str = "", fault: Fault = lambda message: None) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = 1
        TaskIdentity.node_id = 1
        self.app = client_app(config)
        self.options, self.fault = options, fault
        self.contexts: dict[int, Context] = {}
        self.pushed: list[Message] = []
        self.replies: dict[str, Message] = {}

    def add(self, node: int, **told: Any) -> None:
        """Connect a node."""
        run_config: Any = {"options": self.options}
        self.contexts[node] = Context(1, node, told, RecordDict(), run_config)

    def kinds(self) -> list[str]:
        """What was sent, in order."""
        return [message.metadata.message_type for message in self.pushed]

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any: ...

    def create_message(self, *args: Any, **options: Any) -> Any: ...

    def get_nodes(self) -> Any: ...

    def get_node_ids(self) -> Iterable[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        sent = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = identity = str(uuid.uuid4())
            sent.append(identity)
            self.pushed.append(message)
            happens = self.fault(message)
            node = message.metadata.dst_node_id
            if happens == "silence":
                continue
            if isinstance(happens, int) or node not in self.contexts:
                code = happens if isinstance(happens, int) else 5
                self.replies[identity] = Message(Error(code, "ClientApp stopped responding."), reply_to=message)
                continue
            before = global_state(torch.device("cpu"))
            reply = self.app(message, self.contexts[node])
            set_global_state(before, torch.device("cpu"))  # a client is another process
            self.replies[identity] = reply if happens is None else Message(happens(reply), reply_to=message)
        return sent

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self.replies.pop(identity) for identity in list(message_ids) if identity in self.replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Any: ...
