"""``edgeguard calibrate``: fit the guard of a guarded file anew, on the device, without a training framework."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import typer

from edgeguard.cli import console
from edgeguard.cli.inspect import read_model
from edgeguard.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard calibrate model.tflite --data clean.npz | "
        "edgeguard calibrate model.tflite --data images/ --fpr 0.005 -o recalibrated.tflite --json"
    )
    def calibrate(
        model: Path = typer.Argument(help="A guarded .tflite file."),
        data: str = typer.Option(..., help="Clean data: a name, an npz or npy file, or an image folder."),
        output: Path | None = typer.Option(None, "--output", "-o", help="Default: NAME.calibrated.tflite."),
        fpr: float | None = typer.Option(
            None, help="False-positive rate; default: the one that the file was made for."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Fit a guarded model's detector anew with clean data of your own.

        The model stays what it is, and so does its digest; the guard's digest changes. Use data that somebody looked
        at, never unlabelled inputs from the field: they may hold triggers. The result is verified before it is written.
        """
        from converters import calibration, untrusted
        from converters.files import write_all
        from converters.verify import verify
        from edgeguard import data as datasets
        from edgeguard.detection import metadata, sidecar

        content = read_model(model)
        target = output or model.with_suffix(".calibrated.tflite")
        if not target.parent.is_dir():
            raise ConfigError(f"output folder {target.parent}", got="no such folder", do="create it first")
        with console.progress(quiet=as_json) as progress:
            before = metadata.read(content)
            untrusted.probe(content)
            inputs, _, _ = datasets.calibration(data)
            together = datasets.groups(data, len(inputs))
            done = calibration.recalibrate(content, inputs, fpr=fpr, groups=together, progress=progress)
            progress("verifying", 0, 1)
            verified = verify(done.bare, done.content, done.compiled, inputs)
        outcome = {target: done.content}
        if done.sidecar is not None:
            outcome[sidecar.path_beside(target)] = done.sidecar
        write_all(outcome)
        after = done.metadata
        if as_json:
            typer.echo(
                json.dumps(
                    {
                        "output": str(target),
                        "model_digest": after.model_digest,
                        "guard_digest": after.guard_digest,
                        "sidecar_digest": after.sidecar_digest,
                        "detectors": msgspec.to_builtins(after.detectors),
                        "fpr": after.fpr,
                        "runtimes_verified": list(verified.runtimes),
                    }
                )
            )
            return
        console.facts(
            [
                ("written", f"{target} ({len(done.content):,} bytes)"),
                ("model digest", f"{after.model_digest} (unchanged)"),
                ("guard digest", f"{after.guard_digest} (was {before.guard_digest})"),
                ("thresholds", ", ".join(f"{d.name} {d.threshold:.4g}" for d in after.detectors)),
                ("false positives", f"{after.fpr:.2%} asked, from {after.calibration.n_threshold} threshold inputs"),
                ("verified on", ", ".join(verified.runtimes) + ": outputs bit-identical, scores equal NumPy's"),
            ]
        )
