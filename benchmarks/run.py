"""Measure where the time goes, as ratios inside one run.

    python benchmarks/run.py [--rows round arithmetic ...] [--repeats 5] [--output benchmarks/results.json]

prints a table and a profile and writes both, with every timing, the hardware and the versions, to a file. It takes about a
quarter of an hour on two cores; nothing else should run beside it. Each ratio is the median over pairs that were timed in
turn. The images are noise of the shape of CIFAR-10: no row depends on what they show. On a GPU the same rows run there.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

import torch
from pytorch_lightning.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.functional import cross_entropy

from fedamm_pl import FedAMM, FedAvg, FederatedDataModule, Orchestrator
from fedamm_pl.data import ImageData
from fedamm_pl.data.client import Batch
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, RoundRecord
from fedamm_pl.federation.fingerprint import versions
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.seeding import derive_seed

State = dict[str, Tensor]
MOMENTUM, WEIGHT_DECAY, LR, META_LR = 0.9, 5e-4, 0.01, 0.01
PLAIN: dict[str, Any] = {"precision": "32-true", "memory_format": "contiguous_format"}
PAPER_CLIENTS, PAPER_ROUNDS = 10, 500


@dataclass
class Row:
    """A line of the table."""

    what: str
    measured: float
    bar: float | None = None
    at_least: bool = False
    """Whether the bar is a lower one."""
    unit: str = "x"
    seconds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    @property
    def verdict(self) -> str:
        """Whether the bar is met."""
        if self.bar is None:
            return ""
        return "met" if (self.measured >= self.bar if self.at_least else self.measured <= self.bar) else "MISSED"

    def cells(self) -> list[str]:
        """What the table shows."""
        sign = "at least" if self.at_least else "at most"
        bar = "" if self.bar is None else f"{sign} {self.bar:g}{self.unit}"
        return [self.what, f"{self.measured:.3g}{self.unit}", bar, self.verdict, self.note]


def pairs(what: str, first: Callable[[], float], second: Callable[[], float], repeats: int, **options: Any) -> Row:
    """Time two things in turn after a first go of each; the row is the median of first over second.

    Args:
        what: What the ratio is.
        first: Does it once and returns its seconds.
        second: The same for the yardstick.
        repeats: Pairs to time.
        options: Of the row; ``names`` are those of the two.
    """
    names = options.pop("names", ("first", "second"))
    first(), second()
    both = [(first(), second()) for _ in range(repeats)]
    ratio = statistics.median(a / b for a, b in both)
    seconds = dict(
        zip(names, ([round(value, 4) for value in column] for column in zip(*both, strict=True)), strict=True)
    )
    medians = ", ".join(f"{name} {statistics.median(values):.3g} s" for name, values in seconds.items())
    return Row(what, ratio, seconds=seconds, **{"note": medians, **options})


def timed(function: Callable[[], Any]) -> Callable[[], float]:
    """Return a function that calls another and returns its seconds, the GPU's included."""

    def call() -> float:
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter() - start

    return call


class Noise(FederatedDataModule):
    """Noise in place of a data set: ``dataset`` is ``noise-<images a class>-<size>-<channels>-<test images>``."""

    def load_images(self) -> ImageData:
        """Draw the images."""
        per_class, size, channels, tests = map(int, self.hparams["dataset"].split("-")[1:])
        generator = torch.Generator().manual_seed(0)
        shape = (10 * per_class + tests, channels, size, size)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.arange(len(images)) % 10
        cut = 10 * per_class
        return ImageData(images[:cut], labels[:cut], images[cut:], labels[cut:], [str(label) for label in range(10)])


def cifar10(num_test: int = 100, **options: Any) -> Noise:
    """CIFAR-10-LT, imbalance factor 0.01, 20 clients."""
    defaults: dict[str, Any] = {"imbalance_factor": 0.01, "num_clients": 20, "batch_size": 64}
    return Noise(f"noise-5000-32-3-{num_test}", **{**defaults, **options})


class Rounds(FederationCallback):
    """Keeps the seconds of the last round and lets a federation go on by one."""

    def on_round_end(self, orchestrator: Orchestrator, record: RoundRecord) -> None:
        """Keep them, without the evaluation."""
        self.seconds = sum(seconds for kind, seconds in record.seconds.items() if kind != "evaluate")
        self.kinds = record.seconds


