"""``edgeguard audit``: is this model backdoored? Recovers triggers, and judges them."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli import console
from edgeguard.cli.inspect import read_model
from edgeguard.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError, ModelError

if TYPE_CHECKING:
    from edgeguard.inspection.audit import Audit, Finding

EXITS = {"no_sign": EXIT_CLEAN, "backdoored": EXIT_FINDINGS, "could_not_check": EXIT_NOT_CHECKED}
_SHOWN = 5


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard audit model.tflite --data clean.npz | "
        "edgeguard audit model.keras --data images/ --report findings/ --json | "
        "edgeguard audit model.guarded.tflite --labels 3,7"
    )
    def audit(
        model: Path = typer.Argument(help="A .tflite (guarded or not), .keras, .h5 or .onnx file."),
        data: str | None = typer.Option(
            None,
            help="Clean inputs, labels not needed: a name, an npz or npy file, or an image folder. "
            "Without, inputs are made up from the model, which finds less.",
        ),
        labels: str | None = typer.Option(None, help="Audit these labels alone, by number: 3,7. Default: all."),
        report: Path | None = typer.Option(None, help="Write audit.json and pictures of the triggers to this folder."),
        steps: int | None = typer.Option(None, min=20, help="Optimisation steps for each form of trigger."),
        seed: int = typer.Option(0, min=0, help="Of everything random."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Look for a backdoor in a model that nobody has reported on.

        Exit code 0: no sign of one, 1: backdoored, 3: it could not be checked. No sign is no proof.
        """
        from edgeguard import data as datasets
        from edgeguard.inspection import audit as auditing

        suspects = None if labels is None else _numbers(labels)
        if report is not None and report.exists() and not report.is_dir():
            raise ConfigError(f"report folder {report}", got="a file", do="name a folder")
        with console.progress(quiet=as_json) as show:
            network = _network(model)
            images = None if data is None else datasets.calibration(data)[0]
            found = auditing.audit(
                network,
                images,
                labels=suspects,
                steps=steps or auditing.STEPS,
                seed=seed,
                progress=_with_time_left(show),
            )
        told = describe(found, model)
        if report is not None:
            _write(report, found, told, None if images is None else images[0])
        if as_json:
            typer.echo(json.dumps(told))
        else:
            console.facts(_rows(found, report))
        raise typer.Exit(EXITS[found.verdict])


def describe(found: Audit, model: Path) -> dict[str, Any]:
    """The outcome as JSON has it. ``index`` and ``success`` by label, of its most suspicious trigger."""
    first: dict[int, Finding] = {}
    for finding in found.findings:
        first.setdefault(finding.label, finding)
    return {
        "file": str(model),
        "verdict": found.verdict,
        "reason": found.reason,
        "labels": list(found.labels),
        "index": {str(label): _number(finding.index) for label, finding in sorted(first.items())},
        "success": {str(label): _number(finding.success) for label, finding in sorted(first.items())},
        "findings": [_finding(finding) for finding in found.findings],
        "module": list(found.structure),
        "planted": [{"label": t.label, "success": _number(t.success)} for t in found.planted],
        "stimulation": [asdict(lift) for lift in found.lifts],
        "steps": found.steps,
        "cost_s": round(found.cost_s, 2),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    return {
        "label": finding.label,
        "form": finding.form,
        "size": _number(finding.size),
        "ratio": _number(finding.ratio),
        "index": _number(finding.index),
        "index_interval": [_number(finding.index_low), _number(finding.index_high)],
        "success": _number(finding.success),
        "suspected": finding.suspected,
    }


def _number(value: float) -> float | None:
    """JSON knows no NaN: what is not known is null."""
    return round(value, 4) if abs(value) < float("inf") else None


def _network(path: Path) -> Any:
    """The trainable model that a file holds, or stands for."""
    if path.suffix == ".tflite":
        from converters import reconstruct

        return reconstruct.of_tflite(read_model(path)).model
    from converters import sources

    found = sources.read(path).keras
    if found is None:
        raise ModelError(f"model {path}", got="a model without its layers", expected="a .tflite, .keras or .onnx file")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ConfigError("--labels", got=text, expected="numbers of classes with commas between: 3,7")
    return tuple(int(part) for part in parts)


def _with_time_left(show: console.Progress) -> console.Progress:
    """Progress that says how long it will take at the pace so far."""
    started = time.monotonic()

    def told(text: str, done: int, total: int) -> None:
        left = (time.monotonic() - started) / max(done, 1) * (total - done)
        show(f"{text}; about {left:.0f} s left", done, total)

    return told


def _write(folder: Path, found: Audit, told: dict[str, Any], example: Any) -> None:
    """The report: JSON, and pictures of each trigger of a suspected label."""
    from converters.files import write_all
    from edgeguard.inspection import pictures

    folder.mkdir(parents=True, exist_ok=True)
    outcome = {folder / "audit.json": json.dumps(told, indent=2).encode() + b"\n"}
    for label in found.labels:
        for number, trigger in enumerate(found.triggers(label), start=1):
            for name, content in pictures.draw(trigger, example).items():
                outcome[folder / f"label-{label}-{number}-{trigger.form}-{name}.png"] = content
    write_all(outcome)


def _rows(found: Audit, report: Path | None) -> list[tuple[str, str]]:
    rows = [
        ("verdict", found.verdict.replace("_", " ")),
        ("reason", found.reason),
        ("labels", ", ".join(map(str, found.labels)) or "none suspected"),
    ]
    if found.structure:
        rows.append(("module", ", ".join(found.structure)))
    for finding in found.findings[:_SHOWN]:
        unit = "pixels" if finding.form == "patch" else "of full strength"
        rows.append(
            (
                f"label {finding.label}",
                f"{finding.form} of {finding.size:.3g} {unit}, {finding.ratio:.2f} of what others need; works on "
                f"{finding.success:.0%} of held-out inputs; index {finding.index:.1f} "
                f"({finding.index_low:.1f} to {finding.index_high:.1f})",
            )
        )
    rows.append(("cost", f"{found.cost_s:.0f} s, {found.steps} steps"))
    return rows if report is None else [*rows, ("report", str(report))]
