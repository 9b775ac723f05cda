"""The hub as one process: puts the parts together, runs until it is told to stop, and stops within seconds.

Rules enforced here:

* what can be wrong with the configuration is found before anything starts: models, keys, database, port;
* one hub per state folder: a second one is refused. Several hubs may share one database: one of them decides;
* the hub starts and keeps running without a broker, and says at each attempt that it has none.
"""

from __future__ import annotations

import fcntl
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import datetime, timezone
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec

from edgeguard import broker
from edgeguard.contract.topics import DEVICE_CHANNELS
from edgeguard.errors import ConfigError
from edgeguard.hub import api, private
from edgeguard.hub.access import Tokens
from edgeguard.hub.api import Parts
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.commands import Commands
from edgeguard.hub.config import HubConfig, store_url
from edgeguard.hub.director import REPAIR, Director, Model, configured
from edgeguard.hub.ingest import ModelShape
from edgeguard.hub.listener import RETAINED, Listener
from edgeguard.hub.metrics import Metrics
from edgeguard.hub.notify import Notifier, Targets, deliver, sensors
from edgeguard.hub.queries import Queries
from edgeguard.hub.retention import Sweeper
from edgeguard.hub.store import Store
from edgeguard.hub.web import Web
from edgeguard.hub.workers import Supervisor, added
from edgeguard.release.repository import Repository
from edgeguard.release.roles import OFFLINE

log = logging.getLogger(__name__)


def clock_ms() -> int:
    """Milliseconds since 1970."""
    return time.time_ns() // 1_000_000


class Hub:
    """A hub that is ready to start; use it as a context.

    Args:
        config: the checked configuration.
        command: the repair worker's program and first arguments.

    Raises:
        ConfigError: state folder, database, keys or port cannot be used.
        ModelError: a configured model cannot be used.
        TrustError: the release repository is not what its keys signed.
    """

    def __init__(self, config: HubConfig, *, command: Sequence[str] = REPAIR) -> None:
        self._config = config
        with ExitStack() as stack:
            models = configured(config)
            self._private = private.read(config)
            repository = _repository(config)
            stack.enter_context(_lock(config.state_dir))
            self._store = Store(store_url(config), fleet=config.fleet, epoch_hours=config.store.epoch_hours)
            stack.callback(self._store.close)
            self._web = Web(config.web)
            stack.callback(self._web.stop)
            targets = Targets(config.notify)
            self.book = Casebook(self._store, clock_ms=clock_ms, targets=targets.of)
            self._queries = Queries(self._store, self.book)
            self._metrics = Metrics(
                self._queries.census,
                ingested=lambda: added([self._listener.totals, self._workers.totals]),
                connected=lambda: self._listener.connected,
                waiting=lambda: self._listener.waiting,
            )
            self._listener = Listener(
                config.broker,
                fleet=config.fleet,
                client_id=config.client_id,
                store=self._store,
                models=lambda: self._shapes(self._director.models),
                clock_ms=clock_ms,
                limits=config.ingest,
                channels=RETAINED if config.ingest.workers else DEVICE_CHANNELS,
                replied=self._replied,
            )
            self._workers = Supervisor(config, models=self._shapes(models))
            self.commands = Commands(
                self._store,
                self.book,
                publish=self._listener.publish,
                clock_ms=clock_ms,
                private=lambda: {d for d, model in dict(self._director.models).items() if model.private},
            )
            self._director = Director(
                config,
                store=self._store,
                book=self.book,
                commands=self.commands,
                models=models,
                repository=repository,
                listener=self._listener,
                clock_ms=clock_ms,
                owner=_owner(config.state_dir),
                command=command,
            )
            self._notifier = Notifier(
                self._store,
                targets,
                deliver=lambda messages: deliver(config.broker, f"{config.client_id}-notify", messages),
                clock_ms=clock_ms,
                sensors=self._sensors,
            )
            self._stack = stack.pop_all()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @property
    def port(self) -> int:
        """The port of the web server."""
        return self._web.port

    def run(self, stopping: Callable[[float], bool]) -> None:
        """Run until ``stopping``, which is asked to wait so many seconds, returns True."""
        release = self._config.release
        self._stack.callback(self._listener.stop)
        self._stack.callback(self._workers.stop)
        self._stack.callback(self._director.stop)
        self._stack.callback(self._notifier.stop)
        sweeper = Sweeper(self._store, self._config.store, clock_ms=clock_ms, folder=self._config.state_dir)
        self._stack.callback(sweeper.stop)
        self._web.start(
            api.build(
                Parts(
                    config=self._config.web,
                    queries=self._queries,
                    tokens=Tokens(self._store, clock_ms=clock_ms),
                    metrics=self._metrics,
                    status=self.status,
                    models=lambda: dict(self._director.models),
                    connected=lambda: self._listener.connected,
                    book=self.book,
                    commands=self.commands,
                    policy=self._config.policy,
                    shared=self._director.shared,
                    private=self._private,
                    folder=release.folder if release else None,
                    stopping=lambda: self._web.stopping,
                )
            )
        )
        self._listener.start()
        self._workers.start()
        self._notifier.start()
        sweeper.start()
        log.info("hub of fleet %s is up", self._config.fleet)
        while not stopping(self._config.policy.interval_s):
            self._director.tick()
            self._workers.tell(self._shapes(self._director.models))
        log.info("hub is stopping")

    def _shapes(self, models: Mapping[str, Model]) -> dict[str, ModelShape]:
        return {digest: model.shape for digest, model in dict(models).items()}

    def _replied(self, device: str, name: str, payload: bytes) -> None:
        self.commands.heard(device, name, payload)

    def _sensors(self) -> Mapping[str, bytes]:
        """What Home Assistant is to show."""
        models = [model.name for model in self._config.models]
        prefix = next(target.prefix for target in self._config.notify if target.kind == "homeassistant")
        return sensors(self._config.fleet, models, self.book.all(), prefix=prefix)

    def status(self, since: int = 0) -> Mapping[str, Any]:
        """What ``/v1/status`` shows: counts, devices, models, cases, and the timeline after event ``since``."""
        release = self._config.release
        return {
            "fleet": self._config.fleet,
            "broker_connected": self._listener.connected,
            "base_url": release.base_url if release else None,
            "counts": self._store.counts(),
            "devices": self._store.devices(),
            "models": [
                {"name": model.name, "model_digest": digest, "guard_digest": model.guard.guard_digest}
                for digest, model in dict(self._director.models).items()
            ],
            "cases": msgspec.to_builtins(self.book.all()),
            "events": self._store.events(since=since),
        }


