"""Configuration explains itself: what an error says, and what ``edgeguard config`` prints."""

from __future__ import annotations

import datetime
import json
import math
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from msgspec import Meta
from typer.testing import CliRunner

from edgeguard import settings
from edgeguard.agent import config as agent
from edgeguard.cli import config as command
from edgeguard.cli.config import Daemon
from edgeguard.errors import ConfigError
from edgeguard.hub import config as hub
from edgeguard.settings import NonEmpty, Section
from firmware_bridge import systemd

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REQUIRED: dict[Daemon, dict[str, str]] = {
    Daemon.AGENT: {
        "fleet": "demo",
        "device": "camera-1",
        "model": "m.tflite",
        "state_dir": "state",
        "broker.host": "127.0.0.1",
        "sources.folder": "",
        "sources.folder.path": "inbox",
    },
    Daemon.HUB: {"fleet": "demo", "state_dir": "hub", "broker.host": "127.0.0.1"},
}
"""What an operator must fill in, dotted; a section is named with nothing."""
PARSE = {Daemon.AGENT: agent.parse, Daemon.HUB: hub.parse}


def document(daemon: Daemon) -> dict[str, Any]:
    """The shortest document."""
    raw: dict[str, Any] = {}
    for key, value in REQUIRED[daemon].items():
        *above, last = key.split(".")
        table = raw
        for name in above:
            table = table.setdefault(name, {})
        table[last] = value or {}
    return raw


class Inner(Section, frozen=True, kw_only=True):
    """``[[many]]``: some things.

    In two paragraphs.

    Attributes:
        wait_s: how long,
            in two lines.
        names: who.
    """

    wait_s: Annotated[float, Meta(ge=0)]
    names: Annotated[tuple[NonEmpty, ...], Meta(max_length=2)] = ("a", "b")


class Whole(Section, frozen=True, kw_only=True):
    """The whole file.

    Attributes:
        size_mib: how much.
        port: where.
        on: whether.
        place: a file.
        level: how loud.
    """

    size_mib: Annotated[int, Meta(ge=1, le=64)]
    port: Annotated[int, Meta(ge=0, le=255)] | NonEmpty = 0
    on: bool = False
    place: Path | None = None
    level: float = 1.0
    many: tuple[Inner, ...] = ()
    broker: settings.BrokerConfig | None = None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (
            {"size_mb": 1},
            "size_mb; got an unknown key; expected one of size_mib, port, on, place, level, many, broker; "
            "did you mean size_mib?",
        ),
        ({"size_mib": 1, "broker": {"hots": "h"}}, r"broker.hots; got an unknown key; .*; did you mean broker.host?"),
        ({"size_mib": 1, "broker": {"place": "p"}}, r"broker.place; got an unknown key; .*; did you mean place?"),
        ({"size_mib": 1, "many": [{"wait": 1}]}, r"many[0].wait; got an unknown key; .*; did you mean many.wait_s?"),
        ({"zzz": 1}, "zzz; got an unknown key; .*; remove this key"),
        ({"a\x1b[2J\n": 1}, r"'a\x1b[2J\n'; got an unknown key; .*; remove this key"),
        ({}, "size_mib; got nothing; expected integer, 1 to 64 MiB; add this key"),
        ({"size_mib": 0}, "size_mib; got 0; expected integer, 1 to 64 MiB; correct this key"),
        ({"size_mib": 65}, "size_mib; got 65; expected integer, 1 to 64 MiB; correct this key"),
        ({"size_mib": 1.5}, "size_mib; got number 1.5; expected integer, 1 to 64 MiB; correct this key"),
        ({"size_mib": True}, "size_mib; got boolean true; expected integer, 1 to 64 MiB; correct this key"),
        ({"size_mib": "1"}, "size_mib; got string '1'; expected integer, 1 to 64 MiB; correct this key"),
        ({"size_mib": [1]}, "size_mib; got array; expected integer, 1 to 64 MiB; correct this key"),
        (
            {"size_mib": datetime.date(2030, 1, 2)},
            r"size_mib; got date or time datetime.date(2030, 1, 2); expected integer, 1 to 64 MiB; correct this key",
        ),
        ({"size_mib": 1, "on": 1}, "on; got integer 1; expected boolean; correct this key"),
        ({"size_mib": 1, "level": "l" * 99}, "level; got string '" + "l" * 56 + "...; expected number; .*"),
        ({"size_mib": 1, "level": math.inf}, "level; got inf; expected a finite number; correct this key"),
        ({"size_mib": 1, "level": math.nan}, "level; got nan; expected a finite number; correct this key"),
        ({"size_mib": 1, "place": ""}, "place; got ''; expected path; correct this key"),
        ({"size_mib": 1, "place": "a\0"}, r"place; got 'a\x00'; expected path; correct this key"),
        ({"size_mib": 1, "port": 256}, "port; got 256; expected integer, 0 to 255; correct this key"),
        ({"size_mib": 1, "port": ""}, "port; got ''; expected string, 1 to 2000 characters; correct this key"),
        (
            {"size_mib": 1, "port": 1.0},
            "port; got number 1.0; expected integer or string, 0 to 255 or 1 to 2000 characters; correct this key",
        ),
        ({"size_mib": 1, "many": {}}, "many; got table; expected array of tables; correct this key"),
        ({"size_mib": 1, "many": [7]}, "many[0]; got integer 7; expected table; correct this key"),
        (
            {"size_mib": 1, "many": [{"wait_s": 1}, {"wait_s": -1}]},
            "many[1].wait_s; got -1; expected number, at least 0 seconds; correct this key",
        ),
        (
            {"size_mib": 1, "many": [{"wait_s": 1, "names": ["a", "b", "c"]}]},
            "many[0].names; got ['a', 'b', 'c']; expected array of strings, at most 2 entries; correct this key",
        ),
        ({"size_mib": 1, "broker": {}}, "broker.host; got nothing; expected string, 1 to 253 characters; add this key"),
    ],
)
def test_an_error_names_file_key_what_stands_there_and_what_may(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings.convert(raw, Whole, base=Path(), name="x.toml")
    wanted = re.escape(f"x.toml: {message}").replace(re.escape(".*"), ".*")
    assert re.fullmatch(wanted, str(caught.value))


def test_a_literal_is_refused_with_its_values() -> None:
    raw = document(Daemon.AGENT) | {"runtime": {"name": "tensorflow"}}
    with pytest.raises(ConfigError, match=r'runtime\.name; got .*; expected "litert" or "tflite-runtime"'):
        agent.parse(raw, base=Path())


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("window.secnds", "window.seconds"),
        ("windw", "window"),
        ("seconds", "window.seconds"),
        ("broker.linger_s", "linger_s"),
        ("broker.Port", "broker.port"),
        ("many[3].seconds", "window.seconds"),
        ("completely.else", None),
    ],
)
def test_a_suggestion_is_a_key_of_that_name_elsewhere_or_one_spelt_alike(key: str, meant: str | None) -> None:
    known = ("linger_s", "window", "window.seconds", "window.inputs", "broker", "broker.port", "broker.host")
    assert settings.suggestion(key, known) == meant


