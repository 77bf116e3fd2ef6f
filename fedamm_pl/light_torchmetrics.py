"""Import torchmetrics without matplotlib's pyplot and scipy.signal, which it does not need during the import.

torchmetrics imports pyplot for two names that it needs for plotting. pyplot takes a third of a second to import,
chooses a window system and keeps global state; this package makes its figures without it. If SciPy is installed,
torchmetrics also imports scipy.signal, to add a name from older versions to it; this takes a second.
"""

import importlib
import sys
from types import ModuleType
from typing import Any


class LaterPyplot(ModuleType):
    """A placeholder for pyplot, which is imported when an attribute is used."""

    def __getattr__(self, name: str) -> Any:
        """Return the attribute of pyplot with this name."""
        if name.startswith("__"):  # from code that inspects all loaded modules
            raise AttributeError(name)
        if name == "Figure":
            return importlib.import_module("matplotlib.figure").Figure
        if name == "style":
            return importlib.import_module("matplotlib.style")
        return getattr(importlib.import_module(self.__name__), name)


class NoSignal(ModuleType):
    """A placeholder for scipy.signal, with the one name that torchmetrics would add to it."""

    hamming = None


STAND_INS: dict[str, type[ModuleType]] = {"matplotlib.pyplot": LaterPyplot, "scipy.signal": NoSignal}


def import_torchmetrics() -> None:
    """Import torchmetrics without these modules; modules that are already loaded stay."""
    added = {name: kind(name) for name, kind in STAND_INS.items() if name not in sys.modules}
    sys.modules.update(added)
    try:
        importlib.import_module("torchmetrics")
    finally:
        for name, stand_in in added.items():
            if sys.modules.get(name) is stand_in:  # later imports get the real module
                del sys.modules[name]
                parent, _, child = name.rpartition(".")
                if (package := sys.modules.get(parent)) and vars(package).get(child) is stand_in:
                    delattr(package, child)
