"""What the methods that the pages write come to; links, the table of the paper's options, the citation."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import yaml

from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import FedProx
from fedamm_pl.cli.parser import build_parser
from fedamm_pl.cli.shipped import expanded
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.version import __version__
from tests.pages import PAGES, ROOT, blocks
from tests.tiny import NUM_CLASSES, tiny_data

CPU = TrainerConfig(accelerator="cpu")


@pytest.fixture(scope="module")
def written() -> dict[str, Any]:
    """The methods and the callback that the pages write."""
    names: dict[str, Any] = {}
    for block in blocks("docs/python.md", "python") + blocks("docs/own_method.md", "python"):
        if "class " in block.text:
            exec(block.text, names)
    return names


def trained(method: Callable[..., FederatedModule], num_rounds: int = 2, **options: Any) -> Orchestrator:
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
    weaker = trained(partial(written["ServerMomentum"], beta=0.5))
    for other in (trained(FedAvg), weaker):
        assert not torch.equal(own.state.shared["model.conv1.weight"], other.state.shared["model.conv1.weight"])
    assert weaker.server.module.hparams["beta"] == 0.5


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


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        file, _, anchor = target.partition("#")
        if file.startswith("http"):
            continue
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        if anchor:
            heads = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}, target


def test_options_of_the_papers_table_exist() -> None:
    parser = build_parser()
    table = (
        (ROOT / "docs/running.md").read_text().split("The paper's options and ours:")[1].split("`imbalance_factor`")[0]
    )
    options = re.findall(r"`--([\w.]+)`", table)
    assert len(options) >= 13
    config = parser.parse_args(expanded(["--data", "cifar10", "--method", "fedamm"]))
    for option in options:
        group, _, name = option.partition(".")
        values = config[group].get("init_args", config[group]) if name else config
        assert (name or group) in values, option


def test_the_citation_names_this_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
