"""The API of a hub on a free port, over a real database, without broker or director."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec

from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Message
from edgeguard.hub import api
from edgeguard.hub.access import ROLES, Tokens
from edgeguard.hub.casebook import Casebook, Move
from edgeguard.hub.cases import Case
from edgeguard.hub.commands import Commands
from edgeguard.hub.config import WebConfig
from edgeguard.hub.ingest import Accepted
from edgeguard.hub.metrics import Metrics
from edgeguard.hub.private import Private
from edgeguard.hub.queries import Queries
from edgeguard.hub.replay import Replayed
from edgeguard.hub.shared import Shared
from edgeguard.hub.store import Store
from edgeguard.hub.web import Web
from tests.simulators import fleet

NOW = 1_800_000_000_000


@dataclass
class Served:
    """A served database, and a token of each role."""

    store: Store
    book: Casebook
    commands: Commands
    tokens: Tokens
    metrics: Metrics
    web: Web
    clock: list[int]
    connected: bool = True
    sent: list[tuple[str, str, Message]] = field(default_factory=list)
    secrets: dict[str, str] = field(default_factory=dict)

    def take(self, device: str, *messages: Message) -> None:
        """What a device published, as it is stored."""
        items = [Accepted(device=device, message=message, payload=msgspec.json.encode(message)) for message in messages]
        self.store.apply(items, now_ms=self.clock[0])

    def add_case(self, **fields: Any) -> Case:
        """A record of the casebook."""
        known: dict[str, Any] = {
            "model": "signs", "model_digest": fleet.MODEL, "label": 1, "label_name": "yield", "state": "suspected",
            "created_ms": NOW, "updated_ms": NOW, "devices": ("d1", "d2"), "flagged": 40, "inputs": 100,
            "p_value": 1e-30, "channels": (),
        }  # fmt: skip
        return self.book.save(Move(case=Case(**known | fields), text="more flags than clean inputs explain"))

    def ask(
        self, method: str, path: str, body: object = None, *, role: str | None = "viewer", **headers: str
    ) -> tuple[int, Any]:
        """Status and JSON of one request with the token of a role."""
        response, content = self.fetch(method, path, body, role=role, **headers)
        is_json = response.getheader("content-type") == "application/json"
        return response.status, json.loads(content) if is_json and content else content

    def fetch(
        self, method: str, path: str, body: object = None, *, role: str | None = "viewer", **headers: str
    ) -> tuple[HTTPResponse, bytes]:
        """The same with the headers."""
        connection = HTTPConnection("127.0.0.1", self.web.port, timeout=10)
        sent: Mapping[str, str] = {"Authorization": f"Bearer {self.secrets[role]}"} if role else {}
        content = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        sent = {**sent, "Content-Type": "application/json"} if content is not None else sent
        try:
            connection.request(method, path, content, {**sent, **{k.replace("_", "-"): v for k, v in headers.items()}})
            response = connection.getresponse()
            return response, response.read()
        finally:
            connection.close()


def _add_tokens(tokens: Tokens) -> dict[str, str]:
    return {str(role): tokens.add(role, role, who="test")[0] for role in ROLES}


@cache
def _begun() -> tuple[bytes, dict[str, str]]:
    """A new database with a token of each role, and their secrets: made once, since making the tables takes long."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"sqlite:///{folder}/hub.db", fleet="test")
        secrets = _add_tokens(Tokens(store, clock_ms=lambda: NOW))
        store.close()
        return Path(folder, "hub.db").read_bytes(), secrets


@contextmanager
def serve(
    folder: Path,
    url: str | None = None,
    *,
    guard: GuardMetadata | None = None,
    private: Private | None = None,
    **web: Any,
) -> Iterator[Served]:
    """Serve a new database in ``folder``, or the empty one at ``url``; ``web`` are keys of ``[web]``.

    ``guard``: of the model that it watches, which is private where there are parties.
    """
    config = WebConfig(port=0, **web)
    clock = [NOW]
    if url is None:
        content, secrets = _begun()
        (folder / "hub.db").write_bytes(content)
    store = Store(url or f"sqlite:///{folder / 'hub.db'}", fleet="test")
    book = Casebook(store, clock_ms=lambda: clock[0])
    sent: list[tuple[str, str, Message]] = []

    def publish(device: str, channel: str, message: Message) -> bool:
        sent.append((device, channel, message))
        return True

    commands = Commands(store, book, publish=publish, clock_ms=lambda: clock[0])
    tokens = Tokens(store, clock_ms=lambda: clock[0])
    if url is not None:
        secrets = _add_tokens(tokens)
    queries = Queries(store, book)
    metrics = Metrics(queries.census, connected=lambda: served.connected, waiting=lambda: 7)
    served = Served(
        store=store,
        book=book,
        commands=commands,
        tokens=tokens,
        metrics=metrics,
        web=Web(config),
        clock=clock,
        sent=sent,
        secrets=dict(secrets),
    )
    guard = guard or fleet.guard_metadata()
    copy = SimpleNamespace(name="signs", guard=guard, guarded=folder / "signs.tflite", private=private is not None)
    said = Replayed(predicted=1, flagged=True, score=2.0)
    shared = Shared(
        store,
        book,
        folder=folder / "shared",
        models=lambda: {guard.model_digest: copy},
        clock_ms=lambda: clock[0],
        replay=lambda _model, inputs: [said] * len(inputs),
    )
    parts = api.Parts(
        config=config,
        queries=queries,
        tokens=tokens,
        metrics=metrics,
        status=lambda since: {"since": since},
        models=lambda: {guard.model_digest: copy},
        connected=lambda: served.connected,
        book=book,
        commands=commands,
        shared=shared,
        private=private,
        folder=folder / "served",
        stopping=lambda: served.web.stopping,
    )
    served.web.start(api.build(parts))
    try:
        yield served
    finally:
        served.web.stop()
        store.close()
