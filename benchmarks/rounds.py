"""Benchmark rows on a round: against the bare loop, in other arithmetics, and time outside training and evaluation."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import TensorBoardLogger

from benchmarks.bare import bare_round, prepare
from benchmarks.federations import advance, arithmetic, cifar10, federation
from benchmarks.timing import Row, pairs, timed
from fedamm_pl import FedAMM
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, RoundRecord
from fedamm_pl.federation.run import Run
from fedamm_pl.protocol.messages import State

PLAIN: dict[str, Any] = {"precision": "32-true", "memory_format": "contiguous_format"}
PAPER_CLIENTS, PAPER_ROUNDS = 10, 500


def row_round(repeats: int) -> list[Row]:
    """Compare a round with the bare loop, and extrapolate the time of the paper's experiment."""
    run = federation(cifar10())
    advance(run)
    own = FedAMM(10, 3, "resnet32", info=run.data.info)  # networks of the bare loop, as plain modules
    own.to(run.server.module.device)
    before: list[State] = []
    gaps: list[float] = []

    def orchestrated() -> float:
        before[:] = [run.state.shared]
        return advance(run)

    def bare() -> float:
        clients, averages = prepare(run, run.state.round_num), State()
        own.load_shared_state(before[0])
        with arithmetic(run):
            seconds = timed(lambda: averages.update(bare_round(own.model, own.weight_net, clients)))()
        gaps.append(max(float((value - averages[name]).abs().max()) for name, value in run.state.shared.items()))
        return seconds

    names = ("orchestrated", "bare loop")
    row = pairs(
        "orchestrated round / bare loop of the same arithmetic", orchestrated, bare, repeats, bar=1.05, names=names
    )
    row.note += f"; weights differ by at most {max(gaps):.1g}"
    hours = PAPER_ROUNDS * PAPER_CLIENTS * statistics.median(row.seconds["orchestrated"]) / 3600
    paper = "the paper's training (500 rounds, 10 clients, 5 epochs), extrapolated"
    return [row, Row(paper, hours, unit=" h", note="without evaluation")]


def row_arithmetic(repeats: int) -> list[Row]:
    """Compare the fast defaults with plain arithmetic, adding one at a time."""
    data = cifar10()
    # starts with plain arithmetic and adds one change at a time
    ways = {
        "float32, NCHW, double backward": federation(data, trainer=PLAIN, differentiation="functional"),
        "forward mode": federation(data, trainer=PLAIN),
        "forward mode, channels-last": federation(data, trainer={"precision": "32-true"}),
        "forward mode, channels-last, bfloat16": federation(data, trainer={"precision": "bf16-mixed"}),
    }
    for run in ways.values():
        advance(run)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(min(repeats, 3)):
        for name, run in ways.items():
            seconds[name].append(round(advance(run), 4))
    plain, *faster = ways
    rows = []
    for name in faster:
        ratio = statistics.median(a / b for a, b in zip(seconds[plain], seconds[name], strict=True))
        note = f"{statistics.median(seconds[plain]):.3g} s, {statistics.median(seconds[name]):.3g} s"
        bar: dict[str, Any] = {"bar": 1.7, "at_least": True} if name == faster[-1] else {}
        kept = {way: seconds[way] for way in (plain, name)}
        rows.append(Row(f"round in {plain} / in {name}", ratio, seconds=kept, note=note, **bar))
    return rows


class Watched(FederationCallback):
    """Measures whole rounds, from the end of one to the end of the next, including callbacks and checkpoints."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self._last: float | None = None

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Record the share of the round's time that was not training, meta step or evaluation."""
        now = time.perf_counter()
        if self._last is not None:
            inside = sum(record.client_seconds.values()) + record.seconds["evaluate"]
            self.shares.append(1 - inside / (now - self._last))
        self._last = now


def row_outside(repeats: int) -> list[Row]:
    """Measure the time outside training, meta step and evaluation, with TensorBoard and all files of a run."""
    watched = Watched()
    with tempfile.TemporaryDirectory() as folder:
        logger = LogTo(TensorBoardLogger(folder, "", ""))
        options: dict[str, Any] = {
            "output_dir": Path(folder) / "run",
            "callbacks": [logger, watched],
            "eval_interval": 1,
        }
        federation(cifar10(1000), num_rounds=2 * repeats, **options).run()
    share = 100 * statistics.median(watched.shares[1:])
    note = "one client a round, the paper's has ten; with evaluation, TensorBoard, metrics and checkpoints"
    return [Row("time outside training, meta step and evaluation", share, 2, unit=" %", note=note)]
