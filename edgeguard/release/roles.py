"""What a release repository says, as values: its signed metadata, read from disk, verified, and compared.

Five roles. ``root`` and ``targets`` are signed offline; ``targets`` delegates every name under ``repaired/``, and
nothing else, to the role ``repaired``, which the hub signs, as it does ``snapshot`` and ``timestamp``. A role may have
several keys, and a threshold of them that must sign. Rules enforced here:

* nothing is read that the roles above it did not sign: root by root from the first one, and down from the newest;
* a draft, the next version of a role that lacks signatures, counts only when one of the role's own keys signed it:
  whoever can write to the folder cannot put words into an offline signer's mouth;
* the next sequence number is beyond all that a device may have been led to. Repairs with numbers that no device would
  have taken (see ``MAX_AHEAD``) are passed over; a release signed offline, which devices take, counts always;
* no two releases have one number: a draft that was made without knowledge of what was published since is held back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from securesystemslib.signer import Key
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import DelegatedRole, Delegations, Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from edgeguard.errors import ConfigError, TrustError
from edgeguard.release.client import CUSTOM, MAX_AHEAD, REPAIRED, TargetInfo

ROOT, TARGETS, SNAPSHOT, TIMESTAMP = Root.type, Targets.type, Snapshot.type, Timestamp.type
REPAIRS = "repaired"
"""The delegated role."""
OFFLINE = (ROOT, TARGETS)
ONLINE = (TIMESTAMP, SNAPSHOT, REPAIRS)
DRAFTED = (ROOT, TARGETS, REPAIRS)
"""The roles whose next version may have to wait for signatures."""

S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One signed model: its path among the targets, and what the metadata says of it.

    ``file_digest`` is the SHA-256 of the file; ``replaces`` the model digest that it is made to replace, None
    for a first release; ``published`` False while a signature that the keys' holders demand is missing.
    """

    target: str
    sequence: int
    model_digest: str
    guard_digest: str
    file_digest: str
    replaces: str | None
    boards: tuple[str, ...] = ()
    runtimes: tuple[str, ...] = ()
    published: bool = True


