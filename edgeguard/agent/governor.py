"""How much the guard may do: from what its extra work costs to a level of service. Pure: time is passed in.

Rules enforced here:

* the model always runs, and one input in eight is always scored: no level says less. What a level leaves out is
  "not audited" or "not checked", never clean;
* one step at a time, at most one per settle interval, and each with its reason;
* down as soon as one limit is exceeded; up only after all that is known was below a lower mark (80% of the limit, 5 °C
  below that of the temperature) for a hold time. It doubles, up to a bound, when a step up was taken back;
* an unknown reading is neither high nor low: its time counts towards no hold, and no step up follows from it. A
  quantity that was never known, as on a board without the sensor, has no say.

Example:
    >>> governor = Governor(limits=Limits(temperature_c=80.0))
    >>> governor.step(State(), Readings(at_s=0.0, temperature_c=83.2))[1].reason
    'temperature 83.2 °C above 80'
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import IntEnum

from edgeguard.errors import ConfigError


class Level(IntEnum):
    """Levels of service, each with less extra work than the one before."""

    EVERYTHING = 0
    NO_RANDOM_AUDITS = 1
    NO_FURTHER_LOOKS = 2
    EVERY_2ND = 3
    EVERY_4TH = 4
    EVERY_8TH = 5

    @property
    def audits_at_random(self) -> bool:
        """Whether a share of unsuspicious inputs is audited too."""
        return self < Level.NO_RANDOM_AUDITS

    @property
    def looks_further(self) -> bool:
        """Whether doubtful inputs are looked at again; otherwise they are "not audited"."""
        return self < Level.NO_FURTHER_LOOKS

    @property
    def score_every(self) -> int:
        """One input in so many is scored. Best chosen at random: nobody shall count along to the one that is not."""
        return 1 << max(0, self - Level.NO_FURTHER_LOOKS)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What the guard's extra work may take; None is no limit.

    ``cpu_share`` of one core, 0 to 1; ``inferences_per_s`` beyond one for each input; ``memory_bytes`` as the readings
    take it; ``temperature_c`` of the board; ``backlog``: inputs that wait.
    """

    cpu_share: float | None = None
    inferences_per_s: float | None = None
    memory_bytes: int | None = None
    temperature_c: float | None = None
    backlog: int | None = None

    def __post_init__(self) -> None:
        """Raise ConfigError for limits that are negative, infinite or no numbers, and a share of more than one core."""
        for name, least, most in (
            ("cpu_share", 0.0, 1.0),
            ("inferences_per_s", 0.0, math.inf),
            ("memory_bytes", 0.0, math.inf),
            ("temperature_c", -math.inf, math.inf),
            ("backlog", 0.0, math.inf),
        ):
            limit = getattr(self, name)
            if limit is not None and not (least <= limit <= most and math.isfinite(limit)):
                raise ConfigError(f"limit {name}", got=limit, expected=f"a number from {least:g} to {most:g}")


@dataclass(frozen=True, kw_only=True)
class Readings:
    """What was measured up to ``at_s``, seconds of a clock that never goes back. None or NaN is unknown.

    ``cpu_share`` and ``inferences_per_s`` are those of the extra work since the last readings, ``memory_bytes``
    anonymous memory or the control group's. ``throttled``: the board slows itself down.
    """

    at_s: float
    cpu_share: float | None = None
    inferences_per_s: float | None = None
    memory_bytes: int | None = None
    temperature_c: float | None = None
    throttled: bool | None = None
    backlog: int | None = None


@dataclass(frozen=True, kw_only=True)
class Step:
    """A change of level, and why."""

    level: Level
    previous: Level
    reason: str
    at_s: float


@dataclass(frozen=True, kw_only=True)
class State:
    """Where the governor stands; ``State()`` is the start.

    ``stepped_at_s``: the last step, which went up if ``rose``. ``low_s``: how long all that is known has been low, up
    to ``low_at_s``, the last readings if they were low. ``hold_s``: the hold time, where relapses made it longer than
    the governor's own. ``seen``: what was ever known.
    """

    level: Level = Level.EVERYTHING
    stepped_at_s: float | None = None
    rose: bool = False
    low_s: float = 0.0
    low_at_s: float | None = None
    hold_s: float = 0.0
    seen: frozenset[str] = frozenset()


