"""CCVR: sums against numpy, what a client cannot have sent, virtual features, the classifier, and a base of one's own."""

import logging
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedamm_pl import FedAvg, Orchestrator
from fedamm_pl.algorithms import CCVR, FedProx
from fedamm_pl.algorithms.ccvr import COUNTS, PRODUCTS, SUMS, retrained
from fedamm_pl.algorithms.feature_sums import add_features, drawn, impossible, no_sums, pooled, whole
from fedamm_pl.federation.executors import RunSpec
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.models import features_and_logits
from fedamm_pl.protocol.messages import Broadcast, ClientResult, ClientTask, State
from fedamm_pl.protocol.session import ClientSession
from tests.one_round import CPU, Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

SIZE = 6
DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")


def network(size: int = SIZE) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, size), nn.ReLU(), nn.Linear(size, NUM_CLASSES))


def make(data: TinyData, kind: type[Any] = CCVR, **options: Any) -> Any:
    return kind(NUM_CLASSES, 1, network(), lr=0.05, info=data.info, **options)


def clients(**options: Any) -> TinyData:
    return tiny_data(partition="by_dirichlet", dirichlet_alpha=0.3, **options)


def federate(module: Any, data: TinyData, num_rounds: int = 2, **options: Any) -> Orchestrator:
    options = {"client_fraction": 0.5, "local_epochs": 1, "eval_interval": 1, "trainer": CPU, **options}
    run = Orchestrator(module, data, num_rounds=num_rounds, **options)
    run.run()
    return run


# Sums.


@given(
    sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    size=st.integers(1, 7),
    scale=st.sampled_from([1e-3, 1.0, 1e3]),
    shift=st.sampled_from([0.0, 1.0, 30.0]),
)
@settings(deadline=None, derandomize=True, database=None, max_examples=80)
def test_sums_over_any_split_give_mean_and_covariance_of_all(
    sizes: list[int], seed: int, size: int, scale: float, shift: float
) -> None:
    """Of the features stacked: ``numpy.cov(features.T, ddof=1)``."""
    rng = np.random.default_rng(seed)
    parts = [scale * (shift + rng.standard_normal((number, size))) for number in sizes]
    labels = [rng.integers(3, size=number) for number in sizes]
    sent = []
    for part, own in zip(parts, labels, strict=True):
        sums = no_sums(3, size)
        middle = len(own) // 2  # in two batches
        for batch in (slice(0, middle), slice(middle, None)):
            add_features(torch.tensor(part[batch]), torch.tensor(own[batch]), *sums)
        assert all(impossible(int(n), first, second) is None for n, first, second in zip(*sums, strict=True))
        sent.append(sums)
    counts, first, second = (sum(one[place] for one in sent) for place in range(3))  # type: ignore[misc]
    stacked, told = np.concatenate(parts), np.concatenate(labels)
    for label in range(3):
        own = stacked[told == label]
        assert int(counts[label]) == len(own)  # type: ignore[index]
        if not len(own):
            continue
        mean, covariance = pooled(len(own), first[label], second[label])  # type: ignore[index]
        expected = np.cov(own.T, ddof=1).reshape(size, size) if len(own) > 1 else np.zeros((size, size))
        tolerance = 1e-10 * scale**2 * (1 + shift**2)
        np.testing.assert_allclose(mean, own.mean(0), rtol=1e-10, atol=1e-10 * scale)
        np.testing.assert_allclose(covariance, expected, rtol=1e-10, atol=tolerance)


