"""The page says what the files of a run say, loads nothing, and lets nothing in that is not escaped."""

import base64
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import yaml

from fedamm_pl.cli.main import main
from fedamm_pl.results.report import labels, report
from fedamm_pl.results.runs import Run, load, load_all

VOID = {"meta", "img"}
SOURCE = re.compile(r'src="data:image/svg\+xml;base64,([A-Za-z0-9+/=]+)"')
HOSTILE = '<script>alert("&1")</script>'


class Page(HTMLParser):
    """Tables as lists of lines of texts, definitions, and the texts of some elements; checks that elements nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.tables: list[list[list[str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        self.texts.setdefault(tag, []).append("")
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in self.open:
            self.texts[tag][-1] += data
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data

    @property
    def facts(self) -> dict[str, str]:
        return dict(zip(self.texts["dt"], self.texts["dd"], strict=True))


def page(*folders: Path) -> Page:
    return Page(report(load_all(folders)))


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def change(folder: Path, name: str, **values: Any) -> None:
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))


@pytest.fixture
def copied(fedamm_run: Path, fedavg_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function (method, name, option=value of the algorithm, seed=) -> a copy of its run with other options on paper."""
    runs = {"FedAMM": fedamm_run, "FedAvg": fedavg_run}

    def copied(method: str, name: str, seed: int = 0, **options: Any) -> Path:
        ignored = shutil.ignore_patterns("checkpoints", "*.ckpt", "events.*")
        folder = Path(shutil.copytree(runs[method], tmp_path / name, ignore=ignored))
        config = yaml.safe_load((folder / "config.yaml").read_text())
        config["seed"] = seed
        config["algorithm"]["init_args"].update(options)
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        change(folder, "summary.json", seed=seed)
        return folder

    return copied


# One run


def test_the_headline_is_that_of_the_summary(fedamm_run: Path) -> None:
    found, names = summary(fedamm_run), ["test/acc", "test/acc_many", "test/acc_medium", "test/acc_few"]
    assert page(fedamm_run).tables[0] == [
        ["test accuracy, %", "all", "many", "medium", "few"],
        ["final", *(f"{100 * found['final'][name]:.2f}" for name in names)],
        ["best on test", *(f"{100 * found['best'][name]['value']:.2f}" for name in names)],
        ["... in round", *(str(int(found["best"][name]["round"])) for name in names)],
        ["mean of last 10", *(f"{100 * found['mean_last_10'][name]:.2f}" for name in names)],
    ]
    assert "chosen on the test set: an optimistic figure" in report([load(fedamm_run)])


