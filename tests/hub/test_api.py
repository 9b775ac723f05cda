"""The REST interface: what is given of the fleet, page by page; what people decide and ask."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jsonschema  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection
from sqlalchemy.exc import OperationalError

from edgeguard.contract import messages
from edgeguard.contract.messages import Alive, PingReply
from edgeguard.hub import api
from edgeguard.hub.access import needed
from edgeguard.hub.ingest import Rejected
from edgeguard.hub.queries import MAX_PAGE
from edgeguard.hub.shared import ENOUGH
from edgeguard.hub.web import MAX_BODY, MAX_INPUTS
from tests.hub.serving import NOW, Served, serve
from tests.simulators import fleet

ROOT = Path(__file__).parent.parent.parent
DOCUMENT = api.openapi()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def full(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A hub with some of everything, which tests only read, on either kind of database."""
    url = None
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres")
        url = postgres.url(postgres.create(request.getfixturevalue("template")))
    with serve(tmp_path_factory.mktemp("full"), url) as served:
        for device in ("d1", "d2", "gate~cam"):
            served.take(device, fleet.status(), fleet.birth(), *(fleet.report(seq) for seq in range(1, 6)))
        served.take("d3", fleet.status("offline"))
        letter = Rejected(topic="edgeguard/v1/test/d1/report", reason="not JSON", head=b"\xff\x00")
        served.store.apply([letter] * 3, now_ms=NOW)
        for state in ("dismissed", "suspected"):
            served.add_case(state=state)
        served.add_case(state="confirmed", is_case=True, awaiting="repair")
        served.commands.issue("d1", "ping")
        yield served


def pages(hub: Served, path: str, limit: int) -> list[dict[str, Any]]:
    found, cursor = [], None
    while True:
        more = f"&cursor={cursor}" if cursor else ""
        status, page = hub.ask("GET", f"{path}{'&' if '?' in path else '?'}limit={limit}{more}")
        assert status == 200
        assert len(page["items"]) <= limit
        found += page["items"]
        cursor = page["next"]
        if cursor is None:
            return found


LISTS = {
    "/v1/devices": ("device", ["d1", "d2", "d3", "gate~cam"]),
    "/v1/cases": ("id", [3, 2, 1]),
    "/v1/cases?confirmed=true": ("id", [3]),
    "/v1/cases?confirmed=false": ("id", [2, 1]),
    "/v1/cases?state=dismissed": ("id", [1]),
    "/v1/devices?state=online": ("device", ["d1", "d2", "gate~cam"]),
    f"/v1/devices?model={fleet.MODEL}": ("device", ["d1", "d2", "gate~cam"]),
    "/v1/reports": ("seq", [5, 4, 3, 2, 1] * 3),
    "/v1/reports?device=d2": ("seq", [5, 4, 3, 2, 1]),
    "/v1/reports?device=nobody": ("seq", []),
    "/v1/dead-letters": ("reason", ["not JSON"] * 3),
    "/v1/events": ("kind", ["dismissed", "suspected", "confirmed"]),
    "/v1/events?order=newest": ("kind", ["confirmed", "suspected", "dismissed"]),
    "/v1/commands": ("device", ["d1"]),
    "/v1/commands?device=d2": ("device", []),
}


@pytest.mark.parametrize("path", LISTS)
@pytest.mark.parametrize("limit", [1, 2, MAX_PAGE])
def test_a_list_is_the_same_in_pages_of_any_size(full: Served, path: str, limit: int) -> None:
    field, expected = LISTS[path]
    assert [row[field] for row in pages(full, path, limit)] == expected


def test_rows_that_come_meanwhile_move_no_page(hub: Served) -> None:
    hub.take("d1", *(fleet.report(seq) for seq in range(1, 5)))
    first = hub.ask("GET", "/v1/reports?limit=2")[1]
    hub.take("d1", *(fleet.report(seq) for seq in range(5, 9)))
    second = hub.ask("GET", f"/v1/reports?limit=2&cursor={first['next']}")[1]
    assert [row["seq"] for row in first["items"] + second["items"]] == [4, 3, 2, 1]


