"""What the configuration files of agent and hub share: TOML into frozen values, or one clear line on what is wrong.

Rules enforced here:

* an unknown key is refused by its name, so that a typing error never passes as a default; a key spelt alike is named;
* every number has a range and is finite;
* an error names file, key, what stands there and what may stand there, in TOML's words;
* the last part of a number's name tells its unit: ``linger_s``, ``max_mib``, ``per_minute``;
* relative paths count from the folder of the configuration file, not from where the program was started.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta, inspect

from edgeguard.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MAX_BYTES = 1 << 20
CREDENTIAL = "broker-password"
"""Name of the broker's password among a service's credentials."""
KEY_CREDENTIAL = "broker-key"
"""Name of the private key of the client's certificate among a service's credentials."""

NonEmpty = Annotated[str, Meta(min_length=1, max_length=2000)]
Port = Annotated[int, Meta(ge=1, le=65535)]


class Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: immutable, and a key that no field is named after is refused."""


class BrokerConfig(Section, frozen=True, kw_only=True):
    """``[broker]``: the MQTT broker, any that speaks MQTT 3.1.1 or 5.

    Attributes:
        host: name or address.
        port: TCP port.
        username: user name, where the broker asks for one.
        password_file: file whose first line is the password; it never stands in the configuration itself.
        ca: PEM file of the authority that signed the broker's certificate; TLS, 1.2 or later, is used when it is given.
        certificate: PEM file of this client's own certificate, for a broker that tells clients by it; needs key and ca.
        key: PEM file of that certificate's private key, without a pass phrase, readable to nobody else.
        keepalive_s: seconds without traffic after which both ends test the connection.
        protocol: version of MQTT; with 5 the broker says why it refuses a message. Agents and hub may differ.
    """

    host: Annotated[str, Meta(min_length=1, max_length=253)]
    port: Port = 1883
    username: NonEmpty | None = None
    password_file: Path | None = None
    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    keepalive_s: Annotated[int, Meta(ge=5, le=3600)] = 30
    protocol: Literal["3.1.1", "5"] = "3.1.1"


S = TypeVar("S", bound=Section)

_UNITS = {
    "s": "seconds",
    "seconds": "seconds",
    "days": "days",
    "mib": "MiB",
    "c": "degrees Celsius",
    "per_second": "per second",
    "per_minute": "per minute",
}
"""Endings of the names of numbers, and the units that they tell."""

_NAMES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "table"}
"""What TOML calls the types of values; dates and times are the others."""

_WANTED: dict[type[inspect.Type], type] = {
    inspect.StrType: str,
    inspect.BoolType: bool,
    inspect.IntType: int,
    inspect.FloatType: float,
    inspect.ListType: list,
    inspect.VarTupleType: list,
    inspect.DictType: dict,
    inspect.StructType: dict,
}


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
        ConfigError: an unknown or missing key, a wrong type, a value out of range or not finite.
    """
    folder = base.absolute()

    def to_path(wanted: type, value: object) -> object:
        if wanted is Path and isinstance(value, str) and value and "\0" not in value:
            return folder / value
        raise ValueError("Expected a path")

    explain = _Explain(name, kind)
    explain.finite(raw, "")
    try:
        return msgspec.convert(raw, kind, dec_hook=to_path)
    except (msgspec.ValidationError, RecursionError) as error:
        # msgspec decides. What it refused is looked up in the types, which say more than its message does.
        explain.table(raw, struct_type(kind), "")
        raise ConfigError(name, got=error, do="correct this key") from error


def struct_type(kind: type[msgspec.Struct]) -> inspect.StructType:
    """A section's fields, as msgspec sees them."""
    wanted = inspect.type_info(kind)
    assert isinstance(wanted, inspect.StructType)
    return wanted


def keys(wanted: inspect.StructType, prefix: str = "") -> Iterator[str]:
    """All keys that a table may have, dotted, those of the tables in it included: ``window``, ``window.inputs``."""
    for field in wanted.fields:
        yield prefix + field.encode_name
        inner = section_type(field.type)
        if inner:
            yield from keys(inner, f"{prefix}{field.encode_name}.")


def section_type(wanted: inspect.Type) -> inspect.StructType | None:
    """The section that a field is, or is an array of; None for a field that is a value."""
    wanted = _alternatives(wanted)[0]
    if isinstance(wanted, inspect.ListType | inspect.VarTupleType):
        wanted = wanted.item_type
    return wanted if isinstance(wanted, inspect.StructType) else None


