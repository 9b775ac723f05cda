"""Several hubs on one PostgreSQL: batches for the same devices at the same time, and a server that goes away."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence

import pytest
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

from edgeguard.contract.messages import Ack
from edgeguard.hub.batch import DEAD_LETTERS_KEPT
from edgeguard.hub.ingest import Accepted, Rejected
from edgeguard.hub.store import Store
from tests.simulators import fleet
from tests.simulators.fleet import accepted
from tests.simulators.postgres import Postgres

HUBS = 3
DEVICES = tuple(f"d{i}" for i in range(6))
REPORTS = 40


@pytest.fixture
def url(postgres: Postgres, template: str) -> str:
    return postgres.url(postgres.create(template))


def work_together(url: str, shares: Sequence[Sequence[Sequence[Accepted | Rejected]]]) -> None:
    """Each share's batches are applied by a hub of its own, all at the same time. No hub may see an error."""
    errors: list[Exception] = []
    start = threading.Barrier(len(shares))

    def run(batches: Sequence[Sequence[Accepted | Rejected]]) -> None:
        store = Store(url, fleet="test")
        try:
            start.wait(30)
            for batch in batches:
                store.apply(batch, now_ms=1)
        except Exception as error:
            errors.append(error)
        finally:
            store.close()

    threads = [threading.Thread(target=run, args=(batches,)) for batches in shares]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []


def test_hubs_that_all_get_every_report_count_each_once(url: str) -> None:
    sent = [(device, seq) for device in DEVICES for seq in range(1, REPORTS + 1)]
    shares = []
    for hub in range(HUBS):
        order = random.Random(hub).sample(sent, len(sent))
        items = [accepted(fleet.report(seq), device) for device, seq in order]
        shares.append([items[at : at + 20] for at in range(0, len(items), 20)])
    work_together(url, shares)
    store = Store(url, fleet="test")
    counts = store.counts()
    assert (counts["reports"], counts["devices"]) == (len(sent), len(DEVICES))
    assert counts["inputs"] == 30 * len(sent)
    rows = store.evidence(fleet.MODEL, fleet.GUARD)
    assert sum(row.inputs for row in rows) == 30 * len(sent)
    assert sum(row.flagged_sum[3] for row in rows if row.width) == 7 * len(sent)
    last = accepted(fleet.report(REPORTS))
    assert store.apply([last], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=REPORTS))]
    store.close()


def test_hubs_that_share_the_reports_of_a_boot_leave_no_gap(url: str) -> None:
    work_together(
        url, [[[accepted(fleet.report(seq))] for seq in range(1 + hub, REPORTS + 1, HUBS)] for hub in range(HUBS)]
    )
    store = Store(url, fleet="test")
    assert store.counts()["reports"] == REPORTS
    assert store.apply([accepted(fleet.report(1))], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=REPORTS))]
    store.close()


def test_boots_of_one_device_at_different_hubs_add_up(url: str) -> None:
    boots = [f"{hub:016x}" for hub in range(HUBS)]
    shares = [[[accepted(fleet.report(seq, boot=boot))] for seq in range(1, REPORTS + 1)] for boot in boots]
    work_together(url, shares)
    store = Store(url, fleet="test")
    assert sum(row.inputs for row in store.evidence(fleet.MODEL, fleet.GUARD)) == 30 * REPORTS * HUBS
    store.close()


def test_dead_letters_of_several_hubs_are_bounded_and_all_counted(url: str) -> None:
    batches = [[Rejected(topic="t", reason="r", head=b"")] * 100] * 5
    work_together(url, [batches] * HUBS)
    store = Store(url, fleet="test")
    assert store.counts()["dead_letters"] == 500 * HUBS
    assert len(store.dead_letters()) == DEAD_LETTERS_KEPT
    store.close()


def test_devices_and_models_that_several_hubs_meet_first_get_one_number(url: str) -> None:
    models = [f"{i:064x}" for i in range(20)]
    items = [accepted(fleet.report(1, model=model, boot=model[-16:]), f"d{model[-2:]}") for model in models]
    shares = [[random.Random(hub).sample(items, len(items))] for hub in range(HUBS)]
    work_together(url, shares)
    store = Store(url, fleet="test")
    assert store.counts()["devices"] == 20
    assert [sum(row.inputs for row in store.evidence(model, fleet.GUARD)) for model in models] == [30] * 20
    store.close()


def test_a_store_goes_on_after_the_server_was_killed(postgres: Postgres, url: str) -> None:
    store = Store(url, fleet="test")
    store.apply([accepted(fleet.report(1))], now_ms=1)
    postgres.kill()
    with pytest.raises(OperationalError):
        store.apply([accepted(fleet.report(2))], now_ms=1)
    postgres.start()
    with store.read() as db:
        assert db.scalar(text("SELECT 1")) == 1
    assert store.apply([accepted(fleet.report(2))], now_ms=1) == [("d1", Ack(boot=fleet.BOOT, through_seq=2))]
    assert store.counts()["reports"] == 2
    store.close()
