"""A suspicion about one model, and the case that it may become. Pure transitions.

::

    suspected -> inspecting -> confirmed -> repairing -> repaired -> released -> rolling_out -> closed
        |            |             |            |            |           |            |           |
     refused     dismissed      refused      refused      refused     refused      aborted ------>|
                                                                                      |           |
                                                                     rolled_back <- rolling_back <-
    could_not_check: the inspection could not tell, or what it needs is not there
    of a private model: suspected -> confirmed, dismissed or could_not_check; confirmed -> repaired

A record begins as a suspicion, which reports alone may raise. It is a *case* from the moment an inspection on the hub
confirmed it, and stays one.

Rules enforced here:

* a record moves along these arrows only;
* only a confirmed inspection makes a case, or inputs that owners shared (:mod:`edgeguard.hub.shared`); what was
  confirmed can no longer be dismissed: inspections that disagree are *could not check*;
* "could not check" is a state of its own: it is neither dismissed nor confirmed;
* a step that policy gives to a person waits for that person, and the record says which step it waits for;
* a model has at most one open record, and none once a release replaces it: two repairs of one model would collide;
* a model that the fleet is brought back from is not looked at again;
* a person's word ends a roll-out at any time, and can bring the model before back, also later; what is paused stays so
  until somebody says otherwise;
* of a private model the hub inspects and repairs nothing: three parties' finding dismisses or confirms the suspicion,
  and what then goes to the fleet is a release that the model's owner signed;
* a finished record that changed nothing comes up again only when the flagged inputs have doubled since, or for other
  devices: else those who shout for a label once would silence all others about it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract.messages import Digest
from edgeguard.hub.policy import ChannelShift, Suspicion

State = Literal[
    "suspected", "inspecting", "confirmed", "repairing", "repaired", "released", "rolling_out", "closed",
    "dismissed", "refused", "could_not_check", "aborted", "rolling_back", "rolled_back",
]  # fmt: skip
Steering = Literal["pause", "resume", "abort", "back"]
"""What a person, or policy, may do to a roll-out."""
Step = Literal["inspect", "repair", "stage"]
Choice = Literal["auto", "approve", "never"]

_ARROWS: dict[State, tuple[State, ...]] = {
    "suspected": ("inspecting", "confirmed", "refused", "could_not_check"),
    "inspecting": ("confirmed", "dismissed", "could_not_check"),
    "confirmed": ("repairing", "refused", "could_not_check"),
    "repairing": ("repaired", "refused", "could_not_check"),
    "repaired": ("released", "refused"),
    "released": ("rolling_out", "refused"),
    "rolling_out": ("closed", "aborted", "rolling_back"),
    "closed": ("rolling_back",),
    "aborted": ("rolling_back",),
    "rolling_back": ("rolled_back", "aborted"),
    "rolled_back": (),
    "dismissed": ("confirmed",),
    "refused": (),
    "could_not_check": ("confirmed",),
}
_PRIVATE_ARROWS: dict[State, tuple[State, ...]] = {
    **_ARROWS,
    "suspected": ("confirmed", "dismissed", "refused", "could_not_check"),
    "confirmed": ("repaired", "refused", "could_not_check"),
    "could_not_check": ("confirmed", "dismissed", "could_not_check"),
}
WORKING: tuple[State, ...] = ("inspecting", "repairing")
"""The states in which a job is under way."""
OPEN: tuple[State, ...] = (
    "suspected", "inspecting", "confirmed", "repairing", "repaired", "released", "rolling_out", "rolling_back",
)  # fmt: skip
_DECIDED_IN: dict[Step, tuple[State, ...]] = {
    "inspect": ("suspected",),
    "repair": ("confirmed",),
    "stage": ("repaired", "released"),
}
_MAX_NAMED = 5
WEEK_MS = 7 * 86_400_000


class Dormant(msgspec.Struct, frozen=True, kw_only=True):
    """Channels of one tapped layer that the fleet finds least active on clean inputs, the least active first."""

    layer: str
    channels: tuple[int, ...]


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What the worker is given. The vectors are ``[D]``, empty where no device sent such features.

    ``channels`` are the suspected ones, as indices into the features; none: all. ``resume`` is the folder of an
    earlier run that confirmed the same suspicion. ``quarantined`` is an npz file with ``inputs`` ``[M, ...]`` that
    owners shared and the hub's own copy of the model flags and calls the label.
    """

    guarded: str
    keras: str
    data: str
    label: int
    flagged_mean: tuple[float, ...]
    unflagged_mean: tuple[float, ...]
    unflagged_std: tuple[float, ...]
    channels: tuple[int, ...] = ()
    dormant: tuple[Dormant, ...] = ()
    stop_after: Literal["inspect"] | None = None
    resume: str | None = None
    quarantined: str | None = None
    out_dir: str
    seed: int


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the worker on its way."""

    stage: Literal["confirming", "repairing", "converting"]
    text: Annotated[str, Meta(max_length=500)] = ""
    done: int = 0
    total: int = 0


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The worker's last word. ``output`` is the repaired guarded model, ``keras`` its trainable form.

    ``repaired`` False: it stopped after the inspection, as it was told to. ``needs_approval``: no rule of the gate
    failed, but one could not be checked.
    """

    verdict: Literal["confirmed", "not_confirmed", "could_not_check"]
    repaired: bool = True
    gate_passed: bool = False
    needs_approval: bool = False
    output: str | None = None
    model_digest: Digest | None = None
    guard_digest: Digest | None = None
    keras: str | None = None
    summary: dict[str, Any] = msgspec.field(default_factory=dict)

    @property
    def reason(self) -> str:
        """Why the inspection decided as it did, in its own words; empty where it gave none."""
        finding = self.summary.get("finding")
        reason = finding.get("reason") if isinstance(finding, dict) else None
        return reason[:500] if isinstance(reason, str) else ""


