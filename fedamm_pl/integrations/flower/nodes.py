"""Identification of the nodes of a federation: each node is asked which client it is, and its reply is checked."""

import json
import logging
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from flwr.app import Message
from flwr.serverapp import Grid

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.data.holdings import Elsewhere
from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.federation.fingerprint import hashes, versions
from fedamm_pl.integrations.flower.wire import ERROR, HELLO, INFO, LOST, plain_part, record
from fedamm_pl.terminal import line, printable, say

log = logging.getLogger(__name__)
POLL = 0.5
"""Seconds between checks for replies."""
MOST_EXAMPLES = 2**53


class Nodes:
    """The nodes of a federation and the clients that they run.

    Args:
        grid: Flower's grid.
        own_data: Whether clients have their own data. Otherwise server and clients make the same partition, and each
            client takes its part.
        clients: Names or number of the clients, if these have their own data.
        class_counts: Whether clients with their own data report their number of examples of each class.
        start_with: Number of clients that is enough to start; 0: all.

    Attributes:
        told: Facts about the examples that each message sends to a client.
        view: The same for the server's module.
        node_of: Client -> its node, for all connected clients.
        known: Client -> size and class counts of its own data.
        met: Whether the run can begin.
    """

    def __init__(
        self, grid: Grid, own_data: bool, clients: Sequence[str] | int, class_counts: bool, start_with: int = 0
    ) -> None:
        self.grid = grid
        self.own_data = own_data
        self.clients = clients
        self.class_counts = class_counts
        self.start_with = start_with
        self.told: dict[str, Any] = {}
        self.view = SimpleNamespace()
        self.met = False
        self.node_of: dict[str, int] = {}
        self.known: dict[str, Elsewhere] = {}
        self._asked: dict[str, int] = {}  # message -> node
        self._settled: set[int] = set()  # nodes that have identified themselves or were refused
        self._refused: dict[int, str] = {}
        self._doubles: dict[int, str] = {}  # node that was refused as a duplicate -> the client that it claims to be
        self._data: FederatedDataModule | None = None

    def meet(self, data: FederatedDataModule, wait: float) -> None:
        """Wait for the clients to join; if they have their own data, record the sizes of these.

        Args:
            data: The data of the server.
            wait: Number of seconds to wait.

        Raises:
            ValueError: If too few clients have joined by then; the message names missing clients and the reasons of
                refused ones.
        """
        self._data = data
        data.setup()
        form = {"shape": list(data.images.train_images.shape[1:]), "feature_names": data.images.feature_names}
        known = {name: value for name, value in data.info.items() if name not in ("class_counts", "shot_groups")}
        self.told = {INFO: json.dumps({**known, **form})}
        expected = self._expected()
        deadline = time.monotonic() + wait
        say(f"waiting for {expected} clients")
        while len(self.node_of) < expected:
            late = time.monotonic() > deadline
            self.greet()
            if late and len(self.node_of) < expected:
                raise ValueError(self._missing(expected, wait))
            time.sleep(POLL)
        if self.own_data:
            names = self.clients if not isinstance(self.clients, int) else sorted(self.known)
            absent = Elsewhere(0, [0] * data.num_classes if self.class_counts else None)
            self.known = {name: self.known.get(name, absent) for name in names}
            data.hold_elsewhere(self.known)
        info = {name: value for name, value in data.info.items() if name != "class_counts" or data.knows_class_counts}
        self.told = {INFO: json.dumps({**info, **form})}
        self.met = True
        self.view = SimpleNamespace(num_classes=data.num_classes, in_channels=data.in_channels, info=info)

    def _expected(self) -> int:
        assert self._data is not None
        number = self.clients if isinstance(self.clients, int) else len(self.clients)
        number = number if self.own_data else self._data.num_clients
        if self.start_with and isinstance(self.clients, int) and self.own_data:
            raise ValueError(
                "Expected `clients` to be names with `start-with`, got a number: the expected clients must be known."
            )
        if self.class_counts and 0 < self.start_with < number:
            raise ValueError(
                f"Expected `start-with` to be 0 with `class-counts`, which are those of all clients, got {self.start_with}."
            )
        return min(self.start_with or number, number)

    def _missing(self, expected: int, wait: float) -> str:
        names: Sequence[str] = () if isinstance(self.clients, int) else self.clients
        if not self.own_data and self._data is not None:
            names = self._data.client_names
        absent = [name for name in names if name not in self.node_of]
        reasons = [f"missing: {', '.join(absent[:5])}"] if absent else []
        reasons += [f"refused: {reason}" for reason in self._refused.values()]
        said = f" ({'; '.join(reasons)})" if reasons else ""
        return f"Expected {expected} clients within {wait:g} s, got {len(self.node_of)}{said}."

    def greet(self) -> None:
        """Ask new nodes which client they are, and process the answers that have arrived; do not wait for others."""
        online = set(self.grid.get_node_ids())
        self._settled &= online  # a node that was refused and comes back is asked again
        self._refused = {node: reason for node, reason in self._refused.items() if node in online}
        for name, node in list(self.node_of.items()):
            if node not in online:
                log.warning("client %s is no longer connected", shown_client(0, [name]))
                del self.node_of[name]
                # nodes refused as duplicates of this client are asked again: one may be the same client, restarted
                self._settled -= {other for other, wanted in self._doubles.items() if wanted == name}
        new = sorted(online - self._settled - set(self._asked.values()))
        for node in new:
            content = {**self.told, "class_counts": self.class_counts and self.own_data}
            for sent in self.grid.push_messages([Message(record(content), dst_node_id=node, message_type=HELLO)]):
                self._asked[sent] = node
        for reply in self.grid.pull_messages(list(self._asked)) if self._asked else ():
            node_id = self._asked.pop(reply.metadata.reply_to_message_id, None)
            if node_id is None:
                continue
            if reply.has_error() and reply.error.code in LOST:
                continue  # asked again if the node is connected
            self._settled.add(node_id)
            try:
                if reply.has_error():
                    raise ValueError(f"it cannot identify itself: {reply.error.reason}")
                self._hear(node_id, plain_part(reply.content), online)
            except (ValueError, KeyError, TypeError) as error:
                self._refused[node_id] = line(str(error), 300)
                log.warning("node %d is refused: %s", node_id, line(str(error), 300))

    def forget(self, name: str) -> None:
        """Drop a client that has not answered in time; its node must identify itself again before it takes part."""
        node = self.node_of.pop(name, None)
        if node is not None:
            self._settled.discard(node)

    def _hear(self, node: int, said: dict[str, Any], online: set[int]) -> None:
        if ERROR in said:
            raise ValueError(str(said[ERROR]))
        name, examples = said["client"], said["examples"]
        if not isinstance(name, str) or not 1 <= len(name) <= 200 or type(examples) is not int:
            raise ValueError("it does not report its name and its number of examples")
        if not 0 <= examples <= MOST_EXAMPLES:
            raise ValueError(f"client {shown_client(0, [name])} says that it has {examples} examples")
        shown = shown_client(0, [name])
        if said["own"] is not self.own_data:
            wanted, got = ("data of its own", "a part of the partition")[:: 1 if self.own_data else -1]
            raise ValueError(f"client {shown} should have {wanted}, it has {got}")
        if (other := self.node_of.get(name)) is not None and other in online and other != node:
            self._doubles[node] = name
            raise ValueError(f"client {shown} is already connected from another node")
        if self.own_data:
            self._hear_own(name, examples, said.get("class_counts"))
        else:
            self._hear_part(name, examples, said)
        for library, version in versions().items():
            if (theirs := said.get(f"version.{library}")) != version:
                log.warning("client %s has %s %s, the server %s", shown, library, line(str(theirs), 40), version)
        self.node_of[name] = node
        say(printable(f"client {shown} has joined with {examples} examples"))

    def _hear_own(self, name: str, examples: int, counts: object) -> None:
        assert self._data is not None
        shown, num_classes = shown_client(0, [name]), self._data.num_classes
        if not isinstance(self.clients, int) and name not in self.clients:
            raise ValueError(f"client {shown} is not one of the named clients")
        if isinstance(self.clients, int) and name not in self.known and len(self.known) >= self.clients:
            raise ValueError(f"client {shown} is one more than the {self.clients} that were expected")
        if self.class_counts:
            if not isinstance(counts, list) or len(counts) != num_classes or any(type(n) is not int for n in counts):
                raise ValueError(f"client {shown} does not report its class counts")
            if min(counts) < 0 or sum(counts) != examples:
                raise ValueError(f"client {shown} tells class counts that are not those of its {examples} examples")
        self.known[name] = Elsewhere(examples, counts if isinstance(counts, list) and self.class_counts else None)
        if self.met:
            self._data.hold_elsewhere(self.known)

    def _hear_part(self, name: str, examples: int, said: dict[str, Any]) -> None:
        assert self._data is not None
        data, shown = self._data, shown_client(0, [name])
        if name not in data.client_names:
            raise ValueError(f"client {shown} is none of the {data.num_clients} of the partition")
        for what, value in {**hashes(data), "examples": data.client_size(data.client_names.index(name))}.items():
            got = examples if what == "examples" else said.get(what)
            if got != value:
                raise ValueError(
                    f"client {shown} does not see the server's data: {what} {value}, got {line(str(got), 40)}"
                )
