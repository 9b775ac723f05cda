"""How well backdoors are removed, method by method and by ``auto``, on the int8 files of the zoo.

    python -m benchmarks.repair --part auto --data digits --limit 3     # the main table, three models of it
    python -m benchmarks.repair --part methods --data digits            # other parts, at another time
    python -m benchmarks.repair --report                                # docs/repair.md from what was measured

Parts: ``auto``, what the product does, is by far the dearest. ``quarantined``: the same with inputs that owners shared,
by excision and unlearning alone. ``methods``: each alone. ``shares``: unlearning with 1, 5 and 10% of clean data.
``liars``: federated pruning with devices that lie. Without ``--part`` all of them, model by model: what ``auto`` found
and trained then serves ``methods`` too.

Each result is written to ``benchmarks/results/repair``, a file a model, as soon as it is measured; one that this very
code measured on this very model is not measured again. A part that other code measured stays, marked in the report,
until its first new result.

Rules enforced here:

* a fifth of the test set plays the field: devices see it, clean and a part of it triggered, and report the mean
  features of what they flag, false alarms among it. The rest measures; no method sees any of it, nor the trigger;
* the owner's clean inputs are a third for the repair, two thirds for gate and calibration, each in random order;
* ``auto`` converts and judges as a case does, what devices would refuse included;
* a share of clean data is all that a repair has: it searches, ranks, trains and quantises with nothing else;
* accuracy, ASR as the design defines it and the target's recall are those of int8 files;
* a method that breaks is written down as one that failed, and the next is measured;
* models whose attack does not work are not measured;
* liars send their ranks in reverse, and vote for the most active channels.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from benchmarks import digests, repair_report, selection, zoo
from converters import calibration, files, lowering, pipeline, sources
from edgeguard.attacks.base import Images, attack_success_rate
from edgeguard.data import Labels
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EdgeGuardError
from edgeguard.inspection.networks import norms_of
from edgeguard.repair import auto
from edgeguard.repair.deployable import Running
from edgeguard.repair.methods import METHODS
from edgeguard.repair.methods.base import Bench, Knowledge, Method
from edgeguard.repair.methods.federated import MajorityVote, RankAggregation
from edgeguard.repair.owner import REPAIR_SHARE
from edgeguard.repair.recover import Reported
from edgeguard.repair.search import Searches
from edgeguard.repair.target import KerasTarget, TfliteTarget

RESULTS = Path(__file__).parent / "results" / "repair"
SOURCES = (*digests.SHARED, "edgeguard/repair", "benchmarks/repair.py")
FIELD, FIELD_CLEAN, FIELD_TRIGGERED = 0.2, 600, 300
MIN_FLAGGED = 10
QUARANTINED = 50
SHARES = (0.01, 0.05, 0.1)
LIARS = (0.0, 0.1, 0.2)
DEVICES = 10
MIN_REPAIR = 30
FEATURE_INPUTS = RANGE_INPUTS = 500
SOUGHT_SHARE = 2 / 3
"""Of a share of clean data: what triggers are sought on; the rest judges them."""
COMBINATION = "linf + unlearn"
PARTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "auto": (),
        "quarantined": (),
        "methods": (*METHODS, COMBINATION),
        "shares": tuple(f"{share:g}" for share in SHARES),
        "liars": tuple(f"{share:g}" for share in LIARS),
    }
)
"""Each with the entries that it is measured in; none: it is measured as a whole."""


@dataclass(kw_only=True)
class Record:
    """What is known of one model, on the disk as soon as it is known.

    Attributes:
        row: what is on the disk.
        place: where.
        stamp: what a part that is measured now is measured with: code, libraries, and the figures before the repair.
    """

    row: dict[str, Any]
    place: Path
    stamp: Mapping[str, Any]

    def missing(self, part: str) -> list[str]:
        """What this very code has not measured of a part: its entries, or the part itself where it has none."""
        entries = PARTS[part] or (part,)
        if part not in self.row or self.row["measured"][part]["code"] != self.stamp["code"]:
            return list(entries)
        return [entry for entry in PARTS[part] if entry not in self.row[part]]

    def put(self, part: str, found: Mapping[str, Any], entry: str | None = None) -> None:
        """Write one result down. What other code measured of the part goes; what another run wrote meanwhile stays."""
        self.row = {**self.row, **stored(self.place, self.row["fingerprint"])}
        measured = self.row.setdefault("measured", {})
        if measured.get(part, {}).get("code") != self.stamp["code"]:
            self.row.pop(part, None)
            measured[part] = dict(self.stamp)
        if entry is None:
            self.row[part] = dict(found)
        else:
            self.row.setdefault(part, {})[entry] = dict(found)
        files.write(json.dumps(self.row, indent=1).encode() + b"\n", self.place)


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
    running: Running
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


def divided(
    count: int, groups: Labels | None, rng: np.random.Generator
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Which of the owner's ``count`` inputs repair, and which gate: as a case divides them, in random order."""
    together = np.arange(count) if groups is None else groups
    names = rng.permutation(np.unique(together))
    order = rng.permutation(count)
    repairing = np.isin(together, names[: round(len(names) * REPAIR_SHARE)])[order]
    return order[repairing], order[~repairing]


