"""What a guarded model costs on this very board: latency, processor time, memory, energy, side by side in one run.

Rules enforced here:

* the model without its guard gives the same outputs, bit for bit, or nothing is timed;
* what is compared takes turns in one process: blocks of a few inferences, in an order that changes, so that noise hits
  all alike. There are several heats with new interpreters: where one's memory happens to lie changes its speed by a
  percent or more;
* a percentile comes with the interval that its order statistics allow; a bound that so few runs cannot give is None;
* what cannot be measured is named with the reason, and what the board does not tell is None, never zero;
* what makes the figures doubtful is said: too few runs, throttling, heat, another CPU frequency, noise.

``python -m edgeguard.detection.bench`` is the child process whose memory :func:`footprint` reports.
"""

from __future__ import annotations

import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import FEATURES, SCORES
from edgeguard.detection.cascade import UNLIMITED, Budget, Cascade
from edgeguard.detection.guarded import GuardedModel, TfliteModel
from edgeguard.detection.sidecar import Sidecar, read_beside
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]
Run = Callable[[int], int]
"""Runs the input of that number, however large, and returns how many inferences it took."""
Open = Callable[[], Run]
"""Makes a contestant, with an interpreter of its own."""
Progress = Callable[[str, int, int], None]

BARE, GUARDED, VERDICT, CASCADE, IN_BUDGET = "bare", "guarded", "verdict", "cascade", "cascade in budget"
MEANING = {
    BARE: "the model without its guard",
    GUARDED: "with it, scores and features read out",
    VERDICT: "and with the input's checks and quantising, and the verdict",
    CASCADE: "and with all further looks at doubtful inputs",
    IN_BUDGET: f"and with at most {Budget().per_second:g} of them a second",
}

HEATS = 5
BLOCK = 10
WARM_UP = 0.1
READING_S = 1.0
PERCENTILES = (50, 90, 99)
CONFIDENCE = 0.95
MIN_RUNS = 1000
HOTTER_C = 3.0
MAX_CHANGE = 0.05

