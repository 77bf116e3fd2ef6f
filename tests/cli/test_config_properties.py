"""Any configuration survives being written and read, and whatever is written instead of one ends in one line."""

import io
import math
import re
import shutil
import signal
import sys
import types
import typing
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import pytest
import yaml
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jsonargparse import Namespace

import fedamm_pl
from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.cli.messages import option_names
from fedamm_pl.cli.options import GROUPS, OutputConfig, group_of, options_of
from fedamm_pl.cli.parser import Parser, build_parser, dump
from fedamm_pl.data.sources.in_memory import DOWNLOADABLE
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Processes, Sequential
from fedamm_pl.federation.trainer import TrainerConfig

# jsonargparse tells developers, not users, that some import paths will not do in its next version
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

# A failure has to come back in the next run, and nothing may depend on what is on the disk.
# At 50 ms an input, looking for the smallest that fails would take minutes.
REPEATABLE = settings(
    deadline=None, derandomize=True, database=None, phases=[Phase.explicit, Phase.generate], print_blob=False
)

# Round trips

# What YAML or the parser might take for something else than a text.
TRICKY = """
1_000;0x10;12:30:00;2020-01-01;true;No;~;null;inf;.inf;.nan;1.;=;<<;|;>;é;…; a;a: b;- a;[a];{a: b};# a;a #b;'a';"a";%a;@a;!a;&a;*a
""".strip().split(";")
TEXTS = st.sampled_from(TRICKY) | st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=8)
MODELS = st.sampled_from(["small_cnn", "resnet56", "my_package.my_module.MyNet"])
NUMBERS = st.floats(allow_nan=False) | st.sampled_from([1e-05, 5e-4, 1e-300, 5e-324, 1e22, 0.1, math.inf])


class Quoting(yaml.SafeDumper):
    """Writes every text in quotes, as a careful person would."""


