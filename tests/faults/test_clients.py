"""Clients that raise, hang, die or return poison cost a round their own results and nothing else."""

import dataclasses
import itertools
import json
import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext, suppress
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, FederatedModule, Orchestrator
from fedamm_pl.cli.main import main
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.checkpoint import load_checkpoint
from fedamm_pl.federation.client import train_client
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.executors import Processes, RunSpec
from fedamm_pl.federation.executors.base import copied
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.intake import Intake
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.protocol.messages import Answer, Broadcast, ClientFailure, ClientResult, ClientTask, Question, State
from fedamm_pl.protocol.session import ClientSession, ServerSession
from fedamm_pl.seeding import derive_seed
from tests.faults import faulty
from tests.faults.faulty import CPU, SERVER, Plan, Returning, raising
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

FAULTY = "tests.faults.faulty"
VICTIM = 1
FRACTION = 0.75  # of four clients: 0, 1, 3 in round 1 and 0, 1, 2 in round 2
Pair = tuple[int, int]
"""Round and client."""


def assert_equal(first: State, second: State) -> None:
    assert first.keys() == second.keys()
    assert [name for name in first if first[name].dtype != second[name].dtype] == []
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def finite(state: State) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def mean_in_numpy(states: list[State], weights: list[int]) -> State:
    """The weighted mean in float64, rounded once."""
    means = {}
    for name, first in states[0].items():
        total = sum(weight * state[name].double().numpy() for state, weight in zip(states, weights, strict=True))
        mean = total / sum(weights)
        means[name] = torch.from_numpy(np.asarray(mean if first.is_floating_point() else np.round(mean))).to(
            first.dtype
        )
    return means


def by_hand(
    make: Callable[[], FederatedModule], data: FederatedDataModule, left_out: Iterable[Pair], rounds: int, share: float
) -> list[State]:
    """The server's states after rounds in which some clients never train, each of the others on a module of its own."""
    left_out, states = set(left_out), [make().shared_state()]
    for round_num in range(1, rounds + 1):
        clients = sample_clients(data.num_clients, share, 0, round_num)
        results = [
            train(make(), data, round_num, client, states[-1])
            for client in clients
            if (round_num, client) not in left_out
        ]
        weights = [data.client_size(result.client_id) for result in results]
        states.append(mean_in_numpy([result.payload for result in results], weights) if results else states[-1])
    return states


def train(module: FederatedModule, data: FederatedDataModule, round_num: int, client: int, sent: State) -> ClientResult:
    """The result of one client that trains on this module, and whom a copy of it answers."""
    server = copied(module)
    for side in (module, server):
        CPU.place(side)
    server.load_shared_state(sent)

    def answer(question: Question) -> Answer:
        batch = data.meta_batch(derive_seed(0, "meta", round_num, question.client_id, question.step))
        session = ServerSession(
            round_num=round_num,
            num_clients=data.num_clients,
            local_epochs=1,
            meta=unused,
            meta_for=lambda asked: batch,
            generator=unused,
            reduce=unused,
        )
        with CPU.precision_plugin.forward_context():
            return server.answer(question, session)

    session = ClientSession(Broadcast(round_num, 1, sent), task(round_num, client), data.client, answer)
    with quiet():
        return train_client(module, session, CPU)


def unused(*_: Any) -> Any:
    raise AssertionError("nobody needs it")


def task(round_num: int, client: int) -> ClientTask:
    return ClientTask(client, derive_seed(0, "client", round_num, client))


def outcomes(worker: Worker, round_num: int, clients: list[int], sent: State) -> list[ClientResult | ClientFailure]:
    """What comes of clients that a worker trains one after the other on its one module."""
    worker.begin(Broadcast(round_num, 1, sent))
    return [worker.train(task(round_num, client), {}) for client in clients]


def a_worker(module: FederatedModule, data: FederatedDataModule, trainer: TrainerConfig = CPU) -> Worker:
    return Worker(RunSpec(module, data, trainer, seed=0, threads=1))


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    records = [record for record in caplog.records if record.name.startswith("fedamm_pl")]
    return [record.getMessage() for record in records if record.levelno >= logging.WARNING]


def summary(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "summary.json").read_text()))


def counts(folder: Path) -> dict[str, int]:
    """The counts of summary.json that are not 0."""
    content = summary(folder)
    names = ("failed_clients", "refused_updates", "failed_rounds", "resumes")
    return {name: content[name] for name in names if content[name]}


def saved(folder: Path, round_num: int) -> State:
    return load_checkpoint(folder / f"checkpoints/round_{round_num:06d}.ckpt").state.shared


def final_model(folder: Path) -> State:
    state: State = torch.load(folder / "final.ckpt", weights_only=True)["state_dict"]
    return state


def strike(monkeypatch: pytest.MonkeyPatch, *pairs: Pair, **plan: Any) -> None:
    """Let the faults strike these clients in these rounds."""
    monkeypatch.setattr(faulty, "plan", Plan(lambda round_num, client: (round_num, client) in pairs, **plan))


def make(algorithm: type[FederatedModule], data: TinyData, **options: Any) -> FederatedModule:
    torch.manual_seed(0)
    return algorithm(NUM_CLASSES, 1, f"{FAULTY}.network", info=data.info, **options)


def small_data(**options: Any) -> TinyData:
    """Four clients of 30 images: four steps each."""
    return tiny_data(batch_size=8, **options)


class Records(FederationCallback):
    """Keeps the record and the server's state of each round."""

    def __init__(self) -> None:
        self.records: list[RoundRecord] = []
        self.states: list[State] = []

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        self.records.append(record)
        self.states.append({name: value.clone() for name, value in run.state.shared.items()})


def federation(module: FederatedModule, data: TinyData, **options: Any) -> tuple[Orchestrator, Records]:
    recorder = Records()
    defaults: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "eval_interval": 100, "trainer": CPU}
    return Orchestrator(module, data, callbacks=[recorder], **{**defaults, **options}), recorder


