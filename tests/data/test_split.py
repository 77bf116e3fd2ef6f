"""The whole split: which partition is asked for, natural clients, partition files, and what is said of them."""

import json
import logging
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedamm_pl import FederatedDataModule
from fedamm_pl.data import ImageData
from fedamm_pl.data.partitions import NUM_CLIENTS, SIMULATED
from tests.tiny import tiny_data

CLASSES = ["sit", "walk"]
LABELS = np.arange(40) % 2
OWNERS = [f"person {index % 3 + 8}" for index in range(40)]  # person 8, person 9, person 10


class People(FederatedDataModule):
    """Forty images of two classes, each of one of three people, or of who ``owners`` says."""

    def __init__(self, owners: list[str] | None = OWNERS, **options: Any) -> None:
        defaults = {"partition": "by_client", "num_meta_per_class": 2, "imbalance_factor": 1.0, "augmentation": "none"}
        super().__init__(**{**defaults, **options})
        self.owners = owners

    def load_images(self) -> ImageData:
        images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(-1, 1, 6, 6)
        labels = torch.from_numpy(LABELS)
        return ImageData(images, labels, images, labels, CLASSES, clients=self.owners)


def clients(data: FederatedDataModule) -> dict[str, list[int]]:
    return {name: data.client(k).indices.tolist() for k, name in enumerate(data.client_names)}


def meta(data: FederatedDataModule) -> list[int]:
    return data._split.meta.tolist() if data.num_classes else []


def from_file(path: Path, content: Any, **options: Any) -> People:
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return People(partition="from_file", partition_file=str(path), **options)


# Clients


def test_natural_clients_keep_what_meta_set_and_tail_leave_of_their_own() -> None:
    data = People(imbalance_factor=0.5)
    assert (data.num_clients, data.client_names) == (3, ["person 8", "person 9", "person 10"])
    assert data.info["class_counts"] == [18, 9]
    held = clients(data)
    for name, mine in held.items():
        assert {OWNERS[index] for index in mine} == {name}
    left = set(range(40)) - set(meta(data)) - {index for mine in held.values() for index in mine}
    assert len(left) == 9
    assert data.left_over == ""
    assert data.client_class_counts.sum(0).tolist() == [18, 9]


def test_meta_set_and_tail_are_those_of_every_other_partition() -> None:
    natural, simulated = People(imbalance_factor=0.5), People(imbalance_factor=0.5, partition="iid", num_clients=4)
    assert meta(natural) == meta(simulated)
    assert sorted(chain(*clients(natural).values())) == sorted(chain(*clients(simulated).values()))


def test_a_natural_client_of_which_nothing_is_left_is_said(caplog: pytest.LogCaptureFixture) -> None:
    owners = ["all"] * 40
    taken = meta(People())[0]
    owners[taken] = "lone\x1b"
    data = People(owners)
    assert data.client_size(1) == 0
    assert data.client_names == ["all", "lone\x1b"]
    assert r"1 clients hold no examples and take part in no round: 'lone\x1b'" in caplog.text


def test_natural_data_that_are_long_tailed_are_said_to_be_cut_again(caplog: pytest.LogCaptureFixture) -> None:
    class Skewed(People):
        def load_images(self) -> ImageData:
            found, labels = super().load_images(), (torch.arange(40) < 30).long()
            return ImageData(found.train_images, labels, found.test_images, labels, CLASSES, clients=OWNERS)

    Skewed(imbalance_factor=0.5).setup()
    assert "the classes differ in size already" in caplog.text
    assert "imbalance_profile none keeps them all" in caplog.text
    caplog.clear()
    Skewed(imbalance_profile="none").setup()
    assert caplog.text == ""


def test_simulated_clients_are_called_by_their_numbers_and_are_20_by_default() -> None:
    assert tiny_data().client_names == ["0", "1", "2", "3"]
    assert tiny_data(num_clients=None, partition="iid").num_clients == NUM_CLIENTS == 20
    assert People(partition="iid", num_clients=5).client_names == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("number", [0, 2, 4])
def test_another_number_of_clients_than_the_data_have_is_refused(number: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"`num_clients` to be null or 3, .* the data have, got {number}"):
        People(num_clients=number).setup()
    assert People(num_clients=3).num_clients == 3
    path = tmp_path / "p.json"
    with pytest.raises(ValueError, match=rf"`num_clients` to be null or 1, .*p\.json has, got {number}"):
        from_file(path, {"a": [0, 1]}, num_clients=number).setup()


