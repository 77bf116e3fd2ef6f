"""The folder of a run may come from anybody: whatever it holds, ``report`` ends in a page or in one line, soon, and touches no more."""

import io
import json
import random
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl.cli.main import main
from fedamm_pl.results import figure_parts
from fedamm_pl.results.runs import load, load_all
from tests.results.handmade import a_rich_run, a_run

FILES = ("metrics.csv", "config.yaml", "summary.json", "diagnostics.json")
JUNK: list[Any] = [
    None,
    True,
    -1,
    0.5,
    1e300,
    10**400,
    "",
    "x",
    "a" * 2000,
    [],
    [[]],
    [1],
    {},
    {"": {}},
    {"x": [None]},
    [None] * 3,
    ["x"] * 3,
]
SECONDS = 60  # on a loaded machine; most take one or two


def places(node: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values of a JSON document."""
    for step, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*above, step)
        yield from places(value, (*above, step))


def changed(content: Any, place: tuple[Any, ...], value: Any) -> str:
    copy = node = json.loads(json.dumps(content))
    for step in place[:-1]:
        node = node[step]
    node[place[-1]] = value
    return json.dumps(copy)


def end(folder: Path) -> str:
    """Report a folder; return the refusal, or nothing. A refusal is one line, and nothing is left of it."""
    page, begun, status = folder / "report.html", time.monotonic(), 0
    page.unlink(missing_ok=True)
    before = set(folder.parent.rglob("*"))
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        try:
            main(["report", str(folder)])
        except SystemExit as stop:
            status = int(stop.code or 0)
    assert time.monotonic() - begun < SECONDS
    assert "Traceback" not in err.getvalue()
    if status == 0:
        assert set(folder.parent.rglob("*")) - before == {page}
        return ""
    assert (status, out.getvalue(), err.getvalue().count("\n")) == (2, "", 1), err.getvalue()
    assert set(folder.parent.rglob("*")) == before
    return err.getvalue()


def refusal(folder: Path) -> str:
    """Load a folder; return the refusal, or nothing."""
    try:
        load(folder)
    except ValueError as error:
        said = str(error)
        assert len(said.splitlines()) == 1
        return said
    return ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return a_rich_run(tmp_path / "all/run")


def test_the_folder_to_be_mangled_is_a_good_one(folder: Path) -> None:
    assert end(folder) == ""
    text = (folder / "report.html").read_text()
    assert text.count("<img") == 7
    assert "could not be drawn" not in text


def junk(name: str, folder: Path) -> Iterator[str]:
    """Documents with junk in one of all places."""
    content = json.loads((folder / name).read_text())
    for place in places(content):
        for value in JUNK:
            yield changed(content, place, value)


@pytest.mark.parametrize("name", ["summary.json", "diagnostics.json"])
def test_junk_in_any_field_is_read_or_named(name: str, folder: Path) -> None:
    for text in junk(name, folder):
        (folder / name).write_text(text)
        found = refusal(folder)
        assert not found or name in found


def accepted(name: str, folder: Path) -> list[str]:
    """Documents with junk that are read all the same."""
    good = (folder / name).read_text()
    found = []
    for text in list(junk(name, folder)):
        (folder / name).write_text(text)
        if not refusal(folder):
            found.append(text)
    (folder / name).write_text(good)
    return found


@pytest.mark.parametrize("name", ["summary.json", "diagnostics.json"])
def test_what_is_read_is_drawn(name: str, folder: Path) -> None:
    for text in random.Random(0).sample(accepted(name, folder), 4):
        (folder / name).write_text(text)
        assert end(folder) == ""
        assert "could not be drawn" not in (folder / "report.html").read_text(), text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["summary.json", "diagnostics.json"])
def test_all_that_is_read_is_drawn(name: str, folder: Path) -> None:
    for text in accepted(name, folder):
        (folder / name).write_text(text)
        assert end(folder) == ""
        assert "could not be drawn" not in (folder / "report.html").read_text(), text


def mangled(content: bytes, generator: random.Random) -> bytes:
    """Content of which bytes are flipped, lost, doubled, or replaced by what is special somewhere."""
    special = [
        b"\0",
        b"\xff",
        b",",
        b"\n",
        b'"',
        b"*a",
        b"&a ",
        b"- ",
        b"{",
        b"[" * 3000,
        b"nan",
        b"1e999",
        b"9" * 5000,
        b"!!set ",
        b": ",
    ]
    for _ in range(generator.choice([1, 1, 2, 5])):
        start = generator.randrange(len(content) + 1)
        stop = min(len(content), start + generator.choice([0, 0, 1, 1, 5, 50]))
        content = (
            content[:start]
            + generator.choice([*special, bytes([generator.randrange(256)]), content[start:stop] * 2])
            + content[stop:]
        )
    return content


def mangle(folder: Path, times: int) -> None:
    generator = random.Random(times)
    for name in FILES:
        whole = (folder / name).read_bytes()
        for _ in range(times):
            (folder / name).write_bytes(mangled(whole, generator))
            found = refusal(folder)
            assert not found or name in found or "summary.json and diagnostics.json" in found
        (folder / name).write_bytes(whole)


def test_mangled_files_are_read_or_named(folder: Path) -> None:
    mangle(folder, 150)


@pytest.mark.slow
def test_any_mangled_files_are_read_or_named(folder: Path) -> None:
    mangle(folder, 5000)


@pytest.mark.slow
def test_any_mangled_file_ends_in_a_page_or_a_line(folder: Path) -> None:
    generator = random.Random(1)
    for name in FILES:
        whole = (folder / name).read_bytes()
        for _ in range(60):
            (folder / name).write_bytes(mangled(whole, generator))
            end(folder)
        (folder / name).write_bytes(whole)


# What does not fit into memory, or never ends.


def refused(folder: Path, name: str, content: bytes, said: str) -> None:
    (folder / name).write_bytes(content)
    begun = time.monotonic()
    assert said in refusal(folder)
    assert time.monotonic() - begun < 10


LAUGHS = "a0: &a0 [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {k: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [{','.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 10))


@pytest.mark.parametrize("text", [LAUGHS, MERGES, "seed: &a 0\nother: *a\n"])
def test_aliases_are_refused(text: str, folder: Path) -> None:
    refused(
        folder,
        "config.yaml",
        text.encode(),
        "config.yaml to be as a run has written it, got a file that cannot be read: it has an alias",
    )


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("config.yaml", b"seed: 0\n#" + b"x" * 200_000, "more than 200,000 bytes"),
        ("config.yaml", b"a: 0x" + b"f" * 5000, "a number in it is too large"),
        ("config.yaml", b"a: " + b"[" * 40 + b"]" * 40, "nested too deeply"),
        ("config.yaml", b"algorithm: {class_path: [1]}", "a class_path in it is not a text"),
        ("config.yaml", b"1: 2", "a name in it is not a text"),
        ("config.yaml", b"seed: x", "seed should be a whole number from 0 to"),
        ("config.yaml", b"federation: {client_fraction: x}", "federation.client_fraction should be a number from 0 to 1"),
        ("summary.json", b"[" + b"1," * 12_000_000 + b"1]", "it holds more than 12,000,000 values"),
        ("summary.json", b'{"a":' * 100_000, "maximum recursion depth"),
        ("summary.json", b'{"final": 1, "final": 2}', "it has a name twice"),
        ("summary.json", b'{"final": NaN}', "NaN is no JSON"),
        ("metrics.csv", b"round,test/acc\n" + b"0," * 100_000 + b"\n", "metrics.csv"),
        ("metrics.csv", b"round,test/acc,test/acc\n0,0.5,0.5\n", "it has a column twice"),
        ("metrics.csv", b"round,test/acc\n0,1e999\n", "test/acc in row 1 should be a number from 0 to 1, got inf"),
        ("metrics.csv", b"round,test/acc\n0,0.5\n0,0.5\n", "round should rise"),
        ("metrics.csv", b"round,test/acc\n0.5,0.5\n", "round in row 1 should be a whole number"),
        ("metrics.csv", b"round,test/acc\nnan,0.5\n", "round in row 1 should be a whole number"),
        ("metrics.csv", b"round,test/acc\n0,\n", "row 1 has no test/acc"),
        ("metrics.csv", b"round,test/acc\n" + b"x" * 200_000, "field larger than field limit"),
        ("metrics.csv", b"round,test/acc," + b",".join(b"c%d" % n for n in range(110_000)) + b"\n", "more values than a run"),
        ("metrics.csv", b"round,test/acc," + b",".join(b"test/acc_%d" % n for n in range(200)) + b"\n", "columns of groups"),
    ],
)  # fmt: skip
def test_more_than_a_run_holds_is_refused(name: str, content: bytes, said: str, folder: Path) -> None:
    refused(folder, name, content, said)


def test_a_sparse_file_is_not_read_whole(folder: Path) -> None:
    with (folder / "summary.json").open("ab") as file:
        file.truncate(10**12)
    assert "summary.json" in refusal(folder)


def test_lengths_must_agree(folder: Path) -> None:
    content = json.loads((folder / "diagnostics.json").read_text())
    for place, said in [
        (("class_names",), "class_names should be as long as class_counts, 3, got 2"),
        (("client_class_counts", 1), "client_class_counts[1] should be as long as class_counts, 3, got 2"),
        (("client_names",), "client_names should be as long as client_class_counts, 2, got 1"),
        (("confusion",), "confusion should be as long as class_counts, 3, got 2"),
        (("confusion", 2), "confusion[2] should be as long as class_counts, 3, got 2"),
        (("losses",), "rounds[0].weight_curve should be as long as losses, 2, got 3"),
        (("rounds", 3, "weight_per_class"), "rounds[3].weight_per_class should be as long as class_counts, 3, got 2"),
    ]:
        value = content
        for step in place:
            value = value[step]
        cut = value[: min(2, len(value) - 1)]
        refused(folder, "diagnostics.json", changed(content, place, cut).encode(), said)
    refused(
        folder,
        "diagnostics.json",
        changed(content, ("shot_groups", "few", 0), 3).encode(),
        "shot_groups.few[0] should be a class from 0 to 2, got 3",
    )


def test_both_files_are_of_one_run(folder: Path) -> None:
    content = json.loads((folder / "summary.json").read_text())
    text = changed(content | {"shot_groups": {}}, ("class_counts",), [1])
    refused(folder, "summary.json", text.encode(), "to be of one run, got 1 and 3 classes")


@pytest.mark.slow
def test_as_many_classes_as_are_read_are_drawn_soon(folder: Path) -> None:
    content = {
        "class_names": ["c"] * 50_000,
        "class_counts": [1] * 50_000,
        "shot_groups": {"few": list(range(50_000))},
        "rounds": [],
    }
    (folder / "diagnostics.json").write_text(json.dumps(content))
    (folder / "summary.json").unlink()
    assert end(folder) == ""
    content["class_names"] *= 4
    (folder / "diagnostics.json").write_text(json.dumps(content))
    assert "class_names should be a list of at most 50,000, got a list of 200,000" in end(folder)


# Names.


def test_folders_are_looked_through_without_links_and_without_end(tmp_path: Path) -> None:
    run = a_run(tmp_path / "all/run")
    (tmp_path / "all/loop").symlink_to(tmp_path / "all")
    a_run(tmp_path / "elsewhere")
    (tmp_path / "all/out").symlink_to(tmp_path / "elsewhere")
    deep = tmp_path / "all/deep"
    deep.mkdir()
    for _ in range(600):
        deep = deep / "d"
        deep.mkdir()
    assert [found.path for found in load_all([tmp_path / "all"])] == [run]


@pytest.mark.parametrize("limit", ["MAX_RUNS", "MAX_SIZE"])
def test_more_runs_than_can_be_shown_are_refused(limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        a_run(tmp_path / name)
    monkeypatch.setattr(f"fedamm_pl.results.runs.{limit}", 1)
    with pytest.raises(
        ValueError, match=r"^Expected `path` to hold at most .* runs with files of .* bytes, got .* with more"
    ):
        load_all([tmp_path])


def test_control_characters_are_shown_as_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    odd = "a\x1b[2J\u202e\n<b>"
    folder = a_rich_run(tmp_path / f"run{odd.replace('/', '')}", [odd, "b", "c"], method=odd, dataset=odd, command=odd)
    main(["report", str(folder)])
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.count("\n") == 1
    page = (folder / "report.html").read_text()
    for text in (printed.out, page):
        assert not {"\x1b", "\u202e"} & set(text)
        assert r"\x1b[2J\u202e" in text
    assert "<b>" not in page


def test_a_font_that_lacks_characters_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(figure_parts, "said", set())
    figure_parts.drawable.cache_clear()
    folder = a_rich_run(tmp_path / "run", ["中", "文", "tab\tin $\\frac$ it"])
    main(["report", str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    assert line == r"figures: the font lacks characters of some names; they are drawn as codes, 中 as \u4e2d"
    assert "could not be drawn" not in (folder / "report.html").read_text()