def test_pooled_by_hand() -> None:
    """Features (1, 0), (3, 4): mean (2, 2), deviations (-1, -2), (1, 2)."""
    mean, covariance = pooled(2, torch.tensor([4.0, 4.0]), torch.tensor([10.0, 12.0, 16.0]))
    assert mean.tolist() == [2, 2]
    assert covariance.tolist() == [[2, 4], [4, 8]]
    assert whole(torch.tensor([10.0, 12.0, 16.0]), 2).tolist() == [[10, 12], [12, 16]]


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_a_client_measures_the_received_model_without_augmentation(precision: Any) -> None:
    data = clients()
    trainer = TrainerConfig(accelerator="cpu", precision=precision).resolved()
    one = Round(make(data), data, trainer, local_epochs=0)
    result = one.train(1)
    module, own = one.module(), data.client(1)
    module.load_shared_state(one.broadcast.payload)
    images, labels = next(iter(own.plain_batches()))
    with torch.no_grad(), trainer.precision_plugin.forward_context():
        features, _ = features_and_logits(module.model, module.prepare(images))
    features = features.double()
    for label in range(NUM_CLASSES):
        mine = features[labels == label]
        assert int(result.payload[COUNTS][label]) == len(mine)
        torch.testing.assert_close(result.payload[SUMS][label], mine.sum(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(whole(result.payload[PRODUCTS][label], SIZE), mine.T @ mine, rtol=1e-12, atol=1e-12)
    assert {name: value.dtype for name, value in result.payload.items()} == {
        COUNTS: torch.int64,
        SUMS: torch.float64,
        PRODUCTS: torch.float64,
    }
    one.server.accepted_statistics(result)


# What cannot be.


def spoiled(payload: State, kind: str, held: int, absent: int) -> State:
    payload = {name: value.clone() for name, value in payload.items()}
    if kind == "negative count":
        payload[COUNTS][absent] -= 1
        payload[COUNTS][held] += 1
    elif kind == "more examples":
        payload[COUNTS][held] += 1
    elif kind == "wrapped":
        payload[COUNTS][:] = 2**62
    elif kind == "absent class":
        payload[SUMS][absent] = 1.0
    elif kind == "negative square":
        payload[PRODUCTS][held, 0] = -1.0
    elif kind == "negative variance":
        payload[SUMS][held] *= 100
    elif kind == "huge sum":
        payload[SUMS][held] = 1e300
    elif kind == "huge square":
        payload[PRODUCTS][held, 0] = 1e300
    else:
        payload[PRODUCTS][held, 1] = 1e9
    return payload


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("negative count", "its class counts are below 0: -1"),
        ("more examples", r"its class counts add up to \d+, it reports \d+ examples"),
        ("wrapped", r"its class counts add up to 18446744073709551616, it reports \d+ examples"),
        ("absent class", "are those of no 0 features: they are not 0"),
        ("negative square", "a sum of squares is below 0"),
        ("negative variance", "a variance is below 0"),
        ("huge sum", "a variance is below 0"),
        ("huge square", "a sum of squares is beyond those of float32"),
        ("covariance", "a covariance is larger than the variances allow"),
    ],
)
def test_sums_that_cannot_be_are_refused(kind: str, message: str) -> None:
    data = tiny_data(partition="by_num_classes")
    one = Round(make(data), data, local_epochs=0)
    result = one.train(0)
    counts = result.payload[COUNTS]
    held, absent = int(counts.argmax()), int(counts.argmin())
    assert counts[absent] == 0
    payload = spoiled(result.payload, kind, held, absent)
    with pytest.raises(ValueError, match=message):
        one.server.accepted_statistics(ClientResult(0, result.num_examples, payload))


class Lying(CCVR):
    """A client whose sums are those of no features."""

    def statistics(self, session: ClientSession) -> State:
        sent = super().statistics(session)
        return {**sent, PRODUCTS: -sent[PRODUCTS]} if session.task.client_id == 1 else sent


def test_a_client_that_lies_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    data = clients()
    with caplog.at_level(logging.WARNING):
        run = federate(make(data, Lying), data, 1)
    assert "the update of client 1 is refused: its sums for class" in caplog.text
    assert run.state.counts["refused_updates"] == 1
    assert any(name.startswith("calibrated.") for name in run.state.shared)


