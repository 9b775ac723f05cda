"""What the API takes and gives, as pydantic models: its OpenAPI document is made of these. No logic.

Times are milliseconds since 1970 and their names end in ``_ms``. What is not known is null, never zero.
"""

from __future__ import annotations

from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import Base64Bytes, BaseModel, ConfigDict, Field, StringConstraints

from edgeguard.hub import cases
from edgeguard.hub.access import Role
from edgeguard.hub.cases import State, Step
from edgeguard.hub.rollout import Standing

MAX_INTEGER = 2**53
"""Larger numbers are not exact in every reader of JSON."""

_ID = "[a-z0-9][a-z0-9._-]{0,62}"
Id = Annotated[int, Field(ge=1, le=MAX_INTEGER)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
DeviceName = Annotated[str, StringConstraints(pattern=rf"^{_ID}(~{_ID})?$")]
TokenName = Annotated[str, StringConstraints(pattern=rf"^{_ID}$")]
CommandId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{16,64}$")]
Sentence = Annotated[str, StringConstraints(max_length=500, pattern=r"^[^\x00-\x1f\x7f]*$")]
DeviceState = Literal["online", "offline", "stopped", "unknown"]

_DIGEST = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
_GUARD = "60303ae22b998861bce3b28f33eec1be758a213c86c93c076dbe9f558c11c752"
_AT = 1_767_225_600_000
T = TypeVar("T")


class View(BaseModel):
    """Base of all."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def _example(**values: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [values]})


class Problem(View):
    """Why a request was not answered: what is wrong, what was found, what would be right, and what to do."""

    model_config = _example(what="limit", got="5000", expected="Input should be less than or equal to 500", do="")

    what: str
    got: str | None = None
    expected: str | None = None
    do: str | None = None


class Page(View, Generic[T]):
    """A part of a list. ``next`` is the ``cursor`` of the part after it, null at the end."""

    items: list[T]
    next: str | None = None


class Device(View):
    """A device: what it last said of itself, what it runs, and what became of the last release offered to it."""

    model_config = _example(
        device="camera-1", state="online", last_seen_ms=_AT, model_digest=_DIGEST, guard_digest=_GUARD, sequence=3,
        outcome="updated", outcome_sequence=3, reason="", birth={"board": "Raspberry Pi 5"}, health={"p50_us": 81.5},
    )  # fmt: skip

    device: str
    state: DeviceState
    last_seen_ms: int | None
    model_digest: str | None
    guard_digest: str | None
    sequence: int = Field(description="number of the release that it runs, 0 for a file that was never released")
    outcome: Literal["updated", "refused", "failed"] | None
    outcome_sequence: int | None
    reason: str
    birth: dict[str, Any] | None = Field(description="its last birth message; null in lists")
    health: dict[str, Any] | None = Field(description="its last health message; null in lists")


class Model(View):
    """A model that this hub watches: one of its configuration, or a repaired one that it released."""

    model_config = _example(
        name="signs", model_digest=_DIGEST, guard_digest=_GUARD, classes=["stop", "yield"], fpr=0.01, devices=12,
    )  # fmt: skip

    name: str
    model_digest: str
    guard_digest: str
    classes: list[str]
    fpr: float = Field(description="the false-positive rate that its calibration promises")
    devices: int = Field(description="how many devices run it")


class Report(View):
    """One window of one device, as it was counted."""

    model_config = _example(
        device="camera-1", boot="00000000000000ab", seq=7, model_digest=_DIGEST, guard_digest=_GUARD, inputs=64,
        unchecked=0, flagged=1, stored_ms=_AT,
    )  # fmt: skip

    device: str
    boot: str
    seq: int
    model_digest: str
    guard_digest: str
    inputs: int
    unchecked: int
    flagged: int
    stored_ms: int = Field(description="by the hub's clock")


class Audit(View):
    """One entry of an audit trail."""

    at_ms: int
    who: str
    was: str | None
    became: str
    why: str


class Channel(View):
    """A channel that flagged inputs move."""

    tensor: str
    source_layer: str
    kind: str
    channel: int
    index: int = Field(description="position in edgeguard_features")
    shift_in_std: float


class Release(View):
    """The signed release of a repaired model, and how far its roll-out is."""

    target: str
    sequence: int
    model_digest: str
    guard_digest: str
    replaces: str
    at_ms: int
    canaries: list[str]
    everyone: bool
    updated: list[str]
    held: list[str] = Field(description="some of those that do not run it, or fare worse since, and why")
    group: int = Field(description="0: the canaries; then the groups of the configuration")
    groups: int = Field(description="how many there are, with the canaries; 0 before the roll-out")
    group_ms: int | None
    counts: dict[str, int] = Field(description="the devices that it was offered to, by what became of it")
    paused: str = Field(description="why the roll-out stands still; empty while it does not")


class Case(View):
    """A suspicion about one label of one model, or a case: ``is_case`` once an inspection confirmed it."""

    model_config = _example(
        id=1, is_case=True, state="confirmed", model="signs", model_digest=_DIGEST, label=0, label_name="stop",
        created_ms=_AT, updated_ms=_AT + 90_000, devices=["camera-1", "camera-2"], flagged=140, inputs=1600,
        p_value=1e-90, awaiting="repair", private=False, approved=[], note="",
    )  # fmt: skip

    id: int
    is_case: bool
    state: State
    model: str
    model_digest: str
    label: int
    label_name: str
    created_ms: int
    updated_ms: int
    devices: list[str]
    flagged: int
    inputs: int
    p_value: float
    awaiting: Step | None = Field(description="the step that waits for a person")
    private: bool = Field(description="its model is: an inspection that is awaited is that of three parties")
    approved: list[Step]
    note: str


class CaseDetail(Case):
    """The same with what the evidence points at, what was done, why, and by whom."""

    model_config = ConfigDict(json_schema_extra={})

    explanation: str = Field(description="what happened, for the model's owner")
    channels: list[Channel]
    release: Release | None
    back: Release | None = Field(description="the release that brings the model before back")
    summary: dict[str, Any] | None = Field(description="what inspection and repair measured; null before")
    audit: list[Audit]


class Dormant(View):
    """Channels of one layer that the fleet finds least active on clean inputs, the least active first."""

    layer: str
    channels: list[int]


class Evidence(View):
    """What devices sent of a case's label, pooled: those behind it, or all where none of them has the present guard.

    Means are in the order of the guard's features.
    """

    model_config = _example(
        model_digest=_DIGEST, label=14, flagged_mean=[3.1, 0.2], unflagged_mean=[0.4, 0.3],
        dormant=[{"layer": "conv_2", "channels": [7, 3]}],
    )  # fmt: skip

    model_digest: Digest
    label: int
    flagged_mean: list[float]
    unflagged_mean: list[float] = Field(description="empty where no device sent any")
    dormant: list[Dormant] = Field(description="empty where the fleet was not asked")


class Decision(View):
    """A person's word on a step of a case. Whose word it is, the token says."""

    model_config = _example(step="repair", approve=True, why="seen on two cameras of gate 3")

    step: Step
    approve: bool
    why: Sentence = ""


class Round(View):
    """A question to the fleet that three parties answer together; see docs/private.md."""

    model_config = _example(
        v=1, id="case-0003-9f86d081884c7d65", fleet="gate", parties=_GUARD, model_digest=_DIGEST, layer="conv_2",
        channels=64, kind="ranks", prune=13, min_devices=10,
    )  # fmt: skip

    v: int
    id: str
    fleet: str
    parties: Digest = Field(description="of the three parties' descriptions")
    model_digest: Digest
    layer: str
    channels: int = Field(description="of that layer")
    kind: Literal["votes", "ranks"]
    prune: int = Field(description="so many channels are opened at the end, and nothing else")
    min_devices: int = Field(description="fewer valid submissions open nothing")


class Brought(View):
    """What three parties found of a private model, as somebody brings it. Who that is, the token says."""

    plan: dict[str, Any] = Field(description="the inspection, as `edgeguard private inspect plan` wrote it")
    results: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=3)] = Field(
        description="what parties found, as `edgeguard private inspect sign` wrote it, each once"
    )
    why: Sentence = ""


