"""Messages of a device, of little content: what matters in a spool is their number, order and size."""

from __future__ import annotations

from edgeguard.contract.messages import ActivationMean, Alert, Report
from edgeguard.contract.scores import BINS

DIGEST = "0" * 64


def report(boot: str, seq: int, *, activation: ActivationMean | None = None) -> Report:
    """A report that counts nothing."""
    return Report(
        boot=boot,
        seq=seq,
        model_digest=DIGEST,
        guard_digest=DIGEST,
        started_ms=1,
        ended_ms=2,
        inputs=0,
        unchecked=0,
        labels=(),
        histogram=(0,) * BINS,
        activation=activation,
    )


def alert(boot: str, seq: int) -> Alert:
    """An alert."""
    return Alert(boot=boot, seq=seq, model_digest=DIGEST, guard_digest=DIGEST, at_ms=1, label=0, score=2.0, scores={})
