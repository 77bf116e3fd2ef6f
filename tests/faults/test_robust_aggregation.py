"""What a single update, or a minority of them, can do to the global model, and what is said about it."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fedamm_pl import FedAvg, FederatedModule, Orchestrator
from fedamm_pl.algorithms import Climb, CReFF, FedNova, Scaffold
from fedamm_pl.cli.main import main
from fedamm_pl.federation.checkpoint import load_checkpoint
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import RunSpec
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.intake import Intake, outlier
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.server import Server
from fedamm_pl.protocol.messages import ClientResult, ClientTask, State
from fedamm_pl.protocol.reduction import Reduction
from fedamm_pl.protocol.session import ClientSession, ServerSession
from tests.faults import faulty
from tests.faults.faulty import CPU, Plan, Returning
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

CLIENTS = range(5)
VICTIM = 3
FACTOR = 1e6
FAULTY = "tests.faults.faulty"
TOO_LONG = r"round (\d+): the update of client (\d+) is (\d+) times as long as the median of the others"
ROBUST: dict[str, dict[str, Any]] = {
    "median": {"aggregation": "median"},
    "trimmed_mean": {"aggregation": "trimmed_mean", "trim_fraction": 0.2},
}
QUICK: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "eval_interval": 100, "trainer": CPU}
Array = npt.NDArray[np.float64]


def even_data(**options: Any) -> TinyData:
    """Five clients of 46 or 47 images, all classes at each."""
    defaults: dict[str, Any] = {"num_clients": 5, "partition": "iid", "imbalance_factor": 1.0, "batch_size": 8}
    return tiny_data(**{**defaults, **options})


def make(algorithm: type[FederatedModule], data: TinyData, **options: Any) -> FederatedModule:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, f"{FAULTY}.network", info=data.info, **{"lr": 0.05, **options})


def stretched(payload: State, sent: State, factor: float) -> State:
    """An update that is ``factor`` times as long; integers are left, and a variance stays one."""
    long = {
        name: sent[name] + factor * (value - sent[name]) if value.is_floating_point() else value
        for name, value in payload.items()
    }
    return {name: value.abs() if name.endswith("running_var") else value for name, value in long.items()}


def flat(state: State) -> Array:
    """All floating-point entries as one vector."""
    return np.concatenate([value.double().numpy().ravel() for value in state.values() if value.is_floating_point()])


def reported(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The warnings of an update that is too long."""
    records = [record for record in caplog.records if record.name.startswith("fedamm_pl")]
    return [record.getMessage() for record in records if re.match(TOO_LONG, record.getMessage())]


@dataclasses.dataclass(frozen=True)
class Round:
    """What clients that are all honest return in round 1, what they were sent, and what is expected of them."""

    server: Server
    sent: State
    tasks: list[ClientTask]
    results: list[ClientResult]

    @property
    def updates(self) -> Array:
        """(clients, entries)"""
        return np.stack([flat(result.payload) for result in self.results]) - flat(self.sent)

    @property
    def weights(self) -> Array:
        sizes = np.array([result.num_examples for result in self.results], dtype=np.float64)
        return np.asarray(sizes / sizes.sum())

    def with_victim(self, change: Callable[[State, State], State]) -> list[ClientResult]:
        """The results, that of the victim changed."""
        results = list(self.results)
        payload = change(results[VICTIM].payload, self.sent)
        results[VICTIM] = dataclasses.replace(results[VICTIM], payload=payload)
        return results


@cache
def honest_round(algorithm: type[FederatedModule]) -> Round:
    data = even_data()
    worker = Worker(RunSpec(make(algorithm, data), data, CPU, seed=0, threads=1))
    server = Server(make(algorithm, data), data, CPU, seed=0)
    broadcast = server.broadcast(server.module.shared_state(), round_num=1, local_epochs=1)
    worker.begin(broadcast)
    tasks = [ClientTask(client, seed=client) for client in CLIENTS]
    results = [worker.train(task, {}) for task in tasks]
    assert all(isinstance(result, ClientResult) for result in results)
    return Round(server, broadcast.payload, tasks, results)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def honest() -> Round:
    return honest_round(FedAvg)


