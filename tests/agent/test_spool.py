"""The spool: what is committed, what an ack lets go, and what a restart finds."""

from __future__ import annotations

import os
import sqlite3
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from edgeguard.agent.spool import Counters, Spool, read_counters
from edgeguard.contract.messages import MAX_GAPS, Ack, ActivationMean, Alert, Report, decode, encode
from edgeguard.errors import ConfigError
from edgeguard.hub.ingest import Stream
from tests.simulators.reports import alert, report

BOOT, OTHER = "00000000000000aa", "00000000000000bb"
LARGE = 1 << 30

Build = Callable[[str, int], Report | Alert]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "spool.sqlite"


def open_spool(path: Path, boot: str = BOOT, max_bytes: int = LARGE) -> Spool:
    return Spool(path, boot=boot, max_bytes=max_bytes)


def test_session_numbers_go_up_by_one(path: Path) -> None:
    spool = Spool(path, boot=BOOT, max_bytes=LARGE, clock=lambda: 5000.7)
    assert [spool.next_session() for _ in range(3)] == [5001, 5002, 5003]
    spool.close()
    again = Spool(path, boot=OTHER, max_bytes=LARGE, clock=lambda: 9000.0)
    assert again.next_session() == 5004


def test_a_device_whose_state_was_erased_counts_sessions_above_its_earlier_self(path: Path, tmp_path: Path) -> None:
    before = Spool(path, boot=BOOT, max_bytes=LARGE, clock=lambda: 5000.0)
    last = [before.next_session() for _ in range(50)][-1]
    erased = Spool(tmp_path / "new.sqlite", boot=OTHER, max_bytes=LARGE, clock=lambda: 5060.0)
    assert erased.next_session() > last


def test_a_clock_that_was_never_set_is_no_obstacle(path: Path) -> None:
    assert Spool(path, boot=BOOT, max_bytes=LARGE, clock=lambda: -1.0).next_session() == 1


def test_positions_are_those_that_still_wait(path: Path) -> None:
    spool = open_spool(path)
    for _ in range(3):
        spool.put(report)
    first, second, _ = spool.pending()
    spool.forget(Ack(boot=BOOT, through_seq=1))
    assert first.position not in spool.positions(BOOT, (1, 2, 9))
    assert spool.positions(BOOT, (1, 2, 9)) == {second.position}
    assert spool.positions(OTHER, (2,)) == spool.positions(BOOT, ()) == frozenset()


def seqs(spool: Spool) -> list[tuple[str, int]]:
    return [(entry.boot, entry.seq) for entry in spool.pending(limit=10_000)]


def test_seq_counts_reports_and_alerts_together_from_one(path: Path) -> None:
    spool = open_spool(path)
    assert [spool.put(build) for build in (report, alert, report)] == [1, 2, 3]
    assert [entry.kind for entry in spool.pending()] == ["report", "alert", "report"]
    assert decode(Report, spool.pending()[2].payload).seq == 3


def test_pending_goes_on_behind_a_position(path: Path) -> None:
    spool = open_spool(path)
    for _ in range(5):
        spool.put(report)
    first = spool.pending(limit=2)
    rest = spool.pending(after=first[-1].position, limit=2)
    assert [entry.seq for entry in first + rest] == [1, 2, 3, 4]


def test_old_boots_survive_a_restart_under_their_own_name(path: Path) -> None:
    open_spool(path).put(report)
    second = open_spool(path, OTHER)
    second.put(report)
    assert seqs(second) == [(BOOT, 1), (OTHER, 1)]


