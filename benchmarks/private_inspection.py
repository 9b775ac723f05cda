"""What a private inspection and repair cost, and whether they say what the same computation in clear says.

    python -m benchmarks.private_inspection --all [--only PATTERN] [--list]
    python -m benchmarks.private_inspection --data digits --attack badnets [--seed 0] [--latency-ms 20] [--steps 60]
    python -m benchmarks.private_inspection --data fashion_mnist --attack clean --half
    python -m benchmarks.private_inspection --features --data digits --attack badnets
    python -m benchmarks.private_inspection --power --data digits [--attack badnets]
    python -m benchmarks.private_inspection --growth

Rows go to ``benchmarks/results/private.json`` as soon as each is measured. ``--all``: every row of :data:`ROWS` that is
not there yet with today's code, or those whose names match a pattern, each in a process of its own; 1 where a row fails
what is asked of it (``passed``), or cannot be measured. Three processes, TLS between them, each connection through a
relay in this process that counts bytes and can add latency, all held to two cores. The machine may be shared: ``load``
is its load average when the row began. Dense networks (one hidden layer of 32) are trained here from the attacks'
poisoned data; networks of ``--features`` are the zoo's. ``--half``: Fashion-MNIST at 14x14. With ``--steps`` below 60
the row says what a step costs and no verdict is to be had of it. ``--power``: what inspection in the space of features
finds in clear, over the zoo's small CNNs of an attack and clean ones, or of all attacks; with 60 steps, and with 1,000.
``--growth``: what a step costs as the network and the number of inputs grow. In clear means the same program on one
process, its second run: ``clear_s`` is without what compiling takes.
"""

from __future__ import annotations

import argparse
import fnmatch
import itertools
import json
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from benchmarks import digests, relay, zoo
from benchmarks.private import NAMES
from edgeguard import disk
from edgeguard.attacks import registry, victims
from edgeguard.attacks.base import Poison, Task
from edgeguard.attacks.networks import SMALL_CNN
from edgeguard.contract.private import Inspection, Space
from edgeguard.errors import ModelError
from edgeguard.private import child, computation, dense, estimates, inspections, owners, parties, sharing

RESULTS = Path("benchmarks/results/private.json")
KEYS = ("inspections", "growth", "power_of_features")
FIRST_PORT = 19971
HIDDEN = 32
STEPS, LONG = 60, 1000
_TARGET = 3
GROWTH_STEPS = 3
GROWTH: tuple[tuple[tuple[int, ...], int], ...] = (
    ((64, 32, 10), 64),
    ((64, 32, 20), 64),
    ((64, 32, 43), 64),
    ((196, 32, 10), 64),
    ((784, 32, 10), 64),
    ((64, 64, 10), 64),
    ((64, 128, 10), 64),
    ((64, 32, 10), 128),
)
EPOCHS = {"digits": 40, "fashion_mnist": 4}


