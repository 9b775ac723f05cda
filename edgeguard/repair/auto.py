"""Tries methods of repair in order of their cost, holds each result against the gate, and keeps the best that passes.

Rules enforced here:

* every method works on a copy of the original; combinations begin with what a cheaper method left;
* the gate judges the int8 guarded file, on inputs and by triggers that no method was shown;
* what obviously fails, because known triggers still work or clean answers changed, is not converted, and the reason
  says so;
* a method that breaks, for whatever reason, has failed, and takes nothing of the others with it;
* costlier methods are not tried once a cheaper one leaves hardly any success to the triggers;
* of those that pass, the one wins that leaves the triggers least; what passed in full goes before what an owner has to
  approve. Why each other one failed is kept.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EdgeGuardError
from edgeguard.inspection.inversion import Stamp
from edgeguard.repair import gate
from edgeguard.repair.gate import Ints, Successes
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Knowledge, Method

Images = npt.NDArray[np.uint8]
Say = Callable[[str, str, int, int], None]
"""Called with stage, text, steps done, steps in total."""

AUTO = "auto"
PLANS: tuple[tuple[str, ...], ...] = (
    *((name,) for name in METHODS if name != "anp"),
    ("linf", "unlearn"),
    ("anp",),
)
"""What is tried, in order of cost; the combination after what it combines."""
MAX_INPUTS = 1000
SCREENED = 300
SCREEN_SUCCESS = 0.1
SCREEN_LOSS = 0.04
ENOUGH = 0.005


class Converted(Protocol):
    """A guarded file as ``pipeline.convert`` or ``calibration.guard_model`` made it."""

    @property
    def guarded(self) -> bytes:
        """The file."""

    @property
    def metadata(self) -> Any:
        """What it says of itself."""


@dataclass(frozen=True, kw_only=True)
class Judges:
    """What a result is held against; nothing of it was shown to a method, except the triggers to be unlearnt.

    Attributes:
        label: the backdoor's target.
        images: held-out clean inputs [N, H, W, C].
        labels: their true labels [N].
        classes: how many the model has.
        kept: triggers that were kept from the repair.
        quarantined: inputs that owners shared [M, H, W, C], None where there are none.
        before: the untouched guarded file. What it answers is kept from one result to the next.
        reaudit: success of what a fresh search finds in a guarded file; 0 where it finds nothing, NaN where it cannot
            tell, None where there is nothing to search with.
        convert: a target to its guarded int8 file.
    """

    label: int
    images: Images
    labels: Ints
    classes: int
    kept: tuple[Stamp, ...]
    quarantined: Images | None
    before: bytes
    reaudit: Callable[[bytes], float | None]
    convert: Callable[[Any], Converted]

    @functools.cached_property
    def untouched(self) -> Untouched:
        """The answers of ``before``."""
        return Untouched(GuardedModel.load(self.before), self.images, self.quarantined)


class Untouched:
    """What the untouched file answers to clean inputs [N, H, W, C], their triggered copies, and quarantined ones."""

    def __init__(self, model: GuardedModel, images: Images, quarantined: Images | None) -> None:
        self._model, self._images = model, images
        self.clean = _classes(model, images)
        self.quarantined = None if quarantined is None else _classes(model, quarantined)
        self._stamped: list[tuple[Stamp, dict[int, int]]] = []

    def stamped(self, trigger: Stamp, places: Ints) -> Ints:
        """To the copies, with a trigger, of the clean inputs at some places; each is asked once."""
        known = next((answers for other, answers in self._stamped if other is trigger), None)
        if known is None:
            known = {}
            self._stamped.append((trigger, known))
        new = [place for place in places.tolist() if place not in known]
        if new:
            found = _classes(self._model, _pixels(trigger, self._images[new]))
            known.update(zip(new, found.tolist(), strict=True))
        return np.asarray([known[place] for place in places.tolist()], dtype=np.int64)


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One plan, what it did, and how it ended. ``decision`` is None where it never came to the gate."""

    plan: tuple[str, ...]
    notes: tuple[str, ...]
    reason: str
    decision: gate.Decision | None = None
    measured: gate.Measured | None = None
    target: Any = None
    converted: Converted | None = None
    worst: float = math.nan
    loss: float = math.nan

    @property
    def name(self) -> str:
        """Its methods, in their order."""
        return " + ".join(self.plan)

    @property
    def outcome(self) -> gate.Outcome:
        """The gate's; what never came there failed."""
        return "failed" if self.decision is None else self.decision.outcome

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "method": self.name,
            "notes": list(self.notes),
            "outcome": self.outcome,
            "reason": self.reason,
            **({} if self.decision is None else {"gate": self.decision.as_dict()}),
        }


