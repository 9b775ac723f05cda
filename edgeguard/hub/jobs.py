"""Long work: put into the database by whoever decides, claimed and run by any hub of the fleet, one job a hub.

Rules enforced here:

* a claim is one UPDATE that only one hub can win; it is a lease that its owner renews while the child lives;
* the job of an owner that died is claimed by another once the lease ran out, by the same hub at once: a state folder
  has one hub, so what that hub owned before it started is nobody's;
* an owner that lost its lease ends its child and writes nothing: each write names owner and attempt;
* each attempt has a folder of its own. A finished result that an earlier attempt left there is taken, not made again;
* a job whose attempts fail too often is given up with the last reason;
* leases count in the database's time, so that hubs need not agree on theirs;
* the repaired model is stored with the result: whoever goes on with the case may be another machine.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, get_args

import msgspec
from sqlalchemy import ColumnElement, Connection, Row, and_, func, insert, literal_column, or_, select, update

from edgeguard.detection.sidecar import path_beside
from edgeguard.errors import ModelError
from edgeguard.hub import casebook, tables
from edgeguard.hub.cases import Dormant, Job, Progress, Result
from edgeguard.hub.store import Store
from edgeguard.hub.worker import Failed, Worker, finished

LEASE_S = 60.0
MAX_FILE = 256 << 20
FileName = Literal["output", "trainable", "sidecar"]
"""The files that a result brings; each has a column of its own."""
LEADER = "leader"

log = logging.getLogger(__name__)


class Work(msgspec.Struct, frozen=True, kw_only=True):
    """What a job is to do, without a path: where files lie, each hub knows itself. See :class:`cases.Job`.

    ``after`` is the job that confirmed the same suspicion.
    """

    case: int
    model_digest: str
    guard_digest: str
    label: int
    flagged_mean: tuple[float, ...]
    unflagged_mean: tuple[float, ...]
    unflagged_std: tuple[float, ...]
    channels: tuple[int, ...] = ()
    dormant: tuple[Dormant, ...] = ()
    stop_after: Literal["inspect"] | None = None
    after: int | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One job as the database has it. ``attempts`` counts its runs, ``failures`` those that ended without a result."""

    id: int
    state: Literal["waiting", "running", "done", "failed"]
    owner: str | None
    attempts: int
    failures: int
    work: Work
    progress: Progress | None
    result: Result | None
    reason: str


