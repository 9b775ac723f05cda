"""The work's folder: an interrupted repair goes on in the same work alone, and what was judged is what is written."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeguard.errors import ConfigError
from edgeguard.inspection.audit import Audit, Finding
from edgeguard.inspection.inversion import Trigger
from edgeguard.repair import auto, command, gate, hunting
from edgeguard.repair.command import Order, Report
from tests.repair.test_gate import measured

WAITING = Report(outcome="needs approval", reason="recall: not checkable", gate={"checks": []}, tried=[])


@pytest.fixture
def subject() -> command._Subject:
    """The owner's data alone: a model plays no part here."""
    found = object.__new__(command._Subject)
    x, y = np.arange(960, dtype=np.uint8).reshape(60, 4, 4, 1), np.arange(60) % 10
    found.x_repair, found.y_repair, found.x_gate, found.y_gate = x[:20], y[:20], x[20:], y[20:]
    found.groups = np.arange(40)
    return found


def kept(tmp_path: Path) -> Path:
    work = tmp_path / "work"
    command._take_up(work, "of")
    made = command._Made(
        guarded=b"repaired",
        metadata=None,  # type: ignore[arg-type]
        sidecar=b"companion",
    )
    command._keep(work, made, WAITING)
    return work


def changed(subject: command._Subject, **values: Any) -> command._Subject:
    other = copy.copy(subject)
    other.__dict__.update(values)
    return other


def test_the_work_is_another_when_anything_that_it_depends_on_is(
    subject: command._Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = Order(model=tmp_path / "m", data="d", output=tmp_path / "o")
    shared = subject.x_gate[:3]
    found = {
        "same": command._digest_of(order, b"model", subject, shared),
        "model": command._digest_of(order, b"other", subject, shared),
        "method": command._digest_of(replace(order, method="linf"), b"model", subject, shared),
        "seed": command._digest_of(replace(order, seed=1), b"model", subject, shared),
        "shared": command._digest_of(order, b"model", subject, subject.x_gate[:2]),
        "none shared": command._digest_of(order, b"model", subject, None),
        "labels": command._digest_of(order, b"model", changed(subject, y_gate=subject.y_gate[::-1]), shared),
        "groups": command._digest_of(order, b"model", changed(subject, groups=np.arange(40) // 2), shared),
        "no groups": command._digest_of(order, b"model", changed(subject, groups=None), shared),
    }
    monkeypatch.setattr(command, "__version__", "another")
    found["version"] = command._digest_of(order, b"model", subject, shared)
    assert len(set(found.values())) == len(found)
    monkeypatch.undo()
    assert command._digest_of(replace(order, approve=True), b"model", subject, shared) == found["same"]


def test_what_waits_is_found_again_by_the_same_work_alone(tmp_path: Path) -> None:
    work = kept(tmp_path)
    assert command._waiting(work, "of") == WAITING
    assert command._waiting(work, "of another") is None
    (work / "candidate.tflite").write_bytes(b"something else")
    assert command._waiting(work, "of") is None


def test_the_very_file_is_written_with_its_sidecar_beside_it(tmp_path: Path) -> None:
    command._write(kept(tmp_path), tmp_path / "out.tflite")
    assert (tmp_path / "out.tflite").read_bytes() == b"repaired"
    assert (tmp_path / "out.guard.npz").read_bytes() == b"companion"


@pytest.mark.parametrize("name", ["out.tflite", "out.guard.npz"])
def test_a_file_that_appeared_meanwhile_is_not_overwritten(tmp_path: Path, name: str) -> None:
    work = kept(tmp_path)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ConfigError, match="a file that is there"):
        command._write(work, tmp_path / "out.tflite")
    assert (tmp_path / name).read_text() == "mine"
    assert command._waiting(work, "of") == WAITING


def test_another_folder_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(ConfigError, match="something else"):
        command._take_up(tmp_path / "work", "of")


def test_only_what_the_gate_refused_is_not_tried_again(tmp_path: Path) -> None:
    decision = gate.decide(measured(residual=0.5), classes=4)
    refused = auto.Attempt(plan=("linf", "unlearn"), notes=("pruned",), reason=decision.reason, decision=decision)
    broke = auto.Attempt(plan=("anp",), notes=(), reason="MemoryError: ")
    (tmp_path / "tried.json").write_bytes(command._refused([refused, broke]))
    assert [attempt.as_dict() for attempt in command._done(tmp_path)] == [refused.as_dict()]
    (tmp_path / "tried.json").write_text(json.dumps([{**broke.as_dict()}]))
    assert command._done(tmp_path) == []


def test_of_an_audit_those_triggers_judge_that_tell_a_backdoor_from_a_large_patch() -> None:
    def trigger(size: float) -> Trigger:
        mask = np.full((1, 1, 1), size, np.float32)
        return Trigger(label=3, mask=mask, pattern=mask, success=1.0)

    def finding(size: float, suspected: bool) -> Finding:
        return Finding(
            label=3, form="patch", trigger=trigger(size), size=size, success=1.0,
            index=0.0, index_low=0.0, index_high=0.0, ratio=1.0, suspected=suspected,
        )  # fmt: skip

    plain, sign, module = finding(0.9, False), finding(0.2, True), trigger(0.1)
    found = Audit(verdict="backdoored", reason="", findings=(plain, sign), planted=(module,))
    assert hunting._telling(found, 3) == (module,)
    assert hunting._telling(replace(found, planted=()), 3) == (sign.trigger,)
    assert hunting._telling(replace(found, planted=(), findings=(plain,)), 3) == (plain.trigger,)
