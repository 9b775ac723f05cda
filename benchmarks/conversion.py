"""What a guard costs: latency, size and conversion time, guarded and bare side by side in one run.

    python -m benchmarks.conversion [--runs 1000] [--json benchmarks/results/conversion.json]

Models: an 8-layer CNN of our own, trained on real data (fashion_mnist where ``EDGEGUARD_DATA`` has it, else digits), as
int8 and as float; and every ``.tflite`` file in the folder that ``EDGEGUARD_MODELS`` names, as it came and, where it is
float, quantised. There is no data for the latter: they are calibrated on made-up inputs, for structure, latency, size
and identity only, and marked "not validated".

One thread; bare and guarded runs alternate, in an order that alternates too, so that noise hits both alike; scores
and features are read out. A second bare interpreter runs along: its ratio to the first is what noise alone does, and
the guarded one is compared with the mean of both. Where an interpreter's memory happens to lie changes its speed by a
percent or more, so there are eleven heats with new interpreters, and the one with the median ratio counts. p50 and p99
in microseconds.

Thresholds are also fitted on every other device runtime and compared with the first one's: whole other kernels, so a
harder test than another machine. On made-up inputs, whose predictions are chance, that is printed but not judged.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import calibration, files, pipeline, sources
from converters.pipeline import Conversion
from edgeguard import data as datasets
from edgeguard.attacks import victims
from edgeguard.detection import runtime as runtimes
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.detection.statistics import rate_upper
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

WARM_UP = 50
HEATS = 11
INPUTS = 1000
LIMITS = {"litert": 1.04, "tflite-runtime": 1.15}
MAX_SECONDS = 20.0
MAX_SHIFT = 0.03


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model with what it is calibrated on, and fresh clean inputs where there are real ones."""

    name: str
    source: Path | sources.Source
    inputs: Array
    labels: npt.NDArray[np.int64] | None
    fresh: Array | None
    quantised: bool
    synthetic: bool


def cases() -> Iterator[Case]:
    """The models of this benchmark."""
    data = _data()
    data, x_owner, y_owner = datasets.hold_out(data, 2 * INPUTS if len(data.x_train) > 10 * INPUTS else 600)
    model, _ = victims.trained(
        data.x_train.astype(np.uint8),
        data.y_train,
        len(data.classes),
        epochs=3 if len(data.x_train) > 10_000 else 25,
        cache=victims.cache_folder(),
        network=eight_layers,
        architecture="eight-layers-1",
    )
    for quantised in (True, False):
        yield Case(
            name=f"8-layer CNN, {data.name}, {'int8' if quantised else 'float'}",
            source=sources.of_keras(model),
            inputs=x_owner,
            labels=y_owner,
            fresh=data.x_test[:4000],
            quantised=quantised,
            synthetic=False,
        )
    folder = os.environ.get("EDGEGUARD_MODELS")
    for path in sorted(Path(folder).glob("*.tflite")) if folder else []:
        model = TfliteModel(path.read_bytes())
        inputs = pipeline.made_up(model.input_shape, model.input_dtype, model.input_quantization, INPUTS)
        is_float = not np.issubdtype(model.input_dtype, np.integer)
        for quantised in (False, True) if is_float else (False,):
            name = path.stem + (", quantised" if quantised else "")
            yield Case(
                name=name, source=path, inputs=inputs, labels=None, fresh=None, quantised=quantised, synthetic=True
            )


