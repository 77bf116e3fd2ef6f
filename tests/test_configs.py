"""The shipped configurations: each one parses, and says what its name does."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import Namespace

from fedamm_pl.cli.compare import resolver
from fedamm_pl.cli.main import main
from fedamm_pl.cli.options import OFFERED
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.cli.shipped import expanded, names
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.results.comparison import plan
from fedamm_pl.results.comparison_config import CompareConfig, TuningConfig
from fedamm_pl.results.tuning import plan_trials

CONFIGS = Path(__file__).parent.parent / "configs"
ALONE = ["cifar10_small", "fedamm_digits", "quickstart"]
DATA = ["cifar10", "cifar100", "fashion_mnist"]
METHODS = sorted(path.stem for path in CONFIGS.glob("method/*.yaml"))


def parse(*arguments: str) -> Namespace:
    return build_parser().parse_args(expanded(arguments))


def printed_config(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--print_config"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_the_shipped_configurations_are_these() -> None:
    found = sorted(path.stem for path in CONFIGS.glob("*.yaml") if not path.name.startswith("compare"))
    assert found == ALONE
    assert names("data") == DATA
    assert names("method") == METHODS
    others = {"FedAvg": ["fedadagrad", "fedadam", "fedasam", "fedavg", "fedavgm", "fedsam", "fedyogi"]}
    others["FedAMM"] = ["fedamm", "meta_weight_net"]
    by_class: dict[str, list[str]] = {}
    for name in METHODS:
        config = yaml.safe_load((CONFIGS / f"method/{name}.yaml").read_text())
        by_class.setdefault(config["algorithm"]["class_path"], []).append(name)
    assert by_class.keys() == {method.__name__ for method in OFFERED["algorithm"]}
    assert {method: found for method, found in by_class.items() if len(found) > 1} == others


@pytest.mark.parametrize("words", [["--config", name] for name in ALONE], ids=ALONE)
def test_a_configuration_alone_resolves_to_itself(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    check_resolved(words, tmp_path, capsys)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("data", ["fashion_mnist", "cifar100"])
def test_every_method_goes_with_every_data_set(
    method: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    resolved = check_resolved(["--method", method, "--data", data], tmp_path, capsys)
    files = [yaml.safe_load((CONFIGS / name).read_text()) for name in (f"data/{data}.yaml", f"method/{method}.yaml")]
    written: dict[str, Any] = {}
    for file in files:
        for group in ("data", "federation"):
            written[group] = {**written.get(group, {}), **file.get(group, {})}
    assert resolved["data"]["init_args"].items() >= written["data"].items()
    assert resolved["federation"].items() >= written["federation"].items()
    own = files[1]["algorithm"]["init_args"]
    assert resolved["algorithm"]["init_args"].items() >= {"model": "resnet32", **own}.items()


def check_resolved(words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    resolved = printed_config(capsys, *words)
    (folder / "resolved.yaml").write_text(resolved)
    assert printed_config(capsys, "--config", str(folder / "resolved.yaml")) == resolved
    content: dict[str, Any] = yaml.safe_load(resolved)
    return content


@pytest.mark.parametrize("method", ["fedamm", "fedavg"])
@pytest.mark.parametrize("dataset", DATA)
def test_data_and_method_have_the_settings_of_the_paper(dataset: str, method: str) -> None:
    config = parse("--data", dataset, "--method", method)
    data, algorithm = config.data.init_args, config.algorithm.init_args
    assert config.algorithm.class_path == {"fedamm": "fedamm_pl.FedAMM", "fedavg": "fedamm_pl.FedAvg"}[method]
    assert data.dataset == dataset
    assert (data.num_clients, data.partition) == (20, "by_num_classes")
    assert (data.imbalance_factor, data.imbalance_profile) == (0.01, "exponential")
    assert (data.num_meta_per_class, data.batch_size, data.augmentation) == (10, 64, None)  # crop_flip for images
    assert data.shot_rule == ("counts" if dataset == "cifar100" else "share")
    assert (algorithm.model, algorithm.lr) == ("resnet32", 0.01)
    assert (algorithm.momentum, algorithm.weight_decay) == (0.9, 5e-4)
    assert (config.federation.num_rounds, config.federation.client_fraction) == (500, 0.5)
    assert (config.federation.local_epochs, config.federation.aggregation) == (5, "num_examples")
    assert config.seed == 0
    if method == "fedamm":
        assert (algorithm.meta_lr, algorithm.meta_update) == (0.01, "asynchronous")


def test_what_a_method_says_of_the_data_holds_in_either_order() -> None:
    for words in (["--method", "meta_weight_net", "--data", "cifar10"], ["--data=cifar10", "--method=meta_weight_net"]):
        config = parse(*words)
        assert (config.data.init_args.num_clients, config.data.init_args.partition) == (1, "iid")
        assert config.federation.num_rounds == 200


def test_options_after_the_names_win() -> None:
    config = parse("--data", "cifar10", "--method", "fedprox", "--algorithm.mu", "0.5", "--data.num_clients", "7")
    assert (config.algorithm.init_args.mu, config.data.init_args.num_clients) == (0.5, 7)


def test_shipped_configurations_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = printed_config(capsys, "--config", str(CONFIGS / "quickstart.yaml"))
    for name in ("quickstart", "quickstart.yaml", "configs/quickstart.yaml"):
        assert printed_config(capsys, "run", "--config", name) == expected
    (tmp_path / "quickstart").mkdir()  # a folder of runs, say
    assert printed_config(capsys, "--config", "quickstart") == expected
    (tmp_path / "quickstart").rmdir()
    (tmp_path / "quickstart").write_text("algorithm: FedAvg\n")  # a file of one's own goes before
    assert "class_path: fedamm_pl.FedAvg" in printed_config(capsys, "--config", "quickstart")


def test_an_unknown_method_is_refused_with_those_like_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--data", "cifar10", "--method", "scafold"])
    assert stop.value.code == 2
    assert "Expected --method to be one of the shipped methods, like scaffold" in capsys.readouterr().err


def test_a_class_of_data_is_no_name() -> None:
    assert expanded(["--data", "FederatedDataModule", "--algorithm", "FedAvg"])[:2] == ["--data", "FederatedDataModule"]


def test_the_list_of_methods_has_a_line_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--method.help"])
    shown = capsys.readouterr().out
    assert [name for name in METHODS if f"  {name} " not in shown] == []


def test_the_quickstart_needs_no_download() -> None:
    config = parse("--config", "quickstart")
    assert config.algorithm.class_path == "fedamm_pl.FedAMM"
    assert config.data.init_args.dataset == "fashion_mnist_mini"
    assert config.data.init_args.shot_rule == "share"


def test_the_small_configuration_of_cifar10_has_the_data_of_the_large_one_and_less_work() -> None:
    small, large = parse("--config", "cifar10_small"), parse("--data", "cifar10", "--method", "fedamm")
    assert small.data == large.data
    assert (small.algorithm.class_path, small.algorithm.init_args.model) == ("fedamm_pl.FedAMM", "small_cnn")
    assert small.federation.client_fraction == large.federation.client_fraction
    rounds = [config.federation.num_rounds * config.federation.local_epochs for config in (small, large)]
    assert rounds[0] < 0.3 * rounds[1]


def test_the_table_needs_no_download_and_fits_its_options(tmp_path: Path) -> None:
    config = parse("--config", "fedamm_digits")
    assert config.algorithm.class_path == "fedamm_pl.FedAMM"
    assert config.algorithm.init_args.model == "mlp"
    data = FederatedDataModule(**config.data.init_args.as_dict())
    assert data.info["image_size"] == []
    assert data.in_channels == len(data.info["mean"]) == 64
    assert data.imbalance_factor == pytest.approx(config.data.init_args.imbalance_factor, rel=0.1)


def test_the_shipped_comparison_is_of_the_recorded_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    planned: list[Any] = []
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda runs, *_, **__: planned.extend(runs) or [])
    main(["compare", "--config", str(CONFIGS / "compare_fashion_mnist.yaml"), "--dir", str(tmp_path)])
    configs = [yaml.safe_load(run.config) for run in planned]
    methods = {config["algorithm"]["class_path"].rpartition(".")[2] for config in configs}
    recorded = json.loads((CONFIGS.parent / "docs/compare_fashion_mnist.json").read_text())
    assert methods == {run["method"] for run in recorded.values()}
    assert methods <= {method.__name__ for method in OFFERED["algorithm"]}
    assert len(configs) == len(recorded) == 16 * 3 * 2
    assert {config["federation"]["num_rounds"] for config in configs} == {40}


def test_the_shipped_variants_are_of_the_same_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[Any] = []
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda runs, *_, **__: planned.extend(runs) or [])
    rest = []
    for name in ("compare_fashion_mnist", "compare_variants_fashion_mnist"):
        planned.clear()
        main(["compare", "--config", str(CONFIGS / f"{name}.yaml"), "--dir", str(tmp_path / name)])
        configs = [yaml.safe_load(run.config) for run in planned]
        rest.append([{**config, "algorithm": None, "output": None} for config in configs])
    assert len(rest[1]) == 4 * 3 * 2
    assert all(config in rest[0] for config in rest[1])


@pytest.mark.parametrize("data", ["letter", "fashion_mnist"])
def test_the_centralised_comparisons_have_one_client_ten_seeds_and_the_five_methods(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: list[Any] = []
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda runs, *_, **__: planned.extend(runs) or [])
    main(["compare", "--config", str(CONFIGS / f"protocol/centralised_{data}.yaml"), "--dir", str(tmp_path)])
    configs = [yaml.safe_load(run.config) for run in planned]
    methods = [config["algorithm"]["class_path"].rpartition(".")[2] for config in configs]
    assert {name: methods.count(name) for name in methods} == {
        "FedAvg": 10,
        "MetaFineTune": 10,
        "FedAMM": 20,
        "LogitAdjusted": 10,
    }
    options = [config["data"]["init_args"] for config in configs]
    assert {(of["num_clients"], of["partition"], of["num_meta_per_class"]) for of in options} == {(1, "iid", 10)}
    mapped = [
        config["algorithm"]["init_args"] for config in configs if config["algorithm"]["class_path"].endswith("FedAMM")
    ]
    assert {(of["meta_update"], of["meta_interval"]) for of in mapped} == {("synchronous", 1)}
    assert [of.get("families") for of in mapped].count("fixed") == 10


@pytest.mark.parametrize(
    ("name", "num_candidates", "num_tables"), [("tables", 8, 6), ("communication", 6, 6), ("fashion_mnist", 4, 0)]
)
def test_the_protocol_tunes_all_methods_as_much_and_groups_them_all(
    name: str, num_candidates: int, num_tables: int, tmp_path: Path
) -> None:
    content = yaml.safe_load((CONFIGS / f"protocol/{name}.yaml").read_text())
    tables = content.pop("grid", {})
    assert len(tables.get("data.dataset", ())) == num_tables
    one = {option: values[:1] for option, values in tables.items()}  # they differ in nothing else
    config = CompareConfig(**{**content, "grid": one, "tuning": TuningConfig(**content["tuning"])})
    assert config.tuning is not None
    if name == "communication":  # all of them are tuned, and of one kind
        assert set(config.tuning.methods) == set(config.methods)
    else:
        assert set(config.tuning.methods) == {method for method in config.methods if method.endswith(", tuned")}
        assert sorted(name for names in config.groups.values() for name in names) == sorted(config.methods)
    resolve = resolver()
    runs, trials = plan(config, tmp_path, resolve), plan_trials(config, tmp_path, resolve)
    assert len(trials) == len(config.tuning.methods) * num_candidates
    assert {run.seed for run in runs} == set(range(10))
    data = [yaml.safe_load(run.config)["data"]["init_args"] for run in runs + [trial.run for trial in trials]]
    assert all(options["num_val_per_class"] and options["num_meta_per_class"] == 10 for options in data)
