"""How fast the hub takes reports, beside a client that only acknowledges them.

    python -m benchmarks.ingest [--quick] [--reports 200000] [--rows 1000000] [--part memory ...]
                                [--json benchmarks/results/ingest.json]

One machine, a real mosquitto with queues on disk, real clients. Reports of about 512 bytes from 1,000 devices, one in
ten with evidence.

* **Rate**: blocks that take turns, so that a busy machine is as busy for each. The broker's queue is filled while
  nobody is connected; then one client drains it: a bare paho subscriber that acknowledges each message and does nothing
  else, or the hub's ingest (its own connection, checks, commit, acknowledgements to broker and devices) on SQLite and
  on PostgreSQL. Both are processes of their own with the same kind of session, the same broker and the same queue;
  publishers are gone while the clock runs, which is from the connection to the last acknowledgement or commit.
* **Latency**: publish to commit, at an offered rate that leaves room, by one monotonic clock.
* **Workers**: two on one shared subscription drain the queue; the counts must be those of the devices.
* **Memory** of the hub's processes, over so many reports in chunks that the broker's queue holds. SQLite fills a page
  cache of 64 MiB first.
* **Growth**: seconds per report in the store as the table of reports grows. The table is filled with copied rows.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Report, encode
from edgeguard.hub import ingest, schema
from edgeguard.hub.config import IngestConfig
from edgeguard.hub.ingest import Accepted, ModelShape, Rejected
from edgeguard.hub.listener import SHARED, Listener
from edgeguard.hub.store import Store
from edgeguard.settings import BrokerConfig
from tests.simulators import fleet
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.postgres import Postgres

FLEET = "test"
DEVICES = 1000
BROKER = "max_inflight_messages 4096\n"
OFFERED = 500
COPIED = 100_000
QUEUED = 50_000
"""Reports at most that wait in the broker, which drops what is beyond its own limit of 100,000."""
MODELS = {fleet.MODEL: ModelShape(width=fleet.WIDTH, classes=4)}
LIMITS = {"rate_ratio": 0.70, "growth": 1.5, "memory_mib": 8.0}
MIB = 1 << 20

PARTS = ("rate", "latency", "two_workers", "memory", "growth")
DATABASES = ("sqlite", "postgresql")

Say = Callable[[str], None]


def device(number: int) -> str:
    """The name of one of the devices."""
    return f"device-{number % DEVICES:04d}"


def report(number: int, *, started_ms: int = 0) -> Report:
    """Report ``number`` of the whole fleet, the devices in turn."""
    flagged = int(number % 10 == 0)
    made = fleet.report(
        number // DEVICES + 1,
        boot=f"{number % DEVICES:016x}",
        counts=((0, 10, flagged), (1, 20, 0), (2, 12, 0)),
    )
    return msgspec.structs.replace(made, started_ms=started_ms or made.started_ms)


class Client(mqtt.Client):
    """A paho client on the benchmark's broker."""

    def __init__(self, port: int, client_id: str, *, clean: bool = True) -> None:
        super().__init__(CallbackAPIVersion.VERSION2, client_id=client_id, clean_session=clean, protocol=mqtt.MQTTv311)
        self.port = port

    def open(self) -> None:
        """Connect."""
        self.connect("127.0.0.1", self.port)


@contextmanager
def publisher(port: int) -> Iterator[Client]:
    """A connected client whose messages are all with the broker at the end."""
    client = Client(port, "publisher")
    client.max_inflight_messages_set(0)
    client.open()
    client.loop_start()
    yield client
    while client._out_messages:
        time.sleep(0.01)
    client.disconnect()
    client.loop_stop()


def fill(port: int, start: int, count: int) -> None:
    """Publish reports into the queues of whoever has a session."""
    with publisher(port) as client:
        for number in range(start, start + count):
            client.publish(topics.topic(FLEET, device(number), topics.REPORT), encode(report(number)), qos=1)
            while len(client._out_messages) > 2000:
                time.sleep(0.002)


