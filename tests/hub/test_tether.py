"""What a hub started ends with it, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgeguard.hub.jobs import Jobs, Work
from tests.hub.conftest import Setting
from tests.simulators import fleet
from tests.simulators.fleet import wait_until

HUB = """
import sys, threading
from pathlib import Path
from edgeguard.hub import config
from edgeguard.hub.service import Hub
with Hub(config.load(Path(sys.argv[1])), command=(sys.executable, sys.argv[2])) as hub:
    hub.run(threading.Event().wait)
"""
WORKER = """
import os, subprocess, sys, time
from pathlib import Path
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pids = Path(sys.argv[0]).with_suffix(".pids")
pids.with_suffix(".tmp").write_text(f"{os.getpid()} {child.pid}")
pids.with_suffix(".tmp").rename(pids)
time.sleep(600)
"""


def lives(pid: int) -> bool:
    """Whether there is such a process, and more of it than an exit status that nobody asked for."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_the_worker_of_a_killed_hub_dies_with_all_that_it_started(setting: Setting, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    store = setting.store()
    vector = (0.0,) * fleet.WIDTH
    work = Work(
        case=1, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, label=0, flagged_mean=vector,
        unflagged_mean=vector, unflagged_std=vector,
    )  # fmt: skip
    with store.write() as db:
        Jobs(store, owner="test").add(db, work)
    store.close()
    hub = subprocess.Popen([sys.executable, "-c", HUB, str(setting.path), str(script)])
    try:
        told = script.with_suffix(".pids")
        wait_until(told.exists)
        pids = [int(pid) for pid in told.read_text().split()]
        assert all(map(lives, pids))
    finally:
        hub.kill()
        hub.wait(15)
    wait_until(lambda: not any(map(lives, pids)))


@pytest.mark.parametrize(
    ("script", "status"), [("raise SystemExit(3)", 3), ("import os; os.kill(os.getpid(), 15)", -15)]
)
def test_the_exit_status_is_that_of_the_command(script: str, status: int) -> None:
    tether = [sys.executable, "-m", "edgeguard.hub.tether", sys.executable, "-c", script]
    with subprocess.Popen(tether, stdin=subprocess.PIPE, start_new_session=True) as process:
        assert process.wait(15) == status
