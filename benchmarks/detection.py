"""How well triggers are found, beside published detectors, on the int8 files of the zoo.

    python -m benchmarks.detection [--data digits] [--attack badnets] [--network small-cnn-1] [--detector NAME]
    python -m benchmarks.detection --report        # docs/detection.md from what was measured

Every cell of the zoo that is trained (``python -m benchmarks.zoo``) is measured on its test set: clean inputs and the
same inputs with the trigger. Each row is a file of its own in ``benchmarks/results/detection``, written as soon as it
is measured; a row that this very code measured on this very model is not measured again.

Rules enforced here:

* one configuration of our own detector for every cell; statistics and thresholds come from the owner's clean inputs;
* a clean model is a row too: what it flags are false alarms, and the hub's policy must open no case on clean traffic;
* AUROC and TPR are given over all triggered inputs of another true label than the target, and over those alone that
  the model does call the target;
* the cascade works within its default budget at ``RATE`` inputs a second, on a simulated clock; triggered inputs come
  one in a hundred, among clean ones that claim the budget too.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import baselines as published
from benchmarks import detection_report, zoo
from benchmarks.baselines import Scored
from converters import calibration, files
from edgeguard.attacks.base import Images, Progress
from edgeguard.detection import cascade, sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.statistics import rate_upper
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.evidence import LabelCounts
from edgeguard.hub.policy import assess

Floats = npt.NDArray[np.float64]

RESULTS = Path(__file__).parent / "results" / "detection"
RATES = (0.01, 0.05, 0.1)
MAX_INPUTS = 2000
RATE = 20.0
BOOTSTRAPS = 200
TIMED = 30
CURVE = tuple(np.round(np.concatenate([[0.0], np.geomspace(1e-3, 1.0, 40)]), 6).tolist())
EDGES = tuple(np.round(np.geomspace(0.05, 50.0, 61), 6).tolist())
DEVICES = 3
TRAFFIC = 1000
_OWN = (
    *(
        f"edgeguard/detection/{name}.py"
        for name in ("statistics", "cascade", "strip", "squeezing", "guarded", "verdict", "sidecar")
    ),
    *(f"edgeguard/hub/{name}.py" for name in ("policy", "evidence", "excess", "config")),
    *(f"converters/{name}.py" for name in ("calibration", "guard", "taps")),
    "benchmarks/detection.py",
)
_PUBLISHED = ("benchmarks/baselines.py",)
ONE_PASS, CASCADE = "one-pass", "cascade"


@dataclass(frozen=True, kw_only=True)
class OnePass:
    """The score that comes with every inference."""

    model: GuardedModel
    name: str = ONE_PASS

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`benchmarks.baselines.Baseline`. Above 1 is flagged."""
        found = np.asarray([self.model.infer(image).verdict.score for image in images])
        return Scored(suspicion=found, forwards=np.ones(len(images)))


@dataclass(frozen=True, kw_only=True)
class Cascaded:
    """The cascade with a budget that never ends: what its stages say of each doubtful input, and what that costs."""

    model: GuardedModel
    companion: sidecar.Sidecar
    name: str = CASCADE

    def scores(self, images: Images, progress: Progress | None = None) -> Scored:
        """See :class:`benchmarks.baselines.Baseline`. Above 1 is flagged."""
        runner = cascade.Cascade(
            self.model,
            self.companion,
            clock=lambda: 0.0,
            rng=np.random.default_rng(0),
            budget=cascade.UNLIMITED,
        )
        found, forwards = np.empty(len(images)), np.empty(len(images))
        for row, image in enumerate(images):
            inference, taken = runner.infer(image)
            found[row], forwards[row] = inference.verdict.score, taken
        return Scored(suspicion=found, forwards=forwards)


