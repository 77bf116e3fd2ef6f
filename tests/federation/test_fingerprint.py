"""What makes a run another run: every option but those that change no bit of a round."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import FedAMM
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.fingerprint import NEUTRAL, differences, fingerprint, flatten, options
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.version import __version__
from tests.federation.small import CPU, federation, make
from tests.tiny import TinyData, tiny_data, tiny_resnet

OTHER: dict[str, Any] = {
    "seed": 1,
    "algorithm.num_classes": 5,
    "algorithm.in_channels": 3,
    "algorithm.model": "small_cnn",
    "algorithm.lr": 0.02,
    "algorithm.momentum": 0.5,
    "algorithm.weight_decay": 0.1,
    "algorithm.local_optimizer": "sam",
    "algorithm.rho": 0.2,
    "algorithm.meta_lr": 0.5,
    "algorithm.meta_update": "synchronous",
    "algorithm.meta_interval": 3,
    "algorithm.differentiation": "functional",
    "algorithm.weight_net_init": "flat",
    "algorithm.weight_net_hidden": 10,
    "algorithm.weight_net_depth": 2,
    "algorithm.families": "global",
    "algorithm.num_families": 2,
    "algorithm.log_counts": True,
    "algorithm.objective": "focal",
    "algorithm.counts": "global",
    "algorithm.tau": 0.5,
    "algorithm.absent": "mask",
    "algorithm.gamma": 1.0,
    "algorithm.detached": True,
    "algorithm.exchange": "bfloat16",
    "data.dataset": "other",
    "data.root": "elsewhere",
    "data.label_column": "class",
    "data.client_column": "site",
    "data.split_column": "part",
    "data.path_column": "file",
    "data.test_fraction": 0.3,
    "data.image_size": 9,
    "data.in_memory": False,
    "data.num_clients": 5,
    "data.partition": "iid",
    "data.partition_file": "partition.json",
    "data.local_imbalance_factor": 0.5,
    "data.imbalance_factor": 0.3,
    "data.imbalance_profile": "step",
    "data.shuffle_ranks": True,
    "data.ranks_by_size": True,
    "data.largest_class": 20,
    "data.num_meta_per_class": 3,
    "data.num_val_per_class": 2,
    "data.local_test_fraction": 0.2,
    "data.batch_size": 15,
    "data.test_batch_size": 7,
    "data.min_classes_per_client": 3,
    "data.dirichlet_alpha": 0.7,
    "data.min_client_size": 9,
    "data.shards_per_client": 3,
    "data.shot_rule": "counts",
    "data.shot_ranges": {"many": (0, 1), "few": (2, 3)},
    "data.augmentation": "none",
    "data.seed": 1,
    "federation.num_rounds": 4,
    "federation.client_fraction": 0.75,
    "federation.local_epochs": 2,
    "federation.lr_decay": 0.5,
    "federation.aggregation": "uniform",
    "federation.trim_fraction": 0.2,
    "federation.max_update_norm": 3.0,
    "federation.server_optimizer": "adam",
    "federation.server_lr": 0.3,
    "federation.server_momentum": 0.8,
    "federation.server_beta2": 0.9,
    "federation.server_tau": 0.01,
    "federation.min_success_fraction": 0.9,
    "federation.max_failed_rounds": 7,
    "federation.eval_interval": 3,
    "federation.early_stopping": 2,
    "trainer.accelerator": "cuda",
    "trainer.devices": [0],
    "trainer.precision": "64-true",
    "trainer.memory_format": "channels_last",
    "trainer.compile": True,
    "trainer.deterministic": True,
}
"""Every option with another value than the tests have; one that is new belongs here."""


def described(**changes: Any) -> dict[str, Any]:
    """The options of a run, some of them changed where they are kept; nothing is trained or checked."""
    data, module = tiny_data(), make(FedAMM, tiny_data())
    groups: dict[str, dict[str, Any]] = {"algorithm": {}, "data": {}, "federation": {}, "trainer": {}}
    for name, value in changes.items():
        if name != "seed":
            group, _, option = name.partition(".")
            groups[group][option] = value
    module.hparams.update(groups["algorithm"])
    data.hparams.update(groups["data"])
    config = dataclasses.replace(FederationConfig(3, server_optimizer="yogi"), **groups["federation"])
    trainer = dataclasses.replace(CPU, **groups["trainer"])
    return options(module, data, config, trainer, changes.get("seed", 0))


def test_every_option_is_in_the_list_above() -> None:
    assert set(OTHER) == set(described()) - {"algorithm", "data"}
    assert {field.name for field in dataclasses.fields(FederationConfig)} == {
        name.removeprefix("federation.") for name in OTHER if name.startswith("federation.")
    }
    assert {field.name for field in dataclasses.fields(TrainerConfig)} == {
        name.removeprefix("trainer.") for name in OTHER if name.startswith("trainer.")
    }
    assert set(OTHER) >= NEUTRAL


@pytest.mark.parametrize("name", OTHER)
def test_every_option_is_another_run_but_those_that_change_no_bit(name: str) -> None:
    before, after = (fingerprint(found, "content") for found in (described(), described(**{name: OTHER[name]})))
    found = differences(before, after)
    if name in NEUTRAL:
        assert found == []
        return
    (line,) = found
    assert line.startswith(f"{name} is ")


RESUMED = sorted(
    set(OTHER)
    # without a GPU and a compiler they cannot be had, or the network or the data are others
    - {"trainer.accelerator", "trainer.compile", "algorithm.num_classes", "algorithm.in_channels", "data.shot_ranges"}
    - {"trainer.devices", "data.dataset", "data.root"}
    - {"data.partition_file"}  # goes with another partition alone
    - {"federation.early_stopping"}  # which needs a validation set: tests/federation/test_validation.py
)


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("started")
    resumed({}, folder).run()
    return folder


def resumed(changes: dict[str, Any], folder: Path) -> Any:
    groups: dict[str, dict[str, Any]] = {"algorithm": {}, "data": {}, "federation": {}, "trainer": {}, "": {}}
    for name, value in changes.items():
        group, _, option = name.rpartition(".")
        groups[group][option] = value
    trainer = dataclasses.replace(CPU, **groups["trainer"])
    method = {"differentiation": "forward", "local_optimizer": "asam", **groups["algorithm"]}
    more = {"num_rounds": 3, "server_optimizer": "yogi", **groups["federation"], **groups[""]}
    return federation(FedAMM, tiny_data(**groups["data"]), method, trainer=trainer, output_dir=folder, **more)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_with_another_option_is_not_continued(name: str, started: Path) -> None:
    run = resumed({name: OTHER[name]}, started)
    if name in NEUTRAL:
        with run.opened() as seen:
            assert seen.state.round_num == 3
        return
    with (
        pytest.raises(ValueError, match=rf"to hold a run with the same options, got others: .*\b{name} is "),
        run.opened(),
    ):
        pass


def test_other_images_of_the_same_options_are_refused(started: Path) -> None:
    class Changed(TinyData):
        pass

    run = resumed({}, started)
    run.data.images.test_images[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match=r"data \(content\) is '\w+' but was"), run.opened():
        pass


def test_the_version_is_a_part_of_it() -> None:
    assert fingerprint({}, "0") == {"fedamm_pl": __version__, "data (content)": "0"}


def test_differences_are_one_line_each_in_order() -> None:
    saved, current = {"b": 1, "a": 2, "gone": 3}, {"a": 2, "b": "1", "new": None}
    assert differences(saved, current) == ["b is '1' but was 1", "gone is None but was 3"]
    assert differences(saved, dict(saved)) == []


def test_options_are_primitive_and_a_class_of_ones_own_has_its_module(tmp_path: Path) -> None:
    class WithPath(TinyData):
        def __init__(self, folder: Path, **more: Any) -> None:
            super().__init__(**more)

    data = WithPath(folder=tmp_path, num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
    module = make(FedAMM, data, model=tiny_resnet(4, 1))
    found = options(module, data, FederationConfig(1), CPU, 0)
    assert found["data.folder"] == str(tmp_path)
    assert found["data"].startswith("tests.federation.test_fingerprint.") or found["data"].endswith("WithPath")
    assert found["algorithm"] == "FedAMM"
    assert found["algorithm.model"] == "ResNetCIFAR"
    plain = (bool, int, float, str, list, dict, type(None))
    assert [name for name, value in found.items() if type(value) not in plain] == []


def test_options_that_are_no_primitives_survive_a_checkpoint(tmp_path: Path) -> None:
    class WithPath(TinyData):
        def __init__(self, folder: Path, **more: Any) -> None:
            super().__init__(**more)

    for num_rounds in (1, 2):
        data = WithPath(folder=tmp_path, num_clients=4, num_meta_per_class=2, imbalance_factor=0.2)
        federation(data=data, num_rounds=num_rounds, output_dir=tmp_path).run()
    assert (tmp_path / "checkpoints/round_000002.ckpt").exists()


def test_a_configuration_is_flattened_to_the_same_names() -> None:
    config = {
        "seed": 1,
        "algorithm": {"class_path": "fedamm_pl.algorithms.FedAMM", "init_args": {"lr": 0.1}},
        "federation": {"num_rounds": 3},
        "logger": [{"class_path": "a.B"}],
    }
    assert flatten(config) == {
        "seed": 1,
        "algorithm": "FedAMM",
        "algorithm.lr": 0.1,
        "federation.num_rounds": 3,
        "logger": [{"class_path": "a.B"}],
    }


def test_precision_auto_is_what_it_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    run = federation(trainer=TrainerConfig("auto"))
    with run.opened() as seen:
        assert seen.options["trainer.precision"] == "bf16-mixed"
        assert seen.options["trainer.accelerator"] == run.trainer.kind