def federation(data: FederatedDataModule, **options: Any) -> Orchestrator:
    """FedAMM with ResNet-32, one client a round: a tenth of the paper's round, in its proportions."""
    trainer = TrainerConfig(**options.pop("trainer", {}))
    differentiation = options.pop("differentiation", "forward")
    torch.manual_seed(0)
    module = FedAMM(10, data.in_channels, "resnet32", LR, info=data.info, differentiation=differentiation)
    defaults: dict[str, Any] = {"num_rounds": 0, "client_fraction": 0.05, "local_epochs": 5, "eval_interval": 10**6}
    return Orchestrator(module, data, **{**defaults, "callbacks": [Rounds()], "trainer": trainer, **options})


def advance(run: Orchestrator) -> float:
    """Run one more round and return its seconds without the evaluation."""
    run.num_rounds += 1
    run.run()
    (rounds,) = (callback for callback in run.callbacks if isinstance(callback, Rounds))
    return rounds.seconds


# The bare loop: the arithmetic of a round, and nothing else.


@contextmanager
def arithmetic(run: Orchestrator) -> Iterator[None]:
    """The precision of a run, as torch has it."""
    enabled = run.trainer.resolved_precision == "bf16-mixed"
    # without a cache, which would keep the weights of the first step in bfloat16 for all that follow
    with torch.autocast(run.module.device.type, torch.bfloat16, enabled, cache_enabled=False):
        yield


@dataclass
class Prepared:
    """What a client and the server's meta set put into a round, as normalised tensors on the device."""

    num_examples: int
    batches: list[Batch]
    support: Batch
    meta: Batch


def prepare(run: Orchestrator, round_num: int) -> list[Prepared]:
    """Draw what the clients of a round will draw."""

    def ready(batch: Batch) -> Batch:
        return run.module.prepare(batch[0]), batch[1].to(run.module.device)

    prepared = []
    for client in sample_clients(run.data.num_clients, run.client_fraction, run.seed, round_num):
        data, seed = run.data.client(client), derive_seed(run.seed, "client", round_num, client)
        loader = data.train_loader(seed)
        batches = [ready(batch) for _ in range(run.local_epochs) for batch in loader]
        meta = run.data.meta_batch(derive_seed(run.seed, "meta", round_num, client, 0))
        prepared.append(Prepared(data.num_examples, batches, ready(data.support(seed)), ready(meta)))
    return prepared


def weighted(losses: Tensor, raw: Tensor) -> Tensor:
    """Weighted loss of a batch."""
    return (raw / raw.sum() * losses).sum()


