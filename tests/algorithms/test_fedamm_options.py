"""FedAMM's options: start and size of the weight net, families of classes, the objective, and what of the exchange is sent."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator, WeightNet
from fedamm_pl.algorithms import FedFocal, LogitAdjusted
from fedamm_pl.algorithms.meta import meta_gradient, virtual_step
from fedamm_pl.algorithms.meta.together import meta_gradients, unstacked, virtual_steps
from fedamm_pl.algorithms.meta.virtual_steps import Differentiation
from fedamm_pl.algorithms.meta.weighing import Weighing, losses_of_objective
from fedamm_pl.data.client import Batch
from fedamm_pl.federation.callbacks.loggers import weight_net_scalars
from fedamm_pl.federation.executors import Executor, Sequential, Vectorized
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.models.masked import padded
from fedamm_pl.protocol.messages import State
from fedamm_pl.results.run_figures import run_figures
from tests.one_round import Round
from tests.tiny import NUM_CLASSES, TinyData, tiny_data

DOUBLE = TrainerConfig(accelerator="cpu", precision="64-true")
COUNTS = torch.tensor([9, 3, 1, 0])
FAMILIES = torch.tensor([2, 1, 0, 0])
LR = 0.1


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, NUM_CLASSES))


def make(data: TinyData, algorithm: type[FederatedModule] = FedAMM, **options: Any) -> Any:
    torch.manual_seed(0)
    own = {"meta_lr": 0.3, "differentiation": "forward"} if algorithm is FedAMM else {}
    return algorithm(NUM_CLASSES, 1, mlp(), **{"lr": LR, "info": data.info, **own, **options})


def uneven(**options: Any) -> TinyData:
    return tiny_data(partition="by_dirichlet", dirichlet_alpha=0.5, **options)


def run(
    algorithm: type[FederatedModule] = FedAMM, executor: Executor | None = None, num_rounds: int = 2, **options: Any
) -> Orchestrator:
    data = uneven()
    more: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 1, "eval_interval": 1, "trainer": DOUBLE}
    module = make(data, algorithm, **options)
    one = Orchestrator(module, data, num_rounds=num_rounds, executor=executor or Sequential(), **more)
    one.run()
    assert one.state.counts == dict.fromkeys(one.state.counts, 0)
    return one


def of_the_model(state: Mapping[str, Tensor]) -> State:
    return {name: value for name, value in state.items() if name.startswith("model.")}


# The weight net.


def test_a_flat_weight_net_is_one_half_everywhere_and_draws_as_the_default_does() -> None:
    losses = torch.linspace(0, 20, 9)
    torch.manual_seed(0)
    flat, after = WeightNet(flat=True), torch.rand(1)
    torch.manual_seed(0)
    default = WeightNet()
    assert torch.equal(after, torch.rand(1))
    assert flat(losses).tolist() == [0.5] * 9
    assert torch.equal(flat.layers[0].weight, default.layers[0].weight)  # type: ignore[arg-type]


@pytest.mark.parametrize(("hidden", "depth", "outputs", "size"), [(100, 1, 1, 301), (100, 1, 3, 503), (7, 3, 2, 142)])
def test_size_of_the_weight_net(hidden: int, depth: int, outputs: int, size: int) -> None:
    net = WeightNet(hidden, depth, outputs)
    assert sum(value.numel() for value in net.parameters()) == size
    assert sum(isinstance(layer, nn.Linear) for layer in net.layers) == depth + 1


def test_equal_outputs_are_the_weight_net_with_one_bit_for_bit() -> None:
    one, three = WeightNet(), WeightNet(num_families=3)
    three.layers[0].load_state_dict(one.layers[0].state_dict())
    with torch.no_grad():
        three.last.weight.copy_(one.last.weight.expand(3, -1))
        three.last.bias.copy_(one.last.bias.expand(3))
    for size in (1, 5, 32, 333):
        losses, families = torch.rand(size) * 10, torch.randint(3, (size,))
        assert torch.equal(three(losses, families), one(losses))
        assert torch.equal(three.curves(losses), one(losses).expand(3, -1))


def test_each_family_has_an_output() -> None:
    net, losses = WeightNet(num_families=3), torch.linspace(0, 5, 6)
    families = torch.tensor([2, 0, 1, 1, 0, 2])
    expected = net.layers(losses[:, None])[torch.arange(6), families]
    torch.testing.assert_close(net(losses, families), expected)
    assert torch.equal(net(losses), net(losses, torch.zeros_like(families)))
    with pytest.raises(ValueError, match="Expected `depth` to be 1 or more, got 0"):
        WeightNet(depth=0)


def test_with_a_flat_start_the_first_round_is_that_of_fedavg() -> None:
    first, fedavg = run(num_rounds=1, weight_net_init="flat"), run(FedAvg, num_rounds=1)
    torch.testing.assert_close(of_the_model(first.state.shared), fedavg.state.shared, rtol=1e-9, atol=1e-10)
    second, fedavg = run(weight_net_init="flat"), run(FedAvg)
    assert (second.state.shared["model.1.weight"] - fedavg.state.shared["model.1.weight"]).abs().max() > 1e-4


# The meta mapping, by back-propagation through the virtual step with nothing but torch.


def objective(name: str, logits: Tensor, labels: Tensor, counts: Tensor) -> Tensor:
    if name == "logit_adjusted":
        prior = counts.clamp(min=1).double()
        logits = logits + 0.7 * (prior / prior.sum()).log()
    losses = -torch.log_softmax(logits, 1)[torch.arange(len(labels)), labels]
    return losses * (1 - (-losses).exp()) ** 1.5 if name == "focal" else losses


def by_hand(
    model: nn.Module,
    net: WeightNet,
    support: Batch,
    meta: Batch,
    name: str,
    counts: Tensor,
    families: Any,
    detach: bool,
) -> State:
    """h, as the gradient of the meta loss."""
    model, params = copy.deepcopy(model), {}
    for key, value in list(model.named_parameters()):
        params[key] = value
    losses = objective(name, model(support[0]), support[1], counts)
    seen = losses.detach() if detach else losses
    outputs = net.layers(seen[:, None])
    raw = outputs[torch.arange(len(seen)), families[support[1]]] if families is not None else outputs[:, 0]
    loss = (raw / (raw.sum().detach() if detach else raw.sum()) * losses).sum()
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    stepped = {key: value - LR * grad for (key, value), grad in zip(params.items(), grads, strict=True)}
    logits = torch.func.functional_call(model, stepped, (meta[0],))
    final = -torch.log_softmax(logits, 1)[torch.arange(len(meta[1])), meta[1]].mean()
    found = torch.autograd.grad(final, list(net.parameters()))
    return dict(zip((key for key, _ in net.named_parameters()), found, strict=True))


def problem(num_families: int) -> tuple[nn.Module, WeightNet, list[Batch], Batch]:
    torch.manual_seed(0)
    net = WeightNet(6, 2, num_families)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(2)

    def batch(size: int) -> Batch:
        return torch.randn(size, 1, 8, 8, dtype=torch.float64), torch.randint(NUM_CLASSES, (size,))

    return mlp().double(), net.double(), [batch(7), batch(4)], batch(8)


WEIGHINGS = [
    ("cross_entropy", True, False),
    ("cross_entropy", False, True),
    ("logit_adjusted", False, False),
    ("focal", True, True),
    ("logit_adjusted", True, True),
]
every_weighing = pytest.mark.parametrize(("name", "by_family", "detached"), WEIGHINGS)


def weighing(name: Any, by_family: bool, detached: bool, clients: int | None = None) -> Weighing:
    counts, families = COUNTS, FAMILIES if by_family else None
    if clients:  # each has its own
        counts = torch.stack([COUNTS.roll(client) for client in range(clients)])
        families = torch.stack([FAMILIES.roll(client) for client in range(clients)]) if by_family else None
    return Weighing(losses_of_objective(name, 0.7, "one", 1.5), counts, families, detached)


@every_weighing
@pytest.mark.parametrize("differentiation", ["higher", "functional", "forward"])
def test_each_way_equals_back_propagation(
    name: str, by_family: bool, detached: bool, differentiation: Differentiation
) -> None:
    model, net, (support, _), meta = problem(3 if by_family else 1)
    how = weighing(name, by_family, detached)
    expected = by_hand(model, net, support, meta, name, COUNTS, how.families, detached)
    step = virtual_step(model, net, support, LR, differentiation, weighing=how)
    found = step.weight_net_gradient(meta_gradient(model, step.params, meta)[0])
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-5
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@every_weighing
def test_clients_at_once_get_what_each_would_get_alone(name: str, by_family: bool, detached: bool) -> None:
    model, net, supports, meta = problem(3 if by_family else 1)
    images, labels, present, _ = padded(supports)
    how = weighing(name, by_family, detached, clients=2)
    steps = virtual_steps(model, net, images, labels, present, LR, how)
    gradients, _ = meta_gradients(model, steps.params, *(torch.stack([part, part]) for part in meta))
    for client, found in enumerate(unstacked(steps.weight_net_gradients(gradients))):
        families = None if how.families is None else how.families[client]
        assert how.class_counts is not None
        arguments = supports[client], meta, name, how.class_counts[client], families, detached
        torch.testing.assert_close(found, by_hand(model, net, *arguments), rtol=1e-9, atol=1e-11)


# Whole rounds.


def test_one_family_is_fedamm_bit_for_bit() -> None:
    plain = run().state
    for families in ("local", "global"):
        found = run(families=families, num_families=1).state
        assert found.shared.keys() == plain.shared.keys()
        assert all(torch.equal(found.shared[name], value) for name, value in plain.shared.items())


def test_with_equal_outputs_the_classifier_is_that_of_fedamm_bit_for_bit() -> None:
    data = uneven()
    plain, classes = make(data, meta_lr=0.0), make(data, meta_lr=0.0, families="local")
    classes.model.load_state_dict(plain.model.state_dict())
    classes.weight_net.layers[0].load_state_dict(plain.weight_net.layers[0].state_dict())
    with torch.no_grad():
        for part in ("weight", "bias"):
            value = getattr(plain.weight_net.last, part)
            getattr(classes.weight_net.last, part).copy_(value.expand(3, *value.shape[1:]))
    results = [Round(module.double(), data, DOUBLE).train(2) for module in (plain, classes)]
    for name, value in of_the_model(results[0].payload).items():
        assert torch.equal(results[1].payload[name], value)


@pytest.mark.parametrize("counts", ["local", "global"])
def test_with_a_constant_weight_net_it_is_the_method_of_its_objective(counts: str) -> None:
    flat: dict[str, Any] = {"weight_net_init": "flat", "meta_lr": 0.0}
    pairs = [
        (run(objective="logit_adjusted", counts=counts, tau=0.8, **flat), run(LogitAdjusted, counts=counts, tau=0.8)),
        (run(objective="focal", gamma=1.5, **flat), run(FedFocal, gamma=1.5)),
    ]
    for mine, theirs in pairs:
        torch.testing.assert_close(of_the_model(mine.state.shared), theirs.state.shared, rtol=1e-8, atol=1e-9)
        assert mine.state.history[-1]["client/loss"] == pytest.approx(theirs.state.history[-1]["client/loss"])


OPTIONS: list[dict[str, Any]] = [
    {"families": "global"},
    {"families": "local", "log_counts": True},
    {"families": "fixed", "weight_net_depth": 2, "weight_net_hidden": 12},
    {"objective": "logit_adjusted", "absent": "mask", "families": "local"},
    {"objective": "focal", "detached": True},
    {"exchange": "bfloat16"},
    {"exchange": "head"},
    {"weight_net_init": "flat"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_side_by_side_and_in_another_way_it_comes_to_the_same(options: dict[str, Any]) -> None:
    expected = run(**options)
    # what is rounded to bfloat16 may round the other way
    tolerance = 1e-3 if "exchange" in options else 1e-9
    for other in (run(executor=Vectorized(3), **options), run(differentiation="functional", **options)):
        torch.testing.assert_close(other.state.shared, expected.state.shared, rtol=tolerance, atol=tolerance)
    start = make(uneven(), **options).double().shared_state()
    moved = [float((expected.state.shared[n] - v).abs().max()) for n, v in start.items() if n.startswith("weight_net")]
    assert max(moved) > 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_synchronous_clients_and_a_plain_trainer_take_the_options_too(options: dict[str, Any]) -> None:
    one = run(num_rounds=1, meta_update="synchronous", meta_interval=2, **options)
    assert one.state.history[-1]["client/meta_loss"] > 0
    data = tiny_data(augmentation="none")
    module = make(data, **options)
    start = module.weight_net.last.weight.clone()
    trainer = pl.Trainer(max_epochs=4, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    with quiet():
        trainer.fit(module, datamodule=data)
        (tested,) = trainer.test(module, datamodule=data, verbose=False)
    assert tested["test/acc"] > 0.5
    assert not torch.equal(module.weight_net.last.weight, start)


# What the classes' counts are, and where they go.


def test_local_counts_are_the_clients_own_and_global_ones_come_with_the_model() -> None:
    data = uneven()
    every = torch.tensor(data.info["class_counts"])
    for families, counts, sent in (("local", "local", False), ("global", "local", True), (None, "global", True)):
        module = make(data, families=families, objective="logit_adjusted", counts=counts)
        one = Round(module, data)
        assert ("class_counts" in one.broadcast.payload) == sent
        client = one.module()
        client.learn_classes(one.session(1))
        own = torch.tensor(data.client_class_counts[1])
        assert client.class_counts.tolist() == (own if counts == "local" else every).tolist()
        assert module.state_dict().keys() == make(data, families=families).state_dict().keys()
        result = one.train(1)
        assert result.payload.keys() == module.shared_state().keys()
        assert result.bytes_received - result.bytes_sent == (8 * NUM_CLASSES if sent else 0)


def test_families_of_a_client_follow_its_own_counts() -> None:
    data = uneven()
    one = Round(make(data, families="local", num_families=2), data)
    found = set()
    for client in range(4):
        module = one.module()
        module.learn_classes(one.session(client))
        counts = torch.tensor(data.client_class_counts[client])
        assert counts[module.class_families == 0].max() < counts[module.class_families == 1].min()
        found.add(tuple(module.class_families.tolist()))
    assert len(found) > 1


def test_fixed_families_are_the_shot_groups() -> None:
    data = tiny_data(imbalance_factor=0.05)
    module = make(data, families="fixed")
    module.learn_classes(None)
    groups = data.info["shot_groups"]
    assert module.weight_net.num_families == sum(bool(members) for members in groups.values()) > 1
    assert {int(module.class_families[c]) for c in groups["few"]} == {0}
    with pytest.raises(ValueError, match="`info` of FedAMM to hold shot_groups, got none"):
        make(data, families="fixed", info={})
    with pytest.raises(ValueError, match="`info` of FedAMM to hold class_counts, got none"):
        make(data, families="global", info={}).learn_classes(None)


# The exchange.


@pytest.mark.parametrize("meta_update", ["asynchronous", "synchronous"])
def test_bytes_of_the_exchange(meta_update: str) -> None:
    questions: dict[str, State] = {}
    sent: dict[str, int] = {}
    for exchange in ("full", "bfloat16", "head"):
        data = uneven()
        one = Round(make(data, exchange=exchange, meta_update=meta_update, meta_interval=100), data)

        def ask(question: Any, one: Round = one, exchange: str = exchange) -> Any:
            questions[exchange] = question.payload
            answer = one.server.answer(question)
            kinds = {name: (value.shape, value.dtype) for name, value in answer.payload.items()}
            assert kinds == {name: (value.shape, value.dtype) for name, value in question.payload.items()}
            return answer

        result = one.train(0, ask=ask)
        assert result.bytes_received == result.bytes_sent
        sent[exchange] = result.bytes_sent
    state = sum(value.nbytes for value in make(uneven()).shared_state().values())
    parameters = sum(value.nbytes for value in mlp().parameters())
    head = 4 * (8 * NUM_CLASSES + NUM_CLASSES)
    assert sent == {"full": state + parameters, "bfloat16": state + parameters // 2, "head": state + head}
    assert set(questions["head"]) == {"model.4.weight", "model.4.bias"}
    assert {value.dtype for value in questions["bfloat16"].values()} == {torch.bfloat16}


def test_a_difference_in_bfloat16_is_nearer_than_the_weights_in_it() -> None:
    data = uneven()
    one, asked = Round(make(data, exchange="bfloat16").double(), data, DOUBLE), []
    module = one.module()
    one.train(0, module, ask=lambda question: asked.append(question) or one.server.answer(question))  # type: ignore[func-returns-value]
    exact: State = {}
    whole = Round(make(data).double(), data, DOUBLE)
    whole.train(0, ask=lambda question: exact.update(question.payload) or whole.server.answer(question))  # type: ignore[func-returns-value]
    received = one.server.module._received(asked[0], one.server.session)  # type: ignore[operator]
    for name, value in exact.items():
        assert (received[name] - value).norm() <= 2**-8 * (value - one.broadcast.payload[name]).norm()
    name = "model.1.weight"
    rounded = (exact[name].bfloat16().double() - exact[name]).norm()
    assert 5 * (received[name] - exact[name]).norm() < rounded


def test_of_the_head_alone_the_gradient_is_the_heads_part() -> None:
    """h is the sum over the exchanged entries of g times d w_hat / dv, w_hat being w elsewhere."""
    data = uneven()
    module = make(data, exchange="head", momentum=0.0, weight_decay=0.0).double()
    one = Round(module, data, DOUBLE)
    client = one.module().train()
    session = one.session(0)
    client.session = session
    question = client.question(session)
    answer = one.server.answer(session.question(0, question))
    at = {"4.weight": question["model.4.weight"], "4.bias": question["model.4.bias"]}
    images, labels = one.server.session.meta_for(session.question(0, question))
    g, _ = meta_gradient(module.model.train(), at, (module.prepare(images), labels))
    for name, value in g.items():
        torch.testing.assert_close(answer.payload[f"model.{name}"], value)
    support = session.support()
    again = virtual_step(module.model, module.weight_net, (module.prepare(support[0]), support[1]), LR, "functional")
    elsewhere = {name: torch.zeros_like(value) for name, value in again.params.items()}
    h = again.weight_net_gradient({**elsewhere, **g})
    client.take_answer(answer)
    for name, value in client._returned_weight_net.items():
        start = one.broadcast.payload[name]
        torch.testing.assert_close(value, start - 0.3 * h[name.removeprefix("weight_net.")], rtol=1e-9, atol=1e-12)


def test_a_network_without_a_last_linear_layer_cannot_exchange_it() -> None:
    with pytest.raises(ValueError, match="`model` to"):
        FedAMM(NUM_CLASSES, 1, nn.Sequential(nn.Conv2d(1, NUM_CLASSES, 8), nn.Flatten()), exchange="head")
    network = mlp()
    network[-1].requires_grad_(False)
    with pytest.raises(ValueError, match="to train its last linear layer for `exchange` head, got it frozen"):
        FedAMM(NUM_CLASSES, 1, network, info=tiny_data().info, exchange="head")


# What is said and shown.


def test_what_it_takes_is_declared() -> None:
    data = tiny_data()
    plain, full = (
        make(data, **options).privileges
        for options in (
            {},
            {"families": "global", "exchange": "head", "meta_update": "synchronous", "meta_interval": 5},
        )
    )
    assert plain.server == "balanced labelled images"
    assert "its model after a virtual step on one of its batches, once per round" in plain.revealed
    assert "the class counts of all clients together" in full.server
    assert "its last layer after a virtual step on one of its batches, every 5 steps" in full.revealed


def test_the_curve_of_each_family_is_shown() -> None:
    one = run(families="global", num_families=2)
    shown = one.state.diagnostics[-1]
    curves = [shown["weight_curve_1"], shown["weight_curve_2"]]
    assert "weight_curve" not in shown
    assert "weight_curve_3" not in shown
    with torch.no_grad():
        losses = torch.tensor([0.25 * step for step in range(41)]).double()
        torch.testing.assert_close(torch.tensor(curves).double(), one.module.weight_net.curves(losses))  # type: ignore[operator, union-attr]
    scalars = weight_net_scalars(shown, one.data.info["shot_groups"])
    assert scalars["weight_net/family_2_at_loss_1"] == curves[1][4]
    figures = run_figures(one.state.history, {"losses": losses.tolist(), "rounds": one.state.diagnostics})
    drawn = figures["weight_mapping"].axes[0].get_lines()
    assert [line.get_label() for line in drawn] == ["family 1 (smallest classes)", "family 2 (largest classes)"]
    assert list(drawn[1].get_ydata()) == curves[1]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("weight_net_init", "zero"),
        ("weight_net_hidden", 0),
        ("weight_net_depth", 0),
        ("families", "shots"),
        ("num_families", 0),
        ("num_families", 10),
        ("objective", "hinge"),
        ("counts", "all"),
        ("tau", -1.0),
        ("absent", "two"),
        ("gamma", -1.0),
        ("exchange", "int8"),
    ],
)
def test_options_out_of_range_are_refused_by_name(option: str, value: Any) -> None:
    name = option.removeprefix("weight_net_") if value == 0 and "net" in option else option
    with pytest.raises(ValueError, match=rf"Expected `{name}` to be .*, got {value!r}"):
        FedAMM(NUM_CLASSES, 1, mlp(), info=tiny_data().info, **{option: value})
