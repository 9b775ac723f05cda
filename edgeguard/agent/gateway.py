"""The gateway's side of its microcontrollers: each is a device of its own at the hub. Runs in the reporter's thread.

Rules enforced here:

* a microcontroller is ``<gateway>~<name>``, by the port that it is on, whatever it calls itself;
* its reports and alerts go to the spool under its own boot and number, and are acknowledged to it after that commit.
  What the spool does not take now, and reports beyond ``REPORTS_PER_MINUTE``, wait with it: nothing is lost here;
* each time that it comes it has a new session, and so it has when this gateway connects anew: a status says under which
  of the gateway's sessions it holds, and the hub lets it end with that;
* a command of the hub reaches it once at most, and its reply is on disk before it is sent and before the
  microcontroller may forget it. Commands that it does not know are refused here;
* a release is fetched and verified as this device's own are, and its file is the one that was signed; only then is it
  offered. It counts as updated when the microcontroller says that its self-test passed, and one that failed its trial
  too often is not offered again;
* a release with other features, detectors or kind of calibration is refused: the firmware's tables would misread it;
* a hint holds until the next one: an offer that is not staged yet is withdrawn where the hub wants another or none.

What a microcontroller says is hostile: numbers are bounded, and what does not fit is dropped and counted.
"""

from __future__ import annotations

import hashlib
import logging
import math
import secrets
import subprocess
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal

import msgspec

from edgeguard import disk
from edgeguard.agent import mcu
from edgeguard.agent.admission import Fetched, Question, ask
from edgeguard.agent.commands import FILE, Commands, Outcome
from edgeguard.agent.config import AgentConfig
from edgeguard.agent.link import For, Hint, Link
from edgeguard.agent.mcu import Offer, Reliable
from edgeguard.agent.sources.serial import Port
from edgeguard.agent.spool import Spool
from edgeguard.agent.trial import Trial
from edgeguard.agent.update import Progress, Updater, clear
from edgeguard.agent.window import AlertLimit
from edgeguard.contract import messages, topics
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Ack, Alert, Birth, Command, Health, Report, Reported, Status
from edgeguard.detection import metadata, runtime, sidecar
from edgeguard.errors import ConfigError, ModelError, TrustError
from firmware_bridge.link import messages as wire

FOLDER = "mcu"
RUNTIME = "microcontroller"
REPORTS_PER_MINUTE = 120
WAITING = 64
"""While so much of one microcontroller waits for the disk, or for its turn, its line is not read any further."""
TRIALS = 2
"""A model that failed so many trials there is not offered again."""
TRIAL_S = 180.0
"""So long a model that was handed over may be on trial before its microcontroller says what became of it."""
_OFFERED, _RUNNING = "offered.tflite", "running.tflite"
_LARGEST = 2**53
_LARGEST_SCORE = 3.4028234663852886e38
_MAX_SEQUENCE = 2**32 - 1

log = logging.getLogger(__name__)


class Gateway:
    """All microcontrollers of one agent.

    Args:
        config: the agent's.
        ports: one for each ``[[sources.serial]]``.
        boot: id of this process.
        spool: where reports wait for the hub.
        link: the connection, which knows these devices.

    Raises:
        ConfigError: the state folder cannot be written.
    """

    def __init__(self, config: AgentConfig, ports: Sequence[Port], *, boot: str, spool: Spool, link: Link) -> None:
        self._behind = {
            device: _Microcontroller(config, port, device, boot=boot, spool=spool, link=link)
            for device, port in zip(devices(config), ports, strict=True)
        }

    def connected(self) -> None:
        """The connection is new, and this gateway has said that it is online."""
        for one in self._behind.values():
            one.connected()

    def heard(self, what: For) -> None:
        """The hub says something to a microcontroller; acks are not for here. Raises ConfigError on a bad disk."""
        self._behind[what.device].heard(what.event)

    def step(self, now_s: float) -> None:
        """See what the lines brought, and go on. Never waits.

        Raises:
            ConfigError: the disk refuses something; it is tried again at the next step.
        """
        errors = []
        for one in self._behind.values():
            try:
                one.step(now_s)
            except ConfigError as error:
                errors.append(error)
        if errors:
            raise errors[0]

    def close(self) -> None:
        """Let go of files and children."""
        for one in self._behind.values():
            one.close()


