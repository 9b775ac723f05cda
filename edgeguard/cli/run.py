"""``edgeguard run``: the device's daemon. Replaces this process, so that the daemon carries no command-line library."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import typer


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Example: edgeguard run --config /etc/edgeguard/agent.toml")
    def run(
        config: Path = typer.Option(..., help="The agent's TOML file."),
        check: bool = typer.Option(False, "--check", help="Check configuration, model and broker once, then exit."),
    ) -> None:
        """Run the agent: guarded inference on a stream of inputs, reports to the hub, signed updates."""
        replace_process("edgeguard.agent", config, check)


def replace_process(module: str, config: Path, check: bool, *more: str) -> None:
    """Become ``python -m MODULE --config CONFIG``, with what more there is. Does not return."""
    arguments = [sys.executable, "-m", module, "--config", str(config), *more]
    os.execv(sys.executable, [*arguments, "--check"] if check else arguments)