def test_the_log_of_reports_is_looked_through_in_pieces(hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeguard.hub.queries.WINDOW", 3)
    hub.take("d1", *(fleet.report(seq) for seq in range(1, 3)))
    hub.take("d2", *(fleet.report(seq) for seq in range(1, 9)))
    first = hub.ask("GET", "/v1/reports?device=d1")[1]
    assert (first["items"], first["next"] is None) == ([], False)
    assert [row["seq"] for row in pages(hub, "/v1/reports?device=d1", 5)] == [2, 1]
    assert len(pages(hub, "/v1/reports", 5)) == 10


def test_a_device_is_told_with_all_that_it_said_of_itself(full: Served) -> None:
    status, device = full.ask("GET", "/v1/devices/gate~cam")
    assert status == 200
    assert (device["state"], device["model_digest"], device["last_seen_ms"]) == ("online", fleet.MODEL, NOW)
    assert device["birth"]["runtime"] == fleet.birth().runtime
    assert device["health"] is None


def test_models_are_those_that_the_hub_watches(full: Served) -> None:
    (model,) = full.ask("GET", "/v1/models")[1]["items"]
    assert (model["name"], model["model_digest"], model["devices"]) == ("signs", fleet.MODEL, 3)


def test_a_report_names_device_boot_and_model(full: Served) -> None:
    row = full.ask("GET", "/v1/reports?device=d1&limit=1")[1]["items"][0]
    sent = fleet.report(5)
    assert row == {
        "device": "d1", "boot": sent.boot, "seq": 5, "model_digest": sent.model_digest, "inputs": sent.inputs,
        "guard_digest": sent.guard_digest, "unchecked": 0, "flagged": 1, "stored_ms": NOW,
    }  # fmt: skip


def test_a_case_is_told_with_its_explanation_and_its_audit_trail(full: Served) -> None:
    status, case = full.ask("GET", "/v1/cases/3")
    assert status == 200
    assert (case["is_case"], case["awaiting"], case["devices"]) == (True, "repair", ["d1", "d2"])
    assert "signs" in case["explanation"]
    assert [entry["became"] for entry in case["audit"]] == ["confirmed"]


@pytest.mark.parametrize(
    "path", ["/v1/devices/nobody", "/v1/cases/99", "/v1/commands/" + "0" * 20, "/v1/nothing", "/v1/cases/3/decisions/1"]
)
def test_what_is_not_there_is_told(full: Served, path: str) -> None:
    status, told = full.ask("GET", path)
    assert (status, told["got"]) == (404, "not found")


class TestBadRequests:
    @pytest.mark.parametrize(
        ("path", "what"),
        [
            ("/v1/devices?limit=0", "limit"),
            (f"/v1/devices?limit={MAX_PAGE + 1}", "limit"),
            ("/v1/devices?limit=many", "limit"),
            ("/v1/devices?state=broken", "state"),
            ("/v1/devices?model=abc", "model"),
            ("/v1/devices?cursor=%00", "cursor"),
            ("/v1/devices?cursor=MQ", "cursor"),
            ("/v1/reports?cursor=ImEi", "cursor"),
            ("/v1/reports?cursor=LTE", "cursor"),
            ("/v1/reports?cursor=OTk5OTk5OTk5OTk5OTk5OTk5OTk5OTk5", "cursor"),
            ("/v1/reports?device=..%2f", "device"),
            ("/v1/cases/0", "case"),
            ("/v1/cases/x", "case"),
            ("/v1/cases/99999999999999999999", "case"),
            ("/v1/devices/UPPER", "device"),
            ("/v1/devices/a%00b", "device"),
            ("/v1/events?order=random", "order"),
            ("/v1/commands/xyz", "command"),
            *((f"/v1/status?since={since}", "since") for since in ("x", "-1", "1.5", "", "9" * 30, "%00", "%C2%B2")),
        ],
    )
    def test_a_value_that_cannot_be_is_named(self, full: Served, path: str, what: str) -> None:
        status, told = full.ask("GET", path)
        assert status == 400
        assert told["what"] == what
        assert told["expected"]

    @pytest.mark.parametrize(
        "body",
        [
            b"", b"{", b"[]", b"null", b"\xff", b"[" * 20_000,
            b'{"step": "repair"}',
            b'{"step": "repair", "approve": "?"}',
            b'{"step": "paint", "approve": true}',
            b'{"step": "repair", "approve": true, "extra": 1}',
            b'{"step": "repair", "approve": true, "why": "\\u0000"}',
            b'{"step": "repair", "approve": true, "why": "\\ud800"}',
            b'{"step": "repair", "approve": true, "why": "%s"}' % (b"x" * 501),
        ],
    )  # fmt: skip
    def test_a_body_that_is_none_is_refused(self, full: Served, body: bytes) -> None:
        status, told = full.ask("POST", "/v1/cases/3/decisions", body, role="operator")
        assert status == 400
        assert set(told) == {"what", "got", "expected", "do"}

    def test_another_method_is_refused(self, full: Served) -> None:
        assert full.ask("DELETE", "/v1/cases/3", role="admin")[0] == 405


class TestDecisions:
    def test_an_approval_is_recorded_under_the_name_of_the_token(self, hub: Served) -> None:
        hub.add_case(state="confirmed", is_case=True, awaiting="repair")
        decision = {"step": "repair", "approve": True, "why": "seen twice"}
        status, case = hub.ask("POST", "/v1/cases/1/decisions", decision, role="operator")
        assert (status, case["awaiting"], case["approved"]) == (200, None, ["repair"])
        assert (case["audit"][-1]["who"], "seen twice" in case["audit"][-1]["why"]) == ("operator", True)

    def test_a_rejection_ends_the_case(self, hub: Served) -> None:
        hub.add_case(state="confirmed", is_case=True, awaiting="repair")
        case = hub.ask("POST", "/v1/cases/1/decisions", {"step": "repair", "approve": False}, role="operator")[1]
        assert case["state"] == "refused"

    def test_a_step_that_does_not_wait_is_not_decided(self, hub: Served) -> None:
        hub.add_case(state="suspected")
        status, told = hub.ask("POST", "/v1/cases/1/decisions", {"step": "stage", "approve": True}, role="operator")
        assert (status, told["what"]) == (409, "decision on case 1")
        assert hub.ask("POST", "/v1/cases/2/decisions", {"step": "stage", "approve": True}, role="operator")[0] == 404


class TestCommands:
    def test_a_device_is_asked_and_its_answer_shown(self, hub: Served) -> None:
        hub.take("d1", fleet.status())
        status, asked = hub.ask("POST", "/v1/devices/d1/commands", {"name": "ping"}, role="operator")
        assert (status, asked["state"], asked["reply"]) == (202, "waiting", None)
        hub.commands.tick()
        assert [(device, channel) for device, channel, _ in hub.sent] == [("d1", "cmd/ping")]
        hub.clock[0] += 40
        alive = Alive(boot=fleet.BOOT, session=1, uptime_s=2.5)
        hub.commands.heard("d1", "ping", messages.encode(PingReply(id=asked["id"], state="ok", result=alive)))
        answered = hub.ask("GET", f"/v1/commands/{asked['id']}")[1]
        assert (answered["state"], answered["replied_ms"] - answered["issued_ms"]) == ("ok", 40)
        assert answered["reply"]["result"]["uptime_s"] == 2.5

    @pytest.mark.parametrize(("device", "name", "status"), [("nobody", "ping", 404), ("d1", "rank", 400)])
    def test_only_a_device_that_there_is_and_only_so_much(
        self, hub: Served, device: str, name: str, status: int
    ) -> None:
        hub.take("d1", fleet.status())
        assert hub.ask("POST", f"/v1/devices/{device}/commands", {"name": name}, role="operator")[0] == status

    def test_a_device_is_told_to_restart_or_to_calibrate_anew(self, hub: Served) -> None:
        hub.take("d1", fleet.status())
        for body in ({"name": "restart"}, {"name": "recalibrate"}, {"name": "recalibrate", "source": "owner"}):
            assert hub.ask("POST", "/v1/devices/d1/commands", body, role="operator")[0] == 202
            hub.clock[0] += 1
        hub.commands.tick()
        assert [channel for _, channel, _ in hub.sent] == ["cmd/restart", "cmd/recalibrate", "cmd/recalibrate"]
        assert [getattr(command, "source", None) for _, _, command in hub.sent] == [None, "sidecar", "owner"]
        wrong = {"name": "ping", "source": "owner"}
        assert hub.ask("POST", "/v1/devices/d1/commands", wrong, role="operator")[0] == 409

    def test_those_that_are_proposed_are_listed(self, hub: Served) -> None:
        hub.take("d1", fleet.status())
        hub.commands.issue("d1", "ping")
        key = hub.commands.issue("d1", "recalibrate", source="owner", propose=True)
        assert [one["id"] for one in hub.ask("GET", "/v1/commands?state=proposed")[1]["items"]] == [key]

    @pytest.mark.parametrize(("approve", "state"), [(True, "waiting"), (False, "refused")])
    def test_a_proposed_command_is_decided_once(self, hub: Served, approve: bool, state: str) -> None:
        hub.take("d1", fleet.status())
        key = hub.commands.issue("d1", "recalibrate", source="owner", propose=True)
        status, after = hub.ask("POST", f"/v1/commands/{key}/decisions", {"approve": approve}, role="operator")
        assert (status, after["state"]) == (200, state)
        assert hub.ask("POST", f"/v1/commands/{key}/decisions", {"approve": approve}, role="operator")[0] == 409


class TestSharedInputs:
    def body(self, count: int, *, size: int = 64) -> dict[str, Any]:
        inputs = [base64.b64encode(bytes([17 * number]) * size).decode() for number in range(count)]
        return {"dtype": "uint8", "shape": [8, 8, 1], "inputs": inputs, "why": "stickers"}

    def test_they_are_replayed_and_enough_of_them_make_a_case(self, hub: Served) -> None:
        case = hub.add_case()
        status, said = hub.ask("POST", f"/v1/cases/{case.id}/inputs", self.body(4), role="operator")
        assert (status, said["counting"], said["enough"], said["state"]) == (200, 4, ENOUGH, "suspected")
        assert [(one["predicted"], one["flagged"], one["counts"]) for one in said["items"]] == [(1, True, True)] * 4
        status, said = hub.ask("POST", f"/v1/cases/{case.id}/inputs", self.body(ENOUGH), role="operator")
        assert (said["counting"], said["state"]) == (ENOUGH, "confirmed")
        assert hub.ask("GET", f"/v1/cases/{case.id}")[1]["audit"][-1]["who"] == "operator"

    def test_a_viewer_may_not_share(self, hub: Served) -> None:
        case = hub.add_case()
        assert hub.ask("POST", f"/v1/cases/{case.id}/inputs", self.body(1))[0] == 403

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            ({"shape": [64]}, 409),
            ({"dtype": "object"}, 400),
            ({"inputs": ["no base64!"]}, 409),
            ({"inputs": []}, 400),
            ({"inputs": ["AA=="] * 65}, 400),
            ({"inputs": ["AA=="]}, 409),
        ],
    )
    def test_what_is_no_input_of_the_model_is_refused(self, hub: Served, change: dict[str, Any], status: int) -> None:
        case = hub.add_case()
        asked = hub.ask("POST", f"/v1/cases/{case.id}/inputs", self.body(1) | change, role="operator")
        assert asked[0] == status
        assert set(asked[1]) == {"what", "got", "expected", "do"}

    def test_more_may_be_sent_than_elsewhere_but_not_without_end(self, hub: Served) -> None:
        case = hub.add_case()
        large = self.body(1, size=MAX_BODY)
        assert hub.ask("POST", f"/v1/cases/{case.id}/inputs", large, role="operator")[0] == 409
        length = {"Content_Length": str(MAX_INPUTS + 1)}
        assert hub.ask("POST", f"/v1/cases/{case.id}/inputs", b"", role="operator", **length)[0] == 413
        assert hub.ask("POST", "/v1/cases/77/inputs", self.body(1), role="operator")[0] == 404


