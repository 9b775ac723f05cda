"""What an update costs a device: memory of the daemon and of its children, and the delay of an input at the swap.

    python -m benchmarks.update [--model FILE.tflite] [--json benchmarks/results/update.json]

Two models are measured: MLPerf Tiny's resnet8, int8, from the folder that ``EDGEGUARD_MODELS`` names, or the one that
is given, or else a small network of our own; and a network of our own of nearly 2 MiB. Ours have random convolutions
under a last layer that was fitted to made-up pictures. The daemon and the broker are those of
:mod:`benchmarks.agent`; a real repository is served over HTTP. The release is a repair of the same network, fitted to
other pictures, with its sidecar; the daemon runs the socket source and is asked about one input after the other all
through the update.

* **The daemon's anonymous memory** is read each 5 ms, and its largest value during the update set against the median
  of a second before it. Limit: 4 MiB. Two models lie in memory for as long as the exchange takes.
* **The children** that fetch and check: the largest resident size that the kernel saw of each (``VmHWM``).
* **The delay**: the slowest answer within the update beside the median before it, and the same with no update at work,
  over as many answers: on a busy machine the slowest of many is slow anyhow.
* **The exchange**, in processor time of one thread, which other processes do not lengthen: of one inference; of what
  the loop itself does to take the new model, limit: one inference; and of opening the file, in another thread: the
  runtime holds Python's lock meanwhile, and so holds up the loop once.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.agent import MIB, Array, Daemon, Program, infrastructure, pictures, source_of
from converters import lowering, pipeline, sources
from edgeguard.agent.inference import Engine, Running
from edgeguard.contract.messages import Reported
from edgeguard.detection import runtime as runtimes
from edgeguard.detection import sidecar
from edgeguard.detection.cascade import Budget
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import EdgeGuardError
from edgeguard.release.repository import Repository
from edgeguard.release.roles import Release
from firmware_bridge import resources
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import TinyHub

LIMIT_MIB = 4.0
READ_S = 0.005
LONGEST_S = 300.0
CHILDREN = {"edgeguard.release.fetch": "fetch", "edgeguard.agent.admission": "check"}


SMALL = ((16, 2), (32, 2), (64, 2))
LARGE = ((64, 2), (128, 2), (256, 2), (256, 1), (384, 2))
"""Filters and stride of each convolution of our own networks; the larger one has 1.9 million weights."""
TIMES = 50


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A guarded file with its sidecar beside it, what shall replace it, and inputs."""

    name: str
    path: Path
    repaired: pipeline.Conversion
    inputs: Array


def prepare(folder: Path, name: str, source: Any, inputs: Array) -> Prepared:
    """Guard a model twice, fitted to one half of the inputs but the last 100, and to the other."""
    half = (len(inputs) - 100) // 2
    parts = (inputs[:half], inputs[half : 2 * half])
    first, second = (pipeline.convert(source, part, sidecar=True) for part in parts)
    path = folder / "model.guarded.tflite"
    path.write_bytes(first.guarded)
    sidecar.path_beside(path).write_bytes(first.result.sidecar or b"")
    return Prepared(name=name, path=path, repaired=second, inputs=inputs[2 * half :])


def made_up(count: int) -> tuple[Array, Array]:
    """Pictures ``uint8 [count, 32, 32, 3]`` of ten kinds, and which kind each is: coarse patterns under noise."""
    rng = np.random.default_rng(0)
    kinds, labels = rng.integers(32, 224, (10, 8, 8, 3)), rng.integers(0, 10, count)
    coarse = np.clip(kinds[labels] + rng.normal(0, 16, (count, 8, 8, 3)), 0, 255).astype(np.uint8)
    return coarse.repeat(4, axis=1).repeat(4, axis=2), labels