class Steering(View):
    """A person's word on the roll-out of a case. Whose word it is, the token says."""

    model_config = _example(action="pause", why="the cameras of gate 3 are slow since")

    action: cases.Steering
    why: Sentence = ""


class Member(View):
    """A device that a release was offered to, and what became of it."""

    model_config = _example(
        device="camera-1", group=0, state="failed", reason="flags 9.1% of 900 inputs, before 0.8% of 4100",
        offered_ms=_AT, updated_ms=_AT + 40_000,
    )  # fmt: skip

    device: str
    group: int
    state: Standing
    reason: str
    offered_ms: int
    updated_ms: int | None = Field(description="when it was first seen to run the release")


class Verdict(View):
    """A person's word on a command that the hub proposed."""

    model_config = _example(approve=True, why="the camera was moved")

    approve: bool
    why: Sentence = ""


class SharedInputs(View):
    """Inputs that somebody looked at and found *not* to be of the suspected class; ``why`` says who and where."""

    model_config = _example(dtype="uint8", shape=[2, 2, 1], inputs=["AAECAw=="], why="stickers on yield signs, gate 3")

    dtype: Literal["uint8", "int8", "int16", "float32"]
    shape: Annotated[list[Annotated[int, Field(ge=1, le=65536)]], Field(min_length=1, max_length=8)]
    inputs: Annotated[list[Base64Bytes], Field(min_length=1, max_length=64)] = Field(
        description="each the bytes of an array of this shape, the last axis fastest, little-endian, in base64"
    )
    why: Sentence = ""


