"""Which model runs next: what a release, a trial or a re-calibration does to the slots, and what is told of it.

The reporter's thread calls this; the loop only takes a ``successor`` between two inputs, and answers ``swapped``. Rules
enforced here:

* a new model is opened, and run once, before the loop sees it, so that the loop itself loads nothing and runs nothing
  but inputs. It is run when its first start is on disk and the record names it: what kills the process is counted;
* one model waits for the loop at most; until it was taken nothing else is begun;
* a newer release may take the place of one that is on trial: a device without inputs would wait for ever. The way back
  stays the model before, until the newer one proved itself;
* the record on disk says which model runs. Where it names another one than this process runs, as after a rename that
  the disk carried out but did not confirm, that one is taken;
* *updated* is told once the release runs, and *refused* once the one before runs again.
"""

from __future__ import annotations

import logging
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from edgeguard.agent import admission, recalibration, startup
from edgeguard.agent.admission import Fetched, Question
from edgeguard.agent.config import AgentConfig
from edgeguard.agent.inference import Running
from edgeguard.agent.link import Hint
from edgeguard.agent.recalibration import Calibrated
from edgeguard.agent.trial import NEEDED, Fared, judge
from edgeguard.agent.update import Progress, Updater, clear, install
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ConfigError, EdgeGuardError, ModelError, TrustError
from edgeguard.release.client import FetchRequest, spawn_fetch
from firmware_bridge.slots import Slot

UPDATE_FOLDER = "update"

log = logging.getLogger(__name__)


