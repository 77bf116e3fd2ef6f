"""What an executor is: a description of where clients train, opened once per run for a runner that trains them."""

import inspect
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import deep_copy
from fedamm_pl.protocol.messages import Broadcast, ClientFailure, ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule

Outcome = ClientResult | ClientFailure
Kept = Callable[[int], State]
"""Client -> what it kept to itself from its last round, and its personal state."""


@dataclass(frozen=True)
class RunSpec:
    """What a worker builds its module and its data from.

    Pickled it holds no images and, where the network has a name, no weights: class and options of the algorithm and of the
    data, which each worker reads from ``root`` on its own machine.

    Attributes:
        module: The algorithm, as it was made; nobody trains it.
        data: The data; in another process they are set up again.
        trainer: Resolved: with what ``auto`` has chosen.
        seed: The seed of the run.
        threads: Threads of a worker.
    """

    module: FederatedModule
    data: FederatedDataModule
    trainer: TrainerConfig
    seed: int
    threads: int

    def build_module(self) -> FederatedModule:
        """Return a module of one's own."""
        return copied(self.module)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the module by class and options where these determine it."""
        module = copied(self.module).cpu() if "model" not in self.module.hparams else None
        return _rebuilt, (
            type(self.module),
            _options(self.module),
            module,
            self.data,
            self.trainer,
            self.seed,
            self.threads,
        )

    def pickled(self) -> bytes:
        """Return it as bytes for another process.

        Raises:
            ValueError: If algorithm or data cannot be sent, or the module is another one than its options make.
        """
        try:
            content = pickle.dumps(self)
        except Exception as error:  # what a class of one's own does not pickle may raise anything
            raise ValueError(
                f"Expected {type(self.module).__name__} and {type(self.data).__name__} to be importable in another process "
                f"and to hold nothing that cannot be sent, got: {error}."
            ) from error
        if "model" in self.module.hparams and (difference := _difference(self.module, _rebuilt_module(self.module))):
            raise ValueError(
                f"Expected {type(self.module).__name__} to be as its options make it, since other processes make it from "
                f"them, got one that differs in {difference}. Pass the network as a Module, or change it in a class of yours."
            )
        return content


def copied(module: FederatedModule) -> FederatedModule:
    """Return a copy of a module, without a trainer that it was fitted by."""
    try:
        trainer = module.trainer
    except RuntimeError:  # none
        trainer = None
    copy_of = deep_copy(module, {id(trainer): None})
    copy_of.compiled = None
    return copy_of


def _options(module: FederatedModule) -> dict[str, Any]:
    """Return the options that the module's class takes; what it has passed on to its bases is not among them."""
    parameters = inspect.signature(type(module)).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in module.hparams.items() if takes_all or name in parameters}


def _rebuilt_module(module: FederatedModule) -> FederatedModule:
    with torch.random.fork_rng([]):  # weights are drawn, which nobody shall notice; they come with the broadcast
        return type(module)(**_options(module))


def _rebuilt(
    algorithm: type[FederatedModule], options: dict[str, Any], module: FederatedModule | None, *rest: Any
) -> RunSpec:
    return RunSpec(module or algorithm(**options), *rest)


def _difference(module: nn.Module, rebuilt: nn.Module) -> str | None:
    """Return the name of the first entry that is not the same but for its values."""

    def described(module: nn.Module) -> dict[str, Any]:
        entries: dict[str, Any] = {name: value.shape for name, value in module.state_dict().items()}
        return {**entries, **{name: (value.shape, value.requires_grad) for name, value in module.named_parameters()}}

    before, after = described(module), described(rebuilt)
    return next((name for name in sorted({**before, **after}) if before.get(name) != after.get(name)), None)


class Runner(ABC):
    """Trains clients, anywhere; opened once per run, closed once. It holds workers, modules and data.

    A client that raises an ``Exception``, or takes its process with it, costs the round its result and nothing else.

    Attributes:
        environment: What the workers compute with, equal in all of them: ``content_hash`` of the data as they see them,
            ``threads`` and versions.
    """

    environment: dict[str, Any]
    keeps_here: bool = True
    """Whether what clients keep to themselves comes here; elsewhere it stays with them, and here is a token of it."""

    @property
    def busy(self) -> tuple[int, int]:
        """How many workers train a client or start, and how many there are; this process is none."""
        return 0, 0

    @abstractmethod
    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task.

        Args:
            broadcast: What the server sends to all of them.
            tasks: Which clients.
            kept: What each kept to itself; asked when the client is given out.
            meanwhile: Called once, while the first clients train if they do so elsewhere; what it raises ends the round.

        Yields:
            One result for each task, or why there is none, in the order of the tasks, whatever finishes first. No more than
            a bounded number of results waits. A generator that is dropped half-way cancels what is in flight.
        """

    def close(self) -> None:  # noqa: B027  many have nothing to end
        """End the workers; a second time nothing happens."""

    def __enter__(self) -> "Runner":
        """Return the runner."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class Executor(ABC):
    """Describes where clients train: options in plain types, nothing open. Algorithms do not know which they run on."""

    can_ask: ClassVar[bool] = True
    """Whether clients can put questions to the server in the middle of a fit."""

    @property
    def together(self) -> int:
        """How many clients train as one program, whose time is that of all of them."""
        return 1

    @property
    def workers_here(self) -> int:
        """How many processes of this machine compute at once."""
        return 1

    @abstractmethod
    def open(self, spec: RunSpec) -> Runner:
        """Start what trains the clients of a run.

        Raises:
            ValueError: If that is not possible here, or workers differ from each other or from this process.
        """
