"""The hub's REST interface: what a request says, checked, to the part of the hub that answers it.

Rules enforced here:

* every list is given in pages; every number, name and text that comes in is bounded before it reaches the database;
* every answer that is not the one asked for is a :class:`edgeguard.hub.views.Problem`;
* what a person decides or asks of a device is recorded under the name of the token that was used;
* the OpenAPI document is made of this code, and names the role that each operation needs.

Who may do what is decided before any of this: see :mod:`edgeguard.hub.web`.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import anyio.to_thread
import msgspec
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from edgeguard import __version__
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.private import Inspection, Signed
from edgeguard.errors import ConfigError, EdgeGuardError
from edgeguard.hub import commands as questions
from edgeguard.hub import metrics as counters
from edgeguard.hub import views
from edgeguard.hub.access import Token, Tokens, needed
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.cases import Case, State
from edgeguard.hub.commands import Commands
from edgeguard.hub.commands import State as CommandStep
from edgeguard.hub.config import PolicyConfig, WebConfig
from edgeguard.hub.metrics import Metrics
from edgeguard.hub.private import Private
from edgeguard.hub.queries import MAX_PAGE, Queries
from edgeguard.hub.rollout import Standing
from edgeguard.hub.shared import ENOUGH, Shared
from edgeguard.hub.store import Store, reason
from edgeguard.hub.stream import EventStream, Feed
from edgeguard.hub.views import MAX_INTEGER, Page
from edgeguard.hub.web import Caller, Gate, problem

SERVED = ("metadata", "targets")
"""The served folders of a release repository."""
THREADS = 8
"""Requests that may ask the database at once: ingest needs connections too."""
HEALTH_S = 1.0
"""The database is asked at most this often whether it is there: everyone may ask the hub."""
_ABOUT = """What a fleet's hub knows and does. Send `Authorization: Bearer TOKEN`; `x-role` is the role that an
operation needs, and each role may do what those before it may: viewer, operator, admin. Times are milliseconds since
1970; what is not known is null. Lists come in pages: pass `next` as `cursor` until it is null. Whatever is refused is
answered with a Problem."""
_OPERATIONS = ("get", "post", "delete")
T = TypeVar("T")

log = logging.getLogger(__name__)

Cursor = Annotated[str | None, Query(max_length=300, description="`next` of the page before; none: the first page")]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="rows in a page")]


class Named(Protocol):
    """A model that the hub watches."""

    @property
    def name(self) -> str:
        """What its releases are called."""

    @property
    def guard(self) -> GuardMetadata:
        """What its file says of itself."""

    @property
    def private(self) -> bool:
        """Whether nothing of it but counts is for the hub."""


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the API speaks to.

    Attributes:
        config: the web server's configuration.
        queries: reads the database.
        tokens: who may.
        metrics: what is counted.
        status: the hub's state with the events after an id.
        models: those that the hub watches, by model digest.
        connected: whether the broker is.
        book: records what a person decides.
        commands: asks devices.
        policy: says how evidence is pooled.
        shared: replays inputs that owners share.
        private: judges what was found in private; None where no parties are configured.
        folder: the release repository's served folder, None where there is none.
        stopping: whether streams must end.
    """

    config: WebConfig
    queries: Queries
    tokens: Tokens
    metrics: Metrics
    status: Callable[[int], Mapping[str, Any]]
    models: Callable[[], Mapping[str, Named]]
    connected: Callable[[], bool]
    book: Casebook
    commands: Commands
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    shared: Shared | None = None
    private: Private | None = None
    folder: Path | None = None
    stopping: Callable[[], bool] = lambda: False


def build(parts: Parts) -> ASGIApp:
    """The web application, with everything that holds for each request around it."""
    return Gate(application(parts), tokens=parts.tokens, config=parts.config, metrics=parts.metrics)


