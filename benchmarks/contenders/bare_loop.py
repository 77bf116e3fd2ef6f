"""FedAvg as a bare loop, with which the other contenders are compared."""

import torch

from benchmarks.contenders.given import Clock, Given, State, train


def main() -> None:
    """Run the job."""
    given = Given.here()
    job, network, clients, clock = given.job, given.network(), given.clients, Clock(given)
    if job.channels_last:
        clients = [(images.contiguous(memory_format=torch.channels_last), labels) for images, labels in clients]
    total = sum(len(labels) for _, labels in clients)
    for _ in range(1 + job.rounds):
        start = {name: value.clone() for name, value in network.state_dict().items()}
        sums: State = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in start.items()}
        for images, labels in clients:
            network.load_state_dict(start)
            train(network, images, labels, job)
            for name, value in network.state_dict().items():
                sums[name].add_(value, alpha=len(labels) / total)
        network.load_state_dict(sums)
        clock.end_of_round()
    clock.report(network.state_dict())


if __name__ == "__main__":
    main()
