"""Decides who is offered a release, who fares well with it, and whether the roll-out goes on, stops or is done. Pure.

Rules enforced here:

* nobody is offered it before the time to object has passed;
* first the canaries: online devices that run the replaced model, spread over boards, runtimes and health, drawn by a
  seed that nobody knew before the model was repaired. Then group after group, each a share of the devices concerned,
  until everybody is offered it. Whoever is in a group stays in it;
* a group begins when the one before fares well: enough of its devices run the release, have done so for the soak, have
  had enough inputs checked, and are no worse than before by their own reports (:mod:`edgeguard.hub.vitals`);
* where more of a group's devices fail than it puts up with, the roll-out is paused. Of canaries none may fail. A device
  fails that keeps refusing, cannot fetch, goes back to the model before, does not answer in time, or fares worse, which
  it then does for good;
* a canary that is there and does not answer in time, or never was there, is replaced; when nobody is left to replace
  it, the roll-out is paused and says why. So no device holds it for ever, and none is put at risk to find out why
  another one failed;
* **what devices say can delay a roll-out, never force it**: a lie stops it until a person has looked, or passes for one
  device among those of which a group needs ``success``. Only all canaries and that share of each group, lying together,
  bring a bad release to the next one;
* devices that are away are offered it too (it is retained), but nothing waits for them; whoever returns later is told
  where to go once, by the shortest way that is settled: see :func:`way`. A device that was there when it was offered
  and then is gone for longer than it has to answer has failed: an update may have taken it off the network;
* where the hub cannot read the released model, it does not know what its guard promises, and the roll-out is paused;
* a device that runs neither the replaced model nor the release is none of its business;
* a hint has no authority, so whoever may write to the topic can replace it: it is repeated until its device answers
  for it, and rarely after that.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain, zip_longest
from typing import Literal

import msgspec

from edgeguard.hub import vitals
from edgeguard.hub.cases import Released
from edgeguard.hub.config import PolicyConfig, RolloutConfig
from edgeguard.hub.ingest import Device, Pulse
from edgeguard.hub.vitals import Counts, Vitals

REPEAT_S = 10.0
"""A hint is repeated this often to a device that has not answered for it."""
REPEAT_ANSWERED_S = 600.0
"""... and to one that has, where it still does not run the release: each repetition makes it try again at once."""
RESERVES = 3
"""So many times the number of canaries are tried in place of those that do not answer."""
_NAMED = 20
_EVERYBODY = "~"
"""Larger than any rank."""

Standing = Literal["away", "offered", "soaking", "healthy", "failed", "dropped"]


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """A device that a release was offered to.

    Attributes:
        group: 0 for a canary.
        offered_ms: since when it has had the time to answer, by the hub's clock.
        before: how it fared until then, None where it never told.
        unwilling_ms: since when it says that it refuses or cannot fetch it.
        updated_ms: when it was first seen to run the release, and ``since`` how it fared until then.
        looks: so many times its reports were held against those before.
        state: "away" is not there and never was since it was offered; "dropped" no longer counts: it was replaced, or
            put up with.
        worse: what got worse, once it did.
    """

    device: str
    group: int
    offered_ms: int
    before: Pulse | None = None
    unwilling_ms: int | None = None
    updated_ms: int | None = None
    since: Pulse | None = None
    looks: int = 0
    state: Standing = "offered"
    worse: str = ""
    reason: str = ""


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What canaries are spread over: ``kind`` is board and runtime, ``strained`` what does not have all it needs."""

    kind: str
    strained: bool = False


@dataclass(frozen=True, kw_only=True)
class Told:
    """What devices counted under the replaced model and under the release, by device; and what the latter promises,
    None where the hub cannot read it."""

    before: Mapping[str, Counts] = field(default_factory=dict)
    since: Mapping[str, Counts] = field(default_factory=dict)
    promised: float | None = 0.0


