"""What holds for every request: who is let in, what is served to whom, how large it may be, and how the server ends."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection, HTTPSConnection
from pathlib import Path

import pytest

from edgeguard.errors import ConfigError
from edgeguard.hub import config, web
from edgeguard.hub.config import WebConfig
from edgeguard.hub.web import CONNECTIONS, MAX_BODY, TRIES, Web
from tests.hub.serving import Served, serve
from tests.simulators.mosquitto import free_port


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("web")
    for name in ("metadata/timestamp.json", "targets/abc.model.tflite", "secret"):
        path = tmp_path / "served" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"content of {name}")
    (tmp_path / "key.pem").write_text("private")
    (tmp_path / "served" / "targets" / "link").symlink_to(tmp_path / "key.pem")
    return tmp_path


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[Served]:
    with serve(folder) as served:
        yield served


@pytest.fixture
def fresh(tmp_path: Path) -> Iterator[Served]:
    """One that nobody has asked yet."""
    with serve(tmp_path) as served:
        yield served


@pytest.fixture(scope="module")
def open_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that lets readers of this machine in without a token."""
    with serve(tmp_path_factory.mktemp("open"), anonymous="viewer") as served:
        yield served


@pytest.mark.parametrize("path", ["metadata/timestamp.json", "targets/abc.model.tflite"])
def test_releases_are_served_as_they_are_without_a_token(hub: Served, path: str) -> None:
    response, content = hub.fetch("GET", f"/{path}", role=None)
    assert (response.status, content) == (200, f"content of {path}".encode())


@pytest.mark.parametrize(
    "path",
    ["/", "/secret", "/metadata", "/metadata/", "/metadata/nothing.json", "/targets/../secret", "/targets/..%2fsecret",
     "/targets/%2e%2e/secret", "/targets//etc/passwd", "/targets/../../key.pem", "/targets/link", "/keys/root.pem"],
)  # fmt: skip
def test_nothing_else_is_served(hub: Served, path: str) -> None:
    assert hub.ask("GET", path, role=None)[0] in (401, 404)
    assert hub.ask("GET", path, role="admin")[0] in (307, 404)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/v1/devices"), ("GET", "/v1/status"), ("GET", "/metrics"), ("GET", "/v1/events/stream"),
     ("POST", "/v1/tokens"), ("GET", "/nothing"), ("POST", "/healthz")],
)  # fmt: skip
def test_without_a_token_nothing_else_is_answered(hub: Served, method: str, path: str) -> None:
    response, content = hub.fetch(method, path, role=None)
    assert response.status == 401
    assert response.getheader("WWW-Authenticate") == "Bearer"
    assert json.loads(content)["what"] == "authorization"


@pytest.mark.parametrize(
    "authorization",
    [
        "",
        "Bearer",
        "Bearer ",
        "Bearer x",
        "Bearer egt_x y",
        "Basic dXNlcjpwYXNz",
        "Bearer " + "a" * 5000,
        "bearer \xff",
    ],
)
def test_a_wrong_token_is_refused(hub: Served, authorization: str) -> None:
    assert hub.ask("GET", "/v1/devices", role=None, Authorization=authorization)[0] == 401


@pytest.mark.parametrize(
    ("role", "method", "path", "status"),
    [
        ("viewer", "GET", "/v1/devices", 200),
        ("viewer", "POST", "/v1/devices/d1/commands", 403),
        ("viewer", "POST", "/v1/cases/1/decisions", 403),
        ("viewer", "GET", "/v1/tokens", 403),
        ("viewer", "POST", "/nothing", 403),
        ("operator", "GET", "/v1/devices", 200),
        ("operator", "POST", "/v1/cases/1/decisions", 400),
        ("operator", "GET", "/v1/tokens", 403),
        ("operator", "DELETE", "/v1/tokens/viewer", 403),
        ("admin", "GET", "/v1/tokens", 200),
        ("admin", "POST", "/v1/cases/1/decisions", 400),
    ],
)
def test_a_role_may_do_what_it_may(hub: Served, role: str, method: str, path: str, status: int) -> None:
    assert hub.ask(method, path, role=role)[0] == status


