"""FedAvg with Flower's simulation (https://flower.ai): its ``FedAvg`` with one Ray actor.

Clients train with the same function as in the bare loop.
"""

from collections.abc import Iterable

from flwr.app import ArrayRecord, Context, Message, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor

from benchmarks.contenders.flower_client import app as client_app
from benchmarks.contenders.given import Clock, Given


class Timed(FedAvg):  # type: ignore[misc]
    """FedAvg that tells the clock when a round has ended.

    Args:
        clock: The clock.
        clients: Number of clients.
    """

    def __init__(self, clock: Clock, clients: int) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
        self._clock = clock
        self._clients = clients

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Average the replies, and tell the clock."""
        answers = list(replies)
        whole = [answer for answer in answers if not answer.has_error()]
        if len(whole) < self._clients:
            raise RuntimeError(f"Expected {self._clients} answers, got {len(whole)}.")
        arrays, metrics = super().aggregate_train(server_round, answers)
        self._clock.end_of_round()
        return arrays, metrics


def main() -> None:
    """Run the job with Flower."""
    given = Given.here()
    job, clock, final = given.job, Clock(given), dict[str, Tensor]()
    server_app = ServerApp()

    @server_app.main()  # type: ignore[untyped-decorator]
    def serve(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(given.network().state_dict())
        result = Timed(clock, job.num_clients).start(grid, initial, num_rounds=1 + job.rounds)
        final.update(result.arrays.to_torch_state_dict())

    cpus = job.threads  # enough for one actor only
    run_simulation(
        server_app,
        client_app,
        num_supernodes=job.num_clients,
        backend_config={
            "client_resources": {"num_cpus": cpus, "num_gpus": 0.0},
            "init_args": {"num_cpus": cpus, "log_to_driver": False, "logging_level": "error"},
        },
    )
    clock.report(final, "flwr", "ray")


if __name__ == "__main__":
    main()
