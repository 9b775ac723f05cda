"""Which rows of private inspections are still to be measured, and what a row must show to pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import digests, private_inspection, relay

ROW: dict[str, Any] = {
    "model": "digits-badnets-s0", "space": "pixels", "steps": 60, "sought": 64, "latency_ms": 0.0, "same": True,
    "norm_error": 0.0002, "seconds": 93.7, "repaired": {"accuracy": 93.3, "asr": 3.0},
    "repaired_in_clear": {"accuracy": 93.3, "asr": 2.5},
}  # fmt: skip


@pytest.fixture(scope="module")
def code() -> str:
    return digests.code_digest(private_inspection.DEPENDS)


@pytest.mark.parametrize(
    ("name", "fields", "there"),
    [
        ("dense-digits-badnets-s0", {}, True),
        ("dense-digits-badnets-s0", {"code": "of another day"}, False),
        ("dense-digits-badnets-s0", {"model": "digits-badnets-s1"}, False),
        ("dense-digits-badnets-s0", {"steps": 3}, False),
        ("cnn-digits-badnets-s0", {}, False),
        ("cnn-digits-badnets-s0", {"space": "features"}, True),
        ("latency-20", {"steps": 3}, False),
        ("latency-20", {"steps": 3, "latency_ms": 20.0}, True),
        ("dense-fashion-14x14-blended-s0", {"model": "fashion_mnist-14x14-blended-s0"}, True),
        ("growth", {}, False),
    ],
)
def test_a_row_is_measured_unless_it_is_there_with_todays_code(
    tmp_path: Path, code: str, name: str, fields: dict[str, Any], there: bool
) -> None:
    path = tmp_path / "private.json"
    private_inspection.record(path, "inspections", ROW | {"code": code} | fields)
    assert private_inspection.is_there(path, private_inspection.ROWS[name]) is there


def test_growth_is_there_when_all_of_its_sizes_are(tmp_path: Path, code: str) -> None:
    path = tmp_path / "private.json"
    for layers, sought in private_inspection.GROWTH:
        assert not private_inspection.is_there(path, "--growth")
        row = {"model": "-".join(map(str, layers)), "sought": sought, "code": code}
        private_inspection.record(path, "growth", row)
    assert private_inspection.is_there(path, "--growth")


def test_a_row_takes_the_place_of_its_like_and_leaves_all_others(tmp_path: Path) -> None:
    path = tmp_path / "private.json"
    path.write_text('{"rounds": 3}')
    for seconds in (5.0, 6.0):
        private_inspection.record(path, "inspections", ROW | {"seconds": seconds})
    private_inspection.record(path, "inspections", ROW | {"latency_ms": 20.0})
    kept = json.loads(path.read_text())
    assert (kept["rounds"], [row["seconds"] for row in kept["inspections"]]) == (3, [6.0, 93.7])


@pytest.mark.parametrize(
    ("fields", "failed"),
    [
        ({}, []),
        ({"same": False}, ["same"]),
        ({"norm_error": 0.011}, ["norm_error"]),
        ({"seconds": 901.0}, ["within_15_min"]),
        ({"repaired": {"accuracy": 92.2, "asr": 3.0}}, ["repaired_accuracy"]),
        ({"repaired": {"accuracy": 93.3, "asr": 3.6}}, ["repaired_asr"]),
    ],
)
def test_a_row_passes_that_is_as_in_clear_and_in_time(fields: dict[str, Any], failed: list[str]) -> None:
    assert [name for name, good in private_inspection.passed(ROW | fields).items() if not good] == failed


def test_what_three_parties_send_goes_through_a_relay_for_each_pair() -> None:
    relays, hosts = relay.between([1, 2, 3])
    try:
        assert [one.ends for one in relays] == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]
        assert [at[place] for place, at in enumerate(hosts)] == ["127.0.0.1:1", "127.0.0.1:2", "127.0.0.1:3"]
        assert {address for at in hosts for address in at} == {f"127.0.0.1:{one.port}" for one in relays} | {
            f"127.0.0.1:{port}" for port in (1, 2, 3)
        }
    finally:
        for one in relays:
            one.close()
