"""Observers of a run: the base class, Lightning loggers, figures, and progress on the terminal. They add, they never alter."""

import logging
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pytorch_lightning.loggers import Logger
from tqdm import tqdm

from fedamm_pl.federation.fingerprint import options as run_options
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.summary import short_names, summarize
from fedamm_pl.protocol.messages import ClientFailure, ClientResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from fedamm_pl.federation.orchestrator import Orchestrator

log = logging.getLogger(__name__)

DRAWING_SHARE = 0.01
"""Share of a run's time that figures for a logger may take before the last round."""
FIRST_DRAWING = 2.0
"""Seconds that they are expected to take before it is known."""
DATA_FIGURES = ("class_counts", "partition")
SHOWN_LOSSES = (0.0, 1.0, 5.0, 10.0)
"""Losses at which the weight net is logged as scalars."""
CHARTS = {
    "Accuracy": {"all, many, medium, few": ["Multiline", ["test/acc$", "test_shots/.*"]]},
    "Loss": {"clients and test": ["Multiline", ["client/loss$", "test/loss"]]},
    "Weight net": {
        "V(loss) at fixed losses": ["Multiline", ["weight_net/at_loss_.*"]],
        "mean relative weight of many, medium, few": ["Multiline", ["weight_net/relative_weight_.*"]],
    },
    "Time": {"seconds a round": ["Multiline", ["seconds/.*"]]},
}
"""TensorBoard's custom scalars: tab -> chart -> tags."""


@dataclass(frozen=True)
class RoundRecord:
    """What happened in a round.

    Attributes:
        round_num: The round; 0 for the evaluation of the initial model.
        metrics: ``client/...`` means over the clients, and ``test/...`` if the round was evaluated.
        evaluated: Whether it was.
        results: The clients' results, without payloads.
        seconds: Wall time by kind: train, meta, evaluate, other.
        failures: The clients that failed and those whose update was refused.
        failed: Why the round failed and the server kept its state; None if it did not.
    """

    round_num: int
    metrics: Mapping[str, float]
    evaluated: bool
    results: Sequence[ClientResult]
    seconds: Mapping[str, float]
    failures: Sequence[ClientFailure] = ()
    failed: str | None = None


class FederationCallback:
    """Base class of the observers; override what you need."""

    def on_run_start(self, orchestrator: "Orchestrator") -> None:
        """Called once, after a resume was read; ``orchestrator.state.round_num`` is the last completed round."""

    def on_client_end(self, orchestrator: "Orchestrator", result: ClientResult) -> None:
        """Called after each client of a round; the result is without its payload."""

    def on_round_end(self, orchestrator: "Orchestrator", record: RoundRecord) -> None:
        """Called after each round, and once for round 0; ``orchestrator.state`` is the state after it."""

    def on_run_end(self, orchestrator: "Orchestrator") -> None:
        """Called after the last round, with the final weights in ``orchestrator.module``."""


class LogTo(FederationCallback):
    """Sends the metrics of each round to a Lightning logger, with the round as step; at the end the hyperparameters.

    Figures go to loggers that take them (TensorBoard's, and those with ``log_image``): as often as a hundredth of the run's
    time allows, and at the end.

    Args:
        logger: Any Lightning logger.
        options: Options for the hyperparameter table, flat.
        config: The configuration as YAML, logged as text where the logger has texts.
        figures: Whether to log figures.
    """

    def __init__(
        self, logger: Logger, options: Mapping[str, Any] | None = None, config: str = "", figures: bool = True
    ) -> None:
        self.logger = logger
        self.options = dict(options or {})
        self.config = config
        self.figures = figures

    def on_run_start(self, orchestrator: "Orchestrator") -> None:
        """Log the configuration as text, and which scalars share a chart."""
        self._start, self._drawing, self._cost, self._drawn = time.monotonic(), 0.0, FIRST_DRAWING, -1
        experiment: Any = getattr(self.logger, "experiment", None)
        if self.config and hasattr(experiment, "add_text"):
            text = "\n".join(f"    {line}" for line in self.config.splitlines())
            experiment.add_text("config", text, 0)
        if hasattr(experiment, "add_custom_scalars"):
            experiment.add_custom_scalars(CHARTS)

    def on_round_end(self, orchestrator: "Orchestrator", record: RoundRecord) -> None:
        """Log the round's metrics, accounts and, where there is time, figures."""
        try:
            self.logger.log_metrics(round_scalars(orchestrator, record), step=record.round_num)
        except ValueError as error:
            # Lightning's TensorBoard logger takes any error for a wrong value, also that the disk is full
            raise (error.__cause__ if isinstance(error.__cause__, OSError) else error) from None
        due = self._drawing + self._cost <= DRAWING_SHARE * (time.monotonic() - self._start)
        if record.evaluated and due:
            self._draw(orchestrator, record.round_num)
        self.logger.save()  # flushed before the round's checkpoint is written: a run that is killed loses none of it

    def on_run_end(self, orchestrator: "Orchestrator") -> None:
        """Log the last figures and the hyperparameters, with the result where the logger takes them, and close the log."""
        if self._drawn != orchestrator.state.round_num:
            self._draw(orchestrator, orchestrator.state.round_num)
        summary = summarize(orchestrator.state.history)
        final = {
            f"{kind}/{name}": summary[kind][metric]
            for kind in ("final", "mean_last_10")
            for metric, name in short_names(summary["final"]).items()
        }
        options = self.options or run_options(orchestrator)
        try:
            self.logger.log_hyperparams(options, final)  # TensorBoard's takes metrics
        except TypeError:
            self.logger.log_hyperparams(options)
        self.logger.save()
        self.logger.finalize("success")

    def _draw(self, orchestrator: "Orchestrator", round_num: int) -> None:
        add_image = getattr(getattr(self.logger, "experiment", None), "add_image", None)
        log_image = getattr(self.logger, "log_image", None)
        if not self.figures or not (add_image or log_image):
            return
        start = time.monotonic()
        with decoration("figures for the logger"):
            for name, figure in figures(orchestrator).items():
                if name in DATA_FIGURES and self._drawn >= 0:  # the data do not change
                    continue
                if add_image:
                    add_image(f"figures/{name}", pixels(figure), round_num, dataformats="HWC")
                else:
                    assert log_image is not None
                    log_image(f"figures/{name}", [pixels(figure)], step=round_num)
            self._drawn = round_num
        self._cost = time.monotonic() - start
        self._drawing += self._cost