def plans_of(method: str) -> tuple[tuple[str, ...], ...]:
    """The plans that a method's name stands for; ``auto`` is all, ``a+b`` a combination. KeyError: no such method."""
    if method == AUTO:
        return PLANS
    names = tuple(part.strip() for part in method.split("+"))
    for name in names:
        METHODS[name]
    return (names,)


def repair(
    original: Any,
    known: Knowledge,
    bench: Bench,
    judges: Judges,
    say: Say,
    *,
    plans: Sequence[tuple[str, ...]] = PLANS,
    methods: Mapping[str, Method] = METHODS,
    done: Sequence[Attempt] = (),
    keep: Callable[[Sequence[Attempt]], None] = lambda tried: None,
) -> tuple[Attempt | None, list[Attempt]]:
    """Try the plans.

    Args:
        original: the :class:`Target`; not changed.
        known: what is known of the backdoor.
        bench: what the methods work with.
        judges: what their results are held against.
        say: told of each step.
        plans: what to try, cheapest first.
        methods: by name.
        done: attempts of an interrupted run that failed; they are not made again.
        keep: called with all attempts after each.

    Returns:
        The best attempt that passed, or that an owner may approve; None where all failed. And all, in their order.
    """
    tried: list[Attempt] = []
    best: Attempt | None = None
    for number, plan in enumerate(plans):
        if best is not None and best.outcome != "failed" and best.worst <= ENOUGH:
            reason = f"not tried: {best.name} passed, and costs less"
            tried.append(Attempt(plan=plan, notes=(), reason=reason))
            continue
        say("repairing", f"trying {' + '.join(plan)}", number, len(plans))
        before = [attempt for attempt in done if attempt.plan == plan]
        found = before[0] if before else _attempt(original, plan, known, bench, judges, methods, say)
        say("repairing", f"{found.name}: {found.outcome}: {found.reason}", number + 1, len(plans))
        tried.append(found)
        keep(tried)
        best = _better(best, found)
    return best, tried


def _better(best: Attempt | None, found: Attempt) -> Attempt | None:
    if found.outcome == "failed":
        return best

    def order(attempt: Attempt) -> tuple[bool, float, float]:
        return attempt.outcome != "passed", attempt.worst, attempt.loss

    return found if best is None or order(found) < order(best) else best


