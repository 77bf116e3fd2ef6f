"""The README's code runs as it stands there, and its commands are ones that the program takes."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import FedProx
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.cli.shipped import expanded
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.version import __version__
from tests.tiny import NUM_CLASSES, tiny_data

CPU = TrainerConfig(accelerator="cpu")
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


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


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The methods and the callback that the README writes."""
    names: dict[str, Any] = {}
    for code in blocks("python"):
        if "class " in code:
            exec(code, names)
    return names


def trained(method: type[FederatedModule], num_rounds: int = 2, **options: Any) -> Orchestrator:
    data = tiny_data()
    torch.manual_seed(0)
    module = method(NUM_CLASSES, 1, "tests.tiny.tiny_resnet", info=data.info)
    run = Orchestrator(module, data, num_rounds=num_rounds, local_epochs=1, trainer=CPU, **options)
    run.run()
    return run


def test_proximal_is_fedprox(written: dict[str, Any]) -> None:
    own, shipped = trained(written["Proximal"]), trained(FedProx)
    for name, value in own.state.shared.items():
        torch.testing.assert_close(value, shipped.state.shared[name])


def test_server_momentum_goes_on_along_the_last_update(written: dict[str, Any]) -> None:
    one, plain = trained(written["ServerMomentum"], 1), trained(FedAvg, 1)
    for name, value in plain.state.shared.items():
        torch.testing.assert_close(one.state.shared[name], value)  # the first step is FedAvg's
    own = trained(written["ServerMomentum"])
    assert any(name.startswith("velocity.") for name in own.state.shared)
    assert not torch.equal(own.state.shared["model.conv1.weight"], trained(FedAvg).state.shared["model.conv1.weight"])


def test_a_method_that_asks_is_answered_before_the_fit(written: dict[str, Any]) -> None:
    ratios = []

    class Noting(written["Compared"]):  # type: ignore[misc]
        def on_train_start(self) -> None:
            super().on_train_start()
            ratios.append(float(self.session.answer.payload["ratio"]))

    run = trained(Noting)
    assert len(ratios) == 4
    assert all(0 < ratio < 10 for ratio in ratios)
    assert len(set(ratios)) > 1
    assert run.state.bytes_total["sent"] > trained(FedAvg).state.bytes_total["sent"]


def test_a_callback_ends_the_run_and_adds_a_column(written: dict[str, Any]) -> None:
    run = trained(FedAvg, callbacks=[written["StopEarly"]()], eval_interval=1)
    assert all("clients" in row for row in run.state.history)


def test_documented_options_exist() -> None:
    parser = build_parser()
    commands = [
        line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines() if "orchestrate.py" in line
    ]
    assert len(commands) >= 4
    for command in commands:
        words = shlex.split(command.split("orchestrate.py", 1)[1], comments=True)
        if (
            "--help" in words or "--print_config" in words or words[0] in ("compare", "report")
        ):  # these have tests of their own
            continue
        parser.parse_args(expanded(words))


def test_options_of_the_papers_table_exist() -> None:
    parser = build_parser()
    table = README.split("The paper's options and ours:")[1].split("`imbalance_factor`")[0]
    options = re.findall(r"`--([\w.]+)`", table)
    assert len(options) >= 13
    config = parser.parse_args(expanded(["--data", "cifar10", "--method", "fedamm"]))
    for option in options:
        group, _, name = option.partition(".")
        values = config[group].get("init_args", config[group]) if name else config
        assert (name or group) in values, option


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
