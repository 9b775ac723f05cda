"""What data-poisoning attacks share: which data they refuse, which inputs they draw, and how poisons enter the data."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from edgeguard.attacks.base import Images
from edgeguard.data import Labels
from edgeguard.errors import ConfigError

Indices = npt.NDArray[np.intp]


def require_image_shape(what: str, shape: tuple[int, ...], *, side: int = 4) -> None:
    """Refuse what is not the shape (H, W, C) of an image with sides of at least ``side`` pixels.

    Raises:
        ConfigError: it is not.
    """
    if len(shape) != 3 or min(shape[:2]) < side or shape[2] < 1:
        expected = f"images of at least {side}x{side} pixels"
        raise ConfigError(what, got=f"inputs of shape {list(shape)}", expected=expected)


def require_images(what: str, images: Images, *, side: int = 4) -> None:
    """Refuse what is not ``uint8 [N, H, W, C]`` with sides of at least ``side`` pixels.

    Raises:
        ConfigError: it is not.
    """
    if images.dtype != np.uint8:
        raise ConfigError(what, got=f"inputs of type {images.dtype}", expected="images with pixels 0 to 255 (uint8)")
    require_image_shape(what, images.shape[1:], side=side)


def draw_poisons(what: str, labels: Labels, *, target: int, rate: float, clean_label: bool, seed: int) -> Indices:
    """Which training inputs to poison.

    Args:
        what: the attack, for the error.
        labels: of the training set [N].
        target: the attack's target label.
        rate: with ``clean_label`` the share of the target's inputs, else of all inputs, the target's own included.
        clean_label: poison only inputs that already have the target label.
        seed: of the draw.

    Raises:
        ConfigError: none can be drawn.
    """
    candidates = np.flatnonzero(labels == target) if clean_label else np.arange(len(labels))
    count = round(len(candidates) * rate)
    if not 1 <= count <= len(candidates):
        of_what = f"with label {target}" if clean_label else "in all"
        raise ConfigError(
            what, got=f"{len(candidates)} training inputs {of_what}", expected=f"enough to poison {rate:.0%} of them"
        )
    return np.random.default_rng(seed).choice(candidates, size=count, replace=False)


def replaced(images: Images, labels: Labels, chosen: Indices, poisons: Images, target: int) -> tuple[Images, Labels]:
    """A copy of a training set in which ``poisons`` with the target label stand in the place of the chosen inputs."""
    poisoned, relabelled = images.copy(), labels.copy()
    poisoned[chosen] = poisons
    relabelled[chosen] = target
    return poisoned, relabelled
