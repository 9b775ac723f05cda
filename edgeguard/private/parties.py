"""The three computing parties: their keys, and the file in which all participants hold the same three public ones.

Rules enforced here:

* a party makes its own keys and shows only the public halves; a key file is the owner's alone and never overwritten;
* there is no authority: each party trusts the certificates of the two others, one by one, and nobody else's;
* who takes part compares one digest, that of the three public descriptions, before anything is sent.
"""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID
from nacl.public import PrivateKey

from edgeguard.contract.private import PARTIES, Finding, Parties, Party, Signed
from edgeguard.contract.topics import check_fleet
from edgeguard.errors import ConfigError

__all__ = [
    "MAX_BYTES", "OWN", "PEERS", "PUBLIC", "SEALING_KEY", "TLS_KEY", "TOGETHER", "VALID",
    "Own", "Parties", "Party", "create", "join", "own", "read", "read_json", "sign",
]  # fmt: skip

OWN = "own.pem"
PUBLIC, TLS_KEY, SEALING_KEY, TOGETHER, PEERS = "public.json", "tls.key", "sealing.key", "parties.json", "peers.pem"
VALID = timedelta(days=825)
MAX_BYTES = 1 << 20
_EARLY = timedelta(days=1)

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Own:
    """A party as its own process sees it: its place among the three, and the files of its keys."""

    index: int
    parties: Parties
    folder: Path
    sealing: PrivateKey


def create(folder: Path, *, name: str, host: str, port: int, now: datetime) -> Party:
    """Make a party's keys, in a new folder of mode 0700, and its public description, ``public.json``.

    Raises:
        ConfigError: something is there already, or a value is out of range.
    """
    check_fleet(name, "party's name")
    if folder.exists() and any(folder.iterdir()):
        raise ConfigError(f"party's folder {folder}", got="something is there already", do="choose a new folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLY)
        .not_valid_after(now + VALID)
        # The others trust this one certificate, and nothing that its key signs.
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    sealing = PrivateKey.generate()
    party = Party(
        name=name,
        host=host,
        port=port,
        certificate=certificate.public_bytes(Encoding.PEM).decode(),
        sealing_key=bytes(sealing.public_key).hex(),
    )
    _write(folder / TLS_KEY, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    _write(folder / SEALING_KEY, bytes(sealing).hex().encode(), 0o600)
    _write(folder / PUBLIC, msgspec.json.encode(party), 0o644)
    return party


def join(folder: Path, public: tuple[Path, ...]) -> Parties:
    """Bring three public descriptions together, in the order given: ``parties.json``, the same for everybody.

    Args:
        folder: a party's own, or that of a device or an owner, who have no keys.
        public: the three ``public.json``.

    Raises:
        ConfigError: not three different parties, or the folder has joined others already.
    """
    if len(public) != PARTIES:
        raise ConfigError("parties", got=len(public), expected=f"{PARTIES} public descriptions")
    found = Parties(parties=tuple(read_json(path, Party) for path in public))
    for what in ("name", "certificate", "sealing_key"):
        if len({getattr(party, what) for party in found.parties}) != PARTIES:
            raise ConfigError("parties", got=f"the same {what} twice", expected="three that do not collude")
    for party in found.parties:
        _certificate(party)
    path = folder / TOGETHER
    if path.exists() and read(path) != found:
        raise ConfigError(f"parties {path}", got="others are there already", do="choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _write(path, msgspec.json.encode(found), 0o644)
    return found


def read(path: Path) -> Parties:
    """The three parties in a file. Raises ConfigError."""
    return read_json(path, Parties)


def read_json(path: Path, kind: type[T]) -> T:
    """A file of these packages, checked against its type. Raises ConfigError."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(MAX_BYTES), type=kind)
    except OSError as error:
        raise ConfigError(f"file {path}", got=error.strerror, do="check the path") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"file {path}", got=error, expected=f"a {kind.__name__.lower()} in JSON") from error


def own(folder: Path) -> Own:
    """A party's keys and its place among the three that its folder joined.

    Raises:
        ConfigError: a file is missing, readable by others, or the party is none of the three.
    """
    parties = read(folder / TOGETHER)
    mine = read_json(folder / PUBLIC, Party)
    if mine not in parties.parties:
        raise ConfigError(f"party {mine.name}", got=f"none of the three in {folder / TOGETHER}", do="join again")
    index = parties.parties.index(mine)
    _secret(folder / TLS_KEY)
    try:
        sealing = PrivateKey(bytes.fromhex(_secret(folder / SEALING_KEY).decode()))
    except (ValueError, TypeError) as error:  # libsodium's own says so of another length
        raise ConfigError(f"key {folder / SEALING_KEY}", got="no key", do="restore it from a backup") from error
    if bytes(sealing.public_key).hex() != mine.sealing_key:
        raise ConfigError(f"key {folder / SEALING_KEY}", got="another party's key", do="restore it from a backup")
    peers = "".join(p.certificate for p in parties.parties if p is not parties.parties[index])
    (folder / PEERS).write_text(peers)
    (folder / OWN).write_text(mine.certificate)
    return Own(index=index, parties=parties, folder=folder, sealing=sealing)


def sign(own: Own, finding: Finding) -> Signed:
    """What this party found, under its own key. Raises ConfigError where the key cannot be read."""
    path = own.folder / TLS_KEY
    try:
        key = load_pem_private_key(_secret(path), None)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"key {path}", got="no key", do="restore it from a backup") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"key {path}", got="another kind of key", do="restore it from a backup")
    signature = key.sign(finding.signed_bytes, ec.ECDSA(hashes.SHA256()))
    return Signed(finding=finding, party=own.index, signature=signature.hex())


def _certificate(party: Party) -> None:
    try:
        x509.load_pem_x509_certificate(party.certificate.encode())
    except ValueError as error:
        raise ConfigError(f"certificate of party {party.name}", got="no certificate in PEM") from error


def _secret(path: Path) -> bytes:
    try:
        mode = path.stat().st_mode
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise ConfigError(f"key {path}", got=f"mode {mode & 0o777:o}", expected="600", do=f"chmod 600 {path}")
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"key {path}", got=error.strerror, do="restore it from a backup") from error


def _write(path: Path, content: bytes, mode: int) -> None:
    """A new file; never over another."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