def round_scalars(orchestrator: "Orchestrator", record: RoundRecord) -> dict[str, float]:
    """Return what a logger gets of a round. A heading before each slash: TensorBoard folds by it.

    Returns:
        The metrics, those of groups and classes under ``test_shots`` and ``test_per_class``; ``bytes/total``, tensor bytes
        up to this round; ``seconds/...``; ``failures/...``; for a weight net ``weight_net/at_loss_<l>`` and the mean
        relative weight of each group's classes.
    """
    headings = {"test/acc_class_": "test_per_class/acc_", "test/acc_": "test_shots/"}
    scalars = {}
    for name, value in record.metrics.items():
        prefix = next((prefix for prefix in headings if name.startswith(prefix)), "")
        scalars[headings.get(prefix, "") + name.removeprefix(prefix)] = value
    if record.round_num:
        refused = sum(failure.stage == "update" for failure in record.failures)
        scalars["failures/failed_clients"] = len(record.failures) - refused
        scalars["failures/refused_updates"] = refused
        scalars["failures/failed_rounds"] = float(record.failed is not None)
        scalars["bytes/total"] = sum(orchestrator.state.bytes_total.values())
    if record.results:
        scalars.update({f"seconds/{name}": value for name, value in record.seconds.items()})
        scalars["seconds/images_per_second"] = images_per_second(orchestrator, record.results)
    if record.evaluated:
        groups = orchestrator.data.info["shot_groups"]
        scalars.update(weight_net_scalars(orchestrator.state.diagnostics[-1], groups))
    return scalars


