"""``Orchestrator``: runs federated rounds over a module and a data module."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from fedamm_pl.data.client import Batch
from fedamm_pl.data.datamodule import FederatedDataModule
from fedamm_pl.federation.aggregation import Aggregate, TrimmedMean, WeightedAverage
from fedamm_pl.federation.callbacks import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.files import run_files
from fedamm_pl.federation.checkpoint import RunState, latest_checkpoint
from fedamm_pl.federation.checks import check_compiles, check_fit
from fedamm_pl.federation.executors import Executor, SequentialExecutor
from fedamm_pl.federation.fingerprint import differences, environment, fingerprint
from fedamm_pl.federation.intake import Intake, RoundFailedError, client_metrics, first_nonfinite
from fedamm_pl.federation.sampling import num_sampled, sample_clients
from fedamm_pl.federation.summary import divergence
from fedamm_pl.federation.trainer import TrainerConfig, quiet
from fedamm_pl.files import lock_folder
from fedamm_pl.protocol.messages import Answer, ClientFailure, ClientResult, ClientTask, Question, State
from fedamm_pl.protocol.module import FederatedModule
from fedamm_pl.protocol.session import ServerSession
from fedamm_pl.seeding import derive_seed

log = logging.getLogger(__name__)

History = list[dict[str, float]]
Aggregation = Literal["num_examples", "uniform", "median", "trimmed_mean"]
ROBUST = ("median", "trimmed_mean")
MIN_ROBUST_CLIENTS = 3
"""Of fewer, a median is a mean."""


class FederationError(RuntimeError):
    """A run ended before its last round because too many rounds in a row failed."""


class Orchestrator:
    """Runs federated rounds: sample clients, train them, aggregate, evaluate.

    Args:
        module: The algorithm, with the initial weights. Afterwards it holds the final ones.
        data: The data and its clients.
        num_rounds: Rounds to run; 0 evaluates the initial model.
        client_fraction: Share of the clients that takes part in a round, in (0, 1].
        local_epochs: Passes E of a client over its data in a round.
        aggregation: How clients are averaged: by num_examples (p_k = n_k / n), uniform, or robustly and without weights by
            the coordinate-wise median or trimmed_mean.
        trim_fraction: trimmed_mean: share of the clients dropped at each end, in (0, 0.5].
        max_update_norm: A longer update (Euclidean, over all floating-point entries) is shortened to this; null for none.
        min_success_fraction: Share of a round's clients that must succeed, in [0, 1]; else the server keeps its state.
        max_failed_rounds: Failed rounds in a row after which the run stops.
        client_timeout: Seconds after which a client is given up, where the executor can do that; null for none.
        eval_interval: Rounds from one evaluation on the test set to the next; the last round is always evaluated.
        seed: Seed of client sampling and of all draws of the clients.
        callbacks: Observers: logs, progress, your own.
        output_dir: Folder for checkpoints, metrics.csv, summary.json and final.ckpt; a run that was interrupted
            there is continued. Without it nothing is written.
        keep_checkpoints: How many of the newest checkpoints to keep, beside the best.
        trainer: Where and in which arithmetic to train.
        executor: Trains the clients; by default one after the other in this process.

    Raises:
        ValueError: If an option is out of range or beyond the executor, module and data do not fit together, or
            ``output_dir`` cannot be written, is in use by another run, or holds a run with other options or data, or only
            damaged checkpoints.
    """

    def __init__(
        self,
        module: FederatedModule,
        data: FederatedDataModule,
        *,
        num_rounds: int,
        client_fraction: float = 0.5,
        local_epochs: int = 5,
        aggregation: Aggregation = "num_examples",
        trim_fraction: float = 0.1,
        max_update_norm: float | None = None,
        min_success_fraction: float = 0.5,
        max_failed_rounds: int = 3,
        client_timeout: float | None = None,
        eval_interval: int = 5,
        seed: int = 0,
        callbacks: Sequence[FederationCallback] = (),
        output_dir: str | Path | None = None,
        keep_checkpoints: int = 3,
        trainer: TrainerConfig | None = None,
        executor: Executor | None = None,
    ) -> None:
        if not 0 < client_fraction <= 1:
            raise ValueError(f"Expected `client_fraction` to be in (0, 1], got {client_fraction}.")
        if not 0 <= min_success_fraction <= 1:
            raise ValueError(f"Expected `min_success_fraction` to be in [0, 1], got {min_success_fraction}.")
        if not 0 < trim_fraction <= 0.5:
            raise ValueError(f"Expected `trim_fraction` to be in (0, 0.5], got {trim_fraction}.")
        for name, bound in (("max_update_norm", max_update_norm), ("client_timeout", client_timeout)):
            if bound is not None and not 0 < bound < math.inf:
                raise ValueError(f"Expected `{name}` to be a number above 0 or null, got {bound}.")
        lower_bounds = {"num_rounds": 0, "local_epochs": 1, "eval_interval": 1, "seed": 0, "keep_checkpoints": 1}
        for name, least in {**lower_bounds, "max_failed_rounds": 1}.items():
            if (value := locals()[name]) < least:
                raise ValueError(f"Expected `{name}` to be {least} or more, got {value}.")
        if aggregation not in get_args(Aggregation):
            raise ValueError(
                f"Expected `aggregation` to be one of {', '.join(get_args(Aggregation))}, got {aggregation!r}."
            )
        self.module = module
        self.data = data
        self.num_rounds = num_rounds
        self.client_fraction = client_fraction
        self.local_epochs = local_epochs
        self.aggregation = aggregation
        self.trim_fraction = trim_fraction
        self.max_update_norm = max_update_norm
        self.min_success_fraction = min_success_fraction
        self.max_failed_rounds = max_failed_rounds
        self.client_timeout = client_timeout
        self.eval_interval = eval_interval
        self.seed = seed
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.trainer = trainer or TrainerConfig()
        self.executor = executor or SequentialExecutor(self.trainer)
        self.callbacks = list(callbacks)
        self._files = [] if self.output_dir is None else run_files(self.output_dir, keep_checkpoints)
        self._check_options()
        check_fit(module, data)
        self.trainer.place(module)
        self.data.to(module.device)
        if self.trainer.compile:
            with self.trainer.precision_plugin.forward_context():
                check_compiles(module, data)
        labels = data.images.test_labels
        chance = float(labels.bincount().max()) / len(labels)  # accuracy of the best constant guess
        self._guess = chance, math.sqrt(chance * (1 - chance) / len(labels))
        self.state = RunState(0, module.shared_state())
        self._lock = None if self.output_dir is None else lock_folder(self.output_dir)
        try:
            self._restore()
        except BaseException:
            self._unlock()
            raise

    def _check_options(self) -> None:
        """Check options against each other."""
        if self.client_timeout is not None and not self.executor.can_time_out:
            raise ValueError(
                f"Expected `client_timeout` to be null with {type(self.executor).__name__}, got {self.client_timeout}: it "
                "trains in the server's own process, which cannot stop a client that hangs."
            )
        sampled = num_sampled(self.data.num_clients, self.client_fraction)
        if self.aggregation in ROBUST and sampled < MIN_ROBUST_CLIENTS:
            raise ValueError(
                f"Expected `client_fraction` to give {MIN_ROBUST_CLIENTS} or more clients a round for the aggregation "
                f"{self.aggregation}, got {self.client_fraction} of {self.data.num_clients} clients."
            )

    def run(self) -> History:
        """Run the rounds that are left.

        Returns:
            A row of metrics for each evaluated round, the first of round 0.

        Raises:
            FederationError: If ``max_failed_rounds`` rounds in a row failed; all files are written before.
        """
        if self.output_dir is not None and self._lock is not None and not self._lock.is_locked:
            self._lock = lock_folder(self.output_dir)  # it ran before, and gave its folder up
        self._whole = self.state.copy()
        try:
            with quiet():
                self._run()
        except BaseException:
            self.state = self._whole  # of the round in progress nothing is left: run again, it starts anew
            raise
        finally:
            self._unlock()
        if self.state.stopped:
            raise FederationError(self.state.stopped)
        return self.state.history

    def _run(self) -> None:
        if self.state.history and self.state.round_num == self.num_rounds > self.state.history[-1]["round"]:
            # a run that ends where an interrupted one happened to stop, between two evaluations
            self.state.history.append({"round": self.num_rounds, **self.evaluate()})
        self._call("on_run_start")
        if not self.state.history:  # round 0: the initial model
            self._finish_round(self.state.shared, Intake(), None, time.perf_counter())
        for round_num in range(self.state.round_num + 1, self.num_rounds + 1):
            start, failed, self._whole = time.perf_counter(), None, self.state.copy()
            # Who takes part, and what each is asked to do.
            clients = sample_clients(self.data.num_clients, self.client_fraction, self.seed, round_num)
            server = self._server(round_num)
            tasks = self._tasks(server, clients)
            # Clients train when their result is asked for; the server answers questions in between.
            outcomes = self.executor.run(self.module, self.data.client, tasks, self._answer)
            # What is sound of it streams into the server's next state; after a failed round the state stays.
            intake = self._intake(round_num, tasks)
            results = intake.accept(outcomes, lambda result: self._call("on_client_end", result))
            try:
                old = {name: value.clone() for name, value in self.state.shared.items()}  # it may work in place
                shared = self._require_finite(self.module.server_update(old, results, server))
            except RoundFailedError as error:
                shared, failed = self.state.shared, str(error)
                log.warning("round %d failed, the global model stays as it was: %s", round_num, failed)
            else:
                self.state.kept.update(intake.kept)
            # Evaluate if due, do the accounts, tell the callbacks.
            self.state.round_num = round_num
            self._finish_round(shared, intake, failed, start)
            if self.state.stopped:
                break
        self.module.load_shared_state(self.module.deployed(self.state.shared))
        self._call("on_run_end")

    def _restore(self) -> None:
        """Take up the state that a run in ``output_dir`` left."""
        if self.output_dir is None:
            return
        saved = latest_checkpoint(self.output_dir / "checkpoints")
        if saved is None:
            return
        if differing := differences(saved.fingerprint, fingerprint(self)):
            raise ValueError(
                f"Expected `output_dir` {self.output_dir} to hold a run with the same options, got others: "
                f"{'; '.join(differing)}. Choose another folder, or the old options."
            )
        if self.num_rounds < saved.state.round_num:
            raise ValueError(
                f"Expected `num_rounds` to be {saved.state.round_num} or more, the rounds that {self.output_dir} holds, "
                f"got {self.num_rounds}."
            )
        for difference in differences(saved.environment, environment()):
            log.warning("%s; from here on results may differ in their last digits", difference)
        self.state = saved.state
        self.state.shared = {name: value.to(self.module.device) for name, value in self.state.shared.items()}
        if self.state.round_num < self.num_rounds:
            self.state.counts["resumes"] += 1
            if self.state.stopped:  # a new chance
                self.state.stopped, self.state.failed_in_a_row = None, 0

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock.release(force=True)

    def _server(self, round_num: int) -> ServerSession:
        def meta(draw: int) -> Batch:
            return self.data.meta_batch(derive_seed(self.seed, "server_meta", round_num, draw))

        return ServerSession(round_num, self.data.num_clients, self._average, meta)

    def _tasks(self, server: ServerSession, clients: list[int]) -> list[ClientTask]:
        payload, round_num = self.module.broadcast(self.state.shared, server), server.round_num
        return [
            ClientTask(
                round_num,
                client,
                derive_seed(self.seed, "client", round_num, client),
                self.local_epochs,
                payload,
                self.client_timeout,
                self.state.kept.get(client, {}),
            )
            for client in clients
            if self.data.client_size(client)
        ]

    def _answer(self, question: Question) -> Answer:
        seed = derive_seed(self.seed, "meta", question.round_num, question.client_id, question.step)
        with self.trainer.precision_plugin.forward_context():  # the same wherever the client is that asks
            return self.module.answer(question, self.data.meta_batch(seed))

    def _intake(self, round_num: int, tasks: list[ClientTask]) -> Intake:
        return Intake(
            round_num,
            tasks,
            self.module.expected_payload(tasks[0].payload) if tasks else {},
            min_success_fraction=self.min_success_fraction,
            least=MIN_ROBUST_CLIENTS if self.aggregation in ROBUST else 1,
            uniform=self.aggregation != "num_examples",
            max_update_norm=self.max_update_norm,
            watch_outliers=self.aggregation not in ROBUST and self.max_update_norm is None,
            tallies=self.module.tallies(),
        )

    def _average(self) -> Aggregate:
        match self.aggregation:
            case "median":
                return TrimmedMean(0.5)
            case "trimmed_mean":
                return TrimmedMean(self.trim_fraction)
        return WeightedAverage()

    def _require_finite(self, shared: State) -> State:
        if name := first_nonfinite(shared):
            raise RoundFailedError(f"the server's update made {name} NaN or infinite")
        return shared

    def _finish_round(self, shared: State, intake: Intake, failed: str | None, start: float) -> None:
        """Evaluate if due, do the accounts, tell the callbacks."""
        state, results, before = self.state, intake.results, time.perf_counter()
        state.shared = shared
        state.count(intake.failures, failed)
        if state.failed_in_a_row >= self.max_failed_rounds:
            state.stopped = (
                f"stopped after round {state.round_num}: {state.failed_in_a_row} rounds in a row failed, "
                f"`max_failed_rounds` allows no more. The last: {failed}"
            )
        metrics = client_metrics(results)
        due = state.round_num % self.eval_interval == 0 or state.round_num == self.num_rounds or bool(state.stopped)
        if due:
            metrics.update(self.evaluate())
            state.history.append({"round": state.round_num, **metrics})
            self._watch()
        shown = self.module.diagnostics(intake.tallies if failed is None else {}) if due else {}
        now = time.perf_counter()
        seconds = {
            "train": sum(result.train_seconds for result in results),
            "meta": sum(result.meta_seconds for result in results),
            "evaluate": now - before,
        }
        seconds["other"] = now - start - sum(seconds.values())
        if state.round_num:
            for kind, value in seconds.items():
                state.seconds[kind] += value
            state.bytes_total["received"] += sum(result.bytes_received for result in results)
            state.bytes_total["sent"] += sum(result.bytes_sent for result in results)
            state.clients_total += len(results)
        if due:
            totals = {"bytes": sum(state.bytes_total.values()), "seconds": state.seconds.copy()}
            state.diagnostics.append({"round": state.round_num, **totals, **shown})
        self._call(
            "on_round_end", RoundRecord(state.round_num, metrics, due, results, seconds, intake.failures, failed)
        )

    def _watch(self) -> None:
        """Say once if the global model has diverged."""
        state = self.state
        if state.diverged is None and (reason := divergence(state.history, *self._guess)):
            state.diverged = {"round": state.round_num, "reason": reason}
            log.warning("round %d: the global model has diverged: %s", state.round_num, reason)

    def evaluate(self) -> dict[str, float]:
        """Measure the server's current state on the test set.

        Returns:
            ``test/loss``, ``test/acc``, ``test/acc_<group>``, ``test/acc_class_<c>``.
        """
        self.module.load_shared_state(self.module.deployed(self.state.shared))
        loader = self.data.test_dataloader()
        with quiet():
            (metrics,) = self.trainer.build().test(self.module, loader, verbose=False)
        if self.module.test_confusion is not None:
            self.state.confusion = self.module.test_confusion.compute().tolist()
        return dict(metrics)

    def estimate(self) -> dict[str, float]:
        """Estimate what a round costs, from one client's fit and one evaluation; the run's state stays as it is.

        Returns:
            Means over rounds: ``train``, ``meta`` and ``evaluate`` in seconds, ``received`` and ``sent`` in tensor bytes, all
            clients together.

        Raises:
            FederationError: If the client fails.
        """
        sizes = [self.data.client_size(client) for client in range(self.data.num_clients)]
        typical = sorted((size, client) for client, size in enumerate(sizes) if size)
        clients = num_sampled(self.data.num_clients, self.client_fraction) * len(typical) / len(sizes)
        with quiet():
            tasks = self._tasks(self._server(1), [typical[len(typical) // 2][1]])
            results: list[ClientResult] = []
            begun = time.perf_counter()
            while not results or (len(results) < 3 and time.perf_counter() - begun < 3):  # the first fit is slower
                (outcome,) = self.executor.run(self.module, self.data.client, tasks, self._answer)
                if isinstance(outcome, ClientFailure):
                    raise FederationError(str(outcome))
                results.append(outcome)
            start, before = time.perf_counter(), self.state.confusion
            self.evaluate()
            self.state.confusion = before
        result, mean_size = results[-1], sum(sizes) / len(typical)
        return {
            "train": clients * result.train_seconds * mean_size / result.num_examples,
            "meta": clients * result.meta_seconds,
            "evaluate": (time.perf_counter() - start) / self.eval_interval,
            "received": clients * result.bytes_received,
            "sent": clients * result.bytes_sent,
        }

    def _call(self, hook: str, *args: Any) -> None:
        # the files last: what others have logged of a round is there when its checkpoint is
        for callback in [*self.callbacks, *self._files]:
            getattr(callback, hook)(self, *args)