def features_of(model: GuardedModel, images: Images) -> npt.NDArray[np.float64]:
    """Features [N, D] of at most ``FEATURE_INPUTS`` images."""
    return np.asarray([model.measure(x).features for x in images[:FEATURE_INPUTS]], dtype=np.float64)


def stage(member: zoo.Member, part: zoo.Split) -> Scene:
    """Guard the model, let devices see the field, and split the owner's data. Raises ModelError where it cannot."""
    keras = member.keras()
    rng = np.random.default_rng(0)
    bare, plan = calibration.plan(member.int8, layers=[layer.name for layer in keras.layers])
    guarded = calibration.guard_model(
        bare, plan, part.owner_x, classes=part.data.classes, sidecar=True, groups=part.owner_groups
    )
    model = GuardedModel.load(guarded.content)
    assert guarded.sidecar is not None and guarded.metadata.sidecar_digest is not None
    companion = sidecar.decode(guarded.sidecar, digest=guarded.metadata.sidecar_digest, metadata=model.metadata)
    columns = np.concatenate([np.asarray(tap.columns) for tap in guarded.metadata.taps if tap.kind != "logit"])
    repair, gate = divided(len(part.owner_x), part.owner_groups, rng)
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
    x_repair = part.owner_x[repair]
    own = features_of(model, x_repair)
    quiet = ~alarms & (calls == label)
    return Scene(
        member=member, keras=keras, norms=norms_of(keras, guarded.metadata.taps), running=Running(model, companion),
        guarded=guarded.content, metadata=guarded.metadata, norm_columns=columns, x_repair=x_repair,
        y_repair=part.owner_y[repair], x_gate=part.owner_x[gate], y_gate=part.owner_y[gate],
        groups_gate=None if part.owner_groups is None else part.owner_groups[gate],
        features=own, label=label, flagged=int(behind.sum()),
        flagged_mean=features[behind].mean(axis=0) if behind.any() else np.zeros(features.shape[1]),
        usual=features[quiet].mean(axis=0) if quiet.any() else own.mean(axis=0),
        quarantined=seen[behind][:QUARANTINED],
        measuring=Measuring(
            images=images[rest], labels=labels[rest], eligible=eligible, triggered=triggered,
            target=label if attack is None else attack.target,
        ),
    )  # fmt: skip


def of_share(scene: Scene, count: int) -> Scene:
    """The same model, whose owner has ``count`` clean inputs and no more. Devices' guard stays what it was."""
    images = np.concatenate([scene.x_repair, scene.x_gate])[:count]
    labels = np.concatenate([scene.y_repair, scene.y_gate])[:count]
    return replace(
        scene, x_repair=images, y_repair=labels, x_gate=images, y_gate=labels, groups_gate=None,
        features=features_of(scene.running.model, images),
    )  # fmt: skip


