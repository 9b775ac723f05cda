"""Whether a device fares worse than before: found where it does, and hardly ever where it does not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeguard.hub.vitals import LATENCY, STARTS_PER_DAY, Vitals, looks, worse

LEVEL = 0.01


def vitals(**fields: Any) -> Vitals:
    usual: dict[str, Any] = {
        "counts": {0: (500, 5), 1: (500, 5)}, "starts": 1, "seconds": 86_400.0, "latencies": tuple(range(100, 116)),
    }  # fmt: skip
    return Vitals(**(usual | fields))


def found(after: Vitals, before: Vitals | None = None, *, look: int = 1) -> tuple[str, ...]:
    return worse(before or vitals(), after, promised=0.01, level=LEVEL, look=look)


@pytest.mark.parametrize(
    ("what", "after", "words"),
    [
        ("flags", vitals(counts={0: (500, 60), 1: (500, 50)}), "flags 11.0% of 1000 inputs, before 1.0% of 1000"),
        ("one class for everything", vitals(counts={0: (1000, 10)}), "calls 100% of its inputs 0, before 50%"),
        ("slow", vitals(latencies=(400.0,) * 16), "takes 400 us, before 108 us"),
        ("starts again and again", vitals(starts=30, seconds=600.0), "started 30 times in 600 s, before 1 in 86400 s"),
    ],
)
def test_what_is_worse_is_named_with_both_figures(what: str, after: Vitals, words: str) -> None:
    assert found(after) == (words,), what


@pytest.mark.parametrize(
    ("what", "after"),
    [
        ("the same", vitals()),
        ("nothing told", Vitals()),
        ("twice the flags of before", vitals(counts={0: (500, 10), 1: (500, 10)})),
        ("few inputs of one class", vitals(counts={0: (10, 0)})),
        ("a scene that shifts a little", vitals(counts={0: (600, 6), 1: (400, 4)})),
        ("a little slower", vitals(latencies=tuple(1.3 * us for us in range(100, 116)))),
        ("two slow readings", vitals(latencies=(*range(100, 114), 900.0, 900.0))),
        ("somebody restarted it twice", vitals(starts=2, seconds=600.0)),
        ("less flags", vitals(counts={0: (500, 0), 1: (500, 0)})),
    ],
)
def test_what_chance_and_the_tolerances_explain_is_not_worse(what: str, after: Vitals) -> None:
    assert found(after) == (), what


@pytest.mark.parametrize(
    "before",
    [
        vitals(counts={0: (1000, 110)}),
        vitals(latencies=(400.0,) * 16),
        vitals(starts=9000),
    ],
)
def test_a_device_that_fared_so_before_is_not_worse(before: Vitals) -> None:
    assert (
        found(
            vitals(counts=before.counts, latencies=before.latencies, starts=before.starts // 1000, seconds=60.0), before
        )
        == ()
    )


def test_without_anything_from_before_the_promise_of_the_calibration_counts() -> None:
    assert found(vitals(counts={0: (1000, 100)}), Vitals()) == ("flags 10.0% of 1000 inputs, promised 1.0%",)


def test_later_looks_ask_for_more() -> None:
    after = vitals(counts={0: (500, 38), 1: (500, 38)})
    assert found(after)
    assert not found(after, look=30)


@pytest.mark.parametrize(
    ("elapsed_s", "due"), [(0, 0), (12, 0), (13, 1), (24, 1), (25, 2), (50, 3), (100, 4), (199, 4), (200, 5)]
)
def test_looks_fall_due_as_the_time_doubles(elapsed_s: float, due: int) -> None:
    assert looks(elapsed_s, 100.0) == due
    assert looks(elapsed_s, 0.0) == 0


def test_a_device_at_the_edge_of_every_tolerance_is_called_worse_as_rarely_as_promised() -> None:
    random = np.random.default_rng(7)
    false = 0
    for _ in range(2000):
        before = Vitals(
            counts=counts(random, 300, (0.5, 0.5), 0.01), starts=random.poisson(2.0), seconds=43_200.0,
            latencies=tuple(random.normal(100, 5, 16)),
        )  # fmt: skip
        ever = False
        for look in range(1, 5):
            seconds = 450.0 * 2**look
            after = Vitals(
                counts=counts(random, 40 * 2**look, (0.75, 0.25), 0.02),
                starts=random.poisson(STARTS_PER_DAY * seconds / 86_400),
                seconds=seconds,
                latencies=tuple(LATENCY * random.normal(100, 5, min(16, 2 * 2**look))),
            )
            ever |= bool(worse(before, after, promised=0.01, level=0.1, look=look))
        false += ever
    assert false / 2000 <= 0.1


def counts(random: np.random.Generator, n: int, shares: tuple[float, ...], flags: float) -> dict[int, tuple[int, int]]:
    inputs = random.multinomial(n, shares).tolist()
    return {label: (many, int(random.binomial(many, flags))) for label, many in enumerate(inputs) if many}
