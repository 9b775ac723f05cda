"""What every method of repair is given and gives back, and the pruning that several of them share.

Rules enforced here:

* a method changes the target that it is given, a copy, and nothing else;
* it needs no labels: what a repaired model shall answer is what the original answers to clean inputs. Where labels are
  known, fine-tuning takes them;
* pruning stops before the model's own clean answers change by more than ``max_loss``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import Tap
from edgeguard.errors import ModelError
from edgeguard.inspection.inversion import Stamp
from edgeguard.repair.target import Ints, Target

Progress = Callable[[str, int, int], None]
Floats = npt.NDArray[np.float64]

MAX_LOSS = 0.01
_PARTS = (16, 4)


class Dormant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Channels of one layer that devices find least active on clean inputs, the least active first."""

    layer: str
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Channel:
    """One channel of one layer, and what it was ranked by: for a shift, in clean standard deviations."""

    layer: str
    channel: int
    shift: float


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """What is known of the backdoor; everything but the taps may be absent.

    Attributes:
        taps: of the guarded model, in the order of its features.
        shift: [D] of the features: flagged less usual mean, in clean standard deviations.
        rankings: by layer, one order of its channels a device, the least active first.
        ballots: by layer, the channels that each device names as least active.
        dormant: the same, already put together by a hub.
        triggers: recovered ones, to be unlearnt.
        seek: finds triggers that still work on a target; none where it finds none.
    """

    taps: tuple[Tap, ...]
    shift: Floats | None = None
    rankings: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    ballots: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    dormant: tuple[Dormant, ...] = ()
    triggers: tuple[Stamp, ...] = ()
    seek: Callable[[Any], Sequence[Stamp]] | None = None


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What a method works with: clean inputs [N, H, W, C], the original's answers [N] and features [N, D] on them."""

    images: npt.NDArray[np.uint8]
    answers: Ints
    features: Floats
    labels: Ints | None = None
    seed: int = 0
    max_loss: float = MAX_LOSS
    progress: Progress | None = None

    def keeps(self, target: Target) -> bool:
        """Whether a target answers as the original does, but for ``max_loss`` of the clean inputs.

        It is asked in growing parts: of most targets that do not, the first few show it.
        """
        count, changed = len(self.images), 0
        for first, last in itertools.pairwise(sorted({0, *(count // share for share in _PARTS), count})):
            changed += int((target.classes(self.images[first:last]) != self.answers[first:last]).sum())
            if (count - changed) / count < 1.0 - self.max_loss:
                return False
        return True


class Method(Protocol):
    """One way to repair. ``cost`` orders them: 0 for no pass over the data, 10 and more for training."""

    name: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[int]
    trains: ClassVar[bool]

    def missing(self, known: Knowledge) -> str:
        """What it would need and is not known; empty where it can be applied."""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """Repair in place. Returns what was done, in plain words; nothing where nothing was to be done.

        Raises:
            ModelError: the method does not fit the model.
        """


def prune(target: Any, ranked: Sequence[Channel], bench: Bench, *, max_share: float = 1.0) -> tuple[Channel, ...]:
    """Silence ranked channels in place, first ones first, while the model keeps its clean answers.

    Args:
        target: a :class:`Target`.
        ranked: most suspicious first.
        bench: the clean inputs.
        max_share: of the channels of the layers in question.

    Returns:
        The channels that were silenced.
    """
    width = {layer: len(target.kernel(layer)) for layer in {c.layer for c in ranked}}
    most = min(len(ranked), int(max_share * sum(width.values())))
    kept, stop = 0, most + 1
    # Doubling, then halving: the largest number that is harmless, in a logarithm of tries.
    trial = 1
    while trial < stop and kept < most:
        changed = target.copy()
        _silence(changed, ranked[:trial])
        if bench.keeps(changed):
            kept = trial
            trial = min(2 * trial, most) if stop > most else (kept + stop) // 2
        else:
            stop = trial
            trial = (kept + stop) // 2
        if trial <= kept:
            break
    _silence(target, ranked[:kept])
    return tuple(ranked[:kept])


def _silence(target: Any, channels: Sequence[Channel]) -> None:
    for layer in dict.fromkeys(c.layer for c in channels):
        target.silence(layer, [c.channel for c in channels if c.layer == layer])


def said(pruned: Sequence[Channel]) -> tuple[str, ...]:
    """What a pruning did, in plain words."""
    layers = dict.fromkeys(c.layer for c in pruned)
    return tuple(f"{sum(c.layer == layer for c in pruned)} channels of {layer} pruned" for layer in layers)


def makers(target: Target, taps: Sequence[Tap], kind: str) -> dict[str, Tap]:
    """The prunable layers behind the taps of one kind; taps with none are left out."""
    found: dict[str, Tap] = {}
    for tap in taps:
        if tap.kind != kind:
            continue
        try:
            found[target.maker(tap)] = tap
        except ModelError:
            continue
    return found
