"""Commands: sent until they are answered, answered by the device that was asked; what the fleet's answers add up to."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.contract.messages import (
    Alive,
    Ballot,
    Message,
    PingReply,
    Ranking,
    RankReply,
    RecalibrateReply,
    Recalibration,
    TapRanking,
    VoteReply,
    encode,
    issued_ms,
)
from edgeguard.errors import ConfigError
from edgeguard.hub import commands
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.cases import Dormant
from edgeguard.hub.commands import Commands, dormant, majority, mean_ranks
from edgeguard.hub.store import Store
from tests.simulators import fleet

NOW = 1_790_000_000_000
ALIVE = Alive(boot=fleet.BOOT, session=1, uptime_s=5.0)


class World:
    """A broker that takes what it is given, while it is there, and a clock."""

    def __init__(self, store: Store) -> None:
        self.now = NOW
        self.there = True
        self.sent: list[tuple[str, str, Any]] = []
        self.book = Casebook(store, clock_ms=lambda: self.now)
        self.commands = Commands(store, self.book, publish=self.publish, clock_ms=lambda: self.now)

    def publish(self, device: str, channel: str, message: Message) -> bool:
        if self.there:
            self.sent.append((device, channel, message))
        return self.there

    def pass_time(self, seconds: float, *, step_s: float = 1.0) -> None:
        for _ in range(round(seconds / step_s)):
            self.now += round(step_s * 1000)
            self.commands.tick()

    def state(self, key: str) -> str:
        (state,) = [entry.state for entry in self.commands.latest() if entry.id == key]
        return state

    def answer(self, key: str, device: str = "d1", name: str = "ping", **fields: Any) -> None:
        reply = msgspec.structs.replace(PingReply(id=key, state="ok", result=ALIVE), **fields)
        self.commands.heard(device, name, encode(reply))


@pytest.fixture
def world(database: str) -> Iterator[World]:
    store = Store(database, fleet="test")
    yield World(store)
    store.close()


def test_a_command_is_sent_at_the_next_tick_under_an_id_with_the_hubs_time(world: World) -> None:
    key = world.commands.issue("d1", "ping")
    assert world.sent == []
    world.commands.tick()
    ((device, channel, message),) = world.sent
    assert (device, channel, message.id) == ("d1", "cmd/ping", key)
    assert issued_ms(key) == NOW


def test_it_is_repeated_ever_less_often_and_no_longer_once_answered(world: World) -> None:
    key = world.commands.issue("d1", "ping")
    world.pass_time(600, step_s=5)
    assert 4 <= len(world.sent) <= 8
    assert len({message.id for *_, message in world.sent}) == 1
    world.answer(key)
    before = len(world.sent)
    world.pass_time(3600, step_s=60)
    assert (len(world.sent), world.state(key)) == (before, "ok")


def test_without_a_broker_it_waits_and_goes_out_later(world: World) -> None:
    world.there = False
    key = world.commands.issue("d1", "ping")
    world.pass_time(30)
    assert world.state(key) == "waiting"
    world.there = True
    world.pass_time(1)
    assert len(world.sent) == 1


def test_what_nobody_answers_expires(world: World) -> None:
    key = world.commands.issue("d1", "ping", expires_s=60)
    world.pass_time(61)
    assert world.state(key) == "expired"
    world.answer(key)
    assert world.state(key) == "expired"


def test_old_ones_are_forgotten_and_their_audit_trail_is_not(world: World) -> None:
    old = world.commands.issue("d1", "ping", expires_s=60)
    world.now += commands.KEPT_MS + 61_000
    new = world.commands.issue("d1", "ping")
    world.pass_time(2)
    assert [entry.id for entry in world.commands.latest()] == [new]
    assert world.book.audit(f"command {old}")


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("another device", {"device": "d2"}),
        ("another command", {"name": "restart"}),
        ("no command", {"name": "dance"}),
        ("an id that was never given out", {"id": "f" * 20}),
    ],
)
def test_a_reply_that_does_not_belong_changes_nothing(world: World, what: str, change: dict[str, str]) -> None:
    key = world.commands.issue("d1", "ping")
    world.answer(change.get("id", key), **{name: value for name, value in change.items() if name != "id"})
    assert world.state(key) == "waiting", what


def test_the_first_reply_counts(world: World) -> None:
    key = world.commands.issue("d1", "ping")
    world.answer(key, state="refused", result=None, reason="busy")
    world.answer(key)
    (entry,) = world.commands.latest()
    assert (entry.state, entry.reason) == ("refused", "busy")


@given(payload=st.binary(max_size=300))
def test_whatever_bytes_come_nothing_breaks(payload: bytes) -> None:
    class Untouched:
        fleet = "test"

        def read(self) -> None:
            raise AssertionError("the database was asked about a broken reply")

    one = Commands(Untouched(), None, publish=lambda *_: True, clock_ms=lambda: NOW)  # type: ignore[arg-type]
    for name in ("ping", "rank", "vote", "recalibrate", "x"):
        one.heard("d1", name, payload)


def test_a_recalibration_is_answered_twice(world: World) -> None:
    key = world.commands.issue("d1", "recalibrate", source="sidecar")
    for digest, state in ((None, "working"), (fleet.GUARD, "ok")):
        reply = RecalibrateReply(id=key, state="ok", result=Recalibration(guard_digest=digest))
        world.commands.heard("d1", "recalibrate", encode(reply))
        assert world.state(key) == state


@pytest.mark.parametrize(
    ("name", "fields"), [("dance", {}), ("rank", {}), ("recalibrate", {"source": "/etc/passwd"}), ("ping", {"id": 7})]
)
def test_a_command_that_does_not_hold_together_is_refused(world: World, name: str, fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=name):
        world.commands.issue("d1", name, **fields)
    assert world.commands.latest() == []


class TestApproval:
    def test_a_proposed_command_is_sent_once_a_person_approved_it(self, world: World) -> None:
        key = world.commands.issue("d1", "recalibrate", why="drift", propose=True, source="sidecar")
        world.pass_time(30)
        assert (world.sent, world.state(key)) == ([], "proposed")
        world.commands.decide(key, True, "alice", "go on")
        world.pass_time(1)
        assert len(world.sent) == 1
        trail = [(entry.who, entry.became) for entry in world.book.audit(f"command {key}")]
        assert trail == [("hub", "proposed"), ("alice", "waiting")]

    def test_or_never(self, world: World) -> None:
        key = world.commands.issue("d1", "recalibrate", propose=True, source="sidecar")
        world.commands.decide(key, False, "alice")
        world.pass_time(30)
        assert (world.sent, world.state(key)) == ([], "refused")

    @pytest.mark.parametrize("key", ["f" * 20, None])
    def test_what_waits_for_nobody_cannot_be_decided(self, world: World, key: str | None) -> None:
        with pytest.raises(ConfigError, match="nothing to decide"):
            world.commands.decide(key or world.commands.issue("d1", "ping"), True, "alice")


class TestFederatedPruning:
    GUARD = fleet.guard_metadata()

    def wide(self, channels: int = 20) -> Any:
        (tap,) = [tap for tap in self.GUARD.taps if tap.kind == "l1"]
        return msgspec.structs.replace(self.GUARD, taps=(msgspec.structs.replace(tap, channels=channels),))

    def entries(self, world: World, answers: list[Any], *, how: Any) -> list[commands.Entry]:
        guard = self.wide()
        ((name, fields),) = commands.questions(guard, how)
        for number, result in enumerate(answers):
            key = world.commands.issue(f"d{number}", name, case=3, **fields)
            kind = RankReply if how == "ranks" else VoteReply
            world.commands.heard(f"d{number}", name, encode(kind(id=key, state="ok", result=result)))
        return world.commands.of_case(3)

    def ranking(self, channels: list[int], **changes: Any) -> Ranking:
        taps = (TapRanking(tensor="late", source_layer="relu2", channels=tuple(channels)),)
        return Ranking(**{"model_digest": fleet.MODEL, "inputs": 500, "taps": taps, **changes})

    def ballot(self, *channels: int, **changes: Any) -> Ballot:
        return Ballot(**{"model_digest": fleet.MODEL, "layer": "relu2", "inputs": 500, "channels": channels, **changes})

    def test_ranks_of_the_fleet_name_its_least_active_channels(self, world: World) -> None:
        order = [7, 3, *(c for c in range(20) if c not in (7, 3))]
        entries = self.entries(world, [self.ranking(order)] * 5, how="ranks")
        assert dormant(self.wide(), entries) == (Dormant(layer="relu2", channels=(7, 3)),)

    def test_votes_do_too(self, world: World) -> None:
        entries = self.entries(world, [self.ballot(3, 7), self.ballot(3, 9), self.ballot(3, 7)], how="votes")
        assert dormant(self.wide(), entries) == (Dormant(layer="relu2", channels=(3, 7)),)

    def test_answers_about_something_else_are_not_counted(self, world: World) -> None:
        wrong = [
            self.ranking(list(range(20)), model_digest=fleet.OTHER),
            self.ranking(list(range(19))),
            self.ranking(list(range(20)), taps=(TapRanking(tensor="x", source_layer="y", channels=tuple(range(20))),)),
        ]
        assert dormant(self.wide(), self.entries(world, wrong, how="ranks")) == ()

    def test_no_answer_is_no_hint(self) -> None:
        assert dormant(self.wide(), []) == ()

    @pytest.mark.parametrize("devices", [5, 10, 50])
    def test_a_fifth_of_liars_moves_no_channel_beyond_where_honest_devices_have_it(self, devices: int) -> None:
        rng = np.random.default_rng(devices)
        truth = np.arange(30)
        honest = [np.argsort(truth + rng.normal(0, 2, 30)).tolist() for _ in range(devices - devices // 5)]
        liars = [list(range(29, -1, -1))] * (devices // 5)
        places = np.argsort(mean_ranks([*honest, *liars]))
        seen = np.argsort(honest, axis=1)
        slack = 3  # channels whose means lie close change places
        assert (places >= seen.min(axis=0) - slack).all()
        assert (places <= seen.max(axis=0) + slack).all()

    def test_a_fifth_of_liars_votes_nothing_in_and_nothing_out_that_all_others_agree_on(self) -> None:
        assert majority([*[(1, 2)] * 8, *[(5, 6)] * 2]) == (1, 2)

    def test_a_device_that_names_a_channel_twice_has_one_vote(self) -> None:
        assert majority([(4, 4), (1,), (1,)]) == (1,)
