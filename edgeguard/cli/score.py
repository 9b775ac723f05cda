"""``edgeguard score``: a verdict per input."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli.inspect import check_digests, read_model
from edgeguard.detection.verdict import Verdict
from edgeguard.errors import EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError, TrustError

if TYPE_CHECKING:
    from edgeguard.detection.cascade import Cascade
    from edgeguard.detection.guarded import GuardedModel


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard score model.guarded.tflite --data digits --limit 20 | "
        "edgeguard score model.guarded.tflite --data images/ --json | jq 'select(.flagged)' | "
        "edgeguard score model.guarded.tflite --data images/ --audits 100"
    )
    def score(
        model: Path = typer.Argument(help="A guarded .tflite file."),
        data: str = typer.Option(..., help="Inputs: digits, a name, an npz file or an image folder."),
        limit: int | None = typer.Option(None, min=1, help="Score the first N inputs only."),
        one_pass: bool = typer.Option(False, "--one-pass", help="Never audit: the one pass alone decides."),
        audits: float | None = typer.Option(
            None, help="Extra inferences that audits may take per second of the wall clock; default: without limit."
        ),
        as_json: bool = typer.Option(False, "--json", help="One JSON object per input, one per line."),
    ) -> None:
        """Score inputs with a guarded model. Data that came split is scored on its test side.

        Where the model's sidecar NAME.guard.npz lies beside it, doubtful inputs are audited: the model looks at them
        again, smoothed and with clean inputs laid over them. Those that --audits leaves no room for are "not
        audited", which is not clean.

        Exit code 0 when every input is clean, 1 when one is flagged, 3 when none is but some could not be
        checked or audited.
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
        scorer = _scorer(model, guarded, one_pass=one_pass, audits=audits)
        inputs = datasets.pool(data, "test").x_test[:limit]
        inferences = 0
        counts = {"clean": 0, "flagged": 0, "not checked": 0, "not audited": 0}
        for index, one in enumerate(inputs):
            inference, took = scorer.infer(one)
            verdict, inferences = inference.verdict, inferences + took
            counts[verdict.status] += 1
            if as_json:
                typer.echo(json.dumps(as_dict(index, verdict)))
            elif verdict.status != "clean" or limit is not None:
                names = guarded.metadata.classes
                label = "" if verdict.predicted is None else f"{names[verdict.predicted]:<12}"
                typer.echo(f"{index:>6}  {label}{verdict.status:<12}{verdict.reason}")
        if not as_json:
            line = ", ".join(f"{count} {name}" for name, count in counts.items())
            if scorer.limits is not None and len(inputs):
                line += f"; {inferences / len(inputs):.2f} inferences per input"
            typer.echo(line)
        if counts["flagged"]:
            raise typer.Exit(EXIT_FINDINGS)
        if counts["not checked"] or counts["not audited"] or not counts["clean"]:
            raise typer.Exit(EXIT_NOT_CHECKED)


def _scorer(model: Path, guarded: GuardedModel, *, one_pass: bool, audits: float | None) -> Cascade:
    """The model with the dearer stages that its sidecar brings; with none of them where it brings none."""
    import numpy as np

    from edgeguard.detection.cascade import UNLIMITED, Budget, Cascade
    from edgeguard.detection.sidecar import read_beside

    if one_pass and audits is not None:
        raise ConfigError("--audits", got="--one-pass too, which never audits", expected="one of the two")
    budget = UNLIMITED
    if audits is not None:
        budget = Budget(per_second=audits) if audits else Budget(per_second=0.0, burst=0.0)
    sidecar = None if one_pass else read_beside(model, guarded.metadata)
    # A fixed seed: the same command shall say the same, and inputs in a file cannot choose when they are scored.
    return Cascade(guarded, sidecar, clock=time.monotonic, rng=np.random.default_rng(0), budget=budget)


def as_dict(index: int, verdict: Verdict) -> dict[str, Any]:
    """What ``score --json`` prints of one input. A score that is not a number is null: JSON has none."""
    return {
        "index": index,
        "predicted": verdict.predicted,
        "flagged": verdict.flagged,
        "status": verdict.status,
        "score": None if math.isnan(verdict.score) else verdict.score,
        "scores": {name: None if math.isnan(s) else s for name, s in verdict.scores.items()},
        "p_value": verdict.p_value,
        "stages": list(verdict.stages),
        "evidence": dict(verdict.evidence),
        "audit": verdict.audit,
        "reason": verdict.reason,
    }