NOTHING = Told()


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done now.

    Attributes:
        release: the release as the roll-out stands now.
        members: those that are new or changed.
        hints: devices on whose topic the hint must stand.
        text: what happened, where there is something to tell.
        failed: devices that count as failed.
        done: the last group is through.
    """

    release: Released
    members: tuple[Member, ...] = ()
    hints: tuple[str, ...] = ()
    text: str = ""
    failed: tuple[str, ...] = ()
    done: bool = False


def step(
    devices: Sequence[Device],
    members: Iterable[Member],
    release: Released,
    *,
    policy: PolicyConfig,
    config: RolloutConfig,
    now_ms: int,
    traits: Mapping[str, Traits] | None = None,
    told: Told = NOTHING,
) -> Plan:
    """The next step of one roll-out.

    Args:
        devices: all devices of the fleet.
        members: those that it was offered to, as the step before left them.
        release: the release, likewise.
        policy: ``canaries`` and ``veto_s``.
        config: groups, soak and thresholds.
        now_ms: the hub's clock.
        traits: of devices that may become canaries.
        told: what devices reported.
    """
    if now_ms < release.at_ms + policy.veto_s * 1000:
        return Plan(release=release)
    return _Step(devices, members, release, policy, config, now_ms, traits or {}, told).plan()


class _Step:
    """One step: what is known, and what changes."""

    def __init__(
        self,
        devices: Sequence[Device],
        members: Iterable[Member],
        release: Released,
        policy: PolicyConfig,
        config: RolloutConfig,
        now_ms: int,
        traits: Mapping[str, Traits],
        told: Told,
    ) -> None:
        self._devices = {device.device: device for device in devices}
        self._was = {member.device: member for member in members}
        self._members = dict(self._was)
        self._policy, self._config, self._now_ms = policy, config, now_ms
        self._traits, self._told = traits, told
        self._last = len(config.groups)
        group = self._last if release.everyone else min(release.group, self._last)
        through = _EVERYBODY if release.everyone else release.through
        self._release = msgspec.structs.replace(release, group=group, groups=self._last + 1, through=through)
        self._waiting = {d.device: d for d in devices if d.model_digest == release.replaces}
        self._updated = sorted(d.device for d in devices if has(d, release))
        self._text = ""

    def plan(self) -> Plan:
        if self._release.resumed:
            self._resume()
        if not self._release.paused:
            self._join()
        if self._release.group_ms is None and self._members:  # begun by an earlier version
            self._release = msgspec.structs.replace(self._release, group_ms=self._now_ms)
        sizes = Counter(member.group for member in self._members.values() if member.state != "dropped")
        for name, member in self._members.items():
            self._members[name] = self._seen(member, sizes[member.group])
        if self._told.promised is None and not self._release.paused:
            self._pause("the hub cannot read the released model, so nobody can say how devices fare with it")
        done = False if self._release.paused else self._go_on()
        failed = [m for m in self._members.values() if m.state == "failed"]
        hints = () if self._release.paused else self._hints()
        listed = {name: self._held(name) for name in sorted({*hints, *(member.device for member in failed)})}
        return Plan(
            release=msgspec.structs.replace(
                self._release,
                canaries=tuple(sorted(m.device for m in self._members.values() if m.group == 0)),
                everyone=self._release.group == self._last,
                updated=tuple(self._updated),
                held=tuple(f"{name}: {reason}" for name, reason in listed.items())[:_NAMED],
                counts=dict(sorted(Counter(member.state for member in self._members.values()).items())),
            ),
            members=tuple(m for name, m in self._members.items() if self._was.get(name) != m),
            hints=hints,
            text=self._text,
            failed=tuple(sorted(member.device for member in failed)),
            done=done,
        )

    # -- who is in it

    def _resume(self) -> None:
        """What failed until now is put up with, and who has yet to answer gets the time to."""
        for name, member in self._members.items():
            if member.state == "failed":
                self._members[name] = msgspec.structs.replace(member, state="dropped")
            elif member.state in ("offered", "soaking"):
                self._members[name] = msgspec.structs.replace(member, offered_ms=self._now_ms)
        self._release = msgspec.structs.replace(self._release, resumed=False, group_ms=self._now_ms)

    def _join(self) -> None:
        """Offer it to those whose turn it is."""
        for name in self._release.canaries:  # also of a roll-out that an earlier version began
            self._offer(name, 0)
        if self._release.group == 0:
            self._choose_canaries()
            return
        for name in self._waiting:
            if rank(name, self._release) <= self._release.through:
                self._offer(name, self._release.group)

    def _choose_canaries(self) -> None:
        counted = [m for m in self._members.values() if m.group == 0 and m.state != "dropped"]
        room = self._policy.canaries * (1 + RESERVES) - len(self._members)
        missing = min(self._policy.canaries - len(counted), room)
        free = {n: self._traits.get(n, Traits(kind="")) for n, d in self._waiting.items() if d.online}
        taken = [self._traits[m.device].kind for m in counted if m.device in self._traits]
        fresh = {name: traits for name, traits in free.items() if name not in self._members}
        if missing <= 0 or not fresh:
            return
        for name in spread(fresh, missing, self._release, taken=taken):
            self._offer(name, 0)
        if self._release.group_ms is None:
            names = ", ".join(sorted(self._members))
            self._text = f"release {self._release.sequence} goes to {names} first"
        self._release = msgspec.structs.replace(self._release, group_ms=self._now_ms)

    def _offer(self, name: str, group: int) -> None:
        device = self._devices.get(name)
        if device is not None and name not in self._members:
            self._members[name] = Member(
                device=name, group=group, offered_ms=self._now_ms, before=device.pulse,
                state="offered" if device.online else "away",
            )  # fmt: skip

    # -- how they fare

    def _seen(self, member: Member, size: int) -> Member:
        """A member after what its device last said."""
        device = self._devices.get(member.device)
        if device is None or member.state == "dropped":
            return member
        if has(device, self._release):
            return self._running(member, device, size)
        unwilling = device.outcome in ("refused", "failed") and device.outcome_sequence == self._release.sequence
        unwilling_ms = (member.unwilling_ms or self._now_ms) if unwilling else None
        member = msgspec.structs.replace(member, unwilling_ms=unwilling_ms)
        state, reason = self._not_running(member, device)
        offered_ms = self._now_ms if member.state == "away" and state == "offered" else member.offered_ms
        return msgspec.structs.replace(member, state=state, reason=reason, offered_ms=offered_ms)

    def _running(self, member: Member, device: Device, size: int) -> Member:
        if member.updated_ms is None:
            member = msgspec.structs.replace(
                member, state="soaking", reason="", updated_ms=self._now_ms, since=device.pulse
            )
        updated_ms = member.updated_ms if member.updated_ms is not None else self._now_ms
        elapsed_s = (self._now_ms - updated_ms) / 1000
        since = self._since(member, device, elapsed_s)
        enough = elapsed_s >= self._config.soak_s and device.online and since.inputs >= self._config.min_inputs
        look = _looks(elapsed_s, self._config, earned=enough or member.state == "healthy")
        promised = self._told.promised
        if promised is not None and look > member.looks and not member.worse:
            level = self._config.false_alarm / (self._last + 1) / max(1, size)
            found = vitals.worse(self._before(member), since, promised=promised, level=level, look=look)
            member = msgspec.structs.replace(member, looks=look, worse="; ".join(found))
        if member.worse:
            return msgspec.structs.replace(member, state="failed", reason=member.worse)
        if member.state == "healthy":
            return member
        if enough and promised is not None:
            return msgspec.structs.replace(member, state="healthy", reason="")
        waited_s = (self._now_ms - max(updated_ms, member.offered_ms)) / 1000
        if waited_s < self._config.soak_s + self._config.timeout_s:
            return msgspec.structs.replace(member, state="soaking", reason="")
        reason = f"{since.inputs} inputs checked since its update" if device.online else "gone since its update"
        return msgspec.structs.replace(member, state="failed", reason=reason)

    def _not_running(self, member: Member, device: Device) -> tuple[Standing, str]:
        if device.model_digest != self._release.replaces:
            return "dropped", "runs another model"
        if member.updated_ms is not None:
            return "failed", "went back to the model before" + (f" ({device.reason})" if device.reason else "")
        if member.unwilling_ms is not None:
            patient = (self._now_ms - member.unwilling_ms) / 1000 < self._config.patience_s
            return "offered" if patient else "failed", f"{device.outcome} ({device.reason})"
        if member.state == "away":
            return ("offered", "") if device.online else ("away", device.state)
        if (self._now_ms - member.offered_ms) / 1000 < self._config.timeout_s:
            return "offered", "" if device.online else device.state
        return "failed", f"no answer in {self._config.timeout_s:g} s" if device.online else "gone since it was offered"

    def _before(self, member: Member) -> Vitals:
        pulse = member.before
        if pulse is None:
            return Vitals(counts=self._told.before.get(member.device, {}))
        return Vitals(
            counts=self._told.before.get(member.device, {}),
            starts=pulse.starts,
            seconds=(member.offered_ms - pulse.since_ms) / 1000,
            latencies=pulse.latencies,
        )

    def _since(self, member: Member, device: Device, elapsed_s: float) -> Vitals:
        counts = self._told.since.get(member.device, {})
        now, then = device.pulse, member.since
        if now is None or then is None:
            return Vitals(counts=counts)
        new = now.readings - then.readings
        return Vitals(
            counts=counts,
            starts=now.starts - then.starts,
            seconds=elapsed_s,
            latencies=now.latencies[-new:] if new > 0 else (),
        )

    # -- whether it goes on

    def _go_on(self) -> bool:
        """Pause, or begin the next group where this one is through. True when the last one is."""
        for group in range(self._release.group + 1):
            mine = self._counted(group)
            failed = [member for member in mine if member.state == "failed"]
            if group == 0 and self._release.group == 0:
                failed = self._replaced(failed)
            if len(failed) > self._thresholds(group)[1] * len(mine):
                who = "; ".join(f"{member.device}: {member.reason}" for member in failed[:5])
                self._pause(f"{len(failed)} of {len(mine)} devices of {_called(group)} failed: {who}")
                return False
        return self._advance(self._counted(self._release.group))

    def _counted(self, group: int) -> list[Member]:
        """The members of a group that count: who is away has not taken any harm, nor proved anything."""
        return [m for m in self._members.values() if m.group == group and m.state not in ("away", "dropped")]

    def _thresholds(self, group: int) -> tuple[float, float]:
        if group == 0:
            return 1.0, 0.0
        return self._config.groups[group - 1].success, self._config.groups[group - 1].error

    def _replaced(self, failed: list[Member]) -> list[Member]:
        """Drop canaries that did not answer in time where others can take their place; those left of the failed."""
        began_ms = self._release.group_ms if self._release.group_ms is not None else self._now_ms
        late = (self._now_ms - began_ms) / 1000 >= self._config.timeout_s
        mine = [m for m in self._members.values() if m.group == 0 and m.state != "dropped" and m.updated_ms is None]
        silent = [m for m in mine if (late and m.state == "away") or m.reason.startswith("no answer")]
        free = [n for n, d in self._waiting.items() if d.online and n not in self._members]
        room = self._policy.canaries * (1 + RESERVES) - len(self._members)
        if not silent:
            return failed
        if free and room > 0:
            for member in silent:
                reason = member.reason or "no answer"
                self._members[member.device] = msgspec.structs.replace(member, state="dropped", reason=reason)
            names = ", ".join(member.device for member in silent)
            self._choose_canaries()
            self._text = f"{names} did not answer: other canaries take their place"
        elif all(member.state == "away" for member in silent) and not self._counted(0):
            self._pause(f"no canary answered in {self._config.timeout_s:g} s, and nobody is left to take their place")
        return [member for member in failed if self._members[member.device].state == "failed"]

    def _advance(self, mine: list[Member]) -> bool:
        release = self._release
        if release.group_ms is None:
            return False
        late = (self._now_ms - release.group_ms) / 1000 >= self._config.timeout_s
        if release.group == 0 and not late and any(m.group == 0 and m.state == "away" for m in self._members.values()):
            return False
        healthy = sum(member.state == "healthy" for member in mine)
        success = self._thresholds(release.group)[0]
        open_ = any(member.state in ("offered", "soaking") for member in mine)
        enough = bool(mine) and healthy >= success * len(mine)
        if release.group == self._last:
            waits = any(d.online and n not in self._members for n, d in self._waiting.items())
            if (enough or not mine) and not open_ and not waits and self._updated:
                return True
        elif enough:
            self._begin_next()
            return False
        if mine and not open_ and not enough:
            self._pause(f"{healthy} of {len(mine)} devices of {_called(release.group)} fare well, {success:.0%} must")
        elif not mine and late and release.group not in (0, self._last):
            self._pause(f"no device of {_called(release.group)} answered in {self._config.timeout_s:g} s")
        elif not mine and release.group == 0 and all(m.state == "dropped" for m in self._members.values()):
            self._pause("nobody is left to be a canary")
        return False

    def _begin_next(self) -> None:
        """Begin the next group that somebody online is in; the last one where nobody is."""
        there = [n for n, d in self._devices.items() if d.online and (n in self._waiting or has(d, self._release))]
        ranks = sorted(rank(name, self._release) for name in there)
        for group in range(self._release.group + 1, self._last + 1):
            count = math.ceil(self._config.groups[group - 1].share * len(ranks))
            through = _EVERYBODY if group == self._last else max(self._release.through, ranks[count - 1])
            new = [name for name in there if name in self._waiting and name not in self._members]
            new = [name for name in new if rank(name, self._release) <= through]
            if new or group == self._last:
                break
        self._release = msgspec.structs.replace(
            self._release, group=group, through=through, group_ms=self._now_ms, everyone=group == self._last
        )
        whom = "the whole fleet" if group == self._last else f"{self._config.groups[group - 1].share:.0%} of the fleet"
        self._text = f"release {self._release.sequence} goes to {whom}: {len(new)} devices more"
        self._join()

    def _pause(self, why: str) -> None:
        self._release = msgspec.structs.replace(self._release, paused=why)
        self._text = f"release {self._release.sequence} is paused: {why}"

    # -- what is said

    def _hints(self) -> tuple[str, ...]:
        if self._release.group == self._last:
            return tuple(sorted(self._waiting))
        return tuple(
            name for name in sorted(self._waiting)
            if name in self._members and self._members[name].state != "dropped"
        )  # fmt: skip

    def _held(self, name: str) -> str:
        member = self._members.get(name)
        if member is not None and member.reason:
            return member.reason
        device = self._devices[name]
        return "hinted" if device.online else device.state


def _called(group: int) -> str:
    return "the canaries" if group == 0 else f"group {group}"


def has(device: Device, release: Released) -> bool:
    """True for a device that runs the release or one that came after it."""
    return device.model_digest == release.model_digest or (
        device.model_digest != release.replaces and device.sequence > release.sequence
    )


def _looks(elapsed_s: float, config: RolloutConfig, *, earned: bool) -> int:
    """The number of the last look that is due: one more than the time asks for once there is enough to call a device
    healthy, so that nothing is called so unseen."""
    return vitals.looks(elapsed_s, config.soak_s) + earned


def asks(members: Iterable[Member], config: RolloutConfig, now_ms: int) -> bool:
    """Whether the next step will look at what devices counted; reading that takes long in a large fleet."""
    running = [(m, (now_ms - m.updated_ms) / 1000) for m in members if m.updated_ms is not None and not m.worse]
    return any(
        m.state == "soaking" or _looks(elapsed_s, config, earned=m.state == "healthy") > m.looks
        for m, elapsed_s in running
    )


def rank(device: str, release: Released) -> str:
    """A device's place in the order of a roll-out: its name says nothing of it, and another release draws anew."""
    return sha256(f"{release.model_digest} {release.sequence} {device}".encode()).hexdigest()