class Released(msgspec.Struct, frozen=True, kw_only=True):
    """The signed release of a model, and how far its roll-out is.

    Attributes:
        everyone: the last group has begun.
        updated: devices that run it, or one that came after it.
        held: some of those that do not though they should, or that fare worse since, and why.
        group: 0 the canaries, then the groups of the configuration; ``groups`` is how many there are.
        group_ms: when this group began, by the hub's clock.
        through: the largest rank of the group's devices.
        counts: the devices that it was offered to, by what became of it.
        paused: why the roll-out stands still; empty while it does not.
        resumed: a person let it go on: what failed until then is put up with.
    """

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
    group: int = 0
    groups: int = 0
    group_ms: int | None = None
    through: str = ""
    counts: dict[str, int] = msgspec.field(default_factory=dict)
    paused: str = ""
    resumed: bool = False


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One record, from suspicion to the repaired fleet.

    Attributes:
        flagged: as ``inputs``, that of the suspicion; ``judged`` what the last job was given.
        is_case: an inspection confirmed it.
        awaiting: the step that waits for a person.
        approved: the steps that a person approved.
        job: the job under way, or the last one.
        asked_ms: when the fleet was asked for ranks or votes.
        shared: how many inputs that owners shared confirmed it; 0 where an inspection did.
        private: its model is: nothing of it but counts is for the hub.
        back: the release that brings the model before ``release`` back, where that was asked for.
        revision: counts the writes, so that no two hubs move one record at once.
    """

    id: int = 0
    model: str
    model_digest: str
    label: int
    label_name: str = ""
    state: State
    created_ms: int
    updated_ms: int
    devices: tuple[str, ...]
    flagged: int
    inputs: int
    p_value: float
    channels: tuple[ChannelShift, ...]
    judged: int = 0
    is_case: bool = False
    awaiting: Step | None = None
    approved: tuple[Step, ...] = ()
    job: int | None = None
    asked_ms: int | None = None
    shared: int = 0
    private: bool = False
    result: Result | None = None
    release: Released | None = None
    back: Released | None = None
    note: str = ""
    revision: int = 0


def open_case(suspicion: Suspicion, *, model: str, label_name: str, at_ms: int, private: bool = False) -> Case:
    """A new record, without an id yet: a suspicion, not a case."""
    return Case(
        model=model,
        model_digest=suspicion.model_digest,
        label=suspicion.label,
        label_name=label_name,
        state="suspected",
        created_ms=at_ms,
        updated_ms=at_ms,
        devices=suspicion.devices,
        flagged=suspicion.flagged,
        inputs=suspicion.inputs,
        p_value=suspicion.p_value,
        channels=suspicion.channels,
        private=private,
    )


def is_news(suspicion: Suspicion, cases: Iterable[Case], *, now_ms: int) -> bool:
    """Whether a suspicion deserves a record of its own beside those that exist.

    What could not be checked costs the devices behind it no trust: a week later it is tried again, not sooner.
    """
    for case in cases:
        left = case.release if case.state in ("rolling_back", "rolled_back") else None
        if left is not None and left.model_digest == suspicion.model_digest:
            return False
        if case.model_digest != suspicion.model_digest:
            continue
        if case.state in OPEN or case.state == "closed":
            return False
        if case.state == "could_not_check" and case.label == suspicion.label and now_ms < case.updated_ms + WEEK_MS:
            return False
        same = len(set(suspicion.devices) & set(case.devices)) * 2 > len(suspicion.devices)
        if case.label == suspicion.label and same and suspicion.flagged < 2 * max(case.flagged, case.judged):
            return False
    return True


def move(case: Case, state: State, *, at_ms: int, **changes: Any) -> Case:
    """The record in its next state. Raises ValueError where no arrow leads there."""
    if state not in (_PRIVATE_ARROWS if case.private else _ARROWS)[case.state]:
        raise ValueError(f"case {case.id} cannot go from {case.state} to {state}")
    moved: Case = msgspec.structs.replace(case, state=state, updated_ms=at_ms, awaiting=None, **changes)
    return moved


def may(case: Case, step: Step, choice: Choice) -> bool | None:
    """Whether a step may be done now; None where a person has yet to be asked, or to answer."""
    if choice == "auto" or (choice == "approve" and step in case.approved):
        return True
    return None if choice == "approve" else False


def decided(case: Case, step: Step, *, approve: bool, who: str, why: str, at_ms: int) -> Case:
    """The record after a person's decision on one step.

    A rejection ends it: before the inspection, before the repair, or before the roll-out has begun. An approval is
    taken only where it is waited for.

    Raises:
        ValueError: the step is not open for a decision.
    """
    if approve and case.private and step == "inspect":
        raise ValueError(f"case {case.id} waits for what three parties find: no word of a person stands for it")
    if case.state not in _DECIDED_IN[step] or (approve and case.awaiting != step):
        waits = f"waits for approval of {case.awaiting}" if case.awaiting else f"is {case.state}"
        raise ValueError(f"case {case.id} {waits}: nothing to decide on {step}")
    if approve:
        return msgspec.structs.replace(case, awaiting=None, approved=(*case.approved, step), updated_ms=at_ms)
    return move(case, "refused", at_ms=at_ms, note=f"{who} said no to {step}" + (f": {why}" if why else ""))


def steered(case: Case, how: Steering, *, who: str, why: str, at_ms: int) -> Case:
    """The record after a decision on its roll-out.

    Raises:
        ValueError: it has no roll-out that this can be done to.
    """
    release, because = case.release, f": {why}" if why else ""
    wrongly = how in ("pause", "resume") and release is not None and bool(release.paused) != (how == "resume")
    if release is None or case.state not in _STEERED_IN[how] or wrongly:
        now = f"{case.state}, paused" if release and release.paused else case.state
        raise ValueError(f"case {case.id} is {now}: nothing to {_STEERINGS[how]}")
    if how == "pause":
        paused = msgspec.structs.replace(release, paused=f"{who} paused it{because}")
        return msgspec.structs.replace(case, release=paused, updated_ms=at_ms)
    running = msgspec.structs.replace(release, paused="", resumed=how == "resume")
    if how == "resume":
        return msgspec.structs.replace(case, release=running, updated_ms=at_ms)
    state: State = "aborted" if how == "abort" else "rolling_back"
    # Ended before, it begins anew: those who are there have all their time to answer.
    back = msgspec.structs.replace(case.back, at_ms=at_ms) if case.back else None
    said = "ended the roll-out" if how == "abort" else "asked for the model before"
    return move(case, state, at_ms=at_ms, release=running, back=back, note=f"{who} {said}{because}")


_STEERED_IN: dict[Steering, tuple[State, ...]] = {
    "pause": ("rolling_out",),
    "resume": ("rolling_out",),
    "abort": ("rolling_out", "rolling_back"),
    "back": ("rolling_out", "closed", "aborted"),
}
_STEERINGS: dict[Steering, str] = {"pause": "pause", "resume": "resume", "abort": "end", "back": "roll back"}


def confirmed(case: Case, *, at_ms: int, **changes: Any) -> Case:
    """The inspection confirmed the suspicion: from now on it is a case."""
    return move(case, "confirmed", at_ms=at_ms, is_case=True, **changes)


def progressed(case: Case, progress: Progress, *, at_ms: int) -> list[Case]:
    """The moves that a job's progress means: one that repairs has confirmed."""
    moves: list[Case] = []
    if progress.stage != "confirming":
        if case.state == "inspecting":
            moves.append(confirmed(case, at_ms=at_ms))
        if (moves or [case])[-1].state == "confirmed":
            moves.append(move((moves or [case])[-1], "repairing", at_ms=at_ms))
    return moves


