"""``python -m edgeguard.hub.replay MODEL.tflite INPUT.npy...``: what the hub's own copy of a model says of inputs.

Prints one JSON array, an object for each input: ``predicted``, ``flagged`` and ``score``. Inputs were sent by people:
they are read without unpickling, in a process of their own.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EXIT_USAGE, EdgeGuardError


class Replayed(msgspec.Struct, frozen=True, kw_only=True):
    """What the model says of one input. ``score`` is None where it is no number: such an input is not flagged."""

    predicted: int | None
    flagged: bool
    score: float | None


def main(arguments: Sequence[str]) -> int:
    """Replay, print, and return the exit status."""
    try:
        model = GuardedModel.load(Path(arguments[0]).read_bytes())
        found: list[Replayed] = []
        for path in arguments[1:]:
            verdict = model.infer(np.load(path, allow_pickle=False)).verdict
            score = float(verdict.score)
            found.append(
                Replayed(
                    predicted=verdict.predicted,
                    flagged=bool(verdict.flagged),
                    score=score if math.isfinite(score) else None,
                )
            )
    except (EdgeGuardError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    sys.stdout.buffer.write(msgspec.json.encode(found))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
