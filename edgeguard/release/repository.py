"""The hub's repository of signed models, by The Update Framework: https://theupdateframework.github.io/specification/

The folder is served over HTTP as it stands: ``metadata/*.json`` and ``targets/``, with consistent snapshots. The keys
of ``root`` and ``targets`` are kept offline; the hub holds those of ``timestamp``, ``snapshot`` and ``repaired``, and
the last may sign names under ``repaired/`` alone. Whoever holds some keys opens the repository with them and does what
they allow. Rules enforced here:

* a release has a sequence number that only grows; it is taken back only with the offline keys, when those of the hub
  were stolen;
* what lacks signatures is kept in ``drafts/``, which no device follows, until enough of the role's keys signed it;
* what is on disk is what counts: it is read and verified against its own root before each change, so that nothing
  unsigned is signed on. How it is written stands in ``storage``, and who signs what in ``signing``;
* two releases never get one number: a draft that would give one twice is kept, and not published;
* a key is never overwritten, and none is used in two of these places: offline, at the hub, by a countersigner.

Example:
    >>> repository = Repository.create(folder, keys, offline, clock=now)  # doctest: +SKIP
    >>> repository.add(content, name="cnn", model_digest=m, guard_digest=g, replaces=None)  # doctest: +SKIP
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import msgspec
from securesystemslib.signer import Key, Signer
from tuf.api.metadata import Metadata, TargetFile

from edgeguard import disk
from edgeguard.errors import ConfigError
from edgeguard.release import keys as keyring
from edgeguard.release import roles as known
from edgeguard.release.client import CUSTOM, REPAIRED, Companion, TargetInfo, sidecar_path
from edgeguard.release.keys import HUB_PASSPHRASE, OFFLINE_PASSPHRASE, Obtained, Secrets
from edgeguard.release.roles import DRAFTED, OFFLINE, ONLINE, REPAIRS, ROOT, TARGETS, Release, Roles
from edgeguard.release.signing import COUNTERSIGN, EXPIRES, Clock, Signing, delegators, keyids, sensible, unshared
from edgeguard.release.status import Draft, Status, status_of
from edgeguard.release.storage import Storage, apart, disk_errors, write

__all__ = ["COUNTERSIGN", "EXPIRES", "Clock", "Draft", "Release", "Repository", "Rotated", "Status", "Wanted"]

LOG = logging.getLogger(__name__)

Rotated = Literal["root", "targets", "snapshot", "timestamp"]

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """The keys that a new repository's role shall have: their names, see ``keys``, and how many must sign."""

    names: tuple[str, ...] = ("new",)
    threshold: int = 1


