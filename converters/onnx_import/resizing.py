"""Resize and Upsample: along each axis a choice of elements, or a weighted sum of a few.

Keras's own resizing is used where it computes the same; every other combination of attributes becomes indices or a
small matrix per axis, worked out here in NumPy as the operator's specification says.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from keras import ops

from converters.onnx_import import layout
from converters.onnx_import.builder import Builder, Value, known, known_ints, normalised
from converters.onnx_import.graph import Node
from converters.onnx_import.registry import operator

MODES = (
    "half_pixel",
    "half_pixel_symmetric",
    "pytorch_half_pixel",
    "align_corners",
    "asymmetric",
    "tf_half_pixel_for_nn",
)
NEAREST = ("round_prefer_floor", "round_prefer_ceil", "floor", "ceil")
Targets: TypeAlias = dict[int, tuple[int, float]]
"""For each axis its new size and its scale."""
LARGEST = 1 << 24
"""Elements of a matrix of weights."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """How positions of the result fall on the data, and what is taken there."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    outside: bool = True
    antialias: bool = False


@operator("Resize")
def resize(
    g: Builder,
    node: Node,
    x: Value,
    roi: Value | None = None,
    scales: Value | None = None,
    sizes: Value | None = None,
) -> Value:
    """Scales or sizes, for all axes or those that are named."""
    if node.opset < 11:
        mode = node.one_of("mode", "nearest", ("nearest", "linear"))
        return _resized(g, x, _sizes(x, known(roi, "scales")), Rule(mode=mode, coordinates="asymmetric", nearest="old"))
    node.ignore("extrapolation_value")  # of tf_crop_and_resize, which is refused
    rule = Rule(
        mode=node.one_of("mode", "nearest", ("nearest", "linear", "cubic")),
        coordinates=node.one_of("coordinate_transformation_mode", "half_pixel", MODES),
        nearest=node.one_of("nearest_mode", "round_prefer_floor", NEAREST),
        cubic=float(node.take("cubic_coeff_a", -0.75)),
        outside=not node.one_of("exclude_outside", 0, (0, 1)),
        antialias=bool(node.one_of("antialias", 0, (0, 1))),
    )
    axes = [normalised(a, x.rank) for a in node.ints("axes", range(x.rank)) or ()]
    policy = node.one_of("keep_aspect_ratio_policy", "stretch", ("stretch", "not_larger", "not_smaller"))
    targets: Targets = {}
    if sizes is not None and (wanted := known_ints(sizes, "sizes")):
        factors = [size / x.shape[axis] for axis, size in zip(axes, wanted, strict=True)]
        if policy != "stretch":
            factor = min(factors) if policy == "not_larger" else max(factors)
            wanted = tuple(math.floor(factor * x.shape[axis] + 0.5) for axis in axes)
            factors = [factor] * len(axes)
        targets = {a: (n, f) for a, n, f in zip(axes, wanted, factors, strict=True)}
    else:
        targets = _sizes(x, known(scales, "scales"), axes)
    return _resized(g, x, targets, rule)


@operator("Upsample")
def upsample(g: Builder, node: Node, x: Value, scales: Value | None = None) -> Value:
    """The older name: positions are divided by the scale."""
    mode = node.one_of("mode", "nearest", ("nearest", "linear"))
    factors = np.asarray(node.take("scales"), np.float32) if scales is None else known(scales, "scales")
    return _resized(g, x, _sizes(x, factors), Rule(mode=mode, coordinates="asymmetric", nearest="old"))


def _sizes(x: Value, scales: npt.NDArray[np.float32], axes: Sequence[int] | None = None) -> Targets:
    axes = range(x.rank) if axes is None else axes
    return {a: (math.floor(x.shape[a] * float(s)), float(s)) for a, s in zip(axes, scales.reshape(-1), strict=True)}


