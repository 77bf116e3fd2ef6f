"""What is compared, and how: the options of ``fedamm compare``."""

import dataclasses
import math
from typing import Any, Literal

Budget = Literal["rounds", "bytes"]


@dataclasses.dataclass(frozen=True)
class TuningConfig:
    """How the options of methods are chosen on validation before the runs of the table."""

    seeds: list[int]
    """Seeds of the runs that try candidates; none of them may be in `seeds`."""
    methods: dict[str, list[dict[str, Any]]]
    """Name in `methods` -> candidates: options of the algorithm that override the method's own."""
    per_setting: bool = False
    """false: one choice for all settings, by the mean over them; true: one choice per setting."""

    def __post_init__(self) -> None:
        if not self.seeds or not self.methods:
            raise ValueError("Expected `tuning.seeds` and `tuning.methods` to hold something, got one that is empty.")
        if empty := [name for name, candidates in self.methods.items() if not candidates]:
            raise ValueError(f"Expected `tuning.methods` to give {empty[0]} a candidate or more, got none.")


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """What is compared, and how it is run."""

    base: dict[str, Any]
    """Options that all runs share, as in the configuration of a run."""
    methods: dict[str, dict[str, Any] | None]
    """Name in the table -> options of the algorithm; class_path may be omitted if it is the name."""
    seeds: list[int] = dataclasses.field(default_factory=lambda: [0, 1, 2])
    """Each is used by all methods: same split, same clients, same initial weights."""
    grid: dict[str, list[Any]] = dataclasses.field(default_factory=dict)
    """Option, such as data.partition -> its values; every combination is a setting with its own table."""
    dir: str | None = None
    """Folder of the comparison; by default runs/<config name>. Finished runs in it are skipped, interrupted ones continue."""
    jobs: int = 1
    """Number of runs at the same time; they share the processor's cores. 0: run nothing and write the tables of the finished runs."""
    address: str | None = None
    """A Ray cluster for the runs instead of `jobs`: `host:6379`, or `auto` for the one on this machine. As many run as it has room for.
    `local` starts one here, for a machine with several GPUs. With several machines, data and `dir` must be in folders that all share."""
    cpus_per_run: float = 1.0
    """Cores, and threads, of each run in the cluster."""
    gpus_per_run: float = 0.0
    """GPUs of each run in the cluster; 0.25 puts four runs on one GPU. 0: it sees none."""
    reference: str | None = None
    """The method that the others are compared with, seed by seed: one of `methods`; by default FedAvg, or the first if there is none."""
    budget: Budget = "rounds"
    """What is the same for all methods: the number of rounds, or the bytes, as many as the cheapest method needs with the same setting
    and seed. With `bytes`, a run counts up to the last evaluation within them; the files are called results_bytes, and accuracy is
    drawn against bytes. Change it with `jobs` 0 when all runs are finished."""
    groups: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """Title -> some of `methods`, such as those that need the same privileges. Tables and figures show them under their titles, in this
    order; methods in no group come last. Bold print and mean ranks then apply within each group only."""
    tuning: TuningConfig | None = None
    """Candidates for the options of some methods, and seeds to try them with. The best on validation (mean of the last ten evaluations,
    over these seeds) is used for the table. The data need a validation set."""

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds or not all(self.grid.values()):
            raise ValueError(
                "Expected `methods`, `seeds` and each entry of `grid` to hold something, got one that is empty."
            )
        if self.jobs < 0:
            raise ValueError(f"Expected `jobs` to be 0 or more, got {self.jobs}.")
        for name in ("cpus_per_run", "gpus_per_run"):
            amount, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if not 0 <= amount < math.inf or (name == "cpus_per_run" and not amount):
                raise ValueError(
                    f"Expected `{name}` to be a number {'above' if default else 'of'} 0{'' if default else ' or more'}, got {amount}."
                )
            if amount != default and self.address is None:
                raise ValueError(
                    f"Expected `address` to be given with `{name}`, got {name} {amount:g} alone: `jobs` runs take what there is."
                )
        if self.reference is not None:
            self._require_method("`reference` to be", self.reference)
        grouped = [name for members in self.groups.values() for name in members]
        for name in grouped:
            self._require_method("`groups` to hold", name)
            if grouped.count(name) > 1:
                raise ValueError(f"Expected `groups` to hold each method once, got {name} twice.")
        if empty := [title for title, members in self.groups.items() if not members or not title]:
            raise ValueError(
                f"Expected `groups` to have titles and to hold methods, got {empty[0]!r}, which lacks one."
            )
        if self.tuning:
            for name in self.tuning.methods:
                self._require_method("`tuning.methods` to have names that are", name)
            if both := [seed for seed in self.tuning.seeds if seed in self.seeds]:
                raise ValueError(
                    f"Expected `tuning.seeds` to be others than `seeds`, which are reported, got {both[0]} in both."
                )

    def _require_method(self, what: str, name: str) -> None:
        if name not in self.methods:
            raise ValueError(f"Expected {what} one of `methods`, {', '.join(self.methods)}, got {name}.")
