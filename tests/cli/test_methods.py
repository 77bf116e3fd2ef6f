"""``fedamm methods``: the table of what methods take, that it tells the truth, and that the page shows the same."""

import csv
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, algorithms
from fedamm_pl.cli.main import main
from fedamm_pl.cli.methods import GAP, WIDTH, as_text
from fedamm_pl.cli.options import OFFERED
from fedamm_pl.data.sources import ImageInfo
from fedamm_pl.federation.server import takes_statistics
from fedamm_pl.protocol.messages import ClientResult, payload_bytes
from fedamm_pl.protocol.privileges import NOTHING, Privileges
from tests.algorithms.test_methods import METHODS, Method
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, tiny_data

PAGE = Path(__file__).parents[2] / "docs/methods.md"
NAMES = {kind.__name__ for kind in OFFERED["algorithm"]}
MODEL = 4 * (94_186 + 2 * 224) + 3 * 8
"""Bytes of small_cnn with ten classes and grey images: its parameters, and 224 means, variances and 3 counters of BatchNorm."""


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    main(["methods", *words])
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


# What is printed


@pytest.mark.parametrize("columns", [WIDTH, 180])
def test_table_names_every_method_and_fits_a_terminal(
    columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = printed(capsys).splitlines()
    assert columns - 20 < max(map(len, lines[: lines.index("")])) <= columns
    rule = next(index for index, line in enumerate(lines) if set(line) == {"-", " "})
    named = [line.split()[0] for line in lines[rule + 1 : lines.index("")] if not line.startswith(" ")]
    assert set(named) == NAMES
    assert named == ["FedAvg", *sorted(NAMES - {"FedAvg"}, key=str.lower)]
    assert "--algorithm.local_optimizer" in "\n".join(lines)


def test_bytes_are_those_of_a_round(capsys: pytest.CaptureFixture[str]) -> None:
    found = {row["method"]: row for row in json.loads(printed(capsys, "--format", "json"))}
    assert set(found) == NAMES
    both = {name: (row["received"], row["sent"]) for name, row in found.items()}
    assert both["FedAvg"] == both["FedProx"] == (MODEL, MODEL)
    assert both["FedNova"] == (MODEL, MODEL + 8)
    assert both["RatioLoss"] == (MODEL + 40, MODEL)
    assert both["CReFF"] == (MODEL + 4 * 10 * 129, MODEL + 4 * 10 * 10 * 129 + 80)
    # the weight net both ways; the virtual weights there, the gradient back
    assert both["FedAMM"] == (MODEL + 4 * (301 + 94_186), MODEL + 4 * (301 + 94_186))
    rows = list(csv.DictReader(io.StringIO(printed(capsys, "FedNova", "--format", "csv"))))
    assert rows == [{name: str(value) for name, value in found["FedNova"].items()}]


def test_named_methods_are_shown_in_full(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "MetaFineTune", "FedProx")
    first, second = text.split("\n\n")
    assert first.splitlines()[0] == "MetaFineTune"
    assert "balanced labelled images" in first
    assert second.splitlines()[0] == "FedProx"
    assert f"{MODEL:,} bytes per round, 1.00 times the model" in second


class Own(FedAvg):
    """A method of one's own."""

    @property
    def privileges(self) -> Privileges:
        return Privileges(revealed="=secrets | of its own")


class Unmakeable(FedAvg):
    """Cannot be made with defaults."""

    def __init__(self, num_classes: int, in_channels: int, model: str, info: ImageInfo, needed: int) -> None:
        super().__init__(num_classes, in_channels, model, info=info)


def test_own_method_is_named_by_its_path(capsys: pytest.CaptureFixture[str]) -> None:
    path = f"{__name__}.Own"
    assert "=secrets | of its own\n" in printed(capsys, path)
    assert r"| Own | - | =secrets \| of its own | 1 | 1 |" in printed(capsys, path, "--format", "markdown")
    (row,) = csv.DictReader(io.StringIO(printed(capsys, path, "--format", "csv")))
    assert row["revealed"] == "'=secrets | of its own"  # no formula


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["fedprx"], "Expected METHOD to be one of "),
        (["fedprx"], "got fedprx; did you mean FedProx?"),
        (["fedamm_pl.Orchestrator"], "got fedamm_pl.Orchestrator, which is not one"),
        (["no.where"], "got no.where (ModuleNotFoundError: "),
        ([f"{__name__}.Unmakeable"], "TypeError"),
        (["--format", "xml"], "Expected --format to be one of "),
        (["--formats", "csv"], "did you mean --format?"),
    ],
)
def test_mistake_is_one_line(words: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["methods", *words])
    shown = capsys.readouterr()
    assert (stop.value.code, shown.out, shown.err.count("\n")) == (2, "", 1)
    assert shown.err.startswith("fedamm: error: ")
    assert part in shown.err


