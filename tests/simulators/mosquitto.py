"""A real mosquitto on a free loopback port in a temporary folder, which a test can kill and bring back."""

from __future__ import annotations

import os
import secrets
import socket
import subprocess
import time
from pathlib import Path

import pytest

from tests.simulators import needs

_FIRST_PORT, _PORTS = 12_000, 4_000
"""Below what systems hand out to clients, so that no connection takes a port between here and the server's bind."""
_handed_out: set[int] = set()


def free_port() -> int:
    """A loopback port that nothing listens on, and that no other process of the test run is given."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 5
    while True:
        port = _FIRST_PORT + worker * _PORTS + secrets.randbelow(_PORTS)
        if port in _handed_out:
            continue
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        _handed_out.add(port)
        return port


def wait_for_port(port: int, *, timeout_s: float = 60.0) -> None:
    """Return once something accepts connections on a loopback port; fail the test after ``timeout_s``."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            if time.monotonic() > deadline:
                pytest.fail(f"nothing listens on port {port} after {timeout_s} s")
            time.sleep(0.02)


class Mosquitto:
    """One broker: ``start``, ``kill`` (SIGKILL, as a power cut) and ``stop``; its port stays the same.

    ``more``: further lines of its configuration. ``config`` and ``port``: a file that is there already, and the port
    that it names.
    """

    def __init__(self, folder: Path, *, more: str = "", config: Path | None = None, port: int | None = None) -> None:
        self.host = "127.0.0.1"
        self.port = port or free_port()
        self._config = config
        self._folder = folder
        self._more = more
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the broker and wait until it listens. Its queues are kept on disk in the temporary folder."""
        self._folder.mkdir(parents=True, exist_ok=True)
        config = self._config or self._folder / "mosquitto.conf"
        if self._config is None:
            config.write_text(
                f"listener {self.port} 127.0.0.1\n"
                "allow_anonymous true\n"
                "persistence true\n"
                f"persistence_location {self._folder}/\n"
                "max_queued_messages 100000\n"
                f"log_dest file {self._folder}/mosquitto.log\n"
                + (f"user {os.environ.get('USER', 'root')}\n" if os.geteuid() == 0 else "")
                + self._more
            )
        self._process = subprocess.Popen(
            [needs.program("mosquitto", "mosquitto"), "-c", str(config)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        wait_for_port(self.port)

    def signal(self, number: int) -> None:
        """Send a signal: SIGSTOP makes a broker that hangs."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: nothing is flushed."""
        self._end("kill")

    def stop(self) -> None:
        """SIGTERM, then wait."""
        self._end("terminate")

    def _end(self, how: str) -> None:
        if self._process is not None:
            getattr(self._process, how)()
            self._process.wait(timeout=15)
            self._process = None
