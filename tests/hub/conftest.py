"""Hubs: in this process for what a test must reach, and as a real process for what a test must kill."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

import pytest

from edgeguard.contract import topics
from edgeguard.hub import config
from edgeguard.hub.service import Hub
from edgeguard.hub.store import Store
from edgeguard.release.repository import Repository
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.postgres import Postgres


@dataclass
class Setting:
    """A hub's configuration and folders; the hub itself can be started as a process, killed and started again."""

    folder: Path
    broker_port: int
    web_port: int = field(default_factory=free_port)
    policy: str = "interval_s = 0.1\nassess_s = 0.1"
    rollout: str = "soak_s = 0\nmin_inputs = 0"
    model: str = 'keras = "signs.keras"\ndata = "digits"'
    """What the configuration says of the model beside its name and file."""
    more: str = ""
    """Further sections of the configuration."""
    _process: subprocess.Popen[bytes] | None = None

    @property
    def path(self) -> Path:
        """The configuration file, written anew."""
        path = self.folder / "hub.toml"
        path.write_text(
            f'fleet = "test"\nstate_dir = "state"\n[broker]\nhost = "127.0.0.1"\nport = {self.broker_port}\n'
            f'[web]\nport = {self.web_port}\nanonymous = "viewer"\n'
            f"[policy]\n{self.policy}\n[rollout]\n{self.rollout}\n"
            '[release]\nfolder = "release"\nkeys = "keys"\n'
            f'[[models]]\nname = "signs"\nguarded = "signs.tflite"\n{self.model}\n'
            f"{self.more}\n"
        )
        return path

    @property
    def config(self) -> config.HubConfig:
        """The configuration, loaded."""
        return config.load(self.path)

    @property
    def state(self) -> Path:
        """The state folder."""
        return self.folder / "state"

    @property
    def log(self) -> str:
        """What the process wrote to stderr."""
        return (self.folder / "stderr.log").read_text()

    def store(self) -> Store:
        """The hub's database, opened a second time."""
        self.state.mkdir(exist_ok=True)
        return Store(config.store_url(self.config), fleet="test")

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the hub as a process."""
        with (self.folder / "stderr.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "edgeguard.hub", "--config", str(self.path), *arguments], stderr=log
            )
        return self._process

    def wait_until_up(self, *, timeout_s: float = 30.0) -> None:
        """Wait until the hub's web server answers and it is connected."""

        def up() -> bool:
            try:
                return bool(json.loads(fleet.get(self.web_port, "/v1/status")[1])["broker_connected"])
            except OSError:
                return False

        fleet.wait_until(up, timeout_s=timeout_s)

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(15)

    def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(15)

    def end(self) -> None:
        """Kill what the test left running."""
        if self._process is not None and self._process.poll() is None:
            self.kill()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL cluster for all tests together."""
    cluster = Postgres(durable=False)
    cluster.start()
    yield cluster
    cluster.stop()


@pytest.fixture(scope="session")
def template(postgres: Postgres) -> str:
    """A database of PostgreSQL in which there is a hub's schema and nothing else."""
    name = postgres.create()
    Store(postgres.url(name), fleet="template").close()
    return name


@pytest.fixture(params=["sqlite", "postgresql"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh database of this test's own, once for each kind of database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'hub.db'}"
    postgres: Postgres = request.getfixturevalue("postgres")
    return postgres.url(postgres.create(request.getfixturevalue("template")))


@pytest.fixture
def setting(tmp_path: Path, mosquitto: Mosquitto) -> Iterator[Setting]:
    """A fleet's broker, model and release repository, and the hub's configuration for them."""
    made = Setting(tmp_path, mosquitto.port)
    (tmp_path / "signs.tflite").write_bytes(fleet.guarded_file(fleet.guard_metadata()))
    (tmp_path / "signs.keras").touch()
    Repository.create(
        tmp_path / "release", tmp_path / "keys", tmp_path / "offline", clock=lambda: datetime.now(timezone.utc)
    )
    yield made
    made.end()


@pytest.fixture
def hub(setting: Setting) -> Iterator[Callable[..., Hub]]:
    """Starts hubs in this process; the argument is the stand-in repair worker's command. All are stopped at the end."""
    running: list[tuple[threading.Event, threading.Thread]] = []

    def start(*command: str) -> Hub:
        stop = threading.Event()
        hub = Hub(setting.config, command=command)

        def run() -> None:
            with hub:
                hub.run(stop.wait)

        thread = threading.Thread(target=run)
        thread.start()
        running.append((stop, thread))
        return hub

    yield start
    for stop, thread in running:
        stop.set()
        thread.join(15)
        assert not thread.is_alive()


@pytest.fixture
def devices(setting: Setting) -> Iterator[list[Publisher]]:
    """Three devices that run the attacked model and say so."""
    made = [Publisher(setting.broker_port, f"d{i}") for i in range(3)]
    for device in made:
        device.__enter__()
        wait_until(device.connected)
        device.send(topics.STATUS, fleet.status(), retain=True)
        device.send(topics.BIRTH, fleet.birth(), retain=True)
    yield made
    for device in made:
        device.__exit__()