def test_help_and_the_programs_help_name_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["methods", "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "METHOD" in text
    assert "(required)" not in text
    main(["--help"])
    assert "fedamm methods" in capsys.readouterr().out


@pytest.mark.parametrize("most", [20, 40, 100])
def test_long_cells_go_on_below_and_nothing_is_lost(most: int) -> None:
    lines = [["method", "needs"], ["A", "a few words and more of them"], ["B", "1 + 8 B"]]
    found = as_text(lines, most)
    assert max(map(len, found)) <= most
    assert any(line.endswith("1 + 8 B") for line in found)
    start = found[0].index("needs")
    assert start >= len("method") + GAP
    cell = " ".join(line[start:].strip() for line in found[2:-1])
    assert cell == lines[1][1]


def test_the_page_shows_what_the_program_prints(capsys: pytest.CaptureFixture[str]) -> None:
    shown = PAGE.read_text().partition("<!-- methods -->\n")[2].partition("<!-- /methods -->")[0]
    said = "put what `python orchestrate.py methods --format markdown` prints between the two lines in docs/methods.md"
    assert shown == printed(capsys, "--format", "markdown"), said


def test_the_page_defines_every_method() -> None:
    headings = [line[4:].partition(":")[0] for line in PAGE.read_text().splitlines() if line.startswith("### ")]
    assert set(algorithms.__all__) <= set(headings)
    assert len(headings) == len(set(headings))


# What the classes declare


EVERY: dict[str, Method] = {**METHODS, "FedAvg": (FedAvg, {}), "FedAMM": (FedAMM, {"differentiation": "forward"})}


def network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


@pytest.mark.parametrize("method", EVERY.values(), ids=list(EVERY))
def test_what_a_method_declares_is_what_it_does(method: Method) -> None:
    algorithm, options = method
    data = tiny_data(num_clients=2)
    torch.manual_seed(0)
    module: FederatedModule = algorithm(NUM_CLASSES, 1, network(), info=data.info, **options)
    declared, shared = module.privileges, module.shared_state()
    state: dict[str, Any] | None = None
    kept: dict[int, Any] = {}
    for number in (1, 2):
        one = Round(module, data, state=state, round_num=number)
        results = [one.train(client, kept=kept.get(client)) for client in range(2)]
        kept = {result.client_id: result.kept for result in results}
        state = one.update(results)
    assert state is not None
    says = {name: text != NOTHING for name, text in dataclasses.asdict(declared).items()}
    assert ("labelled images" in declared.server) == module.uses_meta_set
    assert says["client_state"] == any(kept.values())
    assert says["server_state"] == bool(state.keys() - shared.keys())
    assert says["revealed"] == (reveals(results[0], module) or sends_statistics(module))


def reveals(result: ClientResult, module: FederatedModule) -> bool:
    """Whether a client has sent more than its model: in its result, its tallies, or a question."""
    beside = result.payload.keys() - module.shared_state().keys()
    return bool(beside or result.tallies or result.bytes_sent > payload_bytes(result.payload)) or any(
        not name.startswith("model.") for name in module.shared_state()
    )


def sends_statistics(module: FederatedModule) -> bool:
    return takes_statistics(module) and module.calibrates(last=True)
