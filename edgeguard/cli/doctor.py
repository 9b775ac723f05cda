"""``edgeguard doctor``: what is wrong with this device, and what to do."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import msgspec
import typer

from edgeguard.cli import console
from edgeguard.cli.inspect import check_digests


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Example: edgeguard doctor --config /etc/edgeguard/agent.toml")
    def doctor(
        model: Path | None = typer.Argument(None, help="A guarded .tflite file; default: what the agent would run."),
        config: Path | None = typer.Option(None, help="The agent's TOML file."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Check this device: Python, TFLite runtime, model, broker, clock, disk, board.

        Nothing is changed, and an agent may run meanwhile. Runtime and model run in a process of their own: if they
        crash, that is one line here. Exit code 0 where nothing failed, 1 where something did, 3 where nothing could
        be checked.
        """
        from edgeguard.agent import doctor as device

        checks = device.examine(config, model, digests=check_digests)
        counts: Counter[str] = Counter(check.status for check in checks)
        if as_json:
            typer.echo(json.dumps({"counts": dict(counts), "checks": [msgspec.to_builtins(one) for one in checks]}))
        else:
            told = (f"{one.found}; {one.do}" if one.do else one.found for one in checks)
            names = (f"{one.status:<11}  {one.name}" for one in checks)
            console.facts(list(zip(names, told, strict=True)))
            states = ("ok", "warning", "failed", "not checked")
            typer.echo(", ".join(f"{counts[state]} {state}" for state in states))
        code = device.exit_code(checks)
        if code:
            raise typer.Exit(code)
