"""Writes docs/detection.md from measured rows: tables, means, and what the targets say. Pure but for :func:`write`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import detection_plots
from converters import files

Row = Mapping[str, Any]

OURS = ("one-pass", "cascade")
ADAPTIVE, CLEAN = "adaptive", "clean"
DEVELOPED_ON = ("badnets", "blended", "sig", "refool")
FINAL_SEED = 2

_INTRODUCTION = f"""\
Made by `python -m benchmarks.detection --report` from `benchmarks/results/detection`; do not edit. Each row is one
model of the attack zoo (`python -m benchmarks.zoo`), scored as int8 TFLite. Cells: AUROC / TPR at 1% FPR with its 95%
bootstrap interval. Thresholds at work, and so the last column, come from the owner's clean inputs alone. The cascade
works within its default budget at 20 inputs a second.

The detector was developed on {", ".join(DEVELOPED_ON)}, with the owner's inputs and never the test set. An earlier
version was measured here on all cells of digits and some of Fashion-MNIST; the logits' own detector and the cascade of
today were developed after that, again on those four attacks alone, but by people who had seen the others' figures.

Microseconds (us) are medians for clean inputs on one busy machine, single calls, those of published detectors partly
from an earlier run; `linf` opens its model anew for each. `linf`, `strip-100`, `squeezing`, `scale-up`, `beatrix` and
`ibd-psc` are published detectors; `benchmarks/baselines.py` says where they deviate. Beatrix's standardisation was
chosen with a look at these attacks, in its favour; `linf` sees the logits beside the norms."""

AUROC, TPR, WORST, FPR_LOWER, FORWARDS = 0.997, 0.97, 0.90, 0.015, 1.5
"""What the cascade is to reach: means and worst cell over :func:`counted`, the others in every cell."""


def line(row: Row) -> str:
    """One row for a person who watches."""
    parts = []
    for name, found in row["detectors"].items():
        if "all" in found:
            best = found.get("successful", found["all"])
            parts.append(f"{name} {best['auroc'][0]:.4f}/{best['tpr_0.01'][0]:.3f}")
        elif "fpr" in found:
            parts.append(f"{name} flags {found['fpr']:.2%}")
    cascade = row["detectors"].get("cascade", {})
    return f"{', '.join(parts)}; FPR {cascade.get('fpr', float('nan')):.2%}, {cascade.get('forwards_clean')} forwards"


def rows_of(folder: Path) -> list[Row]:
    """The rows in a folder, in the order of their names."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def table(rows: Sequence[Row], which: str) -> list[str]:
    """A Markdown table of one data set and network; ``which`` is ``all`` or ``successful``."""
    names = [*OURS, *sorted({n for row in rows for n in row["detectors"]} - set(OURS))]
    lines = [
        "| attack (seed) | accuracy | ASR | n | " + " | ".join(names) + " | FPR one-pass, cascade |",
        "|---" * (5 + len(names)) + "|",
    ]
    for row in rows:
        if row["attack"] == CLEAN:
            continue
        cells = [_cell(row["detectors"].get(name, {}).get(which)) for name in names]
        mark = "" if row["attacked"] else " (below 90%: not counted)"
        lines.append(
            f"| {row['attack']} ({row['seed']}) | {row['accuracy_int8']:.1%} | {row['asr_int8']:.1%}{mark} "
            f"| {row['inputs']['clean']} + {row['inputs']['successful' if which == 'successful' else 'triggered']} | "
            + " | ".join(cells)
            + f" | {_fpr(row)} |"
        )
    return lines


