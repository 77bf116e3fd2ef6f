"""The shipped configurations, the options of the command line, and what comes in by import path."""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, __version__, algorithms
from fedamm_pl.cli.main import build_parser, main
from fedamm_pl.data.sources import ImageData
from fedamm_pl.losses import example_losses

CONFIGS = Path(__file__).parent.parent / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml") if not path.name.startswith("compare"))
PAPER = [
    f"{method}_{data}.yaml" for method in ("fedamm", "fedavg") for data in ("cifar10", "cifar100", "fashion_mnist")
]


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(list(arguments))


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


class OwnNet(nn.Sequential):
    """A network for any images, not registered by name."""

    def __init__(self, num_classes: int, in_channels: int) -> None:
        super().__init__(
            nn.Conv2d(in_channels, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, num_classes),
        )


class OwnData(FederatedDataModule):
    """Two classes of grey images, dark and bright, with an option of its own.

    Args:
        images_per_class: Images of each class, for training and for testing.
        options: Those of every data module.
    """

    def __init__(self, images_per_class: int = 30, **options: Any) -> None:
        super().__init__(**options)
        self.images_per_class = images_per_class

    def load_images(self) -> ImageData:
        labels = torch.arange(2).repeat_interleave(self.images_per_class)
        images = (200 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
        return ImageData(images, labels, images, labels, ["dark", "bright"])


class UnweightedSum(FedAvg):
    """FedAvg with another loss, by one overridden hook."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        losses = example_losses(self(images), labels)
        self.track(len(labels), loss=losses.sum())
        return losses.sum()


# The shipped configurations


def test_own_network_in_the_working_folder_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Any
) -> None:
    (tmp_path / "network_beside_me.py").write_text(
        "from torch import nn\n\n\ndef build(num_classes, in_channels):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(in_channels * 144, num_classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    main(command("FedAvg", "run", "--algorithm.model", "network_beside_me.build", "--federation.num_rounds", "1"))
    assert (tmp_path / "run/final.ckpt").exists()


def test_the_shipped_configurations_are_these() -> None:
    others = "class_balanced climb creff fedetf fedfocal fedlc fednova fedprox logit_adjusted meta_finetune meta_weight_net moon"
    others += " ratio_loss scaffold"
    assert sorted([*PAPER, *(f"{name}_fashion_mnist.yaml" for name in others.split()), "quickstart.yaml"]) == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_a_configuration_parses_and_resolves_to_itself(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = printed_config(capsys, "--config", str(CONFIGS / name))
    (tmp_path / "resolved.yaml").write_text(resolved)
    assert printed_config(capsys, "--config", str(tmp_path / "resolved.yaml")) == resolved
    written = yaml.safe_load((CONFIGS / name).read_text())["data"]
    assert yaml.safe_load(resolved)["data"]["init_args"].items() >= written.items()


@pytest.mark.parametrize("name", PAPER)
def test_a_configuration_has_the_settings_of_the_paper(name: str) -> None:
    config = parse("--config", str(CONFIGS / name))
    method, dataset = name.removesuffix(".yaml").split("_", 1)
    data, algorithm = config.data.init_args, config.algorithm.init_args
    assert config.algorithm.class_path == {"fedamm": "fedamm_pl.FedAMM", "fedavg": "fedamm_pl.FedAvg"}[method]
    assert data.dataset == dataset
    assert (data.num_clients, data.partition) == (20, "by_num_classes")
    assert (data.imbalance_factor, data.imbalance_profile) == (0.01, "exponential")
    assert (data.num_meta_per_class, data.batch_size, data.augmentation) == (10, 64, "crop_flip")
    assert data.shot_rule == ("counts" if dataset == "cifar100" else "share")
    assert (algorithm.model, algorithm.lr) == ("resnet32", 0.01)
    assert (algorithm.momentum, algorithm.weight_decay) == (0.9, 5e-4)
    assert (config.federation.num_rounds, config.federation.client_fraction) == (500, 0.5)
    assert (config.federation.local_epochs, config.federation.aggregation) == (5, "num_examples")
    assert config.seed == 0
    if method == "fedamm":
        assert (algorithm.meta_lr, algorithm.meta_update) == (0.01, "asynchronous")


@pytest.mark.parametrize("name", PAPER[:3])
def test_both_methods_get_the_same_data_and_rounds(name: str) -> None:
    fedamm, fedavg = (
        parse("--config", str(CONFIGS / name.replace("fedamm", method))) for method in ("fedamm", "fedavg")
    )
    assert fedamm.data == fedavg.data
    assert fedamm.federation == fedavg.federation
    assert fedamm.trainer == fedavg.trainer


def test_the_quickstart_needs_no_download() -> None:
    config = parse("--config", str(CONFIGS / "quickstart.yaml"))
    assert config.algorithm.class_path == "fedamm_pl.FedAMM"
    assert config.data.init_args.dataset == "fashion_mnist_mini"
    assert config.data.init_args.shot_rule == "share"


# Options

OPTIONS = [
    ("seed", "7", 7),
    ("data.dataset", "cifar100", "cifar100"),
    ("data.root", "elsewhere", "elsewhere"),
    ("data.imbalance_factor", "0.02", 0.02),
    ("data.num_clients", "7", 7),
    ("data.partition", "by_dirichlet", "by_dirichlet"),
    ("data.num_meta_per_class", "7", 7),
    ("data.batch_size", "7", 7),
    ("data.shot_rule", "counts", "counts"),
    ("algorithm.lr", "0.7", 0.7),
    ("algorithm.model", "resnet20", "resnet20"),
    ("algorithm.meta_lr", "0.7", 0.7),
    ("algorithm.meta_update", "synchronous", "synchronous"),
    ("algorithm.meta_interval", "7", 7),
    ("algorithm.differentiation", "functional", "functional"),
    ("federation.num_rounds", "7", 7),
    ("federation.client_fraction", "0.7", 0.7),
    ("federation.local_epochs", "7", 7),
    ("federation.eval_interval", "7", 7),
    ("trainer.accelerator", "gpu", "gpu"),
    ("trainer.precision", "bf16-mixed", "bf16-mixed"),
    ("output.dir", "elsewhere", "elsewhere"),
]


def value_of(config: Namespace, option: str) -> Any:
    group, _, name = option.partition(".")
    return config[f"{group}.init_args.{name}" if group in ("data", "algorithm") else option]


@pytest.mark.parametrize(("option", "text", "expected"), OPTIONS)
def test_an_option_overrides_the_configuration(option: str, text: str, expected: Any) -> None:
    configuration = ("--config", str(CONFIGS / "fedamm_cifar10.yaml"))
    config = parse(*configuration, f"--{option}", text)
    assert value_of(parse(*configuration), option) != expected
    assert value_of(config, option) == expected
    if option == "seed":
        assert config.data.init_args.seed == expected


def test_an_option_leaves_the_others_as_configured() -> None:
    configuration = ("--config", str(CONFIGS / "fedamm_cifar10.yaml"))
    before, after = parse(*configuration), parse(*configuration, "--algorithm.lr", "0.7", "--data.num_clients", "7")
    after.algorithm.init_args.lr, after.data.init_args.num_clients = 0.01, 20
    assert after == before


def test_a_later_configuration_overrides_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "later.yaml").write_text("federation:\n  num_rounds: 7\n")
    config = parse("--config", str(CONFIGS / "fedamm_cifar10.yaml"), "--config", str(tmp_path / "later.yaml"))
    assert (config.federation.num_rounds, config.federation.local_epochs) == (7, 5)
    assert config.algorithm.class_path == "fedamm_pl.FedAMM"


@pytest.mark.parametrize("algorithm", [FedAMM, FedAvg])
def test_an_algorithm_is_chosen_by_name_or_path(algorithm: type) -> None:
    for name in (algorithm.__name__, f"fedamm_pl.{algorithm.__name__}", f"{algorithm.__module__}.{algorithm.__name__}"):
        config = parse("--algorithm", name, "--federation.num_rounds", "1")
        assert config.algorithm.class_path.rpartition(".")[2] == algorithm.__name__
        assert config.algorithm.init_args.lr == 0.01


# What ends the program at once


def test_help_shows_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    groups = ("seed", "algorithm", "federation", "trainer", "output")
    assert not [
        name for name, *_ in OPTIONS if name.partition(".")[0] not in ("data", "algorithm") and name not in text
    ]
    assert not [name for name in groups if f"--{name}" not in text]
    assert "Folder of the run" in text


@pytest.mark.parametrize(
    ("request_", "group"), [(["--data.help"], "data"), (["--algorithm.help", "FedAMM"], "algorithm")]
)
def test_help_of_a_class_shows_its_options(request_: list[str], group: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(request_)
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert not [name for name, *_ in OPTIONS if name.startswith(f"{group}.") and f"--{name} " not in text]


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert __version__ in capsys.readouterr().out


def test_the_printed_configuration_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printed = printed_config(capsys, "--algorithm", "FedAMM", "--algorithm.lr", "0.7", "--federation.num_rounds", "7")
    (tmp_path / "printed.yaml").write_text(printed)
    config = parse("--config", str(tmp_path / "printed.yaml"))
    assert (config.algorithm.init_args.lr, config.federation.num_rounds) == (0.7, 7)
    assert printed_config(capsys, "--config", str(tmp_path / "printed.yaml")) == printed


# By import path


def test_an_own_network_comes_in_by_import_path(command: Any, tmp_path: Path) -> None:
    main(command("FedAMM", tmp_path, "--algorithm.model", f"{__name__}.OwnNet", "--federation.num_rounds", "1"))
    assert json.loads((tmp_path / "summary.json").read_text())["model"] == f"{__name__}.OwnNet"
    module = FedAMM.load_from_checkpoint(tmp_path / "final.ckpt", weights_only=True)
    assert isinstance(module.model, OwnNet)


def test_an_own_algorithm_comes_in_by_import_path(command: Any, tmp_path: Path) -> None:
    main(command("FedAvg", tmp_path, "--algorithm", f"{__name__}.UnweightedSum", "--federation.num_rounds", "1"))
    content = json.loads((tmp_path / "summary.json").read_text())
    assert (content["method"], content["model"]) == ("UnweightedSum", "small_cnn")


def test_an_own_data_module_comes_in_by_class_path(tmp_path: Path) -> None:
    config = {
        "data": {
            "class_path": f"{__name__}.OwnData",
            "init_args": {"images_per_class": 25, "num_clients": 3, "num_meta_per_class": 5, "imbalance_factor": 0.5},
        },
        "algorithm": {"class_path": "FedAvg", "init_args": {"model": f"{__name__}.OwnNet"}},
        "federation": {"num_rounds": 1, "local_epochs": 1},
        "trainer": {"accelerator": "cpu"},
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    main(["--config", str(tmp_path / "own.yaml"), "--output.dir", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run/summary.json").read_text())["class_counts"] == [20, 10]
    module = FedAvg.load_from_checkpoint(tmp_path / "run/final.ckpt", weights_only=True)
    assert module.info["class_names"] == ["dark", "bright"]
    assert module.hparams["in_channels"] == 1


def test_an_option_of_an_own_data_module_guards_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--data", f"{__name__}.OwnData", "--data.num_clients", "2", "--data.num_meta_per_class", "5"]
    options += ["--data.imbalance_factor", "1", "--algorithm", "FedAvg", "--algorithm.model", f"{__name__}.OwnNet"]
    options += ["--federation.num_rounds", "0", "--trainer.accelerator", "cpu", "--output.dir", str(tmp_path)]
    main(options)
    with pytest.raises(SystemExit) as stop:
        main([*options, "--data.images_per_class", "25"])
    assert stop.value.code == 2
    assert "data.images_per_class is 25 but was 30" in capsys.readouterr().err


def test_a_list_of_loggers_replaces_tensorboard(command: Any, tmp_path: Path) -> None:
    loggers = [
        {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {"save_dir": str(tmp_path), "name": name}}
        for name in ("first", "second")
    ]
    (tmp_path / "loggers.yaml").write_text(yaml.safe_dump({"logger": loggers}))
    run = tmp_path / "run"
    main([*command("FedAMM", run, "--federation.num_rounds", "2"), "--config", str(tmp_path / "loggers.yaml")])
    with (run / "metrics.csv").open() as file:
        expected = [float(row["test/acc"]) for row in csv.DictReader(file)]
    for name in ("first", "second"):
        with (tmp_path / name / "version_0/metrics.csv").open() as file:
            logged = [float(row["test/acc"]) for row in csv.DictReader(file) if row["test/acc"]]
        assert logged == expected
        hyperparameters = yaml.safe_load((tmp_path / name / "version_0/hparams.yaml").read_text())
        assert hyperparameters["algorithm.lr"] == 0.05
    assert not list(run.glob("events.*"))


def test_the_shipped_comparison_names_every_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[Any] = []
    monkeypatch.setattr("fedamm_pl.cli.main.execute", lambda runs, jobs: planned.extend(runs) or [])
    main(["compare", "--config", str(CONFIGS / "compare_fashion_mnist.yaml"), "--dir", str(tmp_path)])
    configs = [yaml.safe_load(run.config) for run in planned]
    methods = {config["algorithm"]["class_path"].rpartition(".")[2] for config in configs}
    assert methods == set(algorithms.__all__) - {"ClassPriorModule", "FederatedModule"}
    assert len(configs) == 16 * 3 * 2
    assert {config["federation"]["num_rounds"] for config in configs} == {40}
