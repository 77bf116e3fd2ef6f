"""The page of several runs compares their methods, and says what each run's files say."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fedamm_pl.results.report import report
from fedamm_pl.results.report_several import labels, pairs
from fedamm_pl.results.runs import Run, load_all
from tests.results.handmade import a_run
from tests.results.pages import SOURCE, Page, change, page, summary


def test_labels_are_methods_and_what_differs_but_the_seed(six: list[Path]) -> None:
    expected = ["FedAMM, meta_update asynchronous"] * 2 + ["FedAMM, meta_update synchronous"] * 2 + ["FedAvg"] * 2
    assert labels(load_all(six)) == expected
    assert labels(load_all(six[::4])) == ["FedAMM", "FedAvg"]
    assert labels(load_all(six[:2])) == ["FedAMM", "FedAMM"]


def test_labels_name_an_option_that_methods_share(copied: Callable[..., Path]) -> None:
    folders = [copied("FedAMM", "a", lr=0.1), copied("FedAvg", "b", lr=0.2), copied("FedAvg", "c", lr=0.1)]
    assert labels(load_all(folders)) == ["FedAMM, lr 0.1", "FedAvg, lr 0.2", "FedAvg, lr 0.1"]


def test_several_runs_have_a_table_by_method_and_one_by_run(six: list[Path]) -> None:
    found = page(*six)
    by_method, by_run = found.tables[:2]
    assert found.texts["h1"] == ["6 runs, tiny"]
    assert by_method[0] == ["method", "seeds", "all", "many", "medium", "few", "MB a round", "s a round"]
    assert [line[0] for line in by_method[1::4]] == ["final", "best on test", "mean of last 3"]
    names = ["FedAMM, meta_update asynchronous †", "FedAMM, meta_update synchronous †", "FedAvg"]
    assert [line[:2] for line in by_method[2:5]] == [[name, "2"] for name in names]
    final = 100 * summary(six[4])["final"]["test/acc"]
    assert by_method[4][2] == f"{final + 0.05:.1f} ± 0.1"
    assert by_run[0][-1] == f"folder in {six[0].parent}"
    assert [line[0] for line in by_run[1:]] == labels(load_all(six))
    assert [line[1] for line in by_run[1:]] == ["0", "1"] * 3
    for folder, line in zip(six, by_run[1:], strict=True):
        content = summary(folder)
        assert line[2:6] == [
            "5",
            f"{100 * content['final']['test/acc']:.2f}",
            f"{100 * content['best']['test/acc']['value']:.2f}",
            f"{100 * content['mean_last_10']['test/acc']:.2f}",
        ]
        assert line[6] == f"{(content['bytes_per_round']['received'] + content['bytes_per_round']['sent']) / 1e6:.2f}"
        assert line[8] == folder.name


def test_the_leader_beyond_the_spread_is_bold(six: list[Path]) -> None:
    for folder in six[4:]:
        content = summary(folder)
        content["final"]["test/acc_few"] = 0.999
        change(folder, "summary.json", final=content["final"])
    more = [shutil.copytree(folder, folder.with_name(f"{folder.name}_third")) for folder in six[::2]]
    for folder in more:
        change(folder, "summary.json", seed=2)
    assert "99.9 ± 0.0" not in Page(report(load_all(six))).texts.get("strong", [])  # two seeds say little
    assert Page(report(load_all([*six, *more]))).texts["strong"].count("99.9 ± 0.0") == 1


def test_methods_on_other_data_are_not_compared(tmp_path: Path) -> None:
    """Their means are 50 and 70, seed by seed; but one is of other data."""
    for alpha, method, accuracy in ((1, "FedAvg", 0.5), (2, "FedAMM", 0.7)):
        found = {"test/loss": 1.0, "test/acc": accuracy}
        best = {name: {"value": value, "round": 3} for name, value in found.items()}
        for seed in range(3):
            folder = tmp_path / f"{method}_{seed}"
            a_run(folder, method=method, seed=seed, final=found, mean_last_10=found, best=best)
            (folder / "config.yaml").write_text(f"seed: {seed}\ndata:\n  dirichlet_alpha: {alpha}\n")
    found = page(tmp_path)
    assert [line[0] for line in found.tables[0][1:5]] == [
        "final",
        "dirichlet_alpha 2",
        "FedAMM, dirichlet_alpha 2 †",
        "dirichlet_alpha 1",
    ]
    assert not [text for text in found.texts["strong"] if "±" in text]


@pytest.mark.parametrize("config", ["", "data:\n  class_path: mine.Hospital\n"])
def test_methods_on_other_data_sets_are_not_compared(config: str, tmp_path: Path) -> None:
    """Runs made from Python have no configuration, and data of one's own have a class."""
    for dataset, method in (("cifar10", "FedAvg"), ("letter", "FedProx")):
        for seed in range(3):
            folder = a_run(tmp_path / f"{method}_{seed}", method=method, seed=seed, dataset=dataset)
            (folder / "config.yaml").unlink()
            if config and dataset == "letter":
                (folder / "config.yaml").write_text(f"seed: {seed}\n{config}")
    assert [found.differences for found in pairs(load_all([tmp_path]))] == [{}, {}]


def test_the_folder_of_runs_is_said_once_where_they_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = a_run(tmp_path / "a" / "0"), a_run(tmp_path / "b" / "1", seed=1)
    assert [line[-1] for line in page(first, second).tables[1]] == [f"folder in {tmp_path}", "a/0", "b/1"]
    monkeypatch.chdir(tmp_path)
    shown = [line[-1] for line in page(Path("a/0"), second).tables[1]]
    assert shown == ["folder", "a/0", str(second)]


def test_each_of_few_runs_has_its_figures(fedamm_run: Path, fedavg_run: Path) -> None:
    runs = load_all([fedamm_run, fedavg_run])
    assert len(SOURCE.findall(report(runs))) == 2 + sum(len(run.figures()) for run in runs)


def test_the_runs_of_many_have_no_figures(
    six: list[Path], copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "figures", lambda run: pytest.fail("it draws them"))
    text = report(load_all([*six, copied("FedAvg", "avg_2", 2)]))
    assert len(SOURCE.findall(text)) == 3
    assert len(Page(text).texts["section"]) == 7


def test_one_seed_twice_is_said(six: list[Path], copied: Callable[..., Path]) -> None:
    assert not [text for text in page(*six).texts["p"] if "too small" in text]
    assert "2 runs are FedAvg, seed 1: the spread is too small." in page(*six, copied("FedAvg", "again", 1)).texts["p"]


def test_unfinished_runs_are_left_out_of_the_methods(six: list[Path]) -> None:
    for folder in six[2:]:
        (folder / "summary.json").unlink()
    found = page(*six)
    assert len(found.tables[0]) == 1 + 3 * 2
    assert [line[2] for line in found.tables[1][1:]] == ["5"] * 2 + ["5 of 5, unfinished"] * 4
    for folder in six[:2]:
        (folder / "summary.json").unlink()
    assert "None of the runs has finished yet." in page(*six).texts["p"]


def test_stopped_runs_are_left_out_of_the_methods(tmp_path: Path) -> None:
    whole, ended = a_run(tmp_path / "a"), a_run(tmp_path / "b", seed=1, num_rounds=3, ended="it is enough")
    stopped = a_run(tmp_path / "c", seed=2, stopped="stopped after round 3: 3 rounds in a row failed")
    by_method, by_run = page(whole, ended, stopped).tables[:2]
    assert by_method[2][:2] == ["FedAMM †", "2"]
    assert by_method[2][-1] == "2.00"
    assert [line[1] for line in by_run[1:]] == ["0", "1", "2"]
