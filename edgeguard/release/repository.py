"""The hub's repository of signed models, by The Update Framework: https://theupdateframework.github.io/specification/

The folder is served over HTTP as it stands: ``metadata/*.json`` and ``targets/``, with consistent snapshots. The keys
of ``root`` and ``targets`` are kept offline; the hub holds those of ``timestamp``, ``snapshot`` and ``repaired``, and
the last may sign names under ``repaired/`` alone. Whoever holds some keys opens the repository with them and does what
they allow. Rules enforced here:

* a release has a sequence number that only grows; it is taken back only with the offline keys, when those of the hub
  were stolen;
* what lacks signatures is kept in ``drafts/``, which no device follows, until enough of the role's keys signed it;
* files are written before the metadata that names them, ``timestamp.json`` last: a crash between any two writes leaves
  the repository as it was, because a client follows only what the timestamp names. A new root, which clients follow by
  its number, is first laid down in ``commit/`` with all that belongs to it: after a crash it is either not there, or
  finished when the repository is next opened;
* each file appears whole or not at all: write beside it, fsync, rename, fsync the folder;
* what is on disk is what counts: it is read and verified against its own root before each change, under a lock on the
  folder, so that nothing unsigned is signed on;
* two releases never get one number: a draft that would give one twice is kept, and not published;
* a key is never overwritten, and none is used in two of these places: offline, at the hub, by a countersigner.

Example:
    >>> repository = Repository.create(folder, keys, offline, clock=now)  # doctest: +SKIP
    >>> repository.add(content, name="cnn", model_digest=m, guard_digest=g, replaces=None)  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import copy
import fcntl
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.exceptions import UnsignedMetadataError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edgeguard.errors import ConfigError
from edgeguard.release import keys as keyring
from edgeguard.release import roles as known
from edgeguard.release.client import CUSTOM, REPAIRED, Companion, TargetInfo, sidecar_path
from edgeguard.release.keys import HUB_PASSPHRASE, OFFLINE_PASSPHRASE, Obtained, Secrets
from edgeguard.release.roles import (
    DRAFTED,
    OFFLINE,
    ONLINE,
    REPAIRS,
    ROOT,
    SNAPSHOT,
    TARGETS,
    TIMESTAMP,
    Release,
    Roles,
    verifies,
)

LOG = logging.getLogger(__name__)

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

Rotated = Literal["root", "targets", "snapshot", "timestamp"]
Clock = Callable[[], datetime]
"""Gives the time now, with a time zone."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The keys that a new repository's role shall have: their names, see ``keys``, and how many must sign."""

    names: tuple[str, ...] = ("new",)
    threshold: int = 1


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


