"""What every data-poisoning attack offers, and the definition of its success."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt

from edgeguard.data import Labels

Images = npt.NDArray[np.uint8]


class Attack(Protocol):
    """Poisons training data and stamps its trigger on inputs. All arrays are ``uint8 [N, H, W, C]``."""

    @property
    def target(self) -> int:
        """The label that triggered inputs shall get."""

    def stamp(self, images: Images) -> Images:
        """A copy of ``images`` with the trigger on each."""

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """A poisoned copy of a training set."""


def victims_of(labels: Labels, predicted_clean: Labels, target: int) -> npt.NDArray[np.bool_]:
    """Which test inputs count for the ASR.

    Those whose true label is not the target and which the model does not already call the target without the trigger.
    """
    return (labels != target) & (predicted_clean != target)


def attack_success_rate(labels: Labels, predicted_clean: Labels, predicted_triggered: Labels, target: int) -> float:
    """ASR: among the inputs of :func:`victims_of`, the share that the model calls the target with the trigger.

    Raises:
        ValueError: no input counts.
    """
    victims = victims_of(labels, predicted_clean, target)
    if not victims.any():
        raise ValueError("no test input counts for the ASR: all have or are called the target label")
    return float(np.mean(predicted_triggered[victims] == target))
