"""``edgeguard hub``: collects reports, decides, repairs, rolls out."""

from __future__ import annotations

from pathlib import Path

import typer

from edgeguard.cli.run import replace_process


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Example: edgeguard hub --config /etc/edgeguard/hub.toml")
    def hub(
        config: Path = typer.Option(..., help="The hub's TOML file."),
        check: bool = typer.Option(False, "--check", help="Check configuration, store and broker once, then exit."),
    ) -> None:
        """Run the hub: evidence from the fleet, cases, repairs, signed releases."""
        replace_process("edgeguard.hub", config, check)
