"""What the daemon costs beside the model: memory, time per input, and what happens over hours.

    python -m benchmarks.agent [--model FILE.tflite] [--seconds 20] [--hours 8] [--json benchmarks/results/agent.json]

The model: MLPerf Tiny's resnet8, int8, from the folder that ``EDGEGUARD_MODELS`` names; else a ResNet-8 of our own,
untrained. It is guarded with 32x32 pictures (GTSRB where ``EDGEGUARD_DATA`` has it, else made-up ones), a broker is
started (mosquitto) and a hub that acknowledges, and the daemon runs as a process of its own.

* **Memory**: resident and anonymous, with the folder and with the socket source, less those of a process that imports
  the same runtime, NumPy, paho-mqtt, ssl and Pillow and invokes the same model.
* **Time per input**, socket source: 1,000 inputs a second are offered, open loop, each answer awaited; then the round
  trip of single inputs is set beside two others, in blocks that take turns: a bare interpreter's invoke in the asking
  process, and the round trip to the least that could stand in the daemon's place, a loop that reads as many bytes,
  invokes the bare model and sends as many back. What the daemon adds is the difference to the latter; the difference
  to the former holds the waking of two processes too.
* **Hours**: the inputs, windows, health messages and broker restarts of so many hours, one after the other without the
  waiting in between: 3,600 inputs an hour, a window each ten inputs, a broker killed once an hour. Memory is read all
  along; at the end the counts of sender and hub must be the same.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import pipeline, sources
from edgeguard import data as datasets
from edgeguard.attacks.networks import NETWORKS, RESNET8_LIKE
from edgeguard.contract import frames
from edgeguard.detection import runtime as runtimes
from edgeguard.detection.guarded import TfliteModel
from edgeguard.errors import ConfigError
from firmware_bridge import resources
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import TinyHub

Array = npt.NDArray[Any]

MIB = 1 << 20
OFFERED = 1000
BLOCK = 250
LIMITS = {"share_mib": 12.0, "anonymous_mib": 48.0, "added_us": 60.0, "added_share": 0.10}

BARE = """
import ssl, sys, time
import numpy as np
import paho.mqtt.client
import PIL.Image
from edgeguard.detection.guarded import TfliteModel

model = TfliteModel(open(sys.argv[1], "rb").read())
x = np.zeros(model.input_shape, np.uint8)
for _ in range(50):
    model.invoke(model.quantise(x))
print("ready", flush=True)
sys.stdin.read()
"""
"""What the daemon's memory is compared with: no line of the daemon's own."""

SERVER = """
import socket, sys
import numpy as np
from edgeguard.detection.guarded import TfliteModel

path, file, size, answer = sys.argv[1], sys.argv[2], int(sys.argv[3]), bytes(int(sys.argv[4]))
model = TfliteModel(open(file, "rb").read())
shape = model.input_shape
pixels = shape[0] * shape[1] * shape[2]
listener = socket.socket(socket.AF_UNIX)
listener.bind(path)
listener.listen()
print("ready", flush=True)
connection, _ = listener.accept()
while True:
    content = b""
    while len(content) < size:
        piece = connection.recv(1 << 18)
        if not piece:
            sys.exit()
        content += piece
    model.invoke(model.quantise(np.frombuffer(content[-pixels:], np.uint8).reshape(shape)))
    connection.sendall(answer)
"""
"""The least that could stand in the daemon's place."""


@dataclass(frozen=True, kw_only=True)
class Guarded:
    """The files of one guarded model, and inputs for it ``uint8 [N, H, W, C]``."""

    name: str
    bare: Path
    guarded: Path
    inputs: Array


def prepare(folder: Path, model: Path | None) -> Guarded:
    """Guard the model and write everything into ``folder``."""
    inputs = pictures()
    name, source = source_of(model, inputs)
    converted = pipeline.convert(source, inputs[:1000], sidecar=True)
    bare, guarded = folder / "bare.tflite", folder / "model.guarded.tflite"
    bare.write_bytes(converted.bare)
    guarded.write_bytes(converted.guarded)
    assert converted.result.sidecar is not None
    (folder / "model.guard.npz").write_bytes(converted.result.sidecar)
    return Guarded(name=name, bare=bare, guarded=guarded, inputs=inputs[1000:3000])


def source_of(model: Path | None, inputs: Array) -> tuple[str, Any]:
    """Name of the model that is measured, and what the converter takes."""
    models = os.environ.get("EDGEGUARD_MODELS")
    found = model or (next(iter(sorted(Path(models).glob("*resnet8_int8.tflite"))), None) if models else None)
    if found is not None:
        return found.stem, found
    return RESNET8_LIKE, sources.of_keras(NETWORKS[RESNET8_LIKE](inputs.shape[1:], 10))


