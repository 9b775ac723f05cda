"""The program of a private mending: the flagged labels' triggers are unlearnt in the last layer, and never shown.

The triggers that an inspection found lie over each other on clean inputs. Hidden units that they lift most lose their
outgoing weights (fine-pruning by activation: Liu et al., RAID 2018, but by the difference that a trigger makes instead
of by what lies dormant). Then gradient descent with momentum on the last layer, on the mean squared difference to the
original's own logits on clean inputs: on these and on their triggered copies. The loss is quadratic, so that no step
compares anything.

JAX, as :mod:`edgeguard.private.inspecting`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from edgeguard.contract.private import Inspection
from edgeguard.private.inspecting import called, logits

MOMENTUM = 0.9


class Lesson(NamedTuple):
    """What is learnt from: the last layer's inputs [2 B, H], the answers wanted [2 B, K], and the rate."""

    hidden: Any
    wanted: Any
    rate: Any


class Last(NamedTuple):
    """The last layer with its momenta."""

    kernel: Any
    bias: Any
    kernel_speed: Any
    bias_speed: Any


class Judged(NamedTuple):
    """Counts of held-out inputs: ``kept`` are answered as before; ``turned``: with the triggers, otherwise than the
    original answers without, before and after."""

    kept: Any
    turned_before: Any
    turned_after: Any


def begin(asked: Inspection, layers: Sequence[Any], x: Any, trigger: Any) -> tuple[Lesson, Last]:
    """The lesson, and the last layer pruned.

    Args:
        asked: the inspection.
        layers: kernels and biases.
        x: clean inputs [B, D].
        trigger: [2, L, D] as the inspection decided, zero for labels that are not flagged.
    """
    clean, triggered = _hidden(layers, x), _hidden(layers, _worn(x, trigger))
    kernel, bias = layers[-2:]
    wanted = clean @ kernel + bias
    hidden = jnp.concatenate([clean, triggered])
    if asked.prune:
        lift = (jnp.mean(triggered, axis=0) - jnp.mean(clean, axis=0)) * jnp.sum(kernel * kernel, axis=1)
        higher = jnp.sum((lift[None, :] > lift[:, None]).astype(jnp.int64), axis=1)
        staying = (higher >= asked.prune).astype(kernel.dtype)
        kernel = kernel * staying[:, None]
        hidden = hidden * staying[None, :]
    rate = 1.0 / (1.0 + jnp.mean(jnp.sum(hidden * hidden, axis=1)))
    zero = (jnp.zeros(kernel.shape), jnp.zeros(bias.shape))
    return Lesson(hidden, jnp.concatenate([wanted, wanted]), rate), Last(kernel, bias, *zero)


def step(lesson: Lesson, last: Last) -> Last:
    """One step."""
    wrong = lesson.hidden @ last.kernel + last.bias - lesson.wanted
    share = 1.0 / lesson.hidden.shape[0]
    kernel_speed = MOMENTUM * last.kernel_speed + (lesson.hidden.T @ wrong) * share
    bias_speed = MOMENTUM * last.bias_speed + jnp.sum(wrong, axis=0) * share
    return Last(
        last.kernel - lesson.rate * kernel_speed, last.bias - lesson.rate * bias_speed, kernel_speed, bias_speed
    )


def judge(layers: Sequence[Any], last: Last, x: Any, trigger: Any) -> Judged:
    """What became of inputs [B, D] that nothing was learnt from."""
    mended = (*layers[:-2], last.kernel, last.bias)
    worn = _worn(x, trigger)
    original, kept, before, after = (
        called(logits(which, inputs @ which[0] + which[1]))
        for which, inputs in ((layers, x), (mended, x), (layers, worn), (mended, worn))
    )
    alike = [jnp.sum(original * other) for other in (kept, before, after)]
    return Judged(alike[0], x.shape[0] - alike[1], x.shape[0] - alike[2])


def in_a_row(last: Last) -> Any:
    """Kernel and bias, as the owner's pad covers them."""
    return jnp.concatenate([last.kernel.reshape(-1), last.bias])


def in_clear(
    asked: Inspection, layers: Sequence[npt.NDArray[Any]], x: npt.NDArray[Any], trigger: npt.NDArray[Any]
) -> tuple[npt.NDArray[Any], npt.NDArray[Any], Judged]:
    """The same mending without any secret: the last layer's kernel and bias, and how it was judged.

    Args:
        asked: the inspection.
        layers: kernels and biases.
        x: inputs [sought + held_out, D] from 0 to 1.
        trigger: [2, L, D] as the inspection decided.
    """
    with jax.experimental.enable_x64():
        arrays = tuple(jnp.asarray(layer, jnp.float64) for layer in layers)
        lesson, last = begin(asked, arrays, jnp.asarray(x[: asked.sought]), jnp.asarray(trigger))
        one = jax.jit(step)
        for _ in range(asked.mending_steps):
            last = one(lesson, last)
        judged = judge(arrays, last, jnp.asarray(x[asked.sought :]), jnp.asarray(trigger))
        return np.asarray(last.kernel), np.asarray(last.bias), Judged(*(int(value) for value in judged))


def _hidden(layers: Sequence[Any], x: Any) -> Any:
    """What goes into the last layer."""
    if len(layers) == 2:
        return x
    before = x @ layers[0] + layers[1]
    return jnp.where(before > 0, before, 0.0)


def _worn(x: Any, trigger: Any) -> Any:
    """Inputs [B, D] with the triggers of all flagged labels over each other."""
    a, b = jnp.sum(trigger[0], axis=0), jnp.sum(trigger[1], axis=0)
    a = jnp.where(a < 1.0, a, 1.0)
    b = jnp.where(a + b < 1.0, b, 1.0 - a)
    return x - (a + b)[None] * x + a[None]
