"""The tables of docs/private.md: what they say of a row, and which rows are marked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import private_report

ROW: dict[str, Any] = {
    "model": "digits-badnets-s0", "space": "pixels", "layers": [64, 32, 10], "steps": 60, "target": 3,
    "verdict": "backdoored", "labels": [3], "same": True, "long": {"labels": [3]}, "norm_error": 0.0002,
    "latency_ms": 0.0, "step_s": 0.7, "seconds": 50.4, "sent_mb": [237.2, 208.2], "code": "today",
}  # fmt: skip


def inspections(*rows: dict[str, Any]) -> str:
    return "\n".join(private_report.tables({"inspections": rows}, "today")["inspections"])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "| digits-badnets-s0 | pixels, 64-32-10 | 3 | backdoored, 3 | yes | 3 | 0.02% | 50 s | 208 to 237 |"),
        ({"code": "before"}, "| digits-badnets-s0\\* |"),
        ({"same": False}, "| **no** |"),
        ({"target": None, "verdict": "no_sign", "labels": []}, "| none | no sign, none |"),
        ({"same": False}, "0 of 1 with the verdict"),
        ({"long": {"labels": []}}, "0 of 1 with the verdict of 1,000 steps"),
    ],
)
def test_an_inspection_is_told_as_it_was_measured(change: dict[str, Any], told: str) -> None:
    assert told in inspections(ROW | change)


def test_rows_of_few_steps_are_of_latency_and_no_verdict() -> None:
    found = private_report.tables({"inspections": [ROW | {"steps": 3, "latency_ms": 20.0}]}, "today")
    assert "0 of 0 with the verdict" in "\n".join(found["inspections"])
    assert "| digits-badnets-s0 | 20 ms | 0.70 s |" in found["latency"]


def test_growth_is_told_a_step() -> None:
    row = {"model": "64-32-20", "steps": 3, "sought": 64, "step_s": 2.0, "sent_mb": [50.9, 45.3], "estimated_mb": 50.3}
    found = private_report.tables({"growth": [row | {"code": "today"}]}, "today")["growth"]
    assert found[-1] == "| 64-32-20 | 64 | 2.00 s | 17 | 17 |"


def test_the_power_of_features_counts_who_is_named_and_who_accused() -> None:
    found = {"labels": [0], "smallest": 0, "ratio": 0.4, "code": "today"}
    rows = [
        found | {"model": "a", "target": 0, "long": found, "same_verdict": True},
        found | {"model": "b", "target": 1, "long": found | {"labels": []}, "same_verdict": False},
        found | {"model": "c", "target": None, "ratio": None},
    ]
    lines = private_report.tables({"power_of_features": rows}, "today")["power"]
    assert lines[2] == "| a | 0 | 0 | 0, 0.40 | 0 | 0, 0.40 |"
    assert "Of 2 attacked models 1 are named with their label, of 1 clean ones 1 accused; 1 of 2 have" in lines[-1]


def test_only_what_stands_between_the_marks_is_written(tmp_path: Path) -> None:
    document, results = tmp_path / "private.md", tmp_path / "private.json"
    names = private_report.tables({}, "")
    document.write_text("before\n" + "".join(f"<!-- {name} -->\nold\n<!-- end -->\nbetween\n" for name in names))
    results.write_text(json.dumps({"inspections": [ROW]}))
    private_report.write(document, results)
    text = document.read_text()
    assert text.startswith("before\n") and text.count("between\n") == len(names) and "old" not in text
    assert "digits-badnets-s0" in text


def test_the_document_has_a_place_for_every_table() -> None:
    text = Path(private_report.DOCUMENT).read_text()
    assert [name for name in private_report.tables({}, "") if f"<!-- {name} -->" not in text] == []
