"""Device and hub over one broker, each in either version of MQTT."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import pytest

from edgeguard.agent.link import Connected, Hint, Link
from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Desired
from edgeguard.hub.ingest import ModelShape
from edgeguard.hub.listener import Listener
from edgeguard.hub.store import Store
from edgeguard.settings import BrokerConfig
from tests.simulators import fleet
from tests.simulators.mosquitto import Mosquitto
from tests.simulators.tiny_hub import wait_until

Protocol = Literal["3.1.1", "5"]
PROTOCOLS: tuple[Protocol, ...] = ("3.1.1", "5")


def listener(broker: BrokerConfig, store: Store, *, group: str | None = None) -> Listener:
    made = Listener(
        broker,
        fleet="test",
        client_id="hub",
        store=store,
        models=lambda: {fleet.MODEL: ModelShape(width=fleet.WIDTH, classes=2)},
        clock_ms=lambda: 7,
        group=group,
    )
    made.start()
    wait_until(lambda: made.connected, "the hub's connection")
    return made


class Device:
    """An agent's link, and what it brought."""

    def __init__(self, broker: BrokerConfig) -> None:
        sessions = itertools.count(1)
        self.link = Link(broker, fleet="test", device="d1", boot=fleet.BOOT, next_session=lambda: next(sessions))
        self.events: list[object] = []
        self.wait_for(lambda: Connected(session=self.link.session) in self.events, "the device's connection")

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        def look() -> bool:
            self.events += self.link.poll(0.02)
            return condition()

        wait_until(look, what)

    def acknowledged(self) -> int:
        """The number that the hub acknowledged last."""
        return max((event.through_seq for event in self.events if isinstance(event, Ack)), default=0)

    def report(self, *seqs: int) -> None:
        for seq in seqs:
            self.link.publish(topics.REPORT, fleet.report(seq))


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(f"sqlite:///{tmp_path / 'hub.db'}", fleet="test")


@pytest.fixture
def device(mosquitto: Mosquitto, request: pytest.FixtureRequest) -> Iterator[Device]:
    protocol: Protocol = getattr(request, "param", "5")
    made = Device(BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol=protocol))
    yield made
    made.link.close()


@pytest.mark.parametrize("device", PROTOCOLS, indirect=True)
@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("group", [None, "workers"])
def test_reports_and_hints_pass_between_all_versions(
    mosquitto: Mosquitto, store: Store, device: Device, protocol: Protocol, group: str | None
) -> None:
    hub = listener(BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol=protocol), store, group=group)
    device.report(*range(1, 101))
    device.wait_for(lambda: device.acknowledged() == 100, "the acknowledgement")
    assert store.counts()["reports"] == 100
    desired = Desired(target="signs-1.tflite", sequence=1)
    assert hub.publish("d1", topics.MODEL_DESIRED, desired, retain=True)
    device.wait_for(lambda: Hint(desired, fresh=True) in device.events, "the hint")
    hub.stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_broker_keeps_reports_while_the_hub_is_away_and_over_its_own_end(
    mosquitto: Mosquitto, store: Store, protocol: Protocol
) -> None:
    broker = BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol=protocol)
    listener(broker, store).stop()
    first = Device(broker)
    first.report(*range(1, 31))
    first.link.close()  # once, and never again: only the broker can bring them
    mosquitto.stop()
    mosquitto.start()
    hub = listener(broker, store)
    wait_until(lambda: store.counts()["reports"] == 30, "what waited at the broker")
    hub.stop()


def test_a_hub_that_the_broker_lets_acknowledge_nothing_says_so(
    tmp_path: Path, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR)
    rules = tmp_path / "acl"
    rules.write_text("topic read edgeguard/v1/test/#\ntopic write edgeguard/v1/test/d1/report\n")
    mosquitto = Mosquitto(tmp_path / "strict", more=f"acl_file {rules}\n")
    mosquitto.start()
    broker = BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol="5")
    hub, device = listener(broker, store), Device(broker)
    for seq in range(1, 4):
        device.report(seq)
        wait_until(lambda seq=seq: store.counts()["reports"] == seq, "the report")  # type: ignore[misc]
    device.wait_for(lambda: "refuses" in caplog.text, "the line in the log")
    told = [record.getMessage() for record in caplog.records if "refuses" in record.getMessage()]
    assert [line.partition(": ")[2] for line in told] == ["the broker refuses what the hub publishes: Not authorized"]
    assert device.acknowledged() == 0
    hub.stop()
    device.link.close()
    mosquitto.stop()
