"""FEDIC: the server's update against one written out in plain torch, the calibration net by hand, and what has no voice."""

import dataclasses
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional

from fedamm_pl.algorithms import FEDIC, FedAvg
from fedamm_pl.algorithms.ensemble import CalibrationNet, Pool, distillation_loss
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.messages import ClientResult, State
from fedamm_pl.protocol.session import ServerSession
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
HIDDEN = 6
QUICK: dict[str, Any] = {"finetune_steps": 3, "calibration_steps": 4, "distill_steps": 5, "num_draws": 3}


def make(algorithm: Any = FEDIC, **options: Any) -> Any:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, NUM_CLASSES))
    options = {**(QUICK if algorithm is FEDIC else {}), **options}
    return algorithm(NUM_CLASSES, 1, network, lr=0.1, info=data().info, **options)


def data() -> TinyData:
    return tiny_data(partition="by_dirichlet", num_clients=3)


def a_round(
    module: Any, state: State | None = None, number: int = 1, **options: Any
) -> tuple[Round, list[ClientResult]]:
    one = Round(module, data(), DOUBLE, state=state, round_num=number, **options)
    return one, [one.train(client) for client in range(3)]


# The calibration net


def test_calibration_net_starts_as_a_gated_mean() -> None:
    net = CalibrationNet(2, 1, torch.Generator())
    with torch.no_grad():
        net.gate.zero_()
    logits = torch.tensor([[[2.0, -1.0]], [[0.0, -3.0]]])  # u . z = 1 and -3
    first, second = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(3))
    share = first / (first + second)
    joined = torch.tensor([[2 * share, -share - 3 * (1 - share)]])
    refined = torch.tensor([[10.0, 20.0]])
    found = net(logits, torch.ones(1, 1), refined)
    torch.testing.assert_close(found, (joined + refined) / 2)
    with torch.no_grad():
        net.gate_bias.fill_(100.0)
        net.scale.copy_(torch.tensor([2.0, 3.0]))
        net.shift.copy_(torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(net(logits, torch.ones(1, 1), refined), joined * net.scale + net.shift)


def test_single_model_has_all_the_votes_however_few() -> None:
    net = CalibrationNet(2, 1, torch.Generator())
    with torch.no_grad():
        net.gate_bias.fill_(100.0)
    logits = torch.tensor([[[-500.0, -400.0]]])  # the sigmoid of -900 is 0
    torch.testing.assert_close(net(logits, torch.zeros(1, 1), torch.zeros(1, 2)), logits[0])


def test_distillation_loss_is_the_divergence_from_the_teacher() -> None:
    student, teacher = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = 1 / (1 + math.exp(-1))
    expected = 0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p))
    assert float(distillation_loss(student, teacher, 2.0)) == pytest.approx(expected, rel=1e-5)
    assert float(distillation_loss(teacher, teacher, 2.0)) == 0


