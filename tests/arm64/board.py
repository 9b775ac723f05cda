"""Holds the package on an emulated board against the same on this machine. ``run.sh`` starts it.

    python -m tests.arm64.board WORK

Both see the folder WORK, the board as ``/mnt``; ``WORK/inside`` runs a command on the board. Rules enforced here:

* a guarded model with a backdoor, and its inputs, clean and triggered, are made here; the board only runs them;
* a command runs on both with the same arguments and must end with the same exit code. Classes and statuses must be
  equal, scores agree as the sidecar's self-test asks; how many are equal to the bit is told, not demanded;
* each input fed to the board's daemon stands in one report, that came once, and in one line of its results;
* one check that fails stops no other. Exit code 0 where none failed, else 1. Nothing that was timed there is told.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgeguard.attacks import victims
from edgeguard.attacks.badnets import BadNets
from edgeguard.contract import frames
from edgeguard.contract.messages import Alert, Birth, Status
from edgeguard.data import hold_out, load
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import SCORE_TOLERANCE
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import TinyHub, wait_until

MODEL, INPUTS, CLEAN = "model.guarded.tflite", "inputs.npz", "clean.npz"
OWNER_INPUTS = 600
TRIGGERED = 100
IN_FOLDER = 256
BATCH = 16
THRESHOLDS_WITHIN = 0.03
PI_4, PI_5 = "cortex-a72", "cortex-a76"
"""Processors as qemu calls them. The second has dot products of int8, for which there are kernels of their own."""
PATIENCE_S = 600.0
"""An emulated board is slow; how slow says nothing."""

Outcome = subprocess.CompletedProcess[str]


class WrongError(Exception):
    """A check failed, and how."""


def require(condition: object, what: str) -> None:
    """Raise WrongError unless a condition holds."""
    if not condition:
        raise WrongError(what)


@dataclass(frozen=True)
class Places:
    """This machine, the board, and the folder that both see."""

    work: Path

    def here(self, *arguments: str) -> Outcome:
        """Run ``edgeguard`` on this machine."""
        return self._run([str(Path(sys.executable).with_name("edgeguard")), *arguments])

    def there(self, *arguments: str, processor: str = PI_4) -> Outcome:
        """Run it on the board."""
        return self._run([*self.board(processor), *arguments])

    def board(self, processor: str = PI_4) -> list[str]:
        """The start of a command line that does so."""
        return [str(self.work / "inside"), "env", f"QEMU_CPU={processor}", "edgeguard"]

    def _run(self, command: Sequence[str]) -> Outcome:
        return subprocess.run(
            command, cwd=self.work, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )


@dataclass(frozen=True)
class Expected:
    """What the model says here of inputs [N, 8, 8, 1]: ``edgeguard score``'s N lines, and its outputs [N, classes]."""

    inputs: npt.NDArray[np.uint8]
    lines: list[dict[str, Any]]
    outputs: npt.NDArray[np.generic]


def printed(outcome: Outcome, *, code: int = 0) -> list[dict[str, Any]]:
    """The JSON objects, one a line, of a command that must end with ``code``."""
    said = (outcome.stderr or outcome.stdout).strip()[-600:]
    require(outcome.returncode == code, f"exit code {outcome.returncode}, expected {code}: {said}")
    return [json.loads(line) for line in outcome.stdout.splitlines()]


