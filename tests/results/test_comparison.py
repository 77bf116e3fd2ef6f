"""``fedamm compare``: its plan, its results, and one real comparison that is repeated, continued and refused."""

import csv
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import yaml

from fedamm_pl import FedAvg, cores
from fedamm_pl.cli import launching
from fedamm_pl.cli.launching import execute, start
from fedamm_pl.cli.main import main
from fedamm_pl.results.comparison import (
    CompareConfig,
    PlannedRun,
    check_folders,
    file_name,
    merged,
    nested,
    plan,
)
from fedamm_pl.results.comparison_files import rows, settings, write_results
from tests.results.handmade import a_summary

Options = dict[str, Any]


# The plan.


def resolve(options: Options) -> tuple[str, int]:
    return yaml.safe_dump(options), options.get("federation", {}).get("num_rounds", 5)


def planned(**options: Any) -> list[PlannedRun]:
    return plan(CompareConfig(**{"base": {}, "methods": {"FedAvg": None}, **options}), Path("out"), resolve)


def options_of(run: PlannedRun) -> Options:
    return dict(yaml.safe_load(run.config))


def test_plan_is_every_setting_with_every_method_and_seed() -> None:
    grid = {"data.partition": ["iid", "by_shards"], "data.imbalance_factor": [0.1, 0.01]}
    runs = planned(methods={"FedAvg": None, "FedProx": {"mu": 0.1}}, seeds=[0, 7], grid=grid)
    assert len(runs) == 2 * 2 * 2 * 2
    assert [(run.setting["data.partition"], run.setting["data.imbalance_factor"]) for run in runs[::4]] == [
        ("iid", 0.1),
        ("iid", 0.01),
        ("by_shards", 0.1),
        ("by_shards", 0.01),
    ]
    assert [(run.method, run.seed) for run in runs[:4]] == [
        ("FedAvg", 0),
        ("FedAvg", 7),
        ("FedProx", 0),
        ("FedProx", 7),
    ]
    for run in runs:
        options = options_of(run)
        assert options["seed"] == run.seed
        assert options["data"] == {name.removeprefix("data."): value for name, value in run.setting.items()}
    assert runs[-1].folder == Path("out/partition_by_shards/imbalance_factor_0.01/FedProx/seed_7")
    assert str(runs[-1]) == "FedProx, data.partition by_shards, data.imbalance_factor 0.01, seed 7"
    assert len({run.folder for run in runs}) == len(runs)


def test_plan_without_a_grid_has_one_folder_for_each_method_and_seed() -> None:
    assert [run.folder for run in planned()] == [Path(f"out/FedAvg/seed_{seed}") for seed in (0, 1, 2)]
    assert {run.num_rounds for run in planned(base={"federation": {"num_rounds": 9}})} == {9}


def test_class_is_the_name_unless_it_is_given() -> None:
    methods = {"FedProx": {"mu": 1.0}, "strong": {"class_path": "FedProx", "mu": 9.0}, "mine": {"class_path": "a.B"}}
    found = [options_of(run)["algorithm"] for run in planned(methods=methods, seeds=[0])]
    assert found == [
        {"class_path": "FedProx", "init_args": {"mu": 1.0}},
        {"class_path": "FedProx", "init_args": {"mu": 9.0}},
        {"class_path": "a.B", "init_args": {}},
    ]


@pytest.mark.parametrize("shared", [{"lr": 0.1, "momentum": 0.5}, {"init_args": {"lr": 0.1, "momentum": 0.5}}])
@pytest.mark.parametrize("own", [{"lr": 0.3, "mu": 1.0}, {"init_args": {"lr": 0.3, "mu": 1.0}}])
def test_options_of_a_method_go_before_those_that_all_share(shared: Options, own: Options) -> None:
    base, methods = {"algorithm": shared, "seed": 99}, {"FedProx": own}
    (run,) = planned(base=base, methods=methods, seeds=[3])
    algorithm = {"class_path": "FedProx", "init_args": {"lr": 0.3, "momentum": 0.5, "mu": 1.0}}
    assert options_of(run) == {"algorithm": algorithm, "seed": 3}
    assert base == {"algorithm": shared, "seed": 99}  # nothing is changed behind the caller
    assert methods == {"FedProx": own}
    assert "lr" in (own.get("init_args") or own)


