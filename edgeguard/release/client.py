"""A device's side of a release: what a signed target must say before it may run, and how a fetch is started.

The agent imports this module, so it imports no TUF. Signatures, expiry and rollback of the metadata are
checked by TUF in a short-lived child, ``edgeguard.release.fetch``. Here stand the rules that TUF cannot know:

* a hint names a target and a sequence, and has no authority: the signed metadata must say the same sequence;
* the sequence must be greater than that of the model that runs, so that an old release cannot come back;
* ``replaces`` must be the model that runs; it is empty only in a first release, for a device that runs none;
* a release under ``repaired/``, which the hub signs, replaces a model, always, and is at most 10,000 ahead of the one
  that runs: what a thief of the hub's keys has used up is never out of reach of a release signed offline;
* board and runtime are among those that the release is made for, where it names some;
* it is not older than the newest release that ever proved itself here, even where an older one runs again;
* a file that was on trial here and failed is not taken again;
* nothing is fetched while the clock is below the time that this device once knew it was: signed metadata could not
  expire;
* a target's name has no empty, ``.`` or ``..`` part, whoever signed it;
* a target is refused for its signed length, before a byte of it is fetched.

The child writes one ``FetchResult`` to its standard output: ``refused`` when a check of trust failed,
``failed`` when network, disk or time did not let it finish. After either it may be tried again.

Example:
    >>> process = spawn_fetch(request)  # doctest: +SKIP
    >>> while (result := read_outcome(process)) is None: ...  # doctest: +SKIP
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract.messages import Count, Digest, Seq, Text
from edgeguard.errors import ConfigError, TrustError

CUSTOM = "edgeguard"
"""The key in a target's custom metadata that holds a ``TargetInfo``."""
REPAIRED = "repaired/"
"""Where a target's name begins with this, the hub's online key may have signed it; it can sign no other name."""
MAX_AHEAD = 10_000
"""A release that the hub may have signed is at most this far ahead of the one that runs."""
FLOOR = "floor.json"
"""Beside the metadata: seconds since 1970 at which it was last found valid."""
EARLIEST_S = 1_767_225_600.0
"""The first second of 2026: this program is younger."""
_Seconds = Annotated[int, Meta(ge=0, le=253_402_300_799)]
"""To the end of the year 9999: beyond it no date can be named."""
MAX_MODEL_BYTES = 256 * 1024 * 1024
MAX_SIDECAR_BYTES = 16 * 1024 * 1024
MAX_RESULT_BYTES = 64 * 1024
MAX_REASON = 300

