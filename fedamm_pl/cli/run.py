"""The command ``run``: from the command line to the table of results."""

import datetime
import gc
import logging
import logging.handlers
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn

import pytorch_lightning as pl
import torch
import yaml
from jsonargparse import Namespace
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from tqdm.contrib.logging import logging_redirect_tqdm

from fedamm_pl.cli.help import requested
from fedamm_pl.cli.messages import one_line
from fedamm_pl.cli.parser import Parser, build_parser, dump, in_one_line, parse
from fedamm_pl.cli.shipped import expanded
from fedamm_pl.cli.signals import StopSignal
from fedamm_pl.cores import crowded, follow_cores
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.data.partitions.natural import shown_client
from fedamm_pl.data.sources.reading import UnusableFileError
from fedamm_pl.federation.callbacks import FederationCallback, LogTo, Progress
from fedamm_pl.federation.callbacks.loggers import check_loggers
from fedamm_pl.federation.estimate import estimate, typical_client
from fedamm_pl.federation.executors import Executor, Pool
from fedamm_pl.federation.fingerprint import flatten
from fedamm_pl.federation.orchestrator import FederationError, Orchestrator
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.server import ServerOptimizerError
from fedamm_pl.federation.summary import table
from fedamm_pl.files import write_atomically
from fedamm_pl.terminal import printable, say, silence

log = logging.getLogger(__name__)

SHOWN_CLASSES = 20
"""Up to this number of classes, the description of a run lists each class."""


def run(
    words: Sequence[str],
    executor: Executor | None = None,
    view: Callable[[FederatedDataModule], Any] = lambda data: data,
) -> None:
    """Run a federation as given by a command line, or print the help that it asks for.

    Args:
        words: The command line without the program's name.
        executor: Where clients train; None: as given by the command line.
        view: See :func:`~fedamm_pl.cli.parser.build_parser`.
    """
    parser, folder = build_parser(view), None
    try:
        with ExitStack() as stack:
            try:
                words = expanded(words)
                if text := requested(words):
                    return say(text)
                config = parse(parser, words)
                if config.dry_run:
                    config.logger = False
                else:
                    folder = Path(os.path.expanduser(config.output.dir or default_folder(config)))
                with deferred_log():
                    for note in (follow_cores(), crowded()):
                        if note:
                            log.warning(note)
                    orchestrator, loggers = instantiate(parser, config, folder, stack, executor)
                if folder is None:
                    return rehearse(orchestrator)
            except (ValueError, OverflowError) as error:
                parser.error(str(error))
            train(orchestrator, loggers, config, dump(parser, config), folder)
    except BrokenPipeError:  # raised by the parser's own output
        silence(sys.stdout)
    except StopSignal as stop:
        stop.hint = printable(how_to_continue(folder)) if folder else ""
        raise


def default_folder(config: Namespace) -> Path:
    """Return runs/<names of the configurations>/<date-time>."""
    stems = [Path(str(path)).stem for path in config.config or ()]
    name = "_".join(stems) or config.algorithm.class_path.rpartition(".")[2]
    # with microseconds, so that runs started at the same time get different folders
    return Path("runs") / name / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S-%f}"


def instantiate(
    parser: Parser, config: Namespace, folder: Path | None, stack: ExitStack, executor: Executor | None = None
) -> tuple[Orchestrator, list[Logger]]:
    """Build all objects that a configuration names; with a folder, also open the run until the stack is closed.

    Raises:
        ValueError: If an option is out of range, or data, module and folder do not fit together.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"Expected `seed` to be 0 to 4294967295, got {config.seed}.")
    pl.seed_everything(config.seed, verbose=False)  # initial weights are drawn when the module is made
    with in_one_line():
        parts = parser.instantiate(config)
    orchestrator = Orchestrator(
        parts.algorithm,
        parts.data,
        parts.federation,
        seed=config.seed,
        output_dir=folder,
        keep_checkpoints=config.output.keep_checkpoints,
        trainer=parts.trainer,
        executor=executor or parts.executor,
    )
    if isinstance(parts.logger, list):
        check_loggers(parts.logger, folder)
    if folder is not None:
        stack.enter_context(orchestrator.opened())
    if parts.logger is not True:
        return orchestrator, parts.logger or []
    started = orchestrator.state.round_num
    purge = started + 1 if orchestrator.state.history else 0  # remove what was logged after the last checkpoint
    return orchestrator, [TensorBoardLogger(str(folder), "", "", default_hp_metric=False, purge_step=purge)]


@contextmanager
def deferred_log() -> Iterator[None]:
    """Delay the package's log until the block has succeeded; after an error, only the error is shown."""
    logger = logging.getLogger("fedamm_pl")
    level, handlers = logger.level, logger.handlers
    held = [
        logging.handlers.MemoryHandler(1000, logging.CRITICAL + 1, target, flushOnClose=False) for target in handlers
    ]
    logger.handlers = [*held]
    logger.setLevel(logging.INFO)
    try:
        yield
        for handler in held:
            handler.flush()
    finally:
        logger.handlers = handlers
        logger.setLevel(level)


