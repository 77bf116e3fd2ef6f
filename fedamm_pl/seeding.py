"""Seeds as a function of (seed, purpose, round, client, step). All randomness is derived here."""

import random
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.random.mtrand import get_bit_generator, set_bit_generator

_spare: list[np.random.MT19937] = []
"""Generators that temporarily replace NumPy's global one; copying its state would take longer than all other steps."""


def derive_seed(seed: int, purpose: str, *keys: int) -> int:
    """Derive an independent 63-bit seed from the run's seed.

    Args:
        seed: The seed of the run, a non-negative integer.
        purpose: What the randomness is for, for example ``"sampling"``; each purpose has its own stream.
        keys: Non-negative integers that distinguish the draws of one purpose: round, client, step. A purpose always has
            the same number of keys.

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
    """Return a NumPy generator with the seed that :func:`derive_seed` gives for the same arguments."""
    return np.random.default_rng(derive_seed(seed, purpose, *keys))


def torch_generator(seed: int) -> torch.Generator:
    """Return a CPU generator with this seed; draws made on the CPU are the same for every training device."""
    return torch.Generator().manual_seed(seed)


def global_state(device: torch.device) -> tuple[Any, ...]:
    """Return the state of all generators that a network may use: torch (CPU and device), Python's ``random``, NumPy."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device, random.getstate(), np.random.get_state()  # noqa: NPY002  a network may use it


def set_global_state(state: tuple[Any, ...], device: torch.device) -> None:
    """Set the state that :func:`global_state` has returned."""
    on_cpu, on_device, python, numpy = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        torch.cuda.set_rng_state(on_device, device)
    random.setstate(python)
    np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def drawing_as(state: tuple[Any, ...], device: torch.device) -> Iterator[None]:
    """Repeat the draws that were made from a state; the global state is restored afterwards."""
    before = global_state(device)
    set_global_state(state, device)
    try:
        yield
    finally:
        set_global_state(before, device)


@contextmanager
def drawing_from(seed: int, device: torch.device) -> Iterator[None]:
    """Seed the global state, which dropout and similar layers draw from; it is restored afterwards."""
    python, numpy = random.getstate(), get_bit_generator()
    own = _spare.pop() if _spare else np.random.MT19937()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        # not torch.manual_seed on a CPU: it looks for every kind of GPU, which takes a tenth of a small client's time
        seed_all = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        seed_all(seed)
        random.seed(seed)
        set_bit_generator(own)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        try:
            yield
        finally:
            random.setstate(python)
            set_bit_generator(numpy)
            _spare.append(own)