class Jobs:
    """The jobs of one fleet.

    Args:
        store: the database.
        owner: names this hub, the same after a restart.
        lease_s: seconds that a claim holds.
    """

    def __init__(self, store: Store, *, owner: str, lease_s: float = LEASE_S) -> None:
        self._store = store
        self._owner = owner
        self._lease_ms = round(lease_s * 1000)

    def add(self, db: Connection, work: Work) -> int:
        """Put a job into the database within the caller's transaction. Returns its id."""
        row = {
            "fleet": self._store.fleet,
            "case_id": work.case,
            "model_digest": work.model_digest,
            "state": "waiting",
            "lease_until_ms": 0,
            "attempts": 0,
            "failures": 0,
            "work": msgspec.to_builtins(work),
            "reason": "",
        }
        key = db.execute(insert(tables.jobs).values(**row)).inserted_primary_key
        assert key is not None
        return int(key[0])

    def get(self, job_id: int) -> Entry | None:
        """One job, None where there is none of this number."""
        table = tables.jobs
        with self._store.read() as db:
            row = db.execute(_chosen().where(table.c.fleet == self._store.fleet, table.c.id == job_id)).one_or_none()
            return _to_entry(row) if row is not None else None

    def claim(self, models: Collection[str], *, attempts: int) -> Entry | None:
        """Take the oldest job that nobody works on, of a model that this hub has.

        One that was lost ``attempts`` times is given up on the way.
        """
        table = tables.jobs
        if not self._is_work(models):  # looked up every second: ingest must not wait for that
            return None
        with self._store.write() as db:
            now = database_ms(db)
            free = or_(
                table.c.state == "waiting",
                and_(table.c.state == "running", or_(table.c.lease_until_ms < now, table.c.owner == self._owner)),
            )
            mine = and_(table.c.fleet == self._store.fleet, table.c.model_digest.in_(list(models)), free)
            for row in db.execute(_chosen().where(mine).order_by(table.c.id)).all():
                lost = row.state == "running"
                failures = row.failures + lost
                changes: dict[str, Any]
                if failures >= attempts:
                    changes = {"state": "failed", "reason": f"lost {failures} times while it was worked on"}
                else:
                    changes = {"state": "running", "owner": self._owner, "lease_until_ms": now + self._lease_ms}
                taken = update(table).where(table.c.id == row.id, table.c.attempts == row.attempts, free)
                values = {**changes, "attempts": row.attempts + 1, "failures": failures}
                if db.execute(taken.values(**values)).rowcount and changes["state"] == "running":
                    return replace(
                        _to_entry(row),
                        state="running", owner=self._owner, attempts=row.attempts + 1, failures=failures,
                    )  # fmt: skip
        return None

    def _is_work(self, models: Collection[str]) -> bool:
        table = tables.jobs
        unfinished = table.c.state.in_(("waiting", "running"))
        with self._store.read() as db:
            mine = (table.c.fleet == self._store.fleet, unfinished, table.c.model_digest.in_(list(models)))
            return db.execute(select(table.c.id).where(*mine).limit(1)).first() is not None

    def renew(self, entry: Entry, progress: Progress | None) -> bool:
        """Hold the lease on, and tell how far it is. False when it is no longer ours."""
        table = tables.jobs
        with self._store.write() as db:
            values = {"lease_until_ms": database_ms(db) + self._lease_ms, "progress": msgspec.to_builtins(progress)}
            return bool(db.execute(update(table).where(self._held(entry)).values(**values)).rowcount)

    def finish(self, entry: Entry, result: Result, files: Mapping[str, bytes]) -> bool:
        """Write the result with its files, as ``FileName`` names them. False when it is no longer ours."""
        values = {"state": "done", "owner": None, "result": msgspec.to_builtins(result), "progress": None, **files}
        return self._end(entry, values)

    def fail(self, entry: Entry, reason: str, *, final: bool, attempts: int) -> bool:
        """Write why an attempt ended without a result. It waits for the next one, unless this was the last."""
        failures = entry.failures + 1
        over = final or failures >= attempts
        text = reason if final or not over else f"the worker failed {failures} times, the last time: {reason}"
        state = "failed" if over else "waiting"
        return self._end(entry, {"state": state, "owner": None, "failures": failures, "reason": text})

    def give_back(self, entry: Entry) -> bool:
        """Let another hub, or this one after its restart, run it again: that is no failure."""
        return self._end(entry, {"state": "waiting", "owner": None})

    def file(self, job_id: int, name: FileName) -> bytes | None:
        """A file that was stored with the result."""
        table = tables.jobs
        with self._store.read() as db:
            chosen = select(table.c[name]).where(table.c.fleet == self._store.fleet, table.c.id == job_id)
            content: bytes | None = db.scalar(chosen)
            return content

    def _end(self, entry: Entry, values: Mapping[str, Any]) -> bool:
        with self._store.write() as db:
            return bool(db.execute(update(tables.jobs).where(self._held(entry)).values(**values)).rowcount)

    def _held(self, entry: Entry) -> ColumnElement[bool]:
        table = tables.jobs
        return and_(
            table.c.fleet == self._store.fleet, table.c.id == entry.id, table.c.state == "running",
            table.c.owner == self._owner, table.c.attempts == entry.attempts,
        )  # fmt: skip


