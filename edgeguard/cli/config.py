"""``edgeguard config``: what may stand in a configuration file, and whether a file is right.

Rules enforced here:

* all that is told of a key stands in the configuration's own struct: its type and default, the range in the type, the
  unit in the name, and what it is for in the ``Attributes:`` of the docstring, one ``name: text`` each;
* what is told of a section is its docstring above that, without the ``[name]`` that it may begin with;
* the example that is printed is a TOML file. Defaults stand in it behind ``#``, so that a later release may change
  them; required keys are left empty, so that an example that nobody filled in is refused.
"""

from __future__ import annotations

import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import typer
from msgspec import NODEFAULT
from msgspec.inspect import Field

from edgeguard.errors import ConfigError

if TYPE_CHECKING:
    from edgeguard.settings import Section

_WIDTH = 120


class Daemon(str, Enum):
    """Who has a configuration file."""

    AGENT = "agent"
    HUB = "hub"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One key of a configuration file, or one section.

    Attributes:
        key: dotted, as in ``window.seconds``.
        what: what it is for.
        type: in TOML's words; a section is a ``table`` or an ``array of tables``.
        unit: of a number, where it has one.
        range: the values that are allowed; None where the type says it all.
        required: whether it must be given; a key of a section, whether it must be given where the section is.
        default: what holds without it; None where nothing does. A section that is there without being written has {}.
    """

    key: str
    what: str
    type: str
    unit: str | None
    range: str | None
    required: bool
    default: object


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(help="Explain the configuration files of agent and hub, and check one.", no_args_is_help=True)
    app.add_typer(group, name="config", epilog="Example: edgeguard config explain agent > agent.toml")

    @group.command(epilog="Example: edgeguard config explain agent window.seconds")
    def explain(
        daemon: Daemon = typer.Argument(Daemon.AGENT, help="Whose configuration."),
        key: str | None = typer.Argument(None, help="A key or a section, such as window.seconds; all by default."),
        as_json: bool = typer.Option(False, "--json", help="Print one JSON array with an object per key."),
    ) -> None:
        """Print what may stand in a configuration file, as a TOML file to fill in: type, range, unit and default."""
        found = select(tuple(rows(kind(daemon))), key)
        typer.echo(json.dumps([asdict(row) for row in found]) if as_json else example(found), nl=as_json)

    @group.command(epilog="Example: edgeguard config check /etc/edgeguard/agent.toml")
    def check(file: Path = typer.Argument(help="A TOML file of an agent or a hub.")) -> None:
        """Check a configuration file alone: no model, folder or broker that it names is looked at."""
        from edgeguard import settings
        from edgeguard.agent import config as agent
        from edgeguard.hub import config as hub

        raw = settings.read_toml(file)
        daemon = whose(raw)
        parse = agent.parse if daemon is Daemon.AGENT else hub.parse
        parse(raw, base=file.parent, name=f"{file} (of {_a(daemon)})")
        typer.echo(f"{file}: a valid configuration of {_a(daemon)}")


def kind(daemon: Daemon) -> type[Section]:
    """The configuration's struct."""
    from edgeguard.agent.config import AgentConfig
    from edgeguard.hub.config import HubConfig

    return AgentConfig if daemon is Daemon.AGENT else HubConfig


def whose(raw: dict[str, object]) -> Daemon:
    """Whether a document is an agent's or a hub's, by which of the two knows more of its keys.

    What an agent's file may hold, but need not, is not enough in a tie: the shortest file of a hub has no key of its
    own.
    """
    known = {daemon: set(kind(daemon).__struct_fields__) for daemon in Daemon}
    return Daemon.AGENT if len(known[Daemon.AGENT] & raw.keys()) > len(known[Daemon.HUB] & raw.keys()) else Daemon.HUB