@dataclass(frozen=True)
class _Quantity:
    """A reading with a limit: its field in both, how a reason puts it, and the mark below which it is low."""

    field: str
    reason: str
    unit: float = 1.0
    lower: Callable[[float], float] = lambda limit: 0.8 * limit


_QUANTITIES = (
    _Quantity("cpu_share", "extra CPU share {:.2f} above {:g}"),
    _Quantity("inferences_per_s", "extra inferences {:.1f}/s above {:g}"),
    _Quantity("memory_bytes", "memory {:.1f} MiB above {:g}", unit=1 << 20),
    _Quantity("temperature_c", "temperature {:.1f} °C above {:g}", lower=lambda limit: limit - 5.0),
    _Quantity("backlog", "{:g} inputs waiting, above {:g}"),
)
_THROTTLED = "throttled"


@dataclass(frozen=True, kw_only=True)
class Governor:
    """Decides on the level of service.

    ``settle_s``: what a step does shows only after so long. ``hold_s``: how long all must be low before a step up, and
    ``hold_max_s`` how long at most once steps up were taken back; one that lasted as long is no mistake any more.
    """

    limits: Limits
    settle_s: float = 10.0
    hold_s: float = 60.0
    hold_max_s: float = 3600.0

    def __post_init__(self) -> None:
        """Raise ConfigError unless 0 < ``settle_s`` and 0 < ``hold_s`` <= ``hold_max_s``, all finite."""
        if not (0 < self.settle_s < math.inf and 0 < self.hold_s <= self.hold_max_s < math.inf):
            raise ConfigError(
                "budget governor",
                got=f"settle {self.settle_s:g} s, hold {self.hold_s:g} to {self.hold_max_s:g} s",
                expected="times above 0, the longest hold last",
            )

    def step(self, state: State, readings: Readings) -> tuple[State, Step | None]:
        """The state after these readings, and the step if there was one."""
        now = readings.at_s
        state, over = self._observed(state, readings)
        since = math.inf if state.stepped_at_s is None else now - state.stepped_at_s
        if since < self.settle_s:
            return state, None
        hold = max(self.hold_s, state.hold_s)
        if over and state.level < max(Level):
            if state.rose:
                hold = self.hold_s if since >= self.hold_max_s else min(2.0 * hold, self.hold_max_s)
            state = replace(state, hold_s=hold)
            return _stepped(state, Level(state.level + 1), "; ".join(over), now)
        if state.level > min(Level) and state.low_at_s is not None and state.low_s >= hold:
            return _stepped(state, Level(state.level - 1), f"low for {state.low_s:.0f} s", now)
        return state, None

    def _observed(self, state: State, readings: Readings) -> tuple[State, list[str]]:
        """The state with these readings counted in, and which limits they exceed."""
        over: list[str] = []
        known: set[str] = set()
        low = True
        for quantity in _QUANTITIES:
            limit, value = getattr(self.limits, quantity.field), getattr(readings, quantity.field)
            if limit is None or value is None or math.isnan(value):
                continue
            known.add(quantity.field)
            low = low and value <= quantity.lower(limit)
            if value > limit:
                over.append(quantity.reason.format(value / quantity.unit, limit / quantity.unit))
        if readings.throttled is not None:
            known.add(_THROTTLED)
            if readings.throttled:
                over.append("the board throttles itself")
        seen, low_s, low_at_s = state.seen | known, state.low_s, None
        if over or not low:
            low_s = 0.0
        elif known and seen == known:
            low_at_s = readings.at_s
            low_s += 0.0 if state.low_at_s is None else max(0.0, readings.at_s - state.low_at_s)
        return replace(state, seen=seen, low_s=low_s, low_at_s=low_at_s), over


def _stepped(state: State, level: Level, reason: str, now: float) -> tuple[State, Step]:
    step = Step(level=level, previous=state.level, reason=reason, at_s=now)
    return replace(state, level=level, stepped_at_s=now, rose=level < step.previous, low_s=0.0), step