@cache
def rows(daemon: Daemon) -> dict[str, command.Row]:
    return {row.key: row for row in command.rows(command.kind(daemon))}


values = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-1, 100),
    st.floats(),
    st.text(max_size=5),
    st.just("1"),
    st.just({}),
    st.lists(st.integers(0, 1), max_size=2),
)


@pytest.mark.parametrize("daemon", Daemon)
@given(data=st.data())
def test_whatever_msgspec_refuses_is_refused_at_the_key_that_is_wrong(daemon: Daemon, data: st.DataObject) -> None:
    kind: type[Section] = command.kind(daemon)
    raw = document(daemon)
    sections = {key for key, row in rows(daemon).items() if row.type == "table"} | {""}
    section = data.draw(st.sampled_from(sorted(sections)))
    table = raw
    for name in filter(None, section.split(".")):
        table = table.setdefault(name, {})
    names = [key.rpartition(".")[2] for key in rows(daemon) if key.rpartition(".")[0] == section]
    name = data.draw(st.sampled_from([*names, "nothing_like_it"]))
    value = table[name] = data.draw(values)
    try:
        msgspec.convert(raw, kind, dec_hook=to_path)
        accepted = not isinstance(value, float) or math.isfinite(value)
    except msgspec.ValidationError:
        accepted = False
    try:
        settings.convert(raw, kind, base=Path(), name="x.toml")
    except ConfigError as error:
        assert not accepted
        known = [*rows(daemon), f"{section}.nothing_like_it".lstrip(".")]
        assert error.what.removeprefix("x.toml: ").partition("[")[0] in known
        assert error.expected is not None
    else:
        assert accepted


def to_path(_: type, value: object) -> Path:
    if isinstance(value, str) and value and "\0" not in value:
        return Path(value)
    raise ValueError


