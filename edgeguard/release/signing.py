"""Signs a repository's metadata with the keys at hand: next versions, and what can be published together.

Nothing here touches a disk. Rules enforced here:

* metadata is signed by all keys at hand that are trusted before or after it, so that clients can follow it whether or
  not they see a new root yet;
* nothing is published that lacks signatures, or holds what ``targets`` withdraws;
* no key signs in two of these places: offline, at the hub, beside it as a countersigner.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from datetime import datetime, timedelta, timezone
from typing import Any

from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, Targets, Timestamp

from edgeguard.errors import ConfigError
from edgeguard.release import roles as known
from edgeguard.release.roles import (
    DRAFTED,
    OFFLINE,
    ONLINE,
    REPAIRS,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    Roles,
    verifies,
)

EXPIRES: Mapping[str, timedelta] = {
    ROOT: timedelta(days=365),
    TARGETS: timedelta(days=365),
    REPAIRS: timedelta(days=90),
    SNAPSHOT: timedelta(days=7),
    TIMESTAMP: timedelta(days=1),
}
"""How long each role's metadata stays valid: the timestamp bounds how long old metadata can be replayed."""
COUNTERSIGN = "countersign"
"""What the file of a countersigner's key is called after, and the name under which ``create`` is asked for some."""
Clock = Callable[[], datetime]
"""Gives the time now, with a time zone."""


class Signing:
    """The keys at hand.

    Args:
        signers: the keys.
        clock: the time now.
        expires: life time of each role's metadata.
    """

    def __init__(self, signers: Iterable[Signer], clock: Clock, expires: Mapping[str, timedelta] = EXPIRES) -> None:
        self._signers = {signer.public_key.keyid: signer for signer in signers}
        self._clock = clock
        self._expires = expires

    @property
    def keys(self) -> tuple[str, ...]:
        """Ids of the keys at hand."""
        return tuple(self._signers)

    def remember(self, signers: Iterable[Signer | None]) -> None:
        """Further keys are at hand."""
        self._signers |= {signer.public_key.keyid: signer for signer in signers if signer is not None}

    def held(self, roles: Roles) -> tuple[str, ...]:
        """The roles of which a key is at hand."""
        return tuple(role for role in (*OFFLINE, *ONLINE) if self._signers.keys() & set(keyids(roles, role)))

    def now(self) -> datetime:
        """The time, in UTC."""
        return self._clock().astimezone(timezone.utc)

    def due(self, role: str, metadata: Metadata[Any]) -> bool:
        """Whether it is time to sign a role's metadata anew."""
        return self.left(role, metadata) < 0.5

    def left(self, role: str, metadata: Metadata[Any]) -> float:
        """The share of its life that a role's metadata has left."""
        return float((metadata.signed.expires - self.now()) / self._expires[role])

    def following(self, metadata: Metadata[Any], role: str) -> Metadata[Any]:
        """The next version of a role's metadata, unsigned, valid from now."""
        following = copy.deepcopy(metadata)
        following.signatures.clear()
        following.signed.version += 1
        following.signed.expires = self.now() + self._expires[role]
        return following

    def signed(self, metadata: Metadata[Any], role: str, *delegators: Metadata[Any]) -> Metadata[Any]:
        """The metadata, signed by the keys at hand that one of these delegators trusts for the role."""
        for keyid in dict.fromkeys(keyid for one in delegators for keyid in known.keyids(one, role)):
            if keyid in self._signers:
                try:
                    metadata.sign(self._signers[keyid], append=True)
                except UnsignedMetadataError as error:
                    cause = error.__cause__ or error
                    got = str(cause) or type(cause).__name__
                    raise ConfigError(f"key {keyid[:8]} of {role}", got=got, expected="a signature") from error
        return metadata

    def repaired(self, roles: Roles, targets: Metadata[Targets]) -> Metadata[Targets]:
        """What is published of the repairs, less what ``targets`` withdraws, for the keys that it trusts."""
        if roles.repaired is None:
            following = Metadata(Targets(expires=self.now() + self._expires[REPAIRS]))
        else:
            following = self.following(roles.repaired, REPAIRS)
        for path in known.withdrawn(targets):
            following.signed.targets.pop(path, None)
        return self.signed(following, REPAIRS, targets)

    def publication(self, roles: Roles, chosen: Mapping[str, Metadata[Any]]) -> list[tuple[str, bytes]] | None:
        """The files that publish these drafts, in the order in which they are to be written.

        Metadata is signed by all keys at hand that are trusted before or after it, so that clients can follow it
        whether or not they see the new root yet. None where signatures are missing.
        """
        root, targets = chosen.get(ROOT, roles.root), chosen.get(TARGETS, roles.targets)
        repaired = chosen.get(REPAIRS, roles.repaired)
        if ROOT in chosen and not (verifies(roles.root, ROOT, root) and verifies(root, ROOT, root)):
            return None
        if not verifies(root, TARGETS, targets):
            return None
        changed = dict(chosen)
        if known.keyids(targets, REPAIRS) and (repaired is None or not fits(targets, repaired)):
            if REPAIRS in chosen or roles.repaired is None:
                return None  # a draft that the new key did not sign may be a thief's
            changed[REPAIRS] = repaired = self.repaired(roles, targets)
            if not fits(targets, repaired):
                return None
        files = []
        snapshot = roles.snapshot
        for role in (TARGETS, REPAIRS):
            if role in changed:
                files.append((f"{changed[role].signed.version}.{role}.json", changed[role].to_bytes()))
        if changed or self.due(SNAPSHOT, snapshot) or not verifies(root, SNAPSHOT, snapshot):
            snapshot = self.following(snapshot, SNAPSHOT)
            for role, (_, content) in zip((role for role in (TARGETS, REPAIRS) if role in changed), files, strict=True):
                snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(
                    changed[role].signed.version, content, ["sha256"]
                )
            self.signed(snapshot, SNAPSHOT, root, roles.root)
            files.append((f"{snapshot.signed.version}.snapshot.json", snapshot.to_bytes()))
        timestamp = self.following(roles.timestamp, TIMESTAMP)
        if snapshot is not roles.snapshot:
            timestamp.signed.snapshot_meta = MetaFile.from_data(snapshot.signed.version, files[-1][1], ["sha256"])
        self.signed(timestamp, TIMESTAMP, root, roles.root)
        if not (verifies(root, SNAPSHOT, snapshot) and verifies(root, TIMESTAMP, timestamp)):
            return None
        files.append(("timestamp.json", timestamp.to_bytes()))
        if ROOT in chosen:
            files.append((f"{root.signed.version}.root.json", root.to_bytes()))
        return files

    def first(self, keys: Mapping[str, Sequence[Key]], thresholds: Mapping[str, int]) -> list[tuple[str, bytes]]:
        """The files of a new repository, the first version of all roles. Raises ConfigError where a key cannot be."""
        root, targets = Metadata(Root(consistent_snapshot=True)), Metadata(Targets())
        for role in (*OFFLINE, TIMESTAMP, SNAPSHOT):
            sensible(role, len({key.keyid for key in keys[role]}), thresholds[role])
            for key in keys[role]:
                root.signed.add_key(key, role)
            root.signed.roles[role].threshold = thresholds[role]
        known.delegate(targets.signed, keys[REPAIRS][0], keys[COUNTERSIGN])
        roles = Roles(
            root=root,
            targets=targets,
            repaired=Metadata(Targets()),
            snapshot=Metadata(Snapshot()),
            timestamp=Metadata(Timestamp()),
        )
        for role in (*ONLINE, COUNTERSIGN):
            unshared(roles, role, {key.keyid for key in keys[role]})
        files = []
        for role in DRAFTED:
            metadata = roles.of(role)
            assert metadata is not None
            metadata.signed.expires = self.now() + self._expires[role]
            self.signed(metadata, role, roles.delegator(role))
            if not verifies(roles.delegator(role), role, metadata):
                raise ConfigError(
                    f"new repository: keys of {role}",
                    got=f"{known.signatures(roles.delegator(role), role, metadata)} that can sign here",
                    expected=str(known.threshold(roles.delegator(role), role)),
                )
            files.append((f"1.{role}.json", metadata.to_bytes()))
            roles.snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(1, files[-1][1], ["sha256"])
        del roles.snapshot.signed.meta["root.json"]
        roles.snapshot.signed.expires = self.now() + self._expires[SNAPSHOT]
        content = self.signed(roles.snapshot, SNAPSHOT, root).to_bytes()
        roles.timestamp.signed.expires = self.now() + self._expires[TIMESTAMP]
        roles.timestamp.signed.snapshot_meta = MetaFile.from_data(1, content, ["sha256"])
        files += [
            ("1.snapshot.json", content),
            ("timestamp.json", self.signed(roles.timestamp, TIMESTAMP, root).to_bytes()),
        ]
        return files


