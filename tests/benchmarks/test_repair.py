"""The repair benchmark: what is written down, what is measured again, and the page, which makes nothing up."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from benchmarks import repair, repair_report
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Knowledge

BEFORE = {"accuracy": 0.99, "asr": 1.0}
PASSED = {"outcome": "passed", "method": "unlearn", "tried": [], "seconds": 120.0, "processor_seconds": 60.0}
FAILED: dict[str, Any] = {"outcome": "failed", "method": None, "tried": [], "seconds": 240.0, "processor_seconds": 60.0}


def row(seed: int, *, code: str = "now", before: dict[str, float] = BEFORE, **parts: Any) -> dict[str, Any]:
    name = {"data": "digits", "network": "small-cnn-1", "attack": "badnets", "seed": seed}
    stamp = {"code": code, "libraries": {"keras": "3"}, "before": before}
    other = {key: parts.pop(key) for key in ("attacked",) if key in parts}
    return {**name, "attacked": True, "fingerprint": "f", **other, "measured": dict.fromkeys(parts, stamp), **parts}


def page(tmp_path: Path, *rows: dict[str, Any], now: str | None = "f") -> str:
    for number, one in enumerate(rows):
        (tmp_path / f"{number}.json").write_text(json.dumps(one))
    repair_report.write(tmp_path, tmp_path / "repair.md", code="now", todays=lambda row: now)
    return (tmp_path / "repair.md").read_text()


def lines(*given: Any, **how: Any) -> list[str]:
    return [line for line in page(*given, **how).splitlines() if line.startswith("| digits")]


def test_seeds_are_pooled(tmp_path: Path) -> None:
    rows = (row(seed, auto={**PASSED, "accuracy": 0.99 - seed / 100, "asr": seed / 50}) for seed in (0, 1))
    assert lines(tmp_path, *rows) == [
        "| digits | small-cnn-1 | badnets | 2 | 99.0 / 100.0 | -0.5 / 1.0 | unlearn | 2 of 2 passed | 2.0 / 1.0 |"
    ]


def test_a_repair_that_failed_counts_with_the_figures_before(tmp_path: Path) -> None:
    good = {**PASSED, "accuracy": 0.94, "asr": 0.0}
    assert lines(tmp_path, row(0, auto=good), *(row(seed, auto=FAILED) for seed in range(1, 5))) == [
        "| digits | small-cnn-1 | badnets | 5 | 99.0 / 100.0 | -1.0 / 80.0 | unlearn "
        "| 4 of 5 failed, 1 of 5 passed | 3.6 / 1.0 |"
    ]


def test_where_all_failed_nothing_changes(tmp_path: Path) -> None:
    assert lines(tmp_path, row(0, auto=FAILED)) == [
        "| digits | small-cnn-1 | badnets | 1 | 99.0 / 100.0 | +0.0 / 100.0 | none | 1 of 1 failed | 4.0 / 1.0 |"
    ]


def test_what_needs_approval_is_not_called_passed(tmp_path: Path) -> None:
    waits = {**PASSED, "outcome": "needs approval", "accuracy": 0.99, "asr": 0.0}
    assert "| 1 of 1 needs approval |" in lines(tmp_path, row(0, auto=waits))[0]


def test_before_and_after_are_of_the_same_seeds(tmp_path: Path) -> None:
    good = {**PASSED, "accuracy": 0.9, "asr": 0.0}
    others = row(1, before={"accuracy": 0.5, "asr": 0.5}, liars={"0": {"mvp": {"accuracy": 0.5, "asr": 0.5}}})
    found = lines(tmp_path, row(0, auto=good), others)
    assert "| badnets | 1 | 99.0 / 100.0 | -9.0 / 0.0 |" in found[0]
    assert "| badnets | 1 | 50.0 / 50.0 | mvp | +0.0 / 50.0 |" in found[1]


def test_a_method_that_not_all_seeds_were_measured_with_has_figures_before_of_its_own(tmp_path: Path) -> None:
    after = {"accuracy": 0.97, "asr": 0.5}
    second = row(1, before={"accuracy": 0.5, "asr": 0.5}, methods={"clp": {"accuracy": 0.5, "asr": 0.5}})
    (found,) = lines(tmp_path, row(0, methods={"clp": after, "anp": after}), second)
    assert "| 2 | 74.5 / 75.0 | -1.0 / 50.0 | -2.0 / 50.0 (of 1, before: 99.0 / 100.0) |" in found


def test_a_method_that_could_not_be_applied_says_so(tmp_path: Path) -> None:
    after, missing, broke = {"accuracy": 0.97, "asr": 0.5}, {"not_applied": "no ranks"}, {"failed": "ValueError: x"}
    first = row(0, methods={"clp": after, "rap": missing, "mvp": missing, "anp": broke})
    (found,) = lines(tmp_path, first, row(1, methods={"clp": missing, "rap": missing, "anp": broke}))
    assert found.endswith("| -1.0 / 75.0 (1 of 2 applied) | not applied | not applied | failed |")


def test_each_share_of_clean_data_and_of_liars_has_a_column(tmp_path: Path) -> None:
    after = {"accuracy": 0.97, "asr": 0.5}
    shares = {"0.1": after, "0.01": {"not_applied": "13 inputs"}}
    text = page(tmp_path, row(0, shares=shares, liars={"0": {"mvp": after}, "0.2": {"mvp": after}}))
    assert "| seeds | before | 1% | 10% |" in text
    assert "| 1 | 99.0 / 100.0 | not applied | -2.0 / 50.0 |" in text
    assert "| before | rule | 0% liars | 20% liars |" in text


def test_a_clean_model_has_no_asr(tmp_path: Path) -> None:
    clean = row(0, before={"accuracy": 0.99}, attacked=None, auto={**PASSED, "accuracy": 0.98})
    assert "| 1 | 99.0 | -1.0 | unlearn |" in lines(tmp_path, clean)[0]


PARTS: dict[str, dict[str, Any]] = {
    "auto": {"auto": FAILED},
    "quarantined": {"quarantined": FAILED},
    "methods": {"methods": {"clp": BEFORE}},
    "shares": {"shares": {"0.1": BEFORE}},
    "liars": {"liars": {"0": {"mvp": BEFORE}}},
}


@pytest.mark.parametrize("part", PARTS)
def test_other_code_and_another_model_are_marked_in_every_table(tmp_path: Path, part: str) -> None:
    assert "| badnets |" in lines(tmp_path, row(0, **PARTS[part]))[0]
    assert "| badnets \\* |" in lines(tmp_path, row(0, code="before", **PARTS[part]))[0]
    assert "| badnets † |" in lines(tmp_path, row(0, **PARTS[part]), now="g")[0]
    assert "| badnets \\* † |" in lines(tmp_path, row(0, code="before", **PARTS[part]), now="g")[0]


def test_a_mark_is_of_the_part_that_other_code_measured(tmp_path: Path) -> None:
    one = row(0, auto=FAILED, methods={"clp": BEFORE})
    one["measured"]["methods"] = {**one["measured"]["methods"], "code": "before"}
    auto, methods = lines(tmp_path, one)
    assert "| badnets |" in auto
    assert "| badnets \\* |" in methods


def test_marks_and_libraries_are_explained_and_what_cannot_be_told_is_said(tmp_path: Path) -> None:
    plain = page(tmp_path, row(0, auto=FAILED))
    assert "Libraries: keras 3." in plain
    assert not [text for text in ("other code", "recipe", "not looked at") if text in plain]
    assert "measured with other code than this" in page(tmp_path, row(0, code="before", auto=FAILED))
    assert "the zoo's recipe would make otherwise" in page(tmp_path, row(0, auto=FAILED), now="g")
    assert "Of 1 it was not looked at" in page(tmp_path, row(0, auto=FAILED), now=None)


def test_models_whose_attack_does_not_work_are_left_out_and_counted(tmp_path: Path) -> None:
    text = page(tmp_path, row(0, auto=FAILED), row(1, attacked=False, auto=FAILED))
    assert "| badnets | 1 |" in text
    assert "Left out: 1 measured, whose attack does not work." in text


def record(tmp_path: Path, code: str = "now", **row: Any) -> repair.Record:
    return repair.Record(row={"fingerprint": "f", **row}, place=tmp_path / "row.json", stamp={"code": code})


def test_a_result_is_on_the_disk_as_soon_as_it_is_there(tmp_path: Path) -> None:
    found = record(tmp_path)
    assert found.missing("methods") == list(repair.PARTS["methods"])
    found.put("methods", BEFORE, "clp")
    assert json.loads((tmp_path / "row.json").read_text())["methods"] == {"clp": BEFORE}
    again = record(tmp_path, **repair.stored(tmp_path / "row.json", "f"))
    assert again.missing("methods") == [name for name in repair.PARTS["methods"] if name != "clp"]
    assert again.missing("auto") == ["auto"]


def test_what_other_code_measured_stays_until_the_part_is_measured_anew(tmp_path: Path) -> None:
    record(tmp_path, "before").put("methods", BEFORE, "clp")
    record(tmp_path, "before").put("auto", FAILED)
    now = record(tmp_path, **repair.stored(tmp_path / "row.json", "f"))
    assert now.missing("methods") == list(repair.PARTS["methods"])
    now.put("methods", BEFORE, "rap")
    kept = json.loads((tmp_path / "row.json").read_text())
    assert kept["methods"] == {"rap": BEFORE}
    assert kept["auto"] == FAILED
    assert {part: stamp["code"] for part, stamp in kept["measured"].items()} == {"methods": "now", "auto": "before"}


def test_what_another_run_wrote_meanwhile_stays(tmp_path: Path) -> None:
    some, other = record(tmp_path), record(tmp_path)
    some.put("auto", FAILED)
    other.put("methods", BEFORE, "clp")
    assert {"auto", "methods"} <= set(json.loads((tmp_path / "row.json").read_text()))


@pytest.mark.parametrize("content", [None, "", "{", '{"fingerprint": "g"}'])
def test_a_row_of_another_model_or_a_damaged_one_is_none(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "row.json").write_text(content)
    assert repair.stored(tmp_path / "row.json", "f") == {}


def test_the_owners_inputs_are_divided_in_random_order_by_groups() -> None:
    groups = np.repeat(np.arange(30), 10)
    some, rest = repair.divided(300, groups, np.random.default_rng(0))
    assert sorted([*some, *rest]) == list(range(300))
    assert len(some) == 100
    assert not set(groups[some]) & set(groups[rest])
    assert len(set(groups[some[:50]])) > 5
    plain, _ = repair.divided(300, None, np.random.default_rng(0))
    assert len(plain) == 100


class Weights:
    """As much of a Keras model as a method needs here."""

    def __init__(self, *values: float) -> None:
        self.values = [np.asarray(value) for value in values]

    def get_weights(self) -> list[Any]:
        return list(self.values)

    def set_weights(self, values: list[Any]) -> None:
        self.values = list(values)


@dataclass
class Adding:
    """A training that adds one to every weight, and counts how often it ran."""

    ran: int = 0

    def missing(self, known: Knowledge) -> str:
        return ""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        self.ran += 1
        target.model.set_weights([value + 1 for value in target.model.get_weights()])
        return ("added",)


def test_what_was_trained_is_put_back_only_for_the_same_weights_and_knowledge() -> None:
    adding, known, bench = Adding(), Knowledge(taps=()), cast("Bench", None)
    once = repair.Once(method=cast("Any", adding))

    def apply(target: Weights, known: Knowledge) -> list[float]:
        assert once.apply(SimpleNamespace(model=target), known, bench) == ("added",)
        return [float(value) for value in target.values]

    assert (apply(Weights(1, 2), known), adding.ran) == ([2, 3], 1)
    assert once.spared == 0
    assert (apply(Weights(1, 2), known), adding.ran) == ([2, 3], 1)
    assert once.spared > 0
    assert (apply(Weights(0, 2), known), adding.ran) == ([1, 3], 2)
    assert once.spared == 0
    assert (apply(Weights(0, 2), known), adding.ran) == ([1, 3], 2)
    assert (apply(Weights(1), known), adding.ran) == ([2], 3)
    assert (apply(Weights(1, 2), Knowledge(taps=())), adding.ran) == ([2, 3], 4)


def scene(count: int) -> repair.Scene:
    """Inputs that are all different, whose features are their first pixel, and a model that cannot be repaired."""
    images = np.arange(count, dtype=np.uint8).reshape(-1, 1, 1, 1)
    model = SimpleNamespace(measure=lambda x: SimpleNamespace(features=[float(x[0, 0, 0])]))
    split = count // 3
    return repair.Scene(
        member=cast("Any", SimpleNamespace(int8=b"no model")), keras=None, norms=None,
        running=cast("Any", SimpleNamespace(model=model)), guarded=b"",
        metadata=SimpleNamespace(feature_count=1, taps=()), norm_columns=np.array([0]),
        x_repair=images[:split], y_repair=np.zeros(split, dtype=np.int64),
        x_gate=images[split:], y_gate=np.zeros(count - split, dtype=np.int64), groups_gate=None,
        features=images[:split, 0, 0].astype(np.float64), label=0, flagged=0, flagged_mean=np.zeros(1),
        usual=np.zeros(1), quarantined=images[:0],
        measuring=repair.Measuring(
            images=images, labels=np.zeros(count, dtype=np.int64), eligible=np.zeros(count, dtype=bool),
            triggered=images[:0], target=0,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("count", [30, 90, 150])
def test_a_share_of_clean_data_is_all_that_a_repair_sees(count: int) -> None:
    whole = scene(180)
    small = repair.of_share(whole, count)
    allowed = set(range(count))
    judged = small.x_repair[round(repair.SOUGHT_SHARE * count) :]
    searches = repair.searches_of(small, held_out=judged)
    for seen in (small.x_repair, small.x_gate, searches.images, searches.held_out):
        assert set(seen.ravel().tolist()) <= allowed
    assert sorted([*searches.images.ravel(), *searches.held_out.ravel()]) == sorted(allowed)
    assert set(small.features.ravel()) <= allowed
    assert searches.reported.std.tolist() == [pytest.approx(small.features.std())]
    assert len(small.y_repair) == len(small.y_gate) == count


def test_methods_that_break_are_written_down_and_the_others_measured(tmp_path: Path) -> None:
    found = record(tmp_path)
    for name in (name for name, method in METHODS.items() if method.trains):
        found.put("methods", BEFORE, name)
    repair.measure(scene(60), found, ["methods"])
    kept = json.loads((tmp_path / "row.json").read_text())["methods"]
    assert set(kept) == set(repair.PARTS["methods"])
    assert kept["linf"] == {"not_applied": "no evidence and no recovered trigger to rank channels by"}
    assert "failed" in kept["clp"]
    assert {name for name, one in kept.items() if "accuracy" in one} == {n for n in METHODS if METHODS[n].trains}


def test_a_share_that_the_owner_does_not_have_is_not_measured(tmp_path: Path) -> None:
    found = record(tmp_path, trained_on=540)
    repair.measure(scene(60), found, ["shares"])
    kept = json.loads((tmp_path / "row.json").read_text())["shares"]
    assert kept["0.01"] == {"not_applied": "6 inputs; the owner has 60, and at least 30 are needed"}
    assert kept["0.1"]["inputs"] == 60
    assert kept["0.1"]["of_which_judge_triggers"] == 20
