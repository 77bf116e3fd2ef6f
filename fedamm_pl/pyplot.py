"""Keeps matplotlib's pyplot out of the import of torchmetrics, which loads it for two names that it needs when it draws.

pyplot takes a third of a second, chooses a window system and keeps global state; this package draws without it.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

NAME = "matplotlib.pyplot"


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
        return getattr(importlib.import_module(NAME), name)


def import_torchmetrics() -> None:
    """Import torchmetrics without pyplot; where that is loaded already, it stays."""
    if NAME in sys.modules:
        importlib.import_module("torchmetrics")
        return
    stand_in = sys.modules[NAME] = LaterPyplot(NAME)
    try:
        importlib.import_module("torchmetrics")
    finally:
        if sys.modules.get(NAME) is stand_in:  # whoever imports it from here on gets the real one
            del sys.modules[NAME]
            if (package := sys.modules.get("matplotlib")) and vars(package).get("pyplot") is stand_in:
                delattr(package, "pyplot")
