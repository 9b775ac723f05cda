"""One case from suspicion to a repaired file: confirm, repair, convert, gate. Runs as a child of the hub.

    python -m edgeguard.repair.case JOB.json

prints one JSON object per line: progress ``{"stage", "text", "done", "total"}``, at the end ``{"result": ...}``, which
is also written to ``result.json`` in the job's folder. A job can be run again; it starts afresh and writes the same.

Rules enforced here:

* nothing is repaired that was not confirmed, and nothing is offered for release that the gate has not passed;
* a trigger is sought in every form, with the suspected channels guiding the search and without, until one confirms:
  what covers a picture is no patch, and its smallest patch may be like any label's;
* what is found is held against all that devices reported, so that nobody chooses what it is held against;
* the data that repairs, and the data that gates and calibrates, are disjoint, group by group:
  :mod:`edgeguard.repair.owner`.
"""

from __future__ import annotations

import json
import os
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EXIT_USAGE, ConfigError, EdgeGuardError, ModelError
from edgeguard.inspection import confirm, networks, pictures
from edgeguard.inspection.confirm import Finding
from edgeguard.inspection.inversion import Evidence, Form, Trigger, classes_of, held_out_success, invert
from edgeguard.repair import auto, owner
from edgeguard.repair.auto import Say
from edgeguard.repair.deployable import Running
from edgeguard.repair.methods.base import Bench, Dormant, Knowledge
from edgeguard.repair.recover import Reported
from edgeguard.repair.search import Searches
from edgeguard.repair.target import KerasTarget

FORMS: tuple[Form, ...] = ("patch", "blend")
"""In the order in which they are sought."""
MAX_CONTROLS = 9
CONFIRMED = "confirmed.npz"
GAMMA = 0.1
"""The usual weight of the evidence in the search for a trigger."""
GATE_INPUTS = 1500
FEATURE_INPUTS = 500


