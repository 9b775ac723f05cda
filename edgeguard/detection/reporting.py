"""Tells the agent on this machine what a program's own interpreter scored, and never makes the program wait.

Rules enforced here:

* nothing blocks: what the socket does not take at once waits, ``WAITING`` reports at most; what comes beyond that is
  dropped and counted;
* connecting is tried at most every ``RETRY_S`` seconds, and until it succeeded once no report is even made: a program
  on a machine without an agent pays for a look at the clock;
* a report arrives whole or not at all: one that a lost connection cut short is sent again from its start;
* a forked child leaves its parent's connection and reports alone and opens a connection of its own: two that write to
  one stream would cut up each other's frames;
* no threads, and no error reaches the program.
"""

from __future__ import annotations

import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable
from itertools import islice

from edgeguard.errors import LinkError

ENVIRONMENT = "EDGEGUARD_SOCKET"
DEFAULT_PATH = "/run/edgeguard/agent.sock"

WAITING = 256
RETRY_S = 5.0
_AT_ONCE = 32
"""Reports in one system call. All that wait would cost much to gather only to hear that the socket is full."""


def socket_path() -> str:
    """Where the agent listens: what ``EDGEGUARD_SOCKET`` says, else the usual place."""
    return os.environ.get(ENVIRONMENT) or DEFAULT_PATH


class Reporter:
    """One connection to the agent, made when there is something to say. Not for use from several threads at once.

    Args:
        path: of the agent's Unix stream socket.
        clock: seconds; it never goes back.
    """

    def __init__(self, path: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._socket: socket.socket | None = None
        self._begin()

    def __del__(self) -> None:
        """Close the connection; what waits is lost."""
        self._close()

    def attached(self) -> bool:
        """Whether an agent listens here, or has: only then is a report worth making. Connects when it is time to."""
        if os.getpid() != self._pid:
            self._close()
            self._begin()
        if self._socket is None and self._clock() >= self._next_try:
            self._connect()
        return self._attached

    def offer(self, count: int, make: Callable[[int], bytes]) -> None:
        """Send reports, keep those that the socket does not take, and drop those that there is no room for.

        Args:
            count: how many there are.
            make: the frame of one of them, by its number from 0. It is called only where there is room for it, and one
                that it refuses to make (LinkError) is dropped.
        """
        for number in range(count):
            if len(self._waiting) == WAITING:
                self._send()
            if len(self._waiting) == WAITING:
                self.dropped += count - number
                return
            try:
                self._waiting.append(make(number))
            except LinkError:
                self.dropped += 1
        self._send()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._attached = False
        self._next_try: float = -math.inf
        self._waiting: deque[bytes] = deque()
        self._taken = 0  # bytes of the first report that waits which the socket has
        self.dropped = 0

    def _connect(self) -> None:
        self._next_try = self._clock() + RETRY_S
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except OSError:
            return
        try:
            connection.connect(self._path)
        except OSError:  # nobody there, or too many before us: a Unix socket never lets a connection hang
            connection.close()
            return
        self._socket, self._attached = connection, True

    def _close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self) -> None:
        while self._waiting and self._socket is not None:
            first = memoryview(self._waiting[0])[self._taken :]
            try:
                sent = self._socket.sendmsg((first, *islice(self._waiting, 1, _AT_ONCE)), (), socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except OSError:
                self._close()
                self._taken = 0
                return
            self._taken += sent
            while self._waiting and self._taken >= len(self._waiting[0]):
                self._taken -= len(self._waiting.popleft())
