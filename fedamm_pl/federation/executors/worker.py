"""``Worker``: trains one client at a time in the process it runs in, with its own module, data and server."""

import ctypes
import json
import logging
import pickle
import platform
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from fedamm_pl.federation.client import attempt
from fedamm_pl.federation.executors.base import Outcome, RunSpec
from fedamm_pl.federation.fingerprint import hashes, versions
from fedamm_pl.federation.server import Server
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.codec import decode, encode, unpack
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientFailure, ClientTask, Question, State
from fedamm_pl.protocol.session import ClientSession
from fedamm_pl.terminal import line

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Options of glibc's ``mallopt``, in bytes."""

NOBODY = -1
"""Client id in the last message of a worker that could not read what it was sent."""


class Worker:
    """Trains clients, each with a new quiet Trainer on the same module, which stays on the device.

    Args:
        spec: What module and data are built from.
    """

    def __init__(self, spec: RunSpec) -> None:
        keep_freed_memory()
        self.spec = spec
        self.module = spec.build_module()
        spec.trainer.place(self.module)
        spec.data.to(spec.trainer.device)
        self._broadcast: Broadcast | None = None
        self._answering: Broadcast | None = None

    @property
    def environment(self) -> dict[str, Any]:
        """The environment: hashes of the data, device, number of threads, and versions."""
        return {
            **hashes(self.spec.data),
            "device": self.spec.trainer.kind,
            "threads": torch.get_num_threads(),
            **versions(),
        }

    def begin(self, broadcast: Broadcast) -> None:
        """Start a round with its broadcast."""
        self._broadcast = broadcast

    def train(self, task: ClientTask, kept: State) -> Outcome:
        """Train a client of the round."""
        return attempt(self.module, self.session(task, kept), self.spec.trainer)

    def session(self, task: ClientTask, kept: State) -> ClientSession:
        """Return the session of a client in the round."""
        assert self._broadcast is not None
        return ClientSession(self._broadcast, task, self.spec.data.client, self.answer, kept)

    @cached_property
    def server(self) -> Server:
        """The worker's own server, which answers its clients as the run's server would."""
        return Server(self.spec.build_module(), self.spec.data, self.spec.trainer, self.spec.seed)

    def answer(self, question: Question) -> Answer:
        """Answer a client of the round."""
        self._begin_to_answer()
        return self.server.answer(question)

    def answers(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer several clients of the round at once, if the method supports it."""
        self._begin_to_answer()
        return self.server.answers(questions)

    def _begin_to_answer(self) -> None:
        if self._answering is not self._broadcast:
            assert self._broadcast is not None
            self.server.begin(self._broadcast)
            self._answering = self._broadcast


def keep_freed_memory() -> None:
    """Keep the memory that a batch frees in this process for the next batch, if the C library is glibc.

    By default its malloc returns large blocks, and free memory at the top of the heap, to the system. Each batch then
    has to get the memory of its activations again page by page, which takes a fifth of the time of a small CNN in
    float32.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    glibc = ctypes.CDLL(None)
    glibc.mallopt(M_MMAP_THRESHOLD, 2**28)
    glibc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def started(spec: bytes, gpu: int) -> tuple[Worker | None, bytes]:
    """Build the worker of this process.

    Args:
        spec: A pickled :class:`RunSpec`.
        gpu: Number of the GPU to use, if GPUs are used.

    Returns:
        The worker and its environment as JSON; or None and the error as JSON.
    """
    logging.getLogger("fedamm_pl").setLevel(logging.ERROR)  # the main process has already logged the warnings
    try:
        with quiet():
            run_spec: RunSpec = pickle.loads(spec)
            torch.set_num_threads(run_spec.threads)
            worker = Worker(replace(run_spec, trainer=_on_gpu(run_spec.trainer, gpu)))
            return worker, json.dumps(worker.environment).encode()
    except Exception as error:
        return None, json.dumps({"error": " ".join(str(error).split()) or type(error).__name__}).encode()


def begun(worker: Worker, broadcast: bytes) -> None:
    """Start a round with an encoded broadcast.

    Raises:
        ValueError: If the message is not a broadcast.
    """
    message = decode(broadcast)
    if not isinstance(message, Broadcast):
        raise ValueError(f"Expected a broadcast, got a {type(message).__name__}")
    worker.begin(message)


def trained(worker: Worker, task: bytes, kept: bytes) -> bytes:
    """Train a client of the round; task, private state and result are bytes.

    Raises:
        ValueError: If the task or the private state cannot be read. Errors of the client itself are returned as a
            failure.
    """
    message = decode(task)
    if not isinstance(message, ClientTask):
        raise ValueError(f"Expected a task, got a {type(message).__name__}")
    outcome = worker.train(message, unpack(kept)[0])
    try:
        return encode(outcome)
    except Exception as error:  # encoding an unusual result may raise any exception
        return encode(ClientFailure(outcome.client_id, "update", line(str(error)) or type(error).__name__))


def unreadable(error: ValueError) -> bytes:
    """Return the last message of a worker that cannot read what it was sent."""
    return encode(ClientFailure(NOBODY, "lost", f"its worker cannot read what it was sent: {error}"))


def _on_gpu(trainer: TrainerConfig, gpu: int) -> TrainerConfig:
    """Choose a GPU, unless the user has chosen one or uses none."""
    if trainer.kind != "cuda" or trainer.devices != 1:
        return trainer
    return replace(trainer, devices=[gpu % torch.cuda.device_count()])
