"""``Orchestrator``: runs federated rounds over a module and a data module."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.observers import Observers
from fedamm_pl.federation.checkpoint import RunState, saved_rounds
from fedamm_pl.federation.checks import check_compiles, check_fit, check_options
from fedamm_pl.federation.config import FederationConfig
from fedamm_pl.federation.evaluation import Evaluator
from fedamm_pl.federation.executors import Executor, Runner, RunSpec, Sequential
from fedamm_pl.federation.executors.base import copied
from fedamm_pl.federation.intake import Intake, RoundFailedError, client_metrics, require_finite
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.sampling import sample_clients
from fedamm_pl.federation.server import Server
from fedamm_pl.federation.stopwatch import Stopwatch
from fedamm_pl.federation.store import ClientStore, FileStore, MemoryStore
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.files import lock_folder
from fedamm_pl.protocol.messages import ClientResult, ClientTask, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.seeding import derive_seed

log = logging.getLogger(__name__)

History = list[dict[str, float]]


class FederationError(RuntimeError):
    """A run ended before its last round because too many rounds in a row failed."""


class Orchestrator:
    """Runs federated rounds: sample clients, train them, aggregate, evaluate.

    Making one touches no file; :meth:`run` locks the output folder, makes it and takes up what it holds.

    Args:
        module: The algorithm, with the initial weights. After the run it holds the final ones.
        data: The data and its clients.
        config: How the federation runs.
        seed: Seed of client sampling and of all draws of clients and server.
        callbacks: Observers: logs, progress, your own.
        output_dir: Folder for checkpoints, metrics.csv, summary.json and final.ckpt; a run that was interrupted
            there is continued. Without it nothing is written.
        keep_checkpoints: How many of the newest checkpoints to keep, beside the best.
        trainer: Where and in which arithmetic to train.
        executor: Where clients train; by default one after the other in this process.
        options: Fields of :class:`FederationConfig` by name, in place of ``config`` or beside it: ``num_rounds=2``.

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
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.keep_checkpoints = keep_checkpoints
        self.trainer = (trainer or TrainerConfig()).resolved()
        self.executor = executor or Sequential()
        self.server = Server(copied(module), data, self.trainer, seed, self.config)
        check_options(module, data, self.config, self.executor)
        check_fit(self.server.module, data)
        if self.trainer.compile:
            with self.trainer.precision_plugin.forward_context():
                check_compiles(self.server.module, data)
        self.evaluator = Evaluator(self.server.module, data, self.trainer)
        self.state = RunState(0, self.server.module.shared_state())
        self._personal = {name: value.cpu() for name, value in module.personal_state().items()}
        self._store: ClientStore = MemoryStore()
        self._opened: tuple[Run, Runner] | None = None

    @contextlib.contextmanager
    def opened(self) -> Iterator[Run]:
        """Lock the folder, start the workers and take up the state that a run has left; :meth:`run` does it by itself.

        Raises:
            ValueError: If ``output_dir`` cannot be written, is in use by another run, or holds a run with other options or
                data, or only damaged checkpoints; or if the workers cannot start.
        """
        if self._opened is not None:
            yield self._opened[0]
            return
        with contextlib.ExitStack() as stack:
            if self.output_dir is not None:
                stack.callback(lock_folder(self.output_dir).release, force=True)
                self._store = FileStore(self.output_dir / "clients")
            with quiet():
                runner = stack.enter_context(self.executor.open(self.spec()))
            run = Run(
                self.config, self.seed, self.server.module, self.data, self.trainer, self.state, runner.environment
            )
            if self.output_dir is not None:
                run.output_dir = self.output_dir
                run.resume(self._store)
                self.state = run.state
            self._opened = run, runner
            stack.callback(setattr, self, "_opened", None)
            yield run

    def spec(self) -> RunSpec:
        """Return what workers build their module and data from."""
        return RunSpec(self.module, self.data, self.trainer, self.seed, torch.get_num_threads())

    def run(self) -> History:
        """Run the rounds that are left.

        Returns:
            A row of metrics for each evaluated round, the first of round 0.

        Raises:
            FederationError: If ``max_failed_rounds`` rounds in a row failed; all files are written before.
            ValueError: If the run cannot be opened, see :meth:`opened`.
        """
        with self.opened() as run, quiet():
            assert self._opened is not None
            self._whole = self.state.copy()
            try:
                self._rounds(run, self._opened[1], Observers(self.callbacks, self.output_dir, self.keep_checkpoints))
            except BaseException:
                run.state = self.state = (
                    self._whole
                )  # of the round in progress nothing is left: run again, it starts anew
                raise
        if self.state.stopped:
            raise FederationError(self.state.stopped)
        return self.state.history

    def _rounds(self, run: Run, runner: Runner, observers: Observers) -> None:
        config, server, state = self.config, self.server, self.state
        self._evaluate_end()  # of a run that ends where an interrupted one happened to stop, between two evaluations
        observers.call("on_run_start", run)
        if not state.history:  # round 0: the initial model
            self._close_round(run, observers, state.shared, Intake(), None, Stopwatch())
        for round_num in range(state.round_num + 1, config.num_rounds + 1):
            if state.ended or state.stopped:
                break
            self._whole, run.rows, failed, kept = state.copy(), [{}], None, set[int]()
            self._store.discard(after=state.round_num)
            stopwatch = Stopwatch()
            # Who takes part, what goes out to all of them alike, and a small task for each.
            clients = sample_clients(self.data.num_clients, config.client_fraction, self.seed, round_num)
            tasks = [self.task(round_num, client) for client in clients if self.data.client_size(client)]
            broadcast = server.broadcast(state.shared, round_num, config.local_epochs)
            # Clients train when their result is asked for, wherever the runner has them train.
            outcomes = stopwatch.waiting_for(runner.run(broadcast, tasks, self._kept))

            def accepted(result: ClientResult, round_num: int = round_num, kept: set[int] = kept) -> None:
                if result.kept:
                    self._store.write(result.client_id, round_num, result.kept)
                    kept.add(result.client_id)
                observers.call("on_client_end", run, dataclasses.replace(result, kept={}))

            # What is sound of it streams into the server's next state; after a failed round the state stays.
            intake = Intake(round_num, tasks, server.expected_payload(), server.module, config)
            try:
                shared = server.update(state.shared, intake.accept(outcomes, server.contribution, accepted))
                require_finite(shared)
            except RoundFailedError as error:
                shared, failed = state.shared, str(error)
                log.warning("round %d failed, the global model stays as it was: %s", round_num, failed)
            else:
                state.kept.update(dict.fromkeys(kept, round_num))
            # Evaluate if due, do the accounts, tell the callbacks.
            state.round_num = round_num
            self._close_round(run, observers, shared, intake, failed, stopwatch)
        self._evaluate_end()
        server.module.load_shared_state(server.module.deployed(state.shared))
        self.trainer.precision_plugin.convert_module(self.module)
        self.module.load_shared_state(server.module.shared_state())
        observers.call("on_run_end", run)

    def task(self, round_num: int, client_id: int) -> ClientTask:
        """Return what a client is asked to do in a round, beside the broadcast."""
        return ClientTask(client_id, derive_seed(self.seed, "client", round_num, client_id))

    def evaluate(self) -> dict[str, float]:
        """Measure the server's current state on the test set.

        Returns:
            ``test/loss``, ``test/acc``, ``test/acc_<group>``, ``test/acc_class_<c>``.
        """
        metrics, self.state.confusion = self.evaluator.measure(self.state.shared)
        return metrics

    def _kept(self, client_id: int) -> State:
        """Return what a client has kept; at its first round its personal state as the module was made with it."""
        version = self.state.kept.get(client_id)
        return self._personal if version is None else self._store.read(client_id, version)

    def _evaluate_end(self) -> None:
        state = self.state
        over = bool(state.ended) or state.round_num == self.config.num_rounds
        if over and state.history and state.history[-1]["round"] < state.round_num:
            state.history.append({"round": state.round_num, **self.evaluate()})

    def _close_round(
        self,
        run: Run,
        observers: Observers,
        shared: State,
        intake: Intake,
        failed: str | None,
        stopwatch: Stopwatch,
    ) -> None:
        """Evaluate if due, do the accounts, tell the callbacks."""
        state, config, results = self.state, self.config, intake.results
        state.shared = shared
        state.count(intake.failures, failed, config.max_failed_rounds)
        (metrics,) = run.rows
        metrics.update(client_metrics(results))
        due = state.round_num % config.eval_interval == 0 or state.round_num == config.num_rounds
        due = due or bool(state.stopped or state.ended)
        if due:
            with stopwatch.evaluating():
                metrics.update(self.evaluate())
            state.history.append({"round": state.round_num, **metrics})
            run.rows.append(state.history[-1])
            self.evaluator.watch(state)
        shown = self.server.module.diagnostics(intake.tallies if failed is None else {}) if due else {}
        seconds = stopwatch.stop()
        client_seconds = {
            "train": sum(result.train_seconds for result in results),
            "meta": sum(result.meta_seconds for result in results),
        }
        if state.round_num:
            state.account(results, seconds, client_seconds)
        if due:
            state.note(shown)
        record = RoundRecord(state.round_num, metrics, due, results, seconds, client_seconds, intake.failures, failed)
        observers.call("on_round_end", run, record)
        saved = [] if self.output_dir is None else saved_rounds(self.output_dir / "checkpoints")
        self._store.prune({*saved, state.round_num})
