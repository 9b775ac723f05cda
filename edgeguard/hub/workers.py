"""Starts the processes that take reports, and starts again those that die.

``python -m edgeguard.hub.workers --config hub.toml`` is a machine that takes reports and does nothing else: any number
of them may stand beside the one hub that decides, all on one database and one broker, each with a ``client_id`` of its
own.

Rules enforced here:

* a worker's client id is the hub's with its number: whoever is started in place of a dead one re-opens its session at
  the broker, and takes what waits there;
* a worker that dies is started again, each time a little later, until it lives for a while;
* sessions of workers that are no longer wanted are ended: a broker goes on sharing messages out to sessions that nobody
  opens. What waited there is lost to the broker and not to the devices, which send it again;
* what is seen of the workers here is for people; counts that matter are in the database.
"""

from __future__ import annotations

import argparse
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import paho.mqtt.client as mqtt

from edgeguard import broker as brokers
from edgeguard.detection.metadata import read as read_metadata
from edgeguard.errors import EXIT_CLEAN, EXIT_USAGE, EdgeGuardError, ModelError
from edgeguard.hub import config as configs
from edgeguard.hub.config import HubConfig
from edgeguard.hub.ingest import ModelShape
from edgeguard.hub.ingest_worker import Assignment
from edgeguard.hub.listener import Totals
from edgeguard.settings import BrokerConfig, password

COMMAND = (sys.executable, "-m", "edgeguard.hub.ingest_worker")
RESTART_FIRST_S = 0.5
RESTART_CAP_S = 30.0
STEADY_S = 60.0
"""A worker that lived for so long died of something new."""
_FILE = "workers"

log = logging.getLogger(__name__)


