"""The demo's report: one self-contained HTML page, and its plots as PNG files beside it.

Rules enforced here:

* the page loads nothing: pictures are data URIs, styles are inline, there is no script;
* every text from outside is escaped, every picture from outside is decoded and written anew;
* what is missing or not a finite number reads "not available"; only what was measured and passed reads as a success;
* each file appears whole or not at all, and the page last; an error leaves nothing half-written behind.
"""

from __future__ import annotations

import base64
import contextlib
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import msgspec
import numpy as np
import numpy.typing as npt
from PIL import Image

from edgeguard import disk
from edgeguard.demo import plots
from edgeguard.demo.plots import MISSING, percent, plain
from edgeguard.demo.record import CHECKED_DATA, Check, Metrics, Record, Samples
from edgeguard.errors import ConfigError

PAGE = "index.html"
OVERVIEW = "overview.png"

MAX_SAMPLES = 8
MAX_CHANNELS = 24
MAX_PICTURE = 2048
"""Longest side in pixels of a picture that the page takes over."""

MEANINGS: Mapping[str, str] = {
    "data": "data set",
    "clean_accuracy_before": "accuracy on clean test inputs, attacked int8 model",
    "clean_accuracy_after": "accuracy on clean test inputs, repaired int8 model",
    "asr_before": "attack success rate, attacked int8 model",
    "asr_after": "attack success rate, repaired int8 model",
    "auroc": "how well the score tells triggered from clean inputs: 1 is perfect, 0.5 is chance",
    "tpr": "share of the triggered inputs that are flagged",
    "tpr_successful": "the same, over the triggered inputs that fool the model",
    "fpr": "share of the clean inputs that are flagged by mistake",
    "latency_bare_us": "median time of one inference without the detector, µs",
    "latency_guarded_us": "median time of one inference with the detector inside, µs",
    "inputs_sent": "inputs that the feeder gave to the devices",
    "inputs_processed": "inputs that the hub's database accounts for",
    "reports_published": "reports that the devices wrote",
    "reports_stored": "reports in the hub's database",
    "devices": "devices in the fleet",
    "devices_updated": "devices that run the repaired model",
    "tampered_refused": "whether a tampered model file was refused",
    "wall_s": "duration of the run, s",
    "n_clean": "clean inputs scored for the false-positive rate",
    "n_triggered": "triggered inputs scored for the true-positive rate",
}

_PLOTS: Mapping[str, tuple[Callable[[Record, plots.Form], bytes], plots.Form]] = {
    "before-after": (plots.before_after, plots.HALF),
    "scores": (plots.scores, plots.WIDE),
    "timeline": (plots.timeline, plots.WIDE),
    "latency": (plots.latency, plots.WIDE),
}
"""Each plot, and how large it is drawn where there is room."""


