"""The report of the repair benchmark: seeds are pooled, and what was not measured is not made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks import repair_report


def row(seed: int, **parts: Any) -> dict[str, Any]:
    name = {"data": "digits", "network": "small-cnn-1", "attack": "badnets", "seed": seed, "code": "now"}
    return {**name, "before": {"accuracy": 0.99, "asr": 1.0}, **parts}


def lines(tmp_path: Path, *rows: dict[str, Any]) -> list[str]:
    for number, one in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    repair_report.write(tmp_path, tmp_path / "repair.md", code="now")
    return [line for line in (tmp_path / "repair.md").read_text().splitlines() if line.startswith("| digits")]


def test_seeds_are_pooled(tmp_path: Path) -> None:
    passed = {"outcome": "passed", "method": "unlearn", "tried": []}
    found = lines(
        tmp_path,
        row(0, auto={**passed, "accuracy": 0.99, "asr": 0.0}),
        row(1, auto={**passed, "accuracy": 0.98, "asr": 0.02}),
    )
    assert found == ["| digits | small-cnn-1 | badnets | 2 | 99.0 / 100.0 | -0.5 / 1.0 | unlearn | passed | - |"]


def test_a_row_of_other_code_is_marked(tmp_path: Path) -> None:
    assert "| badnets \\* |" in lines(tmp_path, row(0), row(1, code="before"))[0]
    assert "measured with other code than this" in (tmp_path / "repair.md").read_text()
    assert "| badnets |" in lines(tmp_path, row(0), row(1))[0]
    assert "measured with other code" not in (tmp_path / "repair.md").read_text()


def test_a_repair_that_failed_has_no_numbers_and_a_part_not_measured_none_either(tmp_path: Path) -> None:
    found = lines(tmp_path, row(0, auto={"outcome": "failed", "method": None, "tried": []}), row(1))
    assert found == ["| digits | small-cnn-1 | badnets | 2 | 99.0 / 100.0 | - | none | failed | - |"]


def test_each_method_and_each_share_of_liars_has_a_column(tmp_path: Path) -> None:
    after = {"accuracy": 0.97, "asr": 0.5}
    found = lines(
        tmp_path,
        row(0, methods={"clp": after, "rap": {"not_applied": "no ranks"}}, liars={"0": {"mvp": after}, "0.2": {}}),
    )
    assert "| digits | small-cnn-1 | badnets | -2.0 / 50.0 | - |" in found
    assert "| digits | small-cnn-1 | badnets | mvp | -2.0 / 50.0 | - |" in found
