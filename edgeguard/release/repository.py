"""The hub's repository of signed models: TUF (the update framework) in its smallest form.

One ed25519 key for each of the four roles, consistent snapshots, no delegation. The folder is served over
HTTP as it stands: ``metadata/*.json`` and ``targets/<sha256>.<name>``. Private keys lie elsewhere, readable
by their owner only; the root key is needed to create the repository and to renew the root, and may be kept
offline in between. Rules enforced here:

* a release has a sequence number that only grows, and is never taken out again;
* files are written before the metadata that names them, ``timestamp.json`` last: a crash between any two
  writes leaves the repository as it was, because a client follows only what the timestamp names;
* each file appears whole or not at all: write beside it, fsync, rename, fsync the folder;
* what is on disk is what counts: it is read and verified against its own root before each change, so that
  nothing unsigned is signed on;
* a key is never overwritten.

Example:
    >>> repository = Repository.create(folder, keys, clock=now)  # doctest: +SKIP
    >>> repository.add(content, name="cnn", model_digest=m, guard_digest=g, replaces=None)  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from securesystemslib.signer import CryptoSigner
from tuf.api.exceptions import RepositoryError
from tuf.api.metadata import Metadata, MetaFile, Root, Snapshot, TargetFile, Targets, Timestamp

from edgeguard.errors import ConfigError, TrustError
from edgeguard.release.client import CUSTOM, TargetInfo

LOG = logging.getLogger(__name__)

EXPIRES: Mapping[str, timedelta] = {
    Root.type: timedelta(days=365),
    Targets.type: timedelta(days=90),
    Snapshot.type: timedelta(days=7),
    Timestamp.type: timedelta(days=1),
}
"""How long each role's metadata stays valid: the timestamp bounds how long old metadata can be replayed."""

Clock = Callable[[], datetime]
"""Gives the time now, with a time zone."""

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
S = TypeVar("S", Root, Targets, Snapshot, Timestamp)


@dataclass(frozen=True, kw_only=True)
class Release:
    """One signed model: its path among the targets, and what the metadata says of it.

    ``file_digest`` is the SHA-256 of the file; ``replaces`` the model digest that it is made to replace, None
    for a first release.
    """

    target: str
    sequence: int
    model_digest: str
    guard_digest: str
    file_digest: str
    replaces: str | None


@dataclass(frozen=True)
class _Roles:
    """The metadata of all four roles that belong together."""

    root: Metadata[Root]
    targets: Metadata[Targets]
    snapshot: Metadata[Snapshot]
    timestamp: Metadata[Timestamp]


