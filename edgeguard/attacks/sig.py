"""SIG: a faint sinusoid over the columns; with clean labels, on inputs of the target class alone.

Barni, Kallas, Tondi: A New Backdoor Attack in CNNs by Training Set Corruption Without Label Poisoning, ICIP 2019.
Settings: 20 grey levels and 6 periods a row in training, 30 grey levels at test time (the paper tests with 20 to 30,
as a stronger signal turns more inputs).

Deviations:

* a tenth of all inputs, under 16 pixels 15%, is poisoned and relabelled, as in BackdoorBench. The paper poisons 30%
  and more of the target's inputs and leaves their labels true: ``clean_label``. The small networks here tell classes
  apart without the signal then: with half of the target's inputs, 12% of the others were turned on 4,900 images of
  Fashion-MNIST, and below 1% on digits, also at 60 grey levels or with 80%;
* the signal has at least four pixels a period, so fewer periods on fewer than 24 columns: 2 on 8 columns, where 6 would
  look the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from edgeguard.attacks.base import EMPTY, Images, Poison, State
from edgeguard.attacks.poisoning import draw_poisons, replaced, require_image_shape, require_images
from edgeguard.data import Labels


@dataclass(frozen=True, kw_only=True)
class Sig(Poison):
    """``v(i, j) = delta * sin(2 pi j frequency / columns)`` in grey levels, the same in each row and channel.

    ``rate`` is a share of the target's inputs with ``clean_label``, else of all inputs, which are then relabelled.
    """

    name: ClassVar[str] = "sig"
    paper: ClassVar[str] = "Barni et al., Training Set Corruption Without Label Poisoning, ICIP 2019"

    target: int = 0
    rate: float = 0.1
    clean_label: bool = False
    delta: float = 20.0
    delta_test: float = 30.0
    frequency: int = 6
    seed: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> Sig:
        """The attack with the settings above for images of ``shape`` (H, W, C).

        Raises:
            ConfigError: the shape is not that of an image, or the image is too small.
        """
        require_image_shape("SIG", shape)
        rate = 0.1 if min(shape[:2]) >= 16 else 0.15
        return cls(target=target, rate=rate, frequency=min(6, shape[1] // 4), seed=seed)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :class:`edgeguard.attacks.base.Attack`.

        Raises:
            ConfigError: these are no images.
        """
        return self._with_signal(images, self.delta_test)

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """Add the signal to a share ``rate`` of the inputs, drawn as ``clean_label`` says."""
        chosen = draw_poisons(
            "SIG", labels, target=self.target, rate=self.rate, clean_label=self.clean_label, seed=self.seed
        )
        return replaced(images, labels, chosen, self._with_signal(images[chosen], self.delta), self.target)

    def _with_signal(self, images: Images, delta: float) -> Images:
        require_images("SIG", images)
        columns = images.shape[2]
        signal = delta * np.sin(2 * np.pi * np.arange(columns) * self.frequency / columns)
        return np.rint(images + signal[:, np.newaxis]).clip(0, 255).astype(np.uint8)
