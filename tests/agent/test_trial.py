"""A model on trial: what it must show, and the count of its starts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgeguard.agent.trial import STARTS, Fared, Trial, count, judge
from edgeguard.detection.guarded import Inference
from edgeguard.detection.verdict import Verdict, not_checked
from edgeguard.detection.verdict import judge as verdict_of
from edgeguard.errors import ConfigError

MODEL, OTHER = "a" * 64, "b" * 64


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "trial.json"


def test_a_model_fails_after_its_starts_over_the_life_of_processes(path: Path) -> None:
    for _ in range(STARTS):
        assert not Trial(path).failed(MODEL)
        Trial(path).begin(MODEL)
    assert Trial(path).failed(MODEL)


def test_a_proof_takes_the_count_back(path: Path) -> None:
    trial = Trial(path)
    for _ in range(STARTS):
        trial.begin(MODEL)
    trial.end(MODEL)
    assert not trial.failed(MODEL)


def test_the_run_in_which_a_running_agent_takes_a_model_is_its_first_start_however_often_it_is_tried(
    path: Path,
) -> None:
    for _ in range(STARTS + 1):
        Trial(path).first(MODEL)
    assert not Trial(path).failed(MODEL)
    for _ in range(STARTS - 1):
        Trial(path).begin(MODEL)
    assert Trial(path).failed(MODEL)


def test_a_board_that_is_switched_off_each_evening_proves_a_model_over_days(path: Path) -> None:
    Trial(path).first(MODEL)
    for _ in range(5):
        trial = Trial(path)
        assert not trial.failed(MODEL)
        trial.begin(MODEL)
        trial.seen(MODEL, trial.fared(MODEL).seen(healthy=20, sick=0), healthy=True)
    assert Trial(path).fared(MODEL) == Fared(healthy=100)
    assert Trial(path).fared(OTHER) == Fared()


def test_inputs_that_could_not_be_scored_do_not_take_the_starts_back(path: Path) -> None:
    for _ in range(STARTS):
        trial = Trial(path)
        trial.begin(MODEL)
        trial.seen(MODEL, trial.fared(MODEL).seen(healthy=5, sick=1), healthy=False)
    assert Trial(path).failed(MODEL)
    assert Trial(path).fared(MODEL) == Fared(healthy=5 * STARTS, sick=STARTS)


def test_a_trial_that_begins_anew_knows_nothing_of_an_earlier_one(path: Path) -> None:
    trial = Trial(path)
    trial.seen(MODEL, Fared(healthy=5, sick=1), healthy=False)
    trial.first(MODEL)
    assert trial.fared(MODEL) == Fared()


def test_another_model_neither_has_nor_clears_the_count_of_a_failed_one(path: Path) -> None:
    trial = Trial(path)
    for _ in range(STARTS):
        trial.begin(MODEL)
    assert not trial.failed(OTHER)
    trial.end(OTHER)
    assert trial.failed(MODEL)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"file_digest":"a","starts":-1}', b"\xff", b"[" * 100_000])
def test_a_damaged_count_is_none(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert not Trial(path).failed(MODEL)


def test_a_count_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="count of starts"):
        Trial(tmp_path / "nowhere" / "trial.json").begin(MODEL)
    assert list(tmp_path.iterdir()) == []


# What a model must show


@pytest.mark.parametrize(
    ("healthy", "sick", "outcome"),
    [
        (0, 0, "go on"),
        (63, 0, "go on"),
        (64, 0, "confirm"),
        (64, 7, "confirm"),
        (63, 1, "go on"),
        (0, 63, "go on"),
        (0, 64, "revert"),
        (57, 7, "revert"),
        (1000, 200, "revert"),
    ],
)
def test_a_model_is_confirmed_by_healthy_inferences_and_left_for_a_tenth_that_are_not(
    healthy: int, sick: int, outcome: str
) -> None:
    assert judge(Fared(healthy=healthy, sick=sick), needed=64) == outcome


X, NOTHING = np.zeros((2, 2, 1), np.float32), np.full((2, 2, 1), np.nan, np.float32)
CLEAN, FLAGGED = verdict_of(1, {"linf": 0.5}), verdict_of(1, {"linf": 2.0})
NO_SCORES, NAN = not_checked(1, {}, "to save work"), not_checked(1, {"linf": float("nan")}, "too large")


def inference(verdict: Verdict) -> Inference:
    return Inference((), np.zeros(1, np.float32), verdict)


@pytest.mark.parametrize(
    ("ran", "verdict", "x", "expected"),
    [
        pytest.param(inference(CLEAN), CLEAN, X, Fared(healthy=1), id="clean"),
        pytest.param(inference(FLAGGED), FLAGGED, X, Fared(healthy=1), id="flagged"),
        pytest.param(inference(NO_SCORES), NO_SCORES, X, Fared(), id="not scored, to save work"),
        pytest.param(inference(NAN), NAN, X, Fared(sick=1), id="scored, and no number"),
        pytest.param(None, NO_SCORES, X, Fared(sick=1), id="the runtime failed"),
        pytest.param(None, NO_SCORES, NOTHING, Fared(), id="the input holds no numbers"),
    ],
)
def test_an_inference_is_healthy_where_it_was_scored(
    ran: Inference | None, verdict: Verdict, x: np.ndarray, expected: Fared
) -> None:
    assert count(Fared(), ran, verdict, x) == expected