def test_numbers_at_the_end_of_their_range_do_not_end_a_run(caplog: pytest.LogCaptureFixture) -> None:
    class Large(CCVR):
        def statistics(self, session: ClientSession) -> State:
            return {
                **super().statistics(session),
                SUMS: torch.zeros(NUM_CLASSES, SIZE, dtype=torch.float64),
                **self.big,
            }

        @property
        def big(self) -> State:
            assert self.session is not None
            counts = self.session.data.class_counts(NUM_CLASSES)
            products = torch.zeros(NUM_CLASSES, SIZE * (SIZE + 1) // 2, dtype=torch.float64)
            products[counts > 0, 0] = 1e76
            return {PRODUCTS: products}

    data = clients()
    with caplog.at_level(logging.WARNING):
        run = federate(make(data, Large), data, 1)
    assert "its calibration failed: the server's update made calibrated.model.3" in caplog.text
    assert run.state.shared.keys() == make(data).shared_state().keys()


# Virtual features.


@pytest.mark.parametrize("rank", [1, 3, SIZE])
def test_virtual_features_have_the_mean_and_covariance_of_the_class(rank: int) -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(rank, SIZE, generator=generator, dtype=torch.float64)
    mean, covariance = torch.arange(SIZE).double(), root.T @ root
    covariance -= 1e-12 * torch.eye(SIZE, dtype=torch.float64)  # rounding leaves eigenvalues below 0
    features = drawn(mean, covariance, 200_000, generator)
    torch.testing.assert_close(features.mean(0), mean, rtol=0, atol=3e-2)
    torch.testing.assert_close(features.T.cov(), covariance, rtol=2e-2, atol=5e-2)


def test_a_class_of_one_example_is_drawn_next_to_it() -> None:
    value = torch.randn(SIZE, dtype=torch.float64)
    sums = no_sums(1, SIZE)
    add_features(value[None], torch.tensor([0]), *sums)
    mean, covariance = pooled(1, sums[1][0], sums[2][0])
    assert not covariance.any()
    features = drawn(mean, covariance, 500, torch.Generator().manual_seed(0))
    assert (features - value).abs().max() < 6e-3  # 1e-6 is the variance
    assert features.std(0).max() == pytest.approx(1e-3, rel=0.2)


def test_retraining_is_sgd_with_momentum_among_the_classes_with_features() -> None:
    """Two full batches by hand, in numpy; class 1 has no features."""
    features = torch.tensor([[1.0, 2.0], [0.5, -1.0], [2.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 2, 2])
    start = (
        torch.tensor([[0.1, 0.2], [5.0, 6.0], [-0.3, 0.4]], dtype=torch.float64),
        torch.tensor([0.0, 9.0, 0.5]).double(),
    )
    w, b, v = start[0].numpy().copy(), start[1].numpy().copy(), 0.0
    z = np.hstack([features.numpy(), np.ones((3, 1))])
    joint = np.hstack([w, b[:, None]])[[0, 2]]
    for _ in range(2):
        logits = z @ joint.T
        p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        gradient = (p - np.eye(2)[[0, 1, 1]]).T @ z / 3
        v = 0.9 * v + gradient
        joint = joint - 0.1 * v
    weight, bias = retrained((features, labels), start, 2, 64, 0.1, torch.Generator())
    np.testing.assert_allclose(weight[[0, 2]], joint[:, :2], rtol=1e-12)
    np.testing.assert_allclose(bias[[0, 2]], joint[:, 2], rtol=1e-12)
    assert torch.equal(weight[1], start[0][1])
    assert bias[1] == start[1][1]


@pytest.mark.parametrize("clip", [False, True])
def test_the_server_trains_on_what_all_clients_have(clip: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def look(examples: tuple[Tensor, Tensor], classifier: Any, *rest: Any) -> Any:
        seen.append((examples, classifier))
        return retrained(examples, classifier, *rest)

    monkeypatch.setattr("fedamm_pl.algorithms.ccvr.retrained", look)
    data = clients()
    module = make(data, clip=clip, num_features=2000)
    run = federate(module.double(), data, 1, client_fraction=0.25, trainer=DOUBLE)
    (((features, labels), (weight, _)),) = seen
    assert torch.equal(weight, run.state.shared["model.3.weight"])  # where training has left it
    assert labels.bincount().tolist() == [2000] * NUM_CLASSES
    assert bool((features < 0).any()) is not clip
    plain = make(data).double()
    plain.load_shared_state({name: value for name, value in run.state.shared.items() if name.startswith("model.")})
    every = torch.cat([data.client(client).indices for client in range(4)])
    with torch.no_grad():
        real, _ = features_and_logits(plain.model, plain.prepare(data.images.train_images[every]).double())
    for label in range(NUM_CLASSES):
        own = real[data.images.train_labels[every] == label]
        if not clip:
            torch.testing.assert_close(features[labels == label].mean(0), own.mean(0), rtol=0.1, atol=0.05)


def test_a_class_that_nobody_holds_keeps_its_row() -> None:
    data = tiny_data()
    one = Round(make(data), data, local_epochs=0)
    results = []
    for client in range(4):
        result = one.train(client)
        payload = {name: value.clone() for name, value in result.payload.items()}
        for value in payload.values():
            value[3] = 0
        results.append(ClientResult(client, max(1, int(payload[COUNTS].sum())), payload))
    state = one.server.calibrated(one.state, results)
    for name in ("model.3.weight", "model.3.bias"):
        assert torch.equal(state[f"calibrated.{name}"][3], state[name][3])
        assert not torch.equal(state[f"calibrated.{name}"][0], state[name][0])


# Together with others, and what it cannot take.


class CCVRProx(CCVR, FedProx):
    """CCVR on what FedProx trains."""


def test_it_calibrates_what_another_method_trains() -> None:
    data = clients()
    mine = federate(make(data, CCVRProx), data)
    theirs = federate(make(data, FedProx), data)
    plain = federate(make(data, FedAvg), data)
    for name, value in theirs.state.shared.items():
        assert torch.equal(mine.state.shared[name], value)
    assert not torch.equal(mine.state.shared["model.3.weight"], plain.state.shared["model.3.weight"])
    assert "calibrated.model.3.weight" in mine.state.shared
    assert mine.module.hparams["mu"] == 0.01


def test_at_the_end_alone_unless_told_otherwise() -> None:
    data = clients()
    end = federate(make(data), data)
    assert ["calibration/bytes_sent" in row for row in end.state.history] == [False, False, True]
    each = federate(make(data, calibrate="evaluations"), data)
    assert ["calibration/bytes_sent" in row for row in each.state.history] == [False, True, True]
    assert each.state.history[-1] == end.state.history[-1]


@pytest.mark.parametrize(("size", "refused"), [(4000, False), (12_000, True)])
def test_many_features_are_said_or_refused(size: int, refused: bool, caplog: pytest.LogCaptureFixture) -> None:
    """4 classes: 4 * (1 + 4000 + 4000 * 4001 / 2) numbers of 8 bytes are 0.256 GB, with 12,000 features 2.3 GB."""
    data = tiny_data()
    module = CCVR(NUM_CLASSES, 1, network(size), info=data.info)
    if refused:
        with pytest.raises(ValueError, match=r"Expected `model` to give features of .* 2147483648 bytes, got 2304"):
            Orchestrator(module, data, num_rounds=1, trainer=CPU)
        return
    with caplog.at_level(logging.WARNING):
        Orchestrator(module, data, num_rounds=1, trainer=CPU)
    assert not caplog.text
    Orchestrator(CCVR(NUM_CLASSES, 1, network(4200), info=data.info), data, num_rounds=1, trainer=CPU)
    assert "CCVR: each client sends 0.3 GB of sums, 4200 features a class" in caplog.text


def test_a_robust_aggregation_is_refused() -> None:
    data = clients()
    with pytest.raises(ValueError, match=r"for CCVR, got median: it cannot protect the sums .* \(features\.\)"):
        Orchestrator(make(data), data, num_rounds=1, client_fraction=1.0, aggregation="median", trainer=CPU)


def test_a_worker_gives_the_same_sums() -> None:
    data = clients()
    worker = Worker(RunSpec(make(data), data, CPU, seed=0, threads=1))
    one = Round(make(data), data, local_epochs=0)
    worker.begin(Broadcast(1, 0, one.broadcast.payload))
    result = worker.train(ClientTask(2, 5), {})
    assert isinstance(result, ClientResult)
    for name, value in one.train(2).payload.items():
        assert torch.equal(result.payload[name], value)
