"""Writes docs/repair.md from the rows that :mod:`benchmarks.repair` measured.

Rules enforced here:

* figures before and after are of the same models, and each part's own, on the same test inputs;
* a repair that failed, or could not be applied, leaves the model as it was: it counts with the figures before;
* models whose attack does not work are left out, and counted;
* what other code measured, or measured on a model that the zoo would make otherwise now, is marked in every table.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]
OTHER_CODE, OTHER_MODEL = "\\*", "†"


def line(row: Row) -> str:
    """One row for a person who watches."""
    said = []
    for part in ("auto", "quarantined"):
        if part in row:
            found = row[part]
            by = "" if "accuracy" not in found else f" by {found['method']}"
            said.append(f"{part}: {_pair(row['measured'][part]['before'])} -> {told(found)}{by}")
    return "; ".join(said) or "no part with a gate"


def told(found: Mapping[str, Any]) -> str:
    """One result for a person who watches."""
    if "accuracy" in found:
        return _pair(found)
    return str(found.get("not_applied") or found.get("failed") or found.get("reason"))


def _pair(found: Mapping[str, Any]) -> str:
    return f"{found['accuracy']:.1%}" + (f"/{found['asr']:.1%}" if "asr" in found else "")


def _pooled(rows: Sequence[Row], part: str) -> list[tuple[tuple[str, str, str], list[Row]]]:
    """Rows that have a part, by data, network and attack: seeds together."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if part in row:
            found.setdefault((row["data"], row["network"], row["attack"]), []).append(row)
    return sorted(found.items())


def _result(row: Row, part: str, *keys: str) -> Row | None:
    """One result; None where it was not measured."""
    at: Any = row[part]
    for key in keys:
        at = at.get(key) if isinstance(at, dict) else None
    return at if isinstance(at, dict) else None


def _before(rows: Sequence[Row], part: str) -> str:
    """Mean accuracy and ASR before the repair, in percent."""
    figures = [row["measured"][part]["before"] for row in rows]
    asr = [found["asr"] for found in figures if "asr" in found]
    text = f"{100 * float(np.mean([found['accuracy'] for found in figures])):.1f}"
    return text + (f" / {100 * float(np.mean(asr)):.1f}" if asr else "")


def _change(rows: Sequence[Row], part: str, *keys: str) -> str:
    """Mean accuracy in points against before, and mean ASR in percent, of rows that were all measured."""
    changes, asr = [], []
    for row in rows:
        before = row["measured"][part]["before"]
        after = _result(row, part, *keys) or {}
        after = after if "accuracy" in after else before
        changes.append(after["accuracy"] - before["accuracy"])
        asr += [after["asr"]] if "asr" in before else []
    text = f"{100 * float(np.mean(changes)):+.1f}"
    return text + (f" / {100 * float(np.mean(asr)):.1f}" if asr else "")


def _cell(group: Sequence[Row], part: str, *keys: str) -> str:
    """A change; of how many models where it was not applied to all, and what was before where not all were measured."""
    have = [row for row in group if _result(row, part, *keys) is not None]
    done = [row for row in have if "accuracy" in (_result(row, part, *keys) or {})]
    if not have:
        return "-"
    if not done:
        return "failed" if any("failed" in (_result(row, part, *keys) or {}) for row in have) else "not applied"
    text = _change(have, part, *keys)
    if len(done) < len(have):
        text += f" ({len(done)} of {len(have)} applied)"
    if len(have) < len(group):
        text += f" (of {len(have)}, before: {_before(have, part)})"
    return text


def write(results: Path, target: Path, *, code: str, todays: Callable[[Row], str | None]) -> None:
    """Write the report.

    Args:
        results: the folder of rows.
        target: the file to write.
        code: digest of the code as it is now; what other code measured is marked.
        todays: the fingerprint that a row's model has now, None where that cannot be told.
    """
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    counted = [row for row in rows if row["attacked"] is not False]
    fingerprints = [todays(row) for row in counted]
    others = {id(row) for row, now in zip(counted, fingerprints, strict=True) if now not in {None, row["fingerprint"]}}

    def marked(name: str, group: Sequence[Row], part: str) -> str:
        marks = [OTHER_CODE] if any(row["measured"][part]["code"] != code for row in group) else []
        marks += [OTHER_MODEL] if any(id(row) in others for row in group) else []
        return " ".join([name, *marks])

    tables = [
        _by_gate(counted, "auto", marked),
        _by_gate(counted, "quarantined", marked),
        _methods(counted, marked),
        _shares(counted, marked),
        _liars(counted, marked),
    ]
    notes = _notes(rows, "".join(tables), unknown=fingerprints.count(None))
    target.write_text("\n\n".join(part.strip() for part in (_HEAD, notes, *tables, _TAIL) if part) + "\n")


