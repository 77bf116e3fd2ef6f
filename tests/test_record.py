"""``scripts/record.py``: tables follow from the record of a comparison, and nothing that differs passes."""

import csv
import importlib.util
import io
import json
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from fedamm_pl.cli.main import main

BASE = {
    "data": {"dataset": "digits", "num_clients": 2, "num_val_per_class": 2},
    "algorithm": {"model": "mlp"},
    "federation": {"num_rounds": 1},
    "trainer": {"accelerator": "cpu", "precision": "32-true"},
    "logger": False,
    "output": {"progress": "none", "figures": False},
}
RECORDS = Path(__file__).parents[1] / "docs" / "protocol"
CONTENT: dict[str, Any] = {
    "base": BASE,
    "methods": {"FedAvg": {"lr": 0.1}, "tuned": {"class_path": "FedAvg"}},
    "seeds": [0],
    "tuning": {"seeds": [1], "methods": {"tuned": [{"lr": 0.01}, {"lr": 0.1}]}},
}


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that follows from the record of the six tables; to compare its 1,152 runs takes the better part of a minute."""
    folder = tmp_path_factory.mktemp("tables")
    with tarfile.open(RECORDS / "tables.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    config = RECORDS.parent.parent / "configs/protocol/tables.yaml"
    main(["compare", "--config", str(config), "--dir", str(folder), "--jobs", "0"])
    return folder


@pytest.fixture(scope="module")
def record() -> ModuleType:
    path = Path(__file__).parents[1] / "scripts" / "record.py"
    spec = importlib.util.spec_from_file_location("record", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory, record: ModuleType) -> tuple[Path, Path, Path]:
    """The record of a small comparison, its file and its table."""
    folder = tmp_path_factory.mktemp("record")
    (folder / "small.yaml").write_text(yaml.safe_dump(CONTENT, sort_keys=False))
    main(["compare", "--config", str(folder / "small.yaml"), "--dir", str(folder / "runs")])
    assert record.pack(folder / "runs", folder / "small.tar.xz") == 4
    return folder / "small.tar.xz", folder / "small.yaml", folder / "runs" / "results.md"


def checked(record: ModuleType, monkeypatch: pytest.MonkeyPatch, *words: Path | str) -> None:
    monkeypatch.setattr(sys, "argv", ["record.py", "check", *map(str, words)])
    record.main()


def test_the_tables_follow_from_the_record(
    packed: tuple[Path, Path, Path],
    record: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    checked(record, monkeypatch, *packed)
    assert capsys.readouterr().out == f"{packed[2]} follows from {packed[0]}\n"


def test_the_same_runs_give_the_same_record(
    packed: tuple[Path, Path, Path], record: ModuleType, tmp_path: Path
) -> None:
    record.pack(packed[2].parent, tmp_path / "again.tar.xz")
    assert (tmp_path / "again.tar.xz").read_bytes() == packed[0].read_bytes()


def test_another_figure_in_the_table_is_seen(
    packed: tuple[Path, Path, Path], record: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = packed[2].read_text()
    (tmp_path / "table.md").write_text(text.replace("FedAvg | 1 |", "FedAvg | 2 |"))
    assert (tmp_path / "table.md").read_text() != text
    with pytest.raises(SystemExit, match=r"\n-\| FedAvg \| 2 "):
        checked(record, monkeypatch, packed[0], packed[1], tmp_path / "table.md")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"seeds": [0, 2]}, "2 of 6 runs are not finished: FedAvg, seed 2; tuned, seed 2\n"),
        (
            {"tuning": {**CONTENT["tuning"], "seeds": [1, 3]}},
            "all 4 runs for tuning to be finished, got 2 that are not.\n",
        ),
        ({"base": {**BASE, "federation": {"num_rounds": 2}}}, "got one with other options: federation.num_rounds"),
    ],
)
def test_a_record_of_other_runs_is_refused(
    changes: dict[str, object],
    reason: str,
    packed: tuple[Path, Path, Path],
    record: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    (tmp_path / "small.yaml").write_text(yaml.safe_dump({**CONTENT, **changes}, sort_keys=False))
    with pytest.raises(SystemExit) as refused:
        checked(record, monkeypatch, packed[0], tmp_path / "small.yaml", packed[2])
    assert refused.value.code
    assert reason in capsys.readouterr().err


def test_the_largest_table_follows_from_its_record(followed: Path) -> None:
    assert (followed / "results.md").read_text() == (RECORDS / "tables.md").read_text()


OTHERS = sorted(path for path in RECORDS.glob("*.md") if path.stem != "tables")


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.stem)
def test_the_recorded_tables_follow_from_the_records(
    path: Path, record: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, at, _ = path.stem.partition("_bytes")
    config, archive = RECORDS.parent.parent / f"configs/protocol/{name}.yaml", RECORDS / f"{name}.tar.xz"
    checked(record, monkeypatch, archive, config, path, *(["--budget", "bytes"] if at else []))
    assert capsys.readouterr().out.endswith(f"{path.name} follows from {archive}\n")


def test_every_record_has_its_table() -> None:
    assert {path.name.partition(".")[0] for path in RECORDS.glob("*.tar.xz")} <= {
        path.stem for path in RECORDS.glob("*.md")
    }


def test_a_record_that_is_not_there_or_no_record_is_one_line(
    packed: tuple[Path, Path, Path], record: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "text.tar.xz").write_text("no archive")
    for name, reason in (("none.tar.xz", "No such file or directory"), ("text.tar.xz", "not an lzma file")):
        with pytest.raises(SystemExit, match=rf"^record.py: error: [^\n]*{reason}[^\n]*$"):
            checked(record, monkeypatch, tmp_path / name, *packed[1:])


def test_a_record_that_is_cut_off_or_lacks_a_configuration_is_one_line(
    packed: tuple[Path, Path, Path], record: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    content = packed[0].read_bytes()
    (tmp_path / "half.tar.xz").write_bytes(content[: len(content) // 2])
    with pytest.raises(SystemExit, match=r"^record.py: error: [^\n]*$"):
        checked(record, monkeypatch, tmp_path / "half.tar.xz", *packed[1:])
    with tarfile.open(packed[0]) as old, tarfile.open(tmp_path / "without.tar.xz", "w:xz") as new:
        for entry in old:
            if entry.name != "FedAvg/seed_0/config.yaml":
                new.addfile(entry, old.extractfile(entry))
    with pytest.raises(SystemExit, match=r"to hold config.yaml of each run, got none for FedAvg/seed_0"):
        checked(record, monkeypatch, tmp_path / "without.tar.xz", *packed[1:])


def test_files_that_lead_out_of_the_folder_are_refused(record: ModuleType, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar.xz", "w:xz") as archive:
        archive.addfile(tarfile.TarInfo("../config.yaml"), io.BytesIO())
    with pytest.raises(SystemExit, match=r"alone, got '../config.yaml'"):
        record.tables(tmp_path / "bad.tar.xz", tmp_path / "none.yaml")


def test_the_first_table_of_the_readme_is_that_of_the_record() -> None:
    text = (RECORDS / "tables.md").read_text()
    lines = text[text.index("**mean over the 6 settings**") :].splitlines()
    cells = [[cell.strip(" *†") for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    head = cells[0]
    accuracies = {line[0]: dict(zip(head, line, strict=True)) for line in cells if len(line) == len(head) and line[1]}
    paired: dict[str, str] = {}
    for method, difference, interval, *_ in (line for line in cells if len(line) == 7 and line[1]):
        paired.setdefault(method, f"{difference} ({interval})")  # all, mean of last 10 comes first
    readme = (RECORDS.parents[1] / "README.md").read_text()
    table = readme[readme.index("| | all | few | all minus tuned FedAvg") :].split("\n\n")[0].splitlines()[2:]
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if "**" not in line]
    assert len(shown) == len(accuracies) - 2 == 12  # without the headings and the line below them
    for method, everything, few, difference, _ in shown:
        assert everything == accuracies[method]["all, mean of last 10"]
        assert few == accuracies[method]["few, mean of last 10"]
        assert difference == ("" if method == "FedAvg, tuned" else paired[method])
    results = (RECORDS.parent / "results.md").read_text()
    assert all(line in results for line in table)


def test_the_figures_that_the_readme_and_the_results_name_are_those_of_the_record(followed: Path) -> None:
    tried: dict[tuple[str, str], list[float]] = {}
    with (followed / "tuning.csv").open() as file:
        for line in csv.DictReader(file):
            if not line["val/acc"]:  # it gave up
                continue
            options = ", ".join(f"{value}" for value in json.loads(line["options"]).values())
            tried.setdefault((line["method"].removesuffix(", tuned"), options), []).append(float(line["val/acc"]))
    reached = {candidate: f"{sum(found) / 6:.1f}" for candidate, found in tried.items() if len(found) == 6}
    named = {
        ("FedAvg", "0.03"): "75.7",
        ("FedAvg", "0.1"): "83.3",
        ("FedAvg", "0.2"): "84.5",
        ("FedAMM", "0.03, 0.1, flat"): "78.6",
        ("FedAMM", "0.03, 1.0, flat"): "82.3",
        ("FedAMM", "0.1, 0.01, flat"): "83.8",
        ("FedAMM", "0.1, 0.1, flat"): "84.4",
        ("FedAMM", "0.1, 1.0, flat"): "71.3",
        ("FedAMM", "0.2, 0.1, flat"): "84.0",
        ("FedAMM", "0.2, 1.0, flat"): "64.8",
    }
    assert {candidate: reached[candidate] for candidate in named} == named
    readme, results = ((RECORDS.parents[1] / name).read_text() for name in ("README.md", "docs/results.md"))
    assert all(figure in results for figure in named.values())
    assert all(figure in readme for figure in ("75.7", "82.3", "84.5", "84.4"))
    # paired by hand: the table has tuned FedAvg as its reference
    found: dict[str, dict[str, float]] = {"all": {}, "few": {}}
    with (followed / "results.csv").open() as file:
        for line in csv.DictReader(file):
            if line["method"] in ("FedAMM", "FedAvg"):
                sign = 1 if line["method"] == "FedAMM" else -1
                for group, differences in found.items():
                    value = sign * float(line[f"mean_last_10/{group}"]) / 6
                    differences[line["seed"]] = differences.get(line["seed"], 0.0) + value
    everything, few = (np.array(list(differences.values())) for differences in found.values())
    reach = float(stats.t.ppf(0.975, 9) * everything.std(ddof=1) / 10**0.5)
    figures = [everything.mean(), everything.mean() - reach, everything.mean() + reach, few.mean()]
    assert len(everything) == 10
    assert [f"{figure:.1f}" for figure in figures] == ["0.8", "0.5", "1.1", "1.6"]
    assert "0.8 points ahead of FedAvg (0.5 to 1.1; few-shot classes 1.6)" in " ".join(readme.split())


def test_the_table_of_the_updates_is_that_of_the_records() -> None:
    results = (RECORDS.parent / "results.md").read_text()
    table = results[results.index("| | chosen | MB a round |") :].split("\n\n")[0].splitlines()[2:]
    rows = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.split("|")[1:-1]] for line in table)}
    assert len(rows) == 3
    for name, at in (("communication", 2), ("communication_bytes", 5)):
        text = (RECORDS / f"{name}.md").read_text()
        overall = text[text.index("**mean over the 6 settings**") :].splitlines()
        head = [cell.strip() for cell in next(line for line in overall if line.startswith("| method")).split("|")[1:-1]]
        for method, cells in rows.items():
            lines = [
                [cell.strip() for cell in line.split("|")[1:-1]] for line in overall if line.startswith(f"| {method}")
            ]
            mean = dict(zip(head, lines[0], strict=True))
            paired = next((line for line in lines[1:] if len(line) == 7), None)
            chosen = next(line for line in lines if len(line) == 5 and "lr" in line[1])
            assert cells[at] == mean["all, mean of last 10"].strip("*")
            assert cells[at + 1] == (f"{paired[1]} ({paired[2]})" if paired else "")
            assert (cells[0], cells[1]) == (chosen[1], mean["MB a round"])
            assert at == 2 or f"{method} {cells[4]}" in text
    readme = " ".join((RECORDS.parents[1] / "README.md").read_text().split())
    assert "(84.2 against 84.0 and 84.4 after 100 rounds" in readme
    assert [rows[name][2][:4] for name in rows] == ["84.2", "84.4", "84.0"]
    assert [rows[name][6][:5] for name in rows] == ["", "-1.4 ", "-10.3"]
    assert "it is 10.3 and 1.4 points ahead" in readme


def test_the_last_column_of_the_readmes_table_counts_tables(followed: Path) -> None:
    counts: dict[str, list[int]] = {}
    with (followed / "results_paired.csv").open() as file:
        for line in csv.DictReader(file):
            if (line["result"], line["group"]) == ("mean_last_10", "all") and line["data.dataset"]:
                place = 1 if float(line["p_holm"]) >= 0.05 else 0 if float(line["difference"]) > 0 else 2
                counts.setdefault(line["method"], [0, 0, 0])[place] += 1
    readme = (RECORDS.parents[1] / "README.md").read_text()
    table = readme[readme.index("| | all | few | all minus tuned FedAvg") :].split("\n\n")[0].splitlines()
    for method, (ahead, level, behind) in counts.items():
        (row,) = (row for row in table if row.startswith(f"| {method} |"))
        assert row.endswith(f"| {ahead} / {level} / {behind} |")


def test_the_table_of_the_images_is_that_of_the_record() -> None:
    lines = [
        [cell.strip(" *†") for cell in line.split("|")[1:-1]]
        for line in (RECORDS / "fashion_mnist.md").read_text().splitlines()
        if line.startswith("|")
    ]
    head, paired, title = lines[0], {}, ""
    for line in lines:
        if len(line) == 7 and not line[1]:
            title = line[0].partition(":")[0]
        elif len(line) == 7:
            paired[title, line[0]] = f"{line[1]} ({line[2]})"
    means = {line[0]: dict(zip(head, line, strict=True)) for line in lines if len(line) == len(head) and line[1]}
    chosen = {line[0]: line[1] for line in lines if len(line) == 5}
    for path, options in ((RECORDS.parents[1] / "README.md", False), (RECORDS.parent / "results.md", True)):
        text = path.read_text()
        table = text[text.index("all, images") :].split("\n\n")[0].splitlines()[2:]
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if "**" not in line]
        assert len(rows) == 4
        for name, *cells in rows:
            wanted = [means[name]["all, mean of last 10"], means[name]["few, mean of last 10"]]
            groups = ("all", "few") if options else ("all",)
            wanted += [paired.get((f"{group}, mean of last 10", name), "") for group in groups]
            assert cells == ([chosen[name]] if options else []) + wanted
