"""Callbacks that draw figures of a run. A failure to draw does not end the run; an error of the disk is raised."""

import io
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary, finalize

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from pytorch_lightning.loggers import Logger

from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.files import diagnostics
from fedamm_pl.federation.run import Run
from fedamm_pl.files import of_the_disk, write_atomically
from fedamm_pl.results.figure_parts import rendered
from fedamm_pl.results.run_figures import run_figures

log = logging.getLogger(__name__)

DRAWING_SHARE = 0.01
"""Largest share of a run's time that drawing figures for a logger may take before the last round."""
FIRST_DRAWING = 2.0
"""Seconds that the first drawing is assumed to take."""
DATA_FIGURES = ("class_counts", "partition")
"""Figures that are the same in every round."""


class LogFigures(FederationCallback):
    """Sends the figures of a run to a Lightning logger, as often as a hundredth of the run's time allows, and at the end.

    Only loggers that accept images get them: TensorBoard's, and those with a method ``log_image``. If ``LogTo`` uses
    the same logger, put it after this callback, since it closes the log at the end of the run.

    Args:
        logger: Any Lightning logger.
    """

    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def on_run_start(self, run: Run) -> None:
        """Start measuring the time of the run."""
        self._start, self._drawing, self._cost, self._drawn = time.monotonic(), 0.0, FIRST_DRAWING, -1

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Log the figures if there is time for them."""
        due = self._drawing + self._cost <= DRAWING_SHARE * (time.monotonic() - self._start)
        if record.evaluated and due:
            self._draw(run)

    def on_run_end(self, run: Run) -> None:
        """Log the last figures."""
        if self._drawn != run.state.round_num:
            self._draw(run)

    def _draw(self, run: Run) -> None:
        add_image = getattr(getattr(self.logger, "experiment", None), "add_image", None)
        log_image = getattr(self.logger, "log_image", None)
        if not (add_image or log_image):
            return
        start, round_num = time.monotonic(), run.state.round_num
        with decoration("figures for the logger"):
            for name, figure in figures(run).items():
                if name in DATA_FIGURES and self._drawn >= 0:
                    continue
                if add_image:
                    add_image(f"figures/{name}", pixels(figure), round_num, dataformats="HWC")
                else:
                    assert log_image is not None
                    log_image(f"figures/{name}", [pixels(figure)], step=round_num)
            self._drawn = round_num
        self.logger.save()
        self._cost = time.monotonic() - start
        self._drawing += self._cost


class FigureFiles(FederationCallback):
    """Writes the figures of a run as vector PDF and as PNG when it ends.

    Args:
        folder: Where to write them; made if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_run_end(self, run: Run) -> None:
        """Write the figures."""
        with decoration(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, figure in figures(run).items():
                write_atomically(self.folder / f"{name}.pdf", rendered(figure, "pdf"))
                Image.fromarray(pixels(figure)).save(png := io.BytesIO(), "png", dpi=(150, 150), compress_level=1)
                write_atomically(self.folder / f"{name}.png", png.getvalue())


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Turn a failure to draw into a warning, so that the run goes on; an error of the disk is raised."""
    try:
        yield
    except Exception as error:
        if of_the_disk(error):
            raise
        log.warning("%s: could not be drawn, the run goes on without (%s: %s)", what, type(error).__name__, error)


_figures: dict[int, tuple[int, dict[str, Figure]]] = {}  # by id of a run; removed together with the run


def figures(run: Run) -> dict[str, Figure]:
    """Return name -> figure of the run so far, laid out; the figures of a round are drawn once and reused."""
    if id(run) not in _figures:
        finalize(run, _figures.pop, id(run), None)
    round_num, drawn = _figures.get(id(run), (-1, {}))
    if round_num != run.state.round_num:
        drawn = run_figures(run.state.history, diagnostics(run))
        for figure in drawn.values():
            if engine := figure.get_layout_engine():  # the expensive part; otherwise each rendering repeats it
                engine.execute(figure)
                figure.set_layout_engine("none")
        _figures[id(run)] = run.state.round_num, drawn
    return drawn


_pixels: WeakKeyDictionary[Figure, NDArray[np.uint8]] = WeakKeyDictionary()


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure to an array of shape (H, W, 4); the result is cached."""
    if figure not in _pixels:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        _pixels[figure] = np.array(canvas.buffer_rgba())
    return _pixels[figure]
