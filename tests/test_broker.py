"""A connection to a broker: whether there is one, what is told when there is not, TLS, passwords and certificates, and
what a session keeps, in both versions of MQTT.
"""

from __future__ import annotations

import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from edgeguard import broker as brokers
from edgeguard import settings
from edgeguard.errors import ConfigError, LinkError
from edgeguard.settings import BrokerConfig, password
from tests.simulators import needs
from tests.simulators.mosquitto import Mosquitto, free_port
from tests.simulators.tiny_hub import wait_until

Protocol = Literal["3.1.1", "5"]
PROTOCOLS: tuple[Protocol, ...] = ("3.1.1", "5")


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


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_broker_that_is_there_passes(mosquitto: Mosquitto, protocol: Protocol) -> None:
    brokers.check(BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol=protocol))


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


class Subscriber:
    """A client whose session outlives its connection."""

    def __init__(self, broker: BrokerConfig) -> None:
        self.heard: list[bytes] = []
        self._ready = False
        self._client = brokers.client(broker, "subscriber", None, clean_session=False)
        self._client.on_connect = lambda client, *_: client.subscribe("news", qos=1)
        self._client.on_subscribe = lambda *_: setattr(self, "_ready", True)
        self._client.on_message = lambda _c, _u, message: self.heard.append(bytes(message.payload))
        brokers.connect(self._client, broker, clean_session=False)
        self._client.loop_start()
        wait_until(lambda: self._ready, "the subscription")

    def close(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()


def publish(port: int, *payloads: bytes) -> None:
    client = mqtt.Client(CallbackAPIVersion.VERSION2)
    client.connect("127.0.0.1", port)
    client.loop_start()
    for payload in payloads:
        client.publish("news", payload, qos=1).wait_for_publish(10)
    client.disconnect()
    client.loop_stop()


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_session_that_is_not_clean_keeps_what_comes_while_its_client_is_away(
    mosquitto: Mosquitto, protocol: Protocol
) -> None:
    broker = BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol=protocol)
    Subscriber(broker).close()
    publish(mosquitto.port, b"1", b"2")
    mosquitto.stop()  # the broker writes its sessions to disk, their end included
    mosquitto.start()
    publish(mosquitto.port, b"3")
    again = Subscriber(broker)
    wait_until(lambda: again.heard == [b"1", b"2", b"3"], "what came meanwhile")
    again.close()


def test_a_session_of_mqtt_5_ends_some_time_after_its_client_left(
    mosquitto: Mosquitto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brokers, "SESSION_EXPIRY_S", 1)
    broker = BrokerConfig(host="127.0.0.1", port=mosquitto.port, protocol="5")
    Subscriber(broker).close()

    def forgotten() -> bool:
        publish(mosquitto.port, b"old")
        present: list[bool] = []
        client = brokers.client(broker, "subscriber", None, clean_session=False)
        client.on_connect = lambda _c, _u, flags, *_: present.append(flags.session_present)
        brokers.connect(client, broker, clean_session=False)
        while not present:
            client.loop(timeout=0.2)
        client.disconnect()
        return not present[0]

    assert not forgotten()
    threading.Event().wait(2.5)
    assert forgotten()


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an authority, a broker's and a device's certificate, and keys that do not fit."""
    folder = tmp_path_factory.mktemp("pki")
    program = needs.program("openssl", "openssl")

    def openssl(*arguments: str) -> None:
        subprocess.run([program, *arguments], cwd=folder, check=True, capture_output=True)

    def key(name: str) -> tuple[str, ...]:
        return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-keyout", f"{name}.key")

    openssl("req", "-x509", *key("ca"), "-days", "2", "-subj", "/CN=authority", "-out", "ca.pem")
    openssl("req", "-x509", *key("stranger"), "-days", "2", "-subj", "/CN=camera-1", "-out", "stranger.pem")
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1\n")
    for name in ("broker", "camera-1"):
        openssl("req", *key(name), "-subj", f"/CN={name}", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                "-days", "2", "-extfile", "names", "-out", f"{name}.pem")  # fmt: skip
    openssl("pkcs8", "-topk8", "-in", "camera-1.key", "-passout", "pass:secret", "-out", "encrypted.key")
    (folder / "nonsense").write_text("nonsense")
    return folder


@pytest.fixture(scope="module")
def strict(pki: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker that only talks to whom the authority signed a certificate, over TLS 1.2 or later."""
    broker = Mosquitto(
        tmp_path_factory.mktemp("strict"),
        more=f"cafile {pki}/ca.pem\ncertfile {pki}/broker.pem\nkeyfile {pki}/broker.key\nrequire_certificate true\n",
    )
    broker.start()
    yield broker
    broker.stop()


