"""Repairs a model file for its owner: what ``edgeguard repair`` does, without the terminal.

Rules enforced here:

* the original is read, never written; a file that is there is never overwritten;
* evidence is taken for the model that it was reported of, and no other: the digests must be the same;
* without evidence the model is audited first; where that finds nothing, nothing is changed;
* clean data must be labelled, with labels of the model's classes: a third repairs, the rest calibrates and gates;
* what was found and tried lies in a folder beside the output until the work is done: an interrupted run goes on there,
  if model, data, evidence and method are still the same.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

from converters import calibration, files, untrusted
from edgeguard import data as datasets
from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.statistics import inputs_needed
from edgeguard.errors import ConfigError, ModelError
from edgeguard.repair import auto
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Dormant, Knowledge, Stamp
from edgeguard.repair.target import KerasTarget, Target, TfliteTarget

REPAIR_SHARE = 1 / 3
FPR = 0.01
FEATURE_INPUTS = 500
TRAINABLE = (".keras", ".h5")
_TRIGGERS, _TRIED, _OF = "triggers.npz", "tried.json", "of.json"

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
    """What is asked for. ``approve``: the owner takes a repair of which a rule of the gate could not be checked."""

    model: Path
    data: str
    output: Path
    evidence: Path | None = None
    method: str = auto.AUTO
    approve: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Report:
    """What came of it. ``output`` is None where nothing was written; accuracies and ASR are None where not measured.

    ``asr``: the most that any recovered trigger or the quarantined inputs achieve on held-out inputs.
    """

    outcome: Outcome
    reason: str
    method: str | None = None
    output: str | None = None
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


@dataclass(kw_only=True)
class _Subject:
    """The model under repair: as a target, guarded, and the owner's data in two parts."""

    target: Target
    guarded: bytes
    metadata: GuardMetadata
    x_repair: npt.NDArray[np.uint8]
    y_repair: npt.NDArray[np.int64]
    x_gate: npt.NDArray[np.uint8]
    y_gate: npt.NDArray[np.int64]
    groups: npt.NDArray[np.int64] | None
    features: npt.NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        model = GuardedModel.load(self.guarded)
        found = [model.measure(x).features for x in self.x_repair[:FEATURE_INPUTS]]
        self.features = np.asarray(found, dtype=np.float64)

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Clean standard deviations of all features, floored."""
        spread = self.features.std(axis=0)
        return np.asarray(np.maximum(spread, max(0.05 * float(spread.mean()), 1e-6)))

    def convert(self, target: Any) -> auto.Converted:
        """A repaired target as a guarded file of the same kind, with the same taps."""
        if isinstance(target, TfliteTarget):
            return _guarded(target.content, self, self.metadata)
        from converters import pipeline, sources

        layers = tuple(dict.fromkeys(tap.source_layer for tap in self.metadata.taps if tap.kind != "logit"))
        return pipeline.convert(
            sources.of_keras(target.model, "repaired"),
            self.x_gate,
            self.y_gate,
            classes=self.metadata.classes,
            fpr=self.metadata.fpr,
            taps=layers,
            groups=self.groups,
        )


def run(order: Order, say: auto.Say) -> Report:
    """Repair one file.

    Raises:
        ConfigError: a file is not there, is in the way, or the method does not fit the model.
        ModelError: the model, its data or the evidence cannot be used.
    """
    if order.output.exists():
        raise ConfigError(f"output {order.output}", got="a file that is there", do="name another one with -o")
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
    subject = _open(order, content, say)
    case = None if order.evidence is None else _evidence(order.evidence, subject.metadata)
    quarantined = None if case is None else _quarantined(case, order, subject.metadata)
    work = order.output.with_name(f".{order.output.name}.work")
    _take_up(work, order, content)
    report = _repaired(order, subject, case, quarantined, plans, work, say)
    if report.outcome != "failed":
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
        keep=lambda attempts: files.write(
            json.dumps([a.as_dict() for a in attempts if a.outcome == "failed"]).encode(), work / _TRIED
        ),
    )
    reasons = [attempt.as_dict() for attempt in tried]
    if best is None or best.decision is None or best.converted is None or best.measured is None:
        told = next((a.decision.as_dict() for a in reversed(tried) if a.decision is not None), None)
        return Report(outcome="failed", reason="no method passed the gate", gate=told, tried=reasons)
    written = best.outcome == "passed" or order.approve
    if written:
        files.write(best.converted.guarded, order.output)
    measured = best.measured
    shares = [(each.before / each.inputs, each.after / each.inputs) for each in measured.successes if each.inputs]
    before, after = (max((pair[side] for pair in shares), default=math.nan) for side in (0, 1))
    return Report(
        outcome="passed" if written else "needs approval",
        reason=best.reason,
        method=best.name,
        output=str(order.output) if written else None,
        model_digest=best.converted.metadata.model_digest,
        clean_accuracy={
            "before": float(np.mean(measured.before == measured.labels)),
            "after": float(np.mean(measured.after == measured.labels)),
        },
        asr={"before": before, "after": after},
        gate=best.decision.as_dict(),
        tried=reasons,
    )


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
    clean = datasets.pool(order.data, "train")
    if clean.x_train.dtype != np.uint8 or clean.x_train.ndim != 4:
        got = f"{clean.x_train.dtype}{list(clean.shape)}"
        raise ModelError(f"clean data {order.data}", got=got, expected="uint8 images [N, H, W, C]")
    count = len(clean.x_train)
    needed = math.ceil((2 * inputs_needed(FPR)) / (1 - REPAIR_SHARE)) + 1
    if count < needed:
        raise ModelError(
            f"clean data {order.data}",
            got=f"{count} inputs",
            expected=f"at least {needed}: a third repairs, the rest calibrates",
            do="bring more clean inputs",
        )
    groups = datasets.groups(order.data, count)
    together = np.arange(count) if groups is None else groups
    names = np.random.default_rng(order.seed).permutation(np.unique(together))
    repairing = np.isin(together, names[: round(len(names) * REPAIR_SHARE)])
    x, y = clean.x_train.astype(np.uint8), clean.y_train
    parts: dict[str, Any] = {
        "x_repair": x[repairing],
        "y_repair": y[repairing],
        "x_gate": x[~repairing],
        "y_gate": y[~repairing],
        "groups": None if groups is None else groups[~repairing],
    }
    say("confirming", "reading the model", 0, 1)
    subject = _trainable(order, parts) if order.model.suffix in TRAINABLE else _flat(content, parts)
    classes = len(subject.metadata.classes)
    if not classes:
        raise ModelError(f"model {order.model}", got="no classes", expected="a classifier")
    if subject.metadata.input.shape != clean.shape:
        raise ModelError(
            f"clean data {order.data}", got=f"{list(clean.shape)}", expected=f"{list(subject.metadata.input.shape)}"
        )
    if int(y.max()) >= classes:
        raise ModelError(
            f"clean data {order.data}", got=f"label {int(y.max())}", expected=f"0 to {classes - 1}, the model's classes"
        )
    return subject


def _trainable(order: Order, parts: dict[str, Any]) -> _Subject:
    import keras

    from converters import pipeline

    done = pipeline.convert(
        order.model, parts["x_gate"], parts["y_gate"], groups=parts["groups"], fpr=FPR, seed=order.seed
    )
    try:
        model = keras.models.load_model(order.model, compile=False)
    except (ValueError, TypeError, OSError) as error:
        reason = str(error).split("\n", 1)[0][:200]
        raise ModelError(f"model {order.model}", got=reason, expected="a model that can be trained") from error
    return _Subject(target=KerasTarget(model), guarded=done.guarded, metadata=done.metadata, **parts)


def _flat(content: bytes, parts: dict[str, Any]) -> _Subject:
    untrusted.probe(content)
    target = TfliteTarget(content)
    try:
        described = metadata_reader.read(content)
    except ModelError:
        bare, plan = calibration.plan(target.content)
        made = calibration.guard_model(bare, plan, parts["x_gate"], groups=parts["groups"])
        return _Subject(target=target, guarded=made.content, metadata=made.metadata, **parts)
    return _Subject(target=target, guarded=content, metadata=described, **parts)


def _guarded(content: bytes, subject: _Subject, like: GuardMetadata) -> _Made:
    names = tuple(dict.fromkeys(tap.tensor for tap in like.taps if tap.kind != "logit"))
    bare, plan = calibration.plan(content, names=names)
    made = calibration.guard_model(
        bare, plan, subject.x_gate, fpr=like.fpr, classes=like.classes, groups=subject.groups
    )
    from converters.verify import verify

    verify(bare, made.content, made.compiled, subject.x_gate)
    return _Made(guarded=made.content, metadata=made.metadata)


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
            do="repair the file that the devices run",
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


def _quarantined(case: Case, order: Order, metadata: GuardMetadata) -> npt.NDArray[np.uint8] | None:
    if case.quarantined is None:
        return None
    assert order.evidence is not None
    path = order.evidence.parent / case.quarantined
    inputs, _, _ = datasets.calibration(str(path))
    if inputs.dtype != np.uint8 or inputs.shape[1:] != metadata.input.shape or not len(inputs):
        raise ModelError(
            f"quarantined inputs {path}",
            got=f"{inputs.dtype}{list(inputs.shape)}",
            expected=f"uint8 images {list(metadata.input.shape)}",
        )
    return inputs.astype(np.uint8)


def _take_up(work: Path, order: Order, content: bytes) -> None:
    """Make the work's folder; what an earlier run left there stays where it was the same work."""
    evidence = b"" if order.evidence is None else _read(order.evidence)
    said = json.dumps([order.data, order.method, order.seed]).encode()
    clean = datasets.pool(order.data, "train")
    digest = hashlib.sha256()
    for part in (content, evidence, said, np.ascontiguousarray(clean.x_train).tobytes()):
        digest.update(hashlib.sha256(part).digest())
    of = json.dumps(digest.hexdigest()).encode()
    mark = work / _OF
    if mark.is_file() and mark.read_bytes() == of:
        return
    if work.exists() and not mark.is_file():
        raise ConfigError(f"folder {work}", got="something else", expected="the work of an interrupted repair")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    files.write(of, mark)


def _done(work: Path) -> list[auto.Attempt]:
    """Attempts of an interrupted run that failed."""
    try:
        rows = json.loads((work / _TRIED).read_bytes())
        return [
            auto.Attempt(plan=tuple(row["method"].split(" + ")), notes=tuple(row["notes"]), reason=str(row["reason"]))
            for row in rows
        ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"file {path}", got=error.strerror or str(error), do="check the path") from error


__all__ = ["Case", "Order", "Report", "run"]