def application(parts: Parts) -> FastAPI:
    """The routes alone."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        anyio.to_thread.current_default_thread_limiter().total_tokens = THREADS
        yield

    app = FastAPI(
        title="EdgeGuard hub",
        version=__version__,
        description=_ABOUT,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    _add_reading(app, parts)
    _add_acting(app, parts)
    _add_tokens(app, parts)
    _add_operating(app, parts)
    _add_errors(app)
    if parts.folder is not None:
        for name in SERVED:
            app.mount(f"/{name}", StaticFiles(directory=parts.folder / name, check_dir=False))
    return app


def openapi() -> dict[str, Any]:
    """The OpenAPI document of the API, without a hub."""
    store = Store("sqlite://", fleet="any")
    book = Casebook(store, clock_ms=lambda: 0)
    queries = Queries(store, book)
    commands = Commands(store, book, publish=lambda *_: False, clock_ms=lambda: 0)
    parts = Parts(
        config=WebConfig(),
        queries=queries,
        tokens=Tokens(store, clock_ms=lambda: 0),
        metrics=Metrics(queries.census),
        status=lambda _since: {},
        models=dict,
        connected=lambda: False,
        book=book,
        commands=commands,
    )
    with closing(store):
        return document(application(parts))


def document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document: the routes, the role that each needs, and how each can fail."""
    made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
    components = made.setdefault("components", {})
    components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    schemas = components.setdefault("schemas", {})
    schemas["Problem"] = views.Problem.model_json_schema()
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    failure = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Problem"}}}}
    for path, item in made["paths"].items():
        for method in _OPERATIONS:
            operation = item.get(method)
            if operation is None:
                continue
            operation["responses"].pop("422", None)
            role = needed(method.upper(), path)
            statuses = [400, *([401, 403, 429] if role else []), *([404] if "{" in path else []), 503]
            for status in statuses:
                operation["responses"].setdefault(str(status), {"description": HTTPStatus(status).phrase, **failure})
            if role:
                operation["security"] = [{"token": []}]
                operation["x-role"] = role
    return made


