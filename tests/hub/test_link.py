"""The process that holds the hub's connection: what passes between it and the hub, and when it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from typing import TypeVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract.messages import MAX_PAYLOAD
from edgeguard.hub.link import Arrivals, Arrived, Down, Frames, Link, Order, State, Up, framed
from edgeguard.settings import BrokerConfig
from tests.simulators.fleet import Publisher, wait_until
from tests.simulators.mosquitto import Mosquitto, free_port

T = TypeVar("T", bound=Up)

STARTER = """
import sys, time
from edgeguard.hub.link import Link, Order
from edgeguard.settings import BrokerConfig

link = Link(Order(broker=BrokerConfig(host="127.0.0.1", port=int(sys.argv[1])), client_id="hub", secret=None,
                  subscribe=(("a", 1),), unsubscribe=()))
link.start()
link.receive()
print(link._process.pid, flush=True)
time.sleep(60)
"""


def order(port: int) -> Order:
    return Order(
        broker=BrokerConfig(host="127.0.0.1", port=port), client_id="hub", secret=None,
        subscribe=(("edgeguard/v1/test/+/report", 1),), unsubscribe=(),
    )  # fmt: skip


class Ear:
    """Hears what a link tells, one thing after the other: several may come at once."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._told: deque[Up] = deque()

    def next(self, kind: type[T]) -> T:
        """The next of a kind."""
        while True:
            while not self._told:
                told = self._link.receive()
                assert told is not None
                self._told += told
            one = self._told.popleft()
            if isinstance(one, kind):
                return one


@given(st.lists(st.tuples(st.text(max_size=5), st.binary(max_size=300), st.booleans()), max_size=8), st.data())
def test_what_was_framed_comes_out_however_the_stream_is_cut(
    publish: list[tuple[str, bytes, bool]], data: st.DataObject
) -> None:
    stream = b"".join(framed(Down(number, [number], [one])) for number, one in enumerate(publish))
    frames = Frames()
    found = []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += frames.feed(stream[:cut])
        stream = stream[cut:]
    assert found == [framed(Down(number, [number], [one]))[4:] for number, one in enumerate(publish)]


def test_a_message_that_is_not_acknowledged_comes_again_on_the_next_connection_under_its_number(
    mosquitto: Mosquitto,
) -> None:
    link = Link(order(mosquitto.port))
    ear = Ear(link)
    link.start()
    try:
        first = ear.next(State)
        with Publisher(mosquitto.port, "d1") as device:
            wait_until(device.connected)
            device.send("report", b"one")
            device.send("report", b"two")
            arrived: list[Arrived] = []
            while len(arrived) < 2:
                arrived += ear.next(Arrivals).messages
        link.send(Down(first.connection - 1, [m.mid for m in arrived], []))  # of another connection: means nothing
        link.send(Down(first.connection, [arrived[0].mid], []))
        link.close()
        assert link.receive() is None
        link.end(5.0)
        link.start()
        second = ear.next(State)
        again = ear.next(Arrivals)
        assert second.connection > first.connection
        assert [m.payload for m in again.messages] == [b"two"]
    finally:
        link.close()
        link.end(5.0)


def test_of_a_message_that_is_too_large_only_as_much_is_kept_as_shows_it(mosquitto: Mosquitto) -> None:
    link = Link(order(mosquitto.port))
    ear = Ear(link)
    link.start()
    try:
        ear.next(State)
        with Publisher(mosquitto.port, "d1") as device:
            wait_until(device.connected)
            device.send("report", bytes(3 * MAX_PAYLOAD))
            arrivals = ear.next(Arrivals)
        assert len(arrivals.messages[0].payload) == MAX_PAYLOAD + 1
    finally:
        link.close()
        link.end(5.0)


@pytest.mark.parametrize("broker", ["there", "not there"])
def test_it_ends_with_the_process_that_started_it(mosquitto: Mosquitto, broker: str) -> None:
    port = mosquitto.port if broker == "there" else free_port()
    starter = subprocess.Popen([sys.executable, "-c", STARTER, str(port)], stdout=subprocess.PIPE, text=True)
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    os.kill(pid, signal.SIGTERM)  # what a service manager sends to all: the hub still needs it
    time.sleep(0.3)
    assert _runs(pid)
    starter.kill()
    starter.communicate()
    wait_until(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