@contextmanager
def quick_collections() -> Iterator[None]:
    """Exclude imported objects from garbage collections: FedAMM with ``higher`` needs a collection in each round."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def train(orchestrator: Orchestrator, loggers: Sequence[Logger], config: Namespace, text: str, folder: Path) -> None:
    """Run a federation with a log, progress and a table of results, and report an error in one line."""
    orchestrator.callbacks += callbacks(loggers, config, text, folder)
    try:
        say(describe(orchestrator))
        write_atomically(folder / "config.yaml", text.encode())
        with logging_redirect_tqdm([logging.getLogger("fedamm_pl")]), silent_writers(), quick_collections():
            history = orchestrator.run()
    except (FederationError, UnusableFileError) as error:  # image files may be decoded during the run
        fail(str(error), folder)
    except ServerOptimizerError as error:  # found only in the first step of the server
        say(f"fedamm: error: {one_line(str(error))}", sys.stderr)
        sys.exit(1)
    except OSError as error:  # such as a full disk or a folder that has become read-only
        place = os.fsdecode(error.filename or folder)  # TensorBoard gives file names as bytes
        fail(f"{error.strerror or error} ({place}) after round {orchestrator.state.round_num}", folder)
    say(table(history))
    if orchestrator.state.ended:
        say(printable(f"ended after round {orchestrator.state.round_num}: {orchestrator.state.ended}"))
    if counted := ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in orchestrator.state.counts.items() if n):
        say(counted)
    say(f"results in {printable(str(folder))}")


def callbacks(loggers: Sequence[Logger], config: Namespace, text: str, folder: Path) -> list[FederationCallback]:
    """Return the callbacks that the options ask for."""
    options = flatten(yaml.safe_load(text))
    found: list[FederationCallback] = []
    if config.output.figures:
        from fedamm_pl.results.drawing import FigureFiles, LogFigures  # here, since it is slow to import

        for logger in loggers:
            found += [LogFigures(logger), LogTo(logger, options, text)]
        found.append(FigureFiles(folder / "figures"))
    else:
        found += [LogTo(logger, options, text) for logger in loggers]
    return [*found, Progress()] if config.output.progress == "auto" else found


@contextmanager
def silent_writers() -> Iterator[None]:
    """Keep threads that cannot write from printing tracebacks; TensorBoard raises their error in the next call."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    yield
    threading.excepthook = before  # not after an error: the thread may outlive the block