def returned(
    outcomes: Sequence[ClientResult], algorithm: type[FederatedModule] = FedAvg, **options: Any
) -> Orchestrator:
    """A run of a round in which these results come back; it may fail."""
    data = even_data()
    options = {**QUICK, "num_rounds": 1, **options}
    run = Orchestrator(make(algorithm, data), data, executor=Returning(outcomes), **options)
    with suppress(FederationError):
        run.run()
    return run


# One update that is far too long


@pytest.mark.parametrize("aggregation", ["num_examples", "uniform"])
def test_a_mean_is_wrecked_by_one_update_and_says_by_whose(
    aggregation: Any, honest: Round, caplog: pytest.LogCaptureFixture
) -> None:
    run = returned(honest.with_victim(lambda *states: stretched(*states, FACTOR)), aggregation=aggregation)
    lengths = np.linalg.norm(honest.updates, axis=1)
    weights = honest.weights if aggregation == "num_examples" else np.full(len(CLIENTS), 1 / len(CLIENTS))
    moved = np.linalg.norm(flat(run.state.shared) - flat(honest.sent))
    assert moved == pytest.approx(weights[VICTIM] * FACTOR * lengths[VICTIM], rel=1e-3)
    (line,) = reported(caplog)
    found = re.match(TOO_LONG, line)
    assert found is not None
    assert found.groups()[:2] == ("1", str(VICTIM))
    ratio = FACTOR * lengths[VICTIM] / np.median(np.delete(lengths, VICTIM))
    assert float(found[3]) == pytest.approx(ratio, rel=1e-3)
    assert "max_update_norm" in line
    assert len(line.splitlines()) == 1
    assert run.state.history[-1]["test/loss"] > 1e3


@pytest.mark.parametrize("factor", [FACTOR, -FACTOR])
@pytest.mark.parametrize("aggregation", ROBUST)
def test_a_robust_mean_stays_within_the_honest_clients(
    aggregation: str, factor: float, honest: Round, caplog: pytest.LogCaptureFixture
) -> None:
    run = returned(honest.with_victim(lambda *states: stretched(*states, factor)), **ROBUST[aggregation])
    others = [flat(result.payload) for result in honest.results if result.client_id != VICTIM]
    result = flat(run.state.shared)
    assert (np.min(others, axis=0) <= result).all()
    assert (result <= np.max(others, axis=0)).all()
    assert reported(caplog) == []


@pytest.mark.parametrize("factor", [FACTOR, -FACTOR])
def test_with_clipping_one_update_moves_the_mean_by_no_more_than_its_share_of_the_bound(
    factor: float, honest: Round, caplog: pytest.LogCaptureFixture
) -> None:
    lengths = np.linalg.norm(honest.updates, axis=1)
    bound = 1.01 * float(lengths.max())  # the honest ones are shorter
    results = honest.with_victim(lambda *states: stretched(*states, factor))
    run = returned(results, max_update_norm=bound)
    undisturbed = flat(honest.sent) + honest.weights @ honest.updates
    moved = np.linalg.norm(flat(run.state.shared) - undisturbed)
    update = flat(results[VICTIM].payload) - flat(honest.sent)
    own = bound / np.linalg.norm(update) * update - honest.updates[VICTIM]  # what is left of it, less its honest one
    assert moved == pytest.approx(honest.weights[VICTIM] * np.linalg.norm(own), rel=1e-3)
    assert moved <= honest.weights[VICTIM] * 2 * bound
    assert reported(caplog) == []


