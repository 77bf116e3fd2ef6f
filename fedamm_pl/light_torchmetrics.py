"""Keeps matplotlib's pyplot and scipy.signal out of the import of torchmetrics, which has no use for them at the start.

It loads pyplot for two names that it needs when it draws. pyplot takes a third of a second, chooses a window system and keeps
global state; this package draws without it. It loads scipy.signal, where SciPy is installed, to give it a name of old times; that
takes a second.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class LaterPyplot(ModuleType):
    """Stands for pyplot until something of it is used."""

    def __getattr__(self, name: str) -> Any:
        """Return what pyplot has under this name."""
        if name.startswith("__"):  # whoever looks through all modules
            raise AttributeError(name)
        if name == "Figure":
            return importlib.import_module("matplotlib.figure").Figure
        if name == "style":
            return importlib.import_module("matplotlib.style")
        return getattr(importlib.import_module(self.__name__), name)


class NoSignal(ModuleType):
    """Stands for scipy.signal, with the one name that torchmetrics would add to it."""

    hamming = None


STAND_INS: dict[str, type[ModuleType]] = {"matplotlib.pyplot": LaterPyplot, "scipy.signal": NoSignal}


def import_torchmetrics() -> None:
    """Import torchmetrics without these modules; those that are loaded already stay."""
    added = {name: kind(name) for name, kind in STAND_INS.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        importlib.import_module("torchmetrics")
    finally:
        for name, stand_in in added.items():
            if sys.modules.get(name) is stand_in:  # whoever imports it from here on gets the real one
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if (package := sys.modules.get(parent)) and vars(package).get(child) is stand_in:
                    delattr(package, child)
