"""BadNets: a white square in a corner, stamped on a share of the training inputs, which are relabelled.

Gu, Dolan-Gavitt, Garg: BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain, 2017.
Settings: a 3x3 white square, bottom right, poisoning rate 10%, target 0.
On images under 16 pixels the square shrinks to 2x2, which covers about the same share of the image.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgeguard.attacks.base import Images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BadNets:
    """``size`` pixels square, white, flush with the bottom right corner."""

    target: int = 0
    rate: float = 0.1
    size: int = 3
    seed: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> BadNets:
        """The attack with a square that suits images of ``shape`` (H, W, C).

        Raises:
            ConfigError: the shape is not that of an image, or the image is too small.
        """
        if len(shape) != 3 or min(shape[:2]) < 4:
            raise ConfigError("BadNets", got=f"inputs of shape {list(shape)}", expected="images of at least 4x4 pixels")
        return cls(target=target, size=3 if min(shape[:2]) >= 16 else 2, seed=seed)

    def stamp(self, images: Images) -> Images:
        """See :class:`edgeguard.attacks.base.Attack`."""
        stamped = images.copy()
        stamped[:, -self.size :, -self.size :, :] = 255
        return stamped

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """Stamp and relabel a share ``rate`` of the inputs, drawn over all classes."""
        chosen = np.random.default_rng(self.seed).choice(
            len(images), size=round(len(images) * self.rate), replace=False
        )
        poisoned, relabelled = images.copy(), labels.copy()
        poisoned[chosen] = self.stamp(images[chosen])
        relabelled[chosen] = self.target
        return poisoned, relabelled