def suggestion(key: str, known: Sequence[str]) -> str | None:
    """The known key that a dotted one was most probably meant to be.

    That of another section with the same name, as a key has that was written below the wrong header; else one of the
    same section that is spelt alike, else one of another.
    """
    section, _, last = re.sub(r"\[\d+\]", "", key).rpartition(".")
    here = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == section}
    anywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    if last in anywhere:
        return anywhere[last]
    for names in (here, anywhere):
        for near in difflib.get_close_matches(last.lower(), names, n=1):
            return names[near]
    return None


def type_name(wanted: inspect.Type) -> str:
    """A type in TOML's words: ``integer``, ``array of strings``, ``"litert" or "tflite-runtime"``."""
    if isinstance(wanted, inspect.UnionType):
        return " or ".join(map(type_name, _alternatives(wanted)))
    if isinstance(wanted, inspect.LiteralType):
        return " or ".join(f'"{value}"' if isinstance(value, str) else str(value) for value in wanted.values)
    if isinstance(wanted, inspect.ListType | inspect.VarTupleType):
        return f"array of {type_name(wanted.item_type)}s"
    if isinstance(wanted, inspect.CustomType):
        return wanted.cls.__name__.lower()
    return _NAMES.get(_WANTED.get(type(wanted), object), type(wanted).__name__)


def unit(name: str, wanted: inspect.Type) -> str | None:
    """The unit that the last part of a number's name tells; None for a count, a share and what is no number."""
    if not isinstance(_alternatives(wanted)[0], inspect.IntType | inspect.FloatType):
        return None
    return next((text for ending, text in _UNITS.items() if f"_{name}".endswith(f"_{ending}")), None)


def limits(wanted: inspect.Type) -> str | None:
    """The values that a type allows: ``1 to 65535``, ``above 0, at most 10``, ``1 to 253 characters``."""
    return " or ".join(filter(None, map(_limits, _alternatives(wanted)))) or None


def expected(name: str, wanted: inspect.Type) -> str:
    """What may stand in a field, on one line: ``number, above 0, at most 10 seconds``."""
    allowed, told = limits(wanted), unit(name, wanted)
    if allowed is None:
        return f"{type_name(wanted)} ({told})" if told else type_name(wanted)
    return f"{type_name(wanted)}, {allowed} {told}" if told else f"{type_name(wanted)}, {allowed}"


class _Explain:
    """Raises ConfigError for the first key of a document that is wrong."""

    def __init__(self, file: str, kind: type[Section]) -> None:
        self._file = file
        self._kind = kind

    def finite(self, value: object, key: str) -> None:
        """Infinity, which passes where only a lower bound is given, and NaN."""
        if isinstance(value, float) and not math.isfinite(value):
            raise self._error(key, value, "a finite number")
        if isinstance(value, dict | list):
            for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
                self.finite(inner, _join(key, name))

    def table(self, table: dict[str, Any], wanted: inspect.StructType, key: str) -> None:
        """A key that is unknown, a value that does not fit, a key that is missing, in this order."""
        fields = {field.encode_name: field for field in wanted.fields}
        for name in table:
            if name not in fields:
                full = _join(key, name)
                meant = suggestion(full, tuple(keys(struct_type(self._kind))))
                do = f"did you mean {meant}?" if meant else "remove this key"
                raise self._error(full, "an unknown key", f"one of {', '.join(fields)}", do)
        for name, value in table.items():
            self._value(value, fields[name].type, name, _join(key, name))
        for name, field in fields.items():
            if field.required and name not in table:
                raise self._error(_join(key, name), "nothing", expected(name, field.type), "add this key")

    def _value(self, value: object, wanted: inspect.Type, name: str, key: str) -> None:
        one = next((one for one in _alternatives(wanted) if _has_type(value, one)), None)
        if one is None:
            raise self._error(key, _with_type(value), expected(name, wanted))
        if not _within(value, one):
            raise self._error(key, _shown(value), expected(name, one))
        if isinstance(one, inspect.StructType) and isinstance(value, dict):
            self.table(value, one, key)
        if isinstance(one, inspect.ListType | inspect.VarTupleType) and isinstance(value, list):
            for index, item in enumerate(value):
                self._value(item, one.item_type, name, _join(key, index))

    def _error(self, key: str, got: object, expected: str, do: str = "correct this key") -> ConfigError:
        return ConfigError(f"{self._file}: {key}", got=got, expected=expected, do=do)


def _alternatives(wanted: inspect.Type) -> tuple[inspect.Type, ...]:
    """The types of a field but null, which TOML cannot write."""
    types = wanted.types if isinstance(wanted, inspect.UnionType) else (wanted,)
    return tuple(one for one in types if not isinstance(one, inspect.NoneType))


def _has_type(value: object, wanted: inspect.Type) -> bool:
    if isinstance(wanted, inspect.LiteralType):
        return type(value) in map(type, wanted.values)
    if isinstance(wanted, inspect.CustomType):
        return isinstance(value, str)
    needed = _WANTED.get(type(wanted), object)
    return type(value) is needed or needed is object or (needed is float and type(value) is int)