def test_each_class_has_a_line(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    lines = page(fedamm_run).tables[1]
    assert lines[0] == ["class", "training images", "group", "round 0, %", "round 5, %"]
    assert [line[1] for line in lines[1:]] == ["55", "34", "21", "13", "8", "5"]
    assert [line[2] for line in lines[1:]] == ["many", "many", "medium", "medium", "few", "few"]
    for label, line in enumerate(lines[1:]):
        column = run.metrics[f"test/acc_class_{label}"]
        assert line[0] == str(label)
        assert line[3:] == [f"{100 * column[0]:.2f}", f"{100 * column[-1]:.2f}"]


def test_title_and_facts(fedamm_run: Path) -> None:
    found, content = page(fedamm_run), summary(fedamm_run)
    kilobytes = f"{content['bytes_per_round']['sent_per_client'] / 1e3:,.0f} kB"
    megabytes = (content["bytes_per_round"]["received"] + content["bytes_per_round"]["sent"]) / 1e6
    seconds = content["seconds_per_round"]
    assert found.texts["title"] == found.texts["h1"] == ["FedAMM on tiny"]
    assert found.texts["p"][0] == f"seed 0, imbalance factor 0.1 (IF 10), {fedamm_run}"
    assert found.facts["Method"] == "FedAMM, uses the server's balanced images"
    assert found.facts["Model"] == f"small_cnn, {content['num_parameters']:,} parameters"
    assert found.facts["Data"] == "tiny, 136 training images in 6 classes"
    assert found.facts["Clients"] == "4, 50% of them a round, partition by_num_classes"
    assert found.facts["Rounds"] == "5 rounds, local epochs 1"
    expected = f"a client receives {kilobytes} and sends {kilobytes}, {megabytes:.2f} MB a round in all"
    assert found.facts["Bytes"] == expected
    assert found.facts["Time"].startswith(f"{sum(seconds.values()):.2f} s a round: train ")
    assert f"meta {seconds['meta'] / sum(seconds.values()):.0%}" in found.facts["Time"]
    assert "Incidents" not in found.facts
    assert f"torch {content['versions']['torch']}" in found.facts["Versions"]
    assert "accelerator cpu" in found.facts["Hardware"]


def test_configuration_and_command_are_there(fedamm_run: Path) -> None:
    config, command = page(fedamm_run).texts["pre"]
    assert yaml.safe_load(config) == load(fedamm_run).config
    assert command == summary(fedamm_run)["command"]


def test_figures_are_whole_and_have_captions(fedamm_run: Path) -> None:
    run = load(fedamm_run)
    text = report([run])
    images = [base64.b64decode(data) for data in SOURCE.findall(text)]
    assert len(images) == len(run.figures()) == text.count("<figcaption>") == text.count("<img ") == text.count("alt=")
    for image in images:
        assert ElementTree.fromstring(image).tag.endswith("svg")
    assert all(caption.endswith(".") for caption in Page(text).texts["figcaption"])


def test_the_same_runs_give_the_same_page(fedavg_run: Path) -> None:
    assert report([load(fedavg_run)]) == report([load(fedavg_run)])


def test_what_went_wrong_is_said(copied: Callable[..., Path]) -> None:
    folder = copied("FedAvg", "run")
    change(
        folder,
        "summary.json",
        failed_clients=3,
        resumes=1,
        stopped="stopped after round 5: 3 rounds in a row failed",
        diverged={"round": 4, "reason": "the test loss is nan"},
    )
    found = page(folder)
    assert found.facts["Incidents"] == "failed clients 3, resumes 1"
    assert "This run has stopped after round 5: 3 rounds in a row failed" in found.texts["p"]
    assert "The global model has diverged in round 4: the test loss is nan." in found.texts["p"]


def test_an_unfinished_run_is_reported_as_such(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "run")
    whole = page(folder)
    (folder / "summary.json").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:3]))
    found = page(folder)
    assert "This run is unfinished: what follows is its state after 2 of 5 rounds." in found.texts["p"]
    assert found.tables[0][1][1] == f"{100 * load(folder).metrics['test/acc'][-1]:.2f}"
    assert [line[:4] for line in found.tables[1][1:]] == [line[:4] for line in whole.tables[1][1:]]
    assert found.facts["Bytes"] == whole.facts["Bytes"]
    assert "s a round: train" in found.facts["Time"]


def test_a_run_that_is_hardly_begun_is_reported(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "run")
    for name in ("summary.json", "diagnostics.json", "config.yaml"):
        (folder / name).unlink()
    assert page(folder).tables[0][0] == ["test accuracy, %", "all", "many", "medium", "few"]
    (folder / "metrics.csv").write_text("\n")
    assert "No round has been evaluated yet." in page(folder).texts["p"]
    assert page(folder, copied("FedAvg", "other")).tables[1][1] == ["run", "", "0, unfinished", *[""] * 5, str(folder)]


# What a page must not hold


def test_a_page_loads_nothing(fedamm_run: Path, fedavg_run: Path) -> None:
    for text in (report([load(fedamm_run)]), report(load_all([fedamm_run, fedavg_run]))):
        outside = SOURCE.sub("", text)
        assert not re.search(r"https?:|//|<script|<link|<iframe|@import|url\(|src=|href=", outside)
        assert "default-src 'none'" in outside
        assert Page(text).tags.count("html") == 1


def test_what_comes_from_files_is_escaped(copied: Callable[..., Path]) -> None:
    folder = copied("FedAMM", "a<b>&c", model=HOSTILE)
    versions = {HOSTILE: HOSTILE}
    change(
        folder,
        "summary.json",
        **dict.fromkeys(("method", "dataset", "model", "command", "stopped"), HOSTILE),
        versions=versions,
        hardware=versions,
        shot_groups={HOSTILE: [0]},
        diverged={"round": 1, "reason": HOSTILE},
    )
    change(folder, "diagnostics.json", class_names=[HOSTILE, *"abcde"])
    for folders in ([folder], [folder, copied("FedAvg", "other")]):
        text = report(load_all(folders))
        found = Page(text)
        assert not {"script", "b"} & set(found.tags)
        assert "&lt;script&gt;alert(&quot;&amp;1&quot;)" in text
        assert any(HOSTILE in line for table in found.tables for line in table)
        assert HOSTILE in found.texts["pre"]


# Several runs


