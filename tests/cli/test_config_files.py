"""Configuration files and values: of the command's own kind, of a bounded size, and with a home."""

import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedamm_pl.cli.config_files import MAX_VALUES, check_size
from fedamm_pl.cli.main import main
from fedamm_pl.results.runs import load, load_all
from tests.faults.test_foreign_folders import LAUGHS, MERGES
from tests.federation.small import federation
from tests.results.handmade import a_run

ROOT = Path(__file__).parents[2]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    begun = time.monotonic()
    with pytest.raises(SystemExit) as stop:
        main(words)
    printed = capsys.readouterr()
    assert time.monotonic() - begun < 20
    assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    return printed.err


@pytest.mark.parametrize("bomb", [LAUGHS, MERGES])
@pytest.mark.parametrize(
    "where", ["file", "named by a file", "file of a group", "value", "compare", "value of compare"]
)
def test_a_few_aliases_do_not_fill_the_memory(
    bomb: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bomb.yaml").write_text(f"algorithm: FedAvg\n{bomb}")
    Path("names.yaml").write_text("algorithm: FedAvg\nfederation: bomb.yaml\n")
    Path("table.yaml").write_text(f"methods: {{FedAvg: }}\nbase: {{}}\n{bomb}")
    words = {
        "file": ["--config", "bomb.yaml"],
        "named by a file": ["--config=names.yaml"],
        "file of a group": ["--algorithm", "FedAvg", "--federation", "bomb.yaml"],
        "value": ["--algorithm", "FedAvg", "--data.shot_ranges", bomb],
        "compare": ["compare", "--config", "table.yaml"],
        "value of compare": ["compare", "--base", bomb, "--methods", "{FedAvg: }"],
    }[where]
    assert "more than 100,000 values" in refusal(words, capsys)


def test_aliases_that_stand_for_little_are_fine() -> None:
    check_size("a: &a [1, 2]\nb: *a\n")
    check_size(f"a: &a {[0] * (MAX_VALUES - 10)}\n")


def test_a_file_of_the_other_kind_is_named_with_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    one, several = (str(ROOT / "configs" / name) for name in ("quickstart.yaml", "compare_fashion_mnist.yaml"))
    said = refusal(["compare", "--config", one], capsys)
    assert said.endswith(f"the options of a comparison, got those of a run: fedamm --config {one} takes them.\n")
    said = refusal([f"--config={several}"], capsys)
    assert said.endswith(
        f"the options of a run, got those of a comparison: fedamm compare --config {several} takes them.\n"
    )


def test_no_configuration_has_aliases(command: Any, fedavg_run: Path) -> None:
    assert not [
        event for event in yaml.parse((fedavg_run / "config.yaml").read_text()) if isinstance(event, yaml.AliasEvent)
    ]


# A shell expands ~ only at the start of a word.


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_a_run_goes_home(command: Any, home: Path) -> None:
    (home / "rounds.yaml").write_text("federation: {num_rounds: 0}\noutput: {dir: ~/by_file}\n")
    words = command("FedAvg", "~/by_option")
    main([*words, "--config=~/rounds.yaml"])
    before = words.index("--output.dir")
    main([*words[:before], *words[before + 2 :], "--federation.num_rounds=0", "--output.dir=~/by_option"])
    assert {path.name for path in home.iterdir()} == {"rounds.yaml", "by_file", "by_option"}
    assert list(Path().iterdir()) == []


def test_a_report_goes_home(home: Path) -> None:
    a_run(home / "run")
    main(["report", "~/run", "--output=~/page.html"])
    main(["report", "~/run"])
    assert {path.name for path in home.rglob("*.html")} == {"page.html", "report.html"}
    assert list(Path().iterdir()) == []
    assert load("~/run").path == load_all(["~/run"])[0].path == home / "run"


def test_a_comparison_goes_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedamm_pl.cli.compare.execute", lambda runs, *_, **__: [])
    content = {
        "base": {"algorithm": {"model": "small_cnn"}, "federation": {"num_rounds": 1}},
        "methods": {"FedAvg": None},
    }
    (home / "table.yaml").write_text(yaml.safe_dump({**content, "dir": "~/table"}))
    main(["compare", "--config=~/table.yaml"])
    assert (home / "table/results.csv").exists()
    assert list(Path().iterdir()) == []


def test_an_orchestrator_goes_home(home: Path) -> None:
    assert federation(output_dir="~/run").output_dir == home / "run"


def test_options_of_runs_beside_base_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "table.yaml").write_text("methods: {FedAvg: }\ndata: {dataset: digits}\n")
    with pytest.raises(SystemExit):
        main(["compare", "--config", str(tmp_path / "table.yaml")])
    assert "table.yaml to have the options of its runs below base, got data beside it." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "content", "expected"),
    [
        (["--data.seed", "3"], "", "Expected --seed in place of --data.seed, got data.seed."),
        (["--data.init_args.seed=3"], "", "Expected --seed in place of --data.seed, got data.init_args.seed."),
        (["--algorithm.num_classes", "7"], "", "Expected --algorithm.num_classes to be left to the data, got"),
        ([], "data: {seed: 3}", "Expected --seed in place of --data.seed, got data.seed."),
        ([], "data.seed: 3", "Expected --seed in place of --data.seed, got data.seed."),
        (
            [],
            "algorithm: {class_path: FedAvg, init_args: {in_channels: 1}}",
            "Expected --algorithm.in_channels to be left",
        ),
    ],
)
def test_what_follows_from_other_options_is_refused(
    words: list[str], content: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"federation: {{num_rounds: 1}}\n{content}\n")
    (tmp_path / "table.yaml").write_text("methods: {FedAvg: }\nbase: {data: {seed: 3}}\n")
    assert expected in refusal([f"--config={tmp_path / 'run.yaml'}", "--algorithm", "FedAvg", *words], capsys)
    said = refusal(["compare", f"--config={tmp_path / 'table.yaml'}"], capsys)
    assert "Expected --seed in place of --data.seed, got data.seed." in said