_COMPARED = 32
_TENSORS = 32
_SPENDING = 200
_CHILD_RUNS = 3
_CHILD_S = 600.0
_MEMORY = re.compile(r"^(VmRSS|RssAnon):\s+(\d+) kB$", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What the board says of itself at one moment; None where it does not. ``cpu_mhz``: of its fastest core."""

    temperature_c: float | None = None
    throttled: bool | None = None
    power_w: float | None = None
    cpu_mhz: float | None = None


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What the readings of a run come to: temperature at first and at most, mean power, least and highest frequency."""

    temperature_c: tuple[float, float] | None
    throttled: bool | None
    power_w: float | None
    cpu_mhz: tuple[float, float] | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """One contestant's run: latencies [n] in their order, processor time and inferences of all together."""

    seconds: Floats
    cpu_s: float
    inferences: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One contestant's figures, for one input.

    ``intervals``: of each percentile, at ``CONFIDENCE``, in microseconds. ``ratio_p50``: to the p50 of the bare model
    in the same heat, the median of all heats; ``ratio_heats``: the least and the highest; None without a bare model.
    ``per_second``: inputs, one after the other. ``inferences``: a mean. ``energy_j``: the whole board's, idle included,
    while the input took its time.
    """

    name: str
    n: int
    p50_us: float
    p90_us: float
    p99_us: float
    intervals: Mapping[str, tuple[float | None, float | None]]
    ratio_p50: float | None
    ratio_heats: tuple[float, float] | None
    per_second: float
    cpu_s: float
    inferences: float
    energy_j: float | None


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Memory of a process that runs the model and does nothing else, in MiB; None where the system does not tell."""

    rss_mib: float | None
    anon_mib: float | None


def is_guarded(model: TfliteModel) -> bool:
    """Whether a file has outputs of a guard. Whether these are as they must be, :class:`GuardedModel` checks."""
    return not {SCORES, FEATURES}.isdisjoint(output["name"] for output in model.outputs)


def random_inputs(model: TfliteModel | GuardedModel, count: int, *, seed: int = 0) -> Array:
    """Inputs [count, ...] that fill the range of a model's input, in the owner's own type where that is known.

    A float input of unknown range gets numbers from 0 to 1.
    """
    if isinstance(model, GuardedModel):
        described = model.metadata.input
        shape, dtype, (low, high) = described.shape, np.dtype(described.dtype), described.range
    else:
        shape, dtype, (low, high) = model.input_shape, model.input_dtype, (0.0, 1.0)
        if np.issubdtype(dtype, np.integer):
            scale, zero_point = model.input_quantization
            low, high = float(np.iinfo(dtype).min), float(np.iinfo(dtype).max)
            if scale:
                low, high, dtype = (low - zero_point) * scale, (high - zero_point) * scale, np.dtype(np.float32)
    rng = np.random.default_rng(seed)
    if np.issubdtype(dtype, np.integer):
        return rng.integers(int(low), int(high), size=(count, *shape), dtype=dtype, endpoint=True)
    return rng.uniform(low, high, size=(count, *shape)).astype(dtype)


def check_same_outputs(bare: TfliteModel, guarded: TfliteModel, inputs: Array) -> None:
    """Raise ModelError unless the model's own outputs for inputs [N, ...] are bit-identical with and without guard."""
    for x in inputs[:_COMPARED]:
        before, after = bare.invoke(bare.quantise(x)), guarded.invoke(guarded.quantise(x))
        same = len(after) == len(before) + 2
        if not same or any(a.tobytes() != b.tobytes() for a, b in zip(before, after, strict=False)):
            raise ModelError(
                "guarded model",
                got="outputs that differ from those of the model without guard",
                expected="bit-identical ones",
                do="convert the model again, or report it",
            )


def why_no_cascade(model: GuardedModel, sidecar: Sidecar | None) -> str | None:
    """Why a guarded model has no further looks; None where it has."""
    if model.metadata.sidecar_digest is None:
        return "the model was made without a sidecar"
    if sidecar is None:
        return "the sidecar is not beside the model"
    cascade = Cascade(model, sidecar, clock=time.monotonic, rng=np.random.default_rng(0))
    return "the sidecar holds no further looks for this model" if cascade.limits is None else None


def contestants(
    *,
    bare: bytes | None,
    guarded: bytes | None,
    sidecar: Sidecar | None,
    inputs: Array,
    threads: int = 1,
    runtime: str | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Open]:
    """What there is to compare, by the names of the rows.

    The cascade's budget is spent at first, and fills by the time that its own inputs take: as if it had the board to
    itself and an input always waited. Inputs that come more slowly are looked at more often, up to the cascade without
    a budget.

    Args:
        bare: the model without guard, where it is known.
        guarded: the model with it, where it has one.
        sidecar: for the cascade; None leaves it out. Only with a guarded model.
        inputs: [N, ...] in the owner's own type, taken in turn.
        threads, runtime: as for :class:`TfliteModel`.
        clock: gives seconds.
    """

    def load() -> GuardedModel:
        assert guarded is not None
        return GuardedModel.load(guarded, threads=threads, runtime=runtime)

    def invoking(content: bytes) -> Run:
        model = TfliteModel(content, threads=threads, runtime=runtime)
        tensors = [model.quantise(x) for x in inputs[:_TENSORS]]

        def run(number: int) -> int:
            model.invoke(tensors[number % len(tensors)])
            return 1

        return run

    def judging() -> Run:
        model = load()

        def run(number: int) -> int:
            model.infer(inputs[number % len(inputs)])
            return 1

        return run

    def looking(budget: Budget) -> Run:
        own = 0.0
        cascade = Cascade(load(), sidecar, clock=lambda: own, rng=np.random.default_rng(0), budget=budget)
        if budget.burst < math.inf:  # what may be spent at once is not what a second costs
            for x in inputs[:_SPENDING]:
                if cascade.infer(x)[0].verdict.audit == "no budget":
                    break

        def run(number: int) -> int:
            nonlocal own
            started = clock()
            _, took = cascade.infer(inputs[number % len(inputs)])
            own += clock() - started
            return took

        return run

    found: dict[str, Open] = {}
    if bare is not None:
        found[BARE] = lambda: invoking(bare)
    if guarded is not None:
        found[GUARDED] = lambda: invoking(guarded)
        found[VERDICT] = judging
        if sidecar is not None:
            found[CASCADE] = lambda: looking(UNLIMITED)
            found[IN_BUDGET] = lambda: looking(Budget())
    return found


def measure(
    opened: Mapping[str, Open],
    *,
    n: int,
    look: Callable[[], Reading],
    progress: Progress | None = None,
    wall_ns: Callable[[], int] = time.perf_counter_ns,
    cpu_ns: Callable[[], int] = time.process_time_ns,
) -> tuple[dict[str, Samples], list[Reading]]:
    """Time ``n`` runs of each contestant, in turns.

    Args:
        opened: as :func:`contestants` returned it.
        n: at least 1.
        look: reads the board; called under load, about once a second between blocks, and at the end.
        progress: called with a text, the runs done and the runs in total.
        wall_ns, cpu_ns: clocks in nanoseconds; the second counts what all threads of this process spend.

    Returns:
        What was measured by name, and the readings in their order.
    """
    names = list(opened)
    times = {name: np.empty(n, dtype=np.int64) for name in names}
    spent, inferences = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    readings: list[Reading] = []
    last, turn = 0, 0
    for heat, numbers in enumerate(np.array_split(np.arange(n), HEATS)):
        runs = {name: opened[name]() for name in _turned(names, heat)}
        for run in runs.values():
            for number in range(1 + int(WARM_UP * len(numbers))):
                run(number)
        for first in range(0, len(numbers), BLOCK):
            if not readings or wall_ns() - last >= READING_S * 1e9:
                readings.append(look())
                last = wall_ns()
            block = numbers[first : first + BLOCK].tolist()
            for name in _turned(names, turn):
                run, row, count, began = runs[name], times[name], 0, cpu_ns()
                for number in block:
                    started = wall_ns()
                    count += run(number)
                    row[number] = wall_ns() - started
                spent[name] += cpu_ns() - began
                inferences[name] += count
            turn += 1
            if progress is not None:
                progress(f"timing {len(names)} in turns", block[-1] + 1, n)
    readings.append(look())
    return {
        name: Samples(seconds=times[name] / 1e9, cpu_s=spent[name] / 1e9, inferences=inferences[name]) for name in names
    }, readings


def _turned(names: Sequence[str], turn: int) -> list[str]:
    """The order of a turn: rotated, and backwards every other time, so that nobody always follows the same one."""
    start = turn // 2 % max(1, len(names))
    order = [*names[start:], *names[:start]]
    return order[::-1] if turn % 2 else order


def conditions(readings: Sequence[Reading]) -> Conditions:
    """Sum up readings. Not throttled is only what every reading called so."""
    degrees = [r.temperature_c for r in readings if r.temperature_c is not None]
    watts = [r.power_w for r in readings if r.power_w is not None]
    mhz = [r.cpu_mhz for r in readings if r.cpu_mhz is not None]
    throttled = [r.throttled for r in readings]
    return Conditions(
        temperature_c=(degrees[0], max(degrees)) if degrees else None,
        throttled=True if True in throttled else None if None in throttled or not throttled else False,
        power_w=sum(watts) / len(watts) if watts else None,
        cpu_mhz=(min(mhz), max(mhz)) if mhz else None,
    )


def rows(measured: Mapping[str, Samples], power_w: float | None = None) -> tuple[Row, ...]:
    """The figures of what :func:`measure` measured, with the board's mean power in watts where it is known."""
    reference = measured.get(BARE)
    return tuple(_row(name, samples, reference, power_w) for name, samples in measured.items())


def _row(name: str, samples: Samples, reference: Samples | None, power_w: float | None) -> Row:
    micros = np.sort(samples.seconds) * 1e6
    n, mean_s = len(micros), float(samples.seconds.mean())
    p50, p90, p99 = (float(np.percentile(micros, percent)) for percent in PERCENTILES)
    heats: list[float] = []
    if reference is not None:
        heats = [a / b for a, b in zip(_medians(samples), _medians(reference), strict=True)]
    return Row(
        name=name,
        n=n,
        p50_us=p50,
        p90_us=p90,
        p99_us=p99,
        intervals={f"p{percent}_us": interval(micros, percent / 100) for percent in PERCENTILES},
        ratio_p50=float(np.median(heats)) if heats else None,
        ratio_heats=(min(heats), max(heats)) if heats else None,
        per_second=1.0 / mean_s,
        cpu_s=samples.cpu_s / n,
        inferences=samples.inferences / n,
        energy_j=None if power_w is None else power_w * mean_s,
    )


def _medians(samples: Samples) -> list[float]:
    """The median of each heat that had any runs."""
    return [float(np.median(heat)) for heat in np.array_split(samples.seconds, HEATS) if len(heat)]


def interval(ordered: Floats, share: float) -> tuple[float | None, float | None]:
    """Bounds of a quantile at ``CONFIDENCE``, by order statistics, whatever the distribution.

    How many of n independent values lie below the quantile is binomial (Conover, Practical Nonparametric Statistics,
    section 3.2). Latencies in a row are not quite independent, so that the true interval is somewhat wider.

    Args:
        ordered: values [n], ascending.
        share: of values below the quantile, above 0 and below 1.

    Returns:
        The lower and upper bound; None where no value is low or high enough to be one.
    """
    n = len(ordered)
    below = np.arange(n + 1)
    logs = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, n + 1)))])
    exponents = logs[n] - logs - logs[::-1] + below * np.log(share) + (n - below) * np.log1p(-share)
    at_most = np.cumsum(np.exp(exponents))
    low = int(np.searchsorted(at_most, (1 - CONFIDENCE) / 2, side="right"))
    high = int(np.searchsorted(at_most, (1 + CONFIDENCE) / 2, side="left"))
    return float(ordered[low - 1]) if low else None, float(ordered[high]) if high < n else None