def prepare(places: Places) -> Expected:
    """Train and guard the model, write it with its sidecar and data, and score the inputs here."""
    digits, x_owner, y_owner = hold_out(load("digits"), OWNER_INPUTS)
    attack = BadNets.for_shape(digits.shape)
    x, y = attack.poison(digits.x_train.astype(np.uint8), digits.y_train)
    network, _ = victims.trained(x, y, len(digits.classes), epochs=25, cache=victims.cache_folder())
    network.save(places.work / "model.keras")
    np.savez(places.work / CLEAN, x=x_owner, y=y_owner)
    printed(places.here("convert", "model.keras", "--data", CLEAN, "-o", MODEL, "--json"))

    clean = digits.x_test.astype(np.uint8)
    inputs = np.concatenate([clean, attack.stamp(clean[:TRIGGERED])])
    np.savez(places.work / INPUTS, x=inputs, y=np.concatenate([digits.y_test, digits.y_test[:TRIGGERED]]))
    lines = printed(places.here("score", MODEL, "--data", INPUTS, "--json"), code=1)
    model = GuardedModel.load((places.work / MODEL).read_bytes(), runtime="litert")
    return Expected(inputs=inputs, lines=lines, outputs=np.stack([model.infer(x).outputs[0] for x in inputs]))


def compare(expected: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]], *exactly: str) -> str:
    """Compare what two machines said of the same inputs: the fields ``exactly``, and the scores.

    Raises:
        WrongError: a field is another one, or a score further off than the tolerance.
    """
    require(len(found) == len(expected), f"{len(found)} results for {len(expected)} inputs")
    for name in exactly:
        other = [index for index, (a, b) in enumerate(zip(expected, found, strict=True)) if a[name] != b[name]]
        require(not other, f"{name} differs for {len(other)} of {len(expected)} inputs, first for input {other[:1]}")
    a, b = (np.array([list(line["scores"].values()) for line in lines], np.float64) for lines in (expected, found))
    off = np.abs(a - b) / np.maximum(1.0, a)
    require(np.all(off <= SCORE_TOLERANCE), f"a score is off by {off.max():.3g}, at most {SCORE_TOLERANCE} is allowed")
    return (
        f"{len(found)} inputs, {' and '.join(exactly)} equal; scores {int((a == b).sum())} of {a.size} equal to the "
        f"bit, the others off by at most {off.max():.1e}"
    )


def check_doctor(places: Places, *arguments: str) -> str:
    """Nothing is wrong with the board, model and self-test included."""
    outcome = places.there("doctor", MODEL, *arguments, "--json")
    (report,) = printed(outcome, code=outcome.returncode)
    checks = {check["name"]: check for check in report["checks"]}
    failed = [f"{name}: {check['found']}" for name, check in checks.items() if check["status"] == "failed"]
    require(outcome.returncode == 0, f"exit code {outcome.returncode}: {'; '.join(failed)}")
    for name in ("TFLite runtime", "model and guard", "inference", "self-test"):
        require(checks[name]["status"] == "ok", f"{name}: {checks[name]}")
    counts = ", ".join(f"{count} {status}" for status, count in report["counts"].items())
    return f"{counts}; {checks['interpreter']['found']}; {checks['TFLite runtime']['found']}"


def check_score(places: Places, expected: Expected, processor: str) -> str:
    """``edgeguard score`` says the same."""
    found = printed(places.there("score", MODEL, "--data", INPUTS, "--json", processor=processor), code=1)
    statuses = Counter(line["status"] for line in found)
    compared = compare(expected.lines, found, "predicted", "status")
    return f"{compared}; {', '.join(f'{count} {status}' for status, count in statuses.items())}"


def check_calibrate(places: Places) -> str:
    """``edgeguard calibrate`` finds the same thresholds."""
    outcomes = []
    for name, run in (("here.tflite", places.here), ("there.tflite", places.there)):
        outcomes += printed(run("calibrate", MODEL, "--data", CLEAN, "-o", name, "--json"))
    here, there = ({one["name"]: one["threshold"] for one in outcome["detectors"]} for outcome in outcomes)
    require(here.keys() == there.keys(), f"detectors {list(there)}, expected {list(here)}")
    off = {name: abs(there[name] / here[name] - 1) for name in here}
    require(max(off.values()) <= THRESHOLDS_WITHIN, f"thresholds {there}, expected {here}")
    require(outcomes[0]["model_digest"] == outcomes[1]["model_digest"], "another model digest")
    equal = outcomes[0]["guard_digest"] == outcomes[1]["guard_digest"]
    return (
        f"thresholds {', '.join(f'{name} {value:.5g}' for name, value in there.items())}, off by at most "
        f"{max(off.values()):.1e}; guards {'equal' if equal else 'not equal'} to the bit"
    )


