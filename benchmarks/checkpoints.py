"""Benchmark rows on the files of MOON, in which each client keeps a model."""

import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from benchmarks.federations import Noise
from benchmarks.machine import bytes_written
from benchmarks.timing import Row, pairs, timed
from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Moon
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.checkpoint import save_checkpoint
from fedamm_pl.federation.run import Run

SAMPLED, KIB = 10, 2**10


class Written(FederationCallback):
    """Records the number of bytes that the process has written by the end of each round."""

    def __init__(self) -> None:
        self._totals: list[int] = []

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Record the number of bytes."""
        self._totals.append(bytes_written())

    def in_a_round(self) -> float:
        """Return the bytes written in a round, the median over rounds."""
        return statistics.median(after - before for before, after in pairwise(self._totals))


class TwelveRounds:
    """Twelve rounds of a method, each with ten of 40 clients.

    Args:
        method: The method.
        folder: Folder of the run.
    """

    def __init__(self, method: Callable[..., FederatedModule], folder: Path) -> None:
        data = Noise("noise-90-28-1-250", num_clients=40, imbalance_factor=1.0, partition="iid")
        torch.manual_seed(0)
        module, written = method(10, 1, "small_cnn", info=data.info), Written()
        options: dict[str, Any] = {"num_rounds": 12, "client_fraction": SAMPLED / 40, "local_epochs": 1}
        run = Orchestrator(module, data, callbacks=[written], output_dir=folder, **options)
        with run.opened() as self.opened:
            run.run()
        newest = max((folder / "checkpoints").iterdir())
        self.checkpoint = newest.stat().st_size
        self.kept = [path.stat().st_size for path in folder.glob("clients/*")]
        self.written = written.in_a_round()

    def save(self) -> None:
        """Write the last checkpoint again."""
        run = self.opened
        assert run.output_dir is not None
        save_checkpoint(run.output_dir / "checkpoints", run.state, run.fingerprint, run.environment)


def row_checkpoint(repeats: int) -> list[Row]:
    """Compare the checkpoints of MOON and FedAvg, in size and in time to save, and measure what a round writes."""
    with tempfile.TemporaryDirectory() as folder:
        moon = TwelveRounds(partial(Moon, projection=None), Path(folder) / "Moon")  # the same network as FedAvg
        fedavg = TwelveRounds(FedAvg, Path(folder) / "FedAvg")
        note = f"{moon.checkpoint / KIB:.0f} / {fedavg.checkpoint / KIB:.0f} KiB, 40 clients"
        size = Row(
            "newest checkpoint after 12 rounds, MOON / FedAvg", moon.checkpoint / fedavg.checkpoint, 1.1, note=note
        )
        what, names = "time to save it, MOON / FedAvg", ("MOON", "FedAvg")
        save = pairs(what, timed(moon.save), timed(fedavg.save), 4 * repeats, names=names)
        least = moon.checkpoint + SAMPLED * statistics.mean(moon.kept)
        note = f"{moon.written / KIB:.0f} KiB, ten clients; FedAvg {fedavg.written / KIB:.0f} KiB"
        what = "written in a round of MOON / size of the checkpoint and of what the round's clients keep"
        round_row = Row(what, moon.written / least, 1.1, note=note)
    return [size, save, *([round_row] if bytes_written() else [])]
