"""A real PostgreSQL cluster in a temporary folder, run as an unprivileged user: the server refuses to run as root."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psycopg

from tests.simulators import needs
from tests.simulators.mosquitto import free_port

_USER = "edgeguard"
_MEMORY, _ROOM = Path("/dev/shm"), 2 << 30


class Postgres:
    """One cluster on a free loopback port: ``start``, ``kill`` and ``stop``; ``create`` a database.

    Args:
        durable: all is on disk, and commits wait for it, as in production. Without, all is in memory where there is
            room for it; commits survive ``kill`` as well.
    """

    def __init__(self, *, durable: bool = True) -> None:
        self.port = free_port()
        self._durable = durable
        self._bin = _programs()
        self._account = _account()
        # Not pytest's folder: only root may pass through that one.
        where = None if durable or not _roomy(_MEMORY) else _MEMORY
        self._folder = Path(tempfile.mkdtemp(prefix="edgeguard-postgres-", dir=where))
        self._server: subprocess.Popen[bytes] | None = None
        if self._account is not None:
            os.chown(self._folder, self._account.pw_uid, self._account.pw_gid)
        self._run("initdb", "-D", str(self._data), "-U", _USER, "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync")

    def start(self) -> None:
        """Start the server and wait until it answers."""
        settings = {
            "port": self.port,
            "listen_addresses": "127.0.0.1",
            "unix_socket_directories": self._folder,
            "fsync": "on" if self._durable else "off",
        }
        with (self._folder / "log").open("ab") as log:
            self._server = subprocess.Popen(
                [
                    str(self._bin / "postgres"), "-D", str(self._data),
                    *(part for key, value in settings.items() for part in ("-c", f"{key}={value}")),
                ],
                stdout=log, stderr=log, **self._identity(),
            )  # fmt: skip
        self._run("pg_isready", "-h", "127.0.0.1", "-p", str(self.port), until_s=30.0)

    def create(self, template: str = "template1") -> str:
        """A new database, empty or a copy of another one that nobody uses; its name."""
        name = f"hub_{secrets.token_hex(4)}"
        with psycopg.connect(f"postgresql://{self._address}/postgres", autocommit=True) as db:
            db.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        return name

    def url(self, name: str) -> str:
        """The URL of a database, for SQLAlchemy."""
        return f"postgresql+psycopg://{self._address}/{name}"

    def kill(self) -> None:
        """End all of the server's processes at once; nothing is flushed."""
        if self._server is not None:
            self._run("pg_ctl", "stop", "-D", str(self._data), "-m", "immediate")
            self._server.wait(30)
            self._server = None

    def stop(self) -> None:
        """End the server and remove the cluster."""
        self.kill()
        shutil.rmtree(self._folder)

    @property
    def _address(self) -> str:
        return f"{_USER}@127.0.0.1:{self.port}"

    @property
    def _data(self) -> Path:
        return self._folder / "data"

    def _run(self, program: str, *arguments: str, until_s: float = 0.0) -> None:
        deadline = time.monotonic() + until_s
        while True:
            done = subprocess.run(
                [str(self._bin / program), *arguments], capture_output=True, text=True, check=False, **self._identity()
            )
            if done.returncode == 0:
                return
            if time.monotonic() >= deadline:
                raise RuntimeError(f"{program}: {done.stdout}{done.stderr}")
            time.sleep(0.05)

    def _identity(self) -> dict[str, Any]:
        if self._account is None:
            return {"cwd": self._folder}
        account = self._account
        return {"cwd": self._folder, "user": account.pw_uid, "group": account.pw_gid, "extra_groups": ()}


def _roomy(folder: Path) -> bool:
    return folder.is_dir() and shutil.disk_usage(folder).free > _ROOM


def _programs() -> Path:
    """The newest server's folder of programs."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=lambda path: int(path.parts[-3]))
    return found[-1].parent if found else needs.missing("postgres", "apt-get install postgresql")


def _account() -> pwd.struct_passwd | None:
    """Whom root becomes; None where there is no need."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            continue
    return needs.missing("an unprivileged user", "add the user nobody")
