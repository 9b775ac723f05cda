"""Adversarial neuron pruning: channels whose small changes make the model err are where a backdoor sits.

Wu, Wang: Adversarial Neuron Pruning Purifies Backdoored Deep Models, NeurIPS 2021. Scale and shift of each batch-norm
channel are disturbed against the model by up to ``EPSILON`` of themselves; masks on the scales are learnt that keep the
clean answers with and without that, weighed ``ALPHA`` to 1; channels with low masks are pruned. A frozen batch-norm is
left as it is.
"""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np

from edgeguard.errors import ModelError
from edgeguard.inspection.networks import logits_of
from edgeguard.repair.methods.base import Bench, Channel, Knowledge, prune, said

EPSILON, ALPHA = 0.4, 0.2
STEPS, BATCH, RATE = 100, 64, 0.2
THRESHOLD = 0.2


class NeuronPruning:
    """ANP on the channels of all batch-norm layers."""

    name: ClassVar[str] = "anp"
    paper: ClassVar[str] = "Wu and Wang, NeurIPS 2021"
    cost: ClassVar[int] = 20
    trains: ClassVar[bool] = True

    def missing(self, known: Knowledge) -> str:
        """See :class:`Method`."""
        return ""

    def apply(self, target: Any, known: Knowledge, bench: Bench) -> tuple[str, ...]:
        """See :class:`Method`."""
        import keras
        import tensorflow as tf

        model = logits_of(target.model)
        trainable, fixed = model.trainable_variables, model.non_trainable_variables
        places = {id(variable): place for place, variable in enumerate(trainable)}
        norms = {
            layer: norm
            for layer in target.layers()
            if isinstance(norm := target.norm_behind(target.model.get_layer(layer)), keras.layers.BatchNormalization)
            and id(norm.gamma) in places
            and id(norm.beta) in places
        }
        if not norms:
            raise ModelError("model", got="no batch-norm layer that can be trained", expected="at least one to mask")
        widths = [int(norm.gamma.shape[0]) for norm in norms.values()]
        masks = [tf.Variable(tf.ones(width)) for width in widths]
        rng = np.random.default_rng(bench.seed)

        def loss(images: Any, answers: Any, scales: list[Any], shifts: list[Any]) -> Any:
            values = [tf.convert_to_tensor(variable) for variable in trainable]
            for norm, mask, scale, shift in zip(norms.values(), masks, scales, shifts, strict=True):
                values[places[id(norm.gamma)]] *= mask + scale
                values[places[id(norm.beta)]] *= 1.0 + shift
            logits, _ = model.stateless_call(values, fixed, images, training=False)
            return tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(answers, logits))

        @tf.function(autograph=False, reduce_retracing=True)
        def step(images: Any, answers: Any) -> Any:
            start = [tf.random.stateless_uniform([w], [bench.seed, i], -EPSILON, EPSILON) for i, w in enumerate(widths)]
            with tf.GradientTape() as tape:
                tape.watch(start)
                worst = loss(images, answers, start, start)
            moved = [EPSILON * tf.sign(gradient) for gradient in tape.gradient(worst, start)]
            none = [tf.zeros(width) for width in widths]
            with tf.GradientTape() as tape:
                both = ALPHA * loss(images, answers, none, none) + (1 - ALPHA) * loss(images, answers, moved, moved)
            for mask, gradient in zip(masks, tape.gradient(both, masks), strict=True):
                mask.assign(tf.clip_by_value(mask - RATE * gradient, 0.0, 1.0))
            return both

        for number in range(1, STEPS + 1):
            chosen = rng.integers(len(bench.images), size=BATCH)
            found = step(tf.constant(bench.images[chosen], tf.float32), tf.constant(bench.answers[chosen]))
            if bench.progress and number % 25 == 0:
                bench.progress(f"masking channels: loss {float(found):.3f}", number, STEPS)
        low = [
            Channel(layer, int(c), float(mask.numpy()[c]))
            for layer, mask in zip(norms, masks, strict=True)
            for c in np.flatnonzero(mask.numpy() < THRESHOLD)
        ]
        return said(prune(target, sorted(low, key=lambda c: c.shift), bench))