class Supervisor:
    """Keeps ``[ingest] workers`` processes running.

    Args:
        config: the hub's configuration.
        models: what is known of models, by model digest.
    """

    def __init__(self, config: HubConfig, *, models: Mapping[str, ModelShape]) -> None:
        self._config = config
        self._models = dict(models)
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._running: dict[int, subprocess.Popen[bytes]] = {}
        self._totals: dict[int, Totals] = {}
        self._before = Totals()
        self._threads: list[threading.Thread] = []

    @property
    def totals(self) -> Totals:
        """What all workers together say that came, those that died included."""
        with self._lock:
            return added([self._before, *self._totals.values()])

    @property
    def processes(self) -> dict[int, int]:
        """The process id of each worker that runs, by its number."""
        with self._lock:
            return {number: process.pid for number, process in self._running.items() if process.poll() is None}

    def start(self) -> None:
        """Start the workers in the background, and end the sessions of those that are no longer wanted."""
        self._threads = [
            threading.Thread(target=self._keep, args=(number,), name=f"worker {number}", daemon=True)
            for number in range(self._config.ingest.workers)
        ]
        self._threads.append(threading.Thread(target=self._forget_former, name="former workers", daemon=True))
        for thread in self._threads:
            thread.start()

    def stop(self, *, wait_s: float = 4.0) -> None:
        """Let each worker finish its batch and end."""
        self._stopping.set()
        with self._lock:
            for process in self._running.values():
                _close(process)
        deadline = time.monotonic() + wait_s
        for thread in self._threads:
            thread.join(max(0.1, deadline - time.monotonic()))
        with self._lock:
            for process in self._running.values():
                process.kill()

    def tell(self, models: Mapping[str, ModelShape]) -> None:
        """The hub knows other models now."""
        with self._lock:
            if models == self._models:
                return
            self._models = dict(models)
            for process in self._running.values():
                _write(process, msgspec.json.encode(self._models))

    def _keep(self, number: int) -> None:
        failures = 0
        while not self._stopping.is_set():
            began = time.monotonic()
            try:
                code = self._run(number)
            except (OSError, msgspec.MsgspecError) as error:
                log.error("ingest worker %d: %s", number, error)  # noqa: TRY400
                code = -1
            if self._stopping.is_set():
                return
            failures = 0 if time.monotonic() - began >= STEADY_S else failures + 1
            wait_s = min(RESTART_CAP_S, RESTART_FIRST_S * 2.0 ** min(failures - 1, 10))
            log.warning("ingest worker %d ended with code %s; starting it again in %g s", number, code, wait_s)
            self._stopping.wait(wait_s)

    def _run(self, number: int) -> int:
        """One process from beginning to end. Returns its exit code."""
        process = subprocess.Popen(COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        with self._lock:
            self._running[number] = process
            _write(process, msgspec.json.encode(self._assignment(number), enc_hook=str))
            if self._stopping.is_set():
                _close(process)
        for line in process.stdout:
            with self._lock, suppress(msgspec.MsgspecError):  # a library may write there too
                self._totals[number] = msgspec.json.decode(line, type=Totals)
        code = process.wait()
        process.stdout.close()
        with self._lock:
            _close(process)
            del self._running[number]
            self._before = added([self._before, self._totals.pop(number, Totals())])
        return code

    def _assignment(self, number: int) -> Assignment:
        config = self._config
        return Assignment(
            broker=config.broker,
            fleet=config.fleet,
            client_id=client_id(config, number),
            store_url=configs.store_url(config),
            epoch_hours=config.store.epoch_hours,
            limits=config.ingest,
            models=self._models,
            log_level=logging.getLogger().getEffectiveLevel(),
        )

    def _forget_former(self) -> None:
        """End the sessions of workers with higher numbers than there are now."""
        file, wanted = self._config.state_dir / _FILE, self._config.ingest.workers
        try:
            former = int(file.read_text()) if file.exists() else 0
            for number in range(wanted, former):
                end_session(self._config.broker, client_id(self._config, number))
            file.write_text(f"{wanted}\n")
        except (OSError, ValueError) as error:
            log.warning("sessions of former workers were not ended: %s; the next start tries again", error)


def client_id(config: HubConfig, number: int) -> str:
    """The MQTT client id of a worker."""
    return f"{config.client_id}-{number}"


def end_session(broker: BrokerConfig, name: str, *, timeout_s: float = brokers.CONNECT_TIMEOUT_S) -> None:
    """Have the broker forget a client: its subscriptions and what waits for it. Raises OSError, ValueError."""
    client = brokers.client(broker, name, password(broker), clean_session=True)
    done = threading.Event()

    def on_connect(_c: mqtt.Client, _u: Any, _f: Any, reason: Any, _p: Any) -> None:
        if not reason.is_failure:
            done.set()
        client.disconnect()

    client.on_connect = on_connect
    brokers.connect(client, broker, clean_session=True)
    deadline = time.monotonic() + timeout_s
    while client.loop(0.2) == mqtt.MQTT_ERR_SUCCESS and time.monotonic() < deadline:
        pass
    if not done.is_set():
        raise TimeoutError(f"the broker does not accept {name}")


def shapes(config: HubConfig) -> dict[str, ModelShape]:
    """What the reports of the configured models look like, by model digest. Raises ModelError."""
    found = {}
    for model in config.models:
        try:
            guard = read_metadata(model.guarded.read_bytes())
        except OSError as error:
            raise ModelError(
                f"guarded model {model.guarded}", got=error.strerror, expected="a readable file"
            ) from error
        found[guard.model_digest] = ModelShape(
            width=guard.feature_count, classes=len(guard.classes), private=model.private
        )
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Take reports on this machine until SIGTERM or Ctrl-C. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="edgeguard.hub.workers", description="Takes reports, and nothing else.")
    parser.add_argument("--config", type=Path, required=True, help="TOML file")
    parser.add_argument("--workers", type=int, help="so many processes; without, as configured, at least one")
    options = parser.parse_args(arguments)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    try:
        config = configs.load(options.config)
        config = with_workers(config, options.workers or max(config.ingest.workers, 1))
        config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        supervisor = Supervisor(config, models=shapes(config))
    except EdgeGuardError as error:
        print(error, file=sys.stderr)
        return EXIT_USAGE
    supervisor.start()
    stop.wait()
    supervisor.stop()
    return EXIT_CLEAN


def with_workers(config: HubConfig, workers: int) -> HubConfig:
    """The configuration with another number of workers, as ``--workers`` gives it."""
    return msgspec.structs.replace(config, ingest=msgspec.structs.replace(config.ingest, workers=workers))


def added(every: Sequence[Totals]) -> Totals:
    """What several together say that came."""
    return Totals(*(sum(values) for values in zip(*map(msgspec.structs.astuple, every), strict=True)))


def _write(process: subprocess.Popen[bytes], line: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(line + b"\n")
        process.stdin.flush()
    except (OSError, ValueError):
        log.debug("a worker that ended is told nothing")


def _close(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    try:
        process.stdin.close()
    except OSError:
        log.debug("a worker had ended before")


if __name__ == "__main__":
    sys.exit(main())
