"""Repairs a model file for its owner: what ``edgeguard repair`` does, without the terminal.

Rules enforced here:

* the original is read, never written; a file that is there is never overwritten;
* evidence is taken for the file that it was reported of, and no other: the digests must be the same. Another file made
  of the same trainable model has another one, so that the file that devices run is named beside it;
* without evidence the model is audited first; where that finds nothing, nothing is changed;
* clean data must be labelled, with labels of the model's classes; see :mod:`edgeguard.repair.owner`;
* what was found and tried lies in a folder beside the output until the run ends: an interrupted one goes on there, if
  model, data with labels and groups, evidence, shared inputs, method, seed and version are still the same. A method
  that broke, and never came to the gate, is tried again;
* a repair that waits for its owner's approval lies there too, with its report, and approving writes that very file.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

from converters import calibration, files, untrusted
from edgeguard import __version__
from edgeguard import data as datasets
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ConfigError, ModelError
from edgeguard.inspection.inversion import Stamp
from edgeguard.repair import auto, gate, owner
from edgeguard.repair.deployable import Running
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Dormant, Knowledge
from edgeguard.repair.target import KerasTarget, Target, TfliteTarget

FPR = 0.01
COMPARED, MIN_ALIKE = 200, 0.98
"""Clean inputs on which a guarded file's tapped activations are compared with those of the model that it is said to be
made of, and how closely they must be correlated: on digits 0.9999, with another network of the same task 0.95."""
FEATURE_INPUTS = 500
TRAINABLE = (".keras", ".h5")
_TRIGGERS, _TRIED, _OF = "triggers.npz", "tried.json", "of.json"
_CANDIDATE, _REPORT = "candidate.tflite", "report.json"

Outcome = Literal["passed", "needs approval", "failed", "nothing found", "could not check"]


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """Evidence: what a fleet reported of one model. JSON; vectors are in the order of ``edgeguard_features``.

    ``rankings`` and ``ballots``: by layer, one list of channels a device, the least active first. ``quarantined``: an
    npz file with an array ``x``, or a ``.npy`` array, of inputs that owners shared; a path from the evidence file on.
    """

    model_digest: str
    label: int
    flagged_mean: tuple[float, ...]
    unflagged_mean: tuple[float, ...] = ()
    dormant: tuple[Dormant, ...] = ()
    rankings: dict[str, tuple[tuple[int, ...], ...]] = msgspec.field(default_factory=dict)
    ballots: dict[str, tuple[tuple[int, ...], ...]] = msgspec.field(default_factory=dict)
    quarantined: str | None = None


@dataclass(frozen=True, kw_only=True)
class Order:
    """What is asked for.

    ``guarded``: the file that devices run and that was made of a trainable ``model``; without, one is made anew.
    ``approve``: the owner takes the repair that an earlier run of the same work left waiting.
    """

    model: Path
    data: str
    output: Path
    evidence: Path | None = None
    guarded: Path | None = None
    method: str = auto.AUTO
    approve: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of it. ``output`` is None where nothing was written; accuracies and ASR are None where not measured.

    ``candidate``: the file that waits for approval, None where none does.
    ``asr``: the most that any recovered trigger or the quarantined inputs achieve on held-out inputs.
    """

    outcome: Outcome
    reason: str
    method: str | None = None
    output: str | None = None
    candidate: str | None = None
    model_digest: str | None = None
    clean_accuracy: Mapping[str, float] | None = None
    asr: Mapping[str, float] | None = None
    gate: Mapping[str, Any] | None = None
    tried: Sequence[Mapping[str, Any]] = ()


@dataclass(frozen=True, kw_only=True)
class _Made:
    """A guarded file; see :class:`auto.Converted`."""

    guarded: bytes
    metadata: GuardMetadata
    sidecar: bytes | None


