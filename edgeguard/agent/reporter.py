"""What happens behind the inference, in a thread of its own: spool, network, updates, results, quarantine.

Rules enforced here:

* the inference never waits for this thread, nor for a disk or a network: it hands over finished windows, and where the
  disk does not take them it keeps adding to the one that is open, so that nothing is lost and memory does not grow;
* the report and the names of its files are committed first, the files are let go of after that; what a killed agent
  left between the two is cleared up at the next start;
* a fetched or re-calibrated model is checked, staged and opened here, by the rules of ``succession``; the inference
  only exchanges one model for the other, between two inputs.
"""

from __future__ import annotations

import errno
import logging
import os
import platform
import queue
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from io import RawIOBase
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy.typing as npt

import edgeguard
from edgeguard import broker
from edgeguard.agent import startup
from edgeguard.agent.commands import Commands, Outcome
from edgeguard.agent.config import AgentConfig
from edgeguard.agent.gateway import Gateway
from edgeguard.agent.gateway import devices as devices_behind
from edgeguard.agent.inference import Running
from edgeguard.agent.link import Connected, Event, For, Hint, Link, Outflow
from edgeguard.agent.quarantine import About, Quarantine
from edgeguard.agent.ranks import Activations, rank, vote
from edgeguard.agent.recalibration import Recalibrator, clean_data
from edgeguard.agent.sources.serial import Port
from edgeguard.agent.spool import OWN, Spool
from edgeguard.agent.succession import Succession
from edgeguard.agent.trial import Fared
from edgeguard.agent.update import Progress
from edgeguard.agent.window import Identity, Window
from edgeguard.contract import topics
from edgeguard.contract.messages import (
    Ack,
    Alert,
    Alive,
    Birth,
    Command,
    Health,
    Recalibrate,
    Recalibration,
    Report,
    Reported,
    Restarting,
    Status,
)
from edgeguard.detection import drift
from edgeguard.detection.verdict import p_value
from edgeguard.errors import ConfigError, EdgeGuardError
from firmware_bridge import board as boards
from firmware_bridge import resources

SPOOL_FILE = "spool.sqlite"
RECALIBRATION_FOLDER = "recalibration"
COMMANDS_FILE = "commands.sqlite"
ACTIVATIONS_FILE = "activations.json"

UNWRITTEN = 2
"""Windows that may wait for the disk; then the open one stays open."""
WAITING = 10_000
"""Results for a topic that may wait."""
LINES = 10_000
"""Lines for ``[results]`` that may wait for the disk; beyond that the newest are dropped and counted."""
SUSPECTS = 64
"""Flagged inputs that may wait for the quarantine."""
LOOK_S = 1.0
TURN_S = 0.05
"""How long this thread sleeps at most before it looks at what was handed over."""
RETRY_S = 2.0
"""Wait before a disk that refused is tried again."""
COMPLAIN_S = 60.0

log = logging.getLogger(__name__)


class Seen(NamedTuple):
    """What drift is judged by: the one-pass score of a checked input, its prediction, and whether it was flagged."""

    score: float
    predicted: int | None
    flagged: bool


@dataclass(frozen=True, kw_only=True)
class Closed:
    """A finished window, the files that it counts, its lines for ``[results]``, and what drift is judged by."""

    window: Window
    files: tuple[str, ...] = ()
    lines: tuple[dict[str, object], ...] = ()
    seen: tuple[Seen, ...] = ()
    own: bool = True
    """What this agent ran itself, not what a program told."""
    fared: Fared = field(default_factory=Fared)


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """One flagged input to be told at once."""

    build: Callable[[str, int], Alert]


@dataclass(frozen=True, kw_only=True)
class Suspect:
    """One flagged input for the quarantine."""

    x: npt.NDArray[Any]
    about: About


@dataclass(frozen=True, kw_only=True)
class Line:
    """One result for ``[results] topic``."""

    line: dict[str, object]


@dataclass(frozen=True, kw_only=True)
class Swapped:
    """From now on inputs meet this model."""

    running: Running


