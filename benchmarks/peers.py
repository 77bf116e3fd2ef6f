"""Measure FedAvg beside other frameworks: the same federation by each of them and by a bare loop.

    python benchmarks/peers.py --environments DIR [--root data] [--jobs small medium large] [--repeats 3]

makes a virtual environment for each peer in DIR (once, from pinned requirements), lets the contenders do each job in turns, each
in a process of its own, prints tables and writes them with every timing to a file. All get the same images, partition, initial
weights and options, compute in float32, and train one client at a time. What is timed are the rounds after the first, without
evaluation; processor time and memory are those of all processes of a contender, memory as PSS, sampled four times a second from
the start of the process to its end. It needs Linux. Nothing else should run beside it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path[0] = str(REPOSITORY)  # instead of the folder of this file

from benchmarks.contenders.comparison import Entry, against_peers, markdown, overview
from benchmarks.contenders.environments import NotInstalledError, python_of
from benchmarks.contenders.job import JOBS, Job
from benchmarks.contenders.material import Material, largest_difference, prepare
from benchmarks.contenders.measure import Contender, FailedError, Measured, measure
from benchmarks.machine import hardware

BARE = "bare loop"
AVERAGED = {"large": "averages BatchNorm's running statistics like weights"}
OURS = {
    "small": "Lightning's loops and hooks around the one step take most of the time",
    "medium": "Lightning's calls around each step",
    "large": "computes channels-last, its default for this network; averages BatchNorm's running statistics like weights",
}
CONTENDERS = {
    "bare": Contender(BARE, "ours", "bare_loop", notes=AVERAGED),
    "bare_channels_last": Contender(
        "bare loop, channels-last", "ours", "bare_loop", {"channels_last": True}, jobs=("large",)
    ),
    "sequential": Contender(
        *("fedamm_pl, Sequential", "ours", "with_fedamm"),
        ours=True,
        notes=OURS,
    ),
    "vectorized": Contender(
        *("fedamm_pl, Vectorized", "ours", "with_fedamm", {"executor": "Vectorized"}),
        ours=True,
        notes={"large": OURS["large"]},
    ),
    "processes": Contender(
        *("fedamm_pl, Processes(1)", "ours", "with_fedamm", {"executor": "Processes"}),
        ours=True,
        notes=OURS,
    ),
    "fluke": Contender(
        "fluke", "fluke", "with_fluke", notes={**AVERAGED, "small": "copies the model twice for each client"}
    ),
    "flower": Contender(
        *("Flower, simulation", "flower", "with_flower"),
        notes={**AVERAGED, "*": "one Ray actor; clients train by the bare loop's function"},
    ),
    "pfl": Contender(
        *("pfl-research", "pfl", "with_pfl"),
        notes={
            "small": "one resident model, few calls around the step",
            "medium": "visits a client's images in the same order in each round",
            "large": "visits a client's images in the same order in each round; averages parameters alone: BatchNorm's running "
            "statistics go on from client to client",
        },
    ),
}
DEFAULT = [name for name in CONTENDERS if name != "processes"]


def main() -> int:
    """Measure all contenders, print the tables and write the results."""
    args = parse()
    found = {key: value for key, value in hardware().items() if key in ("processor", "gpu")}
    content: dict[str, Any] = {"hardware": found, "jobs": {}}
    print(json.dumps(found), flush=True)
    pythons, missing = environments({CONTENDERS[name].environment for name in args.contenders}, args.environments)
    tables, clean = [], True
    for name in args.jobs:
        job = replace(JOBS[name], threads=args.threads, **fewer(args))
        with tempfile.TemporaryDirectory(prefix="peers-") as folder:
            material = prepare(job, Path(folder), args.root)
            chosen = [CONTENDERS[key] for key in args.contenders if CONTENDERS[key].does(name)]
            entries = [Entry(contender, failure=missing.get(contender.environment, "")) for contender in chosen]
            for _ in range(args.repeats):
                in_turn(entries, pythons, material, args.timeout)
        bare = next((entry for entry in entries if entry.contender.name == BARE), None)
        title = f"{name}: {describe(job, material)}"
        rows = against_peers(entries)
        tables.append(f"**{title}**\n\n{overview(job, entries, bare)}")
        if rows:
            tables[-1] += "\n\n" + markdown(["ours / peer", "wall", "processor", "memory"], rows)
        print(f"\n{tables[-1]}", flush=True)
        content["jobs"][name] = {
            "job": asdict(material.job),
            "what": title,
            "contenders": [entry.summary(job, bare) for entry in entries],
            "table": tables[-1].splitlines(),
        }
        args.output.write_text(json.dumps(content, indent=1) + "\n")
        clean = clean and not any("NOT THE SAME WORK" in entry.words(job) for entry in entries)
    return 0 if clean else 1


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--environments", type=Path, required=True, help="folder of four environments, each with a torch of its own"
    )
    parser.add_argument("--root", type=Path, help="folder of Fashion-MNIST and CIFAR-10; without it images are drawn")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--repeats", type=int, default=3, help="how often each contender does each job")
    parser.add_argument("--rounds", type=int, help="timed rounds, in place of the job's")
    parser.add_argument("--clients", type=int, help="clients, in place of the job's")
    parser.add_argument("--threads", type=int, default=1, help="threads of a client")
    parser.add_argument("--timeout", type=float, default=3600, help="seconds after which a contender is given up")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/peers.json")
    return parser.parse_args()


def fewer(args: argparse.Namespace) -> dict[str, Any]:
    """Return the fields of the job that the command line sets."""
    given = {"rounds": args.rounds, "num_clients": args.clients}
    return {name: value for name, value in given.items() if value is not None}


def environments(names: set[str], folder: Path) -> tuple[dict[str, Path], dict[str, str]]:
    """Make the environments; return name -> Python, and name -> reason for those that cannot be made."""
    pythons, missing = {}, {}
    for name in sorted(names):
        try:
            pythons[name] = python_of(name, folder)
        except NotInstalledError as error:
            missing[name] = str(error)
    return pythons, missing


def in_turn(entries: Sequence[Entry], pythons: dict[str, Path], material: Material, timeout: float) -> None:
    """Run the job once with each contender, in order; weights are compared with those of a preceding bare loop."""
    bare: Measured | None = None
    for entry in entries:
        if entry.failure:
            continue
        try:
            measured = measure(entry.contender, pythons[entry.contender.environment], material, timeout)
        except FailedError as error:
            entry.failure = str(error)
            print(f"{material.job.name}  {entry.contender.name}  {error}", flush=True)
            continue
        entry.wall.append(sum(measured.wall))
        entry.processor.append(measured.processor)
        entry.peak.append(measured.peak)
        entry.accuracy.append(material.accuracy(measured.state))
        entry.versions = measured.versions
        bare = measured if entry.contender.name == BARE else bare
        if bare and measured is not bare:
            entry.difference.append(largest_difference(measured.state, bare.state))
        print(
            f"{material.job.name}  {entry.contender.name}  {entry.wall[-1]:.2f} s, processor {entry.processor[-1]:.2f} s, "
            f"{entry.peak[-1]:.0f} MiB, {entry.accuracy[-1]:.1f} %",
            flush=True,
        )


def describe(job: Job, material: Material) -> str:
    """Return a description of a job."""
    return (
        f"{job.num_clients} clients of {job.client_size} images, {job.network}, batches of {job.batch_size}, "
        f"timed rounds: {job.rounds}; {material.source}"
    )


if __name__ == "__main__":
    sys.exit(main())
