"""The keys of a release repository: where they lie, how they are opened, and how new ones are made.

A key folder holds private keys as ``<role>-<first 8 digits of the key's id>.pem``, and references to keys that lie
elsewhere as ``....json``. What names a key, on the command line and in a reference:

    new                         a new ed25519 key, written into the folder
    /path/to/key.pem            a private key in a file: PKCS8, with or without a passphrase
    /path/to/public.pem         somebody else's public key: it can be trusted, not signed with
    env:NAME                    a private key in the environment variable NAME, as PEM
    hsm:2?label=TOKEN           a key on a PKCS#11 token; ``PYKCS11LIB`` names the token's library

Rules enforced here:

* a file with a private key is its owner's alone (mode 600), appears whole or not at all, and is never overwritten.
  Where the file system keeps no modes, as FAT, none is written;
* a passphrase comes from an environment variable, from the file that ``<VARIABLE>_FILE`` names, or from a question,
  never from a command line; one that is too short to hold against a search is refused for new keys;
* no key and no passphrase is part of a message.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import parse_qsl

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
    load_pem_public_key,
)
from securesystemslib.exceptions import UnsupportedLibraryError
from securesystemslib.signer import CryptoSigner, HSMSigner, Key, Signer, SSlibKey

from edgeguard.errors import ConfigError

HUB_PASSPHRASE = "EDGEGUARD_HUB_PASSPHRASE"
"""The variable with the passphrase of the hub's keys."""
OFFLINE_PASSPHRASE = "EDGEGUARD_OFFLINE_PASSPHRASE"
"""The variable with the passphrase of the offline keys, which the hub never knows."""
PIN = "EDGEGUARD_TOKEN_PIN"
"""The variable with a token's PIN."""
MIN_PASSPHRASE = 12

Ask = Callable[[str], str]


@dataclass(frozen=True, kw_only=True)
class Secrets:
    """Where passphrases and PINs come from.

    Args:
        environ: the environment.
        ask: puts a question to a person; None where there is nobody to ask.
    """

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    ask: Ask | None = None

    def find(self, variable: str) -> str | None:
        """What the variable, or the file that ``<variable>_FILE`` names, says; None where neither is set.

        Raises:
            ConfigError: the file cannot be read.
        """
        value = self.environ.get(variable)
        path = self.environ.get(f"{variable}_FILE")
        if value is None and path is not None:
            try:
                value = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"{variable}_FILE={path}", got=error, expected="a file with a passphrase") from error
        return value or None

    def get(self, variable: str, what: str) -> str:
        """The secret for ``what``, asked for where it is not set. Raises ConfigError where nobody can be asked."""
        value = self.find(variable)
        if value is None and self.ask is not None:
            value = self.ask(what)
        if not value:
            raise ConfigError(what, got="none", do=f"set {variable}, or {variable}_FILE to a file that holds it")
        return value


@dataclass(frozen=True, kw_only=True)
class Obtained:
    """A key that somebody named: its public part, and what signs with it, None where only that is known."""

    key: Key
    signer: Signer | None


def check_passphrase(passphrase: str) -> bytes:
    """The passphrase for a new key. Raises ConfigError when it is too short."""
    if len(passphrase) < MIN_PASSPHRASE:
        raise ConfigError("passphrase", got=f"{len(passphrase)} characters", expected=f"at least {MIN_PASSPHRASE}")
    return passphrase.encode()


def obtain(
    name: str, role: str, folder: Path, *, secrets: Secrets, variable: str, passphrase: bytes | None
) -> Obtained:
    """The key that ``name`` names, kept in ``folder`` so that :func:`load` finds it.

    Args:
        name: as in this module's docstring.
        role: what it is for; the first part of the file's name.
        folder: the key folder.
        secrets: passphrases of keys that exist.
        variable: the variable of these.
        passphrase: encrypts a new key's file; None leaves it plain.

    Raises:
        ConfigError: there is no such key, or it cannot be used or written.
    """
    if name == "new":
        return _new(role, folder, passphrase)
    signer: Signer
    if name.startswith("hsm:"):
        uri, public = _token(name, secrets)
        signer = _on_token(uri, public, secrets)
    elif name.startswith("env:"):
        uri, signer = name, _in_environment(name, secrets, variable)
    else:
        path = Path(name).absolute()
        content = _read(path)
        if b"PUBLIC KEY" in content:
            return Obtained(key=_public(path, content), signer=None)
        uri, signer = f"file:{path}", _in_file(path, secrets, variable)
    key = cast(SSlibKey, signer.public_key)
    reference = {"uri": uri, "keyid": key.keyid, "public": key.to_dict()}
    _keep(folder / f"{role}-{key.keyid[:8]}.json", json.dumps(reference, indent=1).encode())
    return Obtained(key=key, signer=signer)


def load(folder: Path, *, secrets: Secrets | None = None, variable: str = HUB_PASSPHRASE) -> tuple[Signer, ...]:
    """All keys of a folder, or the one of a file.

    Raises:
        ConfigError: there is none, or one is readable by others or cannot be opened.
    """
    secrets = secrets or Secrets()
    try:
        paths = (
            sorted(path for path in folder.iterdir() if path.suffix in (".pem", ".json"))
            if folder.is_dir()
            else [folder]
        )
    except OSError as error:
        raise ConfigError(f"key folder {folder}", got=error.strerror, expected="a folder to read") from error
    if not paths:
        raise ConfigError(f"key folder {folder}", got="no keys there", do="name the folder that `release init` made")
    return tuple(
        _reference(path, secrets, variable) if path.suffix == ".json" else _in_file(path, secrets, variable)
        for path in paths
    )


