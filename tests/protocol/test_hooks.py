"""Surveys, personal entries and refusals: hooks of small methods, in rounds and in whole runs."""

import dataclasses
import itertools
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Scaffold
from fedamm_pl.data.client import ClientData
from fedamm_pl.federation.executors import Executor, Processes, Sequential, Vectorized
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult, Question, State, payload_bytes
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.seeding import derive_seed
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data, tiny_resnet

HEAD = "model.3."


def unequal_clients() -> TinyData:
    return tiny_data(num_clients=3, partition="by_dirichlet", dirichlet_alpha=0.5)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, NUM_CLASSES))


def make(algorithm: type[FederatedModule], data: TinyData, network: nn.Module | None = None) -> Any:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, network or mlp(), lr=0.1, info=data.info)


def federate(module: FederatedModule, data: TinyData, num_rounds: int, **options: Any) -> Orchestrator:
    options = {"client_fraction": 1.0, "local_epochs": 1, "trainer": CPU, **options}
    run = Orchestrator(module, data, num_rounds=num_rounds, **options)
    run.run()
    return run


def assert_equal(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# What a client trains on.


class Chosen(FedAvg):
    """Trains on the first half of its examples, as if all were of class 1, drawn with replacement."""

    def local_data(self, session: ClientSession) -> ClientData:
        data = session.data.relabelled(torch.ones_like(session.data.indices))
        half = data.indices[: data.num_examples // 2]
        return dataclasses.replace(data, indices=half, balanced=True)


@pytest.mark.parametrize("executor", [Sequential(), Processes(2), Vectorized()], ids=lambda made: type(made).__name__)
def test_clients_train_on_what_a_method_gives_them(executor: Executor) -> None:
    data = unequal_clients()
    run = federate(make(Chosen, data), data, 1, executor=executor)
    expected = make(FedAvg, data)
    sums = {name: torch.zeros_like(value) for name, value in expected.model.state_dict().items()}
    for client in range(3):
        own, network = data.client(client), mlp()
        network.load_state_dict(expected.model.state_dict())
        optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        half = own.indices[: own.num_examples // 2]
        ones = torch.ones_like(own.labels)  # in balance is then: at random
        chosen = dataclasses.replace(own, indices=half, labels=ones, balanced=True)
        for images, labels in chosen.train_loader(derive_seed(0, "client", 1, client)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(expected.prepare(images)), labels).backward()
            optimizer.step()
        for name, value in network.state_dict().items():
            sums[name] += own.num_examples * value
    total = sum(data.client_size(client) for client in range(3))
    for name, value in sums.items():
        torch.testing.assert_close(run.state.shared[f"model.{name}"], value / total, rtol=1e-4, atol=1e-5)


# Survey.


class Surveying(FedAvg):
    """Sends each client's share of a class in three ways, and notes how it was asked."""

    returned: ClassVar[Mapping[str, Reduction]] = {"weighted.": "average", "plain.": "mean", "total.": "sum"}
    seen: ClassVar[list[dict[str, Any]]] = []
    trained: ClassVar[list[State]] = []

    def survey(self, session: ClientSession) -> State:
        received = {name: torch.equal(value, session.payload[name]) for name, value in self.shared_state().items()}
        self.seen.append(
            {
                "training": [part.training for part in self.modules()],
                "gradients": torch.is_grad_enabled(),
                "autocast": torch.is_autocast_enabled("cpu"),
                "received": all(received.values()) and received.keys() == self.shared_state().keys(),
            }
        )
        share = session.data.class_counts(NUM_CLASSES)[0] / session.data.num_examples
        return {"weighted.share": share, "plain.share": share, "total.share": share}

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        assert self.training
        self.trained.append(dict(self.session.surveyed))

    def expected_payload(self, sent: State) -> State:
        shares = dict.fromkeys(("weighted.share", "plain.share", "total.share"), torch.zeros(()))
        return {**super().expected_payload(sent), **shares}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        return {**super().server_step(state, reduced, server), **{n: v for n, v in reduced.items() if "share" in n}}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_survey_sees_the_received_model_in_evaluation_mode_before_the_fit(precision: Any) -> None:
    data = unequal_clients()
    Surveying.seen.clear()
    Surveying.trained.clear()
    trainer = TrainerConfig(accelerator="cpu", precision=precision)
    run = federate(make(Surveying, data, tiny_resnet(NUM_CLASSES, 1)), data, 2, trainer=trainer)
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    assert len(Surveying.seen) == len(Surveying.trained) == 6
    for seen in Surveying.seen:
        assert not any(seen["training"])
        assert not seen["gradients"]
        assert seen["received"]
        assert seen["autocast"] == (precision == "bf16-mixed")
    sizes = [data.client_size(client) for client in range(3)]
    held = [int(data.client(client).class_counts(NUM_CLASSES)[0]) for client in range(3)]
    shares = [count / size for count, size in zip(held, sizes, strict=True)]
    assert len(set(shares)) > 1
    assert [float(surveyed["plain.share"]) for surveyed in Surveying.trained[:3]] == pytest.approx(shares)
    found = {name: float(value) for name, value in run.state.shared.items() if "share" in name}
    expected = {"weighted": sum(held) / sum(sizes), "plain": sum(shares) / 3, "total": sum(shares)}
    assert found == pytest.approx({f"{name}.share": value for name, value in expected.items()})


def test_survey_changes_nothing_of_the_fit_and_its_bytes_count() -> None:
    data = unequal_clients()

    class Drawing(Surveying):
        """Moves the global random state, and writes on what it received."""

        def survey(self, session: ClientSession) -> State:
            torch.rand(7)
            return super().survey(session)

    rounds = {method: Round(make(method, data), data) for method in (Drawing, FedAvg)}
    mine, theirs = (one.train(1) for one in rounds.values())
    assert_equal({name: value for name, value in mine.payload.items() if name in theirs.payload}, theirs.payload)
    assert mine.bytes_sent == theirs.bytes_sent + 3 * 4 == payload_bytes(mine.payload)


# Personal entries: FedPer (Arivazhagan et al., 2019).


class FedPer(FedAvg):
    """FedAvg whose last layer stays at the client."""

    shared: ClassVar[tuple[str, ...]] = ("model.1.",)
    personal: ClassVar[tuple[str, ...]] = (HEAD,)
    starts: ClassVar[dict[tuple[int, int], State]] = {}
    payloads: ClassVar[list[State]] = []

    def on_train_start(self) -> None:
        super().on_train_start()
        assert self.session is not None
        self.starts[self.session.broadcast.round_num, self.session.task.client_id] = self.personal_state()

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        self.payloads.append(result.payload)
        return super().contribution(result, server)


@pytest.fixture
def fresh() -> None:
    FedPer.starts.clear()
    FedPer.payloads.clear()


def kept_by(run: Orchestrator) -> dict[int, State]:
    """What each client that has taken part keeps to itself."""
    return {client: run._store.read(client, version) for client, version in run.state.kept.items()}


@pytest.mark.usefixtures("fresh")
def test_personal_head_starts_from_the_initial_one_and_stays_at_its_client() -> None:
    data = unequal_clients()
    module = make(FedPer, data)
    initial = module.personal_state()
    assert set(initial) == {"model.3.weight", "model.3.bias"}
    after_one = kept_by(federate(make(FedPer, data), data, 1))
    FedPer.starts.clear()
    run = federate(module, data, 2)
    for client in range(3):
        assert_equal(FedPer.starts[1, client], initial)  # not that of the client before
        assert_equal(FedPer.starts[2, client], after_one[client])
        assert not torch.equal(after_one[client]["model.3.weight"], initial["model.3.weight"])
    assert not torch.equal(after_one[0]["model.3.weight"], after_one[1]["model.3.weight"])
    assert len(FedPer.payloads) == 9
    assert {frozenset(payload) for payload in FedPer.payloads} == {frozenset({"model.1.weight", "model.1.bias"})}
    assert set(run.state.shared) == {"model.1.weight", "model.1.bias"}
    assert run.state.bytes_total["sent"] == 6 * payload_bytes(run.state.shared)
    assert_equal(module.personal_state(), initial)


@pytest.mark.usefixtures("fresh")
def test_a_personal_head_is_evaluated_as_it_was_made() -> None:
    data = unequal_clients()
    module = make(FedPer, data)
    run = federate(module, data, 2)
    reference = make(FedAvg, data)
    reference.load_shared_state({**run.state.shared, **make(FedPer, data).personal_state()})
    (images, labels), *_ = [*data.test_dataloader()]
    accuracy = float((reference.eval()(images).argmax(1) == labels).float().mean())
    assert run.state.history[-1]["test/acc"] == pytest.approx(accuracy)
    assert_equal(module.shared_state(), run.state.shared)


@pytest.mark.usefixtures("fresh")
def test_a_client_that_sat_out_finds_its_head_again_over_a_resume_too(tmp_path: Path) -> None:
    data = unequal_clients()

    def run(num_rounds: int, folder: str | None) -> Orchestrator:
        folders = {"output_dir": tmp_path / folder} if folder else {}
        return federate(make(FedPer, data), data, num_rounds, client_fraction=0.34, **folders)

    whole = run(8, None)
    starts = dict(FedPer.starts)
    rounds = {client: [r for r, c in starts if c == client] for client in {c for _, c in starts}}
    assert any(later - sooner > 1 for mine in rounds.values() for sooner, later in itertools.pairwise(mine))
    for num_rounds in (3, 5, 8):
        halves = run(num_rounds, "halves")
    assert halves.state.counts["resumes"] == 2
    assert_equal(halves.state.shared, whole.state.shared)
    assert halves.state.kept == whole.state.kept
    for client, kept in kept_by(whole).items():
        assert_equal(kept_by(halves)[client], kept)
    for at, state in starts.items():
        assert_equal(FedPer.starts[at], state)


def test_a_personal_head_and_what_a_method_keeps_lie_beside_each_other() -> None:
    data = unequal_clients()

    class PersonalScaffold(Scaffold):
        shared: ClassVar[tuple[str, ...]] = ("model.1.",)
        personal: ClassVar[tuple[str, ...]] = (HEAD,)
        kept: ClassVar[list[set[str]]] = []

        def on_train_start(self) -> None:
            super().on_train_start()
            assert self.session is not None
            self.kept.append(set(self.session.kept))

    run = federate(make(PersonalScaffold, data), data, 2)
    assert run.state.counts == dict.fromkeys(run.state.counts, 0)
    shared = {"model.1.weight", "model.1.bias"}
    assert PersonalScaffold.kept == [set()] * 3 + [shared] * 3
    assert set(kept_by(run)[0]) == {*shared, "model.3.weight", "model.3.bias"}
    assert set(run.state.shared) == {*shared, *(f"control.{name}" for name in shared)}


def test_entries_that_are_neither_shared_nor_personal_are_refused() -> None:
    class Leaking(FedAvg):
        shared: ClassVar[tuple[str, ...]] = ("model.1.",)

    data = unequal_clients()
    with pytest.raises(ValueError, match=r"Expected `shared` and `personal` of Leaking .* without model\.3\.bias"):
        Orchestrator(make(Leaking, data), data, num_rounds=1, trainer=CPU)


# Contributions.


class Refusing(FedAvg):
    """Refuses what client 1 returns, in two lines."""

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        if result.client_id == 1:
            raise ValueError("its number\n is odd")
        return super().contribution(result, server)


def test_a_contribution_that_a_method_refuses_is_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    data = unequal_clients()
    with caplog.at_level(logging.WARNING):
        run = federate(make(Refusing, data), data, 2)
    assert run.state.counts == {"failed_clients": 0, "refused_updates": 2, "failed_rounds": 0, "resumes": 0}
    assert "round 2: the update of client 1 is refused: its number is odd" in caplog.text
    one = Round(make(FedAvg, data), data)
    assert_equal(federate(make(Refusing, data), data, 1).state.shared, one.update([one.train(0), one.train(2)]))


def test_too_many_refusals_fail_the_round() -> None:
    data = unequal_clients()
    module = make(Refusing, data)
    before = module.shared_state()
    run = Orchestrator(module, data, num_rounds=1, client_fraction=1.0, min_success_fraction=0.9, trainer=CPU)
    with pytest.raises(FederationError, match="no round succeeded"):
        run.run()
    assert run.state.counts["failed_rounds"] == 1
    assert_equal(run.state.shared, before)


class Scaling(FedAvg):
    """Doubles updates, by the server's state and by what was sent."""

    def contribution(self, result: ClientResult, server: ServerSession) -> State:
        assert server.sent.keys() == server.state.keys()
        return {name: server.state[name] + 2 * (value - server.sent[name]) for name, value in result.payload.items()}


def test_contributions_are_what_is_reduced() -> None:
    data = unequal_clients()
    one, plain = Round(make(Scaling, data), data), Round(make(FedAvg, data), data)
    results = [plain.train(client) for client in range(3)]
    average = plain.update(results)
    expected = {name: value + 2 * (average[name] - value) for name, value in plain.state.items()}
    found = one.update(results)
    torch.testing.assert_close(found, expected)
    assert one.server.session.num_results == 3
    assert all(not torch.equal(found[name], one.state[name]) for name in found)


class InPlace(FedAvg):
    """Works on the state that it is given."""

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        for name, value in reduced.items():
            state[name].copy_(value)
        return state


def test_a_server_step_may_work_in_place() -> None:
    data = unequal_clients()
    one = Round(make(InPlace, data), data)
    before = {name: value.clone() for name, value in one.state.items()}
    results = [one.train(0)]
    assert_equal(one.update(results), results[0].payload)
    assert_equal(one.state, before)
    assert_equal(
        federate(make(InPlace, data), data, 2).state.shared, federate(make(FedAvg, data), data, 2).state.shared
    )


# The base.


def test_the_base_is_fedavg() -> None:
    data = unequal_clients()
    one = Round(make(FederatedModule, data), data)
    module, state = one.server.module, {**one.state, "own": torch.ones(1)}
    assert set(one.broadcast.payload) == set(one.state)
    assert set(module.broadcast(state, one.server.session)) == set(module.deployed(state)) == set(one.state)
    assert module.question(one.session(0)) is None
    assert module.survey(one.session(0)) == module.tallies() == module.diagnostics({}) == {}
    assert not module.asks_in_fit
    stepped = module.server_step(state, {"model.1.bias": torch.zeros(8), "beside": torch.ones(1)}, one.server.session)
    assert set(stepped) == set(state)
    assert not stepped["model.1.bias"].any()
    with pytest.raises(NotImplementedError, match="FederatedModule clients ask the server nothing"):
        module.answer(Question(1, 0, 0, {}), one.server.session)
    assert module.questions([one.session(0)]) is None
    with pytest.raises(NotImplementedError, match="FederatedModule clients ask the server nothing at once"):
        module.answers([], one.server.session)
    with pytest.raises(NotImplementedError, match="FederatedModule clients ask the server nothing at once"):
        module.take_answers([], [])


def test_states_that_do_not_fit_are_refused_by_name() -> None:
    module = make(FedAvg, unequal_clients())
    state = module.shared_state()
    module.load_shared_state({**state, "control.model.1.weight": torch.zeros(1)})
    lacking = {name: value for name, value in state.items() if name != "model.3.bias"}
    for wrong in (lacking, {**state, "model.9.bias": torch.zeros(1)}):
        name = r"model\.3\.bias" if wrong is lacking else r"model\.9\.bias"
        with pytest.raises(
            ValueError, match=rf"Expected `state` to hold the shared entries .* difference in \['{name}'\]"
        ):
            module.load_shared_state(wrong)
    with pytest.raises(
        ValueError, match=r"(?s)Expected `state` to have the shapes of the module, got .*model\.3\.bias"
    ):
        module.load_shared_state({**state, "model.3.bias": torch.zeros(7)})


def test_copies_leave_the_module_alone() -> None:
    module = make(FedPer, unequal_clients())
    for state in (module.shared_state(), module.personal_state()):
        for value in state.values():
            value.fill_(7)
    assert not any((value == 7).any() for value in module.state_dict().values())


def test_a_result_can_be_replaced_and_not_changed() -> None:
    result = ClientResult(0, 1, {})
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.client_id = 1  # type: ignore[misc]