def test_batches_hold_different_images_with_their_labels() -> None:
    size, draws = 30, 4
    images = torch.arange(size).repeat(draws)
    pool = Pool(images, torch.arange(size) // 10)
    generator = torch.Generator().manual_seed(0)
    batches = [pool.labelled(generator) for _ in range(50)]
    for chosen in batches:
        assert len(images[chosen].unique()) == 20
        assert torch.equal(pool.labels_of(chosen), images[chosen] // 10)
    assert torch.cat(batches).unique().numel() == size * draws
    assert len(pool.unlabelled(generator).unique()) == size * draws  # fewer than 128
    assert len(Pool(torch.zeros(500), torch.zeros(5)).unlabelled(generator).unique()) == 128
    assert len(Pool(torch.zeros(8), torch.zeros(4)).labelled(generator)) == 4


# A whole update


class Adam:
    """Adam by its formula, on a dict of tensors; with L2 added to the gradient."""

    def __init__(self, decay: float) -> None:
        self.decay, self.first, self.second, self.count = decay, dict[str, Any](), dict[str, Any](), 0

    def step(self, params: State, slopes: State) -> State:
        self.count += 1
        moved = {}
        for name, value in params.items():
            slope = slopes[name] + self.decay * value
            self.first[name] = 0.9 * self.first.get(name, 0) + 0.1 * slope
            self.second[name] = 0.999 * self.second.get(name, 0) + 0.001 * slope**2
            mean, square = self.first[name] / (1 - 0.9**self.count), self.second[name] / (1 - 0.999**self.count)
            moved[name] = value - 1e-3 * mean / (square.sqrt() + 1e-8)
        return moved


def combined(net: State, logits: Tensor, features: Tensor, refined: Tensor) -> Tensor:
    votes = torch.sigmoid((logits * net["vote"]).sum(2) + net["vote_bias"])
    shares = votes / votes.sum(0)
    joined = net["scale"] * (shares[:, :, None] * logits).sum(0) + net["shift"]
    gate = 1 / (1 + torch.exp(-(features * net["gate"]).sum(1) - net["gate_bias"]))[:, None]
    return gate * joined + (1 - gate) * refined


def written_out(
    module: Any, results: list[ClientResult], server: ServerSession, net: State | None, adam: Adam
) -> tuple[State, State]:
    """The server's update in plain torch; returns the model and the calibration net."""
    draws = [server.meta(draw) for draw in range(3)]
    images = module.prepare(torch.cat([images for images, _ in draws])).double()
    labels = torch.cat([labels for _, labels in draws])
    size, count = len(draws[0][1]), len(labels)
    total = sum(result.num_examples for result in results)
    average = {
        name: sum(result.num_examples / total * result.payload[name].double() for result in results)
        for name in results[0].payload
    }

    def logits_of(params: State, chosen: Any) -> Tensor:
        network = {name.removeprefix("model."): value for name, value in params.items()}
        found: Tensor = functional_call(module.model, network, (images[chosen],))
        return found

    def features_of(params: State) -> Tensor:
        return (images.flatten(1) @ params["model.1.weight"].T + params["model.1.bias"]).relu()

    generator = server.generator("FEDIC")

    def batch() -> Tensor:
        chosen = torch.randperm(size, generator=generator)[:20]
        return chosen + size * torch.randint(3, chosen.shape, generator=generator)

    batches = [batch() for _ in range(4)]
    refined, own = dict(average), Adam(2e-4)

    def label_loss(params: State, chosen: Tensor) -> Tensor:
        return functional.cross_entropy(logits_of(params, chosen), labels[chosen])

    for chosen in batches[:3]:
        refined = own.step(refined, grad(label_loss)(refined, chosen))
    every = slice(None)
    logits = torch.stack([logits_of(result.payload, every) for result in results])
    features = sum(features_of(result.payload) for result in results) / len(results)
    gate = torch.empty(HIDDEN).uniform_(-(HIDDEN**-0.5), HIDDEN**-0.5, generator=generator).double()
    if net is None:
        one, zero = torch.ones(NUM_CLASSES), torch.zeros(())
        net = {"vote": one, "vote_bias": zero, "scale": one, "shift": 0 * one, "gate": gate, "gate_bias": zero}
        net = {name: value.double() for name, value in net.items()}
    target = logits_of(refined, every)

    def calibration_loss(net: State, chosen: Tensor) -> Tensor:
        teacher = combined(net, logits[:, chosen], features[chosen], target[chosen])
        return functional.cross_entropy(teacher, labels[chosen])

    for chosen in batches:
        net = adam.step(net, grad(calibration_loss)(net, chosen))
    teacher = (combined(net, logits, features, target) / 2).softmax(1)
    student, own = dict(average), Adam(2e-4)

    def student_loss(params: State, unlabelled: Tensor, labelled: Tensor) -> Tensor:
        mine = (logits_of(params, unlabelled) / 2).log_softmax(1)
        divergence = (teacher[unlabelled] * (teacher[unlabelled].log() - mine)).sum(1).mean()
        return 0.5 * divergence + 0.5 * label_loss(params, labelled)

    for _ in range(5):
        unlabelled = torch.randperm(count, generator=generator)[:128]
        student = own.step(student, grad(student_loss)(student, unlabelled, batch()))
    return student, net


def test_two_updates_are_those_written_out_and_the_net_goes_on_from_the_first() -> None:
    module, state, net, adam = make(), None, None, Adam(0)
    for number in (1, 2):
        one, results = a_round(module, state, number)
        reference = make().double()
        expected, net = written_out(reference, results, one.server.session, net, adam)
        state = one.update(results)
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-12)
        for name, value in net.items():
            torch.testing.assert_close(state[f"calibration_net.{name}"], value, rtol=1e-9, atol=1e-12)
    assert int(state["calibration_adam.step.vote"]) == 8


def averaged(results: list[ClientResult], one: Round) -> State:
    return one.server.module.server_step({}, one.server.session.reduce(results), one.server.session)


def test_without_the_teacher_the_server_fine_tunes_the_average_by_adam() -> None:
    one, results = a_round(make(distill_weight=0.0))
    found = one.update(results)
    session, reference = one.server.session, make().double()
    reference.load_shared_state(averaged(results, one))
    optimizer = torch.optim.Adam(reference.model.parameters(), lr=1e-3, weight_decay=2e-4)
    images, labels = (torch.cat(part) for part in zip(*(session.meta(draw) for draw in range(3)), strict=True))
    generator = session.generator("FEDIC")
    pool = Pool(images, labels[:8])
    for _ in range(4):
        pool.labelled(generator)  # of the first two steps
    torch.empty(HIDDEN).uniform_(generator=generator)
    for _ in range(5):
        pool.unlabelled(generator)
        chosen = pool.labelled(generator)
        optimizer.zero_grad()
        functional.cross_entropy(reference(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    for name, value in reference.shared_state().items():
        torch.testing.assert_close(found[name], value)


def test_with_the_teacher_alone_labels_do_not_matter() -> None:
    found = []
    for shift in (0, 1):
        one, results = a_round(make(distill_weight=1.0, calibration_steps=0, finetune_steps=0))
        found.append(one.update(turned(one, results, shift)))
    start = averaged(results, one)
    for name, value in start.items():
        assert torch.equal(found[0][name], found[1][name])
        assert not torch.equal(found[0][name], value)


def turned(one: Round, results: list[ClientResult], shift: int) -> list[ClientResult]:
    """Give the server's images the labels of others."""
    meta = one.server.session.meta

    def shifted(draw: int) -> tuple[Tensor, Tensor]:
        images, labels = meta(draw)
        return images, (labels + shift) % NUM_CLASSES

    one.server.session.meta = shifted
    return results


# What has no voice


@pytest.mark.parametrize("factor", [1e9, 1e30])
def test_model_with_useless_outputs_has_no_voice_but_counts_in_the_average(
    factor: float, caplog: pytest.LogCaptureFixture
) -> None:
    one, results = a_round(make())
    wild = {name: value * (factor if "weight" in name else 1) for name, value in results[1].payload.items()}
    results[1] = dataclasses.replace(results[1], payload=wild, num_examples=1)
    pools: list[Pool] = []
    calibrated = one.server.module._calibrated

    def noting(state: State, pool: Pool, *rest: Any) -> Any:
        pools.append(pool)
        return calibrated(state, pool, *rest)

    one.server.module._calibrated = noting  # type: ignore[method-assign]
    with caplog.at_level(logging.WARNING):
        state = one.update(results)
    assert len(pools[0].votes) == 2
    assert "round 1: the model of client 1 has no voice in the ensemble" in caplog.text
    assert all(bool(value.isfinite().all()) for value in state.values())
    assert float(state["model.1.weight"].abs().max()) > 1


def test_where_no_model_has_a_voice_the_average_stays(caplog: pytest.LogCaptureFixture) -> None:
    one, results = a_round(make())
    results = [
        dataclasses.replace(result, payload={name: value * 1e12 for name, value in result.payload.items()})
        for result in results
    ]
    with caplog.at_level(logging.WARNING):
        state = one.update(results)
    assert "no client's model can be distilled" in caplog.text
    assert state.keys() == averaged(results, one).keys()
    for name, value in averaged(results, one).items():
        assert torch.equal(state[name], value)


def test_single_client_and_a_single_draw_do() -> None:
    one = Round(make(num_draws=1), data())
    state = one.update([one.train(0)])
    assert all(bool(value.isfinite().all()) for value in state.values())


@pytest.mark.parametrize("steps", [{"distill_steps": 0}, {"distill_steps": 0, "finetune_steps": 0}])
def test_without_steps_of_the_student_nothing_is_kept(steps: dict[str, int]) -> None:
    one, results = a_round(make(**steps))
    theirs, _ = a_round(make(FedAvg))
    mine, expected = one.update(results), theirs.update(results)
    assert mine.keys() == expected.keys()
    assert all(torch.equal(mine[name], value) for name, value in expected.items())
