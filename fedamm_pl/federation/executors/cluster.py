"""Connects to a Ray cluster, or starts one on this machine for a run and stops it afterwards."""

import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

from fedamm_pl.terminal import line

log = logging.getLogger(__name__)

LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Variable that keeps the ports of a local Ray on 127.0.0.1, despite its name; else they are open to the network."""

ANSWERING = 5.0
"""Time limit in seconds for a cluster to answer."""


def require_ray(address: str | None) -> None:
    """Check that Ray can be imported, and restrict a local Ray to this machine.

    Args:
        address: Address of the cluster to join; None or ``local`` starts one.

    Raises:
        ValueError: If Ray is not installed; the message says how to get it.
    """
    if is_local(address) and "ray" not in sys.modules:  # Ray reads the variable on import
        os.environ.update({name: os.environ.get(name, value) for name, value in LOOPBACK.items()})
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray  # noqa: F401
    except ImportError as error:
        raise ValueError(
            f'Expected Ray to be installed, got: {error}. Install it by `pip install "ray>=2.59"`; there may be no wheel '
            f"for Python {sys.version_info.major}.{sys.version_info.minor}."
        ) from error


def is_local(address: str | None) -> bool:
    """Return whether an address means that Ray is started on this machine."""
    return address in (None, "local")


@contextlib.contextmanager
def connected(address: str | None, num_workers: int, needed: dict[str, float]) -> Iterator[None]:
    """Connect to a Ray cluster, or start one on this machine, and disconnect or stop it at the end of the context.

    If the program is already connected to a cluster, that connection is used and stays open.

    Args:
        address: Address of the cluster; None or ``local`` starts one.
        num_workers: How many workers will be started.
        needed: The CPUs and GPUs that each worker needs.

    Raises:
        ValueError: If there is no such cluster, or it has no room for the workers.
    """
    import ray

    joined = ray.is_initialized()
    if not joined:
        require_answer(address)
        options: dict[str, Any] = {}
        if is_local(address):
            cores = max(math.ceil(num_workers * needed["CPU"]), os.cpu_count() or 1)
            options = {"include_dashboard": False, "num_cpus": cores}
        logging.getLogger("ray").setLevel(logging.ERROR)  # hides the note at each start that a token protects it
        with handlers_kept():
            try:
                context = ray.init(
                    address=address or "local",  # not Ray's default, which may join a cluster left running
                    log_to_driver=False,
                    logging_level="error",
                    configure_logging=False,
                    **options,
                )
            except (ConnectionError, RuntimeError, ValueError) as error:
                raise ValueError(
                    f"Expected `address` to be that of a Ray cluster with this machine's version of Ray and its token, got {address}: "
                    f"{line(str(error))}"
                ) from error
    try:
        require_room(num_workers, needed)
        yield
    finally:
        if not joined:
            with handlers_kept():
                ray.shutdown()
            if is_local(address):
                shutil.rmtree(context.address_info["session_dir"], ignore_errors=True)


def require_answer(address: str | None) -> None:
    """Check that something answers at an address, since Ray itself would keep trying for minutes.

    Raises:
        ValueError: If nothing answers, or the address is invalid.
    """
    if address == "auto" or is_local(address):
        return
    host, _, port = str(address).rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        raise ValueError(f"Expected `address` to be host:port, auto or local, got {address}.")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWERING).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"Expected a Ray cluster at `address` {address}, got no answer: {error}.") from error


def require_room(num_workers: int, needed: dict[str, float]) -> None:
    """Check that the machines of the cluster are large enough for the workers, regardless of what else runs on them.

    Raises:
        ValueError: If not; the message lists the resources of the machines.
    """
    import ray

    if room(needed) < num_workers:
        nodes = machines()
        there = "; ".join(shown(node) for node in nodes)
        raise ValueError(
            f"Expected a cluster with room for {num_workers} worker{'s' if num_workers != 1 else ''} of {shown(needed)}, got one of {len(nodes)} "
            f"machine{'s' if len(nodes) != 1 else ''} with {there}."
        )
    free = ray.available_resources()
    if any(free.get(kind, 0.0) + 1e-9 < num_workers * amount for kind, amount in needed.items()):
        log.warning(
            "%d workers of %s wait until others leave the cluster: free are %s",
            num_workers,
            shown(needed),
            shown(free),
        )


def machines() -> list[dict[str, float]]:
    """Return the total resources of each machine of the cluster."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def room(needed: dict[str, float]) -> float:
    """Return how many workers fit into the cluster if nothing else runs on it."""

    def fitting(node: dict[str, float]) -> float:
        amounts = [(kind, amount) for kind, amount in needed.items() if amount]
        return min((node.get(kind, 0.0) / amount + 1e-9 for kind, amount in amounts), default=math.inf) // 1

    return sum(map(fitting, machines()))


def environment(threads: int, on_gpu: bool = True) -> dict[str, Any]:
    """Return Ray's runtime environment for the workers: the import path of this process, and their number of threads.

    Args:
        threads: Threads per worker.
        on_gpu: Whether workers may see GPUs. Ray limits which GPUs are visible only for workers that request some.
    """
    path = os.pathsep.join(dict.fromkeys(os.path.abspath(entry or os.curdir) for entry in sys.path))
    hidden = {} if on_gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return {"env_vars": {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), **hidden}}


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Restore the program's signal handlers at the end of the context, since Ray replaces but does not restore them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def reason(error: Exception) -> str:
    """Return one line that says why an actor has not answered."""
    cause = getattr(error, "cause", None)
    text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error) or type(error).__name__
    return line(text.strip().partition("\n")[0])


def shown(resources: dict[str, float]) -> str:
    """Format numbers of CPUs and GPUs."""
    return ", ".join(f"{resources.get(kind, 0):g} {kind}s" for kind in ("CPU", "GPU"))