class Repository:
    """A signed repository, made by ``create`` or ``open``. Its methods may be called from any thread and process."""

    def __init__(
        self, folder: Path, signers: Sequence[Signer], clock: Clock, expires: Mapping[str, timedelta] = EXPIRES
    ) -> None:
        self._folder = folder
        self._storage = Storage(folder)
        self._signing = Signing(signers, clock, expires)

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
        apart(folder, keys, offline)
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
            disk_errors(folder),
            disk.new_folder(folder) as made,  # appears last, when there are keys for it
            disk.new_folder(keys) as new_keys,
            disk.new_folder(offline) as new_offline,
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
            (made / "metadata").mkdir()
            (made / "targets").mkdir()
            made.chmod(0o755)
            signers = [one.signer for some in held.values() for one in some if one.signer is not None]
            keys_of = {role: [one.key for one in some] for role, some in held.items()}
            thresholds = {role: some.threshold for role, some in plan.items()}
            for name, content in Signing(signers, clock, expires).first(keys_of, thresholds):
                write(made / "metadata" / name, content)
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
        with disk_errors(folder):
            if opened._storage.is_unfinished():
                with opened._storage.changing():
                    pass  # which finishes what a crash interrupted
            roles = known.load(folder / "metadata")
        held = opened._signing.held(roles)
        if opened._signing.keys and not held:
            names = ", ".join(keyid[:8] for keyid in opened._signing.keys)
            raise ConfigError(f"keys {names}", got="those of another repository", do="check the key folder")
        if isinstance(keys, Path):
            _migrated(folder, roles)
            for role in ONLINE:
                if role not in held:
                    raise ConfigError(
                        f"key folder {keys}",
                        got=f"no key of {role}",
                        expected=", ".join(f"{role}-{keyid[:8]}" for keyid in keyids(roles, role)),
                        do="check the key folder",
                    )
        return opened

    def held(self) -> tuple[str, ...]:
        """The roles of which a key is at hand."""
        with disk_errors(self._folder):
            return self._signing.held(known.load(self._folder / "metadata"))

    def keys(self, role: str) -> tuple[Key, ...]:
        """The keys that a role has now. Raises ConfigError and TrustError as :meth:`releases`."""
        with disk_errors(self._folder):
            roles = known.load(self._folder / "metadata")
        return tuple(roles.delegator(role).signed.get_key(keyid) for keyid in keyids(roles, role))

    def root(self) -> bytes:
        """The trusted root for the devices: the first one, from which each later one can be reached.

        Raises:
            ConfigError: it cannot be read.
        """
        with disk_errors(self._folder):
            return (self._folder / "metadata" / "1.root.json").read_bytes()

    def releases(self) -> tuple[Release, ...]:
        """All published releases, oldest first.

        Raises:
            ConfigError: the disk cannot be read.
            TrustError: what is on disk is not what the keys signed.
        """
        with disk_errors(self._folder):
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
        with self._storage.changing() as (roles, drafts):
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
        with self._storage.changing() as before:
            _migrated(self._folder, before[0])
            self._submit(*before)  # perhaps the signature has come that a draft waited for
            roles, drafts = self._storage.read()
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
        with self._storage.changing() as (roles, drafts):
            self._unclaimed(drafts, ROOT, *((TARGETS,) if TARGETS in wanted else ()))
            root = self._signing.following(roles.root, ROOT)
            for role, obtained in wanted.items():
                keys = {one.key.keyid: one.key for one in obtained}
                threshold = (thresholds or {}).get(role) or known.threshold(roles.root, role)
                sensible(role, len(keys), threshold)
                unshared(roles, role, keys.keys())
                self._signing.remember(one.signer for one in obtained)
                for keyid in root.signed.roles[role].keyids.copy():
                    root.signed.revoke_key(keyid, role)
                for key in keys.values():
                    root.signed.add_key(key, role)
                root.signed.roles[role].threshold = threshold
            drafts[ROOT] = self._signing.signed(root, ROOT, roles.root, root)
            if TARGETS in wanted:
                targets = self._signing.following(roles.targets, TARGETS)
                drafts[TARGETS] = self._signing.signed(targets, TARGETS, root, roles.root)
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
        with self._storage.changing() as (roles, drafts):
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
            unshared(roles, REPAIRS, {hub.key.keyid})
            unshared(roles, COUNTERSIGN, {key.keyid for key in others})
            self._signing.remember(one.signer for one in (hub, *(countersigners or ())))
            if hub.signer is None and (others or roles.repaired is None):
                raise ConfigError(f"key {hub.key.keyid[:8]}", got="its public part", expected="the private key")
            targets = self._signing.following(roles.targets, TARGETS)
            known.delegate(targets.signed, hub.key, others)
            if withdraw:
                taken = [release for release in listed if release.sequence in withdraw]
                known.withdraw(targets, taken, floor=known.last_sequence(roles))
            drafts[TARGETS] = self._signing.signed(targets, TARGETS, roles.root)
            self._some_signature(roles, TARGETS, drafts[TARGETS])
            if hub.signer is not None:
                drafts[REPAIRS] = self._signing.repaired(roles, targets)
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
        with self._storage.changing() as (roles, drafts):
            if not drafts:
                raise ConfigError(f"drafts of {self._folder}", got="none", do="there is nothing to sign")
            added = 0
            for role, draft in drafts.items():
                digest = sha256(draft.signed_bytes).hexdigest()
                if seen is not None and digest not in {one.digest for one in seen}:
                    raise ConfigError(f"draft of {role}", got="another one than was shown", do="look at it again")
                before = len(draft.signatures)
                self._signing.signed(draft, role, *delegators(roles, drafts, role))
                added += len(draft.signatures) - before
            published = self._submit(roles, drafts)
            if not added and not published:
                raise ConfigError(f"drafts of {', '.join(drafts)}", got="no key at hand that has not signed already")
            return published

    def discard(self) -> tuple[str, ...]:
        """Delete all drafts; the roles that had one."""
        with self._storage.changing() as (_, drafts):
            for role in DRAFTED:
                self._storage.drop_draft(role)
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
        with self._storage.changing() as (roles, drafts):
            for role in DRAFTED:
                metadata = roles.of(role)
                if metadata is None or role in drafts or not self._signing.due(role, metadata):
                    continue
                renewed = self._signing.signed(self._signing.following(metadata, role), role, roles.delegator(role))
                if known.signatures(roles.delegator(role), role, renewed):
                    drafts[role] = renewed
                elif self._signing.left(role, metadata) < 0.25:
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
        with disk_errors(self._folder):
            roles, drafts = self._storage.read()
        return status_of(roles, drafts, self._signing)

    # -- what a change consists of

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
        draft = self._signing.following(current, role)
        if role in drafts:
            draft.signed.targets = drafts[role].signed.targets
        sequence = known.last_sequence(roles, drafts) + 1
        path = f"{REPAIRED if role == REPAIRS else ''}{name}-{sequence}.tflite"
        target = TargetFile.from_data(path, content, ["sha256"])
        target.unrecognized_fields["custom"] = {
            CUSTOM: msgspec.to_builtins(msgspec.structs.replace(info, sequence=sequence))
        }
        draft.signed.targets[path] = target
        self._signing.signed(draft, role, roles.delegator(role))
        self._some_signature(roles, role, draft)
        self._storage.put_target(target.get_prefixed_paths()[0], content)
        if sidecar is not None and info.sidecar is not None:
            self._storage.put_target(sidecar_path(path, info.sidecar.sha256), sidecar)
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
            if not known.clashing(roles, chosen) and (files := self._signing.publication(roles, chosen)) is not None:
                published = tuple(chosen)
                break
        for role in names:
            if role not in published:
                self._storage.keep_draft(role, drafts[role])
        if files is not None:
            self._storage.publish(files)
        elif anyway:
            raise ConfigError("keys of timestamp and snapshot", got="too few at hand", do="give the hub's key folder")
        for role in published:
            self._storage.drop_draft(role)
        return published

    def _some_signature(self, roles: Roles, role: str, draft: Metadata[Any]) -> None:
        """Raises ConfigError when no key of the role is at hand."""
        if not known.signatures(roles.delegator(role), role, draft):
            expected = " or ".join(keyid[:8] for keyid in keyids(roles, role))
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


def _migrated(folder: Path, roles: Roles) -> Roles:
    if roles.repaired is None:
        raise ConfigError(
            f"repository {folder}",
            got="the layout of an earlier version, in which the hub holds every key",
            do="run edgeguard release repair-key once, then move the keys of root and targets off the hub",
        )
    return roles
