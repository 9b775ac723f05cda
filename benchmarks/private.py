"""What private aggregation costs beside the same computation in clear: time, bytes between the parties, growth.

    python -m benchmarks.private [--devices 1000] [--channels 256] [--json FILE] [--quick]

Three processes on this machine, TLS on loopback, and the same rounds in clear; medians over rounds. Bytes are those of
the loopback interface, so that nothing else should use it meanwhile. Each row says whether both gave the same channels.
"""

from __future__ import annotations

import argparse
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgeguard.contract.private import Kind, Round
from edgeguard.private import child, parties, rounds, sharing

NAMES = ("north", "south", "west")
FIRST_PORT = 19871


@dataclass(frozen=True, kw_only=True)
class Row:
    """One size.

    ``private_s``: of the slowest party, from their meeting on; ``loopback_mb``: between all three.
    """

    kind: str
    devices: int
    channels: int
    same: bool
    private_s: float
    clear_s: float
    submission_bytes: int
    loopback_mb: float


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=1000)
    parser.add_argument("--channels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="this size alone")
    args = parser.parse_args(argv)
    sizes = [(args.devices, args.channels)]
    if not args.quick:
        sizes = [(args.devices // 10, args.channels), (args.devices, args.channels // 4), *sizes]
    rows: list[dict[str, Any]] = []
    for devices, channels in sizes:
        for kind in ("votes", "ranks"):
            row = measure(kind, devices, channels, args.rounds)
            print(json.dumps(asdict(row)), flush=True)
            rows.append(asdict(row))
            if args.json:
                _record(args.json, asdict(row) | {"rounds": args.rounds})
    return 0 if all(row["same"] for row in rows) else 1


def _record(path: Path, row: dict[str, Any]) -> None:
    """Add a row to those that are there, in place of one of the same size."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    same = ("kind", "devices", "channels")
    rows = [one for one in kept.get("rows", ()) if [one[name] for name in same] != [row[name] for name in same]]
    kept.pop("rounds", None)
    path.write_text(json.dumps(kept | {"rows": [*rows, row]}, indent=1) + "\n")


def measure(kind: Kind, devices: int, channels: int, count: int) -> Row:
    """One size, ``count`` times."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        together = _parties(folder)
        private_s, clear_s, traffic, same, size = [], [], [], True, 0
        for number in range(count):
            asked = Round(
                id=f"round-{number:04}", fleet="gate", parties=together.digest, model_digest="0" * 64, layer="conv",
                channels=channels, kind=kind, prune=channels // 4,
            )  # fmt: skip
            values = _values(asked, devices, number)
            sent = folder / f"sent-{number}"
            sent.mkdir()
            for device, row in enumerate(values):
                made = sharing.submit(
                    asked, f"cam-{device}", row, together, secrets.token_bytes(sharing.random_bytes(asked))
                )
                size = len(msgspec.json.encode(made))
                rounds.write_submission(made, sent / f"cam-{device}.json")
            rounds.write(asked, folder / f"round-{number}.json")
            before = _loopback_bytes()
            found, seconds = _private(folder, number)
            traffic.append(_loopback_bytes() - before)
            started = time.perf_counter()
            expected = _in_clear(asked, values)
            clear_s.append(time.perf_counter() - started)
            private_s.append(seconds)
            same = same and all(one == expected for one in found)
    return Row(
        kind=kind,
        devices=devices,
        channels=channels,
        same=same,
        private_s=round(statistics.median(private_s), 2),
        clear_s=round(statistics.median(clear_s), 4),
        submission_bytes=size,
        loopback_mb=round(statistics.median(traffic) / 1e6, 1),
    )


def _parties(folder: Path) -> parties.Parties:
    now = datetime.now(timezone.utc)
    for place, name in enumerate(NAMES):
        parties.create(folder / name, name=name, host="127.0.0.1", port=FIRST_PORT + place, now=now)
    public = tuple(folder / name / parties.PUBLIC for name in NAMES)
    for name in NAMES:
        together = parties.join(folder / name, public)
    return together


def _values(asked: Round, devices: int, seed: int) -> sharing.Values:
    """Devices that agree roughly on which channels are idle."""
    rng = np.random.default_rng(seed)
    activity = rng.normal(size=asked.channels) + 0.5 * rng.normal(size=(devices, asked.channels))
    return np.stack([sharing.values_of(asked, np.argsort(row).tolist()) for row in activity])


def _in_clear(asked: Round, values: sharing.Values) -> list[int]:
    cost = -values.sum(axis=0) if asked.kind == "votes" else np.sort(values, axis=0)[(len(values) - 1) // 2]
    return sorted(np.lexsort((np.arange(asked.channels), cost))[: asked.prune].tolist())


_PARTY = """
import json, sys, time
from pathlib import Path
from edgeguard.private import child, parties, rounds
import jax, spu
folder, name, number = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
own, asked = parties.own(folder / name), rounds.read(folder / f"round-{number}.json")
ballots = rounds.Ballots(asked, own)
rounds.collect(folder / f"sent-{number}", ballots)
started = []
def said(text, done, total):
    if done == 2:
        started.append(time.perf_counter())
def deliver(result):
    print(json.dumps([list(result.channels), time.perf_counter() - started[0]]), flush=True)
rounds.meet(asked, ballots, own, said, deliver, timeout_s=300)
"""


def _private(folder: Path, number: int) -> tuple[list[list[int]], float]:
    """What each party opened, and the seconds of the slowest."""

    def run(name: str) -> tuple[list[int], float]:
        command = [sys.executable, "-c", _PARTY, str(folder), name, str(number)]
        errors = folder / f"{name}-errors"
        with (
            errors.open("wb") as log,
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as process,
        ):
            line = next((line for line in process.stdout or () if line.startswith("[[")), None)
            # The result is there before a party leaves; of leaving SPU sometimes makes no end.
            with suppress(subprocess.TimeoutExpired):
                process.wait(child.LEAVE_S)
            process.kill()
            if line is None:
                raise RuntimeError(errors.read_text(errors="replace")[-2000:])
        channels, seconds = json.loads(line)
        return channels, seconds

    with ThreadPoolExecutor(len(NAMES)) as pool:
        results = list(pool.map(run, NAMES))
    return [channels for channels, _ in results], max(seconds for _, seconds in results)


def _loopback_bytes() -> int:
    for line in Path("/proc/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == "lo":
            return int(rest.split()[8])
    return 0


if __name__ == "__main__":
    sys.exit(main())
