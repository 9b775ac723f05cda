"""Audits the zoo: is each attacked model named with its right label, and is a clean one left alone?

    python -m benchmarks.inspection --data digits --limit 5     # five models that are not measured yet
    python -m benchmarks.inspection --calibrate [--data digits] [--limit N]
    python -m benchmarks.inspection --report                    # docs/inspection.md from what was measured

Each model's **int8 file** is audited, through a reconstruction of its float graph, with the owner's clean inputs and
without their labels. A row is written as soon as it is measured; one that this very code measured on this very model is
not measured again, one of other code stays until then and is marked in the report. Every ready model of the zoo whose
attack works is taken; what is missing is listed, not trained. Seconds are the wall clock's, of a machine that may be
shared: the processor's stand beside them.

``--calibrate`` recomputes what the audit's limits come from (``edgeguard/inspection/index.py``): clean twins and the
development attacks (BadNets, Blended, SIG, Refool) with seeds and a target of their own, none of them of the zoo. The
limit of a form is a fifth below the smallest ratio that a working trigger of any clean network reached, rounded to 0.1.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import digests, inspection_report, selection, zoo
from benchmarks.zoo import CLEAN, Cell
from converters import files, reconstruct
from edgeguard.attacks import registry, victims
from edgeguard.attacks.base import Task
from edgeguard.attacks.networks import NETWORKS, SMALL_CNN
from edgeguard.errors import ConfigError
from edgeguard.inspection import index
from edgeguard.inspection.audit import FORMS, Audit, audit

RESULTS = digests.ROOT / "benchmarks" / "results" / "inspection.json"
CALIBRATION = RESULTS.with_name("inspection_calibration.json")
PATCHES = frozenset({"badnets", "dba", "robnet", "trojannet", "pruning_aware", "adaptive", "quantisation"})
DEVELOPMENT = ("badnets", "blended", "sig", "refool")
MARGIN = 0.8
SOURCES = (*digests.SHARED, "benchmarks/inspection.py")
_TARGET = 3
_SEEDS = {"digits": (range(100, 106), range(100, 101)), "fashion_mnist": (range(100, 102), range(0))}
"""Seeds of clean and of attacked calibration models, of each data set."""


def row_of(found: Audit, target: int | None, seconds: float) -> dict[str, Any]:
    """What a result file keeps of an audit.

    ``right``: the target is the first label named, or a module has a trigger for it; of a clean model, none is named.
    """
    best: dict[str, Any] = {}
    for form in FORMS:
        judged = [f for f in found.findings if f.form == form and f.success >= index.MIN_SUCCESS]
        smallest = min(judged, key=lambda f: f.ratio, default=None)
        own = next((f for f in found.findings if f.form == form and f.label == target), None)
        for name, finding in (("smallest", smallest), ("target", own)):
            if finding is not None:
                best[f"{form}_{name}"] = {
                    "label": finding.label,
                    **{k: round(getattr(finding, k), 4) for k in ("size", "ratio", "index", "success")},
                }
    return {
        "verdict": found.verdict,
        "labels": list(found.labels),
        "right": not found.labels if target is None else target in found.labels[: max(1, len(found.planted))],
        "module": list(found.structure),
        "reason": found.reason,
        **best,
        "seconds": round(found.cost_s, 1),
        "processor_seconds": round(seconds, 1),
        "steps": found.steps,
    }


def measure(content: bytes, images: Any, target: int | None) -> dict[str, Any]:
    """Audit one file."""
    before = time.process_time()
    found = audit(reconstruct.of_tflite(content).model, images)
    return row_of(found, target, time.process_time() - before)


def members(options: argparse.Namespace) -> Iterator[tuple[Cell, zoo.Member | None, zoo.Split]]:
    """The cells asked for, twins and development attacks of a seed first; None for a model that is not ready."""
    for cell in sorted(selection.cells_of(options), key=lambda c: (c.seed, c.attack not in (CLEAN, *DEVELOPMENT))):
        part = zoo.at_hand(cell.data)
        if part is not None:
            yield cell, zoo.load(cell, part), part


def is_of(row: dict[str, Any] | None, code: str, **expected: Any) -> bool:
    """Whether a row was measured with this code and is of what is expected."""
    return row is not None and all(row.get(name) == value for name, value in {"code": code, **expected}.items())


def run(options: argparse.Namespace) -> int:
    """Measure what is missing, at most ``--limit`` models; how many failed."""
    path, stamp = options.json or RESULTS, digests.stamp(SOURCES)
    rows = _rows(path)
    missing: list[str] = []
    failed = measured = 0
    for cell, member, part in members(options):
        if member is None:
            missing.append(cell.name)
            continue
        if member.row.get("attacked") is False or is_of(
            rows.get(cell.name), stamp["code"], fingerprint=member.row["fingerprint"]
        ):
            continue
        if options.limit is not None and measured >= options.limit:
            break
        measured += 1
        target = None if member.attack is None else member.attack.target
        try:
            found = measure(member.int8, part.owner_x, target)
        except Exception as error:  # one model that breaks takes nothing of the others with it
            failed += 1
            print(f"{cell.name}: {type(error).__name__}: {error}", flush=True)
            continue
        row = {
            **asdict(cell),
            **stamp,
            "fingerprint": member.row["fingerprint"],
            "attacked": member.row.get("attacked"),
            "target": target,
            **found,
        }
        rows = {**_rows(path), cell.name: row}  # another run may have written meanwhile
        _write(path, rows, summary(list(rows.values())))
        print(f"{cell.name}: {describe(row)}", flush=True)
    print(json.dumps(summary(list(rows.values())), indent=2))
    if missing:
        print(f"not ready, see python -m benchmarks.zoo: {', '.join(missing)}")
    return failed


def describe(row: dict[str, Any]) -> str:
    """One line for a person."""
    said = "right" if row["right"] else "WRONG"
    return f"{row['verdict']} {row['labels']} ({said}); {row['reason']}; {row['seconds']:.0f} s"


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Shares over the rows that count: models whose attack works, and clean ones."""
    attacked = [r for r in rows if r["attacked"]]
    clean = [r for r in rows if r["attack"] == CLEAN]
    patches = [r for r in attacked if r["attack"] in PATCHES]
    return {
        "named_of_patch_type": _share([r["right"] for r in patches]),
        "named_of_all": _share([r["right"] for r in attacked]),
        "clean_accused": _share([r["verdict"] == "backdoored" for r in clean]),
        "by_attack": {name: _share([r["right"] for r in attacked if r["attack"] == name]) for name in registry.ATTACKS},
        "longest_seconds": {
            data: max(r["seconds"] for r in rows if r["data"] == data) for data in sorted({r["data"] for r in rows})
        },
    }