def devices(config: AgentConfig) -> tuple[str, ...]:
    """What the microcontrollers are called at the hub."""
    return tuple(f"{config.device}~{port.name}" for port in config.sources.serial)


class _Microcontroller:
    """One of them."""

    def __init__(self, config: AgentConfig, port: Port, device: str, *, boot: str, spool: Spool, link: Link) -> None:
        self._config = config
        self._port = port
        self._device = device
        self._gateway_boot = boot
        self._spool = spool
        self._link = link
        self._folder = folder = config.state_dir / FOLDER / port.name
        self._model = next(one.model for one in config.sources.serial if one.name == port.name)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"folder {folder}", got=error.strerror, expected="a folder to write in") from error
        self._commands = Commands(folder / FILE, {"ping": self._ping, "restart": self._restart})
        self._asked: dict[int, Command] = {}
        self._updater: Updater | None = None
        self._failed: tuple[str, ...] = ()
        """Of the file that failed its trials: it need not be fetched again."""
        self._trial = Trial(folder / "trial.json", starts=TRIALS)
        self._hint: Hint | None = None
        """The last one; ``_hinted``: the updater has it."""
        self._hinted = False
        self._offered: Fetched | None = None
        self._staged_s: float | None = None
        self._told: Progress | None = None
        self._hello: wire.Hello | None = None
        self._present = False
        self._session = 0
        now_s = time.monotonic()
        self._health_s = -math.inf
        self._reports = AlertLimit.full(REPORTS_PER_MINUTE, now_s)
        self._alerts = AlertLimit.full(config.alerts.per_minute, now_s)
        self._waiting: deque[tuple[int | None, Callable[[float], bool]]] = deque()

    def close(self) -> None:
        """Let go of files and children."""
        if self._updater is not None:
            self._updater.close()
        self._commands.close()

    def connected(self) -> None:
        """Whatever waits, the hub hears first whether it is there."""
        self._waiting.appendleft((None, self._announced))

    def _announced(self, _: float) -> bool:
        """Say what is retained under a new session: whether it is there, and what it is and runs."""
        self._session = self._spool.next_session()
        self._say(topics.STATUS, self._status("online" if self._present else "offline"), retain=True)
        if self._present and self._hello is not None:
            self._say(topics.BIRTH, birth_of(self._hello, self._session), retain=True)
            self._report_model()
        return True

    def heard(self, event: Ack | Hint | Command) -> None:
        """The hub says something."""
        if isinstance(event, Command):
            answer = self._commands.take(event)
            if answer is not None:
                self._link.publish(answer.channel, answer.payload, device=self._device)
        elif isinstance(event, Hint):
            self._hint, self._hinted = event, False

    def step(self, now_s: float) -> None:
        """See what the line brought, keep it, and look after the release."""
        if len(self._waiting) < WAITING:
            for event in self._port.events():
                self._take(event, now_s)
        while self._waiting:
            ticket, act = self._waiting[0]
            if not act(now_s):
                break
            self._waiting.popleft()
            if ticket is not None:
                self._port.keep(ticket)
        self._update(now_s)

    def _take(self, event: mcu.Event, now_s: float) -> None:
        if isinstance(event, mcu.Came):
            self._came(event.hello, now_s)
        elif isinstance(event, mcu.Gone):
            log.warning("%s: gone, silent for %g s or with foreign firmware", self._device, mcu.SILENCE_S)
            self._present = False
            self._say(topics.STATUS, self._status("offline"), retain=True)
        elif isinstance(event, mcu.Foreign):
            what = f"message definitions {event.schema:08x} instead of {wire.SCHEMA:08x}"
            log.error("%s: its firmware has %s; build it anew with this gateway's library", self._device, what)
        elif isinstance(event, mcu.Told):
            self._waiting.append((event.ticket, self._to_keep(event.message)))
        elif isinstance(event, mcu.Unanswered):
            outcome = Outcome(state="failed", reason=event.reason)
            self._waiting.append((None, lambda _: self._answer(event.transaction, lambda _: outcome)))
        elif isinstance(event, mcu.Alive):
            self._health(event.health, now_s)
        elif isinstance(event, mcu.Moved):
            log.info("%s: the model goes over from byte %d of %d on", self._device, event.offset, event.size)
        else:
            self._transferred(event, now_s)

    def _came(self, hello: wire.Hello, now_s: float) -> None:
        log.info("%s: there, boot %016x, release %d", self._device, hello.boot, hello.sequence)
        if self._updater is None or self._hello is None or self._hello.board != hello.board:
            if self._updater is not None:
                self._updater.close()
            self._updater = Updater(
                self._config.update,
                self._folder / "update",
                examine=self._examine,
                known=lambda: (0, self._failed),
                board=hello.board,
                runtime=RUNTIME,
            )
            self._hinted = False
        self._hello, self._present = hello, True
        self._waiting.append((None, self._announced))
        offered = self._offered
        if offered is None:
            return
        if hello.file_digest.hex() == offered.file_digest:
            # It runs there already, whether or not it was heard that all of it had arrived.
            self._port.withdraw()
            self._staged_s = now_s
            if hello.standing is wire.Standing.CONFIRMED:
                self._waiting.append((None, partial(self._judge, hello.standing, offered.file_digest)))
        elif self._staged_s is not None:
            self._waiting.append((None, partial(self._judge, wire.Standing.REVERTED, offered.file_digest)))

    def _to_keep(self, message: Reliable) -> Callable[[float], bool]:
        """What is done once with a message before it is acknowledged; it says False where that is not possible now."""
        assert self._hello is not None
        if isinstance(message, wire.Report):
            return partial(self._keep_report, report_of(message, self._hello))
        if isinstance(message, wire.Alert):
            return partial(self._keep_alert, alert_of(message, self._hello))
        if isinstance(message, wire.Reply):
            return lambda _: self._answer(message.transaction, lambda command: self._outcome(message, command))
        return lambda now_s: self._judge(message.standing, message.file_digest.hex(), now_s)

    def _keep_report(self, report: Report, now_s: float) -> bool:
        allowed, limit = self._reports.take(now_s)
        if allowed:
            self._spool.keep(self._device, report)
        self._reports = limit
        return allowed

    def _keep_alert(self, alert: Alert | None, now_s: float) -> bool:
        allowed, limit = self._alerts.take(now_s)
        if alert is None:
            log.warning("%s: an alert with scores that its detectors do not explain is dropped", self._device)
        elif allowed:
            self._spool.keep(self._device, alert)
        self._alerts = limit
        return True  # its window counts it too

    def _ping(self, command: Command) -> Outcome | None:
        return self._ask(command, wire.Order.PING)

    def _restart(self, command: Command) -> Outcome | None:
        return self._ask(command, wire.Order.RESTART)

    def _ask(self, command: Command, order: wire.Order) -> Outcome | None:
        if not self._present:
            return Outcome(state="refused", reason="the microcontroller is not there; send it again later")
        transaction = secrets.randbits(32)
        self._asked[transaction] = command
        self._port.ask(transaction, order)
        return None

    def _answer(self, transaction: int, outcome: Callable[[Command], Outcome]) -> bool:
        """Store and send the last word on a command. One that nobody waits for is none."""
        command = self._asked.get(transaction)
        if command is not None:
            answer = self._commands.finish(command.id, outcome(command))
            del self._asked[transaction]
            self._link.publish(answer.channel, answer.payload, device=self._device)
        return True

    def _outcome(self, reply: wire.Reply, command: Command) -> Outcome:
        assert self._hello is not None
        if reply.outcome is not wire.Outcome.OK:
            state: Literal["refused", "failed"] = "refused" if reply.outcome is wire.Outcome.REFUSED else "failed"
            return Outcome(state=state, reason=f"the microcontroller says: {state}")
        boot = boot_of(self._hello)
        result: msgspec.Struct = messages.Restarting(boot=boot)
        if command.name == messages.Ping.name:
            result = messages.Alive(boot=boot, session=self._session, uptime_s=reply.uptime_ms / 1000)
        return Outcome(state="ok", result=result)

    def _health(self, health: wire.Health, now_s: float) -> None:
        if self._hello is None or now_s - self._health_s < self._config.health_s:
            return
        self._health_s = now_s
        waiting = self._spool.pending_of(self._device)
        self._say(topics.HEALTH, health_of(health, self._hello, session=self._session, spooled=waiting), qos=0)

    def _update(self, now_s: float) -> None:
        """Follow the hint, while the microcontroller is there and its present model proved itself."""
        hello, updater = self._hello, self._updater
        if self._offered is not None and self._staged_s is not None and now_s - self._staged_s > TRIAL_S:
            self._defer(self._offered, "failed", "it was not heard of since the hand-over", now_s)
        if self._offered is not None and self._staged_s is None and self._hint is not None:
            desired = self._hint.desired
            if desired is None or desired.sequence != self._offered.sequence:
                log.info("%s: release %d is withdrawn", self._device, self._offered.sequence)
                self._port.withdraw()
                self._offered = None
        if updater is None or hello is None or not self._present or self._offered is not None:
            return
        if hello.standing is wire.Standing.TRIAL:
            return
        if self._hint is not None and not self._hinted:
            self._hinted = True
            self._tell(updater.hint(self._hint, running_sequence=hello.sequence, now_s=now_s))
        progress = updater.step(model_digest=hello.model_digest.hex(), running_sequence=hello.sequence, now_s=now_s)
        if isinstance(progress, Fetched):
            self._offer(progress, hello, now_s)
        else:
            self._tell(progress)

    def _offer(self, fetched: Fetched, hello: wire.Hello, now_s: float) -> None:
        """Hand a verified release over; on any doubt the microcontroller keeps what it has."""
        try:
            content = self._checked(fetched, hello)
        except (TrustError, ModelError) as error:
            self._defer(fetched, "refused", str(error), now_s)
        except (ConfigError, OSError) as error:
            self._defer(fetched, "failed", str(error), now_s)
        else:
            self._offered, self._staged_s = fetched, None
            log.info("%s: release %d is offered, %d bytes", self._device, fetched.sequence, len(content))
            self._port.offer(
                Offer(
                    content=content,
                    model_digest=fetched.model_digest,
                    guard_digest=fetched.guard_digest,
                    sequence=fetched.sequence,
                )
            )
        finally:
            clear(fetched)

    def _examine(self, fetched: Fetched) -> subprocess.Popen[bytes]:
        """Start the check of a fetched file against what runs there. Raises ConfigError where that is not here."""
        assert self._hello is not None
        digest = self._hello.file_digest.hex()
        running = self._running(digest)
        question = Question.of(
            fetched,
            running=running,
            running_digest=digest,
            held=(str(sidecar.path_beside(running)),),
            runtime=runtime.choose(self._config.runtime.name),
            threads=self._config.runtime.threads,
        )
        return ask(question, self._folder / "question.json")

    def _running(self, digest: str) -> Path:
        """A copy of the model that runs there: what was handed over last, or what the operator named."""
        for path in (self._folder / _RUNNING, self._folder / _OFFERED, self._model):
            if path is not None and _digest(path) == digest:
                return path
        raise ConfigError(
            f"check of a release for {self._device}",
            got="no copy of the model that runs there",
            expected=f"a file of SHA-256 {digest}",
            do="name it as model in its [[sources.serial]]",
        )

    def _checked(self, fetched: Fetched, hello: wire.Hello) -> bytes:
        """The fetched file. Raises TrustError or ModelError where it is not what was signed, or of no use there."""
        if self._trial.failed(fetched.file_digest):
            self._failed = (fetched.file_digest,)
            raise ModelError("release", got="one that failed its trials there", do="release a repaired one")
        content = fetched.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest != fetched.file_digest:
            raise TrustError("fetched model", got=f"SHA-256 {digest}", expected=fetched.file_digest)
        if len(content) > hello.slot_bytes:
            raise ModelError("release", got=f"{len(content)} bytes", expected=f"at most {hello.slot_bytes} there")
        if fetched.sequence > _MAX_SEQUENCE:
            raise ModelError("release", got=f"sequence {fetched.sequence}", expected=f"at most {_MAX_SEQUENCE}")
        running = self._running(hello.file_digest.hex()).read_bytes()
        check_firmware(metadata.read(content), metadata.read(running))
        # The next release is checked against this one, once it runs. An earlier one's sidecar is none of its own.
        beside = sidecar.path_beside(self._folder / _OFFERED)
        beside.unlink(missing_ok=True)
        disk.write(self._folder / _OFFERED, content)
        if fetched.sidecar is not None:
            disk.write(beside, fetched.sidecar.read_bytes())
        return content

    def _transferred(self, ended: mcu.Ended, now_s: float) -> None:
        """A transfer is over."""
        offered = self._offered
        if offered is None or offered.file_digest != ended.file_digest:
            return
        if ended.state == "staged":
            self._staged_s = now_s
        else:
            self._defer(offered, ended.state, ended.reason, now_s)

    def _judge(self, standing: wire.Standing, file_digest: str, now_s: float) -> bool:
        """What became of a trial. Said of a file that is not on offer it may still settle what runs."""
        hello, offered = self._hello, self._offered
        mine = offered is not None and offered.file_digest == file_digest
        if standing is wire.Standing.REVERTED:
            # Before it was staged this is news of an earlier trial of the same file.
            if mine and offered is not None and self._staged_s is not None:
                self._trial.begin(file_digest)
                self._defer(offered, "refused", "it failed its trial there; the model before it runs", now_s)
            return True
        if hello is not None and hello.file_digest.hex() == file_digest:
            self._trial.end(file_digest)
            self._keep_copy(file_digest)
            self._hello = msgspec.structs.replace(hello, standing=wire.Standing.CONFIRMED)
            if self._updater is not None:
                self._updater.settle(hello.sequence)
            self._tell(Progress(state="updated", sequence=hello.sequence))
            if mine:
                self._offered = self._staged_s = None
        return True

    def _keep_copy(self, file_digest: str) -> None:
        """The model that was handed over runs there now."""
        offered, running = self._folder / _OFFERED, self._folder / _RUNNING
        if _digest(offered) == file_digest:
            try:
                with suppress(FileNotFoundError):
                    sidecar.path_beside(offered).replace(sidecar.path_beside(running))
                offered.replace(running)
            except OSError as error:
                raise ConfigError(f"folder {self._folder}", got=error.strerror, expected="one to write in") from error

    def _defer(self, fetched: Fetched, state: Literal["refused", "failed"], reason: str, now_s: float) -> None:
        self._offered = self._staged_s = None
        assert self._updater is not None
        self._tell(self._updater.defer(fetched.sequence, state, reason, now_s=now_s))

    def _tell(self, progress: Progress | None) -> None:
        """Publish what became of the hint, once per change."""
        if progress is not None and progress != self._told:
            log.info("%s: release %d %s %s", self._device, progress.sequence, progress.state, progress.reason)
            self._told = progress
            self._report_model()

    def _report_model(self) -> None:
        hello, told = self._hello, self._told
        if hello is None:
            return
        reported = Reported(
            session=self._session,
            boot=boot_of(hello),
            state=told.state if told else "running",
            model_digest=hello.model_digest.hex(),
            guard_digest=hello.guard_digest.hex(),
            file_digest=hello.file_digest.hex(),
            sequence=hello.sequence,
            desired_sequence=told.sequence if told else None,
            reason=told.reason if told else "",
        )
        self._say(topics.MODEL_REPORTED, reported, retain=True)

    def _status(self, state: Literal["online", "offline"]) -> Status:
        boot = boot_of(self._hello) if self._hello is not None else self._gateway_boot
        return Status(state=state, session=self._session, boot=boot, via=self._link.session)

    def _say(self, channel: str, message: messages.Message, *, qos: int = 1, retain: bool = False) -> None:
        self._link.publish(channel, message, device=self._device, qos=qos, retain=retain)