def within_budget(
    one_pass: Sequence[Floats],
    audited: Sequence[Scored],
    order: Sequence[tuple[int, int]],
    limits: cascade.Limits,
) -> tuple[Floats, Floats]:
    """Scores and inferences [N] of a stream at ``RATE`` inputs a second within the default budget.

    Args:
        one_pass: one-pass scores of clean and of triggered inputs.
        audited: the same inputs with an audit wherever one is due.
        order: the stream: which of the two, and which input of it.
        limits: of the cascade.
    """
    allowance = cascade.Allowance(cascade.Budget(), cascade.worst_cost(limits), 0.0)
    scores, forwards = np.empty(len(order)), np.ones(len(order))
    for place, (side, index) in enumerate(order):
        extra = audited[side].forwards[index] - 1
        scores[place] = audited[side].suspicion[index]
        flagged = bool(one_pass[side][index] > limits.threshold)
        if extra and allowance.affords(flagged=flagged, now=place / RATE):
            allowance.spend(extra, flagged=flagged)
            forwards[place] += extra
        elif extra:
            # Doubtful and not audited: the one pass alone decides. Others are scored as if no look had been due.
            doubtful = not flagged and one_pass[side][index] >= limits.grey
            scores[place] = one_pass[side][index] / (1.0 if doubtful else limits.threshold)
    return scores, forwards


def stream(clean: int, triggered: int, between: int) -> list[tuple[int, int]]:
    """Every triggered input once, with ``between`` clean ones before each, which come round again and again."""
    order: list[tuple[int, int]] = []
    for index in range(triggered):
        order += [(0, (index * between + step) % clean) for step in range(between)]
        order.append((1, index))
    return order


def cases(guarded: GuardedModel, images: Images) -> list[int]:
    """Labels that the hub's policy calls suspicious when each of ``DEVICES`` devices draws ``TRAFFIC`` of these inputs.

    Args:
        guarded: the model that they run.
        images: ``[N, H, W, C]``; drawn with replacement, as there are more inputs in a day than in a test set.
    """
    described = guarded.metadata
    verdicts = [guarded.infer(image).verdict for image in images]
    drawn = np.random.default_rng(0).integers(len(verdicts), size=(DEVICES, TRAFFIC))
    counts: dict[tuple[int, int], list[int]] = {}
    for device, verdict in ((device, verdicts[index]) for device, row in enumerate(drawn) for index in row):
        total = counts.setdefault((device, -1 if verdict.predicted is None else verdict.predicted), [0, 0])
        total[0] += 1
        total[1] += verdict.flagged
    rows = np.array([(*key, *total) for key, total in counts.items()], dtype=np.int64)
    found = assess(
        LabelCounts(
            devices=tuple(f"device-{number}" for number in range(DEVICES)),
            device=rows[:, 0],
            label=rows[:, 1],
            epoch=np.ones(len(rows), dtype=np.int64),
            inputs=rows[:, 2],
            flagged=rows[:, 3],
        ),
        PolicyConfig(),
        guard=described,
        devices=DEVICES,
        now_epoch=1,
    ).suspicions
    return [suspicion.label for suspicion in found]