@dataclass(frozen=True, kw_only=True)
class Roles:
    """The metadata that belongs together; ``repaired`` is None in a repository made before there was such a role."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    repaired: Metadata[Targets] | None
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]

    def of(self, role: str) -> Metadata[Any] | None:
        """The metadata of the role of this name."""
        found: Metadata[Any] | None = getattr(self, role)
        return found

    def delegator(self, role: str) -> Metadata[Any]:
        """The metadata that says which keys sign for this role."""
        return self.targets if role == REPAIRS else self.root


def load(folder: Path) -> Roles:
    """Read and verify the metadata that the timestamp in ``folder`` names.

    Raises:
        ConfigError: there is no repository.
        TrustError: it is damaged or not signed by its own root.
    """
    path = folder / "1.root.json"
    if not path.exists():
        raise ConfigError(f"repository {folder.parent}", got="none there", do="create it first: edgeguard release init")
    repaired = None
    try:
        root = _read(path, Root)
        _check(root, ROOT, root)
        while (path := folder / f"{root.signed.version + 1}.root.json").exists():
            root = _successor(root, _read(path, Root))
        path = folder / "timestamp.json"
        timestamp = _check(root, TIMESTAMP, _read(path, Timestamp))
        meta = timestamp.signed.snapshot_meta
        path = folder / f"{meta.version}.snapshot.json"
        snapshot = _check(root, SNAPSHOT, _read(path, Snapshot, meta))
        meta = snapshot.signed.meta["targets.json"]
        path = folder / f"{meta.version}.targets.json"
        targets = _check(root, TARGETS, _read(path, Targets, meta))
        targets_releases(targets)
        if keyids(targets, REPAIRS):
            meta = snapshot.signed.meta[f"{REPAIRS}.json"]
            path = folder / f"{meta.version}.{REPAIRS}.json"
            repaired = _check(targets, REPAIRS, _read(path, Targets, meta))
            targets_releases(repaired)
    except (RepositoryError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise TrustError(
            f"repository file {path}",
            got=f"{type(error).__name__} {error}",
            expected="what this repository's keys signed",
            do="restore the folder from a backup",
        ) from error
    return Roles(root=root, targets=targets, repaired=repaired, snapshot=snapshot, timestamp=timestamp)


def load_drafts(folder: Path, roles: Roles) -> dict[str, Metadata[Any]]:
    """The drafts in ``folder`` that follow on ``roles`` and that a key of their role signed. Others are left out."""
    found: dict[str, Metadata[Any]] = {}
    for role in DRAFTED:
        try:
            draft: Metadata[Any] = _read(folder / f"{role}.json", Root if role == ROOT else Targets)
            if role != ROOT:
                targets_releases(draft)
        except (OSError, RepositoryError, ValueError, KeyError, TypeError, RecursionError):
            continue
        current = roles.of(role)
        follows = draft.signed.version == (current.signed.version if current else 0) + 1
        above = TARGETS if role == REPAIRS else ROOT
        delegators = [roles.delegator(role), *([found[above]] if above in found and role != ROOT else [])]
        if follows and any(signatures(one, role, draft) for one in delegators):
            found[role] = draft
    return found


def _read(path: Path, kind: type[S], meta: MetaFile | None = None) -> Metadata[S]:
    """One metadata file, not yet checked but for length and hash, where ``meta`` gives them, and kind."""
    content = path.read_bytes()
    if meta is not None:
        meta.verify_length_and_hashes(content)
    metadata = Metadata[S].from_bytes(content)
    if not isinstance(metadata.signed, kind):
        raise RepositoryError(f"of type {metadata.signed.type}")
    return metadata


def _check(delegator: Metadata[Any], role: str, metadata: Metadata[S]) -> Metadata[S]:
    delegator.signed.verify_delegate(role, metadata.signed_bytes, metadata.signatures)
    return metadata


def _successor(root: Metadata[Root], newer: Metadata[Root]) -> Metadata[Root]:
    _check(root, ROOT, newer)
    _check(newer, ROOT, newer)
    if newer.signed.version != root.signed.version + 1:
        raise RepositoryError(f"of version {newer.signed.version}")
    return newer


def keyids(delegator: Metadata[Any], role: str) -> tuple[str, ...]:
    """The keys that may sign for a role; none where there is no such role."""
    try:
        return tuple(delegator.signed.get_delegated_role(role).keyids)
    except ValueError:
        return ()


def signatures(delegator: Metadata[Any], role: str, metadata: Metadata[Any]) -> int:
    """How many keys of the role signed this metadata."""
    if not keyids(delegator, role):
        return 0
    found = delegator.signed.get_verification_result(role, metadata.signed_bytes, metadata.signatures)
    return len(found.signed)


def threshold(delegator: Metadata[Any], role: str) -> int:
    """How many must."""
    return int(delegator.signed.get_delegated_role(role).threshold)


def verifies(delegator: Metadata[Any], role: str, metadata: Metadata[Any]) -> bool:
    """Whether enough of them did."""
    return bool(keyids(delegator, role)) and signatures(delegator, role, metadata) >= threshold(delegator, role)


def delegate(targets: Targets, hub: Key, countersigners: Sequence[Key]) -> None:
    """Let the hub's key, and where there are countersigners one of them as well, sign all names under ``repaired/``.

    The hub has one key only: with two it could meet the threshold alone. Raises ConfigError where a key comes twice.
    """
    keys = [hub, *countersigners]
    for keyid, count in Counter(key.keyid for key in keys).items():
        if count > 1:
            what = "the hub's and a countersigner's" if keyid == hub.keyid else f"{count} times a countersigner's"
            raise ConfigError(f"key {keyid[:8]}", got=what, expected="a key for each")
    role = DelegatedRole(
        REPAIRS, [key.keyid for key in keys], 2 if countersigners else 1, terminating=True, paths=[f"{REPAIRED}*"]
    )
    targets.delegations = Delegations({key.keyid: key for key in keys}, {REPAIRS: role})


def targets_releases(metadata: Metadata[Targets], *, published: bool = True) -> tuple[Release, ...]:
    """The releases that one role lists, oldest first."""
    releases = []
    for target in metadata.signed.targets.values():
        info = msgspec.convert(target.custom[CUSTOM], TargetInfo)
        releases.append(
            Release(
                target=target.path,
                sequence=info.sequence,
                model_digest=info.model_digest,
                guard_digest=info.guard_digest,
                file_digest=target.hashes["sha256"],
                replaces=info.replaces,
                boards=info.boards,
                runtimes=info.runtimes,
                published=published,
            )
        )
    return tuple(sorted(releases, key=lambda release: release.sequence))


def releases(roles: Roles) -> tuple[Release, ...]:
    """All releases, oldest first."""
    listed = [*targets_releases(roles.targets), *(targets_releases(roles.repaired) if roles.repaired else ())]
    return tuple(sorted(listed, key=lambda release: release.sequence))


def withdrawn(targets: Metadata[Targets]) -> frozenset[str]:
    """The names under ``repaired/`` that the offline keys took back."""
    return frozenset(map(str, _own(targets).get("withdrawn", ())))


def withdraw(targets: Metadata[Targets], taken: Iterable[Release], *, floor: int) -> None:
    """Take releases back for good; no later one gets a number up to ``floor`` again."""
    names = sorted(withdrawn(targets) | {release.target for release in taken})
    targets.signed.unrecognized_fields[CUSTOM] = {"withdrawn": names, "floor": floor}


def last_sequence(roles: Roles, drafts: Mapping[str, Metadata[Any]] | None = None) -> int:
    """The largest sequence that a device may run, or that a draft has taken already."""
    waiting = drafts or {}
    listed = {
        role: {
            one.sequence
            for metadata in (roles.of(role), waiting.get(role))
            if metadata
            for one in targets_releases(metadata)
        }
        for role in (TARGETS, REPAIRS)
    }
    last = max((int(_own(roles.targets).get("floor", 0)), *listed[TARGETS]))
    # Which role lists a release counts, not its name: a thief of the hub's keys chooses that.
    for sequence in sorted(listed[REPAIRS]):
        if sequence <= last + MAX_AHEAD:
            last = max(last, sequence)
    return last


def clashing(roles: Roles, drafts: Mapping[str, Metadata[Any]]) -> tuple[Release, ...]:
    """The releases that these drafts add under a number which another release has.

    No withdrawn one can have it: a withdrawal makes a new version of both roles, which no older draft follows on.
    """
    published = releases(roles)
    added = [
        release
        for role in (TARGETS, REPAIRS)
        if role in drafts
        for release in targets_releases(drafts[role])
        if release not in published
    ]
    count = Counter(release.sequence for release in (*published, *added))
    return tuple(release for release in added if count[release.sequence] > 1)


def _own(targets: Metadata[Targets]) -> dict[str, Any]:
    return dict(targets.signed.unrecognized_fields.get(CUSTOM) or {})


def changes(roles: Roles, role: str, draft: Metadata[Any]) -> tuple[str, ...]:
    """What a draft would change, a line each, for the person who is asked to sign it."""
    current = roles.of(role)
    lines = [f"valid until {draft.signed.expires:%Y-%m-%d}"]
    if role == ROOT:
        for name in (ROOT, TARGETS, SNAPSHOT, TIMESTAMP):
            lines += _keys_changed(name, roles.root, draft)
        return tuple(lines)
    before = set(targets_releases(current)) if current else set()
    after = set(targets_releases(draft))
    for sign, some in (("adds", after - before), ("takes out", before - after)):
        for release in sorted(some, key=lambda one: one.sequence):
            lines.append(
                f"{sign} {release.target}: model {release.model_digest}, guard {release.guard_digest}, "
                f"file {release.file_digest}, replaces {release.replaces or 'no model'}"
            )
    if role == TARGETS:
        lines += _keys_changed(REPAIRS, roles.targets, draft)
        lines += sorted(_delegations(draft) - _delegations(roles.targets))
        lines += [f"withdraws {name}" for name in sorted(withdrawn(draft) - withdrawn(roles.targets))]
    return tuple(lines)


def _delegations(targets: Metadata[Targets]) -> set[str]:
    there = targets.signed.delegations
    return {f"lets {name} sign {role.paths}" for name, role in ((there and there.roles) or {}).items()}


def _keys_changed(role: str, before: Metadata[Any], after: Metadata[Any]) -> list[str]:
    old, new = set(keyids(before, role)), set(keyids(after, role))
    lines = [f"{role}: trusts key {keyid[:8]}" for keyid in sorted(new - old)]
    lines += [f"{role}: trusts key {keyid[:8]} no more" for keyid in sorted(old - new)]
    if new and (not old or threshold(before, role) != threshold(after, role)):
        lines.append(f"{role}: {threshold(after, role)} of {len(new)} keys must sign")
    return lines