def eight_layers(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """Six convolutions and two dense layers, pixels 0 to 255 in, softmax out."""
    import keras

    keras.utils.set_random_seed(seed)
    x = inputs = keras.Input(shape, name="pixels")
    x = keras.layers.Rescaling(1.0 / 255.0)(x)
    for index, width in enumerate((16, 16, 32, 32, 64, 64), start=1):
        x = keras.layers.Conv2D(width, 3, padding="same", use_bias=False, name=f"conv{index}")(x)
        x = keras.layers.BatchNormalization(name=f"bn{index}")(x)
        x = keras.layers.ReLU(name=f"relu{index}")(x)
        if index in {2, 4}:
            x = keras.layers.MaxPooling2D()(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dense(64, activation="relu", name="dense")(x)
    return keras.Model(inputs, keras.layers.Dense(classes, activation="softmax", name="probabilities")(x))


def _data() -> datasets.Dataset:
    folder = os.environ.get("EDGEGUARD_DATA")
    name = "fashion_mnist" if folder and (Path(folder) / "fashion_mnist.npz").is_file() else "digits"
    return datasets.load(name)


def race(bare: bytes, guarded: bytes, one: Array, runtime: str, runs: int) -> dict[str, Any]:
    """The heat with the median ratio, of HEATS on one runtime, and all their ratios."""
    heats = sorted((heat(bare, guarded, one, runtime, runs) for _ in range(HEATS)), key=lambda row: row["ratio_p50"])
    middle = heats[HEATS // 2]
    return {**middle, "ratios_p50": [row["ratio_p50"] for row in heats]}


def heat(bare: bytes, guarded: bytes, one: Array, runtime: str, runs: int) -> dict[str, Any]:
    """Timings of a bare, a guarded and another bare interpreter, all new, interleaved."""
    contestants = [TfliteModel(content, runtime=runtime) for content in (bare, guarded, bare)]
    tensor = contestants[0].quantise(one)
    outputs = [model.invoke(tensor) for model in contestants]
    identical = all(a.tobytes() == b.tobytes() for a, b in zip(outputs[0], outputs[1], strict=False))
    times: list[list[int]] = [[], [], []]
    for run in range(runs + WARM_UP):
        for place in range(3):
            which = (run + place) % 3
            started = time.perf_counter_ns()
            contestants[which].invoke(tensor)
            if run >= WARM_UP:
                times[which].append(time.perf_counter_ns() - started)
    (first50, first99), (guarded50, guarded99), (again50, again99) = (
        np.percentile(t, (50, 99)) / 1000.0 for t in times
    )
    bare50, bare99 = (first50 + again50) / 2, (first99 + again99) / 2
    return {
        "runtime": runtime,
        "bare_p50_us": round(float(bare50), 2),
        "bare_p99_us": round(float(bare99), 2),
        "guarded_p50_us": round(float(guarded50), 2),
        "guarded_p99_us": round(float(guarded99), 2),
        "ratio_p50": round(float(guarded50 / bare50), 4),
        "ratio_p99": round(float(guarded99 / bare99), 4),
        "noise_p50": round(float(again50 / first50), 4),
        "outputs_identical": identical,
        "within_limit": bool(guarded50 / bare50 <= LIMITS.get(runtime, float("inf"))),
    }


def false_positives(done: Conversion, fresh: Array | None) -> dict[str, Any] | None:
    """The joint false-positive rate on fresh clean inputs, next to what was asked."""
    if fresh is None:
        return None
    model = GuardedModel.load(done.guarded)
    flagged = sum(model.infer(x).verdict.flagged for x in fresh)
    return {
        "asked": done.metadata.fpr,
        "measured": round(flagged / len(fresh), 5),
        "upper95": round(rate_upper(flagged, len(fresh)), 5),
        "inputs": len(fresh),
    }


def threshold_shift(done: Conversion, case: Case, runtime: str) -> float:
    """The largest relative difference of a threshold when the same guard is calibrated on another runtime."""
    before = os.environ.get(runtimes.ENVIRONMENT)
    os.environ[runtimes.ENVIRONMENT] = runtime
    try:
        other = calibration.recalibrate(done.guarded, case.inputs, synthetic=case.synthetic).metadata
    finally:
        if before is None:
            del os.environ[runtimes.ENVIRONMENT]
        else:
            os.environ[runtimes.ENVIRONMENT] = before
    pairs = zip(done.metadata.detectors, other.detectors, strict=True)
    return max(abs(b.threshold / a.threshold - 1.0) for a, b in pairs)


def measure(case: Case, runs: int) -> dict[str, Any]:
    """All of one model's figures."""
    started = time.monotonic()
    done = pipeline.convert(case.source, case.inputs, case.labels, quantised=case.quantised, synthetic=case.synthetic)
    seconds = time.monotonic() - started
    growth = len(done.guarded) - len(done.bare)
    names = [name for name in runtimes.available() if name != "tensorflow"]
    return {
        "model": case.name,
        "calibration": "synthetic, not validated" if case.synthetic else "real",
        "calibration_inputs": len(case.inputs),
        "convert_seconds": round(seconds, 2),
        "bytes_bare": len(done.bare),
        "growth_bytes": growth,
        "growth_allowed": calibration.allowed_growth(len(done.bare)),
        "features": done.metadata.feature_count,
        "factors": len(done.result.compiled.statistics.projection),
        "taps": list(dict.fromkeys(tap.tensor for tap in done.metadata.taps)),
        "agreement": done.parity.agreement,
        "int8_accuracy": done.parity.int8_accuracy,
        "float_accuracy": done.parity.float_accuracy,
        "false_positives": false_positives(done, case.fresh),
        "threshold_shift": {
            name: round(threshold_shift(done, case, name), 4)
            for name in names
            if name != done.metadata.environment.runtime
        },
        "verified": list(done.verified.runtimes),
        "races": [race(done.bare, done.guarded, case.inputs[0], name, runs) for name in names],
    }


def broken_limits(row: dict[str, Any]) -> list[str]:
    """What a row does not keep, in words."""
    found = [
        f"latency x{race['ratio_p50']:.3f} on {race['runtime']}, at most x{LIMITS[race['runtime']]}"
        for race in row["races"]
        if not race["within_limit"]
    ]
    if row["growth_bytes"] > row["growth_allowed"]:
        found.append(f"{row['growth_bytes']} bytes more, at most {row['growth_allowed']}")
    if row["convert_seconds"] > MAX_SECONDS:
        found.append(f"converted in {row['convert_seconds']:.1f} s, at most {MAX_SECONDS:g}")
    shift = max(row["threshold_shift"].values(), default=0.0)
    if shift > MAX_SHIFT and row["false_positives"] is not None:
        found.append(f"a threshold moved by {shift:.1%} between runtimes, at most {MAX_SHIFT:.0%}")
    if not all(race["outputs_identical"] for race in row["races"]):
        found.append("outputs differ from the bare model's")
    return [f"{row['model']}: {text}" for text in found]


def show(row: dict[str, Any]) -> None:
    """Print one model's figures."""
    size = f"+{row['growth_bytes'] / 1024:.1f} KiB of {row['growth_allowed'] / 1024:.1f} allowed"
    print(f"{row['model']} ({row['calibration']})")
    print(
        f"    {row['convert_seconds']:.1f} s for {row['calibration_inputs']} inputs; {size}; {row['factors']} factors"
    )
    if row["false_positives"]:
        rates = row["false_positives"]
        print(f"    false positives {rates['measured']:.2%} of {rates['inputs']}, {rates['asked']:.0%} asked")
    shifts = ", ".join(f"{shift:.2%} on {name}" for name, shift in row["threshold_shift"].items())
    print(f"    thresholds move by {shifts or 'not known: one runtime here'}")
    for race in row["races"]:
        print(
            f"    {race['runtime']:<15} p50 {race['bare_p50_us']:8.1f} -> {race['guarded_p50_us']:8.1f} us"
            f"  x{race['ratio_p50']:.3f} ({race['ratios_p50'][0]:.3f} to {race['ratios_p50'][-1]:.3f};"
            f" bare against bare x{race['noise_p50']:.3f})"
            f"  p99 x{race['ratio_p99']:.3f}{'' if race['within_limit'] else '  ABOVE THE LIMIT'}"
        )


def main() -> int:
    """Run, print a table, and write JSON where asked. Exit code 1 where a limit is broken or a model failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows, failed = [], []
    for case in cases():
        try:
            rows.append(measure(case, options.runs))
            show(rows[-1])
        except ModelError as error:
            failed.append({"model": case.name, "error": str(error)})
            print(f"{case.name}: {error}")
    broken = [text for row in rows for text in broken_limits(row)]
    print("\n".join(["", *broken] if broken else ["", "every limit kept"]))
    if options.json:
        document = {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "threads": 1,
            "runs": options.runs,
            "limits": {**LIMITS, "seconds": MAX_SECONDS},
            "rows": rows,
            "broken_limits": broken,
            "failed": failed,
            "peak_memory_bytes": pipeline.peak_memory(),
        }
        files.write(json.dumps(document, indent=2).encode() + b"\n", options.json)
    return 1 if failed or broken else 0


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []:
        if line.startswith("model name"):
            return f"{platform.machine()}, {line.partition(':')[2].strip()}"
    return platform.machine()


if __name__ == "__main__":
    sys.exit(main())
