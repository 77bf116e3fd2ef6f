"""The data module: one split for every method, clients apart from the meta set, and batches that can be repeated."""

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.trainer.states import TrainerStatus
from torch import Tensor

from fedamm_pl.data import FederatedDataModule, ImageData
from fedamm_pl.data.client import BatchLoader
from fedamm_pl.data.partitions import EQUAL, MIN_SIZED, SIMULATED
from fedamm_pl.metrics import shot_groups
from tests.data.numbered import labels_of, numbered, numbers, same

NUM_TRAIN, NUM_CLASSES, NUM_META = 500, 5, 4  # 100 images a class, 4 of them in the meta set
COUNTS = [96, 53, 30, 17, 9]  # int(96 * 0.1^(i / 4))
PARTITIONS = SIMULATED
TRAIN_LABELS = np.random.default_rng(0).permutation(np.repeat(np.arange(NUM_CLASSES), NUM_TRAIN // NUM_CLASSES))
Split = tuple[list[list[int]], list[int]]


def save(root: Path, name: str, labels: np.ndarray, *channels: int) -> None:
    np.savez(
        root / f"{name}.npz",
        x_train=numbered(NUM_TRAIN, *channels),
        y_train=labels,
        x_test=numbered(21, *channels),
        y_test=np.arange(21) % NUM_CLASSES,
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    save(folder, "tiny", TRAIN_LABELS)
    save(folder, "fashion_mnist", np.arange(NUM_TRAIN) % 10)
    save(folder, "cifar10", np.arange(NUM_TRAIN) % 10, 3)
    save(folder, "cifar100", TRAIN_LABELS)  # grey, unlike the real one
    return folder


def module(root: Path, **options: Any) -> FederatedDataModule:
    defaults = {
        "dataset": "tiny",
        "num_clients": 4,
        "imbalance_factor": 0.1,
        "num_meta_per_class": NUM_META,
        "batch_size": 16,
        "augmentation": "none",
    }
    if options.get("partition") in MIN_SIZED:
        defaults["min_client_size"] = 1
    return FederatedDataModule(root=str(root), **{**defaults, **options})


def split_of(data: FederatedDataModule) -> Split:
    clients = [data.client(client_id).indices.tolist() for client_id in range(data.num_clients)]
    return clients, numbers(data.meta_batch(0)[0])


@pytest.mark.parametrize("partition", PARTITIONS)
def test_split_is_a_function_of_seed_and_data_options(root: Path, partition: str) -> None:
    split = split_of(module(root, partition=partition))
    torch.manual_seed(123)
    np.random.seed(123)  # noqa: NPY002
    elsewhere = module(root, partition=partition, batch_size=7, test_batch_size=3, shot_rule="counts")
    list(elsewhere.train_dataloader())
    assert split_of(elsewhere) == split
    assert split_of(module(root, partition=partition, seed=1))[0] != split[0]
    assert split_of(module(root, partition=partition, seed=1))[1] != split[1]


@pytest.mark.parametrize("options", [{"imbalance_factor": 0.5}, {"imbalance_profile": "step"}, {"num_clients": 5}])
def test_another_data_option_gives_another_split(root: Path, options: dict[str, Any]) -> None:
    assert split_of(module(root, **options))[0] != split_of(module(root))[0]


def test_meta_set_is_the_same_for_every_partition(root: Path) -> None:
    assert len({tuple(split_of(module(root, partition=partition))[1]) for partition in PARTITIONS}) == 1


def test_setup_loads_the_images_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, calls = module(root), []
    load = data.load_images
    monkeypatch.setattr(data, "load_images", lambda: calls.append("loaded") or load())
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    assert (data.num_classes, data.in_channels, data.num_clients) == (NUM_CLASSES, 1, 4)
    assert calls == ["loaded"]


def test_images_of_ones_own_come_in_by_overriding_load_images() -> None:
    images, labels = torch.zeros(40, 2, 6, 6, dtype=torch.uint8), torch.arange(40) % 2

    class Mine(FederatedDataModule):
        def load_images(self) -> ImageData:
            return ImageData(images, labels, images, labels, ["no", "yes"])

    data = Mine(num_clients=2, num_meta_per_class=1, imbalance_factor=1)
    assert data.info["class_counts"] == [19, 19]
    assert (data.num_classes, data.in_channels) == (2, 2)


def test_images_of_ones_own_are_not_normalised_as_the_data_set_that_is_the_default() -> None:
    data = Striped([0, 255], num_clients=2, num_meta_per_class=1, imbalance_factor=1)
    assert data.hparams["dataset"] == "fashion_mnist_mini"
    assert (data.info["mean"], data.info["std"]) == ([0.5], [0.5])


class Striped(FederatedDataModule):
    """Images of its own, made of an attribute that is no option."""

    def __init__(self, brightness: list[int], **options: Any) -> None:
        super().__init__(**options)
        self.brightness = brightness

    def load_images(self) -> ImageData:
        labels = torch.arange(40) % 2
        images = torch.tensor(self.brightness, dtype=torch.uint8)[labels, None, None, None].expand(-1, 1, 6, 6)
        return ImageData(images, labels, images, labels, ["dark", "bright"])


Copy = Callable[[FederatedDataModule], FederatedDataModule]
COPIES: dict[str, Copy] = {"deepcopy": copy.deepcopy, "pickle": lambda data: pickle.loads(pickle.dumps(data))}


@pytest.mark.parametrize("how", COPIES)
def test_copy_is_not_set_up_and_sets_itself_up_to_the_same_bits(root: Path, how: str) -> None:
    data = module(root, partition="by_dirichlet", augmentation="crop_flip")
    before = COPIES[how](data)
    content, split, counts, info = data.content_hash, split_of(data), data.client_class_counts, data.info
    data.trainer = SimpleNamespace(lightning_module=None, callback=lambda: None)  # type: ignore[assignment]
    data.to(torch.device("cpu"))
    for made in (before, COPIES[how](data), COPIES[how](COPIES[how](data))):
        assert type(made) is FederatedDataModule
        assert made.hparams == data.hparams
        assert made.trainer is None
        assert not any(isinstance(value, Tensor | ImageData) for value in vars(made).values())
        assert (made.content_hash, split_of(made), made.info) == (content, split, info)
        assert np.array_equal(made.client_class_counts, counts)
        assert same([made.meta_batch(3)], [data.meta_batch(3)])
        assert same(list(made.client(1).train_loader(3)), list(data.client(1).train_loader(3)))


@pytest.mark.parametrize("how", COPIES)
def test_copy_reads_what_is_on_the_disk_now(tmp_path: Path, how: str) -> None:
    save(tmp_path, "tiny", TRAIN_LABELS)
    data = module(tmp_path)
    data.setup()
    copied = COPIES[how](data)
    (tmp_path / "tiny.npz").unlink()
    assert data.num_classes == NUM_CLASSES
    with pytest.raises(ValueError, match="got 'tiny' and no such file"):
        copied.setup()


@pytest.mark.parametrize("how", COPIES)
def test_copy_keeps_the_attributes_of_a_subclass(how: str) -> None:
    data = Striped([10, 200], num_clients=2, num_meta_per_class=1, imbalance_factor=1)
    data.setup()
    copied = COPIES[how](data)
    assert isinstance(copied, Striped)
    assert copied.brightness == [10, 200]
    assert copied.content_hash == data.content_hash
    copied.brightness[0] = 20
    assert data.brightness == [10, 200]


def test_pickle_of_the_images_in_the_package_is_small() -> None:
    data = FederatedDataModule()
    data.prepare_data()
    assert data.content_hash
    assert len(pickle.dumps(data)) < 2000


@pytest.mark.parametrize("partition", PARTITIONS)
def test_clients_are_disjoint_from_each_other_and_from_the_meta_set(root: Path, partition: str) -> None:
    data = module(root, partition=partition)
    held = [numbers(images) for client in range(4) for images, _ in data.client(client).train_loader(0)]
    _, meta = split_of(data)
    everything = [number for batch in held for number in batch] + meta
    assert len(set(everything)) == len(everything)
    assert len(meta) == NUM_META * NUM_CLASSES
    assert sum(data.client_size(client) for client in range(4)) == len(everything) - len(meta)


@pytest.mark.parametrize("partition", PARTITIONS)
def test_client_class_counts_are_those_of_its_batches(root: Path, partition: str) -> None:
    data = module(root, partition=partition)
    expected = np.zeros((4, NUM_CLASSES), dtype=np.int64)
    for client in range(4):
        for label in labels_of(data.client(client).train_loader(0)):
            expected[client, label] += 1
    assert np.array_equal(data.client_class_counts, expected)
    assert data.client_class_counts.sum(1).tolist() == [data.client_size(client) for client in range(4)]
    assert (expected.sum(0) <= COUNTS).all()


def primitive(value: object) -> bool:
    if type(value) is dict:
        return all(type(key) is str and primitive(item) for key, item in value.items())
    if type(value) is list:
        return all(primitive(item) for item in value)
    return type(value) in (int, float, str)


def test_info_describes_the_images_in_primitive_types(root: Path) -> None:
    info = module(root, shot_rule="share", partition="iid").info
    assert primitive(info)
    assert json.loads(json.dumps(info)) == info
    assert info["image_size"] == [6, 6]
    assert info["class_names"] == ["0", "1", "2", "3", "4"]
    assert info["class_counts"] == COUNTS
    assert info["shot_rule"] == "share"
    assert info["shot_groups"] == {"many": [0, 1], "medium": [2], "few": [3, 4]}  # 0.468 0.727 0.873 0.956 1


def test_explicit_shot_ranges_come_into_the_info(root: Path) -> None:
    info = module(root, shot_rule="index", shot_ranges={"many": (0, 1), "few": (2, 4)}).info
    assert primitive(info)
    assert info["shot_groups"] == {"many": [0, 1], "few": [2, 3, 4]}


@pytest.mark.parametrize(
    ("dataset", "mean", "std"),
    [
        ("fashion_mnist", [0.2860], [0.3530]),
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_known_data_sets_have_the_published_normalisation(
    root: Path, dataset: str, mean: list[float], std: list[float]
) -> None:
    info = module(root, dataset=dataset).info
    assert (info["mean"], info["std"]) == (mean, std)
    assert primitive(info)


@pytest.mark.parametrize("dataset", ["tiny", "cifar100"])
def test_other_images_are_normalised_by_those_kept_for_training(root: Path, dataset: str) -> None:
    data = module(root, dataset=dataset, partition="iid")
    kept = [index for mine in split_of(data)[0] for index in mine]
    scaled = numbered(NUM_TRAIN)[kept] / 255
    assert len(kept) == sum(COUNTS)
    assert data.info["mean"] == pytest.approx([scaled.mean()], rel=1e-9)
    assert data.info["std"] == pytest.approx([scaled.std()], rel=1e-9)


@pytest.mark.parametrize("augmentation", ["none", "crop_flip"])
def test_client_trains_on_each_of_its_examples_once_an_epoch(root: Path, augmentation: str) -> None:
    client = module(root, augmentation=augmentation).client(1)
    counts = torch.bincount(torch.tensor(labels_of(client.train_loader(0))), minlength=NUM_CLASSES)
    assert counts.tolist() == np.bincount(TRAIN_LABELS[client.indices], minlength=NUM_CLASSES).tolist()


def test_client_batches_hold_the_clients_own_images_with_their_labels(root: Path) -> None:
    client = module(root).client(2)
    batches = list(client.train_loader(5))
    seen = [number for images, _ in batches for number in numbers(images)]
    assert sorted(seen) == client.indices.tolist()
    assert [label for _, labels in batches for label in labels.tolist()] == TRAIN_LABELS[seen].tolist()
    assert all(images.dtype == torch.uint8 and labels.dtype == torch.int64 for images, labels in batches)


@pytest.mark.parametrize("augmentation", ["none", "crop", "crop_flip"])
def test_same_seed_gives_the_same_batches(root: Path, augmentation: str) -> None:
    client = module(root, augmentation=augmentation).client(0)
    first, again, other = (client.train_loader(seed) for seed in (4, 4, 5))
    assert same(list(first), list(again))
    assert same(list(first), list(again))  # the second epoch too
    assert not same(list(client.train_loader(4)), list(other))


@pytest.mark.parametrize(("num_meta_per_class", "size"), [(1, 5), (4, 20), (20, None)])
def test_support_is_distinct_examples_of_the_clients_own(root: Path, num_meta_per_class: int, size: int | None) -> None:
    client = module(root, num_meta_per_class=num_meta_per_class).client(0)
    images, labels = client.support(0)
    chosen = numbers(images)
    assert len(chosen) == len(set(chosen)) == (client.num_examples if size is None else size)
    assert set(chosen) <= set(client.indices.tolist())
    assert labels.tolist() == TRAIN_LABELS[chosen].tolist()


def test_support_is_drawn_anew_for_each_seed(root: Path) -> None:
    client = module(root, augmentation="crop_flip").client(0)
    assert same([client.support(0)], [client.support(0)])
    assert not same([client.support(0)], [client.support(1)])
    plain = module(root).client(0)
    assert {number for seed in range(40) for number in numbers(plain.support(seed)[0])} == set(plain.indices.tolist())


def test_meta_batch_is_the_whole_meta_set_in_fixed_order(root: Path) -> None:
    data = module(root)
    (first, labels), (second, _) = data.meta_batch(0), data.meta_batch(1)
    assert labels.tolist() == np.repeat(np.arange(NUM_CLASSES), NUM_META).tolist()
    assert TRAIN_LABELS[numbers(first)].tolist() == labels.tolist()
    assert numbers(first) == numbers(second)


def test_meta_batch_is_augmented_by_its_seed(root: Path) -> None:
    data = module(root, augmentation="crop_flip")
    assert same([data.meta_batch(0)], [data.meta_batch(0)])
    assert not same([data.meta_batch(0)], [data.meta_batch(1)])
    assert torch.equal(data.meta_batch(0)[1], data.meta_batch(1)[1])


def test_meta_batch_without_a_meta_set_is_refused(root: Path) -> None:
    data = module(root, num_meta_per_class=0)
    with pytest.raises(ValueError, match="Expected `num_meta_per_class` to be 1 or more for a meta set, got 0"):
        data.meta_batch(0)
    assert data.client(0).support(0)[1].shape == (0,)


def test_train_dataloader_is_the_union_of_the_clients(root: Path) -> None:
    data = module(root, partition="iid")
    loader = data.train_dataloader()
    assert isinstance(loader, BatchLoader)
    clients, _ = split_of(data)
    assert sorted(n for images, _ in loader for n in numbers(images)) == sorted(n for mine in clients for n in mine)


def test_train_dataloader_has_the_meta_set_beside_it_where_a_module_asks(root: Path) -> None:
    data = module(root)
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(trains_on_meta_set=True))  # type: ignore[assignment]
    loaders = data.train_dataloader()
    assert isinstance(loaders, dict)
    assert sorted(loaders) == ["meta", "train"]
    assert len(loaders["meta"]) == len(loaders["train"])
    images, _ = next(iter(loaders["meta"]))
    assert sorted(numbers(images)) == sorted(split_of(data)[1])


def test_test_dataloader_is_the_test_set_in_order(root: Path) -> None:
    loader = module(root, test_batch_size=9, augmentation="crop_flip").test_dataloader()
    assert [len(labels) for _, labels in loader] == [9, 9, 3]
    assert labels_of(loader) == [number % NUM_CLASSES for number in range(21)]
    assert [number for images, _ in loader for number in numbers(images)] == list(range(21))


def test_images_can_be_put_on_a_device(root: Path) -> None:
    data = module(root)
    split, counts = split_of(data), data.client_class_counts
    data.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    assert split_of(data) == split
    assert np.array_equal(data.client_class_counts, counts)
    assert sorted(n for images, _ in data.client(0).train_loader(0) for n in numbers(images)) == split[0][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "Expected `batch_size` to be 1 or more, got 0"),
        ({"test_batch_size": -1}, "Expected `test_batch_size` to be 1 or more, got -1"),
        ({"imbalance_factor": 0.0}, r"Expected `imbalance_factor` to be in \(0, 1\], got 0.0"),
        ({"imbalance_factor": 100.0}, r"Expected `imbalance_factor` to be in \(0, 1\], got 100.0"),
        ({"imbalance_factor": float("nan")}, r"Expected `imbalance_factor` to be in \(0, 1\], got nan"),
        ({"seed": -1}, "Expected `seed` to be 0 or more, got -1"),
        ({"shot_ranges": {"many": (0, 4)}}, "Expected `shot_rule` to be index for `shot_ranges`, got share"),
    ],
)
def test_option_out_of_range_is_refused_at_once(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(root, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "absent"}, "got 'absent' and no such file"),
        (
            {"partition": "by_magic"},
            "`partition` to be one of by_num_classes, .*, iid, .* or the import path of a function .*, got by_magic",
        ),
        ({"imbalance_profile": "linear"}, "`imbalance_profile` to be .* got 'linear'"),
        ({"num_meta_per_class": 100}, "got 100 for class 0"),
        ({"num_clients": 0}, "`num_clients` to be 1 or more, got 0"),
        ({"num_clients": 206}, r"`num_clients` to be at most the number of training examples \(205 here\), got 206"),
        ({"min_classes_per_client": 6}, r"`min_classes_per_client` to be in 1\.\.5, got 6"),
        ({"partition": "by_dirichlet", "dirichlet_alpha": 0.0}, "`dirichlet_alpha` to be a number above 0, got 0.0"),
        ({"partition": "by_dirichlet", "min_client_size": 60}, "`min_client_size` = 60 examples"),
        ({"partition": "by_shards", "shards_per_client": 0}, "`shards_per_client` to be 1 or more, got 0"),
        ({"shot_rule": "quantile"}, "`shot_rule` to be counts, share or index, got 'quantile'"),
        ({"shot_rule": "index"}, "`shot_ranges` to give first and last class"),
        ({"shot_rule": "index", "shot_ranges": {"many": (0, 5)}}, r"`shot_ranges` to be disjoint within 0\.\.4"),
    ],
)
def test_option_that_needs_the_data_is_refused_at_setup(root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(root, **options).setup()


@pytest.mark.parametrize(
    ("options", "unused"),
    [
        ({"dirichlet_alpha": 0.1}, "dirichlet_alpha 0.1 is not used by partition by_num_classes"),
        ({"partition": "iid", "shards_per_client": 3}, "shards_per_client 3 is not used by partition iid"),
        ({"partition": "by_dirichlet", "dirichlet_alpha": 1.0}, ""),
        ({"min_classes_per_client": 3}, ""),
    ],
)
def test_an_option_that_is_not_used_is_a_warning(
    root: Path, options: dict[str, Any], unused: str, caplog: pytest.LogCaptureFixture
) -> None:
    FederatedDataModule("tiny", str(root), imbalance_factor=0.1, num_clients=4, **options).setup()
    found = [line for line in caplog.messages if "not used by" in line]
    assert len(found) == bool(unused)
    assert unused in "".join(found)


def test_unknown_augmentation_is_refused_before_training(root: Path) -> None:
    with pytest.raises(ValueError, match="`augmentation` to be crop_flip, crop or none, got 'flip'"):
        module(root, augmentation="flip").setup()


# What is reported is what is trained on


@pytest.mark.parametrize("partition", PARTITIONS)
def test_counts_groups_and_statistics_are_of_what_clients_hold(root: Path, partition: str) -> None:
    data = module(root, partition=partition, num_clients=14)
    clients, meta = split_of(data)
    held = sorted(number for mine in clients for number in mine)
    counts = np.bincount(TRAIN_LABELS[held], minlength=NUM_CLASSES).tolist()
    assert data.info["class_counts"] == counts == data.client_class_counts.sum(0).tolist()
    assert data.info["shot_groups"] == shot_groups(counts, "share")
    assert data.unused_images == sum(COUNTS) - len(held)
    assert (data.unused_images > 0) == (partition in EQUAL)
    assert data.imbalance_factor == min(counts) / max(counts)
    scaled = numbered(NUM_TRAIN)[held] / 255
    assert data.info["mean"] == pytest.approx([scaled.mean()], rel=1e-9)
    assert data.info["std"] == pytest.approx([scaled.std()], rel=1e-9)
    loader = data.train_dataloader()
    assert isinstance(loader, BatchLoader)
    assert sorted(number for images, _ in loader for number in numbers(images)) == held
    assert not set(held) & set(meta)


def test_what_a_partition_leaves_over_is_said(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(root, partition="by_shards", num_clients=50, shards_per_client=3)  # 150 of 205
    assert data.unused_images == 55
    expected = (
        "55 of 205 training examples (27 %) are left over, since all clients hold equally many, and used by nobody"
    )
    assert data.left_over == expected
    assert caplog.messages == [f"partition by_shards: {expected}"]


def test_class_that_nobody_holds_is_named(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(root, partition="by_shards", num_clients=50, imbalance_factor=0.011)  # 100 of 141
    assert data.info["class_counts"] == [66, 22, 9, 3, 0]
    assert data.left_over.endswith("; classes that no client holds: 4")
    assert data.left_over in caplog.text
    assert data.imbalance_factor == 0
    assert sum(map(len, data.info["shot_groups"].values())) == NUM_CLASSES


def test_little_that_is_left_over_is_no_warning(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(root)  # 205 = 4 * 51 + 1
    assert data.left_over.startswith("1 of 205 training examples (0.49 %) are left over")
    assert caplog.messages == []
    assert module(root, partition="iid").left_over == ""


def skewed(root: Path, counts: list[int], **options: Any) -> FederatedDataModule:
    labels = np.repeat(np.arange(len(counts)), counts)
    images = numbered(len(labels))
    np.savez(root / "skewed.npz", x_train=images, y_train=labels, x_test=images[:3], y_test=[0, 1, 2])
    return module(root, dataset="skewed", num_meta_per_class=2, partition="iid", **options)


def test_tail_that_is_cut_a_second_time_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = skewed(tmp_path, [12, 100, 20])  # 126 without the meta set, 42 a class
    assert data.info["class_counts"] == [10, 13, 4]  # 42, 42 * 0.1 ** 0.5, 4.2
    assert data.imbalance_factor == 4 / 13
    assert caplog.messages == [
        "the classes differ in size already (class 1 has 100 examples, class 0 has 12): imbalance_profile exponential, which "
        "ranks classes by index, discards 99 of 132 examples; imbalance_profile none keeps them all"
    ]


def test_a_meta_set_that_takes_most_of_a_class_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = skewed(tmp_path, [7, 100, 4], imbalance_profile="none", num_val_per_class=1)
    assert data.info["class_counts"] == [4, 97, 1]
    assert caplog.messages == [
        "num_meta_per_class 2 and num_val_per_class 1 take 3 training examples of each class, more than half of those of: 2 (4)"
    ]


@pytest.mark.parametrize(
    ("counts", "options"),
    [
        ([12, 100, 20], {"imbalance_profile": "none"}),
        ([50, 100, 100], {}),  # up to twice as many: balanced
    ],
)
def test_no_second_cut_is_no_warning(
    tmp_path: Path, counts: list[int], options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    data = skewed(tmp_path, counts, **options)
    assert data.info["class_counts"]
    assert caplog.messages == []


def test_largest_class_stays_the_largest_by_option(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = skewed(tmp_path, [12, 100, 20], ranks_by_size=True)
    assert data.info["class_counts"] == [4, 42, 13]
    assert "ranks classes by size, discards 67 of 132 examples" in caplog.text


def test_home_of_the_user_is_found(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(root.parent))
    data = FederatedDataModule("tiny", root=f"~/{root.name}", num_clients=2, num_meta_per_class=1, imbalance_factor=0.1)
    assert data.num_classes == NUM_CLASSES
    assert data.hparams["root"] == f"~/{root.name}"


@pytest.mark.parametrize("augmentation", ["crop", "crop_flip"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 64), (2, 64, 1), (3, 4, 5)])
def test_crop_that_would_shift_images_away_is_refused(shape: tuple[int, int, int], augmentation: str) -> None:
    labels = torch.arange(40) % 2

    class Features(FederatedDataModule):
        def load_images(self) -> ImageData:
            images = torch.zeros(40, *shape, dtype=torch.uint8)
            return ImageData(images, labels, images, labels, ["no", "yes"])

    options = {"num_clients": 2, "num_meta_per_class": 1, "imbalance_factor": 1.0}
    expected = (
        rf"Expected `augmentation` to be none for images of {shape[1]} x {shape[2]} pixels, .* got {augmentation}\."
    )
    with pytest.raises(ValueError, match=expected):
        Features(augmentation=augmentation, **options).setup()
    assert Features(augmentation="none", **options).num_classes == 2


def changed(images: ImageData, part: str) -> ImageData:
    """The same images, but for one thing."""
    order = torch.arange(len(images.train_labels)).roll(1)
    return {
        "a pixel": lambda: dataclasses.replace(images, train_images=images.train_images.flip(3)),
        "a test pixel": lambda: dataclasses.replace(images, test_images=images.test_images.flip(3)),
        "a label": lambda: dataclasses.replace(images, train_labels=images.train_labels.roll(1)),
        "a test label": lambda: dataclasses.replace(images, test_labels=images.test_labels.roll(1)),
        "a name": lambda: dataclasses.replace(images, class_names=["zero", *images.class_names[1:]]),
        "the names": lambda: dataclasses.replace(images, class_names=images.class_names[::-1]),
        "the order": lambda: dataclasses.replace(
            images, train_images=images.train_images[order], train_labels=images.train_labels[order]
        ),
    }[part]()


@pytest.mark.parametrize(
    "part", ["a pixel", "a test pixel", "a label", "a test label", "a name", "the names", "the order"]
)
def test_content_hash_covers_everything_that_is_used(root: Path, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data, other = module(root), module(root)
    images = data.images
    monkeypatch.setattr(other, "load_images", lambda: changed(images, part))
    assert other.content_hash != data.content_hash


def running(rank: int, num_ranks: int, **options: Any) -> Any:
    state = SimpleNamespace(status=options.pop("status", TrainerStatus.RUNNING))
    fake = {"global_rank": rank, "world_size": num_ranks, "lightning_module": None, "overfit_batches": 0}
    return SimpleNamespace(**{**fake, **options}, state=state)


def test_each_process_of_a_training_gets_its_part(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = module(root)
    everything = sorted(labels_of(data.test_dataloader()))
    size, parts, tested = sum(data.info["class_counts"]), [], []
    for rank in range(2):
        data.trainer = running(rank, 2)
        parts.append([number for images, _ in data.train_dataloader() for number in numbers(images)])
        tested += labels_of(data.test_dataloader())
    assert not set(parts[0]) & set(parts[1])
    assert len(parts[0]) == len(parts[1]) == size // 2
    assert sorted(tested) == everything
    said = f"{size % 2} of {size} training examples, others in each epoch, are left out" in caplog.text
    assert said == bool(size % 2)


def test_a_trainer_that_does_not_run_leaves_the_loaders_whole(root: Path) -> None:
    data = module(root)
    data.trainer = running(0, 2, status=TrainerStatus.FINISHED)
    assert len(labels_of(data.train_dataloader())) == sum(data.info["class_counts"])


def test_overfitting_stays_on_the_same_batches(root: Path) -> None:
    data = module(root, augmentation="crop_flip")
    data.trainer = running(0, 1, overfit_batches=2)
    loader = data.train_dataloader()
    assert same(list(loader), list(loader))
    assert len(labels_of(loader)) == sum(data.info["class_counts"])


def test_own_data_are_not_called_by_the_name_of_others() -> None:
    class Sensors(FederatedDataModule):
        def load_images(self) -> ImageData:
            return FederatedDataModule().images

    assert FederatedDataModule().dataset_name == "fashion_mnist_mini"
    assert Sensors().dataset_name == "Sensors"
    assert Sensors(dataset="north").dataset_name == "north"


def test_data_can_be_printed() -> None:
    assert str(FederatedDataModule("cifar10")) == "FederatedDataModule of cifar10"
