"""A contact sheet of a trigger: clean images, the same with the trigger, and what the trigger changed, amplified."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from edgeguard.attacks.base import Images
from edgeguard.errors import ConfigError

CELL = 96
GAP = 8
MARGIN = 104
BACKGROUND, INK = (255, 255, 255), (32, 32, 32)


def amplified(clean: Images, triggered: Images) -> tuple[Images, int]:
    """Absolute differences times the largest whole number that keeps all of them within 255, and that number."""
    difference = np.abs(triggered.astype(np.int16) - clean.astype(np.int16))
    factor = 255 // max(1, int(difference.max()))
    return (difference * factor).astype(np.uint8), factor


def contact_sheet(clean: Images, triggered: Images) -> Image.Image:
    """Draw the sheet: a column for each image, small ones enlarged without smoothing to about ``CELL`` pixels.

    Raises:
        ConfigError: the images are neither grey nor RGB.
    """
    count, height, width, channels = clean.shape
    if channels not in {1, 3}:
        raise ConfigError("contact sheet", got=f"images with {channels} channels", expected="1 (grey) or 3 (RGB)")
    difference, factor = amplified(clean, triggered)
    scale = max(1, CELL // max(height, width))
    step_x, step_y = width * scale + GAP, height * scale + GAP
    sheet = Image.new("RGB", (MARGIN + count * step_x, GAP + 3 * step_y), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    rows = (("clean", clean), ("triggered", triggered), (f"difference x{factor}", difference))
    for row, (title, images) in enumerate(rows):
        top = GAP + row * step_y
        draw.text((GAP, top + step_y // 2 - GAP), title, fill=INK)
        for column, image in enumerate(np.broadcast_to(images, (count, height, width, 3))):
            cell = Image.fromarray(np.ascontiguousarray(image))
            enlarged = cell.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (MARGIN + column * step_x, top))
    return sheet