def test_a_setting_goes_before_what_all_share_and_a_method_before_a_setting() -> None:
    base = {"data": {"partition": "iid", "batch_size": 8}, "algorithm": {"lr": 0.1}}
    grid = {"data.partition": ["by_shards"], "algorithm.lr": [0.2]}
    (first, second) = planned(base=base, methods={"FedAvg": None, "FedProx": {"lr": 0.3}}, grid=grid, seeds=[0])
    assert options_of(first)["data"] == {"partition": "by_shards", "batch_size": 8}
    assert options_of(first)["algorithm"]["init_args"] == {"lr": 0.2}
    assert options_of(second)["algorithm"]["init_args"] == {"lr": 0.3}


def test_wrong_options_are_reported_with_the_method() -> None:
    def refuse(options: Options) -> tuple[str, int]:
        raise ValueError("no such option")

    with pytest.raises(ValueError, match=r"^FedAvg: no such option$"):
        plan(CompareConfig(base={}, methods={"FedAvg": None}), Path("out"), refuse)


@pytest.mark.parametrize(
    "options",
    [
        {"methods": {"FedProx, mu 1": {"class_path": "FedProx"}, "FedProx mu 1": {"class_path": "FedProx", "mu": 1.0}}},
        {"methods": {"†": {"class_path": "FedAvg"}, "‡": {"class_path": "FedProx"}}},
        {"seeds": [0, 0]},  # one run counted twice would make the spread too small
        {"grid": {"data.partition": ["iid", "iid"]}},
    ],
)
def test_no_two_runs_share_a_folder(options: Options) -> None:
    try:
        runs = planned(**{"seeds": [0], **options})
    except ValueError:
        return  # refusing them does as well
    assert len({run.folder for run in runs}) == len(runs)


@pytest.mark.parametrize("name", ["..", "../..", "/etc", "."])
def test_every_run_lies_in_the_folder_of_the_comparison(name: str) -> None:
    try:
        (run,) = planned(methods={name: {"class_path": "FedAvg"}}, seeds=[0])
    except ValueError:
        return
    assert Path("out").resolve() in run.folder.resolve().parents


@pytest.mark.parametrize("empty", [{"methods": {}}, {"seeds": []}, {"grid": {"data.partition": []}}])
def test_empty_comparisons_are_refused(empty: Options) -> None:
    with pytest.raises(ValueError, match="Expected `methods`, `seeds` and each entry of `grid` to hold something"):
        planned(**empty)


def test_fewer_jobs_than_none_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected `jobs` to be 0 or more, got -1"):
        planned(jobs=-1)


def test_without_jobs_nothing_is_run(tmp_path: Path) -> None:
    done, *others = runs = a_plan(tmp_path)
    finished(done)
    assert execute(runs, 0) == others
    assert not any(run.log.exists() for run in runs)


def test_merged_and_nested_leave_their_arguments_alone() -> None:
    options = {"data": {"a": {"b": 1}}, "c": 2}
    whole = merged(options, nested("data.a.d", 3))
    assert whole == {"data": {"a": {"b": 1, "d": 3}}, "c": 2}
    whole["data"]["a"]["b"] = 9
    assert options == {"data": {"a": {"b": 1}}, "c": 2}
    assert merged({"a": {"b": 1}}, {"a": None}) == {"a": None}
    assert merged({"a": None}, {"a": {"b": 1}}) == {"a": {"b": 1}}