@pytest.mark.parametrize("options", [{}, {"max_update_norm": 5.0}, *ROBUST.values()], ids=str)
def test_the_program_survives_what_it_was_told_to_bound(
    options: dict[str, Any],
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def spoil(payload: State, sent: State) -> State:
        return stretched(payload, sent, FACTOR)

    monkeypatch.setattr(faulty, "plan", Plan(lambda round_num, client: (round_num, client) == (2, VICTIM), spoil=spoil))
    words = ["--federation.client_fraction", "1", "--federation.num_rounds", "2", "--logger", "false"]
    words += ["--algorithm.model", f"{FAULTY}.network", "--algorithm", f"{FAULTY}.FedAvgSpoilsPayload"]
    words += [word for name, value in options.items() for word in (f"--federation.{name}", str(value))]
    main(command("FedAvg", tmp_path, *words))
    before, after = (
        load_checkpoint(tmp_path / f"checkpoints/round_{round_num:06d}.ckpt").state for round_num in (1, 2)
    )
    moved = np.linalg.norm(flat(after.shared) - flat(before.shared))
    lines = reported(caplog)
    if options:
        assert moved < 25  # of the order of an honest round
        assert after.diverged is None
        assert lines == []
    else:
        assert moved > 1e5
        assert [re.match(TOO_LONG, line).groups()[:2] for line in lines] == [("2", str(VICTIM))]  # type: ignore[union-attr]


# Clipping


def accepted(results: Sequence[ClientResult], honest: Round, bound: float) -> list[State]:
    server, config = honest.server, FederationConfig(1, max_update_norm=bound)
    intake = Intake(1, honest.tasks, server.expected_payload(), server.module, config)
    payloads = [result.payload for result in intake.accept(results, lambda result: result, lambda result: None)]
    assert not intake.failures
    return payloads


def test_clipping_equals_a_computation_in_numpy(honest: Round) -> None:
    lengths = np.linalg.norm(honest.updates, axis=1)
    bound = float(np.median(lengths))
    for client, payload in enumerate(accepted(honest.results, honest, bound)):
        expected = flat(honest.sent) + min(1, bound / lengths[client]) * honest.updates[client]
        assert np.abs(flat(payload) - expected).max() <= 2e-7 * np.abs(flat(honest.sent)).max()


def test_shorter_updates_are_left_bit_for_bit_and_longer_ones_keep_their_direction(honest: Round) -> None:
    lengths = np.linalg.norm(honest.updates, axis=1)
    bound = float(np.median(lengths))
    clipped = 0
    for result, payload, length in zip(honest.results, accepted(honest.results, honest, bound), lengths, strict=True):
        unchanged = [name for name, value in payload.items() if torch.equal(value, result.payload[name])]
        if length <= bound:
            assert len(unchanged) == len(payload)
            continue
        clipped += 1
        assert unchanged == ["model.norm.num_batches_tracked"]
        before, after = flat(result.payload) - flat(honest.sent), flat(payload) - flat(honest.sent)
        assert before @ after / (np.linalg.norm(before) * np.linalg.norm(after)) > 1 - 1e-9
        assert np.linalg.norm(after) == pytest.approx(bound, rel=1e-6)
    assert clipped == 2


@pytest.mark.parametrize("value", [1e3, 1e20, 3e38, -3e38])
def test_an_update_of_any_size_is_clipped_to_the_bound(value: float, honest: Round) -> None:
    """Up to the largest numbers that float32 has."""

    def huge(payload: State, sent: State) -> State:
        return {
            name: torch.full_like(entry, value) if entry.is_floating_point() and "running_var" not in name else entry
            for name, entry in payload.items()
        }

    payload = accepted(honest.with_victim(huge), honest, 1.0)[VICTIM]
    names = [name for name in payload if "running_var" not in name]
    update = flat({name: payload[name] - honest.sent[name] for name in names})
    assert np.linalg.norm(update) == pytest.approx(1.0, rel=1e-3)
    assert (np.sign(update) == np.sign(value)).all()


def test_integers_are_not_clipped_but_averaged(honest: Round) -> None:
    name = "model.norm.num_batches_tracked"

    def count(payload: State, sent: State) -> State:
        return {**stretched(payload, sent, FACTOR), name: payload[name] + 100}

    results = honest.with_victim(count)
    assert accepted(results, honest, 1e-3)[VICTIM][name] == results[VICTIM].payload[name]
    run = returned(results, max_update_norm=1e-3)
    mean = honest.weights @ np.array([int(result.payload[name]) for result in results])
    assert int(run.state.shared[name]) == round(mean)


def test_a_bound_that_nothing_reaches_changes_no_bit(honest: Round) -> None:
    states = [returned(honest.results, max_update_norm=bound).state.shared for bound in (None, 1e9)]
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]


