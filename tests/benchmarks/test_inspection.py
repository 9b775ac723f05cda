"""The inspection benchmark: which rows are measured again, and which the page marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import inspection, inspection_report

PAGE = "before\n<!-- calibration -->\nold\n<!-- end -->\nbetween\n<!-- measured -->\nold\n<!-- end -->\nafter\n"
FORM = {"ratio": 0.7, "index": 1.0, "label": 1, "size": 2.0, "success": 0.9}


def row(attack: str = "badnets", **other: Any) -> dict[str, Any]:
    own = {
        "data": "digits", "network": "small-cnn-1", "attack": attack, "seed": 0, "code": "now", "fingerprint": "f",
        "attacked": None if attack == "clean" else True, "target": None if attack == "clean" else 0,
        "verdict": "backdoored", "labels": [0], "right": True, "seconds": 9.6, "processor_seconds": 5.0,
        "patch_smallest": FORM, "blend_smallest": FORM, "patch_target": FORM, "blend_target": FORM,
    }  # fmt: skip
    return {**own, **other}


def page(
    tmp_path: Path, *rows: dict[str, Any], calibrated: tuple[dict[str, Any], ...] = (), now: str | None = "f"
) -> str:
    document = tmp_path / "inspection.md"
    document.write_text(PAGE)
    used = [row("clean"), *calibrated]
    tables = inspection_report.Tables(
        rows=rows, summary=inspection.summary(rows), calibrated=used, limits=inspection.limits(used), code="now",
        todays=lambda row: now,
    )  # fmt: skip
    inspection_report.write(document, tables)
    return document.read_text()


@pytest.mark.parametrize(
    ("found", "holds"),
    [
        (row(), True),
        (row(code="before"), False),
        (row(fingerprint="g"), False),
        ({k: v for k, v in row().items() if k != "code"}, False),
        (None, False),
    ],
)
def test_a_row_is_kept_for_the_same_code_and_model_alone(found: dict[str, Any] | None, holds: bool) -> None:
    assert inspection.is_of(found, "now", fingerprint="f") == holds


def test_only_what_stands_between_the_marks_is_written(tmp_path: Path) -> None:
    text = page(tmp_path, row())
    assert "old" not in text
    assert text.startswith("before\n<!-- calibration -->\n\n| form |")
    assert text.endswith("\n\n<!-- end -->\nafter\n")
    assert "| digits small-cnn-1 badnets 0 | backdoored | 0 | 0 | 0.70 | 0.70 | 10 | 5 |" in text


@pytest.mark.parametrize(
    ("changed", "now", "name", "said"),
    [
        ({}, "f", "badnets 0 |", ""),
        ({}, None, "badnets 0 |", ""),
        ({"code": "before"}, "f", "badnets 0 \\* |", "other code"),
        ({}, "g", "badnets 0 † |", "would make otherwise"),
        ({"code": "before"}, "g", "badnets 0 \\* † |", "other code"),
    ],
)
def test_rows_of_other_code_or_another_model_are_marked(
    tmp_path: Path, changed: dict[str, Any], now: str | None, name: str, said: str
) -> None:
    text = page(tmp_path, row(**changed), now=now)
    assert f"| digits small-cnn-1 {name}" in text
    assert f"| {name.replace(' 0', '')} 1 of 1 |" in text
    assert ("\n\\*:" in text, "\n†:" in text) == ("\\*" in name, "†" in name)
    assert said in text


def test_calibration_with_other_code_is_said(tmp_path: Path) -> None:
    assert "with other code" not in page(tmp_path)
    assert "1 of these 2 models were measured with other code" in page(tmp_path, calibrated=(row(code="before"),))


def test_models_whose_attack_does_not_work_are_no_rows(tmp_path: Path) -> None:
    text = page(tmp_path, row(attacked=False), row("clean", labels=[], verdict="no_sign"))
    assert "badnets 0 |" not in text
    assert "| digits small-cnn-1 clean 0 | no sign | - | - |" in text
    assert "| clean ones, accused | 0 of 1 |" in text
