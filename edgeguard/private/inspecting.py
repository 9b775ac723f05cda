"""The program of a private inspection: seeks the smallest trigger of every label at once, and says which stand out.

JAX programs that run under three-party computation as well as in clear (:func:`in_clear`): the same steps on the same
inputs. Per label two arrays, ``a`` and ``b`` [L, D], how far each value is taken to 1 and to 0:

    x' = (1 - a - b) x + a,   a, b >= 0;   mask a + b, pattern a / (a + b), size sum(a + b)

A step goes down the gradient of sum_j softplus(z_j - z_label), whose derivative, the sigmoid, is made of three
straight pieces; with momentum; takes a constant from both arrays, which is the step of an l1 norm (Parikh and Boyd,
Proximal Algorithms, 2014, 6.5.2); and brings them back into their range. The constant is a weight per label that grows
by what the success is above :data:`TARGET_SUCCESS` and shrinks by what it is below: Neural Cleanse's schedule (Wang et
al., S&P 2019) without its comparisons. The gradient is measured in units of its own first length, so that rates fit
networks of any scale.

What does not change between steps is computed once (:class:`Basis`): with the products of every input and every weight
of the first layer, a step needs two products of matrices and no product of single numbers as large as these.

Rules enforced here:

* nothing branches on a secret, and nothing but flags, whether there was enough to compare, and a padded trigger is
  meant to be opened; triggers of labels that are not flagged are zero before they are padded;
* the decision is that of :mod:`edgeguard.inspection.index` for patches: a label is flagged whose trigger works on
  inputs that it was not sought on, whose index is at least 2 and whose ratio is at most 0.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from edgeguard.contract.private import Inspection
from edgeguard.inspection.index import MAX_RATIO, MIN_INDEX, MIN_OTHERS, MIN_SUCCESS
from edgeguard.private.owners import FRACTION_BITS

RATE, MOMENTUM = 0.2, 0.8
SETTLE = ((0.6, 1.0), (0.85, 0.3), (1.0, 0.1))
"""Up to which share of the steps, which share of the rate."""
FIRST_WEIGHT, WEIGHT_RATE, TARGET_SUCCESS = 0.3, 0.5, 0.95
FEATURES_MAX_RATIO = 0.6
"""Limit of the ratio in the space of features: four fifths of the least that a clean network reached. Patches in pixels
have ``MAX_RATIO``."""
_LEAST_SIZE = 1e-3
_NORMAL, _LEAST_DEVIATION = 1.4826, 0.05


class Basis(NamedTuple):
    """What inputs [B, D] give whatever trigger they carry: ``sums`` [B, H] of the first layer, and ``products``
    [B H, D] of each input's values with the weights into each unit."""

    sums: Any
    products: Any


class Search(NamedTuple):
    """The state of a search: ``a`` and ``b`` in ``taken`` [2, L, D], their momenta in ``speed``, the weight [L] of the
    size, and what the gradient is multiplied by [L]."""

    taken: Any
    speed: Any
    weight: Any
    unit: Any


class Decision(NamedTuple):
    """``flagged`` bool [L]; ``comparable``: enough labels have triggers that work; ``trigger`` float [2, L, D],
    zero where not flagged; ``working`` bool [L]: whose triggers work, which is not opened."""

    flagged: Any
    comparable: Any
    trigger: Any
    working: Any


def from_fixed(values: Any) -> Any:
    """Numbers from the integers that owners share."""
    return values.astype(jnp.float64) * 2.0**-FRACTION_BITS


def layers_of(asked: Inspection, values: Any) -> tuple[Any, ...]:
    """Kernels and biases from the model owner's integers."""
    arrays, start = [], 0
    for shape in asked.weights:
        size = int(np.prod(shape))
        arrays.append(from_fixed(values[start : start + size]).reshape(shape))
        start += size
    return tuple(arrays)


def inputs_of(asked: Inspection, values: Any) -> tuple[Any, Any]:
    """Inputs to seek on and inputs to try on from the data owner's integers."""
    inputs = from_fixed(values).reshape(asked.sought + asked.held_out, asked.inputs)
    return inputs[: asked.sought], inputs[asked.sought :]


def to_fixed(values: Any) -> Any:
    """Integers for an owner, from numbers."""
    return (values * 2.0**FRACTION_BITS).astype(jnp.int64)


def logits(layers: Sequence[Any], before: Any) -> Any:
    """What the network answers, from the first layer's sums."""
    if len(layers) == 2:
        return before
    return jnp.where(before > 0, before, 0.0) @ layers[2] + layers[3]


def basis(layers: Sequence[Any], x: Any) -> Basis:
    """Of inputs [B, D]."""
    kernel, bias = layers[:2]
    products = x[:, None, :] * kernel.T[None]
    return Basis(x @ kernel + bias, products.reshape(-1, x.shape[1]))