def _add_reading(app: FastAPI, parts: Parts) -> None:
    queries = parts.queries

    @app.get("/v1/status", tags=["fleet"])
    def status(since: Annotated[int, Query(ge=0, le=MAX_INTEGER, description="id of an event")] = 0) -> Response:
        """The whole state in one answer, with the timeline after an event: for fleets small enough to look at."""
        return Response(msgspec.json.encode(parts.status(since)), media_type="application/json")

    @app.get("/v1/devices", tags=["fleet"])
    def devices(
        limit: Limit = 100,
        cursor: Cursor = None,
        state: views.DeviceState | None = None,
        model: views.Digest | None = None,
    ) -> Page[views.Device]:
        """Devices by name; of one state, or those that run one model."""
        return queries.devices(limit=limit, cursor=cursor, state=state, model_digest=model)

    @app.get("/v1/devices/{device}", tags=["fleet"])
    def device(device: views.DeviceName) -> views.Device:
        """One device, with its last birth and health messages."""
        return _found(queries.device(device), f"device {device}")

    @app.get("/v1/models", tags=["fleet"])
    def models() -> Page[views.Model]:
        """The models that this hub watches."""
        running = queries.running()
        items = [
            views.Model(
                name=model.name,
                model_digest=digest,
                guard_digest=model.guard.guard_digest,
                classes=list(model.guard.classes),
                fpr=model.guard.fpr,
                devices=running.get(digest, 0),
            )
            for digest, model in dict(parts.models()).items()
        ]
        return Page(items=items)

    @app.get("/v1/reports", tags=["evidence"])
    def reports(
        limit: Limit = 100, cursor: Cursor = None, device: views.DeviceName | None = None
    ) -> Page[views.Report]:
        """Reports, the newest first. Of one device, a page can be short, or empty, with more to come."""
        return queries.reports(limit=limit, cursor=cursor, device=device)

    @app.get("/v1/dead-letters", tags=["evidence"])
    def dead_letters(limit: Limit = 100, cursor: Cursor = None) -> Page[views.DeadLetter]:
        """Messages that could not be accepted, the newest first."""
        return queries.dead_letters(limit=limit, cursor=cursor)

    @app.get("/v1/cases", tags=["cases"])
    def cases(
        limit: Limit = 100,
        cursor: Cursor = None,
        state: State | None = None,
        confirmed: Annotated[bool | None, Query(description="true: cases; false: suspicions; none: both")] = None,
        awaiting: Annotated[bool | None, Query(description="true: those of which a step waits for a person")] = None,
    ) -> Page[views.Case]:
        """Suspicions and cases, the newest first."""
        return queries.cases(limit=limit, cursor=cursor, state=state, is_case=confirmed, awaiting=awaiting)

    @app.get("/v1/cases/{case}", tags=["cases"])
    def case(case: views.Id) -> views.CaseDetail:
        """One suspicion or case: explanation, evidence, measurements, audit trail."""
        return _found(queries.case(case), f"case {case}")

    @app.get("/v1/cases/{case}/devices", tags=["cases"])
    def members(
        case: views.Id, limit: Limit = 100, cursor: Cursor = None, state: Standing | None = None
    ) -> Page[views.Member]:
        """The devices that the release of a case was offered to, by name, and what became of it."""
        _found(queries.case(case), f"case {case}")
        return queries.members(case, limit=limit, cursor=cursor, state=state)

    @app.get("/v1/cases/{case}/evidence", tags=["cases"])
    def evidence(case: views.Id) -> views.Evidence:
        """What devices sent of a case's label, pooled, as `edgeguard repair --evidence` reads it."""
        found = _found(parts.book.get(case), f"case {case}")
        model = _found(dict(parts.models()).get(found.model_digest), f"model of case {case}")
        if found.private or model.private:
            raise ConfigError(f"evidence of case {case}", got="a private model", do="ask in a private round")
        pooled = parts.book.evidence(found, model.guard, parts.policy)
        if pooled is None or not pooled.flagged_mean.size:
            raise ConfigError(
                f"evidence of case {case}", got="no features under the guard that the model has now",
                expected="reports with features", do="wait for new reports",
            )  # fmt: skip
        dormant = questions.dormant(model.guard, parts.commands.of_case(case))
        return views.Evidence(
            model_digest=found.model_digest,
            label=found.label,
            flagged_mean=pooled.flagged_mean.tolist(),
            unflagged_mean=pooled.unflagged_mean.tolist(),
            dormant=[views.Dormant(layer=one.layer, channels=list(one.channels)) for one in dormant],
        )

    @app.get("/v1/cases/{case}/round", tags=["cases"])
    def private_round(case: views.Id) -> views.Round:
        """The question that a private round asks the fleet for a case of a private model, as parties and devices read
        it. It is always the same one."""
        found, model, private = _private(parts, case)
        return views.Round(**msgspec.to_builtins(private.round(found, model.guard)))

    @app.get("/v1/events", tags=["timeline"])
    def events(
        limit: Limit = 100, cursor: Cursor = None, order: Literal["oldest", "newest"] = "oldest"
    ) -> Page[views.Event]:
        """The timeline, from its beginning or from its end."""
        return queries.events(limit=limit, cursor=cursor, newest_first=order == "newest")

    @app.get("/v1/commands", tags=["commands"])
    def commands(
        limit: Limit = 100,
        cursor: Cursor = None,
        device: views.DeviceName | None = None,
        state: CommandStep | None = None,
    ) -> Page[views.CommandState]:
        """Commands to devices, the newest first; those that are proposed wait for a person."""
        return queries.commands(limit=limit, cursor=cursor, device=device, state=state)

    @app.get("/v1/commands/{command}", tags=["commands"])
    def command(command: views.CommandId) -> views.CommandState:
        """One command, and what became of it."""
        return _found(queries.command(command), f"command {command}")

    feed = Feed(queries, parts.metrics, stopping=parts.stopping)

    @app.get(
        "/v1/events/stream",
        tags=["timeline"],
        responses={200: {"description": "`id`, `event` and `data`: an Event", "content": {EventStream.media_type: {}}}},
    )
    async def stream(
        request: Request,
        since: Annotated[int | None, Query(ge=0, le=MAX_INTEGER, description="id of an event; none: from now")] = None,
        last_event_id: Annotated[int | None, Header(ge=0, le=MAX_INTEGER)] = None,
    ) -> Response:
        """The timeline after an event, as server-sent events that go on until the client leaves."""
        if feed.full:
            return problem(503, "stream", got="too many clients", do="try again later", headers={"Retry-After": "30"})
        after = since if last_event_id is None else last_event_id
        return EventStream(feed, after, valid=_caller(request).valid)