def settled(case: Case, result: Result, *, at_ms: int) -> list[Case]:
    """The moves that a job's result means.

    Only a confirmed case whose gate passed and that has a model is repaired.
    """
    found = result.reason
    if result.verdict == "confirmed":
        moves = []
        if case.state == "inspecting":
            case = confirmed(case, at_ms=at_ms, result=result, note=found)
            moves.append(case)
        if not result.repaired and case.state == "confirmed":
            return moves
        if case.state == "confirmed":
            case = move(case, "repairing", at_ms=at_ms)
            moves.append(case)
        if result.gate_passed and result.output and result.model_digest and result.guard_digest:
            return [*moves, move(case, "repaired", at_ms=at_ms, result=result, note="")]
        note = "the repaired model did not pass the gate"
        return [*moves, move(case, "refused", at_ms=at_ms, result=result, note=note)]
    if result.verdict == "not_confirmed" and not case.is_case:
        note = "the inspection found no backdoor for this label" + (f": {found}" if found else "")
        return [move(case, "dismissed", at_ms=at_ms, result=result, note=note)]
    note = "two inspections disagree" if result.verdict == "not_confirmed" else "the inspection could not tell"
    note += f": {found}" if found else ""
    # What confirmed it stays with it.
    changes = {} if case.is_case else {"result": result}
    return [move(case, "could_not_check", at_ms=at_ms, note=note, **changes)]


