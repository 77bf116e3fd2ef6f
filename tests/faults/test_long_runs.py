"""Many rounds cost no more memory, open files and threads than a few."""

import gc
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from pytorch_lightning.loggers import TensorBoardLogger

from fedamm_pl import FedAMM, Orchestrator
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, RoundRecord
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig
from tests.faults.test_kills import FORKS, ended
from tests.tiny import NUM_CLASSES, tiny_data, tiny_resnet

MEGABYTE = 2**20


class Usage(FederationCallback):
    """Records resident memory, open files and threads of the process at every so many rounds.

    Args:
        interval: How many.
    """

    def __init__(self, interval: int) -> None:
        self.interval = interval
        self.series: list[dict[str, float]] = []

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Take a sample, after a collection: what is garbage by then is no leak."""
        if record.round_num and record.round_num % self.interval == 0:
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.series.append(
                {
                    "round": record.round_num,
                    "megabytes": pages * resource.getpagesize() / MEGABYTE,
                    "files": len(os.listdir("/proc/self/fd")),
                    "threads": len(os.listdir("/proc/self/task")),
                    "objects": len(gc.get_objects()),
                }
            )


def run_and_measure(folder: Path, num_rounds: int, interval: int) -> None:
    """Run FedAMM with all that the program attaches to it; write the samples to ``usage.json``."""
    usage, data = Usage(interval), tiny_data()
    torch.manual_seed(0)
    Orchestrator(
        FedAMM(NUM_CLASSES, 1, tiny_resnet(NUM_CLASSES, 1), differentiation="higher", info=data.info),
        data,
        num_rounds=num_rounds,
        client_fraction=0.25,
        local_epochs=1,
        trainer=TrainerConfig(accelerator="cpu"),
        callbacks=[usage, LogTo(TensorBoardLogger(folder, "", ""))],
        output_dir=folder,
    ).run()
    (folder / "usage.json").write_text(json.dumps(usage.series))


def measured(folder: Path, num_rounds: int, interval: int) -> list[dict[str, float]]:
    """Do that in a process of its own: the memory of this one is that of other tests."""
    process = FORKS.Process(target=run_and_measure, args=(folder, num_rounds, interval), daemon=True)
    process.start()
    assert ended(process, deadline=20 * num_rounds) == 0
    return list(json.loads((folder / "usage.json").read_text()))


def test_open_files_and_threads_do_not_grow(tmp_path: Path) -> None:
    series = measured(tmp_path, 40, 10)
    for name in ("files", "threads"):
        assert len({sample[name] for sample in series}) == 1, series


@pytest.mark.slow
def test_memory_does_not_grow(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """From round 100 on: before, libraries fill their caches and the allocator its pools."""
    series = measured(tmp_path, 500, 50)
    with capsys.disabled():
        print("", "  ".join(f"{name:>9}" for name in series[0]), sep="\n")
        for sample in series:
            print("  ".join(f"{value:9.1f}" if name == "megabytes" else f"{value:9}" for name, value in sample.items()))
    settled = [sample for sample in series if sample["round"] >= 100]
    for name in ("files", "threads"):
        assert len({sample[name] for sample in settled}) == 1
    # pages that the allocator gives back or not move it by 3 MB; 10 kB kept of each round would add 4
    assert settled[-1]["megabytes"] - settled[0]["megabytes"] < 4
    # a row of metrics every fifth round; a network that is kept is hundreds of objects
    assert settled[-1]["objects"] - settled[0]["objects"] < 400
