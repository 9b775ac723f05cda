"""How much passes a limiter, for how long, and in how much memory."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.hub.limits import Limiter, Novelties


def passed(limiter: Limiter, times: int, *, at_s: float, key: str = "d1", size: int = 0) -> int:
    return sum(limiter.passes(key, now_s=at_s, size=size) for _ in range(times))


def test_a_burst_passes_at_once_and_then_so_many_a_second() -> None:
    limiter = Limiter(rate=2.0, burst=10)
    assert passed(limiter, 100, at_s=0.0) == 10
    assert passed(limiter, 100, at_s=1.0) == 2
    assert passed(limiter, 100, at_s=3.5) == 5


def test_a_long_silence_saves_up_one_burst_and_no_more() -> None:
    limiter = Limiter(rate=2.0, burst=10)
    passed(limiter, 10, at_s=0.0)
    assert passed(limiter, 100, at_s=1e6) == 10


def test_a_flood_does_not_shut_a_device_out_for_longer() -> None:
    limiter = Limiter(rate=1.0, burst=1)
    passed(limiter, 10_000, at_s=0.0)
    assert passed(limiter, 1, at_s=1.0) == 1


def test_keys_do_not_share_a_bucket() -> None:
    limiter = Limiter(rate=1.0, burst=3)
    passed(limiter, 100, at_s=0.0, key="loud")
    assert passed(limiter, 3, at_s=0.0, key="quiet") == 3


def test_bytes_have_a_bucket_of_their_own_and_a_large_message_lets_small_ones_by() -> None:
    limiter = Limiter(rate=100.0, burst=100, bytes_rate=1000.0, bytes_burst=5000.0)
    assert passed(limiter, 10, at_s=0.0, size=2000) == 2
    assert passed(limiter, 2, at_s=0.0, size=500) == 2
    assert passed(limiter, 1, at_s=0.0, size=1) == 0
    assert passed(limiter, 1, at_s=2.0, size=2000) == 1


def test_a_clock_that_jumps_back_neither_blocks_for_ever_nor_gives_anything() -> None:
    limiter = Limiter(rate=1.0, burst=2)
    passed(limiter, 2, at_s=1000.0)
    assert passed(limiter, 5, at_s=0.0) == 0
    assert passed(limiter, 5, at_s=1.0) == 1


def test_full_buckets_are_forgotten() -> None:
    limiter = Limiter(rate=1.0, burst=2)
    for i in range(1000):
        limiter.passes(f"d{i}", now_s=float(i))
    assert len(limiter) <= 2


@pytest.mark.parametrize("rate", [1e-9, 1.0])
def test_however_many_keys_there_are_memory_is_bounded(rate: float) -> None:
    limiter = Limiter(rate=rate, burst=2, keys=100)
    for i in range(10_000):
        limiter.passes(f"d{i}", now_s=0.0)
    assert len(limiter) == 100


@given(st.lists(st.tuples(st.floats(0, 10), st.integers(0, 300)), max_size=60))
def test_no_order_of_messages_gets_more_than_rate_and_burst_through(steps: list[tuple[float, int]]) -> None:
    limiter = Limiter(rate=3.0, burst=5, bytes_rate=100.0, bytes_burst=500.0)
    now = 0.0
    count = content = 0
    for wait_s, size in steps:
        now += wait_s
        if limiter.passes("d1", now_s=now, size=size):
            count, content = count + 1, content + size
    assert count <= 5 + 3.0 * now + 1e-6
    assert content <= 500 + 100.0 * now + 1e-6


def test_what_is_new_of_a_device_is_limited_and_what_is_known_passes() -> None:
    things = Novelties(rate=1.0, burst=2)
    assert [things.passes("d1", thing, now_s=0.0) for thing in "abca"] == [True, True, False, True]
    assert things.passes("d2", "c", now_s=0.0)
    assert things.passes("d1", "c", now_s=1.0)


def test_what_was_forgotten_for_lack_of_room_is_new_again() -> None:
    things = Novelties(rate=0.0, burst=3, known=2)
    assert [things.passes("d1", thing, now_s=0.0) for thing in "abca"] == [True, True, True, False]
