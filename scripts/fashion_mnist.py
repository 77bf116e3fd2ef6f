"""Repeat the README's result: FedAvg against FedAMM on Fashion-MNIST-LT, imbalance factor 0.01, small CNN, three seeds.

    python scripts/fashion_mnist.py [--root data] [--output runs/fashion_mnist] [--jobs 2]

runs ``orchestrate.py`` six times, each on one thread, and prints the table; runs that are finished are not repeated and
interrupted ones are continued. The figures of each run go to ``<output>/results.json``, the learned weights to
``<output>/weight_curve.png``.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

METHODS = {"fedavg": "FedAvg", "fedamm": "FedAMM"}
SEEDS = (0, 1, 2)
OPTIONS = "--algorithm.model small_cnn --federation.num_rounds 40 --federation.eval_interval 1 --output.progress none"
ROWS = {"final": "final", "best": "best on test", "mean_last_10": "mean of last 10"}
COLUMNS = {"test/acc": "all", "test/acc_many": "many", "test/acc_medium": "medium", "test/acc_few": "few"}
REPOSITORY = Path(__file__).resolve().parent.parent


def run(method: str, seed: int, root: str, folder: Path) -> None:
    """Run one experiment, unless its summary already exists."""
    if (folder / "summary.json").exists():
        return
    command = [sys.executable, str(REPOSITORY / "orchestrate.py")]
    command += ["--data", "fashion_mnist", "--method", method, *OPTIONS.split()]
    command += ["--data.root", root, "--seed", str(seed), "--output.dir", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def collect(output: Path) -> dict[str, dict[str, dict[str, float]]]:
    """Return run -> final, best or mean of the last ten -> metric -> value, in percent."""
    results = {}
    for path in sorted(output.glob("*/summary.json")):
        summary = json.loads(path.read_text())
        results[path.parent.name] = {
            key: {
                metric: 100 * (value["value"] if isinstance(value := summary[key][metric], dict) else value)
                for metric in COLUMNS
            }
            for key in ROWS
        }
    return results


def table(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """Return mean and standard deviation over the seeds as Markdown."""
    lines = [f"| | method | {' | '.join(COLUMNS.values())} |", "|---|---|" + "---|" * len(COLUMNS)]
    for key, title in ROWS.items():
        for method, name in METHODS.items():
            cells = []
            for metric in COLUMNS:
                numbers = [results[f"{method}_{seed}"][key][metric] for seed in SEEDS]
                cells.append(f"{statistics.mean(numbers):.1f} ± {statistics.stdev(numbers):.1f}")
            lines.append(f"| {title} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(output: Path) -> None:
    """Draw the weight nets that FedAMM has learned, and their initial states."""
    import pytorch_lightning as pl

    from fedamm_pl import FedAMM
    from fedamm_pl.results.figures import weight_curves

    initial, learned = [], []
    for seed in SEEDS:
        learned.append(FedAMM.load_from_checkpoint(output / f"fedamm_{seed}/final.ckpt", map_location="cpu").weight_net)
        pl.seed_everything(seed, verbose=False)  # as in a run
        initial.append(FedAMM(num_classes=10, in_channels=1, model="small_cnn").weight_net)
    figure = weight_curves({"initial (random)": initial, "after 40 rounds": learned})
    figure.savefig(output / "weight_curve.png", dpi=150)


def main() -> None:
    """Run the missing experiments, print the table and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data", help="folder of the data")
    parser.add_argument("--output", type=Path, default=Path("runs/fashion_mnist"), help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    args = parser.parse_args()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [
            pool.submit(run, method, seed, args.root, args.output / f"{method}_{seed}")
            for seed in SEEDS
            for method in METHODS
        ]
    for job in jobs:
        job.result()  # raises the error of a failed run
    results = collect(args.output)
    (args.output / "results.json").write_text(json.dumps(results, indent=1))
    print(table(results))
    draw(args.output)


if __name__ == "__main__":
    sys.path.insert(0, str(REPOSITORY))
    main()