@pytest.mark.parametrize(
    ("algorithm", "beside"), [(Scaffold, "control."), (CReFF, "class_gradients"), (FedNova, "num_steps")]
)
def test_what_is_sent_beside_the_model_is_not_shortened(algorithm: type[FederatedModule], beside: str) -> None:
    honest = honest_round(algorithm)
    sent = {name: value for name, value in honest.sent.items() if name.startswith("model.")}
    for result, payload in zip(honest.results, accepted(honest.results, honest, 1e-3), strict=True):
        others = [name for name in payload if not name.startswith("model.")]
        assert any(name.startswith(beside) for name in others)
        assert all(torch.equal(payload[name], result.payload[name]) for name in others)
        assert any(bool(payload[name].any()) for name in others)
        update = flat({name: payload[name] for name in sent}) - flat(sent)
        assert np.linalg.norm(update) == pytest.approx(1e-3, rel=1e-3)


class CountsClasses(FedAvg):
    """FedAvg whose clients also say how many examples of each class they hold, in numbers that dwarf any update."""

    returned: ClassVar[Mapping[str, Reduction]] = {"class_counts": "sum"}

    def survey(self, session: ClientSession) -> State:
        labels = torch.cat([labels for _, labels in session.data.plain_batches()])
        return {"class_counts": 1e6 * labels.bincount(minlength=NUM_CLASSES).float()}

    def expected_payload(self, sent: State) -> State:
        return {**super().expected_payload(sent), "class_counts": torch.zeros(NUM_CLASSES)}

    def server_step(self, state: State, reduced: State, server: ServerSession) -> State:
        return {**super().server_step(state, reduced, server), "class_counts": reduced["class_counts"]}


def test_a_bound_does_the_same_to_a_model_whatever_is_sent_beside_it() -> None:
    states, data = [], even_data()
    for algorithm in (FedAvg, CountsClasses):
        run = Orchestrator(make(algorithm, data), data, num_rounds=2, max_update_norm=0.5, **QUICK)
        run.run()
        assert run.state.counts["refused_updates"] == 0
        states.append(run.state.shared)
    counts = states[1].pop("class_counts")
    assert counts.tolist() == (1e6 * data.client_class_counts.sum(0)).tolist()
    assert states[0].keys() == states[1].keys()
    assert not [name for name in states[0] if not torch.equal(states[0][name], states[1][name])]
    assert np.linalg.norm(flat(states[0]) - flat(make(FedAvg, data).shared_state())) <= 2 * 0.5 * (1 + 1e-6)


# Numbers beside the model that cannot be


IMPOSSIBLE: list[tuple[type[FederatedModule], str, torch.Tensor, str]] = [
    *((FedNova, "num_steps", torch.tensor(n), rf"its num_steps is {n}, expected 1 to 4\d") for n in (0, -1, 48, 2**62)),
    (Climb, "global_loss", torch.tensor(-1e-9).double(), "its global_loss is -1e-09, a cross-entropy is 0 or more"),
    (Climb, "global_loss", torch.tensor(-1e30).double(), r"its global_loss is -1e\+30, a cross-entropy is 0 or more"),
    (
        Climb,
        "global_loss",
        torch.tensor(1e300, dtype=torch.float64),
        r"its global_loss is 1e\+300, beyond the largest number of float32",
    ),
    (Climb, "global_loss", torch.tensor(math.nan).double(), "global_loss is NaN or infinite"),
    (Climb, "global_loss", torch.zeros(5).double(), r"global_loss has shape \(5,\), expected \(\)"),
    (CReFF, "present", torch.tensor([1, 1, 2, 1]), "present holds other values than 0 and 1"),
    (CReFF, "present", torch.tensor([1, 1, -1, 1]), "present holds other values than 0 and 1"),
    (CReFF, "present", torch.tensor([1.0, 1.0, 0.5, 1.0]), "present is of type torch.float32, expected torch.int64"),
    (CReFF, "class_gradients", torch.zeros(4, 4, 9) + math.inf, "class_gradients is NaN or infinite"),
    (
        CReFF,
        "class_gradients",
        torch.zeros(4, 4, 9) + 1e30,
        r"its class_gradients are of length 1\.2e\+31, beyond 1e\+15",
    ),
    (CReFF, "present", torch.tensor([0, 0, 0, 0]), "its class_gradients are of classes that it does not hold"),
    (Scaffold, "control.model.hidden.weight", torch.zeros(8, 64) + math.nan, "control.model.hidden.weight is NaN"),
]