@pytest.mark.parametrize(
    ("ack", "left"),
    [
        (Ack(boot=BOOT, through_seq=0), [1, 2, 3, 4]),
        (Ack(boot=BOOT, through_seq=3), [4]),
        (Ack(boot=BOOT, through_seq=99), []),
        (Ack(boot=BOOT, through_seq=4, gaps=(2, 3)), [2, 3]),
        (Ack(boot=OTHER, through_seq=4), [1, 2, 3, 4]),
    ],
)
def test_an_ack_lets_go_of_its_boot_up_to_its_number_but_its_gaps(path: Path, ack: Ack, left: list[int]) -> None:
    spool = open_spool(path)
    for _ in range(4):
        spool.put(report)
    forgotten = spool.forget(ack)
    assert [entry.seq for entry in spool.pending()] == left
    assert len(forgotten) == 4 - len(left)
    assert spool.pending_count == len(left)


def test_a_repeated_ack_forgets_nothing_more(path: Path) -> None:
    spool = open_spool(path)
    spool.put(report)
    assert len(spool.forget(Ack(boot=BOOT, through_seq=1))) == 1
    assert spool.forget(Ack(boot=BOOT, through_seq=1)) == frozenset()


def test_a_report_and_the_files_it_counts_are_committed_together(path: Path) -> None:
    open_spool(path).put(report, consumed=["b.npy", "a.npy"])
    again = open_spool(path, OTHER)
    assert again.consumed() == ["a.npy", "b.npy"]
    again.clear_consumed()
    assert open_spool(path).consumed() == []


def test_a_report_that_cannot_be_made_commits_nothing(path: Path) -> None:
    spool = open_spool(path)

    def broken(_boot: str, _seq: int) -> Report:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        spool.put(broken, consumed=["a.npy"])
    assert (spool.pending(), spool.consumed()) == ([], [])
    assert spool.put(report) == 1


def test_a_commit_that_fails_half_way_changes_nothing(path: Path) -> None:
    spool = open_spool(path)
    no_names: Any = ["a.npy", object()]
    with pytest.raises(ConfigError, match="spool"):
        spool.put(report, consumed=no_names)
    assert (spool.pending(), spool.consumed()) == ([], [])
    assert read_counters(path).reports_total == 0
    assert spool.put(report) == 1


def test_the_oldest_reports_are_dropped_and_counted_when_the_spool_is_full(path: Path) -> None:
    bound = 2000
    spool = open_spool(path, max_bytes=bound)
    for _ in range(20):
        spool.put(report)
    counters = read_counters(path)
    kept = [entry.seq for entry in spool.pending()]
    assert counters.reports_dropped == counters.dropped_total == 20 - len(kept) > 0
    assert kept == list(range(21 - len(kept), 21))
    assert sum(len(entry.payload) for entry in spool.pending()) <= bound
    assert spool.pending_count == len(kept)


def size_of(*builds: Build) -> int:
    return sum(len(encode(build(BOOT, 1))) for build in builds)


@pytest.mark.parametrize(
    ("put", "bound", "left", "dropped"),
    [
        ((report, alert, report, report), size_of(alert, report, report), [2, 3, 4], (1, 0)),
        ((alert, report, alert, report), size_of(alert, alert, report), [1, 3, 4], (1, 0)),
        ((alert, report, alert, alert), size_of(alert, alert, alert), [1, 3, 4], (1, 0)),
        ((alert, alert, report), size_of(alert, report), [2, 3], (0, 1)),
        ((alert, alert, alert), size_of(alert, alert), [2, 3], (0, 1)),
        ((alert, report, alert), 1, [3], (1, 1)),
        ((report, alert, report), 1, [3], (1, 1)),
    ],
)
def test_a_report_goes_before_any_alert_but_never_what_was_put_last(
    path: Path, put: tuple[Build, ...], bound: int, left: list[int], dropped: tuple[int, int]
) -> None:
    spool = open_spool(path, max_bytes=bound)
    for build in put:
        spool.put(build)
    counters = read_counters(path)
    assert [entry.seq for entry in spool.pending()] == left
    assert (counters.reports_dropped, counters.alerts_dropped) == dropped
    assert spool.pending_count == counters.pending == len(left)


