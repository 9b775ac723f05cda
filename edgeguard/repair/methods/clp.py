"""Channel Lipschitz pruning: needs no data. A channel that a trigger drives must be able to react strongly.

Zheng, Tang, Li, Liu: Data-free Backdoor Removal based on Channel Lipschitzness, ECCV 2022: a channel whose Lipschitz
bound, the largest singular value of its kernel times its batch-norm's scale, exceeds the layer's mean by more than
three standard deviations is pruned.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from edgeguard.repair.methods.base import Bench, Channel, Knowledge, said

DEVIATIONS = 3.0


class LipschitzPruning:
    """CLP on every layer but the last, whose channels are the classes."""

    name: ClassVar[str] = "clp"
    paper: ClassVar[str] = "Zheng et al., ECCV 2022"
    cost: ClassVar[int] = 1
    trains: ClassVar[bool] = False

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return ""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        pruned: list[Channel] = []
        for layer in target.layers()[:-1]:
            kernel = target.kernel(layer)
            by_place = kernel.reshape(len(kernel), -1, target.inputs(layer))
            bounds = np.linalg.norm(by_place, ord=2, axis=(1, 2))
            far = (bounds - bounds.mean()) / max(float(bounds.std()), 1e-12)
            found = [Channel(layer, int(c), float(far[c])) for c in np.flatnonzero(far > DEVIATIONS)]
            target.silence(layer, [c.channel for c in found])
            pruned += found
        return said(pruned)
