"""Guard metadata: what a file may say of itself, and which parts must fit each other."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract import guard
from edgeguard.errors import ModelError

GOOD: dict[str, Any] = {
    "schema": 1,
    "model_digest": "a" * 64,
    "guard_digest": "b" * 64,
    "detectors": [{"name": "linf", "threshold": 2.0}, {"name": "l1", "threshold": 3.0}],
    "taps": [
        {"tensor": "t", "source_layer": "relu", "kind": "linf", "offset": 0, "channels": 4},
        {"tensor": "t", "source_layer": "relu", "kind": "l1", "offset": 4, "channels": 4},
    ],
    "class_output": 0,
    "classes": ["a", "b"],
    "input": {"shape": [8, 8, 1], "dtype": "uint8", "range": [0, 255]},
    "fpr": 0.01,
    "fpr_upper": [0.02, 0.03],
    "score_to_p": [[0.5, 0.4], [1.0, 0.01]],
    "calibration": {"n_fit": 200, "n_threshold": 200, "digest": "c" * 64},
    "environment": {"runtime": "litert", "version": "2", "threads": 1, "cpu": "x"},
}


def tap(offset: int, channels: int) -> dict[str, Any]:
    return {"tensor": "t", "source_layer": "", "kind": "l1", "offset": offset, "channels": channels}


def test_metadata_survives_the_file() -> None:
    metadata = guard.decode_metadata(msgspec.json.encode(GOOD))
    assert metadata.feature_count == 8
    assert guard.decode_metadata(guard.encode_metadata(metadata)) == metadata


@pytest.mark.parametrize(
    "change",
    [
        {"schema": 2},
        {"model_digest": "short"},
        {"detectors": []},
        {"detectors": [{"name": "a", "threshold": 0.0}]},
        {"detectors": [{"name": "a", "threshold": 1.0}, {"name": "a", "threshold": 1.0}]},
        {"taps": [tap(0, 4), tap(5, 4)]},
        {"taps": [tap(4, 4)]},
        {"taps": [tap(0, 4096), tap(4096, 1)]},
        {"classes": []},
        {"class_output": None},
        {"fpr_upper": []},
        {"fpr_upper": [0.1, 0.1, 0.1]},
        {"fpr": 1.5},
        {"score_to_p": [[1.0, 0.1], [0.5, 0.2]]},
        {"input": {"shape": [8], "dtype": "object", "range": [0, 1]}},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="guard metadata"):
        guard.decode_metadata(msgspec.json.encode({**GOOD, **change}))


@given(st.binary(max_size=200), st.integers(0, 1000))
def test_damaged_metadata_is_refused_or_read_but_raises_nothing_else(noise: bytes, position: int) -> None:
    content = msgspec.json.encode(GOOD)
    at = position % len(content)
    for damaged in (noise, content[:at] + noise + content[at + len(noise) :]):
        try:
            guard.decode_metadata(damaged)
        except ModelError:
            continue