CORES = 2
LIMIT_S, POINT, NORM_ERROR = 15 * 60, 1.0, 1e-2
"""What is asked of a row: minutes, points of accuracy and attack success, error of sizes."""
DEPENDS = (
    "benchmarks/private_inspection.py", "benchmarks/relay.py", "benchmarks/zoo.py", "edgeguard/attacks",
    "edgeguard/contract/private.py", "edgeguard/inspection/index.py", "edgeguard/private/computation.py",
    "edgeguard/private/dense.py", "edgeguard/private/inspecting.py", "edgeguard/private/inspections.py",
    "edgeguard/private/mending.py", "edgeguard/private/owners.py", "edgeguard/private/sharing.py",
)  # fmt: skip
_LATENCY = "--data digits --attack badnets --steps 3 --latency-ms"
ROWS = {
    **{f"dense-digits-badnets-s{seed}": f"--data digits --attack badnets --seed {seed}" for seed in range(3)},
    **{f"dense-digits-blended-s{seed}": f"--data digits --attack blended --seed {seed}" for seed in range(2)},
    "dense-digits-sig-s0": "--data digits --attack sig",
    **{f"dense-digits-clean-s{seed}": f"--data digits --attack clean --seed {seed}" for seed in range(2)},
    "dense-fashion-badnets-s0": "--data fashion_mnist --attack badnets",
    "dense-fashion-clean-s0": "--data fashion_mnist --attack clean",
    "dense-fashion-14x14-blended-s0": "--data fashion_mnist --attack blended --half",
    "cnn-digits-badnets-s0": "--features --data digits --attack badnets",
    "cnn-digits-clean-s0": "--features --data digits --attack clean",
    "cnn-fashion-badnets-s0": "--features --data fashion_mnist --attack badnets",
    **{f"latency-{ms}": f"{_LATENCY} {ms}" for ms in (1, 20, 80)},
    "growth": "--growth",
    **{f"power-{data}": f"--power --data {data}" for data in ("digits", "fashion_mnist")},
}
"""By name, the options that measure it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--attack", help="or clean; badnets where nothing else is said")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--half", action="store_true")
    parser.add_argument("--features", action="store_true")
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--sought", type=int, default=64)
    parser.add_argument("--no-repair", action="store_true")
    parser.add_argument("--power", action="store_true")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--only", help="with --all: shell pattern of names")
    parser.add_argument("--list", action="store_true", help="with --all: say what is there and what is missing")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.all:
        return every(args.json, args.only or "*", listing=args.list)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])
    if args.power:
        rows, key = power(args.data, args.attack), "power_of_features"
    elif args.growth:
        rows, key = growth(), "growth"
    else:
        args.attack = args.attack or "badnets"
        rows, key = iter([measure(args)]), "inspections"
    code = digests.code_digest(DEPENDS)
    fine = [record(args.json, key, row | {"cores": CORES, "code": code}) for row in rows]
    return 0 if all(fine) else 1


def every(path: Path, pattern: str, *, listing: bool) -> int:
    """Measure what is missing, each row in a process of its own."""
    failed = []
    for name, options in ROWS.items():
        if not fnmatch.fnmatch(name, pattern):
            continue
        there = is_there(path, options)
        print(f"{name}: {'there' if there else 'missing'}", flush=True)
        if there or listing:
            continue
        command = [sys.executable, "-m", "benchmarks.private_inspection", *options.split(), "--json", str(path)]
        if subprocess.run(command, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def is_there(path: Path, options: str) -> bool:
    """Whether all rows that these options measure are there, of today's code."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    code = digests.code_digest(DEPENDS)
    rows = {key: [row for row in kept.get(key, []) if row.get("code") == code] for key in KEYS}
    words = options.split()
    given = dict(itertools.pairwise(words))
    if "--growth" in words:
        sizes = {(row["model"], row["sought"]) for row in rows["growth"]}
        return all(("-".join(map(str, layers)), sought) in sizes for layers, sought in GROWTH)
    if "--power" in words:
        known = {row["model"] for row in rows["power_of_features"]}
        return all(cell.name in known for cell in powered(given["--data"], None) if (zoo.folder() / cell.name).is_dir())
    wanted = (
        subject_name(given["--data"], given["--attack"], int(given.get("--seed", 0)), "--half" in words),
        "features" if "--features" in words else "pixels",
        int(given.get("--steps", STEPS)),
        float(given.get("--latency-ms", 0.0)),
    )
    return any((r["model"], r["space"], r["steps"], r["latency_ms"]) == wanted for r in rows["inspections"])


def subject_name(data: str, attack: str, seed: int, half: bool) -> str:
    """What a row calls its model."""
    return f"{data}{'-14x14' if half else ''}-{attack}-s{seed}"


