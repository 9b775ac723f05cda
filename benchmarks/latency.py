"""Guarded against bare: latency, size and identity of outputs, side by side in one run.

    python -m benchmarks.latency [--runs 1000] [--json benchmarks/results/latency.json]

Models: the demo's own CNN on digits, and every ``.tflite`` file in the folder that ``EDGEGUARD_MODELS`` names
(calibrated on random inputs there: for structure, latency, size and identity only, nothing is said about detection).
One thread; bare and guarded runs alternate; all outputs are read; p50 and p99 in microseconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import pipeline, sources
from edgeguard import data as datasets
from edgeguard.attacks import victims
from edgeguard.attacks.badnets import BadNets
from edgeguard.detection import runtime as runtimes
from edgeguard.detection.guarded import TfliteModel

CALIBRATION = 420
WARM_UP = 30


def models() -> Iterator[tuple[str, sources.Source, npt.NDArray[Any], bool]]:
    """Name, source, calibration inputs, and whether these are real."""
    data, x_owner, _ = datasets.hold_out(datasets.load("digits"), 600)
    attack = BadNets.for_shape(data.shape)
    images, labels = attack.poison(data.x_train.astype(np.uint8), data.y_train)
    model, _ = victims.trained(images, labels, len(data.classes), epochs=25, cache=victims.cache_folder())
    yield "digits CNN, int8", sources.of_keras(model), x_owner, True
    folder = os.environ.get("EDGEGUARD_MODELS")
    for path in sorted(Path(folder).glob("*.tflite")) if folder else []:
        source = sources.read(path)
        shape = TfliteModel(path.read_bytes()).input_shape
        pixels = np.random.default_rng(0).integers(0, 256, (CALIBRATION, *shape), dtype=np.uint8)
        yield path.stem, source, pixels, False


def compare(bare: bytes, guarded: bytes, one: npt.NDArray[Any], runtime: str, runs: int) -> dict[str, Any]:
    """Interleaved timings of both files on one runtime."""
    pair = [TfliteModel(content, runtime=runtime) for content in (bare, guarded)]
    tensor = pair[0].quantise(one)
    identical = all(
        a.tobytes() == b.tobytes() for a, b in zip(pair[0].invoke(tensor), pair[1].invoke(tensor), strict=False)
    )
    times: list[list[int]] = [[], []]
    for run in range(runs + WARM_UP):
        for model, taken in zip(pair, times, strict=True):
            started = time.perf_counter_ns()
            model.invoke(tensor)
            if run >= WARM_UP:
                taken.append(time.perf_counter_ns() - started)
    (bare50, bare99), (guarded50, guarded99) = (np.percentile(t, (50, 99)) / 1000.0 for t in times)
    return {
        "runtime": runtime,
        "bare_p50_us": round(float(bare50), 2),
        "bare_p99_us": round(float(bare99), 2),
        "guarded_p50_us": round(float(guarded50), 2),
        "guarded_p99_us": round(float(guarded99), 2),
        "ratio_p50": round(float(guarded50 / bare50), 3),
        "outputs_identical": identical,
    }


def main() -> int:
    """Run, print a table, and write JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name, source, inputs, validated in models():
        done = pipeline.convert(source, inputs)
        for runtime in runtimes.available():
            if runtime == "tensorflow":
                continue
            row = {
                "model": name,
                "bytes_bare": len(done.bare),
                "bytes_guarded": len(done.guarded),
                "features": done.metadata.feature_count,
                "calibration": "real" if validated else "synthetic, not validated",
                "runs": options.runs,
                **compare(done.bare, done.guarded, inputs[0], runtime, options.runs),
            }
            rows.append(row)
            print(
                f"{name:<30} {runtime:<15} p50 {row['bare_p50_us']:8.1f} -> {row['guarded_p50_us']:8.1f} us"
                f"  x{row['ratio_p50']:.3f}  p99 {row['bare_p99_us']:8.1f} -> {row['guarded_p99_us']:8.1f} us"
                f"  +{(len(done.guarded) - len(done.bare)) / 1024:.1f} KiB"
            )
    if options.json:
        document = {"cpu": platform.machine(), "cores": os.cpu_count(), "threads": 1, "rows": rows}
        pipeline.write(json.dumps(document, indent=2).encode() + b"\n", options.json)
    return 0 if all(row["outputs_identical"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
