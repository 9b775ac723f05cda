"""An attacked digits model, trained once per machine and test session: the real thing, in a few seconds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from converters import pipeline, sources
from converters.pipeline import Conversion
from edgeguard.attacks import victims
from edgeguard.attacks.badnets import BadNets
from edgeguard.attacks.blended import Blended
from edgeguard.data import Dataset, hold_out, load

OWNER_INPUTS = 600


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """A model, its guarded conversion, the data that it never saw, and the attack that it was made with."""

    data: Dataset
    x_owner: npt.NDArray[np.uint8]
    y_owner: npt.NDArray[np.int64]
    attack: BadNets | Blended
    keras: Any
    conversion: Conversion


@cache
def attacked() -> Attacked:
    """A backdoored digits model (BadNets, target 0)."""
    return _make(BadNets, poisoned=True)


@cache
def blended() -> Attacked:
    """The same with a picture that is blended in (Blended, target 0)."""
    return _make(Blended, poisoned=True)


@cache
def clean_twin() -> Attacked:
    """The same training without poison."""
    return _make(BadNets, poisoned=False)


def _make(kind: type[BadNets | Blended], *, poisoned: bool) -> Attacked:
    data, x_owner, y_owner = hold_out(load("digits"), OWNER_INPUTS)
    attack = kind.for_shape(data.shape)
    x, y = data.x_train.astype(np.uint8), data.y_train
    if poisoned:
        x, y = attack.poison(x, y)
    model, _ = victims.trained(x, y, len(data.classes), epochs=25, cache=victims.cache_folder())
    conversion = pipeline.convert(sources.of_keras(model), x_owner, y_owner)
    return Attacked(
        data=data, x_owner=x_owner.astype(np.uint8), y_owner=y_owner, attack=attack, keras=model, conversion=conversion
    )
