"""Three parties with keys of their own, a round for them, and devices' submissions to it."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from edgeguard.contract.private import Round, Submission
from edgeguard.private import parties as making
from edgeguard.private import sharing
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
