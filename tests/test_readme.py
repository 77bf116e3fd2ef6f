"""The README's code runs as it stands there, and its commands are ones that the program takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fedamm_pl import Orchestrator
from fedamm_pl.cli.main import build_parser
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from tests.tiny import NUM_CLASSES, tiny_data

README = (Path(__file__).parent.parent / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found
    return found


def test_python_code_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with quiet():
        for code in blocks("python"):
            exec(code, names)
    data = names["data"]
    with torch.no_grad():
        logits = names["module"].eval()(data.images.test_images[:5])
    torch.testing.assert_close(names["probabilities"], logits.softmax(1))
    assert [row["round"] for row in names["history"]] == [0, 2]
    assert (tmp_path / "runs/python/final.ckpt").exists()
    data = tiny_data()
    module = names["Proximal"](NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info)
    run = Orchestrator(module, data, num_rounds=1, local_epochs=1, trainer=TrainerConfig(accelerator="cpu"))
    assert run.run()[-1]["client/loss"] > 0


def test_documented_options_exist() -> None:
    parser = build_parser()
    commands = [line for block in blocks("bash") for line in block.splitlines() if "orchestrate.py" in line]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.split("orchestrate.py", 1)[1], comments=True)
        if (
            "--help" in words or "--print_config" in words or words[0] in ("compare", "report")
        ):  # these have tests of their own
            continue
        parser.parse_args(words)


def test_options_of_the_papers_table_exist() -> None:
    parser = build_parser()
    table = README.split("The paper's options and ours:")[1].split("`imbalance_factor`")[0]
    options = re.findall(r"`--([\w.]+)`", table)
    assert len(options) >= 13
    config = parser.parse_args(["--config", "configs/fedamm_cifar10.yaml"])
    for option in options:
        group, _, name = option.partition(".")
        values = config[group].get("init_args", config[group]) if name else config
        assert (name or group) in values, option