def keyids(roles: Roles, role: str) -> tuple[str, ...]:
    """The keys that are trusted for a role, by what is published; those that the delegation names first come first."""
    return known.keyids(roles.delegator(role), role)


def delegators(roles: Roles, drafts: Mapping[str, Metadata[Any]], role: str) -> list[Metadata[Any]]:
    """The metadata, published and drafted, that says who signs for a role."""
    above = TARGETS if role == REPAIRS else ROOT
    return [roles.delegator(role), *([drafts[above]] if above in drafts else [])]


def fits(targets: Metadata[Targets], repaired: Metadata[Targets]) -> bool:
    """Whether these repairs are signed as ``targets`` asks, and hold none that it withdraws."""
    return verifies(targets, REPAIRS, repaired) and not known.withdrawn(targets) & set(repaired.signed.targets)


def sensible(role: str, keys: int, threshold: int) -> None:
    """Raises ConfigError unless so many keys can reach the threshold."""
    if not 1 <= threshold <= keys:
        raise ConfigError(f"threshold of {role}", got=str(threshold), expected=f"1 to {keys}, the number of its keys")


def unshared(roles: Roles, role: str, keys: Set[str]) -> None:
    """Raises ConfigError when one of these key ids would sign in two places: offline, at the hub, beside it."""
    repairs = keyids(roles, REPAIRS)
    signing = {other: keyids(roles, other) for other in (*OFFLINE, TIMESTAMP, SNAPSHOT)}
    signing |= {REPAIRS: repairs[:1], COUNTERSIGN: repairs[1:]}
    (own,) = (place for place in (OFFLINE, ONLINE, (COUNTERSIGN,)) if role in place)
    for other, ids in signing.items():
        if other not in own:
            for keyid in keys & set(ids):
                raise ConfigError(f"key {keyid[:8]} for {role}", got=f"a key of {other}", expected="another key")
