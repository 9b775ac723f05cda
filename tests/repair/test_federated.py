"""Federated pruning: ranks and votes of many devices become one order, and a fifth of liars cannot turn it round."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.repair.methods.federated import aggregate_ranks, aggregate_votes

CHANNELS = 16
HONEST = tuple(range(CHANNELS))
REVERSED = HONEST[::-1]


def rankings(liars: int, devices: int = 10) -> list[tuple[int, ...]]:
    """Honest devices whose neighbouring channels are swapped now and then, and liars who reverse the order."""
    rng = np.random.default_rng(0)
    honest = []
    for _ in range(devices - liars):
        order = list(HONEST)
        at = int(rng.integers(CHANNELS - 1))
        order[at], order[at + 1] = order[at + 1], order[at]
        honest.append(tuple(order))
    return [*honest, *[REVERSED] * liars]


@pytest.mark.parametrize("how", ["mean", "median"])
@pytest.mark.parametrize("liars", [0, 1, 2])
def test_a_fifth_of_liars_leaves_the_order_as_it_is(how: Literal["mean", "median"], liars: int) -> None:
    order = aggregate_ranks(rankings(liars), CHANNELS, how=how)
    assert sum(abs(place - channel) for place, channel in enumerate(order)) <= 4


@pytest.mark.parametrize("liars", [0, 1, 2, 4])
def test_liars_below_half_vote_nothing_in_and_nothing_out(liars: int) -> None:
    ballots = [r[: CHANNELS // 2] for r in rankings(liars)]
    assert set(aggregate_votes(ballots, CHANNELS)) >= set(HONEST[: CHANNELS // 2 - 1])
    assert not set(aggregate_votes(ballots, CHANNELS)) & set(HONEST[CHANNELS // 2 + 1 :])


@pytest.mark.parametrize("wrong", [(), (0, 1, 2), (0,) * CHANNELS, (*HONEST[:-1], 99), tuple(range(CHANNELS + 1))])
def test_a_ranking_that_is_none_does_not_count(wrong: tuple[int, ...]) -> None:
    assert aggregate_ranks([wrong], CHANNELS, how="median") == ()
    assert aggregate_ranks([wrong, HONEST], CHANNELS, how="mean") == HONEST


def test_who_votes_for_everything_has_no_more_than_half_of_the_channels() -> None:
    assert aggregate_votes([HONEST], CHANNELS) == HONEST[: CHANNELS // 2]


@given(st.lists(st.lists(st.integers(-5, 40), max_size=60), max_size=12))
def test_whatever_devices_send_each_channel_comes_at_most_once(sent: list[list[int]]) -> None:
    for order in (aggregate_votes(sent, CHANNELS), aggregate_ranks(sent, CHANNELS, how="median")):
        assert len(set(order)) == len(order)
        assert set(order) <= set(HONEST)