def sgd(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.SGD:
    """The method's optimizer."""
    return torch.optim.SGD(parameters, lr, MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def bare_meta_step(network: nn.Module, weight_net: nn.Module, client: Prepared) -> State:
    """Return v_k: virtual step, meta gradient, and a directional derivative in place of the double backward."""
    (images, labels), (meta_images, meta_labels) = client.support, client.meta

    def losses_at(params: State) -> Tensor:
        buffers = {name: value.clone() for name, value in network.named_buffers()}
        return cross_entropy(functional_call(network, {**params, **buffers}, (images,)), labels, reduction="none")

    params = {name: value.detach().requires_grad_() for name, value in network.named_parameters()}
    losses = losses_at(params)
    constant = losses.detach().requires_grad_()
    (slopes,) = torch.autograd.grad(weighted(constant, weight_net(constant)), constant, create_graph=True)
    gradients = torch.autograd.grad(losses, list(params.values()), slopes.detach())
    stepped = {
        name: (value - LR * gradient).detach().requires_grad_()
        for (name, value), gradient in zip(params.items(), gradients, strict=True)
    }
    buffers = {name: value.clone() for name, value in network.named_buffers()}
    meta_loss = cross_entropy(functional_call(network, {**stepped, **buffers}, (meta_images,)), meta_labels)
    direction = torch.autograd.grad(meta_loss, list(stepped.values()))
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            name: forward_ad.make_dual(value.detach(), tangent)  # type: ignore[no-untyped-call]
            for (name, value), tangent in zip(params.items(), direction, strict=True)
        }
        inner = forward_ad.unpack_dual(losses_at(duals)).tangent  # type: ignore[no-untyped-call]
    values = torch.autograd.grad(-LR * (slopes * inner).sum(), list(weight_net.parameters()))
    return {
        name: (value - (1 + MOMENTUM) * META_LR * (gradient + WEIGHT_DECAY * value)).detach()
        for (name, value), gradient in zip(weight_net.named_parameters(), values, strict=True)
    }


def bare_round(network: nn.Module, weight_net: nn.Module, clients: list[Prepared]) -> State:
    """Run a round from the weights that the two networks hold and return the averages."""
    start = {name: value.clone() for name, value in network.state_dict().items()}
    sums: State = {}
    total = sum(client.num_examples for client in clients)
    for client in clients:
        network.load_state_dict(start)
        network.train()
        trained = {f"weight_net.{name}": value for name, value in bare_meta_step(network, weight_net, client).items()}
        optimizer = sgd(network.parameters(), LR)
        seen = torch.zeros((), device=client.meta[0].device)
        for images, labels in client.batches:
            losses = cross_entropy(network(images), labels, reduction="none")
            with torch.no_grad():
                raw = weight_net(losses)
            optimizer.zero_grad()
            weighted(losses, raw).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            seen += losses.detach().sum()
        trained |= {f"model.{name}": value for name, value in network.state_dict().items()}
        for name, value in trained.items():
            sums[name] = sums.get(name, 0) + client.num_examples / total * value.double()
        float(seen)  # a loop that nobody watches would be no fair yardstick
    return sums


# The rows


def row_round(repeats: int) -> list[Row]:
    """A round against the bare loop, and what the paper's experiment would take."""
    run = federation(cifar10())
    advance(run)
    own = FedAMM(10, 3, "resnet32", info=run.data.info).to(run.module.device)  # the loop's own networks, plain modules
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
    """The fast defaults against the plain way, and each of them alone."""
    data = cifar10()
    # from the plain way, one change after the other
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


def row_evaluation(repeats: int) -> list[Row]:
    """An evaluation of 10,000 images against bare forward passes, and bfloat16 against float32."""
    data = cifar10(10_000)
    runs = {precision: federation(data, trainer={"precision": precision}) for precision in ("bf16-mixed", "32-true")}
    rows = []
    for precision, run in runs.items():
        batches = [run.module.prepare(images) for images, _ in run.data.test_dataloader()]
        network = run.module.model.eval()

        def bare(run: Orchestrator = run, batches: list[Tensor] = batches, network: nn.Module = network) -> None:
            with torch.inference_mode(), arithmetic(run):
                for images in batches:
                    network(images)

        what = f"evaluation of 10,000 images / bare forward passes, {precision}"
        names = ("evaluation", "bare")
        rows.append(pairs(what, timed(run.evaluate), timed(bare), repeats, bar=1.1, names=names))
    first, second = (timed(run.evaluate) for run in runs.values())
    what = "evaluation in bfloat16 / in float32"
    return [*rows, pairs(what, first, second, repeats, bar=0.7, names=("bf16-mixed", "32-true"))]


class Watched(FederationCallback):
    """Measures whole rounds, from the end of one to that of the next, callbacks and checkpoints included."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self._last: float | None = None

    def on_round_end(self, orchestrator: Orchestrator, record: RoundRecord) -> None:
        """Note which share was neither training, nor meta step, nor evaluation."""
        now = time.perf_counter()
        if self._last is not None:
            inside = sum(record.seconds[kind] for kind in ("train", "meta", "evaluate"))
            self.shares.append(1 - inside / (now - self._last))
        self._last = now


def row_outside(repeats: int) -> list[Row]:
    """Time outside training, meta step and evaluation, with TensorBoard and all files of a run directory."""
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


FIRST_STEP = """
import os, sys
from fedamm_pl import FedAMM
from fedamm_pl.cli.main import main
FedAMM.training_step = lambda *_: os._exit(0)
main(sys.argv[1:])
"""


def row_start(repeats: int) -> list[Row]:
    """Start of the program against the import of the libraries that it needs."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    bare = [sys.executable, "-c", "import pytorch_lightning, torchvision"]
    bare_without_end = [sys.executable, "-c", "import os, pytorch_lightning, torchvision; os._exit(0)"]
    program, quickstart = [sys.executable, "orchestrate.py"], ["--config", "configs/quickstart.yaml"]

    def start(command: list[str], status: int = 0) -> Callable[[], float]:
        def call() -> None:
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, check=False)
            assert done.returncode == status, done.stderr

        return timed(call)

    names = ("program", "import pytorch_lightning, torchvision")
    rows = [
        pairs(
            "fedamm --help / import of Lightning and torchvision",
            start([*program, "--help"]),
            start(bare),
            repeats,
            bar=1.2,
            names=names,
        ),
        pairs(
            "a configuration error / import",
            start([*program, *quickstart, "--data.num_clients", "many"], 2),
            start(bare),
            repeats,
            bar=1.2,
            names=names,
        ),
    ]
    with tempfile.TemporaryDirectory() as folder:
        count = iter(range(1000))

        def first_step() -> float:
            output = ["--output.dir", f"{folder}/{next(count)}"]
            return start([sys.executable, "-c", FIRST_STEP, *quickstart, *output])()

        what = "first training step of the quickstart / import"
        return [*rows, pairs(what, first_step, start(bare_without_end), repeats, bar=1.5, names=names)]


