"""``fedamm completion``: the script completes as a shell asks, in bash alone."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fedamm_pl.cli.main import main
from fedamm_pl.cli.options import GROUPS, LINKED, OFFERED
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.cli.shipped import expanded, names

DRIVER = (
    'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_fedamm; printf "%s\\n" "${COMPREPLY[@]}"'
)
BASH = shutil.which("bash")

Complete = Callable[..., set[str]]


@pytest.fixture
def script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script, in a folder with a configuration of one's own."""
    pytest.importorskip("shtab")
    main(["completion", "bash"])
    (tmp_path / "quick.yaml").touch()
    path = tmp_path / "fedamm.bash"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.fixture
def complete(script: Path) -> Complete:
    """What bash offers for the last of some words; no program is found on the way, so none is started."""
    if BASH is None:
        pytest.skip("bash is not installed")

    def complete(*words: str) -> set[str]:
        command = [BASH, "-c", DRIVER, "bash", str(script), "fedamm", *words]
        found = subprocess.run(command, cwd=script.parent, env={"PATH": ""}, capture_output=True, text=True, check=True)
        assert found.stderr == ""
        return set(found.stdout.split())

    return complete


def test_the_shell_completes(complete: Complete) -> None:
    assert complete("") == {"run", "compare", "report", "methods", "completion"}
    for run in ([], ["run"]):
        assert complete(*run, "--config", "qu") == {"quickstart", "quick.yaml"}
        assert complete(*run, "--data", "cif") == {"cifar10", "cifar100"}
        assert complete(*run, "--data", "cifar10", "--method", "fedam") == {"fedamm"}
        assert complete(*run, "--data", "cifar10", "--method", "") == set(names("method"))
        assert complete(*run, "--data", "cifar10", "--federation.num_r") == {"--federation.num_rounds"}
        assert complete(*run, "--algorithm.meta_l") == {"--algorithm.meta_lr"}
        assert complete(*run, "--algorithm.meta_update", "") == {"asynchronous", "synchronous"}
        assert complete(*run, "--algorithm.help", "FedAM") == {"FedAMM"}
        assert complete(*run, "--executor", "") == {kind.__name__ for kind in OFFERED["executor"]}
    assert complete("methods", "FedAvg", "FedAM") == {"FedAMM"}
    assert complete("methods", "--format", "m") == {"markdown"}
    assert complete("report", "--o") == {"--output"}
    assert complete("compare", "--j") == {"--jobs"}
    assert complete("compare", "--config", "protocol/t") == {"protocol/tables"}
    assert "quickstart" not in complete("compare", "--config", "")
    assert complete("completion", "") == {"bash"}


def test_what_it_offers_is_taken(complete: Complete) -> None:
    words = ["--config", "quickstart", "--algorithm", "FedAMM"]
    config = build_parser().parse_args(expanded(words))
    known = {"--config", "--dry_run", "--help", "--method", "--method.help", "--print_config", "--version"}
    offered = complete("--")
    assert known <= offered
    for group in GROUPS:
        values = vars(config[group].get("init_args", config[group]))
        mine = {option for option in offered if option.startswith(f"--{group}.")} - {f"--{group}.help"}
        hidden = {"class_path", *LINKED.get(group, ())}
        expected = {f"--{group}.{name}" for name in values.keys() - hidden}
        assert expected <= mine
        if group not in ("algorithm", "executor"):  # these offer the options of all their classes
            assert expected == mine


def test_without_the_package_the_command_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    with pytest.raises(SystemExit) as stop:
        main(["completion", "bash"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "fedamm: error: Expected the package shtab to be installed, got none: pip install shtab\n"
    )
