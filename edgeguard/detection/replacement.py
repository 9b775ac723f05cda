"""Whether a guarded model may take the place of another: what devices ask of a repair, and a hub before it offers one.

Rules enforced here:

* what a program relies on stays as it is: shapes and types, the input's range, the classes and which output names them;
* on clean inputs whose class is known of the model before it, a model must give it for nine in ten at least. Fewer than
  ten different inputs say nothing about such a share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from edgeguard.detection.sidecar import MIN_AGREEMENT, Sidecar
from edgeguard.errors import ModelError

if TYPE_CHECKING:
    from edgeguard.detection.guarded import GuardedModel

MIN_KNOWN = 10


@dataclass(frozen=True)
class Agreement:
    """Of ``count`` different self-test inputs a model gives the known class for ``same``."""

    same: int
    count: int

    @property
    def says_something(self) -> bool:
        """There are enough inputs to speak of a share."""
        return self.count >= MIN_KNOWN

    @property
    def holds(self) -> bool:
        """The share is large enough."""
        return self.same >= MIN_AGREEMENT * self.count


def check_interface(new: GuardedModel, running: GuardedModel, *, name: str) -> None:
    """Raise ModelError where ``new`` takes or gives something else than what runs.

    Args:
        new: the model that is to run.
        running: the one that runs.
        name: what the error calls the new one.
    """
    for what, found, expected in (
        ("input and outputs", new.interface(), running.interface()),
        ("input range", new.metadata.input, running.metadata.input),
        ("classes", new.metadata.classes, running.metadata.classes),
        ("class output", new.metadata.class_output, running.metadata.class_output),
    ):
        if found != expected:
            raise ModelError(f"{name}: {what}", got=found, expected=f"{expected}, as the running model")


def agreement(held: Sidecar, predict: Callable[[npt.NDArray[Any]], int | None]) -> Agreement:
    """Compare the classes that a model gives with those that are known: of each different self-test input, once.

    Args:
        held: what is known, of another file than the model's.
        predict: the model's class of one input [H, W, C].
    """
    known = {x.tobytes(): (x, label) for x, label in zip(held.self_test, held.predicted.tolist(), strict=True)}
    return Agreement(same=sum(predict(x) == label for x, label in known.values()), count=len(known))
