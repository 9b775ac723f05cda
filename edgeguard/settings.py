"""What the configuration files of agent and hub share: TOML into frozen values, or one clear line on what is wrong.

Rules enforced here:

* an unknown key is refused by its name, so that a typing error never passes as a default;
* every number has a range;
* relative paths count from the folder of the configuration file, not from where the program was started.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec
from msgspec import Meta

from edgeguard.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20

NonEmpty = Annotated[str, Meta(min_length=1, max_length=2000)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, and a key that no field is named after is refused."""


class BrokerConfig(Section, frozen=True, kw_only=True):
    """``[broker]``: the MQTT broker, any that speaks MQTT 3.1.1.

    Attributes:
        host: name or address.
        port: TCP port.
        username: user name, where the broker asks for one.
        password_file: file whose first line is the password; it never stands in the configuration itself.
        ca: PEM file of the authority that signed the broker's certificate; TLS is used when it is given.
        keepalive_s: seconds without traffic after which both ends test the connection.
    """

    host: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Port = 1883
    username: NonEmpty | None = None
    password_file: Path | None = None
    ca: Path | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30


S = TypeVar("S", bound=Section)


def read_toml(path: Path) -> dict[str, Any]:
    """The document in a configuration file.

    Raises:
        ConfigError: it cannot be read, is too large or is not TOML.
    """
    what = f"configuration {path}"
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(what, got=error.strerror, expected="a readable TOML file", do="check the path") from error
    if len(content) > _MAX_BYTES:
        raise ConfigError(what, got="more than 1 MiB", expected="a TOML file")
    try:
        return tomllib.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(what, got=error, expected="TOML", do="correct the file") from error


def convert(raw: dict[str, Any], kind: type[S], *, base: Path, name: str) -> S:
    """Check a document against a configuration.

    Args:
        raw: the TOML document.
        kind: the configuration's struct.
        base: folder that relative paths count from.
        name: what to call the file in an error.

    Raises:
        ConfigError: an unknown or missing key, a wrong type or a value out of range.
    """
    folder = base.absolute()

    def to_path(wanted: type, value: object) -> object:
        if wanted is Path and isinstance(value, str) and value and "\0" not in value:
            return folder / value
        raise ValueError("Expected a path")

    try:
        return msgspec.convert(raw, kind, dec_hook=to_path)
    except (msgspec.ValidationError, RecursionError) as error:
        raise ConfigError(name, got=error, do="correct this key") from error


def check_broker(broker: BrokerConfig, name: str) -> None:
    """Raise ConfigError where a password is named without a user."""
    if broker.password_file and not broker.username:
        raise ConfigError(name, got="broker.password_file without broker.username", do="give both or neither")


def password(broker: BrokerConfig) -> str | None:
    """The first line of the password file, None where none is named. Raises ConfigError where it cannot be read."""
    if broker.password_file is None:
        return None
    what = f"password file {broker.password_file}"
    try:
        lines = broker.password_file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(what, got=error, expected="a text file") from error
    if not lines or not lines[0]:
        raise ConfigError(what, got="nothing", expected="a password in line 1")
    return lines[0]
