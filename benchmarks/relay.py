"""A port that passes everything on, later if asked, and counts it: what a line costs, and what it shows a listener."""

from __future__ import annotations

import queue
import socket
import threading
import time
from contextlib import suppress
from dataclasses import dataclass


@dataclass
class Flow:
    """One direction of one connection, written by one thread: whose bytes, and how many."""

    sender: int
    sent: int = 0


class Relay:
    """One on a free port of this machine, from its making on.

    Args:
        target: port of this machine to pass on to.
        caller: who connects.
        called: who answers there.
        delay_s: of everything, in each direction.
    """

    def __init__(self, target: int, caller: int, called: int, delay_s: float = 0.0) -> None:
        self.flows: list[Flow] = []
        self._target, self.ends, self._delay_s = target, (caller, called), delay_s
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._server.close()

    def sent_by(self, party: int) -> int:
        """Bytes so far."""
        return sum(flow.sent for flow in self.flows if flow.sender == party)

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._server.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self._target))
                except OSError:
                    near.close()
                    continue
                for source, sink, sender in ((near, far, self.ends[0]), (far, near, self.ends[1])):
                    source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                    waiting: queue.Queue[tuple[float, bytes]] = queue.Queue()
                    flow = Flow(sender)
                    self.flows.append(flow)
                    threading.Thread(target=self._read, args=(source, waiting, flow), daemon=True).start()
                    threading.Thread(target=self._write, args=(sink, waiting), daemon=True).start()

    def _read(self, source: socket.socket, waiting: queue.Queue[tuple[float, bytes]], flow: Flow) -> None:
        data = b" "
        while data:
            try:
                data = source.recv(1 << 18)
            except OSError:
                data = b""
            flow.sent += len(data)
            waiting.put((time.monotonic() + self._delay_s, data))

    def _write(self, sink: socket.socket, waiting: queue.Queue[tuple[float, bytes]]) -> None:
        with suppress(OSError):
            while True:
                due, data = waiting.get()
                time.sleep(max(0.0, due - time.monotonic()))
                if not data:
                    sink.shutdown(socket.SHUT_WR)
                    return
                sink.sendall(data)


def between(ports: list[int], delay_s: float = 0.0) -> tuple[list[Relay], list[tuple[str, ...]]]:
    """A relay for each pair of parties, and the addresses at which each party reaches all: its own, and relays."""
    relays, hosts = [], []
    for one in range(len(ports)):
        at = []
        for other, port in enumerate(ports):
            if other != one:
                relays.append(Relay(port, one, other, delay_s))
            at.append(f"127.0.0.1:{port if other == one else relays[-1].port}")
        hosts.append(tuple(at))
    return relays, hosts