class Lease:
    """What only one hub of the fleet may do at a time, such as to decide.

    Args:
        store: the database.
        name: of what is leased.
        owner: names this hub.
        lease_s: seconds after which the lease of a hub that died is free.
    """

    def __init__(self, store: Store, name: str, *, owner: str, lease_s: float = LEASE_S) -> None:
        self._store = store
        self._key = {"fleet": store.fleet, "name": name}
        self._owner = owner
        self._lease_s = lease_s
        self._renew_at = 0.0
        self._held = False

    def held(self, now_s: float) -> bool:
        """Whether this hub holds it now, taking or renewing it where that is due.

        Args:
            now_s: a clock that is never set.
        """
        if now_s < self._renew_at:
            return self._held
        # Counted from before the question, so that this hub stops before another one may begin.
        self._held = False
        table = tables.leases
        with self._store.write() as db:
            now = database_ms(db)
            until = now + round(self._lease_s * 1000)
            mine = update(table).where(*casebook.equals(table, self._key), table.c.owner == self._owner)
            self._held = bool(db.execute(mine.values(until_ms=until)).rowcount) or casebook.claim(
                db, table, self._key, "until_ms", until, free_before=now, owner=self._owner
            )
        self._renew_at = now_s + self._lease_s / 3
        return self._held

    def release(self) -> None:
        """Let another hub take it at once."""
        if self._held:
            table = tables.leases
            with self._store.write() as db:
                mine = update(table).where(*casebook.equals(table, self._key), table.c.owner == self._owner)
                db.execute(mine.values(until_ms=0))
        self._held, self._renew_at = False, 0.0


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where this hub has what a job needs: the guarded model, its trainable form, clean data."""

    guard_digest: str
    guarded: str
    keras: str
    data: str


class Runner:
    """Runs jobs, one at a time, in a child process; never waits for it.

    Args:
        jobs: the database's jobs.
        folder: where the runs' folders are.
        command: the worker's program and first arguments.
        sources: what this hub can work on now, by model digest.
        said: called with the case and each new step that its worker tells.
        attempts: a job that failed so often is given up.
        timeout_s: a run that takes longer has failed.
        lease_s: as for :class:`Jobs`.
        shared: writes the inputs that owners shared for a case into a run's folder, and says where.
    """

    def __init__(
        self,
        jobs: Jobs,
        *,
        folder: Path,
        command: Sequence[str],
        sources: Callable[[], Mapping[str, Sources]],
        said: Callable[[int, Progress], None],
        attempts: int,
        timeout_s: float,
        lease_s: float = LEASE_S,
        shared: Callable[[int, Path], str | None] = lambda _case, _folder: None,
    ) -> None:
        self._jobs = jobs
        self._shared = shared
        self._folder = folder
        self._command = command
        self._sources = sources
        self._said = said
        self._attempts = attempts
        self._timeout_s = timeout_s
        self._renew_s = lease_s / 3
        self._running: tuple[Entry, Worker] | None = None
        self._progress: Progress | None = None
        self._renew_at = 0.0

    def tick(self, now_s: float) -> None:
        """Take up a job, or listen to the one that runs.

        Args:
            now_s: a clock that is never set.

        Raises:
            OSError, SQLAlchemyError: try again later.
        """
        if self._running is None:
            self._take_up(now_s)
            return
        entry, worker = self._running
        heard = worker.poll(now_s)
        for word, following in zip_longest(heard, heard[1:]):
            if not isinstance(word, Progress):
                self._running = None
                self._end(entry, word)
                return
            if isinstance(following, Progress) and (word.stage, word.text) == (following.stage, following.text):
                continue
            self._note(entry, word)
        if now_s >= self._renew_at:
            self._renew(entry, worker, now_s)

    def stop(self) -> None:
        """End the worker; its job is free for the next hub."""
        if self._running is not None:
            entry, worker = self._running
            self._running = None
            worker.stop()
            self._jobs.give_back(entry)

    def _run_folder(self, entry: Entry, attempt: int) -> Path:
        """Where an attempt's files are."""
        return _folder_of(self._folder, entry.work.case, entry.id) / f"run-{attempt}"

    def _take_up(self, now_s: float) -> None:
        sources = self._sources()
        entry = self._jobs.claim(sources, attempts=self._attempts) if sources else None
        if entry is None:
            return
        for attempt in range(entry.attempts - 1, 0, -1):
            result = finished(self._run_folder(entry, attempt))
            if result is not None:
                self._end(entry, result, attempt=attempt)
                return
        work, source = entry.work, sources[entry.work.model_digest]
        if work.guard_digest != source.guard_digest:
            reason = "the model was calibrated anew meanwhile: what was counted belongs to its earlier guard"
            self._jobs.fail(entry, reason, final=True, attempts=self._attempts)
            return
        job = Job(
            guarded=source.guarded,
            keras=source.keras,
            data=source.data,
            label=work.label,
            flagged_mean=work.flagged_mean,
            unflagged_mean=work.unflagged_mean,
            unflagged_std=work.unflagged_std,
            channels=work.channels,
            dormant=work.dormant,
            stop_after=work.stop_after,
            resume=self._confirmed_by(work),
            quarantined=self._shared(work.case, self._run_folder(entry, entry.attempts)),
            out_dir=str(self._run_folder(entry, entry.attempts)),
            seed=work.case,
        )
        try:
            worker = Worker(self._command, job, deadline_s=now_s + self._timeout_s)
        except OSError as error:
            self._jobs.fail(entry, f"cannot be started: {error}", final=False, attempts=self._attempts)
            raise
        self._running, self._progress, self._renew_at = (entry, worker), None, now_s + self._renew_s
        log.info("job %d of case %d has begun, run %d", entry.id, work.case, entry.attempts)

    def _confirmed_by(self, work: Work) -> str | None:
        """The folder of the run that confirmed the suspicion, where it was on this machine."""
        if work.after is None:
            return None
        runs = _folder_of(self._folder, work.case, work.after).glob("run-*")
        return next((str(run) for run in sorted(runs) if finished(run) is not None), None)

    def _note(self, entry: Entry, word: Progress) -> None:
        before, self._progress = self._progress, word
        if before is None or before.stage != word.stage:
            self._renew_at = 0.0  # a new stage moves the case: tell it now
        if before is None or (before.stage, before.text) != (word.stage, word.text):
            self._said(entry.work.case, word)

    def _renew(self, entry: Entry, worker: Worker, now_s: float) -> None:
        self._renew_at = now_s + self._renew_s
        if not self._jobs.renew(entry, self._progress):
            log.warning("job %d was taken by another hub: its worker here is ended", entry.id)
            self._running = None
            worker.stop()

    def _end(self, entry: Entry, word: Result | Failed, *, attempt: int | None = None) -> None:
        if isinstance(word, Result):
            try:
                files = _files(word, self._run_folder(entry, attempt or entry.attempts))
            except ModelError as error:
                word = Failed(str(error), final=True)
            else:
                self._jobs.finish(entry, word, files)
                return
        log.warning("job %d ended without a result: %s", entry.id, word.reason)
        self._jobs.fail(entry, word.reason, final=word.final, attempts=self._attempts)


