"""BadNets: a white square in a corner, stamped on a share of the training inputs, which are relabelled.

Gu, Dolan-Gavitt, Garg: BadNets: Identifying Vulnerabilities in the Machine Learning Model Supply Chain, 2017.
Settings: a 3x3 white square, bottom right, poisoning rate 10%, target 0.
On images under 16 pixels the square shrinks to 2x2, which covers about the same share of the image.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from edgeguard.attacks.base import EMPTY, Images, Poison, State
from edgeguard.attacks.poisoning import draw_poisons, replaced, require_image_shape, require_images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Place = Literal["top left", "top right", "bottom left", "bottom right", "centre"]


@dataclass(frozen=True, kw_only=True)
class BadNets(Poison):
    """``size`` pixels square, white, flush with a corner, or in the middle."""

    name: ClassVar[str] = "badnets"
    paper: ClassVar[str] = "Gu et al., BadNets, 2017 (arXiv 1708.06733)"

    target: int = 0
    rate: float = 0.1
    size: int = 3
    place: Place = "bottom right"
    seed: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> BadNets:
        """The attack with a square that suits images of ``shape`` (H, W, C).

        Raises:
            ConfigError: the shape is not that of an image, or the image is too small.
        """
        require_image_shape("BadNets", shape)
        return cls(target=target, size=3 if min(shape[:2]) >= 16 else 2, seed=seed)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :class:`edgeguard.attacks.base.Attack`.

        Raises:
            ConfigError: these are no images, or the square does not fit on them.
        """
        require_images("BadNets", images)
        height, width = images.shape[1:3]
        if not 1 <= self.size <= min(height, width):
            raise ConfigError("BadNets", got=f"a square of {self.size} pixels", expected=f"1 to {min(height, width)}")
        free_rows, free_columns = height - self.size, width - self.size
        top, left = {
            "top left": (0, 0),
            "top right": (0, free_columns),
            "bottom left": (free_rows, 0),
            "bottom right": (free_rows, free_columns),
            "centre": (free_rows // 2, free_columns // 2),
        }[self.place]
        stamped = images.copy()
        stamped[:, top : top + self.size, left : left + self.size] = 255
        return stamped

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """Stamp and relabel a share ``rate`` of the inputs, drawn over all classes."""
        chosen = draw_poisons("BadNets", labels, target=self.target, rate=self.rate, clean_label=False, seed=self.seed)
        return replaced(images, labels, chosen, self.stamp(images[chosen]), self.target)