def _add_acting(app: FastAPI, parts: Parts) -> None:
    queries = parts.queries

    @app.post("/v1/cases/{case}/decisions", tags=["cases"])
    def decide(request: Request, case: views.Id, decision: views.Decision) -> views.CaseDetail:
        """Approve or reject a step of a case. A rejection ends it; an approval is taken only where one is awaited."""
        _found(queries.case(case), f"case {case}")
        parts.book.decide(case, decision.step, decision.approve, _caller(request).name, decision.why)
        return _found(queries.case(case), f"case {case}")

    @app.post("/v1/cases/{case}/rollout", tags=["cases"])
    def steer(request: Request, case: views.Id, steering: views.Steering) -> views.CaseDetail:
        """Pause or resume a roll-out, end it where it is (abort), or bring the model before back (back)."""
        _found(queries.case(case), f"case {case}")
        parts.book.steer(case, steering.action, _caller(request).name, steering.why)
        return _found(queries.case(case), f"case {case}")

    @app.post("/v1/cases/{case}/inputs", tags=["cases"])
    def share(request: Request, case: views.Id, given: views.SharedInputs) -> views.Replayed:
        """Replay inputs on the hub's own copy of the model. Enough that count make a case of a suspicion."""
        _found(queries.case(case), f"case {case}")
        shared = _found(parts.shared, "inputs")
        after, replayed = shared.add(
            case, given.inputs, dtype=given.dtype, shape=given.shape, who=_caller(request).name, why=given.why
        )
        return views.Replayed(
            items=[views.SharedInput(**asdict(one)) for one in replayed],
            counting=sum(one.counts for one in shared.of_case(case)),
            enough=ENOUGH,
            state=after.state,
        )

    @app.post("/v1/cases/{case}/private", tags=["cases"])
    def find(request: Request, case: views.Id, brought: views.Brought) -> views.CaseDetail:
        """Bring what three parties found of a private model: the plan, and what at least two of them signed."""
        found, model, private = _private(parts, case)
        try:
            plan = msgspec.convert(brought.plan, Inspection)
            signed = msgspec.convert(brought.results, list[Signed])
        except msgspec.ValidationError as error:
            raise ConfigError(
                f"finding for case {case}", got=error, do="bring plan.json and what parties signed"
            ) from error
        result = private.judge(found, model.guard, plan, signed)
        parts.book.found_in_private(case, result, _caller(request).name, brought.why)
        return _found(queries.case(case), f"case {case}")

    @app.post("/v1/devices/{device}/commands", tags=["commands"], status_code=202)
    def ask(request: Request, device: views.DeviceName, command: views.Command) -> views.CommandState:
        """Ask a device; its answer comes later, under the command's id."""
        _found(queries.device(device), f"device {device}")
        recalibrates = command.name == "recalibrate"
        if command.source is not None and not recalibrates:
            raise ConfigError(f"command {command.name}", got="a source", do="give one to recalibrate alone")
        fields: dict[str, Any] = {"source": command.source or "sidecar"} if recalibrates else {}
        key = parts.commands.issue(device, command.name, who=_caller(request).name, **fields)
        return _found(queries.command(key), f"command {key}")

    @app.post("/v1/commands/{command}/decisions", tags=["commands"])
    def settle(request: Request, command: views.CommandId, verdict: views.Verdict) -> views.CommandState:
        """Approve or reject a command that the hub proposed."""
        _found(queries.command(command), f"command {command}")
        parts.commands.decide(command, verdict.approve, _caller(request).name, verdict.why)
        return _found(queries.command(command), f"command {command}")


