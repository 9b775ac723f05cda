"""Our STRIP, one pass and cascade beside STRIP of the Adversarial Robustness Toolbox (ART), in one run.

    python -m benchmarks.art_strip [--data digits] [--inputs 300] [--json benchmarks/results/art_strip.json]

Models: the int8 files of the zoo's BadNets networks (``python -m benchmarks.zoo``). ART is no dependency: the first run
makes an environment for it in the folder ``art`` of the cache folder, and a worker process runs there. ART sees the
int8 file as a classifier whose ``predict`` runs it input by input, as ours does.

ART's rows (Gao et al., ACSAC 2019, as version 1.20 has it): an input and an overlay are blended half and half, and the
entropy is taken down the columns of the answers [overlays, classes], so over the overlays of one class instead of over
the classes of one answer.

* ``art``: as shipped. A class to which int8 answers give nothing under every overlay has no entropy: it comes out as
  not a number, ART's own calibration refuses that, and its comparison then never flags. Such inputs count as the least
  suspicious, and ``undefined`` says how many there were.
* ``art-lifted``: as shipped, with half an output step added to every probability, so that a number comes out.
* ``art-axis``: the entropy taken over the classes; everything else as shipped. What still differs from ours is the
  blend, which halves a trigger's contrast where the paper adds, and that overlays are drawn anew for each input.

Ours: ``strip-20`` tries all overlays, ``strip-20-sequential`` stops when the decision is clear, ``one-pass`` and
``cascade`` are what ``edgeguard score`` runs.

Rules enforced here:

* the same clean and triggered inputs for all, 20 overlays for every STRIP, drawn from the same owner's inputs, which
  are also what each STRIP's own threshold is set with, at 1%;
* triggered inputs are of another true label than the target, and the int8 file calls them the target;
* forwards and time include the one inference that answers;
* all timings alternate input by input, in random order and across both processes; one thread runs each file; a ratio
  is to the plain inference of the same process, because the two run other code and other versions of NumPy. On a busy
  machine a long run of inferences is interrupted and a single one is not: the load is recorded.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks import detection, zoo
from converters import calibration, files
from edgeguard.attacks import victims
from edgeguard.attacks.base import Images
from edgeguard.attacks.networks import SMALL_CNN
from edgeguard.detection import cascade, sidecar, strip
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.errors import ConfigError, EdgeGuardError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Pixels = npt.NDArray[np.uint8]

DATA = ("digits", "fashion_mnist")
INPUTS = 300
OWNER = 200
OVERLAYS = 20
FPR = 0.01
TIMED = 100
RUNTIME = "litert"
SIDES = ("clean", "triggered")
PLAIN, ART_PLAIN = "plain", "plain in ART's process"
ART = ("art", "art-lifted", "art-axis")
REQUIREMENTS = (
    "adversarial-robustness-toolbox==1.20.1",
    "packaging",  # imported by ART, and not among what it requires
    f"ai-edge-litert=={importlib.metadata.version('ai-edge-litert')}",
)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a detector made of N inputs: ``suspicion`` (NaN: none came out), ``flagged`` by its own threshold."""

    suspicion: Floats
    flagged: Bools
    forwards: Floats


@dataclass(frozen=True, kw_only=True)
class Detector:
    """``run`` scores one image: its suspicion, whether its own threshold flags it, and the inferences it took."""

    name: str
    run: Callable[[Pixels], tuple[float, bool, int]]

    def outcome(self, images: Images) -> Outcome:
        """Score images, uint8 [N, H, W, C], one by one."""
        found = [self.run(image) for image in images]
        suspicion, flagged, forwards = (np.asarray(column) for column in zip(*found, strict=True))
        return Outcome(
            suspicion=suspicion.astype(np.float64), flagged=flagged.astype(bool), forwards=forwards.astype(np.float64)
        )


# The worker. These functions run in ART's environment, where nothing of this project is: they go there as text, and
# know only one another, NumPy and the modules that HEADER imports.

HEADER = """\
from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path

import numpy as np
"""


