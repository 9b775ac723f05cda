"""How well backdoors are removed, method by method and by ``auto``, on the int8 files of the zoo.

    python -m benchmarks.repair [--data digits] [--attack badnets] [--network small-cnn-1] [--seed 0] [--part methods]
    python -m benchmarks.repair --report        # docs/repair.md from what was measured

Every part of a row is written to ``benchmarks/results/repair`` as soon as it is measured, a file a model; a part that
this very code measured on this very model is not measured again.

Rules enforced here:

* a fifth of the test set plays the field: devices see it, clean and a part of it triggered, and report the mean
  features of what they flag, false alarms among it. The rest measures; no method sees any of it, nor the trigger;
* the owner's clean inputs are a third for the repair, two thirds for gate and calibration;
* accuracy, ASR as the design defines it and the target's recall are those of int8 files;
* liars send their ranks in reverse, and vote for the most active channels.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks import repair_report, zoo
from converters import calibration, files, lowering, pipeline, sources
from edgeguard.attacks.base import Images, attack_success_rate
from edgeguard.data import Labels
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EdgeGuardError
from edgeguard.inspection.networks import norms_of
from edgeguard.repair import auto
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Knowledge, Method
from edgeguard.repair.methods.federated import MajorityVote, RankAggregation
from edgeguard.repair.recover import Reported
from edgeguard.repair.search import Searches
from edgeguard.repair.target import KerasTarget, TfliteTarget

RESULTS = Path(__file__).parent / "results" / "repair"
PARTS = ("methods", "auto", "quarantined", "shares", "liars")
FIELD, FIELD_CLEAN, FIELD_TRIGGERED = 0.2, 600, 300
MIN_FLAGGED = 10
QUARANTINED = 50
SHARES = (0.01, 0.05, 0.1)
LIARS = (0.0, 0.1, 0.2)
DEVICES = 10
MIN_REPAIR = 30


@functools.cache
def code_digest() -> str:
    """Digest of the code that a row depends on: repair, inspection, the converters, and this."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    folders = (root / "edgeguard" / "repair", root / "edgeguard" / "inspection", root / "converters")
    for path in sorted([Path(__file__), *(path for folder in folders for path in folder.rglob("*.py"))]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """The part of the test set that measures: clean inputs with labels, and the true trigger on the eligible ones."""

    images: Images
    labels: Labels
    eligible: npt.NDArray[np.bool_]
    triggered: Images
    target: int

    def of(self, answers: Callable[[Images], Labels]) -> dict[str, float]:
        """Clean accuracy, ASR (absent for a clean model) and the target's recall."""
        clean = answers(self.images)
        found = {
            "accuracy": float(np.mean(clean == self.labels)),
            "target_recall": float(np.mean(clean[self.labels == self.target] == self.target)),
        }
        if len(self.triggered):
            turned = answers(self.triggered)
            found["asr"] = attack_success_rate(self.labels[self.eligible], clean[self.eligible], turned, self.target)
        return found


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One model of the zoo with its owner, its field, and what measures it."""

    member: zoo.Member
    keras: Any
    norms: Any
    guarded: bytes
    metadata: Any
    norm_columns: npt.NDArray[np.int64]
    x_repair: Images
    y_repair: Labels
    x_gate: Images
    y_gate: Labels
    groups_gate: Labels | None
    features: npt.NDArray[np.float64]
    label: int
    flagged: int
    flagged_mean: npt.NDArray[np.float64]
    usual: npt.NDArray[np.float64]
    quarantined: Images
    measuring: Measuring

    @property
    def std(self) -> npt.NDArray[np.float64]:
        """Clean standard deviations of the norms, floored: a channel that never moves says nothing by a whisper."""
        spread = self.features[:, self.norm_columns].std(axis=0)
        return np.asarray(np.maximum(spread, max(0.05 * float(spread.mean()), 1e-6)))


def stage(member: zoo.Member, part: zoo.Split) -> Scene:
    """Guard the model, let devices see the field, and split the owner's data. Raises ModelError where it cannot."""
    keras = member.keras()
    rng = np.random.default_rng(0)
    bare, plan = calibration.plan(member.int8, layers=[layer.name for layer in keras.layers])
    guarded = calibration.guard_model(bare, plan, part.owner_x, groups=part.owner_groups)
    model = GuardedModel.load(guarded.content)
    columns = np.concatenate([np.asarray(tap.columns) for tap in guarded.metadata.taps if tap.kind != "logit"])
    together = np.arange(len(part.owner_x)) if part.owner_groups is None else part.owner_groups
    names = rng.permutation(np.unique(together))
    repairing = np.isin(together, names[: round(len(names) / 3)])
    images, labels = part.data.x_test.astype(np.uint8), part.data.y_test
    order = rng.permutation(len(images))
    field, rest = np.split(order, [round(FIELD * len(order))])
    attack = member.attack
    seen = images[field[:FIELD_CLEAN]]
    eligible = np.zeros(len(rest), dtype=bool)
    triggered = images[:0]
    if attack is not None:
        shown = field[attack.eligible(labels[field])][:FIELD_TRIGGERED]
        seen = np.concatenate([seen, attack.stamp(images[shown], member.state)])
        eligible = attack.eligible(labels[rest])
        triggered = attack.stamp(images[rest][eligible], member.state)
    found = [model.infer(x) for x in seen]
    calls = np.asarray([i.verdict.predicted for i in found])
    alarms = np.asarray([bool(i.verdict.flagged) for i in found])
    features = np.asarray([i.features for i in found], dtype=np.float64)
    label = int(np.bincount(calls[alarms]).argmax()) if alarms.any() else 0
    behind = alarms & (calls == label)
    x_repair = part.owner_x[repairing]
    own = np.asarray([model.infer(x).features for x in x_repair[:500]], dtype=np.float64)
    quiet = ~alarms & (calls == label)
    return Scene(
        member=member, keras=keras, norms=norms_of(keras, guarded.metadata.taps), guarded=guarded.content,
        metadata=guarded.metadata, norm_columns=columns, x_repair=x_repair, y_repair=part.owner_y[repairing],
        x_gate=part.owner_x[~repairing], y_gate=part.owner_y[~repairing],
        groups_gate=None if part.owner_groups is None else part.owner_groups[~repairing],
        features=own, label=label, flagged=int(behind.sum()),
        flagged_mean=features[behind].mean(axis=0) if behind.any() else np.zeros(features.shape[1]),
        usual=features[quiet].mean(axis=0) if quiet.any() else own.mean(axis=0),
        quarantined=seen[behind][:QUARANTINED],
        measuring=Measuring(
            images=images[rest], labels=labels[rest], eligible=eligible, triggered=triggered,
            target=label if attack is None else attack.target,
        ),
    )  # fmt: skip


def searches_of(scene: Scene, *, quarantined: bool = False, images: Images | None = None) -> Searches:
    """The searches that a repair of this model makes."""
    return Searches(
        model=scene.keras, norms=scene.norms, images=scene.x_repair if images is None else images,
        held_out=scene.x_gate, label=scene.label,
        reported=Reported(
            flagged_mean=scene.flagged_mean[scene.norm_columns].astype(np.float32),
            std=scene.std.astype(np.float32),
            quarantined=scene.quarantined if quarantined else None,
        ),
    )  # fmt: skip


def known_of(scene: Scene, triggers: Sequence[Any], seek: Any, liars: float = 0.0) -> Knowledge:
    """What the fleet and the searches say. Each device ranks by inputs of its own, drawn from the owner's."""
    shift = np.zeros(scene.metadata.feature_count)
    columns = scene.norm_columns
    shift[columns] = (scene.flagged_mean - scene.usual)[columns] / scene.std
    rankings: dict[str, list[tuple[int, ...]]] = {}
    ballots: dict[str, list[tuple[int, ...]]] = {}
    for tap in scene.metadata.taps:
        if tap.kind != "l1":
            continue
        for device in range(DEVICES):
            activity = scene.features[device::DEVICES, tap.columns].mean(axis=0)
            order = np.argsort(activity if device >= round(liars * DEVICES) else -activity, kind="stable")
            rankings.setdefault(tap.source_layer, []).append(tuple(order.tolist()))
            ballots.setdefault(tap.source_layer, []).append(tuple(order[: tap.channels // 2].tolist()))
    return Knowledge(
        taps=scene.metadata.taps, shift=shift if scene.flagged >= MIN_FLAGGED else None,
        rankings=rankings, ballots=ballots, triggers=tuple(triggers), seek=seek,
    )  # fmt: skip


def bench_of(scene: Scene, target: Any, images: Images | None = None) -> Bench:
    """What the methods work with."""
    chosen = scene.x_repair if images is None else images
    labels = scene.y_repair[: len(chosen)]
    return Bench(images=chosen, answers=target.classes(chosen), features=scene.features, labels=labels)


def int8_of(scene: Scene, target: Any) -> bytes:
    """The int8 file of a repaired target."""
    if not target.trainable:
        return bytes(target.content)
    lowered = lowering.lower(sources.of_keras(target.model, "repaired"), scene.x_gate[:500])
    assert lowered.int8_tflite is not None
    return lowered.int8_tflite


def applied(scene: Scene, method: Method, known: Knowledge, images: Images | None = None) -> dict[str, Any]:
    """One method on one model: on the int8 file itself where it needs no training, else on the Keras model."""
    why = method.missing(known)
    if why:
        return {"not_applied": why}
    started = time.monotonic()
    target: Any = KerasTarget(scene.keras).copy() if method.trains else TfliteTarget(scene.member.int8)
    try:
        notes = method.apply(target, known, bench_of(scene, target, images))
        content = int8_of(scene, target)
    except EdgeGuardError as error:
        return {"not_applied": str(error)}
    spent = time.monotonic() - started
    found = scene.measuring.of(lambda x: zoo.classes(content, x))
    return {**found, "notes": list(notes), "seconds": round(spent, 1)}


class Both:
    """l-infinity pruning, and unlearning after it."""

    name: ClassVar[str] = "linf + unlearn"
    paper: ClassVar[str] = ""
    cost: ClassVar[int] = 12
    trains: ClassVar[bool] = True

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return METHODS["linf"].missing(known) or METHODS["unlearn"].missing(known)

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        return (*METHODS["linf"].apply(target, known, bench), *METHODS["unlearn"].apply(target, known, bench))


class Once:
    """Unlearning that trains once for a model: what it made is put back when it is applied again."""

    name: ClassVar[str] = "unlearn"
    paper: ClassVar[str] = METHODS["unlearn"].paper
    cost: ClassVar[int] = METHODS["unlearn"].cost
    trains: ClassVar[bool] = True

    def __init__(self) -> None:
        self._method = METHODS["unlearn"]
        self._made: tuple[list[Any], tuple[str, ...]] | None = None

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return self._method.missing(known)

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        if self._made is None:
            notes = self._method.apply(target, known, bench)
            self._made = target.model.get_weights(), notes
        target.model.set_weights(self._made[0])
        return self._made[1]


def by_auto(
    scene: Scene, searches: Searches, known: Knowledge, kept: Sequence[Any], methods: Mapping[str, Method], plans: Any
) -> dict[str, Any]:
    """``auto`` with its gate, and what its result is worth."""
    started = time.monotonic()
    original = KerasTarget(scene.keras)

    def convert(target: Any) -> pipeline.Conversion:
        return pipeline.convert(
            sources.of_keras(target.model, "repaired"),
            scene.x_gate,
            scene.y_gate,
            taps=target.tapped(scene.metadata.taps),
            groups=scene.groups_gate,
        )

    judges = auto.Judges(
        label=scene.label, images=scene.x_gate, labels=scene.y_gate, classes=len(scene.metadata.classes),
        kept=tuple(kept), quarantined=scene.quarantined if searches.reported.quarantined is not None else None,
        before=scene.guarded, reaudit=searches.reaudit, convert=convert,
    )  # fmt: skip
    best, tried = auto.repair(original, known, bench_of(scene, original), judges, _say, plans=plans, methods=methods)
    found: dict[str, Any] = {
        "outcome": "failed" if best is None else best.outcome,
        "method": None if best is None else best.name,
        "tried": [
            {key: value for key, value in attempt.as_dict().items() if key in {"method", "outcome", "reason"}}
            for attempt in tried
        ],
    }
    if best is not None and best.converted is not None:
        content = best.converted.guarded
        found |= scene.measuring.of(lambda x: zoo.classes(content, x))
    return {**found, "seconds": round(time.monotonic() - started, 1)}


def _say(stage: str, text: str, done: int, total: int) -> None:
    if ": " in text:
        print(f"    {text}", flush=True)


def measure(scene: Scene, row: dict[str, Any], parts: Sequence[str], keep: Callable[[], None]) -> None:
    """Fill the parts of a row that are missing; ``keep`` is called after each."""
    wanted = [part for part in parts if part not in row]
    unlearn = Once()
    if {"methods", "auto"} & set(wanted):
        searches = searches_of(scene)
        started = time.monotonic()
        shown, kept = searches.original() if scene.flagged >= MIN_FLAGGED else ([], [])
        row["triggers"] = {
            "recovered": [{"form": t.form, "size": t.size, "success": t.success} for t in shown],
            "seconds": round(time.monotonic() - started, 1),
        }
        known = known_of(scene, shown, searches.residual)
        methods: dict[str, Method] = {**METHODS, "unlearn": unlearn}
        if "auto" in wanted:
            row["auto"] = by_auto(scene, searches, known, kept, methods, auto.PLANS)
            keep()
        if "methods" in wanted:
            row["methods"] = {name: applied(scene, method, known) for name, method in methods.items()}
            row["methods"]["linf + unlearn"] = applied(scene, Both(), replace(known, seek=None))
            keep()
    if "quarantined" in wanted and len(scene.quarantined):
        searches = searches_of(scene, quarantined=True)
        shown, kept = searches.original()
        known = known_of(scene, shown, searches.residual)
        plans = (("excise",), ("unlearn",))
        row["quarantined"] = by_auto(scene, searches, known, kept, METHODS, plans)
        keep()
    if "liars" in wanted:
        row["liars"] = {
            f"{share:g}": {
                method.name + suffix: applied(scene, method, known_of(scene, (), None, share))
                for method, suffix in (
                    (RankAggregation("median"), " median"),
                    (RankAggregation("mean"), " mean"),
                    (MajorityVote(), ""),
                )
            }
            for share in LIARS
        }
        keep()
    if "shares" in wanted:
        total = len(scene.x_repair) + len(scene.x_gate) + row["trained_on"]
        row["shares"] = {}
        for share in SHARES:
            count = round(share * total)
            if not MIN_REPAIR <= count <= len(scene.x_repair):
                row["shares"][f"{share:g}"] = {
                    "not_applied": f"{count} inputs; the owner repairs with {len(scene.x_repair)}"
                }
                continue
            images = scene.x_repair[:count]
            searches = searches_of(scene, images=images)
            shown, _ = searches.original()
            known = known_of(scene, shown, searches.residual)
            row["shares"][f"{share:g}"] = {"inputs": count, **applied(scene, METHODS["unlearn"], known, images)}
        keep()


def _keep(row: dict[str, Any], place: Path) -> None:
    files.write(json.dumps(row, indent=1).encode() + b"\n", place)


def stored(cell: zoo.Cell) -> dict[str, Any]:
    """A row as far as it was measured; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads((RESULTS / f"{cell.name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found


def run(cells: Sequence[zoo.Cell], parts: Sequence[str]) -> int:
    """Measure what is trained and not yet measured; how many failed."""
    failed = 0
    for number, cell in enumerate(cells, start=1):
        part = zoo.at_hand(cell.data)
        member = None if part is None else zoo.load(cell, part)
        if part is None or member is None:
            continue
        row = stored(cell)
        if (row.get("fingerprint"), row.get("code")) != (member.row["fingerprint"], code_digest()):
            row = {}
        if all(wanted in row for wanted in parts):
            continue
        RESULTS.mkdir(parents=True, exist_ok=True)
        place = RESULTS / f"{cell.name}.json"
        try:
            scene = stage(member, part)
            row |= {
                **asdict(cell),
                "attacked": member.row.get("attacked"),
                "fingerprint": member.row["fingerprint"],
                "code": code_digest(),
                "trained_on": len(part.data.x_train),
                "evidence": {"label": scene.label, "flagged": scene.flagged},
                "before": scene.measuring.of(functools.partial(zoo.classes, member.int8)),
                "test_inputs": len(scene.measuring.labels),
            }
            measure(scene, row, parts, functools.partial(_keep, row, place))
        except EdgeGuardError as error:
            failed += 1
            print(f"[{number}/{len(cells)}] {cell.name}: {error}", flush=True)
            continue
        print(f"[{number}/{len(cells)}] {cell.name}: {repair_report.line(row)}", flush=True)
    return failed


def main() -> int:
    """Measure what was asked for, or write the report. Exit code 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", metavar="NAME")
    parser.add_argument("--attack", action="append", metavar="NAME")
    parser.add_argument("--network", action="append", metavar="NAME")
    parser.add_argument("--seed", action="append", type=int, metavar="N")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--report", action="store_true", help="write docs/repair.md and stop")
    options = parser.parse_args()
    if options.report:
        repair_report.write(RESULTS, Path(__file__).parent.parent / "docs" / "repair.md", code=code_digest())
        return 0
    cells = [c for c in zoo.chosen(options) if not options.seed or c.seed in options.seed]
    if options.attack:
        cells = [c for c in cells if c.attack in options.attack]
    failed = run(cells, options.part or PARTS)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