def test_what_was_dropped_in_between_never_hides_from_the_hub_what_still_waits(path: Path) -> None:
    spool = open_spool(path, max_bytes=size_of(alert, report, alert) + 9)
    builds: list[Build] = [alert, *[report] * (MAX_GAPS + 40), alert]
    for build in builds:
        spool.put(build)
    waiting, stream, arrived = {1, MAX_GAPS + 41, MAX_GAPS + 42}, Stream(), set[int]()
    while pending := spool.pending():
        for entry in reversed(pending):  # in the order that is worst for a hub which lists MAX_GAPS gaps
            new, stream = stream.take(entry.seq)
            assert new
            arrived.add(entry.seq)
            spool.forget(stream.ack(BOOT))
    assert arrived == waiting


def test_the_bound_holds_over_a_restart(path: Path) -> None:
    first = open_spool(path)
    for _ in range(10):
        first.put(report)
    size = sum(len(entry.payload) for entry in first.pending())
    second = open_spool(path, OTHER, max_bytes=size)
    second.put(report)
    assert seqs(second)[0] == (BOOT, 2)


def test_one_message_is_kept_even_if_it_alone_is_too_large(path: Path) -> None:
    spool = open_spool(path, max_bytes=1)
    spool.put(report)
    spool.put(report)
    assert [entry.seq for entry in spool.pending()] == [2]


def test_counters_are_read_beside_a_working_agent(path: Path) -> None:
    spool = open_spool(path)
    for build in (report, report, alert):
        spool.put(build)
    session = spool.next_session()
    spool.forget(Ack(boot=BOOT, through_seq=1))
    counters = read_counters(path)
    assert (counters.session, counters.reports_total, counters.alerts_total) == (session, 2, 1)
    assert (counters.reports_dropped, counters.alerts_dropped, counters.pending) == (0, 0, 2)


def test_session_numbers_are_never_given_twice(path: Path) -> None:
    first, second, third = (open_spool(path).next_session() for _ in range(3))
    assert (second, third) == (first + 1, first + 2)


def not_a_database(path: Path) -> None:
    path.write_bytes(b"this is not a database, but it is long enough to look at" * 40)


def a_folder(path: Path) -> None:
    path.mkdir()


def another_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("spoil", [not_a_database, a_folder, another_version])
def test_a_spool_that_cannot_be_used_is_named_in_one_line(path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(path)
    with pytest.raises(ConfigError, match=r"spool .*spool\.sqlite; got .*expected") as caught:
        open_spool(path)
    assert "\n" not in str(caught.value)


def test_a_missing_spool_has_no_counters_and_is_not_made(path: Path) -> None:
    with pytest.raises(ConfigError, match="spool"):
        read_counters(path)
    assert not path.exists()


def test_a_spool_made_in_one_thread_works_in_another(path: Path) -> None:
    spool = open_spool(path)
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(spool.put(report)))
    thread.start()
    thread.join()
    assert found == [1]


@dataclass(frozen=True)
class Held:
    """A message in the model of the spool."""

    boot: str
    seq: int
    kind: str
    size: int