class Repository:
    """A signed repository, made by ``create`` or ``open``. Its methods may be called from any thread."""

    def __init__(
        self, folder: Path, signers: Mapping[str, CryptoSigner], clock: Clock, expires: Mapping[str, timedelta]
    ) -> None:
        self._folder = folder
        self._signers = signers
        self._clock = clock
        self._expires = expires
        self._lock = threading.Lock()

    @classmethod
    def create(
        cls, folder: Path, keys: Path, *, clock: Clock, expires: Mapping[str, timedelta] = EXPIRES
    ) -> Repository:
        """Make four keys and an empty repository signed by them.

        Args:
            folder: what will be served.
            keys: where the private keys go; never inside ``folder``.
            clock: the time now.
            expires: life time of each role's metadata.

        Raises:
            ConfigError: a folder is not empty, the keys would be served, or the disk cannot be written.
        """
        served, hidden = folder.resolve(), keys.resolve()
        if served.is_relative_to(hidden) or hidden.is_relative_to(served):
            raise ConfigError(f"key folder {keys}", expected=f"a folder apart from {folder}, which is served")
        for path in (folder, keys):
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise ConfigError(
                    f"new repository {path}", got="something is there already", do="open it or choose a new folder"
                )
        signers = {role: CryptoSigner.generate_ed25519() for role in EXPIRES}
        root = Root(consistent_snapshot=True)
        for role, signer in signers.items():
            root.add_key(signer.public_key, role)
        roles = _Roles(Metadata(root), Metadata(Targets()), Metadata(Snapshot()), Metadata(Timestamp()))
        with _disk_errors(folder), _new_folder(keys) as new_keys, _new_folder(folder) as new_folder:
            for role, signer in signers.items():
                _write(new_keys / f"{role}.pem", signer.private_bytes, mode=0o600)
            (new_folder / "metadata").mkdir()
            (new_folder / "targets").mkdir()
            new_folder.chmod(0o755)
            cls(new_folder, signers, clock, expires)._publish(roles, set(EXPIRES))
        return cls.open(folder, keys, clock=clock, expires=expires)

    @classmethod
    def open(cls, folder: Path, keys: Path, *, clock: Clock, expires: Mapping[str, timedelta] = EXPIRES) -> Repository:
        """Open a repository, and verify that it is one: signatures, versions and hashes. It may have expired.

        Raises:
            ConfigError: there is none, or a key is missing, another repository's, or readable by others.
            TrustError: what is on disk is not what the keys signed.
        """
        with _disk_errors(folder):
            root = _load(folder / "metadata").root.signed
        signers = {}
        for role in EXPIRES:
            path = keys / f"{role}.pem"
            if role == Root.type and not path.exists():
                continue
            signers[role] = _signer(path)
            if signers[role].public_key.keyid not in root.roles[role].keyids:
                raise ConfigError(f"key {path}", got="the key of another repository", do="check the key folder")
        return cls(folder, signers, clock, expires)

    def root(self) -> bytes:
        """The trusted root for the devices: the first one, from which each later one can be reached.

        Raises:
            ConfigError: it cannot be read.
        """
        with _disk_errors(self._folder):
            return (self._folder / "metadata" / "1.root.json").read_bytes()

    def releases(self) -> tuple[Release, ...]:
        """All releases, oldest first.

        Raises:
            ConfigError: the disk cannot be read.
            TrustError: what is on disk is not what the keys signed.
        """
        with _disk_errors(self._folder):
            return _releases(_load(self._folder / "metadata").targets.signed)

    def add(self, content: bytes, *, name: str, model_digest: str, guard_digest: str, replaces: str | None) -> Release:
        """Sign a model and publish it under the next sequence number.

        Args:
            content: the guarded file.
            name: an id; the target is called ``<name>-<sequence>.tflite``.
            model_digest: of the new model.
            guard_digest: of its guard.
            replaces: model digest of the model that a device must run to take it; None for a first release.

        Raises:
            ConfigError: a bad name or digest, an empty file, or the disk cannot be written.
            TrustError: what is on disk is not what the keys signed.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"release name {name!r}", expected=f"an id like {_NAME.pattern}")
        for digest in (model_digest, guard_digest, *([] if replaces is None else [replaces])):
            if not _DIGEST.fullmatch(digest):
                raise ConfigError(f"digest {digest!r}", expected="64 hexadecimal digits")
        if not content:
            raise ConfigError(f"release {name}", got="an empty file", expected="a guarded model")
        with self._lock, _disk_errors(self._folder):
            roles = _load(self._folder / "metadata")
            sequence = max((release.sequence for release in _releases(roles.targets.signed)), default=0) + 1
            target = TargetFile.from_data(f"{name}-{sequence}.tflite", content, ["sha256"])
            info = TargetInfo(
                sequence=sequence, model_digest=model_digest, guard_digest=guard_digest, replaces=replaces
            )
            target.unrecognized_fields["custom"] = {CUSTOM: msgspec.to_builtins(info)}
            roles.targets.signed.targets[target.path] = target
            _write(self._folder / "targets" / target.get_prefixed_paths()[0], content)
            self._publish(roles, {Targets.type, Snapshot.type, Timestamp.type})
        release = _releases(roles.targets.signed)[-1]
        LOG.info("released %s, sequence %d", release.target, release.sequence)
        return release

    def renew(self) -> None:
        """Sign a fresh timestamp, and of the other roles those that have less than half of their life left.

        Called a few times within the life of a timestamp, it keeps the repository valid for ever.

        Raises:
            ConfigError: the disk cannot be written.
            TrustError: what is on disk is not what the keys signed.
        """
        with self._lock, _disk_errors(self._folder):
            roles = _load(self._folder / "metadata")
            now = self._now()
            due = {
                metadata.signed.type
                for metadata in (roles.root, roles.targets, roles.snapshot)
                if metadata.signed.expires - now < self._expires[metadata.signed.type] / 2
            }
            if Root.type in due and Root.type not in self._signers:
                LOG.warning("the root expires on %s and its key is not here to renew it", roles.root.signed.expires)
                due.remove(Root.type)
            self._publish(roles, due | {Snapshot.type, Timestamp.type} if due else {Timestamp.type})

    def _publish(self, roles: _Roles, changed: set[str]) -> None:
        """Sign and write the changed roles in the order in which a client may see them."""
        folder = self._folder / "metadata"
        if Root.type in changed:
            self._write_role(folder, roles.root)
        if Targets.type in changed:
            roles.snapshot.signed.meta["targets.json"] = self._write_role(folder, roles.targets)
        if Snapshot.type in changed:
            roles.timestamp.signed.snapshot_meta = self._write_role(folder, roles.snapshot)
        _write(folder / "timestamp.json", self._sign(roles.timestamp))

    def _write_role(self, folder: Path, metadata: Metadata[S]) -> MetaFile:
        content = self._sign(metadata)
        version = metadata.signed.version
        _write(folder / f"{version}.{metadata.signed.type}.json", content)
        return MetaFile.from_data(version, content, ["sha256"])

    def _sign(self, metadata: Metadata[S]) -> bytes:
        """Sign the next version of a role's metadata, or the first if there is none, valid from now."""
        role = metadata.signed.type
        if metadata.signatures:
            metadata.signed.version += 1
        metadata.signed.expires = self._now() + self._expires[role]
        metadata.sign(self._signers[role])
        return metadata.to_bytes()

    def _now(self) -> datetime:
        return self._clock().astimezone(timezone.utc)


