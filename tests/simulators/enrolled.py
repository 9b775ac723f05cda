"""A fleet as its operator sets it up: a broker started with exactly the written files, and clients with theirs."""

from __future__ import annotations

import os
import pwd
import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, cast

import paho.mqtt.client as mqtt

from edgeguard import broker as brokers
from edgeguard.agent import config as agent_config
from edgeguard.contract import topics
from edgeguard.hub import config as hub_config
from edgeguard.hub.setup import enrolment
from edgeguard.settings import BrokerConfig, password
from tests.simulators.fleet import wait_until
from tests.simulators.mosquitto import Mosquitto, free_port, wait_for_port

FLEET = "gate"
HOST = "127.0.0.1"


def now() -> datetime:
    """The time."""
    return datetime.now(timezone.utc)


class Peer:
    """One MQTT connection. It stays as it ended: it is never made anew."""

    def __init__(
        self,
        broker: BrokerConfig,
        *,
        client_id: str = "",
        subscribe: tuple[str, ...] = (),
        will: tuple[str, bytes] | None = None,
    ) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.ended = threading.Event()
        self.reason = ""
        self._ready = threading.Event()
        self._client = brokers.client(broker, client_id, password(broker), clean_session=True)
        if will is not None:
            self._client.will_set(*will, qos=1)
        self._subscribe = [(topic, 1) for topic in subscribe]
        self._client.on_connect = self._connected
        self._client.on_subscribe = lambda *_: self._ready.set()
        self._client.on_message = lambda _c, _u, message: self.got.append((message.topic, bytes(message.payload)))
        self._client.on_disconnect = self._disconnected
        try:
            brokers.connect(self._client, broker, clean_session=True)
        except OSError as error:
            self._end(str(error))
            return
        self._client.loop_start()
        wait_until(lambda: self._ready.is_set() or self.ended.is_set(), timeout_s=10)

    @property
    def connected(self) -> bool:
        """Whether the broker took it, and has not ended the connection since."""
        return self._ready.is_set() and not self.ended.is_set()

    def publish(self, topic: str, payload: bytes = b"x") -> None:
        """Publish and wait until the broker has taken it, which says nothing of whether it delivers it."""
        info = self._client.publish(topic, payload, qos=1)
        with suppress(RuntimeError):
            info.wait_for_publish(5)

    def wait_for(self, payload: bytes) -> None:
        """Return once a message with this payload has come."""
        wait_until(lambda: any(content == payload for _, content in self.got), timeout_s=10)

    def break_off(self) -> None:
        """End the connection as a power cut does: the will is the broker's to send."""
        opened = self._client.socket()
        cast(socket.socket, opened).shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()

    def _connected(self, client: mqtt.Client, _userdata: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        if reason.is_failure:
            self._end(str(reason))
        elif self._subscribe:
            client.subscribe(self._subscribe)
        else:
            self._ready.set()

    def _disconnected(self, _c: mqtt.Client, _u: Any, _flags: Any, reason: Any, _properties: Any) -> None:
        self._end(str(reason))

    def _end(self, reason: str) -> None:
        self.reason = self.reason or reason
        self.ended.set()


class Fleet:
    """A set-up, its broker, and clients that connect by the written files."""

    def __init__(self, folder: Path, *, passwords: bool) -> None:
        self.folder = folder
        self.passwords = passwords
        self.port, self.hub_port = free_port(), free_port()
        self.broker = Mosquitto(folder.parent / "log", config=folder / "mosquitto.conf", port=self.port)
        self._peers: list[Peer] = []
        enrolment.create(
            folder,
            fleet=FLEET,
            hosts=[HOST],
            now=now(),
            port=self.port,
            hub_port=self.hub_port,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            passwords=passwords,
        )

    def start(self) -> None:
        """Start the broker."""
        self.broker.start()
        wait_for_port(self.hub_port)

    def end(self) -> None:
        """Close the connections that a test made, and stop the broker."""
        self.close_peers()
        self.broker.stop()

    def close_peers(self) -> None:
        """Close the connections that a test made."""
        while self._peers:
            self._peers.pop().close()

    def enroll(self, device: str, **options: Any) -> enrolment.Change:
        """Enrol a device."""
        return enrolment.enroll(self.folder, device, now=now(), **options)

    def reload(self, holds: Callable[[], object]) -> None:
        """Let the broker read its files again; returns once what shall hold then does."""
        self.broker.signal(signal.SIGHUP)
        wait_until(holds, timeout_s=10)

    def agent(self, device: str) -> BrokerConfig:
        """How a device connects, by its own agent.toml."""
        return agent_config.load(self.folder / "devices" / device / "agent.toml").broker

    @property
    def hub_config(self) -> hub_config.HubConfig:
        """The written hub.toml."""
        return hub_config.load(self.folder / "hub.toml")

    def device(self, device: str, **options: Any) -> Peer:
        """Connect as a device."""
        return self.peer(self.agent(device), **options)

    def hub(self, number: int = 1, *, subscribe: tuple[str, ...] = (f"{topics.PREFIX}/{FLEET}/#",)) -> Peer:
        """Connect as one of the hub's workers."""
        config = self.hub_config
        return self.peer(config.broker, client_id=f"{config.client_id}-{number}", subscribe=subscribe)

    def peer(self, broker: BrokerConfig, **options: Any) -> Peer:
        """Connect somehow."""
        made = Peer(broker, **options)
        self._peers.append(made)
        return made

    def can_connect(self, broker: BrokerConfig) -> bool:
        """Whether the broker takes somebody now."""
        peer = Peer(broker)
        taken = peer.connected
        peer.close()
        return taken


def topic(device: str, channel: str) -> str:
    """A topic of this fleet, also where the device's id is none."""
    return f"{topics.PREFIX}/{FLEET}/{device}/{channel}"