def mixed(clean: Images, triggered: Images) -> Images:
    """Clean inputs with one triggered one after every nine, until either runs out."""
    count = min(len(clean) // 9, len(triggered))
    return np.concatenate([part for k in range(count) for part in (clean[9 * k : 9 * k + 9], triggered[k : k + 1])])


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Clean test inputs, and triggered ones [M] with whether the model calls each the target."""

    clean: Images
    triggered: Images
    successful: npt.NDArray[np.bool_]


def inputs_of(member: zoo.Member, part: zoo.Split) -> Inputs:
    """At most ``MAX_INPUTS`` of each, drawn from the test set."""
    images, labels = part.data.x_test.astype(np.uint8), part.data.y_test
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(len(images))[:MAX_INPUTS])
    clean = images[chosen]
    if member.attack is None:
        empty = clean[:0]
        return Inputs(clean=clean, triggered=empty, successful=np.zeros(0, dtype=bool))
    eligible = np.flatnonzero(member.attack.eligible(labels))
    eligible = np.sort(rng.permutation(eligible)[:MAX_INPUTS])
    triggered = member.attack.stamp(images[eligible], member.state)
    successful = zoo.classes(member.int8, triggered) == member.attack.target
    return Inputs(clean=clean, triggered=triggered, successful=successful)


def auroc(clean: Floats, triggered: Floats) -> float:
    """The chance that a triggered input scores higher than a clean one, ties half."""
    ordered = np.sort(clean)
    below = np.searchsorted(ordered, triggered, "left")
    up_to = np.searchsorted(ordered, triggered, "right")
    return float((below + up_to).mean() / (2 * len(clean)))


def tpr_at(clean: Floats, triggered: Floats, fpr: float) -> float:
    """Share of triggered inputs above the score that at most a share ``fpr`` of the clean ones exceeds."""
    allowed = int(np.floor(fpr * len(clean)))
    threshold = -np.sort(-clean)[min(allowed, len(clean) - 1)]
    return float(np.mean(triggered > threshold))


def quality(clean: Floats, triggered: Floats) -> dict[str, Any]:
    """AUROC and TPR at each rate, with 95% bootstrap intervals."""
    rng = np.random.default_rng(0)
    drawn: list[list[float]] = []
    for _ in range(BOOTSTRAPS):
        one, other = rng.choice(clean, len(clean)), rng.choice(triggered, len(triggered))
        drawn.append([auroc(one, other), *(tpr_at(one, other, rate) for rate in RATES)])
    low, high = np.quantile(np.asarray(drawn), [0.025, 0.975], axis=0)
    values = [auroc(clean, triggered), *(tpr_at(clean, triggered, rate) for rate in RATES)]
    names = ["auroc", *(f"tpr_{rate:g}" for rate in RATES)]
    return {n: [_short(v), _short(a), _short(b)] for n, v, a, b in zip(names, values, low, high, strict=True)}


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def rate_lower(flagged: int, count: int) -> float:
    """Lower 95% bound, one-sided, of a rate of which ``flagged`` of ``count`` were seen."""
    return 1.0 - rate_upper(count - flagged, count)


def judge(clean: Scored, triggered: Scored, successful: npt.NDArray[np.bool_], *, ours: bool) -> dict[str, Any]:
    """What one detector is worth on one model."""
    row: dict[str, Any] = {"forwards_clean": _short(float(clean.forwards.mean()))}
    if len(triggered.forwards):
        rare, often = (0.99, 0.01), (0.5, 0.5)
        both = (float(clean.forwards.mean()), float(triggered.forwards.mean()))
        row["forwards_99_1"], row["forwards_50_50"] = (
            _short(sum(share * cost for share, cost in zip(mix, both, strict=True))) for mix in (rare, often)
        )
    if ours:
        flagged = int((clean.suspicion > 1.0).sum())
        row["flagged_clean"] = flagged
        row["fpr"] = _short(flagged / len(clean.suspicion))
        row["fpr_lower"] = _short(rate_lower(flagged, len(clean.suspicion)))
        row["histogram"] = {
            "clean": np.histogram(clean.suspicion.clip(EDGES[0], EDGES[-1]), EDGES)[0].tolist(),
            "triggered": np.histogram(triggered.suspicion.clip(EDGES[0], EDGES[-1]), EDGES)[0].tolist(),
        }
    if len(successful):
        row["all"] = quality(clean.suspicion, triggered.suspicion)
        if successful.any():
            row["successful"] = quality(clean.suspicion, triggered.suspicion[successful])
        row["curve"] = [_short(tpr_at(clean.suspicion, triggered.suspicion, rate)) for rate in CURVE]
        if ours:
            row["tpr"] = _short(float(np.mean(triggered.suspicion > 1.0)))
    return row


def timings(detectors: Sequence[Any], images: Images) -> dict[str, float]:
    """Median microseconds an input of each, interleaved, so that noise hits all alike."""
    taken: dict[str, list[float]] = {detector.name: [] for detector in detectors}
    for number in range(min(TIMED, len(images))):
        for detector in detectors:
            started = time.perf_counter()
            detector.scores(images[number : number + 1])
            taken[detector.name].append(1e6 * (time.perf_counter() - started))
    return {name: _short(float(np.median(values))) for name, values in taken.items()}


@functools.cache
def code_digest(names: tuple[str, ...] = _OWN) -> str:
    """Digest of the code that a row depends on, as it was first asked for."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for name in names:
        digest.update((root / name).read_bytes())
    return digest.hexdigest()


def measure(member: zoo.Member, part: zoo.Split, names: Sequence[str], progress: Progress) -> dict[str, Any]:
    """One row: our detector and the named baselines on one model.

    Raises:
        ModelError: the model cannot be guarded.
    """
    bare, plan = calibration.plan(member.int8)
    progress("guarding", 0, 1)
    guarded = calibration.guard_model(bare, plan, part.owner_x, sidecar=True, groups=part.owner_groups)
    model = GuardedModel.load(guarded.content)
    assert guarded.sidecar is not None and guarded.metadata.sidecar_digest is not None
    companion = sidecar.decode(guarded.sidecar, digest=guarded.metadata.sidecar_digest, metadata=model.metadata)
    detectors: list[Any] = [OnePass(model=model), Cascaded(model=model, companion=companion)]
    left_out: dict[str, str] = {}
    for name in names:
        try:
            detectors += published.baselines(member, part, names=[name])
        except ConfigError as error:
            left_out[name] = str(error)
    inputs = inputs_of(member, part)
    rows: dict[str, Any] = {}
    found: dict[str, tuple[Scored, Scored]] = {}
    for detector in detectors:
        progress(detector.name, 0, 1)
        clean, triggered = detector.scores(inputs.clean), detector.scores(inputs.triggered)
        found[detector.name] = (clean, triggered)
        if detector.name != CASCADE:
            rows[detector.name] = judge(clean, triggered, inputs.successful, ours=detector.name == ONE_PASS)
    rows[CASCADE] = _judge_cascade(found, inputs, companion)
    for name, microseconds in timings(detectors, inputs.clean).items():
        rows[name]["microseconds"] = microseconds
    return {
        **asdict(member.cell),
        **{key: member.row[key] for key in member.row if key.startswith(("accuracy", "asr"))},
        "attacked": member.row.get("attacked"),
        "fingerprint": member.row["fingerprint"],
        "code": code_digest(),
        "baselines_code": code_digest(_PUBLISHED),
        "inputs": {
            "fit": guarded.metadata.calibration.n_fit,
            "threshold": guarded.metadata.calibration.n_threshold,
            "clean": len(inputs.clean),
            "triggered": len(inputs.triggered),
            "successful": int(inputs.successful.sum()),
        },
        "guard": {
            "taps": [tap.name for tap in plan.taps],
            "features": guarded.metadata.feature_count,
            "factors": len(guarded.compiled.statistics.projection),
            "growth": len(guarded.content) - len(guarded.bare),
        },
        "cases": {
            "clean": cases(model, inputs.clean),
            **({"one in ten triggered": cases(model, mixed(inputs.clean, inputs.triggered))} if member.attack else {}),
        },
        "detectors": rows,
        "left_out": left_out,
    }


def _judge_cascade(
    found: dict[str, tuple[Scored, Scored]], inputs: Inputs, companion: sidecar.Sidecar
) -> dict[str, Any]:
    """The cascade's row: clean traffic alone, and triggered inputs one in a hundred."""
    limits = cascade.limits_of(companion.stages)
    if limits is None:
        raise ModelError("sidecar", got="no limits of the cascade", expected="a calibration set that allows it")
    one_pass, audited = [side.suspicion for side in found[ONE_PASS]], found[CASCADE]
    count, attacked = len(inputs.clean), len(inputs.triggered)
    alone = within_budget(one_pass, audited, [(0, index) for index in range(count)], limits)
    clean = Scored(suspicion=alone[0], forwards=alone[1])
    unaudited = _short(
        float(((one_pass[0] >= limits.grey) & (alone[1] == 1) & (one_pass[0] <= limits.threshold)).mean())
    )
    if not attacked:
        nothing = Scored(suspicion=alone[0][:0], forwards=alone[1][:0])
        return {**judge(clean, nothing, inputs.successful, ours=True), "unaudited_clean": unaudited}
    rare, often = (within_budget(one_pass, audited, stream(count, attacked, n), limits) for n in (99, 1))
    triggered = Scored(suspicion=rare[0][99::100], forwards=rare[1][99::100])
    row = judge(clean, triggered, inputs.successful, ours=True)
    return {
        **row,
        "unaudited_clean": unaudited,
        "forwards_99_1": _short(float(rare[1].mean())),
        "forwards_50_50": _short(float(often[1].mean())),
        "audited_triggered": _short(float((triggered.forwards > 1).mean())),
    }


def stored(cell: zoo.Cell) -> dict[str, Any] | None:
    """A row as it was measured last; None where there is none."""
    try:
        found: dict[str, Any] = json.loads((RESULTS / f"{cell.name}.json").read_text())
    except (OSError, ValueError):
        return None
    return found


def _kept(before: dict[str, Any], member: zoo.Member) -> dict[str, Any]:
    """What a stored row says of published detectors, where neither they nor the model have changed since."""
    same = (before.get("baselines_code"), before["fingerprint"]) == (
        code_digest(_PUBLISHED),
        member.row["fingerprint"],
    )
    found: dict[str, Any] = before["detectors"]
    return {name: row for name, row in found.items() if same and name not in {ONE_PASS, CASCADE}}


def run(cells: Sequence[zoo.Cell], names: Sequence[str], *, again: bool) -> int:
    """Measure what is trained and not yet measured; how many failed."""
    failed = 0
    for number, cell in enumerate(cells, start=1):
        part = zoo.at_hand(cell.data)
        member = None if part is None else zoo.load(cell, part)
        if part is None or member is None:
            print(f"[{number}/{len(cells)}] {cell.name}: not trained (python -m benchmarks.zoo)", flush=True)
            continue
        before = stored(cell)
        kept = _kept(before, member) if before is not None and not again else {}
        wanted = [name for name in names if name not in kept]
        done = before is not None and not again and before["code"] == code_digest()
        if before is not None and done and before["fingerprint"] == member.row["fingerprint"] and not wanted:
            continue
        try:
            row = measure(member, part, wanted, lambda text, done, total: None)
        except EdgeGuardError as error:
            failed += 1
            print(f"[{number}/{len(cells)}] {cell.name}: {error}", flush=True)
            continue
        row["detectors"] |= kept
        RESULTS.mkdir(parents=True, exist_ok=True)
        files.write(json.dumps(row, indent=1).encode() + b"\n", RESULTS / f"{cell.name}.json")
        print(f"[{number}/{len(cells)}] {cell.name}: {detection_report.line(row)}", flush=True)
    return failed


def main() -> int:
    """Measure what was asked for, or write the report. Exit code 1 where a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", metavar="NAME")
    parser.add_argument("--attack", action="append", metavar="NAME")
    parser.add_argument("--network", action="append", metavar="NAME")
    parser.add_argument("--seed", action="append", type=int, metavar="N")
    parser.add_argument("--detector", action="append", metavar="NAME", help="baselines to run; all by default, or none")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument("--report", action="store_true", help="write docs/detection.md and stop")
    options = parser.parse_args()
    if options.report:
        detection_report.write(RESULTS, Path(__file__).parent.parent / "docs" / "detection.md", CURVE, EDGES)
        return 0
    names = list(published.NAMES) if options.detector is None else [n for n in options.detector if n != "none"]
    cells = [c for c in zoo.chosen(options) if not options.seed or c.seed in options.seed]
    failed = run(cells, names, again=options.again)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
