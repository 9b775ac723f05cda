"""``edgeguard repair``: remove a backdoor from a model file, prove it, or refuse."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from edgeguard.cli import console
from edgeguard.errors import EXIT_CLEAN, EXIT_FINDINGS, EXIT_NOT_CHECKED

if TYPE_CHECKING:
    from edgeguard.repair.command import Report

EXITS = {
    "passed": EXIT_CLEAN,
    "nothing found": EXIT_CLEAN,
    "failed": EXIT_FINDINGS,
    "needs approval": EXIT_NOT_CHECKED,
    "could not check": EXIT_NOT_CHECKED,
}


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard repair model.keras --guarded model.guarded.tflite --data clean.npz "
        "--evidence case.json -o repaired.tflite | "
        "edgeguard repair model.tflite --data clean/ --evidence case.json --method linf | "
        "edgeguard repair model.tflite --data clean.npz --method excise+clp --json"
    )
    def repair(
        model: Path = typer.Argument(help="A .keras file, or a .tflite file, guarded or not. It is never changed."),
        data: str = typer.Option(..., help="Clean, labelled data: a name, an npz file, or an image folder."),
        evidence: Path | None = typer.Option(None, help="What the fleet reported of this model; without: an audit."),
        guarded: Path | None = typer.Option(
            None, help="With a .keras file: the file made of it that devices run, and that the evidence is of."
        ),
        method: str = typer.Option(
            "auto",
            help="auto, or one or several joined by +: excise, clp, linf, rap, mvp, aew, unlearn, fine-pruning, anp.",
        ),
        output: Path | None = typer.Option(None, "--output", "-o", help="Default: NAME.repaired.tflite."),
        approve: bool = typer.Option(
            False, "--approve", help="Write the repair that an earlier run of the same command left waiting."
        ),
        seed: int = typer.Option(0, help="Of all that is drawn."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Remove a backdoor and hold the result against the gate; nothing is written that did not pass.

        Where a rule could not be checked, the repaired file waits in a folder beside the output, and the report says
        where: look at both, then give the same command again with --approve. docs/repair.md describes the JSON of
        --evidence.

        Exit code 0 when a repaired file was written or there was nothing to repair, 1 when no method passed, 3 when a
        rule could not be checked and waits for --approve, or the model could not be audited.
        """
        from edgeguard.repair.command import Order, run

        target = output or model.with_suffix(".repaired.tflite")
        with console.progress(quiet=as_json) as progress:
            order = Order(
                model=model,
                data=data,
                output=target,
                evidence=evidence,
                guarded=guarded,
                method=method,
                approve=approve,
                seed=seed,
            )
            report = run(order, lambda stage, text, done, total: progress(text, done, total))
        if as_json:
            typer.echo(json.dumps(asdict(report)))
        else:
            _print(report)
        if EXITS[report.outcome]:
            raise typer.Exit(EXITS[report.outcome])


def _print(report: Report) -> None:
    rows = [("outcome", f"{report.outcome}: {report.reason}")]
    if report.output is not None:
        rows.append(("written", report.output))
    if report.candidate is not None:
        rows.append(("waits", f"{report.candidate}; the same command with --approve writes it"))
    if report.method is not None:
        rows.append(("method", report.method))
    if report.clean_accuracy is not None and report.asr is not None:
        rows.append(("accuracy", f"{report.clean_accuracy['before']:.1%} -> {report.clean_accuracy['after']:.1%}"))
        rows.append(("triggers", f"{report.asr['before']:.1%} -> {report.asr['after']:.1%} of held-out inputs turned"))
    rows += [("tried", f"{tried['method']}: {tried['outcome']}: {tried['reason']}") for tried in report.tried]
    console.facts(rows)
