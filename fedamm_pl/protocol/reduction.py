"""How the server makes one tensor of what clients send, declared by prefix."""

from collections.abc import Mapping
from typing import Literal

Reduction = Literal["average", "mean", "sum"]
"""``average``: weighted as the models are (p_k = n_k / n, or as the run's aggregation says); ``mean``: over the clients
without weights; ``sum``. A robust aggregation takes the place of the first two; sums it cannot protect."""


def reduction_of(name: str, reductions: Mapping[str, Reduction]) -> Reduction:
    """Return how an entry is reduced: as the longest prefix of its name says.

    Args:
        name: Name of the entry.
        reductions: Prefix -> reduction.

    Raises:
        ValueError: If no prefix fits.

    Example:
        >>> reduction_of("control.w", {"model.": "average", "control.": "mean"})
        'mean'
    """
    fitting = [prefix for prefix in reductions if name.startswith(prefix)]
    if not fitting:
        raise ValueError(f"Expected `shared` and `returned` to say how {name} is reduced, got {sorted(reductions)}.")
    return reductions[max(fitting, key=len)]