_Marked = Callable[[str, Sequence[Row], str], str]


def _notes(rows: Sequence[Row], tables: str, *, unknown: int) -> str:
    """What a reader must know of the rows as a whole."""
    notes = ["Models of the zoo that are not in a table were not measured; a cell of - was not measured either."]
    if left_out := sum(row["attacked"] is False for row in rows):
        notes.append(f"Left out: {left_out} measured, whose attack does not work.")
    if OTHER_CODE in tables:
        notes.append(
            f"{OTHER_CODE}: measured with other code than this, of repair, inspection, detection, attacks or "
            "conversion; not measured again since."
        )
    if OTHER_MODEL in tables:
        notes.append(f"{OTHER_MODEL}: measured on a model that the zoo's recipe would make otherwise now.")
    if unknown:
        notes.append(f"Of {unknown} it was not looked at whether the zoo would still make them so: no data here.")
    used = {
        ", ".join(f"{name} {version}" for name, version in stamp["libraries"].items())
        for row in rows
        for stamp in row["measured"].values()
        if stamp["libraries"]
    }
    if used:
        notes.append(f"Libraries: {'; '.join(sorted(used))}.")
    return "\n".join(notes)


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *lines))


def _by_gate(rows: Sequence[Row], part: str, marked: _Marked) -> str:
    lines = []
    for (data, network, attack), group in _pooled(rows, part):
        outcomes = Counter(row[part].get("outcome", "not applied") for row in group)
        methods = sorted({row[part]["method"] for row in group if "accuracy" in row[part]})
        lines.append(
            [
                data, network, marked(attack, group, part), str(len(group)), _before(group, part),
                _change(group, part), ", ".join(methods) or "none",
                ", ".join(f"{count} of {len(group)} {outcome}" for outcome, count in sorted(outcomes.items())),
                _minutes(group, part),
            ]
        )  # fmt: skip
    header = ("data", "network", "attack", "seeds", "before", "after", "by", "gate", "minutes")
    return f"{_GATED[part]}\n\n" + _table(header, lines) if lines else ""


def _minutes(group: Sequence[Row], part: str) -> str:
    """Mean minutes a model, the wall clock's and the processor's; - where one of them is not known."""
    means = []
    for name in ("seconds", "processor_seconds"):
        spent = [row[part].get(name) for row in group]
        known = [seconds for seconds in spent if seconds is not None]
        means.append(f"{np.mean(known) / 60:.1f}" if known and len(known) == len(spent) else "-")
    return " / ".join(means)


def _methods(rows: Sequence[Row], marked: _Marked) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("methods", {})))
    lines = [
        [
            data, network, marked(attack, group, "methods"), str(len(group)), _before(group, "methods"),
            *(_cell(group, "methods", name) for name in names),
        ]
        for (data, network, attack), group in _pooled(rows, "methods")
    ]  # fmt: skip
    header = ("data", "network", "attack", "seeds", "before", *names)
    return "## Each method alone\n\n" + _table(header, lines) if lines else ""


def _shares(rows: Sequence[Row], marked: _Marked) -> str:
    shares = sorted({share for row in rows for share in row.get("shares", {})}, key=float)
    lines = [
        [
            data, network, marked(attack, group, "shares"), str(len(group)), _before(group, "shares"),
            *(_cell(group, "shares", share) for share in shares),
        ]
        for (data, network, attack), group in _pooled(rows, "shares")
    ]  # fmt: skip
    header = ("data", "network", "attack", "seeds", "before", *(f"{float(share):.0%}" for share in shares))
    return _SHARES + _table(header, lines) if lines else ""


def _liars(rows: Sequence[Row], marked: _Marked) -> str:
    shares = sorted({share for row in rows for share in row.get("liars", {})}, key=float)
    lines = []
    for (data, network, attack), group in _pooled(rows, "liars"):
        names = list(dict.fromkeys(name for row in group for found in row["liars"].values() for name in found))
        for name in names:
            cells = (_cell(group, "liars", share, name) for share in shares)
            before = _before(group, "liars")
            lines.append([data, network, marked(attack, group, "liars"), str(len(group)), before, name, *cells])
    header = ("data", "network", "attack", "seeds", "before", "rule", *(f"{float(s):.0%} liars" for s in shares))
    return "## Federated pruning with devices that lie\n\n" + _table(header, lines) if lines else ""