def test_the_role_is_asked_before_the_body_is_read(hub: Served) -> None:
    status, told = hub.ask("POST", "/v1/cases/1/decisions", b"{not json", role="viewer")
    assert (status, told["expected"]) == (403, "role operator")


class TestGuessing:
    def test_an_address_that_tries_too_many_tokens_has_to_wait(self, fresh: Served) -> None:
        statuses = [
            fresh.ask("GET", "/v1/models", role=None, Authorization=f"Bearer x{i}")[0] for i in range(TRIES + 5)
        ]
        assert statuses[:TRIES] == [401] * TRIES
        assert statuses[-1] == 429
        response, _ = fresh.fetch("GET", "/v1/models", role=None, Authorization="Bearer y")
        assert int(response.getheader("Retry-After") or 0) > 0
        assert f"authentication_failures_total {TRIES + 6}.0" in fresh.metrics.text().decode()

    def test_it_locks_nobody_out_who_was_let_in_before(self, fresh: Served) -> None:
        assert fresh.ask("GET", "/v1/models")[0] == 200
        for i in range(TRIES + 5):
            fresh.ask("GET", "/v1/models", role=None, Authorization=f"Bearer x{i}")
        assert fresh.ask("GET", "/v1/models")[0] == 200


class TestAnonymous:
    def test_a_reader_of_this_machine_needs_no_token(self, open_hub: Served) -> None:
        assert open_hub.ask("GET", "/v1/devices", role=None)[0] == 200
        assert open_hub.ask("GET", "/v1/devices", role=None, Host="localhost:8080")[0] == 200
        assert open_hub.ask("GET", "/v1/devices", role=None, Host="[::1]")[0] == 200

    def test_reading_is_all(self, open_hub: Served) -> None:
        assert open_hub.ask("POST", "/v1/devices/d1/commands", {"name": "ping"}, role=None)[0] == 403
        assert open_hub.ask("GET", "/v1/tokens", role=None)[0] == 403

    @pytest.mark.parametrize(
        "host", ["evil.example", "evil.example:8080", "127.0.0.1.evil.example", "[", "", "a@127.0.0.1"]
    )
    def test_a_page_of_another_site_that_reaches_this_machine_does(self, open_hub: Served, host: str) -> None:
        assert open_hub.ask("GET", "/v1/devices", role=None, Host=host)[0] in (400, 401)

    @pytest.mark.parametrize("header", ["X_Forwarded_For", "Forwarded"])
    def test_whoever_comes_through_a_proxy_does(self, open_hub: Served, header: str) -> None:
        assert open_hub.ask("GET", "/v1/devices", role=None, **{header: "127.0.0.1"})[0] == 401

    def test_a_wrong_token_is_not_made_good(self, open_hub: Served) -> None:
        assert open_hub.ask("GET", "/v1/devices", role=None, Authorization="Bearer x")[0] == 401


class TestConfiguration:
    @staticmethod
    def parse(tmp_path: Path, **web: object) -> None:
        config.parse(
            {"fleet": "test", "state_dir": "s", "broker": {"host": "127.0.0.1"}, "web": web},
            base=tmp_path,
            name="hub.toml",
        )

    @pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
    def test_readers_without_a_token_may_be_let_in_on_this_machine(self, tmp_path: Path, host: str) -> None:
        self.parse(tmp_path, host=host, anonymous="viewer")

    @pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "hub.lan", "localhost.evil.example"])
    def test_but_not_on_an_address_that_others_reach(self, tmp_path: Path, host: str) -> None:
        with pytest.raises(ConfigError, match=r"web\.anonymous"):
            self.parse(tmp_path, host=host, anonymous="viewer")

    @pytest.mark.parametrize("web", [{"certificate": "a.pem"}, {"key": "a.key"}])
    def test_half_a_certificate_is_refused(self, tmp_path: Path, web: dict[str, object]) -> None:
        with pytest.raises(ConfigError, match="give both or neither"):
            self.parse(tmp_path, **web)