def _share(values: Sequence[bool]) -> dict[str, Any]:
    return {"of": len(values), "count": sum(values), "share": sum(values) / len(values) if values else None}


def calibrate(options: argparse.Namespace) -> None:
    """Train, audit, and print the limits that follow."""
    path, stamp = options.json or CALIBRATION, digests.stamp(SOURCES)
    rows = _rows(path)
    measured = 0
    for name, (clean_seeds, attacked_seeds) in _SEEDS.items():
        if options.data and name not in options.data:
            continue
        try:
            part = zoo.split(name)
        except ConfigError as error:
            print(f"{name}: left out: {error}", flush=True)
            continue
        cells = [(CLEAN, seed) for seed in clean_seeds]
        cells += [(attack, seed) for seed in attacked_seeds for attack in DEVELOPMENT]
        for attack, seed in cells:
            key = f"{name}-{attack}-s{seed}"
            if is_of(rows.get(key), stamp["code"]):
                continue
            if options.limit is not None and measured >= options.limit:
                break
            measured += 1
            row = measure(_trained(name, part, attack, seed), part.owner_x, None if attack == CLEAN else _TARGET)
            rows = _rows(path)
            rows[key] = {"data": name, "attack": attack, "seed": seed, **stamp, **row}
            _write(path, rows, limits(list(rows.values())))
            print(f"{key}: {describe(rows[key])}", flush=True)
    print(json.dumps(limits(list(rows.values())), indent=2))


