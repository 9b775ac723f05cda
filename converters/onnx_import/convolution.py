"""Convolutions: Keras layers with trainable kernels, on tensors with their channels last."""

from __future__ import annotations

from typing import Any

import numpy as np
from keras import layers, ops

from converters.onnx_import import windows
from converters.onnx_import.builder import Builder, Value, known
from converters.onnx_import.graph import Array, Node
from converters.onnx_import.layout import channels_last
from converters.onnx_import.registry import operator

CONVOLUTIONS = {3: layers.Conv1D, 4: layers.Conv2D, 5: layers.Conv3D}
DEPTHWISE = {3: layers.DepthwiseConv1D, 4: layers.DepthwiseConv2D}
TRANSPOSED = {3: layers.Conv1DTranspose, 4: layers.Conv2DTranspose, 5: layers.Conv3DTranspose}


@operator("Conv")
def conv(g: Builder, node: Node, x: Value, w: Value, b: Value | None = None) -> Value:
    """A convolution, grouped or depthwise where its group says so."""
    kernel, bias = _weights(w, b)
    groups = int(node.take("group", 1))
    window = windows.read(node, x.shape[2:], kernel.shape[2:])
    if kernel.ndim != x.rank or x.rank not in CONVOLUTIONS:
        raise ValueError(f"weights of shape {list(kernel.shape)} for an input of shape {list(x.shape)}")
    if groups < 1 or kernel.shape[1] * groups != x.shape[1] or kernel.shape[0] % groups:
        raise ValueError(f"group {groups} for {x.shape[1]} channels and weights of shape {list(kernel.shape)}")
    order = channels_last(x.rank)
    # TensorFlow has no strides beside dilations: every window, then each stride-th of them.
    step = window.strides if window.dilated and window.strided else None
    if step:
        window = window.at_every_position()
    tensor = g.ordered(x, order)
    if not window.same:
        tensor = pad(g, tensor, window.pads)
    settings: dict[str, Any] = {
        "kernel_size": window.kernel,
        "strides": window.strides,
        "dilation_rate": window.dilations,
        "padding": "same" if window.same and window.padded else "valid",
        "use_bias": bias is not None,
    }
    if groups == x.shape[1] > 1 and x.rank in DEPTHWISE and len(set(window.strides)) == 1:
        each = kernel.shape[0] // groups
        arranged = np.moveaxis(kernel.reshape(groups, each, *kernel.shape[2:]), (0, 1), (-2, -1))
        kind = DEPTHWISE[x.rank]
        settings["depth_multiplier"] = each
    else:
        arranged = np.moveaxis(kernel, (1, 0), (-2, -1))
        kind = CONVOLUTIONS[x.rank]
        settings |= {"filters": kernel.shape[0], "groups": groups}
    result = g.layer(kind, tensor, [arranged] if bias is None else [arranged, bias], **settings)
    if step:
        result = cut(g, result, [(0, size, s) for size, s in zip(window.outputs, step, strict=True)])
    return g.value(result, order)