@pytest.mark.parametrize(
    ("text", "name"), [("FedAvg", "FedAvg"), ("a/b\\c", "a_b_c"), ("τ = 0.5", "τ_0.5"), (" x ", "x"), ("1e-3", "1e-3")]
)
def test_file_names_hold_no_separators_or_spaces(text: str, name: str) -> None:
    assert file_name(text) == name


# What folders hold.


def finished(run: PlannedRun, accuracy: float = 0.5, **changes: Any) -> PlannedRun:
    """Write the summary of a run."""
    accuracies = {"test/loss": 1.0, "test/acc": accuracy, "test/acc_few": accuracy / 2}
    best = {name: {"value": value, "round": 3} for name, value in accuracies.items()}
    results = {"final": accuracies, "best": best, "mean_last_10": accuracies}
    run.folder.mkdir(parents=True)
    content = a_summary(**{**results, "num_rounds": run.num_rounds, "uses_meta_set": False, **changes})
    (run.folder / "summary.json").write_text(json.dumps(content))
    return run


def a_plan(folder: Path, **options: Any) -> list[PlannedRun]:
    config = CompareConfig(**{"base": {}, "methods": {"FedAvg": None, "FedProx": None}, "seeds": [0, 1], **options})
    return plan(config, folder, resolve)


def test_rows_are_those_of_finished_runs_in_percent(tmp_path: Path) -> None:
    first, short, stopped, _ = runs = a_plan(tmp_path, grid={"data.partition": ["iid"]})
    finished(first, resumes=2)
    finished(short, num_rounds=4)
    finished(stopped, stopped="too many failed rounds")
    assert [run.finished for run in runs] == [True, False, False, False]
    (found,) = rows(runs)
    assert found == {
        "data.partition": "iid",
        "method": "FedAvg",
        "seed": 0,
        "uses_meta_set": False,
        **{f"{kind}/{name}": v for kind in ("final", "best", "mean_last_10") for name, v in (("all", 50), ("few", 25))},
        "num_averaged": None,
        "bytes_per_round": 40.0,
        "seconds_per_round": 2.0,
        "failed_clients": 0,
        "refused_updates": 0,
        "failed_rounds": 0,
        "resumes": 2,
    }


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"num_rounds": 4}, False),
        ({"num_rounds": 4, "ended": "the accuracy has not risen for 3 rounds"}, True),
        ({"stopped": "stopped after round 5"}, False),
        ({"stopped": "stopped after round 5", "ended": "it is time"}, False),
    ],
)
def test_a_run_is_finished_after_all_its_rounds_or_where_a_callback_ended_it(
    changes: Options, expected: bool, tmp_path: Path
) -> None:
    (run, *_) = a_plan(tmp_path)
    assert not run.finished
    finished(run, **changes)
    assert run.finished is expected
    assert len(rows([run])) == expected


