"""The files of a run directory: tables, the partition, checkpoints, a summary, and the trained module."""

import csv
import io
import json
import logging
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from fedamm_pl.algorithms.fedamm import LOSS_GRID
from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.clients_file import ClientsCSV
from fedamm_pl.federation.checkpoint import load_checkpoint, save_checkpoint, saved_rounds
from fedamm_pl.federation.contents import Diagnostics, Summary
from fedamm_pl.federation.fingerprint import versions
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.summary import best_is, curve, num_averaged, summarize, validated
from fedamm_pl.files import append_whole, write_atomically
from fedamm_pl.version import __version__

log = logging.getLogger(__name__)


def run_files(folder: Path, keep_checkpoints: int) -> list[FederationCallback]:
    """Return the callbacks that write a run directory."""
    return [
        PartitionFile(folder),
        MetricsCSV(folder),
        DiagnosticsFile(folder),
        ClientsCSV(folder),
        RoundCheckpoint(folder / "checkpoints", keep_checkpoints),
        FinalFiles(folder),
    ]


class PartitionFile(FederationCallback):
    """Writes partition.json, the training examples of each client; other runs can use it with the partition from_file.

    Args:
        folder: Where to write it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "partition.json"

    def on_run_start(self, run: Run) -> None:
        """Write the file; after a resume it is the same."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, run.data.partition_json)


class MetricsCSV(FederationCallback):
    """Writes metrics.csv, a row for each evaluated round. After a resume it starts from the checkpoint's rows.

    Args:
        folder: Where to write it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "metrics.csv"
        self._columns: list[str] = []
        self._last: dict[str, float] | None = None

    def on_run_start(self, run: Run) -> None:
        """Rewrite the file with the rounds up to the one from which the run starts."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._write(run.state.history)

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Append a row, or rewrite all rows if a metric appears for the first time."""
        if not record.evaluated:
            return
        row = self._last = run.state.history[-1]
        if set(row) <= set(self._columns):
            text = io.StringIO()
            csv.DictWriter(text, self._columns, lineterminator="\n").writerow(row)
            append_whole(self.path, text.getvalue().encode())
        else:
            self._write(run.state.history)

    def on_run_end(self, run: Run) -> None:
        """Rewrite the file if an evaluation at the end of the run has added or replaced a row."""
        if run.state.history[-1] is not self._last:
            self._write(run.state.history)

    def _write(self, history: list[dict[str, float]]) -> None:
        self._last = history[-1] if history else None
        names = dict.fromkeys(name for row in history for name in row)
        # test metrics first: the first row has no client metrics, later ones may add classes
        order = ("round", "test/", "val/")
        self._columns = sorted(names, key=lambda name: [not name.startswith(start) for start in order])
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.path, text.getvalue().encode())


class DiagnosticsFile(FederationCallback):
    """Rewrites diagnostics.json, the data that figures need besides the metrics, at each evaluation.

    Args:
        folder: Where to write it.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "diagnostics.json"

    def on_run_start(self, run: Run) -> None:
        """Rewrite the file with the rounds up to the one from which the run starts."""
        if run.state.history:
            self._write(run)

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Write the file if the round was evaluated."""
        if record.evaluated:
            self._write(run)

    def _write(self, run: Run) -> None:
        write_atomically(self.path, _json(diagnostics(run), indent=None).encode())


class RoundCheckpoint(FederationCallback):
    """Writes a checkpoint after every round and keeps the newest few and the best, by validation or else by test accuracy.

    Args:
        folder: Where to write them.
        keep: How many of the newest to keep.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder = folder
        self.keep = keep

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Write the round's checkpoint, then remove those that are no longer kept."""
        save_checkpoint(self.folder, run.state, run.fingerprint, run.environment)
        best = summarize(run.state.history)["best"]["test/acc"]["round"]
        for round_num in saved_rounds(self.folder)[self.keep :]:
            if round_num != best:
                (self.folder / f"round_{round_num:06d}.ckpt").unlink()


class WholeFiles(TorchCheckpointIO):
    """Writes a Lightning checkpoint whole or not at all.

    Lightning's own implementation uses the system's folder for temporary files and does not report a read-only folder.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint."""
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        write_atomically(Path(path), buffer.getvalue())


