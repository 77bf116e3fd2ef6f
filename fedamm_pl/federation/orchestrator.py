"""``Orchestrator``: runs federated rounds over a module and a data module."""

import contextlib
import dataclasses
import itertools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fedamm_pl.cores import too_many
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.accounts import close_round, evaluate_end
from fedamm_pl.federation.calibration import Calibration
from fedamm_pl.federation.callbacks.base import FederationCallback
from fedamm_pl.federation.callbacks.loggers import LogTo, check_loggers
from fedamm_pl.federation.callbacks.observers import Observers
from fedamm_pl.federation.checkpoint import RunState, saved_rounds
from fedamm_pl.federation.checks import check_compiles, check_fit, check_options
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.federation.executors import Executor, Runner, RunSpec, Sequential
from fedamm_pl.federation.executors.base import Kept, Outcome, copied
from fedamm_pl.federation.intake import Intake, RoundFailedError, require_sound
from fedamm_pl.federation.personal import PersonalEvaluation
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.federation.server import Server
from fedamm_pl.federation.stopwatch import Stopwatch
from fedamm_pl.federation.store import ClientStore, FileStore, MemoryStore, RoundKept
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.files import lock_folder
from fedamm_pl.protocol.messages import Broadcast, ClientResult, ClientTask
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.seeding import derive_seed

log = logging.getLogger(__name__)

History = list[dict[str, float]]


class FederationError(RuntimeError):
    """Raised at the end of a run that stopped because too many rounds in a row failed, or all rounds."""


class RunOverError(Exception):
    """Raised when the previous round turns out to be the last; the current round is dropped."""


