"""What the hub acknowledges, to whom and when, through a real broker."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DataError

from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Alert, Desired, Report, encode
from edgeguard.hub.config import IngestConfig
from edgeguard.hub.ingest import Accepted, ModelShape, Rejected
from edgeguard.hub.listener import RETAINED, SHARED, Listener
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
def listen(mosquitto: Mosquitto) -> Iterator[Callable[..., Listener]]:
    running: list[Listener] = []

    def start(store: Store, **more: Any) -> Listener:
        made = Listener(
            BrokerConfig(host="127.0.0.1", port=mosquitto.port),
            fleet="test",
            store=store,
            models=lambda: MODELS,
            clock_ms=lambda: 7,
            **{"client_id": "hub", **more},
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
    database: str, listen: Callable[..., Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    device.keep(fleet.report(1))
    wait_until(lambda: device.acks)
    assert device.acks == [Ack(boot=fleet.BOOT, through_seq=1)]
    assert store.counts()["reports"] == 1


def test_nothing_is_acknowledged_before_the_commit(
    tmp_path: Path, database: str, listen: Callable[..., Listener], device: Publisher
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
    database: str, listen: Callable[..., Listener], device: Publisher
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
    payload: bytes, database: str, listen: Callable[..., Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store)
    device.keep_raw(fleet.BOOT, 1, payload)
    wait_until(lambda: not device.waiting)
    assert store.counts()["reports"] == 0
    assert store.counts()["dead_letters"] == 1


def test_the_hub_goes_on_after_hostile_payloads_on_every_channel(
    database: str, listen: Callable[..., Listener], device: Publisher
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
    database: str, listen: Callable[..., Listener], device: Publisher
) -> None:
    store = Picky(database, fleet="test")
    for seq in range(1, 6):
        device.keep(fleet.report(seq, counts=((0, 13 if seq == 3 else 10, 1),)))
    listen(store)
    wait_until(lambda: not device.waiting)
    assert store.counts()["reports"] == 4
    assert "cannot be stored" in store.dead_letters()[0][1]


def test_alerts_are_stored_and_acknowledged_like_reports(
    database: str, listen: Callable[..., Listener], device: Publisher
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
    database: str, listen: Callable[..., Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store).stop()
    for seq in range(1, 31):
        device.send(topics.REPORT, fleet.report(seq))  # once: only the broker's session can bring them
    listen(store)
    wait_until(lambda: store.counts()["reports"] == 30)


def test_a_killed_broker_loses_nothing(
    database: str, listen: Callable[..., Listener], device: Publisher, mosquitto: Mosquitto
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


def test_a_hint_reaches_its_device(database: str, listen: Callable[..., Listener], device: Publisher) -> None:
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


def test_a_connection_whose_process_is_killed_is_made_again_and_nothing_is_lost(
    database: str, listen: Callable[..., Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    hub = listen(store)
    for seq in range(1, 151):
        device.keep(fleet.report(seq))
        if seq == 75:
            assert hub._link._process is not None
            hub._link._process.kill()
            wait_until(lambda: hub.connections == 2)
    wait_until(lambda: not device.waiting)
    assert (store.counts()["reports"], store.counts()["dead_letters"]) == (150, 0)


def test_a_device_in_a_hurry_is_acknowledged_less_often_than_it_sends(
    database: str, listen: Callable[..., Listener], device: Publisher
) -> None:
    store = Store(database, fleet="test")
    listen(store, limits=IngestConfig(ack_every_s=5.0))
    device.keep(fleet.report(1))
    wait_until(lambda: not device.waiting)
    for seq in range(2, 201):
        device.keep(fleet.report(seq))
    wait_until(lambda: not device.waiting)
    assert len(device.acks) == 2


class TestFloods:
    TIGHT = IngestConfig(messages_per_second=60.0, burst_messages=40, ack_every_s=0.1)

    def test_what_exceeds_a_limit_waits_with_its_device_and_nothing_is_lost(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        store = Store(database, fleet="test")
        hub = listen(store, limits=self.TIGHT)
        for seq in range(1, 151):
            device.keep(fleet.report(seq))
        wait_until(lambda: hub.totals.limited)
        wait_until(lambda: not device.waiting)
        assert (store.counts()["reports"], store.counts()["inputs"]) == (150, 150 * 30)
        assert [(e.kind, e.subject) for e in store.events()] == [("rate_limited", "d1")]

    def test_others_are_served_meanwhile(
        self, database: str, listen: Callable[..., Listener], device: Publisher, mosquitto: Mosquitto
    ) -> None:
        store = Store(database, fleet="test")
        hub = listen(store, limits=self.TIGHT)
        with Publisher(mosquitto.port, "d2") as quiet:
            wait_until(quiet.connected)
            for seq in range(1, 2001):
                device.send(topics.REPORT, fleet.report(seq))
                if seq % 100 == 0:
                    quiet.keep(fleet.report(seq // 100))
            wait_until(lambda: not quiet.waiting)
        wait_until(lambda: hub.totals.limited + hub.totals.taken >= 2020)
        assert store.counts()["reports"] < 2020 - hub.totals.limited + 1
        assert hub.totals.limited > 1000

    def test_one_that_floods_its_status_can_still_be_heard_with_reports(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        store = Store(database, fleet="test")
        hub = listen(store, limits=self.TIGHT)
        for session in range(1, 501):
            device.send(topics.STATUS, fleet.status(session=session))
        device.keep(fleet.report(1))
        wait_until(lambda: not device.waiting)
        assert hub.totals.limited > 300

    def test_a_device_that_invents_models_is_heard_with_few_of_them(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        store = Store(database, fleet="test")
        hub = listen(store)
        for number in range(40):
            device.send("report", encode(fleet.report(number + 1, model=f"{number:064x}")))
        wait_until(lambda: hub.totals.limited + hub.totals.taken >= 40)
        assert store.counts()["reports"] == hub.totals.taken == 16

    def test_rejected_messages_are_all_acknowledged_but_kept_and_told_in_a_limited_number(
        self, database: str, listen: Callable[..., Listener], device: Publisher, caplog: pytest.LogCaptureFixture
    ) -> None:
        store = Store(database, fleet="test")
        hub = listen(store)
        for seq in range(1, 301):
            device.keep_raw(fleet.BOOT, seq, b'{"boot":"%s","seq":%d}' % (fleet.BOOT.encode(), seq))
        wait_until(lambda: not device.waiting)
        assert hub.totals.rejected >= 300
        assert 50 <= len(store.dead_letters()) < 80
        assert len([line for line in caplog.records if "rejected" in line.getMessage()]) < 80


class TestReplies:
    def test_each_is_handed_over_with_its_device_and_command(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        heard: list[tuple[str, str, bytes]] = []
        listen(Store(database, fleet="test"), replied=lambda *reply: heard.append(reply))
        device.send(topics.reply("ping"), b"{}")
        wait_until(lambda: heard == [("d1", "ping", b"{}")])

    def test_one_that_cannot_be_taken_holds_nothing_up(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        def refuse(*_: object) -> None:
            raise ValueError("no such command")

        listen(Store(database, fleet="test"), replied=refuse)
        device.send(topics.reply("ping"), b"{}")
        device.keep(fleet.report(1))
        wait_until(lambda: not device.waiting)


class TestSharedSubscription:
    def test_two_share_the_reports_and_store_each_once(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        stores = [Store(database, fleet="test") for _ in range(2)]
        hubs = [
            listen(store, client_id=f"hub-{i}", channels=SHARED, group="hubs", limits=IngestConfig(ack_every_s=0.1))
            for i, store in enumerate(stores)
        ]
        for seq in range(1, 201):
            device.keep(fleet.report(seq))
        wait_until(lambda: not device.waiting)
        assert (stores[0].counts()["reports"], stores[0].counts()["inputs"]) == (200, 200 * 30)
        assert all(hub.totals.taken > 20 for hub in hubs)

    def test_a_session_is_rid_of_what_it_had_subscribed_to_before(
        self, database: str, listen: Callable[..., Listener], device: Publisher
    ) -> None:
        store = Store(database, fleet="test")
        listen(store).stop()
        listen(store, channels=RETAINED)
        device.send(topics.REPORT, fleet.report(1))
        device.send(topics.STATUS, fleet.status())
        wait_until(lambda: [d.state for d in store.devices()] == ["online"])
        assert store.counts()["reports"] == 0