def spread(free: Mapping[str, Traits], count: int, release: Released, *, taken: Iterable[str] = ()) -> tuple[str, ...]:
    """Choose canaries: kinds of devices in turn, the most frequent first; of each kind one that has all it needs, then
    one that has not, and so on, in the order of their ranks.

    Args:
        free: who may be chosen.
        count: so many, or all there are.
        release: draws the order.
        taken: the kinds of those chosen before: others come first.
    """
    kinds: dict[str, list[str]] = {}
    for kind in {traits.kind for traits in free.values()}:
        ranked = sorted((n for n, t in free.items() if t.kind == kind), key=lambda name: rank(name, release))
        well, strained = ([n for n in ranked if free[n].strained == is_so] for is_so in (False, True))
        kinds[kind] = [name for name in chain.from_iterable(zip_longest(well, strained)) if name is not None]
    before = Counter(taken)
    order = sorted(kinds, key=lambda kind: (before[kind], -len(kinds[kind]), rank(kind, release)))
    rounds = zip_longest(*(kinds[kind] for kind in order))
    return tuple(name for name in chain.from_iterable(rounds) if name is not None)[:count]


def repeat_after_s(device: Device, release: Released) -> float:
    """How long a hint may stand before it is published again, infinite for a device that is not there to hear it.

    An answer under the number of the release may still be one to somebody else's hint that bore this number.
    """
    if not device.online:
        return math.inf
    return REPEAT_ANSWERED_S if device.outcome_sequence == release.sequence else REPEAT_S