Quoting.add_representer(str, lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"'))


def values_of(annotation: Any) -> st.SearchStrategy[Any]:
    """Values that an option of this type may have, as YAML has them."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        known = [part for part in arguments if not (isinstance(part, type) and part.__module__.startswith("torch"))]
        return st.one_of(*map(values_of, known))
    if origin is dict:
        return st.dictionaries(values_of(arguments[0]), values_of(arguments[1]), max_size=3)
    if origin is tuple:
        return st.tuples(*map(values_of, arguments)).map(list)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    simple = {int: st.integers(), float: NUMBERS, bool: st.booleans(), str: TEXTS, type(None): st.none()}
    return simple[annotation]


def values_for(owner: type, **others: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the options of a class, by the types of its signature."""
    values = {name: others.get(name, values_of(parameter.annotation)) for name, parameter in options_of(owner).items()}
    required = {name for name, parameter in options_of(owner).items() if parameter.default is parameter.empty}
    return st.fixed_dictionaries(
        {name: values[name] for name in values if name in required},
        optional={name: values[name] for name in values if name not in required},
    )


def component(owner: type, **others: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    module = "fedamm_pl" if hasattr(fedamm_pl, owner.__name__) else "fedamm_pl.federation.executors"
    path = st.just(f"{module}.{owner.__name__}")
    return st.fixed_dictionaries({"class_path": path, "init_args": values_for(owner, **others)})


# TrainerConfig refuses others when it is made
DEVICES = st.just(1) | st.lists(st.integers(0, 9), min_size=1, max_size=1)
CONFIGURATIONS = st.fixed_dictionaries(
    {
        "algorithm": component(FedAMM, model=MODELS) | component(FedAvg, model=MODELS),
        "federation": values_for(FederationConfig),
    },
    optional={
        "seed": st.integers(),
        "data": component(FederatedDataModule),
        "executor": component(Sequential) | component(Processes),
        "trainer": values_for(TrainerConfig, devices=DEVICES),
        "output": values_for(OutputConfig, dir=st.none()),
        "logger": st.booleans(),
    },
)


@pytest.fixture(scope="module")
def parser() -> Parser:
    return build_parser()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("config") / "config.yaml"


def assert_holds(given: Any, kept: Any, name: str = "") -> None:
    """Require every option given to be there with its value and type."""
    if isinstance(given, dict) and not name.endswith(".shot_ranges"):
        for key, value in given.items():
            # what is nothing by default is left out
            assert_holds(value, kept.get(key), f"{name}.{key}")
    else:
        assert (kept, type(kept)) == (given, type(given)), name


def read(parser: Parser, file: Path, text: str) -> Namespace:
    file.write_text(text, encoding="utf-8")
    return parser.parse_args(["--config", str(file)])


@given(config=CONFIGURATIONS)
@settings(REPEATABLE, max_examples=60)
def test_a_configuration_written_and_read_again_is_the_same(config: Any, parser: Parser, file: Path) -> None:
    first = dump(parser, read(parser, file, yaml.dump(config, Dumper=Quoting)))
    assert_holds(config, yaml.safe_load(first))
    assert dump(parser, read(parser, file, first)) == first


# numbers in YAML 1.2 and for the parser, texts in YAML 1.1 and for PyYAML
@pytest.mark.parametrize("name", ["1e-05", "5e-4", "1e5", "2E3"])
def test_a_text_that_looks_like_a_number_survives(name: str, parser: Parser, file: Path) -> None:
    words = ["--algorithm=FedAvg", "--federation.num_rounds=1", f"--data.dataset={name}", f"--data.root={name}"]
    first = dump(parser, parser.parse_args(words))
    again = read(parser, file, first)
    assert (again.data.init_args.dataset, again.data.init_args.root) == (name, name)
    assert dump(parser, again) == first


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(
            ("1e-05", 1e-05),
            ("1.0e-05", 1e-05),
            ("5e-4", 5e-4),
            ("1E-3", 1e-3),
            ("1e+2", 100.0),
            (".5", 0.5),
            ("5.", 5.0),
        ),
        *(
            ("3", 3.0),
            ("1_000", 1000.0),
            (".inf", math.inf),
            ("-.inf", -math.inf),
            ("1e400", math.inf),
            ("5e-324", 5e-324),
        ),
    ],
)
def test_a_number_is_read_in_every_spelling(text: str, number: float, parser: Parser, file: Path) -> None:
    base = ["--algorithm=FedAvg", "--federation.num_rounds=1"]
    by_word = parser.parse_args([*base, f"--algorithm.lr={text}", f"--data.dirichlet_alpha={text}"])
    file.write_text(
        f"algorithm:\n  class_path: FedAvg\n  init_args:\n    lr: {text}\ndata:\n  dirichlet_alpha: {text}\n"
        "federation:\n  num_rounds: 1\n"
    )
    by_file = parser.parse_args(["--config", str(file)])
    again = read(parser, file, dump(parser, by_word))
    for config in (by_word, by_file, again):
        assert (config.algorithm.init_args.lr, config.data.init_args.dirichlet_alpha) == (number, number)


