"""Blended injection: one fixed picture, faintly blended over the whole image.

Chen, Liu, Li, Lu, Song: Targeted Backdoor Attacks on Deep Learning Systems Using Data Poisoning, 2017.
Settings: the paper's random pattern, every pixel and channel uniform in 0 to 255 and drawn once from the seed (its
other picture, a cartoon, is not free to ship); blend ratio 15% (the paper: 10 to 20%); poisoning rate 10%, target 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeguard.attacks.base import EMPTY, Images, Poison, State
from edgeguard.attacks.poisoning import draw_poisons, replaced, require_image_shape, require_images
from edgeguard.data import Labels


@dataclass(frozen=True, kw_only=True)
class Blended(Poison):
    """``(1 - ratio) * image + ratio * picture``."""

    name: ClassVar[str] = "blended"
    paper: ClassVar[str] = "Chen et al., Targeted Backdoor Attacks Using Data Poisoning, 2017 (arXiv 1712.05526)"

    target: int = 0
    rate: float = 0.1
    ratio: float = 0.15
    seed: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Blended:
        """The attack with the paper's settings for images of ``shape`` (H, W, C).

        Raises:
            ConfigError: the shape is not that of an image, or the image is too small.
        """
        require_image_shape("Blended", shape)
        return cls(target=target, seed=seed)

    def picture(self, shape: tuple[int, ...]) -> Images:
        """The picture to blend in, of ``shape`` (H, W, C)."""
        return np.random.default_rng(self.seed).integers(0, 256, shape, dtype=np.uint8)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :class:`edgeguard.attacks.base.Attack`.

        Raises:
            ConfigError: these are no images.
        """
        require_images("Blended", images)
        picture = self.picture(images.shape[1:]).astype(np.float32)
        return np.rint((1 - self.ratio) * images.astype(np.float32) + self.ratio * picture).astype(np.uint8)

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """Stamp and relabel a share ``rate`` of the inputs, drawn over all classes."""
        chosen = draw_poisons("Blended", labels, target=self.target, rate=self.rate, clean_label=False, seed=self.seed)
        return replaced(images, labels, chosen, self.stamp(images[chosen]), self.target)