def check_bench(places: Places) -> str:
    """``edgeguard bench`` runs to its end with every row. What it measured says nothing here."""
    arguments = ("bench", MODEL, "--data", INPUTS, "--n", "10", "--json")
    (here,), (there,) = printed(places.here(*arguments)), printed(places.there(*arguments))
    names, expected = ([row["name"] for row in one["rows"]] for one in (there, here))
    require(names == expected, f"rows {names}, expected {expected}")
    return f"rows {', '.join(names)}"


def check_daemon(places: Places, expected: Expected) -> str:
    """``edgeguard run`` takes inputs from a folder and from its socket, and the hub hears of each once."""
    broker = Mosquitto(places.work / "broker")
    broker.start()
    hub = TinyHub(broker.port)
    (places.work / "inbox").mkdir()
    (places.work / "agent.toml").write_text(
        f'fleet = "demo"\ndevice = "board"\nmodel = "{MODEL}"\nstate_dir = "state"\nlinger_s = {PATIENCE_S}\n'
        f'[broker]\nhost = "127.0.0.1"\nport = {broker.port}\n[window]\nseconds = 2\n'
        f'[sources.folder]\npath = "inbox"\n[sources.socket]\npath = "agent.sock"\n'
        f'[spool]\nresend_s = {PATIENCE_S}\n[results]\npath = "results.jsonl"\n'
    )
    log = places.work / "agent.log"
    with log.open("wb") as stderr:
        command = [*places.board(), "run", "--config", "agent.toml"]
        process = subprocess.Popen(command, cwd=places.work, stdin=subprocess.DEVNULL, stderr=stderr)
    try:
        wait_until(lambda: hub.all(Birth) or process.poll() is not None, "the daemon's birth", timeout_s=PATIENCE_S)
        require(process.poll() is None, "the daemon ended at its start")
        doctor = check_doctor(places, "--config", "agent.toml")
        total = len(expected.inputs)
        feed(places.work / "inbox", expected.inputs[:IN_FOLDER])
        answers = through_socket(places.work / "agent.sock", expected.inputs[IN_FOLDER:])
        wait_until(lambda: hub.inputs() >= total, f"reports of {total} inputs", timeout_s=PATIENCE_S)
        process.terminate()
        require(process.wait(PATIENCE_S) == 0, f"exit code {process.returncode}")
        wait_until(lambda: (said := hub.latest(Status)) and said.state == "stopped", "the daemon's farewell")
    except (WrongError, pytest.fail.Exception, subprocess.TimeoutExpired) as error:
        raise WrongError(f"{error}\n{log.read_text()[-2000:]}") from error
    finally:
        process.kill()
        process.wait()
        hub.close()
        broker.stop()
    socketed = compare_answers(expected, answers)
    told = compare_reports(hub, expected.lines)
    compare_results(places.work / "results.jsonl", expected.lines)
    return f"{told}; {socketed}; doctor beside it: {doctor.partition(';')[0]}"


def feed(inbox: Path, inputs: npt.NDArray[np.uint8]) -> None:
    """Drop batches into the folder, as a program does."""
    for start in range(0, len(inputs), BATCH):
        temporary = inbox / ".temporary"
        with temporary.open("wb") as file:
            np.save(file, inputs[start : start + BATCH])
        temporary.rename(inbox / f"{start:06d}.npy")