def session(port: int, client_id: str, filters: Sequence[str]) -> None:
    """Leave a session with subscriptions at the broker, or with no ``filters``, end it."""
    client = Client(port, client_id, clean=not filters)
    done = threading.Event()

    def on_connect(*_: Any) -> None:
        if filters:
            client.subscribe([(name, 1) for name in filters])
        else:
            done.set()

    client.on_connect = on_connect
    client.on_subscribe = lambda *_: done.set()
    client.open()
    client.loop_start()
    if not done.wait(30):
        raise TimeoutError("no answer from the broker")
    client.disconnect()
    client.loop_stop()


# -- the processes that are measured


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What a measured process does: drain ``count`` messages, with the hub where it has a ``url``."""

    port: int
    client_id: str
    count: int
    url: str | None = None
    group: str | None = None


def bare(job: Job) -> None:
    """Acknowledge and do nothing else."""
    client = Client(job.port, job.client_id, clean=False)
    client.manual_ack_set(True)
    seen = 0
    began = began_cpu = 0.0

    def on_connect(*_: Any) -> None:
        nonlocal began, began_cpu
        began, began_cpu = time.monotonic(), time.process_time()

    def on_message(_client: Any, _userdata: Any, message: mqtt.MQTTMessage) -> None:
        nonlocal seen
        client.ack(message.mid, message.qos)
        seen += 1
        if seen == job.count:
            took = {"seconds": time.monotonic() - began, "cpu_s": time.process_time() - began_cpu}
            print(json.dumps(took), flush=True)

    client.on_connect, client.on_message = on_connect, on_message
    client.open()
    client.loop_start()
    sys.stdin.read()


class Watched(Store):
    """The hub's store, which also notes when which reports were committed."""

    def __init__(self, url: str, count: int) -> None:
        super().__init__(url, fleet=FLEET)
        self._count = count
        self.stored = 0
        self.began = self.began_cpu = 0.0
        self.delays_ms: list[float] = []

    def apply(self, items: Sequence[Accepted | Rejected], *, now_ms: int) -> list[tuple[str, Ack]]:
        acks = super().apply(items, now_ms=now_ms)
        now = time.monotonic()
        messages = [i.message for i in items if isinstance(i, Accepted) and isinstance(i.message, Report)]
        if messages and messages[0].started_ms > 10**6:  # in microseconds of the monotonic clock: the latency run
            self.delays_ms += [now * 1e3 - message.started_ms / 1e3 for message in messages]
        before, self.stored = self.stored, self.stored + len(messages)
        if before // self._count != self.stored // self._count:
            found = {
                "seconds": now - self.began,
                "cpu_s": time.process_time() - self.began_cpu,
                **memory(),
                **delays(self.delays_ms),
            }
            print(json.dumps(found), flush=True)
            self.delays_ms.clear()
        return acks


def hub(job: Job) -> None:
    """The hub's ingest, until standard input ends."""
    assert job.url is not None
    store = Watched(job.url, job.count)
    listener = Listener(
        BrokerConfig(host="127.0.0.1", port=job.port),
        fleet=FLEET,
        client_id=job.client_id,
        store=store,
        models=lambda: MODELS,
        clock_ms=lambda: time.time_ns() // 1_000_000,
        channels=SHARED,
        group=job.group,
        limits=IngestConfig(messages_per_second=1e6, burst_messages=10**6, kib_per_second=1e6, burst_mib=1024.0),
    )
    listener.start()
    while not listener.connected:
        time.sleep(0.001)
    store.began, store.began_cpu = time.monotonic(), time.process_time()
    print("{}", flush=True)
    sys.stdin.read()
    listener.stop()


def memory() -> dict[str, float]:
    """Anonymous memory of this process and its children, in MiB."""
    pids = [os.getpid(), *(int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())]
    return {"anonymous_mib": round(sum(_anonymous(pid) for pid in pids) / 1024, 2)}


