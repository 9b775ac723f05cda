"""What the parties compute on shares: the robust order of channels over devices, of which only a set is opened.

JAX programs that run under three-party computation as well as in clear. Integers throughout, so that both give the same
bits. Arguments are the parties' additive shares ``int64 [N, C]``; adding them up wraps modulo 2^64, as it must.

Rules enforced here:

* a device's submission counts only where it is one: votes are 0 or 1 and as many as asked for, ranks are each channel's
  place and add up to what all places add up to. What is not is left out, and nobody learns whose it was;
* the median over devices cannot be moved beyond the honest ones' by less than half of them; a vote moves a channel by
  one at most;
* where fewer valid submissions than asked for remain, nothing is opened but that;
* the set of channels is opened without their order.

Wu, Yang, Zhu, Mitra, Mitigating Backdoor Attacks in Federated Learning, 2020: majority vote and rank aggregation.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax.numpy as jnp

from edgeguard.contract.private import Round

Program = Callable[[Any, Any, Any], tuple[Any, Any]]


def program(asked: Round) -> Program:
    """The program of a round: from three shares to (mask [C] of the channels to prune, whether enough took part)."""
    compute = _votes if asked.kind == "votes" else _ranks
    return partial(_opened, compute, asked.prune, asked.min_devices)


def _opened(
    compute: Callable[[Any, int], tuple[Any, Any]], prune: int, min_devices: int, s0: Any, s1: Any, s2: Any
) -> tuple[Any, Any]:
    cost, valid = compute(s0 + s1 + s2, prune)
    enough = jnp.sum(valid) >= min_devices
    return _lowest(cost, prune) & enough, enough


def _votes(x: Any, prune: int) -> tuple[Any, Any]:
    """Minus the number of valid votes for each channel [C], and which devices' are valid [N]."""
    is_bit = jnp.sum((x * (x - 1) != 0).astype(jnp.int64), axis=1) == 0
    valid = (is_bit & (jnp.sum(x, axis=1) == prune)).astype(jnp.int64)
    return -jnp.sum(x * valid[:, None], axis=0), valid


def _ranks(x: Any, prune: int) -> tuple[Any, Any]:
    """The lower median rank of each channel [C] over valid devices, and which devices' are valid [N].

    The median is built up bit by bit: the largest t for which at most half of the ranks lie below t.
    """
    del prune
    channels = x.shape[1]
    within = jnp.sum(((x < 0) | (x >= channels)).astype(jnp.int64), axis=1) == 0
    # Places 0 to C - 1 by their sum and the sum of their squares: of the vectors within range that pass, one that is no
    # permutation is a lie that the median bounds.
    total, squares = channels * (channels - 1) // 2, (channels - 1) * channels * (2 * channels - 1) // 6
    valid = (within & (jnp.sum(x, axis=1) == total) & (jnp.sum(x * x, axis=1) == squares)).astype(jnp.int64)
    count = jnp.sum(valid)
    median = jnp.zeros(channels, dtype=jnp.int64)
    for bit in reversed(range((channels - 1).bit_length())):
        candidate = median + (1 << bit)
        below = jnp.sum((x < candidate[None, :]).astype(jnp.int64) * valid[:, None], axis=0)
        median = median + (1 << bit) * (2 * below < count).astype(jnp.int64)
    return median, valid


def _lowest(cost: Any, count: int) -> Any:
    """Which ``count`` channels [C] cost least; of two that cost the same, the one with the lower number.

    Every pair is compared, so that no order is opened and none is sorted by.
    """
    number = jnp.arange(cost.shape[0])
    cheaper = (cost[None, :] < cost[:, None]) | ((cost[None, :] == cost[:, None]) & (number[None, :] < number[:, None]))
    return jnp.sum(cheaper.astype(jnp.int64), axis=1) < count
