"""What a round will cost, by the measure of one client and one evaluation."""

import time

from fedamm_pl.federation.orchestrator import FederationError, Orchestrator
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.messages import ClientFailure, ClientResult


def estimate(orchestrator: Orchestrator) -> dict[str, float]:
    """Estimate what a round costs, from one client's fit and one evaluation; the run's state stays as it is.

    Args:
        orchestrator: A run that is not open; of several workers one is used.

    Returns:
        Means over rounds: ``train``, ``meta`` and ``evaluate`` in seconds, ``received`` and ``sent`` in tensor bytes, all
        clients together.

    Raises:
        FederationError: If the client fails.
    """
    data, config, state = orchestrator.data, orchestrator.config, orchestrator.state
    sizes = [data.client_size(client) for client in range(data.num_clients)]
    typical = sorted((size, client) for client, size in enumerate(sizes) if size)
    clients = num_sampled(data.num_clients, config.client_fraction) * len(typical) / len(sizes)
    personal = orchestrator.module.personal_state()
    with quiet(), orchestrator.executor.open(orchestrator.spec()) as runner:
        broadcast = orchestrator.server.broadcast(state.shared, 1, config.local_epochs)
        tasks = [orchestrator.task(1, typical[len(typical) // 2][1])]
        results: list[ClientResult] = []
        begun = time.perf_counter()
        while not results or (len(results) < 3 and time.perf_counter() - begun < 3):  # the first fit is slower
            (outcome,) = runner.run(broadcast, tasks, lambda _: personal)
            if isinstance(outcome, ClientFailure):
                raise FederationError(str(outcome))
            results.append(outcome)
        start = time.perf_counter()
        orchestrator.evaluator.measure(state.shared)
    result, mean_size = results[-1], sum(sizes) / len(typical)
    return {
        "train": clients * result.train_seconds * mean_size / result.num_examples,
        "meta": clients * result.meta_seconds,
        "evaluate": (time.perf_counter() - start) / config.eval_interval,
        "received": clients * result.bytes_received,
        "sent": clients * result.bytes_sent,
    }
