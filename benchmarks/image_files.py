"""Train from image files that are decoded when they are needed, and from the same images in memory.

    python benchmarks/image_files.py FOLDER [--images 200000] [--pixels 64] [--rounds 5]

makes so many small JPEG files in FOLDER (outside of the repository; a few minutes and 4 kB of disk each, kept for the next time),
a quarter of them in a list of their own, and trains rounds of FedAvg by the orchestrator, each way in a process of its own. It
prints peak memory, training images a second and the seconds before the first round. The pictures are noise, smoothed.
"""

import argparse
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)  # instead of the folder of this file

import numpy as np
import torch
from PIL import Image

from benchmarks.machine import peak_memory
from fedamm_pl import FedAvg, FederatedDataModule, Orchestrator
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.trainer import TrainerConfig

CLASSES, CLIENTS, SAMPLED, TEST = 100, 100, 2, 1000
"""Classes and clients of the data set, clients per round, and test images."""


@dataclass(frozen=True)
class Measured:
    """Time and memory of a run.

    Attributes:
        start: Seconds before the first round.
        base: Peak memory of the process before the data were read, in MiB.
        peak: Peak memory at the end, in MiB.
        speed: Training images per second.
    """

    start: float
    base: float
    peak: float
    speed: float


def make_files(folder: Path, number: int, pixels: int) -> None:
    """Make missing files, and write lists of all files and of a quarter of them."""
    for part, count in (("train", number), ("test", TEST)):
        lines = []
        for i in range(count):
            name = f"{part}_{pixels}/{i // 1000}/{i}.jpg"
            lines.append(f"{name} {i % CLASSES}")
            if not (folder / name).exists():
                make_file(folder / name, i, pixels)
        for listed in (number // 4, number):
            (folder / f"{listed}_{pixels}_{part}.txt").write_text("\n".join(lines[:listed]))


def make_file(path: Path, seed: int, pixels: int) -> None:
    """Write one JPEG file of smoothed noise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (pixels // 8, pixels // 8, 3), dtype=np.uint8)
    Image.fromarray(small).resize((pixels, pixels), Image.Resampling.BICUBIC).save(path, quality=90)


def run(folder: str, listed: int, pixels: int, rounds: int, in_memory: bool, model: str) -> Measured:
    """Train, and return time and memory."""
    base, start = peak_memory(), time.perf_counter()
    data = FederatedDataModule(
        f"{listed}_{pixels}_train.txt",
        folder,
        in_memory=in_memory,
        num_clients=CLIENTS,
        partition="iid",
        imbalance_profile="none",
        num_meta_per_class=0,
    )
    torch.manual_seed(0)
    module = FedAvg(data.num_classes, data.in_channels, model, info=data.info)
    found: list[tuple[int, float]] = []

    class Speed(FederationCallback):
        def on_round_end(self, run: Run, record: RoundRecord) -> None:
            found.append((sum(result.num_examples for result in record.results), sum(record.client_seconds.values())))

    options = {"client_fraction": SAMPLED / CLIENTS, "local_epochs": 1, "eval_interval": 10**6}
    trainer = TrainerConfig("cpu", precision="32-true")
    orchestrator = Orchestrator(
        module,
        data,
        num_rounds=rounds,
        callbacks=[Speed()],
        trainer=trainer,
        **options,  # type: ignore[arg-type]
    )
    start = time.perf_counter() - start
    orchestrator.run()
    images, seconds = (sum(column) for column in zip(*found, strict=True))
    return Measured(start, base, peak_memory(), images / seconds)


def table(rows: Iterable[list[str]], head: list[str]) -> str:
    """Format a table as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Make the files, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the files are made")
    parser.add_argument("--images", type=int, default=200_000)
    parser.add_argument("--pixels", type=int, default=64, help="height and width")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="small_cnn")
    args = parser.parse_args()
    if args.folder.resolve().is_relative_to(REPOSITORY) or args.images < 4 * CLIENTS or args.pixels < 8:
        parser.error("the folder must lie outside of the repository, with 400 images of 8 pixels or more")
    start = time.perf_counter()
    make_files(args.folder, args.images, args.pixels)
    print(f"files made in {time.perf_counter() - start:.0f} s; {torch.get_num_threads()} threads", flush=True)
    rows = []
    for listed in (args.images // 4, args.images):
        found = []
        for in_memory in (True, False):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a peak never falls
                options = (str(args.folder), listed, args.pixels, args.rounds, in_memory, args.model)
                found.append(pool.submit(run, *options).result())
            took, way = found[-1], "in memory" if in_memory else "from files"
            figures = [
                f"{took.peak:.0f} MiB",
                f"{took.peak - took.base:.0f} MiB",
                f"{took.speed:.0f}",
                f"{took.start:.0f} s",
            ]
            rows.append([f"{listed:,}", way, *figures])
            print(*rows[-1], sep=", ", flush=True)
        held, files = found
        ratios = [f"{files.peak / held.peak:.2f}x", f"{(files.peak - files.base) / (held.peak - held.base):.2f}x"]
        rows.append(
            [
                f"{listed:,}",
                "files / memory",
                *ratios,
                f"{files.speed / held.speed:.2f}x",
                f"{files.start / held.start:.2f}x",
            ]
        )
    head = ["images", "", "peak", "above the libraries", "training images a second", "before the first round"]
    print(f"\n{table(rows, head)}")


if __name__ == "__main__":
    main()
