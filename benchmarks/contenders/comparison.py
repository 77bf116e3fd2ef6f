"""Ratios of the time and memory of contenders, and tables of them."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.contenders.job import Job
from benchmarks.contenders.measure import Contender

SAME_WEIGHTS = 1e-5
"""Largest difference of weights that rounding can cause in some rounds of one step each."""
KINDS = ("wall", "processor", "peak")


@dataclass
class Entry:
    """The results of a contender at a job; lists have one value for each repeat.

    Attributes:
        contender: The contender.
        wall: Seconds of the timed rounds.
        processor: Processor seconds of the timed rounds.
        peak: Peak memory in MiB.
        accuracy: Test accuracy of the final weights in percent.
        difference: Largest difference between the final weights and those of the bare loop in the same repeat.
        versions: Versions of its packages.
        failure: Why the contender failed, in one line; empty if it did not.
    """

    contender: Contender
    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    peak: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    difference: list[float] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    failure: str = ""

    def ratio(self, other: "Entry", kind: str) -> float:
        """Return the ratio of this entry to another in the same repeat, the median over repeats."""
        pairs = zip(getattr(self, kind), getattr(other, kind), strict=False)
        return float(statistics.median(mine / yours for mine, yours in pairs))

    def milliseconds(self, job: Job, kind: str) -> float:
        """Return the milliseconds per client and round, the median over repeats."""
        return 1000 * float(statistics.median(getattr(self, kind))) / (job.num_clients * job.rounds)

    def words(self, job: Job) -> str:
        """Return the note of the contender, a warning if its work was not the same, and its failure."""
        words = [self.contender.note(job.name)]
        if job.one_full_step and self.difference and max(self.difference) > SAME_WEIGHTS:
            words.append("NOT THE SAME WORK: the weights differ by more than rounding")
        return "; ".join(word for word in (*words, self.failure) if word)

    def summary(self, job: Job, bare: "Entry | None") -> dict[str, Any]:
        """Return the entry as content of a JSON file."""
        kept = {name: value for name, value in vars(self).items() if name != "contender"}
        content = {"contender": self.contender.name, "note": self.words(job), **kept}
        if self.wall:
            content["milliseconds per client"] = {kind: self.milliseconds(job, kind) for kind in KINDS[:2]}
            if bare and bare.wall:
                content["over the bare loop"] = {kind: self.ratio(bare, kind) for kind in KINDS}
        return content


HEAD = [
    *("", "ms per client, wall", "processor", "peak MiB", "wall / bare", "processor / bare", "memory / bare"),
    *("accuracy, %", "weights from the bare loop's", "note"),
]


def overview(job: Job, entries: Sequence[Entry], bare: Entry | None) -> str:
    """Return the table of a job, which compares each contender with the bare loop."""
    rows = []
    for entry in entries:
        cells = [entry.contender.name]
        if entry.wall:
            taken = [entry.milliseconds(job, kind) for kind in KINDS[:2]]
            cells += [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in taken]
            cells += [f"{statistics.median(entry.peak):.0f}"]
            cells += [f"{entry.ratio(bare, kind):.2f}x" for kind in KINDS] if bare and bare.wall else [""] * 3
            cells += [f"{statistics.median(entry.accuracy):.1f}"]
            cells += [f"{max(entry.difference):.1g}" if entry.difference else ""]
        else:
            cells += [""] * (len(HEAD) - 2)
        rows.append([*cells, entry.words(job)])
    return markdown(HEAD, rows)


def against_peers(entries: Sequence[Entry]) -> list[list[str]]:
    """Return rows with the ratios of this package to each peer: wall time, processor time and memory."""
    ours = [entry for entry in entries if entry.contender.ours and entry.wall]
    peers = [entry for entry in entries if not entry.contender.ours and entry.wall]
    return [
        [f"{mine.contender.name} / {peer.contender.name}", *(f"{mine.ratio(peer, kind):.2f}x" for kind in KINDS)]
        for mine in ours
        for peer in peers
    ]


def markdown(head: list[str], rows: Sequence[list[str]]) -> str:
    """Format a table as Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])
