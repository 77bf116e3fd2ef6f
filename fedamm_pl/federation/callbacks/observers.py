"""``Observers``: the callbacks of a run, called in an order in which none can harm what the others write."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedamm_pl.federation.callbacks.base import FederationCallback
from fedamm_pl.federation.callbacks.files import run_files
from fedamm_pl.federation.run import Run
from fedamm_pl.files import of_the_disk
from fedamm_pl.terminal import line

log = logging.getLogger(__name__)


class Observers:
    """The user's callbacks of a run, and those that write its folder.

    Args:
        callbacks: The callbacks.
        folder: The folder; None writes nothing.
        keep_checkpoints: How many of the newest checkpoints to keep.
    """

    def __init__(self, callbacks: Sequence[FederationCallback], folder: Path | None, keep_checkpoints: int) -> None:
        self.callbacks = list(callbacks)
        self.files = [] if folder is None else run_files(folder, keep_checkpoints)

    def call(self, hook: str, run: Run, *args: Any) -> None:
        """Call a hook of all callbacks."""
        if hook == "on_run_end":
            return self._end(run)
        # the files last: once the checkpoint of a round exists, so does everything that others have logged of it
        for callback in [*self.callbacks, *self.files]:
            getattr(callback, hook)(run, *args)
        return None

    def _end(self, run: Run) -> None:
        """Call ``on_run_end`` for the files first, so that the run is complete even if another callback fails."""
        for callback in self.files:
            callback.on_run_end(run)
        for callback in self.callbacks:
            try:
                callback.on_run_end(run)
            except Exception as error:
                if of_the_disk(error):  # a full disk is an error of the run
                    raise
                name, what = type(callback).__name__, line(f"{type(error).__name__}: {error}")
                log.warning("%s failed at the end of the run, which is complete without it (%s)", name, what)
