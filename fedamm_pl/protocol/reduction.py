"""How the server reduces the tensors of its clients to one, declared by the prefixes of their names."""

from collections.abc import Mapping
from typing import Literal

Reduction = Literal["average", "mean", "sum"]
"""``average``: weighted like the models (p_k = n_k / n, or as the run's aggregation defines it); ``mean``: unweighted
over the clients; ``sum``. A robust aggregation replaces the first two, but it cannot protect sums."""


def reduction_of(name: str, reductions: Mapping[str, Reduction]) -> Reduction:
    """Return the reduction of an entry, which is that of the longest matching prefix of its name.

    Args:
        name: Name of the entry.
        reductions: Prefix -> reduction.

    Raises:
        ValueError: If no prefix matches.

    Example:
        >>> reduction_of("control.w", {"model.": "average", "control.": "mean"})
        'mean'
    """
    fitting = [prefix for prefix in reductions if name.startswith(prefix)]
    if not fitting:
        raise ValueError(f"Expected `shared` and `returned` to say how {name} is reduced, got {sorted(reductions)}.")
    return reductions[max(fitting, key=len)]
