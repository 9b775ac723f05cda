"""The hub's HTTP side: signed releases for devices, and its state for people. Read-only; it asks nobody who they are.

``/metadata/*`` and ``/targets/*`` are the served folder of the release repository; trust in them comes from their
signatures alone. ``/v1/status?since=ID`` is the hub's state with the timeline after that event. ``/healthz`` answers.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import BaseRoute, Mount, Route
from starlette.staticfiles import StaticFiles

from edgeguard.errors import ConfigError
from edgeguard.hub.config import WebConfig

Status = Callable[[int], Mapping[str, Any]]
SERVED = ("metadata", "targets")

log = logging.getLogger(__name__)


def build(status: Status, folder: Path | None) -> Starlette:
    """The application.

    Args:
        status: gives the hub's state with the events after an id.
        folder: the release repository's served folder, None where there is none.
    """

    async def show_status(request: Request) -> Response:
        since = request.query_params.get("since", "0")
        if not (since.isascii() and since.isdigit() and len(since) <= 18):
            return PlainTextResponse("since: expected the id of an event\n", status_code=400)
        content = await run_in_threadpool(lambda: msgspec.json.encode(status(int(since))))
        return Response(content, media_type="application/json")

    async def show_health(_request: Request) -> Response:
        return PlainTextResponse("ok\n")

    routes: list[BaseRoute] = [Route("/v1/status", show_status), Route("/healthz", show_health)]
    if folder is not None:
        routes += [Mount(f"/{name}", StaticFiles(directory=folder / name, check_dir=False)) for name in SERVED]
    return Starlette(routes=routes)


class Web:
    """The server in a thread. The port is bound on construction, so that a port in use is told before all else.

    Raises:
        ConfigError: the address cannot be bound.
    """

    def __init__(self, config: WebConfig) -> None:
        what = f"web address {config.host}:{config.port}"
        try:
            family = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM)[0][0]
            self._socket = socket.socket(family)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((config.host, config.port))
            self._socket.listen(128)
        except OSError as error:
            raise ConfigError(
                what, got=error.strerror or error, expected="a free port of this machine", do="change [web]"
            ) from error
        self.port: int = self._socket.getsockname()[1]
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self, app: Starlette) -> None:
        """Serve in the background."""
        settings = uvicorn.Config(
            app, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=1, limit_concurrency=256
        )
        self._server = server = uvicorn.Server(settings)
        self._thread = threading.Thread(target=lambda: server.run([self._socket]), name="web", daemon=True)
        self._thread.start()
        log.info("serving http on port %d", self.port)

    def stop(self) -> None:
        """Stop serving and free the port."""
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(3.0)
        self._socket.close()
