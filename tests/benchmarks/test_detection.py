"""What the detection benchmark computes from scores, and the page that it writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score

from benchmarks import detection, detection_report
from benchmarks.baselines import Scored
from edgeguard.detection import cascade
from edgeguard.detection.guarded import GuardedModel
from tests.simulators.attacked import Attacked


@pytest.mark.parametrize("ties", [False, True])
def test_auroc_is_that_of_scikit_learn(ties: bool) -> None:
    rng = np.random.default_rng(0)
    clean, triggered = rng.normal(size=400), rng.normal(1.0, size=300)
    if ties:
        clean, triggered = np.round(clean), np.round(triggered)
    expected = roc_auc_score(np.repeat([0, 1], [400, 300]), np.concatenate([clean, triggered]))
    assert detection.auroc(clean, triggered) == pytest.approx(expected)


@pytest.mark.parametrize(("fpr", "expected"), [(0.01, 0.01), (0.05, 0.05), (0.1, 0.1)])
def test_the_tpr_of_clean_inputs_against_themselves_is_the_fpr(fpr: float, expected: float) -> None:
    scores = np.random.default_rng(0).permutation(1000.0 + np.arange(1000))
    assert detection.tpr_at(scores, scores, fpr) == pytest.approx(expected)


def test_a_score_that_ties_with_the_threshold_is_not_found() -> None:
    assert detection.tpr_at(np.ones(100), np.ones(50), 0.01) == 0.0


def test_the_interval_holds_the_value() -> None:
    rng = np.random.default_rng(0)
    for value, low, high in detection.quality(rng.normal(size=500), rng.normal(2.0, size=500)).values():
        assert low <= value <= high
        assert high - low < 0.3


def test_a_triggered_input_comes_once_in_a_hundred() -> None:
    order = detection.stream(clean=250, triggered=7, between=99)
    assert len(order) == 700
    assert [index for side, index in order if side == 1] == list(range(7))
    assert {index for side, index in order if side == 0} == set(range(250))


def test_what_the_budget_does_not_reach_is_judged_by_the_one_pass() -> None:
    count = 400
    one_pass, audited = np.full(count, 0.5), np.full(count, 2.0)
    sides = [Scored(suspicion=audited, forwards=np.full(count, 4.0))] * 2
    moved = dict.fromkeys(cascade.ON_IMAGES, (1.0,))
    limits = cascade.Limits(grey=0.4, again=0.6, threshold=1.0, moved=moved, score_to_p=())
    order = [(0, index) for index in range(count)]
    scores, forwards = detection.within_budget([one_pass, one_pass], sides, order, limits)
    extra = float((forwards - 1).sum())
    default = cascade.Budget()
    assert extra <= default.burst + default.per_second * count / detection.RATE
    assert extra > (1 - cascade.FLAGGED_SHARE) * default.per_second * count / detection.RATE - 3
    assert set(np.unique(scores)) == {0.5, 2.0}
    assert np.array_equal(scores == 2.0, forwards > 1)


def row(attack: str, **changes: Any) -> dict[str, Any]:
    """One measured cell, as it stands in a file."""
    quality = {"auroc": [0.99, 0.98, 1.0], **{f"tpr_{rate}": [0.9, 0.85, 0.95] for rate in ("0.01", "0.05", "0.1")}}
    found: dict[str, Any] = {"forwards_clean": 1.0, "fpr": 0.01, "fpr_lower": 0.005, "microseconds": 50.0}
    found["unaudited_clean"] = 0.02
    found["histogram"] = {"clean": [1] * 60, "triggered": [2] * 60}
    if attack != "clean":
        found["curve"] = list(detection.CURVE)
        found |= {"all": quality, "successful": quality, "forwards_99_1": 1.1, "forwards_50_50": 1.2}
    return {
        "data": "digits",
        "network": "small-cnn-1",
        "attack": attack,
        "seed": 0,
        "accuracy_int8": 0.98,
        "asr_int8": 0.95,
        "attacked": True,
        "inputs": {"clean": 100, "triggered": 90, "successful": 80},
        "cases": {"clean": [], "one in ten triggered": [0]},
        "detectors": {"one-pass": found, "cascade": found},
        **changes,
    }


def test_the_page_counts_neither_the_adaptive_attack_nor_models_that_are_not_attacked() -> None:
    rows = [row("clean"), row("badnets"), row("wanet"), row("adaptive"), row("robnet", attacked=False)]
    assert [r["attack"] for r in detection_report.counted(rows)] == ["badnets", "wanet"]
    page = detection_report.text(rows)
    assert "| one-pass | 2 | 0.9900 |" in page
    assert "digits robnet (0) 95%" in page.split("## Not counted as attacked")[1]


def test_the_page_says_what_clean_models_flag() -> None:
    page = detection_report.text([row("clean"), row("badnets")])
    assert "| digits small-cnn-1 (0) | 100 | 1.00% | 1.00% (0.50%) | 1.00 | 0 |" in page


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "| mean AUROC | at least 0.997 | 0.9900 | no |"),
        ({}, "| worst cell's AUROC | at least 0.9 | 0.9900 | yes |"),
        ({}, "| largest lower 95% bound of the FPR | at most 1.5% | 0.50% | yes |"),
        ({}, "| cases opened on clean models | none | 0 | yes |"),
        ({"cases": {"clean": [3]}}, "| cases opened on clean models | none | 1 | no |"),
    ],
)
def test_the_page_says_which_targets_are_reached(changes: dict[str, Any], expected: str) -> None:
    assert expected in detection_report.text([row("clean", **changes), row("badnets")])


def test_the_page_does_not_call_a_target_reached_that_was_not_measured() -> None:
    assert "| cases opened on clean models | none | not measured | no |" in detection_report.text([row("badnets")])


def test_the_page_says_how_many_clean_inputs_the_budget_left_out() -> None:
    assert "most 2.00% of a model's clean inputs were doubtful and not audited" in detection_report.text(
        [row("badnets")]
    )


def test_the_page_and_its_pictures_are_written_from_the_rows_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(row("badnets")))
    (tmp_path / "b.json").write_text(json.dumps(row("clean")))
    detection_report.write(tmp_path, tmp_path / "page.md", detection.CURVE, detection.EDGES)
    page = (tmp_path / "page.md").read_text()
    named = re.findall(r"\]\((.*?\.png)\)", page)
    assert len(named) == 4
    assert page == detection_report.text([row("badnets"), row("clean")], named)
    for name in named:
        width, height = Image.open(tmp_path / name).size
        assert min(width, height) > 300


def test_a_clean_model_opens_no_case_and_an_attacked_one_names_the_target(attacked: Attacked) -> None:
    guarded = GuardedModel.load(attacked.conversion.guarded)
    clean = attacked.data.x_test.astype(np.uint8)
    triggered = attacked.attack.stamp(clean[attacked.data.y_test != attacked.attack.target])
    assert detection.cases(guarded, clean) == []
    assert detection.cases(guarded, detection.mixed(clean, triggered)) == [attacked.attack.target]


def test_one_in_ten_of_a_mix_is_triggered() -> None:
    clean, triggered = np.zeros((95, 2, 2, 1), np.uint8), np.ones((40, 2, 2, 1), np.uint8)
    mix = detection.mixed(clean, triggered)
    assert len(mix) == 100
    assert mix[:, 0, 0, 0].sum() == 10