def render(record: Record, folder: Path) -> Path:
    """Write ``index.html`` and the PNG files of its plots, ``overview.png`` among them, into ``folder``.

    The folder is made where it does not exist; files of the same names are replaced.

    Returns:
        The page's path.

    Raises:
        ConfigError: the folder cannot be made or written, or the disk is full.
    """
    files: dict[str, bytes] = {OVERVIEW: plots.overview(record)}
    figures: dict[str, dict[str, str]] = {}
    for name, (draw, wide) in _PLOTS.items():
        files[f"{name}.png"] = draw(record, wide)
        figures[name] = {
            "wide": _uri(files[f"{name}.png"]),
            "wide_dark": _uri(draw(record, replace(wide, theme=plots.DARK))),
            "narrow": _uri(draw(record, plots.NARROW)),
            "narrow_dark": _uri(draw(record, replace(plots.NARROW, theme=plots.DARK))),
        }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("edgeguard.demo", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(_view(record), figures=figures)
    # A name from a file system may hold lone surrogates, which UTF-8 cannot carry.
    files[PAGE] = page.encode("utf-8", "replace")
    _write(folder, files)
    return folder / PAGE


def outcome(metrics: Metrics, checks: Sequence[Check]) -> tuple[str, str]:
    """The run in one sentence, and its tone: ``good``, ``bad`` or ``open`` where nothing was judged."""
    failed = [check for check in checks if not check.passed]
    listed = "; ".join(f"{plain(check.rule)} (measured {_measured(check)})" for check in failed)
    count = f"{len(failed)} of {len(checks)}"
    if not checks:
        return "Nothing was checked: this run holds no promises against its measurements.", "open"
    if metrics.data not in CHECKED_DATA:
        kept = f"{count} do not hold here: {listed}" if failed else f"all {len(checks)} hold here"
        return f"The demo makes no promises for this data set; of its usual ones, {kept}.", "open"
    if failed:
        return f"{count} promises failed: {listed}.", "bad"
    return (
        f"All {len(checks)} promises were kept: the backdoor was detected on the devices and removed at the hub, and "
        "every device runs the repaired model.",
        "good",
    )


def _view(record: Record) -> dict[str, Any]:
    """Everything that the template shows, as text and data URIs."""
    m = record.metrics
    sentence, tone = outcome(m, record.checks)
    words = ("kept", "failed") if m.data in CHECKED_DATA else ("holds", "does not hold")
    return {
        "data": plain(m.data),
        "attack": plain(record.attack),
        "target": plain(record.target),
        "devices": m.devices,
        "sentence": sentence,
        "tone": tone,
        "before_after": [
            ("Clean accuracy", *_change(m.clean_accuracy_before, m.clean_accuracy_after)),
            ("Attack success rate (ASR)", *_change(m.asr_before, m.asr_after)),
        ],
        "samples": _samples(record.samples),
        "scores": [
            ("AUROC", _real(m.auroc, ".4f"), MEANINGS["auroc"]),
            ("True-positive rate", percent(m.tpr), f"{MEANINGS['tpr']}; measured on {m.n_triggered}"),
            ("of those that fool the model", percent(m.tpr_successful), MEANINGS["tpr_successful"]),
            ("False-positive rate", percent(m.fpr), f"{MEANINGS['fpr']}; measured on {m.n_clean}"),
        ],
        "timeline": [(_real(e.at_s, ".1f"), plain(e.actor), plain(e.text)) for e in record.timeline],
        "real_trigger": _real_trigger(record.samples),
        "found_trigger": {name: _picture(record.trigger_images.get(name)) for name in ("mask", "pattern", "example")},
        "case": _case(record.case),
        "latency_ratio": _ratio(m.latency_guarded_us, m.latency_bare_us),
        "promises": [
            (plain(c.rule), MEANINGS.get(c.rule.split(" ")[0], ""), _measured(c), words[not c.passed], bool(c.passed))
            for c in record.checks
        ],
        "metrics": [(name, _raw(value), MEANINGS.get(name, "")) for name, value in msgspec.structs.asdict(m).items()],
    }


def _samples(shown: Samples) -> list[dict[str, Any]]:
    def name(names: Sequence[str], i: int) -> str:
        return plain(names[i]) if i < len(names) else MISSING

    return [
        {
            "clean": _uri(plots.picture(shown.clean[i])),
            "triggered": _uri(plots.picture(shown.triggered[i])),
            "label": name(shown.labels, i),
            "clean_before": name(shown.clean_before, i),
            "triggered_before": name(shown.triggered_before, i),
            "triggered_after": name(shown.triggered_after, i),
        }
        for i in range(min(MAX_SAMPLES, len(shown.clean), len(shown.triggered)))
    ]


def _real_trigger(shown: Samples) -> dict[str, str | None]:
    """The attacker's trigger in the terms of the recovered one: where it paints, what it paints, an example."""
    count = min(len(shown.clean), len(shown.triggered))
    if not count or shown.clean.shape[1:] != shown.triggered.shape[1:]:
        return {"mask": None, "pattern": None, "example": None}
    changed = (shown.clean[:count] != shown.triggered[:count]).any(axis=(0, 3))[..., np.newaxis]
    painted: npt.NDArray[np.uint8] = np.where(changed, np.median(shown.triggered[:count], axis=0), 0).astype(np.uint8)
    return {
        "mask": _uri(plots.picture((changed * 255).astype(np.uint8))),
        "pattern": _uri(plots.picture(painted)),
        "example": _uri(plots.picture(shown.triggered[0])),
    }


def _case(case: Mapping[str, object]) -> dict[str, Any]:
    """The hub's summary as rows of text. Its content comes from another process, so every part may be absent."""
    finding = _mapping(case.get("finding"))
    gate = _mapping(case.get("gate"))
    checks = _mappings(gate.get("checks"))
    pruned = _mappings(case.get("pruned"))
    unit = " of full strength" if finding.get("form") == "blend" else " pixels"
    numbers = (
        ("Success on inputs it was not made from", "success", ".1%", ""),
        ("Size of the recovered trigger", "size", ".2f", unit),
        ("Size that other labels need (median)", "control_size", ".2f", unit),
        ("Agreement with the devices' evidence, 1 is full", "agreement", ".2f", ""),
    )
    return {
        "outcome": _text(finding.get("outcome")).replace("_", " "),
        "reason": _text(finding.get("reason")),
        "numbers": [(title, _real(finding.get(key), form, unit)) for title, key, form, unit in numbers],
        "rounds": _real(case.get("rounds"), ".0f"),
        "pruned": None
        if pruned is None
        else [(_text(c.get("layer")), _real(c.get("channel"), ".0f"), _real(c.get("shift"), "+.1f")) for c in pruned],
        "shown": MAX_CHANNELS,
        "gate": _state(gate.get("passed")),
        "checks": None
        if checks is None
        else [
            (_text(c.get("name")), _real(c.get("measured"), "+.4f"), _real(c.get("limit"), ".4f"), _gate_state(c))
            for c in checks
        ],
    }


def _gate_state(check: Mapping[str, object]) -> str:
    """A pass counts only together with its measurement."""
    state = _state(check.get("passed"))
    return MISSING if state == "passed" and not _is_number(check.get("measured")) else state


def _state(passed: object) -> str:
    return {True: "passed", False: "failed"}[passed] if isinstance(passed, bool) else MISSING


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _mappings(value: object) -> list[Mapping[str, object]] | None:
    return [_mapping(entry) for entry in value] if isinstance(value, list | tuple) else None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool) and math.isfinite(value)


