"""What moves elements and changes none: reshapes, slices, joins, padding, and what reads shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import onnx
from keras import layers, ops

from converters.onnx_import import layout
from converters.onnx_import.builder import Builder, MixesBatch, Value, constant, known, known_ints, normalised, setting
from converters.onnx_import.convolution import sliced
from converters.onnx_import.graph import MAX_ELEMENTS, MAX_RANK, Node
from converters.onnx_import.registry import operator

_FLOATS = {"float16", "bfloat16", "float32", "float64"}
_INTEGERS = {"bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"}


@operator("Identity")
def identity(g: Builder, node: Node, x: Value) -> Value:
    """Nothing."""
    return x


@operator("Constant")
def constant_node(g: Builder, node: Node) -> Value:
    """Numbers, as a tensor or as attributes."""
    for name, dtype in (
        ("value", None),
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        value = node.take(name, None)
        if value is not None:
            return constant(np.asarray(value, dtype))
    raise ValueError("a constant that is not made of numbers")


@operator("ConstantOfShape")
def constant_of_shape(g: Builder, node: Node, shape: Value) -> Value:
    """One number, repeated."""
    sizes = known_ints(shape, "the shape")
    if min(sizes, default=0) < 0 or math.prod(sizes) > MAX_ELEMENTS:
        raise ValueError(f"a result of shape {list(sizes)[:8]}")
    value = np.asarray(node.take("value", np.zeros(1, np.float32)))
    return constant(np.full(sizes, value.reshape(-1)[0], value.dtype))


@operator("Shape")
def shape_of(g: Builder, node: Node, x: Value) -> Value:
    """The shape, or a part of it; always known here."""
    start, end = int(node.take("start", 0)), node.take("end", None)
    return constant(np.asarray(x.shape[start : None if end is None else int(end)], np.int64))


@operator("Cast")
def cast(g: Builder, node: Node, x: Value) -> Value:
    """Another type. Whatever is computed from an input stays float32 where the file says any floating type."""
    node.ignore("saturate", "round_mode")  # of the 8-bit floating types, which are refused
    code = int(node.take("to"))
    target = str(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(code)))
    if target not in _FLOATS | _INTEGERS:
        node.refuse("to", onnx.TensorProto.DataType.Name(code), "a floating or integer type")
    if x.constant:
        return constant(x.tensor.astype(target))
    source = keras.backend.standardize_dtype(x.tensor.dtype)
    target = "float32" if target in _FLOATS else target
    return x if source == target else g.value(g.apply(ops.cast, x.tensor, dtype=target), x.order)


@operator("Transpose")
def transpose(g: Builder, node: Node, x: Value) -> Value:
    """Other numbers for the same axes: nothing moves until an operator needs it to."""
    axes = node.ints("perm", tuple(reversed(range(x.rank)))) or ()
    if sorted(axes) != list(range(x.rank)):
        raise ValueError(f"perm {list(axes)} for {x.rank} axes")
    if x.constant:
        return constant(np.transpose(x.tensor, axes).copy())
    return Value(x.tensor, layout.moves(axes, x.order), tuple(x.shape[a] for a in axes), x.nonnegative)


@operator("Reshape")
def reshape(g: Builder, node: Node, x: Value, shape: Value | None = None) -> Value:
    """Another shape; only the axes that are joined out of order are transposed."""
    node.ignore("consumed_inputs")
    zero_copies = not node.one_of("allowzero", 0, (0, 1))
    return _reshaped(g, x, layout.reshape_target(x.shape, setting(node, "shape", shape) or (), zero_copies=zero_copies))


@operator("Flatten")
def flatten(g: Builder, node: Node, x: Value) -> Value:
    """A matrix."""
    axis = int(node.take("axis", 1))
    axis = axis + x.rank if axis < 0 else axis
    return _reshaped(g, x, (math.prod(x.shape[:axis]), math.prod(x.shape[axis:])))


def _reshaped(g: Builder, x: Value, target: Sequence[int]) -> Value:
    target = tuple(target)
    if len(target) > MAX_RANK:
        raise ValueError(f"{len(target)} axes")
    if x.constant:
        return constant(x.tensor.reshape(target))
    if target == x.shape:
        return x
    found = layout.blocks(x.shape, target)
    if g.batch is not None:
        if x.order[0] != 0 or target[:1] != x.shape[:1]:
            raise MixesBatch
        rest = layout.blocks(x.shape[1:], target[1:])
        found = [((0,), (0,)), *((tuple(a + 1 for a in old), tuple(a + 1 for a in new)) for old, new in rest)]
    # Each block's axes together, in the order in which the blocks already lie.
    found.sort(key=lambda block: min((x.order.index(a) for a in block[0]), default=x.rank))
    tensor = g.ordered(x, tuple(axis for old, _ in found for axis in old))
    order = tuple(axis for _, new in found for axis in new)
    return g.value(g.reshaped(tensor, [target[axis] for axis in order]), order, nonnegative=x.nonnegative)


@operator("Squeeze")
def squeeze(g: Builder, node: Node, x: Value, axes: Value | None = None) -> Value:
    """Without axes of size one."""
    chosen = setting(node, "axes", axes)
    if chosen is None:
        open_batch = {x.order[0]} if g.open_batch and not x.constant else set()
        chosen = tuple(axis for axis in range(x.rank) if x.shape[axis] == 1 and axis not in open_batch)
    gone = [normalised(axis, x.rank) for axis in chosen]
    if any(x.shape[axis] != 1 for axis in gone):
        raise ValueError(f"axes {gone} of shape {list(x.shape)}")
    if x.constant:
        return constant(x.tensor.squeeze(tuple(gone)))
    if g.batch is not None and x.order[0] in gone:
        raise MixesBatch
    kept = [axis for axis in x.order if axis not in gone]
    tensor = g.reshaped(x.tensor, [x.shape[axis] for axis in kept])
    return g.value(tensor, layout.drop(x.order, gone), nonnegative=x.nonnegative)


@operator("Unsqueeze")
def unsqueeze(g: Builder, node: Node, x: Value, axes: Value | None = None) -> Value:
    """With new axes of size one."""
    chosen = setting(node, "axes", axes) or ()
    return g.expanded(x, sorted(normalised(axis, x.rank + len(chosen)) for axis in chosen))


@operator("Concat")
def concat(g: Builder, node: Node, *values: Value) -> Value:
    """Joined along an axis."""
    axis = normalised(int(node.take("axis", 1) if node.opset < 4 else node.take("axis")), values[0].rank)
    if all(v.constant for v in values):
        return constant(g.apply(ops.concatenate, [v.tensor for v in values], axis=axis))
    lead = max((v for v in values if not v.constant), key=lambda v: math.prod(v.shape))
    place = g.spatial_axis(lead, axis)
    if g.batch is not None and any(v.constant for v in values):
        raise MixesBatch  # a constant would have to be repeated for each input
    tensors = [g.ordered(v, lead.order) for v in values]
    tensors = [t.astype(lead.tensor.dtype) if isinstance(t, np.ndarray) else t for t in tensors]
    sure = all(v.nonnegative for v in values)
    if len(tensors) > 1 and not any(isinstance(t, np.ndarray) for t in tensors):
        return g.value(g.layer(layers.Concatenate, tensors, axis=place), lead.order, nonnegative=sure)
    return g.value(g.apply(ops.concatenate, tensors, axis=place), lead.order)


@operator("Split")
def split(g: Builder, node: Node, x: Value, sizes: Value | None = None) -> list[Value]:
    """Parts along an axis, of sizes that are an attribute until opset 12, or equal."""
    axis = normalised(int(node.take("axis", 0)), x.rank)
    parts = len(node.outputs)
    node.one_of("num_outputs", parts, (parts,))
    wanted = setting(node, "split", sizes)
    if wanted is None:
        each = -(-x.shape[axis] // parts)
        wanted = tuple(min(each, x.shape[axis] - each * i) for i in range(parts))
    if sum(wanted) != x.shape[axis] or min(wanted) < 0 or len(wanted) != len(node.outputs):
        raise ValueError(f"parts of {list(wanted)} of {x.shape[axis]}")
    place = g.spatial_axis(x, axis)
    if len(wanted) == 1:
        return [x]
    ends = np.cumsum(wanted)[:-1].tolist()
    tensors = g.apply(ops.split, x.tensor, indices_or_sections=ends, axis=place)
    return [g.value(t, x.order, nonnegative=x.nonnegative) for t in tensors]


@operator("Slice")
def slice_(
    g: Builder,
    node: Node,
    x: Value,
    starts: Value | None = None,
    ends: Value | None = None,
    axes: Value | None = None,
    steps: Value | None = None,
) -> Value:
    """A range along each of some axes; attributes until opset 9, inputs since."""
    first, last = setting(node, "starts", starts) or (), setting(node, "ends", ends) or ()
    chosen = setting(node, "axes", axes) or tuple(range(len(first)))
    step = setting(node, "steps", steps) or (1,) * len(first)
    if not len(first) == len(last) == len(chosen) == len(step) or 0 in step:
        raise ValueError("starts, ends, axes and steps do not fit each other")
    key = [slice(None)] * x.rank
    for begin, end, axis, by in zip(first, last, chosen, step, strict=True):
        size = x.shape[normalised(axis, x.rank)]
        low, high, _ = slice(begin, end, by).indices(size)
        if (low, high, by) == (0, size, 1):
            continue
        # Past the first element a negative step has no number to end at.
        key[g.spatial_axis(x, axis)] = slice(low, None if high < 0 else high, by)
    if all(part == slice(None) for part in key):
        return x
    return g.value(sliced(g, x.tensor, tuple(key)), x.order, nonnegative=x.nonnegative)


@operator("Gather")
def gather(g: Builder, node: Node, x: Value, indices: Value) -> Value:
    """Elements along an axis; rows of a constant by computed indices are an Embedding layer."""
    axis = normalised(int(node.take("axis", 0)), x.rank)
    if x.constant and not indices.constant:
        if x.rank != 2 or axis or x.tensor.dtype.kind != "f":
            raise ValueError("computed indices are handled for the rows of a matrix only")
        settings = {"input_dim": x.shape[0], "output_dim": x.shape[1]}
        rows = g.layer(layers.Embedding, g.plain(indices), [x.tensor], **settings)
        return g.value(rows, layout.plain(indices.rank + 1))
    wanted = known(indices, "the indices")
    size = x.shape[axis]
    if wanted.dtype.kind not in "iu" or (wanted.size and not -size <= wanted.min() <= wanted.max() < size):
        raise ValueError(f"indices outside of {size}")
    wanted = np.where(wanted < 0, wanted + size, wanted).astype(np.int32)
    if x.constant:
        if math.prod(x.shape) // max(size, 1) * wanted.size > MAX_ELEMENTS:
            raise ValueError(f"{wanted.size} indices")
        return constant(np.take(x.tensor, wanted, axis))
    place = g.spatial_axis(x, axis)
    if wanted.ndim == 0:
        return g.value(g.apply(ops.take, x.tensor, wanted, axis=place), layout.drop(x.order, [axis]))
    taken = g.value(g.apply(ops.take, x.tensor, wanted.reshape(-1), axis=place), x.order)
    return _reshaped(g, taken, (*x.shape[:axis], *wanted.shape, *x.shape[axis + 1 :]))


@operator("Pad")
def pad(
    g: Builder,
    node: Node,
    x: Value,
    pads: Value | None = None,
    value: Value | None = None,
    axes: Value | None = None,
) -> Value:
    """More elements at the edges, or fewer where the number is negative."""
    mode = node.one_of("mode", "constant", ("constant", "reflect", "edge", "wrap"))
    amounts = setting(node, "pads" if node.opset > 1 else "paddings", pads) or ()
    chosen = [normalised(a, x.rank) for a in (range(x.rank) if axes is None else known_ints(axes, "axes"))]
    fill = float(node.take("value", 0.0)) if value is None else float(known(value, "the value").reshape(()))
    if len(amounts) != 2 * len(chosen):
        raise ValueError(f"{len(amounts)} pads for {len(chosen)} axes")
    widths = [(0, 0)] * x.rank
    key = [slice(None)] * x.rank
    for axis, before, behind in zip(chosen, amounts, amounts[len(chosen) :], strict=False):
        if (before, behind) != (0, 0):
            place = g.spatial_axis(x, axis)
            widths[place] = (max(before, 0), max(behind, 0))
            key[place] = slice(max(-before, 0), x.shape[axis] - max(-behind, 0))
    tensor = x.tensor
    if any(part != slice(None) for part in key) and any(min(a, 0) for a in amounts):
        tensor = sliced(g, tensor, tuple(key))
    if mode == "constant":
        if any(w != (0, 0) for w in widths):
            tensor = g.apply(ops.pad, tensor, pad_width=tuple(widths), constant_values=fill)
        return g.value(tensor, x.order, nonnegative=x.nonnegative and fill >= 0)
    for place, width in enumerate(widths):
        if width != (0, 0):
            size = g.sizes(tensor)[place]
            if sum(width) > 1 << 24:
                raise ValueError(f"pads {list(amounts)}")
            where = _extended(size, width, mode)
            tensor = g.apply(ops.take, tensor, where, axis=place)
    return g.value(tensor, x.order, nonnegative=x.nonnegative)


def _extended(size: int, width: tuple[int, int], mode: Any) -> Any:
    """Which elements stand where once an axis is padded: NumPy knows, asked about the indices themselves."""
    return np.pad(np.arange(size, dtype=np.int32), width, mode=mode)


@operator("DepthToSpace")
def depth_to_space(g: Builder, node: Node, x: Value) -> Value:
    """Channels become a finer grid; which of them come first, the mode says."""
    block = int(node.take("blocksize"))
    mode = node.one_of("mode", "DCR", ("DCR", "CRD"))
    if x.rank != 4 or block < 1 or x.shape[1] % block**2:
        raise ValueError(f"blocksize {block} for shape {list(x.shape)}")
    batch, channels, height, width = x.shape
    deep = channels // block**2
    order = layout.channels_last(4)
    fine = (block, block, deep) if mode == "DCR" else (deep, block, block)
    apart = g.reshaped(g.ordered(x, order), (batch, height, width, *fine))
    axes = (0, 1, 3, 2, 4, 5) if mode == "DCR" else (0, 1, 4, 2, 5, 3)
    mixed = g.apply(ops.transpose, apart, axes=axes)
    return g.value(g.reshaped(mixed, (batch, height * block, width * block, deep)), order, nonnegative=x.nonnegative)