@dataclass(frozen=True, kw_only=True)
class Stop:
    """No more will come."""


Handed = Closed | Alarm | Line | Swapped | Stop


@dataclass(frozen=True, kw_only=True)
class Pulse:
    """How the loop fares: totals since the start, the median time of one input, and the level of service."""

    inputs: int
    dropped: int
    p50_us: float
    level: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Look:
    """What board and process say of themselves. Reading it takes milliseconds, so this thread does."""

    at_s: float
    board: boards.Board
    resources: resources.Resources

    @classmethod
    def now(cls) -> Look:
        """Look once."""
        return cls(
            at_s=time.monotonic(), board=boards.read(architecture=platform.machine()), resources=resources.read()
        )


@dataclass(kw_only=True)
class _Disk:
    """What the disk has not taken yet."""

    windows: list[Closed] = field(default_factory=list)
    counted: list[str] = field(default_factory=list)
    lines: list[dict[str, object]] = field(default_factory=list)
    retry_at: float = 0.0
    complained_at: float = -COMPLAIN_S
    error: ConfigError | None = None


class Reporter:
    """The thread. Made and started by the agent; everything wrong with its configuration is found before it starts.

    Args:
        config: the agent's.
        boot: id of this process.
        state: what :func:`edgeguard.agent.startup.open_state` found.
        running: the model that runs at first.
        let_go: forgets files that are counted (the folder source's).
        pulse: how the loop fares, for health messages.
        ports: of the microcontrollers that this agent speaks for.

    Raises:
        ConfigError: the spool, the broker's settings, or the results file.
    """

    def __init__(
        self,
        config: AgentConfig,
        *,
        boot: str,
        state: startup.State,
        running: Running,
        let_go: Callable[[Sequence[str]], None],
        pulse: Callable[[], Pulse],
        ports: Sequence[Port] = (),
    ) -> None:
        self._config = config
        self._boot = boot
        self._state = state
        self._let_go = let_go
        self._pulse = pulse
        self._health_at = time.monotonic()
        self.look = Look.now()
        """What board and process said of themselves a second ago at most."""
        self._handed: queue.SimpleQueue[Handed] = queue.SimpleQueue()
        self._suspects: queue.SimpleQueue[Suspect] = queue.SimpleQueue()
        self._lost_lines = 0
        self._unwritten = 0
        self._disk = _Disk()
        self._results = Results(config.results.path) if config.results and config.results.path else None
        self._spool = Spool(config.state_dir / SPOOL_FILE, boot=boot, max_bytes=config.spool.max_mib << 20)
        broker.check_files(config.broker)
        behind = devices_behind(config)
        self._link = Link(
            config.broker,
            fleet=config.fleet,
            device=config.device,
            boot=boot,
            next_session=self._spool.next_session,
            behind=behind,
        )
        self._outflows = {device: Outflow(first_s=config.spool.resend_s) for device in (OWN, *behind)}
        """What one device has under way holds up no other."""
        self._gateway = Gateway(config, ports, boot=boot, spool=self._spool, link=self._link)
        self._models = Succession(config, state, running, board=self._board())
        self._quarantine = _quarantine(config)
        self._activations = Activations(config.state_dir / ACTIVATIONS_FILE)
        self._commands = Commands(
            config.state_dir / COMMANDS_FILE,
            {
                "ping": self._ping,
                "restart": self._restart,
                "rank": lambda command: rank(self._activations.activity(command.model_digest), command),
                "vote": lambda command: vote(self._activations.activity(command.model_digest), command),
                "recalibrate": self._recalibrate,
            },
        )
        self._recalibrator = Recalibrator(config.state_dir / RECALIBRATION_FOLDER)
        self._recalibrating: str | None = None
        """Transaction of the re-calibration at work, until its last word is on disk."""
        self._last_word: Outcome | None = None
        self._drift = drift.resume(None, running.model.metadata)
        self._started_at = time.monotonic()
        self.restart_asked = False
        """True once the hub asked for an end of this process."""
        self._told: Progress | None = None
        """The last that was told of the models."""
        self._stopping = False
        self.failure: BaseException | None = None
        """What ended the thread before it was told to stop."""
        self._thread = threading.Thread(target=self._work, name="reporter", daemon=True)

    @property
    def has_room(self) -> bool:
        """False while so many windows wait for the disk that another one should stay open."""
        return self._unwritten < UNWRITTEN

    @property
    def has_ended(self) -> bool:
        """True once the loop should end: this thread broke, or the hub asked for a restart."""
        return self.failure is not None or self.restart_asked

    def start(self) -> None:
        """Clear up after a killed agent, and start.

        Raises:
            ConfigError: the source cannot let go of what was counted.
        """
        counted = self._spool.consumed()
        if counted:
            log.info("letting go of %d files that were counted before the restart", len(counted))
            self._let_go(counted)
            self._spool.clear_consumed()
        for device in self._spool.devices():
            if device not in self._outflows:
                log.warning("messages of %s wait in the spool, and no [[sources.serial]] is of that name", device)
        self._thread.start()

    def hand(self, what: Handed | Suspect) -> bool:
        """Hand something over. Never waits. False for a line or an input where too much waits: it is lost."""
        if isinstance(what, Suspect):
            if self._suspects.qsize() >= SUSPECTS:
                return False
            self._suspects.put(what)
            return True
        if isinstance(what, Line) and self._handed.qsize() >= WAITING:
            return False
        if isinstance(what, Closed):
            self._unwritten += 1
        self._handed.put(what)
        return True

    def successor(self) -> Running | None:
        """A checked and staged model that is to run from now on; the caller answers with :class:`Swapped`."""
        return self._models.successor()

    @property
    def _running(self) -> Running:
        return self._models.running

    def stop(self) -> None:
        """Write what is there, give the hub ``linger_s`` to acknowledge it, say goodbye.

        Raises:
            ConfigError: the disk refuses what is left.
        """
        self.hand(Stop())
        self._thread.join()
        if self.failure is not None:
            raise self.failure

    def _work(self) -> None:
        try:
            while not self._stopping:
                self._take()
                self._write()
                self._serve_if_possible()
                if time.monotonic() - self.look.at_s >= LOOK_S:
                    self.look = Look.now()
                    if self._quarantine is not None:
                        self._quarantine.tidy()
            self._end()
        except BaseException as error:  # the loop must hear of it, whatever it is
            self.failure = error

    def _take(self) -> None:
        """Take what was handed over, in its order."""
        # No more than what waits now: the loop may hand over as fast as this writes, and the network waits too.
        for _ in range(self._handed.qsize()):
            what = self._handed.get_nowait()
            if isinstance(what, Closed):
                self._disk.windows.append(what)
                self._write()
            elif isinstance(what, Alarm):
                self._alarm(what)
            elif isinstance(what, Line):
                assert self._config.results is not None and self._config.results.topic is not None
                self._link.send(self._config.results.topic, msgspec.json.encode(what.line))
            elif isinstance(what, Swapped):
                self._swapped(what.running)
            else:
                self._stopping = True
        for _ in range(self._suspects.qsize()):
            suspect = self._suspects.get_nowait()
            if self._quarantine is not None:
                self._quarantine.put(suspect.x, suspect.about)

    def _alarm(self, alarm: Alarm) -> None:
        try:
            self._spool.put(alarm.build)
        except ConfigError as error:
            # Its window counts it too.
            self._complain(error)

    def _write(self, *, at_once: bool = False) -> None:
        """Bring to the disk what waits for it; what it refuses is tried again later."""
        disk, now = self._disk, time.monotonic()
        if not (disk.windows or disk.counted or disk.lines) or (now < disk.retry_at and not at_once):
            return
        try:
            while disk.windows:
                closed = disk.windows[0]
                self._spool.put(partial(_report, closed.window, _now_ms()), consumed=closed.files)
                disk.windows.pop(0)
                self._unwritten -= 1
                disk.counted += closed.files
                room = LINES - len(disk.lines)
                disk.lines += closed.lines[:room]
                self._lost_lines += max(0, len(closed.lines) - room)
                if closed.own:
                    self._learn(closed.window)
                    self._watch(closed)
                    if closed.window.identity == Identity.of(self._running.model.metadata):
                        self._models.prove(closed.fared)
            if self._results and disk.lines:
                self._results.write(disk.lines)
            disk.lines = []
            if disk.counted:
                self._let_go(disk.counted)
                self._spool.clear_consumed()
            disk.counted = []
        except ConfigError as error:
            disk.retry_at = now + RETRY_S
            self._complain(error)
        else:
            if disk.error is not None:
                log.info("the disk takes reports again")
            disk.error = None

    def _learn(self, window: Window) -> None:
        """Keep the activations of this device's own model for federated pruning."""
        metadata = self._running.model.metadata
        count, total = window.unflagged()
        if not count or window.identity != Identity.of(metadata):
            return
        self._activations.add(metadata, total, inputs=count)
        try:
            self._activations.save(time.monotonic())
        except ConfigError as error:
            # What is lost on a restart is what was learnt, no report.
            log.warning("%s", error)

    def _watch(self, closed: Closed) -> None:
        """Has the site moved away from the calibration? Said once, and in each health message from then on."""
        metadata = self._running.model.metadata
        if closed.window.identity != Identity.of(metadata):
            return
        before = self._drift.found
        self._drift = drift.resume(self._drift, metadata)
        for score, predicted, flagged in closed.seen:
            p = p_value(score, metadata.score_to_p)
            self._drift = drift.update(self._drift, drift.Observation(p_value=p, predicted=predicted, flagged=flagged))
        if before is None and self._drift.found is not None:
            log.warning("recalibrate: %s", self._drift.found.why)

    def _ping(self, _: Command) -> Outcome:
        uptime = time.monotonic() - self._started_at
        return Outcome(state="ok", result=Alive(boot=self._boot, session=self._link.session, uptime_s=uptime))

    def _restart(self, _: Command) -> Outcome:
        self.restart_asked = True
        return Outcome(state="ok", result=Restarting(boot=self._boot))

    def _recalibrate(self, command: Recalibrate) -> Outcome:
        config, model = self._config.recalibrate, self._running.model
        if config is None:
            return Outcome(state="refused", reason="this device has no [recalibrate] section in its configuration")
        data = self._not_now() or clean_data(command.source, config, model.metadata, self._running.sidecar)
        if isinstance(data, Outcome):
            return data
        self._recalibrator.begin(
            self._state.slots.active(),
            data,
            runtime_name=model.runtime.name,
            timeout_s=config.timeout_s,
            now_s=time.monotonic(),
        )
        self._recalibrating = command.id
        return Outcome(state="ok", result=Recalibration(guard_digest=None), final=False)

    def _not_now(self) -> Outcome | None:
        """The refusal while no re-calibration can begin."""
        if self._recalibrating is not None:
            reason = "a re-calibration is at work already"
        elif self._models.waits or self._stopping:
            reason = "another model is about to run, or the agent to stop"
        elif not self._models.confirmed:
            # It takes the other slot: that of the model to go back to.
            reason = "the model that runs is still on trial"
        else:
            return None
        return Outcome(state="refused", reason=f"{reason}; send it again later")

    def _follow_recalibration(self) -> None:
        """Look at the re-calibration at work, and say what became of it."""
        found = self._recalibrator.step(now_s=time.monotonic())
        if isinstance(found, Outcome):
            self._last_word = found
        elif found is not None:
            try:
                self._models.admit(found)
            except EdgeGuardError as error:
                self._last_word = Outcome(state="failed", reason=str(error))
        if self._recalibrating is not None and self._last_word is not None:
            # On a disk that refuses it raises, and is tried again.
            answer = self._commands.finish(self._recalibrating, self._last_word)
            log.info("re-calibration: %s %s", self._last_word.state, self._last_word.reason)
            self._recalibrating = self._last_word = None
            self._link.publish(answer.channel, answer.payload)

    def _complain(self, error: ConfigError) -> None:
        now = time.monotonic()
        self._disk.error = error
        if now - self._disk.complained_at >= COMPLAIN_S:
            self._disk.complained_at = now
            log.error("inference goes on, but nothing can be recorded: %s", error)

    def _serve_if_possible(self) -> None:
        try:
            self._serve(wait_s=TURN_S)
        except ConfigError as error:
            # A full disk: not even the number of the next connection can be kept.
            self._complain(error)
            time.sleep(TURN_S)

    def _serve(self, wait_s: float) -> None:
        """Look after the network and the update; wait at most ``wait_s`` for something to happen."""
        for event in self._link.poll(wait_s):
            try:
                self._heard(event)
            except ConfigError as error:
                # An ack that the disk did not take is no loss: the hub knows what it has, and says so again.
                self._complain(error)
        now = time.monotonic()
        if not self._stopping:
            self._models.step(now_s=now)
            self._tell()
        if self._link.connected:
            for device, outflow in self._outflows.items():
                for entry in outflow.take(partial(self._spool.pending, device=device), now):
                    channel = topics.REPORT if entry.kind == "report" else topics.ALERT
                    self._link.publish(channel, entry.payload, device=device or None)
            if now - self._health_at >= self._config.health_s:
                self._health_at = now
                self._link.publish(topics.HEALTH, self._health(), qos=0)
        if not self._stopping:
            self._follow_recalibration()
        self._gateway.step(now)

    def _heard(self, event: Event) -> None:
        now = time.monotonic()
        if isinstance(event, Connected):
            self._announce(event.session)
            for outflow in self._outflows.values():
                outflow.restart()
            self._gateway.connected()
        elif isinstance(event, Ack):
            self._acknowledged(OWN, event, now)
        elif isinstance(event, For):
            if isinstance(event.event, Ack):
                self._acknowledged(event.device, event.event, now)
            else:
                self._gateway.heard(event)
        elif isinstance(event, Command):
            answer = self._commands.take(event)
            if answer is not None:
                self._link.publish(answer.channel, answer.payload)
        elif isinstance(event, Hint):
            self._models.hint(event, now_s=now)
            self._tell()

    def _acknowledged(self, device: str, ack: Ack, now_s: float) -> None:
        stored = self._spool.forget(ack, device=device)
        gaps = self._spool.positions(ack.boot, ack.gaps, device=device)
        self._outflows[device].acknowledged(stored, now_s, gaps=gaps)

    def _swapped(self, running: Running) -> None:
        """The inference took the new model."""
        before = self._running.sequence
        self._models.swapped(running)
        self._tell()
        if self._recalibrating is not None and running.sequence == before:
            result = Recalibration(guard_digest=running.model.metadata.guard_digest)
            self._last_word = Outcome(state="ok", result=result)
        if self._link.connected:
            self._announce(self._link.session)

    def _health(self) -> Health:
        pulse = self._pulse()
        return Health(
            session=self._link.session,
            boot=self._boot,
            rss_bytes=self.look.resources.resident_bytes or 0,
            spooled=self._spool.pending_count,
            inputs=pulse.inputs,
            p50_us=pulse.p50_us,
            anonymous_bytes=self.look.resources.anonymous_bytes,
            temperature_c=self.look.board.temperature_c,
            throttled=self.look.board.throttled,
            under_voltage=self.look.board.under_voltage,
            dropped=pulse.dropped + self._lost_lines,
            unwritten=len(self._disk.windows),
            quarantined=None if self._quarantine is None else self._quarantine.count,
            level=pulse.level,
            reason=pulse.reason,
            drift=drift.judge(self._drift).state,
        )

    def _announce(self, session: int) -> None:
        """Publish what is retained: a new connection begins with it."""
        model = self._running.model
        status = Status(state="online", session=session, boot=self._boot)
        self._link.publish(topics.STATUS, status, retain=True)
        there = {
            "commands": True,
            "update": self._config.update,
            "recalibrate": self._config.recalibrate,
            "cascade": self._running.sidecar,
        }
        birth = Birth(
            session=session,
            boot=self._boot,
            edgeguard=edgeguard.__version__,
            python=platform.python_version(),
            board=self._board(),
            runtime=model.runtime.name,
            runtime_version=model.runtime.version,
            model_digest=model.metadata.model_digest,
            guard_digest=model.metadata.guard_digest,
            file_digest=model.file_digest,
            sequence=self._running.sequence,
            detectors=tuple(detector.name for detector in model.metadata.detectors),
            capabilities=tuple(name for name, part in there.items() if part),
        )
        self._link.publish(topics.BIRTH, birth, retain=True)
        self._report_model()

    def _board(self) -> str:
        return (self.look.board.model or platform.machine())[:512]

    def _tell(self) -> None:
        """Publish what became of the hint, once per change."""
        if self._models.told != self._told:
            self._told = self._models.told
            self._report_model()

    def _report_model(self) -> None:
        told, model = self._told, self._running.model
        reported = Reported(
            session=self._link.session,
            boot=self._boot,
            state=told.state if told else "running",
            model_digest=model.metadata.model_digest,
            guard_digest=model.metadata.guard_digest,
            file_digest=model.file_digest,
            sequence=self._running.sequence,
            desired_sequence=told.sequence if told else None,
            reason=told.reason if told else "",
        )
        self._link.publish(topics.MODEL_REPORTED, reported, retain=True)

    def _end(self) -> None:
        self._recalibrator.close()
        while not (self._handed.empty() and self._suspects.empty()):
            self._take()
        self._write(at_once=True)
        deadline = time.monotonic() + self._config.linger_s
        while self._spool.pending_count and time.monotonic() < deadline:
            self._serve_if_possible()
        self._gateway.close()
        self._link.close()
        pending = self._spool.pending_count
        if pending:
            log.warning("%d messages wait in the spool for the next start", pending)
        self._spool.close()
        self._commands.close()
        if self._disk.windows:
            lost = sum(closed.window.inputs for closed in self._disk.windows)
            log.error("%d inputs are in no report; those that lie in a folder stay there", lost)
        if self._disk.windows or self._disk.counted or self._disk.lines:
            self.failure = self._disk.error
        self._models.close()


