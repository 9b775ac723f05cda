"""Mutates real model files by the thousand, and counts what becomes of each: ``python -m benchmarks.fuzz``.

Every mutant goes through ``converters.structure.check`` and ``edgeguard.detection.metadata.read`` in this process,
under a limit of one second of processor time; one that passes goes through every TFLite runtime in a child process.
What must hold: this process neither crashes, hangs nor grows, and every outcome is one of those counted. Mutant N of a
seed is the same one in every run with the same files, so ``--first`` takes up a run where it stopped, or repeats one.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import queue
import resource
import signal
import struct
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import metadata as distributions
from pathlib import Path
from typing import Any

import numpy as np

from converters import flatbuffer, structure
from converters.untrusted import Child, Limits, UntrustedError, run_on, runtimes_to_try
from edgeguard.detection import metadata
from edgeguard.errors import ModelError

RESULTS = Path(__file__).parent / "results" / "fuzz.json"
CHECK_SECONDS = 1.0
MAX_GROWTH_MIB = 256
BATCH = 250
LIMITS = Limits(memory_bytes=2 << 30, cpu_seconds=5, wall_seconds=20.0)
BOUNDARIES = (0, 1, 2, 4, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x10000, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFC, 0xFFFFFFFF)
WORST_FIRST = ("crashed", "timed out", "out of memory", "refused by a runtime", "ran")
MAX_LISTED = 200


@dataclass(frozen=True)
class Seed:
    """A real file, and the positions in it that are not constants: where a changed byte means something else."""

    name: str
    content: bytes
    structural: np.ndarray[Any, np.dtype[np.int64]]


@dataclass
class Tally:
    """What became of the mutants so far."""

    outcomes: Counter[str] = field(default_factory=Counter)
    runtimes: dict[str, Counter[str]] = field(default_factory=dict)
    guard_metadata: Counter[str] = field(default_factory=Counter)
    mutations: dict[str, Counter[str]] = field(default_factory=dict)
    crashes: Counter[str] = field(default_factory=Counter)
    deaths: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)
    slowest_check_ms: float = 0.0


class _TooLongError(Exception):
    """A check in this process ran into its limit."""


def seeds() -> list[Seed]:
    """A bare int8 model and its guarded form, made here, and the third-party files where there are any."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    from converters import pipeline, sources
    from edgeguard.attacks import victims
    from edgeguard.data import hold_out, load

    data, x_owner, y_owner = hold_out(load("digits"), 600)
    model, _ = victims.trained(
        data.x_train.astype(np.uint8), data.y_train, len(data.classes), epochs=25, cache=victims.cache_folder()
    )
    conversion = pipeline.convert(sources.of_keras(model), x_owner, y_owner)
    files = {"digits_int8": conversion.bare, "digits_int8_guarded": conversion.guarded}
    folder = os.environ.get("EDGEGUARD_MODELS")
    if folder:
        files |= {path.stem: path.read_bytes() for path in sorted(Path(folder).glob("*.tflite"))}
    return [Seed(name, content, _structural(content)) for name, content in files.items()]


def _structural(content: bytes) -> np.ndarray[Any, np.dtype[np.int64]]:
    mask = np.ones(len(content), dtype=bool)
    for buffer in flatbuffer.parse(content).buffers:
        data = b"" if buffer.data is None else bytes(np.asarray(buffer.data, dtype=np.uint8))
        if len(data) >= 64:
            start = content.find(data)
            mask[start : start + len(data)] = False
    return np.flatnonzero(mask)


def mutate(files: list[Seed], seed: int, number: int) -> tuple[str, str, bytes]:
    """Mutant ``number`` of ``seed``: the file that it came from, the kind of mutation, and its bytes."""
    rng = np.random.default_rng([seed, number])
    source = files[int(rng.integers(len(files)))]
    kind = list(_MUTATIONS)[int(rng.integers(len(_MUTATIONS)))]
    return source.name, kind, _MUTATIONS[kind](rng, source, files)


def _positions(rng: np.random.Generator, source: Seed, *, most: int = 8) -> list[int]:
    """Up to ``most`` positions; nine of ten times among those that are not constants."""
    count = int(rng.integers(1, most + 1))
    if rng.random() < 0.9:
        return [int(p) for p in rng.choice(source.structural, count)]
    return [int(p) for p in rng.integers(0, len(source.content), count)]


