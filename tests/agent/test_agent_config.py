"""The agent's configuration: what is accepted, and the one line for what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeguard.agent.config import load, parse
from edgeguard.errors import ConfigError


def minimal(**changes: Any) -> dict[str, Any]:
    raw: dict[str, Any] = {
        "fleet": "demo",
        "device": "camera-1",
        "model": "m.tflite",
        "state_dir": "state",
        "broker": {"host": "127.0.0.1"},
        "sources": {"folder": {"path": "inbox"}},
    }
    return {**raw, **changes}


def test_defaults_fill_what_is_not_said() -> None:
    config = parse(minimal(), base=Path("/etc/edgeguard"))
    assert (config.broker.port, config.window.inputs, config.window.seconds) == (1883, 64, 10.0)
    assert config.update is None


def test_relative_paths_count_from_the_configuration() -> None:
    config = parse(minimal(model="/opt/m.tflite"), base=Path("/etc/edgeguard"))
    assert config.sources.folder is not None
    assert config.sources.folder.path == Path("/etc/edgeguard/inbox")
    assert config.model == Path("/opt/m.tflite")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"devcie": "x"}, "devcie"),
        ({"broker": {"host": "h", "prot": 1}}, "prot"),
        ({"broker": {"host": "h", "port": 70000}}, "broker.port"),
        ({"broker": {"host": ""}}, "broker.host"),
        ({"broker": {"host": "h", "password_file": "p"}}, "broker.username"),
        ({"broker": {}}, "host"),
        ({"window": {"inputs": 0}}, "window.inputs"),
        ({"window": {"seconds": "ten"}}, "window.seconds"),
        ({"sources": {"folder": {"path": "inbox", "kind": "camera"}}}, "kind"),
        ({"sources": {"folder": {"path": 3}}}, "sources.folder.path"),
        ({"sources": {"folder": {"path": ""}}}, "sources.folder.path"),
        ({"runtime": {"name": "tensorflow"}}, "runtime.name"),
        ({"results": {"topic": "site/#"}}, "results.topic"),
        ({"sources": {"mqtt": {"topic": "a/#/b"}}}, "sources.mqtt.topic"),
        ({"sources": {"mqtt": {"topic": "a/b+"}}}, "sources.mqtt.topic"),
        ({"alerts": {"per_minute": -1}}, "alerts.per_minute"),
        ({"update": {"metadata_url": "ftp://h/m", "targets_url": "http://h/t", "root": "r"}}, "metadata_url"),
        ({"fleet": "Demo/#"}, "Demo/#"),
        ({"device": "a b"}, "a b"),
    ],
)
def test_a_wrong_key_or_value_is_refused_by_its_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        parse(minimal(**changes), base=Path())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["fleet", "device", "model", "state_dir", "broker", "sources"])
def test_a_missing_key_is_named(missing: str) -> None:
    raw = minimal()
    del raw[missing]
    with pytest.raises(ConfigError, match=missing):
        parse(raw, base=Path())


@pytest.mark.parametrize("content", [b"fleet = ", b"\xff\xfe", b"a = " + b"[" * 5000], ids=["cut", "bytes", "deep"])
def test_a_file_that_is_not_toml_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "agent.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"agent\.toml") as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.toml; got No such file"):
        load(tmp_path / "nowhere.toml")


def test_the_configuration_is_immutable() -> None:
    config = parse(minimal(), base=Path())
    with pytest.raises(AttributeError):
        config.fleet = "other"  # type: ignore[misc]
    assert msgspec.structs.replace(config, fleet="other").fleet == "other"
