"""A fleet, day by day for a year: what its devices count, what liars among them claim, and a hub that inspects.

Everything is drawn from one seed. The hub's side is the real one (:mod:`edgeguard.hub.policy` and
:mod:`edgeguard.hub.trust`); it sees the counts and nothing else. What is assumed of the world:

* each class's true flag rate is drawn from what the calibration leaves open: with r of n calibration inputs of the
  class flagged, Beta(r + 1, n - r + 1), never the nominal rate;
* a share of the devices may have fitted the guard anew, all to one small calibration set: its joint rate is what an
  order statistic of 200 inputs leaves open, and it falls on the classes as it likes;
* devices differ by a lognormal factor of their own, by one for each class, and by one a day; none of these is the
  detector's own beta-binomial law;
* volume and rate swing over the year ("night"); for a month the whole fleet drifts, for another one site;
* now and then a device looks at something odd for a day, and a few sensors are broken;
* a suspicion that was rejected comes up again by the hub's own rule, :func:`edgeguard.hub.cases.is_news`;
* an inspection confirms a backdoor that is there with ``1 - MISSED``, and one that is not with
  ``FALSELY_CONFIRMED``. It takes a day, and there is one at a time for a model.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import GuardMetadata
from edgeguard.detection.statistics import rate_upper
from edgeguard.hub import cases, policy, trust
from edgeguard.hub.cases import Case
from edgeguard.hub.config import PolicyConfig
from edgeguard.hub.evidence import LabelCounts
from edgeguard.hub.trust import Trust
from tests.simulators.fleet import guard_metadata

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Lie = Literal["none", "silent", "shouting", "framing", "scattered", "copying", "dripping"]

MISSED = 0.1
FALSELY_CONFIRMED = 0.02
KEPT = 15
"""Days that the hub keeps apart; what is older is one sum."""
FIRST_DAY = 20_000
DAY_MS = 86_400_000
SITES = 20


@dataclass(frozen=True, kw_only=True)
class Trigger:
    """A backdoor in the model: from ``day`` on, ``share`` of the devices meet its trigger ``rate`` times a day."""

    label: int
    day: int
    share: float
    rate: float
    detected: float = 0.9
    """The share of triggered inputs that are flagged."""


@dataclass(frozen=True, kw_only=True)
class World:
    """One model in one fleet for a year.

    ``lie``: what ``liars`` (a share of the devices) do: *silent* ones report no flag; *shouting* ones flag half of
    everything; *framing* ones together claim an excess in one class; *scattered* ones each in another class; *copying*
    ones report what an honest device counted, and a modest excess in one class; *dripping* ones know everything that
    the hub knows, and frame a class in groups just large enough to be heard, until it is rejected.
    """

    seed: int
    devices: int
    classes: int = 10
    calibration: int = 2000
    volume: float = 1000.0
    days: int = 365
    trigger: Trigger | None = None
    liars: float = 0.0
    lie: Lie = "none"
    recalibrated: float = 0.0
    disturbed: bool = True
    """Night, drift, odd days and broken sensors."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """One inspection for ``label``, begun on ``day``; ``liars`` of the ``devices`` behind it lie."""

    day: int
    label: int
    devices: int
    liars: int
    confirmed: bool


class Year:
    """Runs a world day by day. :meth:`run` returns the inspections; ``findings`` the kinds and subjects found."""

    def __init__(self, world: World, config: PolicyConfig | None = None) -> None:
        self.world = world
        self.config = config or PolicyConfig()
        self.findings: set[tuple[str, str]] = set()
        self.trust: dict[str, Trust] = {}
        self._rng = rng = np.random.default_rng([world.seed, world.devices, world.classes])
        common = rng.dirichlet(np.full(world.classes, 3.0))
        seen = rng.multinomial(world.calibration, common)
        flagged = rng.binomial(seen, np.minimum(rng.gamma(2.0, 0.005, world.classes), 0.5))
        self.rates: Floats = rng.beta(flagged + 1.0, seen - flagged + 1.0)
        upper = tuple(rate_upper(int(r), int(n)) for r, n in zip(flagged, seen, strict=True))
        self.guard: GuardMetadata = msgspec.structs.replace(guard_metadata(classes=world.classes), fpr_upper=upper)
        size = (world.devices, world.classes)
        own = np.random.default_rng([world.seed, 1])
        self.recalibrated = own.permutation(world.devices) < round(world.recalibrated * world.devices)
        weight = own.gamma(0.5, 2.0, world.classes)
        self.own_rates: Floats = own.beta(2.0, 199.0) * weight / (common @ weight)
        mix = common * rng.gamma(4.0, 0.25, size)
        self._volume: Floats = mix / mix.sum(axis=1, keepdims=True) * world.volume * _factor(rng, 0.5, (size[0], 1))
        self._factor: Floats = _factor(rng, 0.3, (size[0], 1)) * _factor(rng, 0.3, size)
        self.lies = rng.permutation(world.devices) < round(world.liars * world.devices)
        self.sees = np.zeros(world.devices, dtype=bool)
        if world.trigger is not None:
            honest = np.flatnonzero(~self.lies)
            chosen = round(world.trigger.share * honest.size)
            self.sees[rng.choice(honest, chosen, replace=False)] = True
        self._broken = (rng.random(world.devices) < 0.001) & ~self.lies & world.disturbed
        self._kept: deque[tuple[Counts, Counts]] = deque()
        self._older = (np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64))
        self._framed = int(rng.integers(world.classes))
        self._own_frame = rng.integers(world.classes, size=world.devices)
        self._dripping = np.zeros(world.devices, dtype=bool)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Ids of the devices; what stands before the hyphen is the site."""
        return tuple(f"site{i % SITES:02d}-{i:05d}" for i in range(self.world.devices))

    def run(self, *, until_case: bool = False, first_look: int = 0) -> list[Inspection]:
        """All inspections from day ``first_look`` on, or those up to the first of the backdoor that confirms it."""
        inspections: list[Inspection] = []
        known: list[Case] = []
        for day in range(self.world.days):
            now_ms = (FIRST_DAY + day) * DAY_MS
            self._count(day)
            if day < first_look:
                continue
            standing = trust.standing(self.trust, now_ms)
            found = self.assess(day, standing)
            first = next((s for s in found.suspicions if cases.is_news(s, known, now_ms=now_ms)), None)
            if first is None:
                continue
            case = cases.open_case(first, model="", label_name="", at_ms=now_ms)
            known.append(msgspec.structs.replace(case, state="dismissed"))
            confirmed = self._inspect(first.label, day)
            named = frozenset(first.devices)
            liars = sum(name in named for name, lies in zip(self.names, self.lies, strict=True) if lies)
            inspections.append(
                Inspection(day=day, label=first.label, devices=len(named), liars=liars, confirmed=confirmed)
            )
            if confirmed and until_case and self._is_target(first.label, day):
                break
            # After a false case too: the model would have been repaired, and the fleet looked at anew.
            self.trust |= trust.after_rejection(self.trust, first.devices, now_ms)
            self._framed = int(self._rng.integers(self.world.classes))
            self._dripping[:] = False
        return inspections

    def assess(self, day: int, standing: Mapping[str, Trust] | None = None) -> policy.Assessment:
        """What the hub makes of the counts up to this day."""
        found = policy.assess(
            self.counts(day),
            self.config,
            guard=self.guard,
            devices=self.world.devices,
            trust=standing or {},
            now_epoch=FIRST_DAY + day,
        )
        self.findings |= {(finding.kind, finding.subject) for finding in found.findings}
        return found

    def counts(self, day: int) -> LabelCounts:
        """What the store would return."""
        epochs = [0, *(FIRST_DAY + day - age for age in reversed(range(len(self._kept))))]
        tables = [self._older, *self._kept]
        size = self._older[0].size
        device, label = np.divmod(np.arange(size), self.world.classes)
        return LabelCounts(
            devices=self.names,
            device=np.tile(device, len(tables)),
            label=np.tile(label, len(tables)),
            epoch=np.repeat(np.asarray(epochs, dtype=np.int64), size),
            inputs=np.concatenate([inputs.ravel() for inputs, _ in tables]),
            flagged=np.concatenate([flagged.ravel() for _, flagged in tables]),
            recalibrated=frozenset(name for name, own in zip(self.names, self.recalibrated, strict=True) if own),
        )

    def _inspect(self, label: int, day: int) -> bool:
        chance = 1.0 - MISSED if self._is_target(label, day) else FALSELY_CONFIRMED
        return bool(self._rng.random() < chance)

    def _is_target(self, label: int, day: int) -> bool:
        trigger = self.world.trigger
        return trigger is not None and label == trigger.label and day >= trigger.day

    def _count(self, day: int) -> None:
        """Draw one more day."""
        rng, world = self._rng, self.world
        swing = np.sin(2 * np.pi * day / 365) if world.disturbed else 0.0
        rates = np.where(self.recalibrated[:, None], self.own_rates, self.rates)
        rate = rates * self._factor * _factor(rng, 0.2, (world.devices, 1)) * (1 + 0.3 * swing)
        if world.disturbed:
            site = np.arange(world.devices) % SITES
            rate = rate * (2.5 if 100 <= day < 130 else 1.0)
            rate = rate * np.where((site == 3) & (200 <= day < 230), 4.0, 1.0)[:, None]
            rate = np.where(rng.random(rate.shape) < 5e-5, 0.4, rate)
            rate[self._broken] = 0.3
        inputs = rng.poisson(self._volume * (1 + 0.4 * swing))
        flagged = rng.binomial(inputs, np.clip(rate, 0.0, 0.95))
        trigger = world.trigger
        if trigger is not None and day >= trigger.day:
            met = rng.poisson(trigger.rate * self.sees)
            inputs[:, trigger.label] += met
            flagged[:, trigger.label] += rng.binomial(met, trigger.detected)
        if self.lies.any():
            self._lie(day, inputs, flagged)
        self._kept.append((inputs, flagged))
        if len(self._kept) > KEPT:
            inputs, flagged = self._kept.popleft()
            self._older = (self._older[0] + inputs, self._older[1] + flagged)

    def _lie(self, day: int, inputs: Counts, flagged: Counts) -> None:
        rng, lie, liars = self._rng, self.world.lie, np.flatnonzero(self.lies)
        if lie == "silent":
            flagged[liars] = 0
        elif lie == "shouting":
            flagged[liars] = inputs[liars] // 2
        elif lie in ("framing", "scattered"):
            label = np.full(liars.size, self._framed) if lie == "framing" else self._own_frame[liars]
            flagged[liars, label] = rng.binomial(inputs[liars, label], 0.4)
        elif lie == "copying":
            model = rng.choice(np.flatnonzero(~self.lies), liars.size)
            inputs[liars], flagged[liars] = inputs[model], flagged[model]
            modest = rng.binomial(inputs[liars, self._framed], 4.0 * self.rates[self._framed].clip(0.02, 0.2))
            flagged[liars, self._framed] = np.maximum(flagged[liars, self._framed], modest)
        elif lie == "dripping":
            if not self._dripping.any():
                self._gather(day)
            group = np.flatnonzero(self._dripping)
            inputs[group, self._framed] += 400
            flagged[group, self._framed] += 300

    def _gather(self, day: int) -> None:
        """The next group: the liars of most weight, just as many as the hub will listen to."""
        standing = trust.standing(self.trust, (FIRST_DAY + day) * DAY_MS)
        needed = trust.bar(standing, policy.quorum_of(self.config, self.world.devices))
        liars = np.flatnonzero(self.lies)
        weight = np.asarray([standing.get(self.names[i], Trust()).weight for i in liars])
        order = np.argsort(-weight, kind="stable")
        # A tenth more than needed, and a few: to be believed takes more than the quorum where odd devices are known.
        enough = int(np.searchsorted(np.cumsum(weight[order]), 1.1 * needed + 3.0)) + 1
        self._dripping[liars[order[:enough]]] = True


def _factor(rng: np.random.Generator, sigma: float, size: tuple[int, ...]) -> Floats:
    """Lognormal factors of mean 1."""
    return rng.lognormal(-(sigma**2) / 2, sigma, size)