@dataclass(kw_only=True)
class _Subject:
    """The model under repair: as a target, guarded, and the owner's data in two parts."""

    target: Target
    guarded: bytes
    place: Path | None
    """Of the file that devices run, None where it was made here."""
    metadata: GuardMetadata
    x_repair: npt.NDArray[np.uint8]
    y_repair: npt.NDArray[np.int64]
    x_gate: npt.NDArray[np.uint8]
    y_gate: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64] | None
    features: npt.NDArray[np.float64] = field(init=False)
    running: Running = field(init=False)

    def __post_init__(self) -> None:
        model = GuardedModel.load(self.guarded)
        self.running = Running(model, None) if self.place is None else Running.at(self.place, model)
        found = [model.measure(x).features for x in self.x_repair[:FEATURE_INPUTS]]
        self.features = np.asarray(found, dtype=np.float64)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Clean standard deviations of all features, floored."""
        spread = self.features.std(axis=0)
        return np.asarray(np.maximum(spread, max(0.05 * float(spread.mean()), 1e-6)))

    def convert(self, target: Any) -> _Made:
        """A repaired target as a guarded file of the same kind, with the same taps, but those that were cut out.

        Raises ModelError where devices would refuse it.
        """
        made = _guarded(target, self) if isinstance(target, TfliteTarget) else self._quantised(target)
        self.running.check(made.guarded)
        return made

    def _quantised(self, target: Any) -> _Made:
        from converters import pipeline, sources

        done = pipeline.convert(
            sources.of_keras(target.model, "repaired"),
            self.x_gate,
            self.y_gate,
            classes=self.metadata.classes,
            fpr=self.metadata.fpr,
            taps=target.tapped(self.metadata.taps),
            groups=self.groups,
            sidecar=True,
        )
        return _Made(guarded=done.guarded, metadata=done.metadata, sidecar=done.result.sidecar)


def run(order: Order, say: auto.Say) -> Report:
    """Repair one file.

    Raises:
        ConfigError: a file is not there, is in the way, or the method does not fit the model.
        ModelError: the model, its data or the evidence cannot be used.
    """
    _unused(order.output)
    if not order.output.parent.is_dir():
        raise ConfigError(f"output folder {order.output.parent}", got="no such folder", do="create it first")
    try:
        plans = auto.plans_of(order.method)
    except KeyError as error:
        known = ", ".join((auto.AUTO, *METHODS))
        raise ConfigError(f"method {order.method!r}", got=f"unknown {error}", expected=known) from error
    content = _read(order.model)
    trainable = order.model.suffix in TRAINABLE
    if not trainable and order.method != auto.AUTO and any(METHODS[name].trains for name in plans[0]):
        raise ConfigError(
            f"method {order.method}",
            got=f"{order.model.name}, which cannot be trained",
            expected="a .keras model",
            do="bring the trainable model, or choose a method that prunes",
        )
    if not trainable and order.guarded is not None:
        raise ConfigError(
            f"--guarded {order.guarded}", got=f"{order.model.name}, which is no trainable model", do="leave it out"
        )
    subject = _open(order, content, say)
    case = None if order.evidence is None else _evidence(order.evidence, subject.metadata)
    quarantined = None if case is None else _quarantined(case, order, subject)
    work = order.output.with_name(f".{order.output.name}.work")
    of = _digest_of(order, content, subject, quarantined)
    report = _waiting(work, of)
    if report is None:
        if order.approve:
            raise ConfigError(
                "--approve",
                got="no repair of this model, data and evidence that waits for it",
                do="run the same command without it first, and look at its report",
            )
        _take_up(work, of)
        report = _repaired(order, subject, case, quarantined, plans, work, say)
    if report.outcome == "needs approval":
        if not order.approve:
            return report
        report = replace(report, outcome="passed", reason=f"approved by the owner; {report.reason}", candidate=None)
    if report.outcome == "passed":
        _write(work, order.output)
        report = replace(report, output=str(order.output))
    shutil.rmtree(work, ignore_errors=True)
    return report


def _repaired(
    order: Order,
    subject: _Subject,
    case: Case | None,
    quarantined: npt.NDArray[np.uint8] | None,
    plans: Sequence[tuple[str, ...]],
    work: Path,
    say: auto.Say,
) -> Report:
    from edgeguard.repair import hunting

    found = hunting.hunt_for(
        subject.target,
        subject.metadata,
        subject.x_repair,
        subject.x_gate,
        None if case is None else (case.label, np.asarray(case.flagged_mean)),
        subject.std,
        quarantined,
        stored=work / _TRIGGERS,
        seed=order.seed,
        progress=lambda text, done, total: say("confirming", text, done, total),
    )
    if found.label is None:
        return Report(outcome=found.outcome, reason=found.reason)
    judges = auto.Judges(
        label=found.label,
        images=subject.x_gate,
        labels=subject.y_gate,
        classes=len(subject.metadata.classes),
        kept=found.kept,
        quarantined=quarantined,
        before=subject.guarded,
        reaudit=found.reaudit,
        convert=subject.convert,
    )
    bench = Bench(
        images=subject.x_repair,
        answers=subject.target.classes(subject.x_repair),
        features=subject.features,
        labels=subject.y_repair,
        seed=order.seed,
        progress=lambda text, done, total: say("repairing", text, done, total),
    )
    best, tried = auto.repair(
        subject.target,
        _knowledge(subject, case, found.shown, found.seek),
        bench,
        judges,
        say,
        plans=plans,
        done=_done(work),
        keep=lambda attempts: files.write(_refused(attempts), work / _TRIED),
    )
    reasons = [attempt.as_dict() for attempt in tried]
    if best is None or best.decision is None or best.converted is None or best.measured is None:
        told = next((a.decision.as_dict() for a in reversed(tried) if a.decision is not None), None)
        return Report(outcome="failed", reason="no method passed the gate", gate=told, tried=reasons)
    measured = best.measured
    shares = [(each.before / each.inputs, each.after / each.inputs) for each in measured.successes if each.inputs]
    report = Report(
        outcome=best.outcome,
        reason=best.reason,
        method=best.name,
        candidate=str(work / _CANDIDATE) if best.outcome == "needs approval" else None,
        model_digest=best.converted.metadata.model_digest,
        clean_accuracy={
            "before": float(np.mean(measured.before == measured.labels)),
            "after": float(np.mean(measured.after == measured.labels)),
        },
        asr={"before": max(b for b, _ in shares), "after": max(a for _, a in shares)} if shares else None,
        gate=best.decision.as_dict(),
        tried=reasons,
    )
    _keep(work, cast("_Made", best.converted), report)
    return report


def _knowledge(
    subject: _Subject, case: Case | None, shown: Sequence[Stamp], seek: Callable[[Any], Sequence[Stamp]] | None
) -> Knowledge:
    """What the methods are told: the fleet's shift, or that of a recovered trigger."""
    clean = subject.features.mean(axis=0)
    shift = None
    if case is not None:
        usual = np.asarray(case.unflagged_mean) if case.unflagged_mean else clean
        shift = (np.asarray(case.flagged_mean) - usual) / subject.std
    elif shown:
        model = GuardedModel.load(subject.guarded)
        stamped = shown[0].stamp(subject.x_repair[:FEATURE_INPUTS]).clip(0, 255).astype(np.uint8)
        shift = (np.mean([model.measure(x).features for x in stamped], axis=0) - clean) / subject.std
    return Knowledge(
        taps=subject.metadata.taps,
        shift=shift,
        rankings={} if case is None else case.rankings,
        ballots={} if case is None else case.ballots,
        dormant=() if case is None else case.dormant,
        triggers=tuple(shown),
        seek=seek,
    )


