"""Estimates what a round will cost by measuring one client and a part of an evaluation."""

import time
from dataclasses import dataclass, replace

from fedamm_pl.federation.executors import Runner
from fedamm_pl.federation.local_test import local_accuracies
from fedamm_pl.federation.orchestrator import FederationError, Orchestrator
from fedamm_pl.federation.personal import PersonalEvaluation, is_personal
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.server import takes_statistics
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.messages import ClientFailure, ClientResult

QUICK = 3.0
"""Measurements that take fewer seconds than this are repeated, or extended to the whole."""
ASKING = 2.5
"""A client that receives more than this many times the size of the broadcast is taken to have asked more than once."""
TEST_SHARE = 10
"""First, one in this many batches of the test set is measured."""


@dataclass(frozen=True)
class Estimate:
    """Mean cost of a round, for all clients together.

    Attributes:
        train: Seconds of training.
        meta: Seconds of meta steps.
        evaluate: Seconds of evaluation: of the test set, the validation set, the examples that clients have held out,
            their own models, and the statistics that all clients send for a calibration before each evaluation. It does
            not include the server's part of a calibration, nor a calibration that takes place only at the end of the
            run.
        received: Tensor bytes that the clients receive.
        sent: Tensor bytes that they send.
        epochs: Number of local epochs of one client that were measured; the rest is extrapolated.
        test_images: Number of test images that were measured.
    """

    train: float
    meta: float
    evaluate: float
    received: float
    sent: float
    epochs: int
    test_images: int


def estimate(orchestrator: Orchestrator) -> Estimate:
    """Estimate what a round costs, from one client's fit and an evaluation; the run's state is unchanged.

    Args:
        orchestrator: A run that has not been opened; if it has several workers, one is used.

    Raises:
        FederationError: If the client fails.
    """
    data, config = orchestrator.data, orchestrator.config
    sizes = [data.client_size(client) for client in range(data.num_clients)]
    clients = num_sampled(data.num_clients, config.client_fraction) * sum(map(bool, sizes)) / len(sizes)
    with quiet():
        with orchestrator.executor.open(orchestrator.spec()) as runner:
            start = time.perf_counter()
            one = fit(orchestrator, runner, 1)
            quick = time.perf_counter() - start < QUICK
            # A second epoch shows whether clients ask in each epoch. If epochs are slow, it is only measured if there
            # seem to be several questions: each answer is about as large as the model.
            asks = one.meta_seconds > 0 and (quick or one.bytes_received > ASKING * sent_out(orchestrator))
            two = fit(orchestrator, runner, 2) if config.local_epochs > 1 and asks else one
            statistics = surveyed(orchestrator, runner) * sum(map(bool, sizes))
        seconds, images = evaluation(orchestrator)
    epochs = 1 if two is one else 2
    sent, received = two.bytes_sent - one.bytes_sent, two.bytes_received - one.bytes_received
    per_epoch = config.local_epochs / epochs
    mean_size = sum(sizes) / sum(map(bool, sizes))
    return Estimate(
        train=clients * two.train_seconds * per_epoch * mean_size / two.num_examples,
        meta=clients * two.meta_seconds * (per_epoch if sent or received else 1),
        evaluate=(seconds + statistics) / config.eval_interval,
        received=clients * (one.bytes_received + received * (config.local_epochs - 1)),
        sent=clients * (one.bytes_sent + sent * (config.local_epochs - 1)),
        epochs=epochs,
        test_images=images,
    )


def typical_client(orchestrator: Orchestrator) -> int:
    """Return the client that is measured: one of median size among those that hold examples."""
    return typical_clients(orchestrator, 1)[0]


def typical_clients(orchestrator: Orchestrator, number: int) -> list[int]:
    """Return some clients around the median size, among those that hold examples."""
    data = orchestrator.data
    held = sorted((size, client) for client in range(data.num_clients) if (size := data.client_size(client)))
    first = max(0, len(held) // 2 - number // 2)
    return [client for _, client in held[first : first + number]]


def sent_out(orchestrator: Orchestrator) -> int:
    """Return the bytes that are broadcast to a client."""
    return sum(
        value.nbytes for value in orchestrator.server.broadcast(orchestrator.state.shared, 1, 1).payload.values()
    )


def fit(orchestrator: Orchestrator, runner: Runner, epochs: int) -> ClientResult:
    """Train the typical client, or several if the executor trains clients together.

    If this is quick it is done up to three times, since the first time is slower.

    Returns:
        A result of the last time, in which the costs are means over the clients.
    """
    personal = orchestrator.module.personal_state()
    broadcast = orchestrator.server.broadcast(orchestrator.state.shared, 1, epochs)
    sampled = num_sampled(orchestrator.data.num_clients, orchestrator.config.client_fraction)
    clients = typical_clients(orchestrator, min(orchestrator.executor.together, sampled))
    tasks = [orchestrator.task(1, client) for client in clients]
    begun = time.perf_counter()
    results: list[ClientResult] = []
    while not results or (len(results) < 3 and time.perf_counter() - begun < QUICK):
        outcomes = []
        for outcome in runner.run(broadcast, tasks, lambda _: personal):
            if isinstance(outcome, ClientFailure):
                raise FederationError(str(outcome))
            outcomes.append(outcome)
        costs = ("num_examples", "train_seconds", "meta_seconds", "bytes_received", "bytes_sent")
        means = {name: sum(getattr(outcome, name) for outcome in outcomes) / len(outcomes) for name in costs}
        results.append(replace(outcomes[0], **means))
    return results[-1]


def surveyed(orchestrator: Orchestrator, runner: Runner) -> float:
    """Return the seconds that the typical client needs for its statistics, 0 if only the last evaluation uses any."""
    server, module = orchestrator.server, orchestrator.server.module
    if not (takes_statistics(module) and module.calibrates(last=False)):
        return 0.0
    personal = orchestrator.module.personal_state()
    broadcast = server.broadcast(orchestrator.state.shared, 1, 0)
    (outcome,) = runner.run(broadcast, [orchestrator.task(1, typical_client(orchestrator))], lambda _: personal)
    if isinstance(outcome, ClientFailure):
        raise FederationError(str(outcome))
    return outcome.train_seconds


def evaluation(orchestrator: Orchestrator) -> tuple[float, int]:
    """Return the seconds of an evaluation, and the number of test images measured for it, a part if there are many."""
    evaluator, state, data = orchestrator.evaluator, orchestrator.state.copy(), orchestrator.data
    loader = data.test_dataloader()
    images, batches = len(data.images.test_labels), -(-len(loader) // TEST_SHARE)
    measured = min(images, batches * data.hparams["test_batch_size"])
    beside = len(data.validation[2]) + sum(map(len, data.local_test))
    if personal := is_personal(evaluator.module):  # these use the test set and the held-out examples once more
        beside += images + sum(map(len, data.local_test))
    start = time.perf_counter()
    evaluator.module.load_shared_state(evaluator.module.deployed(state.shared))
    orchestrator.trainer.build(limit_test_batches=batches).test(evaluator.module, loader, verbose=False)
    if (whole := (time.perf_counter() - start) * (images + beside) / measured) > QUICK:
        return whole, measured
    start = time.perf_counter()
    evaluator.measure(state.shared)
    local_accuracies(evaluator.module, data, orchestrator.trainer)
    if personal:
        kept = orchestrator.module.personal_state()
        PersonalEvaluation(evaluator.module, data, orchestrator.trainer, lambda _: lambda client: kept)(state)
    return time.perf_counter() - start, images