def _trained(name: str, part: zoo.Split, attack: str, seed: int) -> bytes:
    """A model's int8 file, of the zoo's recipe."""
    from converters import lowering, sources

    data, recipe = part.data, zoo.RECIPES[name]
    task = Task(images=data.x_train.astype(np.uint8), labels=data.y_train, classes=len(data.classes))
    training = victims.Training(
        epochs=recipe.epochs,
        augment=recipe.augment,
        network=NETWORKS[SMALL_CNN],
        architecture=SMALL_CNN,
        cache=victims.cache_folder(),
    )
    if attack == CLEAN:
        model = training.fit(task, seed=seed)
    else:
        model = registry.find(attack).for_shape(data.shape, target=_TARGET, seed=seed).mount(task, training).model
    lowered = lowering.lower(sources.of_keras(model, name), part.owner_x[:500])
    assert lowered.int8_tflite is not None
    return lowered.int8_tflite


def limits(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What clean networks reach, the limits that follow, and what development attacks reach."""
    found: dict[str, Any] = {}
    for form in FORMS:
        clean = [r[f"{form}_smallest"]["ratio"] for r in rows if r["attack"] == CLEAN]
        attacked = {
            f"{r['data']}-{r['attack']}-s{r['seed']}": r[f"{form}_target"]["ratio"]
            for r in rows
            if r["attack"] != CLEAN
        }
        found[form] = {
            "clean_networks": len(clean),
            "smallest_clean_ratio": min(clean, default=None),
            "limit": round(MARGIN * min(clean), 1) if clean else None,
            "in_use": index.MAX_RATIO[form],
            "attacked_ratios": attacked,
        }
    return found


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    try:
        rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["rows"]
    except (OSError, ValueError, KeyError):
        return {}
    return rows


def _write(path: Path, rows: dict[str, dict[str, Any]], total: dict[str, Any]) -> None:
    files.write(json.dumps({"summary": total, "rows": rows}, indent=1).encode(), path)


def todays(row: dict[str, Any]) -> str | None:
    """The fingerprint that a row's model has now; None where its data is not here, so that nobody can tell."""
    part = zoo.at_hand(row["data"])
    cell = Cell(**{name: row[name] for name in ("data", "network", "attack", "seed")})
    return None if part is None else zoo.fingerprint(cell, part)


def main() -> int:
    """Measure, calibrate, or write the report. Exit code 1 where a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    selection.add_to(parser)
    parser.add_argument("--json", type=Path, help="where the results are")
    parser.add_argument("--threads", type=int, default=0, help="threads of TensorFlow; all by default")
    parser.add_argument("--report", action="store_true", help="write docs/inspection.md from the results instead")
    parser.add_argument("--calibrate", action="store_true", help="recompute the audit's limits instead")
    options = parser.parse_args()
    if options.report:
        rows, calibrated = (list(_rows(path).values()) for path in (RESULTS, CALIBRATION))
        tables = inspection_report.Tables(
            rows=rows, summary=summary(rows), calibrated=calibrated, limits=limits(calibrated),
            code=digests.code_digest(SOURCES), todays=todays,
        )  # fmt: skip
        inspection_report.write(digests.ROOT / "docs" / "inspection.md", tables)
        return 0
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(options.threads)
    tf.config.threading.set_inter_op_parallelism_threads(options.threads)
    if options.calibrate:
        calibrate(options)
        return 0
    return 1 if run(options) else 0


if __name__ == "__main__":
    sys.exit(main())
