"""What Prometheus reads of a hub, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy.exc import OperationalError

from edgeguard import hub as package
from edgeguard.hub.ingest import Rejected
from edgeguard.hub.listener import Totals
from edgeguard.hub.metrics import Census, Metrics
from tests.hub.serving import NOW, Served, serve
from tests.simulators import fleet

DASHBOARD = Path(package.__file__).parent / "grafana.json"
Samples = dict[tuple[str, str], float]


def samples(text: str) -> Samples:
    """The value of each series, by name and label."""
    return {
        (sample.name, "".join(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


def read(hub: Served) -> Samples:
    response, content = hub.fetch("GET", "/metrics")
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    return samples(content.decode())


def test_the_fleet_is_counted_as_the_database_has_it(hub: Served) -> None:
    hub.take("d1", fleet.status(), *(fleet.report(seq) for seq in (1, 2, 2)))
    hub.take("d2", fleet.status("offline"))
    hub.store.apply([Rejected(topic="t", reason="r", head=b"")], now_ms=NOW)
    hub.add_case(state="dismissed")
    hub.add_case(state="confirmed", is_case=True)
    found = read(hub)
    sent = fleet.report(1)
    assert found["edgeguard_hub_reports_total", ""] == 2
    assert found["edgeguard_hub_inputs_total", ""] == 2 * sent.inputs
    assert found["edgeguard_hub_dead_letters_total", ""] == 1
    assert found["edgeguard_hub_devices", "online"] == found["edgeguard_hub_devices", "offline"] == 1
    assert found["edgeguard_hub_cases", "dismissed"] == found["edgeguard_hub_cases", "confirmed"] == 1
    assert found["edgeguard_hub_database_up", ""] == 1


def test_broker_and_queue_are_those_of_now(hub: Served) -> None:
    assert (read(hub)["edgeguard_hub_connected", ""], read(hub)["edgeguard_hub_queue", ""]) == (1, 7)
    hub.connected = False
    assert read(hub)["edgeguard_hub_connected", ""] == 0


def test_what_came_is_counted_by_what_became_of_it() -> None:
    totals = Totals(taken=5, rejected=2, limited=1, batches=4, stored_s=0.5, lag_s=2.0)
    found = samples(Metrics(lambda: Census(counts=_ZEROS), ingested=lambda: totals).text().decode())
    assert {outcome: found["edgeguard_hub_messages_total", outcome] for outcome in _OUTCOMES} == _OUTCOMES
    assert found["edgeguard_hub_batch_seconds_count", ""] == 4
    assert found["edgeguard_hub_batch_seconds_sum", ""] == 0.5
    assert found["edgeguard_hub_commit_lag_seconds_sum", ""] == 2.0


_OUTCOMES = {"accepted": 5.0, "rejected": 2.0, "rate_limited": 1.0}
_ZEROS = dict.fromkeys(("reports", "inputs", "unchecked", "flagged", "alerts", "dead_letters"), 0)


def test_answers_are_counted_by_status(hub: Served) -> None:
    hub.ask("GET", "/v1/devices")
    hub.ask("GET", "/v1/nothing")
    hub.ask("GET", "/v1/devices", role=None)
    found = read(hub)
    assert [found["edgeguard_hub_requests_total", status] for status in ("200", "404", "401")] == [1, 1, 1]
    assert found["edgeguard_hub_authentication_failures_total", ""] == 1


def test_without_a_database_its_figures_are_missing_and_not_zero() -> None:
    def fail() -> Census:
        raise OperationalError("SELECT", {}, Exception("disk I/O error"))

    found = samples(Metrics(fail, connected=lambda: True).text().decode())
    assert found["edgeguard_hub_database_up", ""] == 0
    assert found["edgeguard_hub_connected", ""] == 1
    assert not any(name in ("edgeguard_hub_reports_total", "edgeguard_hub_devices") for name, _ in found)


def test_two_hubs_in_one_process_do_not_add_up() -> None:
    one, other = (Metrics(lambda: Census(counts=_ZEROS)) for _ in range(2))
    one.denied()
    assert samples(other.text().decode())["edgeguard_hub_authentication_failures_total", ""] == 0


def test_they_need_a_token_unless_the_operator_opens_them(hub: Served, tmp_path: Path) -> None:
    assert hub.ask("GET", "/metrics", role=None)[0] == 401
    folder = tmp_path / "open"
    folder.mkdir()
    with serve(folder, metrics="open") as opened:
        assert opened.fetch("GET", "/metrics", role=None)[0].status == 200
        assert opened.ask("GET", "/v1/devices", role=None)[0] == 401


def queries() -> list[str]:
    board = json.loads(DASHBOARD.read_text())
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return asked + [one["query"] for one in board["templating"]["list"] if one["type"] == "query"]


@pytest.mark.parametrize("query", queries())
def test_the_dashboard_asks_for_what_there_is(query: str) -> None:
    full = Metrics(lambda: Census(counts=_ZEROS, devices={"online": 1}, cases={"closed": 1}, jobs={"done": 1}))
    full.answered(200)
    known = {name for name, _ in samples(full.text().decode())}
    asked = set(re.findall(r"edgeguard_hub_\w+", query))
    assert asked
    assert asked <= known


def test_each_panel_of_the_dashboard_has_a_place_and_a_name() -> None:
    panels = json.loads(DASHBOARD.read_text())["panels"]
    assert len({panel["title"] for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24
