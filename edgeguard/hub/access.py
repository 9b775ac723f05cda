"""Who may use the hub's API: tokens, each with a role.

Rules enforced here:

* a token is 256 random bits, shown once; the database holds its SHA-256 alone. It is looked up by that digest, so that
  how long the look-up takes says nothing of a token that exists;
* all needs a token but what :func:`needed` names;
* roles build on each other: a viewer reads, an operator also decides and commands, an admin also hands out tokens;
* a token that has expired or was revoked is none, from the next request on;
* every token that is made or revoked stands in the audit trail, with who did it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from sqlalchemy import ColumnElement, Row, delete, insert, select, update
from sqlalchemy.exc import IntegrityError, SQLAlchemyError

from edgeguard.errors import ConfigError
from edgeguard.hub.store import Store
from edgeguard.hub.tables import audit, tokens

Role = Literal["viewer", "operator", "admin"]
ROLES: tuple[Role, ...] = ("viewer", "operator", "admin")
"""Each may do what those before it may."""
PREFIX = "egt_"
"""What tokens begin with, so that a scanner for secrets knows one that was published by mistake."""
USED_EVERY_MS = 3_600_000
"""``used_ms`` is not kept more exactly: reading must not become writing."""
_REMEMBERED = 4096
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(frozen=True, kw_only=True)
class Token:
    """A token without its secret. ``expires_ms`` None: never; ``used_ms`` None: not yet, else to the hour."""

    name: str
    role: Role
    created_ms: int
    expires_ms: int | None
    used_ms: int | None


def allows(role: Role, needed: Role) -> bool:
    """Whether a role may do what another one may."""
    return ROLES.index(role) >= ROLES.index(needed)


def needed(method: str, path: str, *, open_metrics: bool = False) -> Role | None:
    """The role that a request needs; None where it needs none.

    All that is not named here needs one, so that nothing is open because somebody forgot it. What devices fetch is
    open: it is signed, and trust in it comes from the signatures alone.

    Args:
        method: of the request.
        path: of the request, decoded.
        open_metrics: whether everyone may read the counters.
    """
    reads = method in ("GET", "HEAD")
    if reads and (path == "/healthz" or path.startswith(("/metadata/", "/targets/"))):
        return None
    if reads and open_metrics and path == "/metrics":
        return None
    if path.startswith("/v1/tokens"):
        return "admin"
    # What a case rests on is what a trigger would have to avoid, that nobody notices.
    reads = reads and not (path.startswith("/v1/cases/") and path.endswith("/evidence"))
    return "viewer" if reads else "operator"


class Tokens:
    """The tokens of one fleet. Every method may be called from any thread.

    Args:
        store: the database.
        clock_ms: the hub's clock.
    """

    def __init__(self, store: Store, *, clock_ms: Callable[[], int]) -> None:
        self._store = store
        self._clock_ms = clock_ms
        self._worked: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def add(self, name: str, role: Role, *, who: str, lifetime_s: int | None = None) -> tuple[str, Token]:
        """Make a token.

        Args:
            name: what it is called, a lower-case id.
            role: what it allows.
            who: who makes it, for the audit trail.
            lifetime_s: after so many seconds it expires; None: never.

        Returns:
            The secret, which nobody can be told again, and what is kept.

        Raises:
            ConfigError: not a name, or one that there is.
        """
        if not _NAME.fullmatch(name):
            raise ConfigError(f"token name {name!r}", expected="a lower-case id such as grafana", do="choose another")
        secret = PREFIX + secrets.token_urlsafe(32)
        now = self._clock_ms()
        expires = None if lifetime_s is None else now + lifetime_s * 1000
        token = Token(name=name, role=role, created_ms=now, expires_ms=expires, used_ms=None)
        row = {"fleet": self._store.fleet, "digest": _digest(secret), **token.__dict__}
        try:
            with self._store.write() as db:
                db.execute(insert(tokens), row)
                db.execute(insert(audit), self._entry(name, role, who, now))
        except IntegrityError as error:
            raise ConfigError(f"token {name}", got="one of this name already", do="revoke that one first") from error
        return secret, token

    def revoke(self, name: str, *, who: str) -> None:
        """End a token. Raises ConfigError where there is none of this name."""
        with self._store.write() as db:
            gone = db.execute(delete(tokens).where(*self._named(name))).rowcount
            if gone:
                db.execute(insert(audit), self._entry(name, "revoked", who, self._clock_ms()))
        if not gone:
            raise ConfigError(f"token {name!r}", got="no token of this name", do="list the tokens")

    def all(self) -> list[Token]:
        """All tokens by name, expired ones too."""
        with self._store.read() as db:
            chosen = select(tokens).where(tokens.c.fleet == self._store.fleet).order_by(tokens.c.name)
            return [_token(row) for row in db.execute(chosen)]

    def worked(self, secret: str) -> bool:
        """Whether this token was valid when it was last looked up. Asks no database."""
        with self._lock:
            return _digest(secret) in self._worked

    def find(self, secret: str) -> Token | None:
        """The token with this secret, None where there is none that is valid now."""
        digest, now = _digest(secret), self._clock_ms()
        with self._store.read() as db:
            row = db.execute(
                select(tokens).where(tokens.c.fleet == self._store.fleet, tokens.c.digest == digest)
            ).one_or_none()
        valid = (
            row is not None
            and hmac.compare_digest(row.digest, digest)
            and (row.expires_ms is None or now < row.expires_ms)
        )
        with self._lock:
            self._worked.pop(digest, None)
            if valid:
                self._worked[digest] = None
                while len(self._worked) > _REMEMBERED:
                    self._worked.popitem(last=False)
        if row is None or not valid:
            return None
        token = _token(row)
        if token.used_ms is None or now - token.used_ms >= USED_EVERY_MS:
            self._note_use(token.name, now)
        return token

    def _note_use(self, name: str, now: int) -> None:
        # A database that is busy writing is no reason to refuse a reader: the next request notes it.
        with suppress(SQLAlchemyError), self._store.write() as db:
            db.execute(update(tokens).where(*self._named(name)).values(used_ms=now))

    def _named(self, name: str) -> tuple[ColumnElement[bool], ...]:
        return (tokens.c.fleet == self._store.fleet, tokens.c.name == name)

    def _entry(self, name: str, became: str, who: str, now: int) -> dict[str, object]:
        return {
            "fleet": self._store.fleet, "at_ms": now, "subject": f"token {name}", "who": who, "was": None,
            "became": became, "why": "",
        }  # fmt: skip


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _token(row: Row[tuple[object, ...]]) -> Token:
    return Token(
        name=row.name, role=row.role, created_ms=row.created_ms, expires_ms=row.expires_ms, used_ms=row.used_ms
    )