def found_in_private(case: Case, result: Result, *, at_ms: int) -> Case:
    """The record after what three parties found. What could not be checked may be checked once more.

    Raises:
        ValueError: its model is not private, or it waits for no finding.
    """
    if not case.private or case.is_case or case.state not in ("suspected", "could_not_check"):
        what = case.state if case.private else "of a model that is not private"
        raise ValueError(f"case {case.id} is {what}: it waits for no private inspection")
    if result.verdict == "confirmed":
        return confirmed(case, at_ms=at_ms, result=result, note=result.reason)
    state: State = "dismissed" if result.verdict == "not_confirmed" else "could_not_check"
    return move(case, state, at_ms=at_ms, result=result, note=result.reason)


def private_id(case: Case) -> str:
    """What a round or an inspection for this record is called."""
    return f"case-{case.id:04}-{case.model_digest[:16]}"


def explain(case: Case) -> str:
    """What happened and what is waited for, in plain words for the model's owner."""
    return " ".join(filter(None, (_seen(case), _inspected(case), _done(case), _waited_for(case))))


def _seen(case: Case) -> str:
    label = f"{case.label}" + (f" ({case.label_name})" if case.label_name not in ("", str(case.label)) else "")
    what = "its inputs" if case.label == -1 else f"the inputs that it calls {label}"
    named = ", ".join(case.devices[:_MAX_NAMED]) + (", ..." if len(case.devices) > _MAX_NAMED else "")
    return (
        f"Model {case.model} flags {case.flagged} of {case.inputs} of {what}, more than clean inputs explain, "
        f"on {_devices(len(case.devices))} ({named})."
    )


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


def _inspected(case: Case) -> str:
    found = f" ({case.result.reason})" if case.result and case.result.reason else ""
    who = "three parties" if case.result and "private" in case.result.summary else "the hub's own copy"
    if case.is_case:
        shared = f"The hub's own copy of the model flags {case.shared} inputs that owners shared: that confirmed it."
        return shared if case.shared else f"The inspection of {who} confirmed a backdoor{found}."
    match case.state:
        case "suspected":
            return "Devices' reports alone prove nothing: no inspection has begun."
        case "inspecting":
            return "The hub's own copy of the model is being inspected."
        case "dismissed":
            return f"The inspection of {who} found no backdoor for this label{found}."
        case "could_not_check":
            return f"It could not be checked: {case.note}. That is neither a confirmation nor an all-clear."
    return f"It was not inspected: {case.note}."