def rehearse(orchestrator: Orchestrator) -> None:
    """Print what would run, and the cost of a round as estimated from local training and an evaluation."""
    say(describe(orchestrator))
    held = (orchestrator.data.client_class_counts > 0).sum(1)
    say(f"classes per client: {held.min()} to {held.max()}")
    config, data = orchestrator.config, orchestrator.data
    client, images = typical_client(orchestrator), len(data.images.test_labels)
    together = min(orchestrator.executor.together, num_sampled(data.num_clients, config.client_fraction))
    name = shown_client(client, data.client_names)
    measured = "one client" if together == 1 else f"{together} clients side by side"
    beside = f" ({held_out(data)})" if data.has_validation or data.local_test else ""
    say(
        f"measuring a local epoch of {f'client {name}' if together == 1 else measured} ({data.client_size(client)} examples) and "
        f"an evaluation of up to {images} test examples{beside} ..."
    )
    try:
        cost = estimate(orchestrator)
    except FederationError as error:
        say(f"fedamm: error: {one_line(str(error))}", sys.stderr)
        sys.exit(1)
    sampled = num_sampled(data.num_clients, config.client_fraction)
    weights = sum(value.nbytes for value in orchestrator.module.model.state_dict().values())
    say(
        f"a round: {sampled} clients, {config.local_epochs} local epochs; clients receive {cost.received / 1e6:.2f} MB "
        f"and send {cost.sent / 1e6:.2f} MB in all (the classifier has {weights / 1e6:.2f} MB)"
    )
    seconds = {name: getattr(cost, name) for name in ("train", "meta", "evaluate")}
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    total = sum(seconds.values()) * config.num_rounds
    say(
        f"estimated time of a round: {sum(seconds.values()):.2f} s ({parts}), measured on {cost.epochs} of "
        f"{config.local_epochs} local epochs of {measured} and on {cost.test_images} of {images} test examples; "
        f"{config.num_rounds} round{'s' if config.num_rounds > 1 else ''}: {datetime.timedelta(seconds=round(total))} (h:mm:ss)"
    )


def describe(orchestrator: Orchestrator) -> str:
    """Return a description of the run in a few lines."""
    module, data, info = orchestrator.server.module, orchestrator.data, orchestrator.data.info
    sizes = [data.client_size(client) for client in range(data.num_clients)]
    least, most = min(sizes), max(sizes)
    network = module.hparams.get("model") or type(module.model).__name__
    factor, parameters = data.imbalance_factor, sum(value.numel() for value in module.model.parameters())
    few_classes, counts = data.num_classes <= SHOWN_CLASSES, info["class_counts"]
    names = [printable(name) for name in info["class_names"]] if few_classes else []
    groups = "; ".join(
        f"{name} {', '.join(names[label] for label in members) if names else len(members)}"
        for name, members in info["shot_groups"].items()
        if members
    )
    started = orchestrator.state.round_num
    return "\n".join(
        [
            f"{type(module).__name__} with {network} ({parameters:,} parameters) on {module.device}, "
            f"{orchestrator.trainer.resolved_precision}, {threads(orchestrator.executor)}",
            f"{data.dataset_name}: {sum(counts)} training examples, imbalance factor {factor:.3g} "
            f"({'a class has no examples' if not factor else f'IF {1 / factor:.4g}'}), "
            f"{data.num_clients} clients of {f'{least} examples each' if least == most else f'{least} to {most} examples'}",
            f"examples per class: {' '.join(map(str, counts)) if few_classes else f'{max(counts)} to {min(counts)}'}",
            f"shot groups by {info['shot_rule']}: {groups}",
            *([data.left_over] if data.left_over else []),
            *([held_out(data)] if data.has_validation or data.local_test else []),
            *([f"continuing after round {started}"] if started else []),
        ]
    )


def held_out(data: FederatedDataModule) -> str:
    """Return a line on the validation and local test examples, and on clients without local test examples."""
    parts, sizes = [], [len(mine) for mine in data.local_test]
    if data.has_validation:
        parts.append(f"{len(data.validation[2])} validation examples")
    if sizes:
        without = f"; {sizes.count(0)} with fewer than two hold none out" if 0 in sizes else ""
        parts.append(
            f"{sum(sizes)} examples held out by {len(sizes) - sizes.count(0)} clients for local tests{without}"
        )
    return f"beside the test set: {', '.join(parts)}"


def threads(executor: Executor) -> str:
    """Return the number of threads, and of worker processes if there are any, as text."""
    count, workers = torch.get_num_threads(), ""
    if isinstance(executor, Pool):
        count, workers = executor.threads(count), f" in each of {executor.num_workers} workers"
    return f"{count} thread{'s' if count > 1 else ''}{workers}"


def fail(reason: str, folder: Path) -> NoReturn:
    """Print one line to standard error and exit with status 1."""
    say(f"fedamm: error: {one_line(reason)}; {printable(how_to_continue(folder))}", sys.stderr)
    sys.exit(1)


def how_to_continue(folder: Path) -> str:
    """Return a hint on how to continue the run."""
    return f"the same command with --output.dir {folder} continues after the last completed round"