def _digest(path: Path) -> str | None:
    with suppress(OSError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    return None


def check_firmware(new: GuardMetadata, running: GuardMetadata) -> None:
    """Refuse a release whose scores the firmware would misread: it was built for the features and detectors that run.

    Raises:
        ModelError: it has others, or only one of the two is calibrated on made-up inputs.
    """
    for what, brought, there in (
        ("features", new.feature_count, running.feature_count),
        ("detectors", [one.name for one in new.detectors], [one.name for one in running.detectors]),
        ("made-up calibration", new.calibration.synthetic, running.calibration.synthetic),
    ):
        if brought != there:
            raise ModelError(
                f"release: {what}",
                got=brought,
                expected=f"{there}, as the firmware was built for",
                do="build and flash firmware with the new model",
            )


def boot_of(hello: wire.Hello) -> str:
    """The id of a start, as the hub has it."""
    return f"{hello.boot:016x}"


def report_of(report: wire.Report, hello: wire.Hello) -> Report:
    """A window as the hub takes it."""
    moved = None
    if report.channels:
        channels = tuple(
            messages.MovedChannel(channel=one.channel, inputs=one.inputs, excess=one.excess) for one in report.channels
        )
        moved = messages.Moved(label=report.evidence_label, inputs=report.evidence, channels=channels)
    return Report(
        boot=boot_of(hello),
        seq=report.number,
        model_digest=hello.model_digest.hex(),
        guard_digest=hello.guard_digest.hex(),
        started_ms=min(report.started_ms, _LARGEST),
        ended_ms=min(report.ended_ms, _LARGEST),
        inputs=report.inputs,
        unchecked=report.unchecked,
        labels=tuple(
            messages.LabelCount(label=one.label, inputs=one.inputs, flagged=one.flagged) for one in report.labels
        ),
        histogram=report.histogram,
        moved=moved,
    )


def alert_of(alert: wire.Alert, hello: wire.Hello) -> Alert | None:
    """An alert as the hub takes it; None where its scores are not those of the detectors."""
    names = hello.detectors.split(",")
    if len(names) != len(alert.scores):
        return None
    # JSON has no infinity; a score that overflowed is still a flagged one.
    scores = [max(-_LARGEST_SCORE, min(score, _LARGEST_SCORE)) for score in alert.scores]
    return Alert(
        boot=boot_of(hello),
        seq=alert.number,
        model_digest=hello.model_digest.hex(),
        guard_digest=hello.guard_digest.hex(),
        at_ms=min(alert.at_ms, _LARGEST),
        label=alert.label,
        score=max(scores),
        scores=dict(zip(names, scores, strict=True)),
    )


def birth_of(hello: wire.Hello, session: int) -> Birth:
    """What a microcontroller is, as the hub takes it. It has no Python."""
    there = {"commands": True, "update": hello.slot_bytes > 0}
    return Birth(
        session=session,
        boot=boot_of(hello),
        edgeguard=hello.library,
        python="",
        board=hello.board,
        runtime=RUNTIME,
        runtime_version="",
        model_digest=hello.model_digest.hex(),
        guard_digest=hello.guard_digest.hex(),
        file_digest=hello.file_digest.hex(),
        sequence=hello.sequence,
        detectors=tuple(hello.detectors.split(",")),
        capabilities=tuple(name for name, part in there.items() if part),
    )


def health_of(health: wire.Health, hello: wire.Hello, *, session: int, spooled: int) -> Health:
    """How a microcontroller fares, as the hub takes it; ``spooled``: of its messages, at the gateway."""
    return Health(
        session=session,
        boot=boot_of(hello),
        rss_bytes=None,
        spooled=spooled,
        inputs=health.inputs,
        p50_us=float(health.inference_us or 0),
        dropped=health.lost,
    )
