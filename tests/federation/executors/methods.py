"""Methods and data whose clients do in a round what its number says, in whatever process they are."""

import multiprocessing
import os
import signal
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM
from fedamm_pl.data import ImageData
from fedamm_pl.data.client import BatchLoader, ClientData
from fedamm_pl.federation.executors import worker
from fedamm_pl.protocol.codec import encode
from fedamm_pl.protocol.messages import ClientTask, State
from fedamm_pl.protocol.session import ClientSession
from tests.tiny import TinyData

NUM_CLIENTS = 8
STRUCK = 1
"""The client that misbehaves."""
UNREADABLE = 6
"""The client whose data cannot be opened, in any round."""
BROKEN_SEED = 13
"""Seed of a task whose second batch cannot be made."""

(
    SOUND,
    FAILS_IN_TRAINING,
    FAILS_IN_QUESTION,
    FAILS_IN_SURVEY,
    FAILS_IN_PAYLOAD,
    UNSENDABLE,
    SLOW,
    DIES_ONCE,
    DIES,
    HANGS,
    SENDS_JUNK,
    SENDS_ANOTHER_KIND,
    SENDS_AN_ODD_RESULT,
) = range(1, 14)
"""Numbers of rounds."""


class Obedient(FedAMM):
    """FedAMM with a state of its own at each client, that counts its rounds; one client misbehaves, but not in its steps.

    Args:
        folder: Where a client that dies once notes that it has.
    """

    personal: ClassVar[tuple[str, ...]] = ("own.",)

    def __init__(self, *args: Any, folder: str = "", **options: Any) -> None:
        super().__init__(*args, **options)
        self.own = nn.Module()
        self.own.register_buffer("visits", torch.tensor(10))

    def turn(self, *rounds: int) -> bool:
        """Whether this client misbehaves in one of these rounds."""
        assert self.session is not None
        return self.session.task.client_id == STRUCK and self.session.broadcast.round_num in rounds

    def survey(self, session: ClientSession) -> State:
        if self.turn(FAILS_IN_SURVEY):
            raise RuntimeError("no survey")
        return super().survey(session)

    def question(self, session: ClientSession) -> State | None:
        if self.turn(FAILS_IN_QUESTION):
            raise RuntimeError("no question")
        return super().question(session)

    def on_train_start(self) -> None:
        super().on_train_start()
        if self.turn(FAILS_IN_TRAINING):
            raise RuntimeError("no step")

    def first_time(self) -> bool:
        """Whether it is, by a file that outlives the process."""
        marker = Path(self.hparams["folder"]) / "died"
        found = marker.exists()
        marker.touch()
        return not found

    def client_payload(self) -> State:
        if self.turn(FAILS_IN_PAYLOAD):
            raise RuntimeError("no payload")
        assert self.session is not None
        self.own.visits += 1  # type: ignore[operator]
        self.session.kept = {"rounds": self.session.kept.get("rounds", torch.tensor(0)) + 1}
        payload = super().client_payload()
        if self.turn(SENDS_JUNK):
            worker.encode = lambda outcome: b"\x1b[31mjunk"
        if self.turn(SENDS_ANOTHER_KIND):
            worker.encode = lambda outcome: encode(ClientTask(STRUCK, 0))
        return {**payload, "model.conv1.weight": torch.empty(3, device="meta")} if self.turn(UNSENDABLE) else payload

    def tallies(self) -> State:
        odd = self.session is not None and self.turn(SENDS_AN_ODD_RESULT)
        return [1] if odd else super().tallies()  # type: ignore[return-value]


class Scripted(Obedient):
    """The same; it misbehaves in its steps, too."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        assert self.session is not None
        if self.session.task.client_id == 0 and self.session.broadcast.round_num == SLOW and batch_idx == 0:
            time.sleep(1.5)
        if batch_idx == 1:
            if self.turn(DIES) or (self.turn(DIES_ONCE) and self.first_time()):
                os.kill(os.getpid(), signal.SIGKILL)
            if self.turn(HANGS):
                time.sleep(3600)
        return super().training_step(batch, batch_idx)


class HalfReadable(TinyData):
    """Eight clients; the data of one cannot be opened, and the batches of one seed cannot be made."""

    def client(self, client_id: int) -> ClientData:
        if client_id == UNREADABLE:
            raise OSError("unreadable")
        return _Fragile(**vars(super().client(client_id)))


class _Fragile(ClientData):
    def train_loader(self, seed: int) -> Any:
        loader = super().train_loader(seed)
        return _Broken(loader) if seed == BROKEN_SEED else loader


@dataclass
class _Broken:
    loader: BatchLoader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Any:
        yield next(iter(self.loader))
        raise OSError("no second batch")


def elsewhere() -> bool:
    """Whether this is a worker's process."""
    return multiprocessing.parent_process() is not None or Path(sys.argv[0]).name == "default_worker.py"  # Ray's


class AbsentElsewhere(TinyData):
    """Data that are on this machine only, so to speak."""

    def load_images(self) -> ImageData:
        if elsewhere():
            raise FileNotFoundError("Expected data,\n got none")
        return super().load_images()


class OtherElsewhere(TinyData):
    """Data that differ on the other machine, so to speak."""

    def load_images(self) -> ImageData:
        images = super().load_images()
        images.train_images[0, 0, 0, 0] += elsewhere()
        return images


def dropout(num_classes: int, in_channels: int) -> nn.Sequential:
    """A network that draws while it trains."""
    layers = {"flat": nn.Flatten(), "drop": nn.Dropout(), "classifier": nn.Linear(64 * in_channels, num_classes)}
    return nn.Sequential(OrderedDict(layers))
