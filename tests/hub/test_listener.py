"""What the hub acknowledges, to whom and when, through a real broker."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from sqlalchemy.exc import DataError

from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Alert, Desired, Report, encode
from edgeguard.hub.ingest import Accepted, ModelShape, Rejected
from edgeguard.hub.listener import Listener
from edgeguard.hub.store import Store
from edgeguard.settings import BrokerConfig
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until
from tests.simulators.mosquitto import Mosquitto, free_port

MODELS: Mapping[str, ModelShape] = {fleet.MODEL: ModelShape(width=fleet.WIDTH, classes=2)}


class Picky(Store):
    """A database that cannot take a report of 13 inputs."""

    def apply(self, items: Sequence[Accepted | Rejected], *, now_ms: int) -> list[tuple[str, Ack]]:
        if any(isinstance(i, Accepted) and isinstance(i.message, Report) and i.message.inputs == 13 for i in items):
            raise DataError("insert", {}, Exception("value out of range"))
        return super().apply(items, now_ms=now_ms)


@pytest.fixture
def database(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path / 'hub.db'}"


@pytest.fixture
def listen(mosquitto: Mosquitto) -> Iterator[Callable[[Store], Listener]]:
    running: list[Listener] = []

    def start(store: Store) -> Listener:
        made = Listener(
            BrokerConfig(host="127.0.0.1", port=mosquitto.port),
            fleet="test",
            client_id="hub",
            store=store,
            models=lambda: MODELS,
            clock_ms=lambda: 7,
        )
        made.start()
        running.append(made)
        wait_until(lambda: made.connected)
        return made

    yield start
    for one in running:
        one.stop()


@pytest.fixture
def device(mosquitto: Mosquitto) -> Iterator[Publisher]:
    with Publisher(mosquitto.port, "d1") as publisher:
        wait_until(publisher.connected)
        yield publisher


def test_a_stored_report_is_acknowledged_to_its_device(
    database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    device.keep(fleet.report(1))
    wait_until(lambda: device.acks)
    assert device.acks == [Ack(boot=fleet.BOOT, through_seq=1)]
    assert store.counts()["reports"] == 1


def test_nothing_is_acknowledged_before_the_commit(
    tmp_path: Path, database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test", busy_timeout_s=0.1)
    listen(store)
    tries = threading.Event()
    with sqlite3.connect(tmp_path / "hub.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        device.keep(fleet.report(1))
        tries.wait(2.0)
        assert not device.acks
        assert device.waiting == 1
        other.execute("ROLLBACK")
    wait_until(lambda: not device.waiting)
    assert store.counts()["reports"] == 1


def test_a_report_whose_ack_was_lost_is_acknowledged_again_and_stored_once(
    database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    device.send(topics.REPORT, fleet.report(1))
    wait_until(lambda: len(device.acks) == 1)
    device.send(topics.REPORT, fleet.report(1))
    wait_until(lambda: len(device.acks) == 2)
    assert store.counts()["reports"] == 1


@pytest.mark.parametrize("payload", [b'{"boot":"%s","seq":1}' % fleet.BOOT.encode(), encode(fleet.report(1, width=9))])
def test_a_report_that_can_never_be_accepted_is_not_sent_for_ever(
    payload: bytes, database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    device.keep_raw(fleet.BOOT, 1, payload)
    wait_until(lambda: not device.waiting)
    assert store.counts()["reports"] == 0
    assert store.counts()["dead_letters"] == 1


def test_the_hub_goes_on_after_hostile_payloads_on_every_channel(
    database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    hostile = [b"", b"\0", b"{", b"[" * 50_000, b'{"v":9}', b"\xff" * 70_000, b'{"session":-1}']
    for channel in topics.DEVICE_CHANNELS:
        for payload in hostile:
            device.send(channel, payload)
    device.keep(fleet.report(1))
    wait_until(lambda: not device.waiting)
    wait_until(lambda: store.counts()["dead_letters"] >= len(hostile) * (len(topics.DEVICE_CHANNELS) - 1))
    assert store.counts()["reports"] == 1


def test_one_message_that_the_database_cannot_take_does_not_hold_up_the_others(
    database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Picky(database, fleet="test")
    for seq in range(1, 6):
        device.keep(fleet.report(seq, counts=((0, 13 if seq == 3 else 10, 1),)))
    listen(store)
    wait_until(lambda: not device.waiting)
    assert store.counts()["reports"] == 4
    assert "cannot be stored" in store.dead_letters()[0][1]


def test_alerts_are_stored_and_acknowledged_like_reports(
    database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    alert = Alert(
        boot=fleet.BOOT, seq=1, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, at_ms=1, label=0, score=2.0,
        scores={},
    )  # fmt: skip
    device.send(topics.ALERT, alert)
    wait_until(lambda: device.acks)
    assert store.counts()["alerts"] == 1


def test_what_arrives_while_the_hub_is_away_is_delivered_afterwards(
    database: str, listen: Callable[[Store], Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store).stop()
    for seq in range(1, 31):
        device.send(topics.REPORT, fleet.report(seq))  # once: only the broker's session can bring them
    listen(store)
    wait_until(lambda: store.counts()["reports"] == 30)


def test_a_killed_broker_loses_nothing(
    database: str, listen: Callable[[Store], Listener], device: Publisher, mosquitto: Mosquitto
) -> None:
    store = Store(database, fleet="test")
    hub = listen(store)
    for seq in range(1, 151):
        device.keep(fleet.report(seq))
        if seq == 75:
            mosquitto.kill()
            wait_until(lambda: not hub.connected)
            mosquitto.start()
    wait_until(lambda: not device.waiting)
    assert hub.connections == 2
    assert store.counts()["reports"] == 150
    assert sum(row.inputs for row in store.evidence(fleet.MODEL, fleet.GUARD)) == 150 * 30


def test_a_hint_reaches_its_device(database: str, listen: Callable[[Store], Listener], device: Publisher) -> None:
    hub = listen(Store(database, fleet="test"))
    hint = Desired(target="signs-1.tflite", sequence=1)
    assert hub.publish("d1", topics.MODEL_DESIRED, hint, retain=True)
    wait_until(lambda: device.hints == [hint])


def test_without_a_broker_each_attempt_is_one_line_in_the_log(database: str, caplog: pytest.LogCaptureFixture) -> None:
    hub = Listener(
        BrokerConfig(host="127.0.0.1", port=free_port()),
        fleet="test",
        client_id="hub",
        store=Store(database, fleet="test"),
        models=dict,
        clock_ms=lambda: 0,
    )
    hub.start()
    wait_until(lambda: len(caplog.records) >= 2)
    hub.stop()
    assert all("refused" in line.getMessage() and "\n" not in line.getMessage() for line in caplog.records)
    assert not hub.publish("d1", topics.MODEL_DESIRED, Desired(target="t", sequence=1))