class Succession:
    """The models of one device, one after the other. Time is passed in, in seconds of any steady clock.

    Args:
        config: the agent's.
        state: what :func:`edgeguard.agent.startup.open_state` found.
        running: the model that runs at first.
        board: this board's name.
        spawn: starts a fetch.
        ask: starts the check of a fetched file.
    """

    def __init__(
        self,
        config: AgentConfig,
        state: startup.State,
        running: Running,
        *,
        board: str = "",
        spawn: Callable[[FetchRequest], subprocess.Popen[bytes]] = spawn_fetch,
        ask: Callable[[Question, Path], subprocess.Popen[bytes]] = admission.ask,
    ) -> None:
        self._config = config
        self._slots, self._trial, self._load = state.slots, state.trial, state.load
        self._ask = ask
        self.running = running
        """The model that the loop runs."""
        self.told: Progress | None = None
        """The last that became of a hint."""
        self.confirmed = False
        """The model that runs proved itself."""
        self.waits = False
        """A model waits for the loop."""
        self._successor: Running | None = None
        self._given_up: Progress | None = None
        """What is told once the model before runs again."""
        self._fared = state.trial.fared(running.model.file_digest)
        """Of the model that runs, while it is on trial."""
        self._updater = Updater(
            config.update,
            config.state_dir / UPDATE_FOLDER,
            examine=self._examine,
            known=lambda: (self._slots.highest, self._slots.failed),
            spawn=spawn,
            board=board,
            runtime=running.model.runtime.name,
        )
        self._look_back()

    def hint(self, hint: Hint, *, now_s: float) -> None:
        """Take what the hub says waits."""
        self._tell(self._updater.hint(hint, running_sequence=self.running.sequence, now_s=now_s))

    def step(self, *, now_s: float) -> None:
        """Go on with the update that is under way; on any doubt the model that runs stays. Never waits."""
        if self.waits:
            return
        found = self._updater.step(
            model_digest=self.running.model.metadata.model_digest,
            running_sequence=self.running.sequence,
            now_s=now_s,
        )
        if isinstance(found, Fetched):
            self._install(found, now_s)
        else:
            self._tell(found)

    def successor(self) -> Running | None:
        """A model that is to run from now on; the caller answers with :meth:`swapped`. Any thread may ask."""
        found, self._successor = self._successor, None
        return found

    def swapped(self, running: Running) -> None:
        """Inputs meet this model from now on."""
        is_release = running.sequence > self.running.sequence
        given_up, self._given_up = self._given_up, None
        self.running, self.waits, self._fared = running, False, Fared()
        self._look_back()
        self._updater.settle(running.sequence)
        if given_up is not None and running.sequence < given_up.sequence:
            # Where the numbers are the same, it is the release itself that runs again, as it was calibrated before.
            self._tell(given_up)
        elif is_release:
            self._tell(Progress(state="updated", sequence=running.sequence))

    def prove(self, seen: Fared) -> None:
        """Judge a model on trial by what it did with real inputs, in a window that it ran alone."""
        if self.confirmed or self.waits:
            return
        update = self._config.update
        self._fared = self._fared.seen(healthy=seen.healthy, sick=seen.sick)
        found = judge(self._fared, needed=update.trial_inputs if update else NEEDED)
        file_digest = self.running.model.file_digest
        try:
            if self._slots.digest != file_digest:
                self._take(self._slots.active())
            elif found == "revert":
                self._give_up()
            elif found == "confirm":
                self._slots.confirm()
                self.confirmed = True
                startup.tidy(self._slots, self.running.model.metadata)
                self._trial.end(file_digest)
            elif seen.healthy or seen.sick:
                self._trial.seen(file_digest, self._fared, healthy=not seen.sick)
        except EdgeGuardError as error:
            log.warning("the trial of the model of sequence %d goes on: %s", self.running.sequence, error)

    def admit(self, done: Calibrated) -> None:
        """Check and stage a re-calibrated model. Raises EdgeGuardError on any doubt; then the old one runs on."""
        model = recalibration.admit(done, self.running.model, load=self._load)
        try:
            slot = self._slots.stage_local(
                done.content,
                made_of=done.made_of,
                guard_digest=model.metadata.guard_digest,
                sidecar=None if done.sidecar is None else self._slots.keep(done.sidecar),
                anchor=self._anchor(done.made_of),
            )
            self._trial.first(slot.sha256)
            self._slots.activate(slot)
            self._warm(model)
        except EdgeGuardError:
            self._look_back()
            raise
        self._offer(model, slot.sequence)

    def close(self) -> None:
        """End the child at work; the agent stops as told, which does not count against a model on trial.

        Raises ConfigError if that cannot be written.
        """
        self._updater.close()
        self._trial.end(self.running.model.file_digest)

    def _look_back(self) -> None:
        """Has the model that runs proved itself?"""
        try:
            self.confirmed = self._slots.confirmed and self._slots.digest == self.running.model.file_digest
        except EdgeGuardError as error:
            log.warning("%s", error)
            self.confirmed = False

    def _anchor(self, slot: Slot) -> str | None:
        """Digest of the sidecar that repairs are held against while the model in this slot runs."""
        return slot.anchor or self.running.model.metadata.sidecar_digest

    def _examine(self, fetched: Fetched) -> subprocess.Popen[bytes]:
        """Start the check of a fetched file in a child. Raises what says that it cannot be."""
        model = self.running.model
        slot = self._slots.holding(model.file_digest)
        anchor = self._anchor(slot)
        question = Question.of(
            fetched,
            running=slot.path,
            running_digest=slot.sha256,
            anchor=anchor,
            held=startup.places_of_sidecar(self._config, anchor) if anchor else (),
            runtime=model.runtime.name,
            threads=self._config.runtime.threads,
        )
        return self._ask(question, self._config.state_dir / UPDATE_FOLDER / "question.json")

    def _install(self, fetched: Fetched, now_s: float) -> None:
        """Put a fetched and checked model in place; on any doubt the one that runs stays."""
        try:
            running = install(
                fetched,
                self._slots,
                trial=self._trial,
                load=self._load,
                anchor=self._anchor(self._slots.holding(self.running.model.file_digest)),
                sidecar_of=partial(startup.sidecar_of, self._config),
            )
            self._warm(running.model)
        except (TrustError, ModelError) as error:
            self._look_back()
            self._tell(self._updater.defer(fetched.sequence, "refused", str(error), now_s=now_s))
        except ConfigError as error:
            self._look_back()
            self._tell(self._updater.defer(fetched.sequence, "failed", str(error), now_s=now_s))
        else:
            self._successor, self.waits = running, True
            clear(fetched)

    def _give_up(self) -> None:
        """The model on trial has failed: let the one before it run again. Raises EdgeGuardError if it cannot."""
        seen, self._fared = self._fared, Fared()
        reason = f"on trial here, {seen.sick} of {seen.healthy + seen.sick} inputs could not be scored"
        self._given_up = Progress(state="refused", sequence=self.running.sequence, reason=reason)
        self._take(self._slots.revert(reason, has_failed=True))

    def _take(self, slot: Slot) -> None:
        """Let the loop take the model that the record names. Raises EdgeGuardError if it does not load."""
        model = self._load(self._slots.read(slot))
        _run_once(model)
        self._offer(model, slot.sequence)

    def _warm(self, model: GuardedModel) -> None:
        """Run a model that was just put in place; where that fails, the one before stays. Raises EdgeGuardError."""
        try:
            _run_once(model)
        except ModelError as error:
            self._slots.revert(str(error), has_failed=True)
            raise

    def _offer(self, model: GuardedModel, sequence: int) -> None:
        held = startup.sidecar_of(self._config, model.metadata)
        self._successor, self.waits = Running(model=model, sidecar=held, sequence=sequence), True

    def _tell(self, progress: Progress | None) -> None:
        if progress is not None and progress != self.told:
            log.info("model of sequence %d: %s %s", progress.sequence, progress.state, progress.reason)
            self.told = progress


def _run_once(model: GuardedModel) -> None:
    """The first inference takes longer. Raises ModelError as ``infer``."""
    expected = model.metadata.input
    model.infer(np.zeros(expected.shape, expected.dtype))