def _open(order: Order, content: bytes, say: auto.Say) -> _Subject:
    """The model as a target and as a guarded file, and the clean data, checked against it."""
    say("confirming", "reading the model", 0, 1)
    owned = owner.parts_of(order.data, fpr=_fpr_of(order, content), seed=order.seed)
    parts = vars(owned)
    subject = _trainable(order, parts) if order.model.suffix in TRAINABLE else _flat(order.model, content, parts)
    classes = len(subject.metadata.classes)
    if not classes:
        raise ModelError(f"model {order.model}", got="no classes", expected="a classifier")
    owned.check(order.data, subject.metadata.input.shape, subject.target.classes, classes=classes)
    return subject


def _fpr_of(order: Order, content: bytes) -> float:
    """The false-positive rate of the file that devices run, which a repaired one shall have as well."""
    if order.model.suffix in TRAINABLE and order.guarded is None:
        return FPR
    guarded = content if order.guarded is None else _read(order.guarded)
    untrusted.probe(guarded)
    try:
        return metadata_reader.read(guarded).fpr
    except ModelError:  # no guard is in it yet
        if order.guarded is not None:
            raise
        return FPR


def _trainable(order: Order, parts: dict[str, Any]) -> _Subject:
    import keras

    from converters import pipeline

    if order.guarded is None:
        done = pipeline.convert(
            order.model, parts["x_gate"], parts["y_gate"], groups=parts["groups"], fpr=FPR, seed=order.seed
        )
        guarded, metadata = done.guarded, done.metadata
    else:
        guarded = _read(order.guarded)
        metadata = metadata_reader.read(guarded)
    try:
        model = keras.models.load_model(order.model, compile=False)
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise ModelError(f"model {order.model}", got=reason, expected="a model that can be trained") from error
    target = KerasTarget(model)
    if order.guarded is not None and (why := _another(target, guarded, metadata, parts["x_gate"][:COMPARED])):
        raise ModelError(
            f"guarded file {order.guarded}", got=why, expected=f"the file that was made of {order.model.name}"
        )
    return _Subject(target=target, guarded=guarded, place=order.guarded, metadata=metadata, **parts)


