"""The C library on this machine as a microcontroller: a process at the end of a cable, with a folder for its flash."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.mcu.cable import Cable


class Board:
    """One board.

    Args:
        program: what :func:`tests.mcu.build.host` made.
        cable: its line.
        folder: its flash, empty at first.
    """

    def __init__(self, program: Path, cable: Cable, folder: Path) -> None:
        self._program, self._cable, self._folder = program, cable, folder
        self._process: subprocess.Popen[bytes] | None = None
        folder.mkdir(parents=True)

    def start(self, environment: Mapping[str, str] | None = None) -> None:
        """Power; see board_host.c for what the environment may say."""
        command = [str(self._program), self._cable.board, str(self._folder)]
        self._process = subprocess.Popen(command, env={**os.environ, **(environment or {})})

    def kill(self) -> None:
        """No power."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(10)

    def ended(self) -> int | None:
        """The exit code of one that ended by itself: 9 where its power failed in the middle of a write."""
        assert self._process is not None
        return self._process.poll()