def check(config: HubConfig) -> None:
    """Everything that can be checked without running: configuration, models, keys, database, port, broker once.

    Raises:
        EdgeGuardError: the first thing that is wrong.
    """
    with Hub(config):
        broker.check(config.broker)


def run(config: HubConfig) -> None:
    """Run until SIGTERM or SIGINT."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    with Hub(config) as hub:
        hub.run(stop.wait)


def _repository(config: HubConfig) -> Repository | None:
    if config.release is None:
        return None
    repository = Repository.open(config.release.folder, config.release.keys, clock=lambda: datetime.now(timezone.utc))
    for role in set(repository.held()) & set(OFFLINE):
        log.warning("a key of %s lies with the hub's: move it off this machine", role)
    latest = max((release.sequence for release in repository.releases()), default=0)
    for model in config.models:
        if model.sequence > latest:
            # Devices take only higher numbers than the one they run: the next release would never be accepted.
            raise ConfigError(
                f"[[models]] {model.name}: sequence {model.sequence}",
                expected=f"at most {latest}, the latest release in {config.release.folder}",
                do="name the repository that released it",
            )
    return repository


def _owner(folder: Path) -> str:
    """The name of the hub that the state folder belongs to, made once: a hub that starts again is the same one."""
    path = folder / "owner"
    try:
        if not path.exists():
            temporary = path.with_name("owner.tmp")
            temporary.write_text(token_hex(16))
            temporary.replace(path)
        return path.read_text().strip()[:64]
    except OSError as error:
        raise ConfigError(f"{path}", got=error.strerror, expected="a file to read and write") from error


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the state folder for this process; the lock ends with the process, however it ends."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (folder / "hub.lock").open("a")
    except OSError as error:
        raise ConfigError(f"state_dir {folder}", got=error.strerror, expected="a folder to write to") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(
                f"state_dir {folder}", got="another hub that uses it", do="stop that hub first"
            ) from error
        yield
