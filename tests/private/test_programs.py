"""What is computed on shares, in clear: robust orders of channels, against NumPy. Three processes: test_rounds.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract.private import Kind, Round
from tests.simulators import needs

jax = needs.python_module("jax", "jax", until=(3, 11))


def a_round(channels: int, kind: Kind, prune: int, min_devices: int = 3) -> Round:
    return Round(
        id="round-0001", fleet="gate", parties="0" * 64, model_digest="0" * 64, layer="conv", channels=channels,
        kind=kind, prune=prune, min_devices=min_devices,
    )  # fmt: skip


def computed(asked: Round, submitted: Any) -> tuple[list[int], bool]:
    """The channels that the program opens, and whether it says that enough took part."""
    from edgeguard.private import programs

    x = np.asarray(submitted, dtype=np.int64)
    rng = np.random.default_rng(0)
    s0, s1 = (rng.integers(-(2**63), 2**63 - 1, x.shape) for _ in range(2))
    with jax.experimental.enable_x64():
        mask, enough = programs.program(asked)(*map(jax.numpy.asarray, (s0, s1, x - s0 - s1)))
    return np.flatnonzero(np.asarray(mask)).tolist(), bool(enough)


def lowest(cost: Any, count: int) -> list[int]:
    return sorted(np.lexsort((np.arange(len(cost)), cost))[:count].tolist())


def rankings(devices: int, channels: int, seed: int) -> Any:
    rng = np.random.default_rng(seed)
    return np.stack([rng.permutation(channels) for _ in range(devices)])


@given(devices=st.integers(3, 9), channels=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_ranks_open_the_channels_with_the_lowest_median_rank(devices: int, channels: int, seed: int) -> None:
    ranks, prune = rankings(devices, channels, seed), channels // 2
    median = np.sort(ranks, axis=0)[(devices - 1) // 2]
    assert computed(a_round(channels, "ranks", prune), ranks) == (lowest(median, prune), True)


@given(devices=st.integers(3, 9), channels=st.integers(2, 9), seed=st.integers(0, 2**32 - 1))
@settings(max_examples=10, deadline=None)
def test_votes_open_the_channels_that_most_devices_named(devices: int, channels: int, seed: int) -> None:
    prune = channels // 2
    votes = (rankings(devices, channels, seed) < prune).astype(np.int64)
    assert computed(a_round(channels, "votes", prune), votes) == (lowest(-votes.sum(axis=0), prune), True)


HONEST_RANKS = [[0, 1, 2, 3]] * 5
HONEST_VOTES = [[1, 0, 0, 0]] * 5
LIES = {
    "a vote of a thousand": ("votes", HONEST_VOTES, [0, 0, 0, 1000]),
    "a negative vote": ("votes", HONEST_VOTES, [2, 0, 0, -1]),
    "votes for everything": ("votes", HONEST_VOTES, [1, 1, 1, 1]),
    "no vote": ("votes", HONEST_VOTES, [0, 0, 0, 0]),
    "a vote that wraps around": ("votes", HONEST_VOTES, [-(2**63), 2**62, 2**62, 1]),
    "a rank beyond the last": ("ranks", HONEST_RANKS, [6, 0, 0, 0]),
    "a rank below the first": ("ranks", HONEST_RANKS, [3, 3, 3, -3]),
    "one rank for all": ("ranks", HONEST_RANKS, [1, 1, 1, 1]),
}


@pytest.mark.parametrize(("kind", "honest", "lie"), LIES.values(), ids=LIES)
def test_a_submission_that_is_none_does_not_count(kind: Kind, honest: list[list[int]], lie: list[int]) -> None:
    asked = a_round(4, kind, 1, min_devices=5)
    assert computed(asked, [*honest, lie]) == ([0], True)
    # It is not counted among those that took part either.
    assert computed(asked, [*honest[:4], lie]) == ([], False)


@pytest.mark.parametrize("kind", ["votes", "ranks"])
def test_less_than_half_of_the_devices_cannot_choose_the_channel(kind: Kind) -> None:
    honest, lie = (HONEST_VOTES, [0, 0, 0, 1]) if kind == "votes" else (HONEST_RANKS, [3, 2, 1, 0])
    assert computed(a_round(4, kind, 1), [*honest, *[lie] * 4]) == ([0], True)


@pytest.mark.parametrize("kind", ["votes", "ranks"])
def test_too_few_valid_submissions_open_nothing_but_that(kind: Kind) -> None:
    honest = HONEST_VOTES if kind == "votes" else HONEST_RANKS
    assert computed(a_round(4, kind, 1, min_devices=6), honest) == ([], False)


def test_of_two_channels_alike_the_lower_number_is_opened() -> None:
    assert computed(a_round(4, "ranks", 2), [[0, 1, 2, 3], [0, 2, 1, 3], [0, 1, 2, 3], [0, 2, 1, 3]]) == ([0, 1], True)