def forward_of(content: bytes) -> tuple[Callable[[Any], Any], float]:
    """A function from inputs [N, ...] to probabilities float32 [N, C], run one by one; and the output's step."""
    module = importlib.import_module("ai_edge_litert.interpreter")
    interpreter = module.Interpreter(model_content=content, num_threads=1)
    interpreter.allocate_tensors()
    source, target = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    (scale, zero), (step, offset) = source["quantization"], target["quantization"]
    limits = np.iinfo(source["dtype"])

    def forward(x: Any) -> Any:
        answers = []
        for one in x:
            steps = np.round(one.astype(np.float32) / np.float32(scale)) + zero
            interpreter.set_tensor(
                source["index"], np.clip(steps, limits.min, limits.max)[np.newaxis].astype(source["dtype"])
            )
            interpreter.invoke()
            raw = interpreter.get_tensor(target["index"])[0]
            answers.append((raw.astype(np.float32) - offset) * np.float32(step))
        return np.stack(answers)

    return forward, float(step)


def entropies_over(over: int | None, kept: list[float], entropy: Any) -> Any:
    """The entropy function for ART's STRIP: over axis ``over``; None: over the one ART asks for. Keeps each sum."""

    def entropies(pk: Any, base: float, axis: int) -> Any:
        found = entropy(pk, base=base, axis=axis if over is None else over)
        kept.append(float(np.sum(found)))
        return found

    return entropies


def guarded_by_art(predict: Any, shape: Any, owner: Any, settings: Any) -> tuple[Any, str]:
    """A classifier with ART's STRIP, calibrated on the owner's inputs; and why ART's calibration failed, if it did."""
    base: Any = importlib.import_module("art.estimators.classification").BlackBoxClassifier
    classes = predict(owner[:1]).shape[1]
    # STRIP puts ``predict`` where BlackBoxClassifier keeps the function that its ``predict`` calls, which would call
    # itself for ever: so predict is replaced.
    answering: Any = type("Answering", (base,), {"predict": lambda self, x, **_: predict(x)})
    transform = importlib.import_module("art.defences.transformer.poisoning").STRIP
    classifier = transform(answering(predict, shape, classes))(
        num_samples=settings["overlays"], false_acceptance_rate=settings["fpr"]
    )
    try:
        classifier.mitigate(owner)
    except ValueError as error:
        classifier.entropy_threshold = -np.inf
        return classifier, str(error)
    return classifier, ""


def serve(folder: str) -> None:
    """Score all inputs, write what came out, then time one input for each line ``SIDE INDEX`` read."""
    place = Path(folder)
    settings = json.loads((place / "settings.json").read_text())
    forward, step = forward_of((place / "model.tflite").read_bytes())
    inputs = dict(np.load(place / "inputs.npz"))
    module: Any = importlib.import_module("art.estimators.poison_mitigation.strip.strip")
    shipped, found, failures = module.entropy, {}, {}
    kept: list[float] = []
    variants = {
        "art": (forward, entropies_over(None, kept, shipped)),
        "art-lifted": (lambda x: forward(x) + np.float32(step / 2), entropies_over(None, kept, shipped)),
        "art-axis": (forward, entropies_over(1, kept, shipped)),
    }
    classifiers = {}
    for name, (predict, entropy) in variants.items():
        np.random.seed(0)  # ART draws from the global generator
        module.entropy = entropy
        classifiers[name], failures[name] = guarded_by_art(
            predict, inputs["owner"].shape[1:], inputs["owner"], settings
        )
        for side in ("clean", "triggered"):
            kept.clear()
            answers = classifiers[name].predict(inputs[side])
            found[f"{name} {side} suspicion"] = -np.asarray(kept) / settings["overlays"]
            found[f"{name} {side} flagged"] = ~answers.any(axis=1)  # an abstention is all zeros
    np.savez(place / "found.npz", **found)
    print(json.dumps({"failures": failures, "art": importlib.import_module("art").__version__}), flush=True)
    contestants = [("plain", forward), *((name, made.predict) for name, made in classifiers.items())]
    rng = np.random.default_rng(0)
    for line in sys.stdin:
        side, number = line.split()
        one, taken = inputs[side][int(number)][np.newaxis], {}
        forward(one)  # not timed: whoever comes first after the wait would pay for it
        for which in rng.permutation(len(contestants)):
            name, run = contestants[which]
            module.entropy = variants[name][1] if name in variants else shipped
            kept.clear()
            started = time.perf_counter()
            run(one)
            taken[name] = 1e6 * (time.perf_counter() - started)
        print(json.dumps(taken), flush=True)