class FinalFiles(FederationCallback):
    """Writes final.ckpt, a Lightning checkpoint of the trained module, and summary.json at the end of the run.

    If there is a validation set, it also writes best.ckpt, the module of the round with the best validation accuracy.

    Args:
        folder: Where to write them.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_run_end(self, run: Run) -> None:
        """Write the files."""
        self._save(run, "final.ckpt")
        if (best := validated(run.state.history)) is not None:
            self._save_best(run, int(best["round"]))
        write_atomically(self.folder / "summary.json", _json(summary(run)).encode())

    def _save(self, run: Run, name: str) -> None:
        trainer = run.trainer.build()
        trainer.strategy.connect(run.module)
        trainer.strategy.checkpoint_io = WholeFiles()
        trainer.save_checkpoint(self.folder / name, weights_only=True)

    def _save_best(self, run: Run, round_num: int) -> None:
        module, final = run.module, run.state.shared
        try:
            path = self.folder / "checkpoints" / f"round_{round_num:06d}.ckpt"
            best = final if round_num == run.state.round_num else load_checkpoint(path).state.shared
        except ValueError as error:
            log.warning("best.ckpt is left out: %s", error)
            (self.folder / "best.ckpt").unlink(missing_ok=True)  # from a run with fewer rounds
            return
        module.load_shared_state(module.deployed(best))
        self._save(run, "best.ckpt")
        module.load_shared_state(module.deployed(final))


def summary(run: Run) -> Summary:
    """Return the content of summary.json."""
    state, data, info = run.state, run.data, run.data.info
    rounds, fits = max(state.round_num, 1), max(state.clients_total, 1)
    results = summarize(state.history)
    content: Summary = {
        "final": results["final"],
        "best": results["best"],
        "mean_last_10": results["mean_last_10"],
        "num_averaged": num_averaged(state.history),
        "best_is": best_is(state.history[-1]),
        "method": type(run.module).__name__,
        "uses_meta_set": run.module.uses_meta_set,
        "model": run.options["algorithm.model"],
        "num_parameters": sum(parameter.numel() for parameter in run.module.model.parameters()),
        "num_rounds": state.round_num,
        "failed_clients": state.counts["failed_clients"],
        "refused_updates": state.counts["refused_updates"],
        "failed_rounds": state.counts["failed_rounds"],
        "resumes": state.counts["resumes"],
        "diverged": state.diverged,
        "stopped": state.stopped,
        "ended": state.ended,
        "seed": run.seed,
        "dataset": data.dataset_name,
        "class_counts": info["class_counts"],
        "unused_images": data.unused_images,
        "shot_rule": info["shot_rule"],
        "shot_groups": info["shot_groups"],
        "imbalance_factor": data.imbalance_factor,
        "IF": 1 / data.imbalance_factor if data.imbalance_factor else None,
        "normalization": {"mean": info["mean"], "std": info["std"]},
        "bytes_per_round": {
            **{name: value / rounds for name, value in state.bytes_total.items()},
            **{f"{name}_per_client": value / fits for name, value in state.bytes_total.items()},
        },
        "seconds_per_round": {name: value / rounds for name, value in state.seconds.items()},
        "client_seconds_per_round": {name: value / rounds for name, value in state.client_seconds.items()},
        "hardware": {
            "accelerator": run.trainer.kind,
            "processor": platform.processor() or platform.machine(),
            "threads": run.environment["threads"],
            "precision": run.trainer.resolved_precision,
        },
        "versions": {"fedamm_pl": __version__, **versions()},
        "command": shlex.join(["python", *sys.argv]),
        "curve": curve(state.history, state.diagnostics),
    }
    if data.has_validation:
        content["validation_examples"] = len(data.validation[2])
    if held := [len(mine) for mine in data.local_test]:
        content["local_test_examples"], content["clients_without_local_test"] = sum(held), held.count(0)
    return content


def diagnostics(run: Run) -> Diagnostics:
    """Return the content of diagnostics.json."""
    state, info, held = run.state, run.data.info, run.data.client_class_counts.tolist()
    content: Diagnostics = {
        "class_names": info["class_names"],
        "class_counts": info["class_counts"],
        "shot_groups": info["shot_groups"],
        "client_class_counts": held,
        "client_names": run.data.client_names if held else [],
        "losses": list(LOSS_GRID),
        "confusion": state.confusion,
        "rounds": state.diagnostics,
    }
    if state.client_accuracies:
        content["client_accuracies"] = [*state.client_accuracies["latest"]]
    return content


def _json(content: Any, indent: int | None = 2) -> str:
    """Format as JSON; NaN and infinity, which JSON lacks, become null."""
    plain = json.loads(json.dumps(content), parse_constant=lambda constant: None)
    return json.dumps(plain, indent=indent, allow_nan=False)
