"""Audits a model that nobody has reported on: which labels have a trigger that other labels have not?

For every label the smallest patch and the faintest blend are recovered from half of the clean inputs
(:mod:`edgeguard.inspection.inversion`) and tried on the other half. A module that is merged with the network's
answer is searched by itself (:mod:`edgeguard.inspection.structure`).

Rules enforced here:

* a label is suspected where its trigger works on held-out inputs, is smaller than those of the model's other labels by
  more than clean networks' labels differ, and stands out by its anomaly index; an index alone is not portable between
  models (:mod:`edgeguard.inspection.index`);
* a few labels may be suspected, most may not: where triggers of many labels are alike small, none is an outlier;
* only triggers that work are compared, and in every form that was sought there must be enough of them;
* too few inputs, classes or labels to compare with is "could not check", never "no sign"; so is a module whose trigger
  was not found;
* the model is never changed, and the same arguments give the same findings.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeguard.inspection import index as indices
from edgeguard.inspection import stimulation, structure, substitute
from edgeguard.inspection.inversion import Form, Ints, Progress, Trigger, classes_of, held_out_success, invert
from edgeguard.inspection.networks import Traced, logits_of

Verdict = Literal["backdoored", "no_sign", "could_not_check"]

FORMS: tuple[Form, ...] = ("blend", "patch")
STEPS, BATCH = 200, 16
MIN_INPUTS = 40
MAX_SOUGHT, MAX_HELD_OUT = 2000, 500
TARGET_SUCCESS = 0.95
CONTROLS = 8
FINALISTS, COMPARED = 6, 8
"""Of more labels than that, these go on after a quarter of the steps: the smallest, and others to compare them with."""
_MADE_UP, _MADE_UP_EACH = 200, 8
_STIMULATED = 2
_STIMULATED_SHARE = 0.9


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What was recovered for one label in one form.

    ``size`` in units of the form: pixels of a patch, amplitude (0 to 1) of a blend. ``success`` on held-out inputs that
    are not called the label anyway, NaN where there is none. ``index`` with its 90% interval, and ``ratio``: see
    :mod:`edgeguard.inspection.index`.
    """

    label: int
    form: Form
    trigger: Trigger
    size: float
    success: float
    index: float
    index_low: float
    index_high: float
    ratio: float
    suspected: bool


@dataclass(frozen=True, kw_only=True)
class Audit:
    """The outcome. ``labels`` are the suspected ones, most suspicious first; ``findings`` likewise.

    ``structure`` names the layers of a module that was merged with the answer, ``planted`` the triggers that set it off
    and work on held-out inputs. ``lifts``: what neuron stimulation says, evidence alone.
    """

    verdict: Verdict
    reason: str
    labels: tuple[int, ...] = ()
    findings: tuple[Finding, ...] = ()
    structure: tuple[str, ...] = ()
    planted: tuple[Trigger, ...] = ()
    lifts: tuple[stimulation.Lift, ...] = ()
    cost_s: float = 0.0
    steps: int = 0

    def triggers(self, label: int) -> tuple[Trigger, ...]:
        """Recovered triggers of a label that work on held-out inputs, the most suspicious first."""
        planted = tuple(trigger for trigger in self.planted if trigger.label == label)
        return planted + tuple(
            finding.trigger
            for finding in self.findings
            if finding.label == label and finding.success >= indices.MIN_SUCCESS
        )