class TestTokens:
    def test_one_is_made_used_listed_and_ended(self, hub: Served) -> None:
        status, made = hub.ask("POST", "/v1/tokens", {"name": "x", "role": "viewer", "lifetime_s": 60}, role="admin")
        assert (status, made["expires_ms"]) == (201, NOW + 60_000)
        bearer = {"Authorization": f"Bearer {made['secret']}"}
        assert hub.ask("GET", "/v1/devices", role=None, **bearer)[0] == 200
        listed = hub.ask("GET", "/v1/tokens", role="admin")[1]["items"]
        assert [token["name"] for token in listed] == ["admin", "operator", "viewer", "x"]
        assert not any("secret" in token for token in listed)
        assert hub.ask("DELETE", "/v1/tokens/x", role="admin") == (204, b"")
        assert hub.ask("GET", "/v1/devices", role=None, **bearer)[0] == 401

    def test_a_name_that_is_taken_or_not_there_is_told(self, hub: Served) -> None:
        assert hub.ask("POST", "/v1/tokens", {"name": "viewer", "role": "admin"}, role="admin")[0] == 409
        assert hub.ask("DELETE", "/v1/tokens/nobody", role="admin")[0] == 404


class TestHealth:
    def test_it_is_ok_while_database_and_broker_are_there(self, hub: Served) -> None:
        response, content = hub.fetch("GET", "/healthz", role=None)
        assert (response.status, content) == (200, b"ok\n")

    def test_it_says_what_is_not_there_and_no_more(self, hub: Served, monkeypatch: pytest.MonkeyPatch) -> None:
        hub.connected = False
        status, told = hub.ask("GET", "/healthz", role=None)
        assert (status, told["got"]) == (503, "no broker")
        monkeypatch.setattr(hub.store, "read", Broken)
        time.sleep(api.HEALTH_S)
        assert hub.ask("GET", "/healthz", role=None)[1]["got"] == "no database and no broker"

    def test_a_database_that_does_not_answer_is_told_as_that(
        self, hub: Served, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert hub.ask("GET", "/v1/devices")[0] == 200
        monkeypatch.setattr(hub.store, "read", Broken)
        response, content = hub.fetch("GET", "/v1/devices")
        assert (response.status, json.loads(content)["what"]) == (503, "database")
        assert response.getheader("Retry-After")


class Broken:
    """A database whose disk fails."""

    def __enter__(self) -> Connection:
        raise OperationalError("SELECT", {}, Exception("disk I/O error"))

    def __exit__(self, *_: object) -> None: ...


class TestDocument:
    def test_it_is_the_one_in_the_documentation(self) -> None:
        written = json.loads((ROOT / "docs" / "openapi.json").read_text())
        assert written == DOCUMENT, "write it anew: edgeguard hub openapi --output docs/openapi.json"

    def test_it_is_served(self, full: Served) -> None:
        assert full.ask("GET", "/v1/openapi.json")[1] == DOCUMENT

    def test_each_operation_says_what_it_does_and_who_may(self) -> None:
        for path, item in DOCUMENT["paths"].items():
            for method, operation in item.items():
                assert operation["description"], path
                assert operation.get("x-role") == needed(method.upper(), path)

    def test_the_examples_are_what_they_are_examples_of(self) -> None:
        schemas = DOCUMENT["components"]["schemas"]
        checked = 0
        for schema in schemas.values():
            for example in schema.get("examples", ()):
                jsonschema.validate(example, {**schema, "components": DOCUMENT["components"]})
                checked += 1
        assert checked >= 12

    @pytest.mark.parametrize("path", ["/v1/devices", "/v1/devices/d1", "/v1/models", "/v1/cases", "/v1/cases/3",
                                      "/v1/reports", "/v1/events", "/v1/dead-letters", "/v1/commands"])  # fmt: skip
    def test_an_answer_is_what_the_document_says(self, full: Served, path: str) -> None:
        written = path.replace("/d1", "/{device}").replace("/3", "/{case}")
        answers = DOCUMENT["paths"][written]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(full.ask("GET", path)[1], {**answers, "components": DOCUMENT["components"]})


PATHS = sorted(path for path in DOCUMENT["paths"] if "stream" not in path)
TEXT = st.one_of(
    st.text(max_size=40),
    st.sampled_from(["0", "-1", "1e9", str(2**63), str(2**64), "null", "../..", "%00", "d1", "\x00", "😀", "'; DROP"]),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(
    path=st.sampled_from(PATHS),
    method=st.sampled_from(["GET", "POST", "DELETE", "PUT"]),
    filled=st.lists(TEXT, min_size=2, max_size=2),
    query=st.dictionaries(
        st.sampled_from(["limit", "cursor", "state", "model", "device", "since", "order", "confirmed"]),
        TEXT,
        max_size=3,
    ),
    body=st.one_of(
        st.binary(max_size=60),
        st.dictionaries(
            st.sampled_from(["step", "approve", "why", "name", "role", "lifetime_s"]),
            JSON | st.sampled_from(["repair", "ping", "viewer", True]),
            max_size=4,
        ).map(lambda value: json.dumps(value).encode()),
    ),
)
@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_is_answered_or_refused_in_one_shape(
    full: Served, path: str, method: str, filled: list[str], query: dict[str, str], body: bytes
) -> None:
    for text in filled:
        start, brace, rest = path.partition("{")
        path = start + (quote(text, safe="", errors="replace") + rest.partition("}")[2] if brace else rest)
    response, content = full.fetch(method, f"{path}?{urlencode(query)}", body, role="admin")
    assert response.status < 500, content
    if response.status >= 400:
        assert set(json.loads(content)) == {"what", "got", "expected", "do"}
