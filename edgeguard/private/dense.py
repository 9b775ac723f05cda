"""The layers of a Keras network that are shared for a private inspection, and the ones before them.

Rules enforced here:

* what cannot be computed jointly as it stands is refused: shared are one or two dense layers with a ReLU between them,
  and for an inspection in pixels nothing but scaling and reshaping comes before;
* inputs are taken from all over the file, whatever its order, and those of another range are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.contract.private import Inspection, Space
from edgeguard.errors import ModelError

_IDLE = frozenset({"InputLayer", "Flatten", "Reshape", "Dropout"})


@dataclass(frozen=True, kw_only=True)
class Shared:
    """``dense``: the Keras layers to share, first to last; ``factor``: what inputs are multiplied by before them."""

    dense: tuple[Any, ...]
    factor: float

    @property
    def layers(self) -> tuple[int, ...]:
        """Values in, hidden units, classes."""
        return (int(self.dense[0].kernel.shape[0]), *(int(layer.kernel.shape[1]) for layer in self.dense))

    def arrays(self, asked: Inspection) -> list[npt.NDArray[np.float64]]:
        """Kernels and biases for inputs of which ``asked.scale`` counts as 1."""
        arrays = [np.asarray(a, np.float64) for layer in self.dense for a in (layer.kernel, layer.bias)]
        arrays[0] = arrays[0] * (self.factor * asked.scale)
        return arrays


def shared(model: Any, space: Space) -> Shared:
    """The layers of a network that an inspection shares.

    Args:
        model: a Keras model, one layer after another, that ends in classes.
        space: ``pixels`` for all layers, ``features`` for the last dense ones.

    Raises:
        ModelError: its layers are no such ones.
    """
    dense: list[Any] = []
    factor = 1.0
    relu = scaled = False
    for layer in reversed(model.layers):
        kind, activation = type(layer).__name__, getattr(getattr(layer, "activation", None), "__name__", "linear")
        if kind == "Dense" and len(dense) < 2 and _joins(activation, relu, bool(dense)):
            if scaled:
                raise _refused(layer, "a scale after it")
            if layer.bias is None or (not dense and activation not in ("softmax", "linear")):
                raise _refused(layer, f"{activation}, bias {layer.bias is not None}")
            dense.insert(0, layer)
            relu = False
        elif kind == "ReLU" and len(dense) == 1 and _plain(layer):
            relu = True
        elif kind == "Rescaling" and space == "pixels" and dense and not np.any(layer.offset):
            if np.ndim(layer.scale):
                raise _refused(layer, "a scale for each channel")
            factor *= float(layer.scale)
            scaled = True
        elif kind not in _IDLE and not (kind == "Softmax" and not dense):
            if space == "features" and dense:
                break
            raise _refused(layer, kind)
    if not dense:
        raise ModelError("network", got="no dense layer at its end", expected="classes from a dense layer")
    return Shared(dense=tuple(dense), factor=factor)


def extractor(model: Any, first: Any) -> Any:
    """The layers before the shared ones, which the data owner is given: from inputs to features [N, D]."""
    import keras

    return keras.Model(model.inputs, first.input)


def inputs(asked: Inspection, images: npt.NDArray[Any], before: Any | None) -> npt.NDArray[np.float64]:
    """What the data owner shares: [sought + held_out, D] from 0 to 1.

    Args:
        asked: the inspection.
        images: clean inputs [N, ...].
        before: the layers that the model's owner gave, for an inspection of features.

    Raises:
        ModelError: too few inputs, others than the layers take, or layers that give something else.
    """
    count = asked.sought + asked.held_out
    if len(images) < count:
        raise ModelError("clean inputs", got=len(images), expected=f"{count} for this inspection")
    if images.dtype != np.uint8 and (asked.space == "features" or asked.scale > 1) and images.max() <= 1:
        raise ModelError("clean inputs", got=f"up to {images.max():g}", expected="pixels from 0 to 255")
    if asked.space == "pixels" and images.max() > asked.scale:
        raise ModelError("clean inputs", got=f"up to {images.max():g}", expected=f"0 to {asked.scale:g}, as planned")
    taken = np.asarray(images[chosen(count, len(images))], np.float32)
    if asked.space == "features":
        if before is None or taken.shape[1:] != tuple(before.inputs[0].shape[1:]):
            raise ModelError(
                "clean inputs", got=taken.shape[1:], expected="what the layers before the shared ones take"
            )
        taken = np.asarray(before.predict(taken, verbose=0))
    flat = taken.reshape(count, -1).astype(np.float64) / asked.scale
    if flat.min() < 0:
        raise ModelError("inputs of the shared layers", got="negative ones", expected="0 or more, as after a ReLU")
    return np.minimum(flat, 1.0)


def chosen(count: int, available: int) -> npt.NDArray[np.int64]:
    """Places [count] of the inputs to share: a file may be sorted by class."""
    return np.random.default_rng(0).permutation(available)[:count]


def mended(model: Any, last: Sequence[npt.NDArray[Any]]) -> None:
    """Put a mended last layer into a network, in place."""
    next(layer for layer in reversed(model.layers) if type(layer).__name__ == "Dense").set_weights(list(last))


def _joins(activation: str, relu: bool, before_another: bool) -> bool:
    """Whether one ReLU, and nothing else, comes after a dense layer; none after the last."""
    return (activation, relu) in (("relu", False), ("linear", True), ("relu", True)) if before_another else not relu


def _plain(layer: Any) -> bool:
    return layer.max_value is None and not layer.negative_slope and not layer.threshold


def _refused(layer: Any, got: str) -> ModelError:
    return ModelError(
        f"layer {layer.name}", got=got, expected="dense layers, at most one ReLU between them", do="share features"
    )
