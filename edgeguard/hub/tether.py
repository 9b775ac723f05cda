"""``python -m edgeguard.hub.tether COMMAND...``: runs a command that ends, with all it started, when the hub does.

Its standard input is a pipe into which nobody writes: its end is the hub's end, however that came about, SIGKILL
included. It must lead a process group of its own. Its exit status is the command's.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence


def main(command: Sequence[str]) -> int:
    """Run the command to its end."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_watch, daemon=True).start()
    status = child.wait()
    if status < 0:
        os.kill(os.getpid(), -status)
    return status


def _watch() -> None:
    os.read(0, 1)  # sys.stdin would hold a lock that the interpreter wants at its end
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
