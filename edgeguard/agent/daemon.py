"""The agent's loop: takes inputs from the sources, runs the guarded model, gives outcomes back, fills windows.

Rules enforced here:

* nothing here waits for a disk or a network: that is the reporter's work, in a thread of its own;
* a window closes between two items, so that an item is counted by exactly one report; a model is exchanged there too,
  so that every input meets exactly one model;
* systemd's watchdog is fed by completed inputs and by nothing else. A loop without inputs runs a self-test now and
  then, through the same path.
"""

from __future__ import annotations

import gc
import logging
import os
import secrets
import selectors
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.agent import governor, startup
from edgeguard.agent.config import AgentConfig
from edgeguard.agent.inference import Engine, Running, line_of, policy_of, result_of
from edgeguard.agent.quarantine import About
from edgeguard.agent.reporter import LINES, Alarm, Closed, Line, Pulse, Reporter, Seen, Suspect, Swapped
from edgeguard.agent.sources.base import Answer, Item, Refused, Told
from edgeguard.agent.sources.folder import NAME as FOLDER
from edgeguard.agent.sources.serial import SerialSource
from edgeguard.agent.trial import Fared, count
from edgeguard.agent.window import MAX_CELLS, AlertLimit, Identity, Window, alert_builder
from edgeguard.contract.frames import Result
from edgeguard.contract.scores import joint
from edgeguard.detection.cascade import Budget
from edgeguard.detection.verdict import Verdict, judge
from firmware_bridge.systemd import Notifier, Watchdog

IDLE_S = 0.2
"""How long the loop sleeps at most when no input waits; a source wakes it earlier."""
WINDOWS = 5
"""Models that may be reported about at once: this device's own, and those of programs with interpreters of theirs."""
TOLD_CELLS = 1 << 20
"""Labels times features of a window of another program's model."""
GOVERN_S = 1.0

log = logging.getLogger(__name__)


