"""``LogTo``: sends the metrics of a run to a Lightning logger."""

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, TensorBoardLogger

from fedamm_pl.algorithms.fedamm import LOSS_GRID
from fedamm_pl.algorithms.meta.tallies import FAMILY_CURVES
from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.summary import short_names, summarize
from fedamm_pl.files import SUBFOLDERS, of_the_disk
from fedamm_pl.terminal import line

log = logging.getLogger(__name__)
SHOWN_LOSSES = (0.0, 1.0, 5.0, 10.0)
"""Losses at which the weight net is logged as scalars."""
CHARTS = {
    "Accuracy": {"all, many, medium, few": ["Multiline", ["test/acc$", "test/acc_(?!class_).*"]]},
    "Validation": {"test and validation": ["Multiline", ["test/acc$", "val/acc$"]]},
    "Clients": {"mean and worst tenth of the clients": ["Multiline", ["local/acc_mean", "local/acc_worst_tenth"]]},
    "Loss": {"clients and test": ["Multiline", ["client/loss$", "test/loss", "val/loss"]]},
    "Weight net": {
        "V(loss) at fixed losses": ["Multiline", ["weight_net/.*at_loss_.*"]],
        "mean relative weight of many, medium, few": ["Multiline", ["weight_net/relative_weight_.*"]],
    },
    "Time": {"seconds a round": ["Multiline", ["seconds/.*", "client_seconds/.*"]]},
}
"""TensorBoard's custom scalars: tab -> chart -> tags."""


class LogTo(FederationCallback):
    """Sends the metrics of each round to a Lightning logger, with the round as step; at the end the hyperparameters.

    If a logger fails, for example because the network is down, the run continues, and the missing entries are counted
    and reported. A full disk does end the run.

    Args:
        logger: Any Lightning logger.
        options: Options for the hyperparameter table, flat.
        config: The configuration as YAML, logged as text where the logger has texts.
    """

    def __init__(self, logger: Logger, options: Mapping[str, Any] | None = None, config: str = "") -> None:
        self.logger = logger
        self.options = dict(options or {})
        self.config = config
        self._missed = 0

    def on_run_start(self, run: Run) -> None:
        """Log the configuration as text, and which scalars share a chart."""
        self._missed = 0
        with self._harmless("at the start"):
            experiment: Any = getattr(self.logger, "experiment", None)
            if self.config and hasattr(experiment, "add_text"):
                text = "\n".join(f"    {row}" for row in self.config.splitlines())
                experiment.add_text("config", text, 0)
            if hasattr(experiment, "add_custom_scalars"):
                left_out = {"Validation": not run.data.has_validation, "Clients": not run.data.local_test}
                experiment.add_custom_scalars(
                    {tab: charts for tab, charts in CHARTS.items() if not left_out.get(tab, False)}
                )

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Log the round's metrics and accounts."""
        scalars = round_scalars(run, record)
        with self._harmless(f"in round {record.round_num}"):
            self.logger.log_metrics(scalars, step=record.round_num)
            self.logger.save()  # flushed before the round's checkpoint is written, so that a killed run loses nothing

    def on_run_end(self, run: Run) -> None:
        """Log the hyperparameters, together with the results if the logger accepts them, and close the logger."""
        summary = summarize(run.state.history)
        final = {
            f"{kind}/{name}": summary[kind][metric]
            for kind in ("final", "mean_last_10")
            for metric, name in short_names(summary["final"]).items()
        }
        options = self.options or run.options
        with self._harmless("at the end"):
            try:
                self.logger.log_hyperparams(options, final)  # TensorBoardLogger accepts metrics
            except TypeError:
                self.logger.log_hyperparams(options)
            self.logger.save()
        with self._harmless("when it was closed"):
            self.logger.finalize("success")
        if self._missed > 1:
            log.warning("%s failed %d times in this run and lacks these entries", self._name, self._missed)

    @property
    def _name(self) -> str:
        return line(type(self.logger).__name__)

    @contextmanager
    def _harmless(self, when: str) -> Iterator[None]:
        """Return a context in which an error of the logger only loses an entry and does not end the run.

        Raises:
            OSError: If the disk fails, for example because it is full.
        """
        try:
            yield
        except Exception as error:
            # Lightning's TensorBoard logger reports any error as an invalid value, even a full disk
            reason = error.__cause__ if isinstance(error.__cause__, OSError) else error
            if of_the_disk(reason):
                raise reason from None
            self._missed += 1
            if self._missed == 1:
                what = line(f"{type(error).__name__}: {error}")
                log.warning("%s failed %s, the run continues without it (%s)", self._name, when, what)


