"""``FederationConfig``: how a federation runs, each option once."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Aggregation = Literal["num_examples", "uniform", "median", "trimmed_mean"]
ServerOptimizerName = Literal["none", "momentum", "adagrad", "adam", "yogi"]
ROBUST = ("median", "trimmed_mean")
MIN_ROBUST_CLIENTS = 3
"""With fewer clients the median equals the mean."""


@dataclass(frozen=True)
class FederationConfig:
    """How a federation runs.

    Raises:
        ValueError: If an option is out of range.
    """

    num_rounds: int
    """Rounds to run; 0 evaluates the initial model."""
    client_fraction: float = 0.5
    """Fraction of the clients that take part in a round, in (0, 1]."""
    local_epochs: int = 5
    """Local epochs per round."""
    lr_decay: float = 1.0
    """Factor by which the clients' learning rate is multiplied after each round, in (0, 1]; FedAMM's meta_lr is not changed."""
    aggregation: Aggregation = "num_examples"
    """How clients are averaged: weighted by num_examples (p_k = n_k / n), uniform, or robustly and without weights by the coordinate-wise
    median or trimmed_mean."""
    trim_fraction: float = 0.1
    """trimmed_mean: fraction of the clients dropped at each end, in (0, 0.5]."""
    max_update_norm: float | None = None
    """Clip updates of the shared model to this Euclidean norm; null disables it. What a method sends besides the model is not clipped."""
    server_optimizer: ServerOptimizerName = "none"
    """How the server uses the average: none takes the average itself; momentum (FedAvgM), adagrad (FedAdagrad), adam (FedAdam) and yogi
    (FedYogi) take a step along the averaged update, with any method. Buffers and FedAMM's weight net are always averaged."""
    server_lr: float | None = None
    """Step size of the server optimizer; null: 1.0 for momentum, else 0.01."""
    server_momentum: float | None = None
    """Its momentum (beta 1), in [0, 1); null: 0.9, adagrad 0."""
    server_beta2: float = 0.99
    """adam and yogi: decay rate of the second moment (beta 2), in [0, 1]."""
    server_tau: float = 1e-3
    """adagrad, adam and yogi: added to the square root of the second moment, which starts at the square of this value."""
    min_success_fraction: float = 0.5
    """Fraction of a round's clients that must succeed, in [0, 1]; otherwise the server's state is not changed."""
    max_failed_rounds: int = 3
    """Number of consecutive failed rounds after which the run stops."""
    eval_interval: int = 5
    """Rounds between evaluations on the test set; the last round is always evaluated."""
    early_stopping: int | None = None
    """Number of consecutive evaluations without a higher val/acc after which the run ends; null: no early stopping. It needs a validation
    set: data.num_val_per_class, or data that come with one."""

    def __post_init__(self) -> None:
        if not 0 < self.client_fraction <= 1:
            raise ValueError(f"Expected `client_fraction` to be in (0, 1], got {self.client_fraction}.")
        if not 0 < self.lr_decay <= 1:
            raise ValueError(f"Expected `lr_decay` to be in (0, 1], got {self.lr_decay}.")
        if not 0 <= self.min_success_fraction <= 1:
            raise ValueError(f"Expected `min_success_fraction` to be in [0, 1], got {self.min_success_fraction}.")
        if not 0 < self.trim_fraction <= 0.5:
            raise ValueError(f"Expected `trim_fraction` to be in (0, 0.5], got {self.trim_fraction}.")
        if self.max_update_norm is not None and not 0 < self.max_update_norm < math.inf:
            raise ValueError(f"Expected `max_update_norm` to be a number above 0 or null, got {self.max_update_norm}.")
        for name, least in (("num_rounds", 0), ("local_epochs", 1), ("eval_interval", 1), ("max_failed_rounds", 1)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"Expected `{name}` to be {least} or more, got {value}.")
        if self.early_stopping is not None and self.early_stopping < 1:
            raise ValueError(f"Expected `early_stopping` to be 1 or more or null, got {self.early_stopping}.")
        for name, choices in (
            ("aggregation", get_args(Aggregation)),
            ("server_optimizer", get_args(ServerOptimizerName)),
        ):
            if (chosen := getattr(self, name)) not in choices:
                raise ValueError(f"Expected `{name}` to be one of {', '.join(choices)}, got {chosen!r}.")
        self._check_server_optimizer()

    def _check_server_optimizer(self) -> None:
        for name in ("server_lr", "server_momentum"):
            if self.server_optimizer == "none" and (value := getattr(self, name)) is not None:
                raise ValueError(f"Expected `{name}` with a `server_optimizer`, got {value} with none.")
        if self.server_lr is not None and not 0 < self.server_lr < math.inf:
            raise ValueError(f"Expected `server_lr` to be a number above 0 or null, got {self.server_lr}.")
        if self.server_momentum is not None and not 0 <= self.server_momentum < 1:
            raise ValueError(f"Expected `server_momentum` to be in [0, 1) or null, got {self.server_momentum}.")
        if not 0 <= self.server_beta2 <= 1:
            raise ValueError(f"Expected `server_beta2` to be in [0, 1], got {self.server_beta2}.")
        if not 0 < self.server_tau < math.inf:
            raise ValueError(f"Expected `server_tau` to be a number above 0, got {self.server_tau}.")

    @property
    def robust(self) -> bool:
        """Whether the aggregation is robust against single clients."""
        return self.aggregation in ROBUST