def with_certificate(pki: Path, port: int, **changes: Any) -> BrokerConfig:
    own = BrokerConfig(
        host="127.0.0.1", port=port, ca=pki / "ca.pem", certificate=pki / "camera-1.pem", key=pki / "camera-1.key"
    )
    return msgspec.structs.replace(own, **changes)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_client_shows_its_certificate(pki: Path, strict: Mosquitto, protocol: Protocol) -> None:
    brokers.check(with_certificate(pki, strict.port, protocol=protocol))


@pytest.mark.parametrize("own", [None, "stranger"])
def test_a_broker_that_asks_for_a_certificate_lets_in_nobody_else(
    pki: Path, strict: Mosquitto, own: str | None
) -> None:
    files = {"certificate": own and pki / f"{own}.pem", "key": own and pki / f"{own}.key"}
    with pytest.raises(LinkError, match=f"broker 127.0.0.1:{strict.port}; got .+"):
        brokers.check(with_certificate(pki, strict.port, **files))


def test_a_broker_under_another_name_is_refused(pki: Path, strict: Mosquitto) -> None:
    with pytest.raises(LinkError, match="certificate"):
        brokers.check(with_certificate(pki, strict.port, host="localhost"))


def test_tls_before_1_2_is_not_spoken(pki: Path) -> None:
    context = brokers.tls(with_certificate(pki, 1), pki / "ca.pem")
    assert context.minimum_version is ssl.TLSVersion.TLSv1_2
    assert context.check_hostname and context.verify_mode is ssl.CERT_REQUIRED


@pytest.mark.parametrize(
    ("key", "file", "words"),
    [
        ("ca", "missing", "broker.ca .*/missing; got No such file"),
        ("ca", "nonsense", "broker.ca .*/nonsense; .* expected a PEM certificate"),
        ("certificate", "missing", "broker.certificate .*/missing; got No such file"),
        ("certificate", "camera-1.key", "broker.certificate .*/camera-1.key; .* expected a PEM certificate"),
        ("key", "missing", "broker.key .*/missing; got No such file"),
        ("key", "nonsense", "broker.key .*/nonsense; .* expected the PEM private key of .*/camera-1.pem"),
        ("key", "stranger.key", "broker.key .*/stranger.key; got .*mismatch"),
        ("key", "encrypted.key", "broker.key .*/encrypted.key; got a key that a pass phrase encrypts"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_before_anything_is_sent(
    pki: Path, key: str, file: str, words: str
) -> None:
    broker = with_certificate(pki, 1, **{key: pki / file})
    for use in (brokers.check_files, brokers.check):
        with pytest.raises(ConfigError, match=words) as caught:
            use(broker)
        assert "\n" not in str(caught.value)


def test_a_service_reads_the_key_that_systemd_hands_it(
    pki: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker = with_certificate(pki, 1, key=Path("/root/unreadable.key"))
    assert settings.key_file(broker) == broker.key
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    (tmp_path / settings.KEY_CREDENTIAL).write_bytes((pki / "camera-1.key").read_bytes())
    assert settings.key_file(broker) == tmp_path / "broker-key"
    brokers.check_files(broker)


@pytest.mark.parametrize(("mode", "lines"), [(0o600, 0), (0o640, 0), (0o644, 1)])
def test_a_key_that_everybody_can_read_is_told_once(
    pki: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, lines: int
) -> None:
    key = tmp_path / "own.key"
    key.write_bytes((pki / "camera-1.key").read_bytes())
    key.chmod(mode)
    for _ in range(3):
        brokers.check_files(with_certificate(pki, 1, key=key))
    assert [str(key) in record.getMessage() for record in caplog.records] == [True] * lines