def test_data_without_clients_are_refused_for_natural_ones() -> None:
    with pytest.raises(
        ValueError, match=r"`partition` to be by_client for data that say whose .* `client_column` names"
    ):
        People(None).setup()
    with pytest.raises(ValueError, match="got '' for example 3"):
        People([*OWNERS[:3], "", *OWNERS[4:]]).setup()


def test_clients_that_nobody_uses_are_said(caplog: pytest.LogCaptureFixture) -> None:
    People().setup()
    People(None, partition="iid", num_clients=3).setup()
    assert caplog.text == ""
    People(partition="iid", num_clients=3).setup()
    assert "name a client for each example; partition iid ignores this, by_client uses it" in caplog.text


# Which partition


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"partition": "by_dirichet"}, r"`partition` to be one of .*, got by_dirichet; did you mean by_dirichlet\?"),
        ({"partition": "by_clients"}, r"got by_clients; did you mean by_client\?"),
        ({"partition": "x"}, r"the import path of a function f\(labels, num_clients, rng\), got x\.$"),
        ({"partition": "from_file"}, "Expected `partition_file` to name the file for partition from_file, got none"),
        (
            {"partition": "iid", "partition_file": "a.json"},
            "`partition` to be from_file for partition_file a.json, got iid",
        ),
    ],
)
def test_a_partition_that_does_not_exist_is_refused_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        People(**options)