class SpoolBesideItsModel(RuleBasedStateMachine):
    """Any sequence of what an agent may do, beside a list that says what must come out."""

    def __init__(self) -> None:
        super().__init__()
        # In memory where there is such a folder: this asks nothing of the disk.
        shm = Path("/dev/shm")
        self.folder = tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else None)
        self.path = Path(self.folder.name) / "spool.sqlite"
        self.boots = 0
        self.held: list[Held] = []
        self.consumed: set[str] = set()
        self.total = {"report": 0, "alert": 0}
        self.dropped = {"report": 0, "alert": 0}
        self.session = 1000
        self.open(LARGE)

    def open(self, bound: int) -> None:
        self.bound, self.seq = bound, 0
        self.boot = f"{self.boots:016x}"
        self.boots += 1
        self.spool = Spool(self.path, boot=self.boot, max_bytes=bound, clock=lambda: 1000.0)

    @rule(channels=st.none() | st.integers(0, 40), names=st.sets(st.sampled_from("abcd")))
    def put(self, channels: int | None, names: set[str]) -> None:
        def build(boot: str, seq: int) -> Report | Alert:
            if channels is None:
                return alert(boot, seq)
            return report(boot, seq, activation=ActivationMean(inputs=1, mean=(0.5,) * channels))

        assert self.spool.put(build, names) == self.seq + 1
        self.seq += 1
        kind = "alert" if channels is None else "report"
        self.consumed |= names
        self.total[kind] += 1
        self.held.append(Held(self.boot, self.seq, kind, len(encode(build(self.boot, self.seq)))))
        while sum(held.size for held in self.held) > self.bound and len(self.held) > 1:
            oldest = next((held for held in self.held[:-1] if held.kind == "report"), self.held[0])
            self.held.remove(oldest)
            self.dropped[oldest.kind] += 1

    @rule(names=st.lists(st.sampled_from("abcd"), max_size=2))
    def put_what_cannot_be_committed(self, names: list[Any]) -> None:
        names.append(object())
        with pytest.raises(ConfigError):
            self.spool.put(report, names)

    @rule(back=st.integers(0, 3), through=st.integers(0, 12), gaps=st.sets(st.integers(1, 12)))
    def forget(self, back: int, through: int, gaps: set[int]) -> None:
        boot = f"{max(0, self.boots - 1 - back):016x}"
        stored = {held for held in self.held if held.boot == boot and held.seq <= through and held.seq not in gaps}
        assert len(self.spool.forget(Ack(boot=boot, through_seq=through, gaps=tuple(gaps)))) == len(stored)
        self.held = [held for held in self.held if held not in stored]

    @rule()
    def clear_consumed(self) -> None:
        self.spool.clear_consumed()
        self.consumed.clear()

    @rule()
    def next_session(self) -> None:
        self.session += 1
        assert self.spool.next_session() == self.session

    @rule(bound=st.sampled_from([1, 1000, 3000, LARGE]))
    def start_again(self, bound: int) -> None:
        self.spool.close()
        self.open(bound)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), limit=st.integers(1, 5))
    def look_behind_a_position(self, data: st.DataObject, limit: int) -> None:
        entries = self.spool.pending()
        index = data.draw(st.integers(0, len(entries) - 1))
        assert self.spool.pending(entries[index].position, limit) == entries[index + 1 :][:limit]
        assert self.spool.positions(entries[index].boot, [entries[index].seq]) == {entries[index].position}

    @invariant()
    def it_holds_what_the_model_holds(self) -> None:
        found = [Held(entry.boot, entry.seq, entry.kind, len(entry.payload)) for entry in self.spool.pending()]
        assert found == self.held
        assert self.spool.pending_count == len(self.held)
        assert set(self.spool.consumed()) == self.consumed
        assert read_counters(self.path) == Counters(
            session=self.session,
            reports_total=self.total["report"],
            alerts_total=self.total["alert"],
            reports_dropped=self.dropped["report"],
            alerts_dropped=self.dropped["alert"],
            pending=len(self.held),
        )

    def teardown(self) -> None:
        self.spool.close()
        self.folder.cleanup()


TestSpoolBesideItsModel = SpoolBesideItsModel.TestCase
TestSpoolBesideItsModel.settings = settings(deadline=None, max_examples=60, stateful_step_count=30)


MCU, SECOND = "gate~pump", "gate~valve"


def of(boot: str, seq: int, kind: Build = report) -> Report | Alert:
    return kind(boot, seq)