class Repository:
    """A signed repository, made by ``create`` or ``open``. Its methods may be called from any thread and process."""

    def __init__(
        self, folder: Path, signers: Sequence[Signer], clock: Clock, expires: Mapping[str, timedelta] = EXPIRES
    ) -> None:
        self._folder = folder
        self._signers = {signer.public_key.keyid: signer for signer in signers}
        self._clock = clock
        self._expires = expires

    @classmethod
    def create(
        cls,
        folder: Path,
        keys: Path,
        offline: Path,
        *,
        clock: Clock,
        expires: Mapping[str, timedelta] = EXPIRES,
        wanted: Mapping[str, Wanted] | None = None,
        secrets: Secrets | None = None,
        passphrase: bytes | None = None,
        offline_passphrase: bytes | None = None,
    ) -> Repository:
        """Make keys, and an empty repository signed by them.

        Args:
            folder: what will be served.
            keys: where the hub's private keys go: timestamp, snapshot and repaired.
            offline: where those of root and targets go, to be taken away from the hub.
            clock: the time now.
            expires: life time of each role's metadata.
            wanted: the keys of each role where it is not one new key; ``COUNTERSIGN`` for the keys of which one must
                sign each repair as well.
            secrets: where the passphrases of keys come from that exist already.
            passphrase: encrypts the hub's new keys; None leaves them plain.
            offline_passphrase: encrypts the offline ones.

        Raises:
            ConfigError: a folder is not empty, keys would be served or lie together, a key cannot be used, or the disk
                cannot be written.
        """
        _apart(folder, keys, offline)
        for path in (folder, keys, offline):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(
                    f"new repository {path}", got="something is there already", do="open it or choose a new folder"
                )
        plan = {role: Wanted() for role in (*OFFLINE, *ONLINE)} | {COUNTERSIGN: Wanted(names=())} | dict(wanted or {})
        if plan[REPAIRS].threshold != 1 or len(plan[REPAIRS].names) != 1:
            raise ConfigError("keys of repaired", expected="one, of the hub", do=f"ask for {COUNTERSIGN} keys instead")
        secrets = secrets or Secrets()
        with (
            _disk_errors(folder),
            _new_folder(folder) as new_folder,  # appears last, when there are keys for it
            _new_folder(keys) as new_keys,
            _new_folder(offline) as new_offline,
        ):
            held: dict[str, list[Obtained]] = {}
            for role, some in plan.items():
                where, variable, secret = (
                    (new_keys, HUB_PASSPHRASE, passphrase)
                    if role in ONLINE
                    else (new_offline, OFFLINE_PASSPHRASE, offline_passphrase)
                )
                held[role] = [
                    keyring.obtain(name, role, where, secrets=secrets, variable=variable, passphrase=secret)
                    for name in some.names
                ]
            (new_folder / "metadata").mkdir()
            (new_folder / "targets").mkdir()
            new_folder.chmod(0o755)
            signers = [one.signer for some in held.values() for one in some if one.signer is not None]
            made = cls(new_folder, signers, clock, expires)
            made._begin({role: [one.key for one in some] for role, some in held.items()}, plan)
        return cls(folder, signers, clock, expires)

    @classmethod
    def open(
        cls,
        folder: Path,
        keys: Path | Sequence[Signer],
        *,
        clock: Clock,
        expires: Mapping[str, timedelta] = EXPIRES,
    ) -> Repository:
        """Open a repository, and verify that it is one: signatures, versions and hashes. It may have expired.

        Args:
            folder: what is served.
            keys: the hub's key folder, which must hold all that the hub signs with; or keys, whichever are at hand.
            clock: the time now.
            expires: life time of each role's metadata.

        Raises:
            ConfigError: there is no repository, or one of an earlier version; a key is missing, another repository's,
                or readable by others.
            TrustError: what is on disk is not what the keys signed.
        """
        opened = cls(folder, keyring.load(keys) if isinstance(keys, Path) else keys, clock, expires)
        with _disk_errors(folder):
            if (folder / "commit").exists():
                with opened._changing():
                    pass  # which finishes what a crash interrupted
            roles = known.load(folder / "metadata")
        held = opened._held(roles)
        if opened._signers and not held:
            names = ", ".join(keyid[:8] for keyid in opened._signers)
            raise ConfigError(f"keys {names}", got="those of another repository", do="check the key folder")
        if isinstance(keys, Path):
            _migrated(folder, roles)
            for role in ONLINE:
                if role not in held:
                    raise ConfigError(
                        f"key folder {keys}",
                        got=f"no key of {role}",
                        expected=", ".join(f"{role}-{keyid[:8]}" for keyid in _keyids(roles, role)),
                        do="check the key folder",
                    )
        return opened

    def held(self) -> tuple[str, ...]:
        """The roles of which a key is at hand."""
        with _disk_errors(self._folder):
            return self._held(known.load(self._folder / "metadata"))

    def keys(self, role: str) -> tuple[Key, ...]:
        """The keys that a role has now. Raises ConfigError and TrustError as :meth:`releases`."""
        with _disk_errors(self._folder):
            roles = known.load(self._folder / "metadata")
        return tuple(roles.delegator(role).signed.get_key(keyid) for keyid in _keyids(roles, role))

    def root(self) -> bytes:
        """The trusted root for the devices: the first one, from which each later one can be reached.

        Raises:
            ConfigError: it cannot be read.
        """
        with _disk_errors(self._folder):
            return (self._folder / "metadata" / "1.root.json").read_bytes()

    def releases(self) -> tuple[Release, ...]:
        """All published releases, oldest first.

        Raises:
            ConfigError: the disk cannot be read.
            TrustError: what is on disk is not what the keys signed.
        """
        with _disk_errors(self._folder):
            return known.releases(known.load(self._folder / "metadata"))

    def add(
        self,
        content: bytes,
        *,
        name: str,
        model_digest: str,
        guard_digest: str,
        replaces: str | None,
        boards: Sequence[str] = (),
        runtimes: Sequence[str] = (),
        sidecar: bytes | None = None,
    ) -> Release:
        """Sign a model with the offline keys, under the next sequence number, and publish it.

        Args:
            content: the guarded file.
            name: an id; the target is called ``<name>-<sequence>.tflite``.
            model_digest: of the new model.
            guard_digest: of its guard.
            replaces: model digest of the model that a device must run to take it; None for a first release.
            boards: patterns of the boards that it is for; empty for all.
            runtimes: patterns of the runtimes that it is for; empty for all.
            sidecar: the file that belongs beside the model; its digest is signed with the model's.

        Returns:
            The release; not published yet where more signatures, or the hub's keys, are needed.

        Raises:
            ConfigError: a bad name or digest, an empty file, no key at hand, or the disk cannot be written.
            TrustError: what is on disk is not what the keys signed.
        """
        info = _described(name, content, model_digest, guard_digest, replaces, boards, runtimes, sidecar)
        with self._changing() as (roles, drafts):
            return self._release(TARGETS, name, content, sidecar, info, _migrated(self._folder, roles), drafts)

    def add_repair(
        self,
        content: bytes,
        *,
        name: str,
        model_digest: str,
        guard_digest: str,
        replaces: str,
        boards: Sequence[str] = (),
        runtimes: Sequence[str] = (),
        sidecar: bytes | None = None,
    ) -> Release:
        """Sign a repaired model with the hub's key; the target is called ``repaired/<name>-<sequence>.tflite``.

        To be called again for the same file is no harm: it is the same release, published once it has the second
        signature, where one is demanded. Only when the replaced model itself was released since, as by a roll-out that
        went back, it is a new one. Arguments and errors as for :meth:`add`.
        """
        info = _described(name, content, model_digest, guard_digest, replaces, boards, runtimes, sidecar)
        with self._changing() as before:
            _migrated(self._folder, before[0])
            self._submit(*before)  # perhaps the signature has come that a draft waited for
            roles, drafts = self._read()
            waiting = known.targets_releases(drafts[REPAIRS], published=False) if REPAIRS in drafts else ()
            made = _made_before((*known.releases(roles), *waiting), sha256(content).hexdigest(), replaces)
            if made is not None:
                return made
            return self._release(REPAIRS, name, content, sidecar, info, roles, drafts)

    def rotate(
        self, wanted: Mapping[Rotated, Sequence[Obtained]], *, thresholds: Mapping[Rotated, int] | None = None
    ) -> bool:
        """Let roles be signed by other keys from now on. What the old ones signed is signed anew.

        Where several keys of the hub are lost, their roles must be given together: each is needed to publish.

        Args:
            wanted: all the keys that each of these roles shall have.
            thresholds: how many of them must sign, where it is not as many as before.

        Returns:
            True when it is published, False when signatures are missing yet.

        Raises:
            ConfigError: the keys or a threshold cannot be, a draft waits, no root key is at hand, or the disk cannot
                be written.
            TrustError: what is on disk is not what the keys signed.
        """
        with self._changing() as (roles, drafts):
            self._unclaimed(drafts, ROOT, *((TARGETS,) if TARGETS in wanted else ()))
            root = self._next(roles.root, ROOT)
            for role, obtained in wanted.items():
                keys = {one.key.keyid: one.key for one in obtained}
                threshold = (thresholds or {}).get(role) or known.threshold(roles.root, role)
                _sensible(role, len(keys), threshold)
                self._unshared(roles, role, keys.keys())
                self._remember(obtained)
                for keyid in root.signed.roles[role].keyids.copy():
                    root.signed.revoke_key(keyid, role)
                for key in keys.values():
                    root.signed.add_key(key, role)
                root.signed.roles[role].threshold = threshold
            drafts[ROOT] = self._signed(root, ROOT, roles.root, root)
            if TARGETS in wanted:
                drafts[TARGETS] = self._signed(self._next(roles.targets, TARGETS), TARGETS, root, roles.root)
            self._some_signature(roles, ROOT, drafts[ROOT])
            return ROOT in self._submit(roles, drafts)

    def repair_key(
        self,
        hub: Obtained,
        *,
        countersigners: Sequence[Obtained] | None = None,
        withdraw: Sequence[int] = (),
    ) -> bool:
        """Say which key of the hub may sign repairs, and which offline keys must sign them too, one of them each.

        Args:
            hub: the hub's key.
            countersigners: the offline ones; none when empty, as before when None.
            withdraw: sequence numbers of repairs to take back, such as those that a thief of the old key signed.

        Returns:
            True when it is published, False when signatures are missing yet.

        Raises:
            ConfigError: no such repair, a draft waits, no targets key is at hand, or the disk cannot be written.
            TrustError: what is on disk is not what the keys signed.
        """
        with self._changing() as (roles, drafts):
            self._unclaimed(drafts, TARGETS, REPAIRS)
            listed = known.targets_releases(roles.repaired) if roles.repaired else ()
            if unknown := set(withdraw) - {release.sequence for release in listed}:
                raise ConfigError(f"repair {min(unknown)}", got="no such sequence under repaired/", do="see status")
            before = roles.targets.signed.delegations
            if countersigners is None:
                kept = known.keyids(roles.targets, REPAIRS)[1:]
                others = [before.keys[keyid] for keyid in kept] if before else []
            else:
                others = [one.key for one in countersigners]
            self._unshared(roles, REPAIRS, {hub.key.keyid})
            self._unshared(roles, COUNTERSIGN, {key.keyid for key in others})
            self._remember([hub, *(countersigners or ())])
            if hub.signer is None and (others or roles.repaired is None):
                raise ConfigError(f"key {hub.key.keyid[:8]}", got="its public part", expected="the private key")
            targets = self._next(roles.targets, TARGETS)
            known.delegate(targets.signed, hub.key, others)
            if withdraw:
                taken = [release for release in listed if release.sequence in withdraw]
                known.withdraw(targets, taken, floor=known.last_sequence(roles))
            drafts[TARGETS] = self._signed(targets, TARGETS, roles.root)
            self._some_signature(roles, TARGETS, drafts[TARGETS])
            if hub.signer is not None:
                drafts[REPAIRS] = self._repaired(roles, targets)
            return TARGETS in self._submit(roles, drafts)

    def sign(self, seen: Sequence[Draft] | None = None) -> tuple[str, ...]:
        """Sign all drafts with the keys at hand, and publish those that are complete.

        Args:
            seen: what was shown to the person who signs: nothing else is signed. None signs whatever is there.

        Returns:
            The roles that were published.

        Raises:
            ConfigError: there is no draft, it is another than was seen, no key for one is at hand, or the disk cannot
                be written.
            TrustError: what is on disk is not what the keys signed.
        """
        with self._changing() as (roles, drafts):
            if not drafts:
                raise ConfigError(f"drafts of {self._folder}", got="none", do="there is nothing to sign")
            added = 0
            for role, draft in drafts.items():
                digest = sha256(draft.signed_bytes).hexdigest()
                if seen is not None and digest not in {one.digest for one in seen}:
                    raise ConfigError(f"draft of {role}", got="another one than was shown", do="look at it again")
                before = len(draft.signatures)
                self._signed(draft, role, *_delegators(roles, drafts, role))
                added += len(draft.signatures) - before
            published = self._submit(roles, drafts)
            if not added and not published:
                raise ConfigError(f"drafts of {', '.join(drafts)}", got="no key at hand that has not signed already")
            return published

    def discard(self) -> tuple[str, ...]:
        """Delete all drafts; the roles that had one."""
        with self._changing() as (_, drafts):
            for role in DRAFTED:
                (self._folder / "drafts" / f"{role}.json").unlink(missing_ok=True)
            return tuple(drafts)

    def renew(self) -> tuple[str, ...]:
        """Sign a fresh timestamp, and of the other roles those that have less than half of their life left.

        Called a few times within the life of a timestamp, it keeps valid for ever what the keys at hand may sign.
        Drafts that are complete are published.

        Returns:
            The roles of ``DRAFTED`` that were published.

        Raises:
            ConfigError: a key of the hub is not at hand, or the disk cannot be written.
            TrustError: what is on disk is not what the keys signed.
        """
        with self._changing() as (roles, drafts):
            for role in DRAFTED:
                metadata = roles.of(role)
                if metadata is None or role in drafts or not self._due(role, metadata):
                    continue
                renewed = self._signed(self._next(metadata, role), role, roles.delegator(role))
                if known.signatures(roles.delegator(role), role, renewed):
                    drafts[role] = renewed
                elif self._left(role, metadata) < 0.25:
                    LOG.warning(
                        "%s expires on %s and its key is not here to renew it: edgeguard release renew",
                        role,
                        metadata.signed.expires.date(),
                    )
            return self._submit(roles, drafts, anyway=True)

    def status(self) -> Status:
        """What is published, what waits, and what somebody must do.

        Raises:
            ConfigError: the disk cannot be read.
            TrustError: what is on disk is not what the keys signed.
        """
        with _disk_errors(self._folder):
            roles, drafts = self._read()
        shown = []
        for role in (*OFFLINE, *reversed(ONLINE)):
            metadata = roles.of(role)
            if metadata is not None:
                keyids = _keyids(roles, role)
                shown.append(
                    RoleStatus(
                        role=role,
                        version=metadata.signed.version,
                        expires=metadata.signed.expires,
                        threshold=known.threshold(roles.delegator(role), role),
                        keys=keyids,
                        at_hand=len(self._signers.keys() & set(keyids)),
                    )
                )
        waiting = tuple(
            Draft(
                role=role,
                version=draft.signed.version,
                digest=sha256(draft.signed_bytes).hexdigest(),
                signatures=max(known.signatures(one, role, draft) for one in _delegators(roles, drafts, role)),
                threshold=max(
                    known.threshold(one, role) for one in _delegators(roles, drafts, role) if known.keyids(one, role)
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
                *self._warnings(roles),
                *(_waits(one, known.clashing(roles, {one.role: drafts[one.role]})) for one in waiting),
            ),
        )

    # -- what a change consists of

    def _begin(self, keys: Mapping[str, Sequence[Key]], plan: Mapping[str, Wanted]) -> None:
        """Sign the first version of all roles."""
        root, targets = Metadata(Root(consistent_snapshot=True)), Metadata(Targets())
        for role in (*OFFLINE, TIMESTAMP, SNAPSHOT):
            _sensible(role, len({key.keyid for key in keys[role]}), plan[role].threshold)
            for key in keys[role]:
                root.signed.add_key(key, role)
            root.signed.roles[role].threshold = plan[role].threshold
        known.delegate(targets.signed, keys[REPAIRS][0], keys[COUNTERSIGN])
        roles = Roles(
            root=root,
            targets=targets,
            repaired=Metadata(Targets()),
            snapshot=Metadata(Snapshot()),
            timestamp=Metadata(Timestamp()),
        )
        for role in (*ONLINE, COUNTERSIGN):
            self._unshared(roles, role, {key.keyid for key in keys[role]})
        files = []
        for role in DRAFTED:
            metadata = roles.of(role)
            assert metadata is not None
            metadata.signed.expires = self._now() + self._expires[role]
            self._signed(metadata, role, roles.delegator(role))
            if not verifies(roles.delegator(role), role, metadata):
                raise ConfigError(
                    f"new repository: keys of {role}",
                    got=f"{known.signatures(roles.delegator(role), role, metadata)} that can sign here",
                    expected=str(known.threshold(roles.delegator(role), role)),
                )
            files.append((f"1.{role}.json", metadata.to_bytes()))
            roles.snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(1, files[-1][1], ["sha256"])
        del roles.snapshot.signed.meta["root.json"]
        roles.snapshot.signed.expires = self._now() + self._expires[SNAPSHOT]
        content = self._signed(roles.snapshot, SNAPSHOT, root).to_bytes()
        roles.timestamp.signed.expires = self._now() + self._expires[TIMESTAMP]
        roles.timestamp.signed.snapshot_meta = MetaFile.from_data(1, content, ["sha256"])
        files += [
            ("1.snapshot.json", content),
            ("timestamp.json", self._signed(roles.timestamp, TIMESTAMP, root).to_bytes()),
        ]
        for name, data in files:
            _write(self._folder / "metadata" / name, data)

    def _release(
        self,
        role: str,
        name: str,
        content: bytes,
        sidecar: bytes | None,
        info: TargetInfo,
        roles: Roles,
        drafts: dict[str, Metadata[Any]],
    ) -> Release:
        if role == TARGETS:
            self._unclaimed(drafts, TARGETS)
        current = roles.of(role)
        assert current is not None
        draft = self._next(current, role)
        if role in drafts:
            draft.signed.targets = drafts[role].signed.targets
        sequence = known.last_sequence(roles, drafts) + 1
        path = f"{REPAIRED if role == REPAIRS else ''}{name}-{sequence}.tflite"
        target = TargetFile.from_data(path, content, ["sha256"])
        target.unrecognized_fields["custom"] = {
            CUSTOM: msgspec.to_builtins(msgspec.structs.replace(info, sequence=sequence))
        }
        draft.signed.targets[path] = target
        self._signed(draft, role, roles.delegator(role))
        self._some_signature(roles, role, draft)
        _write(self._folder / "targets" / target.get_prefixed_paths()[0], content)
        if sidecar is not None and info.sidecar is not None:
            _write(self._folder / "targets" / sidecar_path(path, info.sidecar.sha256), sidecar)
        drafts[role] = draft
        published = role in self._submit(roles, drafts)
        LOG.info("%s %s, sequence %d", "released" if published else "signed, not yet published,", path, sequence)
        (release,) = (one for one in known.targets_releases(draft, published=published) if one.target == path)
        return release

    def _submit(self, roles: Roles, drafts: Mapping[str, Metadata[Any]], *, anyway: bool = False) -> tuple[str, ...]:
        """Publish the most of these drafts that can be together, and keep the others.

        Args:
            roles: what is published.
            drafts: their next versions.
            anyway: sign a fresh timestamp where none can be published.

        Returns:
            The roles that were published.

        Raises:
            ConfigError: not even a timestamp could be signed though it was asked for.
        """
        names = [role for role in DRAFTED if role in drafts]
        possible = (
            {name: drafts[name] for name in some}
            for count in range(len(names), -1, -1)
            for some in combinations(names, count)
            if some or anyway
        )
        published: tuple[str, ...] = ()
        files = None
        for chosen in possible:
            if not known.clashing(roles, chosen) and (files := self._publication(roles, chosen)) is not None:
                published = tuple(chosen)
                break
        for role in names:
            if role not in published:
                self._keep_draft(role, drafts[role])
        if files is not None:
            self._write_all(files)
        elif anyway:
            raise ConfigError("keys of timestamp and snapshot", got="too few at hand", do="give the hub's key folder")
        for role in published:
            (self._folder / "drafts" / f"{role}.json").unlink(missing_ok=True)
        return published

    def _publication(self, roles: Roles, chosen: Mapping[str, Metadata[Any]]) -> list[tuple[str, bytes]] | None:
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
        if known.keyids(targets, REPAIRS) and (repaired is None or not _fits(targets, repaired)):
            if REPAIRS in chosen or roles.repaired is None:
                return None  # a draft that the new key did not sign may be a thief's
            changed[REPAIRS] = repaired = self._repaired(roles, targets)
            if not _fits(targets, repaired):
                return None
        files = []
        snapshot = roles.snapshot
        for role in (TARGETS, REPAIRS):
            if role in changed:
                files.append((f"{changed[role].signed.version}.{role}.json", changed[role].to_bytes()))
        if changed or self._due(SNAPSHOT, snapshot) or not verifies(root, SNAPSHOT, snapshot):
            snapshot = self._next(snapshot, SNAPSHOT)
            for role, (_, content) in zip((role for role in (TARGETS, REPAIRS) if role in changed), files, strict=True):
                snapshot.signed.meta[f"{role}.json"] = MetaFile.from_data(
                    changed[role].signed.version, content, ["sha256"]
                )
            self._signed(snapshot, SNAPSHOT, root, roles.root)
            files.append((f"{snapshot.signed.version}.snapshot.json", snapshot.to_bytes()))
        timestamp = self._next(roles.timestamp, TIMESTAMP)
        if snapshot is not roles.snapshot:
            timestamp.signed.snapshot_meta = MetaFile.from_data(snapshot.signed.version, files[-1][1], ["sha256"])
        self._signed(timestamp, TIMESTAMP, root, roles.root)
        if not (verifies(root, SNAPSHOT, snapshot) and verifies(root, TIMESTAMP, timestamp)):
            return None
        files.append(("timestamp.json", timestamp.to_bytes()))
        if ROOT in chosen:
            files.append((f"{root.signed.version}.root.json", root.to_bytes()))
        return files

    def _repaired(self, roles: Roles, targets: Metadata[Targets]) -> Metadata[Targets]:
        """What is published of the repairs, less what ``targets`` withdraws, for the keys that it trusts."""
        if roles.repaired is None:
            following = Metadata(Targets(expires=self._now() + self._expires[REPAIRS]))
        else:
            following = self._next(roles.repaired, REPAIRS)
        for path in known.withdrawn(targets):
            following.signed.targets.pop(path, None)
        return self._signed(following, REPAIRS, targets)

    def _next(self, metadata: Metadata[Any], role: str) -> Metadata[Any]:
        """The next version of a role's metadata, unsigned, valid from now."""
        following = copy.deepcopy(metadata)
        following.signatures.clear()
        following.signed.version += 1
        following.signed.expires = self._now() + self._expires[role]
        return following

    def _signed(self, metadata: Metadata[Any], role: str, *delegators: Metadata[Any]) -> Metadata[Any]:
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

    def _some_signature(self, roles: Roles, role: str, draft: Metadata[Any]) -> None:
        """Raises ConfigError when no key of the role is at hand."""
        if not known.signatures(roles.delegator(role), role, draft):
            expected = " or ".join(keyid[:8] for keyid in _keyids(roles, role))
            where = "the offline key folder" if role in OFFLINE else "the hub's key folder"
            raise ConfigError(f"key of {role}", got="none at hand", expected=expected, do=f"give {where}")

    def _unclaimed(self, drafts: Mapping[str, Metadata[Any]], *roles: str) -> None:
        for role in roles:
            if role in drafts:
                raise ConfigError(
                    f"draft of {role} in {self._folder}",
                    got="one that waits for signatures",
                    do="sign or discard it first: edgeguard release sign",
                )

    def _unshared(self, roles: Roles, role: str, keys: Set[str]) -> None:
        """Raises ConfigError when one of these key ids would sign in two places: offline, at the hub, beside it."""
        repairs = _keyids(roles, REPAIRS)
        signing = {other: _keyids(roles, other) for other in (*OFFLINE, TIMESTAMP, SNAPSHOT)}
        signing |= {REPAIRS: repairs[:1], COUNTERSIGN: repairs[1:]}
        (own,) = (place for place in (OFFLINE, ONLINE, (COUNTERSIGN,)) if role in place)
        for other, keyids in signing.items():
            if other not in own:
                for keyid in keys & set(keyids):
                    raise ConfigError(f"key {keyid[:8]} for {role}", got=f"a key of {other}", expected="another key")

    def _remember(self, obtained: Sequence[Obtained]) -> None:
        for one in obtained:
            if one.signer is not None:
                self._signers[one.key.keyid] = one.signer

    def _held(self, roles: Roles) -> tuple[str, ...]:
        return tuple(role for role in (*OFFLINE, *ONLINE) if self._signers.keys() & set(_keyids(roles, role)))

    def _due(self, role: str, metadata: Metadata[Any]) -> bool:
        return self._left(role, metadata) < 0.5

    def _left(self, role: str, metadata: Metadata[Any]) -> float:
        """The share of its life that a role's metadata has left."""
        return float((metadata.signed.expires - self._now()) / self._expires[role])

    def _warnings(self, roles: Roles) -> list[str]:
        warnings = []
        if roles.repaired is None:
            warnings.append("made by an earlier version; the hub's key for repairs is missing: run release repair-key")
        for role in (*OFFLINE, *ONLINE):
            metadata = roles.of(role)
            if metadata is None:
                continue
            left, ends = metadata.signed.expires - self._now(), metadata.signed.expires.date()
            if left <= timedelta():
                warnings.append(f"{role} has expired on {ends}: devices take no release")
            elif left < self._expires[role] / 4:
                warnings.append(f"{role} expires on {ends}: run release renew")
        return warnings

    def _now(self) -> datetime:
        return self._clock().astimezone(timezone.utc)

    # -- on disk

    def _read(self) -> tuple[Roles, dict[str, Metadata[Any]]]:
        roles = known.load(self._folder / "metadata")
        return roles, known.load_drafts(self._folder / "drafts", roles)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[tuple[Roles, dict[str, Metadata[Any]]]]:
        """What is published and what is drafted, while nobody else changes it."""
        with _disk_errors(self._folder):
            if not (self._folder / "metadata").is_dir():
                known.load(self._folder / "metadata")
            with (self._folder / ".lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                self._finish()
                yield self._read()

    def _finish(self) -> None:
        """Complete a publication that a crash interrupted."""
        commit = self._folder / "commit"
        if commit.exists():
            for path in sorted(commit.iterdir(), key=lambda path: (path.name.endswith(".root.json"), path.name)):
                _write(self._folder / "metadata" / path.name, path.read_bytes())
            self._drop(commit)

    def _drop(self, commit: Path) -> None:
        done = Path(tempfile.mkdtemp(prefix=".done.", dir=self._folder))
        commit.replace(done)
        _sync(self._folder)
        shutil.rmtree(done, ignore_errors=True)

    def _write_all(self, files: Sequence[tuple[str, bytes]]) -> None:
        commit = self._folder / "commit"
        whole = any(name.endswith(".root.json") for name, _ in files)
        if whole:
            with _new_folder(commit) as folder:
                for name, content in files:
                    _write(folder / name, content)
        for name, content in files:
            _write(self._folder / "metadata" / name, content)
        if whole:
            self._drop(commit)

    def _keep_draft(self, role: str, draft: Metadata[Any]) -> None:
        path, content = self._folder / "drafts" / f"{role}.json", draft.to_bytes()
        if not path.exists() or path.read_bytes() != content:
            _write(path, content)


def _described(
    name: str,
    content: bytes,
    model_digest: str,
    guard_digest: str,
    replaces: str | None,
    boards: Sequence[str],
    runtimes: Sequence[str],
    sidecar: bytes | None,
) -> TargetInfo:
    """What will be signed of a release, but for its sequence. Raises ConfigError."""
    if not _NAME.fullmatch(name):
        raise ConfigError(f"release name {name!r}", expected=f"an id like {_NAME.pattern}")
    for digest in (model_digest, guard_digest, *([] if replaces is None else [replaces])):
        if not _DIGEST.fullmatch(digest):
            raise ConfigError(f"digest {digest!r}", expected="64 hexadecimal digits")
    if not content:
        raise ConfigError(f"release {name}", got="an empty file", expected="a guarded model")
    info = TargetInfo(
        sequence=1,
        model_digest=model_digest,
        guard_digest=guard_digest,
        replaces=replaces,
        boards=tuple(boards),
        runtimes=tuple(runtimes),
        sidecar=None if sidecar is None else Companion(sha256=sha256(sidecar).hexdigest(), length=len(sidecar)),
    )
    try:
        return msgspec.convert(msgspec.to_builtins(info), TargetInfo)
    except msgspec.ValidationError as error:
        raise ConfigError(f"release {name}", got=str(error)[:200]) from error


def _made_before(listed: Sequence[Release], file_digest: str, replaces: str) -> Release | None:
    """The release of this very file, but for devices that came to the replaced model by a later one."""
    since = max((one.sequence for one in listed if one.model_digest == replaces), default=0)
    same = [
        one for one in listed if (one.file_digest, one.replaces) == (file_digest, replaces) and one.sequence > since
    ]
    return max(same, key=lambda one: one.sequence, default=None)


def _waits(draft: Draft, clashing: Sequence[Release]) -> str:
    if clashing:
        (first, *_) = clashing
        return (
            f"a draft of {draft.role} is not published: its {first.target} has the number of another release by now; "
            "discard it and add it anew: edgeguard release sign --discard"
        )
    what = "signatures" if draft.signatures < draft.threshold else "the hub to publish it: edgeguard release renew"
    return f"a draft of {draft.role} waits for {what}"


def _delegators(roles: Roles, drafts: Mapping[str, Metadata[Any]], role: str) -> list[Metadata[Any]]:
    """The metadata, published and drafted, that says who signs for a role."""
    above = TARGETS if role == REPAIRS else ROOT
    return [roles.delegator(role), *([drafts[above]] if above in drafts else [])]


def _fits(targets: Metadata[Targets], repaired: Metadata[Targets]) -> bool:
    """Whether these repairs are signed as ``targets`` asks, and hold none that it withdraws."""
    return verifies(targets, REPAIRS, repaired) and not known.withdrawn(targets) & set(repaired.signed.targets)


def _keyids(roles: Roles, role: str) -> tuple[str, ...]:
    return known.keyids(roles.delegator(role), role)


def _sensible(role: str, keys: int, threshold: int) -> None:
    if not 1 <= threshold <= keys:
        raise ConfigError(f"threshold of {role}", got=str(threshold), expected=f"1 to {keys}, the number of its keys")


def _migrated(folder: Path, roles: Roles) -> Roles:
    if roles.repaired is None:
        raise ConfigError(
            f"repository {folder}",
            got="the layout of an earlier version, in which the hub holds every key",
            do="run edgeguard release repair-key once, then move the keys of root and targets off the hub",
        )
    return roles


def _apart(folder: Path, keys: Path, offline: Path) -> None:
    """Raises ConfigError when keys would be served, or offline keys lie with the hub's."""
    served, hidden, away = folder.resolve(), keys.resolve(), offline.resolve()
    for path in (hidden, away):
        if served.is_relative_to(path) or path.is_relative_to(served):
            raise ConfigError(f"key folder {path}", expected=f"a folder apart from {folder}, which is served")
    if hidden.is_relative_to(away) or away.is_relative_to(hidden):
        raise ConfigError(f"offline key folder {offline}", expected=f"a folder apart from {keys}, the hub's")


@contextlib.contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"repository {path}", got=str(error), do="check its disk and owner") from error


@contextlib.contextmanager
def _new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which appears under its name when all went well, and not at all otherwise."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
        _sync(path.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        if not path.parent.exists():
            path.parent.mkdir()
            _sync(path.parent.parent)
        temporary.write_bytes(content)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    _sync(path.parent)


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
