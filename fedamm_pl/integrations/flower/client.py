"""The client side of the Flower app: it trains on its own data and keeps its state on its own disk.

Flower starts a new process for each message.
"""

import json
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedamm_pl.integrations.flower.wire import (
    AGAIN,
    ANSWER,
    BEGIN,
    BROADCAST,
    ERROR,
    FINISH,
    HELLO,
    INFO,
    KEPT,
    OUTCOME,
    ROUND,
    RUN,
    TASK,
    bytes_part,
    has_part,
    plain_part,
    record,
)
from fedamm_pl.terminal import line

if TYPE_CHECKING:
    from fedamm_pl.data.datamodule import FederatedDataModule
    from fedamm_pl.data.own import OwnData
    from fedamm_pl.protocol.messages import State

TOKEN = "kept_elsewhere"
"""Name of the token that the server holds in place of the state that a client keeps."""


def client_app(config: str | Path) -> ClientApp:
    """Return the ClientApp that trains one client of a federation.

    ``--node-config`` takes these settings of a node:

    - ``client``: name of the client; in a partition of common data without names, its number.
    - ``config``: a file with options of this node, such as ``data.root`` or ``trainer.accelerator``; they override
      those of the app.
    - ``own``: true if all training examples at the node belong to the client; otherwise it takes its part of the
      partition.
    - ``state``: folder for what the client keeps from one round to the next, by default ``~/.fedamm``.

    Args:
        config: Configuration file of the run, in the folder of the app.
    """
    app = ClientApp()

    def answered(handler: Callable[["Node", RecordDict], RecordDict]) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            # a reply is sent after any error, since without one Flower sends this node no further message
            try:
                content = handler(Node(Path(config), context), message.content)
            except NotBegunError as error:
                content = record({AGAIN: str(error)})
            except (Exception, SystemExit) as error:
                text = "its options are refused; its log says why" if isinstance(error, SystemExit) else str(error)
                content = record({ERROR: line(" ".join(text.split()) or type(error).__name__, 300)})
            return Message(content, reply_to=message)

        return handle

    app.query(HELLO.partition(".")[2])(answered(Node.hello))
    app.train(BEGIN.partition(".")[2])(answered(Node.begin))
    app.train(FINISH.partition(".")[2])(answered(Node.finish))
    return app


class AskedError(Exception):
    """Raised when a client asks the server a question, to end its process."""


class NotBegunError(Exception):
    """Raised when an answer arrives for a round that this node has not started."""


