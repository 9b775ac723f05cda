"""``edgeguard convert``: a model in, a guarded int8 ``.tflite`` out."""

from __future__ import annotations

import json
from pathlib import Path

import typer

from edgeguard.cli import console
from edgeguard.errors import ConfigError


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard convert model.keras --data clean.npz | "
        "edgeguard convert model.tflite --data images/ -o guarded.tflite --fpr 0.02 --json"
    )
    def convert(
        source: Path = typer.Argument(help="A .keras, .h5, .onnx or .tflite file, or a SavedModel folder."),
        data: str = typer.Option(..., help="Clean calibration data: digits, a name, an npz file or an image folder."),
        output: Path | None = typer.Option(None, "--output", "-o", help="Default: NAME.guarded.tflite."),
        fpr: float = typer.Option(0.01, help="False-positive rate asked of the detector."),
        taps: int = typer.Option(2, min=1, max=4, help="How many activations the guard listens to."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Convert a model to int8 TFLite with the detector compiled into the graph.

        The model's own outputs stay bit-identical; that is verified on every device runtime installed before anything
        is written.
        """
        from converters import pipeline, sources
        from edgeguard import data as datasets

        target = output or Path(f"{source.stem}.guarded.tflite")
        if not target.parent.is_dir():
            raise ConfigError(f"output folder {target.parent}", got="no such folder", do="create it first")
        with console.progress(quiet=as_json) as progress:
            model = sources.read(source)
            calibration = datasets.pool(data, "train")
            done = pipeline.convert(
                model, calibration.x_train, calibration.y_train, fpr=fpr, tap_count=taps, progress=progress
            )
        pipeline.write(done.guarded, target)
        summary = pipeline.summary(done, target)
        if as_json:
            typer.echo(json.dumps(summary))
            return
        rows = [
            ("written", f"{target} ({len(done.guarded):,} bytes; {len(done.bare):,} without guard)"),
            ("model digest", done.metadata.model_digest),
            ("guard digest", done.metadata.guard_digest),
            ("taps", ", ".join(dict.fromkeys(t.source_layer or t.tensor for t in done.metadata.taps))),
            ("false positives", f"{fpr:.2%} asked, from {done.metadata.calibration.n_threshold} threshold inputs"),
            ("accuracy", f"float {_share(done.float_accuracy)}, int8 {_share(done.int8_accuracy)} on this data"),
            ("agreement", f"{_share(done.agreement)} of int8 answers are those of the float model"),
            ("latency, p50", f"{done.latency_bare_us:.1f} us bare, {done.latency_guarded_us:.1f} us guarded, here"),
            ("verified on", ", ".join(done.verified.runtimes) + ": outputs bit-identical, scores equal NumPy's"),
        ]
        console.facts(rows)


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2%}"