def own(convolutions: tuple[tuple[int, int], ...], inputs: Array, labels: Array) -> Any:
    """An int8 network with random convolutions and a last layer fitted by ridge regression, for the converter."""
    import keras

    keras.utils.set_random_seed(0)
    layers = keras.layers
    pixels = x = keras.Input(inputs.shape[1:])
    x = layers.Rescaling(1.0 / 255.0)(x)
    for width, stride in convolutions:
        x = layers.Conv2D(width, 3, stride, padding="same", use_bias=False)(x)
        x = layers.ReLU()(layers.BatchNormalization()(x))
    x = layers.GlobalAveragePooling2D()(x)
    last = layers.Dense(10)
    model = keras.Model(pixels, layers.Softmax()(last(x)))
    features = keras.Model(pixels, x).predict(inputs.astype(np.float32), verbose=0)
    mean, spread = features.mean(axis=0), features.std(axis=0) + 1e-9
    scaled = (features - mean) / spread
    wanted = 10.0 * np.eye(10)[labels] - 1.0
    weights = np.linalg.solve(scaled.T @ scaled + 10.0 * np.eye(len(mean)), scaled.T @ wanted)
    last.set_weights([weights / spread[:, np.newaxis], -(mean / spread) @ weights])
    content = lowering.lower(sources.of_keras(model), inputs).int8_tflite
    assert content is not None
    return sources.Source(name="own", tflite=content)


@contextmanager
def served(folder: Path, repaired: pipeline.Conversion) -> Iterator[tuple[Release, str]]:
    """The repair in a repository behind an HTTP server; what the daemon's configuration says of it."""
    repository = Repository.create(
        folder / "release", folder / "keys", folder / "offline", clock=lambda: datetime.now(timezone.utc)
    )
    metadata = repaired.metadata
    release = repository.add_repair(
        repaired.guarded,
        name="bench",
        model_digest=metadata.model_digest,
        guard_digest=metadata.guard_digest,
        replaces=metadata.model_digest,
        sidecar=repaired.result.sidecar,
    )
    (folder / "root.json").write_bytes(repository.root())
    handler = functools.partial(_Quiet, directory=str(folder / "release"))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_address[1]}"
    more = (
        f'[update]\nmetadata_url = "{url}/metadata/"\ntargets_url = "{url}/targets/"\nroot = "{folder}/root.json"\n'
        "retry_s = 3600\n"
    )
    try:
        yield release, more
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        """Be quiet."""


@dataclass
class Watch:
    """Reads memory in a thread of its own until it is told to stop."""

    pid: int
    anonymous: list[int] = field(default_factory=list)
    children: dict[str, int] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._work)
        self._thread.start()
        return self

    def __exit__(self, *why: object) -> None:
        self._stop.set()
        self._thread.join()

    def _work(self) -> None:
        while not self._stop.wait(READ_S):
            self.anonymous.append(resources.read(pid=self.pid).anonymous_bytes or 0)
            for child in Path(f"/proc/{self.pid}/task").glob("*/children"):
                for pid in _text(child).split():
                    self._child(Path("/proc") / pid)

    def _child(self, process: Path) -> None:
        line = _text(process / "cmdline").replace("\0", " ")
        for module, name in CHILDREN.items():
            if module in line:
                peak = [row for row in _text(process / "status").splitlines() if row.startswith("VmHWM")]
                if peak:
                    self.children[name] = max(self.children.get(name, 0), int(peak[0].split()[1]) << 10)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # the process has ended
        return ""


def measure(prepared: Prepared, folder: Path, broker: Mosquitto, hub: TinyHub) -> dict[str, Any]:
    """One update, watched."""
    path, repaired, inputs = prepared.path, prepared.repaired, prepared.inputs
    with served(folder, repaired) as (release, more):
        daemon = Daemon(folder / "device", path, broker.port, "socket", window="inputs = 64\nseconds = 1.0", more=more)
        program = Program(daemon.socket)
        ask(program, inputs, seconds=3.0)  # warm
        with Watch(daemon.process.pid) as before:
            quiet = ask(program, inputs, seconds=1.0)
        hub.hint(f"bench-{daemon.folder.name}", release.target, release.sequence)
        with Watch(daemon.process.pid) as during:
            busy = ask(program, inputs, seconds=LONGEST_S, until=lambda: _outcome(hub) in ("updated", "refused"))
        with Watch(daemon.process.pid) as after:
            calm = ask(program, inputs, seconds=3.0, count=len(busy))
        reported = hub.latest(Reported)
        program.close()
        stopped = daemon.stop()
    base = statistics.median(before.anonymous)
    return {
        "model": prepared.name,
        "model_kib": round(len(repaired.guarded) / 1024, 1),
        "sidecar_kib": round(len(repaired.result.sidecar or b"") / 1024, 1),
        "outcome": reported.state if reported else None,
        "reason": reported.reason if reported else None,
        "exit_code": stopped,
        "update_s": round(sum(busy), 2),
        "daemon_anonymous_mib": {
            "before": round(base / MIB, 2),
            "largest_during": round(max(during.anonymous) / MIB, 2),
            "added": round((max(during.anonymous) - base) / MIB, 2),
            "after": round(statistics.median(after.anonymous) / MIB, 2),
            "limit_added": LIMIT_MIB,
        },
        "children_peak_resident_mib": {name: round(peak / MIB, 1) for name, peak in sorted(during.children.items())},
        "answers_ms": {
            "median_before": round(statistics.median(quiet) * 1e3, 3),
            "median_during": round(statistics.median(busy) * 1e3, 3),
            "slowest_during": round(max(busy) * 1e3, 3),
            "slowest_of_as_many_after": round(max(calm) * 1e3, 3),
            "count": len(busy),
        },
        "exchange": exchange(prepared),
    }


