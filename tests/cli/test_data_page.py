"""Each command of docs/data.md, in its order, on small data of the kind that it speaks of."""

import ast
import csv
import json
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fedamm_pl.cli.main import main
from fedamm_pl.federation.trainer import quiet
from tests.pages import blocks, commands, run_python

COMMANDS = [
    list(command.words)
    for block in blocks("docs/data.md", "bash")
    for command in commands(block)
    if command.program == "python"  # the others, of the program `fedamm`, are examples of options
]
FOLDERS = [words[words.index("--output.dir") + 1] for words in COMMANDS]
SMALL = [
    *("--federation.num_rounds", "2", "--federation.local_epochs", "1", "--federation.eval_interval", "1"),
    *("--trainer.accelerator", "cpu", "--output.figures", "false", "--logger", "false", "--output.progress", "none"),
]


def photograph(path: Path, label: int, rng: np.random.Generator) -> None:
    """Write an image of some size, brighter for a higher label."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = rng.integers(34, 50, 2)
    pixels = rng.integers(0, 80, (height, width, 3)) + 80 * label
    Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``data`` in it, as the page says."""
    folder, rng = tmp_path_factory.mktemp("page"), np.random.default_rng(0)
    data = folder / "data"
    sites, classes = ["north", "east", "south", "west"], ["healthy", "ill"]
    rows = ["path,label,site"]
    for number in range(64):
        site, label = sites[number % 4], number // 4 % 2
        photograph(data / "hospitals" / site / classes[label] / f"{number}.png", label, rng)
        photograph(data / "photos" / f"{number}.png", label, rng)
        rows.append(f"photos/{number}.png,{classes[label]},{site}")
    (data / "photos.csv").write_text("\n".join(rows) + "\n")
    listed = [f"photos/{number}.png {number // 4 % 2}\n" for number in range(64)]
    (data / "train.txt").write_text("".join(listed[:48]))
    (data / "test.txt").write_text("".join(listed[48:]))
    heading = ["client", *(f"f{column}" for column in range(10)), "label"]
    features = rng.normal(size=(330, 10)).round(3)
    vowel = [[row // 22, *features[row], row % 11] for row in range(330)]
    letters = [[*features[row % 330], ascii_uppercase[row % 26]] for row in range(6000)]
    for name, columns, lines in (("vowel", heading, vowel), ("letter", heading[1:], letters)):
        text = [",".join(map(str, line)) for line in [columns, *lines]]
        (data / f"{name}.csv").write_text("\n".join(text) + "\n")
    return folder


def assert_found_again(partition: dict[str, Any]) -> None:
    """Require another program to find each client's examples in the table, by what the page says of ``rows``."""
    with open("data/vowel.csv") as file:
        table = list(csv.DictReader(file))
    train, test = ([table[row] for row in partition["rows"][part]] for part in ("train", "test"))
    for name, mine in partition["clients"].items():
        assert mine
        assert {train[index]["client"] for index in mine} == {name}
    assert sorted(partition["rows"]["train"] + partition["rows"]["test"]) == list(range(len(table)))
    assert len(test) == 66
    assert {train[index]["label"] for index in partition["meta"]} == {str(label) for label in range(11)}


@pytest.mark.parametrize("words", COMMANDS, ids=FOLDERS)
def test_command(words: list[str], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    written = place / words[words.index("--output.dir") + 1]
    if "--data.partition_file" in words and not Path(words[words.index("--data.partition_file") + 1]).exists():
        before = next(other for other in COMMANDS if other[other.index("--output.dir") + 1] == "runs/letter")
        main([*before[2:], *SMALL])
    main([*words[2:], *SMALL])
    summary = json.loads((written / "summary.json").read_text())
    assert 0 <= summary["final"]["test/acc"] <= 1
    names = json.loads((written / "partition.json").read_text())["clients"]
    if "by_client" in words:
        assert set(names) == (
            {str(k) for k in range(15)} if "vowel.csv" in words else {"north", "east", "south", "west"}
        )
    if "vowel.csv" in words:
        assert_found_again(json.loads((written / "partition.json").read_text()))
    if "--data.partition_file" in words:
        assert names == json.loads((place / "runs/letter/partition.json").read_text())["clients"]
    assert (written / "clients.csv").exists() == ("--data.local_test_fraction" in words)


@pytest.mark.filterwarnings("ignore:.*logging interval")  # of two batches
def test_the_code_of_the_page_runs(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    for folder in ("hospitals", "vowel", "letter"):
        if not Path(f"runs/{folder}/final.ckpt").exists():
            main([*COMMANDS[FOLDERS.index(f"runs/{folder}")][2:], *SMALL])
    for number in (1, 2):
        photograph(place / "new" / f"{number}.jpg", number - 1, np.random.default_rng(number))
    smaller = {
        "max_epochs=50": "max_epochs=1, limit_train_batches=2, limit_val_batches=1",
    }
    capsys.readouterr()
    with quiet():
        names = run_python("docs/data.md", smaller)
    predicted, hospitals, *_, letters = capsys.readouterr().out.splitlines()
    assert len(ast.literal_eval(letters)) == 5
    assert set(ast.literal_eval(letters)) <= set(ascii_uppercase)
    assert set(ast.literal_eval(predicted)) <= {"healthy", "ill"}
    assert ast.literal_eval(hospitals) == ["east", "north", "south", "west"]
    assert {row["client"] for row in names["first"]} == {"0"}
    assert names["probabilities"].shape == (5, 26)
    (shown, _) = (json.loads(block.text) for block in blocks("docs/data.md", "json"))
    assert shown.keys() == json.loads(Path("runs/vowel/partition.json").read_text()).keys()


def test_the_page_has_a_command_for_each_kind_of_data() -> None:
    assert len(COMMANDS) >= 6
    assert len(set(FOLDERS)) == len(FOLDERS)
