"""Unlearning: on clean inputs *and* on their triggered copies, give the original's own clean answer.

After Wang et al., Neural Cleanse, S&P 2019, who fine-tune on triggered inputs under their true label. Distilling the
original's own answers needs no labels and keeps the clean accuracy: see :mod:`edgeguard.repair.training`.
"""

from __future__ import annotations

from typing import Any, ClassVar

from edgeguard.repair.methods.base import Bench, Knowledge
from edgeguard.repair.training import distil, teachings

STEPS = 200
RATE = 7e-4
MAX_ROUNDS = 3


class Unlearning:
    """Distillation with every recovered trigger, then with those that are newly found in the repaired model."""

    name: ClassVar[str] = "unlearn"
    paper: ClassVar[str] = "Wang et al., S&P 2019, with distillation"
    cost: ClassVar[int] = 10
    trains: ClassVar[bool] = True

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return "" if known.triggers else "no recovered trigger to unlearn"

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        teacher = target.copy()
        taught = teachings(teacher.model, bench.images)
        triggers, rounds = list(known.triggers), 0
        for rounds in range(1, MAX_ROUNDS + 1):
            distil(
                target.model,
                bench.images,
                taught,
                triggers,
                steps=STEPS,
                rate=RATE / rounds,
                seed=bench.seed + rounds,
                note=f"unlearning, round {rounds}",
                progress=bench.progress,
            )
            found = list(known.seek(target)) if known.seek is not None and rounds < MAX_ROUNDS else []
            if not found:
                break
            triggers += found
        return (f"{len(triggers)} triggers unlearnt in {rounds} rounds of {STEPS} steps",)
