"""partition.json: written by every run; a run from it is the same run, and one with another is not continued."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedamm_pl import FedAMM, FedAvg, Orchestrator
from fedamm_pl.federation.executors import Processes
from tests.federation.small import assert_equal, federation
from tests.tiny import TinyData, tiny_data

METHOD = {"differentiation": "forward"}


def from_file(path: Path, **options: Any) -> TinyData:
    return tiny_data(partition="from_file", partition_file=str(path), num_clients=None, **options)


def run(data: TinyData, folder: Path | None = None, **options: Any) -> Orchestrator:
    made = federation(FedAMM, data, METHOD, output_dir=folder, client_fraction=0.5, **options)
    made.run()
    return made


def shuffled(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(rng.permutation(len(labels)), num_clients)


def numbered(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    return np.array_split(np.arange(len(labels)), num_clients)


@pytest.mark.parametrize("partition", ["by_num_classes", "by_dirichlet_blocks", f"{__name__}.shuffled"])
@pytest.mark.parametrize("sets", [{}, {"num_val_per_class": 3, "local_test_fraction": 0.2}])
def test_a_run_from_the_file_that_a_run_has_written_is_the_same_run(
    partition: str, sets: dict[str, Any], tmp_path: Path
) -> None:
    first = run(tiny_data(partition=partition, **sets), tmp_path)
    other = {**sets, "imbalance_factor": 1.0, "shuffle_ranks": True} | ({"local_test_fraction": 0.0} if sets else {})
    again = run(from_file(tmp_path / "partition.json", **other))
    assert again.state.history == first.state.history
    assert_equal(again.state.shared, first.state.shared)
    assert again.state.confusion == first.state.confusion


def test_the_file_is_there_from_the_start_and_the_same_after_a_resume(tmp_path: Path) -> None:
    run(tiny_data(), tmp_path, num_rounds=0)
    content = (tmp_path / "partition.json").read_bytes()
    assert json.loads(content)["data"] == tiny_data().content_hash
    (tmp_path / "partition.json").write_text("mangled")
    run(tiny_data(), tmp_path, num_rounds=1)
    assert (tmp_path / "partition.json").read_bytes() == content


def test_a_run_goes_on_with_the_same_partition_wherever_the_file_lies(tmp_path: Path) -> None:
    run(tiny_data(), tmp_path / "one")
    first, second = tmp_path / "one/partition.json", tmp_path / "copy.json"
    run(from_file(first), tmp_path / "two", num_rounds=1)
    shutil.copy(first, second)
    again = run(from_file(second), tmp_path / "two", num_rounds=2)
    assert again.state.round_num == 2
    content = json.loads(first.read_bytes())
    content["clients"]["0"], content["clients"]["1"] = content["clients"]["1"], content["clients"]["0"]
    second.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"got others: data \(partition\) is '\w+' but was '\w+'"):
        run(from_file(second), tmp_path / "two", num_rounds=3)


def test_a_run_with_a_function_that_shares_out_otherwise_is_not_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tiny_data(partition=f"{__name__}.shuffled"), tmp_path, num_rounds=1)
    monkeypatch.setitem(globals(), "shuffled", numbered)
    with pytest.raises(ValueError, match=r"got others: data \(partition\) is '\w+' but was '\w+'"):
        run(tiny_data(partition=f"{__name__}.shuffled"), tmp_path)


def test_a_number_of_clients_that_was_left_to_the_file_may_be_said(tmp_path: Path) -> None:
    run(tiny_data(), tmp_path / "one", num_rounds=0)
    data = from_file(tmp_path / "one/partition.json")
    run(data, tmp_path / "two", num_rounds=1)
    options = {**data.hparams, "num_clients": 4}
    assert run(TinyData(**options), tmp_path / "two", num_rounds=2).state.round_num == 2


def test_workers_see_the_partition_of_the_file(tmp_path: Path) -> None:
    run(tiny_data(), tmp_path, num_rounds=0)
    data = from_file(tmp_path / "partition.json")
    expected = federation(FedAvg, data).run()
    with federation(FedAvg, data, executor=Processes(1, threads_per_worker=1)).opened() as seen:
        assert seen.environment["partition_hash"] == data.partition_hash
        assert seen.fingerprint["data (partition)"] == data.partition_hash
    assert expected


def test_workers_that_see_another_partition_are_refused(tmp_path: Path) -> None:
    run(tiny_data(), tmp_path, num_rounds=0)
    path = tmp_path / "partition.json"
    data = from_file(path)
    data.setup()
    content = json.loads(path.read_bytes())
    content["clients"]["0"].pop()
    path.write_text(json.dumps(content))
    executor = Processes(1, threads_per_worker=1)
    with pytest.raises(ValueError, match="partition_hash is"), federation(FedAvg, data, executor=executor).opened():
        pass
