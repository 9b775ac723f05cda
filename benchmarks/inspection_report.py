"""Writes the tables of docs/inspection.md from the rows that :mod:`benchmarks.inspection` measured.

Rules enforced here:

* only what stands between a table's marks is written; the text around it is a person's;
* what other code measured, or measured on a model that the zoo would make otherwise now, is marked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.zoo import CLEAN
from converters import files

Row = dict[str, Any]
OTHER_CODE, OTHER_MODEL = "\\*", "†"
_SHARES = (
    ("patch-type attacks", "named_of_patch_type"),
    ("all attacks", "named_of_all"),
    ("clean ones, accused", "clean_accused"),
)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What the tables are made of.

    Attributes:
        rows: of the zoo.
        summary: of these.
        calibrated: of calibration models.
        limits: by form, what follows from these.
        code: digest of the code as it is now.
        todays: the fingerprint that a row's model has now, None where that cannot be told.
    """

    rows: Sequence[Row]
    summary: Mapping[str, Any]
    calibrated: Sequence[Row]
    limits: Mapping[str, Any]
    code: str
    todays: Callable[[Row], str | None]


def write(document: Path, tables: Tables) -> None:
    """Put the tables between their marks."""
    text = document.read_text()
    for name, lines in (("calibration", calibration(tables)), ("measured", measured(tables))):
        begin = text.index(f"<!-- {name} -->")
        end = text.index("<!-- end -->", begin)
        text = text[:begin] + "\n".join([f"<!-- {name} -->", "", *lines, ""]) + "\n" + text[end:]
    files.write(text.encode(), document)


def calibration(tables: Tables) -> list[str]:
    """The limits and what they come from."""
    rows = tables.calibrated
    lines = ["| form | clean networks | smallest ratio | of index above 2 | limit | development attacks |"]
    lines.append("|---|---|---|---|---|---|")
    for form, found in tables.limits.items():
        above = sum(row[f"{form}_smallest"]["index"] > 2.0 for row in rows if row["attack"] == CLEAN)
        attacks = ", ".join(
            f"{row['data']} {row['attack']} {row[f'{form}_target']['ratio']:.2f}"
            for row in rows
            if row["attack"] != CLEAN
        )
        lines.append(
            f"| {form} | {found['clean_networks']} | {found['smallest_clean_ratio']:.2f} | {above} | "
            f"{found['in_use']:.2f} | {attacks} |"
        )
    other = sum(row.get("code") != tables.code for row in rows)
    if other:
        lines += ["", f"{other} of these {len(rows)} models were measured with other code than this."]
    return lines


def measured(tables: Tables) -> list[str]:
    """What the zoo's audits said."""
    counted = [row for row in tables.rows if row["attacked"] or row["attack"] == CLEAN]
    marks = {id(row): _marks(row, tables) for row in counted}
    lines = ["| models | named with the right label |", "|---|---|"]
    for name, key in _SHARES:
        pooled = [marks[id(row)] for row in counted if (row["attack"] == CLEAN) == (key == "clean_accused")]
        lines.append(f"| {_marked(name, pooled)} | {_of(tables.summary[key])} |")
    lines += ["", "| attack | named | | attack | named |", "|---|---|---|---|---|"]
    attacks = [
        (_marked(name, [marks[id(row)] for row in counted if row["attack"] == name]), _of(share))
        for name, share in tables.summary["by_attack"].items()
        if share["of"]
    ]
    pairs = [attacks[i : i + 2] for i in range(0, len(attacks), 2)]
    lines += [f"| {' | | '.join(f'{name} | {share}' for name, share in pair)} |" for pair in pairs]
    lines += ["", "| model | verdict | labels | target | patch ratio | blend ratio | seconds | processor |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in sorted(counted, key=lambda row: (row["data"], row["network"], row["attack"], row["seed"])):
        ratios = [row.get(f"{form}_{'smallest' if row['target'] is None else 'target'}") for form in ("patch", "blend")]
        cells = [
            _marked(f"{row['data']} {row['network']} {row['attack']} {row['seed']}", [marks[id(row)]]),
            row["verdict"].replace("_", " "),
            ", ".join(map(str, row["labels"])) or "-",
            "-" if row["target"] is None else str(row["target"]),
            *("-" if ratio is None else f"{ratio['ratio']:.2f}" for ratio in ratios),
            f"{row['seconds']:.0f}",
            f"{row['processor_seconds']:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    said = {
        OTHER_CODE: f"{OTHER_CODE}: measured with other code than this; not measured again since.",
        OTHER_MODEL: f"{OTHER_MODEL}: measured on a model that the zoo's recipe would make otherwise now.",
    }
    used = [text for mark, text in said.items() if any(mark in of for of in marks.values())]
    return [*lines, "", *used] if used else lines


def _marks(row: Row, tables: Tables) -> list[str]:
    found = [] if row.get("code") == tables.code else [OTHER_CODE]
    now = tables.todays(row)
    return found if now in {None, row["fingerprint"]} else [*found, OTHER_MODEL]


def _marked(name: str, marks: Sequence[Sequence[str]]) -> str:
    """A name with every mark that one of its rows has."""
    return " ".join([name, *(mark for mark in (OTHER_CODE, OTHER_MODEL) if any(mark in of for of in marks))])


def _of(share: Mapping[str, Any]) -> str:
    return f"{share['count']} of {share['of']}" if share["of"] else "not measured"