def _another(target: KerasTarget, guarded: bytes, metadata: GuardMetadata, images: npt.NDArray[np.uint8]) -> str:
    """Why a guarded file was not made of a model; empty where it may have been."""
    shape, classes = tuple(target.model.inputs[0].shape[1:]), int(target.model.outputs[0].shape[-1])
    if (shape, classes) != (tuple(metadata.input.shape), len(metadata.classes)):
        return f"inputs of {list(metadata.input.shape)} and {len(metadata.classes)} classes"
    taps = [tap for tap in metadata.taps if tap.kind != "logit"]
    known = set(target.tapped(metadata.taps))
    for tap in taps:
        if tap.source_layer not in known:
            return f"a tap of {tap.source_layer}"
        if target.model.get_layer(tap.source_layer).output.shape[-1] != tap.channels:
            return f"{tap.channels} channels of {tap.source_layer}"
    if not taps or tuple(images.shape[1:]) != shape:
        return ""  # nothing to compare; or the data are refused, not the file
    from edgeguard.inspection.networks import norms_of, run

    # Two networks for one task answer alike; what moves inside them does not.
    model = GuardedModel.load(guarded)
    columns = np.concatenate([np.asarray(tap.columns) for tap in taps])
    reported = np.asarray([model.measure(x).features for x in images], dtype=np.float64)[:, columns]
    own = run(norms_of(target.model, metadata.taps), images, 1)
    alike = float(np.corrcoef(reported.ravel(), own.ravel())[0, 1])
    return "" if alike >= MIN_ALIKE else f"activations that are correlated by {alike:.2f} with those of the model"


def _flat(path: Path, content: bytes, parts: dict[str, Any]) -> _Subject:
    untrusted.probe(content)
    target = TfliteTarget(content)
    try:
        described = metadata_reader.read(content)
    except ModelError:
        bare, plan = calibration.plan(target.content)
        made = calibration.guard_model(bare, plan, parts["x_gate"], groups=parts["groups"])
        return _Subject(target=target, guarded=made.content, place=None, metadata=made.metadata, **parts)
    return _Subject(target=target, guarded=content, place=path, metadata=described, **parts)


def _guarded(target: TfliteTarget, subject: _Subject) -> _Made:
    like = subject.metadata
    bare, plan = calibration.plan(target.content, names=target.tapped(like.taps))
    made = calibration.guard_model(
        bare, plan, subject.x_gate, fpr=like.fpr, classes=like.classes, groups=subject.groups, sidecar=True
    )
    from converters.verify import verify

    verify(bare, made.content, made.compiled, subject.x_gate)
    return _Made(guarded=made.content, metadata=made.metadata, sidecar=made.sidecar)


def _evidence(path: Path, metadata: GuardMetadata) -> Case:
    try:
        case = msgspec.json.decode(_read(path), type=Case)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(f"evidence {path}", got=str(error)[:200], expected="a case's evidence as JSON") from error
    if case.model_digest != metadata.model_digest:
        raise ModelError(
            f"evidence {path}",
            got=f"that of model {case.model_digest[:16]}",
            expected=f"{metadata.model_digest[:16]}, this model's digest",
            do="repair the file that devices run, or name it with --guarded beside its trainable model",
        )
    if not 0 <= case.label < len(metadata.classes):
        raise ModelError(f"evidence {path}", got=f"label {case.label}", expected=f"0 to {len(metadata.classes) - 1}")
    for name, vector in (("flagged_mean", case.flagged_mean), ("unflagged_mean", case.unflagged_mean)):
        if (vector or name == "flagged_mean") and (
            len(vector) != metadata.feature_count or not all(map(math.isfinite, vector))
        ):
            raise ModelError(
                f"evidence {path}: {name}",
                got=f"{len(vector)} values",
                expected=f"{metadata.feature_count} finite ones",
            )
    return case