@pytest.mark.parametrize(("algorithm", "name", "value", "reason"), IMPOSSIBLE)
def test_an_impossible_number_beside_the_model_is_refused(
    algorithm: type[FederatedModule], name: str, value: torch.Tensor, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    honest = honest_round(algorithm)
    assert name in honest.results[VICTIM].payload
    run = returned(honest.with_victim(lambda payload, sent: {**payload, name: value}), algorithm)
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("fedamm_pl")]
    assert re.match(rf"round 1: the update of client {VICTIM} is refused: {reason}", line), line
    assert len(line.splitlines()) == 1
    assert run.state.counts["refused_updates"] == 1
    others = returned([result for result in honest.results if result.client_id != VICTIM], algorithm)
    assert run.state.shared.keys() == others.state.shared.keys()
    assert not [key for key, wanted in others.state.shared.items() if not torch.equal(run.state.shared[key], wanted)]


def test_as_many_steps_as_examples_are_possible(caplog: pytest.LogCaptureFixture) -> None:
    honest = honest_round(FedNova)
    for steps in (1, honest.results[VICTIM].num_examples):
        returned(honest.with_victim(lambda payload, _, n=steps: {**payload, "num_steps": torch.tensor(n)}), FedNova)
    assert [record for record in caplog.records if "refused" in record.getMessage()] == []


# Median and trimmed mean


