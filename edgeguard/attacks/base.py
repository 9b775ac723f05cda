"""What every attack offers, what it leaves behind, and the definition of its success.

An attack is mounted on a task with a trainer: it poisons the training set, trains in a way of its own, or edits a
trained model. What comes back is the victim: an attacked model, and the state from which its trigger can be stamped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from inspect import Parameter, signature
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Images = npt.NDArray[np.uint8]
State = Mapping[str, npt.NDArray[Any]]
"""Arrays that :meth:`Attack.stamp` needs beside the attack's own settings: a learned trigger, the weights of a
generator. Empty for most attacks. Plain arrays, so that a victim can be stored and moved."""

EMPTY: State = MappingProxyType({})
"""The state of an attack whose settings say all there is to know about its trigger."""

Progress = Callable[[str, int, int], None]
"""Called with a text, the steps done and the steps in total."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the attacker trains on: ``uint8 [N, H, W, C]``, ``int64 [N]``, and the number of classes."""

    images: Images
    labels: Labels
    classes: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one image, (H, W, C)."""
        return tuple(self.images.shape[1:])


class Trainer(Protocol):
    """Trains networks of one architecture; see ``victims.Training``."""

    def fresh(self, task: Task, *, seed: int) -> Any:
        """An untrained Keras model of the architecture: pixels 0 to 255 in, softmax out."""

    def fit(self, task: Task, *, seed: int, model: Any = None) -> Any:
        """A model trained on the task with the usual recipe, from scratch or from ``model`` (changed in place)."""


@dataclass(frozen=True, kw_only=True)
class Victim:
    """An attacked model and what its trigger needs."""

    model: Any
    state: State


class Attack(Protocol):
    """One attack with its settings, a frozen dataclass. All images are ``uint8 [N, H, W, C]``.

    ``name`` is what commands and tables call it; ``paper`` says where its settings come from.
    """

    name: ClassVar[str]
    paper: ClassVar[str]

    @property
    def target(self) -> int:
        """The label that triggered inputs shall get."""

    @property
    def seed(self) -> int:
        """Everything random about the attack follows from it."""

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Attack:
        """The attack with the paper's settings for images of ``shape`` (H, W, C).

        Raises:
            ConfigError: it does not fit such data.
        """

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Attack: train or edit a model.

        Raises:
            ConfigError: the task does not fit the attack.
        """

    def stamp(self, images: Images, state: State) -> Images:
        """A copy of ``images`` with the trigger on each, as the attacker shows it at test time.

        Deterministic: what is random in an attack follows from its seed and the image's place in the batch. An attack
        without a state gives ``state`` the default :data:`EMPTY`; see :func:`needs_state`.
        """

    def eligible(self, labels: Labels) -> npt.NDArray[np.bool_]:
        """Which test inputs [N], by their true labels, the attack is meant to turn: here all but the target's."""
        return labels != self.target


@runtime_checkable
class Poison(Attack, Protocol):
    """An attack that only poisons the training set and leaves training to whoever trains."""

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """A poisoned copy of a training set.

        Raises:
            ConfigError: there is nothing that this attack could poison.
        """

    def prepare(self, images: Images, labels: Labels) -> State:
        """What :meth:`stamp` takes from the training set; here nothing."""
        return EMPTY

    def mount(self, task: Task, trainer: Trainer, progress: Progress | None = None) -> Victim:
        """Poison the task and train from scratch. Only the trainer takes its time, and reports progress itself.

        Raises:
            ConfigError: the task does not fit the attack.
        """
        if not 0 <= self.target < task.classes:
            raise ConfigError(f"attack {self.name}", got=f"target {self.target}", expected=f"0 to {task.classes - 1}")
        images, labels = self.poison(task.images, task.labels)
        model = trainer.fit(Task(images=images, labels=labels, classes=task.classes), seed=self.seed)
        return Victim(model=model, state=self.prepare(task.images, task.labels))


def needs_state(attack: Attack) -> bool:
    """Whether an attack can only stamp with the state that it left behind: ``state`` then has no default."""
    return signature(attack.stamp).parameters["state"].default is Parameter.empty


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
