"""What rejected suspicions do to the weight of devices, and how many of them liars can cause."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.hub import trust
from edgeguard.hub.trust import MEMORY_MS, Trust, most_rejections

NOW = 2 * MEMORY_MS


def test_each_rejection_halves_what_a_device_counts() -> None:
    known = trust.after_rejection({}, ["a", "b"], NOW)
    known |= trust.after_rejection(known, ["a"], NOW + 1)
    assert {name: one.weight for name, one in known.items()} == {"a": 0.25, "b": 0.5}


def test_only_the_devices_behind_the_suspicion_are_changed() -> None:
    known = {"a": Trust(rejections=3, rejected_ms=NOW)}
    assert set(trust.after_rejection(known, ["b"], NOW)) == set(trust.after_confirmation(known, ["b"])) == {"b"}


def test_a_confirmation_takes_back_one_rejection() -> None:
    known = {"a": Trust(rejections=2, rejected_ms=NOW)}
    assert trust.after_confirmation(known, ["a", "b"]) == {"a": Trust(rejections=1, rejected_ms=NOW), "b": Trust()}


def test_a_year_without_a_rejection_is_forgotten_and_no_sooner() -> None:
    known = {"a": Trust(rejections=2, rejected_ms=NOW)}
    assert trust.standing(known, NOW + MEMORY_MS)["a"].weight == 0.25
    assert trust.standing(known, NOW + MEMORY_MS + 1)["a"].weight == 1.0
    assert trust.after_rejection(known, ["a"], NOW + MEMORY_MS + 1)["a"].rejections == 1


def test_lost_weight_raises_the_bar() -> None:
    lost = {f"d{i}": Trust(rejections=1, rejected_ms=NOW) for i in range(40)}
    assert trust.bar({}, 3) == 3
    assert trust.bar(lost, 3) == pytest.approx(trust.BAR * 40 / 2)


@pytest.mark.parametrize(
    ("liars", "quorum", "most"),
    [(0, 2, 0), (1, 2, 0), (2, 2, 1), (20, 2, 10), (200, 3, 18), (2000, 25, 19), (2000, 1, 34)],
)
def test_the_bound_is_small_and_grows_slowly(liars: int, quorum: int, most: int) -> None:
    assert most_rejections(liars, quorum) == most


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 60), st.integers(1, 6), st.integers(0, 2**32 - 1), st.booleans())
def test_liars_cause_no_more_rejections_in_a_year_than_the_bound_whoever_stands_up_when(
    liars: int, quorum: int, seed: int, thrifty: bool
) -> None:
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(liars)]
    # Where they come from: some were wrong before, and may be forgiven within the year.
    known = {name: Trust(rejections=2, rejected_ms=NOW - int(rng.integers(MEMORY_MS))) for name in names[::3]}
    caused = 0
    for day in range(0, 365, 3):
        at_ms = NOW + day * 86_400_000
        standing = trust.standing(known, at_ms)
        weight = {name: standing.get(name, Trust()).weight for name in names}
        order = sorted(names, key=lambda name: (-weight[name] if thrifty else 0.0, rng.random()))
        needed, group, together = trust.bar(standing, quorum), list[str](), 0.0
        for name in order:
            if together >= needed:
                break
            group.append(name)
            together += weight[name]
        if together >= needed:
            caused += 1
            known |= trust.after_rejection(known, group, at_ms)
    assert caused <= most_rejections(liars, quorum)