def begin(asked: Inspection, layers: Sequence[Any], x: Basis) -> Search:
    """The state before the first step."""
    nothing = jnp.zeros((2, asked.classes, asked.inputs))
    gradient, _ = _gradient(layers, x, nothing)
    scale = (1 - MOMENTUM) * np.sqrt(2.0 * asked.inputs)
    unit = scale * jax.lax.rsqrt(jnp.sum(gradient * gradient, axis=(0, 2)))
    return Search(nothing, nothing, jnp.full(asked.classes, FIRST_WEIGHT), unit)


def rate_at(asked: Inspection, number: int) -> float:
    """The rate of a step, counted from 0."""
    return RATE * next(share for end, share in SETTLE if number < end * asked.steps)


def step(layers: Sequence[Any], x: Basis, state: Search, rate: Any) -> Search:
    """One step of all labels.

    Args:
        layers: kernels and biases.
        x: of the inputs.
        state: so far.
        rate: see :func:`rate_at`.
    """
    taken, weight = state.taken, state.weight
    gradient, miss = _gradient(layers, x, taken)
    speed = MOMENTUM * state.speed + gradient * state.unit[:, None]
    moved = taken - rate * (speed + weight[:, None])
    # All that is cut off at zero is compared in one go: rounds between the parties are what a step costs.
    parts = [moved, moved + taken[::-1] - 1.0, 1.0 - miss]
    cut = _positive(jnp.concatenate([part.reshape(-1) for part in parts]))
    count = taken.size
    within, over = (cut[i * count : (i + 1) * count].reshape(taken.shape) for i in range(2))
    success = jnp.mean(cut[2 * count :].reshape(miss.shape), axis=0)
    grown = weight * (1.0 + WEIGHT_RATE * (success - TARGET_SUCCESS))
    return Search(within - over, speed, grown, state.unit)


def decide(asked: Inspection, layers: Sequence[Any], x: Any, taken: Any) -> Decision:
    """Which labels stand out.

    Args:
        asked: the inspection.
        layers: kernels and biases.
        x: inputs [B, D] that the triggers were not sought on.
        taken: see :class:`Search`.
    """
    working, known = works(layers, x, taken)
    flagged, comparable = stands_out(sizes(taken), working, max_ratio(asked))
    flagged, comparable = flagged & known, comparable & known
    return Decision(flagged, comparable, jnp.where(flagged[:, None], taken, 0.0), working)


def sizes(taken: Any) -> Any:
    """Of the labels' triggers, [L]."""
    return jnp.sum(taken, axis=(0, 2))


def max_ratio(asked: Inspection) -> float:
    """The limit of the ratio."""
    return MAX_RATIO["patch"] if asked.space == "pixels" else FEATURES_MAX_RATIO


def stands_out(sizes: Any, working: Any, limit: float) -> tuple[Any, Any]:
    """Which sizes [L] stand out among those that work, bool [L]; and whether enough work to be compared.

    As :func:`edgeguard.inspection.index.measure` and ``stands_out``, without sorting: places come from comparing all
    pairs, order statistics from places, and medians and quartiles are sums whose weights follow from how many work.
    """
    labels = sizes.shape[0]
    count = jnp.sum(working.astype(jnp.int64))
    # Those that do not work come last.
    ordered = jnp.where(working, jnp.where(sizes > _LEAST_SIZE, sizes, _LEAST_SIZE), 2.0**20)
    number = np.arange(labels)
    ahead = (ordered[None, :] < ordered[:, None]) | (
        (ordered[None, :] == ordered[:, None]) & (number[None, :] < number[:, None])
    )
    place = jnp.sum(ahead.astype(jnp.int64), axis=1)
    at = (place[None, :] == number[:, None]).astype(sizes.dtype)  # [place, label]
    known = (count == np.arange(labels + 1)).astype(sizes.dtype)
    size_at = at @ jnp.where(working, ordered, 0.0)
    logs = jnp.where(working, jnp.log(ordered), 0.0)
    log_at = at @ logs
    median = jnp.sum((known @ _weights(labels, _median)) * log_at)
    side = jnp.sum((known @ _weights(labels, _low_median)) * log_at)
    deviation = _NORMAL * (median - side)
    deviation = jnp.where(deviation > _LEAST_DEVIATION, deviation, _LEAST_DEVIATION)
    far = median - logs >= MIN_INDEX * deviation
    # The k-th of the others is the k-th of all where it comes before the label itself, else the one after it.
    after = jnp.cumsum(at[::-1], axis=0)[::-1] - at  # [place k, label]: the label comes after place k
    following = jnp.concatenate([size_at[1:], jnp.zeros(1, sizes.dtype)])
    others = size_at[:, None] * after + following[:, None] * (1.0 - after)
    quartile = (known @ _weights(labels, _others_quartile)) @ others
    small = ordered <= limit * quartile
    comparable = count > MIN_OTHERS
    return working & far & small & comparable, comparable


