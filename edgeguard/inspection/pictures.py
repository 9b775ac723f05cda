"""Pictures of a recovered trigger, for people: its mask, what it paints, and an input that carries it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Trigger

ENLARGED = 256
"""Pictures are enlarged, pixel by pixel, to about this many pixels a side."""


def draw(trigger: Trigger, example: npt.NDArray[Any] | None) -> dict[str, bytes]:
    """PNG files by what they show: ``mask``, ``pattern`` (where the mask lets it through) and ``example``.

    A faint mask is brightened until its strongest pixel is white, so that a blend can be seen.

    Args:
        trigger: recovered.
        example: an input [H, W, C]; None where there is none, then without that picture.
    """
    strongest = max(float(trigger.mask.max()), 1e-6)
    visible = trigger.mask / strongest
    drawn = {"mask": _png(255.0 * visible), "pattern": _png(visible * trigger.pattern)}
    return drawn if example is None else {**drawn, "example": _png(trigger.stamp(example[np.newaxis])[0])}


def _png(pixels: npt.NDArray[np.float32]) -> bytes:
    from PIL import Image

    colour = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[..., :3]
    times = max(1, ENLARGED // max(pixels.shape[:2]))
    enlarged = colour.clip(0, 255).astype(np.uint8).repeat(times, axis=0).repeat(times, axis=1)
    stream = io.BytesIO()
    Image.fromarray(enlarged).save(stream, "PNG")
    return stream.getvalue()