def _quarantined(case: Case, order: Order, subject: _Subject) -> npt.NDArray[np.uint8] | None:
    """Shared inputs that the untouched file calls the target: others are no proof of anything."""
    if case.quarantined is None:
        return None
    assert order.evidence is not None
    path = order.evidence.parent / case.quarantined
    inputs, _, _ = datasets.calibration(str(path))
    shape = subject.metadata.input.shape
    if inputs.dtype != np.uint8 or inputs.shape[1:] != shape or not len(inputs):
        raise ModelError(
            f"quarantined inputs {path}",
            got=f"{inputs.dtype}{list(inputs.shape)}",
            expected=f"uint8 images {list(shape)}",
        )
    images = inputs.astype(np.uint8)
    triggered = np.asarray([subject.running.model.measure(x).predicted == case.label for x in images])
    if not triggered.any():
        raise ModelError(
            f"quarantined inputs {path}",
            got="none that the model calls the label",
            expected=f"inputs that it calls {case.label}",
        )
    return images[triggered]


def _digest_of(order: Order, content: bytes, subject: _Subject, quarantined: npt.NDArray[np.uint8] | None) -> str:
    """Of all that a result depends on."""
    named = (b"" if path is None else _read(path) for path in (order.evidence, order.guarded))
    said = json.dumps([__version__, order.method, order.seed]).encode()
    digest = hashlib.sha256()
    for part in (content, *named, said):
        digest.update(hashlib.sha256(part).digest())
    own = (subject.x_repair, subject.y_repair, subject.x_gate, subject.y_gate, subject.groups, quarantined)
    for array in own:
        form = "none" if array is None else f"{array.dtype.str} {array.shape}"
        values = b"" if array is None else array.tobytes()
        digest.update(hashlib.sha256(form.encode() + b"\n" + values).digest())
    return digest.hexdigest()


def _take_up(work: Path, of: str) -> None:
    """Make the work's folder; what an earlier run left there stays where it was the same work."""
    mark = work / _OF
    if _is_of(work, of):
        return
    if work.exists() and not mark.is_file():
        raise ConfigError(f"folder {work}", got="something else", expected="the work of an interrupted repair")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    files.write(json.dumps(of).encode(), mark)


def _is_of(work: Path, of: str) -> bool:
    mark = work / _OF
    return mark.is_file() and mark.read_bytes() == json.dumps(of).encode()


def _keep(work: Path, made: _Made, report: Report) -> None:
    """Put what came of the work into its folder, the report last."""
    candidate = work / _CANDIDATE
    files.write(made.guarded, candidate)
    if made.sidecar is not None:
        files.write(made.sidecar, sidecar.path_beside(candidate))
    kept = {"sha256": hashlib.sha256(made.guarded).hexdigest(), "report": asdict(report)}
    files.write(json.dumps(kept).encode(), work / _REPORT)


def _waiting(work: Path, of: str) -> Report | None:
    """The report of a repair that an earlier run of the same work left there; None where there is none."""
    if not _is_of(work, of):
        return None
    try:
        kept = json.loads((work / _REPORT).read_bytes())
        same = hashlib.sha256((work / _CANDIDATE).read_bytes()).hexdigest() == kept["sha256"]
        return Report(**kept["report"]) if same else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _write(work: Path, output: Path) -> None:
    """The file that lies in the work's folder, and its sidecar, to where they were asked for."""
    _unused(output)
    candidate = work / _CANDIDATE
    companion = sidecar.path_beside(candidate)
    contents = {output: _read(candidate)}
    if companion.is_file():
        contents[sidecar.path_beside(output)] = _read(companion)
    files.write_all(contents)


def _unused(output: Path) -> None:
    """Raise ConfigError where a file, or its sidecar, is in the way."""
    for path in (output, sidecar.path_beside(output)):
        if path.exists():
            raise ConfigError(f"output {path}", got="a file that is there", do="name another one with -o")


def _refused(attempts: Sequence[auto.Attempt]) -> bytes:
    """What an interrupted run need not try again: what came to the gate, and failed there."""
    rows = [a.as_dict() for a in attempts if a.outcome == "failed" and a.decision is not None]
    return json.dumps(rows).encode()


def _done(work: Path) -> list[auto.Attempt]:
    """Attempts of an interrupted run that the gate refused."""
    try:
        return [
            auto.Attempt(
                plan=tuple(row["method"].split(" + ")),
                notes=tuple(row["notes"]),
                reason=str(row["reason"]),
                decision=gate.Decision.from_dict(row["gate"]),
            )
            for row in json.loads((work / _TRIED).read_bytes())
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"file {path}", got=error.strerror or str(error), do="check the path") from error


__all__ = ["Case", "Order", "Report", "run"]
