"""Records in the database: each move with its audit trail, its event and its notifications; decisions; trust."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine, insert, select

from edgeguard.errors import ConfigError
from edgeguard.hub import cases, migrations, schema, tables
from edgeguard.hub.casebook import DAY_MS, Casebook, Move, StaleError
from edgeguard.hub.cases import Case, Result
from edgeguard.hub.policy import Suspicion
from edgeguard.hub.store import Store
from tests.simulators import database, fleet

SUSPICION = Suspicion(
    model_digest=fleet.MODEL, label=1, devices=("a", "b"), flagged=50, inputs=200, p_value=1e-9, excess=9.0, channels=()
)  # fmt: skip


class Clock:
    """Milliseconds that stand until they are set."""

    now = 1000

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    url = database.sqlite(tmp_path)
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres")
        url = postgres.url(postgres.create(request.getfixturevalue("template")))
    one = Store(url, fleet=database.FLEET)
    yield one
    one.close()


@pytest.fixture
def book(store: Store, clock: Clock) -> Casebook:
    return Casebook(store, clock_ms=clock, targets=lambda kind: ["ops"] if kind == "confirmed" else [])


def suspect(book: Casebook) -> Case:
    case = cases.open_case(SUSPICION, model="signs", label_name="stop", at_ms=1)
    return book.save(Move(case=case, text="50 of 200 flagged"))


def settle(book: Casebook, case: Case, verdict: Any) -> Case:
    case = book.save(Move(case=cases.move(case, "inspecting", at_ms=2), text="inspecting"))
    moves = cases.settled(case, Result(verdict=verdict, repaired=False), at_ms=3)
    return book.save(*(Move(case=move, text=move.note) for move in moves))


def outbox(store: Store) -> list[Any]:
    with store.read() as db:
        return list(db.execute(select(tables.outbox)).all())


def test_a_suspicion_is_listed_apart_from_cases_until_it_is_confirmed(book: Casebook) -> None:
    case = suspect(book)
    assert ([c.id for c in book.suspicions()], book.cases()) == ([case.id], [])
    settle(book, case, "confirmed")
    assert (book.suspicions(), [c.id for c in book.cases()]) == ([], [case.id])


def test_a_record_comes_back_as_it_was_written(book: Casebook) -> None:
    case = suspect(book)
    assert book.get(case.id) == case
    assert book.all() == [case]
    assert book.get(case.id + 1) is None


def test_each_move_stands_in_the_audit_trail_and_in_the_timeline(book: Casebook, store: Store) -> None:
    case = settle(book, suspect(book), "not_confirmed")
    trail = [(entry.who, entry.was, entry.became) for entry in book.audit(case.id)]
    assert trail == [
        ("hub", None, "suspected"), ("hub", "suspected", "inspecting"), ("hub", "inspecting", "dismissed")
    ]  # fmt: skip
    assert [event.kind for event in store.events()] == ["suspected", "inspecting", "dismissed"]
    assert book.audit(case.id)[-1].why == case.note


def test_several_moves_are_written_together_and_told_one_by_one(book: Casebook) -> None:
    case = book.save(Move(case=cases.move(suspect(book), "inspecting", at_ms=2), text="x"))
    good = Result(verdict="confirmed", gate_passed=True, output="o", model_digest=fleet.OTHER, guard_digest=fleet.GUARD)
    case = book.save(*(Move(case=move, text="y") for move in cases.settled(case, good, at_ms=3)))
    assert case.state == "repaired"
    assert [entry.became for entry in book.audit(case.id)][2:] == ["confirmed", "repairing", "repaired"]


def test_of_two_who_read_a_record_only_the_first_writes_it(book: Casebook) -> None:
    case = suspect(book)
    book.save(Move(case=cases.move(case, "inspecting", at_ms=2), text="first"))
    for write in (lambda c: book.save(Move(case=c, text="second")), book.note):
        with pytest.raises(StaleError):
            write(cases.move(case, "could_not_check", at_ms=2))
    assert [entry.why for entry in book.audit(case.id)][-1] == "first"


def test_what_belongs_to_a_move_and_fails_takes_the_move_with_it(book: Casebook, store: Store) -> None:
    case = suspect(book)

    def fail(_db: Any, _case: Case) -> Case:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        book.save(Move(case=cases.move(case, "inspecting", at_ms=2), text="x"), also=fail)
    assert book.get(case.id) == case
    assert len(store.events()) == len(book.audit(case.id)) == 1


class TestDecisions:
    def test_a_decision_names_who_made_it_and_why(self, book: Casebook) -> None:
        case = suspect(book)
        book.save(Move(case=msgspec.structs.replace(case, awaiting="inspect"), text="waits", kind="awaiting_approval"))
        book.decide(case.id, "inspect", True, "alice", "looks real")
        last = book.audit(case.id)[-1]
        assert (last.who, last.was, last.became, last.why) == (
            "alice", "suspected", "suspected", "alice approved inspect: looks real"
        )  # fmt: skip
        after = book.get(case.id)
        assert after is not None
        assert after.approved == ("inspect",)

    def test_a_rejection_is_one_too(self, book: Casebook) -> None:
        case = book.decide(suspect(book).id, "inspect", False, "bob")
        assert (case.state, case.note, book.audit(case.id)[-1].who) == ("refused", "bob said no to inspect", "bob")

    @pytest.mark.parametrize(("case_id", "word"), [(1, "nothing to decide on repair"), (99, "no such case")])
    def test_what_cannot_be_decided_is_refused_and_leaves_no_trace(
        self, book: Casebook, case_id: int, word: str
    ) -> None:
        suspect(book)
        with pytest.raises(ConfigError, match=word):
            book.decide(case_id, "repair", True, "alice")
        assert len(book.audit(1)) == 1

    def test_text_that_a_database_or_terminal_would_choke_on_is_replaced(self, book: Casebook) -> None:
        case = book.decide(suspect(book).id, "inspect", False, "bob", "a\x00b\x1b[31m\ud800")
        assert book.audit(case.id)[-1].why == "bob said no to inspect: a\ufffdb\ufffd[31m\ufffd"

    def test_many_at_once_are_each_taken_once(self, book: Casebook) -> None:
        case = suspect(book)
        book.save(Move(case=msgspec.structs.replace(case, awaiting="inspect"), text="waits"))
        taken: list[str] = []

        def decide(who: str) -> None:
            try:
                book.decide(case.id, "inspect", True, who)
                taken.append(who)
            except ConfigError:
                pass

        threads = [threading.Thread(target=decide, args=(f"p{i}",)) for i in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == 1
        assert [entry.who for entry in book.audit(case.id)].count(taken[0]) == 1


class TestTrust:
    def test_a_dismissal_costs_the_devices_behind_it_a_confirmation_gives_back(self, book: Casebook) -> None:
        settle(book, suspect(book), "not_confirmed")
        assert {device: known.rejections for device, known in book.trust(fleet.MODEL).items()} == {"a": 1, "b": 1}
        settle(book, suspect(book), "confirmed")
        assert {device: known.rejections for device, known in book.trust(fleet.MODEL).items()} == {"a": 0, "b": 0}

    def test_what_could_not_be_checked_or_a_person_refused_says_nothing_of_devices(self, book: Casebook) -> None:
        settle(book, suspect(book), "could_not_check")
        book.decide(suspect(book).id, "inspect", False, "bob")
        assert book.trust(fleet.MODEL) == {}

    def test_of_another_model_nothing_follows(self, book: Casebook) -> None:
        settle(book, suspect(book), "not_confirmed")
        assert book.trust(fleet.OTHER) == {}

    def test_it_comes_back_after_a_year(self, book: Casebook, clock: Clock) -> None:
        settle(book, suspect(book), "not_confirmed")
        clock.now += 366 * DAY_MS
        assert {known.weight for known in book.trust(fleet.MODEL).values()} == {1.0}


class TestTelling:
    def test_a_move_that_somebody_wants_to_hear_of_is_in_the_outbox_with_its_explanation(
        self, book: Casebook, store: Store
    ) -> None:
        case = settle(book, suspect(book), "confirmed")
        (row,) = outbox(store)
        body = msgspec.json.decode(row.body)
        assert (row.target, body["kind"], body["subject"]) == ("ops", "confirmed", f"case {case.id}")
        assert body["explanation"] == cases.explain(case)

    def test_a_finding_is_told_once_a_day(self, book: Casebook, store: Store, clock: Clock) -> None:
        told = []
        for hour in range(0, 49, 6):
            clock.now = 1000 + hour * 3_600_000
            told.append(book.tell_daily("drift", "site a", "much"))
        assert sum(told) == len(store.events()) == 2
        assert told[0]

    def test_other_kinds_and_subjects_are_told_apart(self, book: Casebook) -> None:
        assert all(book.tell_daily(kind, name, "x") for kind in ("drift", "sensor") for name in ("site a", "site b"))


@pytest.mark.parametrize(
    ("state", "verdict", "became", "is_case"),
    [("confirming", None, "suspected", False), ("repairing", None, "suspected", False),
     ("repaired", "confirmed", "suspected", False), ("closed", "confirmed", "closed", True),
     ("dismissed", "not_confirmed", "dismissed", False), ("refused", "confirmed", "refused", True)],
)  # fmt: skip
def test_cases_from_before_jobs_are_read_as_what_they_are_now(
    tmp_path: Path, state: str, verdict: str | None, became: str, is_case: bool
) -> None:
    case = msgspec.to_builtins(cases.open_case(SUSPICION, model="signs", label_name="", at_ms=1))
    detail = {**case, "state": state, "runs": 1, "failures": 0, "result": verdict and {"verdict": verdict}}
    for added in ("is_case", "awaiting", "approved", "job", "asked_ms", "revision", "label_name"):
        del detail[added]
    path = tmp_path / "old.db"
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as db:
        config.attributes["connection"] = db
        command.upgrade(config, "0002")
        row = {
            "fleet": "test",
            "model_digest": fleet.MODEL,
            "label": 1,
            "state": state,
            "created_ms": 1,
            "updated_ms": 1,
        }
        db.execute(insert(schema.cases).values(**row, detail=detail))
    engine.dispose()
    store = Store(f"sqlite:///{path}", fleet="test")
    (read,) = Casebook(store, clock_ms=lambda: 1).all()
    store.close()
    assert (read.state, read.is_case) == (became, is_case)
