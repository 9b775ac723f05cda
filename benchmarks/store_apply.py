"""What a report costs the hub's store: processor time of ``Store.apply`` on SQLite and on PostgreSQL.

    python -m benchmarks.store_apply [--reports 20000] [--profile] [--json benchmarks/results/store_apply.json]

Reports of about 530 bytes from 1,000 devices, in batches of several sizes. Blocks of the two databases take turns.
Given are the processor time of this process (SQLite works in it, PostgreSQL's server does not) and the time on the
clock, each for a report: the median over batches, and the tenth percentile, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import platform
import pstats
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from edgeguard.contract.messages import LabelCount, Report, encode
from edgeguard.contract.scores import BINS
from edgeguard.hub.ingest import Accepted
from edgeguard.hub.store import Store
from tests.simulators.postgres import Postgres

DEVICES = 1000
SIZES = (20, 256, 1000)
ROUNDS = 3


def reports(count: int) -> list[Accepted]:
    """So many reports, of one device after the other; their boots are new."""
    boots = [f"{random.getrandbits(64):016x}" for _ in range(DEVICES)]
    items = []
    for number in range(count):
        boot, seq = boots[number % DEVICES], number // DEVICES + 1
        labels = tuple(LabelCount(label=label, inputs=75, flagged=0) for label in range(4))
        message = Report(
            boot=boot, seq=seq, model_digest="a" * 64, guard_digest="b" * 64, started_ms=1_700_000_000_000,
            ended_ms=1_700_000_300_000, inputs=300, unchecked=0, labels=labels, histogram=(300, *(0,) * (BINS - 1)),
        )  # fmt: skip
        items.append(Accepted(device=f"device-{number % DEVICES:05d}", message=message, payload=encode(message)))
    return items


def spend(store: Store, items: list[Accepted], size: int) -> list[tuple[float, float]]:
    """Processor and clock time of each whole batch, in us per report."""
    found = []
    for start in range(0, len(items) - size + 1, size):
        batch = items[start : start + size]
        clock, processor = time.perf_counter(), time.process_time()
        store.apply(batch, now_ms=time.time_ns() // 1_000_000)
        spent = (time.process_time() - processor, time.perf_counter() - clock)
        found.append((spent[0] / size * 1e6, spent[1] / size * 1e6))
    return found


def summary(times: list[tuple[float, float]]) -> dict[str, float]:
    """Median and tenth percentile."""
    columns = zip(("processor_us", "clock_us"), np.array(times).T, strict=True)
    return {
        f"{name}_{label}": round(float(np.percentile(column, share)), 1)
        for name, column in columns
        for label, share in (("p50", 50), ("p10", 10))
    }


def main() -> int:
    """Measure, print, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reports", type=int, default=20_000, help="reports for each size of batch and database")
    parser.add_argument("--profile", action="store_true", help="show where the time goes, for the largest batches")
    parser.add_argument("--json", type=Path, help="where to write the result")
    options = parser.parse_args()
    cluster = Postgres()
    cluster.start()
    found: dict[str, Any] = {
        "machine": platform.machine(), "cores": os.cpu_count(), "load_before": os.getloadavg()[0],
        "payload_bytes": len(reports(1)[0].payload), "reports": options.reports,
    }  # fmt: skip
    try:
        with tempfile.TemporaryDirectory() as folder:
            urls = {"sqlite": f"sqlite:///{folder}/hub.db", "postgresql": cluster.url(cluster.create())}
            stores = {name: Store(url, fleet="apply") for name, url in urls.items()}
            for store in stores.values():
                store.apply(reports(DEVICES), now_ms=1)  # devices are met once, reports every day
            for size in SIZES:
                times: dict[str, list[tuple[float, float]]] = {name: [] for name in stores}
                for _ in range(ROUNDS):
                    for name, store in stores.items():
                        times[name] += spend(store, reports(options.reports // ROUNDS), size)
                for name, values in times.items():
                    found.setdefault(name, {})[f"batches of {size}"] = summary(values)
            if options.profile:
                for store in stores.values():
                    _profile(store, reports(options.reports))
            for store in stores.values():
                store.close()
    finally:
        cluster.stop()
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0


def _profile(store: Store, items: list[Accepted]) -> None:
    with cProfile.Profile() as profile:
        spend(store, items, SIZES[-1])
    pstats.Stats(profile).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    sys.exit(main())
