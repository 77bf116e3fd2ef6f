"""A federation as a Flower app, its nodes in this process: the simulation's bits, what is refused by name, and what is survived."""

import csv
import json
import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("flwr", reason="Flower is not installed; it needs Python 3.11")

from fedamm_pl import FederatedDataModule
from fedamm_pl.algorithms import CCVR
from fedamm_pl.cli.main import main
from fedamm_pl.data.own import OwnData
from fedamm_pl.integrations.flower import executor, nodes
from fedamm_pl.integrations.flower.client import KeptOnDisk
from fedamm_pl.integrations.flower.server import DEFAULTS, serve
from fedamm_pl.integrations.flower.wire import BEGIN, FINISH, HELLO, OUTCOME, ROUND, bytes_part, record
from fedamm_pl.protocol.codec import decode, encode
from fedamm_pl.protocol.messages import ClientResult, Question, State
from tests.federation.small import assert_equal
from tests.integrations.machines import Fault, Machines

Federate = Callable[..., Machines]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (executor, nodes):
        monkeypatch.setattr(module, "POLL", 0.01)


@pytest.fixture
def config(data_root: Path, tmp_path: Path) -> Path:
    """Four clients, all of them in each of two rounds."""
    content = {
        "data": {"dataset": "tiny", "root": str(data_root), "num_clients": 4, "imbalance_factor": 0.1}
        | {"num_meta_per_class": 5, "batch_size": 16, "partition": "by_dirichlet", "min_client_size": 4},
        "algorithm": {"class_path": "FedAMM", "init_args": {"model": "small_cnn", "lr": 0.05}},
        "federation": {"num_rounds": 2, "client_fraction": 1.0, "local_epochs": 1, "eval_interval": 1},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "logger": False,
        "output": {"figures": False, "progress": "none"},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture
def federate(config: Path, tmp_path: Path) -> Federate:
    """A function that runs a federation, of four nodes unless told otherwise, and returns them."""

    def federate(
        folder: str = "run", options: str = "", fault: Fault = lambda message: None, number: int = 4, **told: Any
    ) -> Machines:
        options = f"--data.num_clients {number} {options}"
        machines = Machines(config, options, fault)
        for client in range(number):
            machines.add(10 + client, client=str(client), state=str(tmp_path / "state"))
        serve(machines, config, {"output-dir": str(tmp_path / folder), "options": options, "wait": 5.0, **told})
        return machines

    return federate


def simulate(config: Path, folder: Path, options: str = "") -> None:
    main(["--config", str(config), *options.split(), "--output.dir", str(folder)])


def final(folder: Path) -> dict[str, torch.Tensor]:
    content: dict[str, torch.Tensor] = torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]
    return content


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def summary(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return content


METHODS = {
    "FedAMM, forward": "--algorithm.differentiation forward",
    "FedAMM, bfloat16": "--algorithm.differentiation forward --algorithm.exchange bfloat16",
    "FedAvg": "--algorithm FedAvg",
    "Scaffold": "--algorithm Scaffold",
    "Moon": "--algorithm Moon",
    "CCVR": "--algorithm CCVR --algorithm.num_features 20 --algorithm.calibrate evaluations",
    "LogitAdjusted": "--algorithm LogitAdjusted --algorithm.counts local",
}


@pytest.mark.parametrize("method", METHODS)
def test_every_round_has_the_bits_of_the_simulation(
    method: str, federate: Federate, config: Path, tmp_path: Path
) -> None:
    machines = federate(options=METHODS[method])
    simulate(config, tmp_path / "simulation", METHODS[method])
    assert_equal(final(tmp_path / "run"), final(tmp_path / "simulation"))
    assert rows(tmp_path / "run") == rows(tmp_path / "simulation")  # the bytes that clients exchange among them
    asks = 8 if method.startswith("FedAMM") else 0
    assert machines.kinds().count(FINISH) == asks
    assert machines.kinds().count(HELLO) == 4


def test_what_clients_have_of_their_own_stays_with_them(federate: Federate, config: Path, tmp_path: Path) -> None:
    options = "--algorithm FedRoD --federation.num_rounds 3"
    federate(options=options)
    simulate(config, tmp_path / "simulation", options)
    assert_equal(final(tmp_path / "run"), final(tmp_path / "simulation"))
    mine, theirs = rows(tmp_path / "run")[-1], rows(tmp_path / "simulation")[-1]
    assert theirs.keys() - mine.keys() == {"personal/acc", "personal/acc_global"}
    files = sorted((tmp_path / "run" / "clients").iterdir())
    assert all(path.stat().st_size < 500 for path in files)  # tokens
    kept = list((tmp_path / "state").rglob("client_0/*.state"))
    assert len(kept) == 3
    assert all(path.stat().st_size > 1000 for path in kept)


class Counting(CCVR):
    """Keeps at each client in how many rounds it has trained."""

    def client_payload(self) -> State:
        assert self.session is not None
        self.session.kept = {"rounds": self.session.kept.get("rounds", torch.zeros(())) + 1}
        return super().client_payload()


def test_a_round_in_which_nobody_trains_leaves_what_clients_keep(
    federate: Federate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeptOnDisk, "VERSIONS", 1)
    federate(options=f"--algorithm {__name__}.Counting --algorithm.model small_cnn --federation.num_rounds 3")
    assert summary(tmp_path / "run")["failed_clients"] == 0
    assert [path.name for path in (tmp_path / "state").rglob("client_0/*.state")] == ["000000_000003.state"]


@pytest.mark.parametrize("method", ["FedAMM, forward", "Moon"])
def test_a_run_is_continued_by_another_one_in_the_same_folder(
    method: str, federate: Federate, config: Path, tmp_path: Path
) -> None:
    options = METHODS[method]
    federate(options=options)
    federate(options=f"{options} --federation.num_rounds 3")
    simulate(config, tmp_path / "simulation", f"{options} --federation.num_rounds 3")
    assert_equal(final(tmp_path / "run"), final(tmp_path / "simulation"))


def test_what_a_client_has_lost_of_its_own_is_said(
    federate: Federate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federate(options=METHODS["Scaffold"])
    for path in (tmp_path / "state").rglob("client_2/*.state"):
        path.unlink()
    federate(options=f"{METHODS['Scaffold']} --federation.num_rounds 3")
    assert "client 2 failed (data): Expected the state of this client from round 2 to be in" in caplog.text
    assert summary(tmp_path / "run")["failed_clients"] == 1


def test_the_example_names_all_that_a_run_may_be_told() -> None:
    import tomllib  # from Python 3.11 on, as Flower

    app = Path(__file__).parents[2] / "examples" / "federation" / "app" / "pyproject.toml"
    assert tomllib.loads(app.read_text())["tool"]["flwr"]["app"]["config"] == DEFAULTS
    page = (Path(__file__).parents[2] / "docs" / "federation.md").read_text()
    assert [name for name in DEFAULTS if f"`{name}`" not in page] == []


def test_the_pages_code_makes_an_app() -> None:
    page = (Path(__file__).parents[2] / "docs" / "federation.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["app"]).__name__ == "ClientApp"


# What is refused.


def changed(kind: str, client: int, change: Callable[[Any], Any], round_num: int = 2) -> Fault:
    """One client's reply to one message is another."""

    def fault(message: Any) -> Any:
        if message.metadata.message_type != kind or message.metadata.dst_node_id != 10 + client:
            return None
        return change if message.content.config_records["plain"][ROUND] == round_num else None

    return fault


def outcome_of(reply: Any) -> Any:
    return decode(bytes_part(reply.content, OUTCOME))


def with_result(change: Callable[[ClientResult], Any]) -> Callable[[Any], Any]:
    return lambda reply: record({ROUND: 2}, outcome=encode(change(outcome_of(reply))))


def shape(result: ClientResult) -> ClientResult:
    name = next(iter(result.payload))
    return replace(result, payload={**result.payload, name: torch.zeros(3, 3)})


def nan(message: Any) -> Any:
    return replace(message, payload={name: value * torch.nan for name, value in message.payload.items()})


def other_method(result: ClientResult) -> ClientResult:
    return replace(result, payload={**result.payload, "control.model.conv1.weight": torch.zeros(1)})


REFUSED: dict[str, tuple[str, Callable[[Any], Any], str]] = {
    "shape": (
        FINISH,
        with_result(shape),
        "the update of client 1 is refused: model.features.0.weight has shape (3, 3)",
    ),
    "NaN": (FINISH, with_result(nan), "the update of client 1 is refused: "),
    "another method's": (FINISH, with_result(other_method), "client 1 is refused: it holds what was not asked for"),
    "huge": (
        FINISH,
        lambda reply: record({ROUND: 2}, outcome=b"x" * 80_000_000),
        "client 1 is refused: Expected outcome to have at most",
    ),
    "another round's": (
        FINISH,
        lambda reply: record({ROUND: 1}, outcome=encode(outcome_of(reply))),
        "client 1 is refused: it answers round 1, not 2",
    ),
    "another client's": (
        FINISH,
        with_result(lambda result: replace(result, client_id=0)),
        "client 1 is refused: it answers for client 0",
    ),
    "a pickle": (
        FINISH,
        lambda reply: record({ROUND: 2}, outcome=b"\x80\x04\x8c\x05posix\x8c\x06system\x93."),
        "client 1 is refused: Expected packed tensors",
    ),
    "no bytes": (FINISH, lambda reply: record({ROUND: 2}), "client 1 is refused: Expected a message with outcome"),
    "a second question": (
        FINISH,
        lambda reply: record({ROUND: 2}, outcome=encode(Question(2, 1, 0, {"w": torch.ones(1)}))),
        "client 1 is refused: it sends a Question where a result was asked for",
    ),
    "question: NaN": (BEGIN, with_result(nan), "client 1 is refused: its question holds NaN or infinity in model."),
    "question: shape": (
        BEGIN,
        with_result(shape),
        "client 1 is refused: model.features.0.weight has shape (3, 3)",
    ),
    "question: unknown": (
        BEGIN,
        with_result(lambda asked: replace(asked, payload={"other": torch.ones(1)})),
        "client 1 is refused: it asks with what was not sent to it: other",
    ),
    "question: another round's": (
        BEGIN,
        with_result(lambda asked: replace(asked, round_num=1)),
        "client 1 is refused: it asks as client 1 in round 1, step 0",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_not_sound_is_refused_by_name(
    what: str, federate: Federate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kind, change, said = REFUSED[what]
    federate(options=METHODS["FedAMM, forward"], fault=changed(kind, 1, change), number=2)
    assert said in caplog.text
    found = summary(tmp_path / "run")
    assert (found["refused_updates"], found["failed_clients"], found["failed_rounds"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ("0129", "refused: Expected `client` to be one of the 4 of the partition, got '9'"),
        ("0122", "refused: client 2 is already connected from another node"),
        ("012", r"Expected 4 clients within 0.2 s, got 3 \(missing: 3\)"),
        ("012 ", "refused: Expected --node-config to name the client"),
    ],
)
def test_names_of_clients(names: str, said: str, config: Path, tmp_path: Path) -> None:
    machines = Machines(config)
    for node, name in enumerate(names):
        machines.add(node, client=name)
    with pytest.raises(ValueError, match=said):
        serve(machines, config, {"output-dir": str(tmp_path / "run"), "wait": 0.2})


def test_a_method_that_asks_in_mid_fit_is_refused(federate: Federate, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RuntimeError, match="status 2"):
        federate(options="--algorithm.meta_update synchronous")
    assert "answers clients during local training for FedAMM with these options, got Flower" in capsys.readouterr().err


def test_whose_the_data_are_must_be_agreed(federate: Federate) -> None:
    with pytest.raises(ValueError, match="client 0 should have data of its own, it has a part of the partition"):
        federate(**{"own-data": True, "clients": "4", "wait": 0.2})


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ({"output-dir": "runs/x"}, "Expected `output-dir` to be an absolute path"),
        ({"clients": "a,b"}, "Expected `clients` to be empty without `own-data`"),
        ({"own-data": True, "clients": "a,,b"}, "Expected `clients` to be the names of clients"),
        ({"client-timeout": 0.0}, "Expected `client-timeout` to be a number above 0"),
        ({"window": 0}, "Expected `window` to be 1 or more"),
    ],
    ids=str,
)
def test_what_a_run_is_told_is_checked(told: dict[str, Any], said: str, federate: Federate) -> None:
    with pytest.raises(ValueError, match=said):
        federate(**told)


def test_another_data_set_at_a_client_is_refused(config: Path, tmp_path: Path, data_root: Path) -> None:
    with np.load(data_root / "tiny.npz") as arrays:
        (tmp_path / "other").mkdir()
        np.savez(tmp_path / "other" / "tiny.npz", **{**arrays, "x_test": arrays["x_test"] // 2})
    machines = Machines(config)
    other = tmp_path / "other.yaml"
    other.write_text(f"data: {{root: {tmp_path / 'other'}}}\n")
    for node in range(4):
        machines.add(node, client=str(node), **({"config": str(other)} if node == 3 else {}))
    with pytest.raises(ValueError, match="refused: client 3 does not see the server's data: content_hash"):
        serve(machines, config, {"output-dir": str(tmp_path / "run"), "wait": 0.2})


# What is survived.


def once(kind: str, client: int, happens: Any) -> Fault:
    """It happens once, in round 2."""
    left = [happens]

    def fault(message: Any) -> Any:
        metadata = message.metadata
        if not left or metadata.message_type != kind or metadata.dst_node_id != 10 + client:
            return None
        return left.pop() if message.content.config_records["plain"][ROUND] == 2 else None

    return fault


@pytest.mark.parametrize("kind", [BEGIN, FINISH])
def test_a_client_whose_process_dies_is_asked_again(
    kind: str, federate: Federate, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    federate(options=METHODS["FedAMM, forward"], fault=once(kind, 2, 8))
    simulate(config, tmp_path / "simulation", METHODS["FedAMM, forward"])
    assert_equal(final(tmp_path / "run"), final(tmp_path / "simulation"))
    assert "client 2 is asked again: ClientApp stopped responding. (code 8)" in caplog.text


def test_a_node_that_was_started_anew_between_two_messages_begins_again(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = ["once"]

    def fault(message: Any) -> None:
        if message.metadata.message_type == FINISH and message.metadata.dst_node_id == 11 and left:
            left.pop()
            machines.add(11, client="1", state=str(tmp_path / "state"))

    machines = Machines(config, METHODS["FedAMM, forward"], fault)
    for client in range(4):
        machines.add(10 + client, client=str(client), state=str(tmp_path / "state"))
    serve(machines, config, {"output-dir": str(tmp_path / "run"), "options": METHODS["FedAMM, forward"], "wait": 5.0})
    simulate(config, tmp_path / "simulation", METHODS["FedAMM, forward"])
    assert_equal(final(tmp_path / "run"), final(tmp_path / "simulation"))
    assert "client 1 is asked again: its node was restarted during the round" in caplog.text


def test_a_client_that_is_late_is_lost_for_the_round_and_takes_part_in_the_next(
    federate: Federate, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = f"{METHODS['FedAMM, forward']} --federation.num_rounds 3"
    machines = federate(options=options, fault=once(FINISH, 0, "silence"), **{"client-timeout": 3.0})
    assert "client 0 failed (lost): nothing came back within 3 s" in caplog.text
    found = summary(tmp_path / "run")
    assert (found["failed_clients"], found["failed_rounds"]) == (1, 0)
    assert machines.kinds().count(HELLO) == 5  # it says again who it is
    assert machines.kinds().count(FINISH) == 12


def test_a_client_that_goes_and_comes_back_at_another_node(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = "--algorithm FedAvg --federation.num_rounds 4"
    seen = []

    def fault(message: Any) -> None:
        if message.metadata.message_type == BEGIN:
            seen.append(message.content.config_records["plain"][ROUND])
            if seen.count(1) == 4 and 13 in machines.contexts:
                del machines.contexts[13]
            if seen.count(2) == 3:
                machines.add(99, client="3", state=str(tmp_path))

    machines = Machines(config, options, fault)
    for client in range(4):
        machines.add(10 + client, client=str(client), state=str(tmp_path))
    told = {"output-dir": str(tmp_path / "run"), "options": options, "wait": 5.0, "rejoin-timeout": 0.2}
    serve(machines, config, told)
    assert "client 3 is no longer connected" in caplog.text
    assert "client 3 failed (lost): it is not connected" in caplog.text
    assert seen.count(4) == 4


# Data of their own.


FEATURES = ["x0", "x1", "x2"]


def table(path: Path, rows_of: Iterator[tuple[int, str, str]], rng: np.random.Generator) -> None:
    """Write rows of (class, split) whose features tell the class."""
    lines = ["x0,x1,x2,label,split"]
    for label, split, name in rows_of:
        values = rng.normal(size=3) + 3 * np.eye(3)[label]
        lines.append(",".join([*(f"{value:.4f}" for value in values), name, split]))
    path.write_text("\n".join(lines) + "\n")


NAMES = ["ant", "bee", "cat"]


@pytest.fixture
def hospitals(tmp_path: Path) -> Path:
    """A server with a meta pool and a test set, and three clients with two classes each and no test set."""
    rng = np.random.default_rng(0)
    server = [(label, split, NAMES[label]) for label in range(3) for split in ["train"] * 8 + ["test"] * 30]
    table(tmp_path / "server.csv", iter(server), rng)
    for client in range(3):
        mine = [(label, "train", NAMES[label]) for label in {client, (client + 1) % 3} for _ in range(20 + 10 * client)]
        table(tmp_path / f"client_{client}.csv", iter(mine), rng)
        (tmp_path / f"client_{client}.yaml").write_text(f"data: {{dataset: client_{client}.csv}}\n")
    content = {
        "data": {"dataset": "server.csv", "root": str(tmp_path), "label_column": "label", "split_column": "split"}
        | {"num_clients": 1, "partition": "iid", "imbalance_profile": "none", "num_meta_per_class": 4, "batch_size": 8},
        "algorithm": {
            "class_path": "FedAMM",
            "init_args": {"model": "mlp", "lr": 0.05, "differentiation": "forward"},
        },
        "federation": {"num_rounds": 3, "client_fraction": 1.0, "local_epochs": 2, "eval_interval": 1},
        "trainer": {"accelerator": "cpu", "precision": "32-true"},
        "output": {"figures": False, "progress": "none"},
        "logger": False,
    }
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def with_own_data(config: Path, names: list[str], options: str = "") -> Machines:
    machines = Machines(config, options)
    for client, name in enumerate(names):
        machines.add(client, client=name, own=True, config=str(config.parent / f"client_{client}.yaml"))
    return machines


@pytest.mark.parametrize("counts", [False, True])
def test_clients_with_data_of_their_own(counts: bool, hospitals: Path, capsys: pytest.CaptureFixture[str]) -> None:
    machines = with_own_data(hospitals, ["a", "b", "c"])
    folder = hospitals.parent / "run"
    told = {"output-dir": str(folder), "own-data": True, "clients": "a,b,c", "class-counts": counts, "wait": 5.0}
    serve(machines, hospitals, told)
    found = summary(folder)
    assert found["final"]["test/acc"] > 0.8
    assert found["failed_clients"] == 0
    assert found["class_counts"] == ([60, 50, 70] if counts else [4, 4, 4])
    known = json.loads((folder / "diagnostics.json").read_text())
    assert known["client_class_counts"] == ([[20, 20, 0], [0, 30, 30], [40, 0, 40]] if counts else [])
    out = capsys.readouterr().out
    assert "client 'b' has joined with 60 examples" in out
    assert "12 of the training examples at the server are used by nobody" in out
    told_of_counts = [message.content.config_records["plain"]["class_counts"] for message in machines.pushed[:3]]
    assert told_of_counts == [counts] * 3


def test_a_method_that_needs_the_counts_of_all_is_refused_without_them(
    hospitals: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = "--algorithm LogitAdjusted --algorithm.counts global"
    told = {
        "output-dir": str(hospitals.parent / "run"),
        "own-data": True,
        "clients": "3",
        "options": options,
        "wait": 5.0,
    }
    with pytest.raises(RuntimeError, match="status 2"):
        serve(with_own_data(hospitals, ["a", "b", "c"], options), hospitals, told)
    assert "Expected `class-counts` to be true for LogitAdjusted" in capsys.readouterr().err
    serve(with_own_data(hospitals, ["a", "b", "c"], options), hospitals, {**told, "class-counts": True})


def test_a_client_that_joins_in_the_middle(hospitals: Path, caplog: pytest.LogCaptureFixture) -> None:
    machines = with_own_data(hospitals, ["a", "b"])

    def fault(message: Any) -> None:
        if message.metadata.message_type == FINISH and 2 not in machines.contexts:
            machines.add(2, client="c", own=True, config=str(hospitals.parent / "client_2.yaml"))
            machines.add(3, client="d", own=True, config=str(hospitals.parent / "client_2.yaml"))

    machines.fault = fault
    folder = hospitals.parent / "run"
    told = {"output-dir": str(folder), "own-data": True, "clients": "a,b,c", "start-with": 2, "wait": 5.0}
    serve(machines, hospitals, told)
    asked = [message.metadata.dst_node_id for message in machines.pushed if message.metadata.message_type == BEGIN]
    assert asked.count(2) == 2
    assert asked.count(0) == 3
    assert "node 3 is refused: client 'd' is not one of the named clients" in caplog.text
    assert summary(folder)["failed_clients"] == 0


def test_own_data_are_read_by_the_names_of_the_servers_classes(hospitals: Path) -> None:
    options = {**FederatedDataModule("client_2.csv", str(hospitals.parent), split_column="split").hparams}
    data = OwnData(options, ["cat", "bee", "ant"], [3])
    mine = data.client(0)
    assert mine.class_counts(3).tolist() == [40, 0, 40]
    assert mine.num_examples == data.num_examples == 80
    assert mine.support_size == 30
    with pytest.raises(ValueError, match="Expected classes that the server knows, got cat"):
        OwnData(options, ["ant", "bee"], [3])
    with pytest.raises(ValueError, match=r"Expected examples of shape \(4,\), as the server has, got \(3,\)"):
        OwnData(options, NAMES, [4])


def test_own_features_are_put_into_the_servers_order(hospitals: Path) -> None:
    options = {**FederatedDataModule("client_2.csv", str(hospitals.parent), split_column="split").hparams}
    header = (hospitals.parent / "client_2.csv").read_text().splitlines()[0].split(",")
    names = [name for name in header if name not in ("label", "split")]
    given, moved = (OwnData(options, NAMES, [3], order).client(0) for order in (names, names[::-1]))
    assert torch.equal(torch.as_tensor(moved.images[:]), torch.as_tensor(given.images[:]).flip(1))
    with pytest.raises(ValueError, match="Expected the features that the server has, got none called age"):
        OwnData(options, NAMES, [3], ["age", *names[1:]])
    with pytest.raises(ValueError, match=rf"Expected the features that the server has, got {names[2]} too"):
        OwnData(options, NAMES, [2], names[:2])


def test_class_counts_are_those_of_all_clients_or_refused(hospitals: Path) -> None:
    told = {"output-dir": str(hospitals.parent / "run"), "own-data": True, "clients": "a,b,c", "wait": 5.0}
    with pytest.raises(ValueError, match=r"Expected `start-with` to be 0 with `class-counts`, .*, got 2"):
        serve(with_own_data(hospitals, ["a", "b", "c"]), hospitals, {**told, "class-counts": True, "start-with": 2})


def test_nothing_is_said_twice(federate: Federate, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        federate(options=METHODS["FedAvg"])
    assert [entry.message for entry in caplog.records if entry.name.startswith("fedamm_pl.integrations")] == []


def test_a_node_that_was_refused_while_its_dead_twin_was_listed_is_asked_again(
    config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = "--algorithm FedAvg --federation.num_rounds 3"
    left = ["once"]

    def fault(message: Any) -> Any:
        plain = message.content.config_records["plain"]
        if message.metadata.message_type != BEGIN or message.metadata.dst_node_id != 13 or not left:
            return None
        if plain[ROUND] == 1:
            machines.add(99, client="3", state=str(tmp_path))
            return None
        left.pop()
        del machines.contexts[13]
        return 5

    machines = Machines(config, options, fault)
    for client in range(4):
        machines.add(10 + client, client=str(client), state=str(tmp_path))
    serve(machines, config, {"output-dir": str(tmp_path / "run"), "options": options, "wait": 5.0})
    simulate(config, tmp_path / "simulation", options)
    assert_equal(final(tmp_path / "run"), final(tmp_path / "simulation"))
    assert "node 99 is refused: client 3 is already connected from another node" in caplog.text
    assert "client 3 is asked again: ClientApp stopped responding. (code 5)" in caplog.text


def test_a_node_that_does_not_come_back_is_lost(config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fault(message: Any) -> Any:
        if message.metadata.message_type == BEGIN and message.metadata.dst_node_id == 13:
            del machines.contexts[13]
            return 5
        return None

    options = "--algorithm FedAvg"
    machines = Machines(config, options, fault)
    for client in range(4):
        machines.add(10 + client, client=str(client), state=str(tmp_path))
    told = {"output-dir": str(tmp_path / "run"), "options": options, "wait": 5.0, "rejoin-timeout": 0.5}
    serve(machines, config, told)
    assert "client 3 failed (lost): ClientApp stopped responding. (code 5)" in caplog.text
    assert "client 3 failed (lost): it is not connected" in caplog.text  # in the next round
    assert summary(tmp_path / "run")["failed_clients"] == 2


def test_a_node_that_was_refused_is_asked_again_when_it_comes_back_mended(config: Path, tmp_path: Path) -> None:
    options = "--data.num_clients 2 --algorithm FedAvg --federation.num_rounds 1"
    machines = Machines(config, options)
    machines.add(10, client="0", state=str(tmp_path))
    machines.add(11, client="9", state=str(tmp_path))
    polls: list[set[int]] = []

    def get_node_ids() -> list[int]:
        polls.append(set(machines.contexts))
        if len(polls) == 4:
            del machines.contexts[11]
        if len(polls) == 6:
            machines.add(11, client="1", state=str(tmp_path))  # with its key it has the same number
        return list(machines.contexts)

    machines.get_node_ids = get_node_ids  # type: ignore[method-assign]
    serve(machines, config, {"output-dir": str(tmp_path / "run"), "options": options, "wait": 20.0})
    assert summary(tmp_path / "run")["failed_clients"] == 0


def test_a_node_whose_app_fails_is_refused_and_not_asked_for_ever(config: Path, tmp_path: Path) -> None:
    options = "--data.num_clients 2 --algorithm FedAvg"

    def fault(message: Any) -> Any:
        return 2 if message.metadata.dst_node_id == 11 else None

    machines = Machines(config, options, fault)
    for client in range(2):
        machines.add(10 + client, client=str(client), state=str(tmp_path))
    with pytest.raises(ValueError, match="refused: it cannot identify itself: ClientApp stopped responding"):
        serve(machines, config, {"output-dir": str(tmp_path / "run"), "options": options, "wait": 0.5})
    assert machines.kinds() == [HELLO, HELLO]


def test_other_versions_at_a_client_are_said(
    federate: Federate, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nodes, "versions", lambda: {"torch": "0.0"})
    federate(options="--algorithm FedAvg --federation.num_rounds 1", number=2)
    assert f"client 0 has torch {torch.__version__.partition('+')[0]}" in caplog.text
    assert "the server 0.0" in caplog.text


def test_a_client_without_its_data_says_why(hospitals: Path) -> None:
    machines = with_own_data(hospitals, ["a", "b", "c"])
    (hospitals.parent / "client_1.csv").unlink()
    told = {"output-dir": str(hospitals.parent / "run"), "own-data": True, "clients": "a,b,c", "wait": 0.2}
    with pytest.raises(ValueError, match=r"missing: b; refused: Expected .*client_1\.csv"):
        serve(machines, hospitals, told)
