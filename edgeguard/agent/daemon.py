"""The agent's main loop: wires source, model, window, spool, link and updater together.

Rules enforced here:

* inference never waits for the network, and a network that is away never stops the agent;
* a window closes between two batches, so that a batch is counted by exactly one report; a model is swapped
  there too, after the window of the old one was closed, so that every input meets exactly one model;
* the report and the names of its batches are committed first, the batches are deleted after that; what a
  killed agent left between the two is cleared up at the next start.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import numpy.typing as npt

import edgeguard
from edgeguard.agent import startup
from edgeguard.agent.config import AgentConfig
from edgeguard.agent.link import Connected, Hint, Link, Outflow
from edgeguard.agent.source import Batch, FolderSource
from edgeguard.agent.spool import Spool
from edgeguard.agent.update import Fetched, Progress, Updater, admit
from edgeguard.agent.window import AlertLimit, Window, alert_builder
from edgeguard.contract import topics
from edgeguard.contract.messages import Ack, Birth, Health, Reported, Status
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.verdict import Verdict
from edgeguard.errors import ConfigError, ModelError, TrustError

SPOOL_FILE = "spool.sqlite"
UPDATE_FOLDER = "update"

IDLE_S = 0.05
"""How long the agent sleeps when no input waits; the network wakes it earlier."""
SERVICE_S = 0.02
"""How often the network is looked after between inputs."""

log = logging.getLogger(__name__)


class Agent:
    """One device. Everything that can be wrong with its configuration is found here, before it starts.

    Raises:
        ConfigError: a folder, the spool, the broker's settings, or another agent on the same state folder.
        ModelError: the first model cannot be used.
        TrustError: the installed model is damaged, and there is no other.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        self._boot = secrets.token_hex(8)
        self._lock = startup.claim(config.state_dir)
        self._load = startup.loader(config.runtime)
        self._slots, self._model = startup.open_model(config, self._load)
        self._sequence = self._slots.active().sequence
        self._confirmed = self._slots.confirmed
        self._trial = startup.trial(config)
        startup.check_root(config.update)
        expected = self._model.metadata.input
        self._source = FolderSource(config.source.path, shape=expected.shape, dtype=expected.dtype)
        self._results = Results(config.results.path) if config.results else None
        self._spool = Spool(config.state_dir / SPOOL_FILE, boot=self._boot, max_bytes=config.spool.max_mib << 20)
        self._link = Link(
            config.broker,
            fleet=config.fleet,
            device=config.device,
            boot=self._boot,
            next_session=self._spool.next_session,
        )
        self._outflow = Outflow(first_s=config.spool.resend_s)
        self._updater = Updater(config.update, config.state_dir / UPDATE_FOLDER)
        self._fetched: Fetched | None = None
        self._told: Progress | None = None
        self._window: Window | None = None
        self._window_at = self._served_at = self._health_at = time.monotonic()
        self._batches: list[str] = []
        self._alerts = AlertLimit.full(config.alerts.per_minute, time.monotonic())
        self._durations: deque[float] = deque(maxlen=512)
        self._inputs = 0

    def run(self, stopping: Callable[[], bool]) -> None:
        """Work until ``stopping`` says so, or until the source has ended where the configuration says so.

        Raises:
            ConfigError: the disk is full or refuses to write. What is not counted yet stays in the source.
        """
        self._clear_up()
        log.info(
            "agent %s/%s runs model %s, sequence %d, on %s %s",
            self._config.fleet,
            self._config.device,
            self._model.metadata.model_digest[:12],
            self._sequence,
            self._model.runtime.name,
            self._model.runtime.version,
        )
        while not stopping():
            batch = self._source.take()
            if batch is not None:
                self._process(batch)
            elif self._source.ended and self._config.source.stop_at_end:
                break
            else:
                self._serve(wait_s=IDLE_S)
            if self._is_window_due():
                self._close_window()
            if self._fetched is not None:
                self._swap(self._fetched)
        self._stop()

    def _process(self, batch: Batch) -> None:
        """Run one batch through the model and into the window."""
        if self._window is None:
            self._window = Window(self._model.metadata, started_ms=_now_ms())
            self._window_at = time.monotonic()
        for index, x in enumerate(batch.inputs):
            verdict = self._infer(x, self._window)
            if self._results:
                self._results.add(batch.name, index, verdict)
            if time.monotonic() - self._served_at >= SERVICE_S:
                self._serve()
        self._batches.append(batch.name)
        self._inputs += len(batch.inputs)

    def _infer(self, x: npt.NDArray[Any], window: Window) -> Verdict | None:
        started = time.perf_counter()
        try:
            inference = self._model.infer(x)
        except ModelError:
            # Its shape and type were checked with the file, so this one input holds NaN or infinity.
            window.add_unchecked()
            return None
        self._durations.append(time.perf_counter() - started)
        window.add(inference.verdict, inference.features)
        if inference.verdict.flagged:
            allowed, self._alerts = self._alerts.take(time.monotonic())
            if allowed:
                self._spool.put(alert_builder(inference.verdict, self._model.metadata, at_ms=_now_ms()))
        return inference.verdict

    def _is_window_due(self) -> bool:
        if self._window is None:
            return False
        limit = self._config.window
        return self._window.inputs >= limit.inputs or time.monotonic() - self._window_at >= limit.seconds

    def _close_window(self) -> None:
        """Commit the report with the names of its batches, then let go of the batches."""
        window, self._window = self._window, None
        if window is None:
            return
        self._spool.put(lambda boot, seq: window.report(boot=boot, seq=seq, ended_ms=_now_ms()), consumed=self._batches)
        if self._results:
            self._results.write()
        self._source.discard(self._batches)
        self._spool.clear_consumed()
        self._batches = []
        self._confirm()

    def _confirm(self) -> None:
        """A model that filled a window has proved itself."""
        if not self._confirmed:
            try:
                self._slots.confirm()
                self._confirmed = True
                self._trial.end(self._model.file_digest)
            except (ConfigError, TrustError) as error:
                log.warning("the model cannot be confirmed: %s", error)

    def _clear_up(self) -> None:
        """Delete the batches that a killed agent had counted but not yet deleted."""
        counted = self._spool.consumed()
        if counted:
            log.info("deleting %d batches that were counted before the restart", len(counted))
            self._source.discard(counted)
            self._spool.clear_consumed()

    def _serve(self, wait_s: float = 0.0) -> None:
        """Look after the network and the update; wait at most ``wait_s`` for something to happen."""
        for event in self._link.poll(wait_s):
            now = time.monotonic()
            if isinstance(event, Connected):
                self._announce(event.session)
                self._outflow.restart()
            elif isinstance(event, Ack):
                stored, gaps = self._spool.forget(event), self._spool.positions(event.boot, event.gaps)
                self._outflow.acknowledged(stored, now, gaps=gaps)
            elif isinstance(event, Hint):
                self._tell(self._updater.hint(event, running_sequence=self._sequence, now_s=now))
        now = self._served_at = time.monotonic()
        if self._fetched is None:
            progress = self._updater.step(
                model_digest=self._model.metadata.model_digest, running_sequence=self._sequence, now_s=now
            )
            if isinstance(progress, Fetched):
                self._fetched = progress
            else:
                self._tell(progress)
        if self._link.connected:
            for entry in self._outflow.take(self._spool.pending, now):
                self._link.publish(topics.REPORT if entry.kind == "report" else topics.ALERT, entry.payload)
            if now - self._health_at >= self._config.health_s:
                self._health_at = now
                self._link.publish(topics.HEALTH, self._health(), qos=0)

    def _announce(self, session: int) -> None:
        """Publish what is retained: a new connection begins with it."""
        metadata = self._model.metadata
        status = Status(state="online", session=session, boot=self._boot)
        self._link.publish(topics.STATUS, status, retain=True)
        birth = Birth(
            session=session,
            boot=self._boot,
            edgeguard=edgeguard.__version__,
            python=platform.python_version(),
            board=board(),
            runtime=self._model.runtime.name,
            runtime_version=self._model.runtime.version,
            model_digest=metadata.model_digest,
            guard_digest=metadata.guard_digest,
            file_digest=self._model.file_digest,
            sequence=self._sequence,
            detectors=tuple(detector.name for detector in metadata.detectors),
            capabilities=("update",) if self._config.update else (),
        )
        self._link.publish(topics.BIRTH, birth, retain=True)
        self._report_model()

    def _tell(self, progress: Progress | None) -> None:
        """Publish what became of the hint, once per change."""
        if progress is not None and progress != self._told:
            log.info("model of sequence %d: %s %s", progress.sequence, progress.state, progress.reason)
            self._told = progress
            self._report_model()

    def _report_model(self) -> None:
        told = self._told
        reported = Reported(
            session=self._link.session,
            boot=self._boot,
            state=told.state if told else "running",
            model_digest=self._model.metadata.model_digest,
            guard_digest=self._model.metadata.guard_digest,
            file_digest=self._model.file_digest,
            sequence=self._sequence,
            desired_sequence=told.sequence if told else None,
            reason=told.reason if told else "",
        )
        self._link.publish(topics.MODEL_REPORTED, reported, retain=True)

    def _swap(self, fetched: Fetched) -> None:
        """Replace the model between two batches; on any doubt the old one runs on."""
        self._fetched = None
        # Outside of what is caught below: a report that cannot be spooled must end the agent, not be lost.
        self._close_window()
        try:
            model = self._admit(fetched)
            self._slots.activate(self._slots.stage(fetched.path, sha256=fetched.file_digest, sequence=fetched.sequence))
        except (TrustError, ModelError) as error:
            self._tell(self._updater.defer(fetched.sequence, "refused", str(error), now_s=time.monotonic()))
        except (ConfigError, OSError) as error:
            self._tell(self._updater.defer(fetched.sequence, "failed", str(error), now_s=time.monotonic()))
        else:
            self._model, self._sequence, self._confirmed = model, fetched.sequence, False
            self._updater.settle(fetched.sequence)
            self._durations.clear()
            self._tell(Progress(state="updated", sequence=fetched.sequence))
            if self._link.connected:
                self._announce(self._link.session)
        finally:
            with suppress(OSError):
                fetched.path.unlink()

    def _admit(self, fetched: Fetched) -> GuardedModel:
        if self._trial.failed(fetched.file_digest):
            raise ModelError("fetched model", got="one that ran and never filled a window", do="release a repaired one")
        return admit(fetched.path.read_bytes(), fetched, self._model, load=self._load)

    def _health(self) -> Health:
        durations = self._durations
        return Health(
            session=self._link.session,
            boot=self._boot,
            rss_bytes=resident_bytes(),
            spooled=self._spool.pending_count,
            inputs=self._inputs,
            p50_us=statistics.median(durations) * 1e6 if durations else 0.0,
        )

    def _stop(self) -> None:
        """Spool the open window, give the hub a moment to acknowledge what is left, and say goodbye."""
        self._close_window()
        deadline = time.monotonic() + self._config.linger_s
        while self._spool.pending_count and time.monotonic() < deadline:
            self._serve(wait_s=IDLE_S)
        self._updater.close()
        self._link.close()
        if self._spool.pending_count:
            log.warning("%d messages wait in the spool for the next start", self._spool.pending_count)
        self._spool.close()
        self._trial.end(self._model.file_digest)
        log.info("stopped after %d inputs", self._inputs)


class Results:
    """A file with one line of JSON per counted input.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lines: list[dict[str, object]] = []
        self.write()

    def add(self, name: str, index: int, verdict: Verdict | None) -> None:
        """Remember one input until its window is counted; ``verdict`` is None if it could not be scored."""
        status = verdict.status if verdict else "not checked"
        self._lines.append(
            {
                "file": name,
                "index": index,
                "predicted": verdict.predicted if verdict else None,
                "status": status,
                "flagged": None if status == "not checked" else status == "flagged",
                "score": verdict.score if verdict else None,
            }
        )

    def write(self) -> None:
        """Append the remembered lines."""
        try:
            with self._path.open("ab") as file:
                file.write(msgspec.json.Encoder().encode_lines(self._lines))
        except OSError as error:
            raise ConfigError(f"results file {self._path}", got=error.strerror, expected="a writable file") from error
        self._lines = []


def board() -> str:
    """The board's own name where it has one, else the processor architecture."""
    try:
        return Path("/proc/device-tree/model").read_text().rstrip("\0\n")[:512]
    except (OSError, ValueError):
        return platform.machine()


def resident_bytes() -> int:
    """Memory of this process that is in RAM; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