def _attempt(
    original: Any,
    plan: tuple[str, ...],
    known: Knowledge,
    bench: Bench,
    judges: Judges,
    methods: Mapping[str, Method],
    say: Say,
) -> Attempt:
    notes: list[str] = []
    for name in plan:
        why = methods[name].missing(known)
        if not why and methods[name].trains and not original.trainable:
            why = "needs a trainable model"
        if why:
            return Attempt(plan=plan, notes=(), reason=f"not tried: {why}")
    target = original.copy()
    try:
        for name in plan:
            done = methods[name].apply(target, known, bench)
            if not done and len(plan) > 1:
                return Attempt(plan=plan, notes=(), reason=f"not tried: {name} alone changes nothing")
            notes += done
        if not notes:
            return Attempt(plan=plan, notes=(), reason="found nothing to change")
        why = screen(original, target, known, judges)
        if why:
            return Attempt(plan=plan, notes=tuple(notes), reason=why)
        say("converting", f"{' + '.join(plan)}: quantising and guarding", 0, 1)
        converted = judges.convert(target)
        measured = measure(judges, known.triggers, converted.guarded, lambda: judges.reaudit(converted.guarded))
        decision = gate.decide(measured, classes=judges.classes)
    except Exception as error:  # frameworks raise whatever they like at a model that they did not expect
        why = str(error) if isinstance(error, EdgeGuardError) else f"{type(error).__name__}: {error}"
        return Attempt(plan=plan, notes=tuple(notes), reason=why)
    return Attempt(
        plan=plan,
        notes=tuple(notes),
        reason=decision.reason,
        decision=decision,
        measured=measured,
        target=target,
        converted=converted,
        worst=max((each.after / each.inputs for each in measured.successes if each.inputs), default=math.nan),
        loss=float(np.mean(measured.before == measured.labels) - np.mean(measured.after == measured.labels)),
    )


def screen(original: Any, target: Any, known: Knowledge, judges: Judges) -> str:
    """Why a target is not worth converting; empty where it is."""
    images, label = judges.images[:SCREENED], judges.label
    was, now = original.classes(images), target.classes(images)
    loss = float(np.mean(was == judges.labels[:SCREENED]) - np.mean(now == judges.labels[:SCREENED]))
    if loss > SCREEN_LOSS:
        return f"clean accuracy falls by {loss:.1%}"
    counted = images[(was != label) & (judges.labels[:SCREENED] != label)]
    for trigger in (*known.triggers, *judges.kept):
        turned = target.classes(_pixels(trigger, counted))
        if len(turned) and (success := float(np.mean(turned == label))) > SCREEN_SUCCESS:
            return f"a recovered trigger still turns {success:.1%}"
    return ""


def measure(
    judges: Judges, unlearnt: Sequence[Stamp], after: bytes, reaudit: Callable[[], float | None]
) -> gate.Measured:
    """Both files on the same inputs, and what every trigger does to them.

    Args:
        judges: with the untouched file.
        unlearnt: triggers that the repair was shown.
        after: the repaired file.
        reaudit: success of what is found anew in it; called only where the known triggers no longer work.
    """
    model, before, target = GuardedModel.load(after), judges.untouched, judges.label
    was, now = before.clean, _classes(model, judges.images)
    victims = np.flatnonzero((judges.labels != target) & (was != target) & (now != target))[:MAX_INPUTS]

    def success(kind: Literal["unlearned", "kept", "quarantined"], hit: Ints, images: Images) -> Successes:
        after = int((_classes(model, images) == target).sum())
        return Successes(kind=kind, inputs=len(images), before=int((hit == target).sum()), after=after)

    def stamped(kind: Literal["unlearned", "kept"], trigger: Stamp) -> Successes:
        return success(kind, before.stamped(trigger, victims), _pixels(trigger, judges.images[victims]))

    found = [stamped("unlearned", trigger) for trigger in unlearnt]
    found += [stamped("kept", trigger) for trigger in judges.kept]
    if judges.quarantined is not None and before.quarantined is not None and len(judges.quarantined):
        found.append(success("quarantined", before.quarantined, judges.quarantined))
    worst = max((each.after / each.inputs for each in found if each.inputs), default=math.nan)
    # A search in a model that lets known triggers through would tell nothing new.
    residual = reaudit() if worst <= SCREEN_SUCCESS else math.nan
    return gate.Measured(labels=judges.labels, before=was, after=now, successes=tuple(found), residual=residual)


def _classes(model: GuardedModel, images: Images) -> Ints:
    found = [model.measure(x).predicted for x in images]
    return np.asarray([-1 if predicted is None else predicted for predicted in found], dtype=np.int64)


def _pixels(trigger: Stamp, images: Images) -> Images:
    return np.asarray(trigger.stamp(images).clip(0, 255), dtype=np.uint8)