def record(path: Path, key: str, row: dict[str, Any]) -> bool:
    """Add a row to those that are there; one of the same model and settings is replaced. Whether it passed."""
    print(json.dumps(row), flush=True)
    kept = json.loads(path.read_text()) if path.exists() else {}
    names = ("model", "space", "steps", "latency_ms", "sought")
    others = [r for r in kept.get(key, []) if [r.get(n) for n in names] != [row.get(n) for n in names]]
    disk.write(path, (json.dumps(kept | {key: [*others, row]}, indent=1) + "\n").encode())
    return all(row.get("passed", {}).values())


def passed(row: Mapping[str, Any]) -> dict[str, bool]:
    """What is asked of a whole inspection, and whether it is so; of its repair where there was one."""
    asked = {
        "same": row["same"],
        "norm_error": row["norm_error"] <= NORM_ERROR,
        "within_15_min": row["seconds"] <= LIMIT_S,
    }
    if "repaired" in row:
        clear = row["repaired_in_clear"]
        asked |= {f"repaired_{name}": abs(value - clear[name]) <= POINT for name, value in row["repaired"].items()}
    return asked


def network(shape: tuple[int, ...], classes: int, *, seed: int = 0) -> Any:
    """A dense Keras network with one hidden layer that takes pixels 0 to 255."""
    import keras

    keras.utils.set_random_seed(seed)
    inputs = keras.Input(shape, name="pixels")
    x = keras.layers.Flatten()(keras.layers.Rescaling(1.0 / 255.0)(inputs))
    x = keras.layers.Dense(HIDDEN, activation="relu", name="hidden")(x)
    outputs = keras.layers.Softmax()(keras.layers.Dense(classes, name="logits")(x))
    return keras.Model(inputs, outputs, name="dense")


