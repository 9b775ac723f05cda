"""Tokens: what is kept of them, when they end, and which requests need one of which role."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import select, text

from edgeguard.errors import ConfigError
from edgeguard.hub.access import PREFIX, ROLES, USED_EVERY_MS, Role, Token, Tokens, allows, needed
from edgeguard.hub.store import Store
from edgeguard.hub.tables import audit

NOW = 1_800_000_000_000


@pytest.fixture
def clock() -> list[int]:
    return [NOW]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(f"sqlite:///{tmp_path / 'hub.db'}", fleet="test")
    yield opened
    opened.close()


@pytest.fixture
def tokens(store: Store, clock: list[int]) -> Tokens:
    return Tokens(store, clock_ms=lambda: clock[0])


def test_a_token_is_known_by_its_secret_alone(tokens: Tokens) -> None:
    secret, made = tokens.add("grafana", "viewer", who="me")
    assert made == Token(name="grafana", role="viewer", created_ms=NOW, expires_ms=None, used_ms=None)
    found = tokens.find(secret)
    assert found is not None
    assert (found.name, found.role) == ("grafana", "viewer")
    for other in ("", "grafana", secret[:-1], secret + "a", secret.upper(), "\udcff", "\0"):
        assert tokens.find(other) is None


def test_a_secret_is_random_and_nowhere_in_the_database(tokens: Tokens, tmp_path: Path, store: Store) -> None:
    secrets = [tokens.add(f"t{i}", "admin", who="me")[0] for i in range(3)]
    assert len(set(secrets)) == 3
    for secret in secrets:
        assert secret.startswith(PREFIX)
        assert len(secret) - len(PREFIX) >= 256 / 6
    with store.read() as db:
        digests = {row[0] for row in db.execute(text("SELECT digest FROM tokens"))}
    assert digests == {hashlib.sha256(secret.encode()).hexdigest() for secret in secrets}
    store.close()
    for path in tmp_path.iterdir():
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path


def test_a_token_ends_when_it_expires(tokens: Tokens, clock: list[int]) -> None:
    secret, _ = tokens.add("guest", "viewer", who="me", lifetime_s=60)
    clock[0] = NOW + 59_999
    assert tokens.find(secret) is not None
    clock[0] = NOW + 60_000
    assert tokens.find(secret) is None
    assert not tokens.worked(secret)


def test_a_token_ends_when_it_is_revoked(tokens: Tokens) -> None:
    secret, _ = tokens.add("guest", "viewer", who="me")
    assert tokens.find(secret) is not None
    tokens.revoke("guest", who="me")
    assert tokens.find(secret) is None
    assert tokens.all() == []


def test_making_and_revoking_stand_in_the_audit_trail(tokens: Tokens, store: Store) -> None:
    tokens.add("guest", "operator", who="ann")
    tokens.revoke("guest", who="bob")
    with store.read() as db:
        rows = db.execute(select(audit.c.subject, audit.c.who, audit.c.became).order_by(audit.c.id)).all()
    assert [tuple(row) for row in rows] == [("token guest", "ann", "operator"), ("token guest", "bob", "revoked")]


def test_its_use_is_noted_to_the_hour(tokens: Tokens, clock: list[int]) -> None:
    secret, _ = tokens.add("grafana", "viewer", who="me")

    def used() -> int | None:
        tokens.find(secret)
        return tokens.all()[0].used_ms

    assert used() == NOW
    clock[0] = NOW + USED_EVERY_MS - 1
    assert used() == NOW
    clock[0] = NOW + USED_EVERY_MS
    assert used() == NOW + USED_EVERY_MS


def test_a_token_of_another_fleet_is_none_here(tokens: Tokens, tmp_path: Path) -> None:
    secret, _ = tokens.add("grafana", "viewer", who="me")
    other = Store(f"sqlite:///{tmp_path / 'hub.db'}", fleet="other")
    assert Tokens(other, clock_ms=lambda: NOW).find(secret) is None
    assert Tokens(other, clock_ms=lambda: NOW).all() == []
    other.close()


@pytest.mark.parametrize("name", ["", "Grafana", "a b", "-a", "a" * 64, "a\n", "../x", "ä"])
def test_a_bad_name_is_refused(tokens: Tokens, name: str) -> None:
    with pytest.raises(ConfigError, match="token name"):
        tokens.add(name, "viewer", who="me")


def test_a_name_is_given_once(tokens: Tokens) -> None:
    first, _ = tokens.add("grafana", "viewer", who="me")
    with pytest.raises(ConfigError, match="grafana"):
        tokens.add("grafana", "admin", who="me")
    found = tokens.find(first)
    assert found is not None
    assert found.role == "viewer"


def test_only_a_token_that_there_is_can_be_revoked(tokens: Tokens) -> None:
    with pytest.raises(ConfigError, match="nobody"):
        tokens.revoke("nobody", who="me")


def test_each_role_may_do_what_those_before_it_may() -> None:
    assert [[allows(role, wanted) for wanted in ROLES] for role in ROLES] == [
        [True, False, False],
        [True, True, False],
        [True, True, True],
    ]


@pytest.mark.parametrize(
    ("method", "path", "role"),
    [
        ("GET", "/v1/devices", "viewer"),
        ("HEAD", "/v1/devices", "viewer"),
        ("GET", "/v1/openapi.json", "viewer"),
        ("GET", "/v1/events/stream", "viewer"),
        ("GET", "/metrics", "viewer"),
        ("GET", "/v1/cases/1", "viewer"),
        ("GET", "/v1/cases/1/evidence", "operator"),
        ("HEAD", "/v1/cases/1/evidence", "operator"),
        ("GET", "/", "viewer"),
        ("GET", "/nothing", "viewer"),
        ("GET", "/healthz/", "viewer"),
        ("GET", "/metadata", "viewer"),
        ("GET", "//metadata/x", "viewer"),
        ("POST", "/v1/cases/1/decisions", "operator"),
        ("POST", "/v1/devices/d1/commands", "operator"),
        ("POST", "/healthz", "operator"),
        ("PUT", "/metadata/root.json", "operator"),
        ("BREW", "/v1/devices", "operator"),
        ("GET", "/v1/tokens", "admin"),
        ("POST", "/v1/tokens", "admin"),
        ("DELETE", "/v1/tokens/x", "admin"),
        ("GET", "/healthz", None),
        ("GET", "/metadata/timestamp.json", None),
        ("GET", "/targets/abc.model.tflite", None),
    ],
)
def test_what_a_request_needs(method: str, path: str, role: Role | None) -> None:
    assert needed(method, path) == role


def test_the_counters_are_open_only_where_the_operator_says_so() -> None:
    assert needed("GET", "/metrics", open_metrics=True) is None
    assert needed("POST", "/metrics", open_metrics=True) == "operator"
    assert needed("GET", "/metrics/x", open_metrics=True) == "viewer"
