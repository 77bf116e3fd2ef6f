"""A reader that has gone, or a closed terminal, ends no run and costs no file."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedamm_pl.results.runs import load

ROOT = Path(__file__).parents[2]
WAYS = {
    "the reader of the output goes after a line": '"$@" | head -1',
    "nobody reads the output": '"$@" | true',
    "both are closed": '"$@" >&- 2>&-',
    "nobody reads the errors": '"$@" 2> >(true)',
    "the output goes to a full disk": '"$@" > /dev/full 2>&1',
}


def run_in_shell(way: str, words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f"set -o pipefail; {way}", "bash", sys.executable, str(ROOT / "orchestrate.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=300)


@pytest.mark.parametrize("way", WAYS)
def test_the_run_goes_on_to_its_end(way: str, command: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    ended = run_in_shell(WAYS[way], command("FedAvg", folder, "--federation.num_rounds", "2"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert (folder / "final.ckpt").exists()
    run = load(folder)
    assert run.summary is not None
    assert run.metrics["round"].tolist() == [0, 2]


@pytest.mark.parametrize(
    "words",
    [["--help"], ["report", "RUN"], ["--algorithm", "FedAvg", "--federation.num_rounds", "1", "--print_config"]],
)
def test_other_commands_end_well_too(words: list[str], fedavg_run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(fedavg_run, tmp_path / "run")
    ended = run_in_shell(WAYS["nobody reads the output"], [word.replace("RUN", str(folder)) for word in words])
    assert (ended.returncode, ended.stderr) == (0, "")


def test_what_an_encoding_lacks_is_shown_as_a_code(command: Any, tmp_path: Path) -> None:
    words = command("FedAvg", tmp_path / "sch\u00f6n", "--federation.num_rounds", "0")
    ended = run_in_shell('"$@"', words, PYTHONIOENCODING="ascii")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.splitlines()[-1].endswith(r"sch\xf6n")
