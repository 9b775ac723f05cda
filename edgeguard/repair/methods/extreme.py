"""Adjusting extreme weights: what a backdoor needs of a few weights, the rest of a layer does not have.

After Wu, Yang, Zhu, Mitra: Mitigating Backdoor Attacks in Federated Learning, 2020 (arXiv 2011.01767): weights further
than ``delta`` standard deviations from their layer's mean are set to zero, ``delta`` falling from 5 by halves, while
the clean answers stay.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from edgeguard.repair.methods.base import Bench, Knowledge

FIRST, LAST, STEP = 5.0, 1.5, 0.5


class ExtremeWeights:
    """AEW, on the last convolution and the dense layers behind it: the last two weighted layers."""

    name: ClassVar[str] = "aew"
    paper: ClassVar[str] = "Wu et al., 2020 (arXiv 2011.01767)"
    cost: ClassVar[int] = 4
    trains: ClassVar[bool] = False

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return ""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        done: list[str] = []
        for layer in target.layers()[-2:]:
            kernel = target.kernel(layer)
            far = np.abs(kernel - kernel.mean()) / max(float(kernel.std()), 1e-12)
            best: float | None = None
            for delta in np.arange(FIRST, LAST - STEP / 2, -STEP):
                if not (far > delta).any():
                    continue
                changed = target.copy()
                changed.zero(layer, far > delta)
                if not bench.keeps(changed):
                    break
                best = float(delta)
            if best is not None:
                target.zero(layer, far > best)
                done.append(f"{int((far > best).sum())} weights of {layer} beyond {best:g} deviations set to zero")
        return tuple(done)
