"""Whether one guarded model may take the place of another."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import numpy as np
import pytest

from edgeguard.detection import replacement
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ModelError
from tests.detection.test_sidecar import COUNT, SHAPE, SOUND
from tests.simulators.attacked import Attacked


@pytest.mark.parametrize(
    ("known", "gives", "same", "count", "holds"),
    [
        ([0] * 10, [0] * 10, 10, 10, True),
        ([0] * 10, [0] * 9 + [1], 9, 10, True),
        ([0] * 10, [0] * 8 + [1, 2], 8, 10, False),
        ([0] * 10, [None] * 10, 0, 10, False),
    ],
)
def test_of_the_known_classes_nine_in_ten_must_be_given(
    known: list[int], gives: list[int | None], same: int, count: int, holds: bool
) -> None:
    inputs = np.arange(len(known), dtype=np.uint8).reshape(-1, 1, 1, 1)
    held = replace(SOUND, self_test=inputs, predicted=np.asarray(known, np.int64))
    found = replacement.agreement(held, lambda x: gives[int(x.item())])
    assert (found.same, found.count, found.holds, found.says_something) == (same, count, holds, True)


def test_an_input_that_is_there_ten_times_says_no_more_than_one() -> None:
    held = replace(SOUND, self_test=np.zeros((COUNT, *SHAPE), np.uint8), predicted=np.zeros(COUNT, np.int64))
    found = replacement.agreement(held, lambda _: 0)
    assert (found.same, found.count, found.says_something) == (1, 1, False)


def test_a_model_may_take_its_own_place(attacked: Attacked) -> None:
    model = GuardedModel.load(attacked.conversion.guarded)
    replacement.check_interface(model, model, name="repaired model")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("input range", {"input": "range"}),
        ("classes", {"classes": ("x",) * 10}),
        ("class output", {"class_output": None}),
    ],
)
def test_what_programs_rely_on_stays(attacked: Attacked, what: str, change: dict[str, object]) -> None:
    running, other = (GuardedModel.load(attacked.conversion.guarded) for _ in range(2))
    described = other.metadata.input
    if "input" in change:
        change = {"input": msgspec.structs.replace(described, range=(0.0, 1.0))}
    other.metadata = msgspec.structs.replace(other.metadata, **change)
    with pytest.raises(ModelError, match=f"repaired model: {what}"):
        replacement.check_interface(other, running, name="repaired model")
