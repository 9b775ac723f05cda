"""What a repository is, as it is shown to a person: roles and their keys, drafts, and what somebody must do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Any

import msgspec
from tuf.api.metadata import Metadata

from edgeguard.release import roles as known
from edgeguard.release.roles import OFFLINE, ONLINE, Release, Roles
from edgeguard.release.signing import Signing, delegators, keyids


class RoleStatus(msgspec.Struct, frozen=True, kw_only=True):
    """A role as it is published. ``keys`` are ids, ``at_hand`` how many of them this repository was opened with."""

    role: str
    version: int
    expires: datetime
    threshold: int
    keys: tuple[str, ...]
    at_hand: int


class Draft(msgspec.Struct, frozen=True, kw_only=True):
    """The next version of a role, which lacks signatures or has not been published yet; ``changes`` a line each.

    ``digest`` is the SHA-256 of what is signed.
    """

    role: str
    version: int
    digest: str
    signatures: int
    threshold: int
    changes: tuple[str, ...]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """What a repository is. ``sequence`` is the number of the newest release, ``warnings`` what somebody must do."""

    releases: int
    sequence: int
    roles: tuple[RoleStatus, ...]
    drafts: tuple[Draft, ...]
    warnings: tuple[str, ...]


def status_of(roles: Roles, drafts: Mapping[str, Metadata[Any]], signing: Signing) -> Status:
    """What is published, what waits, and what somebody must do."""
    shown = []
    for role in (*OFFLINE, *reversed(ONLINE)):
        metadata = roles.of(role)
        if metadata is not None:
            ids = keyids(roles, role)
            shown.append(
                RoleStatus(
                    role=role,
                    version=metadata.signed.version,
                    expires=metadata.signed.expires,
                    threshold=known.threshold(roles.delegator(role), role),
                    keys=ids,
                    at_hand=len(set(signing.keys) & set(ids)),
                )
            )
    waiting = tuple(
        Draft(
            role=role,
            version=draft.signed.version,
            digest=sha256(draft.signed_bytes).hexdigest(),
            signatures=max(known.signatures(one, role, draft) for one in delegators(roles, drafts, role)),
            threshold=max(
                known.threshold(one, role) for one in delegators(roles, drafts, role) if known.keyids(one, role)
            ),
            changes=known.changes(roles, role, draft),
        )
        for role, draft in drafts.items()
    )
    listed = known.releases(roles)
    return Status(
        releases=len(listed),
        sequence=known.last_sequence(roles),
        roles=tuple(shown),
        drafts=waiting,
        warnings=(
            *_warnings(roles, signing),
            *(_waits(one, known.clashing(roles, {one.role: drafts[one.role]})) for one in waiting),
        ),
    )


def _warnings(roles: Roles, signing: Signing) -> list[str]:
    warnings = []
    if roles.repaired is None:
        warnings.append("made by an earlier version; the hub's key for repairs is missing: run release repair-key")
    for role in (*OFFLINE, *ONLINE):
        metadata = roles.of(role)
        if metadata is None:
            continue
        left, ends = metadata.signed.expires - signing.now(), metadata.signed.expires.date()
        if left <= timedelta():
            warnings.append(f"{role} has expired on {ends}: devices take no release")
        elif signing.left(role, metadata) < 0.25:
            warnings.append(f"{role} expires on {ends}: run release renew")
    return warnings


def _waits(draft: Draft, clashing: Sequence[Release]) -> str:
    if clashing:
        (first, *_) = clashing
        return (
            f"a draft of {draft.role} is not published: its {first.target} has the number of another release by now; "
            "discard it and add it anew: edgeguard release sign --discard"
        )
    what = "signatures" if draft.signatures < draft.threshold else "the hub to publish it: edgeguard release renew"
    return f"a draft of {draft.role} waits for {what}"
