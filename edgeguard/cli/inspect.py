"""``edgeguard inspect``: what a guarded file says of itself, and whether that is true of its content."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import typer

from edgeguard.cli import console
from edgeguard.contract.guard import GuardMetadata
from edgeguard.errors import EXIT_FINDINGS, EXIT_NOT_CHECKED, ConfigError, TrustError


def read_model(path: Path) -> bytes:
    """The content of a model file. Raises ConfigError when it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"model {path}", got=error.strerror or str(error), do="check the path") from error


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(epilog="Example: edgeguard inspect model.guarded.tflite --json")
    def inspect(
        model: Path = typer.Argument(help="A guarded .tflite file."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Show a guarded file's metadata and check its digests against its content.

        Exit code 1 when a digest does not fit, 3 when the packages that check it are not installed.
        """
        from edgeguard.detection import metadata as reader

        content = read_model(model)
        described = reader.read(content)
        digests = check_digests(content, described)
        if as_json:
            everything = {
                "file": str(model),
                "bytes": len(content),
                "file_digest": hashlib.sha256(content).hexdigest(),
                "digests": digests,
                **msgspec.to_builtins(described),
            }
            typer.echo(json.dumps(everything))
        else:
            _print(model, content, described, digests)
        if digests != "fit":
            raise typer.Exit(EXIT_FINDINGS if digests == "do not fit" else EXIT_NOT_CHECKED)


def check_digests(content: bytes, described: GuardMetadata) -> str:
    """Whether a guarded file's digests fit its content: ``fit``, ``do not fit``, or ``not checked``."""
    try:
        from converters import flatbuffer, guard
    except ImportError:
        return "not checked"
    model = flatbuffer.parse(content)
    try:
        guard.check_digests(model, described)
    except TrustError:
        return "do not fit"
    return "fit"


def _print(path: Path, content: bytes, described: GuardMetadata, digests: str) -> None:
    shape = "x".join(str(n) for n in described.input.shape)
    low, high = described.input.range
    environment = described.environment
    rows = [
        ("file", f"{path} ({len(content):,} bytes)"),
        ("file digest", hashlib.sha256(content).hexdigest()),
        ("model digest", described.model_digest),
        ("guard digest", described.guard_digest),
        ("digests", f"{digests} the content" if digests != "not checked" else "not checked: converters not installed"),
        ("input", f"{shape} {described.input.dtype}, {low:g} to {high:g}"),
        ("classes", f"{len(described.classes)}: {', '.join(described.classes)[:80]}" if described.classes else "none"),
        ("detectors", ", ".join(f"{d.name} (flags above {d.threshold:.4g})" for d in described.detectors)),
        ("false positives", f"{described.fpr:.2%} asked; at most {max(described.fpr_upper):.1%} in any class (95%)"),
        (
            "calibration",
            f"{described.calibration.n_fit} inputs fitted, {described.calibration.n_threshold} others set thresholds",
        ),
        (
            "measured on",
            f"{environment.runtime} {environment.version}, {environment.cpu}, {environment.threads} thread",
        ),
        ("sidecar", described.sidecar_digest or "none: the one-pass detector only"),
    ]
    rows += [("tap", f"{t.kind:<4} of {t.source_layer or t.tensor}: {t.channels} channels") for t in described.taps]
    console.facts(rows)