def _new(role: str, folder: Path, passphrase: bytes | None) -> Obtained:
    private = Ed25519PrivateKey.generate()
    signer = CryptoSigner(private)
    protection = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    content = private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, protection)
    _keep(folder / f"{role}-{signer.public_key.keyid[:8]}.pem", content)
    return Obtained(key=signer.public_key, signer=signer)


def _keep(path: Path, content: bytes) -> None:
    """Write a file that is not there yet: whole, on disk, its owner's alone."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            shared = os.fstat(file.fileno()).st_mode & 0o077
        try:
            if shared:
                raise ConfigError(
                    f"key {path}", got="a file system that cannot keep it from other users", do="use one like ext4"
                )
            os.close(os.open(path, os.O_CREAT | os.O_EXCL, 0o600))  # never over what is there; FAT has no links
            try:
                temporary.replace(path)
            except OSError:
                path.unlink()
                raise
        finally:
            temporary.unlink(missing_ok=True)
    except FileExistsError as error:
        raise ConfigError(f"key {path}", got="one is there already", do="choose another folder") from error
    except OSError as error:
        raise ConfigError(f"key {path}", got=error.strerror, expected="a folder to write to") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"key {path}", got=error.strerror, expected="a key file", do="check the path") from error


def _in_file(path: Path, secrets: Secrets, variable: str) -> CryptoSigner:
    content = _read(path)
    mode = path.stat().st_mode
    if mode & 0o077:
        raise ConfigError(f"key {path}", got=f"mode {mode & 0o777:o}", expected="600", do=f"chmod 600 {path}")
    return _opened(f"key {path}", content, secrets, variable)


def _in_environment(uri: str, secrets: Secrets, variable: str) -> CryptoSigner:
    content = secrets.environ.get(uri.removeprefix("env:"))
    if content is None:
        raise ConfigError(f"key {uri}", got="no such environment variable", expected="a private key as PEM")
    return _opened(f"key {uri}", content.encode(), secrets, variable)


def _opened(what: str, content: bytes, secrets: Secrets, variable: str) -> CryptoSigner:
    """The key in a PEM text, opened with its passphrase where it has one."""
    passphrase = secrets.get(variable, f"passphrase of {what}").encode() if b"ENCRYPTED" in content else None
    try:
        return CryptoSigner(load_pem_private_key(content, passphrase))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if passphrase is not None:
            raise ConfigError(what, got="not opened by this passphrase", do=f"check {variable}") from error
        raise ConfigError(what, got=str(error)[:200], expected="a PKCS8 key: ed25519, ECDSA or RSA") from error


def _public(path: Path, content: bytes) -> SSlibKey:
    try:
        return SSlibKey.from_crypto(load_pem_public_key(content))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"key {path}", got=str(error)[:200], expected="a public key as PEM") from error


def _reference(path: Path, secrets: Secrets, variable: str) -> Signer:
    content = _read(path)
    try:
        known: dict[str, Any] = json.loads(content)
        uri, key = str(known["uri"]), SSlibKey.from_dict(known["keyid"], dict(known["public"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"key {path}", got=f"{type(error).__name__} {error}", expected="a key's reference") from error
    if uri.startswith("hsm:"):
        return _on_token(uri, key, secrets)
    if uri.startswith("env:"):
        signer = _in_environment(uri, secrets, variable)
    else:
        signer = _in_file(Path(uri.removeprefix("file:")), secrets, variable)
    if signer.public_key.keyid != key.keyid:
        raise ConfigError(f"key {path}", got=f"another key at {uri}", expected=f"the key {key.keyid[:8]}")
    return signer


def _on_token(uri: str, key: SSlibKey, secrets: Secrets) -> Signer:
    try:
        return HSMSigner.from_priv_key_uri(uri, key, lambda _: secrets.get(PIN, "token's PIN"))
    except (UnsupportedLibraryError, ValueError) as error:
        raise _token_error(uri, error) from error


def _token(uri: str, secrets: Secrets) -> tuple[str, SSlibKey]:
    """The full address and the public key of a key on a token."""
    number, _, query = uri.removeprefix("hsm:").partition("?")
    label = dict(parse_qsl(query)).get("label")
    if number and not number.isdecimal():
        raise ConfigError(f"key {uri}", expected="hsm:NUMBER or hsm:NUMBER?label=TOKEN")
    try:
        return HSMSigner.import_(int(number) if number else None, label, lambda _: secrets.get(PIN, "token's PIN"))
    except ConfigError:
        raise
    except Exception as error:  # each library of a token has errors of its own
        raise _token_error(uri, error) from error


def _token_error(uri: str, error: Exception) -> ConfigError:
    if isinstance(error, UnsupportedLibraryError):
        return ConfigError(f"key {uri}", got=str(error), do="pip install 'edgeguard[hsm]'")
    return ConfigError(
        f"key {uri}",
        got=str(error) or type(error).__name__,
        do="set PYKCS11LIB to the token's PKCS#11 library, and check label, key number and PIN",
    )