@pytest.mark.parametrize("daemon", Daemon)
class TestEveryKey:
    def test_says_what_it_is_for(self, daemon: Daemon) -> None:
        assert [key for key, row in rows(daemon).items() if len(row.what) < 5] == []

    def test_that_is_a_number_says_its_range(self, daemon: Daemon) -> None:
        numbers = [row for row in rows(daemon).values() if row.type in ("integer", "number")]
        assert numbers
        assert [row.key for row in numbers if row.range is None] == []

    def test_that_is_documented_exists(self, daemon: Daemon) -> None:
        todo: list[type[msgspec.Struct]] = [command.kind(daemon)]
        while todo:
            section = todo.pop()
            assert set(command.attributes(section)) <= set(section.__struct_fields__), section
            fields = settings.struct_type(section).fields
            todo += [nested.cls for nested in map(settings.section_type, (field.type for field in fields)) if nested]


def test_a_row_holds_what_the_struct_says() -> None:
    found = {row.key: row for row in command.rows(Whole)}
    assert [*found] == [
        *("size_mib", "port", "on", "place", "level", "many", "many.wait_s", "many.names", "broker"),
        *(f"broker.{name}" for name in settings.BrokerConfig.__struct_fields__),
    ]
    assert found["size_mib"] == command.Row(
        key="size_mib", what="how much.", type="integer", unit="MiB", range="1 to 64", required=True, default=None
    )
    assert found["many"].what == "some things. In two paragraphs."
    assert (found["many"].type, found["many"].default) == ("array of tables", [])
    assert found["many.wait_s"].what == "how long, in two lines."
    assert (found["many.names"].type, found["many.names"].default) == ("array of strings", ["a", "b"])
    assert (found["place"].type, found["place"].default, found["place"].required) == ("path", None, False)


def test_a_field_that_the_docstring_leaves_out_is_seen() -> None:
    class Silent(Section, frozen=True, kw_only=True):
        """Says nothing of its field."""

        field: int

    assert [row.what for row in command.rows(Silent)] == [""]


def filled(text: str, given: Mapping[str, str], *, defaults: bool = False) -> str:
    """An example with these keys written, and with its defaults written too if wanted."""
    lines, section, off = [], "", False
    for line in text.splitlines():
        header = re.fullmatch(r"#?\[+([\w.]+)\]+", line)
        pair = re.fullmatch(r"#?(\w+) = (.*)", line)
        if header:
            section = header[1]
            off = line.startswith("#") and section not in given
            lines.append(line if off else line.lstrip("#"))
        elif pair:
            key = f"{section}.{pair[1]}".lstrip(".")
            default = line.lstrip("#") if defaults and not off and pair[2] != '""' else line
            lines.append(f'{pair[1]} = "{given[key]}"' if key in given else default)
    return "\n".join(lines)


@pytest.mark.parametrize("daemon", Daemon)
class TestTheExample:
    def text(self, daemon: Daemon) -> str:
        return command.example(tuple(rows(daemon).values()))

    def test_is_toml_and_asks_for_what_is_required(self, daemon: Daemon) -> None:
        with pytest.raises(ConfigError):
            PARSE[daemon](tomllib.loads(self.text(daemon)), base=Path())

    def test_filled_in_is_accepted_and_means_the_same_as_the_shortest_file(self, daemon: Daemon) -> None:
        text = filled(self.text(daemon), REQUIRED[daemon])
        assert PARSE[daemon](tomllib.loads(text), base=Path()) == PARSE[daemon](document(daemon), base=Path())

    def test_shows_the_defaults_that_hold(self, daemon: Daemon) -> None:
        text = filled(self.text(daemon), REQUIRED[daemon], defaults=True)
        raw = tomllib.loads(text)
        assert len(raw) > len(document(daemon))
        assert PARSE[daemon](raw, base=Path()) == PARSE[daemon](document(daemon), base=Path())

    def test_shows_every_key_behind_its_facts(self, daemon: Daemon) -> None:
        text = self.text(daemon)
        for key, row in rows(daemon).items():
            name = re.escape(key.rpartition(".")[2])
            wanted = rf"^#?\[+{re.escape(key)}\]+$" if row.type.endswith(("table", "tables")) else rf"^#?{name} = "
            assert re.search(wanted, text, flags=re.MULTILINE), key
        assert max(map(len, text.splitlines())) <= 120


@pytest.fixture
def edgeguard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.chdir(tmp_path)
    return CliRunner()


def run(runner: CliRunner, *arguments: str) -> Any:
    app = typer.Typer()
    command.register(app)
    return runner.invoke(app, ["config", *arguments])


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("agent", "window"), ["window", "window.inputs", "window.seconds"]),
        (("agent", "window.seconds"), ["window", "window.seconds"]),
        (("hub", "release.keys"), ["release", "release.keys"]),
        (("hub", "fleet"), ["fleet"]),
        (("agent", "sources.folder.path"), ["sources", "sources.folder", "sources.folder.path"]),
    ],
)
def test_explain_shows_one_key_or_one_section_below_its_headers(
    edgeguard: CliRunner, arguments: tuple[str, ...], keys: list[str]
) -> None:
    printed = run(edgeguard, "explain", *arguments, "--json")
    assert [row["key"] for row in json.loads(printed.stdout)] == keys
    text = run(edgeguard, "explain", *arguments).stdout
    assert text.startswith("# ")
    tomllib.loads(text)