def _real(value: object, form: str, unit: str = "") -> str:
    return f"{value:{form}}{unit}" if _is_number(value) else MISSING


def _text(value: object) -> str:
    return (plain(value) if isinstance(value, str) else "") or MISSING


def _raw(value: object) -> str:
    if isinstance(value, bool | np.bool_):
        return str(value).lower()
    return (
        plain(value) if isinstance(value, str) else _real(value, "d" if isinstance(value, int | np.integer) else ".6g")
    )


def _measured(check: Check) -> str:
    return re.sub(r"\bnan\b", MISSING, plain(check.measured))


def _change(before: float, after: float) -> tuple[str, str, str]:
    points = (after - before) * 100
    return percent(before), percent(after), _real(points, "+.1f", " points")


def _ratio(guarded: float, bare: float) -> str:
    ratio = guarded / bare if bare > 0 else math.nan
    return _real(ratio, ".2f")


def _picture(path: Path | None) -> str | None:
    """A PNG file as a data URI, decoded and encoded anew; None where that is not possible."""
    if path is None:
        return None
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if max(image.size) > MAX_PICTURE:
                return None
            return _uri(plots.picture(np.asarray(image.convert("RGB"))))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files beside their places first, then move each to its place in the given order."""
    made = False
    partial = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        made = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            with partial[name].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name in files:
            partial[name].replace(folder / name)
        disk.sync(folder)
    except OSError as error:
        for path in partial.values():
            with contextlib.suppress(OSError):
                path.unlink()
        if made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise ConfigError(
            f"report folder {folder}",
            got=error.strerror or str(error),
            expected="a folder that can be written",
            do="choose another with --report",
        ) from error


__all__ = ["OVERVIEW", "PAGE", "outcome", "render"]