# A client that raises, in the program

ASYNCHRONOUS, SYNCHRONOUS = "asynchronous", "synchronous"
RAISING = [
    # method, its update, what is replaced, by what, the stage that is named
    ("FedAMM", ASYNCHRONOUS, "algorithm", "FailsInTheVirtualStep", "meta step"),
    ("FedAMM", SYNCHRONOUS, "algorithm", "FailsInTheVirtualStep", "meta step"),
    ("FedAMM", ASYNCHRONOUS, "algorithm", "FailsToAnswer", "meta step"),
    ("FedAMM", SYNCHRONOUS, "algorithm", "FailsToAnswer", "meta step"),
    ("FedAMM", ASYNCHRONOUS, "algorithm", "AnswersTooLittle", "meta step"),
    ("FedAMM", ASYNCHRONOUS, "algorithm", "FailsInTrainingStep", "training"),
    ("FedAMM", SYNCHRONOUS, "algorithm", "FailsInTrainingStep", "training"),
    ("FedAvg", None, "algorithm", "FedAvgFailsInTrainingStep", "training"),
    ("FedAMM", ASYNCHRONOUS, "algorithm", "FailsAtTheEndOfTraining", "training"),
    ("FedAMM", ASYNCHRONOUS, "algorithm", "FailsInPayload", "training"),
    ("FedAMM", ASYNCHRONOUS, "data", "UnreadableData", "data"),
    ("FedAvg", None, "data", "UnreadableData", "data"),
    ("FedAMM", ASYNCHRONOUS, "data", "NoSupport", "data"),
    ("FedAMM", ASYNCHRONOUS, "data", "BrokenBatches", "data"),
    ("FedAvg", None, "data", "BrokenBatches", "data"),
    ("FedAMM", ASYNCHRONOUS, "data", "UnknownClasses", "meta step"),
    ("FedAvg", None, "data", "UnknownClasses", "training"),
]
NETWORK = f"{FAULTY}.network"
QUIET = ("--logger", "false", "--output.progress", "none")


def run_options(update: str | None, num_rounds: int) -> list[str]:
    options = ["--federation.client_fraction", str(FRACTION), "--federation.num_rounds", str(num_rounds), *QUIET]
    return [*options, "--algorithm.model", NETWORK, *(["--algorithm.meta_update", update] if update else [])]


@pytest.fixture(scope="module")
def by_hand_of_the_program(data_root: Path) -> Callable[..., list[State]]:
    """(method, update, left out, rounds, share) -> the states of a run of the program without some clients."""
    data = FederatedDataModule(
        "tiny", str(data_root), num_clients=4, imbalance_factor=0.1, num_meta_per_class=5, batch_size=8
    )

    @cache
    def states(method: str, update: Any, left_out: tuple[Pair, ...], rounds: int, share: float) -> list[State]:
        def module() -> FederatedModule:
            pl.seed_everything(0, verbose=False)
            if method == "FedAvg":
                return FedAvg(6, 3, NETWORK, lr=0.05, info=data.info)
            return FedAMM(6, 3, NETWORK, lr=0.05, info=data.info, meta_update=update, differentiation="forward")

        return by_hand(module, data, left_out, rounds, share)

    return states


@pytest.fixture
def without_victim(by_hand_of_the_program: Any) -> Callable[[str, str | None], list[State]]:
    """(method, update) -> the states of two rounds in the first of which the victim never trains."""
    return lambda method, update: by_hand_of_the_program(method, update, ((1, VICTIM),), 2, FRACTION)