def check_loggers(loggers: Sequence[Logger], folder: Path | None) -> None:
    """Check that loggers do not write over the files of the run or of each other.

    TensorBoard's loggers may write into the folder of the run, since their files have distinct names.

    Args:
        loggers: The loggers.
        folder: The folder of the run, if it has one.

    Raises:
        ValueError: If a logger writes into the folder of the run or one of the run's subfolders, or two loggers of the
            same kind write into one folder.
    """
    for logger in loggers:
        place = _named(logger, "log_dir") or _named(logger, "save_dir")
        own = () if folder is None else (folder.resolve(), *(folder.resolve() / part for part in SUBFOLDERS))
        if place in own and not isinstance(logger, TensorBoardLogger):
            name = line(type(logger).__name__)
            raise ValueError(
                f"Expected `logger` to write into a folder of its own, got {name} in {place}, where the run writes its files: "
                f"give it another `save_dir`, {own[0] / name} for example."
            )
    for one, other in itertools.combinations(loggers, 2):
        place = _named(one, "log_dir")
        if (
            place
            and place == _named(other, "log_dir")
            and (isinstance(one, type(other)) or isinstance(other, type(one)))
        ):
            raise ValueError(
                f"Expected each `logger` to write into a folder of its own, got two {line(type(one).__name__)} in {place}: give "
                "them different names."
            )


def _named(logger: Logger, attribute: str) -> Path | None:
    """Return the folder that an attribute of a logger names, or None."""
    try:
        place = getattr(logger, attribute)
        return Path(place).resolve() if place else None
    except Exception:  # a user-defined logger, or one that asks its service
        return None


def round_scalars(run: Run, record: RoundRecord) -> dict[str, float]:
    """Return the scalars that a logger receives for a round.

    Returns:
        The metrics, by their names in metrics.csv; ``bytes/total``, tensor bytes up to this round; ``seconds/...``
        (wall time), ``client_seconds/...`` (added up over the clients); ``failures/...``; for a weight net
        ``weight_net/at_loss_<l>`` and the mean relative weight of each group's classes.
    """
    scalars = dict(record.metrics)
    if record.round_num:
        refused = sum(failure.stage == "update" for failure in record.failures)
        scalars["failures/failed_clients"] = len(record.failures) - refused
        scalars["failures/refused_updates"] = refused
        scalars["failures/failed_rounds"] = float(record.failed is not None)
        scalars["bytes/total"] = sum(run.state.bytes_total.values())
    if record.results:
        scalars.update({f"seconds/{name}": value for name, value in record.seconds.items()})
        scalars.update({f"client_seconds/{name}": value for name, value in record.client_seconds.items()})
        scalars["seconds/images_per_second"] = images_per_second(run, record)
    if record.evaluated:
        groups = run.data.info["shot_groups"]
        scalars.update(weight_net_scalars(run.state.diagnostics[-1], groups))
    return scalars


def weight_net_scalars(shown: Mapping[str, Any], groups: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Return a weight net's values at a few losses, and the mean relative weight of each group's classes.

    Args:
        shown: What :meth:`FedAMM.diagnostics` returned; without a weight net the result is empty.
        groups: Group name -> classes.
    """
    scalars: dict[str, float] = {}
    for family, key in enumerate(("weight_curve", *FAMILY_CURVES)):
        if curve := shown.get(key):
            heading = f"weight_net/family_{family}_at_loss" if family else "weight_net/at_loss"
            scalars |= {f"{heading}_{loss:g}": curve[LOSS_GRID.index(loss)] for loss in SHOWN_LOSSES}
    if weights := shown.get("weight_per_class"):
        for name, members in groups.items():
            if seen := [weights[label] for label in members if weights[label] is not None]:
                scalars[f"weight_net/relative_weight_{name}"] = sum(seen) / len(seen)
    return scalars


def images_per_second(run: Run, record: RoundRecord) -> float:
    """Return the training images of a round per second of wall time, whether clients train in parallel or not."""
    images = run.config.local_epochs * sum(result.num_examples for result in record.results)
    return images / max(record.seconds["clients"], 1e-9)