def _done(case: Case) -> str:
    if not case.is_case:
        return ""
    release = case.release
    where = f" (release {release.sequence})" if release else ""
    if release and case.state in ("rolling_out", "closed"):
        held = f"; not well or not yet: {', '.join(release.held[:_MAX_NAMED])}" if release.held else ""
        last = max(release.groups - 1, release.group)
        stage = "the canaries" if release.group == 0 else f"group {release.group} of {last} after the canaries"
        at = f", at {stage}" if case.state == "rolling_out" else ""
        stands = f" It is paused: {release.paused}." if release.paused else ""
        return f"The repaired model{where} runs on {_devices(len(release.updated))}{at}{held}.{stands}"
    if release and case.state == "aborted":
        return (
            f"Its roll-out was ended: {case.note}. The repaired model{where} runs on {_devices(len(release.updated))}, "
            "the others keep the one with the backdoor."
        )
    if release and case.state in ("rolling_back", "rolled_back"):
        again = f" (release {case.back.sequence})" if case.back else ""
        comes = "is back" if case.state == "rolled_back" else "is coming back"
        left = f"; not on {', '.join(case.back.held[:_MAX_NAMED])}" if case.back and case.back.held else ""
        return (
            f"The repaired model{where} was taken back: {case.note}. The model before, with the backdoor, {comes}"
            f"{again}{left}."
        )
    if case.private and case.state == "refused":
        return f"It was ended: {case.note}."
    done: dict[State, str] = {
        "confirmed": "Nothing was changed so far.",
        "repairing": "The model is being repaired.",
        "repaired": "A repaired model passed the gate." if not case.private else "Its owner signed another model.",
        "released": f"The repaired model is signed{where} and offered to no device yet.",
        "could_not_check": f"The repair could not be finished: {case.note}. Devices keep the model that they have.",
    }
    return done.get(case.state, f"It ended without a repaired model in the fleet: {case.note}.")


_WAITS: dict[State, str] = {
    "suspected": "the inspection",
    "inspecting": "the inspection's result",
    "confirmed": "the repair",
    "repairing": "the repair's result",
    "repaired": "the release",
    "released": "the time to object to pass",
    "rolling_out": "the remaining devices",
    "rolling_back": "the devices that run the repaired model",
}


def _waited_for(case: Case) -> str:
    if case.private and not case.is_case and case.state in ("suspected", "could_not_check"):
        return _how_to_inspect(case)
    if case.private and case.state == "confirmed":
        return _how_to_repair(case)
    if case.awaiting:
        name = {"inspect": "inspection", "repair": "repair", "stage": "roll-out"}[case.awaiting]
        return f"Waiting for a person to approve the {name}."
    if case.state not in OPEN:
        return "Nothing more is waited for."
    if case.state == "rolling_out" and case.release and case.release.paused:
        return "Waiting for a person to resume, roll back or end the roll-out."
    return f"Waiting for {_WAITS[case.state]}" + (f": {case.note}." if case.note and not case.result else ".")


def _how_to_inspect(case: Case) -> str:
    return (
        "The model is private. Waiting for a private inspection: its owner writes the plan, `edgeguard private inspect "
        f"plan plan.json --id {private_id(case)} --for {case.model_digest} --parties parties.json --model FILE.keras`; "
        "owners give and the three parties run it; two of them or all three sign what they found, `edgeguard private "
        "inspect sign FOLDER --plan plan.json -o NAME.json`; and `edgeguard hub private "
        f"{case.id} --plan plan.json --result NAME.json --result NAME.json` brings it here. To ask the fleet which "
        f"channels it finds least active: `edgeguard hub case {case.id} --round round.json`, then `edgeguard private "
        "submit` on devices and `edgeguard private party` at the parties. Details: docs/private.md."
    )


def _how_to_repair(case: Case) -> str:
    return (
        "Waiting for the model's owner: repair it with `edgeguard private repair run` or `edgeguard private repair "
        "clear`, or, where it was inspected in features, which neither heals, with `edgeguard repair`; convert and "
        "check it, and sign it, `edgeguard release add FOLDER NEW.tflite --replaces "
        f"{case.model_digest} --offline KEYS`. The hub then rolls out what replaces it; `edgeguard hub reject "
        f"{case.id} repair` ends the case without."
    )
