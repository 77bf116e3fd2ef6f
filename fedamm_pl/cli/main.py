"""The command line: a typed configuration, from YAML files and options, to a finished run."""

import argparse
import dataclasses
import datetime
import difflib
import importlib
import inspect
import itertools
import json
import logging
import logging.handlers
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import pytorch_lightning as pl
import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from pytorch_lightning.loggers import Logger, TensorBoardLogger
from tqdm.contrib.logging import logging_redirect_tqdm

from fedamm_pl import FederatedDataModule, FederatedModule, Orchestrator, __version__
from fedamm_pl.federation.callbacks import FigureFiles, LogTo, Progress
from fedamm_pl.federation.fingerprint import flatten
from fedamm_pl.federation.orchestrator import FederationError
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.summary import table
from fedamm_pl.federation.trainer import TrainerConfig
from fedamm_pl.files import lock_folder, write_atomically
from fedamm_pl.results.comparison import CompareConfig, check_folders, execute, plan, write_results
from fedamm_pl.results.report import write_report
from fedamm_pl.results.runs import load_all

DESCRIPTION = """FedAMM: Long-Tailed Federated Learning via Aggregated Meta Mapping.
Trains a classifier over simulated clients with long-tailed data and writes metrics, checkpoints and the model to a folder.
"""
NOT_OPTIONS = {"self", "module", "data", "seed", "callbacks", "output_dir", "keep_checkpoints", "trainer", "executor"}
SHOWN_CLASSES = 20  # up to so many, the opening lines list classes one by one
LINKED = ("num_classes", "in_channels", "info")  # what the algorithm learns from the data


@dataclasses.dataclass(frozen=True)
class OutputConfig:
    """Where results go and what is shown."""

    dir: str | None = None
    """Folder of the run; by default runs/<config name>/<date-time>. An interrupted run in it is continued."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints to keep, beside the best."""
    progress: Literal["auto", "none"] = "auto"
    """auto shows a bar on a terminal and a line per evaluation elsewhere; none shows only the closing table."""
    figures: bool = True
    """Draw figures, into the folder's figures/ as PDF and PNG and for loggers that take images."""


class Parser(ArgumentParser):
    """A parser whose errors are one line that names the option, what it got and what is allowed; exit status 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print one line to standard error and exit."""
        print(f"fedamm: error: {one_line(message)}", file=sys.stderr)
        sys.exit(2)