class Agent:
    """One device. Everything that can be wrong with its configuration is found here, before it starts.

    Raises:
        ConfigError: a source, the spool, the broker's settings, or another agent on the same state folder.
        ModelError: the first model cannot be used.
        TrustError: the installed model is damaged, and there is no other.
    """

    def __init__(self, config: AgentConfig) -> None:
        self._config = config
        state, running = startup.open_state(config)
        startup.check_root(config.update)
        self._engine = self._engine_of(running)
        self._sources = startup.open_sources(config, running.model.metadata.input)
        self._reporter = Reporter(
            config,
            boot=secrets.token_hex(8),
            state=state,
            running=running,
            let_go=self._let_go,
            pulse=self._pulse,
            ports=[port for source in self._sources if isinstance(source, SerialSource) for port in source.ports],
        )
        self._selector = selectors.DefaultSelector()
        self._notifier = Notifier(os.environ)
        self._watchdog = Watchdog.from_environment(os.environ, os.getpid())
        self._windows: dict[tuple[Identity, bool], Window] = {}
        self._windows_at = time.monotonic()
        self._files: list[str] = []
        self._lines: list[dict[str, object]] = []
        self._seen: list[Seen] = []
        self._fared = Fared()
        full = AlertLimit.full(config.alerts.per_minute, time.monotonic())
        self._alerts = {True: full, False: full}
        """Of what this agent ran, and of what it was told: neither takes the other's place."""
        self._governor, self._governor_state = _governor(config), governor.State()
        self._governed = (time.monotonic(), 0.0, 0)
        self._durations: deque[float] = deque(maxlen=512)
        self._reason = ""
        self.inputs = 0
        self.dropped = 0
        """Results and foreign scores that there was no room for."""
        self._turn = 0

    def run(self, stopping: Callable[[], bool]) -> None:
        """Work until ``stopping`` says so, or until every source has ended.

        Raises:
            ConfigError: the disk refuses what is left. What lies in a folder and is not counted stays there.
        """
        running = self._engine.running
        self._reporter.start()
        for source in self._sources:
            source.open(self._selector)
        log.info(
            "agent %s/%s runs model %s, sequence %d, on %s %s; inputs from %s",
            self._config.fleet,
            self._config.device,
            running.model.metadata.model_digest[:12],
            running.sequence,
            running.model.runtime.name,
            running.model.runtime.version,
            ", ".join(source.name for source in self._sources),
        )
        gc.freeze()  # what is loaded by now stays: walking it again and again would hold up inputs
        self._notifier.ready()
        wait_s = 0.0
        while not (stopping() or self._reporter.has_ended or self._has_ended()):
            for key, mask in self._selector.select(wait_s):
                key.data.ready(key, mask)
            taken = self._next()
            if isinstance(taken, Item):
                self._process(taken)
            elif isinstance(taken, Told):
                self._count_told(taken)
            self._between()
            wait_s = 0.0 if taken is not None else self._idle_s()
        self._stop()

    def _next(self) -> Item | Told | Refused | None:
        """What is next; the sources take turns."""
        for _ in self._sources:
            self._turn = (self._turn + 1) % len(self._sources)
            taken = self._sources[self._turn].take()
            if taken is not None:
                return taken
        return None

    def _has_ended(self) -> bool:
        """True when nothing can come any more. A folder ends only where the configuration says so."""
        folder = self._config.sources.folder
        return all(
            source.ended and (source.name != FOLDER or (folder is not None and folder.stop_at_end))
            for source in self._sources
        )

    def _process(self, item: Item) -> None:
        """Run an item's inputs, one by one."""
        metadata = self._engine.running.model.metadata
        window = self._window(Identity.of(metadata), metadata.feature_count, own=True)
        source = self._sources[self._turn]
        for index, x in enumerate(item.inputs):
            started = time.perf_counter()
            inference, verdict = self._engine.infer(x)
            self._durations.append(time.perf_counter() - started)
            result, body = result_of(item.name, inference, verdict, policy_of(verdict, self._config.policy))
            source.answer(Answer(item=item, result=result, body=body))
            if inference is None:
                window.add_unchecked()
            else:
                window.add(verdict, inference.features)
                self._see(verdict)
            self._fared = count(self._fared, inference, verdict, x)
            if verdict.flagged:
                self._alarm(verdict, window.identity, own=True)
                self._quarantine(x, verdict, result, window.identity)
            if self._config.results is not None:
                self._tell(line_of(item.source, item.name, index, result))
            if inference is not None:
                self._completed()
        self.inputs += len(item.inputs)
        if item.source == FOLDER:
            self._files.append(item.name)

    def _see(self, verdict: Verdict) -> None:
        if verdict.status != "not checked" and len(self._seen) < LINES:
            self._seen.append(Seen(joint(verdict.scores.values()), verdict.predicted, verdict.flagged))

    def _count_told(self, told: Told) -> None:
        """Count what a program's own interpreter scored: in a window of its own, whatever model it says that was."""
        scored = told.scored
        identity = Identity(scored.model_digest, scored.guard_digest)
        known = (identity, False) in self._windows
        if not known and len(self._windows) >= WINDOWS and self._reporter.has_room:
            self._close_windows()
        if not known and len(self._windows) >= WINDOWS:
            self.dropped += 1
            return
        window = self._window(identity, len(told.features), own=False)
        if window.size != len(told.features):
            self.dropped += 1
            return
        scores = {n: float("nan") if s is None else s for n, s in zip(scored.detectors, scored.scores, strict=True)}
        verdict = judge(scored.predicted, scores)
        window.add(verdict, told.features)
        self.inputs += 1
        if verdict.flagged:
            self._alarm(verdict, identity, own=False)

    def _window(self, identity: Identity, size: int, *, own: bool) -> Window:
        """The open window of a model; what this agent ran itself is never mixed with what it was told."""
        window = self._windows.get((identity, own))
        if window is None:
            if not self._windows:
                self._windows_at = time.monotonic()
            cells = MAX_CELLS if own else TOLD_CELLS
            window = Window(identity, size, started_ms=time.time_ns() // 1_000_000, max_cells=cells)
            self._windows[identity, own] = window
        return window

    def _alarm(self, verdict: Verdict, identity: Identity, *, own: bool) -> None:
        allowed, self._alerts[own] = self._alerts[own].take(time.monotonic())
        if allowed:
            at_ms = time.time_ns() // 1_000_000
            self._reporter.hand(Alarm(build=alert_builder(verdict, identity, at_ms=at_ms)))

    def _quarantine(self, x: npt.NDArray[Any], verdict: Verdict, result: Result, identity: Identity) -> None:
        if self._config.quarantine is None:
            return
        about = About(
            at_ms=time.time_ns() // 1_000_000,
            predicted=verdict.predicted,
            scores=result.scores,
            p_value=result.p_value,
            model_digest=identity.model_digest,
            guard_digest=identity.guard_digest,
        )
        self.dropped += not self._reporter.hand(Suspect(x=x.copy(), about=about))

    def _tell(self, line: dict[str, object]) -> None:
        results = self._config.results
        assert results is not None
        if results.topic is not None:
            self.dropped += not self._reporter.hand(Line(line=line))
        if results.path is not None:
            if len(self._lines) < LINES:
                self._lines.append(line)
            else:
                self.dropped += 1

    def _completed(self) -> None:
        if self._watchdog is not None and self._watchdog.completed(time.monotonic()):
            self._notifier.watchdog()

    def _self_test(self) -> None:
        """No input was completed for long: run one of nobody's, which is not counted and gets no further look."""
        if self._watchdog is not None and self._watchdog.self_test_due(time.monotonic()):
            expected = self._engine.running.model.metadata.input
            self._engine.running.model.infer(np.zeros(expected.shape, expected.dtype))
            self._completed()

    def _idle_s(self) -> float:
        """Nothing waits: how long the loop may sleep, in seconds."""
        return IDLE_S if self._watchdog is None else min(IDLE_S, self._watchdog.wait_s(time.monotonic()))

    def _between(self) -> None:
        """What happens between two items: self-test, windows, the next model, the budget."""
        self._self_test()
        now = time.monotonic()
        limit = self._config.window
        if self._windows and self._reporter.has_room:
            full = sum(window.inputs for window in self._windows.values()) >= limit.inputs
            if full or now - self._windows_at >= limit.seconds:
                self._close_windows()
        successor = self._reporter.successor()
        if successor is not None:
            self._close_windows()
            self._engine = self._engine_of(successor)
            self._durations.clear()
            self._reporter.hand(Swapped(running=successor))
        if now - self._governed[0] >= GOVERN_S:
            self._govern(now)

    def _close_windows(self) -> None:
        """Hand over what is open. The files and lines go with the window of this device's own model."""
        for (_, own), window in self._windows.items():
            if not own:
                self._reporter.hand(Closed(window=window, own=False))
                continue
            files, lines, seen = tuple(self._files), tuple(self._lines), tuple(self._seen)
            fared, self._fared = self._fared, Fared()
            self._reporter.hand(Closed(window=window, files=files, lines=lines, seen=seen, fared=fared))
            self._files, self._lines, self._seen = [], [], []
        self._windows = {}

    def _govern(self, now: float) -> None:
        """Look at what the guard takes, and do less or more."""
        before_at, before_s, before_n = self._governed
        elapsed, engine = now - before_at, self._engine
        self._governed = (now, engine.extra_s, engine.extra_inferences)
        look = self._reporter.look
        readings = governor.Readings(
            at_s=now,
            cpu_share=max(0.0, engine.extra_s - before_s) / elapsed,
            inferences_per_s=max(0, engine.extra_inferences - before_n) / elapsed,
            memory_bytes=look.resources.anonymous_bytes,
            temperature_c=look.board.temperature_c,
            throttled=look.board.throttled,
        )
        self._governor_state, step = self._governor.step(self._governor_state, readings)
        engine.level = self._governor_state.level
        if step is not None:
            log.warning("level of service %s (before: %s): %s", step.level.name, step.previous.name, step.reason)
            self._reason = "" if step.level is governor.Level.EVERYTHING else step.reason
            self._notifier.status(f"{step.level.name}: {step.reason}")

    def _engine_of(self, running: Running) -> Engine:
        budget = self._config.budget
        return Engine(
            running,
            budget=Budget(per_second=budget.inferences_per_second, burst=budget.burst),
            audit_share=budget.audit_share,
            rng=np.random.default_rng(),
        )

    def _let_go(self, names: Sequence[str]) -> None:
        for source in self._sources:
            if source.name == FOLDER:
                source.counted(names)

    def _pulse(self) -> Pulse:
        durations = list(self._durations)
        return Pulse(
            inputs=self.inputs,
            dropped=self.dropped + sum(source.dropped for source in self._sources),
            p50_us=statistics.median(durations) * 1e6 if durations else 0.0,
            level=self._engine.level.name.lower(),
            reason=self._reason,
        )

    def _stop(self) -> None:
        self._notifier.stopping()
        for source in self._sources:
            source.close()
        self._close_windows()
        try:
            self._reporter.stop()
        finally:
            self._selector.close()
            self._notifier.close()
        log.info("stopped after %d inputs", self.inputs)


def _governor(config: AgentConfig) -> governor.Governor:
    budget = config.budget
    return governor.Governor(
        limits=governor.Limits(
            cpu_share=budget.cpu_share,
            memory_bytes=None if budget.memory_mib is None else int(budget.memory_mib * (1 << 20)),
            temperature_c=budget.temperature_c,
        )
    )
