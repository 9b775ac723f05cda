"""Tells the outside what happened: webhooks, messages of the broker, and sensors that Home Assistant discovers.

Rules enforced here:

* a notification is in the database's outbox since the transaction that it tells of, and leaves it once it was taken:
  a restart loses none, and one may come twice;
* a webhook's body is signed with HMAC-SHA256 under a key that only the two ends have; redirects are not followed;
* what is not taken is tried again ever later, for three days; one place that does not answer keeps no other waiting
  longer than one attempt takes, and never the hub's loop;
* the hub's own topics lie under ``edgeguard/v1/<fleet>/_hub``: no device's id begins with an underscore.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import logging
import queue
import threading
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from http.client import HTTPException
from pathlib import Path
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from edgeguard import broker as brokers
from edgeguard.contract import topics
from edgeguard.errors import ConfigError, EdgeGuardError, LinkError
from edgeguard.hub import tables
from edgeguard.hub.cases import OPEN, Case
from edgeguard.hub.config import NotifyConfig
from edgeguard.hub.store import Store, reason
from edgeguard.settings import BrokerConfig, password

SIGNATURE = "X-EdgeGuard-Signature"
"""``sha256=`` and the hex HMAC of the body."""
TIMEOUT_S = 10.0
RETRY_FIRST_MS = 15_000
"""Longer than an attempt may take, so that no second hub makes it at the same time."""
RETRY_CAP_MS = 3600_000
GIVEN_UP_MS = 3 * 86_400_000
IDLE_S = 1.0
SENSORS_EVERY_S = 60.0
_AT_ONCE = 32
_MIN_SECRET = 16

Deliver = Callable[[Sequence[tuple[str, bytes, bool]]], None]
"""Gives topics, payloads and retain flags to the broker; raises LinkError or OSError unless it took them all."""

log = logging.getLogger(__name__)


class Targets:
    """Who is told of what: the ``[[notify]]`` sections, their keys read.

    Raises:
        ConfigError: a key file cannot be read or is too short.
    """

    def __init__(self, configs: Sequence[NotifyConfig]) -> None:
        self.configs = {config.name: config for config in configs}
        self.secrets = {
            config.name: _secret(config.name, config.secret_file) for config in configs if config.secret_file
        }

    def of(self, kind: str) -> list[str]:
        """The names of those who are told of an event of this kind."""
        return [
            config.name
            for config in self.configs.values()
            if config.kind != "homeassistant" and (not config.events or kind in config.events)
        ]


class Notifier:
    """Empties the outbox in a thread of its own.

    Args:
        store: the database.
        targets: who is told.
        deliver: to the broker.
        clock_ms: the hub's clock.
        sensors: gives Home Assistant's messages as they should stand now: topic and payload, all retained.
    """

    def __init__(
        self,
        store: Store,
        targets: Targets,
        *,
        deliver: Deliver,
        clock_ms: Callable[[], int],
        sensors: Callable[[], Mapping[str, bytes]],
    ) -> None:
        self._store = store
        self._targets = targets
        self._deliver = deliver
        self._clock_ms = clock_ms
        self._sensors = sensors
        self._shown: dict[str, bytes] = {}
        self._show_all_at = 0
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Begin, where there is anybody to tell."""
        kinds = {config.kind for config in self._targets.configs.values()}
        loops = {
            "notify": (kinds & {"webhook", "mqtt"}, self.send_due),
            "sensors": (kinds & {"homeassistant"}, self.show_sensors),
        }
        for name, (wanted, step) in loops.items():
            if wanted:
                thread = threading.Thread(target=self._loop, args=(step,), name=name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def stop(self) -> None:
        """End after the attempt at hand, which is not waited for: what it sends stays in the outbox if it fails."""
        self._stopping.set()
        for thread in self._threads:
            thread.join(2.0)

    def send_due(self) -> None:
        """Try each notification that is due once."""
        table = tables.outbox
        with self._store.read() as db:
            now = self._clock_ms()
            # Another hub on this database may have places of its own; what nobody takes is given up in the end.
            ours = or_(table.c.target.in_(list(self._targets.configs)), table.c.created_ms < now - GIVEN_UP_MS)
            mine = (table.c.fleet == self._store.fleet, table.c.next_ms <= now, ours)
            rows = db.execute(select(table).where(*mine).order_by(table.c.id).limit(_AT_ONCE)).all()
        silent: set[str] = set()
        for row in rows:
            if self._stopping.is_set():
                return
            if row.target in silent or not self._claimed(row.id, row.attempts):
                continue
            try:
                self._send(row.target, row.id, row.body)
            except (EdgeGuardError, OSError, ValueError, HTTPException) as error:
                waited = self._clock_ms() - row.created_ms
                log.warning("notification %d to %s was not taken: %s", row.id, row.target, error)
                silent.add(row.target)
                self._postpone(row.target)
                if waited < GIVEN_UP_MS:
                    continue
                log.error("notification %d to %s is given up", row.id, row.target)  # noqa: TRY400
            with self._store.write() as db:
                db.execute(delete(table).where(table.c.id == row.id))

    def show_sensors(self) -> None:
        """Publish what Home Assistant's sensors show: what has changed, and now and then all."""
        now = self._clock_ms()
        if not self._show_all_at - SENSORS_EVERY_S * 1000 <= now < self._show_all_at:
            self._shown, self._show_all_at = {}, now + round(SENSORS_EVERY_S * 1000)
        wanted = self._sensors()
        changed = [(name, payload, True) for name, payload in wanted.items() if self._shown.get(name) != payload]
        if not changed:
            return
        try:
            self._deliver(changed)
            self._shown = dict(wanted)
        except (EdgeGuardError, OSError) as error:
            log.warning("sensors are not shown: %s", error)

    def _claimed(self, number: int, attempts: int) -> bool:
        """Take an attempt, which no other hub then makes; the next one comes after this one's time."""
        table = tables.outbox
        pause = min(RETRY_FIRST_MS * 2 ** min(attempts, 20), RETRY_CAP_MS)
        values = {"attempts": attempts + 1, "next_ms": self._clock_ms() + pause}
        with self._store.write() as db:
            mine = update(table).where(table.c.id == number, table.c.attempts == attempts)
            return bool(db.execute(mine.values(**values)).rowcount)

    def _postpone(self, target: str) -> None:
        """Let what else is due for a place that did not answer wait too, so that it is not in the others' way."""
        table, now = tables.outbox, self._clock_ms()
        with self._store.write() as db:
            due = update(table).where(table.c.fleet == self._store.fleet, table.c.target == target)
            db.execute(due.where(table.c.next_ms <= now).values(next_ms=now + RETRY_FIRST_MS))

    def _send(self, target: str, number: int, body: bytes) -> None:
        config = self._targets.configs.get(target)
        if config is None:
            log.warning("notification %d is for %s, which is no longer configured", number, target)
        elif config.kind == "mqtt":
            self._deliver([(topic(self._store.fleet, "notice"), body, False)])
        elif config.url is not None:
            post(config.url, body, key=self._targets.secrets[target], number=number)

    def _loop(self, step: Callable[[], None]) -> None:
        while not self._stopping.wait(IDLE_S):
            try:
                step()
            except SQLAlchemyError as error:
                log.warning("notifications: %s", reason(error))


def post(url: str, body: bytes, *, key: bytes, number: int) -> None:
    """POST one body with its signature.

    Raises:
        LinkError: the answer was no success.
        OSError: there was no answer.
    """
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "edgeguard-hub",
        "X-EdgeGuard-Id": str(number),
        SIGNATURE: signature(body, key),
    }
    request = urllib.request.Request(url, data=body, headers=headers, method="POST")
    with _OPENER.open(request, timeout=TIMEOUT_S) as answer:
        if not 200 <= answer.status < 300:
            raise LinkError("webhook", got=f"status {answer.status}", expected="2xx")