class Subject:
    """A model with its owner's clean inputs, and its test set for what a repair is worth."""

    def __init__(self, args: argparse.Namespace) -> None:
        part = zoo.split(args.data)
        halve: Any = _halved if args.half else np.asarray
        self.clean = halve(part.owner_x)
        self.x, self.y = halve(part.data.x_test), part.data.y_test
        self.attack: Any = None
        self.state: Any = {}
        self.name = subject_name(args.data, args.attack, args.seed, args.half)
        if args.features:
            cell = zoo.Cell(data=args.data, network=SMALL_CNN, attack=args.attack, seed=args.seed)
            member = zoo.load(cell, part)
            if member is None:
                raise SystemExit(f"{cell.name} is not in the zoo")
            self.model, self.attack, self.state = member.keras(), member.attack, member.state
            return
        x, y = halve(part.data.x_train), part.data.y_train
        if args.attack != zoo.CLEAN:
            self.attack = registry.find(args.attack).for_shape(x.shape[1:], target=_TARGET, seed=args.seed)
            if not isinstance(self.attack, Poison):
                raise SystemExit(f"{args.attack} does more than poison")
            x, y = self.attack.poison(x, y)
        training = victims.Training(
            epochs=EPOCHS[args.data], network=network, architecture=f"dense-{HIDDEN}", cache=victims.cache_folder()
        )
        self.model = training.fit(Task(images=x, labels=y, classes=len(part.data.classes)), seed=args.seed)

    def worth(self, model: Any) -> dict[str, float]:
        """Accuracy, and where there is an attack its success, in per cent on the test set."""
        answers = model.predict(self.x.astype(np.float32), verbose=0, batch_size=256).argmax(axis=1)
        worth = {"accuracy": round(100 * float(np.mean(answers == self.y)), 2)}
        if self.attack is not None:
            chosen = self.attack.eligible(self.y) & (answers != self.attack.target)
            state = {"state": self.state} if self.state else {}
            worn = self.attack.stamp(self.x[chosen], **state).astype(np.float32)
            turned = model.predict(worn, verbose=0, batch_size=256).argmax(axis=1)
            worth["asr"] = round(100 * float(np.mean(turned == self.attack.target)), 2)
        return worth


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """One row."""
    from edgeguard.private import inspecting, mending

    subject = Subject(args)
    space: Space = "features" if args.features else "pixels"
    shared = dense.shared(subject.model, space)
    before = dense.extractor(subject.model, shared.dense[0]) if args.features else None
    count = args.sought + 64
    scale = 255.0
    if before is not None:
        taken = subject.clean[dense.chosen(count, len(subject.clean))]
        scale = float(before.predict(taken.astype(np.float32), verbose=0).max())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        owns = _parties(folder)
        asked = Inspection(
            id="inspection-1", parties=owns[0].parties.digest, space=space, layers=shared.layers, scale=scale,
            sought=args.sought, steps=args.steps, prune=3 if len(shared.layers) == 3 else 0,
        )  # fmt: skip
        layers, x = shared.arrays(asked), dense.inputs(asked, subject.clean, before)
        pad = _give(folder, asked, owns[0].parties, layers, x)
        load = os.getloadavg()[0]
        seconds, step_s, sent = _jointly(folder, "inspect", args.latency_ms)
        found = inspections.result(folder / NAMES[0] / "work" / inspections.INSPECTED, inspections.Inspected)
        sizes = _sizes(folder, asked)
        inspecting.in_clear(asked, layers, x)
        started = time.perf_counter()
        expected_sizes, expected = inspecting.in_clear(asked, layers, x)
        clear_s = time.perf_counter() - started
        whole = args.steps == STEPS
        labels = np.flatnonzero(expected.flagged).tolist()
        verdict = "backdoored" if labels else "no_sign" if bool(expected.comparable) else "could_not_check"
        same = (found.verdict, list(found.labels)) == (verdict, labels)
        row: dict[str, Any] = {
            "model": subject.name, "space": space, "layers": list(asked.layers), "steps": asked.steps,
            "sought": asked.sought, "latency_ms": args.latency_ms, "load": round(load, 1),
            "target": getattr(subject.attack, "target", None), "verdict": found.verdict, "labels": list(found.labels),
            "clear_verdict": verdict, "clear_labels": labels, "same": same if whole else None,
            "long": clearly(msgspec.structs.replace(asked, steps=LONG), layers, x) if whole else None,
            "norm_error": round(float(np.max(np.abs(sizes / expected_sizes - 1))), 6),
            "seconds": round(seconds, 1), "step_s": round(step_s, 2), "clear_s": round(clear_s, 2),
            "sent_mb": [round(n / 1e6, 1) for n in sent],
            "estimated_mb": round(estimates.of(asked).sent_bytes / 1e6, 1),
        }  # fmt: skip
        if whole and found.labels and not args.no_repair:
            row["before"] = subject.worth(subject.model)
            seconds, _, sent = _jointly(folder, "mend", args.latency_ms)
            mended = inspections.result(folder / NAMES[0] / "work" / inspections.MENDED, inspections.Mended)
            factor = shared.factor * asked.scale if len(asked.layers) == 2 else 1.0
            kernel, bias = owners.last_layer(asked, np.frombuffer(mended.padded, dtype="<i8"), pad)
            dense.mended(subject.model, (kernel / factor, bias))
            row["repaired"] = subject.worth(subject.model)
            clear = mending.in_clear(asked, layers, x, expected.trigger)
            dense.mended(subject.model, (clear[0] / factor, clear[1]))
            row["repaired_in_clear"] = subject.worth(subject.model)
            row["repair_seconds"], row["repair_sent_mb"] = round(seconds, 1), [round(n / 1e6, 1) for n in sent]
    return row | {"passed": passed(row)} if whole else row


