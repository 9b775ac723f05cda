"""What a person, or policy, may do to a roll-out: pure, in the casebook, over the API, and on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest

from edgeguard.contract.messages import Health
from edgeguard.errors import ConfigError
from edgeguard.hub import cases
from edgeguard.hub.cases import Case, Released, State, Steering
from edgeguard.hub.config import PolicyConfig, RolloutConfig, parse
from edgeguard.hub.ingest import READINGS, Device
from edgeguard.hub.members import Members
from edgeguard.hub.policy import Suspicion
from edgeguard.hub.rollout import Member, Traits, step
from tests.hub.serving import NOW, Served, serve
from tests.simulators import fleet

RELEASE = Released(
    target="t", sequence=2, model_digest=fleet.OTHER, guard_digest=fleet.GUARD, replaces=fleet.MODEL, at_ms=5
)
PAUSED = msgspec.structs.replace(RELEASE, paused="2 of 10 devices of group 1 failed")
STATES: tuple[State, ...] = get_args(State)
WORDS: tuple[Steering, ...] = get_args(Steering)
POSSIBLE = {
    ("rolling_out", "pause"), ("rolling_out", "abort"), ("rolling_out", "back"), ("closed", "back"),
    ("aborted", "back"), ("rolling_back", "abort"),
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as made:
        yield made


def case(state: State, release: Released | None = RELEASE, **fields: Any) -> Case:
    return Case(
        id=1, model="signs", model_digest=fleet.MODEL, label=1, state=state, created_ms=1, updated_ms=1, devices=("a",),
        flagged=1, inputs=2, p_value=0.0, channels=(), is_case=True, release=release, **fields,
    )  # fmt: skip


def steer(record: Case, how: Steering) -> Case:
    return cases.steered(record, how, who="alice", why="slow", at_ms=9)


def failed(device: str) -> Member:
    return Member(device=device, group=1, offered_ms=NOW, state="failed", reason="x")


class TestDecisions:
    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("how", WORDS)
    def test_are_possible_where_there_is_something_to_decide(self, state: State, how: Steering) -> None:
        if (state, how) in POSSIBLE:
            assert steer(case(state), how).updated_ms == 9
        else:
            with pytest.raises(ValueError, match=f"case 1 is {state}: nothing to"):
                steer(case(state), how)

    def test_without_a_release_there_is_nothing_to_decide(self) -> None:
        with pytest.raises(ValueError, match="nothing to pause"):
            steer(case("rolling_out", None), "pause")

    def test_a_roll_back_that_begins_again_gives_devices_all_their_time(self) -> None:
        back = msgspec.structs.replace(RELEASE, sequence=3)
        assert steer(case("aborted", back=back), "back").back == msgspec.structs.replace(back, at_ms=9)

    def test_a_pause_says_who_and_why(self) -> None:
        release = steer(case("rolling_out"), "pause").release
        assert release is not None
        assert release.paused == "alice paused it: slow"

    def test_what_is_paused_is_resumed_and_nothing_else_is(self) -> None:
        release = steer(case("rolling_out", PAUSED), "resume").release
        assert release is not None
        assert (release.paused, release.resumed) == ("", True)
        with pytest.raises(ValueError, match="rolling_out, paused: nothing to pause"):
            steer(case("rolling_out", PAUSED), "pause")

    @pytest.mark.parametrize(("how", "state"), [("abort", "aborted"), ("back", "rolling_back")])
    def test_what_is_paused_can_be_ended_and_taken_back(self, how: Steering, state: str) -> None:
        after = steer(case("rolling_out", PAUSED), how)
        assert after.state == state
        assert after.release == RELEASE
        assert "alice" in after.note


@pytest.mark.parametrize(
    ("record", "words"),
    [
        (case("rolling_out", PAUSED), "It is paused: 2 of 10 devices of group 1 failed."),
        (case("rolling_out", PAUSED), "Waiting for a person to resume, roll back or end the roll-out."),
        (case("aborted", note="alice ended the roll-out"), "the others keep the one with the backdoor"),
        (case("rolling_back", note="alice asked"), "The model before, with the backdoor, is coming back"),
        (case("rolled_back", back=msgspec.structs.replace(RELEASE, sequence=3)), "is back (release 3)"),
    ],
)
def test_the_explanation_says_so(record: Case, words: str) -> None:
    assert words in cases.explain(record)


@pytest.mark.parametrize(("state", "news"), [("rolling_back", False), ("rolled_back", False), ("aborted", True)])
def test_a_model_that_the_fleet_is_brought_back_from_is_not_suspected_anew(state: State, news: bool) -> None:
    suspicion = Suspicion(
        model_digest=fleet.OTHER, label=1, devices=("a",), flagged=9, inputs=9, p_value=0.0, excess=9.0, channels=()
    )
    assert cases.is_news(suspicion, [case(state)], now_ms=1) == news


class TestCasebook:
    def test_a_decision_stands_in_the_audit_trail(self, hub: Served) -> None:
        number = hub.add_case(state="rolling_out", release=RELEASE).id
        hub.book.steer(number, "pause", "alice", "slow")
        hub.book.steer(number, "resume", "bob")
        hub.book.steer(number, "back", "carol", "slow all the same")
        trail = [(entry.who, entry.was, entry.became, entry.why) for entry in hub.book.audit(number)]
        assert trail[1:] == [
            ("alice", "rolling_out", "rolling_out", "alice paused the roll-out: slow"),
            ("bob", "rolling_out", "rolling_out", "bob resumed the roll-out"),
            ("carol", "rolling_out", "rolling_back", "carol asked to roll back the roll-out: slow all the same"),
        ]

    def test_what_a_later_release_replaced_is_not_taken_back_before_that_one(self, hub: Served) -> None:
        first = hub.add_case(state="closed", release=RELEASE)
        later = msgspec.structs.replace(RELEASE, replaces=fleet.OTHER, model_digest="d" * 64)
        second = hub.add_case(state="closed", model_digest=fleet.OTHER, release=later)
        with pytest.raises(ConfigError, match=f"release of case {second.id} replaces that of case {first.id}"):
            hub.book.steer(first.id, "back", "alice")
        assert hub.book.steer(second.id, "back", "alice").state == "rolling_back"

    def test_members_come_back_as_they_were_written(self, hub: Served) -> None:
        members = Members(hub.store)
        some = [Member(device=f"d{n}", group=n % 3, offered_ms=n) for n in range(600)]
        with hub.store.write() as db:
            members.put(db, 1, some)
            members.put(db, 1, [msgspec.structs.replace(some[0], state="healthy")])
        found = members.of(1)
        assert len(found) == 600
        assert found[0] == msgspec.structs.replace(some[0], state="healthy")
        assert members.of(2) == []

    def test_canaries_are_spread_over_what_devices_said_of_themselves(self, hub: Served) -> None:
        hot = Health(session=1, boot=fleet.BOOT, rss_bytes=1, spooled=0, inputs=1, p50_us=1.0, level="one pass")
        hub.take("d1", fleet.birth(), hot)
        hub.take("d2", fleet.birth())
        found = Members(hub.store).traits({"d1", "d2", "unheard"})
        assert found == {"d1": Traits(kind="test test 0", strained=True), "d2": Traits(kind="test test 0")}

    def test_starts_and_latencies_are_remembered(self, hub: Served) -> None:
        for number in range(READINGS + 4):
            told = Health(session=1, boot=fleet.BOOT, rss_bytes=1, spooled=0, inputs=1, p50_us=float(number))
            hub.take("d1", told)
        hub.take("d1", fleet.status(session=2, boot="f" * 16), fleet.status(session=1))
        (device,) = hub.store.devices()
        assert device.pulse is not None
        assert (device.pulse.boot, device.pulse.starts, device.pulse.since_ms) == ("f" * 16, 1, NOW)
        assert device.pulse.readings == READINGS + 3  # 0 is none
        assert device.pulse.latencies == tuple(float(number) for number in range(4, READINGS + 4))


class TestApi:
    def test_an_operator_steers_and_sees_each_device(self, hub: Served) -> None:
        number = hub.add_case(state="rolling_out", release=RELEASE).id
        with hub.store.write() as db:
            Members(hub.store).put(
                db,
                number,
                [failed(f"d{n}") for n in (1, 2)],
            )
        path = f"/v1/cases/{number}"
        status, found = hub.ask("POST", f"{path}/rollout", {"action": "pause", "why": "slow"}, role="operator")
        assert (status, found["release"]["paused"]) == (200, "operator paused it: slow")
        assert hub.ask("POST", f"{path}/rollout", {"action": "pause"}, role="operator")[0] == 409
        assert hub.ask("POST", f"{path}/rollout", {"action": "resume"}, role="viewer")[0] == 403
        assert hub.ask("POST", f"{path}/rollout", {"action": "explode"}, role="operator")[0] == 400
        assert hub.ask("POST", "/v1/cases/99/rollout", {"action": "abort"}, role="operator")[0] == 404
        page = hub.ask("GET", f"{path}/devices?state=failed&limit=1")[1]
        assert [(row["device"], row["reason"]) for row in page["items"]] == [("d1", "x")]
        page = hub.ask("GET", f"{path}/devices?cursor={page['next']}")[1]
        assert [row["device"] for row in page["items"]] == ["d2"]


@pytest.mark.parametrize(
    ("shares", "fits"), [([1.0], True), ([0.1, 0.5, 1.0], True), ([0.5], False), ([0.5, 0.5, 1.0], False)]
)
def test_groups_grow_and_end_with_everybody(shares: list[float], fits: bool, tmp_path: Any) -> None:
    raw = {
        "fleet": "f", "state_dir": "s", "broker": {"host": "h"},
        "rollout": {"groups": [{"share": share} for share in shares]},
    }  # fmt: skip
    if fits:
        assert len(parse(raw, base=tmp_path).rollout.groups) == len(shares)
    else:
        with pytest.raises(ConfigError, match="growing ones of which the last is 1"):
            parse(raw, base=tmp_path)


def test_a_paused_roll_out_still_says_how_its_devices_fare() -> None:
    device = Device(device="a", state="online", model_digest=fleet.OTHER, sequence=2)
    plan = step(
        [device], [Member(device="a", group=0, offered_ms=5)], PAUSED, policy=PolicyConfig(),
        config=RolloutConfig(soak_s=0, min_inputs=0), now_ms=10,
    )  # fmt: skip
    assert plan.release.counts == {"healthy": 1}
    assert plan.release.paused == PAUSED.paused
