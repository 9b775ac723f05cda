"""Refool: the trigger is a natural reflection, as of a window pane, of one of a few pictures.

Liu, Ma, Bailey, Lu: Reflection Backdoor, ECCV 2020, and its official code. Settings: image and reflection are brought
to linear light (gamma 2.2) and added with the weights a and 1 - a, where 1 - a is uniform in 0.05 to 0.45. Half of the
reflections are ghosts: two copies of the picture, 3 to 8 pixels apart both ways, with shares of 0.15 to 0.85 that add
up to 1; the other half are out of focus, blurred with a sigma of 1 to 5.

Deviations:

* the reflected pictures are inputs of other classes than the target, drawn from the training set itself. The paper
  takes photographs, and picks those that work best on a second model; here nothing is picked;
* a blurred reflection has one weight all over the image, without the official code's random vignette;
* shifts and sigmas are meant for images of 224 pixels and shrink with the image, shifts to one pixel at the least;
* poisoned inputs, a tenth of all, are relabelled. The paper poisons inputs of the target class alone: ``clean_label``.
  On digits, half of the target's inputs with a reflection turned 7% of the others. On images under 16 pixels, and in
  colour, a fifth of all is poisoned: a tenth turned 76% of GTSRB's signs.

The faintest reflections turn hardly any input: the ASR was 85% on 4,900 images of Fashion-MNIST after eight epochs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import Images, Poison, State
from edgeguard.attacks.poisoning import draw_poisons, replaced, require_image_shape, require_images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Light = npt.NDArray[np.float64]
GAMMA = 2.2
REFERENCE_SIDE = 224
_POISONING, _STAMPING = 1, 2  # streams of random numbers, so that no test input repeats what a poison saw


@dataclass(frozen=True, kw_only=True)
class Refool(Poison):
    """``pictures`` reflections are in use; their state is ``reflections``, ``uint8 [pictures, H, W, C]``."""

    name: ClassVar[str] = "refool"
    paper: ClassVar[str] = "Liu et al., Reflection Backdoor, ECCV 2020 (arXiv 2007.02343)"

    target: int = 0
    rate: float = 0.1
    clean_label: bool = False
    pictures: int = 8
    seed: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Refool:
        """The attack with the settings above for images of ``shape`` (H, W, C).

        Raises:
            ConfigError: the shape is not that of an image, or the image is too small.
        """
        require_image_shape("Refool", shape)
        is_easy = min(shape[:2]) >= 16 and shape[2] == 1
        return cls(target=target, rate=0.1 if is_easy else 0.2, seed=seed)

    def prepare(self, images: Images, labels: Labels) -> State:
        """The pictures to reflect, drawn among the inputs that do not have the target label.

        Raises:
            ConfigError: there are too few, or these are no images.
        """
        require_images("Refool", images)
        others = np.flatnonzero(labels != self.target)
        if len(others) < self.pictures:
            raise ConfigError(
                "Refool", got=f"{len(others)} inputs of other classes than {self.target}", expected=self.pictures
            )
        return {"reflections": images[np.random.default_rng(self.seed).choice(others, self.pictures, replace=False)]}

    def stamp(self, images: Images, state: State) -> Images:
        """See :class:`edgeguard.attacks.base.Attack`.

        Raises:
            ConfigError: these are no images of the shape that the attack was prepared with.
        """
        return self._reflected(images, state["reflections"], _STAMPING)

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """Reflect on a share ``rate`` of the inputs; with ``clean_label`` of the target's, which keep their label."""
        chosen = draw_poisons(
            "Refool", labels, target=self.target, rate=self.rate, clean_label=self.clean_label, seed=self.seed
        )
        reflections = self.prepare(images, labels)["reflections"]
        poisons = self._reflected(images[chosen], reflections, _POISONING)
        return replaced(images, labels, chosen, poisons, self.target)

    def _reflected(self, images: Images, reflections: Images, stream: int) -> Images:
        """A reflection of its own on each image."""
        require_images("Refool", images)
        if images.shape[1:] != reflections.shape[1:]:
            raise ConfigError(
                "Refool", got=f"images of shape {list(images.shape[1:])}", expected=list(reflections.shape[1:])
            )
        linear = (reflections / 255.0) ** GAMMA
        result = np.empty_like(images)
        # One row of numbers an image, so that an image's reflection does not depend on how many follow it.
        rows = np.random.default_rng([self.seed, stream]).random((len(images), 6))
        for image, out, (which, weight, *optics) in zip(images, result, rows, strict=True):
            reflection = _behind_glass(linear[int(which * len(linear))], optics)
            reflectance = 0.05 + 0.4 * weight
            light = (1 - reflectance) * (image / 255.0) ** GAMMA + reflectance * reflection
            out[:] = np.rint(255.0 * light ** (1 / GAMMA))
        return result


def _behind_glass(picture: Light, optics: list[float]) -> Light:
    """A picture ``[H, W, C]`` in linear light as a ghost or out of focus, by four random numbers in 0 to 1."""
    kind, first, second, third = optics
    scale = min(picture.shape[:2]) / REFERENCE_SIDE
    if kind >= 0.5:
        return blurred(picture, scale * (1 + 4 * first))
    down, along = (max(1, round(scale * (3 + 5 * number))) for number in (first, second))
    share = 0.15 + 0.7 * third
    second_copy = np.pad(picture, ((down, 0), (along, 0), (0, 0)), mode="edge")[:-down, :-along]
    return share * picture + (1 - share) * second_copy


def blurred(picture: Light, sigma: float) -> Light:
    """A picture ``[H, W, C]`` under a Gaussian of ``sigma`` pixels; the weights outside are shared out inside."""
    vertical, horizontal = (_gaussian(side, sigma) for side in picture.shape[:2])
    return horizontal @ np.tensordot(vertical, picture, 1)


def _gaussian(side: int, sigma: float) -> Light:
    distance = np.subtract.outer(np.arange(side), np.arange(side)) / sigma
    weights = np.exp(-0.5 * distance**2)
    return weights / weights.sum(axis=1, keepdims=True)