class SharedInput(View):
    """What the hub's own copy of the model says of one of them. ``counts``: it speaks for the suspicion."""

    digest: str
    predicted: int | None
    flagged: bool
    score: float | None
    counts: bool


class Replayed(View):
    """The inputs in their order, how many of all that were shared count, and how many make a case of a suspicion."""

    items: list[SharedInput]
    counting: int
    enough: int
    state: State


class Event(View):
    """One entry of the timeline. ``id`` grows with time."""

    model_config = _example(
        id=12, at_ms=_AT, kind="suspected", subject="case 1", text="model signs, label 0 (stop)", detail={"case": 1},
    )  # fmt: skip

    id: int
    at_ms: int
    kind: str
    subject: str
    text: str
    detail: dict[str, Any]


class DeadLetter(View):
    """A message that could not be accepted."""

    model_config = _example(
        number=3, at_ms=_AT, topic="edgeguard/v1/demo/camera-1/report", reason="Report message; got version 2",
        head="eyJ2IjoyLCAuLi4=",
    )  # fmt: skip

    number: int
    at_ms: int
    topic: str
    reason: str
    head: str = Field(description="the beginning of the message, in base64")


class Command(View):
    """What to ask of a device."""

    model_config = _example(name="recalibrate", source="sidecar")

    name: Literal["ping", "restart", "recalibrate"]
    source: Literal["sidecar", "owner"] | None = Field(
        default=None, description="of the clean inputs, for recalibrate alone: the model's sidecar unless given"
    )


class CommandState(View):
    """A command, and what became of it. One that is proposed waits for a person."""

    model_config = _example(
        id="019b6e0f2c00a1b2c3d4", device="camera-1", name="ping", state="ok", issued_ms=_AT, replied_ms=_AT + 40,
        reason="", reply={"id": "019b6e0f2c00a1b2c3d4", "state": "ok", "result": {"uptime_s": 61.5}},
    )  # fmt: skip

    id: str
    device: str
    name: str
    state: Literal["proposed", "waiting", "working", "ok", "refused", "failed", "expired"]
    issued_ms: int
    replied_ms: int | None
    reason: str
    reply: dict[str, Any] | None


class Token(View):
    """A token without its secret. ``used_ms`` is kept to the hour."""

    model_config = _example(name="grafana", role="viewer", created_ms=_AT, expires_ms=_AT + 7_776_000_000, used_ms=_AT)

    name: str
    role: Role
    created_ms: int
    expires_ms: int | None
    used_ms: int | None


class NewToken(View):
    """A token to make. Without ``lifetime_s`` it never expires."""

    model_config = _example(name="grafana", role="viewer", lifetime_s=7_776_000)

    name: TokenName
    role: Role
    lifetime_s: Annotated[int, Field(ge=60, le=10 * 366 * 86400)] | None = None


class MadeToken(Token):
    """A token that was just made. ``secret`` is shown this once."""

    model_config = _example(
        name="grafana", role="viewer", created_ms=_AT, expires_ms=_AT + 7_776_000_000, used_ms=_AT,
        secret="egt_..."
    )  # fmt: skip

    secret: str
