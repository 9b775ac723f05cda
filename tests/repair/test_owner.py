"""The owner's data in two parts: nothing that belongs together is on both sides, and each part is large enough."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest

from edgeguard.errors import ModelError
from edgeguard.repair.owner import parts_of


def stored(tmp_path: Path, groups: list[int] | None = None, count: int = 1200) -> str:
    """Inputs that stand sorted by class, each with its number in its pixels."""
    x = np.zeros((count, 2, 2, 1), dtype=np.uint8)
    x[:, 0, 0, 0], x[:, 0, 1, 0] = np.arange(count) // 256, np.arange(count) % 256
    more = {} if groups is None else {"groups": np.asarray(groups)}
    np.savez(tmp_path / "clean.npz", x=x, y=np.arange(count) * 10 // count, **more)
    return str(tmp_path / "clean.npz")


def numbers(x: np.ndarray) -> list[int]:
    return (x[:, 0, 0, 0].astype(int) * 256 + x[:, 0, 1, 0]).tolist()


def test_a_third_repairs_the_rest_gates_and_no_input_is_lost(tmp_path: Path) -> None:
    parts = parts_of(stored(tmp_path), fpr=0.01, seed=0)
    assert len(parts.x_repair) == 400
    assert sorted(numbers(parts.x_repair) + numbers(parts.x_gate)) == list(range(1200))
    assert parts.y_gate.tolist() == [n * 10 // 1200 for n in numbers(parts.x_gate)]


def test_the_first_inputs_of_sorted_data_are_of_every_class(tmp_path: Path) -> None:
    parts = parts_of(stored(tmp_path), fpr=0.01, seed=0)
    assert set(parts.y_repair[:100].tolist()) == set(parts.y_gate[:100].tolist()) == set(range(10))


def test_no_group_stands_on_both_sides(tmp_path: Path) -> None:
    parts = parts_of(stored(tmp_path, [n // 30 for n in range(1200)]), fpr=0.01, seed=0)
    assert parts.groups is not None
    assert parts.groups.tolist() == [n // 30 for n in numbers(parts.x_gate)]
    assert not set(parts.groups.tolist()) & {n // 30 for n in numbers(parts.x_repair)}


@pytest.mark.parametrize(
    ("groups", "count"),
    [
        (None, 300),
        ([0] * 1200, 1200),
        ([min(n, 3) for n in range(1200)], 1200),
    ],
    ids=["few", "one group", "three inputs and one large group"],
)
def test_a_part_that_is_too_small_is_refused(tmp_path: Path, groups: list[int] | None, count: int) -> None:
    with pytest.raises(ModelError, match=f"{count} inputs"):
        parts_of(stored(tmp_path, groups, count), fpr=0.01, seed=0)


@pytest.mark.parametrize(
    ("shape", "classes", "shift", "told"),
    [
        ((2, 2, 1), 10, 0, None),
        ((2, 2, 3), 10, 0, r"\[2, 2, 1\]"),
        ((2, 2, 1), 9, 0, "label 9"),
        ((2, 2, 1), 10, 1, "labels of which the model gives 0%"),
    ],
)
def test_data_of_another_model_are_refused(
    tmp_path: Path, shape: tuple[int, ...], classes: int, shift: int, told: str | None
) -> None:
    parts = parts_of(stored(tmp_path), fpr=0.01, seed=0)

    def answers(x: np.ndarray) -> np.ndarray:
        return np.asarray([(n * 10 // 1200 + shift) % 10 for n in numbers(x)])

    with nullcontext() if told is None else pytest.raises(ModelError, match=told):
        parts.check("clean.npz", shape, answers, classes=classes)
