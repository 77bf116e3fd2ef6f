"""The options of a run: their groups, the classes to choose from, and the options of each class."""

import dataclasses
import importlib
import inspect
import typing
from typing import Literal

from fedamm_pl import algorithms
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Executor, Processes, Ray, Sequential, Vectorized
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.module import FederatedModule


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where results go and what is shown."""

    dir: str | None = None
    """Folder of the run; by default runs/<config name>/<date-time>. An interrupted run in this folder is continued."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, in addition to the best."""
    progress: Literal["auto", "none"] = "auto"
    """auto shows a progress bar in a terminal and one line per evaluation elsewhere; none shows only the final table."""
    figures: bool = True
    """Draw figures, as PDF and PNG in the folder's figures/ and for loggers that accept images."""


GROUPS: dict[str, type] = {
    "data": FederatedDataModule,
    "algorithm": FederatedModule,
    "federation": FederationConfig,
    "executor": Executor,
    "trainer": TrainerConfig,
    "output": OutputConfig,
}
"""Group of options -> the class that takes them, or the base of the classes to choose from."""
OFFERED: dict[str, list[type]] = {
    "data": [FederatedDataModule],
    "algorithm": [getattr(algorithms, name) for name in algorithms.__all__],
    "executor": [Sequential, Processes, Ray, Vectorized],
}
"""Group with a choice of classes -> the classes of the package; other classes are given by import path."""
LINKED = {"data": ("seed",), "algorithm": ("num_classes", "in_channels", "info")}
"""Group -> parameters that are not options: the seed is that of the run, an algorithm gets the others from the data."""


def options_of(owner: type) -> dict[str, inspect.Parameter]:
    """Return the options of a class: its parameters without those of :data:`LINKED`."""
    hidden = LINKED.get(group_of(owner) or "", ())
    return {name: parameter for name, parameter in parameters_of(owner).items() if name not in hidden}


def parameters_of(owner: type) -> dict[str, inspect.Parameter]:
    """Return the parameters of a class with resolved types; with ``**kwargs``, also the parameters of its base."""
    found: dict[str, inspect.Parameter] = {}
    for kind in owner.__mro__[:-1]:  # without object
        if "__init__" not in vars(kind):
            continue
        try:
            hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]
        except NameError:  # some types are imported for type checkers only
            hints = {}
        (_, *parameters) = inspect.signature(kind.__init__).parameters.values()  # type: ignore[misc]
        for parameter in parameters:
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                annotation = hints.get(parameter.name, typing.Any)
                found.setdefault(parameter.name, parameter.replace(annotation=annotation))
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def group_of(owner: type) -> str | None:
    """Return the group whose options a class takes, or None."""
    return next((group for group, base in GROUPS.items() if issubclass(owner, base)), None)


def offered(group: str) -> list[type]:
    """Return the classes of the package that take the options of a group."""
    return OFFERED.get(group, [GROUPS[group]])


def imported(group: str) -> list[type]:
    """Return the class of a group and all its imported subclasses, including those of the user."""
    found = [GROUPS[group]]
    for kind in found:  # the list grows
        subclasses: list[type] = kind.__subclasses__()
        found += [subclass for subclass in subclasses if subclass not in found]
    return found


def find_class(group: str, name: str) -> type:
    """Find a class by its name or import path.

    Raises:
        ValueError: If there is no such class in this group.
    """
    for kind in imported(group):
        if kind.__name__ == name:
            return kind
    module, _, attribute = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # a user's module may raise anything
        raise ValueError(f"{name} ({type(error).__name__}: {error})" if module else name) from error
    if not (inspect.isclass(found) and issubclass(found, GROUPS[group])):
        raise ValueError(f"{name}, which is not one")
    return found