def through_socket(path: Path, inputs: npt.NDArray[np.uint8]) -> list[tuple[frames.AnyFrame, bytes]]:
    """Send each input to the daemon; its answers, in their order."""
    answers: list[tuple[frames.AnyFrame, bytes]] = []
    reader = frames.Reader()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as program:
        program.settimeout(PATIENCE_S)
        program.connect(str(path))
        for number, x in enumerate(inputs, start=IN_FOLDER):
            frame = frames.Input(id=str(number), encoding="array", dtype="uint8", shape=x.shape)
            program.sendall(frames.encode(frame, x.tobytes()))
        while len(answers) < len(inputs):
            piece = program.recv(1 << 16)
            require(piece, f"the socket was closed after {len(answers)} of {len(inputs)} answers")
            answers += reader.feed(piece)
    return answers


def compare_answers(expected: Expected, answers: Iterable[tuple[frames.AnyFrame, bytes]]) -> str:
    """Classes, scores and outputs that came back over the socket. What an audit adds is random, and not compared."""
    lines, outputs = [], []
    for number, (frame, body) in enumerate(answers, start=IN_FOLDER):
        if not isinstance(frame, frames.Result):
            raise WrongError(f"input {number}: {frame}")
        require(frame.id == str(number), f"answer to input {frame.id}, expected {number}")
        lines.append({"predicted": frame.predicted, "scores": frame.scores})
        outputs.append(np.frombuffer(body, frame.outputs[0].dtype))
    compared = compare(expected.lines[IN_FOLDER:], lines, "predicted")
    off = np.abs(np.stack(outputs) - expected.outputs[IN_FOLDER:]).max(axis=1)
    same = f"outputs {int((off == 0).sum())} of {len(off)} equal, the others off by at most {off.max():.2g}"
    return f"over the socket {compared}; {same}"


def compare_reports(hub: TinyHub, lines: Sequence[Mapping[str, Any]]) -> str:
    """Every input stands in one report, and every report and alert came once."""
    predicted = Counter(line["predicted"] for line in lines)
    counted: Counter[int] = Counter()
    for report in hub.reports():
        require(not report.unchecked, f"{report.unchecked} inputs of a report were not checked")
        counted.update({one.label: one.inputs for one in report.labels})
    require(hub.inputs() == len(lines), f"{hub.inputs()} inputs in the reports, expected {len(lines)}")
    require(counted == predicted, f"inputs per class {dict(counted)}, expected {dict(predicted)}")
    repeated = [seq for (_, seq), count in hub.heard.items() if count != 1]
    require(not repeated, f"messages that came more than once: {repeated}")
    alerts = sum(isinstance(message, Alert) for message in hub.stored.values())
    return f"{len(lines)} inputs in {len(hub.reports())} reports, {alerts} alerts, each once"


def compare_results(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Every input stands in one line of the results, with its class."""
    found: Counter[tuple[int, int]] = Counter()
    for line in map(json.loads, path.read_text().splitlines()):
        number = int(line["name"].removesuffix(".npy")) + line["index"]
        found[number, line["predicted"]] += 1
    expected = Counter((number, line["predicted"]) for number, line in enumerate(lines))
    require(found == expected, f"lines of the results that are missing, or too many: {(expected - found) or found}")


def main(work: Path) -> int:
    """Run every check. Returns the exit code."""
    places = Places(work)
    expected = prepare(places)
    checks: dict[str, Callable[[], str]] = {
        "doctor": lambda: check_doctor(places),
        f"score on {PI_4}": lambda: check_score(places, expected, PI_4),
        f"score on {PI_5}": lambda: check_score(places, expected, PI_5),
        "calibrate": lambda: check_calibrate(places),
        "bench": lambda: check_bench(places),
        "run": lambda: check_daemon(places, expected),
    }
    failures = 0
    for name, check in checks.items():
        try:
            print(f"ok      edgeguard {name}: {check()}", flush=True)
        except (WrongError, pytest.fail.Exception) as error:
            failures += 1
            print(f"FAILED  edgeguard {name}: {error}", flush=True)
    print(f"{len(checks) - failures} of {len(checks)} checks passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
