"""The client's half: its own data, what it keeps on its own disk, and its part of a round, in a process for each message."""

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
"""Stands at the server for what a client keeps."""


def client_app(config: str | Path) -> ClientApp:
    """Return the ClientApp that trains one client of a federation.

    What a node is told by ``--node-config``: ``client``, its name, in a partition of common data its number; ``config``, a file with options
    of its own, which come after those of the app, for example ``data.root`` or ``trainer.accelerator``; ``own``: true where all training
    examples that it finds are its own, else it takes its part of the partition; ``state``: a folder for what it keeps from one round to
    the next, by default ``~/.fedamm``.

    Args:
        config: The configuration of the run, a file beside the app.
    """
    app = ClientApp()

    def answered(handler: Callable[["Node", RecordDict], RecordDict]) -> Callable[[Message, Context], Message]:
        def handle(message: Message, context: Context) -> Message:
            # whatever happens, a message goes back: without one Flower never gives this node another
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
    """The client asks the server, and its process ends here."""


class NotBegunError(Exception):
    """An answer has come for a round that this node knows nothing of."""


class Node:
    """One client on its machine, made for one message.

    Args:
        config: The configuration of the run.
        context: What Flower knows of the node and of the run.

    Raises:
        ValueError: If the node is not told which client it is.
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
        """Say who this is and how many examples it has; how many of each class only if the server asks for it."""
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
        """Take up a round: return the result, or what the method asks before the fit."""
        sent = bytes_part(content, BROADCAST)
        # for the message that brings the answer; Flower has it in memory, for this run
        self.context.state[BROADCAST] = ArrayRecord([np.frombuffer(sent, dtype=np.uint8)])
        return self._trained(content, sent)

    def finish(self, content: RecordDict) -> RecordDict:
        """Go on with the answer: what came before it is done again, since no process outlives its message."""
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
        # of its own for each client: nodes of one machine may share the folder
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
            outcome = replace(outcome, kept=disk.write(broadcast.round_num, outcome.kept))
        return record({ROUND: broadcast.round_num}, **{OUTCOME: encode(outcome)})

    def _parts(self, info: Mapping[str, Any]) -> Any:
        """Make data, algorithm and trainer by this node's own files; only what is known of the examples comes from the server."""
        from fedamm_pl.cli.parser import build_parser, in_one_line, parse

        names, shape = info["class_names"], info["shape"]
        known = {name: value for name, value in info.items() if name != "shape"}
        view = SimpleNamespace(num_classes=len(names), in_channels=shape[0], info=known)
        parser = build_parser(lambda data: view)
        config = parse(parser, self.words)
        with in_one_line():
            return parser.instantiate(config)

    def _data(self, parts: Any, info: Mapping[str, Any]) -> "tuple[FederatedDataModule | OwnData, int]":
        """Return what has this client's examples, and its number there."""
        from fedamm_pl.data.own import OwnData

        if self.own:
            return OwnData(parts.data.hparams, info["class_names"], info["shape"]), 0
        names = parts.data.client_names
        if self.name not in names:
            raise ValueError(
                f"Expected `client` to be one of the {len(names)} of the partition, got {self.name!r:.60}."
            )
        return parts.data, names.index(self.name)


class KeptOnDisk:
    """What a client keeps to itself, in files of its own machine; the server has a token that says of which round it is.

    Args:
        folder: Of the run and the client.
        client_id: The client.
    """

    VERSIONS: ClassVar[int] = 10
    """The newest ones are left, so that a server may go back to a checkpoint."""

    def __init__(self, folder: Path, client_id: int) -> None:
        self.folder = folder
        self.client_id = client_id

    def read(self, token: "State") -> "State":
        """Return what a token stands for; the state itself where it is none: what a client has at its first round.

        Raises:
            ValueError: If it is not there any more, or damaged.
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
        """Keep a state, and return its token."""
        from fedamm_pl.federation.store import FileStore

        self.folder.mkdir(parents=True, exist_ok=True)
        store = FileStore(self.folder)
        store.discard(after=round_num - 1)
        store.write(self.client_id, round_num, state)
        store.prune(sorted(store.versions(self.client_id))[-self.VERSIONS :])
        return {TOKEN: torch.tensor(round_num)}