def memory_so_far() -> float:
    """Return the peak memory of this process in MiB."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 2**10
    # not on Linux, where it counts what the parent had when it started this process
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def peak_memory(num_clients: int, num_rounds: int = 40) -> tuple[float, float]:
    """Return the peak memory in MiB after a quarter of the rounds and after all, ten clients a round."""
    peaks: list[float] = []

    class Peak(FederationCallback):
        def on_round_end(self, orchestrator: Orchestrator, record: RoundRecord) -> None:
            peaks.append(memory_so_far())

    torch.set_num_threads(1)
    data = Noise("noise-6010-28-1-1000", num_clients=num_clients, imbalance_factor=1.0, partition="iid")
    network = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))  # small: what the clients cost shall show
    module = FedAMM(10, 1, network, info=data.info, differentiation="forward")
    with tempfile.TemporaryDirectory() as folder:
        options: dict[str, Any] = {"client_fraction": 10 / num_clients, "local_epochs": 1, "output_dir": folder}
        Orchestrator(module, data, num_rounds=num_rounds, callbacks=[Peak()], **options).run()
    return peaks[num_rounds // 4], peaks[-1]


def row_memory(repeats: int) -> list[Row]:
    """Memory with many clients against few, over the same data; it needs no repeats."""
    results = []
    for num_clients in (100, 10_000):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:  # a process of its own: a peak stays
            results.append(pool.submit(peak_memory, num_clients).result())
    (early, few), many = results[0], results[1][1]
    note = f"{many:.0f} / {few:.0f} MiB, the same 60,000 images"
    return [
        Row("peak memory, 10,000 clients / 100", many / few, 1.1, note=note),
        Row("peak memory after 40 rounds / after 10", few / early, 1.05, note="100 clients"),
    ]


def row_clients(repeats: int) -> list[Row]:
    """Time for one client as more are sampled."""
    data = Noise("noise-6010-8-1-100", num_clients=1000, imbalance_factor=1.0, partition="iid")
    trainer = TrainerConfig("cpu", precision="32-true")

    def run(sampled: int) -> Orchestrator:
        network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        module = FedAvg(10, 1, network, info=data.info)
        options: dict[str, Any] = {"client_fraction": sampled / 1000, "local_epochs": 1, "eval_interval": 10**6}
        return Orchestrator(module, data, num_rounds=0, callbacks=[Rounds()], trainer=trainer, **options)

    few, more, many = run(10), run(100), run(1000)

    def one_client(run: Orchestrator, sampled: int) -> Callable[[], float]:
        return lambda: advance(run) / sampled

    names = ("more", "10 clients")
    what = "time of a client with {} sampled / with 10 (60 images, a linear network)"
    return [
        pairs(what.format("100"), one_client(more, 100), one_client(few, 10), repeats, bar=1.1, names=names),
        pairs(what.format("1,000"), one_client(many, 1000), one_client(few, 10), repeats, bar=1.1, names=names),
    ]


def row_data(repeats: int) -> list[Row]:
    """Crop, flip and normalisation against the training step."""
    run = federation(cifar10())
    client = max(range(run.data.num_clients), key=run.data.client_size)
    data = run.data.client(client)
    module, network = run.module, run.module.model.train()
    optimizer = sgd(network.parameters(), LR)
    batches = [(module.prepare(images), labels.to(module.device)) for images, labels in data.train_loader(0)]

    def read() -> None:
        for images, _ in data.train_loader(0):
            module.prepare(images)

    def train() -> None:
        with arithmetic(run):
            for images, labels in batches:
                optimizer.zero_grad()
                cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    row = pairs(
        "crop, flip and normalisation / training step", timed(read), timed(train), repeats, names=("data", "step")
    )
    row.measured, row.bar, row.unit = 100 * row.measured, 3, " %"
    return [row]


OBSERVED = """
import collections, json, sys, time
from fedamm_pl import Orchestrator
from fedamm_pl.cli.main import main

