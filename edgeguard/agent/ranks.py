"""How active each channel is on this device's unflagged inputs, and what federated pruning asks about that.

Rules enforced here:

* nothing but a count and a sum ``[D]`` is kept of inputs, for each of the last few models;
* at ``HALVE_AT`` inputs count and sum are halved, so that conditions of long ago fade: a mean rests on fewer inputs
  than that, of which those before the last halving count half, those before the one before it a quarter;
* a model with other taps than before begins anew, and so does everything where the file is damaged;
* fewer than ``MIN_INPUTS`` inputs rank nothing.

A channel's activation is its l1 feature, the average of its magnitude over space.

Wu, Yang, Zhu, Mitra, "Mitigating Backdoor Attacks in Federated Learning", arXiv 2011.01767: pruning by rank
aggregation (RAP) and by majority vote (MVP). There a client's ranks descend; here the least active channel, which is
pruned first, stands first. Channels of the same mean stand in the order of their numbers.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgeguard import disk
from edgeguard.agent.commands import Outcome
from edgeguard.contract.guard import GuardMetadata, Tap
from edgeguard.contract.messages import Ballot, Digest, Features, Rank, Ranking, TapRanking, Vote
from edgeguard.errors import ConfigError

FILE = "activations.json"
MODELS = 4
HALVE_AT = 100_000
MIN_INPUTS = 100
SAVE_S = 300.0

log = logging.getLogger(__name__)


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """Unflagged inputs of one model: how many, and the sum of their features ``[D]``, in the order of ``taps``."""

    model_digest: Digest
    taps: Annotated[tuple[Tap, ...], Meta(min_length=1, max_length=64)]
    inputs: Annotated[int, Meta(ge=1, lt=HALVE_AT)]
    total: Features

    def __post_init__(self) -> None:
        if len(self.total) != max(tap.columns.stop for tap in self.taps) or not all(map(math.isfinite, self.total)):
            raise ValueError("a sum that does not fit the taps")


class _File(msgspec.Struct, frozen=True, kw_only=True):
    v: Literal[1] = 1
    models: Annotated[tuple[Activity, ...], Meta(max_length=MODELS)]


def rank(activity: Activity | None, command: Rank) -> Outcome:
    """What this device answers to a rank: a :class:`Ranking`, or why there is none.

    Args:
        activity: that of the model in question, None where there is none.
        command: asks for all taps, or for one by its source layer or tensor.
    """
    if activity is None or activity.inputs < MIN_INPUTS:
        return _too_few(activity)
    taps = _taps(activity, command.layer)
    if not taps:
        return _no_tap(activity, command.layer)
    rankings = tuple(
        TapRanking(tensor=tap.tensor, source_layer=tap.source_layer, channels=_ascending(activity, tap)) for tap in taps
    )
    result = Ranking(model_digest=activity.model_digest, inputs=activity.inputs, taps=rankings)
    return Outcome(state="ok", result=result)


def vote(activity: Activity | None, command: Vote) -> Outcome:
    """What this device answers to a vote: a :class:`Ballot`, or why there is none.

    Args:
        activity: as for :func:`rank`.
        command: asks for a share of one tap's channels.
    """
    if activity is None or activity.inputs < MIN_INPUTS:
        return _too_few(activity)
    taps = _taps(activity, command.layer)
    if len(taps) != 1:
        return _no_tap(activity, command.layer)
    chosen = _ascending(activity, taps[0])[: round(command.share * taps[0].channels)]
    result = Ballot(
        model_digest=activity.model_digest,
        layer=command.layer,
        inputs=activity.inputs,
        channels=tuple(sorted(chosen)),
    )
    return Outcome(state="ok", result=result)


def ascending(activity: Activity | None, layer: str) -> tuple[int, ...]:
    """The channels of one tap, the least active first.

    Args:
        activity: as for :func:`rank`.
        layer: the tap, by its source layer or tensor.

    Raises:
        ConfigError: too few inputs, or no such tap.
    """
    if activity is None or activity.inputs < MIN_INPUTS:
        refused = _too_few(activity)
    elif len(taps := _taps(activity, layer)) != 1:
        refused = _no_tap(activity, layer)
    else:
        return _ascending(activity, taps[0])
    raise ConfigError("activations of this device", got=refused.reason, do="let the agent run this model for longer")


class Activations:
    """Adds up the unflagged inputs of the last few models, and keeps that in a file.

    Args:
        path: the file; made by :meth:`save`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._models = {kept.model_digest: _Sum(kept.taps, kept.inputs, np.array(kept.total)) for kept in _read(path)}
        self._due_s = -math.inf
        self._is_saved = True

    def add(self, metadata: GuardMetadata, features: npt.NDArray[np.floating[Any]], *, inputs: int = 1) -> None:
        """Count unflagged inputs. Those with a feature that is not finite were not checked, and are left out.

        Args:
            metadata: the guard of the model that they ran through.
            features: the sum of their ``edgeguard_features`` ``[D]``.
            inputs: how many they are.
        """
        if not np.isfinite(features).all():
            return
        running = self._models.pop(metadata.model_digest, None)
        if running is None or running.taps != metadata.taps:
            running = _Sum(metadata.taps, 0, np.zeros(metadata.feature_count))
            while len(self._models) >= MODELS:
                del self._models[next(iter(self._models))]
        running.add(features, inputs)
        # Put back as the last: the first is the one that has not run for longest.
        self._models[metadata.model_digest] = running
        self._is_saved = False

    def activity(self, model_digest: str) -> Activity | None:
        """What is known of one model, None where nothing is."""
        running = self._models.get(model_digest)
        if running is None:
            return None
        total = tuple(running.total.tolist())
        return Activity(model_digest=model_digest, taps=running.taps, inputs=running.inputs, total=total)

    def save(self, now_s: float) -> None:
        """Write the file where there is something new, at most every ``SAVE_S``; a restart loses no more than that.

        Args:
            now_s: seconds of any steady clock.

        Raises:
            ConfigError: it cannot be written.
        """
        if self._is_saved or now_s < self._due_s:
            return
        models = tuple(found for digest in self._models if (found := self.activity(digest)) is not None)
        try:
            disk.write(self._path, msgspec.json.encode(_File(models=models)))
        except OSError as error:
            raise ConfigError(
                f"activations {self._path}",
                got=error.strerror or str(error),
                expected="a file that can be written",
                do="check the disk's space and the folder's owner",
            ) from error
        self._is_saved, self._due_s = True, now_s + SAVE_S


