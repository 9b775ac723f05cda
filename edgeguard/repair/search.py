"""The searches of one repair: triggers to unlearn, triggers to judge by, and what a repaired model still lets through.

Rules enforced here:

* what judges was found by other seeds than what is unlearnt, and is not told to any method;
* a residual trigger is one that still works on the repaired model *and* moves the original's norms as devices reported;
* a re-audit that could not check is NaN, never 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.audit import STEPS as AUDIT_STEPS
from edgeguard.inspection.audit import audit
from edgeguard.inspection.inversion import Progress
from edgeguard.repair import gate
from edgeguard.repair.recover import FORMS, Form, Recovered, Reported, beside, distance, hunt, success_of

KEPT_SEED = 1000
RESIDUAL_SUCCESS = 0.1
"""A residual trigger that turns less than this is left to the gate."""


@dataclass(kw_only=True)
class Searches:
    """Searches for triggers of one label, in the original and in repaired models.

    Attributes:
        model: the original Keras model.
        norms: it, as ``inspection.networks.norms_of`` makes it.
        images: clean inputs to recover on.
        held_out: others, to judge by.
        label: the backdoor's target.
        reported: what is known of triggered inputs.
        gamma: weight of that.
        steps: of each search.
        seed: of all that is drawn.
        progress: called now and then.
    """

    model: Any
    norms: Any
    images: npt.NDArray[np.uint8]
    held_out: npt.NDArray[np.uint8]
    label: int
    reported: Reported
    gamma: float = 1.0
    steps: int = 200
    seed: int = 0
    progress: Progress | None = None
    _nearest: float | None = field(default=None, init=False)
    _forms: tuple[Form, ...] = field(default=FORMS, init=False)
    _rounds: int = field(default=0, init=False)

    def original(self) -> tuple[list[Recovered], list[Any]]:
        """Triggers of the original: to be unlearnt, and to be kept from the repair.

        What no search from clean inputs finds, a module that was added, an audit of the structure does.
        """
        shown, _ = self.known(self._hunt(self.norms, self.seed), [])
        kept: list[Any] = list(self._hunt(self.norms, self.seed + KEPT_SEED))
        if not kept:
            found = audit(self.model, self.held_out, labels=[self.label], steps=AUDIT_STEPS // 4, seed=self.seed)
            kept = list(found.triggers(self.label))
        return shown, kept

    def known(self, shown: list[Recovered], kept: list[Any]) -> tuple[list[Recovered], list[Any]]:
        """The same from an earlier run."""
        if shown:
            self._nearest = distance(self.norms, shown[0], self.held_out, self.reported)
            self._forms = tuple(trigger.form for trigger in shown)
        return shown, kept

    def residual(self, target: Any) -> list[Recovered]:
        """Triggers that still work on a repaired target, as devices reported them."""
        if self._nearest is None:
            return []
        self._rounds += 1
        both = beside(target.model, self.norms)
        return self._hunt(both, self.seed + self._rounds, min_success=RESIDUAL_SUCCESS, nearest=self._nearest)

    def reaudit(self, target: Any) -> float:
        """Success of the best trigger that a fresh audit, or a search as devices reported, finds; 0 where none does."""
        found = audit(
            target.model,
            self.held_out,
            labels=[self.label],
            steps=AUDIT_STEPS // 4,
            seed=self.seed,
            progress=self.progress,
        )
        if found.verdict == "could_not_check":
            return math.nan
        if found.verdict == "backdoored":
            return max((f.success for f in found.findings if f.suspected), default=1.0)
        left = self.residual(target)
        worst = max((success_of(target.model, trigger, self.held_out) for trigger in left), default=0.0)
        return worst if worst > gate.MAX_SUCCESS else 0.0

    def _hunt(self, model: Any, seed: int, **how: Any) -> list[Recovered]:
        return hunt(
            model,
            self.images,
            self.held_out,
            self.label,
            self.reported,
            forms=self._forms,
            gamma=self.gamma,
            steps=self.steps,
            seed=seed,
            progress=self.progress,
            **how,
        )