class Job(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the hub asks for. The three vectors are the fleet's evidence, in the order of ``edgeguard_features``.

    ``data`` names clean, labelled inputs of the model's owner; ``unflagged_mean`` may be empty. ``channels`` are the
    suspected ones among the features, none: all. ``dormant``: see :func:`methods.linf.with_dormant`. ``stop_after``
    ends the run once the suspicion is confirmed or not; ``resume`` is the folder of such a run, which is then not done
    again. ``quarantined``: an npz file of triggered inputs that owners shared.
    """

    guarded: str
    keras: str
    data: str
    label: int
    flagged_mean: tuple[float, ...]
    unflagged_mean: tuple[float, ...] = ()
    unflagged_std: tuple[float, ...] = ()
    channels: tuple[int, ...] = ()
    dormant: tuple[Dormant, ...] = ()
    stop_after: Literal["inspect"] | None = None
    resume: str | None = None
    quarantined: str | None = None
    out_dir: str
    seed: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of it. ``output`` is the repaired, guarded file; only with ``gate_passed`` is it fit for release.

    ``repaired`` False: the run ended after the inspection, as the job says. ``needs_approval``: no rule of the gate
    failed, but one could not be checked: the model's owner decides, nobody else.
    """

    verdict: Literal["confirmed", "not_confirmed", "could_not_check"]
    repaired: bool = True
    gate_passed: bool
    needs_approval: bool = False
    output: str | None = None
    model_digest: str | None = None
    guard_digest: str | None = None
    keras: str | None = None
    summary: dict[str, Any] = msgspec.field(default_factory=dict)


class _Case:
    """The parts that every step needs, loaded and checked once."""

    def __init__(self, job: Job) -> None:
        import keras

        self.job = job
        self.content = _read(Path(job.guarded))
        self.guarded = GuardedModel.load(self.content)
        self.running = Running.at(Path(job.guarded), self.guarded)
        self.metadata: GuardMetadata = self.guarded.metadata
        # Any trigger that works moves the logits alike: they say nothing about which channels carry it.
        norms = [tap.columns for tap in self.metadata.taps if tap.kind != "logit"]
        self.norm_columns = np.concatenate([np.asarray(columns) for columns in norms])
        self.flagged_mean = self._vector("flagged_mean", job.flagged_mean)
        if not 0 <= job.label < len(self.metadata.classes):
            raise ModelError("job", got=f"label {job.label}", expected=f"0 to {len(self.metadata.classes) - 1}")
        if not Path(job.keras).exists():
            raise ConfigError(f"trainable model {job.keras}", got="no such file", do="check the hub's [[models]] entry")
        self.original = keras.models.load_model(job.keras, compile=False)
        self.norms = networks.norms_of(self.original, self.metadata.taps)
        self.quarantined = None if job.quarantined is None else _shared(Path(job.quarantined), self.metadata)
        self.target = KerasTarget(self.original)
        parts = owner.parts_of(job.data, fpr=self.metadata.fpr, seed=job.seed)
        parts.check(job.data, self.metadata.input.shape, self.target.classes, classes=len(self.metadata.classes))
        self.x_repair, self.x_gate, self.y_gate, self.groups = parts.x_repair, parts.x_gate, parts.y_gate, parts.groups
        own = [self.guarded.infer(x) for x in self.x_repair[:FEATURE_INPUTS]]
        self.features = np.asarray([i.features for i in own], dtype=np.float64)
        features = self.features[:, self.norm_columns]
        self.clean_mean = features.mean(axis=0)
        spread = features.std(axis=0)
        self.std = np.maximum(spread, max(0.05 * float(spread.mean()), 1e-6))
        guiding = (
            np.isin(self.norm_columns, job.channels) if job.channels else np.ones(len(self.norm_columns), dtype=bool)
        )
        if not guiding.any():
            raise ModelError("job", got=f"channels {job.channels[:5]}", expected="channels of the tapped activations")
        self.evidence = Evidence(
            flagged_mean=self.flagged_mean.astype(np.float32),
            # At an infinite spread no distance counts.
            std=np.where(guiding, self.std, np.inf).astype(np.float32),
        )
        self.focus = guiding.size / int(guiding.sum())
        """What the evidence's weight is multiplied by: it is a mean over all channels, and only so many count."""
        if job.unflagged_mean:
            self.usual = self._vector("unflagged_mean", job.unflagged_mean)
        else:
            same = [i.features[self.norm_columns] for i in own if i.verdict.predicted == job.label]
            self.usual = np.mean(same, axis=0) if same else self.clean_mean

    def _vector(self, name: str, values: tuple[float, ...]) -> npt.NDArray[np.float64]:
        vector = np.asarray(values, dtype=np.float64)
        if vector.shape != (self.metadata.feature_count,) or not np.isfinite(vector).all():
            raise ModelError(
                f"evidence {name}",
                got=f"{vector.shape} values",
                expected=f"{self.metadata.feature_count} finite ones",
            )
        return vector[self.norm_columns]


def run(job: Job, say: Say) -> Result:
    """Work through one case.

    Raises:
        ConfigError, ModelError: the job names something that cannot be used.
    """
    case = _Case(job)
    out = Path(job.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    finding, triggers = _resumed(case) or _confirm(case, say)
    summary: dict[str, Any] = {"finding": asdict(finding)}
    if finding.outcome != "confirmed":
        return Result(verdict=finding.outcome, gate_passed=False, summary=summary)
    _draw(triggers[0], case.x_gate[0], out)
    if job.stop_after == "inspect":
        _keep_finding(finding, triggers, out)
        return Result(verdict=finding.outcome, repaired=False, gate_passed=False, summary=summary)
    return _repair(case, finding, triggers, out, summary, say)


def _confirm(case: _Case, say: Say) -> tuple[Finding, list[Trigger]]:
    """What was found, and the triggers of the form that says so, the telling one first."""
    label = case.job.label
    others = [c for c in range(len(case.metadata.classes)) if c != label]
    rng = np.random.default_rng(case.job.seed)
    controls = sorted(int(c) for c in rng.permutation(others)[:MAX_CONTROLS])
    clean = classes_of(case.norms, case.x_repair)
    held_out = case.x_gate[:GATE_INPUTS]
    usual = classes_of(case.original, held_out)
    findings: list[Finding] = []
    triggers: list[Trigger] = []
    for form in FORMS:
        guided = invert(
            case.norms,
            case.x_repair,
            [label],
            form=form,
            evidence=case.evidence,
            gamma=GAMMA * case.focus,
            clean=clean,
            seed=case.job.seed,
            progress=_stage(say, "confirming", f"seeking the {form} that devices saw"),
        )
        plain, *control = invert(
            case.norms,
            case.x_repair,
            [label, *controls],
            form=form,
            clean=clean,
            seed=case.job.seed,
            progress=_stage(say, "confirming", f"seeking a {form} of {len(controls)} other labels to compare with"),
        )
        sizes = [t.size for t in control if t.success >= confirm.MIN_SUCCESS]
        triggers += [*guided, plain]
        successes = [held_out_success(case.original, trigger, held_out, usual) for trigger in (*guided, plain)]
        findings += [_judged(case, t, s, sizes) for t, s in zip((*guided, plain), successes, strict=True)]
        telling = confirm.telling(findings)
        say("confirming", f"{findings[telling].outcome}: {findings[telling].reason}", 1, 1)
        if findings[telling].outcome == "confirmed":
            break
    best = triggers.pop(telling)
    return findings[telling], [best, *(t for t in triggers if t.form == best.form)]


def _judged(case: _Case, trigger: Trigger, success: float, controls: Sequence[float]) -> Finding:
    clean = case.x_gate[:300]
    usual, reproduced = (networks.run(case.norms, x, 1).mean(axis=0) for x in (clean, trigger.stamp(clean)))
    return confirm.decide(
        label=trigger.label,
        form=trigger.form,
        success=success,
        size=trigger.size,
        controls=controls,
        agreement=confirm.agreement_of(case.flagged_mean - case.clean_mean, reproduced - usual, case.std),
    )


def _repair(
    case: _Case, finding: Finding, triggers: list[Trigger], out: Path, summary: dict[str, Any], say: Say
) -> Result:
    from converters import files, pipeline

    known, judges = _knowledge(case, finding, triggers, say)
    bench = Bench(
        images=case.x_repair,
        answers=case.target.classes(case.x_repair),
        features=case.features,
        seed=case.job.seed,
        progress=_stage(say, "repairing", "repairing"),
    )
    best, tried = auto.repair(case.target, known, bench, judges, say)
    reasons = [attempt.as_dict() for attempt in tried]
    if best is None or best.converted is None or best.decision is None:
        nearest = [attempt for attempt in tried if attempt.decision is not None]
        told = {"gate": nearest[-1].decision.as_dict()} if nearest and nearest[-1].decision is not None else {}
        return Result(verdict="confirmed", gate_passed=False, summary={**summary, **told, "tried": reasons})
    for check in best.decision.checks:
        say("converting", f"gate: {check.name} {check.measured:+.3f}, at most {check.limit:.3f}: {check.state}", 1, 1)
    output, keras_path = out / "repaired.tflite", out / "repaired.keras"
    files.write(best.converted.guarded, output)
    if (companion := cast("pipeline.Conversion", best.converted).result.sidecar) is not None:
        files.write(companion, sidecar.path_beside(output))
    best.target.model.save(keras_path)
    return Result(
        verdict="confirmed",
        gate_passed=True,
        needs_approval=best.outcome == "needs approval",
        output=str(output),
        model_digest=best.converted.metadata.model_digest,
        guard_digest=best.converted.metadata.guard_digest,
        keras=str(keras_path),
        summary={
            **summary,
            "method": best.name,
            "notes": list(best.notes),
            "gate": best.decision.as_dict(),
            "tried": reasons,
            "conversion": pipeline.summary(cast("pipeline.Conversion", best.converted), output),
        },
    )


def _knowledge(case: _Case, finding: Finding, triggers: list[Trigger], say: Say) -> tuple[Knowledge, auto.Judges]:
    """What the methods are told, and what their results are held against."""
    from converters import pipeline, sources

    label, seed = finding.label, case.job.seed
    reported = Reported(flagged_mean=case.evidence.flagged_mean, std=case.evidence.std, quarantined=case.quarantined)
    searches = Searches(
        model=case.original, norms=case.norms, images=case.x_repair, held_out=case.x_gate, label=label,
        reported=reported, gamma=case.focus, seed=seed,
        progress=_stage(say, "repairing", "seeking triggers of every form"),
    )  # fmt: skip
    shown, kept = searches.original()
    shift = np.zeros(case.metadata.feature_count)
    shift[case.norm_columns] = (case.flagged_mean - case.usual) / case.std
    known = Knowledge(
        taps=case.metadata.taps,
        shift=shift,
        dormant=case.job.dormant,
        triggers=tuple(shown) or tuple(triggers[:1]),
        seek=searches.residual,
    )

    def convert(target: Any) -> pipeline.Conversion:
        done = pipeline.convert(
            sources.of_keras(target.model, "repaired"),
            case.x_gate,
            case.y_gate,
            classes=case.metadata.classes,
            fpr=case.metadata.fpr,
            taps=target.tapped(case.metadata.taps),
            sidecar=True,
            groups=case.groups,
        )
        case.running.check(done.guarded)
        return done

    judges = auto.Judges(
        label=label,
        images=case.x_gate,
        labels=case.y_gate,
        classes=len(case.metadata.classes),
        kept=tuple(kept) or tuple(triggers[1:]),
        quarantined=case.quarantined,
        before=case.content,
        reaudit=searches.reaudit,
        convert=convert,
    )
    return known, judges


def _shared(path: Path, metadata: GuardMetadata) -> npt.NDArray[np.uint8]:
    """Inputs that owners shared, as the hub wrote them: ``inputs`` [M, H, W, C]."""
    try:
        with np.load(path) as file:
            inputs = file["inputs"]
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"shared inputs {path}", got=error, do="share them again") from error
    if inputs.dtype != np.uint8 or inputs.shape[1:] != metadata.input.shape:
        raise ModelError(
            f"shared inputs {path}",
            got=f"{inputs.dtype}{list(inputs.shape[1:])}",
            expected=f"uint8{list(metadata.input.shape)}",
        )
    return np.asarray(inputs, dtype=np.uint8)


def _keep_finding(finding: Finding, triggers: list[Trigger], out: Path) -> None:
    """What a later run needs to go on from here."""
    np.savez(
        out / CONFIRMED,
        finding=json.dumps(asdict(finding)),
        masks=np.stack([trigger.mask for trigger in triggers]),
        patterns=np.stack([trigger.pattern for trigger in triggers]),
        success=np.asarray([trigger.success for trigger in triggers]),
        forms=np.asarray([trigger.form for trigger in triggers]),
    )


def _resumed(case: _Case) -> tuple[Finding, list[Trigger]] | None:
    """What an earlier run confirmed; None where there is none for this label that can be used."""
    if case.job.resume is None:
        return None
    try:
        with np.load(Path(case.job.resume) / CONFIRMED) as kept:
            finding = Finding(**json.loads(str(kept["finding"])))
            shape = case.metadata.input.shape
            triggers = [
                Trigger(
                    label=finding.label,
                    mask=mask.reshape(*shape[:2], 1),
                    pattern=pattern.reshape(shape),
                    success=float(success),
                    form=cast("Form", str(form)),
                )
                for mask, pattern, success, form in zip(
                    kept["masks"], kept["patterns"], kept["success"], kept["forms"], strict=True
                )
            ]
    except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        return None
    return (finding, triggers) if finding.label == case.job.label and triggers else None


def _draw(trigger: Trigger, example: npt.NDArray[np.uint8], out: Path) -> None:
    """The recovered trigger as PNG files: mask, what it paints, and an example that carries it."""
    for name, content in pictures.draw(trigger, example).items():
        (out / f"trigger-{name}.png").write_bytes(content)


def _stage(say: Say, stage: str, text: str) -> Callable[[str, int, int], None]:
    """Progress under one text, so that whoever listens sees one step and not each of its numbers."""
    return lambda _, done, total: say(stage, text, done, total)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model {path}", got=error.strerror or str(error), do="check the path") from error


def main() -> int:
    """The child's entry point. Exit code 0 with a result, 2 with one line on stderr."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    # Libraries write to stdout what they like; the protocol keeps the real one for itself.
    channel = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def send(message: object) -> None:
        channel.write(msgspec.json.encode(message).decode() + "\n")

    try:
        if len(sys.argv) != 2:
            raise ConfigError("arguments", got=sys.argv[1:], expected="JOB.json")
        try:
            job = msgspec.json.decode(_read(Path(sys.argv[1])), type=Job)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            got = str(error)[:200]
            raise ConfigError(f"job {sys.argv[1]}", got=got, expected="a job as the hub writes it") from error
        result = run(
            job,
            lambda stage, text, done, total: send({"stage": stage, "text": text, "done": done, "total": total}),
        )
        from converters.files import write

        write(msgspec.json.encode(result), Path(job.out_dir) / "result.json")
        send({"result": result})
    except EdgeGuardError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    return 0


if __name__ == "__main__":
    sys.exit(main())
