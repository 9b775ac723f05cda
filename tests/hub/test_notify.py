"""Notifications: to a real HTTP server and a real broker, signed, repeated, surviving restarts; Home Assistant."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from sqlalchemy import select

from edgeguard.contract import topics
from edgeguard.errors import ConfigError, LinkError
from edgeguard.hub import cases, config, notify, tables
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.config import NotifyConfig
from edgeguard.hub.notify import Notifier, Targets
from edgeguard.hub.policy import Suspicion
from edgeguard.hub.store import Store
from edgeguard.settings import BrokerConfig
from tests.simulators import database, fleet
from tests.simulators.fleet import wait_until
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.webhook import Webhook

KEY = b"a key of both ends only"
HOUR_MS = 3_600_000


class World:
    """An outbox with one webhook as its target, and a clock."""

    def __init__(self, folder: Path, port: int) -> None:
        self.now = 1000
        self.folder = folder
        (folder / "secret").write_bytes(KEY + b"\n")
        self.store = Store(database.sqlite(folder), fleet=database.FLEET)
        self.targets = Targets([self.config(port), self.config(port, name="quiet", events=("closed",))])
        self.book = Casebook(self.store, clock_ms=lambda: self.now, targets=self.targets.of)

    def config(self, port: int, name: str = "ops", events: tuple[str, ...] = ()) -> NotifyConfig:
        url = f"http://127.0.0.1:{port}/hook"
        return NotifyConfig(name=name, kind="webhook", url=url, secret_file=self.folder / "secret", events=events)

    def notifier(self, **changes: Any) -> Notifier:
        parts: dict[str, Any] = {"deliver": _nobody, "sensors": dict, **changes}
        return Notifier(self.store, parts.pop("targets", self.targets), clock_ms=lambda: self.now, **parts)

    @property
    def waiting(self) -> int:
        with self.store.read() as db:
            return len(db.execute(select(tables.outbox.c.id)).all())


def _nobody(_messages: Any) -> None:
    raise LinkError("broker", got="none in this test")


def _greet(server: socket.socket) -> None:
    connection, _ = server.accept()
    with connection:
        connection.sendall(b"SSH-2.0-test\r\n")
        connection.recv(65536)


@pytest.fixture
def hook() -> Iterator[Webhook]:
    with Webhook() as one:
        yield one


@pytest.fixture
def world(tmp_path: Path, hook: Webhook) -> Iterator[World]:
    one = World(tmp_path, hook.port)
    yield one
    one.store.close()


class TestWebhook:
    def test_an_event_is_posted_with_a_signature_over_its_body(self, world: World, hook: Webhook) -> None:
        world.book.tell("suspected", "case 1", "model signs", {"case": 1})
        world.notifier().send_due()
        (post,) = hook.posts
        assert json.loads(post.body)["kind"] == "suspected"
        expected = hmac.new(KEY, post.body, hashlib.sha256).hexdigest()
        assert post.headers["x-edgeguard-signature"] == f"sha256={expected}"
        assert post.headers["content-type"] == "application/json"
        assert world.waiting == 0

    def test_each_place_hears_of_the_kinds_that_it_asked_for(self, world: World, hook: Webhook) -> None:
        world.book.tell("suspected", "case 1", "x")
        world.book.tell("closed", "case 1", "x")
        world.notifier().send_due()
        assert sorted(json.loads(post.body)["kind"] for post in hook.posts) == ["closed", "closed", "suspected"]

    @pytest.mark.parametrize("status", [500, 404, 301, 307])
    def test_what_is_not_taken_is_tried_again_later_and_ever_later(
        self, world: World, hook: Webhook, status: int
    ) -> None:
        hook.status, hook.location = status, "/elsewhere"
        world.book.tell("suspected", "case 1", "x")
        notifier = world.notifier()
        tried = []
        for _ in range(40):
            notifier.send_due()
            tried.append(len(hook.posts))
            world.now += 15_000
        gaps = [tried.index(n + 1) - tried.index(n) for n in range(1, tried[-1])]
        assert len(gaps) >= 3
        assert gaps == sorted(gaps)
        assert gaps[-1] > gaps[0]
        assert {post.path for post in hook.posts} == {"/hook"}
        hook.status = 200
        world.now += HOUR_MS
        notifier.send_due()
        assert world.waiting == 0

    def test_after_three_days_it_is_given_up(self, world: World, hook: Webhook) -> None:
        hook.status = 500
        world.book.tell("suspected", "case 1", "x")
        for _ in range(80):
            world.notifier().send_due()
            world.now += HOUR_MS
        assert world.waiting == 0

    def test_a_restart_loses_none_and_a_server_that_comes_back_gets_all(self, world: World, hook: Webhook) -> None:
        port = hook.port
        hook.__exit__()
        for number in range(5):
            world.book.tell("suspected", f"case {number}", "x")
        world.notifier().send_due()
        assert world.waiting == 5
        world.now += HOUR_MS
        with Webhook(port=port) as again:
            world.notifier().send_due()
            assert [json.loads(post.body)["subject"] for post in again.posts] == [f"case {i}" for i in range(5)]
        assert world.waiting == 0
        hook.__enter__()

    def test_of_two_hubs_one_makes_an_attempt(self, world: World, hook: Webhook) -> None:
        for number in range(10):
            world.book.tell("suspected", f"case {number}", "x")
        threads = [threading.Thread(target=world.notifier().send_due) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(hook.posts) == 10

    def test_a_server_that_never_answers_keeps_nobody_but_the_thread(
        self, world: World, hook: Webhook, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(notify, "IDLE_S", 0.05)
        hook.pause = threading.Event()
        notifier = world.notifier()
        notifier.start()
        world.book.tell("suspected", "case 1", "x")
        wait_until(lambda: hook.posts)
        began = time.monotonic()
        world.book.tell("suspected", "case 2", "y")
        assert time.monotonic() - began < 2.0
        hook.pause.set()
        wait_until(lambda: world.waiting == 0)
        notifier.stop()

    def test_one_place_that_does_not_answer_keeps_no_other_waiting(self, world: World, hook: Webhook) -> None:
        dead = world.config(free_port(), name="dead")
        targets = Targets([dead, world.config(hook.port)])
        book = Casebook(world.store, clock_ms=lambda: world.now, targets=targets.of)
        for number in range(50):
            book.tell("suspected", f"case {number}", "x")
        for _ in range(4):
            world.notifier(targets=targets).send_due()
        assert len(hook.posts) == world.waiting == 50

    def test_what_is_for_a_place_of_another_hub_is_left_to_it_and_given_up_in_the_end(
        self, world: World, hook: Webhook
    ) -> None:
        world.book.tell("suspected", "case 1", "x")
        other = world.notifier(targets=Targets([]))
        other.send_due()
        assert (hook.posts, world.waiting) == ([], 1)
        world.now += 4 * 24 * HOUR_MS
        other.send_due()
        assert (hook.posts, world.waiting) == ([], 0)

    def test_a_place_that_speaks_another_protocol_is_tried_again_like_any_other(self, world: World) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            targets = Targets([world.config(server.getsockname()[1], name="shell")])
            Casebook(world.store, clock_ms=lambda: world.now, targets=targets.of).tell("suspected", "case 1", "x")
            answering = threading.Thread(target=_greet, args=(server,))
            answering.start()
            world.notifier(targets=targets).send_due()
            answering.join()
        assert world.waiting == 1

    @pytest.mark.parametrize(("content", "word"), [(b"short\n", "5 bytes"), (None, "No such file")])
    def test_a_key_that_is_missing_or_short_is_told_at_the_start(
        self, tmp_path: Path, content: bytes | None, word: str
    ) -> None:
        path = tmp_path / "key"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=word):
            Targets([NotifyConfig(name="ops", kind="webhook", url="http://x/", secret_file=path)])


@pytest.mark.parametrize(
    ("sections", "word"),
    [
        ([{"name": "ops", "kind": "webhook", "secret_file": "key"}], "without url"),
        ([{"name": "ops", "kind": "webhook", "url": "https://x"}], "without secret_file"),
        ([{"name": "ops", "kind": "webhook", "url": "file:///etc/passwd", "secret_file": "key"}], "url"),
        ([{"name": "ops", "kind": "mqtt"}, {"name": "ops", "kind": "homeassistant"}], "two [[notify]]"),
        ([{"name": "ops", "kind": "pigeon"}], "kind"),
    ],
)
def test_a_section_that_cannot_work_is_refused(tmp_path: Path, sections: list[dict[str, Any]], word: str) -> None:
    raw = {"fleet": "test", "state_dir": "s", "broker": {"host": "h"}, "notify": sections}
    with pytest.raises(ConfigError) as refused:
        config.parse(raw, base=tmp_path)
    assert word in str(refused.value)


class TestBroker:
    @pytest.fixture
    def heard(self, mosquitto: Mosquitto) -> Iterator[list[tuple[str, bytes, bool]]]:
        messages: list[tuple[str, bytes, bool]] = []
        subscribed = threading.Event()
        client = mqtt.Client(CallbackAPIVersion.VERSION2, client_id="listener")

        def on_connect(*_: Any) -> None:
            client.subscribe("#", qos=1)

        client.on_connect = on_connect
        client.on_subscribe = lambda *_: subscribed.set()
        client.on_message = lambda _c, _u, m: messages.append((m.topic, bytes(m.payload), m.retain))
        client.connect("127.0.0.1", mosquitto.port)
        client.loop_start()
        assert subscribed.wait(10)
        yield messages
        client.disconnect()
        client.loop_stop()

    def test_a_notice_goes_to_the_hubs_own_topic(
        self, world: World, mosquitto: Mosquitto, heard: list[tuple[str, bytes, bool]]
    ) -> None:
        targets = Targets([NotifyConfig(name="house", kind="mqtt")])
        book = Casebook(world.store, clock_ms=lambda: world.now, targets=targets.of)
        book.tell("confirmed", "case 1", "a backdoor")
        broker = BrokerConfig(host="127.0.0.1", port=mosquitto.port)
        world.notifier(targets=targets, deliver=lambda m: notify.deliver(broker, "hub-notify", m)).send_due()
        wait_until(lambda: heard)
        ((name, payload, _),) = heard
        assert name == "edgeguard/v1/test/_hub/notice"
        assert json.loads(payload)["text"] == "a backdoor"
        assert world.waiting == 0

    def test_without_a_broker_it_stays_in_the_outbox(self, world: World) -> None:
        targets = Targets([NotifyConfig(name="house", kind="mqtt")])
        Casebook(world.store, clock_ms=lambda: world.now, targets=targets.of).tell("confirmed", "case 1", "x")
        broker = BrokerConfig(host="127.0.0.1", port=free_port())
        world.notifier(targets=targets, deliver=lambda m: notify.deliver(broker, "hub-notify", m)).send_due()
        assert world.waiting == 1

    def test_no_device_can_have_the_hubs_topic(self) -> None:
        with pytest.raises(LinkError):
            topics.parse(notify.topic("test", "notice"))

    def test_sensors_stand_retained_and_are_published_again_when_they_change(
        self, world: World, mosquitto: Mosquitto, heard: list[tuple[str, bytes, bool]]
    ) -> None:
        broker = BrokerConfig(host="127.0.0.1", port=mosquitto.port)
        shown = {"homeassistant/x/config": b"{}", "state": b"OFF"}
        notifier = world.notifier(deliver=lambda m: notify.deliver(broker, "hub-notify", m), sensors=lambda: shown)
        notifier.show_sensors()
        notifier.show_sensors()
        shown["state"] = b"ON"
        notifier.show_sensors()
        wait_until(lambda: len(heard) >= 3)
        assert [payload for _, payload, _ in heard] == [b"{}", b"OFF", b"ON"]
        world.now += 61_000
        notifier.show_sensors()
        wait_until(lambda: len(heard) == 5)


class TestHomeAssistant:
    def record(self, **changes: Any) -> cases.Case:
        suspicion = Suspicion(
            model_digest=fleet.MODEL, label=1, devices=("a",), flagged=5, inputs=9, p_value=0.1, excess=1.0, channels=()
        )  # fmt: skip
        case = cases.open_case(suspicion, model="signs", label_name="stop", at_ms=1)
        return msgspec.structs.replace(case, **changes)

    def states(self, records: list[cases.Case]) -> dict[str, str]:
        """By name, as Home Assistant would find them."""
        shown = notify.sensors("test", ["signs"], records, prefix="ha")
        configs = [json.loads(payload) for name, payload in shown.items() if name.startswith("ha/binary_sensor/")]
        return {content["name"]: shown[content["state_topic"]].decode() for content in configs}

    @pytest.mark.parametrize(
        ("changes", "suspected", "confirmed"),
        [(None, "OFF", "OFF"), ({}, "ON", "OFF"), ({"state": "repairing", "is_case": True}, "ON", "ON"),
         ({"state": "dismissed"}, "OFF", "OFF"), ({"state": "closed", "is_case": True}, "OFF", "OFF"),
         ({"model": "other"}, "OFF", "OFF")],
    )  # fmt: skip
    def test_a_model_shows_whether_a_backdoor_is_suspected_and_confirmed(
        self, changes: dict[str, Any] | None, suspected: str, confirmed: str
    ) -> None:
        assert self.states([] if changes is None else [self.record(**changes)]) == {
            "Hub": "ON",
            "signs: backdoor suspected": suspected,
            "signs: backdoor confirmed": confirmed,
        }

    def test_topics_and_ids_keep_to_what_home_assistant_takes(self) -> None:
        shown = notify.sensors("test", ["signs.v2"], [], prefix="ha")
        configs = {name: json.loads(payload) for name, payload in shown.items() if name.endswith("/config")}
        for name, content in configs.items():
            _, component, unique, last = name.split("/")
            assert (component, last, content["unique_id"]) == ("binary_sensor", "config", unique)
            assert unique.replace("_", "").isalnum()
        assert len({content["unique_id"] for content in configs.values()}) == 3

    def test_a_hub_that_falls_silent_is_shown_as_away(self) -> None:
        shown = notify.sensors("test", [], [], prefix="ha")
        (content,) = [json.loads(payload) for name, payload in shown.items() if name.endswith("/config")]
        assert content["device_class"] == "connectivity"
        assert content["expire_after"] > notify.SENSORS_EVERY_S
