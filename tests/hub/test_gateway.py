"""Microcontrollers at the hub: they are online no longer than the gateway that speaks for them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from edgeguard.contract.messages import Status
from edgeguard.hub.ingest import Accepted
from edgeguard.hub.store import Store
from tests.simulators import fleet
from tests.simulators.fleet import accepted


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database, fleet="test")
    yield opened
    opened.close()


def gateway(state: str, session: int, device: str = "gate") -> Accepted:
    return accepted(fleet.status(state, session=session), device)


def mcu(state: str, session: int, via: int | None, device: str = "gate~pump") -> Accepted:
    return accepted(Status(state=state, session=session, boot=fleet.BOOT, via=via), device)  # type: ignore[arg-type]


ONLINE = [gateway("online", 5), mcu("online", 6, 5)]


@pytest.mark.parametrize("batches", ["together", "one by one"])
@pytest.mark.parametrize(
    ("what", "said", "state"),
    [
        ("both are there", ONLINE, "online"),
        ("the gateway's will", [*ONLINE, gateway("offline", 5)], "offline"),
        ("the gateway was stopped", [*ONLINE, gateway("stopped", 5)], "stopped"),
        ("a late will of an earlier connection", [*ONLINE, gateway("offline", 4)], "online"),
        ("its own offline, then the gateway's", [*ONLINE, mcu("offline", 6, 5), gateway("stopped", 5)], "offline"),
        ("what a broker repeats in any order", [mcu("online", 6, 5), gateway("offline", 5)], "offline"),
        ("the same, the other way round", [gateway("offline", 5), mcu("online", 6, 5)], "offline"),
        ("the gateway came back, it did not", [*ONLINE, gateway("offline", 5), gateway("online", 7)], "offline"),
        (
            "both came back",
            [*ONLINE, gateway("offline", 5), gateway("online", 7), mcu("online", 8, 7)],
            "online",
        ),
        ("it came back by a newer connection than is known", [gateway("offline", 5), mcu("online", 8, 7)], "online"),
        ("a gateway that nobody heard of", [mcu("online", 6, 5)], "online"),
    ],
)
def test_a_microcontroller_is_online_no_longer_than_its_gateway(
    store: Store, what: str, said: list[Accepted], state: str, batches: str
) -> None:
    for batch in [said] if batches == "together" else [[one] for one in said]:
        store.apply(batch, now_ms=1)
    assert {device.device: device.state for device in store.devices()}["gate~pump"] == state, what


def test_a_will_is_of_its_own_gateway_alone(store: Store) -> None:
    others = [("gate-2", None), ("gate_~pump", 5), ("gate.~pump", 5), ("gatex~pump", 5)]
    store.apply([*ONLINE, gateway("online", 5, "gate-2")], now_ms=1)
    store.apply([mcu("online", 6, via, device) for device, via in others[1:]], now_ms=1)
    store.apply([gateway("offline", 5)], now_ms=2)
    states = {device.device: device.state for device in store.devices()}
    assert states == {"gate": "offline", "gate~pump": "offline", **{device: "online" for device, _ in others}}
