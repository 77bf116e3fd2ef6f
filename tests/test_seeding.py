"""Seeds: the same everywhere, and different wherever anything differs."""

import itertools
import random

import numpy as np
import pytest
import torch

from fedamm_pl.seeding import derive_seed, drawing_as, drawing_from, global_state, numpy_generator, torch_generator

PURPOSES = ("sampling", "client", "meta", "partition")


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63 - 1])
@pytest.mark.parametrize("keys", [(), (3,), (3, 1, 2)])
def test_seed_has_63_bits_and_repeats(seed: int, keys: tuple[int, ...]) -> None:
    derived = derive_seed(seed, "meta", *keys)
    assert derived == derive_seed(seed, "meta", *keys)
    assert type(derived) is int
    assert 0 <= derived < 2**63
    torch_generator(derived)
    numpy_generator(seed, "meta", *keys)


def test_seed_is_the_same_on_every_machine() -> None:
    # changes only together with the results of every run
    assert derive_seed(0, "sampling", 1) == 1558429665125453911


def test_seed_purpose_and_keys_each_make_a_difference() -> None:
    cells = list(itertools.product((0, 1, 2, 2**40), PURPOSES, range(1, 5), range(4), range(4)))
    assert len({derive_seed(seed, purpose, *keys) for seed, purpose, *keys in cells}) == len(cells)


def test_order_of_the_keys_makes_a_difference() -> None:
    assert len({derive_seed(0, "meta", *keys) for keys in itertools.permutations((1, 2, 3))}) == 6


def test_bits_of_derived_seeds_are_balanced() -> None:
    seeds = np.array([derive_seed(0, "sampling", number) for number in range(500)], dtype=np.uint64)
    bits = (seeds[:, None] >> np.arange(63, dtype=np.uint64)) & np.uint64(1)
    assert np.abs(bits.mean(0) - 0.5).max() < 0.1  # 4.5 standard errors


def test_numpy_generators_repeat_and_differ_by_purpose() -> None:
    first, same, other = (numpy_generator(0, purpose, 1).random(4).tolist() for purpose in ("a", "a", "b"))
    assert first == same
    assert first != other


def test_torch_generators_repeat_on_the_cpu_and_leave_the_global_state_alone() -> None:
    before = torch.get_rng_state()
    generators = [torch_generator(seed) for seed in (5, 5, 6)]
    first, same, other = (torch.rand(4, generator=generator).tolist() for generator in generators)
    assert first == same
    assert first != other
    assert generators[0].device.type == "cpu"
    assert torch.equal(torch.get_rng_state(), before)


def draws() -> tuple[float, float, float]:
    """A draw from each global state that a network may draw from."""
    return float(torch.rand(())), random.random(), float(np.random.random())  # noqa: NPY002


def test_all_that_a_network_may_draw_from_follows_the_seed_and_is_left_as_it_was() -> None:
    device = torch.device("cpu")
    before = global_state(device)
    with drawing_from(3, device):
        first = draws()
        state = global_state(device)
        then = draws()
    with drawing_from(3, device):
        assert draws() == first
    with drawing_as(state, device):
        assert draws() == then
    left = draws()
    with drawing_as(before, device):
        assert draws() == left


def test_the_global_state_is_as_it_was_after_an_error() -> None:
    device = torch.device("cpu")
    state = global_state(device)
    with pytest.raises(ZeroDivisionError), drawing_from(3, device):
        draws()[0] / 0
    left = draws()
    with drawing_as(state, device):
        assert draws() == left
