"""A case: one suspicion about one model, from the first evidence to the repaired fleet. Pure transitions.

::

    suspected -> confirming -> repairing -> repaired -> released -> rolling_out -> closed
                 |             |            |           |
                 |             refused      refused     refused (vetoed)
                 dismissed
    could_not_check: the worker could not tell, or crashed too often

Rules enforced here:

* a case moves along these arrows only, and back to ``confirming`` when its worker is run again;
* "could not check" is a state of its own: it is neither dismissed nor confirmed;
* a model has at most one open case, and none once a release replaces it: two repairs of one model would collide;
* a finished case that changed nothing comes up again only when the flagged inputs have doubled since its run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract.messages import Digest
from edgeguard.hub.policy import ChannelShift, Suspicion

State = Literal[
    "suspected", "confirming", "repairing", "repaired", "released", "rolling_out", "closed",
    "dismissed", "refused", "could_not_check",
]  # fmt: skip

_ARROWS: dict[State, tuple[State, ...]] = {
    "suspected": ("confirming", "could_not_check"),
    "confirming": ("confirming", "repairing", "repaired", "dismissed", "refused", "could_not_check"),
    "repairing": ("confirming", "repairing", "repaired", "dismissed", "refused", "could_not_check"),
    "repaired": ("released", "refused"),
    "released": ("rolling_out", "refused"),
    "rolling_out": ("rolling_out", "closed"),
    "closed": ("closed",),
    "dismissed": (),
    "refused": (),
    "could_not_check": (),
}
WORKING: tuple[State, ...] = ("suspected", "confirming", "repairing")
"""The states in which the worker has yet to finish."""
OPEN: tuple[State, ...] = (*WORKING, "repaired", "released", "rolling_out")


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker is given. The vectors are ``[D]``, empty where no device sent such features."""

    guarded: str
    keras: str
    data: str
    label: int
    flagged_mean: tuple[float, ...]
    unflagged_mean: tuple[float, ...]
    unflagged_std: tuple[float, ...]
    out_dir: str
    seed: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the worker on its way."""

    stage: Literal["confirming", "repairing", "converting"]
    text: Annotated[str, Meta(max_length=500)] = ""
    done: int = 0
    total: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's last word. ``output`` is the repaired guarded model, ``keras`` its trainable form."""

    verdict: Literal["confirmed", "not_confirmed", "could_not_check"]
    gate_passed: bool = False
    output: str | None = None
    model_digest: Digest | None = None
    guard_digest: Digest | None = None
    keras: str | None = None
    summary: dict[str, Any] = msgspec.field(default_factory=dict)


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """The signed release of a repaired model, and how far its roll-out is."""

    target: str
    sequence: int
    model_digest: str
    guard_digest: str
    replaces: str
    at_ms: int
    canaries: tuple[str, ...] = ()
    everyone: bool = False
    updated: tuple[str, ...] = ()
    held: tuple[str, ...] = ()


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One case. ``runs`` counts the worker's starts, ``failures`` those that ended without a result.

    ``flagged`` and ``inputs`` are those of the suspicion; ``judged`` the flagged inputs that the last run was given.
    """

    id: int = 0
    model: str
    model_digest: str
    label: int
    state: State
    created_ms: int
    updated_ms: int
    devices: tuple[str, ...]
    flagged: int
    inputs: int
    p_value: float
    channels: tuple[ChannelShift, ...]
    judged: int = 0
    runs: int = 0
    failures: int = 0
    progress: Progress | None = None
    result: Result | None = None
    release: Released | None = None
    note: str = ""


def open_case(suspicion: Suspicion, *, model: str, at_ms: int) -> Case:
    """A new case, without an id yet."""
    return Case(
        model=model,
        model_digest=suspicion.model_digest,
        label=suspicion.label,
        state="suspected",
        created_ms=at_ms,
        updated_ms=at_ms,
        devices=suspicion.devices,
        flagged=suspicion.flagged,
        inputs=suspicion.inputs,
        p_value=suspicion.p_value,
        channels=suspicion.channels,
    )


def is_news(suspicion: Suspicion, cases: Iterable[Case]) -> bool:
    """Whether a suspicion deserves a case of its own beside those that exist."""
    for case in cases:
        if case.model_digest != suspicion.model_digest:
            continue
        if case.state in OPEN or case.state == "closed":
            return False
        if case.label == suspicion.label and suspicion.flagged < 2 * max(case.flagged, case.judged):
            return False
    return True


def move(case: Case, state: State, *, at_ms: int, **changes: Any) -> Case:
    """The case in its next state. Raises ValueError where no arrow leads there."""
    if state not in _ARROWS[case.state]:
        raise ValueError(f"case {case.id} cannot go from {case.state} to {state}")
    moved: Case = msgspec.structs.replace(case, state=state, updated_ms=at_ms, **changes)
    return moved


def started(case: Case, *, judged: int, at_ms: int) -> Case:
    """The worker was started, for the first time or again, on so many flagged inputs."""
    return move(case, "confirming", at_ms=at_ms, runs=case.runs + 1, judged=judged, progress=None)


def progressed(case: Case, progress: Progress, *, at_ms: int) -> Case:
    """The worker came further. Converting the repaired model is part of repairing."""
    state: State = "confirming" if progress.stage == "confirming" else "repairing"
    return move(case, state, at_ms=at_ms, progress=progress)


def settled(case: Case, result: Result, *, at_ms: int) -> Case:
    """The worker has finished. Only a confirmed case whose gate passed and that has a model is repaired."""
    state: State
    if result.verdict == "could_not_check":
        state, note = "could_not_check", "the inspection could not tell"
    elif result.verdict == "not_confirmed":
        state, note = "dismissed", "the inspection found no backdoor for this label"
    elif result.gate_passed and result.output and result.model_digest and result.guard_digest:
        state, note = "repaired", ""
    else:
        state, note = "refused", "the repaired model did not pass the gate"
    return move(case, state, at_ms=at_ms, result=result, progress=None, note=note)


def crashed(case: Case, reason: str, *, attempts: int, at_ms: int) -> Case:
    """The worker ended without a result. After ``attempts`` of these the case is given up."""
    failures = case.failures + 1
    if failures >= attempts:
        note = f"the worker failed {failures} times, the last time: {reason}"
        return move(case, "could_not_check", at_ms=at_ms, failures=failures, progress=None, note=note)
    return move(case, "confirming", at_ms=at_ms, failures=failures, progress=None, note=reason)
