"""The files of a small run of 3 rounds, made by hand."""

import json
from pathlib import Path
from typing import Any

ACCURACIES = {"test/loss": 1.0, "test/acc": 0.5, "test/acc_few": 0.25}


def a_summary(**changes: Any) -> dict[str, Any]:
    """Return the content of summary.json."""
    return {
        "final": ACCURACIES,
        "best": {name: {"value": value, "round": 3} for name, value in ACCURACIES.items()},
        "mean_last_10": ACCURACIES,
        "method": "FedAMM",
        "dataset": "tiny",
        "seed": 0,
        "imbalance_factor": 0.1,
        "IF": 10.0,
        "num_rounds": 3,
        "stopped": None,
        "ended": None,
        "uses_meta_set": True,
        "bytes_per_round": {"received": 10.0, "sent": 30.0, "received_per_client": 1.0, "sent_per_client": 3.0},
        "seconds_per_round": {"clients": 1.5, "evaluate": 0.25, "other": 0.25},
        "client_seconds_per_round": {"train": 2.5, "meta": 0.5},
        **dict.fromkeys(("failed_clients", "refused_updates", "failed_rounds", "resumes"), 0),
        **changes,
    }


def a_run(folder: Path, **changes: Any) -> Path:
    """Write a finished run, with some entries of its summary changed."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"{round_num},1.0,0.5,0.25\n" for round_num in range(4)]
    (folder / "metrics.csv").write_text("".join(["round,test/loss,test/acc,test/acc_few\n", *rows]))
    (folder / "summary.json").write_text(json.dumps(a_summary(**changes)))
    seconds = {"clients": 4.5, "evaluate": 0.75, "other": 0.75}
    last = {"round": 3, "bytes": 120, "seconds": seconds, "client_seconds": {"train": 7.5, "meta": 1.5}}
    content = {"class_names": ["a", "b"], "class_counts": [8, 2], "shot_groups": {"few": [1]}, "rounds": [last]}
    (folder / "diagnostics.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text("seed: 0\n")
    return folder


def a_rich_run(folder: Path, names: list[str] | None = None, **changes: Any) -> Path:
    """Write a finished run whose files hold all that a run may write: also weights, a confusion matrix, and the clients."""
    classes, groups = names or ["a", "b", "c"], {"many": [0], "few": [1, 2]}
    counts = [2 ** (len(classes) - label) for label in range(len(classes))]
    a_run(folder, class_counts=counts, shot_groups=groups, shot_rule="share", **changes)
    summary = json.loads((folder / "summary.json").read_text())
    more = {"num_averaged": 3, "diverged": {"round": 3, "reason": "the test loss is nan"}, "model": "small_cnn"}
    more |= {
        "num_parameters": 100,
        "unused_images": 1,
        "versions": {"torch": "2"},
        "hardware": {"threads": 2},
        "command": "python x",
    }
    (folder / "summary.json").write_text(json.dumps(summary | more))
    seen = {"weight_curve": [0.1, 0.2, 0.3], "loss_histogram": [0.5, 0.3, 0.2]}
    rounds: list[dict[str, Any]] = [
        {"round": n, "bytes": n * 40, "seconds": {"clients": 1.5 * n}, "client_seconds": {"train": 2.5 * n}, **seen}
        | {"weight_per_class": [None, *(1.0 + label for label in range(1, len(classes)))]}
        for n in range(4)
    ]
    content = {"class_names": classes, "class_counts": counts, "shot_groups": groups, "rounds": rounds}
    content |= {
        "client_class_counts": [counts, counts],
        "client_names": ["north", "south"],
        "losses": [0.0, 0.25, 0.5],
        "confusion": [counts for _ in counts],
    }
    (folder / "diagnostics.json").write_text(json.dumps(content))
    columns = ["round", "test/loss", "test/acc", "test/acc_many", "test/acc_few"]
    columns += [f"test/acc_class_{label}" for label in range(len(classes))]
    rows = [",".join([str(n), "1.0", *["0.5"] * (len(columns) - 2)]) for n in range(4)]
    (folder / "metrics.csv").write_text("\n".join([",".join(columns), *rows, ""]))
    (folder / "config.yaml").write_text(
        "seed: 0\nalgorithm:\n  class_path: FedAMM\nfederation:\n  client_fraction: 0.5\n"
    )
    return folder