def growth() -> Iterator[dict[str, Any]]:
    """What a step costs as labels, inputs, width and the number of inputs grow: of networks with random weights."""
    rng = np.random.default_rng(0)
    for layers, sought in GROWTH:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            owns = _parties(folder)
            asked = Inspection(
                id="inspection-1", parties=owns[0].parties.digest, space="pixels", layers=layers, scale=255.0,
                sought=sought, steps=GROWTH_STEPS,
            )  # fmt: skip
            arrays = [rng.normal(0, shape[0] ** -0.5, shape) for shape in asked.weights]
            _give(folder, asked, owns[0].parties, arrays, rng.random((sought + asked.held_out, asked.inputs)))
            load = os.getloadavg()[0]
            seconds, step_s, sent = _jointly(folder, "inspect", 0.0)
        yield {
            "model": "-".join(map(str, layers)), "steps": asked.steps, "sought": sought, "load": round(load, 1),
            "seconds": round(seconds, 1), "step_s": round(step_s, 2), "sent_mb": [round(n / 1e6, 1) for n in sent],
            "estimated_mb": round(estimates.of(asked).sent_bytes / 1e6, 1),
        }  # fmt: skip


def _give(folder: Path, asked: Inspection, trusted: parties.Parties, layers: Any, x: Any) -> Any:
    """Write the plan and what both owners give, as the commands do; the pad."""
    pad = np.frombuffer(secrets.token_bytes(8 * owners.pad_values(asked)), dtype="<i8")
    given = {"model-owner": owners.model_values(asked, layers, pad), "data-owner": owners.data_values(asked, x)}
    (folder / "given").mkdir()
    (folder / "plan.json").write_bytes(msgspec.json.encode(asked))
    for role, values in given.items():
        part = owners.part(asked, role)
        sealed = inspections.give(part, values, trusted, secrets.token_bytes(sharing.random_bytes(part)))
        (folder / "given" / f"{role}.json").write_bytes(msgspec.json.encode(sealed))
    return pad


def power(data: str, attack: str | None) -> Iterator[dict[str, Any]]:
    """What the space of features finds in clear, of an attack's models and clean ones; pixels: ``inspection.json``."""
    part = zoo.split(data)
    for cell in powered(data, attack):
        member = zoo.load(cell, part)
        if member is None:
            continue
        model = member.keras()
        try:
            shared = dense.shared(model, "features")
        except ModelError as error:
            print(f"{cell.name}: {error}", file=sys.stderr)
            continue
        before = dense.extractor(model, shared.dense[0])
        taken = part.owner_x[dense.chosen(128, len(part.owner_x))]
        scale = float(before.predict(taken.astype(np.float32), verbose=0).max())
        asked = Inspection(
            id="inspection-1", parties="0" * 64, space="features", layers=shared.layers, scale=scale, sought=64
        )
        x = dense.inputs(asked, part.owner_x, before)
        long = msgspec.structs.replace(asked, steps=LONG)
        row = {
            "model": cell.name,
            "space": "features",
            "target": None if member.attack is None else member.attack.target,
            **clearly(asked, shared.arrays(asked), x),
            "long": clearly(long, shared.arrays(long), x),
        }
        yield row | {"same_verdict": bool(row["labels"]) == bool(row["long"]["labels"])}


def powered(data: str, attack: str | None) -> list[zoo.Cell]:
    """The zoo's small CNNs of a data set: clean ones and an attack's, or all attacks'."""
    cells = [cell for cell in zoo.matrix() if (cell.data, cell.network) == (data, SMALL_CNN)]
    return [cell for cell in cells if attack is None or cell.attack in (zoo.CLEAN, attack)]


def clearly(asked: Inspection, layers: Any, x: Any) -> dict[str, Any]:
    """What an inspection finds in clear: flagged labels, and how far the smallest trigger stands out."""
    from edgeguard.inspection import index
    from edgeguard.private import inspecting

    sizes, found = inspecting.in_clear(asked, layers, x)
    known = np.where(found.working, sizes, np.inf)
    smallest = int(np.argmin(known))
    measured = index.measure(known, smallest)
    compared = bool(found.comparable)
    return {
        "steps": asked.steps,
        "labels": np.flatnonzero(found.flagged).tolist(),
        "comparable": compared,
        "smallest": smallest,
        "ratio": round(measured.ratio, 3) if compared else None,
        "index": round(measured.index, 2) if compared else None,
    }


