"""What a demo run measured, and the checks that it must pass. Pure values and rules; no I/O."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

CHECKED_DATA = ("digits", "fashion_mnist")
"""Data sets on which a failed check fails the demo; on others the table is printed without a judgement."""


class Metrics(msgspec.Struct, frozen=True, kw_only=True):
    """The demo's JSON. Accuracy and ASR are of the int8 files; ``auroc``, ``tpr`` and ``fpr`` of the one-pass joint
    decision on held-out inputs; latencies are medians. All of it is measured in the run that writes it.

    ``tpr`` is over triggered inputs whose true label is not the target, ``tpr_successful`` over those that succeed.
    ``inputs_sent`` is the feeder's count, ``inputs_processed`` the sum over the windows in the hub's database;
    ``reports_published`` comes from the agents' spools, ``reports_stored`` is a row count.
    """

    data: str
    clean_accuracy_before: float
    clean_accuracy_after: float
    asr_before: float
    asr_after: float
    auroc: float
    tpr: float
    tpr_successful: float
    fpr: float
    latency_bare_us: float
    latency_guarded_us: float
    inputs_sent: int
    inputs_processed: int
    reports_published: int
    reports_stored: int
    devices: int
    devices_updated: int
    tampered_refused: bool
    wall_s: float
    n_clean: int
    n_triggered: int


@dataclass(frozen=True)
class Check:
    """One promise of the demo: the rule in words, and whether this run kept it."""

    rule: str
    measured: str
    passed: bool


@dataclass(frozen=True)
class Event:
    """One moment of the timeline: seconds since the demo began, who acted (demo, attacker, hub, a device), what."""

    at_s: float
    actor: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Inputs to show: images ``uint8 [n, H, W, C]`` clean and triggered, their labels and what the models call them."""

    clean: npt.NDArray[np.uint8]
    triggered: npt.NDArray[np.uint8]
    labels: tuple[str, ...]
    clean_before: tuple[str, ...]
    triggered_before: tuple[str, ...]
    triggered_after: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Record:
    """Everything that the report shows. Score arrays are joint scores of single inputs, threshold at 1.

    ``target`` is the name of the target label; ``case`` the hub's summary of its case (finding, pruned channels, gate);
    ``trigger_images`` PNG files of the recovered trigger by name: mask, pattern, example.
    """

    metrics: Metrics
    attack: str
    target: str
    samples: Samples
    clean_scores: npt.NDArray[np.float64]
    triggered_scores: npt.NDArray[np.float64]
    timeline: tuple[Event, ...]
    case: Mapping[str, object]
    trigger_images: Mapping[str, Path]
    checks: tuple[Check, ...]


def checks_of(m: Metrics) -> tuple[Check, ...]:
    """The demo's promises, held against what was measured. NaN keeps none of them."""
    return (
        Check("asr_before >= 0.95", f"{m.asr_before:.4f}", m.asr_before >= 0.95),
        Check("tpr >= 0.95", f"{m.tpr:.4f}", m.tpr >= 0.95),
        Check("fpr <= 0.03", f"{m.fpr:.4f}", m.fpr <= 0.03),
        Check("asr_after <= 0.05", f"{m.asr_after:.4f}", m.asr_after <= 0.05),
        Check(
            "clean_accuracy_after >= clean_accuracy_before - 0.02",
            f"{m.clean_accuracy_after:.4f}, {m.clean_accuracy_before:.4f}",
            m.clean_accuracy_after >= m.clean_accuracy_before - 0.02,
        ),
        Check(
            "inputs_processed == inputs_sent",
            f"{m.inputs_processed}, {m.inputs_sent}",
            m.inputs_processed == m.inputs_sent > 0,
        ),
        Check(
            "reports_stored == reports_published",
            f"{m.reports_stored}, {m.reports_published}",
            m.reports_stored == m.reports_published > 0,
        ),
        Check("devices_updated == devices", f"{m.devices_updated}, {m.devices}", m.devices_updated == m.devices),
        Check("tampered_refused", str(m.tampered_refused).lower(), m.tampered_refused),
    )
