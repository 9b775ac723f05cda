"""Sliding windows: where a convolution or pooling looks. Pure arithmetic.

All tuples have one entry per spatial axis. The padding lies before (``begin``) and behind (``end``) the data; ``extra``
is what rounding up the number of windows (``ceil_mode``) adds behind that, and is never part of an average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

Ints: TypeAlias = tuple[int, ...]
LARGEST = 1 << 17
"""A kernel or padding, along one axis."""
MOST_LOOKS = 1 << 26
"""What all windows along one axis look at together."""


class Attributes(Protocol):
    """What is needed of a node: its name for messages stays with it."""

    def ints(self, name: str, default: Sequence[int] | None = None) -> Ints | None: ...
    def one_of(self, name: str, default: Any, allowed: Sequence[Any]) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Window:
    """A window over data of ``sizes``."""

    sizes: Ints
    kernel: Ints
    strides: Ints
    dilations: Ints
    begin: Ints
    end: Ints
    extra: Ints

    @property
    def extent(self) -> Ints:
        """How far a dilated kernel reaches."""
        return tuple((k - 1) * d + 1 for k, d in zip(self.kernel, self.dilations, strict=True))

    @property
    def outputs(self) -> Ints:
        """The number of windows."""
        return tuple(
            (size + b + e + more - reach) // stride + 1
            for size, b, e, more, reach, stride in zip(
                self.sizes, self.begin, self.end, self.extra, self.extent, self.strides, strict=True
            )
        )

    @property
    def pads(self) -> tuple[tuple[int, int], ...]:
        """(before, behind) with what rounding up adds."""
        return tuple((b, e + more) for b, e, more in zip(self.begin, self.end, self.extra, strict=True))

    @property
    def padded(self) -> bool:
        """True where the window leaves the data."""
        return any(before or behind for before, behind in self.pads)

    @property
    def dilated(self) -> bool:
        """True where the kernel has holes."""
        return any(d > 1 for d in self.dilations)

    @property
    def strided(self) -> bool:
        """True where windows skip positions."""
        return any(s > 1 for s in self.strides)

    @property
    def same(self) -> bool:
        """True where TensorFlow's SAME is this very padding: the odd one behind, nothing rounded up."""
        totals = _same_totals(self.sizes, self.extent, self.strides)
        return self.pads == tuple((total // 2, total - total // 2) for total in totals)

    def at_every_position(self) -> Window:
        """The same window with stride one."""
        return replace(self, strides=(1,) * len(self.sizes))

    def positions(self, axis: int) -> npt.NDArray[np.int64]:
        """Where each window looks: [windows, kernel], counted from the start of the padding."""
        starts = np.arange(self.outputs[axis]) * self.strides[axis]
        return starts[:, np.newaxis] + np.arange(self.kernel[axis]) * self.dilations[axis]

    def counts(self, *, with_padding: bool) -> npt.NDArray[np.float32]:
        """How many elements each window averages, [*outputs]: those of the data, or of the data and its padding."""
        counts = np.ones((), np.float32)
        for axis, size in enumerate(self.sizes):
            low = 0 if with_padding else self.begin[axis]
            high = self.begin[axis] + size + (self.end[axis] if with_padding else 0)
            where = self.positions(axis)
            inside = ((where >= low) & (where < high)).sum(axis=1)
            counts = np.multiply.outer(counts, np.maximum(inside, 1).astype(np.float32))
        return counts


def read(node: Attributes, sizes: Ints, kernel: Ints | None, *, round_up: bool = False) -> Window:
    """The window that a node's attributes describe.

    Args:
        node: its attributes ``kernel_shape, strides, dilations, pads`` and ``auto_pad`` are read.
        sizes: of the spatial axes.
        kernel: of the weights, where there are any.
        round_up: as ``ceil_mode`` says.

    Raises:
        ValueError: the attributes contradict each other or the data.
    """
    rank = len(sizes)
    kernel = node.ints("kernel_shape", kernel) if kernel is None else kernel_of(node, kernel)
    if kernel is None:
        raise ValueError("there is no kernel_shape")
    strides = node.ints("strides", (1,) * rank) or ()
    dilations = node.ints("dilations", (1,) * rank) or ()
    mode = node.one_of("auto_pad", "NOTSET", ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"))
    pads = node.ints("pads", (0,) * 2 * rank) or ()
    if {len(kernel), len(strides), len(dilations), len(pads) // 2} != {rank} or len(pads) % 2:
        raise ValueError(f"kernel_shape, strides, dilations or pads do not fit {rank} spatial axes")
    if min((*kernel, *strides, *dilations)) < 1 or min(pads) < 0:
        raise ValueError("kernel_shape, strides, dilations or pads are not positive")
    if max((*kernel, *strides, *dilations, *pads)) > LARGEST:
        raise ValueError(f"kernel_shape, strides, dilations or pads above {LARGEST}")
    if mode != "NOTSET" and any(pads):
        raise ValueError(f"pads stand beside auto_pad {mode}")
    window = Window(
        sizes=sizes,
        kernel=kernel,
        strides=strides,
        dilations=dilations,
        begin=pads[:rank],
        end=pads[rank:],
        extra=(0,) * rank,
    )
    if mode.startswith("SAME"):
        totals = _same_totals(sizes, window.extent, strides)
        less, more = tuple(t // 2 for t in totals), tuple(t - t // 2 for t in totals)
        window = (
            replace(window, begin=less, end=more) if mode == "SAME_UPPER" else replace(window, begin=more, end=less)
        )
    if min(window.outputs) < 1 and not round_up:
        raise ValueError(f"a window of {list(window.extent)} does not fit {list(sizes)}")
    window = _rounded_up(window) if round_up else window
    if max(n * k for n, k in zip(window.outputs, window.kernel, strict=True)) > MOST_LOOKS:
        raise ValueError(f"{list(window.outputs)} windows of {list(window.kernel)}")
    return window


def kernel_of(node: Attributes, kernel: Ints) -> Ints:
    """The kernel's size by its weights; ``kernel_shape`` may only repeat it.

    Raises:
        ValueError: it says something else.
    """
    if node.ints("kernel_shape", kernel) != kernel:
        raise ValueError(f"kernel_shape differs from the weights' {list(kernel)}")
    return kernel


def _rounded_up(window: Window) -> Window:
    """One more window where the last would be cut short, unless it began behind data and padding before it."""
    extra = []
    for size, b, e, reach, stride in zip(
        window.sizes, window.begin, window.end, window.extent, window.strides, strict=True
    ):
        count = -(-(size + b + e - reach) // stride) + 1
        if (count - 1) * stride >= size + b:
            count -= 1
        extra.append(max((count - 1) * stride + reach - (size + b + e), 0))
    return replace(window, extra=tuple(extra))


def _same_totals(sizes: Ints, extent: Ints, strides: Ints) -> Ints:
    return tuple(
        max((-(-size // stride) - 1) * stride + reach - size, 0)
        for size, reach, stride in zip(sizes, extent, strides, strict=True)
    )