def pictures() -> Array:
    """3,000 pictures of 32x32 pixels, in colour, ``uint8``."""
    try:
        data = datasets.load("gtsrb")
    except ConfigError:
        coarse = np.random.default_rng(0).integers(0, 256, (3000, 8, 8, 3)).astype(np.uint8)
        return coarse.repeat(4, axis=1).repeat(4, axis=2)
    order = np.random.default_rng(0).permutation(len(data.x_train))[:3000]
    return data.x_train[order].astype(np.uint8)


class Daemon:
    """One agent as a process of its own."""

    def __init__(self, folder: Path, model: Path, port: int, source: str, *, window: str, more: str = "") -> None:
        folder.mkdir()
        self.folder = folder
        self.inbox = folder / "inbox"
        self.inbox.mkdir()
        self.socket = folder / "agent.sock"
        path = {"folder": "inbox", "socket": "agent.sock"}[source]
        (folder / "agent.toml").write_text(
            f'fleet = "demo"\ndevice = "bench-{folder.name}"\nmodel = "{model}"\nstate_dir = "state"\nlinger_s = 30\n'
            f'[broker]\nhost = "127.0.0.1"\nport = {port}\n[sources.{source}]\npath = "{path}"\n'
            f"[window]\n{window}\n{more}\n"
        )
        with (folder / "log").open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "edgeguard.agent", "--config", str(folder / "agent.toml")], stderr=log
            )
        until = time.monotonic() + 30
        while " runs model " not in (folder / "log").read_text():
            if self.process.poll() is not None or time.monotonic() > until:
                raise RuntimeError((folder / "log").read_text()[-2000:])
            time.sleep(0.05)

    def memory(self) -> resources.Resources:
        """What it uses now."""
        return resources.read(pid=self.process.pid)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


class Program:
    """A program that sends inputs to the daemon and reads its results."""

    def __init__(self, path: Path) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(str(path))
        self._reader = frames.Reader()
        self.answers: list[frames.AnyFrame] = []

    def send(self, name: str, x: Array) -> float:
        """Send one input, waiting while the daemon does not read; seconds that took."""
        content = _frame(name, x)
        started = time.perf_counter()
        self._connection.sendall(content)
        return time.perf_counter() - started

    def read(self, *, wait: bool) -> int:
        """Take the results that are there, or wait for one; how many came."""
        self._connection.setblocking(wait)
        try:
            found = self._reader.feed(self._connection.recv(1 << 20))
        except BlockingIOError:
            return 0
        finally:
            self._connection.setblocking(True)
        self.answers += [frame for frame, _ in found]
        return len(found)

    def ask(self, x: Array) -> float:
        """The round trip of one input, in seconds."""
        content = _frame("", x)
        started = time.perf_counter()
        self._connection.sendall(content)
        while not self.read(wait=True):
            pass
        return time.perf_counter() - started

    def close(self) -> None:
        """Leave."""
        self._connection.close()


class Plain:
    """The program's side of the bare server."""

    def __init__(self, path: Path, answer: int) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._connection.connect(str(path))
        self._answer = answer

    def ask(self, x: Array) -> float:
        """The round trip of one input, in seconds."""
        content = _frame("", x)
        started = time.perf_counter()
        self._connection.sendall(content)
        left = self._answer
        while left:
            left -= len(self._connection.recv(1 << 20))
        return time.perf_counter() - started

    def close(self) -> None:
        """Leave."""
        self._connection.close()