def build_parser() -> Parser:
    """Return the parser of the program."""
    parser = Parser(prog="fedamm", description=DESCRIPTION, allow_abbrev=False, version=__version__)
    parser.add_argument(
        "--config", action="config", help="A YAML file with these options; later ones override earlier."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of split, initial weights, sampling and training.")
    parser.add_argument("--data", type=FederatedDataModule, default={"class_path": "fedamm_pl.FederatedDataModule"})
    parser.add_argument("--algorithm", type=FederatedModule, required=True, help="FedAMM, FedAvg, or an import path.")
    parser.add_class_arguments(Orchestrator, "federation", skip=NOT_OPTIONS, instantiate=False)
    with attribute_docstrings():
        parser.add_argument("--trainer", type=TrainerConfig, default=TrainerConfig())
        parser.add_argument(
            "--logger",
            type=bool | list[Logger],
            default=True,
            help="A list of Lightning loggers; true is TensorBoard in the run's folder, false none.",
        )
        parser.add_argument("--output", type=OutputConfig, default=OutputConfig())
    parser.add_argument(
        "--dry_run", action="store_true", help="Print what would run and what a round costs, write nothing, and stop."
    )
    parser.link_arguments("seed", "data.init_args.seed")
    for name in LINKED:
        parser.link_arguments("data", f"algorithm.init_args.{name}", _attribute(name), apply_on="instantiate")
    return parser


@contextmanager
def attribute_docstrings() -> Iterator[None]:
    """Make the line under a field its help. Only here: the parser would read the sources of all of Lightning's classes."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        yield
    finally:
        set_parsing_settings(docstring_parse_attribute_docstrings=False)


def _attribute(name: str) -> Callable[[FederatedDataModule], Any]:
    def attribute(data: FederatedDataModule) -> Any:
        return getattr(data, name)

    attribute.__name__ = name  # shown by --help
    return attribute


# Messages


def option_names() -> dict[str, str]:
    """Return parameter name -> option, for messages of the library, which knows no options."""
    options = {name: f"--output.{name}" for name in (field.name for field in dataclasses.fields(OutputConfig))}
    options.update({name: f"--trainer.{name}" for name in (field.name for field in dataclasses.fields(TrainerConfig))})
    owners: list[tuple[str, type]] = [("federation", Orchestrator), ("data", FederatedDataModule)]
    owners += [("algorithm", algorithm) for algorithm in algorithm_classes()]
    for group, owner in owners:
        for name in inspect.signature(owner).parameters:
            if name not in NOT_OPTIONS and name not in LINKED:
                options[name] = f"--{group}.{name}"
    return {**options, "output_dir": "--output.dir", "seed": "--seed"}


def algorithm_classes() -> list[type[FederatedModule]]:
    """Return the algorithms that are imported, FederatedModule left out."""
    found, queue = [], [FederatedModule]
    while queue:
        subclasses = queue.pop().__subclasses__()
        found += subclasses
        queue += subclasses
    return found


def one_line(message: str) -> str:
    """Reword a parser's or the library's message as one line that names options."""
    options = option_names()
    message = " ".join(line.strip(" -") for line in message.splitlines() if line.strip(" -"))
    # what the data said when the algorithm asked it for its classes and channels
    message = re.sub(r"^Call to compute_fn of link .*?\) failed: ", "", message)
    message = re.sub(r"`(\w+)`", lambda match: options.get(match[1], match[0]), message)
    if unknown := re.search(r"(?:Option|accept option) '([\w.]+)'|unrecognized arguments: (.*)", message):
        name = unknown[1] or unknown[2].split()[0].split("=")[0].lstrip("-")
        close = difflib.get_close_matches(name.split(".")[-1], options, 1)
        return f"unknown option {name}" + (f"; did you mean {options[close[0]]}?" if close else "; see --help")
    if wrong := re.match(r'Parser key "([\w.]+)": (.*)', message):
        name = options.get(wrong[1], f"--{wrong[1]}")
        if name == "--algorithm":
            names = ", ".join(sorted(algorithm.__name__ for algorithm in algorithm_classes()))
            got = re.sub(r"^Expected a dot import path string: |^Problem with given class_path ", "", wrong[2])
            return f"Expected --algorithm to be one of {names} or an import path of a FederatedModule, got {got}"
        text = re.sub(r"typing\.|<class '(\w+)'>", lambda match: match[1] or "", wrong[2])
        text = re.sub(r"Literal\[(.*?)\]", r"one of \1", text)
        text = re.sub(r"^Expected an? (.*?)\. Got value: (.*)", r"to be \1, got \2", text)
        return f"Expected {name} {text}" if text.startswith("to be") else f"{name}: {text}"
    return message


# The run


def main(args: Sequence[str] | None = None) -> None:
    """Run the program.

    Args:
        args: The command line without the program's name; by default that of the process.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # your own networks, data and algorithms, wherever the program itself lies
    folder = None
    try:
        with stop_signals():
            parser, words = build_parser(), list(sys.argv[1:] if args is None else args)
            if words[:1] == ["compare"]:
                return run_comparison(words[1:])
            if words[:1] == ["report"]:
                return run_report(words[1:])
            try:
                check_config_files(words)
                config = parser.parse_args(words)
                check_values(config)
                folder = Path(config.output.dir or default_folder(config))
                with deferred_log():
                    orchestrator, loggers = instantiate(parser, config, None if config.dry_run else folder)
            except (ValueError, OverflowError) as error:
                parser.error(str(error))
            if config.dry_run:
                return rehearse(orchestrator)
            run(parser, config, folder, orchestrator, loggers)
    except StopSignal as stop:
        print(f"\nstopped by {stop.signal.name}", end="", file=sys.stderr)
        print(f"; {how_to_continue(folder)}" if folder else "", file=sys.stderr)
        sys.exit(stop.code)
    finally:
        flush_output()


def flush_output() -> None:
    """Flush the standard output now, where an error can be handled: its reader may have gone."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # else the interpreter would report it at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def run(parser: Parser, config: Namespace, folder: Path, orchestrator: Orchestrator, loggers: Sequence[Logger]) -> None:
    """Run a federation, with what the command line adds: log, progress, the closing table, one line for an error."""
    text = dump(parser, config)
    options = flatten(yaml.safe_load(text))
    orchestrator.callbacks += [LogTo(logger, options, text, config.output.figures) for logger in loggers]
    if config.output.figures:
        orchestrator.callbacks.append(FigureFiles(folder / "figures"))
    if config.output.progress == "auto":
        orchestrator.callbacks.append(Progress())
    try:
        write_atomically(folder / "config.yaml", text.encode())
        print(describe(orchestrator))
        with logging_redirect_tqdm([logging.getLogger("fedamm_pl")]), silent_writers():
            history = orchestrator.run()
    except FederationError as error:
        fail(str(error), folder)
    except OSError as error:  # a full disk, a folder that has become read-only
        place = os.fsdecode(error.filename or folder)  # TensorBoard's names are bytes
        fail(f"{error.strerror or error} ({place}) after round {orchestrator.state.round_num}", folder)
    print(table(history))
    if counted := ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in orchestrator.state.counts.items() if n):
        print(counted)
    print(f"results in {folder}")


def rehearse(orchestrator: Orchestrator) -> None:
    """Print what would run, and what a round costs by the measure of one client and one evaluation."""
    print(describe(orchestrator))
    counts = orchestrator.data.client_class_counts
    held = (counts > 0).sum(1)
    print(f"classes per client: {held.min()} to {held.max()}")
    try:
        cost = orchestrator.estimate()
    except FederationError as error:
        print(f"fedamm: error: {one_line(str(error))}", file=sys.stderr)
        sys.exit(1)
    seconds = {name: cost[name] for name in ("train", "meta", "evaluate")}
    sampled = num_sampled(orchestrator.data.num_clients, orchestrator.client_fraction)
    weights = sum(value.nbytes for value in orchestrator.module.model.state_dict().values())
    print(
        f"a round: {sampled} clients, {orchestrator.local_epochs} local epochs; clients receive "
        f"{cost['received'] / 1e6:.2f} MB and send {cost['sent'] / 1e6:.2f} MB in all (the classifier has {weights / 1e6:.2f} MB)"
    )
    parts = ", ".join(f"{name} {value:.2f} s" for name, value in seconds.items())
    total = sum(seconds.values()) * orchestrator.num_rounds
    print(
        f"estimated time of a round: {sum(seconds.values()):.2f} s ({parts}), measured on one client and one evaluation; "
        f"{orchestrator.num_rounds} rounds: {datetime.timedelta(seconds=round(total))} (h:mm:ss)"
    )


@contextmanager
def silent_writers() -> Iterator[None]:
    """Keep threads that cannot write from printing tracebacks: TensorBoard's hands the error on to the next call."""
    before = threading.excepthook

    def hook(args: threading.ExceptHookArgs) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    yield
    threading.excepthook = before  # not after an error: the thread may outlive the block


def run_comparison(words: list[str]) -> None:
    """Run ``fedamm compare``."""
    parser = Parser(prog="fedamm compare", description="Methods x seeds x settings in one table.", allow_abbrev=False)
    parser.add_argument("--config", action="config", help="A YAML file with these options.")
    with attribute_docstrings():
        parser.add_class_arguments(CompareConfig, instantiate=False)
    run_parser = build_parser()

    @cache
    def check_class(class_path: str, options: str) -> None:
        # found now, not in a process of its own hours later; the data are not loaded for it
        module, _, name = class_path.rpartition(".")
        getattr(importlib.import_module(module), name)(**json.loads(options))

    def resolve(options: dict[str, Any]) -> tuple[str, int]:
        config = run_parser.parse_object(options)
        for part, given in (("data", {}), ("algorithm", {"num_classes": 10, "model": "small_cnn"})):
            values = {name: value for name, value in vars(config[part].init_args).items() if name not in LINKED}
            try:
                text = json.dumps({**values, **given})
            except TypeError:  # options that are objects are made, and checked, in the run's own process
                continue
            check_class(config[part].class_path, text)
        return dump(run_parser, config), int(config.federation.num_rounds)

    try:
        check_config_files(words)
        parsed = parser.parse_args(words)
        name = Path(str(parsed.config[-1])).stem if parsed.config else "compare"
        config = CompareConfig(**{field.name: parsed[field.name] for field in dataclasses.fields(CompareConfig)})
        folder = Path(config.dir or Path("runs") / name)
        runs = plan(config, folder, resolve)
        check_folders(runs, lambda text: flatten(yaml.safe_load(text)))
        with lock_folder(folder):
            failed = execute(runs, config.jobs)
            print("\n" + write_results(folder, runs))
    except ValueError as error:
        parser.error(str(error))
    print(f"results in {folder}")
    if failed:
        print(
            f"fedamm: error: {len(failed)} of {len(runs)} runs failed: {'; '.join(map(str, failed))}", file=sys.stderr
        )
        sys.exit(1)


def run_report(words: list[str]) -> None:
    """Run ``fedamm report``."""
    parser = Parser(
        prog="fedamm report",
        description="Runs as one HTML page that needs no network: figures, tables, configuration, command, versions.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs",
        metavar="RUN",
        nargs="+",
        help="Folder of a run, finished or not, or a folder with runs below it, like that of a comparison.",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=str,
        help="The page to write; by default report.html, in the run's folder if there is one run, else in the working folder.",
    )
    parsed = parser.parse_args(words)
    try:
        runs = load_all(parsed.runs)
    except ValueError as error:
        parser.error(str(error).replace("`path`", "RUN"))
    output = Path(parsed.output or (runs[0].path if len(runs) == 1 else Path()) / "report.html")
    try:
        write_report(runs, output)
    except OSError as error:
        parser.error(f"Expected --output to be a file that can be written, got {output} ({error.strerror}).")
    print(f"report in {output}")


def fail(reason: str, folder: Path) -> NoReturn:
    """Print one line to standard error and exit with status 1."""
    print(f"fedamm: error: {one_line(reason)}; {how_to_continue(folder)}", file=sys.stderr)
    sys.exit(1)


def how_to_continue(folder: Path) -> str:
    """Say that nothing before the round is lost."""
    return f"the same command with --output.dir {folder} continues after the last completed round"


class StopSignal(SystemExit):
    """The program was told to stop."""

    def __init__(self, number: int) -> None:
        self.signal = signal.Signals(number)
        super().__init__(128 + number)  # as a shell reports a process that a signal has ended


@contextmanager
def stop_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into a :class:`StopSignal`; a second one ends the process at once.

    Lightning would turn Ctrl-C in a fit into exit status 1 and ignore a second one.
    """
    if threading.current_thread() is not threading.main_thread():  # only there signals can be handled
        yield
        return
    stopping = False

    def stop(number: int, _: object) -> None:
        nonlocal stopping
        if stopping:
            os._exit(128 + number)
        stopping = True
        raise StopSignal(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if stopping else handler)


def check_config_files(words: Sequence[str]) -> None:
    """Check that configuration files are YAML mappings; whether they exist is left to the parser.

    Raises:
        ValueError: If one is not; the message names the file.
    """
    names = [word.partition("=")[2] for word in words if word.startswith("--config=")]
    names += [value for option, value in itertools.pairwise(words) if option == "--config"]
    for name in names:
        try:
            if not Path(name).is_file():
                continue
            content = yaml.safe_load(Path(name).read_text())
            json.dumps(content, default=str, skipkeys=True)  # refuses a mapping that holds itself
        except Exception as error:  # mangled YAML may raise anything
            reason = str(error) or type(error).__name__
            raise ValueError(
                f"Expected --config {name:.200} to be YAML, got a file that cannot be read: {reason}"
            ) from error
        if not isinstance(content, dict):
            raise ValueError(f"Expected --config {name} to be a YAML mapping of options, got {content!r:.60}.")


def check_values(config: Namespace) -> None:
    """Check what the parser lets pass: groups that are no mappings, and null where an option must have a value.

    Raises:
        ValueError: If there is one; the message names it.
    """
    groups: dict[str, tuple[Any, Any]] = {
        "federation": (config.federation, Orchestrator),
        "trainer": (config.trainer, TrainerConfig),
        "output": (config.output, OutputConfig),
    }
    for group in ("data", "algorithm"):
        given = config[group]
        if given is None:
            raise ValueError(f"Expected --{group} to be a class or a mapping of options, got null.")
        if unknown := sorted(given.get("dict_kwargs") or {}):
            raise ValueError(f"unknown option {group}.{unknown[0]}; see --help")
        module, _, name = given.class_path.rpartition(".")
        groups[group] = given.get("init_args") or argparse.Namespace(), getattr(importlib.import_module(module), name)
    for group, (values, owner) in groups.items():
        if not isinstance(values, argparse.Namespace):
            raise ValueError(f"Expected --{group} to be a mapping of options, got {values!r:.60}.")
        hints = typing.get_type_hints(owner.__init__)
        for name, value in vars(values).items():
            if (
                value is None
                and name in hints
                and name not in LINKED
                and type(None) not in typing.get_args(hints[name])
            ):
                raise ValueError(f"Expected --{group}.{name} to have a value, got null.")


@contextmanager
def deferred_log() -> Iterator[None]:
    """Hold back what the package logs until the block has succeeded, so that an error stands alone."""
    logger = logging.getLogger("fedamm_pl")
    target = logging.StreamHandler()
    handler = logging.handlers.MemoryHandler(1000, logging.CRITICAL + 1, target, flushOnClose=False)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
        handler.flush()
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def default_folder(config: Namespace) -> Path:
    """Return runs/<config name>/<date-time>."""
    name = Path(str(config.config[-1])).stem if config.config else config.algorithm.class_path.rpartition(".")[2]
    # with microseconds: runs that a script starts at once get folders of their own
    return Path("runs") / name / f"{datetime.datetime.now():%Y-%m-%d_%H-%M-%S-%f}"


def instantiate(parser: Parser, config: Namespace, folder: Path | None) -> tuple[Orchestrator, list[Logger]]:
    """Build everything that a configuration names; without a folder no loggers.

    Raises:
        ValueError: If an option is out of range or data, module and folder do not fit together.
    """
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"Expected `seed` to be 0 to 4294967295, got {config.seed}.")
    pl.seed_everything(config.seed, verbose=False)  # initial weights are drawn when the module is made
    parts = parser.instantiate(config)
    orchestrator = Orchestrator(
        parts.algorithm,
        parts.data,
        **vars(config.federation),
        seed=config.seed,
        output_dir=folder,
        keep_checkpoints=config.output.keep_checkpoints,
        trainer=parts.trainer,
    )
    if folder is None:
        return orchestrator, []
    if parts.logger is True:
        started = orchestrator.state.round_num
        purge = started + 1 if orchestrator.state.history else 0  # what was logged after the last checkpoint
        return orchestrator, [TensorBoardLogger(folder, "", "", default_hp_metric=False, purge_step=purge)]
    return orchestrator, parts.logger or []


def dump(parser: Parser, config: Namespace) -> str:
    """Return the configuration as YAML without ``output.dir``, fit for ``--config``."""
    shown = config.clone()
    shown.output.dir = None
    content = with_texts(json.loads(parser.dump(shown, format="json")), shown)
    content["output"].pop("dir", None)
    content.pop("dry_run", None)  # said to the program, no part of the experiment
    return str(yaml.dump(content, Dumper=Dumper, sort_keys=False))


def with_texts(content: Any, given: Any) -> Any:
    """Return dumped options with the texts as they were given: the parser's dump makes a number of a text like 1e5."""
    if isinstance(content, dict) and isinstance(given, argparse.Namespace):
        values = vars(given)
        return {name: with_texts(value, values.get(name)) for name, value in content.items()}
    return given if isinstance(given, str) else content


class Dumper(yaml.SafeDumper):
    """Puts texts like 1e5 in quotes: they are numbers to the parser, though not to PyYAML."""

    def represent_text(self, text: str) -> yaml.Node:
        """Represent a text."""
        try:
            float(text)
        except ValueError:
            return self.represent_str(text)
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'")


Dumper.add_representer(str, Dumper.represent_text)


def describe(orchestrator: Orchestrator) -> str:
    """Describe in a few lines what is about to run."""
    module, data, info = orchestrator.module, orchestrator.data, orchestrator.data.info
    sizes = [data.client_size(client) for client in range(data.num_clients)]
    factor, parameters = data.imbalance_factor, sum(value.numel() for value in module.model.parameters())
    few_classes, counts = data.num_classes <= SHOWN_CLASSES, info["class_counts"]
    groups = "; ".join(
        f"{name} {members if few_classes else len(members)}" for name, members in info["shot_groups"].items() if members
    )
    started = orchestrator.state.round_num
    return "\n".join(
        [
            f"{type(module).__name__} with {module.hparams['model']} ({parameters:,} parameters) on {module.device}, "
            f"{orchestrator.trainer.resolved_precision}",
            f"{data.hparams['dataset']}: {sum(info['class_counts'])} training images, imbalance factor {factor:g} "
            f"(IF {1 / factor:g}), {data.num_clients} clients of {min(sizes)} to {max(sizes)} images",
            f"images per class: {' '.join(map(str, counts)) if few_classes else f'{max(counts)} to {min(counts)}'}",
            f"shot groups by {info['shot_rule']}: {groups}",
            *([f"continuing after round {started}"] if started else []),
        ]
    )


if __name__ == "__main__":
    main()