def _halved(images: Any) -> Any:
    """Pictures at half their width and height."""
    count, height, width, channels = images.shape
    blocks = images.astype(np.float32).reshape(count, height // 2, 2, width // 2, 2, channels)
    return np.round(blocks.mean(axis=(2, 4))).astype(np.uint8)


def _parties(folder: Path) -> list[parties.Own]:
    from datetime import datetime, timezone

    now = datetime.now(timezone.utc)
    for place, name in enumerate(NAMES):
        parties.create(folder / name, name=name, host="127.0.0.1", port=FIRST_PORT + place, now=now)
    public = tuple(folder / name / parties.PUBLIC for name in NAMES)
    for name in NAMES:
        parties.join(folder / name, public)
    return [parties.own(folder / name) for name in NAMES]


_PARTY = """
import json, shutil, sys, time
from pathlib import Path
import msgspec
from edgeguard.contract.private import Inspection, Space
from edgeguard.errors import ModelError
from edgeguard.private import computation, inspections, parties
folder, name, what, hosts = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
own = parties.own(folder / name)
asked = msgspec.json.decode((folder / "plan.json").read_bytes(), type=Inspection)
held = inspections.take(asked, folder / "given", own)
import jax, spu
times = []
def said(text, done, total):
    times.append((text, done, time.perf_counter()))
    if text == "deciding":  # the last shares of the search, which do not stay
        shutil.copy(folder / name / "work" / f"state-{asked.steps:04}.json", folder / name / "shares.json")
    if done % 10 == 0:
        print(text, done, total, file=sys.stderr, flush=True)
def deliver(result):
    now = time.perf_counter()
    steps = [at for text, done, at in times if text == "seeking triggers"]
    step = (steps[-1] - steps[0]) / (len(steps) - 1) if len(steps) > 1 else 0.0
    print("measured", json.dumps([now - times[0][2], step]), flush=True)
getattr(inspections, what)(
    asked, held, own, folder / name / "work", said, deliver, timeout_s=300,
    addresses=computation.Addresses(hosts=tuple(hosts.split(","))),
)
"""


def _jointly(folder: Path, what: str, latency_ms: float) -> tuple[float, float, list[int]]:
    """Seconds of the slowest party from their meeting on, seconds a step, and bytes that each sent."""
    processes = []
    relays, hosts = relay.between([FIRST_PORT + place for place in range(len(NAMES))], latency_ms / 1000.0)
    for one, name in enumerate(NAMES):
        command = [sys.executable, "-c", _PARTY, str(folder), name, what, ",".join(hosts[one])]
        errors = None if one == 0 else subprocess.DEVNULL
        processes.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True))
    try:
        said = [_measured(process) for process in processes]
    finally:
        for process in processes:
            # The result is there before a party leaves; of leaving SPU sometimes makes no end.
            with suppress(subprocess.TimeoutExpired):
                process.wait(child.LEAVE_S)
            process.kill()
            process.wait()
        for line in relays:
            line.close()
    sent = [sum(line.sent_by(place) for line in relays) for place in range(len(NAMES))]
    return max(s for s, _ in said), max(s for _, s in said), sent


def _measured(process: subprocess.Popen[str]) -> tuple[float, float]:
    """What a party says of its time."""
    for line in process.stdout or ():
        if line.startswith("measured "):
            whole, step = json.loads(line.removeprefix("measured "))
            return whole, step
    raise RuntimeError(f"a party ended with {process.wait()} and no result")


def _sizes(folder: Path, asked: Inspection) -> Any:
    """Sizes [L] of all labels' triggers, from the shares of all three: what nobody may do but a benchmark."""
    states = []
    for name in NAMES:
        content = (folder / name / "shares.json").read_bytes()
        states.append(msgspec.convert(json.loads(content)["kept"], dict[str, computation.Kept]))
    return computation.reconstruct([state["taken"] for state in states]).sum(axis=(0, 2))


if __name__ == "__main__":
    sys.exit(main())
