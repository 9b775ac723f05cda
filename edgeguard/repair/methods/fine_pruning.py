"""Fine-pruning: prune the channels that are quiet on clean inputs, then fine-tune on these.

Liu, Dolan-Gavitt, Garg: Fine-Pruning, RAID 2018. Channels of the last tapped convolution, by ascending mean activation,
while the clean answers stay; then fine-tuning under the true labels, or where there are none under the original's
answers. An attacker who prunes before he poisons (ibid.) leaves nothing quiet; the fine-tuning is what is against him.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from edgeguard.repair.methods.base import Bench, Channel, Knowledge, makers, prune, said
from edgeguard.repair.training import descend

STEPS = 200
RATE = 1e-3
BATCH = 64


class FinePruning:
    """Prune what is dormant, and fine-tune."""

    name: ClassVar[str] = "fine-pruning"
    paper: ClassVar[str] = "Liu et al., RAID 2018"
    cost: ClassVar[int] = 11
    trains: ClassVar[bool] = True

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return ""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        import tensorflow as tf

        done: tuple[str, ...] = ()
        layers = makers(target, known.taps, "l1")
        last = next((layer for layer in reversed(target.layers()) if layer in layers), None)
        if last is not None:
            activity = bench.features[:, layers[last].columns].mean(axis=0)
            done = said(prune(target, [Channel(last, int(c), 0.0) for c in np.argsort(activity)], bench))
        rng = np.random.default_rng(bench.seed)
        truth = bench.answers if bench.labels is None else bench.labels

        def draw() -> tuple[Any, Any]:
            chosen = rng.integers(len(bench.images), size=BATCH)
            return bench.images[chosen].astype(np.float32), truth[chosen]

        def loss_of(logits: Any, labels: Any) -> Any:
            return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))

        descend(target.model, draw, loss_of, steps=STEPS, rate=RATE, note="fine-tuning", progress=bench.progress)
        return (*done, f"fine-tuned in {STEPS} steps")
