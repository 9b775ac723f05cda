"""The database: everything once, in one transaction, on disk when it returns."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import OperationalError

from edgeguard.contract.messages import Ack, Alert, Message, encode
from edgeguard.errors import ConfigError
from edgeguard.hub.batch import DEAD_LETTERS_KEPT
from edgeguard.hub.cases import Case
from edgeguard.hub.ingest import Accepted, Rejected
from edgeguard.hub.store import Store
from tests.simulators import fleet


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(url(tmp_path), fleet="test")
    yield opened
    opened.close()


def url(folder: Path) -> str:
    return f"sqlite:///{folder / 'hub.db'}"


def accepted(message: Message, device: str = "d1") -> Accepted:
    return Accepted(device=device, message=message, payload=encode(message))


def alert(seq: int) -> Alert:
    return Alert(
        boot=fleet.BOOT, seq=seq, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, at_ms=1, label=0, score=2.0,
        scores={},
    )  # fmt: skip


def case(**fields: object) -> Case:
    one = Case(
        model="signs", model_digest=fleet.MODEL, label=7, state="suspected", created_ms=1, updated_ms=2,
        devices=("a",), flagged=50, inputs=200, p_value=1e-20, channels=(),
    )  # fmt: skip
    return msgspec.structs.replace(one, **fields)


def test_the_largest_session_that_a_message_may_bear_can_be_stored(store: Store) -> None:
    store.apply([accepted(fleet.status(session=2**53)), accepted(fleet.birth(session=2**53))], now_ms=1)
    assert [device.session for device in store.devices()] == [2**53]


def test_a_report_and_its_evidence_are_stored_together(store: Store) -> None:
    assert store.apply([accepted(fleet.report())], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=1))]
    counts = store.counts()
    assert (counts["reports"], counts["inputs"], counts["flagged"]) == (1, 30, 1)
    first, second = sorted(store.evidence(fleet.MODEL, fleet.GUARD), key=lambda row: row.label)
    assert (first.inputs, first.flagged, first.flagged_sum.tolist()) == (10, 1, [1, 2, 3, 7])
    assert (second.inputs, second.flagged, second.width) == (20, 0, 0)


@given(st.lists(st.tuples(st.sampled_from(["d1", "d2"]), st.integers(1, 8)), max_size=40), st.integers(1, 9))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_duplicates_and_disorder_in_batches_of_any_size_count_once(
    tmp_path: Path, arrivals: list[tuple[str, int]], size: int
) -> None:
    for old in tmp_path.glob("hub.db*"):
        old.unlink()
    store = Store(url(tmp_path), fleet="test")
    for start in range(0, len(arrivals), size):
        batch = [accepted(fleet.report(seq), device) for device, seq in arrivals[start : start + size]]
        store.apply(batch, now_ms=1)
    unique = set(arrivals)
    assert store.counts()["reports"] == len(unique)
    assert store.counts()["inputs"] == 30 * len(unique)
    rows = store.evidence(fleet.MODEL, fleet.GUARD)
    assert sum(row.inputs for row in rows) == 30 * len(unique)
    total = sum((row.flagged_sum for row in rows if row.width), start=np.zeros(fleet.WIDTH))
    np.testing.assert_allclose(total, len(unique) * np.array([1, 2, 3, 7]))
    store.close()


def test_alerts_and_reports_share_one_sequence(store: Store) -> None:
    acks = store.apply([accepted(alert(1)), accepted(fleet.report(2)), accepted(alert(1))], now_ms=1)
    assert acks == [("d1", Ack(boot=fleet.BOOT, through_seq=2))]
    assert store.counts()["alerts"] == 1


def test_boots_and_devices_have_sequences_of_their_own(store: Store) -> None:
    other = "f" * 16
    items = [accepted(fleet.report(1)), accepted(fleet.report(3, boot=other)), accepted(fleet.report(1), "d2")]
    assert store.apply(items, now_ms=1) == [
        ("d1", Ack(boot=fleet.BOOT, through_seq=1)),
        ("d1", Ack(boot=other, through_seq=3, gaps=(1, 2))),
        ("d2", Ack(boot=fleet.BOOT, through_seq=1)),
    ]


def test_a_repeated_report_is_acknowledged_again(store: Store) -> None:
    first = store.apply([accepted(fleet.report())], now_ms=1)
    assert store.apply([accepted(fleet.report())], now_ms=2) == first
    assert store.counts()["reports"] == 1


def test_a_rejected_report_is_acknowledged_and_counted_as_a_dead_letter_once(store: Store) -> None:
    letter = Rejected(topic="t", reason="does not add up", head=b"{", identity=("d1", fleet.BOOT, 1))
    for _ in range(2):
        assert store.apply([letter], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=1))]
    assert store.dead_letters() == [("t", "does not add up", b"{")]
    assert store.counts()["reports"] == 0


def test_a_letter_without_identity_is_kept_and_not_acknowledged(store: Store) -> None:
    assert store.apply([Rejected(topic="t", reason="r\0\n", head=b"\0")], now_ms=1) == []
    assert store.counts()["dead_letters"] == 1


def test_dead_letters_are_bounded_and_all_are_counted(store: Store) -> None:
    for start in range(0, DEAD_LETTERS_KEPT + 50, 50):
        store.apply([Rejected(topic=str(start + i), reason="r", head=b"") for i in range(50)], now_ms=1)
    kept = store.dead_letters()
    assert len(kept) == DEAD_LETTERS_KEPT
    assert kept[0][0] == "50"
    assert store.counts()["dead_letters"] == DEAD_LETTERS_KEPT + 50


def test_features_of_another_width_than_before_are_a_dead_letter(store: Store) -> None:
    acks = store.apply([accepted(fleet.report(1)), accepted(fleet.report(2, width=9))], now_ms=1)
    assert acks == [("d1", Ack(boot=fleet.BOOT, through_seq=2))]
    assert store.counts()["reports"] == 1
    assert sum(row.inputs for row in store.evidence(fleet.MODEL, fleet.GUARD)) == 30
    assert "width 9" in store.dead_letters()[0][1]


def test_models_and_guards_have_evidence_of_their_own(store: Store) -> None:
    store.apply([accepted(fleet.report(1)), accepted(fleet.report(2, guard=fleet.OTHER))], now_ms=1)
    assert sum(row.inputs for row in store.evidence(fleet.MODEL, fleet.GUARD)) == 30
    assert sum(row.inputs for row in store.evidence(fleet.MODEL, fleet.OTHER)) == 30


def test_the_largest_numbers_that_are_accepted_can_be_stored(store: Store) -> None:
    big = msgspec.structs.replace(fleet.report(2**53, counts=((0, 10**9, 10**9),), shift=3e38), started_ms=2**53)
    for seq in range(2**53, 2**53 - 3, -1):
        store.apply([accepted(msgspec.structs.replace(big, seq=seq))], now_ms=1)
    assert store.counts()["inputs"] == 3 * 10**9


def test_nothing_is_changed_when_the_database_is_locked(tmp_path: Path) -> None:
    store = Store(url(tmp_path), fleet="test", busy_timeout_s=0.1)
    with sqlite3.connect(tmp_path / "hub.db", isolation_level=None) as other:
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(OperationalError, match="locked"):
            store.apply([accepted(fleet.report())], now_ms=1)
        other.execute("ROLLBACK")
    assert store.counts()["reports"] == 0
    assert store.apply([accepted(fleet.report())], now_ms=1)
    store.close()


def test_a_failure_in_the_middle_of_a_batch_leaves_nothing_of_it(store: Store, tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "hub.db") as db:
        db.execute("ALTER TABLE dead_letters RENAME TO gone")  # written last
    letter = Rejected(topic="t", reason="r", head=b"")
    with pytest.raises(OperationalError, match="dead_letters"):
        store.apply([accepted(alert(1)), accepted(fleet.report(2)), letter], now_ms=1)
    with sqlite3.connect(tmp_path / "hub.db") as db:
        db.execute("ALTER TABLE gone RENAME TO dead_letters")
    assert not any(store.counts().values())
    assert not store.evidence(fleet.MODEL, fleet.GUARD)


def test_commits_reach_the_disk(store: Store) -> None:
    with store._read() as db:
        assert db.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert db.exec_driver_sql("PRAGMA synchronous").scalar() == 2


def test_devices_follow_their_messages(store: Store) -> None:
    items = [fleet.status(), fleet.birth(), fleet.reported("refused", sequence=0, desired=4)]
    store.apply([accepted(message) for message in items], now_ms=5)
    (device,) = store.devices()
    assert (device.device, device.online, device.model_digest, device.outcome) == ("d1", True, fleet.MODEL, "refused")
    store.apply([accepted(fleet.status("offline"))], now_ms=6)
    assert not store.devices()[0].online


def test_what_becomes_of_a_hint_enters_the_timeline_once(store: Store) -> None:
    for _ in range(2):
        store.apply([accepted(fleet.reported("fetching", desired=4))], now_ms=4)
        store.apply([accepted(fleet.reported("refused", desired=4))], now_ms=5)
    store.apply([accepted(fleet.reported("updated", desired=4, sequence=4))], now_ms=6)
    assert [(e.kind, e.subject, e.at_ms) for e in store.events()] == [
        ("device_refused", "d1", 5),
        ("device_updated", "d1", 6),
    ]


def test_a_case_and_what_happened_to_it_are_saved_together(store: Store) -> None:
    one = store.save(case(), ("suspected", "label 7"))
    two = store.save(msgspec.structs.replace(one, state="confirming"), ("confirming", "inspecting"))
    other = store.save(case(model_digest=fleet.OTHER))
    assert store.cases() == [two, other]
    assert [(e.kind, e.subject) for e in store.events()] == [("suspected", "case 1"), ("confirming", "case 1")]


def test_the_timeline_can_be_read_on_from_an_id(store: Store) -> None:
    for i in range(5):
        store.add_event("note", "x", str(i), at_ms=i)
    third = store.events(limit=3)[-1]
    assert [e.text for e in store.events(since=third.id)] == ["3", "4"]


def test_fleets_do_not_see_each_other(store: Store, tmp_path: Path) -> None:
    store.apply(
        [accepted(fleet.report()), accepted(fleet.status()), Rejected(topic="t", reason="r", head=b"")], now_ms=1
    )
    store.save(case(), ("suspected", ""))
    other = Store(url(tmp_path), fleet="other")
    assert not any(other.counts().values())
    assert not (other.devices() or other.cases() or other.events() or other.evidence(fleet.MODEL, fleet.GUARD))
    assert not other.dead_letters()
    other.close()


def test_what_was_stored_is_there_after_opening_again(store: Store, tmp_path: Path) -> None:
    store.apply([accepted(fleet.report(2))], now_ms=1)
    store.close()
    again = Store(url(tmp_path), fleet="test")
    assert again.apply([accepted(fleet.report(2))], now_ms=1) == [
        ("d1", Ack(boot=fleet.BOOT, through_seq=2, gaps=(1,)))
    ]
    assert again.counts()["reports"] == 1
    again.close()


@pytest.mark.parametrize(
    "bad",
    ["nonsense", "sqlite:////nowhere/at/all/hub.db", "nosuchdatabase://host/db", "postgresql+nosuch://u:secret@h/d"],
)
def test_a_database_that_cannot_be_opened_is_told_in_one_line(bad: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Store(bad, fleet="test")
    assert "\n" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_file_that_is_no_database_is_left_alone(tmp_path: Path) -> None:
    file = tmp_path / "hub.db"
    file.write_bytes(b"dear diary, " * 1000)
    with pytest.raises(ConfigError, match="not a database"):
        Store(url(tmp_path), fleet="test")
    assert file.read_bytes() == b"dear diary, " * 1000


def test_a_database_of_another_version_is_refused(store: Store, tmp_path: Path) -> None:
    store.close()
    with sqlite3.connect(tmp_path / "hub.db") as db:
        db.execute("UPDATE schema_version SET version = 99")
    with pytest.raises(ConfigError, match="version 99"):
        Store(url(tmp_path), fleet="test")
