"""Measure what workers gain and cost: local processes and Ray, one and two of one thread, against one client after the other.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py [--repeats 5] [--output benchmarks/scaling.json]

prints a table and writes it with every timing, the hardware and the versions to a file. It takes some minutes; nothing else should run
beside it. Rounds of all executors are timed in turn, and each ratio is the median over the turns.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)  # instead of the folder of this file

import torch

from benchmarks.federations import LR, Noise, Rounds, advance
from benchmarks.machine import hardware
from benchmarks.run import markdown
from fedamm_pl import FedAMM, FedAvg, FederatedModule, Orchestrator
from fedamm_pl.federation.executors import Executor, Processes, Ray, Sequential
from fedamm_pl.federation.executors.cluster import connected, require_ray
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.protocol.codec import encode, pack

CLIENTS = 8
EXECUTORS: dict[str, Executor] = {
    "Sequential": Sequential(),
    "Processes, 1 worker": Processes(1, threads_per_worker=1),
    "Processes, 2 workers": Processes(2, threads_per_worker=1),
    "Ray, 1 worker": Ray(1, threads_per_worker=1),
    "Ray, 2 workers": Ray(2, threads_per_worker=1),
}


def eight_clients(algorithm: type[FederatedModule], images: int, executor: Executor, **options: Any) -> Orchestrator:
    """Return a federation of the small CNN (94,186 parameters) on eight clients of equal size, all in each round."""
    data = Noise(
        f"noise-{CLIENTS * images // 10 + 1}-28-1-100",
        num_clients=CLIENTS,
        imbalance_factor=1.0,
        partition="iid",
        batch_size=32,
        num_meta_per_class=1,
    )
    torch.manual_seed(0)
    module = algorithm(10, 1, "small_cnn", LR, info=data.info, **options)
    more: dict[str, Any] = {"client_fraction": 1.0, "local_epochs": 2, "eval_interval": 10**6, "num_rounds": 0}
    trainer = TrainerConfig("cpu", precision="32-true")
    return Orchestrator(module, data, callbacks=[Rounds()], trainer=trainer, executor=executor, **more)


def in_turn(runs: dict[str, Orchestrator], repeats: int) -> dict[str, list[float]]:
    """Time rounds of the federations in turn, after one round of each that is not timed."""
    for run in runs.values():
        advance(run)
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            found[name].append(advance(run))
    return found


def opened(stack: contextlib.ExitStack, runs: dict[str, Orchestrator]) -> dict[str, float]:
    """Open federations, and return the seconds that each needs to start."""
    seconds = {}
    for name, run in runs.items():
        start = time.perf_counter()
        stack.enter_context(run.opened())
        seconds[name] = time.perf_counter() - start
    return seconds


def messages(run: Orchestrator) -> dict[str, int]:
    """Return the bytes of messages in a round: to a worker once, to a worker for each client, and back per client."""
    broadcast = run.server.broadcast(run.state.shared, 1, 1)
    with Sequential().open(run.spec()) as runner:
        (outcome,) = runner.run(broadcast, [run.task(1, 0)], lambda client: {})
    there = len(encode(run.task(1, 0))) + len(pack({}))
    return {
        "broadcast, once a worker": len(encode(broadcast)),
        "a client, there": there,
        "a client, back": len(encode(outcome)),
    }


def main() -> None:
    """Measure all executors, print the tables and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="turns")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/scaling.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    require_ray(None)
    start = time.perf_counter()
    with connected(None, 2, {"CPU": 1, "GPU": 0}):
        ray_seconds = time.perf_counter() - start
    with contextlib.ExitStack() as stack:
        stack.enter_context(connected(None, 8, {"CPU": 1, "GPU": 0}))
        work = {
            name: eight_clients(FedAMM, 150, executor, differentiation="forward")
            for name, executor in EXECUTORS.items()
        }
        starts = opened(stack, work)
        bytes_sent = messages(work["Sequential"])
        training = in_turn(work, args.repeats)
    with contextlib.ExitStack() as stack:
        stack.enter_context(connected(None, 8, {"CPU": 1, "GPU": 0}))
        nothing = {name: eight_clients(FedAvg, 2, executor) for name, executor in EXECUTORS.items()}
        opened(stack, nothing)
        idle = in_turn(nothing, 4 * args.repeats)
    first = "Sequential"
    lines = []
    for name in EXECUTORS:
        rate = statistics.median(CLIENTS / value for value in training[name])
        ratio = statistics.median(a / b for a, b in zip(training[first], training[name], strict=True))
        over = statistics.median(1e3 * (b - a) / CLIENTS for a, b in zip(idle[first], idle[name], strict=True))
        alone = name.endswith("1 worker")  # with more workers, time saved in parallel hides the overhead
        lines.append([name, f"{rate:.2f}", f"{ratio:.2f}", f"{over:.1f}" if alone else "", f"{starts[name]:.1f}"])
    head = ["executor, one thread each", "clients/s", "times Sequential", "overhead of a client, ms", "start, s"]
    table = markdown(lines, head)
    sizes = markdown([[name, f"{value:,}"] for name, value in bytes_sent.items()], ["message", "bytes"])
    print(f"{table}\n\na local Ray starts and ends in {ray_seconds:.1f} s\n\n{sizes}")
    seconds = {"training": training, "next to nothing": idle, "start": starts, "local Ray": ray_seconds}
    content = {"hardware": hardware(), "table": [head, *lines], "seconds": seconds, "bytes": bytes_sent}
    args.output.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