class Orchestrator:
    """Runs federated rounds: sample clients, train them, aggregate, evaluate.

    Creating it touches no files; :meth:`run` creates and locks the output folder and continues a run in it.

    Args:
        module: The algorithm, with the initial weights; after the run it holds the final weights.
        data: The data and its clients.
        config: How the federation runs.
        seed: Seed for client sampling and for all random draws of clients and server.
        callbacks: Observers: logging, progress, your own.
        output_dir: Folder for checkpoints, metrics.csv, summary.json and final.ckpt; an interrupted run in it is continued. Without it
            nothing is written.
        keep_checkpoints: How many of the newest checkpoints to keep, in addition to the best.
        trainer: Hardware and precision of training.
        executor: Where clients train; by default one after the other in this process.
        options: Fields of :class:`FederationConfig` by name, instead of or in addition to ``config``: ``num_rounds=2``.

    Raises:
        ValueError: If an option is out of range, or module, data, options and executor do not fit together.
    """

    def __init__(
        self,
        module: FederatedModule,
        data: FederatedDataModule,
        config: FederationConfig | None = None,
        *,
        seed: int = 0,
        callbacks: Sequence[FederationCallback] = (),
        output_dir: str | Path | None = None,
        keep_checkpoints: int = 3,
        trainer: TrainerConfig | None = None,
        executor: Executor | None = None,
        **options: Any,
    ) -> None:
        for name, least in (("seed", 0), ("keep_checkpoints", 1)):
            if (value := locals()[name]) < least:
                raise ValueError(f"Expected `{name}` to be {least} or more, got {value}.")
        self.config = FederationConfig(**options) if config is None else dataclasses.replace(config, **options)
        self.module = module
        self.data = data
        self.seed = seed
        self.callbacks = list(callbacks)
        self.output_dir = None if output_dir is None else Path(os.path.expanduser(output_dir))
        self.keep_checkpoints = keep_checkpoints
        self.trainer = (trainer or TrainerConfig()).resolved()
        self.executor = executor or Sequential()
        self.server = Server(copied(module), data, self.trainer, seed, self.config)
        check_options(module, data, self.config, self.executor)
        check_fit(self.server.module, data)
        if self.server.module.compiled:
            with self.trainer.precision_plugin.forward_context():
                check_compiles(self.server.module, data)
        self.evaluator = Evaluator(self.server.module, data, self.trainer)
        self.state = RunState(0, self.server.module.shared_state())
        self._personal = {name: value.cpu() for name, value in module.personal_state().items()}
        self._store: ClientStore = MemoryStore()
        self._opened: tuple[Run, Runner] | None = None
        self._owed: Callable[[], None] | None = (
            None  # the end of the previous round, if it is postponed until the next one begins
        )

    @contextlib.contextmanager
    def opened(self) -> Iterator[Run]:
        """Lock the folder, start the workers and load the state of an earlier run; :meth:`run` does this itself.

        Raises:
            ValueError: If ``output_dir`` cannot be written, is in use by another run, or holds a run with other options
                or data, or only damaged checkpoints; if a logger would write among its files; or if the workers cannot
                start.
        """
        if self._opened is not None:
            yield self._opened[0]
            return
        check_loggers([callback.logger for callback in self.callbacks if isinstance(callback, LogTo)], self.output_dir)
        with contextlib.ExitStack() as stack:
            if self.output_dir is not None:
                stack.callback(lock_folder(self.output_dir).release, force=True)
                self._store = FileStore(self.output_dir / "clients")
            with quiet():
                runner = stack.enter_context(self.executor.open(self.spec()))
            workers = self.executor.workers_here
            if self.trainer.kind == "cpu" and workers and (found := too_many(runner.environment["threads"], workers)):
                remedy = "num_workers and threads_per_worker" if workers > 1 else "torch.set_num_threads"
                log.warning("%s, and is slow for it: OMP_NUM_THREADS or %s set fewer", found, remedy)
            run = Run(
                self.config, self.seed, self.server.module, self.data, self.trainer, self.state, runner.environment
            )
            run.busy = lambda: runner.busy
            if self.output_dir is not None:
                run.output_dir = self.output_dir
                run.resume(self._store)
                self.state = run.state
            self.evaluator.calibration = Calibration(self.server, runner, self.config, self._all_tasks, self._kept)
            if runner.keeps_here:
                self.evaluator.personal = PersonalEvaluation(self.server.module, self.data, self.trainer, self._kept)
            self._opened = run, runner
            stack.callback(setattr, self, "_opened", None)
            yield run

    def spec(self) -> RunSpec:
        """Return the specification from which workers build their module and data."""
        return RunSpec(self.module, self.data, self.trainer, self.seed, torch.get_num_threads())

    def run(self) -> History:
        """Run the remaining rounds.

        Returns:
            A row of metrics for each evaluated round, the first of round 0.

        Raises:
            FederationError: If ``max_failed_rounds`` rounds in a row or all rounds failed; all files are written first.
            ValueError: If the run cannot be opened, see :meth:`opened`.
        """
        with self.opened() as run, quiet():
            assert self._opened is not None
            if self.state.stopped and self.state.round_num < self.config.num_rounds:  # try again
                self.state.stopped, self.state.failed_in_a_row = None, 0
            self._whole, self._owed = self.state.copy(), None
            try:
                self._rounds(run, self._opened[1], Observers(self.callbacks, self.output_dir, self.keep_checkpoints))
            except BaseException:
                run.state = self.state = self._whole  # discard the round in progress; it will start again
                raise
        if self.state.stopped:
            raise FederationError(self.state.stopped)
        return self.state.history

    def _rounds(self, run: Run, runner: Runner, observers: Observers) -> None:
        config, server, state = self.config, self.server, run.state
        evaluate_end(run, self.evaluator)
        observers.call("on_run_start", run)
        if not state.history:  # round 0: the initial model
            close_round(run, self.evaluator, observers, Intake(), None, Stopwatch())
        self._whole, run.rows = state.copy(), [{}]
        for round_num in range(state.round_num + 1, config.num_rounds + 1):
            if state.ended or state.stopped:
                break
            failed, stopwatch = None, Stopwatch()
            # Draw the clients, and make the broadcast for all of them and a small task for each.
            clients = sample_clients(self.data.num_clients, config.client_fraction, self.seed, round_num)
            tasks = self._tasks(round_num, clients)
            broadcast = server.broadcast(state.shared, round_num, config.local_epochs)
            kept = RoundKept(self._store, state.kept, round_num, self._personal)
            # The runner trains the clients when their results are requested.
            outcomes = self._outcomes(run, runner, broadcast, tasks, kept.read, stopwatch)
            if outcomes is None:
                break
            # Valid results stream into the server's next state; after a failed round the state is unchanged.
            names = self.data.client_names
            intake = Intake(round_num, tasks, server.expected_payload(), server.module, config, names)
            results = intake.accept(outcomes, server.contribution, partial(self._accepted, run, observers, kept))
            try:
                state.shared = require_sound(server.update(state.shared, results), intake.expected.nonnegative)
                kept.commit()
            except RoundFailedError as error:
                failed = str(error)
                kept.drop()
                log.warning("round %d failed, the global model is unchanged: %s", round_num, failed)
            # Evaluate if due, update the accounts, call the callbacks.
            state.round_num = round_num
            close = partial(self._close, run, observers, intake, failed, stopwatch)
            if failed or state.ended or round_num == config.num_rounds or not self._may_overlap(runner):
                close()
            else:  # the next round need not wait for it
                self._owed = stopwatch.paused_until(close)
        evaluate_end(run, self.evaluator)
        server.module.load_shared_state(server.module.deployed(state.shared))
        self.trainer.precision_plugin.convert_module(self.module)
        self.module.load_shared_state(server.module.shared_state())
        observers.call("on_run_end", run)

    def _close(self, run: Run, observers: Observers, intake: Intake, failed: str | None, stopwatch: Stopwatch) -> None:
        close_round(run, self.evaluator, observers, intake, failed, stopwatch)
        saved = [] if self.output_dir is None else saved_rounds(self.output_dir / "checkpoints")
        self._store.prune({*saved, run.state.round_num})
        self._whole, run.rows = run.state.copy(), [{}]

    def _outcomes(
        self,
        run: Run,
        runner: Runner,
        broadcast: Broadcast,
        tasks: Sequence[ClientTask],
        kept: Kept,
        stopwatch: Stopwatch,
    ) -> Iterator[Outcome] | None:
        """Return an iterator over the outcomes of a round's clients.

        If the end of the previous round was postponed, it takes place while the first clients train. The result is None
        if the previous round then turns out to be the last.
        """
        if (owed := self._owed) is None:
            return stopwatch.waiting_for(runner.run(broadcast, tasks, kept))
        self._owed = None

        def meanwhile() -> None:
            with stopwatch.aside():
                owed()
            if run.state.ended:
                raise RunOverError

        outcomes = stopwatch.waiting_for(runner.run(broadcast, tasks, kept, meanwhile))
        try:
            first = list(itertools.islice(outcomes, 1))
        except RunOverError:  # the clients that had started are stopped
            return None
        self.server.take_up(broadcast)  # the evaluation has overwritten the module's state
        return itertools.chain(first, outcomes)

    def _may_overlap(self, runner: Runner) -> bool:
        """Return whether the server can evaluate while the clients of the next round train.

        It can if they train in other processes that do not compete with it for this machine's CPU, and if it does not
        need the clients for a calibration.
        """
        elsewhere = runner.busy[1] and (self.executor.workers_here == 0 or self.trainer.kind != "cpu")
        return bool(elsewhere) and not self.server.module.calibrates(False)  # a calibration needs the clients

    def _accepted(self, run: Run, observers: Observers, kept: RoundKept, result: ClientResult) -> None:
        kept.write(result.client_id, result.kept)
        observers.call("on_client_end", run, dataclasses.replace(result, kept={}))

    def task(self, round_num: int, client_id: int) -> ClientTask:
        """Return a client's task in a round, in addition to the broadcast."""
        return ClientTask(client_id, derive_seed(self.seed, "client", round_num, client_id))

    def _tasks(self, round_num: int, clients: Iterable[int]) -> list[ClientTask]:
        return [self.task(round_num, client) for client in clients if self.data.client_size(client)]

    def _all_tasks(self, round_num: int) -> list[ClientTask]:
        return self._tasks(round_num, range(self.data.num_clients))

    def _kept(self, state: RunState) -> Kept:
        """Return a function that reads the private state of a client as it was after the state's round."""
        return RoundKept(self._store, state.kept, state.round_num + 1, self._personal).read

    def evaluate(self) -> dict[str, float]:
        """Measure the server's current state on the test set.

        Returns:
            ``test/loss``, ``test/acc``, ``test/acc_<group>``, ``test/acc_class_<c>``.
        """
        metrics, self.state.confusion = self.evaluator.measure(self.state.shared)
        return metrics
