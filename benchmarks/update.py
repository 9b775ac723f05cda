"""What an update costs a device: memory of the daemon and of its children, and the delay of an input at the swap.

    python -m benchmarks.update [--model FILE.tflite] [--json benchmarks/results/update.json]

The daemon, the model and the broker are those of :mod:`benchmarks.agent`; a real repository is served over HTTP. The
release is a repair of the same network, fitted to other pictures, with its sidecar; the daemon runs the socket source
and is asked about one input after the other all through the update.

* **The daemon's anonymous memory** is read each 5 ms, and its largest value during the update set against the median
  of a second before it. Limit: 4 MiB.
* **The children** that fetch and check: the largest resident size that the kernel saw of each (``VmHWM``).
* **The delay**: the slowest answer within the update beside the median before it, and the same with no update at work,
  over as many answers: on a busy machine the slowest of many is slow anyhow.
"""

from __future__ import annotations

import argparse
import functools
import http.server
import json
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from benchmarks.agent import MIB, Array, Daemon, Program, infrastructure, pictures, source_of
from converters import pipeline
from edgeguard.contract.messages import Reported
from edgeguard.detection import runtime as runtimes
from edgeguard.detection import sidecar
from edgeguard.release.repository import Repository
from edgeguard.release.roles import Release
from firmware_bridge import resources
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import TinyHub

LIMIT_MIB = 4.0
READ_S = 0.005
LONGEST_S = 300.0
CHILDREN = {"edgeguard.release.fetch": "fetch", "edgeguard.agent.admission": "check"}


def prepare(folder: Path, model: Path | None) -> tuple[str, Path, pipeline.Conversion, Array]:
    """A guarded file with its sidecar, what shall replace it, and inputs."""
    inputs = pictures()
    name, source = source_of(model, inputs)
    first, second = (pipeline.convert(source, part, sidecar=True) for part in (inputs[:1000], inputs[1000:2000]))
    path = folder / "model.guarded.tflite"
    path.write_bytes(first.guarded)
    sidecar.path_beside(path).write_bytes(first.result.sidecar or b"")
    return name, path, second, inputs[2000:]


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


def measure(folder: Path, broker: Mosquitto, hub: TinyHub, model: Path | None) -> dict[str, Any]:
    """One update, watched."""
    name, path, repaired, inputs = prepare(folder, model)
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
        "model": name,
        "runtime": runtimes.choose(),
        "machine": platform.machine(),
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
    }


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


def main() -> int:
    """Measure, print, and write what was measured. 0 when the update went through and the limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with infrastructure() as (folder, broker, hub):
        found = measure(folder, broker, hub, options.model)
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    kept = found["outcome"] == "updated" and found["daemon_anonymous_mib"]["added"] <= LIMIT_MIB
    return 0 if kept else 1


if __name__ == "__main__":
    raise SystemExit(main())