class Results:
    """``[results] path``: a file with one line of JSON per counted input; a file named ``-`` is standard output.

    Raises:
        ConfigError: it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.write([])

    def write(self, lines: Sequence[dict[str, object]]) -> None:
        """Append lines. Raises ConfigError where they cannot be written."""
        content = msgspec.json.Encoder().encode_lines(lines)
        try:
            if self._path.name == "-":
                sys.stdout.buffer.write(content)
                sys.stdout.buffer.flush()
                return
            with self._path.open("ab", buffering=0) as file:
                before = file.seek(0, os.SEEK_END)
                _write_all(file, content, before)
        except OSError as error:
            raise ConfigError(f"results file {self._path}", got=error.strerror, expected="a writable file") from error


def _write_all(file: RawIOBase, content: bytes, before: int) -> None:
    """Append all of it, or nothing: a part of a line would spoil the next one, and all are written again."""
    try:
        written = file.write(content)
    except OSError:
        file.truncate(before)
        raise
    if written != len(content):
        file.truncate(before)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _quarantine(config: AgentConfig) -> Quarantine | None:
    wanted = config.quarantine
    if wanted is None:
        return None
    return Quarantine(
        wanted.path,
        max_bytes=int(wanted.max_mib * (1 << 20)),
        max_count=wanted.max_inputs,
        max_age_s=wanted.max_days * 86400.0,
    )


def _report(window: Window, ended_ms: int, boot: str, seq: int) -> Report:
    return window.report(boot=boot, seq=seq, ended_ms=ended_ms)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