def weight_net_scalars(shown: Mapping[str, Any], groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return a weight net's values at a few losses, and the mean relative weight of each group's classes.

    Args:
        shown: What :meth:`FedAMM.diagnostics` returned; without a weight net the result is empty.
        groups: Group name -> classes.
    """
    from fedamm_pl.algorithms.fedamm import LOSS_GRID

    scalars = {}
    if curve := shown.get("weight_curve"):
        scalars = {f"weight_net/at_loss_{loss:g}": curve[LOSS_GRID.index(loss)] for loss in SHOWN_LOSSES}
    if weights := shown.get("weight_per_class"):
        for name, members in groups.items():
            if seen := [weights[label] for label in members if weights[label] is not None]:
                scalars[f"weight_net/relative_weight_{name}"] = sum(seen) / len(seen)
    return scalars


def images_per_second(orchestrator: "Orchestrator", results: Sequence[ClientResult]) -> float:
    """Return the training images of a round's clients by the time of their fits without the meta steps."""
    images = orchestrator.local_epochs * sum(result.num_examples for result in results)
    return images / max(sum(result.train_seconds for result in results), 1e-9)


_drawn: "WeakKeyDictionary[Orchestrator, tuple[int, dict[str, Figure]]]" = WeakKeyDictionary()


def figures(orchestrator: "Orchestrator") -> dict[str, "Figure"]:
    """Draw the figures of a run so far, by name, laid out; once for all who ask after the same round."""
    from fedamm_pl.federation.callbacks.files import diagnostics
    from fedamm_pl.results.figures import run_figures  # matplotlib, where it is needed

    round_num, drawn = _drawn.get(orchestrator, (-1, {}))
    if round_num != orchestrator.state.round_num:
        drawn = run_figures(orchestrator.state.history, diagnostics(orchestrator))
        for figure in drawn.values():
            if engine := figure.get_layout_engine():  # the dear part, which each rendering would do anew
                engine.execute(figure)
                figure.set_layout_engine("none")
        _drawn[orchestrator] = orchestrator.state.round_num, drawn
    return drawn


@contextmanager
def decoration(what: str) -> Iterator[None]:
    """Let a failure to draw cost the figures, not the run; a disk that fails is another matter."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        log.warning("%s: could not be drawn, the run goes on without (%s: %s)", what, type(error).__name__, error)


_pixels: "WeakKeyDictionary[Figure, Any]" = WeakKeyDictionary()


def pixels(figure: "Figure") -> Any:
    """Render a figure to an array (H, W, 4) of uint8; once for all who ask."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if figure not in _pixels:
        canvas: Any = FigureCanvasAgg(figure)
        canvas.draw()
        _pixels[figure] = np.array(canvas.buffer_rgba())
    return _pixels[figure]


class FigureFiles(FederationCallback):
    """Writes the figures of a run as vector PDF and as PNG when it ends.

    Args:
        folder: Where to write them; made if missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)

    def on_run_end(self, orchestrator: "Orchestrator") -> None:
        """Write them."""
        from PIL import Image

        with decoration(str(self.folder)):
            self.folder.mkdir(parents=True, exist_ok=True)
            for name, figure in figures(orchestrator).items():
                figure.savefig(self.folder / f"{name}.pdf")
                Image.fromarray(pixels(figure)).save(self.folder / f"{name}.png", dpi=(150, 150), compress_level=1)


class Progress(FederationCallback):
    """A bar over rounds: clients done, loss, accuracies, images/s, time left, failures.

    Where the output is no terminal, one plain line per evaluation.
    """

    def on_run_start(self, orchestrator: "Orchestrator") -> None:
        """Open the bar."""
        self._latest = dict(orchestrator.state.history[-1]) if orchestrator.state.history else {}
        self._clients, self._speed = 0, 0.0
        self._first, self._start = orchestrator.state.round_num, time.monotonic()
        self._bar = tqdm(
            total=orchestrator.num_rounds,
            initial=self._first,
            bar_format="round {n_fmt}/{total_fmt} |{bar:6}| {elapsed}<{remaining}{postfix}",
            ncols=shutil.get_terminal_size().columns,
            disable=not sys.stderr.isatty(),
        )

    def on_client_end(self, orchestrator: "Orchestrator", result: ClientResult) -> None:
        """Show how many clients of the round are done."""
        self._clients += 1
        self._show(orchestrator)

    def on_round_end(self, orchestrator: "Orchestrator", record: RoundRecord) -> None:
        """Move the bar, or print a line if the round was evaluated."""
        self._latest.update(record.metrics)
        self._clients = 0
        if record.results:
            self._speed = images_per_second(orchestrator, record.results)
        self._bar.update(record.round_num - self._bar.n)
        self._show(orchestrator)
        if self._bar.disable and record.evaluated:
            done, left = record.round_num - self._first, orchestrator.num_rounds - record.round_num
            parts = [f"round {record.round_num}/{orchestrator.num_rounds}"]
            parts += [f"{name} {self._latest[metric]:.3f}" for metric, name in short_names(self._latest).items()]
            if "client/loss" in self._latest:
                parts.append(f"client_loss {self._latest['client/loss']:.3f}")
            parts += self._throughput() + self._failures(orchestrator)
            if done and left:
                parts.append(f"{(time.monotonic() - self._start) / done * left:.0f} s left")
            print("  ".join(parts), flush=True)

    def _show(self, orchestrator: "Orchestrator") -> None:
        if self._bar.disable:
            return
        sampled = num_sampled(orchestrator.data.num_clients, orchestrator.client_fraction)
        parts = [f"client {self._clients}/{sampled}"] if self._clients else []
        parts += [f"{name} {100 * self._latest[metric]:.0f}%" for metric, name in short_names(self._latest).items()]
        parts += self._failures(orchestrator)
        if "client/loss" in self._latest:
            parts.append(f"loss {self._latest['client/loss']:.2f}")
        self._bar.set_postfix_str(" ".join(parts + self._throughput()))  # a narrow terminal cuts off its end

    def _throughput(self) -> list[str]:
        return [f"{self._speed:,.0f} images/s"] if self._speed else []

    def _failures(self, orchestrator: "Orchestrator") -> list[str]:
        failures = sum(orchestrator.state.counts[name] for name in ("failed_clients", "refused_updates"))
        return [f"{failures} failures"] if failures else []

    def on_run_end(self, orchestrator: "Orchestrator") -> None:
        """Close the bar."""
        self._bar.close()
