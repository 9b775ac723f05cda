"""The hub's web server: its socket, its thread, and what holds for every request before anything answers it.

Rules enforced here:

* nothing is answered without the role that :func:`edgeguard.hub.access.needed` asks for, known path or not;
* nobody is taken at their word for where they come from: what a proxy adds to a request is not believed;
* without a token, a reader must be on this machine, must have asked for this machine by name, and not through a proxy:
  a page that a browser shows can reach an address of this machine, but says the name that it came under;
* an address that tries too many tokens is refused without a look at the database. One that worked before always
  passes: whoever guesses from behind the same proxy locks nobody out;
* a request has at most 64 KiB, and is whole ``REQUEST_S`` after the connection was opened or the last answer given; a
  client that takes nothing for a quarter of a minute is cut off by the kernel;
* an address has at most ``CONNECTIONS`` connections, a quarter of all: one that opens more shuts out itself alone;
* every refusal is a :class:`edgeguard.hub.views.Problem`; no answer is kept by a browser, framed, or read by a page of
  another site.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus

import uvicorn
from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from edgeguard.errors import ConfigError
from edgeguard.hub.access import Role, Tokens, allows, needed
from edgeguard.hub.config import WebConfig, is_loopback
from edgeguard.hub.limits import Limiter
from edgeguard.hub.metrics import Metrics
from edgeguard.hub.views import Problem

MAX_BODY = 64 * 1024
MAX_INPUTS = 8 << 20
"""The same where inputs are shared."""
ANONYMOUS = "anonymous"
TRIES, TRY_S = 20, 3
"""An address may try so many tokens at once that this process has not seen working, and one more every 3 seconds."""
REQUEST_S = 10.0
CONNECTIONS = 64
_ADDRESSES = 4096
_MAX_TOKEN = 200
_STALLED_MS = 15_000
_HOST = re.compile(r"(?:\[([0-9a-fA-F:.]+)\]|([^:@/\[\]]+))(?::[0-9]+)?")
_INPUTS = re.compile(r"/v1/cases/[0-9]+/inputs")
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks. ``valid`` looks up whether they still may; it asks the database."""

    name: str
    role: Role
    valid: Callable[[], bool]