def deliver(broker: BrokerConfig, client_id: str, messages: Sequence[tuple[str, bytes, bool]]) -> None:
    """Publish at QoS 1 on a connection of its own, and wait until the broker has acknowledged each message.

    Raises:
        LinkError: it refused, or did not acknowledge in time.
        OSError: there is no connection.
    """
    client = brokers.client(broker, client_id, password(broker), clean_session=True)
    answer: queue.Queue[str] = queue.Queue()
    client.on_connect = lambda _c, _u, _f, code, _p: answer.put(str(code) if code.is_failure else "")
    brokers.connect(client, broker, clean_session=True)
    client.loop_start()
    try:
        refused = answer.get(timeout=TIMEOUT_S)
        if refused:
            raise LinkError("broker", got=f"refused: {refused}")
        handed = [client.publish(name, payload, qos=1, retain=retain) for name, payload, retain in messages]
        for one in handed:
            one.wait_for_publish(TIMEOUT_S)
            if not one.is_published():
                raise LinkError("broker", got="no acknowledgement", expected=f"one within {TIMEOUT_S:g} s")
    except (queue.Empty, RuntimeError, ValueError) as error:
        raise LinkError("broker", got=str(error) or "no answer", expected="an open connection") from error
    finally:
        client.disconnect()
        client.loop_stop()


