"""What the hub serves over HTTP: signed releases as they are, its state, and nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgeguard.errors import ConfigError
from edgeguard.hub.config import WebConfig
from edgeguard.hub.web import Web, build
from tests.simulators.fleet import get
from tests.simulators.mosquitto import free_port


@pytest.fixture
def port(tmp_path: Path) -> Iterator[int]:
    for name in ("metadata/timestamp.json", "targets/abc.model.tflite", "secret"):
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    (tmp_path / "key.pem").write_text("private")
    (tmp_path / "served" / "targets" / "link").symlink_to(tmp_path / "key.pem")
    web = Web(WebConfig(port=0))
    web.start(build(lambda since: {"since": since}, tmp_path / "served"))
    yield web.port
    web.stop()


@pytest.mark.parametrize("path", ["metadata/timestamp.json", "targets/abc.model.tflite"])
def test_releases_are_served_as_they_are(port: int, path: str) -> None:
    assert get(port, f"/{path}") == (200, f"content of {path}".encode())


@pytest.mark.parametrize(
    "path",
    ["/", "/secret", "/metadata", "/metadata/", "/metadata/nothing.json", "/targets/../secret", "/targets/..%2fsecret",
     "/targets/%2e%2e/secret", "/targets//etc/passwd", "/targets/../../key.pem", "/targets/link", "/keys/root.pem"],
)  # fmt: skip
def test_nothing_else_is_served(port: int, path: str) -> None:
    assert get(port, path)[0] in (307, 404)


def test_the_state_is_json_from_an_event_on(port: int) -> None:
    status, body = get(port, "/v1/status?since=12")
    assert (status, json.loads(body)) == (200, {"since": 12})


@pytest.mark.parametrize("since", ["x", "-1", "1.5", "", "9" * 30, "%00", "%C2%B2"])
def test_a_bad_event_id_is_refused(port: int, since: str) -> None:
    assert get(port, f"/v1/status?since={since}")[0] == 400


def test_health_is_answered(port: int) -> None:
    assert get(port, "/healthz") == (200, b"ok\n")


def test_without_a_repository_there_are_no_releases() -> None:
    web = Web(WebConfig(port=0))
    web.start(build(lambda _since: {}, None))
    assert get(web.port, "/metadata/timestamp.json")[0] == 404
    web.stop()


def test_a_port_in_use_is_told_before_anything_is_served() -> None:
    first = Web(WebConfig(port=free_port()))
    with pytest.raises(ConfigError, match=str(first.port)):
        Web(WebConfig(port=first.port))
    first.stop()


def test_a_port_is_free_again_after_stopping() -> None:
    first = Web(WebConfig(port=free_port()))
    first.start(build(lambda _since: {}, None))
    assert get(first.port, "/healthz")[0] == 200
    first.stop()
    Web(WebConfig(port=first.port)).stop()


@pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_told(host: str) -> None:
    with pytest.raises(ConfigError, match=host):
        Web(WebConfig(host=host))
