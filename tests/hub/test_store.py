"""What every database must do: everything once, in one transaction. Run for SQLite and for PostgreSQL."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, insert, select, text
from sqlalchemy.exc import DBAPIError

from edgeguard.contract.messages import Ack
from edgeguard.errors import ConfigError
from edgeguard.hub import batch, schema
from edgeguard.hub.batch import DEAD_LETTERS_KEPT
from edgeguard.hub.ingest import Rejected
from edgeguard.hub.store import OUTCOMES_AT_ONCE, Store
from tests.simulators import fleet
from tests.simulators.fleet import accepted, alert


@pytest.fixture
def store(database: str) -> Iterator[Store]:
    opened = Store(database, fleet="test")
    yield opened
    opened.close()


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


arrivals = st.lists(st.tuples(st.sampled_from(["d1", "d2"]), st.integers(1, 8)), max_size=40)


@given(arrivals, st.integers(1, 9), st.integers(0, 10**9))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_duplicates_and_disorder_in_batches_of_any_size_count_once(
    database: str, arrivals: list[tuple[str, int]], size: int, number: int
) -> None:
    store = Store(database, fleet=f"f{number}")
    before = store.counts()
    boot = f"{secrets.randbits(64):016x}"
    for start in range(0, len(arrivals), size):
        batch = [accepted(fleet.report(seq, boot=boot), device) for device, seq in arrivals[start : start + size]]
        store.apply(batch, now_ms=1)
    unique = set(arrivals)
    after = store.counts()
    assert after["reports"] - before["reports"] == len(unique)
    assert after["inputs"] - before["inputs"] == 30 * len(unique)
    rows = store.evidence(fleet.MODEL, fleet.GUARD)
    assert sum(row.inputs for row in rows) == after["inputs"]
    total = sum((row.flagged_sum for row in rows if row.width), start=np.zeros(fleet.WIDTH))
    np.testing.assert_allclose(total, after["reports"] * np.array([1, 2, 3, 7]))
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


def test_a_failure_in_the_middle_of_a_batch_leaves_nothing_of_it(store: Store) -> None:
    with store.write() as db:
        db.execute(text("ALTER TABLE totals RENAME TO gone"))  # written last
    letter = Rejected(topic="t", reason="r", head=b"")
    with pytest.raises(DBAPIError, match="totals"):
        store.apply([accepted(alert(1)), accepted(fleet.report(2)), letter], now_ms=1)
    with store.write() as db:
        db.execute(text("ALTER TABLE gone RENAME TO totals"))
    assert not any(store.counts().values())
    assert not store.evidence(fleet.MODEL, fleet.GUARD)
    assert store.apply([accepted(fleet.report(1))], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=1))]


def test_an_error_in_a_transaction_takes_back_what_it_wrote(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.write() as db:
        db.execute(delete(schema.devices))
        db.execute(insert(schema.models), {"fleet": "test", "model_digest": "m", "guard_digest": "g"})
        raise ZeroDivisionError
    with store.read() as db:
        assert db.execute(select(schema.models)).all() == []


def test_a_device_is_last_seen_when_it_last_said_anything(store: Store) -> None:
    store.apply([accepted(fleet.status())], now_ms=5)
    assert store.devices()[0].last_seen_ms == 5
    store.apply([accepted(fleet.report())], now_ms=7)
    assert store.devices()[0].last_seen_ms == 7


def test_text_that_no_database_takes_is_made_plain(store: Store) -> None:
    bad = msgspec.structs.replace(fleet.reported("refused", desired=4), reason="no\0pe\n")
    birth = msgspec.structs.replace(fleet.birth(), board="a\0b")
    store.apply([accepted(birth), accepted(bad)], now_ms=1)
    assert "\0" not in store.devices()[0].reason
    assert [event.kind for event in store.events()] == ["device_refused"]


def test_the_first_and_the_last_boot_id_can_be_stored(store: Store) -> None:
    for boot in ("0" * 16, "7" + "f" * 15, "8" + "0" * 15, "f" * 16):
        for _ in range(2):
            assert store.apply([accepted(fleet.report(3, boot=boot))], now_ms=1) == [
                ("d1", Ack(boot=boot, through_seq=3, gaps=(1, 2)))
            ]
    assert store.counts()["reports"] == 4


def test_a_letter_that_is_not_to_be_listed_is_counted_and_acknowledged(store: Store) -> None:
    letter = Rejected(topic="t", reason="r", head=b"", identity=("d1", fleet.BOOT, 1), listed=False)
    assert store.apply([letter], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=1))]
    assert store.dead_letters() == []
    assert store.counts()["dead_letters"] == 1


def test_labels_are_counted_by_device_and_epoch(database: str) -> None:
    store = Store(database, fleet="test", epoch_hours=1)
    hour = 3_600_000
    store.apply([accepted(fleet.report(1)), accepted(fleet.report(1), "d2")], now_ms=5 * hour)
    store.apply([accepted(fleet.report(2, counts=((-1, 7, 2), (4095, 3, 0))))], now_ms=6 * hour)
    counts = store.label_counts(fleet.MODEL, fleet.GUARD)
    columns = (counts.device, counts.label, counts.epoch, counts.inputs, counts.flagged)
    assert counts.devices == ("d1", "d2")
    assert sorted(zip(*(column.tolist() for column in columns), strict=True)) == [
        (0, -1, 6, 7, 2),
        (0, 0, 5, 10, 1),
        (0, 1, 5, 20, 0),
        (0, 4095, 6, 3, 0),
        (1, 0, 5, 10, 1),
        (1, 1, 5, 20, 0),
    ]
    assert all(column.dtype == np.int64 for column in columns)
    store.close()


def test_nothing_was_counted_for_an_unknown_model(store: Store) -> None:
    store.apply([accepted(fleet.report())], now_ms=1)
    counts = store.label_counts(fleet.OTHER, fleet.GUARD)
    assert counts.devices == ()
    assert counts.inputs.tolist() == []
    assert store.evidence(fleet.OTHER, fleet.GUARD) == []


def test_features_of_one_label_are_summed_over_epochs(database: str) -> None:
    store = Store(database, fleet="test", epoch_hours=1)
    for seq in (1, 2):
        store.apply([accepted(fleet.report(seq)), accepted(fleet.report(seq, counts=((0, 4, 0),)), "d2")],
                    now_ms=seq * 3_600_000)  # fmt: skip
    first, second = store.label_features(fleet.MODEL, fleet.GUARD, 0)
    assert (first.device, first.inputs, first.flagged, first.flagged_vectors, first.unflagged) == ("d1", 20, 2, 2, 18)
    assert first.flagged_sum.tolist() == [2, 4, 6, 14]
    assert first.unflagged_sum.tolist() == [18, 36, 54, 72]
    np.testing.assert_allclose(first.unflagged_squares, 18 * (np.array([1, 2, 3, 4]) ** 2 + 0.25))
    assert (second.device, second.inputs, second.flagged, second.width) == ("d2", 8, 0, 0)
    store.close()


def test_the_newest_features_that_are_enough_are_those_of_the_last_slots(store: Store) -> None:
    day = 86_400_000
    for seq, epoch, shift in ((1, 1, 50.0), (2, 20, 3.0), (3, 21, 3.0)):
        counts = ((0, 10, 2),)
        store.apply([accepted(fleet.report(seq, counts=counts, shift=shift))], now_ms=epoch * day)

    def shifts(enough: int | None) -> tuple[int, float]:
        (row,) = store.label_features(fleet.MODEL, fleet.GUARD, 0, enough=enough)
        assert row.inputs == 30
        return row.flagged_vectors, row.flagged_sum[-1] / row.flagged_vectors - row.unflagged_sum[-1] / row.unflagged

    assert shifts(1) == shifts(4) == pytest.approx((4, 3.0))
    assert shifts(5) == shifts(None) == pytest.approx((6, (2 * 50 + 4 * 3) / 6))


def test_a_device_that_runs_a_guard_of_its_own_is_known_by_what_it_counted_with_that_guard(store: Store) -> None:
    own = "d" * 64
    for device in ("d1", "d2"):
        store.apply([accepted(fleet.report(1, counts=((0, 10, 1),)), device)], now_ms=1)
    items = [fleet.birth(guard=own), fleet.report(2, guard=own, counts=((0, 7, 2),))]
    store.apply([accepted(message) for message in items], now_ms=2)
    counts = store.label_counts(fleet.MODEL, fleet.GUARD)
    assert (counts.devices, counts.recalibrated) == (("d1", "d2"), frozenset({"d1"}))
    assert [(row.device, row.inputs, row.flagged) for row in store.evidence(fleet.MODEL, fleet.GUARD)] == [
        ("d1", 7, 2),
        ("d2", 10, 1),
    ]
    assert [row.flagged_vectors for row in store.label_features(fleet.MODEL, fleet.GUARD, 0)] == [2, 1]
    store.apply([accepted(fleet.birth(session=2))], now_ms=3)
    back = store.label_counts(fleet.MODEL, fleet.GUARD)
    assert (back.inputs.tolist(), back.recalibrated) == ([10, 10], frozenset())


def test_what_a_device_runs_now_does_not_hide_what_it_counts_under_another_model(store: Store) -> None:
    store.apply([accepted(fleet.birth(model=fleet.OTHER, guard=fleet.OTHER)), accepted(fleet.report(1))], now_ms=1)
    counts = store.label_counts(fleet.MODEL, fleet.GUARD)
    assert (counts.devices, counts.recalibrated) == (("d1",), frozenset())


def test_several_reports_of_one_device_in_one_batch_add_up(store: Store) -> None:
    store.apply([accepted(fleet.report(seq)) for seq in range(1, 51)], now_ms=1)
    one = store.label_features(fleet.MODEL, fleet.GUARD, 0)[0]
    assert (one.inputs, one.flagged, one.unflagged) == (500, 50, 450)
    np.testing.assert_allclose(one.flagged_sum, 50 * np.array([1, 2, 3, 7]))


def test_one_batch_may_hold_features_of_several_widths(store: Store) -> None:
    items = [accepted(fleet.report(1)), accepted(fleet.report(1, width=9), "d2"), accepted(fleet.report(2))]
    store.apply(items, now_ms=1)
    assert [(row.device, row.width) for row in store.label_features(fleet.MODEL, fleet.GUARD, 0)] == [
        ("d1", 4),
        ("d2", 9),
    ]


def test_devices_follow_their_messages(store: Store) -> None:
    items = [fleet.status(), fleet.birth(), fleet.reported("refused", sequence=0, desired=4)]
    store.apply([accepted(message) for message in items], now_ms=5)
    (device,) = store.devices()
    assert (device.device, device.online, device.model_digest, device.outcome) == ("d1", True, fleet.MODEL, "refused")
    store.apply([accepted(fleet.status("offline"))], now_ms=6)
    assert not store.devices()[0].online


def test_the_numbers_of_the_timeline_are_in_the_order_of_the_commits(store: Store) -> None:
    """As with two hubs on one PostgreSQL, one of which takes its time: a reader that saw 2 would never ask for 1."""
    told = threading.Thread(target=store.add_event, args=("note", "x", "quick"), kwargs={"at_ms": 2})
    with store.write() as db:
        batch.add_event(db, "test", at_ms=1, kind="note", subject="x", text="slow", detail={})
        told.start()
        told.join(0.5)
        assert told.is_alive()
        assert store.events() == []
    told.join(10)
    assert [event.text for event in store.events()] == ["slow", "quick"]


def test_a_device_that_changes_its_mind_all_day_fills_no_timeline(store: Store) -> None:
    for number in range(300):
        state = ("refused", "failed")[number % 2]
        store.apply([accepted(fleet.reported(state, desired=4))], now_ms=1000 * number)
    store.apply([accepted(fleet.reported("refused", desired=5), "d2")], now_ms=300_000)
    told = [event.subject for event in store.events()]
    assert told.count("d1") == OUTCOMES_AT_ONCE
    assert told.count("d2") == 1
    assert [device.outcome for device in store.devices()] == ["failed", "refused"]


def test_what_becomes_of_a_hint_enters_the_timeline_once(store: Store) -> None:
    for _ in range(2):
        store.apply([accepted(fleet.reported("fetching", desired=4))], now_ms=4)
        store.apply([accepted(fleet.reported("refused", desired=4))], now_ms=5)
    store.apply([accepted(fleet.reported("updated", desired=4, sequence=4))], now_ms=6)
    assert [(e.kind, e.subject, e.at_ms) for e in store.events()] == [
        ("device_refused", "d1", 5),
        ("device_updated", "d1", 6),
    ]


def test_the_timeline_can_be_read_on_from_an_id(store: Store) -> None:
    for i in range(5):
        store.add_event("note", "x", str(i), at_ms=i)
    third = store.events(limit=3)[-1]
    assert [e.text for e in store.events(since=third.id)] == ["3", "4"]


def test_fleets_do_not_see_each_other(store: Store, database: str) -> None:
    store.apply(
        [accepted(fleet.report()), accepted(fleet.status()), Rejected(topic="t", reason="r", head=b"")], now_ms=1
    )
    store.add_event("note", "x", "", at_ms=1)
    other = Store(database, fleet="other")
    assert not any(other.counts().values())
    assert not (other.devices() or other.events() or other.evidence(fleet.MODEL, fleet.GUARD))
    assert not other.dead_letters()
    other.close()


def test_what_was_stored_is_there_after_opening_again(store: Store, database: str) -> None:
    store.apply([accepted(fleet.report(2))], now_ms=1)
    store.close()
    again = Store(database, fleet="test")
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


def test_a_url_that_cannot_be_read_is_refused_without_a_word_of_its_password() -> None:
    with pytest.raises(ConfigError) as refused:
        Store("postgresql+psycopg://user:pa@ss:w0rd@host/db", fleet="test")
    assert "w0rd" not in str(refused.value)