def _resized(g: Builder, x: Value, targets: Targets, rule: Rule) -> Value:
    targets = {axis: t for axis, t in targets.items() if t != (x.shape[axis], 1.0)}
    if any(n < 1 or scale <= 0 or n * x.shape[axis] > LARGEST for axis, (n, scale) in targets.items()):
        raise ValueError(f"a result of size {[size for size, _ in targets.values()]}")
    matrices = {axis: matrix(x.shape[axis], size, scale, rule) for axis, (size, scale) in targets.items()}
    if keras_does_it(x, targets, matrices, rule):
        order = layout.channels_last(4)
        size = tuple(targets.get(axis, (x.shape[axis], 1.0))[0] for axis in (2, 3))
        tensor = g.apply(
            ops.image.resize,
            g.ordered(x, order),
            size=size,
            interpolation="nearest" if rule.mode == "nearest" else "bilinear",
            data_format="channels_last",
        )
        return g.value(tensor, order)
    for axis, weights in matrices.items():
        if rule.mode == "nearest":
            place = g.spatial_axis(x, axis)
            x = g.value(g.apply(ops.take, x.tensor, weights.argmax(axis=1).astype(np.int32), axis=place), x.order)
        else:
            g.spatial_axis(x, axis)
            order = (*(a for a in x.order if a != axis), axis)
            x = g.value(g.apply(ops.matmul, g.ordered(x, order), np.ascontiguousarray(weights.T)), order)
    return x


def keras_does_it(x: Value, targets: Targets, matrices: dict[int, npt.NDArray[np.float32]], rule: Rule) -> bool:
    """True where resizing an image from pixel centres, sizes over sizes, has the same weights."""
    if x.rank != 4 or x.constant or not targets or not set(targets) <= {2, 3} or rule.mode == "cubic":
        return False
    own = Rule(mode=rule.mode, coordinates="half_pixel", nearest="round_prefer_ceil")
    for axis, (size, _) in targets.items():
        if rule.mode == "nearest":
            centres = np.floor((np.arange(size) + 0.5) * x.shape[axis] / size)
            if (matrices[axis].argmax(axis=1) != centres).any():
                return False
        elif not np.allclose(matrices[axis], matrix(x.shape[axis], size, size / x.shape[axis], own), atol=1e-6):
            return False
    return True


def matrix(size: int, result: int, scale: float, rule: Rule) -> npt.NDArray[np.float32]:
    """The weights [result, size] with which each element of the result sums the data."""
    places = positions(size, result, scale, rule.coordinates)
    weights = np.zeros((result, size), np.float64)
    rows = np.arange(result)
    if rule.mode == "nearest":
        weights[rows, np.clip(_nearest(places, scale, rule.nearest), 0, size - 1).astype(np.int64)] = 1
        return weights.astype(np.float32)
    squeeze = min(scale, 1.0) if rule.antialias else 1.0
    reach = math.ceil((1 if rule.mode == "linear" else 2) / squeeze)
    neighbours = np.floor(places)[:, np.newaxis] + np.arange(-reach, reach + 1)
    distance = np.abs(neighbours - places[:, np.newaxis]) * squeeze
    each = np.maximum(1 - distance, 0) if rule.mode == "linear" else _cubic(distance, rule.cubic)
    if not rule.outside:
        each = np.where((neighbours < 0) | (neighbours >= size), 0, each)
    each /= each.sum(axis=1, keepdims=True)
    np.add.at(weights, (rows[:, np.newaxis], np.clip(neighbours, 0, size - 1).astype(np.int64)), each)
    return weights.astype(np.float32)


def positions(size: int, result: int, scale: float, mode: str) -> npt.NDArray[np.float64]:
    """Where each element of the result falls on the data."""
    i = np.arange(result, dtype=np.float64)
    if mode == "align_corners":
        length = scale * size  # before it was rounded down to ``result``
        return i * (size - 1) / (length - 1) if length > 1.0001 else i * 0
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if mode == "pytorch_half_pixel" and result == 1:
        return i * 0
    shift = size / 2 * (1 - result / (scale * size)) if mode == "half_pixel_symmetric" else 0.0
    return shift + (i + 0.5) / scale - 0.5


def _nearest(places: npt.NDArray[np.float64], scale: float, mode: str) -> npt.NDArray[np.float64]:
    if mode == "old":  # before opset 11: up when it shrinks, down when it grows
        mode = "ceil" if scale < 1 else "floor"
    rounded = {
        "round_prefer_floor": np.ceil(places - 0.5),
        "round_prefer_ceil": np.floor(places + 0.5),
        "floor": np.floor(places),
        "ceil": np.ceil(places),
    }
    return rounded[mode]


def _cubic(distance: npt.NDArray[np.float64], a: float) -> npt.NDArray[np.float64]:
    """Keys' cubic convolution kernel."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))