Url = Annotated[str, Meta(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$", max_length=512)]


@dataclass(frozen=True, kw_only=True)
class Hint:
    """What the hub says waits. Nothing in it is trusted."""

    target: str
    sequence: int


@dataclass(frozen=True, kw_only=True)
class Running:
    """The model that runs on this device. ``highest``: sequence of the newest release that proved itself here."""

    model_digest: str
    sequence: int
    highest: int = 0


Patterns = Annotated[tuple[Annotated[str, Meta(min_length=1, max_length=100)], ...], Meta(max_length=32)]


class Companion(msgspec.Struct, frozen=True, kw_only=True):
    """A model's sidecar, signed as part of the model's own target: its SHA-256 and its length in bytes."""

    sha256: Digest
    length: Annotated[int, Meta(ge=1, le=MAX_SIDECAR_BYTES)]


class TargetInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the signed metadata says of a target. ``replaces`` is a model digest, None for a first release.

    ``boards`` and ``runtimes`` say where it may run, each as patterns with ``*`` and ``?`` of which one must match, in
    whatever case: the board's name as the birth message gives it, and the runtime's. Empty: anywhere.
    """

    sequence: Seq
    model_digest: Digest
    guard_digest: Digest
    replaces: Digest | None
    boards: Patterns = ()
    runtimes: Patterns = ()
    sidecar: Companion | None = None


class FetchRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fetch, all that the child needs to know.

    Args:
        metadata_url: base address of the signed metadata, http or https.
        targets_url: base address of the targets.
        metadata_dir: this device's memory of the metadata that it saw last; kept between fetches.
        root: file with the trusted root that the operator put on the device.
        target: the hinted target.
        sequence: the hinted sequence.
        running_model_digest: the model that runs, None when there is none.
        running_sequence: its sequence.
        staging_dir: where the fetched file is put; its content is nobody else's.
        max_bytes: the largest model that this device takes.
        timeout: seconds for the whole fetch, after which the child gives up; what came by then is kept.
        highest_sequence: of the newest release that ever proved itself here.
        failed: SHA-256 of files that failed their trial here.
        board: this board's name.
        runtime: name of the runtime.
        bytes_per_s: bound on the download, None: none.
        compress: ask the server to pack what it sends.
    """

    metadata_url: Url
    targets_url: Url
    metadata_dir: str
    root: str
    target: Annotated[str, Meta(min_length=1, max_length=200)]
    sequence: Seq
    running_model_digest: Digest | None
    running_sequence: Count = 0
    staging_dir: str
    max_bytes: Annotated[int, Meta(ge=1, le=MAX_MODEL_BYTES)] = 64 * 1024 * 1024
    timeout: Annotated[float, Meta(gt=0, le=86_400)] = 300.0
    highest_sequence: Count = 0
    failed: tuple[Digest, ...] = ()
    board: str = ""
    runtime: str = ""
    bytes_per_s: Annotated[int, Meta(ge=1)] | None = None
    compress: bool = False

    @property
    def hint(self) -> Hint:
        """The hint that this fetch follows."""
        return Hint(target=self.target, sequence=self.sequence)

    @property
    def running(self) -> Running | None:
        """The model that runs, None when there is none."""
        if self.running_model_digest is None:
            return None
        return Running(
            model_digest=self.running_model_digest, sequence=self.running_sequence, highest=self.highest_sequence
        )


class FetchResult(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of a fetch. The fields from ``path`` on are set when, and only when, it is ``fetched``.

    ``received``: bytes of the model and its sidecar that this attempt added to what earlier ones brought. The last two
    fields are None for a release without a sidecar.
    """

    state: Literal["fetched", "refused", "failed"]
    reason: Text = ""
    received: Count = 0
    path: str | None = None
    file_digest: Digest | None = None
    sequence: Seq | None = None
    model_digest: Digest | None = None
    guard_digest: Digest | None = None
    sidecar_path: str | None = None
    sidecar_digest: Digest | None = None


def sidecar_path(target: str, sha256: str) -> str:
    """Where among the served targets the sidecar of ``target`` lies."""
    folder, slash, name = target.rpartition("/")
    return f"{folder}{slash}{sha256}.{name.removesuffix('.tflite')}.guard.npz"


def check_name(target: str) -> None:
    """Raise TrustError unless every part of a target's name is an ordinary file name."""
    parts = target.split("/")
    if not target.isprintable() or "\\" in target or any(part in ("", ".", "..") for part in parts):
        raise TrustError(f"target {target!r}", expected="a plain name, no way out of its folder")


def check_target(
    custom: object, hint: Hint, running: Running | None, *, board: str = "", runtime: str = ""
) -> TargetInfo:
    """Decide from the signed metadata of a target whether this device may take it.

    Args:
        custom: the target's custom metadata, as signed.
        hint: what the hub said.
        running: the model that runs, None when there is none.
        board: this board's name; fits no release that names boards when it is empty.
        runtime: the runtime's name; likewise.

    Returns:
        What was signed of the target.

    Raises:
        TrustError: the metadata does not describe a release, or one that is not this hint's, not newer than
            the running model, or a repair too far ahead of it, not made to replace it, or not for this
            board or runtime.
    """
    what = f"target {hint.target}"
    try:
        info = msgspec.convert(custom, dict[str, object]).get(CUSTOM)
        signed = msgspec.convert(info, TargetInfo)
    except msgspec.ValidationError as error:
        raise TrustError(what, got=str(error)[:200], expected="the signed description of a release") from error
    if signed.sequence != hint.sequence:
        raise TrustError(what, got=f"sequence {hint.sequence} in the hint", expected=f"{signed.sequence} as signed")
    if running is not None and signed.sequence <= running.sequence:
        raise TrustError(what, got=f"sequence {signed.sequence}", expected=f"more than {running.sequence}, which runs")
    if running is not None and signed.sequence < running.highest:
        raise TrustError(what, got=f"sequence {signed.sequence}", expected=f"{running.highest}, which ran, or newer")
    furthest = (running.sequence if running else 0) + MAX_AHEAD
    if hint.target.startswith(REPAIRED) and signed.sequence > furthest:
        raise TrustError(what, got=f"sequence {signed.sequence}", expected=f"at most {furthest}")
    if hint.target.startswith(REPAIRED) and signed.replaces is None:
        raise TrustError(what, got="a repair that replaces no model", expected="a first release signed offline")
    for name, here, patterns in (("board", board, signed.boards), ("runtime", runtime, signed.runtimes)):
        if patterns and not any(fnmatchcase(here.lower(), pattern.lower()) for pattern in patterns):
            raise TrustError(what, got=f"{name} {here or 'unknown'}", expected=f"one of {', '.join(patterns)}")
    runs = running.model_digest if running else None
    if signed.replaces != runs:
        raise TrustError(
            what,
            got=f"a release that replaces {signed.replaces or 'no model'}",
            expected=runs or "a first release",
        )
    return signed


def time_floor(metadata_dir: Path) -> float:
    """What the clock cannot be below, in seconds since 1970: the time at which signed metadata was last found valid."""
    try:
        return max(EARLIEST_S, float(msgspec.json.decode((metadata_dir / FLOOR).read_bytes(), type=_Seconds)))
    except (OSError, msgspec.DecodeError, RecursionError):
        return EARLIEST_S  # never fetched, or damaged: then this is all that is known


def check_clock(now_s: float, floor_s: float) -> None:
    """Raise ConfigError where the clock is below the floor: a board without one starts in 1970 until it is set."""
    if now_s < floor_s:
        told, known = (datetime.fromtimestamp(max(0.0, at), timezone.utc) for at in (now_s, floor_s))
        raise ConfigError(
            "clock of this device",
            got=f"{told:%Y-%m-%d %H:%M} UTC",
            expected=f"{known:%Y-%m-%d %H:%M} UTC or later",
            do="set it, as by NTP: without the time nobody can tell whether signed metadata has expired",
        )


def spawn_fetch(request: FetchRequest, *, clock: Callable[[], float] = time.time) -> subprocess.Popen[bytes]:
    """Start a fetch in a process of its own, so that TUF costs the agent no memory and cannot stop it.

    The child gives up by itself after ``request.timeout``; terminate it to give up sooner. Only one may run
    at a time over the same folders: a second one fails.

    Args:
        request: what to fetch.
        clock: seconds since 1970.

    Raises:
        ConfigError: the clock is below the floor, a setting is out of range, the staging folder cannot be written, or
            no process be started.
    """
    check_clock(clock(), time_floor(Path(request.metadata_dir)))
    path = Path(request.staging_dir) / "request.json"
    content = msgspec.json.encode(request)
    try:
        msgspec.json.decode(content, type=FetchRequest)
    except msgspec.ValidationError as error:
        raise ConfigError("fetch request", got=str(error)[:200], do="check the update settings") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        return subprocess.Popen(
            [sys.executable, "-m", "edgeguard.release.fetch", "--request", str(path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C in a terminal is the agent's to handle
        )
    except OSError as error:
        raise ConfigError(f"fetch of {request.target}", got=str(error), do=f"check {path.parent}") from error


def read_outcome(process: subprocess.Popen[bytes]) -> FetchResult | None:
    """The result of a fetch, or None while it runs. To be asked no more once it gave a result.

    A child that ended without a proper result has failed, whatever its exit code.
    """
    code = process.poll()
    if code is None:
        return None
    with process:
        content = process.stdout.read(MAX_RESULT_BYTES) if process.stdout else b""
    try:
        result = msgspec.json.decode(content, type=FetchResult)
    except (msgspec.DecodeError, RecursionError):
        return FetchResult(state="failed", reason=f"the fetch ended without a result, exit code {code}")
    needed = (result.path, result.file_digest, result.sequence, result.model_digest, result.guard_digest)
    halves = (result.sidecar_path is None) != (result.sidecar_digest is None)
    if result.state == "fetched" and (None in needed or halves):
        return FetchResult(state="failed", reason="the fetch ended with half a result")
    return result