def signature(body: bytes, key: bytes) -> str:
    """What stands in the header :data:`SIGNATURE`; RFC 2104 with SHA-256."""
    return "sha256=" + hmac.new(key, body, hashlib.sha256).hexdigest()


def topic(fleet: str, name: str) -> str:
    """One of the hub's own topics."""
    return f"{topics.PREFIX}/{topics.check_fleet(fleet)}/_hub/{name}"


def sensors(fleet: str, models: Sequence[str], cases: Sequence[Case], *, prefix: str) -> dict[str, bytes]:
    """Home Assistant's discovery messages and states: is a backdoor suspected or a case open, and is the hub there.

    Args:
        fleet: the fleet.
        models: names of its models.
        cases: all records.
        prefix: Home Assistant's discovery prefix.

    Returns:
        Payloads by topic, to be retained.
    """
    shown: dict[str, bytes] = {}

    def add(key: str, state: bool, **config: Any) -> None:
        # Home Assistant takes fewer characters than names may have.
        unique = f"edgeguard_{hashlib.sha256(f'{fleet}/{key}'.encode()).hexdigest()[:16]}"
        state_topic = topic(fleet, f"sensor/{key}")
        device = {"identifiers": [f"edgeguard_{fleet}"], "name": f"EdgeGuard {fleet}", "manufacturer": "EdgeGuard"}
        config |= {"unique_id": unique, "state_topic": state_topic, "device": device}
        shown[f"{prefix}/binary_sensor/{unique}/config"] = json.dumps(config).encode()
        shown[state_topic] = b"ON" if state else b"OFF"

    # Without a repetition within this time the hub is taken to be away.
    add("hub", True, name="Hub", device_class="connectivity", expire_after=round(3 * SENSORS_EVERY_S))
    for model in sorted(set(models)):  # a name holds no slash
        records = [case for case in cases if case.model == model and case.state in OPEN]
        add(f"{model}/suspected", bool(records), name=f"{model}: backdoor suspected", device_class="problem")
        confirmed = any(case.is_case for case in records)
        add(f"{model}/case", confirmed, name=f"{model}: backdoor confirmed", device_class="safety")
    return shown


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any, **__: Any) -> None:
        """A body that was signed for one place goes to no other."""


_OPENER = urllib.request.build_opener(_NoRedirect)


def _secret(name: str, path: Path) -> bytes:
    what = f"[[notify]] {name}: secret_file {path}"
    try:
        key = path.read_bytes().split(b"\n", 1)[0].strip()
    except OSError as error:
        raise ConfigError(what, got=error.strerror, expected="a readable file") from error
    if len(key) < _MIN_SECRET:
        raise ConfigError(what, got=f"{len(key)} bytes", expected=f"at least {_MIN_SECRET} in its first line")
    return key
