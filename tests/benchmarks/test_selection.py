"""Which models a run measures."""

from __future__ import annotations

import argparse

import pytest

from benchmarks import selection, zoo


def chosen(*arguments: str) -> list[str]:
    parser = argparse.ArgumentParser()
    selection.add_to(parser)
    return [cell.name for cell in selection.cells_of(parser.parse_args(arguments))]


def test_without_options_it_is_the_whole_matrix() -> None:
    assert chosen() == [cell.name for cell in zoo.matrix()]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--data digits --attack sig --seed 1", ["digits-small-cnn-1-sig-s1"]),
        ("--data digits --attack clean --seed 2", ["digits-small-cnn-1-clean-s2"]),
        ("--data digits --attack clean --seed 0 --seed 1", [f"digits-small-cnn-1-clean-s{seed}" for seed in (0, 1)]),
        ("--data gtsrb --attack badnets --network small-cnn-1", ["gtsrb-small-cnn-1-badnets-s0"]),
        ("--attack unheard_of", []),
    ],
)
def test_options_narrow_it(arguments: str, expected: list[str]) -> None:
    assert chosen(*arguments.split()) == expected
