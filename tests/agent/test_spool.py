"""The spool: what is committed, what an ack lets go, and what a restart finds."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.agent.spool import Spool, read_counters
from edgeguard.contract.messages import Ack, Alert, Report, decode
from edgeguard.contract.scores import BINS
from edgeguard.errors import ConfigError

BOOT, OTHER = "00000000000000aa", "00000000000000bb"
DIGEST = "0" * 64
LARGE = 1 << 30


def report(boot: str, seq: int) -> Report:
    return Report(
        boot=boot,
        seq=seq,
        model_digest=DIGEST,
        guard_digest=DIGEST,
        started_ms=1,
        ended_ms=2,
        inputs=0,
        unchecked=0,
        labels=(),
        histogram=(0,) * BINS,
    )


def alert(boot: str, seq: int) -> Alert:
    return Alert(boot=boot, seq=seq, model_digest=DIGEST, guard_digest=DIGEST, at_ms=1, label=0, score=2.0, scores={})


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


@settings(deadline=None)
@given(
    steps=st.lists(st.one_of(st.just(None), st.tuples(st.integers(0, 12), st.sets(st.integers(1, 12)))), max_size=30)
)
def test_the_spool_holds_exactly_what_no_ack_covered(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, set[int]] | None]
) -> None:
    spool = open_spool(tmp_path_factory.mktemp("spool") / "s.sqlite")
    held: set[int] = set()
    for step in steps:
        if step is None:
            held.add(spool.put(report))
        else:
            spool.forget(Ack(boot=BOOT, through_seq=step[0], gaps=tuple(step[1])))
            held -= {seq for seq in held if seq <= step[0] and seq not in step[1]}
    assert [entry.seq for entry in spool.pending()] == sorted(held)
    spool.close()


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


def test_the_oldest_are_dropped_and_counted_when_the_spool_is_full(path: Path) -> None:
    bound = 2000
    spool = open_spool(path, max_bytes=bound)
    for _ in range(20):
        spool.put(report)
    counters = read_counters(path)
    kept = [entry.seq for entry in spool.pending()]
    assert counters.dropped_total == 20 - len(kept) > 0
    assert kept == list(range(21 - len(kept), 21))
    assert sum(len(entry.payload) for entry in spool.pending()) <= bound
    assert spool.pending_count == len(kept)


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
    assert (counters.dropped_total, counters.pending) == (0, 2)


def test_session_numbers_are_never_given_twice(path: Path) -> None:
    first, second, third = (open_spool(path).next_session() for _ in range(3))
    assert (second, third) == (first + 1, first + 2)


def not_a_database(path: Path) -> None:
    path.write_bytes(b"this is not a database, but it is long enough to look at" * 40)


def a_folder(path: Path) -> None:
    path.mkdir()


def a_newer_version(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 99")


@pytest.mark.parametrize("spoil", [not_a_database, a_folder, a_newer_version])
def test_a_spool_that_cannot_be_used_is_named_in_one_line(path: Path, spoil: Callable[[Path], None]) -> None:
    spoil(path)
    with pytest.raises(ConfigError, match=r"spool .*spool\.sqlite; got .*expected") as caught:
        open_spool(path)
    assert "\n" not in str(caught.value)


def test_a_missing_spool_has_no_counters_and_is_not_made(path: Path) -> None:
    with pytest.raises(ConfigError, match="spool"):
        read_counters(path)
    assert not path.exists()
