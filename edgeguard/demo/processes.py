"""Child processes of the demo: started with their log in a file, watched, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from edgeguard.errors import ConfigError, LinkError

STOP_S = 30.0


def free_port() -> int:
    """A loopback TCP port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def check_listening(host: str, port: int) -> None:
    """Raise ConfigError unless something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout=5):
            return
    except OSError as error:
        raise ConfigError(
            f"broker {host}:{port}",
            got=error.strerror or str(error),
            expected="an MQTT broker that listens",
            do="start it, or leave --broker out",
        ) from error


class Processes:
    """A group of ``python -m MODULE`` children, ended together on leaving the context."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Processes:
        self._logs.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self._running.values()):
            process.terminate()
        for process in self._running.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
            process.kill()
            process.wait()

    def start(self, name: str, module: str, *arguments: str) -> None:
        """Start one child; its output goes to ``NAME.log``."""
        with self._log(name).open("ab") as log:
            self._running[name] = subprocess.Popen(
                [sys.executable, "-m", module, *arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def check(self, *, ended: Sequence[str] = ()) -> None:
        """Raise LinkError when a child that is not in ``ended`` has stopped."""
        for name, process in self._running.items():
            code = process.poll()
            if code is not None and name not in ended:
                raise LinkError(
                    f"process {name}",
                    got=f"it ended with code {code}: {self.last_line(name)}",
                    expected="it to keep running",
                    do=f"read {self._log(name)}",
                )

    def wait(self, name: str, timeout_s: float) -> None:
        """Wait for a child to end by itself, with code 0.

        Raises:
            LinkError: it does not, or fails.
        """
        try:
            code = self._running[name].wait(timeout_s)
        except subprocess.TimeoutExpired as error:
            raise LinkError(f"process {name}", got=f"still running after {timeout_s:.0f} s") from error
        if code != 0:
            raise LinkError(
                f"process {name}", got=f"exit code {code}: {self.last_line(name)}", do=f"read {self._log(name)}"
            )
        del self._running[name]

    def stop(self, name: str) -> None:
        """End a child with SIGTERM and wait until it has."""
        self._running[name].terminate()
        self.wait(name, STOP_S)

    def last_line(self, name: str) -> str:
        """The last line of a child's log."""
        lines = self._log(name).read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "no output"

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"


def wait_for_port(processes: Processes, host: str, port: int, timeout_s: float = 30.0) -> None:
    """Return once something listens on a port. Raises LinkError when a child dies or time runs out."""
    deadline = time.monotonic() + timeout_s
    while True:
        processes.check()
        try:
            with socket.create_connection((host, port), timeout=1):
                return
        except OSError as error:
            if time.monotonic() > deadline:
                raise LinkError(f"port {port}", got="nothing that listens", do="see the logs") from error
        time.sleep(0.05)
