"""JPEG and PNG files to what a model takes.

Rules enforced here:

* a file is hostile: pixels and scans are bounded before any are decoded, and whatever is wrong with it is one
  ModelError; formats other than JPEG and PNG never reach a decoder;
* one file gives one input, in this order: turned as EXIF says; 16 bits cut to the upper 8; transparency dropped, not
  composited, so that the colour of an invisible pixel counts; grey or colour as the model asks; the whole image brought
  to its size, aspect ratio not kept, bilinear over the area that each new pixel covers;
* what needs none of that stays as it is, pixel by pixel: an image of the model's own size gives what ``edgeguard.data``
  reads from a folder;
* of an animation the first image counts, the one that a viewer without animations shows.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from edgeguard.contract.guard import ModelInput
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]
Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 25_000_000
"""Decoding takes up to 8 bytes for each: 200 MB at the bound, as much as a small board can spare for a moment."""
MAX_SCANS = 100
"""A progressive JPEG usually has ten. Each is a pass over all pixels and takes less than a hundred bytes to ask for."""

_START_OF_SCAN = b"\xff\xda"
_MODES = {1: "L", 3: "RGB"}


def decode(content: bytes, expected: ModelInput) -> Array:
    """One input [H, W, C] of the model's own type.

    Args:
        content: a JPEG or PNG file.
        expected: what the model takes. uint8 gets pixels as they are; any other type has 0 to 255 mapped linearly to
            its range, rounded where it holds whole numbers.

    Raises:
        ModelError: the model's input is no image, or the file cannot be decoded.
    """
    check(expected)
    try:
        pixels = _pixels(content, *expected.shape)
    except Exception as error:  # a hostile image makes the decoders raise whatever they like
        unknown = isinstance(error, UnidentifiedImageError)  # its text is a memory address
        raise ModelError(
            "image",
            got=f"{len(content)} bytes that begin like neither" if unknown else str(error)[:200] or repr(error),
            expected="a JPEG or PNG file",
            do="remove or replace it",
        ) from error
    return _scaled(pixels, expected)


def fit(pixels: Pixels, expected: ModelInput) -> Array:
    """One input [H, W, C] of the model's own type, from pixels [h, w] (grey) or [h, w, 3] (RGB) of any size.

    Raises:
        ModelError: the model's input is no image.
    """
    check(expected)
    return _scaled(_fitted(Image.fromarray(pixels), *expected.shape), expected)


def check(expected: ModelInput) -> None:
    """Raise ModelError unless the model takes images."""
    if len(expected.shape) != 3 or expected.shape[2] not in _MODES:
        raise ModelError(
            "model input",
            got=f"an image for {expected.dtype}{list(expected.shape)}",
            expected="a model of images, [H, W, C] with C of 1 or 3",
            do="feed this model arrays",
        )


def is_image(content: bytes) -> bool:
    """Whether these bytes begin as a JPEG or PNG file does."""
    return content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"))


def _pixels(content: bytes, height: int, width: int, channels: int) -> Pixels:
    """Pixels [H, W, C], 0 to 255. Raises anything on hostile content."""
    with Image.open(io.BytesIO(content), formats=("JPEG", "PNG")) as file:
        if file.width * file.height > MAX_PIXELS:
            raise ValueError(f"{file.width}x{file.height} pixels, at most {MAX_PIXELS} in all")
        if file.format != "PNG" and content.count(_START_OF_SCAN) > MAX_SCANS:
            raise ValueError(f"more than {MAX_SCANS} scans")
        ImageOps.exif_transpose(file, in_place=True)
        file.info.pop("transparency", None)
        image: Image.Image = file
        if image.mode.startswith("I"):  # grey of 16 bits, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        return _fitted(image, height, width, channels)


def _fitted(image: Image.Image, height: int, width: int, channels: int) -> Pixels:
    if image.mode != _MODES[channels]:
        image = image.convert(_MODES[channels])
    return np.asarray(image.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, channels)


def _scaled(pixels: Pixels, expected: ModelInput) -> Array:
    if expected.dtype == "uint8":
        return pixels
    low, high = expected.range
    values = pixels.astype(np.float32) * np.float32(high - low) / np.float32(255) + np.float32(low)
    dtype = np.dtype(expected.dtype)
    if not np.issubdtype(dtype, np.integer):
        return values
    limits = np.iinfo(dtype)
    return np.clip(np.round(values), limits.min, limits.max).astype(dtype)
