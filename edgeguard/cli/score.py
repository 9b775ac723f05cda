"""``edgeguard score``: a verdict per input."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import typer

from edgeguard.cli.inspect import check_digests, read_model
from edgeguard.detection.verdict import Verdict
from edgeguard.errors import EXIT_FINDINGS, EXIT_NOT_CHECKED, TrustError


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard score model.guarded.tflite --data digits --limit 20 | "
        "edgeguard score model.guarded.tflite --data images/ --json | jq 'select(.flagged)'"
    )
    def score(
        model: Path = typer.Argument(help="A guarded .tflite file."),
        data: str = typer.Option(..., help="Inputs: digits, a name, an npz file or an image folder."),
        limit: int | None = typer.Option(None, min=1, help="Score the first N inputs only."),
        as_json: bool = typer.Option(False, "--json", help="One JSON object per input, one per line."),
    ) -> None:
        """Score inputs with a guarded model. Data that came split is scored on its test side.

        Exit code 0 when every input is clean, 1 when one is flagged, 3 when none is but some could not be
        checked.
        """
        from edgeguard import data as datasets
        from edgeguard.detection.guarded import GuardedModel

        content = read_model(model)
        guarded = GuardedModel.load(content)
        if check_digests(content, guarded.metadata) == "do not fit":
            raise TrustError(
                f"model {model}",
                got="digests that do not fit its content: model or guard were changed",
                expected="a file as edgeguard convert wrote it",
                do="fetch or convert it again",
            )
        inputs = datasets.pool(data, "test").x_test[:limit]
        counts = {"clean": 0, "flagged": 0, "not checked": 0, "not audited": 0}
        for index, one in enumerate(inputs):
            verdict = guarded.infer(one).verdict
            counts[verdict.status] += 1
            if as_json:
                typer.echo(json.dumps(as_dict(index, verdict)))
            elif verdict.status != "clean" or limit is not None:
                names = guarded.metadata.classes
                label = "" if verdict.predicted is None else f"{names[verdict.predicted]:<12}"
                typer.echo(f"{index:>6}  {label}{verdict.status:<12}{verdict.reason}")
        if not as_json:
            typer.echo(", ".join(f"{count} {name}" for name, count in counts.items()))
        if counts["flagged"]:
            raise typer.Exit(EXIT_FINDINGS)
        if counts["not checked"] or counts["not audited"] or not counts["clean"]:
            raise typer.Exit(EXIT_NOT_CHECKED)


def as_dict(index: int, verdict: Verdict) -> dict[str, Any]:
    """What ``score --json`` prints of one input. A score that is not a number is null: JSON has none."""
    return {
        "index": index,
        "predicted": verdict.predicted,
        "flagged": verdict.flagged,
        "status": verdict.status,
        "scores": {name: None if math.isnan(s) else s for name, s in verdict.scores.items()},
        "p_value": verdict.p_value,
        "stages": list(verdict.stages),
        "evidence": dict(verdict.evidence),
        "audit": verdict.audit,
        "reason": verdict.reason,
    }
