"""Speaks to a hub's API, with the standard library alone.

Rules enforced here:

* a token goes to the address that was given and to no other: redirections are not followed, proxies not used; it is
  never printed;
* whatever comes back is bounded, checked for its shape, and shown without control characters: a device may have
  written it;
* a hub that cannot be asked is a ``LinkError``: nothing is known then. What it refuses is a ``ConfigError``.
"""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import IO, Any, NoReturn

from edgeguard.errors import ConfigError, LinkError

TIMEOUT_S = 30.0
_MAX_ANSWER = 64 << 20
_PAGE = 500


class Client:
    """One hub.

    Args:
        url: where its web server is, such as ``https://hub.lan:8443``.
        token: what to show it, None for a hub that lets readers of its own machine in.
        ca: PEM file of the authority that signed its certificate; without, those that this machine trusts.

    Raises:
        ConfigError: not a URL of a web server, no token, or not a file of certificates.
    """

    def __init__(self, url: str, token: str | None, ca: Path | None = None) -> None:
        if not _is_address(url):
            raise ConfigError("url", got=repr(url), expected="one such as http://127.0.0.1:8080")
        if token is not None and not (token.isascii() and token.isprintable()):
            raise ConfigError("token", expected="one line of ASCII", do="give it as edgeguard hub token add printed it")
        self._url = url.rstrip("/")
        self._token = token
        try:
            context = ssl.create_default_context(cafile=ca)
        except OSError as error:
            raise ConfigError(f"ca {ca}", got=error, expected="a PEM file of certificates") from error
        self._opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(context=context),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
        ):
            self._opener.add_handler(handler)

    def get(self, path: str, **query: object) -> dict[str, Any]:
        """One JSON object. Queries that are None are left out."""
        with self._open("GET", path, query) as response:
            return _object(response)

    def send(self, method: str, path: str, body: Mapping[str, object] | None = None) -> dict[str, Any]:
        """Ask for a change; the JSON object in answer, {} where there is none."""
        with self._open(method, path, {}, body) as response:
            return _object(response) if response.status != 204 else {}

    def rows(self, path: str, *, limit: int, **query: object) -> list[dict[str, Any]]:
        """The first ``limit`` rows of a list, over as many pages as they take."""
        found: list[dict[str, Any]] = []
        cursor = None
        while True:
            page = self.get(path, limit=min(_PAGE, limit - len(found)), cursor=cursor, **query)
            found += page["items"]
            cursor = page["next"]
            if cursor is None or len(found) >= limit:
                return found

    def follow(self, path: str, since: int | None) -> Iterator[dict[str, Any]]:
        """The data of server-sent events, as long as the connection lasts."""
        with self._open("GET", path, {"since": since}) as response:
            while line := _line(response):
                if line.startswith(b"data: "):
                    yield _parse(line[6:])

    def _open(
        self, method: str, path: str, query: Mapping[str, object], body: Mapping[str, object] | None = None
    ) -> HTTPResponse:
        given = urllib.parse.urlencode({name: value for name, value in query.items() if value is not None})
        request = urllib.request.Request(
            f"{self._url}{path}" + (f"?{given}" if given else ""),
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Accept": "application/json", "User-Agent": "edgeguard"}
            | ({} if body is None else {"Content-Type": "application/json"})
            | ({} if self._token is None else {"Authorization": f"Bearer {self._token}"}),
        )
        try:
            response: HTTPResponse = self._opener.open(request, timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            raise _refused(self._url, error) from error
        except (OSError, HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise LinkError(f"hub {self._url}", got=reason, expected="a hub that answers", do="see --url") from error
        return response


def plain(value: object) -> str:
    """A value for a terminal: nothing in it moves the cursor. What is not known is a dash."""
    text = "-" if value is None else str(value)
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


class _Answer(dict[str, Any]):
    """A JSON object that a hub should have written: what is not in it says that another service did."""

    def __missing__(self, key: str) -> NoReturn:
        raise LinkError("answer of the hub", got=f"no {key!r}", expected="an EdgeGuard hub of this version")


def _is_address(url: str) -> bool:
    """Whether a URL names a web server, and no more than its host, port and path."""
    try:
        parts = urllib.parse.urlsplit(url)
        host = (parts.hostname or "").encode("idna")  # as the resolver gets it; labels have at most 63 bytes
        parts.port  # noqa: B018  # raises where it is no number
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and host != b""
        and parts.path.isascii()
        and not (parts.query or parts.fragment)
    )


def _line(response: HTTPResponse) -> bytes:
    try:
        return response.readline(_MAX_ANSWER)
    except (OSError, HTTPException) as error:
        raise LinkError("events of the hub", got=error, expected="a hub that goes on") from error


def _object(response: IO[bytes]) -> dict[str, Any]:
    try:
        content = response.read(_MAX_ANSWER)
    except (OSError, HTTPException) as error:
        raise LinkError("answer of the hub", got=error, expected="JSON") from error
    return _parse(content)


def _parse(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content, object_hook=_Answer)
    except (ValueError, RecursionError) as error:
        raise LinkError("answer of the hub", got=error, expected="JSON") from error
    if not isinstance(found, dict):
        raise LinkError("answer of the hub", got=type(found).__name__, expected="a JSON object")
    return found


def _refused(url: str, error: urllib.error.HTTPError) -> ConfigError | LinkError:
    try:
        told = _object(error)
    except LinkError:
        told = {"got": f"status {error.code}"}
    kind = LinkError if error.code >= 500 or error.code == 429 else ConfigError
    shown = {name: plain(told[name]) for name in ("got", "expected", "do") if told.get(name) is not None}
    return kind(plain(told.get("what", f"hub {url}")), **shown)