_HEAD = """# Repair: how well backdoors are removed

Written by `python -m benchmarks.repair --report` from `benchmarks/results/repair`; `make bench-repair` measures. All
numbers are those of int8 files on test inputs that neither repair nor evidence saw, with the attacker's own trigger.
Cells of `before` read: clean accuracy / attack success rate (ASR), in percent; others: accuracy in points against
before / ASR in percent. ASR: of test inputs that are not of the target label and that the model does not call so
without the trigger, the share that it calls so with it. Seeds are pooled. A repair that failed or could not be applied
leaves the model as it was, and counts so. Minutes: a model's mean, by the wall clock of a machine that others may use
too / of its processor.

What the repair knows: the owner's clean inputs, and the mean features of what devices flagged, false alarms among it.
Never the trigger.
"""

_GATED = {
    "auto": "## What auto makes of each model",
    "quarantined": """## With quarantined inputs

Owners shared at most 50 of the inputs that devices flagged, false alarms among them. Excision and unlearning alone.""",
}

_SHARES = """## Unlearning with less clean data

Shares of the training set and the owner's inputs together. They are all that the repair has: two thirds of them seek
triggers, a third judges these, all of them train and set the ranges of int8. The guard that devices run, and so what
they report, is calibrated with everything that the owner has.

"""

_TAIL = """## Published rows to beat

| what | published | source |
|---|---|---|
| federated pruning, Fashion-MNIST | ASR 99.7 -> 1.9 at -5.5 points; with fine-tuning 6.4 at -1.7 | Wu et al. [1] |
| federated pruning, distributed backdoor, CIFAR-10 | more than 70 points at less than -2 | Wu et al. [1] |
| l-infinity pruning, GTSRB, recovered trigger | ASR 81.6 -> 48.4 | Cheng et al., arXiv 2002.12162 |
| fine-pruning, traffic signs; pruning-aware | .991 -> .288; .899 -> .366 | Liu et al., RAID 2018 |
| BackdoorBench, GTSRB, best (Neural Cleanse), mean of 8 attacks | accuracy 96.8, ASR 1.3 | BackdoorBench |

[1] arXiv 2011.01767. These were measured on other, larger networks and in float32.

## How it works

`edgeguard/repair/recover.py` seeks triggers of three forms (a patch, an overlay, a warp) that turn clean inputs to the
reported label and move the channel norms as devices reported. `methods/unlearning.py` teaches the model to give the
original's own clean answers with the trigger on. `auto.py` tries every method in order of cost and holds each result
against `gate.py`: clean accuracy, recall of every class, recovered and kept triggers, quarantined inputs, a re-audit.
The re-audit reads the guarded int8 file. With a case of a trainable model it looks at the case's label, with a
quarter of an audit's steps, and then seeks what devices reported; else it looks at every label. Whether a trigger that
works and is more than 1.5 times the size that the original had is the same one, nothing tells: then the re-audit cannot
be checked. Nor can it be with three classes or fewer, nor the recall rule with fewer than 100 held-out inputs of a
class: "needs approval".

## `edgeguard repair MODEL --data CLEAN --evidence CASE.json`

`CLEAN` is divided by its groups where it has any: a third repairs, the rest calibrates and judges. A repair that passed
is written with its sidecar beside it. One that needs approval waits in `.OUTPUT.work` beside it, with its report; the
same command with `--approve` writes that very file. An interrupted run goes on there.

With a `.keras` file, `--guarded FILE` names the file that was made of it and that devices run: evidence is of that one,
and one that is converted anew with other inputs has another digest.

`CASE.json` is what a fleet reported of one model: `edgeguard hub case N --evidence CASE.json` writes it, without
`rankings`, `ballots` and `quarantined`. Vectors are in the order of the guarded file's `edgeguard_features`; numbers of
layers' channels count from 0. Only the first three entries are needed:

| entry | what it is |
|---|---|
| `model_digest` | the guarded file's, 64 hex digits: evidence of another model is refused |
| `label` | number of the class that triggered inputs are called |
| `flagged_mean` | mean features of inputs that devices flagged and called `label` |
| `unflagged_mean` | mean features of inputs that they called so and did not flag |
| `dormant` | `[{"layer": NAME, "channels": [...]}]`: the least active ones first, put together of all devices |
| `rankings`, `ballots` | `{"LAYER": [[...], ...]}`: one list of channels a device, the least active first |
| `quarantined` | path, from this file on, of an npz with `x` or an npy: `uint8 [N, H, W, C]` that owners shared |
"""