class TestSize:
    def test_a_large_body_is_refused(self, hub: Served) -> None:
        status, told = hub.ask("POST", "/v1/tokens", b"x" * (MAX_BODY + 1), role="admin")
        assert (status, told["expected"]) == (413, f"at most {MAX_BODY} bytes")

    def test_so_is_one_of_unknown_length(self, hub: Served) -> None:
        with socket.create_connection(("127.0.0.1", hub.web.port), timeout=10) as raw:
            raw.sendall(
                b"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
                b"Authorization: Bearer " + hub.secrets["admin"].encode() + b"\r\n\r\n"
            )
            for _ in range(5):
                raw.sendall(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
            assert raw.recv(64).startswith(b"HTTP/1.1 413")

    @pytest.mark.parametrize("length", ["-1", "1e3", "9" * 40])
    def test_so_is_a_length_that_is_none(self, hub: Served, length: str) -> None:
        assert hub.ask("POST", "/v1/tokens", b"", role="admin", Content_Length=length)[0] in (400, 413)


def test_every_answer_says_what_browsers_must_not_do_with_it(hub: Served) -> None:
    for path, role in (("/v1/devices", "viewer"), ("/nothing", None), ("/healthz", None), ("/metadata/x", None)):
        response, _ = hub.fetch("GET", path, role=role)
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert "frame-ancestors 'none'" in (response.getheader("Content-Security-Policy") or "")
        assert response.getheader("Access-Control-Allow-Origin") is None
        assert response.getheader("Server") is None
    assert hub.fetch("GET", "/v1/devices")[0].getheader("Cache-Control") == "no-store"


def test_a_page_of_another_site_gets_no_leave_to_ask(hub: Served) -> None:
    response, _ = hub.fetch(
        "OPTIONS", "/v1/tokens", role="admin", Origin="https://evil.example", Access_Control_Request_Method="POST"
    )
    assert response.status == 405
    assert response.getheader("Access-Control-Allow-Origin") is None


class TestHttps:
    @pytest.fixture
    def certificate(self, tmp_path: Path) -> tuple[Path, Path]:
        made = tmp_path / "hub.pem", tmp_path / "hub.key"
        subprocess.run(
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
             "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", made[0], "-keyout", made[1]],
            check=True, capture_output=True,
        )  # fmt: skip
        return made

    def test_it_is_spoken_where_there_is_a_certificate(self, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
        with serve(tmp_path, certificate=certificate[0], key=certificate[1]) as hub:
            context = ssl.create_default_context(cafile=certificate[0])
            connection = HTTPSConnection("localhost", hub.web.port, context=context, timeout=10)
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            assert (response.status, response.read()) == (200, b"ok\n")
            assert response.getheader("Strict-Transport-Security")
            connection.close()

    def test_a_certificate_that_cannot_be_used_is_told(self, tmp_path: Path, certificate: tuple[Path, Path]) -> None:
        other = tmp_path / "other.pem"
        other.write_text("no certificate")
        for pair in ((other, certificate[1]), (certificate[0], other), (tmp_path / "none.pem", certificate[1])):
            with pytest.raises(ConfigError, match=r"web\.certificate"):
                Web(WebConfig(port=0, certificate=pair[0], key=pair[1]))


class TestConnections:
    ASKED = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    POSTED = b"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer TOKEN\r\nContent-Length: 9\r\n\r\n{"

    @pytest.fixture
    def quick(self, hub: Served, monkeypatch: pytest.MonkeyPatch) -> Served:
        """One that waits half a second for a request."""
        monkeypatch.setattr(web, "REQUEST_S", 0.5)
        return hub

    @pytest.mark.parametrize(
        "sent",
        [
            b"",
            ASKED[:-2],
            ASKED,
            ASKED + ASKED[:9],
            POSTED,
        ],
        ids=["nothing", "half a head", "one request", "one and a half", "half a body"],
    )
    def test_whoever_owes_a_request_for_long_is_cut_off(self, quick: Served, sent: bytes) -> None:
        with socket.create_connection(("127.0.0.1", quick.web.port), timeout=4) as raw:
            raw.sendall(sent.replace(b"TOKEN", quick.secrets["admin"].encode()))
            while raw.recv(4096):
                pass

    def test_so_is_whoever_sends_it_byte_by_byte(self, quick: Served) -> None:
        with socket.create_connection(("127.0.0.1", quick.web.port), timeout=4) as raw, pytest.raises(OSError):
            for byte in self.ASKED * 2:
                raw.sendall(bytes([byte]))
                time.sleep(0.05)

    def test_a_connection_is_used_again_for_as_long_as_it_asks(self, quick: Served) -> None:
        connection = HTTPConnection("127.0.0.1", quick.web.port, timeout=4)
        connection.connect()
        opened = connection.sock
        for _ in range(5):
            connection.request("GET", "/healthz")
            assert connection.getresponse().read() == b"ok\n"
            assert connection.sock is opened
            time.sleep(0.2)
        connection.close()

    def test_an_answer_may_take_longer(self, quick: Served) -> None:
        with socket.create_connection(("127.0.0.1", quick.web.port), timeout=4) as raw:
            head = f"GET /v1/events/stream HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {quick.secrets['viewer']}"
            raw.sendall(f"{head}\r\n\r\n".encode())
            time.sleep(1.2)
            quick.book.tell("test", "it", "much later")
            content = b""
            while b"much later" not in content:
                content += (part := raw.recv(4096))
                assert part

    def test_an_address_that_opens_too_many_shuts_out_itself_alone(self, fresh: Served) -> None:
        to = ("127.0.0.1", fresh.web.port)
        opened = [socket.create_connection(to, timeout=4, source_address=("127.0.0.2", 0)) for _ in range(300)]
        for raw in opened[CONNECTIONS:]:
            with suppress(ConnectionResetError):
                assert raw.recv(1) == b""
        assert fresh.ask("GET", "/healthz", role=None)[0] == 200
        opened[0].sendall(self.ASKED)
        assert opened[0].recv(64).startswith(b"HTTP/1.1 200")
        for raw in opened:
            raw.close()


class TestServer:
    def test_a_port_in_use_is_told_before_anything_is_served(self) -> None:
        first = Web(WebConfig(port=free_port()))
        with pytest.raises(ConfigError, match=str(first.port)):
            Web(WebConfig(port=first.port))
        first.stop()

    def test_a_port_is_free_again_after_stopping(self, tmp_path: Path) -> None:
        with serve(tmp_path) as hub:
            port = hub.web.port
            assert hub.ask("GET", "/healthz", role=None)[0] == 200
        Web(WebConfig(port=port)).stop()

    @pytest.mark.parametrize("host", ["no-such-host.invalid", "192.0.2.1"])
    def test_an_address_of_another_machine_is_told(self, host: str) -> None:
        with pytest.raises(ConfigError, match=host):
            Web(WebConfig(host=host))

    def test_it_stops_within_seconds_while_it_is_asked(self, tmp_path: Path) -> None:
        with serve(tmp_path) as hub:
            done = threading.Event()

            def keep_asking() -> None:
                while not done.is_set():
                    try:
                        hub.ask("GET", "/v1/devices")
                    except OSError:
                        return

            asking = threading.Thread(target=keep_asking)
            asking.start()
            began = time.monotonic()
            hub.web.stop()
            assert time.monotonic() - began < 3
            done.set()
            asking.join(15)
