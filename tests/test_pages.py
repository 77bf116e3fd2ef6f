"""Every block of code and every command of every page: run, or read by the program that it is for, or named below with a reason.

Blocks and commands are found by :mod:`tests.pages`, so that a new one is tested without being listed here. The commands and the code of
docs/data.md run in ``tests/cli/test_data_page.py``, on data of the kind that the page speaks of.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import re
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedamm_pl.cli.compare as compare_module
from fedamm_pl.cli.main import main
from fedamm_pl.cli.options import GROUPS, OFFERED, options_of
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.cli.run import describe, instantiate
from fedamm_pl.cli.shipped import expanded
from fedamm_pl.federation.trainer import quiet
from tests.pages import PAGES, ROOT, Command, all_blocks, blocks, commands, inline_commands, outside_blocks, run_python

NOT_RUN = {
    ".ci/run": "installs the package and runs all tests",
    "docker": "is not installed where the tests run; the Dockerfile has tests of its own",
    "export": "sets a variable of the shell",
    "flower-superlink": "starts a server of Flower",
    "flower-supernode": "starts a client of Flower; its --node-config is checked",
    "flwr": "needs a server of Flower; its --run-config is checked",
    "for": "a loop over `flwr supernode register`",
    "mkdir": "makes a folder in the home",
    "mkdocs": "a server",
    "mypy": "takes a minute",
    "pip": "installs; the files and the extras that it names are checked",
    "pytest": "would run the tests in the tests; the files that it names are checked",
    "ray": "starts or ends a cluster",
    "ruff": "formats the files",
    "tensorboard": "a server",
}
"""Program -> why its commands are not run."""
TEXTS = {
    ("README.md", "FedAMM with small_cnn"): "output; its first lines have a test below",
    ("docs/data.md", "hospitals: read as <client>/"): "a message of the log",
    ("docs/data.md", "train/n01440764/"): "a line of a list file, as those that the commands of the page read",
    ("docs/own_method.md", "fedamm_pl/"): "the tree of files; it has a test below",
}
"""Page and beginning of a block that is no code -> what it is."""
LEARNING = ("README.md", "docs/python.md")
"""Pages whose run is long enough to learn; two of its rounds are enough here."""
RUN = {"python", "fedamm"}
IN_THE_REPOSITORY = re.compile(r"(docs|configs|scripts|benchmarks|tests|examples|\.ci)/|requirements\S*\.txt$")
ELSEWHERE = "docs/data.md"
WITH_PYTHON = [page for page in PAGES if blocks(page, "python") and page != ELSEWHERE]
FOUND = list(
    {
        str(command): command
        for command in itertools.chain(
            *(commands(block) for block in all_blocks("bash")),
            *(inline_commands(page, RUN | NOT_RUN.keys()) for page in PAGES),
        )
    }.values()
)
TO_RUN = [command for command in FOUND if command.program in RUN]


class Stopped(BaseException):
    """The command line has been read, and what it asks for would begin."""


def stop(*_: Any, **__: Any) -> Any:
    raise Stopped


@pytest.fixture
def nothing_begins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs end where their command line has been read and checked; a comparison is planned for the first values of its grid."""
    monkeypatch.chdir(ROOT)
    own = [block.text for block in blocks("docs/own_method.md", "python")]
    (tmp_path / "mymethods.py").write_text("\n".join(own))  # as the pages say
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymethods", raising=False)
    monkeypatch.setattr("fedamm_pl.cli.run.deferred_log", stop)
    monkeypatch.setattr("fedamm_pl.cli.report.load_all", stop)
    monkeypatch.setattr("fedamm_pl.cli.completion.script", stop)
    monkeypatch.setattr("fedamm_pl.cli.methods.measure_all", stop)
    monkeypatch.setattr(compare_module, "check_before", stop)
    monkeypatch.setattr(compare_module, "plan", of_one_setting(compare_module.plan))
    monkeypatch.setattr(compare_module, "plan_trials", of_one_setting(compare_module.plan_trials))


def of_one_setting(plan: Callable[..., Any]) -> Callable[..., Any]:
    def planned(config: Any, *rest: Any) -> Any:
        first = {name: values[:1] for name, values in config.grid.items()}
        tuning = config.tuning
        if tuning:
            tuning = dataclasses.replace(tuning, methods={name: tried[:1] for name, tried in tuning.methods.items()})
        return plan(dataclasses.replace(config, grid=first, seeds=config.seeds[:1], tuning=tuning), *rest)

    return planned


@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize("command", TO_RUN, ids=str)
def test_the_program_takes_the_command(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    words = list(command.words[1:])
    if command.program == "python" and words[0] != "orchestrate.py":
        if words[0] == "-m":
            words = [f"{words[1].replace('.', '/')}.py", *words[2:]]
        script = words[0]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        read = argparse.ArgumentParser.parse_args
        monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: stop(read(*given)))
        with pytest.raises(Stopped):
            runpy.run_path(script, run_name="__main__")
        return
    words = words[1:] if command.program == "python" else words
    if not words or words in (["compare"], ["report"]):  # the name of the program, not a command
        return
    asks = any(word.endswith("help") for word in words)
    ends = {"--print_config", "--version"} & set(words)
    with contextlib.nullcontext() if asks else pytest.raises(SystemExit if ends else Stopped) as end:
        main(words)
    assert not ends or not end.value.code


@pytest.mark.parametrize("program", sorted({command.program for command in FOUND} - RUN))
def test_a_program_that_is_not_run_is_named_with_the_reason(program: str) -> None:
    assert program in NOT_RUN