def doubts(measured: Mapping[str, Samples], found: Conditions) -> tuple[str, ...]:
    """What makes the figures doubtful, in words, one line each."""
    lines = []
    n = min((len(samples.seconds) for samples in measured.values()), default=0)
    if n < MIN_RUNS:
        lines.append(f"{n} runs are too few for p99: take at least {MIN_RUNS:,}")
    if found.throttled:
        lines.append("the board throttled during the run")
    if found.temperature_c is not None and found.temperature_c[1] - found.temperature_c[0] >= HOTTER_C:
        lines.append(f"the board grew hotter: {found.temperature_c[0]:.1f} to {found.temperature_c[1]:.1f} C")
    if found.cpu_mhz is not None and found.cpu_mhz[1] > (1 + MAX_CHANGE) * found.cpu_mhz[0]:
        lines.append(f"the CPU frequency changed: {found.cpu_mhz[0]:.0f} to {found.cpu_mhz[1]:.0f} MHz")
    noisy = [f"{name} {change:+.0%}" for name, change in _changes(measured) if abs(change) > MAX_CHANGE]
    if noisy:
        lines.append(f"noisy: p50 of the second half against the first: {', '.join(noisy)}")
    return tuple(lines)


def _changes(measured: Mapping[str, Samples]) -> Iterator[tuple[str, float]]:
    for name, samples in measured.items():
        first, second = np.array_split(samples.seconds, 2)
        if len(second):
            yield name, float(np.median(second) / np.median(first)) - 1