def _flip_bits(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    content = bytearray(source.content)
    for position in _positions(rng, source):
        content[position] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _flip_one_bit(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    content = bytearray(source.content)
    content[_positions(rng, source, most=1)[0]] ^= 1 << int(rng.integers(8))
    return bytes(content)


def _set_bytes(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    content = bytearray(source.content)
    for position in _positions(rng, source):
        content[position] = int(rng.integers(256))
    return bytes(content)


def _boundaries(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    content = bytearray(source.content)
    for position in _positions(rng, source, most=2):
        start = min(position & ~3, len(content) - 4)
        old = int.from_bytes(content[start : start + 4], "little")
        value = (*BOUNDARIES, old + 1, old - 1, old * 2, len(content), len(content) - start)[int(rng.integers(19))]
        content[start : start + 4] = (value & 0xFFFFFFFF).to_bytes(4, "little")
    return bytes(content)


def _truncate(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    return source.content[: int(rng.integers(len(source.content)))]


def _copy_block(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    """Write one stretch of the file over another, in place, or insert it and move the rest."""
    content = bytearray(source.content)
    length = 4 * int(rng.integers(1, 64))
    start, target = (p & ~3 for p in rng.choice(source.structural, 2).tolist())
    block = content[start : start + length]
    content[target : target + (len(block) if rng.random() < 0.8 else 0)] = block
    return bytes(content)


def _splice(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    """The head of one file and the tail of another, or a stretch of another in the middle."""
    other = files[int(rng.integers(len(files)))].content
    cut = int(rng.integers(min(len(source.content), len(other)))) & ~3
    if rng.random() < 0.5:
        return source.content[:cut] + other[cut:]
    end = cut + 4 * int(rng.integers(1, 64))
    return source.content[:cut] + other[cut:end] + source.content[end:]


def _random(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    """Noise behind a true beginning."""
    kept = source.content[: int(rng.integers(8, 256))]
    return kept + rng.bytes(int(rng.integers(0, 4096)))


def _change_fields(rng: np.random.Generator, source: Seed, files: list[Seed]) -> bytes:
    """A well-formed file with other numbers in one to three fields of its tensors, operators, options and codes."""
    model = flatbuffer.parse(source.content)
    graph = model.subgraphs[0]
    owners = [*model.operatorCodes, *graph.tensors, *graph.operators]
    owners += [t.quantization for t in graph.tensors if t.quantization is not None]
    owners += [o.builtinOptions for o in graph.operators if o.builtinOptions is not None] * 2
    for owner in rng.choice(np.asarray(owners, dtype=object), int(rng.integers(1, 4))):
        fields = [name for name, value in vars(owner).items() if _is_number(value)]
        if fields:
            name = fields[int(rng.integers(len(fields)))]
            setattr(owner, name, _other(rng, getattr(owner, name)))
    try:
        return flatbuffer.pack(model)
    except (struct.error, TypeError, ValueError, OverflowError):  # a number that its field cannot hold
        return _flip_one_bit(rng, source, files)


def _is_number(value: object) -> bool:
    if isinstance(value, np.ndarray):
        return value.dtype != np.uint8 and 0 < value.size <= 4096
    return isinstance(value, int | float)


def _other(rng: np.random.Generator, value: Any) -> Any:
    """Another number, or the list with one entry changed, dropped, doubled, or in another order."""
    if not isinstance(value, np.ndarray):
        step = [1, -1, 2, 4, int(rng.integers(-128, 128)), -int(value), 0x7FFFFFFF - int(value), -1 - int(value)]
        other = value + step[int(rng.integers(len(step)))]
        return bool(other % 2) if isinstance(value, bool) else other
    changed, at = value.copy(), int(rng.integers(value.size))
    if changed.dtype.kind == "f":
        factor = (0.0, -1.0, 1e-30, 1e30, np.inf, np.nan, 2.0, 0.5)[int(rng.integers(8))]
        changed[at] *= np.float32(factor)
        return changed
    act = int(rng.integers(6))
    if act < 3:
        changed[at] = (int(changed[at]) + 1, int(changed[at]) - 1, int(rng.integers(-2, 4096)))[act]
        return changed
    return (np.delete(changed, at), np.append(changed, changed[at]), changed[::-1].copy())[act - 3]


_MUTATIONS: dict[str, Callable[[np.random.Generator, Seed, list[Seed]], bytes]] = {
    "one bit flipped": _flip_one_bit,
    "bits flipped": _flip_bits,
    "bytes set": _set_bytes,
    "boundary values": _boundaries,
    "truncated": _truncate,
    "fields changed": _change_fields,
    "block copied": _copy_block,
    "spliced": _splice,
    "random": _random,
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise _TooLongError in the main thread when the process has used more processor time than that."""

    def expire(number: int, frame: object) -> None:
        raise _TooLongError

    before = signal.signal(signal.SIGPROF, expire)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def check(content: bytes, tally: Tally, who: dict[str, Any]) -> bool:
    """Both checks in this process; whether the structure passed."""
    passed = {"structure": False, "metadata": False}
    for name, function in (("structure", structure.check), ("metadata", metadata.read)):
        started = time.process_time()
        try:
            with limited(CHECK_SECONDS):
                function(content)
            passed[name] = True
        except ModelError:
            pass
        except Exception as error:  # whatever else comes out is what this program looks for
            tally.failures.append({**who, "check": name, "error": f"{type(error).__name__}: {error}"[:300]})
        tally.slowest_check_ms = max(tally.slowest_check_ms, (time.process_time() - started) * 1000)
    tally.guard_metadata["read" if passed["metadata"] else "refused"] += 1
    return passed["structure"]


def on_runtimes(children: queue.SimpleQueue[Child], content: bytes, names: tuple[str, ...]) -> dict[str, str]:
    """What each runtime made of a file, in a child from the pool: one of WORST_FIRST, with how it died behind it."""
    child = children.get()
    outcomes: dict[str, str] = {}
    try:
        for name in names:
            try:
                run_on(child, content, name)
                outcomes[name] = "ran"
            except UntrustedError as error:
                outcomes[name] = f"{error.kind}: {str(error.got)[:120]}"
            except ModelError:
                outcomes[name] = "refused by a runtime"
    finally:
        children.put(child)
    return outcomes


def add(tally: Tally, who: dict[str, Any], outcomes: dict[str, str]) -> None:
    """Add what the runtimes made of one mutant."""
    kinds = {name: outcome.partition(":")[0] for name, outcome in outcomes.items()}
    for name, kind in kinds.items():
        tally.runtimes.setdefault(name, Counter())[kind] += 1
        if kind not in {"ran", "refused by a runtime"}:
            tally.crashes[outcomes[name].partition(": ")[2]] += 1
            if len(tally.deaths) < MAX_LISTED:
                tally.deaths.append({**who, "runtime": name, "outcome": outcomes[name]})
    worst = min(kinds.values(), key=WORST_FIRST.index)
    tally.outcomes[worst] += 1
    tally.mutations.setdefault(who["mutation"], Counter())[worst] += 1


def run(files: list[Seed], *, count: int, seed: int, first: int, workers: int, keep: Path | None) -> Tally:
    """Make and judge mutants ``first`` to ``first + count``; ``keep`` is a folder for those that killed a child."""
    tally, names = Tally(), runtimes_to_try()
    children: queue.SimpleQueue[Child] = queue.SimpleQueue()
    with ExitStack() as held, ThreadPoolExecutor(workers) as pool:
        for _ in range(workers):
            children.put(held.enter_context(Child(LIMITS)))
        for start in range(first, first + count, BATCH):
            waiting = []
            for number in range(start, min(start + BATCH, first + count)):
                name, kind, content = mutate(files, seed, number)
                who = {"number": number, "file": name, "mutation": kind}
                if check(content, tally, who):
                    waiting.append((who, content, pool.submit(on_runtimes, children, content, names)))
                else:
                    tally.outcomes["refused by the structure check"] += 1
                    tally.mutations.setdefault(kind, Counter())["refused by the structure check"] += 1
            for who, content, future in waiting:
                outcomes = future.result()
                add(tally, who, outcomes)
                if keep is not None and not {"ran", "refused by a runtime"}.issuperset(outcomes.values()):
                    (keep / f"{who['number']}.tflite").write_bytes(content)
            done = sum(tally.outcomes.values())
            print(f"\r{done}/{count}  {dict(tally.outcomes)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return tally


def main() -> int:
    """Run, print, write. Exit code 0 when nothing failed, 1 otherwise."""
    parser = argparse.ArgumentParser(description="Mutate model files and count what becomes of each.")
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first mutant")
    parser.add_argument("--workers", type=int, default=2, help="child processes")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--keep", type=Path, help="folder for the mutants that killed a child")
    asked = parser.parse_args()
    if asked.keep is not None:
        asked.keep.mkdir(parents=True, exist_ok=True)
    files = seeds()
    for one in files:  # what is not refused may not grow the process: warm up with what is whole
        structure.check(one.content)
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    tally = run(files, count=asked.count, seed=asked.seed, first=asked.first, workers=asked.workers, keep=asked.keep)
    growth = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if growth > MAX_GROWTH_MIB:
        tally.failures.append({"check": "memory", "error": f"this process grew by {growth:.0f} MiB"})
    report = {
        "count": asked.count,
        "seed": asked.seed,
        "first": asked.first,
        "files": {one.name: len(one.content) for one in files},
        "seconds": round(time.monotonic() - started, 1),
        "growth_mib": round(growth, 1),
        **vars(tally),
        "versions": {
            "python": platform.python_version(),
            **{name: distributions.version(name) for name in ("numpy", "flatbuffers", "ai-edge-litert")},
            **{name: distributions.version(name) for name in runtimes_to_try() if name != "litert"},
            "machine": platform.machine(),
        },
    }
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    asked.json.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps({k: v for k, v in report.items() if k not in {"deaths", "mutations", "files"}}, indent=1))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