def way(model_digest: str, settled: Iterable[Released]) -> tuple[Released, ...]:
    """The releases that lead from a model to the one that it is to run now, in their order; empty where it runs it.

    Args:
        model_digest: what a device runs.
        settled: releases whose roll-out is through, or which bring an earlier model back.
    """
    steps: list[Released] = []
    for release in sorted(settled, key=lambda release: release.sequence):
        if release.replaces == model_digest:
            steps.append(release)
            model_digest = release.model_digest
    return tuple(steps)


def taken_back(devices: Sequence[Device], back: Released, *, timeout_s: float, now_ms: int) -> tuple[Released, bool]:
    """How far a roll-back is, and whether it is done: those that are there run the earlier model, or will not.

    Args:
        devices: all devices of the fleet.
        back: the release that brings the earlier model back.
        timeout_s: seconds that a device which is there has to answer.
        now_ms: the hub's clock.
    """
    still = sorted((d for d in devices if d.model_digest == back.replaces), key=lambda d: (not d.online, d.device))
    left = [d for d in still if d.online]
    answered = [d for d in left if d.outcome in ("refused", "failed") and d.outcome_sequence == back.sequence]
    late = now_ms - back.at_ms >= timeout_s * 1000
    names = {d.device: f"{d.device}: {d.outcome} ({d.reason})" for d in answered}
    held = tuple(names.get(d.device, f"{d.device}: {'hinted' if d.online else d.state}") for d in still)[:_NAMED]
    # Whoever never took the release runs the earlier model under its old number.
    updated = tuple(sorted(d.device for d in devices if has(d, back) and d.sequence >= back.sequence))
    return msgspec.structs.replace(back, updated=updated, held=held), late or len(answered) == len(left)