def _add_tokens(app: FastAPI, parts: Parts) -> None:
    tokens = parts.tokens

    @app.get("/v1/tokens", tags=["tokens"])
    def list_tokens() -> Page[views.Token]:
        """All tokens, without their secrets."""
        return Page(items=[_token(token) for token in tokens.all()])

    @app.post("/v1/tokens", tags=["tokens"], status_code=201)
    def add_token(request: Request, new: views.NewToken) -> views.MadeToken:
        """Make a token. Its secret is shown this once."""
        secret, token = tokens.add(new.name, new.role, who=_caller(request).name, lifetime_s=new.lifetime_s)
        return views.MadeToken(**_token(token).model_dump(), secret=secret)

    @app.delete("/v1/tokens/{name}", tags=["tokens"], status_code=204)
    def revoke_token(request: Request, name: views.TokenName) -> None:
        """End a token."""
        if name not in {token.name for token in tokens.all()}:
            _found(None, f"token {name}")
        tokens.revoke(name, who=_caller(request).name)


def _add_operating(app: FastAPI, parts: Parts) -> None:
    alive = _Cached(parts.queries.alive)

    @app.get("/healthz", tags=["operation"], response_class=Response)
    def health() -> Response:
        """Whether the database answers and the broker is connected; 503 with what does not."""
        missing = [name for name, there in (("database", alive()), ("broker", parts.connected())) if not there]
        if missing:
            return problem(503, "hub", got=f"no {' and no '.join(missing)}", do="see the hub's log")
        return Response("ok\n", media_type="text/plain")

    @app.get("/metrics", tags=["operation"], response_class=Response)
    def metrics() -> Response:
        """The counters, in Prometheus' text format."""
        return Response(parts.metrics.text(), media_type=counters.CONTENT_TYPE)

    @app.get("/v1/openapi.json", tags=["operation"])
    def openapi() -> dict[str, Any]:
        """This document."""
        return document(app)


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(_request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:]) or "request body"
        given = None if first["type"] in ("missing", "json_invalid") else first.get("input")
        return problem(400, where, got=given, expected=first["msg"])

    @app.exception_handler(EdgeGuardError)
    async def refused(request: Request, error: EdgeGuardError) -> Response:
        # What a body says was checked before: what is refused here does not fit what the hub has.
        status = 400 if request.method == "GET" else 409
        return problem(status, error.what, got=error.got, expected=error.expected, do=error.do)

    @app.exception_handler(HTTPException)
    async def failed(request: Request, error: HTTPException) -> Response:
        phrase = HTTPStatus(error.status_code).phrase
        what = f"{request.method} {request.url.path}" if error.detail == phrase else error.detail
        return problem(error.status_code, what, got=phrase.lower(), headers=error.headers)

    @app.exception_handler(SQLAlchemyError)
    async def unanswered(_request: Request, error: SQLAlchemyError) -> Response:
        log.error("database: %s", reason(error))
        return problem(503, "database", got="no answer", do="try again later", headers={"Retry-After": "5"})

    @app.exception_handler(Exception)
    async def internal(_request: Request, _error: Exception) -> Response:
        return problem(500, "hub", got="an error of its own", do="see the hub's log")


class _Cached:
    """Whether a question is answered, asked at most every ``HEALTH_S``."""

    def __init__(self, ask: Callable[[], object]) -> None:
        self._ask = ask
        self._lock = threading.Lock()
        self._at_s = -math.inf
        self._answered = False

    def __call__(self) -> bool:
        with self._lock:
            if time.monotonic() - self._at_s >= HEALTH_S:
                try:
                    self._ask()
                    self._answered = True
                except SQLAlchemyError:
                    self._answered = False
                self._at_s = time.monotonic()
            return self._answered


def _found(thing: T | None, what: str) -> T:
    if thing is None:
        raise HTTPException(404, what)
    return thing


def _private(parts: Parts, case: int) -> tuple[Case, Named, Private]:
    """A case of a private model, its model, and what the hub knows of the parties. Raises ConfigError."""
    found = _found(parts.book.get(case), f"case {case}")
    model = _found(dict(parts.models()).get(found.model_digest), f"model of case {case}")
    if not found.private or parts.private is None:
        raise ConfigError(f"case {case}", got="a model that is not private", expected="one with private = true")
    return found, model, parts.private


def _caller(request: Request) -> Caller:
    caller: Caller = request.state.caller
    return caller


def _token(token: Token) -> views.Token:
    return views.Token(**asdict(token))
