"""Copies of the finished runs, with other options on paper."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl.results.runs import Run
from tests.results.pages import change, summary


@pytest.fixture
def copied(fedamm_run: Path, fedavg_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function (method, name, option=value of the algorithm, seed=) -> a copy of its run with other options on paper."""
    runs = {"FedAMM": fedamm_run, "FedAvg": fedavg_run}

    def copied(method: str, name: str, seed: int = 0, **options: Any) -> Path:
        ignored = shutil.ignore_patterns("checkpoints", "*.ckpt", "events.*")
        folder = Path(shutil.copytree(runs[method], tmp_path / name, ignore=ignored))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["seed"] = seed
        config["algorithm"]["init_args"].update(options)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        change(folder, "summary.json", seed=seed)
        return folder

    return copied


@pytest.fixture
def six(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """FedAMM asynchronous and synchronous and FedAvg, two seeds each, FedAvg's second a tenth of a point better.

    For speed none has figures of its own.
    """
    monkeypatch.setattr(Run, "figures", lambda run: {})
    folders = [copied("FedAMM", f"async_{seed}", seed) for seed in (0, 1)]
    folders += [copied("FedAMM", f"sync_{seed}", seed, meta_update="synchronous") for seed in (0, 1)]
    folders += [copied("FedAvg", f"avg_{seed}", seed) for seed in (0, 1)]
    content = summary(folders[-1])
    content["final"]["test/acc"] += 0.001
    change(folders[-1], "summary.json", final=content["final"])
    return folders