def test_results_have_a_table_for_each_setting(tmp_path: Path) -> None:
    runs = a_plan(tmp_path, grid={"data.partition": ["iid", "by_shards"]})
    for index, run in enumerate(runs):
        finished(run, 0.5 + 0.01 * index)
    text = write_results(tmp_path, runs)
    assert [title for title, _ in settings(runs, rows(runs))] == ["partition iid", "partition by_shards"]
    assert text == (tmp_path / "results.md").read_text()
    assert text.count("| FedAvg |") == text.count("| FedProx | 2 |") == text.count("| method | seeds |") == 3
    assert "**partition by_shards**" in text
    assert "**mean over the 2 settings**" in text
    assert "†" not in text
    assert (tmp_path / "results.tex").read_text().count(r"\begin{tabular}") == 3 * 2
    assert (tmp_path / "results.pdf").stat().st_size > 1000
    assert (tmp_path / "results.png").stat().st_size > 1000
    with (tmp_path / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert [float(line["final/all"]) for line in found] == pytest.approx([50 + index for index in range(8)])


def test_results_of_nothing_are_empty_and_no_error(tmp_path: Path) -> None:
    assert "|" not in write_results(tmp_path, a_plan(tmp_path))
    assert (tmp_path / "results.csv").read_text().strip() == ""


def test_grid_may_hold_lists(tmp_path: Path) -> None:
    runs = a_plan(tmp_path, grid={"trainer.devices": [[0], [1]]})
    for run in runs:
        finished(run)
    assert write_results(tmp_path, runs).count("| FedAvg |") == 3


def test_folders_with_other_options_are_refused(tmp_path: Path) -> None:
    first, *_ = runs = a_plan(tmp_path)
    check_folders(runs)
    first.folder.mkdir(parents=True)
    (first.folder / "config.yaml").write_text(first.config)
    check_folders(runs)
    (first.folder / "config.yaml").write_text(first.config.replace("seed: 0", "seed: 7"))
    with pytest.raises(
        ValueError, match=r"to hold the run FedAvg, seed 0, got one with other options: seed is 0 but was 7"
    ):
        check_folders(runs)


def test_another_class_of_the_same_name_is_another_run(tmp_path: Path) -> None:
    first, *_ = runs = a_plan(tmp_path, methods={"mine": {"class_path": "version1.Mine"}})
    first.folder.mkdir(parents=True)
    (first.folder / "config.yaml").write_text(first.config)
    check_folders(runs)
    (first.folder / "config.yaml").write_text(first.config.replace("version1", "version2"))
    with pytest.raises(ValueError, match=r"algorithm is 'version1.Mine' but was 'version2.Mine'"):
        check_folders(runs)


def test_a_grid_goes_below_the_options_of_a_class_as_a_run_writes_them() -> None:
    base = {"data": {"class_path": "fedamm_pl.FederatedDataModule", "init_args": {"num_clients": 3}}}
    (run,) = planned(base=base, grid={"data.num_clients": [5]}, seeds=[0])
    assert options_of(run)["data"]["init_args"] == {"num_clients": 5}


# Names.


@pytest.mark.parametrize("name", ["a" * 300, "é" * 300, "中" * 300])
def test_long_names_are_cut_and_stay_apart(name: str) -> None:
    runs = planned(methods={f"{name}{ending}": {"class_path": "FedAvg"} for ending in ("x", "y")}, seeds=[0])
    assert len({run.folder for run in runs}) == 2
    for run in runs:
        assert all(len(part.encode()) < 200 for part in run.log.parts)
    assert planned(methods={f"{name}x": {"class_path": "FedAvg"}}, seeds=[0])[0].folder == runs[0].folder


def test_names_are_shown_and_mean_nothing(tmp_path: Path) -> None:
    method, value = '=HYPERLINK("http://e")', "d\n\\\\input{/etc/passwd}%|<b>"
    runs = a_plan(tmp_path, methods={method: {"class_path": "FedAvg"}}, grid={"data.root": [value]})
    for run in runs:
        finished(run)
    write_results(tmp_path, runs)
    with (tmp_path / "results.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [line["method"] for line in found] == [f"'{method}"] * 2
    assert [line["final/all"] for line in found] == ["50.0"] * 2
    first, second, *_ = (tmp_path / "results.tex").read_text().splitlines()
    assert first.startswith("% root d")
    assert second.startswith(r"\begin{tabular}")
    assert r"\input" not in (tmp_path / "results.tex").read_text()
    markdown = (tmp_path / "results.md").read_text()
    assert markdown.startswith("**root d")
    assert r"\|\<b\>**" in markdown.splitlines()[0]


def test_a_figure_that_cannot_be_drawn_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr("fedamm_pl.results.comparison_files.comparison", fail)
    runs = [finished(run) for run in a_plan(tmp_path)]
    assert "| FedAvg |" in write_results(tmp_path, runs)
    assert {path.name for path in tmp_path.glob("results.*")} == {"results.csv", "results.md", "results.tex"}
    assert caplog.messages == [f"{tmp_path}: the figure is left out (MemoryError: )"]


# What a folder from somebody else may hold.


def outside(folder: Path) -> Path:
    """Return a file beside the comparison's folder."""
    path = folder.with_name("outside")
    path.write_text("precious")
    return path


RESULTS = ("csv", "md", "tex", "pdf", "png")


@pytest.mark.parametrize("name", [*(f"results.{kind}" for kind in RESULTS), "summaries.json", ".results.pdf.tmp"])
def test_results_are_written_to_no_link(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    runs = [finished(run) for run in a_plan(folder)]
    (folder / name).symlink_to(outside(folder))
    write_results(folder, runs)
    assert outside(folder).read_text() == "precious"
    assert not [path for path in folder.iterdir() if path.is_symlink()]
    assert all((folder / f"results.{kind}").stat().st_size for kind in RESULTS)


@pytest.mark.parametrize("place", ["partition_iid", "partition_iid/FedAvg", "partition_iid/FedAvg/seed_0"])
@pytest.mark.parametrize("ending", ["", ".log", ".yaml"])
def test_links_in_a_comparison_are_refused(place: str, ending: str, tmp_path: Path) -> None:
    folder = tmp_path / "table"
    runs = a_plan(folder, grid={"data.partition": ["iid"]})
    link = folder / (place + ending)
    link.parent.mkdir(parents=True)
    link.symlink_to(outside(folder) if ending else tmp_path)
    with pytest.raises(ValueError, match=rf"to hold no links, got {link}, which points to") as refused:
        check_folders(runs)
    assert "\n" not in str(refused.value)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
def test_a_log_that_is_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    runs = a_plan(tmp_path / "table")
    runs[0].log.parent.mkdir(parents=True)
    os.mkfifo(runs[0].log)
    with pytest.raises(ValueError, match=rf"Expected {runs[0].log} to be a file, .* got something else"):
        check_folders(runs)


def test_a_log_that_is_a_link_is_not_written(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    run, *_ = a_plan(folder)
    run.log.parent.mkdir(parents=True)
    run.log.symlink_to(outside(folder))
    with pytest.raises(OSError, match=r"symbolic links"):
        start(run, 1)
    assert outside(folder).read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "use"),
    [("config.yaml", lambda runs: check_folders(runs)), ("summary.json", lambda runs: execute(runs, 1))],
)
def test_a_run_is_not_read_through_a_link(name: str, use: Callable[[list[PlannedRun]], Any], tmp_path: Path) -> None:
    run, other, *_ = runs = a_plan(tmp_path)
    finished(other)
    run.folder.mkdir(parents=True)
    (run.folder / name).symlink_to(other.folder / "summary.json")
    with pytest.raises(ValueError, match=rf"Expected {run.folder / name} to be .*: it is a link"):
        use(runs)


def test_a_failed_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, *_ = a_plan(tmp_path)  # its configuration has no data
    assert execute([run], 1) == [run]
    line = capsys.readouterr().out.splitlines()[-1]
    assert re.fullmatch(r"\[1/1\] FedAvg, seed 0: failed, see \S+seed_0\.log \(fedamm: error: .+\)", line)


@pytest.fixture
def forks() -> None:
    """The process that runs are forked from, before a test changes the environment: other tests fork from it too."""
    launching.forkserver.ensure_running()


@pytest.mark.usefixtures("forks")
@pytest.mark.parametrize(("chosen", "expected"), [(None, 3), ("7", None)])
def test_runs_share_the_cores_unless_the_user_has_chosen(
    chosen: str | None, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Any] = []
    monkeypatch.setattr(launching.CONTEXT, "Process", lambda args, **_: found.append(args) or Mock())
    monkeypatch.setattr(cores, "usable_cores", lambda: 6)
    monkeypatch.setattr(launching, "usable_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_NUM_THREADS", chosen)
    start(a_plan(tmp_path)[0], 2)
    ((*_, threads, environment),) = found
    assert (threads, environment.get("OMP_NUM_THREADS")) == (expected, chosen)


@pytest.mark.usefixtures("forks")
def test_a_run_has_the_environment_of_now_and_the_threads_it_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "chosen_now.py").write_text(
        "import os, torch\nraise RuntimeError(f'{os.environ[\"CHOSEN\"]} {torch.get_num_threads()}')"
    )
    monkeypatch.setattr(launching, "shared_out", lambda *_: 3)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("algorithm: chosen_now.Method")
    for chosen in ("first", "second"):
        monkeypatch.setenv("CHOSEN", chosen)
        process = launching.launch(tmp_path / "run.yaml", tmp_path / "run", tmp_path / "run.log", 1)
        process.join()
        assert process.exitcode == 2
    first, second = (tmp_path / "run.log").read_text().splitlines()
    assert ("first 3" in first, "second 3" in second) == (True, True)


# The program.


Write = Callable[..., list[str]]


@pytest.fixture(scope="module")
def configuration(data_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Write:
    """A function (folder, **changes) -> the command line of a comparison of runs of one round."""

    def write(folder: Path, **changes: Any) -> list[str]:
        data = {"dataset": "tiny", "root": str(data_root), "num_clients": 2, "imbalance_factor": 0.5}
        content = {
            "base": {
                "data": {**data, "num_meta_per_class": 5, "batch_size": 40},
                "algorithm": {"model": "small_cnn", "lr": 0.05},
                "federation": {"num_rounds": 1, "local_epochs": 1},
                "trainer": {"accelerator": "cpu"},
                "logger": False,
                "output": {"figures": False},
            },
            "methods": {"FedAvg": None, "prox": {"class_path": "FedProx", "mu": 0.5}},
            "seeds": [0, 1],
            "grid": {"data.partition": ["iid", "by_dirichlet"]},
            "dir": str(folder),
            "jobs": 2,
            **changes,
        }
        path = tmp_path_factory.mktemp("compare") / "comparison.yaml"
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        return ["compare", "--config", str(path)]

    return write


@pytest.fixture(scope="module")
def compared(configuration: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished comparison; what a test changes in it, it restores."""
    folder = tmp_path_factory.mktemp("compared") / "table"
    main(configuration(folder))
    return folder


def summaries(folder: Path) -> dict[str, int]:
    """Return each run's summary with the time of its last change."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("summary.json")}


def test_comparison_runs_everything_on_shared_splits(compared: Path) -> None:
    expected = {
        f"partition_{partition}/{method}/seed_{seed}/summary.json"
        for partition in ("iid", "by_dirichlet")
        for method in ("FedAvg", "prox")
        for seed in (0, 1)
    }
    assert set(summaries(compared)) == expected
    with (compared / "results.csv").open() as file:
        found = list(csv.DictReader(file))
    assert len(found) == 8
    assert [line["method"] for line in found] == ["FedAvg", "FedAvg", "prox", "prox"] * 2
    starts = {}
    for name in expected:
        with (compared / name).with_name("metrics.csv").open() as file:
            first = next(csv.DictReader(file))
        partition, method, seed, _ = Path(name).parts
        starts[partition, method, seed] = first["test/loss"]
    for partition, method, seed in starts:  # same initial weights for all methods, others for other seeds
        assert starts[partition, method, seed] == starts["partition_iid", "FedAvg", seed]
    assert len(set(starts.values())) == 2
    text = (compared / "results.md").read_text()
    assert "**partition iid**" in text
    assert text.count("| prox | 2 |") == 3
    for name in ("results.csv", "results.md", "results.tex", "results.pdf", "results.png"):
        assert (compared / name).stat().st_size > 0


def test_what_is_finished_is_not_run_again(
    compared: Path, configuration: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    before, csv_before = summaries(compared), (compared / "results.csv").read_bytes()
    main(configuration(compared))
    printed = capsys.readouterr()
    assert printed.out.startswith("8 runs, 8 finished before\n")
    assert printed.err == ""
    assert (compared / "results.md").read_text() in printed.out
    assert printed.out.endswith(f"results in {compared}\n")
    assert "[" not in printed.out.splitlines()[1]
    assert summaries(compared) == before
    assert (compared / "results.csv").read_bytes() == csv_before


def test_what_was_interrupted_is_continued(
    compared: Path, configuration: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    before = summaries(compared)
    lost = compared / "partition_iid/prox/seed_1"
    content, log = json.loads((lost / "summary.json").read_text()), lost.with_name("seed_1.log")
    size = log.stat().st_size
    (lost / "summary.json").unlink()
    main(configuration(compared))
    printed = capsys.readouterr().out
    assert printed.startswith("8 runs, 7 finished before\n[8/8] prox, data.partition iid, seed 1: ")
    assert "continuing after round 1" in log.read_bytes()[size:].decode()  # the log of before is kept
    again = json.loads((lost / "summary.json").read_text())
    assert {name: again[name] for name in ("final", "best", "resumes", "bytes_per_round")} == {
        name: content[name] for name in ("final", "best", "resumes", "bytes_per_round")
    }
    changed = {name for name, time in summaries(compared).items() if time != before[name]}
    assert changed == {"partition_iid/prox/seed_1/summary.json"}


def one_error(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    """Return the one line that the program prints to standard error as it exits with status 2."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("fedamm: error: ")
    assert printed.err.count("\n") == 1
    return printed.err


def test_changed_options_are_refused_with_a_list(
    compared: Path, configuration: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    before = summaries(compared)
    methods = {"FedAvg": None, "prox": {"class_path": "FedProx", "mu": 0.25, "lr": 0.01}}
    error = one_error(capsys, configuration(compared, methods=methods))
    assert "algorithm.lr is 0.01 but was 0.05; algorithm.mu is 0.25 but was 0.5" in error
    assert "prox, data.partition iid, seed 0" in error
    assert "Choose another" in error
    assert summaries(compared) == before


def test_fewer_methods_make_a_smaller_table_of_what_is_there(
    compared: Path, configuration: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    main(configuration(compared, methods={"FedAvg": None}, seeds=[1], grid={"data.partition": ["by_dirichlet"]}))
    printed = capsys.readouterr().out
    assert printed.startswith("1 runs, 1 finished before\n")
    assert "prox" not in printed


def test_failing_method_is_reported_and_the_others_are_in_the_table(
    compared: Path, configuration: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(compared / "partition_iid/FedAvg/seed_0", tmp_path / "FedAvg/seed_0")
    words = configuration(
        tmp_path,
        methods={"FedAvg": None, "bad": {"class_path": "FedProx", "model": "nothing.of_the_kind"}},
        seeds=[0],
        grid={"data.partition": ["iid"]},
    )
    shutil.move(tmp_path / "FedAvg", tmp_path / "partition_iid/FedAvg")
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.startswith("2 runs, 1 finished before\n")
    assert f"[2/2] bad, data.partition iid, seed 0: failed, see {tmp_path}/partition_iid/bad/seed_0.log" in printed.out
    assert printed.err == "fedamm: error: 1 of 2 runs failed: bad, data.partition iid, seed 0\n"
    assert "Expected --algorithm.model to be one of" in (tmp_path / "partition_iid/bad/seed_0.log").read_text()
    text = (tmp_path / "results.md").read_text()
    assert "| FedAvg | 1 |" in text
    assert "| bad |" not in text
    assert "Left out of the paired differences: bad (seed 0 is not finished)." in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": {"FedAvg": None, "FedSomething": None}}, r"FedSomething"),
        ({"methods": {"FedAvg": None, "FedProx": {"nu": 1.0}}}, r"nu"),
        ({"methods": {"FedAvg": None, "FedProx": {"mu": "much"}}}, r"mu.*much"),
        ({"methods": {"FedProx": {"mu": -1}}}, r"FedProx: Expected --algorithm.mu to be a number of 0 or more, got -1"),
        ({"methods": {"FedAvg": {"lr": 0}}}, r"FedAvg: Expected --algorithm.lr to be a number above 0, got 0"),
        ({"grid": {"data.imbalance_factor": [0.1, 2]}}, r"--data.imbalance_factor to be in \(0, 1\], got 2"),
        ({"grid": {"data.partitions": ["iid"]}}, r"partition"),
        ({"grid": {"data.partition": ["iid", "by_magic"]}}, r"by_magic"),
        ({"methods": {}}, r"--methods|`methods`|methods"),
        ({"jobs": -1}, r"jobs.*got -1"),
        ({"job": 2}, r"job"),
    ],
)
def test_wrong_comparison_is_one_line_and_starts_nothing(
    configuration: Write, changes: Options, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    error = one_error(capsys, configuration(folder, **changes))
    assert re.search(message, error)
    assert not list(tmp_path.rglob("*.yaml"))
    assert not list(tmp_path.rglob("*.log"))


@pytest.mark.parametrize("name", ["results.pdf", "partition_iid/FedAvg/seed_0.log"])
def test_a_link_is_one_line_and_starts_nothing(
    name: str, configuration: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "table"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).symlink_to(outside(folder))
    assert f"to hold no links, got {folder / name}, which points to {outside(folder)}" in one_error(
        capsys, configuration(folder)
    )
    assert outside(folder).read_text() == "precious"
    assert not list(folder.rglob("*.yaml"))


def test_options_are_tuned_and_reported_by_one_command(
    configuration: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = configuration(
        tmp_path,
        methods={"FedAvg": None, "tuned": {"class_path": "FedAvg", "lr": 0.001}},
        seeds=[0],
        grid={"data.num_val_per_class": [4]},
        tuning={"seeds": [7], "methods": {"tuned": [{"lr": 1e-30}, {"lr": 0.2}]}},
    )
    main(words)
    printed = capsys.readouterr().out
    assert printed.startswith("2 tuning runs, then 2 reported runs\n2 runs, 0 finished before\n[1/2] tuned: lr ")
    assert "(val/acc, mean of last 1)" in printed
    with (tmp_path / "tuning.csv").open() as file:
        found = list(csv.DictReader(file))
    best = max(found, key=lambda row: float(row["val/acc"]))
    assert [row["chosen"] for row in found] == [str(row is best) for row in found]
    config = yaml.safe_load((tmp_path / "num_val_per_class_4/tuned/seed_0/config.yaml").read_text())
    assert config["algorithm"]["init_args"]["lr"] == json.loads(best["options"])["lr"]
    before = summaries(tmp_path)
    assert len(before) == 4
    main(words)
    assert capsys.readouterr().out.count("2 runs, 2 finished before") == 2
    assert summaries(tmp_path) == before


class Rooted(FedAvg):
    """A method with an option that JSON does not know."""

    def __init__(self, num_classes: int, model: str, place: Path = Path("here"), **_: Any) -> None:
        super().__init__(num_classes, 1, model)


def test_a_method_may_have_options_that_are_objects(
    configuration: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = {"own": {"class_path": "tests.results.test_comparison.Rooted"}, "FedProx": {"mu": -1}}
    shared = {"data": {"dataset": "tiny"}, "algorithm": {"model": "small_cnn"}, "federation": {"num_rounds": 1}}
    assert "FedProx: " in one_error(capsys, configuration(tmp_path / "new", base=shared, methods=methods))


def test_missing_configuration_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "none.yaml" in one_error(capsys, ["compare", "--config", str(tmp_path / "none.yaml")])
    one_error(capsys, ["compare"])