seconds = collections.Counter()


def timed_call(self, hook, *args):
    for callback in [*self.callbacks, *self._files]:
        start = time.perf_counter()
        getattr(callback, hook)(self, *args)
        seconds[type(callback).__name__] += time.perf_counter() - start


Orchestrator._call, run = timed_call, Orchestrator.run


def timed_run(self):
    start = time.perf_counter()
    history = run(self)
    seconds["run"] = time.perf_counter() - start
    return history


Orchestrator.run = timed_run
main(sys.argv[1:])
print(json.dumps(seconds))
"""


def row_watching(repeats: int) -> list[Row]:
    """The quickstart with everything to look at, against the same run without the time that this took."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(min(repeats, 3)):
            options = ["--config", "configs/quickstart.yaml", "--output.dir", f"{folder}/{number}"]
            command = [sys.executable, "-c", OBSERVED, *options]
            done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    parts = {name: statistics.median(run[name] for run in runs) for name in ("LogTo", "FigureFiles", "Progress", "run")}
    note = "TensorBoard {LogTo:.2f} s, figures/ {FigureFiles:.2f} s, progress {Progress:.3f} s of {run:.1f} s".format(
        **parts
    )
    ratios = [run["run"] / (run["run"] - run["LogTo"] - run["FigureFiles"] - run["Progress"]) for run in runs]
    seconds = {name: [round(run[name], 4) for run in runs] for name in parts}
    what = "quickstart with TensorBoard, figures and progress / without"
    return [Row(what, statistics.median(ratios), 1.02, seconds=seconds, note=note)]


ROWS: dict[str, Callable[[int], list[Row]]] = {
    "round": row_round,
    "arithmetic": row_arithmetic,
    "evaluation": row_evaluation,
    "outside": row_outside,
    "start": row_start,
    "memory": row_memory,
    "clients": row_clients,
    "data": row_data,
    "watching": row_watching,
}


# The profile

KINDS = {
    "convolution, forward": ("convolution", "conv2d", "mkldnn_convolution", "cudnn_convolution", "onednn"),
    "BatchNorm": ("batch_norm",),
    "optimizer, without its additions": ("Optimizer.step", "_fused_sgd", "_foreach"),
    "ReLU, addition, padding": ("relu", "threshold", "add", "pad", "slice"),
    "casts and copies": ("copy_", "_to_copy", "clone", "contiguous", "fill_", "zero_"),
}


def kind_of(name: str) -> str:
    """Return the kind of an operator."""
    if "convolution_backward" in name:
        return "convolution, backward"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


def profile() -> dict[str, float]:
    """Return the share of a round's operator time by kind, in percent."""
    run = federation(cifar10())
    advance(run)
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        advance(run)
    shares: dict[str, float] = {}
    for event in profiler.key_averages():
        seconds = event.self_device_time_total if torch.cuda.is_available() else event.self_cpu_time_total
        shares[kind_of(event.key)] = shares.get(kind_of(event.key), 0) + seconds
    total = sum(shares.values())
    return {kind: 100 * value / total for kind, value in sorted(shares.items(), key=lambda item: -item[1])}


def hardware() -> dict[str, Any]:
    """Return what it ran on."""
    names = [line.partition(": ")[2] for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": next(iter(names), platform.processor()),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "precision chosen by auto": TrainerConfig().resolved_precision,
        "versions": versions(),
    }


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def markdown(rows: Iterable[list[str]], head: list[str]) -> str:
    """Format a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, "profile"], default=[*ROWS, "profile"])
    parser.add_argument("--repeats", type=int, default=5, help="pairs of timings a row")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "benchmarks/results.json")
    args = parser.parse_args()
    found = hardware()
    print(json.dumps(found), flush=True)
    rows: list[Row] = []
    for name in args.rows:
        for row in ROWS[name](args.repeats) if name in ROWS else []:
            print(" | ".join(row.cells()), flush=True)
            rows.append(row)
    shares = profile() if "profile" in args.rows else {}
    content = {"hardware": found, "rows": [{**asdict(row), "verdict": row.verdict} for row in rows], "profile": shares}
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    print("\n" + markdown([row.cells() for row in rows], ["what", "measured", "bar", "", ""]))
    if shares:
        cells = [[kind, f"{share:.1f} %"] for kind, share in shares.items()]
        print("\n" + markdown(cells, ["where a round's time goes", "share"]))


if __name__ == "__main__":
    main()