def exchange(prepared: Prepared) -> dict[str, float]:
    """Processor time of one thread, in milliseconds: an inference, the loop's share of the exchange, the opening."""
    content = prepared.repaired.guarded
    model = GuardedModel.load(content)
    held = sidecar.decode(
        prepared.repaired.result.sidecar or b"",
        digest=str(model.metadata.sidecar_digest),
        metadata=model.metadata,
        name="sidecar",
    )
    running, x = Running(model=model, sidecar=held, sequence=1), prepared.inputs[0]

    def taken() -> Engine:
        return Engine(running, budget=Budget(per_second=20.0, burst=5.0), audit_share=0.0, rng=np.random.default_rng(0))

    inference = _cpu_ms(lambda: model.infer(x))
    found = {"inference_ms": inference, "loop_ms": _cpu_ms(taken)}
    found["opening_ms"] = _cpu_ms(lambda: runtimes.open_interpreter(content))
    for name in ("loop", "opening"):
        found[f"{name}_in_inferences"] = found[f"{name}_ms"] / inference
    return {name: round(value, 3) for name, value in found.items()}


def _cpu_ms(call: Any) -> float:
    """The median."""
    times = []
    for _ in range(TIMES):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return statistics.median(times) * 1e3


def ask(
    program: Program,
    inputs: Array,
    *,
    seconds: float,
    count: int | None = None,
    until: Any = lambda: False,
) -> list[float]:
    """Round trips, one after the other, in seconds: for so long, or so many, or until something happened."""
    times: list[float] = []
    ends = time.monotonic() + (seconds if count is None else LONGEST_S)
    while time.monotonic() < ends and (count is None or len(times) < count):
        times.append(program.ask(inputs[len(times) % len(inputs)]))
        if len(times) % 50 == 0 and until():
            break
    return times


def _outcome(hub: TinyHub) -> str | None:
    reported = hub.latest(Reported)
    return reported.state if reported else None


def models(given: Path | None) -> list[tuple[str, Any, Array]]:
    """Name, source and inputs of each model that is measured."""
    inputs, labels = made_up(1300)
    found = [("own-large", own(LARGE, inputs[:600], labels[:600]), inputs)]
    if given is not None or os.environ.get("EDGEGUARD_MODELS"):
        some = pictures()[:2100]
        return [(*source_of(given, some), some), *found]
    return [("own-small", own(SMALL, inputs[:600], labels[:600]), inputs), *found]


def main() -> int:
    """Measure, print, and write what was measured: 0 when all updates went through and the limits are kept, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = []
    try:
        for name, source, inputs in models(options.model):
            with infrastructure() as (folder, broker, hub):
                runs.append(measure(prepare(folder, name, source, inputs), folder, broker, hub))
    except EdgeGuardError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    checks = {
        "all updated": all(one["outcome"] == "updated" and one["exit_code"] == 0 for one in runs),
        "at most 4 MiB of memory added": {
            one["model"]: one["daemon_anonymous_mib"]["added"] <= LIMIT_MIB for one in runs
        },
        "the exchange takes the loop at most one inference": {
            one["model"]: one["exchange"]["loop_in_inferences"] <= 1.0 for one in runs
        },
    }
    found = {"runtime": runtimes.choose(), "machine": platform.machine(), "checks": checks, "runs": runs}
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(all(one.values()) if isinstance(one, dict) else one for one in checks.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
