"""One look at a broker: whether it is there, and what is told when it is not; and the password that it asks for."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgeguard import broker as brokers
from edgeguard.errors import ConfigError, LinkError
from edgeguard.settings import BrokerConfig, password
from tests.simulators.mosquitto import Mosquitto, free_port


def silent(_tmp_path: Path) -> Iterator[BrokerConfig]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield BrokerConfig(host="127.0.0.1", port=server.getsockname()[1])


def nobody(_tmp_path: Path) -> Iterator[BrokerConfig]:
    yield BrokerConfig(host="127.0.0.1", port=free_port())


def no_such_host(_tmp_path: Path) -> Iterator[BrokerConfig]:
    yield BrokerConfig(host="no-such-host.invalid")


def no_host_name(_tmp_path: Path) -> Iterator[BrokerConfig]:
    yield BrokerConfig(host="a" * 200 + "..b")


@pytest.mark.parametrize("case", [silent, nobody, no_such_host, no_host_name])
def test_a_check_of_a_broker_that_is_not_there_says_so_in_one_line(
    case: Callable[[Path], Iterator[BrokerConfig]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "CONNECT_TIMEOUT_S", 1.0)
    for broker in case(tmp_path):
        with pytest.raises(LinkError, match=f"broker {broker.host}:{broker.port}; got .+; expected an MQTT") as caught:
            brokers.check(broker)
        assert "\n" not in str(caught.value)


def test_a_broker_that_is_there_passes(mosquitto: Mosquitto) -> None:
    brokers.check(BrokerConfig(host="127.0.0.1", port=mosquitto.port))


def test_a_certificate_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nonsense")
    for name in ("ca.pem", "missing.pem"):
        with pytest.raises(ConfigError, match=name):
            brokers.check(BrokerConfig(host="127.0.0.1", ca=tmp_path / name))


def test_the_password_is_the_first_line_of_its_file(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("s3cret\nnot this\n")
    assert password(BrokerConfig(host="h", username="u", password_file=path)) == "s3cret"


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff\xfe"])
def test_a_password_file_without_a_password_is_an_error(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "secret"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="password file"):
        password(BrokerConfig(host="h", username="u", password_file=path))