def in_clear(asked: Inspection, layers: Sequence[npt.NDArray[Any]], x: npt.NDArray[Any]) -> tuple[Any, Decision]:
    """The same inspection without any secret.

    Args:
        asked: the inspection.
        layers: kernels and biases.
        x: inputs [sought + held_out, D] from 0 to 1.

    Returns:
        Sizes [L], and the decision.
    """
    with jax.experimental.enable_x64():
        arrays = tuple(jnp.asarray(layer, jnp.float64) for layer in layers)
        once = _BASIS(arrays, jnp.asarray(x[: asked.sought]))
        state = _BEGIN(asked, arrays, once)
        for number in range(asked.steps):
            state = _STEP(arrays, once, state, rate_at(asked, number))
        found = _DECIDE(asked, arrays, jnp.asarray(x[asked.sought :]), state.taken)
        return np.asarray(sizes(state.taken)), Decision(*(np.asarray(value) for value in found))


_BASIS, _STEP = jax.jit(basis), jax.jit(step)
_BEGIN, _DECIDE = (jax.jit(of, static_argnums=0) for of in (begin, decide))


def _gradient(layers: Sequence[Any], x: Basis, taken: Any) -> tuple[Any, Any]:
    """Gradients of the loss [2, L, D]; and what each input misses being called each label by [B, L]."""
    before = stamped(layers, x, taken)
    inputs, labels, width = before.shape
    if len(layers) > 2:
        active = before > 0
        z = jnp.where(active, before, 0.0) @ layers[2] + layers[3]
    else:
        z = before
    own = np.eye(labels, dtype=bool)
    margin = 0.5 + 0.25 * (z - _own(z)[:, :, None])
    pieces = _positive(jnp.stack([margin, margin - 1.0]))
    beaten = jnp.where(own, 0.0, pieces[0] - pieces[1])
    miss = jnp.sum(beaten, axis=2)
    back = jnp.where(own, -miss[:, :, None], beaten) * (1.0 / inputs)
    if len(layers) > 2:
        back = jnp.where(active, back @ layers[2].T, 0.0)
    white = jnp.sum(back, axis=0) @ layers[0].T
    black = back.transpose(1, 0, 2).reshape(labels, inputs * width) @ x.products
    return jnp.stack([white - black, -black]), miss


def stamped(layers: Sequence[Any], x: Basis, taken: Any) -> Any:
    """The first layer's sums [B, L, H] for inputs that carry each label's trigger."""
    inputs, width = x.sums.shape
    lost = (x.products @ jnp.sum(taken, axis=0).T).reshape(inputs, width, -1).transpose(0, 2, 1)
    return x.sums[:, None, :] - lost + (taken[0] @ layers[0])[None]


def works(layers: Sequence[Any], x: Any, taken: Any) -> tuple[Any, Any]:
    """Which labels' triggers turn enough of the inputs [B, D] that the network does not call the label anyway, [L];
    and whether there are such inputs for every label."""
    once = basis(layers, x)
    anyway = called(logits(layers, once.sums))
    turned = _first(logits(layers, stamped(layers, once, taken)))
    counted = jnp.sum(1 - anyway, axis=0)
    hits = jnp.sum(turned * (1 - anyway), axis=0)
    hundredths = round(100 * MIN_SUCCESS)
    known = jnp.sum((counted == 0).astype(jnp.int64)) == 0
    return (100 * hits >= hundredths * counted) & (counted > 0), known


def called(z: Any) -> Any:
    """The largest of z [B, K], as int64 [B, K] with a one there."""
    return _first(jnp.broadcast_to(z[:, None, :], (z.shape[0], z.shape[1], z.shape[1])))


def _first(z: Any) -> Any:
    """Whether z [B, L, K] is largest at its label: int64 [B, L]."""
    own = np.eye(z.shape[1], dtype=bool)
    reached = (z >= _own(z)[:, :, None]).astype(jnp.int64)
    return (jnp.sum(jnp.where(own, 0, reached), axis=2) == 0).astype(jnp.int64)


def _own(z: Any) -> Any:
    """What z [B, L, L] says of each label itself, [B, L]: its diagonal."""
    inputs, labels, _ = z.shape
    return z.reshape(inputs, labels * labels)[:, :: labels + 1]


def _positive(values: Any) -> Any:
    return jnp.where(values > 0, values, 0.0)


def _weights(labels: int, of: Any) -> npt.NDArray[np.float64]:
    """[labels + 1, labels]: for each number of values, what each of the sorted ones counts for."""
    weights = np.zeros((labels + 1, labels))
    for count in range(MIN_OTHERS + 1, labels + 1):
        for place, share in of(count):
            weights[count, place] += share
    return weights


def _median(count: int) -> list[tuple[int, float]]:
    return [((count - 1) // 2, 0.5), (count // 2, 0.5)]


def _low_median(count: int) -> list[tuple[int, float]]:
    return _median((count + 1) // 2)


def _others_quartile(count: int) -> list[tuple[int, float]]:
    at = 0.25 * (count - 2)
    low = int(at)
    return [(low, 1.0 - (at - low)), (low + 1, at - low)]
