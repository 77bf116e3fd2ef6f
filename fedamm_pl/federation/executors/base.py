"""Base classes: an ``Executor`` describes where clients train; a ``Runner``, opened by it once per run, trains them."""

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
"""Client id -> the private state that it kept from its last round, and its personal state."""


@dataclass(frozen=True)
class RunSpec:
    """Describes a run, so that a worker can build its module and its data.

    A pickled specification contains no images and, if the network is given by name, no weights. It contains the classes
    and options of the algorithm and of the data; each worker reads the data from ``root`` on its own machine.

    Attributes:
        module: The algorithm as it was created; workers train copies of it.
        data: The data; another process sets them up again.
        trainer: Hardware and precision, with ``auto`` already resolved.
        seed: The seed of the run.
        threads: Number of threads per worker.
    """

    module: FederatedModule
    data: FederatedDataModule
    trainer: TrainerConfig
    seed: int
    threads: int

    def build_module(self) -> FederatedModule:
        """Return a copy of the module."""
        return copied(self.module)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the module as class and options if these determine it, else as a copy."""
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
        """Return the specification as bytes for another process.

        Raises:
            ValueError: If algorithm or data cannot be pickled, or the module is not as its options would create it.
        """
        try:
            content = pickle.dumps(self)
        except Exception as error:  # pickling a user-defined class may raise any exception
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
    """Return a copy of a module, without the Trainer that fitted it."""
    try:
        trainer = module.trainer
    except RuntimeError:  # none
        trainer = None
    copy_of = deep_copy(module, {id(trainer): None})
    copy_of.compiled = None
    return copy_of


def _options(module: FederatedModule) -> dict[str, Any]:
    """Return the options that the module's class takes, without those that it has passed on to its base classes."""
    parameters = inspect.signature(type(module)).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return {name: value for name, value in module.hparams.items() if takes_all or name in parameters}


def _rebuilt_module(module: FederatedModule) -> FederatedModule:
    with torch.random.fork_rng([]):  # drawing weights must not change the random state; clients receive theirs
        return type(module)(**_options(module))


def _rebuilt(
    algorithm: type[FederatedModule], options: dict[str, Any], module: FederatedModule | None, *rest: Any
) -> RunSpec:
    return RunSpec(module or algorithm(**options), *rest)


def _difference(module: nn.Module, rebuilt: nn.Module) -> str | None:
    """Return the name of the first entry that differs in more than its values, or None."""

    def described(module: nn.Module) -> dict[str, Any]:
        entries: dict[str, Any] = {name: value.shape for name, value in module.state_dict().items()}
        for name, part in module.named_modules(remove_duplicate=False):
            entries[f"{name} ({type(part).__name__})"] = part.extra_repr()  # such as the rate of a dropout
        return {**entries, **{name: (value.shape, value.requires_grad) for name, value in module.named_parameters()}}

    before, after = described(module), described(rebuilt)
    return next((name for name in sorted({**before, **after}) if before.get(name) != after.get(name)), None)


class Runner(ABC):
    """Trains the clients of a run. It holds the workers, modules and data, and is opened and closed once per run.

    If a client raises an ``Exception`` or its worker process dies, the round loses the result of this client only.

    Attributes:
        environment: The environment of the workers, the same for all of them: ``content_hash`` of the data that they
            see, ``threads`` and versions.
    """

    environment: dict[str, Any]
    keeps_here: bool = True
    """Whether the clients' private state is returned to this process; if not, this process only receives a token."""

    @property
    def busy(self) -> tuple[int, int]:
        """Number of workers that are training a client or starting, and number of all workers, without this process."""
        return 0, 0

    @abstractmethod
    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task.

        Args:
            broadcast: What the server sends to all clients.
            tasks: Which clients to train.
            kept: Returns the private state of a client; called when the client is about to train.
            meanwhile: Called once; if clients train in other processes, while the first ones train. An exception that
                it raises ends the round.

        Yields:
            A result or a failure for each task, in the order of the tasks, whichever finishes first. Only a bounded
            number of results waits to be yielded. Closing the generator early cancels the clients that are still
            training.
        """

    def close(self) -> None:  # noqa: B027  many have nothing to end
        """End the workers; calling it again has no effect."""

    def __enter__(self) -> "Runner":
        """Return the runner."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the runner."""
        self.close()


class Executor(ABC):
    """Describes where clients train: options in plain types, nothing open. Algorithms do not know which they run on."""

    can_ask: ClassVar[bool] = True
    """Whether clients can ask the server questions in the middle of a fit."""

    @property
    def together(self) -> int:
        """Number of clients that train together as one program and are timed together."""
        return 1

    @property
    def workers_here(self) -> int:
        """Number of processes on this machine that compute at the same time."""
        return 1

    @abstractmethod
    def open(self, spec: RunSpec) -> Runner:
        """Start the workers of a run and return their runner.

        Raises:
            ValueError: If they cannot be started here, or differ from each other or from this process.
        """