def memory(guarded: Guarded, folder: Path, port: int) -> dict[str, Any]:
    """The daemon's share of memory with each source, after 2,000 inputs."""
    bare = subprocess.Popen(
        [sys.executable, "-c", BARE, str(guarded.bare)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert bare.stdout is not None and bare.stdout.readline() == "ready\n"
    base = resources.read(pid=bare.pid)
    bare.communicate()
    rows: dict[str, Any] = {"bare_process": _mib(base)}
    for source in ("folder", "socket"):
        daemon = Daemon(folder / source, guarded.guarded, port, source, window="inputs = 64\nseconds = 1.0")
        feed(daemon, source, guarded.inputs)
        time.sleep(2)
        used = daemon.memory()
        assert daemon.stop() == 0
        rows[source] = {
            **_mib(used),
            "share_mib": round(((used.resident_bytes or 0) - (base.resident_bytes or 0)) / MIB, 2),
        }
    return rows


def feed(daemon: Daemon, source: str, inputs: Array) -> None:
    """Bring inputs to a daemon and wait until it has taken them."""
    if source == "socket":
        program = Program(daemon.socket)
        for x in inputs:
            program.ask(x)
        program.close()
        return
    for number, start in enumerate(range(0, len(inputs), 50)):
        temporary = daemon.inbox / f".{number:06d}.tmp"
        with temporary.open("wb") as file:
            np.save(file, inputs[start : start + 50])
        temporary.rename(daemon.inbox / f"{number:06d}.npy")
    while list(daemon.inbox.glob("*.npy")):
        time.sleep(0.1)


def offered(daemon: Daemon, hub: TinyHub, inputs: Array, seconds: float) -> dict[str, Any]:
    """A thousand inputs a second, open loop: what was answered, lost, and how long the sender was held up."""
    program = Program(daemon.socket)
    before = hub.inputs()
    count = round(seconds * OFFERED)
    cpu = daemon.memory().cpu_seconds or 0.0
    held: list[float] = []
    started = time.perf_counter()
    for number in range(count):
        rest = started + number / OFFERED - time.perf_counter()
        if rest > 0:
            time.sleep(rest)
        held.append(program.send(str(number), inputs[number % len(inputs)]))
        program.read(wait=False)
    sent_s = time.perf_counter() - started
    while len(program.answers) < count:
        program.read(wait=True)
    taken = (daemon.memory().cpu_seconds or 0.0) - cpu
    until = time.monotonic() + 30
    while hub.inputs() - before < count and time.monotonic() < until:
        time.sleep(0.1)
    refused = sum(not isinstance(answer, frames.Result) for answer in program.answers)
    program.close()
    return {
        "offered_per_s": OFFERED,
        "sent_per_s": round(count / sent_s, 1),
        "inputs": count,
        "answered": len(program.answers) - refused,
        "refused": refused,
        "counted_by_the_hub": hub.inputs() - before,
        "sender_held_up_ms_p99": round(1e3 * float(np.quantile(held, 0.99)), 3),
        "cpu_us_per_input": round(1e6 * taken / count, 1),
    }


def round_trips(daemon: Daemon, guarded: Guarded, folder: Path, blocks: int = 30) -> dict[str, Any]:
    """Round trips to the daemon and to a bare server, and a bare invoke here, in turns; medians in microseconds."""
    program = Program(daemon.socket)
    program.ask(guarded.inputs[0])
    answer = frames.encode(program.answers[-1])
    path = folder / "bare.sock"
    sizes = (str(len(_frame("", guarded.inputs[0]))), str(len(answer)))
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, path, guarded.bare, *sizes], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None and server.stdout.readline() == "ready\n"
    plain = Plain(path, len(answer))
    bare = TfliteModel(guarded.bare.read_bytes())
    steps: dict[str, Callable[[Array], float]] = {
        "daemon": program.ask,
        "server": plain.ask,
        "invoke": partial(timed, bare),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    medians: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    for block in range(blocks):
        part = guarded.inputs[(block * BLOCK) % (len(guarded.inputs) - BLOCK) :][:BLOCK]
        for name in names[block % 3 :] + names[: block % 3]:
            found = [paced(steps[name], x) for x in part]
            times[name] += found
            medians[name].append(float(np.median(found)))
    program.close()
    plain.close()
    server.wait(10)
    p50 = {name: 1e6 * float(np.median(values)) for name, values in times.items()}

    def added(to: str) -> float:
        return 1e6 * float(np.median([a - b for a, b in zip(medians["daemon"], medians[to], strict=True)]))

    return {
        **{f"{name}_p50_us": round(value, 1) for name, value in p50.items()},
        "daemon_p99_us": round(1e6 * float(np.quantile(times["daemon"], 0.99)), 1),
        "added_p50_us": round(added("server"), 1),
        "added_with_transport_p50_us": round(added("invoke"), 1),
        "blocks": blocks,
        "inputs": len(times["daemon"]),
    }


def paced(step: Callable[[Array], float], x: Array) -> float:
    """One measured step in each millisecond, as at the offered rate."""
    started = time.perf_counter()
    found = step(x)
    rest = 1.0 / OFFERED - (time.perf_counter() - started)
    if rest > 0:
        time.sleep(rest)
    return found


def timed(model: TfliteModel, x: Array) -> float:
    """One bare invoke, its outputs read, in seconds."""
    tensor = model.quantise(x)
    started = time.perf_counter()
    model.invoke(tensor)
    return time.perf_counter() - started


def hours(guarded: Guarded, folder: Path, broker: Mosquitto, hub: TinyHub, count: int) -> dict[str, Any]:
    """So many hours' worth of inputs, windows, health messages and broker restarts, without the waiting in between."""
    daemon = Daemon(
        folder / "hours",
        guarded.guarded,
        broker.port,
        "socket",
        window="inputs = 10\nseconds = 10.0",
        more="[spool]\nresend_s = 1.0\n",
    )
    program = Program(daemon.socket)
    before = hub.inputs()
    inputs = count * 3600
    every = inputs // count  # one restart an hour
    used: list[tuple[int, int]] = []
    for number in range(inputs):
        program.ask(guarded.inputs[number % len(guarded.inputs)])
        program.answers.clear()
        if number % every == every // 2:
            broker.kill()
        if number % every == every // 2 + 100:
            broker.start()
        if number % (inputs // 48) == 0:
            found = daemon.memory()
            used.append((found.resident_bytes or 0, found.anonymous_bytes or 0))
            print(f"  hour {number / 3600:.1f}: {used[-1][0] / MIB:.1f} MiB resident", flush=True)
    program.close()
    code = daemon.stop()
    until = time.monotonic() + 60
    while hub.inputs() - before < inputs and time.monotonic() < until:
        time.sleep(0.2)
    half = len(used) // 2
    return {
        "hours": count,
        "inputs": inputs,
        "broker_restarts": count,
        "counted_by_the_hub": hub.inputs() - before,
        "reports": len(hub.reports()),
        "exit_code": code,
        "resident_mib": [round(r / MIB, 1) for r, _ in used],
        "anonymous_mib_first_half": round(float(np.median([a for _, a in used[1:half]])) / MIB, 2),
        "anonymous_mib_second_half": round(float(np.median([a for _, a in used[half:]])) / MIB, 2),
    }


@contextmanager
def infrastructure() -> Iterator[tuple[Path, Mosquitto, TinyHub]]:
    """A folder, a broker and a hub that acknowledges."""
    with tempfile.TemporaryDirectory() as name:
        broker = Mosquitto(Path(name) / "mosquitto")
        broker.start()
        hub = TinyHub(broker.port)
        try:
            yield Path(name), broker, hub
        finally:
            hub.close()
            broker.stop()


def main() -> int:
    """Measure, print, and write what was measured. 0 when every limit is kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--hours", type=int, default=8)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with infrastructure() as (folder, broker, hub):
        guarded = prepare(folder, options.model)
        print(f"{guarded.name} on {runtimes.choose()}", flush=True)
        found: dict[str, Any] = {
            "model": guarded.name,
            "runtime": runtimes.choose(),
            "machine": platform.machine(),
            "limits": LIMITS,
            "memory": memory(guarded, folder, broker.port),
        }
        daemon = Daemon(
            folder / "offered", guarded.guarded, broker.port, "socket", window="inputs = 1000\nseconds = 10.0"
        )
        found["offered"] = offered(daemon, hub, guarded.inputs, options.seconds)
        found["time"] = round_trips(daemon, guarded, folder)
        found["stopped"] = daemon.stop()
        if options.hours:
            found["hours"] = hours(guarded, folder, broker, hub, options.hours)
    kept = judge(found)
    found["kept"] = kept
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(kept.values()) else 1


def judge(found: dict[str, Any]) -> dict[str, bool]:
    """Which limits are kept."""
    spent, time_ = found["memory"], found["time"]
    kept = {
        f"{source}: {name}": spent[source][key] <= LIMITS[limit]
        for source in ("folder", "socket")
        for name, key, limit in (
            ("share", "share_mib", "share_mib"),
            ("anonymous", "anonymous_mib", "anonymous_mib"),
        )
    }
    kept["time added"] = time_["added_p50_us"] <= max(
        LIMITS["added_us"], LIMITS["added_share"] * time_["invoke_p50_us"]
    )
    rate = found["offered"]
    kept["nothing lost at the offered rate"] = rate["inputs"] == rate["answered"] == rate["counted_by_the_hub"]
    if "hours" in found:
        over = found["hours"]
        kept["counts reconcile"] = over["inputs"] == over["counted_by_the_hub"] and over["exit_code"] == 0
        kept["memory flat"] = over["anonymous_mib_second_half"] - over["anonymous_mib_first_half"] < 1.0
    return kept


def _frame(name: str, x: Array) -> bytes:
    return frames.encode(frames.Input(id=name, encoding="array", dtype="uint8", shape=x.shape), x.tobytes())


def _mib(used: resources.Resources) -> dict[str, float]:
    return {
        "resident_mib": round((used.resident_bytes or 0) / MIB, 2),
        "anonymous_mib": round((used.anonymous_bytes or 0) / MIB, 2),
    }


if __name__ == "__main__":
    sys.exit(main())