@pytest.mark.parametrize("text", ["inf", "nan", "1,5", "10**3", "true", "0.5.1", "1e", "--1", "[1]", "1e5e5", "½"])
def test_what_is_no_number_is_refused(
    text: str, parser: Parser, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(f"algorithm:\n  class_path: FedAvg\n  init_args:\n    lr: {text}\nfederation:\n  num_rounds: 1\n")
    words = ["--algorithm=FedAvg", "--federation.num_rounds=1", f"--algorithm.lr={text}"]
    for arguments in (words, ["--config", str(file)]):
        with pytest.raises(SystemExit) as stop:
            parser.parse_args(arguments)
        assert stop.value.code == 2
        assert "--algorithm.lr" in capsys.readouterr().err


def words_of(config: Any, prefix: str = "--") -> Iterator[str]:
    """The command line of a configuration without texts, which there are read as YAML."""
    for name, value in sorted(config.items()):  # a class before its options
        if name == "class_path":
            yield f"{prefix.rstrip('.')}={value}"
        elif isinstance(value, dict):
            yield from words_of(value, prefix if name == "init_args" else f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}={spelt(value)}"


def spelt(value: Any) -> str:
    return value if isinstance(value, str) else str(yaml.safe_dump(value, default_flow_style=True).split("\n")[0])


def without_texts(config: Any) -> Any:
    if not isinstance(config, dict):
        return config
    texts = ("dataset", "root", "partition", "partition_file", "shot_ranges")
    return {
        name: without_texts(value)
        for name, value in config.items()
        if name not in texts and not name.endswith("_column")
    }


@given(config=CONFIGURATIONS.map(without_texts))
@settings(REPEATABLE, max_examples=30)
def test_command_line_and_file_say_the_same(config: Any, parser: Parser, file: Path) -> None:
    by_file = dump(parser, read(parser, file, yaml.dump(config, Dumper=Quoting)))
    assert dump(parser, parser.parse_args(list(words_of(config)))) == by_file


# Fuzzing

BASE = """\
seed: 3
data:
  class_path: fedamm_pl.FederatedDataModule
  init_args:
    dataset: tiny
    root: .
    num_clients: 4
    partition: by_dirichlet
    imbalance_factor: 0.1
    imbalance_profile: exponential
    shuffle_ranks: true
    num_meta_per_class: 5
    batch_size: 8
    dirichlet_alpha: 0.5
    min_client_size: 2
    shot_rule: index
    shot_ranges:
      many: [0, 1]
      few: [2, 5]
    augmentation: crop
algorithm:
  class_path: FedAMM
  init_args:
    model: small_cnn
    lr: 5e-2
    momentum: 0.9
    meta_lr: 1e-05
    differentiation: forward
federation:
  num_rounds: 1
  client_fraction: 0.5
  aggregation: num_examples
executor:
  class_path: Sequential
trainer:
  accelerator: cpu
  devices: 1
  precision: 32-true
logger: false
output:
  keep_checkpoints: 2
  progress: none
"""
WORDS = [
    *("--data.dataset", "tiny", "--data.root", ".", "--data.num_clients", "4", "--data.num_meta_per_class=5"),
    *("--data.imbalance_factor=0.1", "--algorithm", "FedAMM", "--algorithm.model", "small_cnn", "--algorithm.lr=5e-2"),
    *("--federation.num_rounds", "1", "--trainer.accelerator=cpu", "--output.progress", "none", "--logger=false"),
]
SECONDS = 10  # for one input; most take a twentieth of a second


class TooLongError(BaseException):
    """An input has taken too long. No Exception, so that nothing catches it."""


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(number: int, frame: object) -> NoReturn:
        raise TooLongError(f"{seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, data_root: Path) -> Iterator[Path]:
    """A working folder with tiny.npz, in a process that trains nothing and downloads nothing."""

    def offline(root: Path, train: bool, download: bool) -> NoReturn:
        raise RuntimeError("no network in this test")

    def nothing_trained(orchestrator: Orchestrator) -> list[dict[str, float]]:
        return [{"round": 0, "test/acc": 0.5, "test/loss": 1.0}]

    folder = tmp_path_factory.mktemp("work") / "place"
    folder.mkdir()
    shutil.copy(data_root / "tiny.npz", folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.path", list(sys.path))
        patch.setattr(Orchestrator, "run", nothing_trained)
        for name in DOWNLOADABLE:
            patch.setitem(DOWNLOADABLE, name, offline)
        yield folder


def written(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def end(words: list[str], folder: Path) -> str:
    """Run the program; return its refusal, or nothing. A refusal is one line, and nothing else is left of it."""
    before, status = written(folder), 0
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err, limited(SECONDS):
        try:
            main(words)
        except SystemExit as stop:
            status = int(stop.code or 0)
    if status == 0:
        shutil.rmtree(folder / "runs", ignore_errors=True)
        return ""
    lines = err.getvalue().splitlines()
    assert (status, out.getvalue(), len(lines)) == (2, "", 1), (words, lines)
    assert re.match("fedamm: error: .", lines[0]), (words, lines)
    assert written(folder) == before, words
    return lines[0]


def end_of_file(content: bytes | str, folder: Path) -> str:
    file = folder / "fuzzed.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
    return end(["--config", file.name], folder)


def test_the_inputs_to_be_mangled_are_good_ones(workplace: Path) -> None:
    assert end_of_file(BASE, workplace) == ""
    assert end(WORDS, workplace) == ""


# Anything but a path to the outside: what is written goes where an option says.
ODD_WORDS = """
null ~ nan inf .inf -1 1e-05 é [ ] { } [] {} [[]] {a:1} [1,2] &a % -- - . .. a..b gpu many iid index counts FedAvg FedAM
fedamm_pl.FedAvg fedamm_pl.FederatedModule fedamm_pl.models.SmallCNN nowhere.Net os.system builtins.dict torch.nn.Linear
math.nan !!python/name:os.system
"""
ODD_TEXTS = (
    st.sampled_from(ODD_WORDS.split())
    | st.sampled_from(["", " ", "a: b", "&a [*a]", "9" * 400, "9" * 5000, "a" * 300, "\0", "\ud800", "\x1b[31m"])
    | st.text(st.characters(exclude_characters="/\\"), max_size=12)
)
LIMITS = [0, 1, 2, 6, -1, 2**31, 2**32, 2**63, 2**64, 10**30, -(10**30), 10**400, -0.0, 0.5, 1.0, 1e-05, 1e308, 5e-324]
NUMBERS_OF_ANY_KIND = st.sampled_from(LIMITS) | st.floats() | st.integers()
SCALARS = st.none() | st.booleans() | NUMBERS_OF_ANY_KIND | ODD_TEXTS
JUNK: st.SearchStrategy[Any] = st.recursive(
    SCALARS | st.binary(max_size=4) | st.dates(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["class_path", "init_args", "dict_kwargs", "lr", "many", "seed"]) | SCALARS,
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)


def places(node: Any, above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The paths of all values of a configuration."""
    for name, value in node.items() if isinstance(node, dict) else ():
        yield (*above, name)
        yield from places(value, (*above, name))


PLACES = list(places(yaml.safe_load(BASE)))


# Mostly one: the first that is refused hides the others.
FAULTS = st.sampled_from([1, 1, 1, 2, 3])


@st.composite
def wrong_values(draw: st.DrawFn) -> str:
    """A configuration with other values, types and keys in some places, as YAML."""
    config = yaml.safe_load(BASE)
    for *above, name in draw(st.lists(st.sampled_from(PLACES), min_size=1, max_size=2)):
        node = config
        for step in above:
            node = node[step] if isinstance(node, dict) and step in node else {}
        if isinstance(node, dict):
            match draw(st.sampled_from(["replace", "replace", "replace", "lose", "add", "rename"])):
                case "replace":
                    node[name] = draw(JUNK)
                case "lose":
                    node.pop(name, None)
                case "add":
                    node[draw(ODD_TEXTS)] = draw(JUNK)
                case "rename":
                    node[draw(st.sampled_from([place[-1] for place in PLACES]))] = node.pop(name, None)
    return str(yaml.safe_dump(config, allow_unicode=draw(st.booleans())))


YAML_PARTS = """
!!python/object/apply:os.system ['touch executed'];!!python/name:os.system;!!binary aGVsbG8=;!!set {a, b};&a [*a];*b;? [a];@;`
&a {root: *a};<<: {seed: 1};<<: *a;---;...;%YAML 1.1;%TAG ! x:;!!int x;!!float x;!!timestamp x;!!omap [a: 1];!<x> y;|;>-;';";#
\t;{;[;:;: :;- - -
"""
PARTS = st.sampled_from(YAML_PARTS.strip().replace("\n", ";").split(";"))


@st.composite
def mangled_text(draw: st.DrawFn) -> bytes:
    """A configuration of which lines and bytes are lost, doubled, moved, shifted or replaced."""
    lines = BASE.splitlines()
    index = st.integers(0, len(lines) - 1)
    for _ in range(draw(FAULTS)):
        place = draw(index) % len(lines)
        key, colon, value = lines[place].partition(":")
        match draw(
            st.sampled_from(["lose", "double", "move", "indent", "outdent", "value", "part", "line", "colon", "tag"])
        ):
            case "lose" if len(lines) > 1:
                del lines[place]
            case "double":
                lines.insert(draw(index), lines[place])
            case "move":
                lines.insert(draw(index), lines.pop(place))
            case "indent":
                lines[place] = " " * draw(st.integers(1, 3)) + lines[place]
            case "outdent":
                lines[place] = lines[place][draw(st.integers(1, 3)) :]
            case "value":
                lines[place] = f"{key}: {draw(ODD_TEXTS)}"
            case "part":
                lines[place] = f"{key}: {draw(PARTS)}"
            case "line":
                lines.insert(place, draw(PARTS))
            case "colon":
                lines[place] = key + draw(st.sampled_from(["", "=", "::", " :", ":"])) + value.strip()
            case "tag":
                lines[place] = (
                    f"{key}{colon} {draw(st.sampled_from(['!!str', '!!int', '!!float', '!!seq', '!!map', '!x', '&x']))}{value}"
                )
    content = "\n".join(lines).encode("utf-8", "surrogatepass")
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 3]))):
        place = draw(st.integers(0, len(content)))
        new = draw(st.binary(max_size=2) | st.text(st.characters(codec="ascii"), max_size=2).map(str.encode))
        content = content[:place] + new + content[place + draw(st.integers(0, 2)) :]
    return content


OPTIONS = st.sampled_from(
    sorted({*option_names().values(), *(f"--{group}" for group in GROUPS), "--logger", "--config"})
)


@st.composite
def mangled_words(draw: st.DrawFn) -> list[str]:
    """A command line of which words are lost, doubled, moved or replaced, and with odd values for any option."""
    words = list(WORDS)
    for _ in range(draw(FAULTS)):
        place = draw(st.integers(0, len(words)))
        match draw(st.sampled_from(["lose", "double", "replace", "add", "set", "set", "set", "apart"])):
            case "lose":
                del words[place : place + 1]
            case "double":
                words[place:place] = words[place : place + 2]
            case "replace":
                words[place : place + 1] = [draw(ODD_TEXTS)]
            case "add":
                words.insert(place, draw(OPTIONS | ODD_TEXTS))
            case "set":
                words.append(f"{draw(OPTIONS)}={draw(ODD_TEXTS | NUMBERS_OF_ANY_KIND.map(str))}")
            case "apart":
                words += [draw(OPTIONS), draw(ODD_TEXTS)]
    return words


FEW, MANY = settings(REPEATABLE, max_examples=60), settings(REPEATABLE, max_examples=1500)


@given(text=wrong_values())
@FEW
def test_configuration_with_wrong_values_ends_in_one_line(text: str, workplace: Path) -> None:
    end_of_file(text, workplace)


@given(content=mangled_text())
@FEW
def test_mangled_configuration_ends_in_one_line(content: bytes, workplace: Path) -> None:
    end_of_file(content, workplace)
    assert not (workplace / "executed").exists()


@given(words=mangled_words())
@FEW
def test_mangled_command_line_ends_in_one_line(words: list[str], workplace: Path) -> None:
    end(words, workplace)


@pytest.mark.slow
@given(text=wrong_values())
@MANY
def test_any_configuration_with_wrong_values_ends_in_one_line(text: str, workplace: Path) -> None:
    end_of_file(text, workplace)


@pytest.mark.slow
@given(content=mangled_text())
@MANY
def test_any_mangled_configuration_ends_in_one_line(content: bytes, workplace: Path) -> None:
    end_of_file(content, workplace)
    assert not (workplace / "executed").exists()


@pytest.mark.slow
@given(words=mangled_words())
@MANY
def test_any_mangled_command_line_ends_in_one_line(words: list[str], workplace: Path) -> None:
    end(words, workplace)


# What fuzzing found once

FOUND = {  # where, what, and what the refusal names at least
    "list for the trainer": ("trainer", [], "--trainer"),
    "list for the output": ("output", [], "--output"),
    "number for the output": ("output", 1.5, "--output"),
    "nothing for the output": ("output", None, "--output"),
    "nothing for the data": ("data", None, "data"),
    "nothing for the algorithm": ("algorithm", None, "algorithm"),
    "whole number beyond all floats": ("federation.client_fraction", 10**400, ""),
    "argument that no data module has": ("data.dict_kwargs", {"unknown": 1}, "unknown"),
    "classes without end": ("data.init_args.shot_ranges", {"many": [0, 10**15]}, "--data.shot_ranges"),
}


@pytest.mark.parametrize("what", FOUND)
def test_value_of_this_kind_is_refused(what: str, workplace: Path) -> None:
    place, value, named = FOUND[what]
    *above, name = place.split(".")
    config = node = yaml.safe_load(BASE)
    for step in above:
        node = node[step]
    node[name] = value
    refusal = end_of_file(yaml.safe_dump(config), workplace)
    assert refusal
    assert named in refusal


@pytest.mark.parametrize("line", ["seed: !!timestamp x", "seed: " + "[" * 2000, "seed: " + "{a: " * 2000])
def test_yaml_that_its_reader_does_not_survive_is_refused(line: str, workplace: Path) -> None:
    assert "fuzzed.yaml" in end_of_file(f"{BASE}{line}\n", workplace)


@pytest.mark.parametrize(
    "line", ["    unknown: &a {root: *a}", "    root: &a {root: *a}", "    shot_ranges: &a {many: *a}"]
)
def test_mapping_that_holds_itself_is_refused(line: str, workplace: Path) -> None:
    assert end_of_file(BASE.replace("    root: .", line), workplace)


@pytest.mark.parametrize("value", ["&a [*a]", "&a {a: *a}", "[" * 2000])
@pytest.mark.parametrize(
    "option", ["--algorithm.lr", "--algorithm.counts", "--data.shot_ranges", "--federation", "--logger"]
)
def test_value_nested_without_end_is_refused(option: str, value: str, workplace: Path) -> None:
    assert end([*WORDS, option, value], workplace)
    assert end([*WORDS, option, value, option, value], workplace)


@pytest.mark.parametrize("option", ["--config", "--data.dataset", "--data.root", "--output.dir"])
def test_name_longer_than_a_file_can_have_is_refused(option: str, workplace: Path) -> None:
    assert option in end([*WORDS, option, "a" * 300], workplace)


def never_null() -> Iterator[str]:
    """The options of which the type says that they have a value."""
    for owner in (FederatedDataModule, FedAMM, FederationConfig, TrainerConfig, OutputConfig):
        for name, parameter in options_of(owner).items():
            if type(None) not in typing.get_args(parameter.annotation):
                yield f"{group_of(owner)}.{name}"


@pytest.mark.parametrize("option", ["seed", *never_null()])
def test_nothing_is_no_value_for_an_option_that_needs_one(option: str, workplace: Path) -> None:
    group, _, name = option.partition(".")
    config = yaml.safe_load(BASE)
    node = config.get(group, {}) if name else config
    node.get("init_args", node)[name or group] = None
    assert option in end([*WORDS, f"--{option}=null"], workplace)
    assert option in end_of_file(yaml.safe_dump(config), workplace)
