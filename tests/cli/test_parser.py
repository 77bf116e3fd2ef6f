"""Options of the command line and of configuration files: what overrides what, how classes are chosen, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from fedamm_pl import FedAMM, FedAvg
from fedamm_pl.cli.main import main
from fedamm_pl.cli.parser import build_parser, dump
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Processes, Sequential

CONFIGS = Path(__file__).parent.parent.parent / "configs"
CONFIG = ("--config", str(CONFIGS / "data/cifar10.yaml"), "--config", str(CONFIGS / "method/fedamm.yaml"))
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
    ("federation.aggregation", "median", "median"),
    ("trainer.accelerator", "gpu", "gpu"),
    ("trainer.precision", "bf16-mixed", "bf16-mixed"),
    ("output.dir", "elsewhere", "elsewhere"),
]


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(list(arguments))


def value_of(config: Namespace, option: str) -> Any:
    group, _, name = option.partition(".")
    return config[f"{group}.init_args.{name}" if group in ("data", "algorithm") else option]


@pytest.mark.parametrize(("option", "text", "expected"), OPTIONS)
def test_an_option_overrides_the_configuration(option: str, text: str, expected: Any) -> None:
    configuration = CONFIG
    config = parse(*configuration, f"--{option}", text)
    assert value_of(parse(*configuration), option) != expected
    assert value_of(config, option) == expected
    if option == "seed":
        assert config.data.init_args.seed == expected


def test_an_option_leaves_the_others_as_configured() -> None:
    configuration = CONFIG
    before, after = parse(*configuration), parse(*configuration, "--algorithm.lr", "0.7", "--data.num_clients", "7")
    after.algorithm.init_args.lr, after.data.init_args.num_clients = 0.01, 20
    assert after == before


def test_a_later_configuration_overrides_an_earlier_one(tmp_path: Path) -> None:
    (tmp_path / "later.yaml").write_text("federation:\n  num_rounds: 7\n")
    config = parse(*CONFIG, "--config", str(tmp_path / "later.yaml"))
    assert (config.federation.num_rounds, config.federation.local_epochs) == (7, 5)
    assert config.algorithm.class_path == "fedamm_pl.FedAMM"


@pytest.mark.parametrize("algorithm", [FedAMM, FedAvg])
def test_an_algorithm_is_chosen_by_name_or_path(algorithm: type) -> None:
    for name in (algorithm.__name__, f"fedamm_pl.{algorithm.__name__}", f"{algorithm.__module__}.{algorithm.__name__}"):
        config = parse("--algorithm", name, "--federation.num_rounds", "1")
        assert config.algorithm.class_path.rpartition(".")[2] == algorithm.__name__
        assert config.algorithm.init_args.lr == 0.01


@pytest.mark.parametrize("executor", [Sequential, Processes])
def test_an_executor_is_chosen_by_name_path_or_mapping(executor: type, tmp_path: Path) -> None:
    words = ["--algorithm", "FedAvg", "--federation.num_rounds", "1"]
    name, path = executor.__name__, f"fedamm_pl.federation.executors.{executor.__name__}"
    (tmp_path / "name.yaml").write_text(f"executor: {name}\n")
    (tmp_path / "mapping.yaml").write_text(f"executor: {{class_path: {name}}}\n")
    for more in (
        ["--executor", name],
        ["--executor", path],
        ["--config", str(tmp_path / "name.yaml")],
        ["--config", str(tmp_path / "mapping.yaml")],
    ):
        assert parse(*words, *more).executor.class_path == path
    assert parse(*words).executor.class_path == "fedamm_pl.federation.executors.Sequential"


def test_options_of_an_executor_are_set_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "executor.yaml").write_text(
        "executor: {class_path: Processes, init_args: {num_workers: 3, max_retries: 0}}"
    )
    words = ["--algorithm", "FedAvg", "--federation.num_rounds", "1", "--config", str(tmp_path / "executor.yaml")]
    parser = build_parser()
    config = parser.parse_args([*words, "--executor.client_timeout", "5"])
    options = {"num_workers": 3, "threads_per_worker": None, "client_timeout": 5.0, "max_retries": 0}
    assert vars(config.executor.init_args) == options
    assert (
        yaml.safe_load(dump(parser, config))["executor"]["init_args"].items()
        >= {"num_workers": 3, "max_retries": 0}.items()
    )
    config.pop("algorithm")
    made = parser.instantiate(config.clone())
    assert isinstance(made.executor, Processes)
    assert (made.executor.num_workers, made.executor.client_timeout) == (3, 5.0)
    assert made.federation == FederationConfig(num_rounds=1)


def test_the_printed_configuration_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0
        return capsys.readouterr().out

    text = printed("--algorithm", "FedAMM", "--algorithm.lr", "0.7", "--federation.num_rounds", "7")
    (tmp_path / "printed.yaml").write_text(text)
    config = parse("--config", str(tmp_path / "printed.yaml"))
    assert (config.algorithm.init_args.lr, config.federation.num_rounds) == (0.7, 7)
    assert printed("--config", str(tmp_path / "printed.yaml")) == text
