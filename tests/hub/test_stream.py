"""The timeline as server-sent events: in order, without gaps, for a bounded number of clients, until the hub stops."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert

from edgeguard.hub import schema, stream
from edgeguard.hub.queries import Queries
from edgeguard.hub.views import Event
from tests.hub.serving import NOW, Served, serve
from tests.simulators.fleet import wait_until


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


class Following:
    """A client of the stream: its events as they come."""

    def __init__(self, hub: Served, query: str = "", **headers: str) -> None:
        self._connection = HTTPConnection("127.0.0.1", hub.web.port, timeout=10)
        self._connection.request(
            "GET",
            f"/v1/events/stream{query}",
            headers={"Authorization": f"Bearer {hub.secrets['viewer']}"}
            | {k.replace("_", "-"): v for k, v in headers.items()},
        )
        self.response: HTTPResponse = self._connection.getresponse()

    def line(self) -> bytes:
        return self.response.readline().strip()

    def event(self) -> dict[str, Any]:
        """The next event, whose id stands before it."""
        lines: list[bytes] = []
        while not lines or not lines[-1].startswith(b"data: "):
            lines.append(self.line())
            assert lines[-1] or len(lines) < 10
        event: dict[str, Any] = json.loads(lines[-1][6:])
        assert f"id: {event['id']}".encode() in lines
        assert f"event: {event['kind']}".encode() in lines
        return event

    def close(self) -> None:
        self._connection.close()


def tell(hub: Served, text: str) -> None:
    hub.book.tell("test", "it", text)


class TestStream:
    def test_it_gives_what_there_is_after_a_number_and_then_what_comes(self, hub: Served) -> None:
        for text in ("one", "two", "three"):
            tell(hub, text)
        client = Following(hub, "?since=1")
        assert client.response.getheader("Content-Type") == "text/event-stream; charset=utf-8"
        assert [client.event()["text"] for _ in range(2)] == ["two", "three"]
        tell(hub, "four")
        assert client.event()["text"] == "four"
        client.close()

    def test_a_client_that_comes_back_goes_on_where_it_was(self, hub: Served) -> None:
        for text in ("one", "two", "three"):
            tell(hub, text)
        client = Following(hub, "?since=0", Last_Event_ID="2")
        assert client.event()["text"] == "three"
        client.close()

    def test_without_a_number_it_begins_with_what_comes(self, hub: Served) -> None:
        tell(hub, "before")
        client = Following(hub)
        assert client.line() == b"retry: 3000"
        tell(hub, "after")
        assert client.event()["text"] == "after"
        client.close()

    def test_where_nothing_is_new_the_entries_are_not_read(self, hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        tell(hub, "before")
        read: list[int] = []
        real = Queries.events_after

        def noted(queries: Queries, since: int, *, through: int, limit: int) -> list[Event]:
            read.append(through)
            return real(queries, since, through=through, limit=limit)

        monkeypatch.setattr(Queries, "events_after", noted)
        client = Following(hub, "?since=1")
        time.sleep(stream.POLL_S * 3)
        assert read == []
        tell(hub, "after")
        assert (client.event()["text"], read) == ("after", [2])
        client.close()

    def test_it_ends_within_a_second_when_the_hub_stops(self, hub: Served) -> None:
        client = Following(hub)
        client.line()
        began = time.monotonic()
        threading.Thread(target=hub.web.stop).start()
        while client.response.readline():
            pass
        assert time.monotonic() - began < 1.5
        client.close()

    def test_a_client_that_leaves_makes_room(self, hub: Served) -> None:
        clients = [Following(hub) for _ in range(stream.CLIENTS)]
        assert hub.ask("GET", "/v1/events/stream")[0] == 503
        clients[0].close()
        wait_until(lambda: f"streams {stream.CLIENTS - 1}.0" in hub.metrics.text().decode())
        more = Following(hub)
        assert more.response.status == 200
        for client in [more, *clients[1:]]:
            client.close()

    @pytest.mark.parametrize("number", ["x", "-1", str(10**30)])
    def test_a_bad_number_is_refused(self, hub: Served, number: str) -> None:
        assert hub.ask("GET", f"/v1/events/stream?since={number}")[0] == 400
        assert hub.ask("GET", "/v1/events/stream", Last_Event_ID=number)[0] == 400


class TestHeartbeat:
    @pytest.fixture
    def quick(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
        monkeypatch.setattr(stream.Feed.__init__, "__kwdefaults__", {"heartbeat_s": 0.3})
        with serve(tmp_path) as served:
            yield served

    def test_it_is_heard_where_nothing_happens(self, quick: Served) -> None:
        client = Following(quick)
        lines = [client.line() for _ in range(5)]
        assert lines.count(b": still here") >= 1
        client.close()

    def test_a_client_whose_token_ended_hears_no_more(self, quick: Served) -> None:
        client = Following(quick)
        client.line()
        quick.tokens.revoke("viewer", who="test")
        while client.response.readline():
            pass
        client.close()

    def test_a_client_that_reads_nothing_is_dropped(
        self, quick: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setattr(stream, "SEND_S", 0.3)
        row = {"fleet": "test", "at_ms": NOW, "kind": "k", "subject": "s", "text": "x" * 100_000, "detail": {}}
        with quick.store.write() as db:
            db.execute(insert(schema.events), [row] * 60)
        with socket.create_connection(("127.0.0.1", quick.web.port)) as raw:
            head = "GET /v1/events/stream?since=0 HTTP/1.1\r\nHost: x"
            raw.sendall(f"{head}\r\nAuthorization: Bearer {quick.secrets['viewer']}\r\n\r\n".encode())
            wait_until(lambda: "reads no events" in caplog.text)
            wait_until(lambda: "streams 0.0" in quick.metrics.text().decode())
