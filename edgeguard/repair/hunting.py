"""Which triggers a repair of a file unlearns and is judged by, whatever is known: evidence, or nothing but the model.

Rules enforced here:

* a trainable model with evidence: triggers that reproduce what devices reported, see :mod:`edgeguard.repair.search`;
* without evidence, or a ``.tflite`` file: an audit, of the file's reconstruction where it is one. No sign of a backdoor
  is no reason to change anything; what could not be checked is not called clean;
* without a training framework nothing can be searched: quarantined inputs judge, and the re-audit is not checkable.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import GuardMetadata
from edgeguard.inspection.audit import Audit
from edgeguard.inspection.inversion import Stamp
from edgeguard.repair.methods.base import Progress
from edgeguard.repair.target import KerasTarget, TfliteTarget

Images = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What was found. ``label`` None: nothing to repair, or nothing could be checked, and why.

    ``shown`` is to be unlearnt, ``kept`` judges; ``seek`` and ``reaudit``: see ``Knowledge`` and ``Judges``.
    """

    label: int | None
    outcome: Literal["nothing found", "could not check"] = "nothing found"
    reason: str = ""
    shown: tuple[Stamp, ...] = ()
    kept: tuple[Stamp, ...] = ()
    seek: Callable[[Any], Sequence[Stamp]] | None = None
    reaudit: Callable[[bytes], float | None] = lambda guarded: None


def hunt_for(
    target: Any,
    metadata: GuardMetadata,
    images: Images,
    held_out: Images,
    evidence: tuple[int, npt.NDArray[np.float64]] | None,
    std: npt.NDArray[np.float64],
    quarantined: Images | None,
    *,
    stored: Path,
    seed: int = 0,
    progress: Progress | None = None,
) -> Found:
    """Search once, or take what an interrupted run stored.

    Args:
        target: the original.
        metadata: of its guarded file.
        images: clean inputs to recover on.
        held_out: others, to judge by.
        evidence: label and mean features [D] of flagged inputs, None where nobody reported.
        std: clean standard deviations of the features [D].
        quarantined: inputs that owners shared.
        stored: a file for the triggers.
        seed: of all that is drawn.
        progress: called now and then.

    Raises:
        ModelError: the model does not end in a softmax, or is not the one that the guard taps.
    """
    if evidence is None or not isinstance(target, KerasTarget):
        label = None if evidence is None else evidence[0]
        return _audited(target, images, held_out, label, seed, progress)
    from edgeguard.inspection.networks import norms_of
    from edgeguard.repair.recover import Reported
    from edgeguard.repair.search import Searches

    columns = np.concatenate([np.asarray(tap.columns) for tap in metadata.taps if tap.kind != "logit"])
    searches = Searches(
        model=target.model,
        norms=norms_of(target.model, metadata.taps),
        images=images,
        held_out=held_out,
        label=evidence[0],
        reported=Reported(
            flagged_mean=evidence[1][columns].astype(np.float32),
            std=std[columns].astype(np.float32),
            quarantined=quarantined,
        ),
        seed=seed,
        progress=progress,
    )
    before = _stored(stored, evidence[0])
    shown, kept = searches.original() if before is None else searches.known(*before)
    _store(stored, shown, kept)
    return Found(
        label=evidence[0], shown=tuple(shown), kept=tuple(kept), seek=searches.residual, reaudit=searches.reaudit
    )


def _audited(
    target: Any, images: Images, held_out: Images, label: int | None, seed: int, progress: Progress | None
) -> Found:
    """What an audit of the model, or of a file's reconstruction, finds."""
    model = _float_model(target)
    if model is None:
        if label is None:
            return Found(
                label=None, outcome="could not check", reason="the model cannot be audited, and nobody reported"
            )
        return Found(label=label)
    from edgeguard.inspection.audit import audit
    from edgeguard.repair.search import reaudited

    suspects = None if label is None else [label]
    found = audit(model, images, labels=suspects, seed=seed, progress=progress)
    if label is None and found.verdict != "backdoored":
        outcome: Literal["nothing found", "could not check"] = (
            "nothing found" if found.verdict == "no_sign" else "could not check"
        )
        return Found(label=None, outcome=outcome, reason=found.reason)
    suspect = found.labels[0] if label is None else label
    again = audit(model, held_out, labels=[suspect], seed=seed + 1, progress=progress)

    return Found(
        label=suspect,
        shown=_telling(found, suspect),
        kept=_telling(again, suspect),
        reaudit=lambda guarded: reaudited(guarded, held_out, seed=seed + 2, progress=progress),
    )


def _telling(found: Audit, label: int) -> tuple[Stamp, ...]:
    """A module's triggers, or those that stand out, or any: a large patch turns a clean model too."""
    planted = tuple(trigger for trigger in found.planted if trigger.label == label)
    suspected = tuple(f.trigger for f in found.findings if f.suspected and f.label == label)
    return (planted or suspected or found.triggers(label))[:2]


def _float_model(target: Any) -> Any:
    """The trainable model, or the reconstruction of a file; None where there is neither."""
    if isinstance(target, KerasTarget):
        return target.model
    assert isinstance(target, TfliteTarget)
    from edgeguard.repair.search import rebuilt

    return rebuilt(target.content)


def _store(path: Path, shown: Sequence[Any], kept: Sequence[Any]) -> None:
    """Recovered triggers; what came from an audit is sought anew."""
    from edgeguard.repair.recover import Recovered

    if not all(isinstance(trigger, Recovered) for trigger in (*shown, *kept)):
        return
    arrays: dict[str, npt.NDArray[Any]] = {}
    for side, triggers in (("shown", shown), ("kept", kept)):
        for number, trigger in enumerate(triggers):
            for place, part in enumerate(trigger.parts):
                arrays[f"{side}-{number}-{trigger.form}-{trigger.success:.4f}-{place}"] = part
    partial = path.with_suffix(".partial.npz")
    np.savez(partial, **arrays)
    partial.replace(path)


def _stored(path: Path, label: int) -> tuple[list[Any], list[Any]] | None:
    from edgeguard.repair.recover import FORMS, Recovered

    found: dict[str, list[Any]] = {"shown": [], "kept": []}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for name in (n for n in arrays.files if n.endswith("-0")):
                side, _, form, success, _ = name.split("-")
                parts = [arrays[f"{name[:-1]}{place}"] for place in range(2) if f"{name[:-1]}{place}" in arrays.files]
                if form in FORMS:
                    found[side].append(Recovered(label=label, form=form, parts=tuple(parts), success=float(success)))
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return None
    return (found["shown"], found["kept"]) if found["kept"] else None
