"""Randomness as a function of (seed, purpose, round, client, step), derived here and nowhere else."""

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(seed: int, purpose: str, *keys: int) -> int:
    """Derive an independent 63-bit seed from the run's seed.

    Args:
        seed: The seed of the run, a non-negative integer.
        purpose: What the randomness is for, for example ``"sampling"``; each purpose has its own stream.
        keys: Non-negative integers that tell the draws of one purpose apart: round, client, step. A purpose always has
            the same number of them.

    Returns:
        A seed for any generator. The same arguments give the same seed on every machine.

    Example:
        >>> derive_seed(0, "sampling", 1) == derive_seed(0, "sampling", 1)
        True
        >>> derive_seed(0, "sampling", 1) == derive_seed(0, "sampling", 2)
        False
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *keys])
    return int(entropy.generate_state(1, np.uint64)[0] >> np.uint64(1))


def numpy_generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """Return a NumPy generator for :func:`derive_seed` of the same arguments."""
    return np.random.default_rng(derive_seed(seed, purpose, *keys))


def torch_generator(seed: int) -> torch.Generator:
    """Return a CPU generator with this seed: draws made on the CPU are the same for every training device."""
    return torch.Generator().manual_seed(seed)


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Let dropout and the like, which draw from the global state, draw from a seed; afterwards it is as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # on a CPU not torch.manual_seed, which looks for every kind of GPU: for a small client that is a tenth of its time
        seed_all = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        seed_all(seed)
        yield
