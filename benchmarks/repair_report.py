"""Writes docs/repair.md from the rows that :mod:`benchmarks.repair` measured."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

Row = dict[str, Any]


def line(row: Row) -> str:
    """One row for a person who watches."""
    text = f"before {_pair(row['before'])}"
    for part in ("auto", "quarantined"):
        if part in row:
            text += f"; {part}: {row[part]['method'] or 'none passed'}"
            text += f" {_pair(row[part])}" if "accuracy" in row[part] else ""
    return text


def _pair(found: Row) -> str:
    return f"{found['accuracy']:.1%}" + (f"/{found['asr']:.1%}" if "asr" in found else "")


def _pooled(rows: Sequence[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """Rows by data, network and attack: seeds together."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["data"], row["network"], row["attack"]), []).append(row)
    return dict(sorted(found.items()))


def _mean(rows: Iterable[Row], *keys: str) -> float | None:
    values = []
    for row in rows:
        at: Any = row
        for key in keys:
            at = at.get(key) if isinstance(at, dict) else None
        if isinstance(at, int | float):
            values.append(float(at))
    return float(np.mean(values)) if values else None


def _change(rows: Sequence[Row], *keys: str) -> str:
    """Accuracy in points against before, and ASR in percent."""
    have = [row for row in rows if _mean([row], *keys, "accuracy") is not None]
    after, before = _mean(have, *keys, "accuracy"), _mean(have, "before", "accuracy")
    if after is None or before is None:
        return "-"
    asr = _mean(have, *keys, "asr")
    return f"{100 * (after - before):+.1f}" + ("" if asr is None else f" / {100 * asr:.1f}")


def write(results: Path, target: Path, *, code: str) -> None:
    """Write the report.

    Args:
        results: the folder of rows.
        target: the file to write.
        code: digest of the code as it is now; rows of other code are marked.
    """
    rows = [json.loads(path.read_text()) for path in sorted(results.glob("*.json"))]
    parts = [_HEAD, _main(rows, code), _methods(rows), _shares(rows), _liars(rows), _TAIL]
    target.write_text("\n\n".join(part.strip() for part in parts if part) + "\n")


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    ruler = ["---"] * len(header)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (header, ruler, *lines))


def _main(rows: Sequence[Row], code: str) -> str:
    lines = []
    for (data, network, attack), group in _pooled(rows).items():
        auto = [row for row in group if "auto" in row]
        outcomes = sorted({row["auto"]["outcome"] for row in auto})
        methods = sorted({row["auto"]["method"] or "none" for row in auto})
        before = _mean(group, "before", "accuracy")
        asr = _mean(group, "before", "asr")
        lines.append(
            [
                data, network, attack + ("" if all(row.get("code") == code for row in group) else " \\*"),
                str(len(group)),
                "-" if before is None else f"{100 * before:.1f}" + ("" if asr is None else f" / {100 * asr:.1f}"),
                _change(group, "auto"), ", ".join(methods), ", ".join(outcomes) or "not run",
                _change(group, "quarantined"),
            ]
        )  # fmt: skip
    header = ("data", "network", "attack", "seeds", "before", "auto", "by", "gate", "with 50 quarantined inputs")
    missing = "Models of the zoo that are not in a table were not measured; an empty cell was not measured either."
    if any(row.get("code") != code for row in rows):
        missing += (
            "\n\\*: measured with other code than this, of repair, inspection or conversion; not measured again since."
        )
    return f"## What auto makes of each model\n\n{missing}\n\n" + _table(header, lines)


def _methods(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row.get("methods", {})))
    lines = [
        [data, network, attack, *(_change(group, "methods", name) for name in names)]
        for (data, network, attack), group in _pooled([row for row in rows if "methods" in row]).items()
    ]
    return "## Each method alone\n\n" + _table(("data", "network", "attack", *names), lines) if lines else ""


def _shares(rows: Sequence[Row]) -> str:
    shares = list(dict.fromkeys(share for row in rows for share in row.get("shares", {})))
    lines = [
        [data, network, attack, *(_change(group, "shares", share) for share in shares)]
        for (data, network, attack), group in _pooled([row for row in rows if "shares" in row]).items()
    ]
    header = ("data", "network", "attack", *(f"{float(share):.0%}" for share in shares))
    text = "## Unlearning with less clean data\n\nShares of the training set; - where the owner has fewer.\n\n"
    return text + _table(header, lines) if lines else ""


def _liars(rows: Sequence[Row]) -> str:
    have = [row for row in rows if "liars" in row]
    if not have:
        return ""
    shares = list(have[0]["liars"])
    names = list(have[0]["liars"][shares[0]])
    lines = [
        [data, network, attack, name, *(_change(group, "liars", share, name) for share in shares)]
        for (data, network, attack), group in _pooled(have).items()
        for name in names
    ]
    header = ("data", "network", "attack", "rule", *(f"{float(share):.0%} liars" for share in shares))
    return "## Federated pruning with devices that lie\n\n" + _table(header, lines)


_HEAD = """# Repair: how well backdoors are removed

Written by `python -m benchmarks.repair --report` from `benchmarks/results/repair`; `make bench-repair` measures. All
numbers are those of int8 files on test inputs that neither repair nor evidence saw, with the attacker's own trigger.
Cells read: clean accuracy in points against before / attack success rate (ASR) in percent. ASR: of test inputs that are
not of the target label and that the model does not call so without the trigger, the share that it calls so with it.

What the repair knows: the owner's clean inputs, and the mean features of what devices flagged, false alarms among it;
in the last column of the first table also 50 quarantined inputs. Never the trigger.
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
quarter of an audit's steps, and then seeks what devices reported, where a trigger of more than 1.5 times the size
that the original had counts as another; else it looks at every label. With fewer than 100 held-out inputs of a class
the recall rule cannot be checked, with three classes or fewer the re-audit: "needs approval".

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