def _anonymous(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def delays(found_ms: Sequence[float]) -> dict[str, float]:
    """Percentiles, where there is anything."""
    if not found_ms:
        return {}
    p50, p99 = np.percentile(found_ms, [50, 99])
    return {"p50_ms": round(float(p50), 2), "p99_ms": round(float(p99), 2), "max_ms": round(max(found_ms), 2)}


class Measured:
    """One of these processes; use it as a context."""

    def __init__(self, job: Job) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.ingest", "--job", json.dumps(msgspec.to_builtins(job))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __enter__(self) -> Measured:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def answer(self) -> dict[str, Any]:
        """The next line that it writes."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the measured process ended")
        found: dict[str, Any] = json.loads(line)
        return found


# -- what is measured

FILTERS = [topics.subscription(FLEET, channel) for channel in SHARED]


def drain(port: int, count: int, url: str | None) -> dict[str, Any]:
    """Fill the queue, and let one client drain it. Reports a second, and processor time of the main process."""
    job = Job(port=port, client_id="drain", count=count, url=url)
    session(port, "drain", FILTERS)
    fill(port, 0, count)
    with Measured(job) as process:
        if url:
            process.answer()
        found = process.answer()
    session(port, "drain", [])
    if url:
        counted(url, count)
    return {"per_s": round(count / found["seconds"], 1), "cpu_us": round(found["cpu_s"] / count * 1e6, 1)}


def counted(url: str, reports: int) -> None:
    """Hold the database against what the devices sent. Raises RuntimeError."""
    store = Store(url, fleet=FLEET)
    found = store.counts()
    summed = sum(row.inputs for row in store.evidence(fleet.MODEL, fleet.GUARD))
    store.close()
    wanted = (reports, 42 * reports, (reports + 9) // 10, 0, 42 * reports)
    got = (found["reports"], found["inputs"], found["flagged"], found["dead_letters"], summed)
    if got != wanted:
        raise RuntimeError(f"counts {got}, expected {wanted}")


def rate(port: int, databases: Mapping[str, Callable[[], str]], count: int, rounds: int, say: Say) -> dict[str, Any]:
    """Bare and hub in turn."""
    found: dict[str, list[float]] = {"bare": [], **{name: [] for name in databases}}
    for turn in range(rounds):
        for name, values in found.items():
            one = drain(port, count, databases[name]() if name != "bare" else None)
            values.append(one["per_s"])
            say(f"rate, round {turn + 1} of {rounds}: {name} {one['per_s']:,.0f}/s, {one['cpu_us']:.0f} us each")
    ratios = {
        name: [round(mine / other, 3) for mine, other in zip(found[name], found["bare"], strict=True)]
        for name in databases
    }
    return {
        "reports_per_block": count,
        "reports_per_s": found,
        "median_per_s": {name: statistics.median(values) for name, values in found.items()},
        "ratios": ratios,
        "median_ratio": {name: statistics.median(values) for name, values in ratios.items()},
    }


def latency(port: int, url: str, seconds: float) -> dict[str, Any]:
    """Publish to commit, at a steady rate, open loop."""
    count = int(seconds * OFFERED)
    with Measured(Job(port=port, client_id="latency", count=count, url=url)) as process:
        process.answer()
        with publisher(port) as client:
            began = time.monotonic()
            for number in range(count):
                wait_s = began + number / OFFERED - time.monotonic()
                if wait_s > 0:
                    time.sleep(wait_s)
                sent = report(number, started_ms=int(time.monotonic() * 1e6))
                client.publish(topics.topic(FLEET, device(number), topics.REPORT), encode(sent), qos=1)
        found = process.answer()
    session(port, "latency", [])
    counted(url, count)
    return {"offered_per_s": OFFERED, "reports": count} | {k: v for k, v in found.items() if k.endswith("_ms")}


def two_workers(port: int, url: str, count: int) -> dict[str, Any]:
    """Two members of one shared subscription; counts must be exact."""
    filters = [f"$share/hub/{name}" for name in FILTERS]
    names = ("worker-0", "worker-1")
    for name in names:
        session(port, name, filters)
    Store(url, fleet=FLEET).close()
    fill(port, 0, count)
    began = time.monotonic()
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(Measured(Job(port=port, client_id=name, count=count + 1, url=url, group="hub")))
        store = Store(url, fleet=FLEET)
        while store.counts()["reports"] < count:
            if time.monotonic() > began + 300:
                raise TimeoutError("two workers did not drain the queue")
            time.sleep(0.2)
        store.close()
        took = time.monotonic() - began
    for name in names:
        session(port, name, [])
    counted(url, count)
    return {"reports": count, "reconcile": True, "seconds_with_their_start": round(took, 1)}


def flat_memory(port: int, url: str, count: int, say: Say) -> dict[str, Any]:
    """Memory after each chunk of reports."""
    chunk = min(max(count // 10, 1000), QUEUED)
    readings: list[float] = []
    with Measured(Job(port=port, client_id="memory", count=chunk, url=url)) as process:
        process.answer()
        for start in range(0, count, chunk):
            fill(port, start, chunk)
            readings.append(process.answer()["anonymous_mib"])
            if (start // chunk + 1) % max(count // chunk // 10, 1) == 0:
                say(f"memory: {start + chunk:,} reports, {readings[-1]:.1f} MiB")
    session(port, "memory", [])
    counted(url, count)
    fifth = max(len(readings) // 5, 1)
    last, before = readings[-fifth:], readings[-2 * fifth : -fifth]
    return {
        "reports": count,
        "anonymous_mib": readings,
        "last_fifth_minus_the_one_before_mib": round(statistics.mean(last) - statistics.mean(before), 2),
    }


def growth(url: str, rows: Sequence[int], say: Say) -> dict[str, Any]:
    """Time in the store per report, with so many reports in the table."""
    store = Store(url, fleet=FLEET)
    number, found = 0, {}

    def apply(count: int) -> float:
        nonlocal number
        batches = []
        for start in range(number, number + count, 500):
            made = [(n, encode(report(n))) for n in range(start, min(start + 500, number + count))]
            batches.append(
                [
                    ingest.read(topics.topic(FLEET, device(n), topics.REPORT), payload, fleet=FLEET, models=MODELS)
                    for n, payload in made
                ]
            )
        number += count
        began = time.perf_counter()
        for batch in batches:
            store.apply(batch, now_ms=1_000_000 + number)
        return (time.perf_counter() - began) / count * 1e6

    apply(5 * DEVICES)  # so that the devices are known and the process is warm
    for wanted in rows:
        copy_rows(store, wanted - number)
        took = [apply(1000) for _ in range(7)]
        found[str(wanted)] = round(statistics.median(took), 1)
        say(f"growth: {wanted:,} rows, {found[str(wanted)]:.1f} us a report")
    store.close()
    values = list(found.values())
    return {"us_per_report": found, "largest_over_first": round(max(values) / values[0], 2)}


def copy_rows(store: Store, count: int) -> None:
    """Add so many reports to the table, copies of some that are there."""
    engine = store._engine
    series = (
        "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {0}) SELECT i FROM n"
        if engine.dialect.name == "sqlite"
        else "SELECT generate_series(1, {0}) AS i"
    )
    columns = ", ".join(column.name for column in schema.reports.columns if column.name != "id")
    with engine.begin() as db:
        for left in range(count, 0, -COPIED):
            each = -(-min(left, COPIED) // DEVICES)
            db.exec_driver_sql(
                f"INSERT INTO reports ({columns}) SELECT {columns} FROM "
                f"(SELECT * FROM reports LIMIT {DEVICES}) AS r, ({series.format(each)}) AS n"
            )


def main() -> int:
    """Measure, print, and write what was measured. 0 when every limit is kept."""
    options = _options()
    if options.job:
        job = msgspec.json.decode(options.job, type=Job)
        (hub if job.url else bare)(job)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # broker and database end with this process
    block, rounds, memory_reports = 10_000, options.rounds, options.reports
    rows = [n for n in (10**4, 10**5, 10**6, 10**7) if n <= options.rows]
    if options.quick:
        block, rounds, memory_reports, rows = 4000, 1, 8000, [10**4]
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", flush=True)

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = Mosquitto(folder / "mosquitto", more=BROKER)
        broker.start()
        stack.callback(broker.stop)
        postgres = Postgres()
        stack.callback(postgres.stop)
        postgres.start()
        files = iter(range(10**6))
        databases: dict[str, Callable[[], str]] = {
            "sqlite": lambda: f"sqlite:///{folder}/{next(files)}.db",
            "postgresql": lambda: postgres.url(postgres.create()),
        }
        size = statistics.mean(len(encode(report(number))) for number in range(10))
        machine = {
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
        }
        found: dict[str, Any] = _kept(options.json, machine) if options.part else {}
        found |= {
            "machine": machine,
            "broker": BROKER.strip(),
            "report_bytes": round(size, 1),
            "devices": DEVICES,
            "limits": LIMITS,
        }
        wanted = options.part or PARTS
        if "rate" in wanted:
            found["rate"] = rate(broker.port, databases, block, rounds, say)
        parts: dict[str, Callable[[str], Any]] = {
            "latency": lambda url: latency(broker.port, url, 2.0 if options.quick else 20.0),
            "two_workers": lambda url: two_workers(broker.port, url, block),
            "memory": lambda url: flat_memory(broker.port, url, memory_reports, say),
            "growth": lambda url: growth(url, rows, say),
        }
        for part, measure in parts.items():
            if part not in wanted:
                continue
            chosen = [options.database] if options.database else DATABASES
            found[part] = found.get(part, {}) | {name: measure(databases[name]()) for name in chosen}
            say(f"{part}: {json.dumps(found[part])}")
    kept = judge(found)
    found["kept"] = kept
    print(json.dumps(found, indent=2))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    return 0 if all(kept.values()) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few reports: shows that it works")
    parser.add_argument("--reports", type=int, default=200_000, help="of the memory run; 10000000 is the full one")
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the growth run; 10000000 is the full one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--part", action="append", choices=PARTS, help="only these; the file's other parts stay")
    parser.add_argument("--database", choices=DATABASES, help="only this one; not with the rates")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.database and "rate" in (options.part or PARTS):
        parser.error("--database needs a --part other than rate: rates are compared in one run")
    return options


def _kept(place: Path | None, machine: Mapping[str, Any]) -> dict[str, Any]:
    """What an earlier run wrote; empty where there is none, or it ran on another machine."""
    if place is None or not place.exists():
        return {}
    found: dict[str, Any] = json.loads(place.read_text())
    return found if found.get("machine") == machine else {}


def judge(found: Mapping[str, Any]) -> dict[str, bool]:
    """Which limits are kept, of what was measured."""
    kept = {}
    for name, ratio in found.get("rate", {}).get("median_ratio", {}).items():
        kept[f"{name}: rate"] = ratio >= LIMITS["rate_ratio"]
    for name, each in found.get("two_workers", {}).items():
        kept[f"{name}: two workers reconcile"] = each["reconcile"]
    for name, each in found.get("memory", {}).items():
        kept[f"{name}: memory flat"] = each["last_fifth_minus_the_one_before_mib"] <= LIMITS["memory_mib"]
    for name, each in found.get("growth", {}).items():
        kept[f"{name}: growth"] = each["largest_over_first"] <= LIMITS["growth"]
    return kept


if __name__ == "__main__":
    sys.exit(main())