def searches_of(scene: Scene, *, quarantined: bool = False, held_out: Images | None = None) -> Searches:
    """The searches that a repair of this model makes. With ``held_out``, on the rest of the repair's inputs."""
    rest = scene.x_repair if held_out is None else scene.x_repair[: -len(held_out)]
    return Searches(
        model=scene.keras, norms=scene.norms, images=rest, held_out=scene.x_gate if held_out is None else held_out,
        label=scene.label,
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


def sought(scene: Scene, held_out: Images | None = None) -> Knowledge:
    """What is known where nothing has to be kept for a gate: half the searches of ``auto``."""
    if scene.flagged < MIN_FLAGGED:
        return known_of(scene, (), None)
    searches = searches_of(scene, held_out=held_out)
    shown, _ = searches.known(searches.shown(), [])
    return known_of(scene, shown, searches.residual)


def bench_of(scene: Scene, target: Any) -> Bench:
    """What the methods work with."""
    answers = target.classes(scene.x_repair)
    return Bench(images=scene.x_repair, answers=answers, features=scene.features, labels=scene.y_repair)


def int8_of(scene: Scene, target: Any) -> bytes:
    """The int8 file of a repaired target."""
    if not target.trainable:
        return bytes(target.content)
    lowered = lowering.lower(sources.of_keras(target.model, "repaired"), scene.x_gate[:RANGE_INPUTS])
    assert lowered.int8_tflite is not None
    return lowered.int8_tflite


def applied(scene: Scene, methods: Sequence[Method], known: Knowledge) -> dict[str, Any]:
    """Methods one after the other on one model: on the int8 file itself where none needs training, else on Keras."""
    why = next((why for method in methods if (why := method.missing(known))), "")
    if why:
        return {"not_applied": why}
    started = time.monotonic()
    notes: list[str] = []
    try:
        trains = any(method.trains for method in methods)
        target: Any = KerasTarget(scene.keras).copy() if trains else TfliteTarget(scene.member.int8)
        bench = bench_of(scene, target)
        for method in methods:
            done = method.apply(target, known, bench)
            if not done and len(methods) > 1:
                return {"not_applied": f"{method.name} alone changes nothing"}
            notes += done
        content = int8_of(scene, target)
    except Exception as error:  # frameworks raise whatever they like at a model that they did not expect
        return {"failed": str(error) if isinstance(error, EdgeGuardError) else f"{type(error).__name__}: {error}"}
    spent = time.monotonic() - started
    found = scene.measuring.of(lambda x: zoo.classes(content, x))
    return {**found, "notes": notes, "seconds": round(spent, 1)}


@dataclass(frozen=True, kw_only=True)
class _Made:
    """Weights before and after a training, from what it was taught, and what it said and took."""

    given: list[Any]
    known: Knowledge
    weights: list[Any]
    notes: tuple[str, ...]
    seconds: float


@dataclass
class Once:
    """A method that trains, once for a model: what it made is put back where the same is asked of the same weights.

    ``spared``: the seconds that putting it back spared when it was applied last, 0 where it trained.
    """

    name: ClassVar[str] = METHODS["unlearn"].name
    paper: ClassVar[str] = METHODS["unlearn"].paper
    cost: ClassVar[int] = METHODS["unlearn"].cost
    trains: ClassVar[bool] = True
    method: Method = field(default_factory=lambda: METHODS["unlearn"])
    spared: float = 0.0
    _made: list[_Made] = field(default_factory=list)

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return self.method.missing(known)

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        given = target.model.get_weights()
        for made in self._made:
            if made.known is known and _same(made.given, given):
                target.model.set_weights(made.weights)
                self.spared = made.seconds
                return made.notes
        started = time.monotonic()
        notes = self.method.apply(target, known, bench)
        self.spared, spent = 0.0, time.monotonic() - started
        weights = target.model.get_weights()
        self._made.append(_Made(given=given, known=known, weights=weights, notes=notes, seconds=spent))
        return notes


def _same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    return len(some) == len(others) and all(np.array_equal(a, b) for a, b in zip(some, others, strict=True))


def by_auto(
    scene: Scene, searches: Searches, known: Knowledge, kept: Sequence[Any], methods: Mapping[str, Method], plans: Any
) -> dict[str, Any]:
    """``auto`` with its gate, and what its result is worth."""
    original = KerasTarget(scene.keras)

    def convert(target: Any) -> pipeline.Conversion:
        done = pipeline.convert(
            sources.of_keras(target.model, "repaired"),
            scene.x_gate,
            scene.y_gate,
            classes=scene.metadata.classes,
            fpr=scene.metadata.fpr,
            taps=target.tapped(scene.metadata.taps),
            sidecar=True,
            groups=scene.groups_gate,
        )
        scene.running.check(done.guarded)
        return done

    judges = auto.Judges(
        label=scene.label, images=scene.x_gate, labels=scene.y_gate, classes=len(scene.metadata.classes),
        kept=tuple(kept), quarantined=searches.reported.quarantined,
        before=scene.guarded, reaudit=searches.reaudit, convert=convert,
    )  # fmt: skip
    best, tried = auto.repair(original, known, bench_of(scene, original), judges, _say, plans=plans, methods=methods)
    found: dict[str, Any] = {
        "outcome": "failed" if best is None else best.outcome,
        "method": None if best is None else best.name,
        "reason": "no method passed the gate" if best is None else best.reason,
        "tried": [
            {key: value for key, value in attempt.as_dict().items() if key in {"method", "outcome", "reason"}}
            for attempt in tried
        ],
    }
    if best is not None and best.converted is not None:
        content = best.converted.guarded
        found |= scene.measuring.of(lambda x: zoo.classes(content, x))
    return found


def _say(stage: str, text: str, done: int, total: int) -> None:
    if ": " in text:
        print(f"    {text}", flush=True)


def measure(scene: Scene, record: Record, parts: Sequence[str]) -> None:
    """Measure what is missing of the parts that are asked for."""
    unlearn = Once()
    methods: dict[str, Method] = {**METHODS, "unlearn": unlearn}
    known: Knowledge | None = None
    if "auto" in parts and record.missing("auto"):
        found, known = _gated(scene, methods)
        record.put("auto", found)
    if "quarantined" in parts and record.missing("quarantined"):
        record.put("quarantined", _with_quarantined(scene))
    if "methods" in parts:
        for entry in record.missing("methods"):
            known = known or sought(scene)
            found = applied(scene, [methods[name] for name in entry.split(" + ")], known)
            if "seconds" in found and "unlearn" in entry:
                found["seconds"] = round(found["seconds"] + unlearn.spared, 1)
            _put(record, "methods", found, entry)
    if "liars" in parts:
        for entry in record.missing("liars"):
            liars = known_of(scene, (), None, float(entry))
            rules: tuple[tuple[Method, str], ...] = (
                (RankAggregation("median"), " median"),
                (RankAggregation("mean"), " mean"),
                (MajorityVote(), ""),
            )
            record.put("liars", {rule.name + suffix: applied(scene, [rule], liars) for rule, suffix in rules}, entry)
    if "shares" in parts:
        for entry in record.missing("shares"):
            _put(record, "shares", _with_share(scene, float(entry), record.row["trained_on"]), entry)


def _put(record: Record, part: str, found: Mapping[str, Any], entry: str) -> None:
    record.put(part, found, entry)
    print(f"    {part}, {entry}: {repair_report.told(found)}", flush=True)


def _gated(scene: Scene, methods: Mapping[str, Method]) -> tuple[dict[str, Any], Knowledge]:
    """``auto`` with what devices report, and what was known."""
    started, processor = time.monotonic(), time.process_time()
    searches = searches_of(scene)
    shown, kept = searches.original() if scene.flagged >= MIN_FLAGGED else ([], [])
    sought_s = time.monotonic() - started
    known = known_of(scene, shown, searches.residual)
    found = by_auto(scene, searches, known, kept, methods, auto.PLANS)
    found["triggers"] = [{"form": t.form, "size": t.size, "success": t.success} for t in shown]
    found["search_seconds"] = round(sought_s, 1)
    return {**found, **_spent(started, processor)}, known


def _with_quarantined(scene: Scene) -> dict[str, Any]:
    """Excision and unlearning, with inputs that owners shared."""
    if scene.flagged < MIN_FLAGGED:
        return {"not_applied": f"devices flagged {scene.flagged} inputs"}
    started, processor = time.monotonic(), time.process_time()
    searches = searches_of(scene, quarantined=True)
    shown, kept = searches.original()
    known = known_of(scene, shown, searches.residual)
    found = by_auto(scene, searches, known, kept, METHODS, (("excise",), ("unlearn",)))
    return {**found, "inputs": len(scene.quarantined), **_spent(started, processor)}


def _spent(started: float, processor: float) -> dict[str, float]:
    """Seconds since two clocks said so: the wall's, and the processor's in all threads."""
    return {
        "seconds": round(time.monotonic() - started, 1),
        "processor_seconds": round(time.process_time() - processor, 1),
    }


def _with_share(scene: Scene, share: float, trained_on: int) -> dict[str, Any]:
    """Unlearning with a share of the training set as the only clean inputs."""
    own = len(scene.x_repair) + len(scene.x_gate)
    count = round(share * (own + trained_on))
    if not MIN_REPAIR <= count <= own:
        return {"not_applied": f"{count} inputs; the owner has {own}, and at least {MIN_REPAIR} are needed"}
    small = of_share(scene, count)
    judged = small.x_repair[round(SOUGHT_SHARE * count) :]
    started = time.monotonic()
    known = sought(small, judged)
    sought_s = time.monotonic() - started
    found = applied(small, [METHODS["unlearn"]], known)
    return {"inputs": count, "of_which_judge_triggers": len(judged), "search_seconds": round(sought_s, 1), **found}


def stored(place: Path, fingerprint: str) -> dict[str, Any]:
    """A row as far as it was measured on the model of this fingerprint; empty where there is none."""
    try:
        found: dict[str, Any] = json.loads(place.read_text())
    except (OSError, ValueError):
        return {}
    return found if found.get("fingerprint") == fingerprint else {}


def run(cells: Sequence[zoo.Cell], parts: Sequence[str], limit: int | None = None) -> int:
    """Measure what is trained and not yet measured, at most ``limit`` models; how many failed."""
    failed = measured = 0
    stamp = digests.stamp(SOURCES)
    for number, cell in enumerate(cells, start=1):
        part = zoo.at_hand(cell.data)
        member = None if part is None else zoo.load(cell, part)
        if part is None or member is None or member.row.get("attacked") is False:
            continue
        place = RESULTS / f"{cell.name}.json"
        record = Record(row=stored(place, member.row["fingerprint"]), place=place, stamp=stamp)
        if not any(record.missing(wanted) for wanted in parts):
            continue
        if limit is not None and measured >= limit:
            break
        measured += 1
        RESULTS.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        print(f"[{number}/{len(cells)}] {cell.name}", flush=True)
        try:
            scene = stage(member, part)
            record.row |= {
                **asdict(cell),
                "attacked": member.row.get("attacked"),
                "fingerprint": member.row["fingerprint"],
                "trained_on": len(part.data.x_train),
            }
            record.stamp = {
                **stamp,
                "before": scene.measuring.of(functools.partial(zoo.classes, member.int8)),
                "test_inputs": len(scene.measuring.labels),
                "evidence": {"label": scene.label, "flagged": scene.flagged},
            }
            print(f"    staged in {time.monotonic() - started:.0f} s", flush=True)
            measure(scene, record, parts)
        except Exception as error:  # one model that breaks takes nothing of the others with it
            failed += 1
            print(f"[{number}/{len(cells)}] {cell.name}: {type(error).__name__}: {error}", flush=True)
            continue
        spent = (time.monotonic() - started) / 60
        print(f"[{number}/{len(cells)}] {cell.name}: {repair_report.line(record.row)}; {spent:.1f} min", flush=True)
    return failed


def todays(row: Mapping[str, Any]) -> str | None:
    """The fingerprint that a row's model has now; None where its data is not here, so that nobody can tell."""
    part = zoo.at_hand(row["data"])
    cell = zoo.Cell(**{name: row[name] for name in ("data", "network", "attack", "seed")})
    return None if part is None else zoo.fingerprint(cell, part)


def main() -> int:
    """Measure what was asked for, or write the report. Exit code 1 where a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection.add_to(parser)
    parser.add_argument("--part", action="append", choices=PARTS, help="only this part (may be repeated)")
    parser.add_argument("--report", action="store_true", help="write docs/repair.md and stop")
    options = parser.parse_args()
    if options.report:
        document = digests.ROOT / "docs" / "repair.md"
        repair_report.write(RESULTS, document, code=digests.code_digest(SOURCES), todays=todays)
        return 0
    failed = run(selection.cells_of(options), options.part or tuple(PARTS), options.limit)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
