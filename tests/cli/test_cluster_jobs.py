"""``fedamm compare`` on a Ray cluster: the same results, jobs that are lost, and machines that do not see the folder."""

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl import FedAvg
from fedamm_pl.cli.cluster_jobs import run_on_machine
from fedamm_pl.cli.main import main
from fedamm_pl.federation.executors import cluster as clusters
from fedamm_pl.results.comparison_config import CompareConfig

os.environ.update(clusters.LOOPBACK)  # before the first import: no port of these clusters is open to the network
ray = pytest.importorskip("ray", reason="Ray is not installed; there may be no wheel for this Python")


class DiesOnce(FedAvg):
    """Kills its process in its second round, unless it has done so before.

    Args:
        marker: File by which it knows.
    """

    def __init__(self, *args: Any, marker: str = "", **options: Any) -> None:
        super().__init__(*args, **options)

    def on_train_start(self) -> None:
        super().on_train_start()
        marker = Path(self.hparams["marker"])
        if self.session is not None and self.session.broadcast.round_num == 2 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Ray with room for two runs, and a home of its own, into which it writes a token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        with clusters.connected(None, 2, {"CPU": 1, "GPU": 0}):
            yield


def options(**changes: Any) -> dict[str, Any]:
    return {
        "base": {
            "data": {"dataset": "digits", "num_clients": 2},
            "algorithm": {"model": "mlp", "lr": 0.1},
            "federation": {"num_rounds": 2},
            "trainer": {"accelerator": "cpu", "precision": "32-true"},
            "logger": False,
            "output": {"progress": "none", "figures": False},
        },
        "methods": {"FedAvg": None},
        "seeds": [0, 1],
        **changes,
    }


def compared(folder: Path, *words: str, **changes: Any) -> None:
    (folder / "small.yaml").write_text(yaml.safe_dump(options(**changes), sort_keys=False))
    main(["compare", "--config", str(folder / "small.yaml"), *words])


@pytest.mark.usefixtures("cluster")
def test_runs_on_a_cluster_are_those_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, words in (("here", []), ("there", ["--address", "local"])):
        compared(tmp_path, "--dir", name, *words)
    for seed in (0, 1):
        here, there = (
            json.loads((tmp_path / name / f"FedAvg/seed_{seed}/summary.json").read_text()) for name in ("here", "there")
        )
        assert here["curve"] == there["curve"]
        assert here["mean_last_10"] == there["mean_last_10"]
        assert there["hardware"]["threads"] == 1
        assert "round 2/2" not in (tmp_path / f"there/FedAvg/seed_{seed}.log").read_text()


@pytest.mark.usefixtures("cluster")
def test_a_job_that_is_lost_is_reported_and_goes_on_at_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    dies = {"class_path": "tests.cli.test_cluster_jobs.DiesOnce", "marker": str(tmp_path / "died")}
    more: dict[str, Any] = {"methods": {"FedAvg": None, "dies": dies}, "seeds": [0]}
    with pytest.raises(SystemExit):
        compared(tmp_path, "--dir", str(tmp_path / "out"), "--address", "local", **more)
    printed = capsys.readouterr()
    assert "dies, seed 0: failed, see " in printed.out
    assert "The worker died" in printed.out
    assert "1 of 2 runs failed: dies, seed 0" in printed.err
    compared(tmp_path, "--dir", str(tmp_path / "out"), "--address", "local", **more)
    summary = json.loads((tmp_path / "out/dies/seed_0/summary.json").read_text())
    plain = json.loads((tmp_path / "out/FedAvg/seed_0/summary.json").read_text())
    assert summary["resumes"] == 1
    assert summary["final"] == plain["final"]


@pytest.mark.usefixtures("cluster")
def test_a_machine_that_does_not_see_the_folder_is_named(tmp_path: Path) -> None:
    places = [str(tmp_path / name) for name in ("a.yaml", "a", "a.log")]
    with pytest.raises(ValueError, match=r"Expected machine [\d.]+ to see .*/gone and .*/a.yaml, in folders that all"):
        run_on_machine("seed: 0", *places, str(tmp_path / "gone"), 1)
    (tmp_path / "a.yaml").write_text("seed: 1")  # another folder of the same name
    with pytest.raises(ValueError, match=r"to see .* and .*/a.yaml, in folders that all machines share"):
        run_on_machine("seed: 0", *places, os.getcwd(), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpus_per_run": 0.5}, "`address` to be given with `gpus_per_run`, got gpus_per_run 0.5 alone"),
        ({"cpus_per_run": 0.0, "address": "auto"}, "`cpus_per_run` to be a number above 0, got 0.0"),
        ({"gpus_per_run": -1.0, "address": "auto"}, "`gpus_per_run` to be a number of 0 or more, got -1.0"),
    ],
)
def test_options_out_of_range_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(base={}, methods={"FedAvg": None}, **changes)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:9", "Expected a Ray cluster at `address` 127.0.0.1:9, got no answer: "),
        ("ray://host:10001", "Expected `address` to be host:port, auto or local, got ray://host:10001"),
        ("host", "Expected `address` to be host:port, auto or local, got host"),
    ],
)
def test_an_address_without_a_cluster_is_refused_at_once(address: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clusters.require_answer(address)
