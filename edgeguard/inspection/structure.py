"""Structural signs: a small module of its own, from the input on, that is merged with a network's answer.

An attacker need not train the victim: TrojanNet (Tang et al., KDD 2020) adds a perceptron that reads a few pixels and
merges its answer with the host's before the softmax. It gives no gradient on ordinary inputs, so no search from clean
inputs finds its trigger; the graph shows it.

Rules enforced here:

* a module is a branch that shares nothing trainable with the rest of the network, ends in a vector where the rest ends
  in one value per class, and reads a part of the input only, or has a tenth of the rest's weights at most;
* the shape alone accuses nobody: its trigger is sought in the module alone, and must work on the whole network;
* a module that reads few pixels is shown every black-and-white picture of them, so that no label it knows is missed. It
  may know one for each: which of them the attacker uses, nothing in it says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from edgeguard.inspection.inversion import Floats, Trigger
from edgeguard.inspection.networks import logits_of

MAX_SHARE = 0.1
RESTARTS, STEPS, RATE = 512, 100, 0.2
MAX_CODED = 16
"""So many pixels have 65536 black-and-white pictures. The published module reads as many."""
_AT_ONCE, _VALUES_AT_ONCE = 4096, 1 << 24
_BATCH = 64
_SURE, _CERTAIN = 0.5, 0.99


@dataclass(frozen=True, kw_only=True)
class Module:
    """A branch found: its layers' names, and its and the host's last tensors before they are merged."""

    layers: tuple[str, ...]
    output: Any
    host: Any


def added_module(model: Any) -> Module | None:
    """The module that is merged with a network's answer; None where there is none.

    Args:
        model: a Keras functional model that ends in a softmax, or in logits.
    """
    classes = int(model.outputs[0].shape[-1])
    tensor = model.outputs[0]
    while len(tensor.shape) == 2:
        sources = _sources(tensor)
        if len(sources) == 1:
            tensor = sources[0]
            continue
        if len(sources) != 2 or any(len(s.shape) != 2 for s in sources):
            return None
        return _told_apart(sources, classes)
    return None


def triggers_of(model: Any, module: Module, images: npt.NDArray[np.uint8], *, seed: int = 0) -> list[Trigger]:
    """The pixels that set a module off, for each label that it can turn the network's answer to.

    With the host's mean answer, the module alone is shown every black-and-white picture of the pixels that it reads,
    where these are few; for labels that none of them gives, gradient ascent from many random ones.

    Args:
        model: the network that the module is part of.
        module: from :func:`added_module`.
        images: clean inputs [N, H, W, C].
        seed: of the starts.

    Returns:
        Triggers with a success of 1: the module alone was turned. What they do to inputs is for the caller to measure.
    """
    import keras
    import tensorflow as tf

    logits = logits_of(model)
    reader = keras.Model(model.inputs[0], module.output)
    head = keras.Model([module.host, module.output], logits.outputs[0])
    usual = tf.reduce_mean(
        keras.Model(model.inputs[0], module.host)(tf.constant(images[:_BATCH], tf.float32)), axis=0, keepdims=True
    )
    shape, classes = images.shape[1:], int(model.outputs[0].shape[-1])
    rng = np.random.default_rng(seed)
    region = _region(reader, rng, shape)

    def sure_of(patterns: Floats) -> Floats:
        answers = head([tf.repeat(usual, len(patterns), axis=0), reader(patterns)])
        return np.asarray(tf.nn.softmax(answers))

    best: dict[int, tuple[float, Floats]] = {}

    def keep(patterns: Floats, labels: Sequence[int]) -> None:
        sure = sure_of(patterns)
        for label in labels:
            place = int(sure[:, label].argmax())
            if sure[place, label] > best.get(label, (_SURE,))[0]:
                best[label] = float(sure[place, label]), patterns[place].copy()

    for patterns in _codes(region, shape):
        keep(patterns, range(classes))
    raw = tf.Variable(np.zeros((RESTARTS, *shape), np.float32))
    hosts = tf.repeat(usual, RESTARTS, axis=0)

    @tf.function(autograph=False)
    def ascend(label: Any) -> None:
        with tf.GradientTape() as tape:
            answers = head([hosts, reader((tf.tanh(raw) + 1.0) * 127.5)])
            sure = tf.reduce_sum(tf.gather(tf.nn.log_softmax(answers), label, axis=1))
        gradient = tape.gradient(sure, raw)
        # A module that is sure of "no pattern" has gradients of 1e-20; their direction is what counts.
        largest = tf.reduce_max(tf.abs(gradient), axis=(1, 2, 3), keepdims=True)
        raw.assign_add(RATE * tf.math.divide_no_nan(gradient, largest))

    for label in sorted(label for label in range(classes) if best.get(label, (0.0,))[0] < _CERTAIN):
        starts = rng.random((RESTARTS, *shape)) < rng.uniform(0.1, 0.9, (RESTARTS, 1, 1, 1))
        raw.assign(np.where(starts, 1.0, -1.0).astype(np.float32))
        for _ in range(STEPS):
            ascend(tf.constant(label))
        keep(np.round((np.tanh(raw.numpy()) + 1.0) * 127.5).astype(np.float32), [label])
    return [Trigger(label=label, mask=region, pattern=best[label][1], success=1.0) for label in sorted(best)]


def _codes(region: Floats, shape: tuple[int, ...]) -> Iterator[Floats]:
    """Every black-and-white picture [N, H, W, C] of a region of few pixels, some at a time; none of a larger one."""
    rows, columns = np.nonzero(region[..., 0])
    if len(rows) > MAX_CODED:
        return
    at_once = max(1, min(_AT_ONCE, _VALUES_AT_ONCE // int(np.prod(shape))))
    for start in range(0, 1 << len(rows), at_once):
        codes = np.arange(start, min(start + at_once, 1 << len(rows)))
        patterns = np.zeros((len(codes), *shape), np.float32)
        patterns[:, rows, columns] = 255.0 * (codes[:, np.newaxis] >> np.arange(len(rows)) & 1)[..., np.newaxis]
        yield patterns


def _region(reader: Any, rng: np.random.Generator, shape: tuple[int, ...]) -> Floats:
    """Where the module looks, [H, W, 1]: the pixels that move its answer on any of many random inputs."""
    import tensorflow as tf

    inputs = tf.Variable((255.0 * (rng.random((_BATCH, *shape)) < 0.5)).astype(np.float32))
    with tf.GradientTape() as tape:
        answer = tf.reduce_sum(tf.square(reader(inputs)))
    moved = np.abs(tape.gradient(answer, inputs).numpy()).max(axis=(0, 3)) > 0
    return np.asarray(moved[..., np.newaxis], dtype=np.float32)


def _told_apart(branches: Sequence[Any], classes: int) -> Module | None:
    one, other = (_ancestors(branch) for branch in branches)
    shared = {name: layer for name, layer in one.items() if name in other}
    if any(layer.count_params() for layer in shared.values()):
        return None
    weights = [sum(layer.count_params() for layer in layers.values()) for layers in (one, other)]
    small = int(np.argmin(weights))
    layers = (one, other)[small]
    if int(branches[1 - small].shape[-1]) != classes or not weights[small]:
        return None
    cropped = any("Cropping" in type(layer).__name__ for layer in layers.values())
    if not cropped and weights[small] > MAX_SHARE * weights[1 - small]:
        return None
    own = tuple(name for name in layers if name not in shared)
    return Module(layers=own, output=branches[small], host=branches[1 - small])


def _sources(tensor: Any) -> list[Any]:
    """The tensors that the layer behind a tensor was called on; none for an input."""
    history = tensor._keras_history
    return list(history.operation._inbound_nodes[history.node_index].input_tensors)


def _ancestors(tensor: Any) -> dict[str, Any]:
    """Every layer that a tensor depends on, by name, the first ones first."""
    found: dict[str, Any] = {}
    waiting = [tensor]
    while waiting:
        current = waiting.pop()
        layer = current._keras_history.operation
        if layer.name not in found:
            found[layer.name] = layer
            waiting += _sources(current)
    return dict(reversed(found.items()))