def worker_source() -> str:
    """The worker as a program; its one argument is the folder to work in."""
    parts = (inspect.getsource(part) for part in (forward_of, entropies_over, guarded_by_art, serve))
    return "\n\n".join([HEADER, *parts, "serve(sys.argv[1])\n"])


# This side


def environment(folder: Path) -> Path:
    """The interpreter of ART's environment in ``folder``; made where it is not there, or is another's.

    Raises:
        ConfigError: it cannot be made.
    """
    python, ready, wanted = folder / "bin" / "python", folder / "ready", "\n".join([sys.version, *REQUIREMENTS])
    if ready.is_file() and ready.read_text() == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    steps = {
        "making an environment for ART (once)": [sys.executable, "-m", "venv", str(folder)],
        "installing ART there (once, a minute or so)": [
            *(str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *REQUIREMENTS,
        ],
    }
    for text, command in steps.items():
        print(text, flush=True)
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError("ART's environment", got=last_line(done.stderr), do=f"try again, without {folder}")
    ready.write_text(wanted)
    return python


def last_line(text: str) -> str:
    """The last line that says something, cut at 200 characters."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "no message"


class Worker:
    """ART's process: what it found, and its timings on demand. Made by :func:`working`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process, self._folder = process, folder
        said = self._read()
        self.failures: dict[str, str] = said["failures"]
        self.version: str = said["art"]
        with np.load(folder / "found.npz", allow_pickle=False) as stored:
            self._found = dict(stored)

    def outcome(self, name: str, side: str) -> Outcome:
        """Of one of ``ART`` on clean or on triggered inputs; each takes all overlays and the input itself."""
        suspicion = self._found[f"{name} {side} suspicion"]
        return Outcome(
            suspicion=suspicion,
            flagged=self._found[f"{name} {side} flagged"],
            forwards=np.full(len(suspicion), 1.0 + OVERLAYS),
        )

    def timings(self, side: str, index: int) -> dict[str, float]:
        """Microseconds of a plain inference and of each of ``ART`` on one input."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{side} {index}\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ConfigError("ART's process", got=last_line((self._folder / "stderr").read_text()))
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def working(python: Path, content: bytes, owner: Images, inputs: dict[str, Images]) -> Iterator[Worker]:
    """ART's process on one model, its scores ready.

    Raises:
        ConfigError: it failed; the message is its last line.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files.write(content, folder / "model.tflite")
        files.write(json.dumps({"overlays": OVERLAYS, "fpr": FPR}).encode(), folder / "settings.json")
        arrays: dict[str, Any] = {"owner": owner, **inputs}
        np.savez(folder / "inputs.npz", **arrays)
        with (
            (folder / "stderr").open("w") as errors,
            subprocess.Popen(
                [python, "-c", worker_source(), str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            try:
                yield Worker(process, folder)
            finally:
                process.kill()


def our_strips(model: TfliteModel, owner: Images) -> list[Detector]:
    """STRIP with all of the ``OVERLAYS`` overlays, and with limits from the rest of the owner's inputs."""

    def answer(x: Any) -> Floats:
        return np.asarray(model.predict(x[np.newaxis])[0], dtype=np.float64)

    overlays, rest = owner[:OVERLAYS], owner[OVERLAYS:]
    entropies = [[strip.entropy(answer(strip.superimpose(x, o))) for o in overlays] for x in rest]
    limits = strip.fit_limits(np.asarray(entropies), FPR)

    def run(x: Pixels, stopping: strip.StripLimits | None) -> tuple[float, bool, int]:
        answer(x)
        found = strip.strip(x, overlays, answer, stopping)
        return -found.entropy, found.entropy <= limits.threshold, 1 + found.forwards

    return [
        Detector(name=f"strip-{OVERLAYS}", run=lambda x: run(x, None)),
        Detector(name=f"strip-{OVERLAYS}-sequential", run=lambda x: run(x, limits)),
    ]


def our_guard(content: bytes, owner: Images) -> list[Detector]:
    """One pass and cascade, the latter with a budget that never ends, calibrated on all of the owner's inputs."""
    bare, plan = calibration.plan(content)
    guarded = calibration.guard_model(bare, plan, owner, sidecar=True)
    assert guarded.sidecar is not None and guarded.metadata.sidecar_digest is not None
    model = GuardedModel.load(guarded.content, runtime=RUNTIME)
    companion = sidecar.decode(guarded.sidecar, digest=guarded.metadata.sidecar_digest, metadata=model.metadata)
    runner = cascade.Cascade(
        model, companion, clock=lambda: 0.0, rng=np.random.default_rng(0), budget=cascade.UNLIMITED
    )

    def one_pass(x: Pixels) -> tuple[float, bool, int]:
        verdict = model.infer(x).verdict
        return verdict.score, verdict.flagged, 1

    def cascaded(x: Pixels) -> tuple[float, bool, int]:
        inference, forwards = runner.infer(x)
        return inference.verdict.score, inference.verdict.flagged, forwards

    return [Detector(name="one-pass", run=one_pass), Detector(name="cascade", run=cascaded)]


def chosen_inputs(member: zoo.Member, part: zoo.Split, count: int) -> dict[str, Images]:
    """At most ``count`` clean inputs, and as many triggered ones that the int8 file calls the target."""
    all_of = detection.inputs_of(member, part)
    sides = {"clean": all_of.clean, "triggered": all_of.triggered[all_of.successful]}
    rng = np.random.default_rng(0)
    return {side: images[np.sort(rng.permutation(len(images))[:count])] for side, images in sides.items()}


def worth(clean: Outcome, triggered: Outcome) -> dict[str, Any]:
    """AUROC and TPR at 1% FPR with 95% intervals, both rates at the detector's own threshold, and inferences."""
    undefined = [int(np.isnan(side.suspicion).sum()) for side in (clean, triggered)]
    found = detection.quality(ranked(clean.suspicion), ranked(triggered.suspicion))
    return {
        "auroc": found["auroc"],
        "tpr_0.01": found[f"tpr_{FPR:g}"],
        "own_fpr": float(clean.flagged.mean()),
        "own_tpr": float(triggered.flagged.mean()),
        "forwards": [round(float(side.forwards.mean()), 2) for side in (clean, triggered)],
        "undefined": undefined,
    }


def ranked(suspicion: Floats) -> Floats:
    """What is not a number is never flagged: it counts as the least suspicious of all."""
    return np.where(np.isnan(suspicion), -np.inf, suspicion)


def race(
    plain: Callable[[Images], Any], detectors: Sequence[Detector], worker: Worker, inputs: dict[str, Images]
) -> dict[str, dict[str, float]]:
    """Median microseconds of each by side; all interleaved, in random order. ``ART_PLAIN`` is the worker's."""
    contestants: list[tuple[str, Callable[[Pixels], Any]]] = [
        (PLAIN, lambda x: plain(x[np.newaxis])),
        *((detector.name, detector.run) for detector in detectors),
    ]
    taken: dict[str, dict[str, list[float]]] = {side: {} for side in SIDES}
    rng = np.random.default_rng(0)
    for number in range(min(TIMED, *(len(images) for images in inputs.values()))):
        for side in SIDES:
            image, into = inputs[side][number], taken[side]
            plain(image[np.newaxis])  # not timed: whoever comes first after the wait would pay for it
            for which in rng.permutation(len(contestants)):
                name, run = contestants[which]
                started = time.perf_counter()
                run(image)
                into.setdefault(name, []).append(1e6 * (time.perf_counter() - started))
            for name, microseconds in worker.timings(side, number).items():
                into.setdefault(ART_PLAIN if name == PLAIN else name, []).append(microseconds)
    return {side: {name: float(np.median(values)) for name, values in rows.items()} for side, rows in taken.items()}


def with_times(rows: dict[str, dict[str, Any]], medians: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Rows with microseconds on clean and triggered inputs, and how many plain inferences of its process that is."""
    timed = {}
    for name, row in rows.items():
        base = ART_PLAIN if name in ART else PLAIN
        timed[name] = {
            **row,
            "microseconds": [round(medians[side][name], 1) for side in SIDES],
            "times_plain": [round(medians[side][name] / medians[side][base], 2) for side in SIDES],
        }
    return timed


def measure(member: zoo.Member, part: zoo.Split, count: int, python: Path) -> dict[str, Any]:
    """One model: every detector on the same inputs.

    Raises:
        ConfigError: ART's process failed.
        ModelError: the model cannot be guarded.
    """
    content, inputs = member.int8, chosen_inputs(member, part, count)
    half = calibration.halves(len(part.owner_x)).fit
    owner = part.owner_x[np.random.default_rng(0).permutation(half)[:OWNER]]
    model = TfliteModel(content, runtime=RUNTIME)
    detectors = [*our_strips(model, owner), *our_guard(content, part.owner_x)]
    with working(python, content, owner, inputs) as worker:
        rows = {name: worth(*(worker.outcome(name, side) for side in SIDES)) for name in ART}
        for name, failure in worker.failures.items():
            rows[name].update({"calibration_failed": failure} if failure else {})
        rows |= {one.name: worth(*(one.outcome(inputs[side]) for side in SIDES)) for one in detectors}
        medians = race(model.predict, detectors, worker, inputs)
        version = worker.version
    return {
        "model": member.cell.name,
        "inputs": {**{side: len(images) for side, images in inputs.items()}, "owner": len(owner)},
        "art": version,
        "runtime": f"{model.runtime.name} {model.runtime.version}",
        "plain_microseconds": {
            "ours": [round(medians[side][PLAIN], 1) for side in SIDES],
            "art": [round(medians[side][ART_PLAIN], 1) for side in SIDES],
        },
        "detectors": with_times(rows, medians),
    }


def table(row: dict[str, Any]) -> str:
    """One model's rows for a person; pairs are clean / triggered."""
    inputs, plain = row["inputs"], row["plain_microseconds"]
    lines = [
        f"{row['model']}: {inputs['clean']} clean and {inputs['triggered']} triggered inputs; one plain inference "
        f"takes {plain['ours'][0]:.0f} us, in ART's process {plain['art'][0]:.0f} us; pairs are clean / triggered",
        f"  {'':<20}{'AUROC':>7}{'TPR at 1%':>11}{'own FPR, TPR':>17}{'forwards':>14}{'p50 us':>18}{'x plain':>16}",
    ]
    for name, found in row["detectors"].items():
        own = f"{found['own_fpr']:.1%}, {found['own_tpr']:.1%}"
        pairs = (
            _pair(found["forwards"], ".1f"),
            _pair(found["microseconds"], ".0f"),
            _pair(found["times_plain"], ".1f"),
        )
        lines.append(
            f"  {name:<20}{found['auroc'][0]:>7.3f}{found['tpr_0.01'][0]:>11.1%}{own:>17}"
            f"{pairs[0]:>14}{pairs[1]:>18}{pairs[2]:>16}"
        )
        if any(found["undefined"]):
            lines.append(f"  {'':<20} no number for {_pair(found['undefined'], 'd')} of them")
        if "calibration_failed" in found:
            lines.append(f"  {'':<20} its calibration failed: {found['calibration_failed']}")
    return "\n".join(lines)


def _pair(values: Sequence[float], form: str) -> str:
    return " / ".join(f"{value:{form}}" for value in values)


def main() -> int:
    """Run, print tables, and write JSON where asked. Exit code 1 where a model could not be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", action="append", metavar="NAME", help=f"of the zoo; {' and '.join(DATA)} by default")
    parser.add_argument("--inputs", type=int, default=INPUTS, metavar="N", help="clean ones, and as many triggered")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.inputs < 1:
        parser.error("--inputs: at least 1")
    started, rows, failed = time.monotonic(), [], []
    try:
        python = environment(victims.cache_folder() / "art")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    for name in options.data or DATA:
        cell = zoo.Cell(data=name, network=SMALL_CNN, attack="badnets", seed=0)
        try:
            part = zoo.split(name)
            member = zoo.load(cell, part)
            if member is None:
                raise ConfigError(cell.name, got="not trained", do="run python -m benchmarks.zoo")
            rows.append(measure(member, part, options.inputs, python))
        except EdgeGuardError as error:
            failed.append({"model": cell.name, "error": str(error)})
            print(f"{cell.name}: {error}", flush=True)
            continue
        print(table(rows[-1]), flush=True)
    if options.json:
        document = {
            "machine": platform.machine(),
            "cores": os.cpu_count(),
            "load": round(os.getloadavg()[0], 2),
            "overlays": OVERLAYS,
            "seconds": round(time.monotonic() - started, 1),
            "rows": rows,
            "failed": failed,
        }
        files.write(json.dumps(document, indent=2).encode() + b"\n", options.json)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
