"""What a private inspection will cost, before it starts: bytes that a party sends, and time.

The counts of products and comparisons follow from the shapes; what one costs was measured with
``python -m benchmarks.private_inspection`` (three parties, TLS), on two networks.
"""

from __future__ import annotations

from typing import NamedTuple

from edgeguard.contract.private import Inspection

PRODUCT_BYTES, COMPARISON_BYTES = 17, 40
STEP_ROUNDS, OTHER_ROUNDS = 70, 450
"""One after another, whatever the size: from times with a line of 20 and of 80 ms."""
BYTES_PER_S = 2.7e6
"""Of a party, of three on two cores that others used as well."""
START_S = 15.0


class Estimate(NamedTuple):
    """``sent_bytes`` of one party; ``seconds`` by the line's latency in milliseconds, from one party to another."""

    sent_bytes: int
    seconds: dict[int, float]


def of(asked: Inspection, latencies: tuple[int, ...] = (0, 1, 20, 80)) -> Estimate:
    """Of an inspection. The first gradient and the decision send about as much as two steps."""
    sent = (asked.steps + 2) * step_bytes(asked) + once_bytes(asked)
    rounds = asked.steps * STEP_ROUNDS + OTHER_ROUNDS
    return Estimate(round(sent), {ms: START_S + sent / BYTES_PER_S + rounds * ms / 1000.0 for ms in latencies})


def step_bytes(asked: Inspection) -> float:
    """Bytes that a party sends in a step."""
    products, comparisons = operations(asked)
    return products * PRODUCT_BYTES + comparisons * COMPARISON_BYTES


def once_bytes(asked: Inspection) -> float:
    """Bytes that a party sends for the products of all inputs and weights; see :class:`inspecting.Basis`."""
    return (asked.sought + asked.held_out) * asked.inputs * asked.layers[1] * PRODUCT_BYTES


def operations(asked: Inspection) -> tuple[int, int]:
    """Products or roundings, and comparisons, in a step."""
    labels, inputs = asked.classes, asked.sought
    hidden = inputs * labels * asked.layers[1] if len(asked.layers) == 3 else 0
    answers, values = inputs * labels * labels, labels * asked.inputs
    products = 4 * hidden + 5 * answers + 12 * values
    comparisons = hidden + 2 * answers + 4 * values + inputs * labels
    return products, comparisons


def facts(asked: Inspection) -> list[tuple[str, str]]:
    """To print."""
    found = of(asked)
    times = ", ".join(f"{seconds / 60:.0f} min at {ms} ms" for ms, seconds in found.seconds.items())
    return [("each party sends", f"about {found.sent_bytes / 1e6:.0f} MB"), ("time", f"about {times} between parties")]
