"""``python -m edgeguard.hub.ingest_worker``: takes reports and alerts from a shared subscription, and nothing else.

Started by :mod:`edgeguard.hub.workers`, which it talks to over standard input and output, one JSON document a line:

* in: first an :class:`Assignment`, then each time that the hub knows other models, their shapes by digest;
* out: its :class:`~edgeguard.hub.listener.Totals`, at most once in ``TELL_S`` after a commit.

Rules enforced here:

* the end of standard input is the only order to stop, so that a worker never outlives who started it. The batch at
  hand is stored and acknowledged first. Signals for the whole group do not end it;
* what it cannot work without, such as a database that answers, ends it with one line: it is started again later.
"""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgeguard.errors import EXIT_CLEAN, EXIT_INTERNAL, EXIT_USAGE, EdgeGuardError
from edgeguard.hub.config import IngestConfig
from edgeguard.hub.ingest import ModelShape
from edgeguard.hub.listener import SHARED, Listener
from edgeguard.hub.store import EPOCH_HOURS, Store
from edgeguard.settings import BrokerConfig

TELL_S = 0.5


class Assignment(msgspec.Struct, frozen=True, kw_only=True):
    """What a worker needs to know. ``client_id`` is its own; ``log_level`` one of :mod:`logging`'s numbers."""

    broker: BrokerConfig
    fleet: str
    client_id: str
    store_url: str
    epoch_hours: int = EPOCH_HOURS
    limits: IngestConfig
    models: Mapping[str, ModelShape] = msgspec.field(default_factory=dict)
    log_level: int = logging.INFO


def main() -> int:
    """Work until standard input ends. Returns the exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    order = msgspec.json.decode(sys.stdin.buffer.readline(), type=Assignment, dec_hook=_to_path)
    logging.basicConfig(
        stream=sys.stderr,
        level=order.log_level,
        format=f"%(asctime)s %(levelname)s {order.client_id} %(name)s: %(message)s",
    )
    try:
        _work(order)
    except EdgeGuardError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    except Exception:
        logging.getLogger(__name__).exception("the worker ended on an error of its own")
        return EXIT_INTERNAL
    return EXIT_CLEAN


def _work(order: Assignment) -> None:
    models = dict(order.models)
    told_at = 0.0

    def tell() -> None:
        nonlocal told_at
        now = time.monotonic()
        if now - told_at >= TELL_S:
            told_at = now
            sys.stdout.buffer.write(msgspec.json.encode(listener.totals) + b"\n")
            sys.stdout.buffer.flush()

    store = Store(order.store_url, fleet=order.fleet, epoch_hours=order.epoch_hours)
    listener = Listener(
        order.broker,
        fleet=order.fleet,
        client_id=order.client_id,
        store=store,
        models=lambda: models,
        clock_ms=lambda: time.time_ns() // 1_000_000,
        stored=tell,
        limits=order.limits,
        channels=SHARED,
        group=order.limits.group,
    )
    listener.start()
    for line in sys.stdin.buffer:
        models = msgspec.json.decode(line, type=dict[str, ModelShape])
    listener.stop()
    store.close()


def _to_path(wanted: type, text: str) -> Path:
    assert wanted is Path
    return Path(text)


if __name__ == "__main__":
    sys.exit(main())