def halves(labels: np.ndarray, num_clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    order = rng.permutation(len(labels))
    return [order[: len(labels) // 4], *np.array_split(order[len(labels) // 2 :], num_clients - 1)]


def test_a_function_of_ones_own_shares_out_what_meta_set_and_tail_leave(caplog: pytest.LogCaptureFixture) -> None:
    data = People(partition=f"{__name__}.halves", num_clients=3)
    held = clients(data)
    assert [len(mine) for mine in held.values()] == [9, 9, 9]
    assert not set(chain(*held.values())) & set(meta(data))
    assert data.unused_images == 9
    assert "9 of 36 training examples (25 %) are left over, since the partition gives them to no client" in caplog.text
    assert clients(People(partition=f"{__name__}.halves", num_clients=3)) == held
    with pytest.raises(ValueError, match=r"`partition` to be one of .*, got 'nowhere\.f'"):
        People(partition="nowhere.f").setup()


def test_no_import_path_is_taken_from_a_checkpoint(tmp_path: Path) -> None:
    hparams = {"partition": f"{__name__}.halves", "num_clients": 3, "num_meta_per_class": 2}
    torch.save({FederatedDataModule.CHECKPOINT_HYPER_PARAMS_KEY: hparams}, tmp_path / "data.ckpt")
    with pytest.raises(ValueError, match=r"`partition` in .*data\.ckpt not to be an import path, got .*halves"):
        FederatedDataModule.load_from_checkpoint(tmp_path / "data.ckpt")
    data = FederatedDataModule.load_from_checkpoint(tmp_path / "data.ckpt", partition=f"{__name__}.halves")
    assert data.num_clients == 3
    hparams["partition"] = "iid"
    torch.save({FederatedDataModule.CHECKPOINT_HYPER_PARAMS_KEY: hparams}, tmp_path / "data.ckpt")
    assert FederatedDataModule.load_from_checkpoint(tmp_path / "data.ckpt").hparams["partition"] == "iid"


# Files


@pytest.mark.parametrize("partition", [*SIMULATED, "by_client"])
def test_the_file_of_a_partition_makes_the_same_split(partition: str, tmp_path: Path) -> None:
    number = None if partition == "by_client" else 3
    data = People(partition=partition, num_clients=number, imbalance_factor=0.5, min_client_size=1)
    again = from_file(tmp_path / "p.json", data.partition_json)
    assert clients(again) == clients(data)
    assert meta(again) == meta(data)
    assert again.info == data.info
    assert json.loads(again.partition_json) == json.loads(data.partition_json)


def test_clients_of_a_file_stand_in_its_order_and_nothing_is_cut(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    data = from_file(tmp_path / "p.json", {"zoe": [5, 0, 2], "adam": [9, 1]}, imbalance_factor=0.1)
    assert clients(data) == {"zoe": [0, 2, 5], "adam": [1, 9]}
    assert data.info["class_counts"] == [2, 3]
    assert data.unused_images == 31
    assert data.left_over.startswith(
        "31 of 40 training examples (78 %) are left over, since the file gives them to no client"
    )
    (said,) = [record for record in caplog.records if "p.json" in record.getMessage()]
    assert said.levelno == logging.INFO
    assert "the options of imbalance are not used" in said.getMessage()
    assert "so there is no check that it is of these" in said.getMessage()


def test_the_meta_set_of_a_plain_file_is_drawn_from_what_no_client_holds(tmp_path: Path) -> None:
    held = {"a": list(range(30))}
    first, again, other = (from_file(tmp_path / "p.json", held, seed=seed) for seed in (0, 0, 1))
    assert LABELS[meta(first)].tolist() == [0, 0, 1, 1]
    assert min(meta(first)) >= 30
    assert meta(first) == meta(again) != meta(other)
    with pytest.raises(ValueError, match=r"p\.json to leave `num_meta_per_class` = 6 .* meta set, got 5 of class sit"):
        from_file(tmp_path / "p.json", held, num_meta_per_class=6).setup()
    assert from_file(tmp_path / "p.json", {"a": list(range(40))}, num_meta_per_class=0).unused_images == 0


def whole(**changes: Any) -> dict[str, Any]:
    made = {
        "format": 1,
        "data": People().examples_hash,
        "num_examples": 40,
        "clients": {"a": list(range(20))},
        "meta": [30, 31, 33, 32],
    }
    return made | changes


def test_the_sets_of_a_file_are_used_as_they_stand(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    data = from_file(tmp_path / "p.json", whole(local_test={"a": [38]}))
    assert meta(data) == [30, 32, 31, 33]  # by class
    assert data.meta_batch(0)[0][:, 0, 0, 0].tolist() == [30, 32, 31, 33]
    assert [mine.tolist() for mine in data._split.local_test] == [[38]]
    assert data.unused_images == 15
    assert "the options of imbalance are not used" in caplog.text
    from_file(tmp_path / "p.json", whole(local_test={"a": [38]}), local_test_fraction=0.5).setup()
    assert "the options of imbalance and local_test_fraction are not used" in caplog.text
    assert json.loads(data.partition_json)["local_test"] == {"a": [38]}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"meta": [30, 32, 31]}, "meta set of .* equally many .*, got 1 of class walk and 2 of class sit"),
        ({"meta": [30, 31]}, r"`num_meta_per_class` to be 1, as in the meta set of .*p\.json, got 2"),
        ({"meta": []}, "`num_meta_per_class` to be 0, as in the meta set"),
        (
            {"data": "0" * 16},
            r"to be a partition of these data \(content \w{12}\), got one of others \(content 0{12}\)",
        ),
        ({"num_examples": 41}, "40 training examples, got one of 41"),
        ({"clients": {"a": [40]}}, "to hold indices from 0 to 39, got 40 for client 'a'"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_file(tmp_path / "p.json", whole(**changes)).setup()
    assert "p.json" in str(caught.value)


def test_a_class_that_no_client_of_a_file_holds_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = from_file(tmp_path / "p.json", {"a": [0, 2], "b": []})
    assert data.info["class_counts"] == [2, 0]
    assert "classes that no client holds: walk" in caplog.text
    assert "1 clients hold no examples and take part in no round: 'b'" in caplog.text


def test_a_file_without_any_example_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"p\.json to give clients training examples, got none"):
        from_file(tmp_path / "p.json", {"a": [], "b": []}).setup()


def test_the_home_of_the_user_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "p.json").write_text('{"a": [0, 1]}')
    assert People(partition="from_file", partition_file="~/p.json").client_names == ["a"]


def test_the_hash_of_a_partition_stands_where_options_and_data_do_not_say_all(tmp_path: Path) -> None:
    assert People().partition_hash
    assert People(partition="iid", num_clients=3).partition_hash == ""
    first = from_file(tmp_path / "p.json", {"a": [0], "b": [1]}).partition_hash
    assert first
    assert from_file(tmp_path / "q.json", b' {"a": [0],\n"b": [1]}').partition_hash == first
    assert from_file(tmp_path / "p.json", {"a": [1], "b": [0]}).partition_hash != first
    assert from_file(tmp_path / "p.json", {"b": [1], "a": [0]}).partition_hash != first
