"""Microcontrollers on serial ports: a thread for each keeps it open and lets :class:`edgeguard.agent.mcu.Peer` talk.

Rules enforced here:

* a port that is not there, or goes, is opened again after ``RETRY_S``, under the name that the configuration gives it:
  udev's names under ``/dev/serial/by-id`` stay with a board whatever it is plugged into;
* bytes from a line are hostile: whatever they are costs that line at most;
* a port that takes no bytes loses them: what matters is sent again.

The agent's loop finds no inputs here: a microcontroller runs its model itself. What it says goes to the reporter.
pyserial is imported when a port is configured, not before: ``pip install 'edgeguard[serial]'``.
"""

from __future__ import annotations

import logging
import os
import queue
import select
import selectors
import socket
import termios
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from edgeguard.agent import mcu
from edgeguard.agent.config import SerialConfig
from edgeguard.agent.mcu import Offer, Peer
from edgeguard.agent.sources.base import Answer
from edgeguard.errors import ConfigError
from firmware_bridge.link.messages import Order

NAME = "serial"
RETRY_S = 1.0
TICK_S = 0.1
WAITING = 1024
"""Events that may wait for the reporter; while that many do, the lines are not read."""
_PIECE = 4096

log = logging.getLogger(__name__)


class Port:
    """One port and its thread. Every method may be called from any thread.

    Args:
        config: its section.
        opened: opens the port; what it returns has pyserial's ``fileno`` and ``close``.
    """

    def __init__(self, config: SerialConfig, opened: Callable[[SerialConfig], Any]) -> None:
        self.name = config.name
        self._config = config
        self._opened = opened
        self._peer = Peer(lambda: time.time_ns() // 1_000_000)
        self._orders: queue.SimpleQueue[Callable[[Peer], None]] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[mcu.Event] = queue.SimpleQueue()
        self._woken, self._waking = socket.socketpair()
        for end in (self._woken, self._waking):
            end.setblocking(False)
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"serial {config.name}", daemon=True)
        self._complaint = "not open yet"

    def start(self) -> None:
        """Open the port and talk, from now on."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, and close the port."""
        self._stopping.set()
        if self._thread.ident is not None:
            self._wake()
            self._thread.join()
        self._woken.close()
        self._waking.close()

    def events(self) -> list[mcu.Event]:
        """What happened since the last call."""
        return [self._events.get_nowait() for _ in range(self._events.qsize())]

    def keep(self, ticket: int) -> None:
        """See :meth:`edgeguard.agent.mcu.Peer.keep`."""
        self._order(lambda peer: peer.keep(ticket))

    def ask(self, transaction: int, order: Order) -> None:
        """See :meth:`edgeguard.agent.mcu.Peer.ask`."""
        self._order(lambda peer: peer.ask(transaction, order))

    def offer(self, offer: Offer) -> None:
        """See :meth:`edgeguard.agent.mcu.Peer.offer`."""
        self._order(lambda peer: peer.offer(offer))

    def withdraw(self) -> None:
        """See :meth:`edgeguard.agent.mcu.Peer.withdraw`."""
        self._order(lambda peer: peer.withdraw())

    def _order(self, order: Callable[[Peer], None]) -> None:
        if not self._stopping.is_set():
            self._orders.put(order)
            self._wake()

    def _wake(self) -> None:
        with suppress(OSError):  # full: it is awake; closed: it is over
            self._waking.send(b"\0")

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                line = self._opened(self._config)
                try:
                    self._complain("")
                    self._talk(line.fileno())
                finally:
                    line.close()
            except (OSError, ValueError, termios.error) as error:
                self._complain(str(error))
            deadline = time.monotonic() + RETRY_S
            while not self._stopping.is_set() and time.monotonic() < deadline:
                select.select([self._woken], [], [], TICK_S)
                self._turn(b"")
                self._peer.output()  # nobody is there to read it

    def _talk(self, descriptor: int) -> None:
        while not self._stopping.is_set():
            full = self._events.qsize() >= WAITING
            woken = self._woken.fileno()
            readable, _, _ = select.select([woken] if full else [woken, descriptor], [], [], TICK_S)
            piece = b""
            if descriptor in readable:
                piece = os.read(descriptor, _PIECE)
                if not piece:
                    raise OSError("the line ended")
            self._turn(piece)
            out = self._peer.output()
            with suppress(BlockingIOError):  # what the port does not take is lost, as on the line itself
                os.write(descriptor, out)

    def _turn(self, piece: bytes) -> None:
        with suppress(BlockingIOError):
            self._woken.recv(4096)
        for _ in range(self._orders.qsize()):
            self._orders.get_nowait()(self._peer)
        now = time.monotonic()
        damaged = self._peer.damaged
        events = self._peer.feed(piece, now) + self._peer.tick(now)
        for event in events:
            self._events.put(event)
        found = self._peer.damaged
        if damaged.bit_length() != found.bit_length():  # told at the first, second, fourth, eighth ...
            log.warning("%s: %d damaged or unknown frames so far", self._config.name, found)

    def _complain(self, complaint: str) -> None:
        if complaint != self._complaint:
            self._complaint = complaint
            if complaint:
                log.warning("%s: port %s: %s; trying again", self.name, self._config.port, complaint)
            else:
                log.info("%s: port %s is open", self.name, self._config.port)


class SerialSource:
    """All ports.

    Args:
        configs: a section for each.

    Raises:
        ConfigError: pyserial is not installed.
    """

    name = NAME
    ended = False
    dropped = 0

    def __init__(self, configs: Sequence[SerialConfig]) -> None:
        opened = _opener()
        self.ports = tuple(Port(config, opened) for config in configs)

    def open(self, selector: selectors.BaseSelector) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        for port in self.ports:
            port.start()

    def ready(self, key: selectors.SelectorKey, mask: int) -> None:
        """Nothing is selected on."""

    def take(self) -> None:
        """No inputs come from here."""

    def answer(self, answer: Answer) -> None:
        """Nobody asked."""

    def counted(self, names: Iterable[str]) -> None:
        """Nothing to let go of."""

    def close(self) -> None:
        """See :class:`edgeguard.agent.sources.base.Source`."""
        for port in self.ports:
            port.stop()


def _opener() -> Callable[[SerialConfig], Any]:
    try:
        import serial
    except ImportError as error:
        raise ConfigError(
            "[[sources.serial]]", got="no pyserial", expected="serial", do="pip install 'edgeguard[serial]'"
        ) from error

    def opened(config: SerialConfig) -> Any:
        # It sets the line up; the descriptor is read and written here, without waiting.
        return serial.Serial(str(config.port), config.baud, exclusive=True)

    return opened