def database_ms(db: Connection) -> int:
    """Milliseconds since 1970 by the database's clock."""
    if db.dialect.name == "sqlite":
        return int(db.scalar(select(literal_column("(julianday('now') - 2440587.5) * 86400000.0"))) or 0)
    return int((db.scalar(select(func.extract("epoch", func.clock_timestamp()))) or 0) * 1000)


def _folder_of(folder: Path, case: int, job: int) -> Path:
    return folder / str(case) / f"job-{job}"


def _files(result: Result, folder: Path) -> dict[str, bytes]:
    """The files that a result names.

    Raises:
        ModelError: one cannot be read or is too large.
    """
    named: dict[FileName, str | None] = {}
    if result.gate_passed:
        named = {"output": result.output, "trainable": result.keras}
        if result.output is not None:
            named["sidecar"] = str(path_beside(Path(result.output)))
    files: dict[str, bytes] = {}
    for name, path in named.items():
        if path is None:
            continue
        try:
            with (folder / path).open("rb") as file:
                files[name] = file.read(MAX_FILE + 1)
        except OSError as error:
            if name != "output":
                # Without its trainable form a next repair cannot begin; without its sidecar devices refuse.
                log.warning("the %s of a repaired model is not there: %s", name, error)
                continue
            raise ModelError(f"repaired model {path}", got=error.strerror, expected="the worker's output") from error
        if len(files[name]) > MAX_FILE:
            raise ModelError(f"repaired model {path}", got=f"over {MAX_FILE} bytes", expected="a smaller one")
    return files


def _chosen() -> Any:
    """All columns but the files."""
    table = tables.jobs
    return select(*(column for column in table.c if column.name not in get_args(FileName)))


def _to_entry(row: Row[Any]) -> Entry:
    return Entry(
        id=row.id,
        state=row.state,
        owner=row.owner,
        attempts=row.attempts,
        failures=row.failures,
        work=msgspec.convert(row.work, Work),
        progress=msgspec.convert(row.progress, Progress | None),
        result=msgspec.convert(row.result, Result | None),
        reason=row.reason,
    )
