"""``edgeguard convert``: a model in, a guarded int8 ``.tflite`` out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from edgeguard.cli import console
from edgeguard.cli.inspect import read_model
from edgeguard.errors import ConfigError

if TYPE_CHECKING:
    from converters.pipeline import Conversion

SYNTHETIC = "synthetic"


def register(app: typer.Typer) -> None:
    """Add the command."""

    @app.command(
        epilog="Examples: edgeguard convert model.keras --data clean.npz | "
        "edgeguard convert model.onnx --data images/ --labels classes.txt --keras trainable.keras | "
        "edgeguard convert model.tflite --data clean.npy -o guarded.tflite --fpr 0.02 --json | "
        "edgeguard convert model.tflite --taps list"
    )
    def convert(
        source: Path = typer.Argument(help="A .keras, .h5, .onnx or .tflite file, or a SavedModel folder."),
        data: str | None = typer.Option(
            None,
            help="Clean calibration data: a name, an npz or npy file, or an image folder; "
            "'synthetic' makes inputs up: for structure and latency, not for detection.",
        ),
        output: Path | None = typer.Option(None, "--output", "-o", help="Default: NAME.guarded.tflite."),
        labels: Path | None = typer.Option(
            None, help="Class names, one a line (.txt), or the true labels of the data (.npy)."
        ),
        as_float: bool = typer.Option(False, "--float", help="Leave a float model float."),
        input_type: str | None = typer.Option(
            None, "--input", help="Input of the int8 model: int8 (default) or uint8."
        ),
        fpr: float = typer.Option(0.01, help="False-positive rate asked of the detector."),
        taps: str = typer.Option(
            "2", help="How many activations the guard listens to, or their names, or 'list' to see those there are."
        ),
        keras: Path | None = typer.Option(None, help="Also write the trainable Keras model here."),
        sidecar: bool = typer.Option(
            True, "--sidecar/--no-sidecar", help="Write NAME.guard.npz: clean inputs for dearer checks and a self-test."
        ),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON object."),
    ) -> None:
        """Convert a model to int8 TFLite with the detector compiled into the graph.

        The model's own outputs stay bit-identical; that is verified on every runtime installed before anything is
        written. Model files are read in a child process with limits.
        """
        from converters import pipeline
        from converters.files import write_all
        from edgeguard import data as datasets
        from edgeguard.detection import sidecar as sidecars

        if taps == "list":
            _list_taps(source, as_json=as_json)
            return
        target = output or Path(f"{source.stem}.guarded.tflite")
        for path in (target, *([keras] if keras else [])):
            if not path.parent.is_dir():
                raise ConfigError(f"output folder {path.parent}", got="no such folder", do="create it first")
        if input_type not in {None, "int8", "uint8"}:
            raise ConfigError("--input", got=input_type, expected="int8 or uint8")
        if keras is not None and keras.suffix not in {".keras", ".h5"}:
            raise ConfigError("--keras", got=keras.name, expected="a .keras or .h5 file")
        if data is None:
            raise ConfigError("--data", got="nothing", expected="clean calibration data, or 'synthetic'")
        with console.progress(quiet=as_json) as progress:
            inputs, true, names = _calibration(data, source, labels)
            done = pipeline.convert(
                source,
                inputs,
                true,
                classes=names,
                fpr=fpr,
                taps=int(taps) if taps.isdecimal() else tuple(name.strip() for name in taps.split(",")),
                quantised=not as_float,
                input_type=input_type,  # type: ignore[arg-type]  # checked above
                keras=None if keras is None else keras.suffix,  # type: ignore[arg-type]  # checked above
                sidecar=sidecar and data != SYNTHETIC,
                synthetic=data == SYNTHETIC,
                groups=None if data == SYNTHETIC else datasets.groups(data, len(inputs)),
                progress=progress,
            )
        outcome = {target: done.guarded}
        if done.result.sidecar is not None:
            outcome[sidecars.path_beside(target)] = done.result.sidecar
        if keras is not None and done.lowered.keras is not None:
            outcome[keras] = done.lowered.keras
        write_all(outcome)
        if as_json:
            typer.echo(json.dumps(pipeline.summary(done, target)))
        else:
            console.facts(_rows(done, target, keras))


def _calibration(data: str, source: Path, labels: Path | None) -> tuple[Any, Any, tuple[str, ...]]:
    """Inputs, true labels or None, and class names where they are known."""
    from edgeguard import data as datasets

    if data == SYNTHETIC:
        if source.suffix != ".tflite":
            raise ConfigError("--data synthetic", got=f"{source.name}", expected="a .tflite file")
        from converters import flatbuffer, pipeline

        model = flatbuffer.parse(read_model(source))
        shape, dtype = flatbuffer.input_of(model)
        tensor = model.subgraphs[0].tensors[int(model.subgraphs[0].inputs[0])]
        inputs = pipeline.made_up(shape, dtype, flatbuffer.quantization(tensor))
        return inputs, None, () if labels is None else datasets.read_class_names(labels)
    inputs, true, names = datasets.calibration(data)
    if labels is None:
        return inputs, true, names
    if labels.suffix == ".npy":
        return inputs, datasets.read_labels(labels, len(inputs)), names
    return inputs, true, datasets.read_class_names(labels)


def _list_taps(source: Path, *, as_json: bool) -> None:
    from converters import flatbuffer, guard
    from converters import taps as planning

    if source.suffix != ".tflite":
        raise ConfigError("--taps list", got=source.name, expected="a .tflite file", do="convert the model first")
    model = flatbuffer.parse(read_model(source))
    guard.strip(model)
    chosen = {tap.tensor for tap in planning.plan_taps(model).taps}
    found = planning.tappable(model)
    if as_json:
        listed = [
            {"tensor": t.name, "channels": t.channels, "signed": t.signed, "default": t.tensor in chosen} for t in found
        ]
        typer.echo(json.dumps(listed))
        return
    for tap in found:
        words = [f"{tap.channels} channels", tap.dtype]
        words += ["signed"] * tap.signed + ["chosen by default"] * (tap.tensor in chosen)
        typer.echo(f"{planning.label(tap.name)}  ({', '.join(words)})")


def _rows(done: Conversion, target: Path, keras: Path | None) -> list[tuple[str, str]]:
    from converters import pipeline
    from converters import taps as planning
    from converters.calibration import allowed_growth
    from edgeguard.detection import sidecar as sidecars

    described, parity, verified = done.metadata, done.parity, done.verified
    growth, allowed = len(done.guarded) - len(done.bare), allowed_growth(len(done.bare))
    rows = [
        ("written", f"{target} ({len(done.guarded):,} bytes)"),
        ("model digest", described.model_digest),
        ("guard digest", described.guard_digest),
        ("taps", ", ".join(dict.fromkeys(t.source_layer or planning.label(t.tensor) for t in described.taps))),
        ("false positives", f"{described.fpr:.2%} asked, from {described.calibration.n_threshold} threshold inputs"),
        ("accuracy", f"float {_share(parity.float_accuracy)}, int8 {_share(parity.int8_accuracy)} on this data"),
        ("agreement", _agreement(done)),
        (
            "latency, p50",
            f"{done.latency.bare_us:.1f} us bare, {done.latency.guarded_us:.1f} us guarded "
            f"(x{done.latency.ratio:.3f}) on {described.environment.runtime}, here",
        ),
        ("verified on", ", ".join(verified.runtimes) + ": outputs bit-identical, scores equal NumPy's"),
        ("not run on", "; ".join(f"{name} ({why})" for name, why in verified.not_run.items()) or "-"),
        (
            "size",
            f"{growth:,} bytes for the guard"
            + (f", more than the {allowed:,} meant for it: many classes, or many channels" if growth > allowed else ""),
        ),
        ("peak memory", f"{pipeline.peak_memory() / 2**20:.0f} MiB"),
    ]
    if done.result.sidecar is not None:
        rows.insert(1, ("sidecar", f"{sidecars.path_beside(target)} ({len(done.result.sidecar):,} bytes)"))
    if keras is not None:
        rows.insert(1, ("trainable model", str(keras)))
    if described.calibration.synthetic:
        rows.append(("NOT VALIDATED", "calibrated on made-up inputs: a device will report every input as not checked"))
    return rows


def _agreement(done: Conversion) -> str:
    if done.lowered.float_tflite is None:
        return "not known: the source was int8 already"
    if done.lowered.int8_tflite is None:
        return "left float"
    if done.parity.output_error is not None:
        return f"the int8 output is {done.parity.output_error:.2%} off the float one (RMS)"
    return f"{_share(done.parity.agreement)} of int8 answers are those of the float model"


def _share(value: float | None) -> str:
    return "not known" if value is None else f"{value:.2%}"