def footprint(model: Path, *, threads: int = 1, runtime: str | None = None) -> Footprint:
    """Memory of a fresh process that runs a model file, guarded or not, with its sidecar where there is one.

    Raises:
        ModelError: the runtime crashed on the file, or did not come to an end.
    """
    command = [sys.executable, "-m", "edgeguard.detection.bench", str(model), str(threads), runtime or ""]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_CHILD_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise ModelError(
            f"model {model}", got=f"no end of {_CHILD_RUNS} inferences in {_CHILD_S:g} s", do="take a smaller one"
        ) from error
    if done.returncode < 0:
        raise ModelError(
            f"model {model}",
            got=f"a runtime that died of {signal.Signals(-done.returncode).name}",
            do="fetch or convert it again, or take another --runtime",
        )
    # Anything else that is wrong with the file is said by whoever opens it next.
    return memory_in(done.stdout if done.returncode == 0 else "")


def memory_in(status: str) -> Footprint:
    """Read the text of Linux's ``/proc/self/status``."""
    found = {name: int(kib) / 1024 for name, kib in _MEMORY.findall(status)}
    return Footprint(rss_mib=found.get("VmRSS"), anon_mib=found.get("RssAnon"))


def _child(model: Path, threads: int, runtime: str | None) -> None:
    """Run a few inputs, the dearest way there is, and print what memory that takes."""
    content = model.read_bytes()
    try:
        guarded = GuardedModel.load(content, threads=threads, runtime=runtime)
    except ModelError:
        plain = TfliteModel(content, threads=threads, runtime=runtime)
        for x in random_inputs(plain, _CHILD_RUNS):
            plain.invoke(plain.quantise(x))
    else:
        rng, sidecar = np.random.default_rng(0), read_beside(model, guarded.metadata)
        cascade = Cascade(guarded, sidecar, clock=time.monotonic, rng=rng, budget=UNLIMITED, audit_share=1.0)
        for x in random_inputs(guarded, _CHILD_RUNS):
            cascade.infer(x)
    status = Path("/proc/self/status")
    print(status.read_text() if status.is_file() else "")


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] or None)
