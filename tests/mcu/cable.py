"""A serial cable between a gateway and a microcontroller: two terminals and a thread that carries bytes over.

The gateway's end has a name as udev gives one. A cable can be pulled and plugged in again, and damage what it carries.
"""

from __future__ import annotations

import os
import random
import select
import threading
import tty
from contextlib import suppress
from pathlib import Path


class Cable:
    """One cable.

    Args:
        name: path of the gateway's end, a link as ``/dev/serial/by-id`` holds them.
        damage: share of the bytes that are flipped, lost or doubled on their way, a third each.
    """

    def __init__(self, name: Path, *, damage: float = 0.0) -> None:
        self.name = name
        self.damage = damage
        self._rng = random.Random(1)
        self._board, self._board_end = os.openpty()
        tty.setraw(self._board_end)
        self.board = os.ttyname(self._board_end)
        """Path of the microcontroller's end."""
        self._gateway, self._gateway_end = -1, -1
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self.plug_in()
        self._thread = threading.Thread(target=self._carry, daemon=True)
        self._thread.start()

    def plug_in(self) -> None:
        """The gateway's end is there, under a device name of its own and the name that stays."""
        with self._lock:
            self._gateway, self._gateway_end = os.openpty()
            tty.setraw(self._gateway_end)
            self.name.parent.mkdir(parents=True, exist_ok=True)
            self.name.symlink_to(os.ttyname(self._gateway_end))

    def pull(self) -> None:
        """The gateway's end is gone, with its name."""
        with self._lock:
            self.name.unlink()
            os.close(self._gateway)
            os.close(self._gateway_end)
            self._gateway = self._gateway_end = -1

    def write(self, content: bytes) -> None:
        """Let the gateway read this, whoever says it."""
        with self._lock:
            os.write(self._gateway, content)

    def close(self) -> None:
        """Take it away."""
        self._stopping.set()
        self._thread.join()
        if self._gateway >= 0:
            self.pull()
        os.close(self._board)
        os.close(self._board_end)

    def _carry(self) -> None:
        while not self._stopping.is_set():
            with self._lock:
                ends = [end for end in (self._gateway, self._board) if end >= 0]
            ready, _, _ = select.select(ends, [], [], 0.02)
            with self._lock:
                for end in ready:
                    if end in (self._gateway, self._board):
                        other = self._board if end == self._gateway else self._gateway
                        with suppress(OSError):
                            content = self._spoilt(os.read(end, 4096))
                            if other >= 0 and content:
                                os.write(other, content)

    def _spoilt(self, content: bytes) -> bytes:
        if not self.damage:
            return content
        out = bytearray()
        for byte in content:
            fate = self._rng.random() / self.damage * 3
            if fate < 1:
                out.append(byte ^ (1 << self._rng.randrange(8)))
            elif 2 <= fate < 3:
                out += bytes((byte, byte))
            elif fate >= 3:
                out.append(byte)
        return bytes(out)
