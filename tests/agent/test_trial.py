"""The count of starts of a model on trial."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeguard.agent.trial import STARTS, Trial
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