def test_messages_of_other_devices_keep_their_own_boot_and_number(path: Path) -> None:
    spool = open_spool(path)
    spool.put(report)
    assert spool.keep(MCU, of(BOOT, 1))
    assert spool.keep(SECOND, of(OTHER, 7, alert))
    assert [(entry.boot, entry.seq) for entry in spool.pending()] == [(BOOT, 1)]
    assert [(entry.boot, entry.seq) for entry in spool.pending(device=MCU)] == [(BOOT, 1)]
    assert [(entry.seq, entry.kind) for entry in spool.pending(device=SECOND)] == [(7, "alert")]
    assert spool.devices() == ["", MCU, SECOND]
    assert spool.put(report) == 2


def test_a_message_that_comes_again_while_it_waits_is_kept_once(path: Path) -> None:
    spool = open_spool(path)
    assert [spool.keep(MCU, of(BOOT, 1)), spool.keep(MCU, of(BOOT, 1))] == [True, False]
    assert (spool.pending_count, spool.pending_of(MCU)) == (1, 1)


def test_an_ack_is_for_its_own_device_alone(path: Path) -> None:
    spool = open_spool(path)
    spool.put(report)
    spool.keep(MCU, of(BOOT, 1))
    assert len(spool.forget(Ack(boot=BOOT, through_seq=9), device=MCU)) == 1
    assert spool.pending(device=MCU) == []
    assert len(spool.pending()) == 1
    assert spool.positions(BOOT, (1,)) and not spool.positions(BOOT, (1,), device=MCU)


def test_a_full_spool_drops_of_the_device_that_has_most(path: Path) -> None:
    spool = open_spool(path, max_bytes=4 * size_of(report))
    spool.put(report)
    for seq in range(1, 6):
        spool.keep(MCU, of(OTHER, seq))
    assert [entry.seq for entry in spool.pending(device=MCU)] == [3, 4, 5]
    assert [entry.seq for entry in spool.pending()] == [1]
    assert read_counters(path).reports_dropped == 2


def test_alerts_of_one_device_do_not_push_out_the_reports_of_the_others(path: Path) -> None:
    spool = open_spool(path, max_bytes=2 * size_of(report) + 3 * size_of(alert))
    spool.put(report)
    spool.keep(SECOND, of(OTHER, 1))
    for seq in range(1, 9):
        spool.keep(MCU, of(OTHER, seq, alert))
    assert [entry.seq for entry in spool.pending(device=MCU)] == [6, 7, 8]
    assert [entry.kind for device in ("", SECOND) for entry in spool.pending(device=device)] == ["report", "report"]
    assert (read_counters(path).reports_dropped, read_counters(path).alerts_dropped) == (0, 5)


def test_what_waits_in_a_spool_of_version_2_goes_on_waiting(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.executescript(
            "CREATE TABLE outbox (position INTEGER PRIMARY KEY AUTOINCREMENT, boot TEXT NOT NULL, seq INTEGER NOT NULL,"
            " kind TEXT NOT NULL, payload BLOB NOT NULL, UNIQUE (boot, seq));"
            "CREATE INDEX outbox_kind ON outbox (kind);"
            "CREATE TABLE counters (id INTEGER PRIMARY KEY CHECK (id = 1), session INTEGER NOT NULL,"
            " reports_total INTEGER NOT NULL, alerts_total INTEGER NOT NULL, reports_dropped INTEGER NOT NULL,"
            " alerts_dropped INTEGER NOT NULL);"
            "INSERT INTO counters VALUES (1, 41, 5, 0, 0, 0);"
            "CREATE TABLE consumed (name TEXT PRIMARY KEY);"
            "INSERT INTO consumed VALUES ('a.npy');"
            "PRAGMA user_version = 2"
        )
        db.execute("INSERT INTO outbox (boot, seq, kind, payload) VALUES (?, 5, 'report', ?)", (OTHER, b"{}"))
    db.close()
    for _ in range(2):
        spool = open_spool(path)
        assert [(entry.boot, entry.seq, entry.payload) for entry in spool.pending()] == [(OTHER, 5, b"{}")]
        assert (spool.pending_count, spool.consumed()) == (1, ["a.npy"])
        spool.close()
    assert open_spool(path).next_session() == 42