def problem(
    status: int,
    what: str,
    *,
    got: object = None,
    expected: object = None,
    do: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A refusal. Whatever a request held is shown in printable ASCII and cut short."""
    body = Problem(what=_shown(what) or "", got=_shown(got), expected=_shown(expected), do=do)
    return Response(body.model_dump_json(), status, headers, media_type="application/json")


class Gate:
    """What every request passes, as an ASGI application around another one.

    Args:
        app: what answers; finds the :class:`Caller` under ``caller`` in the request's state.
        tokens: who may.
        config: who may without a token.
        metrics: counts answers and refusals.
    """

    def __init__(self, app: ASGIApp, *, tokens: Tokens, config: WebConfig, metrics: Metrics) -> None:
        self._app = app
        self._tokens = tokens
        self._config = config
        self._metrics = metrics
        self._tries = Limiter(rate=1 / TRY_S, burst=TRIES, keys=_ADDRESSES)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.answered(message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers[name] = value
                if not scope["path"].startswith(("/metadata/", "/targets/")):
                    headers["Cache-Control"] = "no-store"
                if self._config.certificate:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
            await send(message)

        length = Headers(scope=scope).get("content-length", "0")
        most = MAX_INPUTS if _INPUTS.fullmatch(scope["path"]) else MAX_BODY
        if not length.isdecimal() or int(length[:20]) > most:
            await _too_large(most)(scope, receive, send_on)
            return
        taken = 0

        async def receive_on() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
            return message

        refusal = await self._admit(scope)
        await (refusal or self._app)(scope, receive_on, send_on)

    async def _admit(self, scope: Scope) -> Response | None:
        """Put the caller into the request's state, or say why not."""
        method, path = scope["method"], scope["path"]
        role = needed(method, path, open_metrics=self._config.metrics == "open")
        if role is None:
            return None
        headers = Headers(scope=scope)
        caller: Caller | Response
        if "authorization" in headers:
            caller = await self._by_token(headers["authorization"], _address(scope))
        elif self._needs_none(headers, _address(scope)):
            caller = Caller(name=ANONYMOUS, role="viewer", valid=lambda: True)
        else:
            self._metrics.denied()
            caller = _unknown("no token")
        if isinstance(caller, Response):
            return caller
        if not allows(caller.role, role):
            return problem(403, f"{method} {path}", got=f"a token of role {caller.role}", expected=f"role {role}")
        scope.setdefault("state", {})["caller"] = caller
        return None

    async def _by_token(self, authorization: str, address: str) -> Caller | Response:
        scheme, _, secret = authorization.partition(" ")
        secret = secret.strip()
        if scheme.lower() != "bearer" or not 0 < len(secret) <= _MAX_TOKEN:
            self._metrics.denied()
            return _unknown("another kind of authorization")
        if not self._tokens.worked(secret) and not self._tries.passes(address, now_s=time.monotonic()):
            self._metrics.denied()
            return problem(
                429, "authorization", got="too many tokens tried from this address", do="try again later",
                headers={"Retry-After": str(TRY_S)},
            )  # fmt: skip
        try:
            token = await run_in_threadpool(self._tokens.find, secret)
        except SQLAlchemyError:
            log.exception("a token could not be looked up")
            return problem(503, "database", got="no answer", do="try again later", headers={"Retry-After": "5"})
        if token is None:
            self._metrics.denied()
            log.warning("a wrong token from %s", address)
            return _unknown("a token that is unknown, expired or revoked")
        return Caller(name=token.name, role=token.role, valid=lambda: self._tokens.find(secret) is not None)

    def _needs_none(self, headers: Headers, address: str) -> bool:
        named = _HOST.fullmatch(headers.get("host", ""))
        return (
            self._config.anonymous == "viewer"
            and is_loopback(address)
            and named is not None
            and is_loopback(named[1] or named[2])
            and "forwarded" not in headers
            and "x-forwarded-for" not in headers
        )


class Connection(H11Protocol):
    """A connection that ends where no whole request comes in time, or where its address has too many."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take it, unless there are too many from there."""
        super().connection_made(transport)
        others = (other for other in self.connections if isinstance(other, Connection))
        if sum(_host(other.client) == _host(self.client) for other in others) > CONNECTIONS:
            transport.abort()
        else:
            self._watch()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        """Wait for the next request, or answer the one that came meanwhile."""
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._stop()
        super().connection_lost(exc)

    def _watch(self) -> None:
        """Let the time run exactly while the client owes a request."""
        if self.cycle is not None and not (self.cycle.more_body or self.cycle.response_complete):
            self._stop()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_S, self._end)

    def _stop(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _end(self) -> None:
        # An answer may still be on its way, and is waited for. Who has never asked is owed nothing, not even TLS's end.
        (self.transport.abort if self.cycle is None else self.transport.close)()


class Web:
    """The server in a thread. The port is bound on construction, so that a port in use is told before all else.

    Raises:
        ConfigError: the address cannot be bound, or the certificate not used.
    """

    def __init__(self, config: WebConfig) -> None:
        self._config = config
        _check_certificate(config)
        what = f"web address {config.host}:{config.port}"
        try:
            family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with suppress(AttributeError, OSError):  # Linux alone has it; a connection inherits it
                self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _STALLED_MS)
            self._socket.bind((config.host, config.port))
            self._socket.listen(128)
        except OSError as error:
            raise ConfigError(
                what, got=error.strerror or error, expected="a free port of this machine", do="change [web]"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def stopping(self) -> bool:
        """True once the server was told to stop: whoever still answers must come to an end."""
        return self._server is not None and self._server.should_exit

    def start(self, app: ASGIApp) -> None:
        """Serve in the background."""
        settings = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=1, limit_concurrency=256,
            proxy_headers=False, server_header=False, http=Connection, ws="none",
            ssl_certfile=self._config.certificate, ssl_keyfile=self._config.key,
        )  # fmt: skip
        self._server = server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=lambda: server.run([self._socket]), name="web", daemon=True)
        self._thread.start()
        log.info("serving %s on port %d", "https" if self._config.certificate else "http", self.port)

    def stop(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(3.0)
        self._socket.close()


def _check_certificate(config: WebConfig) -> None:
    if config.certificate is None:
        return
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(config.certificate, config.key, password="")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"web.certificate {config.certificate}",
            got=error,
            expected="a PEM certificate and its key, without a pass phrase",
        ) from error


def _address(scope: Scope) -> str:
    return _host(scope.get("client"))


def _host(client: tuple[str, int] | None) -> str:
    return client[0] if client else ""


def _unknown(got: str) -> Response:
    return problem(
        401, "authorization", got=got, expected="Authorization: Bearer TOKEN", do="make one: edgeguard hub token add",
        headers={"WWW-Authenticate": "Bearer"},
    )  # fmt: skip


def _too_large(most: int) -> Response:
    return problem(413, "request body", expected=f"at most {most} bytes", headers={"Connection": "close"})


def _shown(value: object) -> str | None:
    if value is None:
        return None
    text = str(value).encode("ascii", "backslashreplace").decode()
    return "".join(c if c.isprintable() else "?" for c in text)[:300]