def _within(value: Any, wanted: inspect.Type) -> bool:
    """Whether a value of the right type keeps to the type's limits."""
    if isinstance(wanted, inspect.LiteralType):
        return value in wanted.values
    if isinstance(wanted, inspect.CustomType):
        return value != "" and "\0" not in value
    if isinstance(wanted, inspect.IntType | inspect.FloatType):
        return (
            (wanted.ge is None or value >= wanted.ge)
            and (wanted.gt is None or value > wanted.gt)
            and (wanted.le is None or value <= wanted.le)
            and (wanted.lt is None or value < wanted.lt)
        )
    if isinstance(wanted, inspect.StrType | inspect.ListType | inspect.VarTupleType):
        if not (wanted.min_length or 0) <= len(value) <= (wanted.max_length or math.inf):
            return False
        pattern = wanted.pattern if isinstance(wanted, inspect.StrType) else None
        return pattern is None or re.search(pattern, value) is not None
    return True


def _limits(wanted: inspect.Type) -> str:
    if isinstance(wanted, inspect.IntType | inspect.FloatType):
        return _span(wanted.ge, wanted.le, above=wanted.gt, below=wanted.lt)
    if isinstance(wanted, inspect.ListType | inspect.VarTupleType):
        length = _span(wanted.min_length, wanted.max_length)
        return f"{length} entries" if length else ""
    if isinstance(wanted, inspect.StrType):
        length = _span(wanted.min_length, wanted.max_length)
        parts = (f"{length} characters" if length else "", f"matching {wanted.pattern}" if wanted.pattern else "")
        return ", ".join(filter(None, parts))
    return ""


def _span(least: float | None, most: float | None, *, above: float | None = None, below: float | None = None) -> str:
    if least is not None and most is not None:
        return f"{least} to {most}"
    parts = (("at least", least), ("above", above), ("at most", most), ("below", below))
    return ", ".join(f"{word} {bound}" for word, bound in parts if bound is not None)


def _join(key: str, name: str | int) -> str:
    """A dotted key. Names that TOML would have quoted are quoted, so that one can say anything on a terminal."""
    if isinstance(name, int):
        return f"{key}[{name}]"
    part = name if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", name) else _shown(name)
    return f"{key}.{part}" if key else part


def _with_type(value: object) -> str:
    name = _NAMES.get(type(value), "date or time")
    return name if isinstance(value, list | dict) else f"{name} {_shown(value)}"


def _shown(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_broker(broker: BrokerConfig, name: str) -> None:
    """Raise ConfigError where a key of ``[broker]`` is given without one that it needs."""
    needed = (
        ("password_file", "username"),
        ("certificate", "key"),
        ("key", "certificate"),
        ("certificate", "ca"),
    )
    for given, other in needed:
        if getattr(broker, given) and not getattr(broker, other):
            raise ConfigError(name, got=f"broker.{given} without broker.{other}", do="give both or neither")


def check_topic(topic: str, name: str, key: str, *, is_filter: bool = False) -> None:
    """Raise ConfigError unless this may be published to, or subscribed to as a filter (MQTT 3.1.1, 4.7)."""
    levels = topic.split("/")
    wild = [level for level in levels if "+" in level or "#" in level]
    fits = is_filter and all(level in ("+", "#") for level in wild) and "#" not in levels[:-1]
    if "\0" in topic or len(topic.encode(errors="replace")) > 65535 or (wild and not fits):
        raise ConfigError(
            f"{name}: {key}",
            got=repr(topic[:200]),
            expected="a topic filter" if is_filter else "a topic without wildcards",
            do="correct this key",
        )


def password(broker: BrokerConfig) -> str | None:
    """The first line of the password file, None where none is named. Raises ConfigError where it cannot be read."""
    if broker.password_file is None:
        return None
    path = _credential(CREDENTIAL) or broker.password_file
    what = f"password file {path}"
    try:
        lines = path.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(what, got=error, expected="a text file") from error
    if not lines or not lines[0]:
        raise ConfigError(what, got="nothing", expected="a password in line 1")
    return lines[0]


def key_file(broker: BrokerConfig) -> Path | None:
    """Where the private key of the client's certificate lies, None where none is named."""
    return broker.key and (_credential(KEY_CREDENTIAL) or broker.key)


def _credential(name: str) -> Path | None:
    """The copy of a file that systemd has made for the service's user (``LoadCredential``, systemd.exec(5))."""
    path = Path(os.environ.get("CREDENTIALS_DIRECTORY", "")) / name
    return path if path.is_absolute() and path.is_file() else None