class Node:
    """One client on its machine, made for one message.

    Args:
        config: Configuration file of the run.
        context: Flower's context of the node and the run.

    Raises:
        ValueError: If the configuration of the node does not name the client.
    """

    def __init__(self, config: Path, context: Context) -> None:
        self.context = context
        told = context.node_config
        self.own = bool(told.get("own", False))
        if not (name := str(told.get("client", "")).strip()):
            raise ValueError("Expected --node-config to name the client, like client='hospital-a', got none.")
        self.name = name
        own = ["--config", str(told["config"])] if "config" in told else []
        self.words = ["--config", str(config), *own, *shlex.split(str(context.run_config.get("options", "")))]
        self.state = Path(os.path.expanduser(str(told.get("state", "~/.fedamm"))))

    def hello(self, content: RecordDict) -> RecordDict:
        """Return the name of the client and its number of examples; class counts only if the server asks for them."""
        from fedamm_pl.data.own import OwnData
        from fedamm_pl.federation.fingerprint import hashes, versions

        asked = plain_part(content)
        info = json.loads(asked[INFO])
        parts = self._parts(info)
        data, client = self._data(parts, info)
        mine = data.client(client)
        told: dict[str, Any] = {"client": self.name, "own": self.own, "examples": mine.num_examples}
        told |= {f"version.{name}": version for name, version in versions().items()}
        if not isinstance(data, OwnData):
            told |= hashes(data)
        if asked["class_counts"]:
            told["class_counts"] = mine.class_counts(len(info["class_names"])).tolist()
        return record(told)

    def begin(self, content: RecordDict) -> RecordDict:
        """Start a round: return the result, or the question that the method asks before the fit."""
        sent = bytes_part(content, BROADCAST)
        # kept for the message with the answer; Flower holds it in memory for this run
        self.context.state[BROADCAST] = ArrayRecord([np.frombuffer(sent, dtype=np.uint8)])
        return self._trained(content, sent)

    def finish(self, content: RecordDict) -> RecordDict:
        """Finish a round with the answer to a question; earlier steps are repeated, since this is a new process."""
        stored = self.context.state.array_records.get(BROADCAST)
        if stored is None:
            raise NotBegunError("its node was restarted during the round")
        return self._trained(content, stored.to_numpy_ndarrays()[0].tobytes())

    def _trained(self, content: RecordDict, sent: bytes) -> RecordDict:
        from fedamm_pl.federation.client import attempt
        from fedamm_pl.federation.executors.worker import keep_freed_memory
        from fedamm_pl.protocol.codec import decode, encode, unpack
        from fedamm_pl.protocol.messages import Answer, Broadcast, ClientResult, ClientTask, Question
        from fedamm_pl.protocol.session import ClientSession

        asked = plain_part(content)
        broadcast, task = decode(sent), decode(asked[TASK])
        answer = decode(bytes_part(content, ANSWER)) if has_part(content, ANSWER) else None
        if not isinstance(broadcast, Broadcast) or not isinstance(task, ClientTask):
            raise ValueError("Expected a broadcast and a task, got others.")
        if broadcast.round_num != asked[ROUND]:
            raise NotBegunError(f"its node knows the broadcast of round {broadcast.round_num}, not of {asked[ROUND]}")
        info = json.loads(asked[INFO])
        parts = self._parts(info)
        data, client = self._data(parts, info)
        trainer = parts.trainer.resolved()
        keep_freed_memory()
        data.to(trainer.device)
        trainer.place(parts.algorithm)
        # a separate folder for each client, since nodes on one machine may share the folder
        disk = KeptOnDisk(self.state / str(asked[RUN]) / f"client_{task.client_id}", task.client_id)
        questions: list[Question] = []

        def ask(question: Question) -> Answer:
            if isinstance(answer, Answer):
                return answer
            questions.append(question)
            raise AskedError

        kept = disk.read(unpack(bytes_part(content, KEPT))[0])
        session = ClientSession(broadcast, task, lambda _: data.client(client), ask, kept)
        outcome: Any = attempt(parts.algorithm, session, trainer)
        if questions:
            outcome = questions[0]
        elif isinstance(outcome, ClientResult) and outcome.kept:
            # a round in which nobody trains changes nothing: its version would push out the one that the server knows
            kept = disk.write(broadcast.round_num, outcome.kept) if broadcast.local_epochs else {}
            outcome = replace(outcome, kept=kept)
        return record({ROUND: broadcast.round_num}, **{OUTCOME: encode(outcome)})

    def _parts(self, info: Mapping[str, Any]) -> Any:
        """Build data, algorithm and trainer from this node's files and the server's facts about the examples."""
        from fedamm_pl.cli.parser import build_parser, in_one_line, parse

        names, shape = info["class_names"], info["shape"]
        known = {name: value for name, value in info.items() if name not in ("shape", "feature_names")}
        view = SimpleNamespace(num_classes=len(names), in_channels=shape[0], info=known)
        parser = build_parser(lambda data: view)
        config = parse(parser, self.words)
        with in_one_line():
            return parser.instantiate(config)

    def _data(self, parts: Any, info: Mapping[str, Any]) -> "tuple[FederatedDataModule | OwnData, int]":
        """Return the data that contain this client's examples, and the index of the client in them."""
        from fedamm_pl.data.own import OwnData

        if self.own:
            return OwnData(parts.data.hparams, info["class_names"], info["shape"], info["feature_names"]), 0
        names = parts.data.client_names
        if self.name not in names:
            raise ValueError(
                f"Expected `client` to be one of the {len(names)} of the partition, got {self.name!r:.60}."
            )
        return parts.data, names.index(self.name)


class KeptOnDisk:
    """Private state of a client in files on its machine; the server holds a token with the round of the state.

    Args:
        folder: Folder of the run and the client.
        client_id: The client.
    """

    VERSIONS: ClassVar[int] = 10
    """Number of states to keep, the newest ones, so that the server can go back to an earlier checkpoint."""

    def __init__(self, folder: Path, client_id: int) -> None:
        self.folder = folder
        self.client_id = client_id

    def read(self, token: "State") -> "State":
        """Return the state of a token; in the client's first round there is no token but the state itself.

        Raises:
            ValueError: If the state is missing or damaged.
        """
        from fedamm_pl.federation.store import FileStore

        if TOKEN not in token:
            return token
        round_num = int(token[TOKEN])
        try:
            return FileStore(self.folder).read(self.client_id, round_num)
        except OSError as error:
            raise ValueError(
                f"Expected the state of this client from round {round_num} to be in {self.folder}, got {error.strerror or error}."
            ) from error

    def write(self, round_num: int, state: "State") -> "State":
        """Write a state, and return its token."""
        from fedamm_pl.federation.store import FileStore

        self.folder.mkdir(parents=True, exist_ok=True)
        store = FileStore(self.folder)
        store.discard(after=round_num - 1)
        store.write(self.client_id, round_num, state)
        store.prune(sorted(store.versions(self.client_id))[-self.VERSIONS :])
        return {TOKEN: torch.tensor(round_num)}