@pytest.mark.parametrize(("method", "update", "group", "fault", "stage"), RAISING)
def test_a_client_that_raises_is_named_counted_and_left_out(
    method: str,
    update: str | None,
    group: str,
    fault: str,
    stage: str,
    without_victim: Any,
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    strike(monkeypatch, (1, VICTIM))
    main(command(method, tmp_path, *run_options(update, 2), f"--{group}", f"{FAULTY}.{fault}"))
    (line,) = warnings_in(caplog)
    reason = r"(RuntimeError: injected|IndexError: Target 10\d\d is out of bounds\.|ValueError: Expected the answer .*) \(\w+\.py, line \d+\)"
    assert re.fullmatch(rf"round 1: client {VICTIM} failed \({stage}\): {reason}", line), line
    assert counts(tmp_path) == {"failed_clients": 1}
    expected = without_victim(method, update)
    for round_num in range(3):
        assert_equal(saved(tmp_path, round_num), expected[round_num])
    assert_equal(final_model(tmp_path), expected[2])


# A client that raises, whatever it raises


class SilentError(Exception):
    """Has nothing to say."""


class UnspeakableError(Exception):
    """Cannot even be shown."""

    def __str__(self) -> str:
        raise ValueError("no text")


class NoTextError(Exception):
    """Is shown as something that is no text."""

    def __str__(self) -> str:
        return 3  # type: ignore[return-value]


def recurse() -> None:
    recurse()


def divide() -> None:
    1 / 0  # noqa: B018


ERRORS: dict[str, tuple[Callable[[], None], str]] = {
    "one line": (raising(ValueError("just so")), "ValueError: just so"),
    "several lines": (raising(RuntimeError("first\nsecond\n  third")), "RuntimeError: first"),
    "empty lines first": (raising(RuntimeError("\n\n  first  \n\nsecond")), "RuntimeError: first"),
    "other ends of lines": (
        raising(RuntimeError("first\rsecond\x0bthird\x85fourth\u2028fifth")),
        "RuntimeError: first",
    ),
    "key": (raising(KeyError("missing")), "KeyError: 'missing'"),
    "no arguments": (raising(AssertionError()), "AssertionError"),
    "empty text": (raising(SilentError("")), "SilentError"),
    "blank text": (raising(SilentError(" \n\t\n")), "SilentError"),
    "long text": (raising(ValueError("x" * 100_000)), "ValueError: xxxxx"),
    "file": (raising(FileNotFoundError(2, "No such file", "scan.png")), "FileNotFoundError: .*scan.png"),
    "memory": (raising(MemoryError()), "MemoryError"),
    "recursion": (recurse, "RecursionError: maximum recursion depth exceeded"),
    "arithmetic": (divide, "ZeroDivisionError: division by zero"),
    "timeout": (raising(TimeoutError("slow disk")), "TimeoutError: slow disk"),
    "text that raises": (raising(UnspeakableError()), "UnspeakableError"),
    "text that is none": (raising(NoTextError()), "NoTextError"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_any_exception_becomes_one_line(error: str, monkeypatch: pytest.MonkeyPatch) -> None:
    act, expected = ERRORS[error]
    strike(monkeypatch, (1, VICTIM), act=act)
    data = small_data()
    module = make(faulty.FedAvgFailsInTrainingStep, data)
    failure, result = outcomes(a_worker(module, data), 1, [VICTIM, 2], module.shared_state())
    assert isinstance(result, ClientResult)
    assert isinstance(failure, ClientFailure)
    assert (failure.client_id, failure.stage) == (VICTIM, "training")
    assert re.match(expected, failure.reason), failure.reason
    assert re.search(r"\(\w+\.py, line \d+\)$", failure.reason), failure.reason
    assert len(failure.reason.splitlines()) == 1
    assert len(failure.reason) < 400


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_what_is_meant_to_end_the_program_is_no_failure_of_a_client(
    stop: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    strike(monkeypatch, (1, VICTIM), act=raising(stop()))
    data = small_data()
    module = make(faulty.FailsInPayload, data, differentiation="forward")
    with pytest.raises(stop):
        outcomes(a_worker(module, data), 1, [VICTIM], module.shared_state())


# What a client that raised leaves behind

HALF_WAY = [
    *itertools.product(["FailsInTrainingStep", "FailsInPayload"], [ASYNCHRONOUS, SYNCHRONOUS], ["forward"]),
    *itertools.product(["FailsToAnswer"], [ASYNCHRONOUS, SYNCHRONOUS], ["higher", "functional", "forward"]),
    *itertools.product(["FailsInTheVirtualStep", "AnswersTooLittle"], [ASYNCHRONOUS], ["higher", "forward"]),
]
SAME_AS_BEFORE: tuple[Callable[[], Any], ...] = (
    torch.is_grad_enabled,
    torch.is_inference_mode_enabled,
    torch.get_default_dtype,
    torch.are_deterministic_algorithms_enabled,
    lambda: torch.is_autocast_enabled("cpu"),
    lambda: torch.get_rng_state().tolist(),
    lambda: [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)],
    lambda: logging.getLogger("lightning.pytorch").level,
)


@pytest.mark.parametrize(("fault", "update", "differentiation"), HALF_WAY)
def test_the_next_client_returns_the_same_bits_as_without_the_failure(
    fault: str, update: str, differentiation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"meta_update": update, "differentiation": differentiation, "meta_lr": 0.3}
    data = small_data()
    healthy = make(FedAMM, data, **options)
    sent = healthy.shared_state()
    undisturbed = train(healthy, data, 1, 3, sent)
    strike(monkeypatch, (1, VICTIM))
    worker = a_worker(make(getattr(faulty, fault), data, **options), data)
    global_state = [look() for look in SAME_AS_BEFORE]
    failure, result = outcomes(worker, 1, [VICTIM, 3], sent)
    assert isinstance(failure, ClientFailure)
    assert isinstance(result, ClientResult)
    assert_equal(result.payload, undisturbed.payload)
    assert result.metrics == undisturbed.metrics
    assert (result.bytes_sent, result.bytes_received) == (undisturbed.bytes_sent, undisturbed.bytes_received)
    assert worker.module.session is None
    assert [look() for look in SAME_AS_BEFORE] == global_state


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_no_precision_outlives_a_failure(precision: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    payloads = []
    for pairs in ([(1, VICTIM)], []):
        strike(monkeypatch, *pairs)
        data = small_data()
        module = make(faulty.FailsInTheVirtualStep, data, differentiation="forward")
        worker = a_worker(module, data, TrainerConfig("cpu", precision=precision))
        first, last = outcomes(worker, 1, [VICTIM, 3], module.shared_state())
        assert isinstance(first, ClientFailure) == bool(pairs)
        assert isinstance(last, ClientResult)
        payloads.append(last.payload)
        assert torch.get_default_dtype() == torch.float32
        assert not torch.is_autocast_enabled("cpu")
    assert_equal(*payloads)


# Poison

CLIENTS = (0, 1, 2, 3)
POISONED = 2
WEIGHT, COUNTER = "model.hidden.weight", "model.norm.num_batches_tracked"
ENTRIES = (WEIGHT, "model.norm.running_mean", "model.norm.running_var", "weight_net.layers.2.weight")


def with_value(name: str, number: float) -> Callable[[State], State]:
    """One number of an entry replaced."""

    def poison(payload: State) -> State:
        value = payload[name].clone()
        value.view(-1)[-1] = number
        return {**payload, name: value}

    return poison


def mapped(name: str, change: Callable[[torch.Tensor], Any]) -> Callable[[State], State]:
    """An entry replaced."""
    return lambda payload: {**payload, name: change(payload[name])}


def without(name: str) -> Callable[[State], State]:
    return lambda payload: {key: value for key, value in payload.items() if key != name}


def renamed(old: str, new: Any) -> Callable[[State], Any]:
    return lambda payload: {new if key == old else key: value for key, value in payload.items()}


NONFINITE = "is NaN or infinite"
PAYLOADS: dict[str, tuple[Callable[[State], Any], str]] = {
    f"{number} in {name}": (with_value(name, number), f"{re.escape(name)} {NONFINITE}")
    for name, number in itertools.product(ENTRIES, (math.nan, math.inf, -math.inf))
}
PAYLOADS |= {
    "missing weight": (without(WEIGHT), f"lacks {WEIGHT}"),
    "missing buffer": (without(COUNTER), f"lacks {COUNTER}"),
    "missing weight net": (without("weight_net.layers.0.bias"), r"lacks weight_net\.layers\.0\.bias"),
    "empty": (lambda payload: {}, "lacks model.classifier.bias and 12 more"),
    "extra": (lambda payload: {**payload, "model.junk": torch.zeros(2)}, r"not asked for: '?model\.junk"),
    "extra NaN": (lambda payload: {**payload, "junk": torch.tensor(math.nan)}, "not asked for: '?junk"),
    "renamed": (renamed(WEIGHT, "module.1.weight"), f"lacks {WEIGHT}"),
    "name that is no text": (lambda payload: {**payload, 3: torch.zeros(2)}, "not asked for: 3"),
    "name of two lines": (
        lambda payload: {**payload, "x\nround 9: all is well": torch.zeros(2)},
        "not asked for: '?x",
    ),
    "long name": (lambda payload: {**payload, "x" * 100_000: torch.zeros(2)}, "not asked for: '?xxx"),
    "flat": (mapped(WEIGHT, torch.flatten), rf"{WEIGHT} has shape \(512,\), expected \(8, 64\)"),
    "transposed": (mapped(WEIGHT, torch.t), rf"{WEIGHT} has shape \(64, 8\), expected \(8, 64\)"),
    "one row less": (mapped(WEIGHT, lambda value: value[1:]), rf"{WEIGHT} has shape \(7, 64\)"),
    "scalar to broadcast": (mapped("model.norm.bias", lambda value: value[0]), r"model\.norm\.bias has shape \(\)"),
    "another dimension": (mapped(COUNTER, lambda value: value[None]), rf"{COUNTER} has shape \(1,\), expected \(\)"),
    "float64": (
        mapped(WEIGHT, torch.Tensor.double),
        f"{WEIGHT} is of type torch.float64, expected torch.float32",
    ),
    "float16": (
        mapped(WEIGHT, torch.Tensor.half),
        f"{WEIGHT} is of type torch.float16, expected torch.float32",
    ),
    "integers": (
        mapped(WEIGHT, torch.Tensor.int),
        f"{WEIGHT} is of type torch.int32, expected torch.float32",
    ),
    "complex": (mapped(WEIGHT, lambda value: value + 0j), f"{WEIGHT} is of type torch.complex64"),
    "counter as float": (mapped(COUNTER, torch.Tensor.float), f"{COUNTER} is of type torch.float32"),
    "array": (mapped(WEIGHT, lambda value: value.numpy()), f"{WEIGHT} of its payload is of type ndarray, not a tensor"),
    "list": (mapped(WEIGHT, lambda value: value.tolist()), f"{WEIGHT} of its payload is of type list, not a tensor"),
    "nothing": (mapped(WEIGHT, lambda value: None), f"{WEIGHT} of its payload is of type NoneType, not a tensor"),
    "sparse": (mapped(WEIGHT, torch.Tensor.to_sparse), WEIGHT),
    "without memory": (mapped(WEIGHT, lambda value: value.to("meta")), WEIGHT),
    "no mapping": (lambda payload: list(payload.values()), "payload"),
    "no payload": (lambda payload: None, "payload"),
}
HUGE = 10**400  # beyond float64
NUMBERS: dict[str, Any] = {
    "zero": 0,
    "negative": -30,
    "NaN": math.nan,
    "infinite": math.inf,
    "fraction": 30.0,
    "text": "30",
    "true": True,
    "none": None,
    "tensor": torch.tensor(30),
    "beyond 64 bits": 2**64,
    "beyond float64": HUGE,
}
METRICS: dict[str, tuple[Any, str]] = {
    "text": ({"loss": "low"}, "loss is 'low', not a number"),
    "none": ({"loss": None}, "loss is None, not a number"),
    "tensor": ({"loss": torch.zeros(3)}, r"loss is tensor\(.*, not a number"),
    "list": ({"loss": [1.0]}, r"loss is \[1\.0\], not a number"),
    "complex": ({"loss": 1j}, "loss is 1j, not a number"),
    "long text": ({"loss": "x" * 100_000}, "loss is 'xxx"),
    "text of two lines": ({"loss": torch.zeros(2, 2)}, r"loss is tensor\("),
    "name of two lines": ({"x\nround 9: all is well": None}, "x"),
    "beyond float64": ({"loss": HUGE}, "loss"),
    "no mapping": (None, "metrics"),
}

Spoil = Callable[[ClientResult], Any]


@pytest.fixture(scope="module")
def honest() -> list[ClientResult]:
    """What the clients return in round 1."""
    data = small_data()
    return [train(fedamm(data), data, 1, client, fedamm(data).shared_state()) for client in CLIENTS]


def fedamm(data: TinyData) -> FederatedModule:
    return make(FedAMM, data, differentiation="forward")


def average(results: Iterable[ClientResult]) -> State:
    results = list(results)
    return mean_in_numpy([result.payload for result in results], [result.num_examples for result in results])


@pytest.fixture(scope="module")
def sound(honest: list[ClientResult]) -> State:
    """The average of all but the poisoned client."""
    return average(result for result in honest if result.client_id != POISONED)


def returned(*outcomes: Any, **options: Any) -> tuple[Orchestrator, RoundRecord]:
    """A round in which these outcomes come back; it may fail."""
    data = small_data()
    run, recorder = federation(fedamm(data), data, num_rounds=1, executor=Returning(outcomes), **options)
    with suppress(FederationError):
        run.run()
    return run, recorder.records[1]


def counted(**numbers: int) -> dict[str, int]:
    return {**dict.fromkeys(("failed_clients", "refused_updates", "failed_rounds", "resumes"), 0), **numbers}


@pytest.fixture
def assert_refused(
    honest: list[ClientResult], sound: State, caplog: pytest.LogCaptureFixture
) -> Callable[[Spoil, str], None]:
    """Require that what the poisoned client returns is refused for a reason, and that the others are averaged."""

    def assert_refused(spoil: Spoil, reason: str) -> None:
        spoiled = [spoil(result) if result.client_id == POISONED else result for result in honest]
        run, record = returned(*spoiled)
        (failure,) = record.failures
        assert (failure.client_id, failure.stage) == (POISONED, "update")
        assert re.search(reason, failure.reason), failure.reason
        (line,) = warnings_in(caplog)
        assert line == f"round 1: the update of client {POISONED} is refused: {failure.reason}"
        assert len(line.splitlines()) == 1, line
        assert len(line) < 500
        assert run.state.counts == counted(refused_updates=1)
        assert [result.client_id for result in record.results] == [0, 1, 3]
        assert_equal(run.state.shared, sound)
        assert_equal(run.module.shared_state(), sound)

    return assert_refused


def test_the_average_of_sound_clients_is_finite_and_none_of_theirs(honest: list[ClientResult], sound: State) -> None:
    assert finite(sound)
    assert all(not torch.equal(result.payload[WEIGHT], sound[WEIGHT]) for result in honest)
    run, _ = returned(*honest)
    assert run.state.counts == counted()
    assert_equal(run.state.shared, average(honest))


@pytest.mark.parametrize("poison", PAYLOADS)
def test_a_poisoned_payload_is_refused(poison: str, assert_refused: Any) -> None:
    spoil, reason = PAYLOADS[poison]
    assert_refused(lambda result: dataclasses.replace(result, payload=spoil(result.payload)), reason)


@pytest.mark.parametrize("number", NUMBERS)
def test_an_impossible_number_of_examples_is_refused(number: str, assert_refused: Any) -> None:
    assert_refused(lambda result: dataclasses.replace(result, num_examples=NUMBERS[number]), "examples")


@pytest.mark.parametrize("metric", METRICS)
def test_a_metric_that_is_no_number_is_refused(metric: str, assert_refused: Any) -> None:
    metrics, reason = METRICS[metric]
    assert_refused(lambda result: dataclasses.replace(result, metrics=metrics), reason)


@pytest.mark.parametrize("aggregation", ["uniform", "median", "trimmed_mean"])
def test_poison_is_refused_before_any_aggregation(aggregation: Any, honest: list[ClientResult]) -> None:
    spoil, _ = PAYLOADS[f"nan in {WEIGHT}"]
    poisoned = dataclasses.replace(honest[POISONED], payload=spoil(honest[POISONED].payload))
    run, record = returned(honest[0], honest[1], poisoned, honest[3], aggregation=aggregation)
    assert [failure.client_id for failure in record.failures] == [POISONED]
    for name, value in run.state.shared.items():
        stacked = np.stack([honest[client].payload[name].double().numpy() for client in (0, 1, 3)])
        # one of three trimmed at each end leaves the middle one
        expected = stacked.mean(0) if aggregation == "uniform" else np.median(stacked, axis=0)
        if not value.is_floating_point():
            expected = np.round(expected)
        assert torch.equal(value, torch.from_numpy(np.asarray(expected)).to(value.dtype)), name


@pytest.mark.parametrize("name", [WEIGHT, "model.norm.running_mean", "weight_net.layers.0.bias"])
def test_the_program_goes_on_without_a_poisoned_update(
    name: str,
    without_victim: Any,
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    strike(monkeypatch, (1, VICTIM), spoil=lambda payload, sent: with_value(name, math.nan)(payload))
    main(command("FedAMM", tmp_path, *run_options(ASYNCHRONOUS, 2), "--algorithm", f"{FAULTY}.SpoilsPayload"))
    assert warnings_in(caplog) == [f"round 1: the update of client {VICTIM} is refused: {name} {NONFINITE}"]
    assert counts(tmp_path) == {"refused_updates": 1}
    assert_equal(final_model(tmp_path), without_victim("FedAMM", ASYNCHRONOUS)[2])


def test_numbers_of_other_libraries_are_metrics_and_survive_a_checkpoint(
    honest: list[ClientResult], tmp_path: Path
) -> None:
    metrics = {"loss": np.float32(0.5), "steps": np.int64(4), "done": True, "share": Fraction(1, 3)}
    outcomes = [dataclasses.replace(result, metrics=metrics) for result in honest]
    for num_rounds in (1, 2):
        data = small_data()
        options: dict[str, Any] = {"num_rounds": num_rounds, "executor": Returning(outcomes), "output_dir": tmp_path}
        run, _ = federation(fedamm(data), data, **options)
        run.run()
    last = run.state.history[-1]
    assert [last[f"client/{name}"] for name in metrics] == [0.5, 4, 1, pytest.approx(1 / 3)]
    assert {type(last[f"client/{name}"]) for name in metrics} == {float}
    assert run.state.counts["resumes"] == 1


def test_a_client_whose_loss_is_nan_keeps_its_finite_update(
    honest: list[ClientResult], caplog: pytest.LogCaptureFixture
) -> None:
    """A mean over an epoch that once overflowed says nothing about the weights."""
    run, _ = returned(*(dataclasses.replace(result, metrics={"loss": math.nan}) for result in honest))
    assert warnings_in(caplog) == []
    assert_equal(run.state.shared, average(honest))


# An executor that does not return one outcome for each task


def test_an_answer_that_nobody_asked_for_is_refused(
    honest: list[ClientResult], sound: State, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = dataclasses.replace(honest[POISONED], client_id=99)
    run, _ = returned(honest[0], honest[1], stranger, honest[3])
    assert warnings_in(caplog) == [
        "round 1: the update of client 99 is refused: it was not asked for, or came twice",
        f"round 1: client {POISONED} failed (lost): nothing came back",
    ]
    assert run.state.counts == counted(failed_clients=1, refused_updates=1)
    assert_equal(run.state.shared, sound)


def test_of_two_answers_of_a_client_the_first_counts(
    honest: list[ClientResult], caplog: pytest.LogCaptureFixture
) -> None:
    changed = {name: value + 1 for name, value in honest[0].payload.items()}
    run, record = returned(*honest, dataclasses.replace(honest[0], payload=changed))
    assert warnings_in(caplog) == ["round 1: the update of client 0 is refused: it was not asked for, or came twice"]
    assert run.state.counts == counted(refused_updates=1)
    assert [result.client_id for result in record.results] == list(CLIENTS)
    assert_equal(run.state.shared, average(honest))


def test_a_client_that_was_given_up_does_not_come_back(
    honest: list[ClientResult], sound: State, caplog: pytest.LogCaptureFixture
) -> None:
    given_up = ClientFailure(POISONED, "lost", "nothing came back within 1 s")
    run, _ = returned(honest[0], honest[1], given_up, honest[3], honest[POISONED])
    assert warnings_in(caplog) == [
        f"round 1: client {POISONED} failed (lost): nothing came back within 1 s",
        f"round 1: the update of client {POISONED} is refused: it was not asked for, or came twice",
    ]
    assert run.state.counts == counted(failed_clients=1, refused_updates=1)
    assert_equal(run.state.shared, sound)


def test_clients_of_which_nothing_comes_back_have_failed(
    honest: list[ClientResult], sound: State, caplog: pytest.LogCaptureFixture
) -> None:
    run, record = returned(honest[0], honest[1], honest[3])
    assert list(record.failures) == [ClientFailure(POISONED, "lost", "nothing came back")]
    assert warnings_in(caplog) == [f"round 1: client {POISONED} failed (lost): nothing came back"]
    assert run.state.counts == counted(failed_clients=1)
    assert_equal(run.state.shared, sound)


def test_an_executor_that_returns_nothing_fails_the_round(caplog: pytest.LogCaptureFixture) -> None:
    run, _ = returned()
    assert len(warnings_in(caplog)) == len(CLIENTS) + 1
    assert run.state.counts == counted(failed_clients=len(CLIENTS), failed_rounds=1)
    assert_equal(run.state.shared, fedamm(small_data()).shared_state())


def test_results_may_come_in_any_order(honest: list[ClientResult], caplog: pytest.LogCaptureFixture) -> None:
    run, record = returned(*reversed(honest))
    assert warnings_in(caplog) == []
    assert [result.client_id for result in record.results] == [3, 2, 1, 0]
    torch.testing.assert_close(run.state.shared, average(honest), rtol=1e-6, atol=0)


# What the server holds is its own


@pytest.mark.parametrize("aggregation", ["num_examples", "median"])
@pytest.mark.parametrize("algorithm", [faulty.LivePayload, faulty.PayloadWithGraph])
def test_a_payload_may_be_the_module_itself(algorithm: type[FederatedModule], aggregation: Any) -> None:
    """It is neither overwritten by the next client nor does it bring a graph to the server."""
    states = []
    for method in (algorithm, FedAvg):
        data = small_data()
        run, _ = federation(make(method, data), data, num_rounds=1, aggregation=aggregation)
        run.run()
        states.append(run.state.shared)
    assert_equal(*states)
    assert not [name for name, value in states[0].items() if value.requires_grad]


def test_a_client_that_writes_on_what_it_was_sent_changes_it_for_itself_alone() -> None:
    states = []
    for method in (faulty.WritesOnWhatItReceived, FedAvg):
        data = small_data()
        run, recorder = federation(make(method, data), data, num_rounds=1)
        run.run()
        assert not recorder.records[1].failures
        states.append(run.state.shared)
    assert_equal(*states)


# How many must succeed


def failing(monkeypatch: pytest.MonkeyPatch, rounds: Iterable[int], clients: Iterable[int] = CLIENTS) -> None:
    strike(monkeypatch, *itertools.product(rounds, clients))


@pytest.mark.parametrize(
    ("fraction", "num_failing", "succeeds"),
    [
        (0.5, 2, True),
        (0.5, 3, False),
        (0.75, 1, True),
        (0.75, 2, False),
        (0.51, 1, True),
        (0.51, 2, False),
        (1.0, 0, True),
        (1.0, 1, False),
        (0.0, 3, True),
        (0.0, 4, False),
        (1e-12, 3, True),
        (0.5, 4, False),
    ],
)
def test_a_round_needs_its_share_of_successes_and_no_more(
    fraction: float, num_failing: int, succeeds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing(monkeypatch, [1], range(num_failing))
    data = small_data()
    options: dict[str, Any] = {"num_rounds": 1, "min_success_fraction": fraction}
    run, recorder = federation(make(faulty.FedAvgFailsInTrainingStep, data), data, **options)
    with nullcontext() if succeeds else pytest.raises(FederationError, match="after round 1: no round succeeded"):
        run.run()
    before, after = recorder.states
    record = recorder.records[1]
    assert len(record.failures) == num_failing
    assert len(record.results) == len(CLIENTS) - num_failing
    assert run.state.counts == counted(failed_clients=num_failing, failed_rounds=1 - succeeds)
    if succeeds:
        assert record.failed is None
        assert finite(after)
        assert [name for name in before if torch.equal(before[name], after[name])] == []
    else:
        required = max(math.ceil(fraction * len(CLIENTS)), 1)
        told = f"{len(record.results)} of 4 clients succeeded, {required} or more must; the last to fail: client "
        assert str(record.failed).startswith(f"{told}{num_failing - 1} failed (training): RuntimeError: injected")
        assert_equal(after, before)
        assert_equal(run.module.shared_state(), before)


@pytest.mark.parametrize(
    ("fraction", "num_tasks", "required"),
    [
        (0.1, 30, 3),
        (0.07, 100, 7),
        (0.29, 100, 29),
        (0.3, 10, 3),
        (0.7, 10, 7),
        (0.0, 10, 1),
        (1.0, 10, 10),
        (0.5, 3, 2),
    ],
)
def test_the_share_is_that_of_exact_decimals(fraction: float, num_tasks: int, required: int) -> None:
    tasks = [ClientTask(client, 0) for client in range(num_tasks)]
    config = FederationConfig(1, min_success_fraction=fraction)
    assert Intake(1, tasks, config=config).required == required


def test_a_failed_round_leaves_the_model_and_the_next_starts_from_it(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failing(monkeypatch, [2], [0, 1, 2])
    data = small_data()
    run, recorder = federation(make(faulty.FedAvgFailsInTrainingStep, data), data, num_rounds=3)
    run.run()
    left_out = itertools.product([2], CLIENTS)  # what client 3 returned counts for nothing
    expected = by_hand(lambda: make(FedAvg, data), data, left_out, 3, 1.0)
    for state, wanted in zip(recorder.states, expected, strict=True):
        assert_equal(state, wanted)
    assert [bool(record.failed) for record in recorder.records] == [False, False, True, False]
    *failures, last = warnings_in(caplog)
    assert len(failures) == 3
    assert last == f"round 2 failed, the global model is unchanged: {recorder.records[2].failed}"


# When the run stops


def all_clients(*rounds: int) -> list[Pair]:
    return list(itertools.product(rounds, CLIENTS))


def test_too_many_failed_rounds_in_a_row_end_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, range(2, 100))
    data = small_data()
    options: dict[str, Any] = {"num_rounds": 9, "max_failed_rounds": 3, "output_dir": tmp_path}
    run, recorder = federation(make(faulty.FedAvgFailsInTrainingStep, data), data, **options)
    with pytest.raises(FederationError, match=r"^stopped after round 4: 3 rounds in a row failed, `max_failed_rounds`"):
        run.run()
    assert [record.round_num for record in recorder.records] == [0, 1, 2, 3, 4]
    assert [row["round"] for row in run.state.history] == [0, 4]
    assert_equal(run.state.shared, recorder.states[1])
    assert_equal(run.module.shared_state(), recorder.states[1])
    assert_equal(final_model(tmp_path), recorder.states[1])
    assert_equal(saved(tmp_path, 4), recorder.states[1])


def test_without_a_single_good_round_the_initial_model_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, range(100))
    data = small_data()
    options: dict[str, Any] = {"num_rounds": 9, "max_failed_rounds": 1, "output_dir": tmp_path}
    run, _ = federation(make(faulty.FedAvgFailsInTrainingStep, data), data, **options)
    with pytest.raises(FederationError, match=r"stopped after round 1: 1 round"):
        run.run()
    assert_equal(final_model(tmp_path), make(FedAvg, data).shared_state())
    assert summary(tmp_path)["final"]["test/acc"] == run.state.history[0]["test/acc"]


def test_a_success_in_between_starts_the_count_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, [1, 2, 4, 5, 7])
    data = small_data()
    options: dict[str, Any] = {"num_rounds": 7, "max_failed_rounds": 3}
    run, recorder = federation(make(faulty.FedAvgFailsInTrainingStep, data), data, **options)
    run.run()
    failed = [record.round_num for record in recorder.records if record.failed]
    assert failed == [1, 2, 4, 5, 7]
    assert run.state.counts == counted(failed_clients=4 * len(failed), failed_rounds=len(failed))
    assert run.state.stopped is None


STOPPING = ("--federation.max_failed_rounds", "2", "--algorithm.model", NETWORK, *QUIET)
STOPPING += ("--algorithm", f"{FAULTY}.FedAvgFailsInTrainingStep")


def test_the_program_stops_with_status_1_and_a_line_and_goes_on_when_started_again(
    command: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command("FedAvg", tmp_path, *STOPPING)
    failing(monkeypatch, range(2, 100))
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    lines = capsys.readouterr().err.splitlines()
    (last,) = [line for line in lines if line.startswith("fedamm: ")]
    assert last == lines[-1]
    reason = (
        "fedamm: error: stopped after round 3: 2 rounds in a row failed, --federation.max_failed_rounds allows no more"
    )
    assert last.startswith(reason)
    assert "injected" in last
    assert last.endswith(f"the same command with --output.dir {tmp_path} continues after the last completed round")
    assert "Traceback" not in "\n".join(lines)

    # Of rounds 2 and 3 nothing is left but the accounts.
    good, content = saved(tmp_path, 1), summary(tmp_path)
    assert_equal(saved(tmp_path, 3), good)
    assert_equal(final_model(tmp_path), good)
    assert counts(tmp_path) == {"failed_clients": 4, "failed_rounds": 2}
    assert content["stopped"].startswith("stopped after round 3: 2 rounds in a row failed")
    assert "\n" not in content["stopped"]
    assert content["num_rounds"] == 3
    assert [row.split(",")[0] for row in (tmp_path / "metrics.csv").read_text().split()] == ["round", "0", "2", "3"]

    # Started again without a cure it has a new chance of two rounds.
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 1
    assert "continuing after round 3\n" in capsys.readouterr().out
    assert counts(tmp_path) == {"failed_clients": 8, "failed_rounds": 4, "resumes": 1}
    assert summary(tmp_path)["stopped"].startswith("stopped after round 5: 2 rounds in a row failed")
    assert_equal(final_model(tmp_path), good)


def test_a_stopped_run_can_be_finished(
    by_hand_of_the_program: Any,
    command: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = command("FedAvg", tmp_path, *STOPPING)
    failing(monkeypatch, [2, 3])
    with pytest.raises(SystemExit):
        main(words)
    main(words)
    assert capsys.readouterr().out.splitlines()[-1] == f"results in {tmp_path}"
    assert counts(tmp_path) == {"failed_clients": 4, "failed_rounds": 2, "resumes": 1}
    assert summary(tmp_path)["stopped"] is None
    assert summary(tmp_path)["num_rounds"] == 5
    left_out = tuple(all_clients(2, 3))
    assert_equal(final_model(tmp_path), by_hand_of_the_program("FedAvg", None, left_out, 5, 0.5)[-1])


def test_failed_rounds_in_a_row_are_counted_across_a_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, range(2, 100))

    def run(num_rounds: int) -> Orchestrator:
        data = small_data()
        options: dict[str, Any] = {"num_rounds": num_rounds, "max_failed_rounds": 3, "output_dir": tmp_path}
        return federation(make(faulty.FedAvgFailsInTrainingStep, data), data, **options)[0]

    run(3).run()  # two have failed
    continued = run(9)
    with continued.opened() as opened:
        assert opened.state.failed_in_a_row == 2
    with pytest.raises(FederationError, match=r"stopped after round 4: 3 rounds in a row failed"):
        continued.run()


def test_a_run_that_stopped_in_its_last_round_says_so_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    failing(monkeypatch, [2, 3])

    def run() -> Orchestrator:
        data = small_data()
        options: dict[str, Any] = {"num_rounds": 3, "max_failed_rounds": 2, "output_dir": tmp_path}
        return federation(make(faulty.FedAvgFailsInTrainingStep, data), data, **options)[0]

    with pytest.raises(FederationError, match=r"stopped after round 3"):
        run().run()
    # there is no round left to try again
    with pytest.raises(FederationError, match=r"stopped after round 3"):
        run().run()
    assert summary(tmp_path)["stopped"].startswith("stopped after round 3")


# The server's own update


def fill_with_nan(updated: State, old: State) -> State:
    return {**updated, WEIGHT: torch.full_like(updated[WEIGHT], math.nan)}


def nan_in_place(updated: State, old: State) -> State:
    """An algorithm that works on the state that it was given."""
    for name, value in old.items():
        value.copy_(updated[name])
    old[WEIGHT].fill_(math.inf)
    return old


@pytest.mark.parametrize("spoil", [fill_with_nan, nan_in_place])
def test_a_server_update_that_is_not_finite_fails_the_round(
    spoil: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strike(monkeypatch, (2, SERVER), spoil=spoil)
    data = small_data()
    run, recorder = federation(make(faulty.SpoilsTheServer, data), data, num_rounds=3)
    run.run()
    reason = f"the server's update made {WEIGHT} NaN or infinite"
    assert [record.failed for record in recorder.records] == [None, None, reason, None]
    assert warnings_in(caplog) == [f"round 2 failed, the global model is unchanged: {reason}"]
    expected = by_hand(lambda: make(FedAvg, data), data, all_clients(2), 3, 1.0)
    for state, wanted in zip(recorder.states, expected, strict=True):
        assert_equal(state, wanted)


def test_a_server_that_always_fails_stops_the_run_with_a_finite_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    strike(monkeypatch, *((round_num, SERVER) for round_num in range(100)), spoil=fill_with_nan)
    data = small_data()
    run, _ = federation(make(faulty.SpoilsTheServer, data), data, num_rounds=9, output_dir=tmp_path)
    with pytest.raises(FederationError, match=rf"stopped after round 3: .* the server's update made {WEIGHT} NaN"):
        run.run()
    assert finite(final_model(tmp_path))
    assert counts(tmp_path) == {"failed_rounds": 3}


# Clients that hang or die


def test_a_client_that_hangs_cannot_be_given_up_in_the_servers_own_process(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(command("FedAMM", tmp_path / "run", "--executor.client_timeout", "5"))
    assert stop.value.code == 2
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line == "fedamm: error: Sequential has no option client_timeout (Processes, Ray have); see --executor.help"
    assert printed.out == ""
    assert not (tmp_path / "run").exists()


ENDS = {
    1: lambda: os.kill(os.getpid(), signal.SIGSEGV),
    2: lambda: time.sleep(1e6),
    3: raising(RuntimeError("injected")),
}


class EndsInTraining(FedAvg):
    """A client takes its process with it, one hangs and one raises. Other processes know of no ``plan``."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        assert self.session is not None
        if batch_idx == 2 and (end := ENDS.get(self.session.task.client_id)):
            end()
        return super().training_step(batch, batch_idx)


def test_clients_that_die_hang_or_raise_in_processes_are_told_apart_and_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = small_data()
    executor = Processes(2, client_timeout=6, max_retries=0)
    options: dict[str, Any] = {"num_rounds": 1, "min_success_fraction": 0.25, "output_dir": tmp_path}
    run, recorder = federation(make(EndsInTraining, data), data, executor=executor, **options)
    run.run()
    died, hung, raised = recorder.records[1].failures
    assert died == ClientFailure(1, "lost", "its worker died, SIGSEGV")
    assert hung == ClientFailure(2, "lost", "nothing came back within 6 s")
    assert (raised.client_id, raised.stage) == (3, "training")
    assert re.fullmatch(r"RuntimeError: injected \(\w+\.py, line \d+\)", raised.reason)
    assert warnings_in(caplog) == [f"round 1: {failure}" for failure in (died, hung, raised)]
    assert counts(tmp_path) == {"failed_clients": 3}
    expected = by_hand(lambda: make(FedAvg, data), data, itertools.product([1], ENDS), 1, 1.0)
    assert_equal(saved(tmp_path, 1), expected[1])
