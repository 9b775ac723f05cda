"""Stands where the agent listens: a real Unix socket that takes frames, as slowly as a test wants."""

from __future__ import annotations

import os
import select
import socket
import tempfile
from pathlib import Path

from edgeguard.contract import frames


class Listener:
    """One socket at a time, at a path that stays. What arrived on each connection is kept apart."""

    def __init__(self) -> None:
        # The path of a Unix socket may have 107 bytes: pytest's folders are too deep.
        self._folder = tempfile.TemporaryDirectory(prefix="edgeguard-")
        self.path = str(Path(self._folder.name) / "agent.sock")
        self._socket: socket.socket | None = None
        self._connections: list[tuple[socket.socket, frames.Reader]] = []
        self.received: list[tuple[frames.AnyFrame, bytes]] = []
        self.cut_short = 0
        self.accepted = 0

    def start(self) -> None:
        """Listen."""
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.setblocking(False)
        self._socket.bind(self.path)
        self._socket.listen()

    def stop(self) -> None:
        """End as a killed agent does: what was not read is lost."""
        self._accept()
        for connection, reader in self._connections:
            connection.close()
            self.cut_short += not reader.empty
        self._connections = []
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            Path(self.path).unlink()

    def close(self) -> None:
        """Stop for good."""
        self.stop()
        self._folder.cleanup()

    def read(self, at_most: int = 1 << 30) -> list[tuple[frames.AnyFrame, bytes]]:
        """Take at most so many bytes of what waits on each connection; the frames that they complete."""
        self._accept()
        found: list[tuple[frames.AnyFrame, bytes]] = []
        for connection, reader in self._connections:
            left = at_most
            while left and select.select([connection], [], [], 0)[0]:
                piece = connection.recv(min(left, 65536))
                if not piece:
                    break
                found += reader.feed(piece)
                left -= len(piece)
        self.received += found
        return found

    def _accept(self) -> None:
        while self._socket is not None:
            try:
                connection, _ = self._socket.accept()
            except BlockingIOError:
                return
            self.accepted += 1
            self._connections.append((connection, frames.Reader()))


def descriptors() -> int:
    """How many files and sockets this process holds open."""
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
