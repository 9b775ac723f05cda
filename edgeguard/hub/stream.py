"""The timeline as server-sent events: what there is after a number, then what comes.

Rules enforced here:

* the database is the only buffer: a client that reads slowly reads later, and takes no memory of the hub. One that
  does not read at all is dropped;
* numbers are in the order of the commits (see :mod:`edgeguard.hub.batch`): a client that goes on from the last one
  that it saw misses none;
* all clients together look at the database ``1 / POLL_S`` times a second, each by itself only where there is something
  new for it; there are at most ``CLIENTS``;
* a client whose token is no longer valid is told nothing after the next heartbeat;
* a stream ends within a second once the hub is stopping.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable

from sqlalchemy.exc import SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from edgeguard.hub.metrics import Metrics
from edgeguard.hub.queries import Queries
from edgeguard.hub.store import reason
from edgeguard.hub.views import Event

CLIENTS = 32
POLL_S = 0.4
HEARTBEAT_S = 15.0
SEND_S = 10.0
_AT_ONCE = 200

log = logging.getLogger(__name__)


class Feed:
    """What the streams of one web server share. Its methods belong to that server's event loop.

    Args:
        queries: reads the timeline.
        metrics: counts the clients.
        stopping: whether the streams must end.
        heartbeat_s: a client hears something at least this often.
    """

    def __init__(
        self, queries: Queries, metrics: Metrics, *, stopping: Callable[[], bool], heartbeat_s: float = HEARTBEAT_S
    ) -> None:
        self.queries = queries
        self.stopping = stopping
        self.heartbeat_s = heartbeat_s
        self._metrics = metrics
        self._newest = 0
        self._looked_s = -POLL_S
        self._looking = asyncio.Lock()
        self._clients = 0

    @property
    def full(self) -> bool:
        """Whether there are as many clients as there may be."""
        return self._clients >= CLIENTS

    def count(self, change: int) -> None:
        """A client came or went."""
        self._clients += change
        self._metrics.streams(change)

    async def newest(self) -> int:
        """The number of the last entry, as of the last look. Raises SQLAlchemyError."""
        async with self._looking:
            if time.monotonic() - self._looked_s >= POLL_S:
                self._newest = await run_in_threadpool(self.queries.newest_event)
                self._looked_s = time.monotonic()
            return self._newest


class EventStream(Response):
    """One client's stream.

    Args:
        feed: what it shares with the others.
        since: the number that it saw last; None begins with what comes next.
        valid: whether the client may still read; asks the database.
    """

    media_type = "text/event-stream"

    def __init__(self, feed: Feed, since: int | None, *, valid: Callable[[], bool]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._feed = feed
        self._since = since
        self._valid = valid

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the client goes, is too slow, may no longer, or the hub stops."""
        self._feed.count(1)
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await self._follow(send, gone)
        except asyncio.TimeoutError:
            log.warning("a client that reads no events was dropped")
        except SQLAlchemyError as error:
            log.warning("a stream of events ends: %s", reason(error))
        finally:
            gone.cancel()
            self._feed.count(-1)
        await send({"type": "http.response.body", "body": b""})

    async def _follow(self, send: Send, gone: asyncio.Task[None]) -> None:
        async def say(text: str) -> None:
            message = {"type": "http.response.body", "body": text.encode(), "more_body": True}
            await asyncio.wait_for(send(message), SEND_S)

        feed = self._feed
        since = await run_in_threadpool(feed.queries.newest_event) if self._since is None else self._since
        await say("retry: 3000\n\n")
        heard_s = time.monotonic()
        while not (gone.done() or feed.stopping()):
            through = await feed.newest()
            events: list[Event] = []
            if through > since:
                events = await run_in_threadpool(feed.queries.events_after, since, through=through, limit=_AT_ONCE)
            if events:
                await say("".join(map(_line, events)))
                since = events[-1].id
            elif time.monotonic() - heard_s < feed.heartbeat_s:
                await asyncio.wait({gone}, timeout=POLL_S)
                continue
            else:
                await say(": still here\n\n")
            if time.monotonic() - heard_s >= feed.heartbeat_s:
                heard_s = time.monotonic()
                if not await run_in_threadpool(self._valid):
                    return


def _line(event: Event) -> str:
    return f"id: {event.id}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n"


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