@operator("ConvTranspose")
def conv_transpose(g: Builder, node: Node, x: Value, w: Value, b: Value | None = None) -> Value:
    """A transposed convolution: all positions that the kernels reach, then the part that the padding leaves."""
    kernel, bias = _weights(w, b)
    groups = int(node.take("group", 1))
    if kernel.ndim != x.rank or x.rank not in TRANSPOSED:
        raise ValueError(f"weights of shape {list(kernel.shape)} for an input of shape {list(x.shape)}")
    if groups < 1 or kernel.shape[0] != x.shape[1] or x.shape[1] % groups:
        raise ValueError(f"group {groups} for {x.shape[1]} channels and weights of shape {list(kernel.shape)}")
    strides, dilations, begin, sizes = _transposed_window(node, x.shape[2:], kernel.shape[2:])
    dilated = any(d > 1 for d in dilations)
    if dilated and any(s > 1 for s in strides):
        node.refuse("dilations", list(dilations), "1 beside strides")
    order = channels_last(x.rank)
    tensor = g.ordered(x, order)
    # Positions behind the last kernel hold the bias alone: zeros behind the input reach them.
    extent = [(k - 1) * d + 1 for k, d in zip(kernel.shape[2:], dilations, strict=True)]
    reach = [(size - 1) * s + e for size, s, e in zip(x.shape[2:], strides, extent, strict=True)]
    short = [max(-(-(b + n - r) // s), 0) for b, n, r, s in zip(begin, sizes, reach, strides, strict=True)]
    # TensorFlow has no dilated one; without strides it is a convolution with the mirrored kernel, padded on all sides.
    around = [e - 1 if dilated else 0 for e in extent]
    tensor = pad(g, tensor, [(more, more + behind) for more, behind in zip(around, short, strict=True)])
    settings: dict[str, Any] = {"dilation_rate": dilations} if dilated else {"strides": strides}
    kinds = CONVOLUTIONS if dilated else TRANSPOSED
    inputs, outputs = x.shape[1] // groups, kernel.shape[1]
    parts = [tensor] if groups == 1 else g.apply(ops.split, tensor, indices_or_sections=groups, axis=-1)
    results = []
    for group, part in enumerate(parts):
        own = kernel[group * inputs : (group + 1) * inputs]
        flipped = np.flip(own, tuple(range(2, own.ndim)))
        arranged = np.moveaxis(flipped, (0, 1), (-2, -1)) if dilated else np.moveaxis(own, (1, 0), (-2, -1))
        weights = [arranged] if bias is None else [arranged, bias[group * outputs : (group + 1) * outputs]]
        results.append(
            g.layer(
                kinds[x.rank],
                part,
                weights,
                filters=outputs,
                kernel_size=kernel.shape[2:],
                padding="valid",
                use_bias=bias is not None,
                **settings,
            )
        )
    result = results[0] if groups == 1 else g.apply(ops.concatenate, results, axis=-1)
    return g.value(cut(g, result, [(b, b + n, 1) for b, n in zip(begin, sizes, strict=True)]), order)


def _weights(w: Value, b: Value | None) -> tuple[Array, Array | None]:
    return known(w, "the weights"), None if b is None else known(b, "the bias")


def _transposed_window(
    node: Node, inputs: windows.Ints, kernel: windows.Ints
) -> tuple[windows.Ints, windows.Ints, windows.Ints, windows.Ints]:
    """Strides, dilations, what is cut off in front, and the sizes of the result."""
    rank = len(inputs)
    windows.kernel_of(node, kernel)
    strides = node.ints("strides", (1,) * rank) or ()
    dilations = node.ints("dilations", (1,) * rank) or ()
    more = node.ints("output_padding", (0,) * rank) or ()
    pads = node.ints("pads", (0,) * 2 * rank) or ()
    wanted = node.ints("output_shape")
    mode = node.one_of("auto_pad", "NOTSET", ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"))
    if {len(strides), len(dilations), len(more), len(pads) // 2} != {rank} or min((*strides, *dilations)) < 1:
        raise ValueError(f"strides, dilations, output_padding or pads do not fit {rank} spatial axes")
    if min((*pads, *more)) < 0:
        raise ValueError("pads or output_padding are negative")
    full = [
        (size - 1) * s + (k - 1) * d + 1 + extra
        for size, s, k, d, extra in zip(inputs, strides, kernel, dilations, more, strict=True)
    ]
    if wanted is None and mode.startswith("SAME"):
        wanted = tuple(size * s for size, s in zip(inputs, strides, strict=True))
    if wanted is None:
        begin = pads[:rank]
        sizes = tuple(f - b - e for f, b, e in zip(full, begin, pads[rank:], strict=True))
    else:
        sizes = wanted[-rank:]
        totals = [max(f - n, 0) for f, n in zip(full, sizes, strict=True)]
        begin = tuple(t // 2 if mode == "SAME_UPPER" else t - t // 2 for t in totals)
    if min(sizes) < 1:
        raise ValueError(f"pads leave a result of {list(sizes)}")
    return strides, dilations, begin, sizes


def pad(g: Builder, tensor: Any, pads: Any, value: float = 0.0) -> Any:
    """A tensor with its channels last, padded along its spatial axes."""
    if not any(before or behind for before, behind in pads):
        return tensor
    return g.apply(ops.pad, tensor, pad_width=((0, 0), *pads, (0, 0)), constant_values=value)


def cut(g: Builder, tensor: Any, ranges: Any) -> Any:
    """Start, end and step along the spatial axes of a tensor with its channels last."""
    if all(r == (0, size, 1) for r, size in zip(ranges, g.sizes(tensor)[1:-1], strict=True)):
        return tensor
    return sliced(g, tensor, (slice(None), *(slice(*r) for r in ranges), slice(None)))


def sliced(g: Builder, tensor: Any, key: tuple[slice, ...]) -> Any:
    """``tensor[key]``."""

    def getitem(data: Any) -> Any:
        return data[key]

    return g.apply(getitem, tensor)
