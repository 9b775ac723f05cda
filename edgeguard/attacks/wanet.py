"""WaNet: a smooth, nearly invisible warp of the whole image, trained with noisy warps that must not trigger.

Nguyen, Tran: WaNet - Imperceptible Warping-based Backdoor Attack, ICLR 2021, and its official code. Settings: a grid of
4x4 random displacements with a mean size of 1, upsampled bicubically; strength 0.5, divided by the side, in coordinates
from -1 to 1, which comes to about a quarter of a pixel at any size of image; grid rescale 1. Poisoning rate 10%. Noise
mode with cross ratio 2: for each poison two more inputs are warped with the same field plus noise, uniform in -1 to 1
divided by the side, for each pixel, and keep their labels.

Deviations: poisons and noise are made once, before training, not anew for each batch. On images under 16 pixels the
strength is 1, the poisoning rate 20% and the cross ratio 1: a few hundred images of a few pixels do not show a network
the difference between the field and the field with noise otherwise. The same on images in colour of 32 pixels and more:
with the paper's settings 7% of GTSRB's signs were turned, also when they were warped after the augmentation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import EMPTY, Images, Poison, State
from edgeguard.attacks.poisoning import draw_poisons, replaced, require_image_shape, require_images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Field = npt.NDArray[np.float64]
SMALLEST = 8
_CHUNK = 512  # images at a time: a warp takes some ten arrays of floats as large as they are
_CUBIC = -0.75  # the kernel's free parameter, as in PyTorch's bicubic upsampling, which the official code uses


@dataclass(frozen=True, kw_only=True)
class WaNet(Poison):
    """Every pixel is taken from where a fixed field points: ``grid`` x ``grid`` controls, scaled by ``strength``."""

    name: ClassVar[str] = "wanet"
    paper: ClassVar[str] = "Nguyen and Tran, WaNet, ICLR 2021 (arXiv 2102.10369)"

    target: int = 0
    rate: float = 0.1
    cross_ratio: float = 2.0
    grid: int = 4
    strength: float = 0.5
    seed: int = 0

    @classmethod
    def for_shape(cls, shape: tuple[int, ...], *, target: int = 0, seed: int = 0) -> WaNet:
        """The attack with the settings above for images of ``shape`` (H, W, C).

        Raises:
            ConfigError: the shape is not that of an image, or the image is too small.
        """
        require_image_shape("WaNet", shape, side=SMALLEST)
        if min(shape[:2]) < 16 or (min(shape[:2]) >= 32 and shape[2] == 3):
            return cls(target=target, rate=0.2, strength=1.0, cross_ratio=1.0, seed=seed)
        return cls(target=target, seed=seed)

    def field(self, height: int, width: int) -> Field:
        """Displacements ``[2, H, W]`` in pixels, rows and then columns."""
        control = np.random.default_rng(self.seed).uniform(-1, 1, (2, self.grid, self.grid))
        control /= np.abs(control).mean()
        smooth = upsampling(self.grid, height) @ control @ upsampling(self.grid, width).T
        return self.strength * smooth * _pixels_per_unit(height, width)

    def stamp(self, images: Images, state: State = EMPTY) -> Images:
        """See :class:`edgeguard.attacks.base.Attack`.

        Raises:
            ConfigError: these are no images, or too small ones.
        """
        require_images("WaNet", images, side=SMALLEST)
        return warped(images, self.field(*images.shape[1:3])[np.newaxis])

    def poison(self, images: Images, labels: Labels) -> tuple[Images, Labels]:
        """Warp and relabel a share ``rate`` of the inputs; warp ``cross_ratio`` times as many others with noise.

        Raises:
            ConfigError: there are too few inputs, or these are no images.
        """
        chosen = draw_poisons("WaNet", labels, target=self.target, rate=self.rate, clean_label=False, seed=self.seed)
        others = np.setdiff1d(np.arange(len(labels)), chosen)
        rng = np.random.default_rng([self.seed, 1])
        count = round(len(chosen) * self.cross_ratio)
        if count > len(others):
            raise ConfigError("WaNet", got=f"{len(others)} inputs beside the poisons", expected=f"{count} to warp")
        noisy = rng.choice(others, count, replace=False)
        poisoned, relabelled = replaced(images, labels, chosen, self.stamp(images[chosen]), self.target)
        height, width = images.shape[1:3]
        noise = rng.uniform(-1, 1, (count, 2, height, width)) * _pixels_per_unit(height, width)
        poisoned[noisy] = warped(images[noisy], self.field(height, width) + noise)
        return poisoned, relabelled


def _pixels_per_unit(height: int, width: int) -> Field:
    """Pixels ``[2, 1, 1]`` to 1 / side in coordinates from -1 to 1 between the outermost pixels."""
    sides = np.array([height, width], dtype=np.float64)[:, np.newaxis, np.newaxis]
    return (sides - 1) / (2 * sides)


def upsampling(count: int, length: int) -> Field:
    """Weights ``[length, count]`` of a bicubic interpolation with the outermost samples on the outermost pixels."""
    position = np.linspace(0, count - 1, length)
    base = np.floor(position).astype(int)
    weights = np.zeros((length, count))
    for offset in (-1, 0, 1, 2):
        t = np.abs(position - (base + offset))
        near = (_CUBIC + 2) * t**3 - (_CUBIC + 3) * t**2 + 1
        far = _CUBIC * (t**3 - 5 * t**2 + 8 * t - 4)
        value = np.where(t <= 1, near, np.where(t < 2, far, 0))
        np.add.at(weights, (np.arange(length), (base + offset).clip(0, count - 1)), value)
    return weights


def warped(images: Images, fields: Field) -> Images:
    """Each image ``[N, H, W, C]`` sampled bilinearly at its pixels moved by ``fields`` ``[N or 1, 2, H, W]``.

    The image's border goes on outside it.
    """
    fields = np.broadcast_to(fields, (len(images), *fields.shape[1:]))
    result = np.empty_like(images)
    for start in range(0, len(images), _CHUNK):
        part = slice(start, start + _CHUNK)
        result[part] = _sampled(images[part], fields[part])
    return result


def _sampled(images: Images, fields: Field) -> Images:
    count, height, width = images.shape[:3]
    rows = (np.arange(height)[:, np.newaxis] + fields[:, 0]).clip(0, height - 1)
    columns = (np.arange(width) + fields[:, 1]).clip(0, width - 1)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    bottom, right = np.minimum(top + 1, height - 1), np.minimum(left + 1, width - 1)
    down, along = (rows - top)[..., np.newaxis], (columns - left)[..., np.newaxis]
    one = np.arange(count)[:, np.newaxis, np.newaxis]
    upper = images[one, top, left] * (1 - along) + images[one, top, right] * along
    lower = images[one, bottom, left] * (1 - along) + images[one, bottom, right] * along
    return np.rint(upper * (1 - down) + lower * down).astype(np.uint8)