def _releases(targets: Targets) -> tuple[Release, ...]:
    releases = []
    for target in targets.targets.values():
        info = msgspec.convert(target.custom[CUSTOM], TargetInfo)
        releases.append(
            Release(
                target=target.path,
                sequence=info.sequence,
                model_digest=info.model_digest,
                guard_digest=info.guard_digest,
                file_digest=target.hashes["sha256"],
                replaces=info.replaces,
            )
        )
    return tuple(sorted(releases, key=lambda release: release.sequence))


def _load(folder: Path) -> _Roles:
    """Read and verify the metadata that the timestamp names.

    Raises:
        ConfigError: there is no repository.
        TrustError: it is damaged or not signed by its own root.
    """
    path = folder / "1.root.json"
    if not path.exists():
        raise ConfigError(f"repository {folder.parent}", got="none there", do="create it first")
    try:
        root = _read(path, Root)
        _check(root, root)
        while (path := folder / f"{root.signed.version + 1}.root.json").exists():
            root = _successor(root, _read(path, Root))
        path = folder / "timestamp.json"
        timestamp = _check(_read(path, Timestamp), root)
        meta = timestamp.signed.snapshot_meta
        path = folder / f"{meta.version}.snapshot.json"
        snapshot = _check(_read(path, Snapshot, meta), root)
        meta = snapshot.signed.meta["targets.json"]
        path = folder / f"{meta.version}.targets.json"
        targets = _check(_read(path, Targets, meta), root)
        _releases(targets.signed)
    except (RepositoryError, ValueError, KeyError, TypeError) as error:
        raise TrustError(
            f"repository file {path}",
            got=f"{type(error).__name__} {error}",
            expected="what this repository's keys signed",
            do="restore the folder from a backup",
        ) from error
    return _Roles(root, targets, snapshot, timestamp)


def _read(path: Path, kind: type[S], meta: MetaFile | None = None) -> Metadata[S]:
    """One metadata file, not yet checked but for length and hash, where ``meta`` gives them, and kind."""
    content = path.read_bytes()
    if meta is not None:
        meta.verify_length_and_hashes(content)
    metadata = Metadata[S].from_bytes(content)
    if not isinstance(metadata.signed, kind):
        raise RepositoryError(f"of type {metadata.signed.type}")
    return metadata


def _check(metadata: Metadata[S], root: Metadata[Root]) -> Metadata[S]:
    root.signed.verify_delegate(metadata.signed.type, metadata.signed_bytes, metadata.signatures)
    return metadata


def _successor(root: Metadata[Root], newer: Metadata[Root]) -> Metadata[Root]:
    _check(newer, root)
    _check(newer, newer)
    if newer.signed.version != root.signed.version + 1:
        raise RepositoryError(f"of version {newer.signed.version}")
    return newer


def _signer(path: Path) -> CryptoSigner:
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
        if mode & 0o077:
            raise ConfigError(f"key {path}", got=f"mode {mode & 0o777:o}", expected="600", do=f"chmod 600 {path}")
        return CryptoSigner(load_pem_private_key(content, None))
    except OSError as error:
        raise ConfigError(
            f"key {path}", got=error.strerror, expected="a key file", do="check the key folder"
        ) from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"key {path}", got=str(error)[:200], expected="an unencrypted PKCS8 key") from error


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


def _write(path: Path, content: bytes, *, mode: int = 0o644) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
            file.flush()
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
