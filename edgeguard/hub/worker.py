"""Runs the inspection and repair of one case in a child process and reads its progress, without ever waiting for it.

The child is ``COMMAND JOB.json``. It writes one JSON object a line to its standard output: a ``Progress``, and last
``{"result": Result}``; the same result lies in ``result.json`` of its folder. Its standard error goes to
``worker.log``.

Rules enforced here:

* every run has a folder of its own, so that what an earlier one left, or still writes, does no harm;
* a run ends with the hub, however that ends (:mod:`edgeguard.hub.tether`): no two work at one job;
* a run that finished while the hub was away is not run again: its ``result.json`` is taken;
* what the child says is checked; other lines are logged and ignored;
* an exit without a result, or running out of time, is a failure with a reason; exit status 2 says that the job cannot
  be done, and its last line why: running it again would be in vain.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeguard.errors import EXIT_USAGE
from edgeguard.hub.cases import Job, Progress, Result

_MAX_LINE = 1 << 20
_MAX_RESULT = 16 << 20

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failed:
    """The child ended without a result, or was ended. ``final``: another run would end the same way."""

    reason: str
    final: bool = False


class _Last(msgspec.Struct):
    result: Result


class Worker:
    """One running child.

    Args:
        command: the program and its arguments before the job file.
        job: what to do; its ``out_dir`` is made here.
        deadline_s: the moment on the caller's clock at which it has taken too long.

    Raises:
        OSError: the folder cannot be written or the program not started.
    """

    def __init__(self, command: Sequence[str], job: Job, *, deadline_s: float) -> None:
        if shutil.which(command[0]) is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), command[0])
        folder = Path(job.out_dir)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "job.json"
        file.write_bytes(msgspec.json.encode(job))
        with (folder / "worker.log").open("ab") as errors:
            # A session of its own: Ctrl-C is for the hub, which then ends the child and what that started.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeguard.hub.tether", *command, str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
        assert self._process.stdout is not None
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._folder = folder
        self._deadline_s = deadline_s
        self._rest = b""
        self._result: Result | None = None

    def poll(self, now_s: float) -> list[Progress | Result | Failed]:
        """What it said since the last call. A ``Result`` or ``Failed`` comes once and last."""
        ended = self._process.poll() is not None
        heard = self._read()
        if ended:
            self._close()
            result = self._result or finished(self._folder)
            return [*heard, result or self._failed(self._process.returncode)]
        if now_s > self._deadline_s:
            self.stop()
            return [*heard, Failed("it took longer than policy.worker_timeout_s")]
        return list(heard)

    def stop(self) -> None:
        """End the child and all that it started."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._close()

    def _close(self) -> None:
        self._stdout.close()
        self._stdin.close()

    def _failed(self, status: int) -> Failed:
        if status == EXIT_USAGE:
            return Failed(self._last_words(), final=True)
        return Failed(f"exit status {status}: {self._last_words()}")

    def _last_words(self) -> str:
        path = self._folder / "worker.log"
        with suppress(OSError):
            lines = path.read_bytes()[-2000:].decode(errors="replace").split("\n")
            return next((line for line in reversed(lines) if line.strip()), "") or f"nothing in {path}"
        return f"nothing in {path}"

    def _read(self) -> list[Progress]:
        heard: list[Progress] = []
        with suppress(BlockingIOError):
            while chunk := os.read(self._stdout.fileno(), 65536):
                *lines, self._rest = (self._rest + chunk).split(b"\n")
                heard += [progress for line in lines if (progress := self._understand(line)) is not None]
                self._rest = self._rest[-_MAX_LINE:]
        return heard

    def _understand(self, line: bytes) -> Progress | None:
        if not line.strip():
            return None
        try:
            if b'"result"' in line:
                self._result = msgspec.json.decode(line, type=_Last).result
                return None
            return msgspec.json.decode(line, type=Progress)
        except (msgspec.DecodeError, ValueError, RecursionError):
            log.warning("the repair worker said something else: %r", line[:200])
            return None


def finished(folder: Path) -> Result | None:
    """The result that a run left in its folder, None where there is none that can be read."""
    try:
        with (folder / "result.json").open("rb") as file:
            return msgspec.json.decode(file.read(_MAX_RESULT), type=Result)
    except (OSError, msgspec.DecodeError, ValueError, RecursionError):
        return None
