"""Evidence-guided l-infinity pruning: silence the channels that devices saw move with the trigger.

The channels of the tapped layers are ranked by how far the fleet's flagged inputs shifted their l-infinity norm, in
clean standard deviations (after Cheng et al., Defending against Backdoor Attack on Deep Neural Networks, 2020), and
silenced one after another while the model still gives its own clean answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import Tap
from edgeguard.errors import ModelError

MAX_SHARE = 0.15
MIN_SHIFT = 2.0


@dataclass(frozen=True)
class Channel:
    """One channel of one layer, and how far the trigger shifted it, in clean standard deviations."""

    layer: str
    channel: int
    shift: float


class Dormant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Channels of one layer that devices find least active on clean inputs, the least active first."""

    layer: str
    channels: tuple[int, ...]


def rank(taps: Sequence[Tap], shift: npt.NDArray[np.float64]) -> list[Channel]:
    """Channels by the upward shift of their l-infinity norm, largest first; those below MIN_SHIFT are left out.

    Args:
        taps: of the guarded model.
        shift: [D], flagged minus unflagged mean features, in clean standard deviations.
    """
    channels = [
        Channel(tap.source_layer, i, float(shift[tap.offset + i]))
        for tap in taps
        if tap.kind == "linf" and tap.source_layer
        for i in range(tap.channels)
    ]
    return sorted((c for c in channels if c.shift >= MIN_SHIFT), key=lambda c: -c.shift)


def with_dormant(ranked: Sequence[Channel], dormant: Sequence[Dormant], taps: Sequence[Tap]) -> list[Channel]:
    """The ranked channels, and after them those that the fleet finds dormant on clean inputs.

    A backdoor may live in channels that clean inputs leave alone: federated pruning (Wu et al., Mitigating Backdoor
    Attacks in Federated Learning, 2020). Layers and channels that are not tapped are left out.
    """
    widths = {tap.source_layer: tap.channels for tap in taps if tap.kind != "logit" and tap.source_layer}
    known = {(channel.layer, channel.channel) for channel in ranked}
    more = [
        Channel(entry.layer, channel, 0.0)
        for entry in dormant
        for channel in dict.fromkeys(entry.channels)
        if 0 <= channel < widths.get(entry.layer, 0) and (entry.layer, channel) not in known
    ]
    return [*ranked, *more]


def prune(
    model: Any, ranked: Sequence[Channel], *, agrees: Callable[[Any], float], max_loss: float = 0.01
) -> tuple[Channel, ...]:
    """Silence ranked channels in place, most suspicious first.

    Args:
        model: a Keras model; its weights are changed.
        ranked: as :func:`rank` gives them.
        agrees: share of clean inputs on which the model still gives the original's answer, 0 to 1.
        max_loss: how much of that agreement may be lost.

    Returns:
        The channels that were silenced.
    """
    if not ranked:
        return ()
    layers = {name: _producer(model, name) for name in {c.layer for c in ranked}}
    width = {name: int(layer.get_weights()[0].shape[-1]) for name, layer in layers.items()}
    best: tuple[Channel, ...] = ()
    kept = model.get_weights()
    for count in _steps(min(len(ranked), int(MAX_SHARE * sum(width.values())))):
        for channel in ranked[len(best) : count]:
            _silence(layers[channel.layer], channel.channel)
        if agrees(model) < 1.0 - max_loss:
            model.set_weights(kept)
            break
        best, kept = tuple(ranked[:count]), model.get_weights()
    return best


def _steps(limit: int) -> list[int]:
    """1, 2, 4, ... up to the limit."""
    steps = [2**i for i in range(limit.bit_length()) if 2**i <= limit]
    return steps if not steps or steps[-1] == limit else [*steps, limit]


def _producer(model: Any, name: str) -> Any:
    """The nearest layer before ``name`` whose weights scale its channels: a batch-norm, convolution or dense layer.

    Raises:
        ModelError: there is none on a straight path.
    """
    import keras

    layer = model.get_layer(name)
    while True:
        if isinstance(layer, keras.layers.BatchNormalization | keras.layers.Conv2D | keras.layers.Dense):
            return layer
        source = layer.input
        if isinstance(source, list) or not hasattr(source, "_keras_history"):
            raise ModelError(f"layer {name}", got="no single layer before it", expected="a convolution to prune")
        layer = source._keras_history.operation


def _silence(layer: Any, channel: int) -> None:
    """Make a channel constantly zero before its activation."""
    weights = layer.get_weights()
    # Batch-norm: gamma and beta; convolution and dense: kernel (channels last) and bias. Statistics stay.
    for index in range(min(2, len(weights))):
        weights[index][..., channel] = 0.0
    layer.set_weights(weights)


__all__ = ["Channel", "Dormant", "prune", "rank", "with_dormant"]