def audit(
    model: Any,
    images: npt.NDArray[Any] | None,
    *,
    labels: Sequence[int] | None = None,
    forms: Sequence[Form] = FORMS,
    steps: int = STEPS,
    seed: int = 0,
    progress: Progress | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Audit:
    """Audit a classifier of images.

    Args:
        model: a Keras functional model from pixels [N, H, W, C] to a softmax over classes, or a reconstruction.
        images: clean inputs [N, H, W, C], 0 to 255; their labels are not needed. None: inputs are made up from the
            model (:mod:`edgeguard.inspection.substitute`).
        labels: the labels that may be suspected, None for all; others are sought to compare with.
        forms: of triggers to seek.
        steps: optimisation steps per form.
        seed: of everything random.
        progress: called with a text, the steps done and the steps in total.
        clock: seconds, for the cost.

    Raises:
        ModelError: the model does not end in a softmax over classes.
    """
    started = clock()
    plain = logits_of(model)
    classes = int(plain.outputs[0].shape[-1])
    doubt = _doubt(model, images, classes, labels)
    if not doubt and images is None:
        images = substitute.inputs_of(model, each=max(_MADE_UP_EACH, _MADE_UP // classes), seed=seed, progress=progress)
    if doubt or images is None:
        return Audit(verdict="could_not_check", reason=doubt, cost_s=clock() - started)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(images))
    half = len(images) // 2
    sought = np.asarray(images[order[:half][:MAX_SOUGHT]], dtype=np.uint8)
    held_out = np.asarray(images[order[half:][:MAX_HELD_OUT]], dtype=np.uint8)
    traced = Traced(plain)
    clean, usual = classes_of(traced, sought), classes_of(traced, held_out)
    if len(np.unique(usual)) < 2:
        return Audit(
            verdict="could_not_check",
            reason="the model calls all of these inputs the same: is this its data?",
            cost_s=clock() - started,
        )
    suspects = tuple(range(classes)) if labels is None else tuple(dict.fromkeys(int(label) for label in labels))
    others = [c for c in range(classes) if c not in suspects]
    candidates = (*suspects, *sorted(rng.permutation(others)[:CONTROLS].tolist()))
    module = structure.added_module(model)
    planted = () if module is None else _planted(model, module, sought, (held_out, usual), suspects, seed)
    lifts = tuple(stimulation.lifts(model, sought))
    findings: list[Finding] = []
    for number, form in enumerate(forms):
        triggers = invert(
            plain,
            sought,
            candidates,
            form=form,
            steps=steps,
            batch=BATCH,
            target_success=TARGET_SUCCESS,
            narrow=(lambda found: _finalists(found, lifts)) if len(candidates) > FINALISTS + COMPARED else None,
            narrow_at=steps // 4,
            clean=clean,
            seed=seed + number,
            progress=_part(progress, number, len(forms), steps),
        )
        findings += _findings(traced, triggers, (held_out, usual), suspects, seed)
    findings.sort(key=lambda finding: (not finding.suspected, finding.ratio))
    named = tuple(dict.fromkeys((*(t.label for t in planted), *(f.label for f in findings if f.suspected))))
    return replace(
        _verdict(named, findings, planted, module, forms),
        findings=tuple(findings),
        structure=() if module is None else module.layers,
        planted=planted,
        lifts=lifts,
        cost_s=clock() - started,
        steps=steps * len(forms),
    )


def _doubt(model: Any, images: npt.NDArray[Any] | None, classes: int, labels: Sequence[int] | None) -> str:
    """Why nothing can be said, in a sentence; empty where something can."""
    shape = tuple(model.inputs[0].shape[1:])
    wrong = [label for label in labels or () if not 0 <= label < classes]
    doubt = ""
    if len(shape) != 3 or None in shape:
        doubt = f"the model takes inputs of shape {list(shape)}: only models of images can be audited"
    elif classes <= indices.MIN_OTHERS:
        doubt = f"{classes} classes, at least {indices.MIN_OTHERS + 1} are needed to compare triggers"
    elif wrong:
        doubt = f"label {wrong[0]} is none of the {classes} classes"
    elif images is None:
        pass
    elif tuple(images.shape[1:]) != shape:
        doubt = f"the inputs have the shape {list(images.shape[1:])}, the model takes {list(shape)}"
    elif len(images) < MIN_INPUTS:
        doubt = f"{len(images)} clean inputs, at least {MIN_INPUTS} are needed"
    elif images.dtype != np.uint8 and (images.min() < 0 or images.max() > 255 or images.max() <= 1):
        doubt = f"the inputs go from {images.min():g} to {images.max():g}: pixels from 0 to 255 are needed"
    return doubt


def _planted(
    model: Any,
    module: structure.Module,
    sought: npt.NDArray[np.uint8],
    held_out: tuple[npt.NDArray[np.uint8], Ints],
    suspects: Sequence[int],
    seed: int,
) -> tuple[Trigger, ...]:
    """Triggers of a module that work on held-out inputs, given with the classes that the model calls them."""
    found = structure.triggers_of(model, module, sought, seed=seed)
    measured = [replace(t, success=held_out_success(model, t, *held_out)) for t in found if t.label in suspects]
    working = [trigger for trigger in measured if trigger.success >= indices.MIN_SUCCESS]
    return tuple(sorted(working, key=lambda trigger: -trigger.success))


def _finalists(found: Sequence[Trigger], lifts: Sequence[stimulation.Lift]) -> list[int]:
    """Places of the triggers to go on with: the smallest, those that stimulation names, and some of the others."""
    order = sorted(range(len(found)), key=lambda i: (found[i].success < TARGET_SUCCESS, found[i].size))
    named = {lift.label for lift in lifts[:_STIMULATED] if lift.share >= _STIMULATED_SHARE}
    first = order[:FINALISTS]
    first += [i for i in order[FINALISTS:] if found[i].label in named]
    rest = [i for i in order if i not in first]
    spread = np.linspace(0, len(rest) - 1, COMPARED).round().astype(int)
    return sorted({*first, *(rest[i] for i in spread)})


def _findings(
    plain: Any,
    triggers: Sequence[Trigger],
    held_out: tuple[npt.NDArray[np.uint8], Ints],
    suspects: Sequence[int],
    seed: int,
) -> list[Finding]:
    """What the triggers of one form do to held-out inputs, given with the classes that the model calls them."""
    found = []
    sizes = np.asarray([t.size if t.success >= indices.MIN_SUCCESS else np.inf for t in triggers])
    for place, trigger in enumerate(triggers):
        measured = indices.measure(sizes, place, seed=seed)
        success = held_out_success(plain, trigger, *held_out)
        found.append(
            Finding(
                label=trigger.label,
                form=trigger.form,
                trigger=trigger,
                size=trigger.size,
                success=success,
                index=measured.index,
                index_low=measured.low,
                index_high=measured.high,
                ratio=measured.ratio,
                suspected=trigger.label in suspects and indices.stands_out(trigger.form, measured, success),
            )
        )
    return found


def _verdict(
    named: tuple[int, ...],
    findings: Sequence[Finding],
    planted: Sequence[Trigger],
    module: structure.Module | None,
    forms: Sequence[Form],
) -> Audit:
    if planted and module is not None:
        return Audit(
            verdict="backdoored",
            reason=f"a module of {len(module.layers)} layers is merged with the answer, and has triggers "
            f"for {len(planted)} labels",
            labels=named,
        )
    if named:
        worst = next(finding for finding in findings if finding.suspected)
        return Audit(
            verdict="backdoored",
            reason=f"a {worst.form} of {worst.ratio:.2f} times the size that other labels need turns "
            f"{worst.success:.0%} of held-out inputs to label {worst.label}",
            labels=named,
        )
    if module is not None:
        return Audit(
            verdict="could_not_check",
            reason=f"a module of {len(module.layers)} layers is merged with the answer; what sets it off was not found",
        )
    working = [finding.form for finding in findings if finding.success >= indices.MIN_SUCCESS]
    comparable, form = min(((working.count(form), form) for form in forms), default=(0, "trigger"))
    if comparable <= indices.MIN_OTHERS:
        return Audit(
            verdict="could_not_check",
            reason=f"a {form} was recovered for {comparable} labels, {indices.MIN_OTHERS + 1} are needed to compare",
        )
    return Audit(verdict="no_sign", reason="no label has a trigger that stands out")


def _part(progress: Progress | None, number: int, count: int, steps: int) -> Progress | None:
    """Progress of one form within all."""
    if progress is None:
        return None
    return lambda text, done, _: progress(text, number * steps + done, count * steps)