@pytest.mark.parametrize("num_clients", [3, 4, 5])
@pytest.mark.parametrize(
    ("aggregation", "trim_fraction"), [("median", 0.1), ("trimmed_mean", 0.1), ("trimmed_mean", 0.4)]
)
def test_robust_means_equal_numpy(aggregation: Any, trim_fraction: float, num_clients: int, honest: Round) -> None:
    results = honest.with_victim(lambda *states: stretched(*states, FACTOR))[-num_clients:]
    run = returned(results, aggregation=aggregation, trim_fraction=trim_fraction)
    for name, value in run.state.shared.items():
        stacked = np.sort(np.stack([result.payload[name].double().numpy() for result in results]), axis=0)
        if aggregation == "median":
            expected = np.median(stacked, axis=0)
        else:
            cut = min(int(np.ceil(trim_fraction * num_clients)), (num_clients - 1) // 2)
            expected = stacked[cut : num_clients - cut].mean(0)
        if not value.is_floating_point():
            expected = np.round(expected)
        assert torch.equal(value, torch.from_numpy(np.asarray(expected)).to(value.dtype)), name


@pytest.mark.parametrize("aggregation", ROBUST)
def test_fewer_than_three_clients_a_round_are_refused_for_a_robust_mean(aggregation: Any) -> None:
    data = even_data()
    options: dict[str, Any] = {"num_rounds": 1, "aggregation": aggregation, "trainer": CPU}
    message = rf"`client_fraction` to give 3 or more clients a round for the aggregation {aggregation}, got 0\.5 of 5"
    with pytest.raises(ValueError, match=message):
        Orchestrator(make(FedAvg, data), data, client_fraction=0.5, **options)
    Orchestrator(make(FedAvg, data), data, client_fraction=0.6, **options)


def test_the_program_refuses_them_in_one_line(command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command("FedAvg", tmp_path / "run", "--federation.aggregation", "median"))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("fedamm: error: Expected --federation.client_fraction to give 3 or more clients a round")
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("aggregation", ROBUST)
def test_fewer_than_three_successes_fail_a_round_of_a_robust_mean(aggregation: Any, honest: Round) -> None:
    for num_results, fails in ((2, True), (3, False)):
        run = returned(honest.results[:num_results], aggregation=aggregation, min_success_fraction=0.0)
        assert run.state.counts["failed_rounds"] == fails
        kept = [name for name, value in honest.sent.items() if torch.equal(run.state.shared[name], value)]
        assert len(kept) == (len(honest.sent) if fails else 0)


class SpoilsControls(faulty.Strikable, Scaffold):
    """A client claims that its control variate has changed by very much."""

    def client_payload(self) -> State:
        payload = super().client_payload()
        spoilt = {name: torch.full_like(value, 1e3) for name, value in payload.items() if name.startswith("control.")}
        return {**payload, **spoilt} if self.struck else payload


def test_a_robust_mean_protects_the_control_variates_of_scaffold(monkeypatch: pytest.MonkeyPatch) -> None:
    def loss(aggregation: Any, *victims: int) -> float:
        monkeypatch.setattr(faulty, "plan", Plan(lambda round_num, client: client in victims))
        data = even_data(augmentation="none")
        run = Orchestrator(make(SpoilsControls, data), data, num_rounds=3, aggregation=aggregation, **QUICK)
        return run.run()[-1]["test/loss"]

    undisturbed, protected, wrecked = loss("median"), loss("median", VICTIM), loss("num_examples", VICTIM)
    assert protected == pytest.approx(undisturbed, rel=0.2)
    assert not wrecked < 10 * undisturbed


@pytest.mark.parametrize("aggregation", ROBUST)
@pytest.mark.parametrize(("algorithm", "sums"), [(CReFF, "class_gradients, present"), (Climb, "global_loss")])
def test_a_method_whose_clients_send_sums_is_refused_for_a_robust_mean(
    algorithm: type[FederatedModule], sums: str, aggregation: Any, tmp_path: Path
) -> None:
    message = (
        rf"^Expected `aggregation` to be num_examples or uniform for {algorithm.__name__}, got {aggregation}: it cannot "
        rf"protect the sums that its clients send \({sums}\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        returned([], algorithm, aggregation=aggregation, output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


# What is reported


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("model", ["tests.tiny.tiny_resnet", "small_cnn"])
def test_honest_clients_of_very_different_sizes_are_not_reported(
    model: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = tiny_data(
        partition="by_dirichlet", dirichlet_alpha=0.1, min_client_size=2, num_clients=8, imbalance_factor=1.0, seed=seed
    )
    sizes = [data.client_size(client) for client in range(8)]
    assert max(sizes) > 6 * min(sizes)
    torch.manual_seed(0)
    module = FedAvg(NUM_CLASSES, 1, model, lr=0.05, info=data.info)
    Orchestrator(module, data, num_rounds=2, seed=seed, **QUICK).run()
    assert reported(caplog) == []


def test_of_fewer_than_three_clients_none_is_reported(honest: Round, caplog: pytest.LogCaptureFixture) -> None:
    results = honest.with_victim(lambda *states: stretched(*states, FACTOR))
    returned(results[VICTIM : VICTIM + 2], min_success_fraction=0.0)
    assert reported(caplog) == []


@pytest.mark.parametrize(
    ("norms", "found"),
    [
        ([1.0, 1.0, 10.0], (2, 10.0)),
        ([1.0, 1.0, 9.999], None),
        ([1.0, 1.0, 0.001], None),  # an update that is too short harms nobody
        ([1.0, 3.0, 20.0, 2.0], (2, 10.0)),
        ([0.0, 0.0, 1.0], None),
        ([0.0, 0.0, 0.0], None),
        ([1.0, 100.0], None),
        ([100.0], None),
        ([], None),
        ([50.0, 50.0, 1.0, 1.0, 1.0], (0, 50.0)),
    ],
)
def test_ten_times_the_median_of_the_others_is_an_outlier(norms: list[float], found: Any) -> None:
    assert outlier(dict(enumerate(norms))) == found


# A minority that works against the others


def accuracy_under_attack(aggregation: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The accuracy after three rounds in which two of five clients return their update reversed and three times as long."""
    data = even_data(augmentation="none")
    module = make(faulty.FedAvgSpoilsPayload, data)
    plan = Plan(lambda round_num, client: client in (1, VICTIM), spoil=lambda *states: stretched(*states, -3.0))
    monkeypatch.setattr(faulty, "plan", plan)
    run = Orchestrator(module, data, num_rounds=3, aggregation=aggregation, trim_fraction=0.4, **QUICK)
    return run.run()[-1]["test/acc"]


def test_a_reversed_minority_stops_the_mean_and_not_the_robust_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    chance = 1 / NUM_CLASSES
    assert accuracy_under_attack("num_examples", monkeypatch) <= chance
    assert accuracy_under_attack("median", monkeypatch) > 0.8
    assert accuracy_under_attack("trimmed_mean", monkeypatch) > 0.8
