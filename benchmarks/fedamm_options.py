"""FedAMM's options side by side on a small long-tailed Fashion-MNIST; docs/results.md has the table.

python benchmarks/fedamm_options.py --root data --seeds 0 1 2
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

from fedamm_pl import FederatedDataModule, Orchestrator, algorithms
from fedamm_pl.data import ImageData
from fedamm_pl.data.sources.source import Source
from fedamm_pl.federation.executors import Vectorized
from fedamm_pl.federation.trainer import TrainerConfig

FLAT = {"differentiation": "forward", "weight_net_init": "flat"}
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "FedAvg": ("FedAvg", {}),
    "LogitAdjusted, local prior": ("LogitAdjusted", {"counts": "local"}),
    "FedAMM, meta_lr 0.01": ("FedAMM", {"differentiation": "forward", "meta_lr": 0.01}),
    **{f"FedAMM, meta_lr {lr}, flat": ("FedAMM", {**FLAT, "meta_lr": lr}) for lr in (0.01, 0.1, 1.0)},
    **{
        f"FedAMM, meta_lr {lr}, flat, families global": ("FedAMM", {**FLAT, "meta_lr": lr, "families": "global"})
        for lr in (0.01, 0.1)
    },
    "FedAMM, meta_lr 0.01, flat, logit_adjusted": (
        "FedAMM",
        {**FLAT, "meta_lr": 0.01, "objective": "logit_adjusted"},
    ),
    **{
        f"FedAMM, meta_lr 0.1, flat, exchange {exchange}": ("FedAMM", {**FLAT, "meta_lr": 0.1, "exchange": exchange})
        for exchange in ("bfloat16", "head")
    },
}


class Part(FederatedDataModule):
    """The first 1,210 training and 300 test images of each class of Fashion-MNIST."""

    def load_images(self) -> ImageData:
        """Return the images class by class."""
        whole = super().load_images()

        def first(images: Source, labels: Tensor, count: int) -> tuple[Tensor, Tensor]:
            places = torch.cat([(labels == label).nonzero()[:count, 0] for label in range(len(whole.class_names))])
            return images[places], labels[places]

        train = first(whole.train_images, whole.train_labels, 1210)
        return ImageData(*train, *first(whole.test_images, whole.test_labels, 300), whole.class_names)


def mlp() -> nn.Module:
    """Return a multilayer perceptron with 64 hidden units."""
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(64), nn.ReLU(), nn.Linear(64, 10))


def measure(name: str, seed: int, root: str, num_rounds: int) -> dict[str, float]:
    """Run a method, and return means over the last ten evaluated rounds; accuracies are in percent."""
    method, options = METHODS[name]
    data = Part(
        "fashion_mnist",
        root,
        num_clients=20,
        batch_size=32,
        partition="by_dirichlet",
        dirichlet_alpha=0.3,
        seed=seed,
    )
    torch.manual_seed(seed)
    module = getattr(algorithms, method)(10, 1, mlp(), lr=0.03, info=data.info, **options)
    run = Orchestrator(
        module,
        data,
        num_rounds=num_rounds,
        client_fraction=0.4,
        local_epochs=2,
        eval_interval=2,
        seed=seed,
        trainer=TrainerConfig("cpu", precision="32-true"),
        executor=Vectorized(),
    )
    last = run.run()[-10:]
    accuracies = {key: 100 * sum(row[key] for row in last) / len(last) for key in ("test/acc", "test/acc_few")}
    return {**accuracies, "MB": (last[-1]["client/bytes_sent"] + last[-1]["client/bytes_received"]) / 1e6}


def main() -> None:
    """Print a row for each method, with its difference from FedAvg for each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--root", default="data", help="folder of Fashion-MNIST")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS), metavar="METHOD")
    parsed = parser.parse_args()
    base = {seed: measure("FedAvg", seed, parsed.root, parsed.rounds) for seed in parsed.seeds}
    for name in parsed.methods:
        rows = {
            seed: base[seed] if name == "FedAvg" else measure(name, seed, parsed.root, parsed.rounds)
            for seed in parsed.seeds
        }
        means = [sum(row[key] for row in rows.values()) / len(rows) for key in ("test/acc", "test/acc_few", "MB")]
        apart = [rows[seed]["test/acc"] - base[seed]["test/acc"] for seed in parsed.seeds]
        print(
            f"{name:50} all {means[0]:.1f} few {means[1]:.1f} ({' '.join(f'{gap:+.1f}' for gap in apart)}) {means[2]:.2f} MB"
        )


if __name__ == "__main__":
    main()
