"""``Progress``: shows the progress of a run on the terminal."""

import shutil
import sys
import time

from tqdm import tqdm

from fedamm_pl.federation.callbacks.base import FederationCallback, RoundRecord
from fedamm_pl.federation.callbacks.loggers import images_per_second
from fedamm_pl.federation.run import Run
from fedamm_pl.federation.sampling import num_sampled
from fedamm_pl.federation.summary import beside, short_names
from fedamm_pl.protocol.messages import ClientResult
from fedamm_pl.terminal import say


class Progress(FederationCallback):
    """A bar over rounds: clients done, workers busy with one, loss, accuracies, images/s, time left, failures.

    If the output is not a terminal, it prints one plain line per evaluation.
    """

    def on_run_start(self, run: Run) -> None:
        """Open the bar."""
        self._latest = dict(run.state.history[-1]) if run.state.history else {}
        self._clients, self._speed = 0, 0.0
        self._first, self._start = run.state.round_num, time.monotonic()
        self._bar = tqdm(
            total=run.config.num_rounds,
            initial=self._first,
            bar_format="round {n_fmt}/{total_fmt} |{bar:6}| {elapsed}<{remaining}{postfix}",
            ncols=shutil.get_terminal_size().columns,
            disable=sys.stderr is None or not sys.stderr.isatty(),
        )

    def on_client_end(self, run: Run, result: ClientResult) -> None:
        """Show how many clients of the round are done."""
        self._clients += 1
        self._show(run)

    def on_round_end(self, run: Run, record: RoundRecord) -> None:
        """Move the bar, or print a line if the round was evaluated."""
        self._latest.update(record.metrics)
        self._clients = 0
        if record.results:
            self._speed = images_per_second(run, record)
        self._bar.update(record.round_num - self._bar.n)
        self._show(run)
        if self._bar.disable and record.evaluated:
            done, left = record.round_num - self._first, run.config.num_rounds - record.round_num
            parts = [f"round {record.round_num}/{run.config.num_rounds}"]
            shown = short_names(self._latest) | beside(self._latest)
            parts += [f"{name} {self._latest[metric]:.1%}" for metric, name in shown.items()]
            if "client/loss" in self._latest:
                parts.append(f"client_loss {self._latest['client/loss']:.3f}")
            parts += self._throughput() + self._failures(run)
            if done and left:
                parts.append(f"{(time.monotonic() - self._start) / done * left:.0f} s left")
            say("  ".join(parts))

    def _show(self, run: Run) -> None:
        if self._bar.disable:
            return
        sampled = num_sampled(run.data.num_clients, run.config.client_fraction)
        parts = [f"client {self._clients}/{sampled}"] if self._clients else []
        busy, workers = run.busy()
        parts += [f"{busy}/{workers} workers busy"] if busy else []
        parts += [f"{name} {100 * self._latest[metric]:.0f}%" for metric, name in short_names(self._latest).items()]
        parts += self._failures(run)
        if "client/loss" in self._latest:
            parts.append(f"loss {self._latest['client/loss']:.2f}")
        self._bar.set_postfix_str(" ".join(parts + self._throughput()))  # a narrow terminal cuts off its end

    def _throughput(self) -> list[str]:
        return [f"{self._speed:,.0f} examples/s"] if self._speed else []

    def _failures(self, run: Run) -> list[str]:
        failures = sum(run.state.counts[name] for name in ("failed_clients", "refused_updates"))
        return [f"{failures} failures"] if failures else []

    def on_run_end(self, run: Run) -> None:
        """Close the bar."""
        self._bar.close()