@dataclass
class _Sum:
    taps: tuple[Tap, ...]
    inputs: int
    total: npt.NDArray[np.float64]

    def add(self, features: npt.NDArray[np.floating[Any]], inputs: int) -> None:
        self.inputs += inputs
        self.total += features
        while self.inputs >= HALVE_AT:
            self.inputs //= 2
            self.total /= 2


def _read(path: Path) -> tuple[Activity, ...]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_File).models
    except FileNotFoundError:
        return ()
    except (OSError, ValueError, msgspec.DecodeError, RecursionError) as error:
        log.warning("activations %s cannot be read, counting begins anew: %s", path, error)
        return ()


def _ascending(activity: Activity, tap: Tap) -> tuple[int, ...]:
    mean = np.asarray(activity.total)[tap.columns] / activity.inputs
    return tuple(np.argsort(mean, kind="stable").tolist())


def _taps(activity: Activity, layer: str | None) -> list[Tap]:
    return [
        tap for tap in activity.taps if tap.kind == "l1" and (layer is None or layer in (tap.source_layer, tap.tensor))
    ]


def _too_few(activity: Activity | None) -> Outcome:
    seen = f"only {activity.inputs} unflagged inputs" if activity else "no unflagged input"
    return Outcome(state="refused", reason=f"{seen} of this model; at least {MIN_INPUTS} are needed")


def _no_tap(activity: Activity, layer: str | None) -> Outcome:
    known = ", ".join(tap.tensor for tap in _taps(activity, None))
    return Outcome(state="refused", reason=f"not one tap {layer or ''}; there are: {known or 'none'}")
