"""Train on your own table: a CSV file with the rows of three hospitals, which are the clients.

    python examples/own_table.py

Features may be in any unit. The column ``hospital`` names the owner of each row, and ``split`` marks the rows for
testing.
"""

import csv
import tempfile
from pathlib import Path

import numpy as np

from fedamm_pl import FederatedDataModule, Orchestrator
from fedamm_pl.algorithms import LogitAdjusted

DIAGNOSES = ["healthy", "common", "rare"]


def write_table(path: Path) -> None:
    """Write 400 rows: two measurements, a diagnosis and the hospital. Diagnoses are distributed differently in each."""
    rng = np.random.default_rng(0)
    shares = {"north": [0.8, 0.18, 0.02], "south": [0.5, 0.4, 0.1], "west": [0.9, 0.05, 0.05]}
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["age", "marker", "diagnosis", "hospital", "split"])
        for row in range(400):
            hospital = list(shares)[row % 3]
            diagnosis = int(rng.choice(3, p=shares[hospital]))
            age, marker = rng.normal(50 + 10 * diagnosis, 8), rng.normal(1e-3 * (1 + 2 * diagnosis), 5e-4)
            writer.writerow(
                [f"{age:.1f}", f"{marker:.6f}", DIAGNOSES[diagnosis], hospital, "test" if row % 4 == 3 else "train"]
            )


def main() -> dict[str, float]:
    """Train on the rows of the hospitals, and return the metrics of the last evaluation."""
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder) / "patients.csv")
        data = FederatedDataModule(
            "patients.csv",
            folder,
            label_column="diagnosis",
            client_column="hospital",
            split_column="split",
            partition="by_client",
            imbalance_profile="none",  # the data are already long-tailed
            num_meta_per_class=0,
            batch_size=16,
        )
        module = LogitAdjusted(data.num_classes, data.in_channels, "mlp-32", lr=0.05, info=data.info, counts="local")
        run = Orchestrator(module, data, num_rounds=15, client_fraction=1.0, local_epochs=2, eval_interval=5)
        metrics = run.run()[-1]
    print(f"{', '.join(data.client_names)}: {data.info['class_counts']} rows of {data.info['class_names']}")
    print(f"test accuracy {metrics['test/acc']:.1%}, of the rarest diagnosis {metrics['test/acc_class_2']:.1%}")
    return metrics


if __name__ == "__main__":
    main()