@pytest.fixture
def six(copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """FedAMM asynchronous and synchronous and FedAvg, two seeds each, FedAvg's second a tenth of a point better.

    For speed none has figures of its own.
    """
    monkeypatch.setattr(Run, "figures", lambda run: {})
    folders = [copied("FedAMM", f"async_{seed}", seed) for seed in (0, 1)]
    folders += [copied("FedAMM", f"sync_{seed}", seed, meta_update="synchronous") for seed in (0, 1)]
    folders += [copied("FedAvg", f"avg_{seed}", seed) for seed in (0, 1)]
    content = summary(folders[-1])
    content["final"]["test/acc"] += 0.001
    change(folders[-1], "summary.json", final=content["final"])
    return folders


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
    assert [line[0] for line in by_method[1::4]] == ["final", "best on test", "mean of last 10"]
    names = ["FedAMM, meta_update asynchronous †", "FedAMM, meta_update synchronous †", "FedAvg"]
    assert [line[:2] for line in by_method[2:5]] == [[name, "2"] for name in names]
    final = 100 * summary(six[4])["final"]["test/acc"]
    assert by_method[4][2] == f"{final + 0.05:.1f} ± 0.1"
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
        assert line[8] == str(folder)


def test_the_leader_beyond_the_spread_is_bold(six: list[Path]) -> None:
    for folder in six[4:]:
        content = summary(folder)
        content["final"]["test/acc_few"] = 0.999
        change(folder, "summary.json", final=content["final"])
    assert Page(report(load_all(six))).texts["strong"].count("99.9 ± 0.0") == 1


def test_each_of_few_runs_has_its_figures(fedamm_run: Path, fedavg_run: Path) -> None:
    runs = load_all([fedamm_run, fedavg_run])
    assert len(SOURCE.findall(report(runs))) == 2 + sum(len(run.figures()) for run in runs)


def test_the_runs_of_many_have_no_figures(
    six: list[Path], copied: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Run, "figures", lambda run: pytest.fail("it draws them"))
    text = report(load_all([*six, copied("FedAvg", "avg_2", 2)]))
    assert len(SOURCE.findall(text)) == 2
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


def test_no_run_is_an_error() -> None:
    with pytest.raises(ValueError, match="Expected `runs` to hold a run, got none"):
        report([])


# The command


def test_the_page_of_a_run_goes_to_its_folder(copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("FedAvg", "run")
    main(["report", str(folder)])
    assert capsys.readouterr().out == f"report in {folder / 'report.html'}\n"
    assert (folder / "report.html").read_text() == report([load(folder)])


def test_the_page_of_a_comparison_goes_to_the_working_folder(
    six: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["report", str(tmp_path)])
    assert capsys.readouterr().out == "report in report.html\n"
    assert Page((tmp_path / "report.html").read_text()).texts["h1"] == ["6 runs, tiny"]


def test_the_page_goes_where_it_is_told(fedavg_run: Path, tmp_path: Path) -> None:
    main(["report", str(fedavg_run), "--output", str(tmp_path / "page.html")])
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["{tmp}/nowhere"], ["Expected RUN to be the folder of a run, with metrics.csv, got", "nowhere"]),
        (["{tmp}"], ["Expected RUN to be the folder of a run", "got {tmp}"]),
        ([], ["required: runs"]),
        (["{run}", "--output", "{tmp}"], ["Expected --output to be a file that can be written, got {tmp}"]),
        (["{run}", "--output", "/proc/page.html"], ["Expected --output to be a file", "got /proc/page.html"]),
        (["{run}", "--outptu", "x"], ["unknown option outptu"]),
    ],
)
def test_mistakes_are_one_line_and_status_2(
    words: list[str], parts: list[str], fedavg_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def filled(text: str) -> str:
        return text.format(tmp=tmp_path, run=fedavg_run)

    with pytest.raises(SystemExit) as stop:
        main(["report", *map(filled, words)])
    shown = capsys.readouterr()
    assert stop.value.code == 2
    assert shown.out == ""
    assert shown.err.startswith("fedamm: error: ")
    assert shown.err.count("\n") == 1
    for part in parts:
        assert filled(part) in shown.err
    assert list(tmp_path.iterdir()) == []


def test_a_mangled_file_is_named(copied: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    folder = copied("FedAvg", "run")
    (folder / "summary.json").write_text("{")
    with pytest.raises(SystemExit) as stop:
        main(["report", str(folder)])
    assert stop.value.code == 2
    assert f"fedamm: error: Expected {folder / 'summary.json'} to be " in capsys.readouterr().err


def test_help_is_useful(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["report", "--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    for word in ("RUN", "--output", "report.html", "comparison"):
        assert word in shown
