"""One input through the model, its guard and what else the budget allows; and how the outcome is told.

Rules enforced here:

* the model runs for every input, whatever the budget says; what is cut is the guard's own work;
* an input whose scores were not read is *not checked*; a doubtful one that no look was left for is *not audited*;
* what the policy withholds is neither in the result's outputs nor in its prediction.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.agent.config import Policy, PolicyConfig
from edgeguard.agent.governor import Level
from edgeguard.contract import frames
from edgeguard.detection.cascade import Budget, Cascade
from edgeguard.detection.guarded import GuardedModel, Inference
from edgeguard.detection.sidecar import Sidecar
from edgeguard.detection.verdict import Verdict, not_checked
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class Running:
    """The model that runs, as it was installed."""

    model: GuardedModel
    sidecar: Sidecar | None
    sequence: int


class Engine:
    """A running model at work. Not for use from several threads at once."""

    def __init__(
        self,
        running: Running,
        *,
        budget: Budget,
        audit_share: float,
        rng: np.random.Generator,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.running = running
        self.level = Level.EVERYTHING
        self.extra_inferences = 0
        """Looks taken so far."""
        self.extra_s = 0.0
        """Seconds of the guard's own work so far: looks."""
        self._clock = clock
        self._rng = rng
        self._audit_share = audit_share
        self._cascade = Cascade(
            running.model, running.sidecar, clock=clock, rng=rng, budget=budget, audit_share=audit_share
        )

    def infer(self, x: Array) -> tuple[Inference | None, Verdict]:
        """Run one input ``[*shape]`` in the owner's type. The inference is None where the model refused the input."""
        level = self.level
        try:
            if level.score_every > 1 and self._rng.integers(level.score_every):
                inference = self.running.model.infer(x)
                reason = f"one input in {level.score_every} is scored, to save work"
                verdict = not_checked(inference.verdict.predicted, {}, reason)
                return msgspec.structs.replace(inference, verdict=verdict), verdict
            self._cascade.audit_share = self._audit_share if level.audits_at_random else 0.0
            started = self._clock()
            inference, took = self._cascade.infer(x, looks=level.looks_further)
        except ModelError as error:
            # Shape and type were checked by the source: the input holds NaN or infinity, or the runtime failed.
            return None, not_checked(None, {}, str(error))
        if took > 1:
            self.extra_inferences += took - 1
            self.extra_s += (self._clock() - started) * (took - 1) / took
        return inference, inference.verdict


def policy_of(verdict: Verdict, policy: PolicyConfig) -> Policy:
    """What the configuration says about such an input."""
    status = verdict.status
    if status == "clean":
        return "pass"
    if status == "flagged":
        return policy.flagged
    return policy.not_checked if status == "not checked" else policy.not_audited


def result_of(name: str, inference: Inference | None, verdict: Verdict, policy: Policy) -> tuple[frames.Result, bytes]:
    """The result frame of one input, and its body."""
    outputs: tuple[Array, ...] = ()
    if inference is not None and policy != "withhold":
        outputs = inference.outputs
    body = b"".join([output.tobytes() for output in outputs])
    result = frames.Result(
        bytes=len(body),
        id=name,
        predicted=None if policy == "withhold" else verdict.predicted,
        status=verdict.status,
        policy=policy,
        score=_number(verdict.score),
        scores={detector: _number(score) for detector, score in verdict.scores.items()},
        p_value=verdict.p_value,
        stages=verdict.stages,
        reason=verdict.reason[:500],
        outputs=tuple([_described(output.dtype, output.shape) for output in outputs]),
    )
    return result, body


def line_of(source: str, name: str, index: int, result: frames.Result) -> dict[str, object]:
    """One input as ``[results]`` has it. ``flagged`` is None for one that was not checked."""
    return {
        "source": source,
        "name": name,
        "index": index,
        "predicted": result.predicted,
        "status": result.status,
        "flagged": None if result.status == "not checked" else result.status == "flagged",
        "score": result.score,
        "p_value": result.p_value,
        "policy": result.policy,
        "reason": result.reason,
    }


@lru_cache(maxsize=64)
def _described(dtype: np.dtype[Any], shape: tuple[int, ...]) -> frames.Output:
    return msgspec.convert({"dtype": dtype.name, "shape": shape}, frames.Output)


def _number(score: float) -> float | None:
    # JSON has neither NaN nor infinity; a score that overflowed is still a flagged one.
    return None if math.isnan(score) else min(score, _LARGEST)
