"""``Ray``: trains clients on a Ray cluster: on several machines, several GPUs, or the cores of this machine."""

import contextlib
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

from fedamm_pl.federation.executors.base import Outcome, Runner, RunSpec
from fedamm_pl.federation.executors.cluster import connected, environment, is_local, reason, require_ray, shown
from fedamm_pl.federation.executors.pool import STARTING, Pool, PoolRunner, PoolSlot
from fedamm_pl.federation.executors.slots import Slot
from fedamm_pl.federation.executors.worker import Worker, begun, started, trained, unreadable
from fedamm_pl.federation.trainer import quiet
from fedamm_pl.protocol.codec import encode, pack
from fedamm_pl.protocol.messages import Broadcast, ClientTask, State

if TYPE_CHECKING:
    import ray


class Ray(Pool):
    """Trains clients on the workers of a Ray cluster: on several machines, on several GPUs, or several on one GPU.

    Needs ``pip install ".[ray]"``. With several machines, each needs the same packages, and the same data in the same place. A worker that
    dies, loses its machine, or exceeds its client's time limit is replaced, and the client is trained again. With the same number of
    threads per client the results equal those of training one client after the other, bit for bit.

    Args:
        num_workers: Number of workers; each trains one client at a time.
        address: Address of a running cluster, ``host:6379``, or ``auto`` for the one on this machine; by default, or with ``local``, Ray
            is started here and stopped after the run.
        cpus_per_worker: Cores that Ray reserves for a worker; by default its number of threads.
        gpus_per_worker: GPUs per worker; 0.25 puts four workers on one GPU. By default 1 if this process trains on a GPU, else 0.
        threads_per_worker: Threads per worker; by default ``cpus_per_worker``. If that is not set: 1 in a running cluster, else the
            threads of the main process, up to the number of cores, divided equally.
        client_timeout: Time limit per client in seconds; null for none.
        max_retries: How often a client is trained again after its worker died or its time was up.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        num_workers: int = 2,
        address: str | None = None,
        cpus_per_worker: float | None = None,
        gpus_per_worker: float | None = None,
        threads_per_worker: int | None = None,
        client_timeout: float | None = None,
        max_retries: int = 1,
    ) -> None:
        super().__init__(num_workers, threads_per_worker, client_timeout, max_retries)
        for name in ("cpus_per_worker", "gpus_per_worker"):
            if (value := locals()[name]) is not None and not 0 <= value < math.inf:
                raise ValueError(f"Expected `{name}` to be a number of 0 or more, got {value}.")
        if gpus_per_worker is not None and gpus_per_worker > 1 and gpus_per_worker != int(gpus_per_worker):
            raise ValueError(f"Expected `gpus_per_worker` to be whole where it is above 1, got {gpus_per_worker}.")
        self.address = address
        self.cpus_per_worker = cpus_per_worker
        self.gpus_per_worker = gpus_per_worker

    @property
    def workers_here(self) -> int:
        """Number of workers if Ray is started on this machine, else 0: those of a cluster may run anywhere."""
        return self.num_workers if is_local(self.address) else 0

    def threads(self, threads: int) -> int:
        """Return the number of threads per worker, given the number of threads of this process."""
        if self.threads_per_worker is None and (self.cpus_per_worker or not is_local(self.address)):
            return max(1, int(self.cpus_per_worker or 1))
        return super().threads(threads)

    def for_workers(self, spec: RunSpec) -> RunSpec:
        """Return the specification for the workers, which use the GPU that Ray assigns, not that of this process."""
        on_gpu = spec.trainer.kind == "cuda"
        return super().for_workers(replace(spec, trainer=replace(spec.trainer, devices=1)) if on_gpu else spec)

    def open(self, spec: RunSpec) -> Runner:
        """Start or join the cluster, and wait until each worker has its module and its data.

        Raises:
            ValueError: If Ray is not installed, the cluster cannot be reached or is too small, or workers cannot start.
        """
        require_ray(self.address)
        return RayRunner(self, self.for_workers(spec))

    def resources(self, spec: RunSpec) -> dict[str, float]:
        """Return the CPUs and GPUs per worker.

        Raises:
            ValueError: If GPUs are requested although this process does not train on one.
        """
        on_gpu = spec.trainer.kind == "cuda"
        gpus = float(on_gpu) if self.gpus_per_worker is None else self.gpus_per_worker
        if gpus and not on_gpu:
            raise ValueError(
                f"Expected `gpus_per_worker` to be 0 where the server does not train on a GPU, got {gpus:g}: accelerator is "
                f"{spec.trainer.kind} here."
            )
        cpus = self.threads(spec.threads) if self.cpus_per_worker is None else self.cpus_per_worker
        return {"CPU": cpus, "GPU": gpus}


class RayRunner(PoolRunner):
    """Runner of :class:`Ray`.

    Args:
        options: The executor: cluster, number of workers, time limit and retries.
        spec: What the workers build module and data from.

    Raises:
        ValueError: If there is no such cluster, it is too small, or workers cannot be started or do not see the same
            data.
    """

    def __init__(self, options: Ray, spec: RunSpec) -> None:
        needed = options.resources(spec)
        self._closing = contextlib.ExitStack()
        self._closing.enter_context(connected(options.address, options.num_workers, needed))
        try:
            cast, more = cache(_Cast), {"runtime_env": environment(spec.threads)}  # one for all slots
            super().__init__(options, spec, lambda content, number: RaySlot(number, needed, more, cast(content)), wait)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        for slot in getattr(self, "_slots", []):
            slot.close()
        self._slots = []
        self._closing.close()


class _Cast:
    """Puts the spec and the broadcast of the round into Ray's object store; the next broadcast frees the last one.

    Args:
        spec: A pickled :class:`RunSpec`.
    """

    def __init__(self, spec: bytes) -> None:
        import ray

        self.spec = ray.put(spec)
        self._sent: Broadcast | None = None
        self._reference: Any = None

    def reference(self, broadcast: Broadcast) -> Any:
        """Return the object reference of a broadcast."""
        import ray

        if self._sent is not broadcast:
            self._reference, self._sent = ray.put(encode(broadcast)), broadcast
        return self._reference


class RaySlot(PoolSlot):
    """A slot whose worker is a Ray actor.

    Args:
        place: Number of the slot.
        needed: The CPUs and GPUs that the actor needs.
        options: Further options of the actor.
        cast: Holds the references to the spec and the broadcast.
    """

    def __init__(self, place: int, needed: dict[str, float], options: dict[str, Any], cast: _Cast) -> None:
        super().__init__(place)
        self._needed = needed
        self._options = {"num_cpus": needed["CPU"], "num_gpus": needed["GPU"], **options}
        self._cast = cast
        self._node = ""
        self.closed = False
        self._start()

    @property
    def name(self) -> str:
        """Name of the worker in messages, including its machine once that is known."""
        return f"worker {self.place}{self._node and f' on {self._node}'}"

    def _start(self) -> None:
        import ray

        self.ready, self._training, self._node = False, False, ""
        actor: Any = ray.remote(RayWorker)
        # no restarts or retries by Ray: run_on_slots decides which client is trained again, counts and logs it
        self._actor = actor.options(
            max_restarts=0, max_task_retries=0, scheduling_strategy="SPREAD", **self._options
        ).remote()
        self.pending = self._actor.start.remote([self._cast.spec], self.place, os.getcwd())

    def started(self) -> dict[str, Any]:
        """Wait for the actor and return its environment, see :class:`PoolSlot`."""
        import ray

        try:
            node, content = ray.get(self.pending, timeout=STARTING)
        except ray.exceptions.GetTimeoutError as error:
            raise ValueError(
                f"Expected {self.name} to start within {STARTING:g} s, got one that waits for {shown(self._needed)} or is still "
                f"loading; free in the cluster: {shown(ray.available_resources())}."
            ) from error
        except ray.exceptions.RayError as error:
            raise ValueError(f"Expected {self.name} to start, got: {reason(error)}") from error
        self._node = node
        return self.environment_in(content)

    def send(self, broadcast: Broadcast, task: ClientTask, kept: State) -> None:
        """Give the worker a client, see :class:`Slot`."""
        import ray

        # Ray does not resolve a reference in a list: the actor fetches the broadcast itself, once per round
        try:
            sent = [self._cast.reference(broadcast)]
            self.pending = self._actor.train.remote(sent, encode(task), pack(kept))
        except ray.exceptions.RayError as error:
            raise EOFError(f"its worker on {self._node} cannot be reached: {reason(error)}") from error
        self.ready, self._training = False, True

    def receive(self) -> Outcome | None:
        """Return what the worker has sent, see :class:`Slot`."""
        import ray

        if not self._training:
            try:
                self.started()
            except ValueError as error:
                raise EOFError(str(error)) from error
            return None
        try:
            content = ray.get(self.pending, timeout=STARTING)
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise EOFError(f"its worker on {self._node} died: {reason(error)}") from error
        self.pending, self._training = None, False
        return self.outcome_in(content)

    def restart(self) -> None:
        """End the actor and start another one.

        Once the slot is closed this does nothing: a round that was dropped may be cancelled after that.
        """
        if not self.closed:
            self._end()
            self._start()

    def close(self) -> None:
        """End the actor."""
        self.closed = True
        self._end()

    def _end(self) -> None:
        import ray

        with contextlib.suppress(ray.exceptions.RayError, ValueError):
            ray.kill(self._actor)
        self._actor = self.pending = None


class RayWorker:
    """The class of the actors: a :class:`Worker` that receives and returns bytes."""

    def start(self, spec: "list[ray.ObjectRef[bytes]]", gpu: int, folder: str) -> tuple[str, bytes]:
        """Build module and data; return the machine's address, and the environment or an error as JSON."""
        import ray

        with contextlib.suppress(OSError):  # if the folder is missing, a later error names the data not found
            os.chdir(folder)
        (content,) = ray.get(spec)
        on_gpu = bool(ray.get_gpu_ids())  # the actor sees only the devices that Ray has assigned to it
        self._worker, said = started(content, 0 if on_gpu else gpu)
        self._reference: Any = None
        return ray.util.get_node_ip_address(), said

    def train(self, broadcast: "list[ray.ObjectRef[bytes]]", task: bytes, kept: bytes) -> bytes:
        """Train a client; the broadcast is only fetched if the round is new."""
        import ray

        assert isinstance(self._worker, Worker)
        with quiet():
            try:
                if broadcast[0] != self._reference:
                    begun(self._worker, ray.get(broadcast[0]))
                    self._reference = broadcast[0]
                return trained(self._worker, task, kept)
            except ValueError as error:
                return unreadable(error)


def wait(slots: Sequence[Slot], seconds: float | None) -> Sequence[Slot]:
    """Return the slots whose actor has sent something or has died, once there is one."""
    import ray

    by_reference: dict[Any, Slot] = {}
    for slot in slots:
        assert isinstance(slot, RaySlot)
        by_reference[slot.pending] = slot
    ray.wait(list(by_reference), num_returns=1, timeout=seconds)
    found, _ = ray.wait(list(by_reference), num_returns=len(by_reference), timeout=0)  # all that are ready
    return [by_reference[reference] for reference in found]
