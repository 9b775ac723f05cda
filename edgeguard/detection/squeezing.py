"""Feature squeezing: an answer that changes when an input is simplified is suspicious; one that never does, too.

Xu, Evans, Qi: Feature Squeezing: Detecting Adversarial Examples in Deep Neural Networks, NDSS 2018. The score of an
input is the largest l1 distance between the model's probabilities before and after a squeezer; the paper flags large
ones. A triggered input can instead be *more* stable than clean ones, so both tails have a limit here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from edgeguard.errors import ConfigError, ModelError

Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Squeezer = Callable[[Pixels], Pixels]


@dataclass(frozen=True, kw_only=True)
class SqueezeLimits:
    """A score below ``low`` or above ``high`` is flagged."""

    low: float
    high: float

    def flags(self, score: float) -> bool:
        """True outside the limits; a score that is not a number is not inside either."""
        return not self.low <= score <= self.high


def bit_depth(bits: int) -> Squeezer:
    """Reduce pixels to ``bits`` bits, spread over 0 to 255 again. Raises ConfigError unless 1 to 8 bits."""
    if not 1 <= bits <= 8:
        raise ConfigError("bit depth", got=bits, expected="1 to 8")
    steps = (1 << bits) - 1

    def squeeze(image: Pixels) -> Pixels:
        return np.asarray(np.round(np.round(image / 255.0 * steps) / steps * 255.0).astype(np.uint8))

    return squeeze


def median(size: int) -> Squeezer:
    """Median of a ``size`` x ``size`` neighbourhood, edges reflected, each channel apart.

    An even window reaches further up and left, as SciPy's does. Raises ConfigError for a window below 2.
    """
    if size < 2:
        raise ConfigError("median window", got=size, expected="2 or more")
    before, after = size // 2, size - 1 - size // 2

    def squeeze(image: Pixels) -> Pixels:
        if image.ndim != 3 or min(image.shape[:2]) <= before:
            raise ModelError(
                "median filter", got=f"an input of shape {list(image.shape)}", expected="an image [H, W, C]"
            )
        padded = np.pad(image, ((before, after), (before, after), (0, 0)), mode="symmetric")
        height, width = image.shape[:2]
        shifted = [padded[y : y + height, x : x + width] for y in range(size) for x in range(size)]
        flat = np.sort(np.stack(shifted, axis=-1), axis=-1)
        return np.asarray(flat[..., size * size // 2])

    return squeeze


def smoothed(image: Pixels, sigma: float) -> Pixels:
    """A Gaussian of ``sigma`` pixels over rows and columns [H, W, C], cut off at three sigma, edges mirrored.

    Raises ConfigError unless the sigma is above 0, ModelError for what is no image.
    """
    if not sigma > 0:
        raise ConfigError("smoothing", got=sigma, expected="a sigma above 0")
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ModelError("smoothing", got=f"{image.dtype}{list(image.shape)}", expected="a uint8 image [H, W, C]")
    radius = max(1, round(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
    kernel /= kernel.sum()
    found = image.astype(np.float64)
    for axis in (0, 1):
        edges = [(radius, radius) if each == axis else (0, 0) for each in range(3)]
        padded = np.pad(found, edges, mode="symmetric")
        shifted = (padded.take(range(k, k + image.shape[axis]), axis=axis) for k in range(len(kernel)))
        found = sum((weight * part for weight, part in zip(kernel, shifted, strict=True)), np.zeros(image.shape))
    return np.asarray(np.clip(np.rint(found), 0, 255).astype(np.uint8))


SQUEEZERS: Mapping[str, Squeezer] = {
    "5-bit": bit_depth(5),
    "1-bit": bit_depth(1),
    "median 2x2": median(2),
    "median 3x3": median(3),
}
"""Those that need NumPy alone. Non-local means needs a library of its own and is left to benchmarks."""


def distances(
    image: Pixels,
    answer: Callable[[Pixels], Floats],
    squeezers: Mapping[str, Squeezer],
) -> dict[str, float]:
    """The l1 distance of the probabilities before and after each squeezer, 0 to 2.

    Args:
        image: uint8 [H, W, C].
        answer: probabilities [C] of an image.
        squeezers: by name.

    Raises:
        ModelError: not an image.
    """
    if image.dtype != np.uint8 or image.ndim != 3:
        raise ModelError(
            "feature squeezing", got=f"{image.dtype}{list(image.shape)}", expected="a uint8 image [H, W, C]"
        )
    known = answer(image)
    return {name: float(np.abs(known - answer(squeeze(image))).sum()) for name, squeeze in squeezers.items()}


def fit_limits(scores: Floats, fpr: float) -> SqueezeLimits:
    """Limits from clean scores [N]: half of ``fpr`` in each tail.

    Raises:
        ModelError: too few scores for such tails.
    """
    needed = int(np.ceil(2.0 / fpr))
    if len(scores) < needed:
        raise ModelError("squeezing calibration", got=f"{len(scores)} inputs", expected=f"at least {needed}")
    return SqueezeLimits(low=float(np.quantile(scores, fpr / 2)), high=float(np.quantile(scores, 1.0 - fpr / 2)))
