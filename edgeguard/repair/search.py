"""The searches of one repair: triggers to unlearn, triggers to judge by, and what a repaired model still lets through.

Rules enforced here:

* what judges was found by other seeds than what is unlearnt, and is not told to any method;
* a residual trigger is one that still works on the repaired model, moves the original's norms as devices reported,
  *and* is hardly larger than the original's of its form: a patch over most of an input turns any model;
* a re-audit reads the int8 guarded file that would be released; with a case it looks at the label of the case alone,
  with a quarter of an audit's steps, so that it is weaker than an audit;
* a re-audit that could not tell is NaN, never 0. Where there is nothing to audit with, as no training framework, an
  operator that cannot be rebuilt, or too few classes to compare, it is None, and so is a search as devices reported
  that finds nothing in the original either. It is None, too, where triggers that searches of the original found differ
  much in size, and one in between still works on the repaired model: it may be the same or another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ModelError
from edgeguard.inspection import index
from edgeguard.inspection.audit import STEPS, audit
from edgeguard.inspection.inversion import Progress, held_out_success
from edgeguard.repair import gate
from edgeguard.repair.recover import FORMS, Form, Hunt, Recovered, Reported, beside, distance
from edgeguard.repair.target import KerasTarget

KEPT_SEED = 1000
RESIDUAL_SUCCESS = 0.1
"""A residual trigger that turns less than this is left to the gate."""
GROWN = 1.5
"""A trigger that is so many times larger than the original's of its form is another trigger: to be judged, than the
smallest of the original's; to be unlearnt, where one too many does little harm, than the largest.

On digits under BadNets, Blended, SIG and Refool what other seeds found in the original lay within 1.1 of it, one patch
of eleven at 4.8; what was found after unlearning, and in clean twins, at 2.1 to 5.9, of warps at 1.5 to 1.9.
"""


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
    steps: int = STEPS
    seed: int = 0
    progress: Progress | None = None
    _nearest: float | None = field(default=None, init=False)
    _sizes: dict[Form, list[float]] = field(default_factory=dict, init=False)
    _forms: tuple[Form, ...] = field(default=FORMS, init=False)
    _rounds: int = field(default=0, init=False)
    _hunting: Hunt | None = field(default=None, init=False)

    def original(self) -> tuple[list[Recovered], list[Any]]:
        """Triggers of the original: to be unlearnt, and to be kept from the repair.

        What no search from clean inputs finds, a module that was added, an audit of the structure does.
        """
        shown = self.shown()
        self._forms = tuple(trigger.form for trigger in shown) or FORMS
        kept: list[Any] = list(self._hunt(self.norms, self.seed + KEPT_SEED))
        if not kept:
            found = audit(self.model, self.held_out, labels=[self.label], steps=self.steps, seed=self.seed)
            kept = list(found.triggers(self.label))
        return self.known(shown, kept)

    def shown(self) -> list[Recovered]:
        """Triggers of the original that are to be unlearnt."""
        return self._hunt(self.norms, self.seed)

    def known(self, shown: list[Recovered], kept: list[Any]) -> tuple[list[Recovered], list[Any]]:
        """The same from an earlier run."""
        if shown:
            self._nearest = distance(self.norms, shown[0], self.held_out, self.reported)
            self._forms = tuple(trigger.form for trigger in shown)
        for trigger in (*shown, *(each for each in kept if isinstance(each, Recovered))):
            self._sizes.setdefault(trigger.form, []).append(trigger.size)
        return shown, kept

    def residual(self, target: Any) -> list[Recovered]:
        """Triggers that still work on a repaired target, as devices reported them, to be unlearnt too."""
        if self._nearest is None:
            return []
        self._rounds += 1
        both = beside(target.model, self.norms)
        found = self._hunt(both, self.seed + self._rounds, min_success=RESIDUAL_SUCCESS, nearest=self._nearest)
        return hardly_larger(found, self._sizes, than=max)

    def reaudit(self, guarded: bytes) -> float | None:
        """What :func:`reaudited` finds in a guarded file, or a search as devices reported, whichever is worse."""
        model = rebuilt(guarded)
        if model is None:
            return None
        found = _audited(model, self.held_out, [self.label], STEPS // 4, self.seed, self.progress)
        if found is not None and not found <= gate.MAX_SUCCESS:
            return found
        if self._nearest is None:
            return None
        again = self.residual(KerasTarget(model))
        successes = [held_out_success(model, trigger, self.held_out) for trigger in again]
        working = [(t, success) for t, success in zip(again, successes, strict=True) if success > gate.MAX_SUCCESS]
        left = [success for t, success in working if hardly_larger([t], self._sizes, than=min)]
        if left:
            return max(left)
        return None if working else found

    def _hunt(self, model: Any, seed: int, **how: Any) -> list[Recovered]:
        if self._hunting is None or self._hunting.model is not model:
            self._hunting = Hunt(model, self.images, self.held_out, self.label, self.reported, gamma=self.gamma)
        return self._hunting.triggers(seed, forms=self._forms, steps=self.steps, progress=self.progress, **how)


def hardly_larger(
    found: Sequence[Recovered], sizes: Mapping[Form, Sequence[float]], *, than: Callable[[Sequence[float]], float]
) -> list[Recovered]:
    """Triggers at most :data:`GROWN` times as large as the original's of their form.

    Args:
        found: triggers, each of a form in ``sizes``.
        sizes: of the original's triggers.
        than: which of them counts, ``min`` or ``max``.
    """
    return [trigger for trigger in found if trigger.size <= GROWN * than(sizes[trigger.form])]


def reaudited(
    guarded: bytes,
    images: npt.NDArray[np.uint8],
    *,
    labels: Sequence[int] | None = None,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
) -> float | None:
    """Success of the best trigger that a fresh audit of a guarded file finds, of any label; 0 where it finds none.

    Args:
        guarded: the file.
        images: clean inputs [N, H, W, C] that no method was shown.
        labels: to look at, None: all.
        steps: of the searches.
        seed: of all that is drawn.
        progress: called now and then.

    Returns:
        NaN where the audit could not tell, None where there is nothing to audit with; see the rules above.
    """
    model = rebuilt(guarded)
    return None if model is None else _audited(model, images, labels, steps, seed, progress)


def _audited(
    model: Any,
    images: npt.NDArray[np.uint8],
    labels: Sequence[int] | None,
    steps: int,
    seed: int,
    progress: Progress | None,
) -> float | None:
    if int(model.outputs[0].shape[-1]) <= index.MIN_OTHERS:
        return None
    found = audit(model, images, labels=labels, steps=steps, seed=seed, progress=progress)
    if found.verdict == "could_not_check":
        return math.nan
    suspected = [f.success for f in found.findings if f.suspected] + [t.success for t in found.planted]
    return max(suspected, default=0.0)


def rebuilt(content: bytes) -> Any:
    """A file as a float Keras model with the int8 weights; None where it cannot be rebuilt here."""
    try:
        from converters import reconstruct

        return reconstruct.of_tflite(content).model
    except (ImportError, ModelError):
        return None
