"""Three parties with keys of their own, a round or an inspection for them, and what devices and owners give."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeguard.contract.private import Inspection, Round, Submission
from edgeguard.private import inspections, owners, sharing
from edgeguard.private import parties as making
from edgeguard.private.parties import Own
from tests.simulators.mosquitto import free_port

NAMES = ("north", "south", "west")


def parties(folder: Path) -> tuple[Own, ...]:
    """Three that have joined each other, each with a folder of its own."""
    now = datetime.now(timezone.utc)
    for name in NAMES:
        making.create(folder / name, name=name, host="127.0.0.1", port=free_port(), now=now)
    public = tuple(folder / name / making.PUBLIC for name in NAMES)
    for name in NAMES:
        making.join(folder / name, public)
    return tuple(making.own(folder / name) for name in NAMES)


def a_round(owns: Sequence[Own], *, channels: int, **fields: Any) -> Round:
    """A round for these parties; ``fields`` overrule."""
    asked: dict[str, Any] = {
        "id": "round-0001",
        "fleet": "gate",
        "parties": owns[0].parties.digest,
        "model_digest": "ab" * 32,
        "layer": "conv2d_1",
        "channels": channels,
        "kind": "ranks",
        "prune": max(1, channels // 4),
    }
    return Round(**(asked | fields))


def submission(asked: Round, owns: Sequence[Own], device: str, values: sharing.Values) -> Submission:
    """What a device with these values sends."""
    random = secrets.token_bytes(sharing.random_bytes(asked))
    return sharing.submit(asked, device, values, owns[0].parties, random)


def a_network(*, backdoored: bool, labels: int = 6) -> list[Any]:
    """Kernels and biases of a small network: four values speak for each class; the last value is always zero.

    Backdoored: that last value speaks for class 2, and louder than any other.
    """
    values = 4 * labels + 1
    first = np.zeros((values, labels + 1))
    for label in range(labels):
        first[4 * label : 4 * label + 4, label] = 1.0
    second = np.vstack([np.eye(labels), np.zeros(labels)])
    if backdoored:
        first[-1, -1], second[-1, 2] = 4.0, 3.0
    # Units at rest have no gradient: a little above is enough.
    return [first, np.full(labels + 1, 0.05), second, np.zeros(labels)]


def clean_inputs(count: int, *, labels: int = 6, seed: int = 0) -> Any:
    """Inputs [count, 4 labels + 1] of all classes in turn, 0 to 1."""
    rng = np.random.default_rng(seed)
    inputs = 0.2 * rng.random((count, 4 * labels + 1))
    for number in range(count):
        start = 4 * (number % labels)
        inputs[number, start : start + 4] = 0.7 + 0.3 * rng.random(4)
    inputs[:, -1] = 0.0
    return inputs


def an_inspection(owns: Sequence[Own] | None = None, *, labels: int = 6, **fields: Any) -> Inspection:
    """An inspection of :func:`a_network`."""
    asked: dict[str, Any] = {
        "id": "inspection-1",
        "parties": owns[0].parties.digest if owns else "0" * 64,
        "layers": (4 * labels + 1, labels + 1, labels),
        "sought": 12,
        "held_out": 12,
        "steps": 12,
        "every": 4,
        "mending_steps": 30,
    }
    return Inspection(**(asked | fields))


def give(asked: Inspection, owns: Sequence[Own], folder: Path, layers: Any, inputs: Any) -> owners.Pad:
    """What both owners give, in a folder; what the model's owner keeps."""
    pad = np.frombuffer(secrets.token_bytes(8 * owners.pad_values(asked)), dtype="<i8")
    folder.mkdir()
    parts = {"model-owner": owners.model_values(asked, layers, pad), "data-owner": owners.data_values(asked, inputs)}
    for role, values in parts.items():
        part = owners.part(asked, role)
        given = inspections.give(part, values, owns[0].parties, secrets.token_bytes(sharing.random_bytes(part)))
        (folder / f"{role}.json").write_bytes(msgspec.json.encode(given))
        if role == "model-owner":
            weights = owners.weights_digest(asked, layers)
            kept = owners.Pad(inspection=asked.digest, given=given.digest, weights=weights, values=pad.tobytes())
    return kept