def rows(section: type[msgspec.Struct], prefix: str = "") -> Iterator[Row]:
    """All keys of a configuration in the order of a TOML file: the plain keys of a table, then the tables in it."""
    from edgeguard import settings

    told = attributes(section)
    inner = []
    for field in settings.struct_type(section).fields:
        nested = settings.section_type(field.type)
        if nested:
            inner.append((field, nested.cls))
            continue
        yield Row(
            key=prefix + field.encode_name,
            what=told.get(field.name, ""),
            type=settings.type_name(field.type),
            unit=settings.unit(field.name, field.type),
            range=settings.limits(field.type),
            required=field.required,
            default=_plain(_default(field)),
        )
    for field, nested_kind in inner:
        default = _default(field)
        key = prefix + field.encode_name
        yield Row(
            key=key,
            what=_summary(nested_kind),
            type=settings.type_name(field.type),
            unit=None,
            range=settings.limits(field.type),
            required=field.required,
            default={} if isinstance(default, nested_kind) else _plain(default),
        )
        yield from rows(nested_kind, f"{key}.")


def attributes(section: type[msgspec.Struct]) -> dict[str, str]:
    """What a section's docstring says of each field, under ``Attributes:``."""
    _, _, listed = inspect.cleandoc(section.__doc__ or "").partition("\nAttributes:\n")
    block = textwrap.dedent(re.split(r"^\S", listed, maxsplit=1, flags=re.MULTILINE)[0])
    items = re.findall(r"^(\w+): ((?:.*\n?)(?:[ \n].*\n?)*)", block, flags=re.MULTILINE)
    return {name: _one_line(text) for name, text in items}


def select(found: Sequence[Row], key: str | None) -> Sequence[Row]:
    """The rows of one key, or of one section and all below it.

    Raises:
        ConfigError: there is no such key.
    """
    from edgeguard.settings import suggestion

    if key is None:
        return found
    chosen = [row for row in found if row.key == key or row.key.startswith(f"{key}.")]
    if not chosen:
        meant = suggestion(key, [row.key for row in found])
        raise ConfigError(
            f"key {key}", got="an unknown key", do=f"did you mean {meant}?" if meant else "name none to see all"
        )
    sections = {row.key for row in found if _is_section(row)}
    above = {parent for parent in sections if key.startswith(f"{parent}.")}
    return [row for row in found if row.key in above or row in chosen]


def example(found: Sequence[Row]) -> str:
    """A TOML file with a comment for each row."""
    off: set[str] = set()
    lines: list[str] = []
    for row in found:
        above, _, name = row.key.rpartition(".")
        if _is_section(row):
            header = f"[[{row.key}]]" if row.type.startswith("array") else f"[{row.key}]"
            written = above not in off and (row.required or row.default == {})
            if not written:
                off.add(row.key)
            lines += ["", *_comment(f"{row.what} {_presence(row)}"), header if written else f"#{header}"]
        else:
            written = above not in off and row.required
            line = f"{name} = {_toml(row.default)}"
            lines += ["", *_comment(row.what), *_comment(_facts(row)), line if written else f"#{line}"]
    return "\n".join(lines[1:]) + "\n"


def _facts(row: Row) -> str:
    allowed = ", ".join(part for part in (row.type, row.range) if part)
    if row.unit:
        allowed += f" {row.unit}" if row.range else f" ({row.unit})"
    if row.required:
        return f"{allowed}; required"
    return f"{allowed}; {'no default' if row.default is None else f'default {_toml(row.default)}'}"


def _presence(row: Row) -> str:
    if row.required:
        return "Required."
    return "" if row.default == {} else "Not there unless written."


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, _WIDTH - 2, break_long_words=False, break_on_hyphens=False)]


def _is_section(row: Row) -> bool:
    return row.type in ("table", "array of tables")


def _default(field: Field) -> object:
    return field.default if field.default_factory is NODEFAULT else field.default_factory()


def _plain(default: object) -> object:
    """A default as TOML and JSON can write it."""
    if default is NODEFAULT:
        return None
    if isinstance(default, tuple | list):
        return [_plain(one) for one in default]
    return str(default) if isinstance(default, Path) else default


def _toml(value: object) -> str:
    """A value in TOML, whose strings, numbers and arrays are written as in JSON; nothing is written as empty."""
    return json.dumps("" if value is None else value, ensure_ascii=False)


def _summary(section: type[msgspec.Struct]) -> str:
    above, _, _ = inspect.cleandoc(section.__doc__ or "").partition("\nAttributes:\n")
    return _one_line(re.sub(r"^``\[+[\w.]+\]+``: ", "", above))


def _one_line(text: str) -> str:
    return " ".join(text.replace("``", "").split())


def _a(daemon: Daemon) -> str:
    return "an agent" if daemon is Daemon.AGENT else "a hub"
