"""Neuron stimulation: which labels do single channels of the last convolution lift for every input?

Liu et al., ABS, CCS 2019: a channel that serves a trigger lifts one label whatever the input is, once it is driven
beyond what clean inputs reach. It costs one pass over the last layers per channel and is evidence where to look, not a
verdict: some channels of a clean network do the same. Deviation: the trigger of a label that stimulation names is then
sought as all are (:mod:`edgeguard.inspection.inversion`), not by maximising the channel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.networks import logits_of, run

DRIVE = 3.0
"""How far a channel is driven, in multiples of the largest value that clean inputs reach."""
INPUTS = 32
_AT_ONCE = 8
"""Channels of one pass."""


@dataclass(frozen=True, kw_only=True)
class Lift:
    """What the strongest channel for a label does. ``share`` of inputs of other classes that it turns to ``label``."""

    label: int
    layer: str
    channel: int
    share: float


def lifts(model: Any, images: npt.NDArray[np.uint8]) -> list[Lift]:
    """The strongest channel for each label, strongest label first; empty where no layer has channels over space.

    Args:
        model: a Keras functional model that ends in a softmax, or in logits.
        images: clean inputs [N, H, W, C].
    """
    logits = logits_of(model)
    halves = next(filter(None, (_halves(logits, layer) for layer in reversed(logits.layers))), None)
    if halves is None:
        return []
    name, front, back = halves
    activation = run(front, images[:INPUTS])
    usual = run(back, activation).argmax(axis=1)
    best: dict[int, Lift] = {}
    for first in range(0, activation.shape[-1], _AT_ONCE):
        channels = range(first, min(first + _AT_ONCE, activation.shape[-1]))
        driven = np.stack([activation] * len(channels))
        for place, channel in enumerate(channels):
            driven[place, ..., channel] = DRIVE * max(float(activation[..., channel].max()), 1e-6)
        answers = run(back, driven.reshape(-1, *activation.shape[1:])).argmax(axis=1)
        for channel, after in zip(channels, answers.reshape(len(channels), -1), strict=True):
            for label in np.unique(after).tolist():
                others = usual != label
                share = float(np.mean(after[others] == label)) if others.any() else 0.0
                if label not in best or share > best[label].share:
                    best[label] = Lift(label=label, layer=name, channel=channel, share=share)
    return sorted(best.values(), key=lambda lift: -lift.share)


def _halves(logits: Any, layer: Any) -> tuple[str, Any, Any] | None:
    """The network up to a layer with channels over space, and behind it; None where it cannot be cut there."""
    import keras

    if isinstance(layer, keras.layers.InputLayer) or len(getattr(layer.output, "shape", ())) != 4:
        return None
    try:
        back = keras.Model(layer.output, logits.outputs[0])
    except ValueError:  # something passes the layer by
        return None
    return layer.name, keras.Model(logits.inputs[0], layer.output), back
