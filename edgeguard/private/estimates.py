"""What a private inspection will cost, before it starts: bytes that a party sends, and time.

The counts of products and comparisons follow from the shapes; what one costs was measured with
``python -m benchmarks.private_inspection`` (three parties, TLS), on two networks.
"""

from __future__ import annotations

from typing import NamedTuple

from edgeguard.contract.private import Inspection

PRODUCT_BYTES, COMPARISON_BYTES = 20, 40
STEP_ROUNDS = 120
"""One after another, whatever the size: counted from the protocol (three comparisons, some fifteen products), not
measured."""
BYTES_PER_S = 1.4e6
"""Of a party, of three on two cores that others used as well: the slowest that was measured."""
START_S = 60.0


class Estimate(NamedTuple):
    """``sent_bytes`` of one party; ``seconds`` by the line's latency in milliseconds, from one party to another."""

    sent_bytes: int
    seconds: dict[int, float]


def of(asked: Inspection, latencies: tuple[int, ...] = (0, 1, 20, 80)) -> Estimate:
    """Of an inspection."""
    sent = asked.steps * step_bytes(asked)
    rounds = asked.steps * STEP_ROUNDS
    return Estimate(round(sent), {ms: START_S + sent / BYTES_PER_S + rounds * ms / 1000.0 for ms in latencies})


def step_bytes(asked: Inspection) -> float:
    """Bytes that a party sends in a step."""
    products, comparisons = operations(asked)
    return products * PRODUCT_BYTES + comparisons * COMPARISON_BYTES


def operations(asked: Inspection) -> tuple[int, int]:
    """Products, each with its rounding, and comparisons in a step."""
    values, width, labels, inputs = asked.inputs, asked.layers[1], asked.classes, asked.sought
    hidden = inputs * labels * width if len(asked.layers) == 3 else 0
    products = 2 * values * labels * width + 2 * inputs * labels * width + 3 * hidden
    products += 6 * inputs * labels * labels + 14 * labels * values
    comparisons = hidden + 2 * inputs * labels * labels + 4 * labels * values + inputs * labels
    return products, comparisons


def facts(asked: Inspection) -> list[tuple[str, str]]:
    """To print."""
    found = of(asked)
    times = ", ".join(f"{seconds / 60:.0f} min at {ms} ms" for ms, seconds in found.seconds.items())
    return [("each party sends", f"about {found.sent_bytes / 1e6:.0f} MB"), ("time", f"about {times} between parties")]
