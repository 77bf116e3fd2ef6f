"""``Sequential``: trains one client after the other in this process."""

from collections.abc import Callable, Iterator, Sequence

from fedamm_pl.federation.executors.base import Executor, Kept, Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.worker import Worker
from fedamm_pl.protocol.messages import Broadcast, ClientTask


class Sequential(Executor):
    """Trains one client after the other in this process. It cannot stop a client that hangs."""

    def open(self, spec: RunSpec) -> Runner:
        """Build the worker."""
        return SequentialRunner(spec)


class SequentialRunner(Runner):
    """Runner of :class:`Sequential`.

    Args:
        spec: What to build the worker from.
    """

    def __init__(self, spec: RunSpec) -> None:
        self._worker = Worker(spec)
        self.environment = self._worker.environment

    def run(
        self, broadcast: Broadcast, tasks: Sequence[ClientTask], kept: Kept, meanwhile: Callable[[], None] | None = None
    ) -> Iterator[Outcome]:
        """Train the client of each task, see :class:`Runner`."""
        if meanwhile:
            meanwhile()
        self._worker.begin(broadcast)
        for task in tasks:
            yield self._worker.train(task, kept(task.client_id))