def test_explain_prints_the_whole_agent_by_default(edgeguard: CliRunner) -> None:
    assert run(edgeguard, "explain").stdout == command.example(tuple(rows(Daemon.AGENT).values()))


def test_explain_prints_type_range_unit_and_default(edgeguard: CliRunner) -> None:
    text = run(edgeguard, "explain", "agent", "window.seconds").stdout
    assert "# number, above 0, at most 86400 seconds; default 10.0\n#seconds = 10.0\n" in text


def test_explain_of_no_key_names_the_one_that_was_meant(edgeguard: CliRunner) -> None:
    error = run(edgeguard, "explain", "agent", "window.secs").exception
    assert isinstance(error, ConfigError)
    assert "did you mean window.seconds?" in str(error)


@pytest.mark.parametrize("daemon", Daemon)
def test_check_knows_whose_file_it_is(edgeguard: CliRunner, daemon: Daemon) -> None:
    text = command.example(tuple(rows(daemon).values()))
    Path("it.toml").write_text(filled(text, REQUIRED[daemon]))
    done = run(edgeguard, "check", "it.toml")
    assert (done.exit_code, daemon.value in done.stdout) == (0, True)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('fleet = "demo"\n[policy]\nalpha = 2.0\n[web]', r"it.toml \(of a hub\): policy.alpha; got 2.0; expected"),
        ('fleet = "demo"\ndevice = 1', r"it.toml \(of an agent\): device; got integer 1; expected string"),
        ("fleet", r"configuration it.toml; got .*; expected TOML"),
    ],
)
def test_check_refuses_a_file_with_the_error(edgeguard: CliRunner, text: str, message: str) -> None:
    Path("it.toml").write_text(text)
    error = run(edgeguard, "check", "it.toml").exception
    assert isinstance(error, ConfigError)
    assert re.search(message, str(error))


def test_a_service_reads_the_password_that_systemd_hands_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("from the file\n")
    (tmp_path / systemd.CREDENTIAL).write_text("from systemd\n")
    broker = settings.BrokerConfig(host="h", username="u", password_file=tmp_path / "password")
    assert settings.password(broker) == "from the file"
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert settings.password(broker) == "from systemd"
    (tmp_path / systemd.CREDENTIAL).unlink()
    assert settings.password(broker) == "from the file"


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"password_file": "p"}, "broker.password_file without broker.username"),
        ({"certificate": "c", "ca": "a"}, "broker.certificate without broker.key"),
        ({"key": "k", "ca": "a"}, "broker.key without broker.certificate"),
        ({"certificate": "c", "key": "k"}, "broker.certificate without broker.ca"),
        ({"protocol": "3.1"}, 'broker.protocol; got \'3.1\'; expected "3.1.1" or "5"'),
        ({"protocol": 5}, 'broker.protocol; got integer 5; expected "3.1.1" or "5"'),
    ],
)
@pytest.mark.parametrize("daemon", Daemon)
def test_what_a_broker_needs_together_is_told(daemon: Daemon, keys: dict[str, Any], words: str) -> None:
    raw = document(daemon)
    raw["broker"] |= keys
    with pytest.raises(ConfigError) as caught:
        PARSE[daemon](raw, base=Path(), name="it.toml")
    assert words in str(caught.value) and "it.toml" in str(caught.value)


@pytest.mark.parametrize("daemon", Daemon)
def test_a_client_certificate_of_mqtt_5_is_a_configuration(daemon: Daemon) -> None:
    raw = document(daemon)
    raw["broker"] |= {"ca": "ca.pem", "certificate": "own.pem", "key": "own.key", "protocol": "5"}
    config: Any = PARSE[daemon](raw, base=Path("/etc/edgeguard"))
    assert (config.broker.protocol, config.broker.key) == ("5", Path("/etc/edgeguard/own.key"))


@pytest.mark.parametrize(("daemon", "key"), [(Daemon.AGENT, "fleet"), (Daemon.AGENT, "device"), (Daemon.HUB, "fleet")])
def test_an_id_that_is_none_is_told_with_file_and_key(daemon: Daemon, key: str) -> None:
    with pytest.raises(ConfigError, match=rf"it.toml: {key}; got 'A/b'; expected an id like"):
        PARSE[daemon](document(daemon) | {key: "A/b"}, base=Path(), name="it.toml")
