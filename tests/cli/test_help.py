"""Help: a page for the program and for each class, short, in words, with the options that one can set and no others."""

import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
import yaml
from torch import nn

from fedamm_pl import FedAvg
from fedamm_pl.cli.main import main
from fedamm_pl.cli.options import GROUPS, LINKED, OFFERED, group_of, options_of
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.models import MODELS

METHODS = OFFERED["algorithm"]
CLASSES = [kind for group in GROUPS for kind in OFFERED.get(group, [GROUPS[group]])]
LAYERS = {name for name, kind in vars(nn).items() if inspect.isclass(kind) and issubclass(kind, nn.Module)} - {"Module"}

Shown = Callable[..., str]


class Own(FedAvg):
    """A method of one's own, see :class:`FedAvg`.

    It passes on what it does not know.

    Args:
        strength: How ``strong`` it is.
        options: Those of FedAvg.
    """

    def __init__(self, strength: float | None = None, **options: Any) -> None:
        super().__init__(**options)


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Shown:
    """The program's answer to a request for help."""
    monkeypatch.setenv("COLUMNS", "80")

    def shown(*words: str) -> str:
        main(words)
        printed = capsys.readouterr()
        assert printed.err == ""
        assert printed.out.startswith("usage: fedamm ")
        assert max(map(len, printed.out.splitlines())) <= 80
        assert not re.search(r"`|:\w+:`", printed.out)
        return printed.out

    return shown


def help_of(shown: Shown, kind: type) -> str:
    group = group_of(kind)
    return shown(f"--{group}.help", *([kind.__name__] if group in OFFERED else []))


def options_in(text: str) -> set[str]:
    return set(re.findall(r"^  --(\S+)", text, re.MULTILINE))


# The program


def test_help_of_the_program_is_short_and_names_the_rest(shown: Shown) -> None:
    text = shown("--help")
    assert text.count("\n") < 100
    for option in ("--data.help", "--algorithm.help", "--executor.help", "--trainer.help", "compare", "report"):
        assert option in text
    assert shown("-h") == text
    assert shown("--seed", "1", "--help", "--algorithm.help") == text


def test_help_of_the_program_shows_its_options(shown: Shown) -> None:
    text = shown("--help")
    listed = {f"{group}.{name}" for group in ("federation", "output") for name in options_of(GROUPS[group])}
    top = {string.removeprefix("--") for action in build_parser()._actions for string in action.option_strings}
    top = {name for name in top if "." not in name and not name.endswith("+")} - {"federation", "trainer", "output"}
    assert options_in(text) - {"trainer.OPTION"} == listed | top
    assert "Folder of the run" in text


# A class


@pytest.mark.parametrize("kind", CLASSES)
def test_help_of_a_class_is_short_and_has_every_option_with_its_text(kind: type, shown: Shown) -> None:
    text, group = help_of(shown, kind), group_of(kind)
    assert text.count("\n") < 12 + 4.5 * len(options_of(kind))
    assert options_in(text) == {f"{group}.{name}" for name in options_of(kind)}
    for name, parameter in options_of(kind).items():
        entry = re.search(rf"^  --{group}\.{name} (.+\n(?:        .+\n)?)((?:      \S.*\n)+)", text, re.MULTILINE)
        assert entry, name
        assert ("(required)" if parameter.default is parameter.empty else "(default") in entry[1], name


@pytest.mark.parametrize("method", METHODS)
def test_help_of_a_method_has_what_one_can_set_and_no_layer_of_torch(
    method: type, shown: Shown, capsys: pytest.CaptureFixture[str]
) -> None:
    text = shown("--algorithm.help", method.__name__)
    assert text.count("\n") < 75
    assert not LAYERS & set(re.findall(r"\w+", text))
    with pytest.raises(SystemExit):
        main(["--algorithm", method.__name__, "--federation.num_rounds", "1", "--print_config"])
    accepted = yaml.safe_load(capsys.readouterr().out)["algorithm"]["init_args"]
    assert options_in(text) == {f"algorithm.{name}" for name in accepted if name not in LINKED["algorithm"]}


def test_network_is_a_name_or_an_import_path(shown: Shown) -> None:
    (model,) = re.findall(r"--algorithm\.model (.*?)\n  --", shown("--algorithm.help", "FedAMM"), re.DOTALL)
    assert model.startswith("str (default resnet32)")
    for name in MODELS:
        assert name in model
    assert "import path" in model


@pytest.mark.parametrize(
    "word", ["--algorithm.help FedAMM", "--algorithm.help=FedAMM", "--seed 1 --algorithm.help FedAMM -x"]
)
def test_class_is_named_by_the_same_or_the_next_word(word: str, shown: Shown) -> None:
    assert shown(*word.split()) == shown("--algorithm.help", "FedAMM")


def test_help_of_an_own_class_has_its_options_and_those_it_passes_on(shown: Shown) -> None:
    text = shown("--algorithm.help", f"{__name__}.Own")
    assert f"--algorithm {__name__}.Own" in text
    assert "A method of one's own, see FedAvg." in text
    assert "  --algorithm.strength float or null (default null)\n      How strong it is.\n" in text
    assert options_in(text) == {"algorithm.strength", *(f"algorithm.{name}" for name in options_of(FedAvg))}


@pytest.mark.parametrize("group", ["algorithm", "executor"])
def test_help_without_a_class_lists_them(group: str, shown: Shown) -> None:
    text = shown(f"--{group}.help")
    listed = re.findall(r"^  (\w+) ", text, re.MULTILINE)
    assert sorted(listed) == sorted(kind.__name__ for kind in OFFERED[group])
    assert f"--{group}.help CLASS" in " ".join(text.split())
    assert shown(f"--{group}.help", "--seed", "1") == text


@pytest.mark.parametrize(
    ("option", "name", "parts"),
    [
        ("--algorithm.help", "fedamm", ["--algorithm", "got fedamm", "did you mean FedAMM?"]),
        ("--algorithm.help", "nowhere.Net", ["--algorithm", "nowhere.Net", "No module named 'nowhere'"]),
        ("--algorithm.help", f"{__name__}.METHODS", ["--algorithm", "METHODS, which is not one"]),
        ("--algorithm.help", "torch.nn.Linear", ["--algorithm", "torch.nn.Linear, which is not one"]),
        ("--data.help", "FedAMM", ["--data", "FederatedDataModule", "got FedAMM"]),
        ("--executor.help", "Process", ["--executor", "did you mean Processes?"]),
    ],
)
def test_help_of_an_unknown_class_is_one_line(
    option: str, name: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([option, name])
    printed = capsys.readouterr()
    assert (stop.value.code, printed.out, printed.err.count("\n")) == (2, "", 1)
    assert printed.err.startswith("fedamm: error: ")
    for part in parts:
        assert part in printed.err


@pytest.mark.parametrize("words", [["compare", "--help"], ["report", "--help"], ["--logger.help", "CSVLogger"]])
def test_other_help_calls_the_program_by_the_same_name(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage: fedamm ")
