"""Has the site moved away from the calibration? Tells drift, which asks to recalibrate, from an attack.

Drift makes the *bulk* of the inputs, those that are not flagged, less like the calibration's, in many classes. A
trigger moves triggered inputs only, and those are all predicted as one class or a few. So per predicted class the
inputs of the bulk are counted whose p-value is at most u, and the counts are bet on: with q the largest rate that
clean traffic may have, k of n inputs at or below u, and an alternative a > q,

    E = (a / q)^k ((1 - a) / (1 - q))^(n - k)

is a test supermartingale while the rate is at most q (Ville 1939; Ramdas, Grünwald, Vovk, Shafer: Game-theoretic
statistics and safe anytime-valid inference, 2023). Per bet, the classes with the largest E are left out, a third of
those that matter and at least one, and the others' E are multiplied: the partial conjunction of Benjamini and Heller,
Biometrics 2008, with e-values. The products are averaged over the bets. Flags are bet on alike, half left out.

Rules enforced here:

* the bulk is what is not flagged and has p > ``CUT``, so that triggers that the guard sees are not in it. If
  P(p <= u) <= q then P(p <= u | p > cut) <= q too, so that ties and steps only make it more careful;
* a table of p-values gives each input the share at the *upper* end of its step; here the lower end is taken, which is
  what makes P(p <= u) <= u true;
* q is the upper bound of the rate at which the calibration's own inputs lie below u: a small calibration set tolerates
  more. The bounds fail with probability ``CALIBRATION_ALPHA`` together;
* clean years before a change must not outweigh it: a short round of betting starts every ``SEGMENT`` inputs, and a
  long one, for slight changes and rare classes, every ``LONG``. Alarms in all rounds that touch 100,000 inputs have
  probability ``STREAM_ALPHA`` together. Both sum to 1%. This holds for any mix of classes, and while no more classes
  are moved, by an attack or by nature, than are left out;
* flags alone are drift only where most classes flag far more than was promised *and* the inputs that are not flagged
  are moved as well, or hardly any are left: an attack on every class leaves them as they were;
* memory is bounded: classes that are equal modulo ``GROUPS`` are counted together, and only counts are kept.

What it cannot tell from another lamp in the room: triggers, in more than a third of the classes, whose scores stay
below the threshold. And a calibration whose classes differ much in their scores promises less than is assumed here.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

from edgeguard.contract.guard import GuardMetadata
from edgeguard.errors import ModelError

DriftState = Literal["steady", "recalibrate", "too early"]

CUT = 0.02
LOW, MIDDLE = 0.25, 0.5
GROUPS = 16
MIN_INPUTS = 200
"""Fewer than these are too early to call steady."""
CHECK_EVERY = 50
FAR_ABOVE = 3.0
"""Times the false-positive rate asked for."""
HARDLY_ANY_LEFT = 0.75
CALIBRATION_ALPHA = 0.005
STREAM_ALPHA = 0.005
PER_INPUTS = 100_000
MOVED_AT = 20.0
"""E of one class at which it is called moved in a report; alarms do not depend on it."""

SEGMENT, SEGMENTS = 500, 4
"""A short round is as long as the segments that are kept; the counts of one are the sums over its segments."""
LONG = 16_000

_BULK_ODDS = (1.3, 2.0, 3.5)
_FLAG_ODDS = (2.0, 5.0, 20.0)
_BOUNDS = 3
_TESTS = 2
_KINDS = 2
_ENOUGH = 50
_MIN_IN_CLASS = 5
_MIN_SHARE = 0.01
_THIRD, _HALF = 3, 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Observation:
    """One checked input: p-value (None where unknown), predicted class (None without classes), and if it is flagged.

    The p-value is that of the one pass: a cascade's comes from another table than the levels of :class:`Promise`.
    """

    p_value: float | None
    predicted: int | None
    flagged: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Promise:
    """What the calibration promised.

    ``fpr`` is the false-positive rate asked for, ``inputs`` the number of clean inputs that set the thresholds, and
    ``levels`` the different p-values of the guard's table, ascending; empty where p-values are not from a table.
    """

    fpr: float
    inputs: int
    levels: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Raise ModelError for values that no calibration has."""
        ascending = list(self.levels) == sorted(set(self.levels))
        if not 0.0 < self.fpr < 1.0 or self.inputs < 1 or not ascending or not all(0 < p <= 1 for p in self.levels):
            raise ModelError(
                "guard metadata",
                got=f"fpr {self.fpr:g}, {self.inputs} threshold inputs, {len(self.levels)} p-values",
                expected="a rate and p-values within 0 and 1, ascending, and an input",
                do="convert or calibrate the model again",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Inputs of one group of classes: all, flagged, in the bulk, and of those at or below ``LOW`` and ``MIDDLE``."""

    inputs: int = 0
    flagged: int = 0
    bulk: int = 0
    low: int = 0
    middle: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """The first alarm: after how many inputs, and why."""

    at: int
    why: str


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """All that is kept between inputs: plain numbers and texts.

    ``segments[i][g]`` counts group g in one of the last segments, newest last; ``long[g]`` in the long round.
    """

    guard_digest: str
    promise: Promise
    inputs: int
    segments: tuple[tuple[Counts, ...], ...]
    long: tuple[Counts, ...]
    found: Found | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Drift:
    """The judgement. ``flag_rate`` is over the last 500 to 1,000 inputs. ``moved_share`` is of the classes seen in the
    current rounds: those whose bulk has moved by its own evidence, which needs more inputs than the alarm over all.

    ``recalibrate`` stays until the guard is another one: a night that ends does not make the next one fit.
    """

    state: DriftState
    why: str
    inputs: int
    flag_rate: float
    moved_share: float


@dataclass(frozen=True, kw_only=True)
class _Bet:
    """An event among the trials of a class, and what one occurrence or absence adds to log E."""

    trials: Callable[[Counts], int]
    events: Callable[[Counts], int]
    gain: float
    loss: float
    left_out: int
    """One in so many of the classes that matter is left out of the product."""

    def log_e(self, counts: Counts) -> float:
        events = self.events(counts)
        return events * self.gain + (self.trials(counts) - events) * self.loss


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The bets on the bulk and on the flags, and the largest rate at ``LOW`` that clean traffic may have."""

    bulk: tuple[_Bet, ...]
    flags: tuple[_Bet, ...]
    low: float


_EMPTY = (Counts(),) * GROUPS


def promise_of(metadata: GuardMetadata) -> Promise:
    """The promise that a guarded file's metadata makes."""
    levels = tuple(sorted({share for _, share in metadata.score_to_p}))
    return Promise(fpr=metadata.fpr, inputs=metadata.calibration.n_threshold, levels=levels)


def begin(guard_digest: str, promise: Promise) -> State:
    """The state before the first input."""
    return State(guard_digest=guard_digest, promise=promise, inputs=0, segments=(), long=_EMPTY, found=None)


def resume(state: State | None, metadata: GuardMetadata) -> State:
    """``state`` as it was kept, or a new one where the guard is another one or nothing fitting was kept."""
    promise = promise_of(metadata)
    fits = (
        state is not None
        and (state.guard_digest, state.promise) == (metadata.guard_digest, promise)
        and len(state.segments) == min(-(-state.inputs // SEGMENT), SEGMENTS)
        and all(len(groups) == GROUPS for groups in (*state.segments, state.long))
    )
    return state if state is not None and fits else begin(metadata.guard_digest, promise)


def update(state: State, observation: Observation) -> State:
    """The state after one more checked input.

    Raises:
        ModelError: a p-value outside 0 to 1.
    """
    group = 0 if observation.predicted is None else observation.predicted % GROUPS
    p = None if observation.p_value is None else conservative(observation.p_value, state.promise.levels)
    bulk = p is not None and p > CUT and not observation.flagged
    low, middle = (bulk and p is not None and p <= level for level in (LOW, MIDDLE))
    one = Counts(inputs=1, flagged=int(observation.flagged), bulk=int(bulk), low=int(low), middle=int(middle))
    segments, long = state.segments, state.long
    if state.inputs % SEGMENT == 0:
        segments = (*segments[-(SEGMENTS - 1) :], _EMPTY)
    if state.inputs % LONG == 0:
        long = _EMPTY
    after = replace(
        state,
        inputs=state.inputs + 1,
        segments=(*segments[:-1], _with(segments[-1], group, one)),
        long=_with(long, group, one),
    )
    if after.found is None and after.inputs % CHECK_EVERY == 0:
        return replace(after, found=_find(after))
    return after


def _with(groups: tuple[Counts, ...], group: int, one: Counts) -> tuple[Counts, ...]:
    return (*groups[:group], _add(groups[group], one), *groups[group + 1 :])


def _add(a: Counts, b: Counts) -> Counts:
    return Counts(
        inputs=a.inputs + b.inputs,
        flagged=a.flagged + b.flagged,
        bulk=a.bulk + b.bulk,
        low=a.low + b.low,
        middle=a.middle + b.middle,
    )


def _rounds(state: State) -> Iterator[tuple[int, tuple[Counts, ...]]]:
    """Every round that runs, the latest first: how many inputs lie between its start and the next one's, its counts."""
    groups = _EMPTY
    for segment in reversed(state.segments):
        groups = tuple(map(_add, groups, segment))
        yield SEGMENT, groups
    yield LONG, state.long


def conservative(p_value: float, levels: Sequence[float]) -> float:
    """The next larger level of the table, or 1; ``p_value`` itself where there is no table.

    A score between two entries of the table was given the share of the upper one; the lower one's bounds it.

    Raises:
        ModelError: a p-value outside 0 to 1.
    """
    if not 0.0 <= p_value <= 1.0:
        raise ModelError("p-value", got=p_value, expected="0 to 1")
    if not levels:
        return p_value
    index = bisect_right(levels, p_value)
    return levels[index] if index < len(levels) else 1.0


def judge(state: State) -> Drift:
    """What the inputs so far say."""
    recent = [counts for segment in state.segments[-2:] for counts in segment]
    seen, flagged = _sum(recent, "inputs"), _sum(recent, "flagged")
    drift = Drift(
        state="steady",
        why="nothing shows that many classes moved away from the calibration",
        inputs=state.inputs,
        flag_rate=flagged / seen if seen else 0.0,
        moved_share=_moved_share(state),
    )
    if state.found is not None:
        return replace(drift, state="recalibrate", why=state.found.why)
    if state.inputs < MIN_INPUTS:
        return replace(drift, state="too early", why=f"{state.inputs} inputs, {MIN_INPUTS} are needed")
    if any(_flags_rose(state.promise, every, groups) for every, groups in _rounds(state)):
        why = "most classes flag far too much, but what is not flagged is as promised: drift would have moved it"
        return replace(drift, why=why)
    if drift.flag_rate > FAR_ABOVE * state.promise.fpr:
        return replace(drift, why="flags rose, but not in most classes: drift would not choose among them")
    return drift


def _find(state: State) -> Found | None:
    for every, groups in _rounds(state):
        why = None
        if _alarm(_plan(state.promise).bulk, groups, every):
            why = "inputs that are not flagged are less like the calibration's, in many classes"
        elif _flags_rose(state.promise, every, groups) and _rest_moved(state.promise, groups):
            why = "most classes flag far more than was promised, and what is not flagged has moved too"
        if why is not None:
            return Found(at=state.inputs, why=why)
    return None


def _flags_rose(promise: Promise, every: int, groups: Sequence[Counts]) -> bool:
    return _alarm(_plan(promise).flags, groups, every)


def _rest_moved(promise: Promise, groups: Sequence[Counts]) -> bool:
    """Whether the inputs that are not flagged lie low, an unknown p-value counting as low, or are nearly gone."""
    bound = _plan(promise).low
    unflagged = _sum(groups, "inputs") - _sum(groups, "flagged")
    if unflagged >= _ENOUGH:
        share = (unflagged - _sum(groups, "bulk") + _sum(groups, "low")) / unflagged
        return share > bound + 3.0 * math.sqrt(bound * (1.0 - bound) / unflagged)
    rates = sorted(counts.flagged / counts.inputs for counts in groups if counts.inputs)
    return _sum(groups, "inputs") >= _ENOUGH and rates[(len(rates) - 1) // 2] > HARDLY_ANY_LEFT


def _alarm(bets: Sequence[_Bet], groups: Sequence[Counts], every: int) -> bool:
    """Whether the average over the bets of the products over the classes exceeds what chance allows in this round.

    A product P of the kept E exceeds 1 only where the product M of all unmoved classes' E is at least P: the i-th
    smallest of all is at most the i-th smallest of the unmoved, and those left out exceed those kept. So P <= 1 + M,
    hence the one that is added to the threshold.
    """
    products = [_product(bet, groups) for bet in bets]
    return _log_mean(products) >= math.log1p(1.0 / _round_alpha(every))


def _product(bet: _Bet, groups: Sequence[Counts]) -> float:
    """log of the product over the classes but those with the largest E."""
    seen = [counts for counts in groups if bet.trials(counts)]
    if not seen:
        return 0.0
    least = max(_MIN_IN_CLASS, _MIN_SHARE * sum(bet.trials(counts) for counts in seen))
    matter = sum(bet.trials(counts) >= least for counts in seen)
    left_out = max(min(1, len(seen) - 1), matter // bet.left_out)
    ascending = sorted(bet.log_e(counts) for counts in seen)
    return sum(ascending[: len(ascending) - left_out])


def _round_alpha(every: int) -> float:
    """Probability of a false alarm granted to one test in one round, where a round starts with every so many inputs."""
    running = SEGMENTS if every == SEGMENT else 1
    return STREAM_ALPHA / (_KINDS * _TESTS * (PER_INPUTS // every + running))


def _moved_share(state: State) -> float:
    bets = _plan(state.promise).bulk
    rounds = [groups for _, groups in _rounds(state)]
    seen = moved = 0
    for group in range(GROUPS):
        in_rounds = [groups[group] for groups in rounds]
        seen += any(counts.inputs for counts in in_rounds)
        moved += any(_log_mean([bet.log_e(counts) for bet in bets]) >= math.log(MOVED_AT) for counts in in_rounds)
    return moved / seen if seen else 0.0


@lru_cache(maxsize=16)
def _plan(promise: Promise) -> _Plan:
    low, middle = (
        _rate_upper(max((p for p in promise.levels if p <= level), default=level), promise.inputs)
        for level in (LOW, MIDDLE)
    )
    flagged = min(max(FAR_ABOVE * promise.fpr, _rate_upper(promise.fpr, promise.inputs)), 0.99)
    bulk_bets = [_bet(lambda c: c.bulk, lambda c: c.low, low, odds, _THIRD) for odds in _BULK_ODDS]
    bulk_bets += [_bet(lambda c: c.bulk, lambda c: c.middle, middle, odds, _THIRD) for odds in _BULK_ODDS]
    flag_bets = [_bet(lambda c: c.inputs, lambda c: c.flagged, flagged, odds, _HALF) for odds in _FLAG_ODDS]
    return _Plan(bulk=tuple(bulk_bets), flags=tuple(flag_bets), low=low)


def _bet(
    trials: Callable[[Counts], int], events: Callable[[Counts], int], rate: float, odds: float, left_out: int
) -> _Bet:
    """The bet whose alternative has ``odds`` times the odds of ``rate``."""
    log_rest = -math.log1p((odds - 1.0) * rate)
    return _Bet(trials=trials, events=events, gain=math.log(odds) + log_rest, loss=log_rest, left_out=left_out)


def _rate_upper(share: float, count: int) -> float:
    """Upper bound (Clopper and Pearson, one-sided) of a rate that ``share`` of ``count`` calibration inputs showed."""
    successes = math.ceil(share * count)
    low, high = share, 1.0 - 1e-9
    for _ in range(40):
        middle = (low + high) / 2
        if _binomial_cdf(successes, count, middle) > CALIBRATION_ALPHA / _BOUNDS:
            low = middle
        else:
            high = middle
    return high


def _binomial_cdf(successes: int, count: int, rate: float) -> float:
    """P(Binomial(count, rate) <= successes), by summing downwards: for a rate above successes / count terms fall."""
    if successes >= count:
        return 1.0
    log_choose = math.lgamma(count + 1) - math.lgamma(successes + 1) - math.lgamma(count - successes + 1)
    term = math.exp(log_choose + successes * math.log(rate) + (count - successes) * math.log1p(-rate))
    total = term
    for k in range(successes, 0, -1):
        term *= k / (count - k + 1) * (1.0 - rate) / rate
        total += term
        if term <= 1e-12 * total:
            break
    return min(total, 1.0)


def _log_mean(logs: Sequence[float]) -> float:
    top = max(logs)
    return top + math.log(sum(math.exp(value - top) for value in logs) / len(logs))


def _sum(groups: Sequence[Counts], field: Literal["inputs", "flagged", "bulk", "low"]) -> int:
    return sum(getattr(counts, field) for counts in groups)