def test_only_programs_of_the_pages_are_named() -> None:
    assert NOT_RUN.keys() - {command.program for command in FOUND} == set()


def test_commands_name_files_of_the_repository() -> None:
    words = {word for command in FOUND for word in command.words}
    files = {word for word in words if IN_THE_REPOSITORY.match(word)}
    assert len(files) > 20
    assert [word for word in files if not (ROOT / word).exists()] == []
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    asked = {extra for word in words for extra in re.findall(r"^\.\[(\w+)\]$", word)}
    assert asked
    assert asked <= set(extras)


def test_flower_is_told_what_the_app_takes() -> None:
    app = (ROOT / "examples/federation/app/pyproject.toml").read_text().partition("[tool.flwr.app.config]")[2]
    known = {
        "run": set(re.findall(r"^([\w-]+) =", app, re.MULTILINE)),
        "node": {"client", "config", "own", "state"},
    }
    text = "\n".join((ROOT / page).read_text() for page in PAGES)
    for kind, pattern in (("run", r"--run-config '([^']*=[^']*)'"), ("node", r'--node-config "([^"]*=[^"]*)"')):
        told = re.findall(pattern, text)
        assert told
        assert {name for words in told for name in re.findall(r"([\w-]+)=", words)} <= known[kind]


def test_options_in_the_text_exist() -> None:
    known = {f"{group}.{name}" for group, kind in GROUPS.items() for name in options_of(kind)}
    known |= {f"{group}.{name}" for group, kinds in OFFERED.items() for kind in kinds for name in options_of(kind)}
    known |= {f"{group}.help" for group in (*GROUPS, "method")}
    for page in PAGES:
        named = set(re.findall(r"--((?:" + "|".join([*GROUPS, "method"]) + r")\.\w+)", (ROOT / page).read_text()))
        assert named - known == set(), page


@pytest.mark.parametrize("page", PAGES)
def test_commands_stand_in_fenced_blocks(page: str) -> None:
    programs = "|".join(map(re.escape, RUN | NOT_RUN.keys() - {"for", "export"}))
    assert re.findall(rf"^ +(?:[A-Z_]+=\S+ )?(?:{programs}) .*", outside_blocks(page), re.MULTILINE) == []


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_code_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "docs/federation.md":
        pytest.importorskip("flwr")
    with quiet():
        names = run_python(page, {'"num_rounds": 8': '"num_rounds": 2'} if page in LEARNING else None)
    if page == "README.md":
        assert (tmp_path / "runs/first/final.ckpt").exists()
    if page == "docs/python.md":
        with torch.no_grad():
            logits = names["module"].eval()(names["data"].images.test_images[:5])
        torch.testing.assert_close(names["probabilities"], logits.softmax(1))
        assert (tmp_path / "runs/python/final.ckpt").exists()
    if "history" in names:
        assert [row["round"] for row in names["history"]] == [0, 2]


@pytest.mark.usefixtures("nothing_begins")
@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_the_parser_takes_the_configuration(block: Any, tmp_path: Path) -> None:
    file, base = tmp_path / "block.yaml", tmp_path / "base.yaml"
    file.write_text(block.text)
    base.write_text("base: {data: {num_val_per_class: 1}, federation: {num_rounds: 1}}\n")
    compared = "methods" in yaml.safe_load(block.text)
    words = (
        ["compare", "--config", str(base)] if compared else ["--algorithm", "FedAvg", "--federation.num_rounds", "1"]
    )
    with pytest.raises(Stopped):
        main([*words, "--config", str(file)])


@pytest.mark.parametrize("block", all_blocks("toml", "json"), ids=str)
def test_the_file_can_be_read(block: Any) -> None:
    if block.language == "json":
        assert json.loads(block.text)
    else:
        assert pytest.importorskip("tomllib").loads(block.text)


def test_other_blocks_are_named_with_what_they_are() -> None:
    others = [block for block in all_blocks() if block.language not in ("bash", "python", "yaml", "toml", "json")]
    named = [[key for key in TEXTS if key[0] == block.page and block.text.startswith(key[1])] for block in others]
    assert [str(block) for block, keys in zip(others, named, strict=True) if not keys] == []
    assert {key for keys in named for key in keys} == TEXTS.keys()


def test_the_quickstart_says_what_the_readme_shows() -> None:
    words = ["--config", str(ROOT / "configs/quickstart.yaml"), "--trainer.accelerator", "cpu", "--logger", "false"]
    parser = build_parser()
    with contextlib.ExitStack() as stack:
        said = describe(instantiate(parser, parser.parse_args(expanded(words)), None, stack)[0]).splitlines()
    (shown,) = [block.text.splitlines() for block in blocks("README.md", "")]
    assert shown[0].partition(" on ")[0] == said[0].partition(" on ")[0]  # the rest depends on the machine
    assert shown[1 : len(said)] == said[1:]


def test_the_tree_of_the_code_is_the_code() -> None:
    (block,) = blocks("docs/own_method.md", "")
    named = re.findall(r"^  (?:(\w+/)|((?:\w+\.py ?)+))", block.text, re.MULTILINE)
    found = {name for folder, files in named for name in ([folder.rstrip("/")] if folder else files.split())}
    there = {path.name for path in (ROOT / "fedamm_pl").iterdir() if path.name not in ("__pycache__", "py.typed")}
    assert found == there - {"__init__.py", "version.py"}
