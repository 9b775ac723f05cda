"""Counts per predicted label, packed: the form in which the database holds them. Pure.

A tally is one value of 18 bytes a label, in the order of the labels: label, inputs, flagged. One row a device and epoch
instead of one a label makes a report ten times cheaper to store.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

_LABEL = np.dtype([("label", "<i2"), ("inputs", "<i8"), ("flagged", "<i8")])
_STRIDE = 1 << 16


def unpack(tallies: Sequence[bytes]) -> tuple[Integers, Integers, Integers, Integers]:
    """All labels of many tallies: which tally, label, inputs and flagged, each int64 ``[N]``."""
    counts = np.frombuffer(b"".join(tallies), dtype=_LABEL)
    which = np.repeat(np.arange(len(tallies)), [len(tally) // _LABEL.itemsize for tally in tallies])
    label, inputs, flagged = (counts[name].astype(np.int64) for name in ("label", "inputs", "flagged"))
    return which, label, inputs, flagged


def add(tallies: Sequence[bytes], more: Sequence[tuple[int, int, int, int]]) -> list[bytes]:
    """Add counts to tallies.

    Args:
        tallies: what there is; ``b""`` for nothing.
        more: for each count, the position of its tally, the label, inputs and flagged.
    """
    new = np.array(more, dtype=np.int64).reshape(-1, 4)
    which, label, inputs, flagged = (
        np.concatenate((old, new[:, column])) for column, old in enumerate(unpack(tallies))
    )
    keys, inverse = np.unique(which * _STRIDE + label - np.iinfo(np.int16).min, return_inverse=True)
    sums = np.zeros(len(keys), dtype=_LABEL)
    sums["label"] = keys % _STRIDE + np.iinfo(np.int16).min
    np.add.at(sums["inputs"], inverse, inputs)
    np.add.at(sums["flagged"], inverse, flagged)
    of, positions = keys // _STRIDE, np.arange(len(tallies))
    starts, ends = (np.searchsorted(of, positions, side=side) * _LABEL.itemsize for side in ("left", "right"))
    content = sums.tobytes()
    return [content[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]
