"""Counts of labels in one value: what goes in comes out, and adding adds."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from edgeguard.hub import tallies

ONE = st.tuples(st.integers(0, 4), st.integers(-1, 4095), st.integers(0, 2**40), st.integers(0, 2**40))


def content(packed: list[bytes]) -> dict[tuple[int, int], tuple[int, int]]:
    columns = (column.tolist() for column in tallies.unpack(packed))
    return {(which, label): (inputs, flagged) for which, label, inputs, flagged in zip(*columns, strict=True)}


@given(st.lists(ONE), st.lists(ONE))
def test_adding_in_two_steps_gives_the_sum_for_each_label(
    first: list[tuple[int, int, int, int]], second: list[tuple[int, int, int, int]]
) -> None:
    inputs: Counter[tuple[int, int]] = Counter()
    flagged: Counter[tuple[int, int]] = Counter()
    for which, label, some, bad in (*first, *second):
        inputs[which, label] += some
        flagged[which, label] += bad
    packed = tallies.add(tallies.add([b""] * 5, first), second)
    assert content(packed) == {key: (inputs[key], flagged[key]) for key in inputs}


def test_one_label_takes_eighteen_bytes() -> None:
    assert [len(tally) for tally in tallies.add([b"", b""], [(1, 7, 1, 0), (1, -1, 2**60, 3)])] == [0, 36]


def test_nothing_is_added_to_nothing() -> None:
    assert tallies.add([], []) == []
