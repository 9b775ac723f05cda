"""Writes the tables of docs/private.md from the rows of benchmarks/results/private.json.

    python -m benchmarks.private_report

Rules enforced here:

* only what stands between the marks is written; the text around it is a person's;
* a row of other code than today's is marked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import digests
from benchmarks.private_inspection import DEPENDS, RESULTS, STEPS
from converters import files

Row = Mapping[str, Any]
DOCUMENT = Path("docs/private.md")
OTHER_CODE = "\\*"
_SAID = {"backdoored": "backdoored", "no_sign": "no sign", "could_not_check": "could not check"}


def tables(kept: Mapping[str, Sequence[Row]], code: str) -> dict[str, list[str]]:
    """Lines of each table, by its mark. ``code``: today's digest."""
    whole = [row for row in kept.get("inspections", ()) if row["steps"] == STEPS]
    late = [row for row in kept.get("inspections", ()) if row["steps"] != STEPS]
    return {
        "inspections": _inspections(whole, code),
        "repairs": _repairs([row for row in whole if "repaired" in row], code),
        "latency": _latency(late, code),
        "growth": _growth(kept.get("growth", ()), code),
        "power": _power(kept.get("power_of_features", ()), code),
        "aggregation": _aggregation(kept.get("rows", ())),
    }


def _name(row: Row, code: str) -> str:
    return f"{row['model']}{'' if row.get('code') == code else OTHER_CODE}"


def _labels(labels: Sequence[int]) -> str:
    return ", ".join(map(str, labels)) or "none"


def _mb(row: Row, key: str = "sent_mb") -> str:
    low, high = (f"{of(row[key]):.0f}" for of in (min, max))
    return low if low == high else f"{low} to {high}"


def _inspections(rows: Sequence[Row], code: str) -> list[str]:
    lines = [
        "| model | space, layers | target | private: verdict, labels | in clear the same "
        "| 1,000 steps in clear, labels | size error | time | a party sends, MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        target = "none" if row["target"] is None else row["target"]
        lines.append(
            f"| {_name(row, code)} | {row['space']}, {'-'.join(map(str, row['layers']))} | {target} "
            f"| {_SAID[row['verdict']]}, {_labels(row['labels'])} | {'yes' if row['same'] else '**no**'} "
            f"| {_labels(row['long']['labels']) if row.get('long') else ''} | {row['norm_error']:.2%} "
            f"| {row['seconds']:.0f} s | {_mb(row)} |"
        )
    same = sum(bool(row["same"]) for row in rows)
    compared = [row for row in rows if row.get("long")]
    alike = sum(bool(row["labels"]) == bool(row["long"]["labels"]) for row in compared)
    lines += [
        "",
        f"{same} of {len(rows)} with the verdict and labels that they have in clear; {alike} of {len(compared)} with "
        "the verdict of 1,000 steps.",
    ]
    return lines


def _repairs(rows: Sequence[Row], code: str) -> list[str]:
    lines = [
        "| model | before: accuracy, attack success | mended by three parties | mended in clear | time "
        "| a party sends, MB |",
        "|---|---|---|---|---|---|",
    ]

    def worth(found: Mapping[str, float]) -> str:
        return f"{found['accuracy']:.1f}%" + (f", {found['asr']:.1f}%" if "asr" in found else "")

    for row in rows:
        lines.append(
            f"| {_name(row, code)} | {worth(row['before'])} | {worth(row['repaired'])} "
            f"| {worth(row['repaired_in_clear'])} | {row['repair_seconds']:.0f} s | {_mb(row, 'repair_sent_mb')} |"
        )
    return lines


def _latency(rows: Sequence[Row], code: str) -> list[str]:
    lines = ["| model | added to a line | a step |", "|---|---|---|"]
    for row in sorted(rows, key=lambda row: float(row["latency_ms"])):
        lines.append(f"| {_name(row, code)} | {row['latency_ms']:.0f} ms | {row['step_s']:.2f} s |")
    return lines


def _growth(rows: Sequence[Row], code: str) -> list[str]:
    lines = [
        "| layers | inputs sought on | a step | a party sends a step, MB | estimated |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        sent = max(row["sent_mb"]) / row["steps"]
        lines.append(
            f"| {_name(row, code)} | {row['sought']} | {row['step_s']:.2f} s | {sent:.0f} "
            f"| {row['estimated_mb'] / row['steps']:.0f} |"
        )
    return lines


def _power(rows: Sequence[Row], code: str) -> list[str]:
    lines = [
        f"| model | target | labels at {STEPS} steps | smallest, ratio | labels at 1,000 | smallest, ratio |",
        "|---|---|---|---|---|---|",
    ]

    def found(one: Row) -> str:
        ratio = "none to compare" if one["ratio"] is None else f"{one['smallest']}, {one['ratio']:.2f}"
        return f"{_labels(one['labels'])} | {ratio}"

    for row in rows:
        target = "none" if row["target"] is None else row["target"]
        long = found(row["long"]) if "long" in row else " | "
        lines.append(f"| {_name(row, code)} | {target} | {found(row)} | {long} |")
    attacked = [row for row in rows if row["target"] is not None]
    clean = [row for row in rows if row["target"] is None]
    named = sum(row["target"] in row["labels"] for row in attacked)
    alike = [row for row in rows if "long" in row]
    lines += [
        "",
        f"Of {len(attacked)} attacked models {named} are named with their label, of {len(clean)} clean ones "
        f"{sum(bool(row['labels']) for row in clean)} accused; {sum(row['same_verdict'] for row in alike)} of "
        f"{len(alike)} have the verdict of 1,000 steps.",
    ]
    return lines


def _aggregation(rows: Sequence[Row]) -> list[str]:
    lines = [
        "| devices x channels | what they send | the same in clear | time | in clear | between the parties, MB |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['devices']:,} x {row['channels']} | {row['kind']} | {'yes' if row['same'] else '**no**'} "
            f"| {row['private_s']:.1f} s | {row['clear_s'] * 1000:.1f} ms | {row['loopback_mb']:.0f} |"
        )
    return lines


def write(document: Path, results: Path) -> None:
    """Put the tables between their marks."""
    text = document.read_text()
    for name, lines in tables(json.loads(results.read_text()), digests.code_digest(DEPENDS)).items():
        begin = text.index(f"<!-- {name} -->")
        end = text.index("<!-- end -->", begin)
        text = text[:begin] + "\n".join([f"<!-- {name} -->", "", *lines, ""]) + "\n" + text[end:]
    files.write(text.encode(), document)


if __name__ == "__main__":
    write(digests.ROOT / DOCUMENT, digests.ROOT / RESULTS)
    sys.exit(0)