def _cell(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "-"
    tpr = found["tpr_0.01"]
    return f"{found['auroc'][0]:.4f} / {tpr[0]:.3f} [{tpr[1]:.2f}, {tpr[2]:.2f}]"


def _fpr(row: Row) -> str:
    return ", ".join(f"{row['detectors'][name]['fpr']:.2%}" for name in OURS)


def clean_table(rows: Sequence[Row]) -> list[str]:
    """What clean models flag."""
    lines = [
        "| model (seed) | clean test inputs | one-pass flags | cascade flags (lower 95% bound) | forwards | cases |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row["attack"] == CLEAN:
            one, both = (row["detectors"][name] for name in OURS)
            lines.append(
                f"| {row['data']} {row['network']} ({row['seed']}) | {row['inputs']['clean']} | {one['fpr']:.2%} "
                f"| {both['fpr']:.2%} ({both['fpr_lower']:.2%}) | {both['forwards_clean']:.2f} "
                f"| {len(row['cases']['clean'])} |"
            )
    return lines


def counted(rows: Sequence[Row]) -> list[Row]:
    """The rows that the means are taken over: models that are attacked, but for the adaptive attack."""
    return [row for row in rows if row["attack"] not in {CLEAN, ADAPTIVE} and row["attacked"]]


def means(rows: Sequence[Row], which: str) -> list[str]:
    """Mean and worst AUROC, mean TPR and forwards of each detector over :func:`counted`."""
    lines = [
        "| detector | cells | mean AUROC | worst cell | mean TPR at 1, 5, 10% | forwards, clean | 99:1 | 50:50 | us |",
        "|---" * 9 + "|",
    ]
    names = [*OURS, *sorted({n for row in rows for n in row["detectors"]} - set(OURS))]
    for name in names:
        found = [row["detectors"][name] for row in counted(rows) if which in row["detectors"].get(name, {})]
        if not found:
            continue
        aurocs = [f[which]["auroc"][0] for f in found]
        each = (_mean([f[which][f"tpr_{rate}"][0] for f in found]) for rate in ("0.01", "0.05", "0.1"))
        tprs = ", ".join(f"{value:.3f}" for value in each)
        clean = _mean([f["forwards_clean"] for f in found])
        lines.append(
            f"| {name} | {len(found)} | {_mean(aurocs):.4f} | {min(aurocs):.4f} | {tprs} | {clean:.2f} "
            f"| {_mean([f['forwards_99_1'] for f in found]):.2f} | {_mean([f['forwards_50_50'] for f in found]):.2f} "
            f"| {_mean([f['microseconds'] for f in found]):.0f} |"
        )
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def targets(rows: Sequence[Row]) -> list[str]:
    """What the cascade is to reach, and what it reached."""
    ours = [row["detectors"][OURS[1]] for row in counted(rows) if "successful" in row["detectors"][OURS[1]]]
    if not ours:
        return []
    everywhere = [row["detectors"][OURS[1]] for row in rows]
    clean = [row for row in rows if row["attack"] == CLEAN]
    aurocs = [found["successful"]["auroc"][0] for found in ours]
    tpr = _mean([found["successful"]["tpr_0.01"][0] for found in ours])
    bound = max(found["fpr_lower"] for found in everywhere)
    alone, mixed = (
        max(f["forwards_clean"] for f in everywhere),
        max(f["forwards_99_1"] for f in everywhere if "forwards_99_1" in f),
    )
    opened = sum(len(row["cases"]["clean"]) for row in clean)
    unaudited = max(found["unaudited_clean"] for found in everywhere)
    lines = (
        ("mean AUROC", f"at least {AUROC}", f"{_mean(aurocs):.4f}", _mean(aurocs) >= AUROC),
        ("mean TPR at 1% FPR", f"at least {TPR}", f"{tpr:.3f}", tpr >= TPR),
        ("worst cell's AUROC", f"at least {WORST}", f"{min(aurocs):.4f}", min(aurocs) >= WORST),
        ("largest lower 95% bound of the FPR", f"at most {FPR_LOWER:.1%}", f"{bound:.2%}", bound <= FPR_LOWER),
        ("most inferences, clean traffic", f"at most {FORWARDS}", f"{alone:.2f}", alone <= FORWARDS),
        ("most inferences, 99:1", f"at most {FORWARDS}", f"{mixed:.2f}", mixed <= FORWARDS),
        ("cases opened on clean models", "none", str(opened) if clean else "not measured", bool(clean) and not opened),
    )
    return [
        "| the cascade's target | wanted | reached | |",
        "|---|---|---|---|",
        *(f"| {name} | {wanted} | {reached} | {'yes' if kept else 'no'} |" for name, wanted, reached, kept in lines),
        "",
        f"Over {len(ours)} attacked cells (successful inputs) and {len(clean)} of clean models; FPR and inferences",
        "also over the adaptive ones and those not counted as attacked. The budget caps the inferences; for that, at",
        f"most {unaudited:.2%} of a model's clean inputs were doubtful and not audited.",
    ]


def text(rows: Sequence[Row], pictures: Sequence[str] = ()) -> str:
    """The whole page. ``pictures``: names of files beside it."""
    missing = [row for row in rows if row["attack"] not in {CLEAN} and not row["attacked"]]
    held = [row for row in rows if row["attack"] not in DEVELOPED_ON or row["seed"] == FINAL_SEED]
    parts = [
        "# Detection, measured",
        "",
        _INTRODUCTION,
        "",
        *targets(rows),
        *(f"\n![{name.partition('.')[0].replace('-', ' ')}]({name})" for name in pictures),
        "",
        "## All cells",
        "",
        "Over attacked models but the adaptive one, triggered inputs that the model does call the target:",
        "",
        *means(rows, "successful"),
        "",
        "The same over all triggered inputs, also those that the trigger does not turn:",
        "",
        *means(rows, "all"),
        "",
        *_shared(rows),
        "Of the first table, attacks and seeds that the detector was not developed on (successful inputs):",
        "",
        *means(held, "successful"),
        "",
        "## Clean models",
        "",
        *clean_table(rows),
    ]
    for data, network in sorted({(row["data"], row["network"]) for row in rows}):
        own = [row for row in rows if (row["data"], row["network"]) == (data, network)]
        if any(row["attack"] != CLEAN for row in own):
            parts += ["", f"## {data}, {network}", "", "Triggered inputs that succeed:", "", *table(own, "successful")]
            parts += ["", "All triggered inputs:", "", *table(own, "all")]
    if missing:
        names = ", ".join(f"{r['data']} {r['attack']} ({r['seed']}) {r['asr_int8']:.0%}" for r in missing)
        parts += ["", "## Not counted as attacked", "", f"ASR too low: {names}."]
    return "\n".join(parts) + "\n"


def _shared(rows: Sequence[Row]) -> list[str]:
    """The means over the cells that every detector was measured on, where these are not all."""
    names = {name for row in rows for name in row["detectors"]}
    both = [row for row in counted(rows) if set(row["detectors"]) == names]
    if not both or len(both) == len(counted(rows)):
        return []
    return ["Side by side, on the cells that every detector was measured on:", "", *means(both, "successful"), ""]


def write(folder: Path, page: Path, grid: Sequence[float], edges: Sequence[float]) -> None:
    """Write the page and its pictures from the rows in a folder.

    Args:
        folder: of the rows.
        page: the Markdown file; pictures are written beside it.
        grid: the FPRs that the rows' curves were measured at.
        edges: the bounds of the bins that the rows' scores were counted in.
    """
    rows = rows_of(folder)
    pictures = {}
    attacked = counted(rows)
    if attacked:
        ranked = sorted(attacked, key=lambda row: float(row["detectors"][OURS[0]]["all"]["auroc"][0]))
        pictures = {
            "detection-roc.png": detection_plots.roc(attacked, grid),
            "detection-cost.png": detection_plots.cost(attacked),
            "detection-scores-worst.png": detection_plots.histogram(ranked[0], edges),
            "detection-scores-median.png": detection_plots.histogram(ranked[len(ranked) // 2], edges),
        }
    for name, content in pictures.items():
        files.write(content, page.with_name(name))
    files.write(text(rows, list(pictures)).encode(), page)
