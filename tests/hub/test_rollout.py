"""Who is offered a release, and when: canaries first, then group after group, and what fails stops it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeguard.hub.cases import Released
from edgeguard.hub.config import GroupConfig, PolicyConfig, RolloutConfig
from edgeguard.hub.ingest import Device, Pulse
from edgeguard.hub.rollout import (
    REPEAT_ANSWERED_S,
    REPEAT_S,
    RESERVES,
    Member,
    Plan,
    Told,
    Traits,
    rank,
    repeat_after_s,
    spread,
    step,
    taken_back,
    way,
)
from tests.simulators import fleet

OLD, NEW, NEWER = fleet.MODEL, fleet.OTHER, "d" * 64
RELEASE = Released(target="t", sequence=5, model_digest=NEW, guard_digest=fleet.GUARD, replaces=OLD, at_ms=1000)
GROUPS = (GroupConfig(share=0.1), GroupConfig(share=0.5), GroupConfig(share=1.0))
QUICK: dict[str, Any] = {"soak_s": 0, "min_inputs": 0, "timeout_s": 60, "patience_s": 0, "groups": GROUPS}


@dataclass
class Fleet:
    """Devices, and a roll-out among them that goes on at each :meth:`step`."""

    devices: dict[str, Device] = field(default_factory=dict)
    release: Released = RELEASE
    members: dict[str, Member] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=lambda: dict(QUICK))
    policy: dict[str, Any] = field(default_factory=dict)
    now_ms: int = 1000
    told: Told = field(default_factory=Told)

    def add(self, *names: str, model: str = OLD, state: Any = "online", **more: Any) -> Fleet:
        for name in names:
            self.devices[name] = Device(device=name, model_digest=model, state=state, **more)
        return self

    def change(self, *names: str, **fields: Any) -> Fleet:
        for name in names:
            self.devices[name] = replace(self.devices[name], **fields)
        return self

    def update(self, *names: str) -> Fleet:
        return self.change(*names, model_digest=NEW, sequence=5, outcome="updated", outcome_sequence=5)

    def refuse(self, *names: str, outcome: Any = "refused", reason: str = "bad signature") -> Fleet:
        return self.change(*names, outcome=outcome, outcome_sequence=5, reason=reason)

    def step(self, after_s: float = 0.0, **traits: Traits) -> Plan:
        self.now_ms += round(1000 * after_s)
        plan = step(
            list(self.devices.values()), list(self.members.values()), self.release, now_ms=self.now_ms,
            policy=PolicyConfig(**self.policy), config=RolloutConfig(**self.config), traits=traits, told=self.told,
        )  # fmt: skip
        self.release = plan.release
        self.members |= {member.device: member for member in plan.members}
        return plan

    def take(self) -> tuple[str, ...]:
        """All that are hinted update, as long as there are more of them; who was hinted last."""
        hints: tuple[str, ...] = ()
        while (plan := self.step()).hints and not plan.done:
            hints = plan.hints
            self.update(*(name for name in hints if self.devices[name].online))
            if all(not self.devices[name].online for name in hints):
                break
        return hints

    def canary(self) -> str:
        (name,) = self.step().hints
        return name

    def resume(self) -> Fleet:
        self.release = msgspec.structs.replace(self.release, paused="", resumed=True)
        return self


def many(count: int, **more: Any) -> Fleet:
    return Fleet(**more).add(*(f"d{number:03}" for number in range(count)))


class TestGroups:
    def test_each_begins_when_the_one_before_fares_well(self) -> None:
        fleet = many(100)
        sizes = []
        while not (plan := fleet.step()).done:
            if plan.hints:
                sizes.append(len(plan.hints))
            fleet.update(*plan.hints)
        assert sizes == [1, 9, 40, 50]
        assert plan.release.counts == {"healthy": 100}
        assert len(plan.release.updated) == 100

    def test_a_group_that_nobody_would_be_added_by_is_passed_over(self) -> None:
        fleet = many(3)
        fleet.update(fleet.canary())
        assert len(fleet.step().hints or fleet.step().hints) == 1
        assert fleet.release.group == 2

    def test_whoever_is_in_a_group_stays_in_it_while_the_fleet_grows(self) -> None:
        fleet = many(20)
        fleet.update(fleet.canary())
        fleet.step()
        before = set(fleet.step().hints)
        fleet.add(*(f"new{number}" for number in range(20)))
        assert before <= set(fleet.step().hints)

    def test_other_models_are_left_alone(self) -> None:
        fleet = Fleet().add("a", model=NEWER, sequence=9).add("b", model="e" * 64)
        assert fleet.step() == Plan(release=fleet.release)

    def test_nobody_is_offered_it_while_an_operator_may_object(self) -> None:
        fleet = many(1, policy={"veto_s": 60.0})
        assert fleet.step(59.9).hints == ()
        assert fleet.step(0.1).hints == ("d000",)

    def test_who_is_away_gets_the_hint_and_is_not_waited_for(self) -> None:
        fleet = many(2).add("z", state="offline")
        fleet.update(fleet.canary())
        fleet.take()
        plan = fleet.step()
        assert plan.done
        assert plan.hints == ("z",)
        assert plan.release.counts == {"away": 1, "healthy": 2}

    def test_a_device_that_comes_back_has_all_its_time_to_answer(self) -> None:
        fleet = many(2, config=QUICK | {"soak_s": 1000}).add("z", state="offline")
        fleet.update(fleet.canary())
        fleet.step()
        fleet.step(1000)
        fleet.change("z", state="online")
        fleet.step()
        assert fleet.step(59.9).release.paused == ""

    def test_a_roll_out_begun_by_an_earlier_version_goes_on(self) -> None:
        old = msgspec.structs.replace(RELEASE, canaries=("a",), everyone=True)
        fleet = Fleet(release=old).add("a", model=NEW, sequence=5).add("b", "c")
        plan = fleet.step()
        assert plan.hints == ("b", "c")
        assert plan.release.group == plan.release.groups - 1
        fleet.update("b", "c")
        assert fleet.step().done


class TestCanaries:
    def test_are_as_many_as_policy_says_and_online(self) -> None:
        fleet = many(5, policy={"canaries": 3}).change("d000", "d001", state="offline")
        assert fleet.step().hints == ("d002", "d003", "d004")

    def test_are_drawn_by_the_release_and_not_by_name(self) -> None:
        free = {f"d{number}": Traits(kind="pi") for number in range(20)}
        assert len({spread(free, 1, release(number, OLD, NEW)) for number in range(30)}) > 10

    def test_are_spread_over_boards_and_runtimes_the_most_frequent_first(self) -> None:
        free = {f"pi{n}": Traits(kind="pi") for n in range(8)} | {f"nano{n}": Traits(kind="nano") for n in range(2)}
        free["odd"] = Traits(kind="odd")
        kinds = [free[name].kind for name in spread(free, 4, RELEASE)]
        assert kinds[:2] == ["pi", "nano"]
        assert sorted(kinds) == ["nano", "odd", "pi", "pi"]
        assert spread(free, 4, RELEASE) == spread(dict(reversed(free.items())), 4, RELEASE)

    def test_of_one_kind_some_that_are_strained_are_among_them(self) -> None:
        free = {f"d{n}": Traits(kind="pi", strained=n < 5) for n in range(10)}
        assert [free[name].strained for name in spread(free, 4, RELEASE)] == [False, True, False, True]

    @pytest.mark.parametrize("outcome", ["refused", "failed"])
    def test_one_that_does_not_take_it_pauses_the_roll_out_which_says_why(self, outcome: Any) -> None:
        fleet = many(3)
        fleet.refuse(name := fleet.canary(), outcome=outcome)
        plan = fleet.step()
        assert plan.hints == ()
        why = f"1 of 1 devices of the canaries failed: {name}: {outcome} (bad signature)"
        assert plan.release.paused == why
        assert plan.release.held == (f"{name}: {outcome} (bad signature)",)

    def test_one_that_refuses_may_change_its_mind_for_a_while(self) -> None:
        fleet = many(2, config=QUICK | {"patience_s": 30})
        fleet.refuse(name := fleet.canary())
        assert fleet.step().hints == (name,)
        assert fleet.step(29.9).hints == (name,)
        fleet.update(name)
        assert not fleet.step(1).release.paused

    def test_an_outcome_of_an_earlier_release_says_nothing(self) -> None:
        fleet = many(1).change("d000", outcome="refused", outcome_sequence=4)
        assert fleet.step().release.held == ("d000: hinted",)

    def test_one_that_is_there_and_never_answers_is_replaced(self) -> None:
        fleet = many(2)
        name = fleet.canary()
        assert fleet.step(59.9).hints == (name,)
        plan = fleet.step(0.1)
        (other,) = plan.hints
        assert other != name
        assert plan.text == f"{name} did not answer: other canaries take their place"

    def test_one_that_never_was_there_is_replaced(self) -> None:
        fleet = many(2, release=msgspec.structs.replace(RELEASE, canaries=("z",))).add("z", state="offline")
        assert fleet.step().hints == ("z",)
        assert fleet.step(60).text == "z did not answer: other canaries take their place"

    def test_one_that_was_there_and_is_gone_has_failed(self) -> None:
        fleet = many(9)
        fleet.change(name := fleet.canary(), state="offline")
        assert fleet.step(59.9).release.paused == ""
        plan = fleet.step(0.1)
        assert plan.release.paused == f"1 of 1 devices of the canaries failed: {name}: gone since it was offered"
        assert plan.release.held == (f"{name}: gone since it was offered",)

    def test_where_nobody_is_left_to_replace_it_the_roll_out_pauses_and_says_why(self) -> None:
        fleet = many(1)
        fleet.step()
        plan = fleet.step(60)
        assert "no answer" in plan.release.paused
        assert plan.hints == ()

    @pytest.mark.parametrize("state", ["online", "offline"])
    def test_one_that_was_replaced_is_told_of_once_and_holds_nothing(self, state: Any) -> None:
        fleet = many(3)
        first = fleet.canary()
        fleet.step(60)
        fleet.change(first, state=state)
        texts = [fleet.step(1).text for _ in range(20)]
        assert texts == [""] * 20
        fleet.update(*(name for name, member in fleet.members.items() if member.state == "offered"))
        fleet.step()
        assert fleet.release.group > 0

    def test_no_more_than_some_are_tried(self) -> None:
        fleet = many(50)
        fleet.step()
        for _ in range(RESERVES + 5):
            plan = fleet.step(60)
        assert plan.release.paused
        assert len(fleet.members) == 1 + RESERVES

    def test_one_is_looked_at_once_more_before_it_is_called_healthy(self) -> None:
        fleet = many(3, config=QUICK | {"soak_s": 1000, "min_inputs": 100, "timeout_s": 10_000})
        fleet.update(name := fleet.canary())
        fleet.step()
        fleet.told = Told(since={name: {0: (20, 0)}}, promised=0.01)
        assert fleet.step(1000).release.counts == {"soaking": 1}
        fleet.told = Told(since={name: {0: (100, 80)}}, promised=0.01)
        assert fleet.step(10).release.paused.endswith(f"{name}: flags 80.0% of 100 inputs, promised 1.0%")

    def test_none_is_called_healthy_by_a_hub_that_cannot_read_the_released_model(self) -> None:
        fleet = many(3, config=QUICK | {"soak_s": 100})
        fleet.update(name := fleet.canary())
        fleet.step()
        fleet.told = Told(since={name: {0: (100, 80)}}, promised=None)
        plan = fleet.step(100)
        assert plan.release.paused.startswith("the hub cannot read the released model")
        assert plan.release.counts == {"soaking": 1}

    def test_one_that_left_is_waited_for_though_the_others_fare_well(self) -> None:
        fleet = many(10, policy={"canaries": 3})
        one, *others = fleet.step().hints
        fleet.update(*others).change(one, state="offline")
        assert fleet.step().release.group == fleet.step().release.group == 0

    def test_one_that_dies_of_it_pauses_the_roll_out(self) -> None:
        fleet = many(3, config=QUICK | {"soak_s": 100})
        fleet.update(name := fleet.canary())
        fleet.step()
        fleet.change(name, state="offline")
        assert fleet.step(159).release.paused == ""
        assert fleet.step(1).release.paused.endswith(f"{name}: gone since its update")

    def test_one_that_goes_back_to_the_model_before_pauses_the_roll_out(self) -> None:
        fleet = many(3, config=QUICK | {"soak_s": 100})
        fleet.update(name := fleet.canary())
        fleet.step()
        fleet.change(name, model_digest=OLD, sequence=0, outcome="failed", reason="its self-test")
        assert "went back to the model before (its self-test)" in fleet.step().release.paused

    def test_one_without_inputs_proves_nothing(self) -> None:
        fleet = many(3, config=QUICK | {"min_inputs": 50})
        fleet.update(name := fleet.canary())
        fleet.told = Told(since={name: {0: (49, 0)}}, promised=0.01)
        assert fleet.step(59).release.group == 0
        fleet.told = Told(since={name: {0: (50, 0)}}, promised=0.01)
        fleet.step()
        assert fleet.release.group > 0


class TestFailures:
    def begun(self, failing: int, *, config: dict[str, Any] | None = None) -> Fleet:
        """A fleet of 40 whose second group of 16 has begun, of which some refuse."""
        fleet = many(40, config=QUICK | (config or {}))
        while fleet.release.group < 2:
            fleet.update(*(hints := fleet.step().hints))
        fleet.change(*hints, model_digest=OLD, sequence=0, outcome=None)
        fleet.refuse(*hints[:failing])
        return fleet.update(*hints[failing:])

    def test_as_many_as_the_group_puts_up_with_stop_nothing(self) -> None:
        fleet = self.begun(1)
        plan = fleet.step()
        assert not plan.release.paused
        assert plan.release.everyone

    def test_more_pause_it_and_nobody_else_is_offered_it(self) -> None:
        fleet = self.begun(2)
        plan = fleet.step()
        assert plan.release.paused.startswith("2 of 16 devices of group 2 failed: ")
        assert plan.hints == ()
        assert len(plan.failed) == 2
        assert fleet.step(10_000).hints == ()

    @pytest.mark.parametrize(("gone", "stops"), [(1, False), (2, True)])
    def test_devices_that_are_gone_since_it_was_offered_have_failed(self, gone: int, stops: bool) -> None:
        fleet = self.begun(0)
        hints = [name for name, member in fleet.members.items() if member.group == 2]
        fleet.change(*hints[:gone], model_digest=OLD, sequence=0, outcome=None, state="offline")
        assert not fleet.step().release.paused
        plan = fleet.step(60)
        assert ("gone since it was offered" in plan.release.paused) == stops

    def test_resumed_it_goes_on_without_them(self) -> None:
        fleet = self.begun(2)
        fleet.step()
        plan = fleet.resume().step()
        assert not plan.release.paused
        assert len(plan.hints) == 20 + 2
        fleet.update(*(name for name in plan.hints if fleet.devices[name].outcome is None))
        plan = fleet.step()
        assert plan.release.counts == {"dropped": 2, "healthy": 38}
        assert sum(plan.release.counts.values()) == len(fleet.members) == 40

    def test_neither_well_enough_nor_bad_enough_is_paused_with_both_figures(self) -> None:
        groups = (GroupConfig(share=0.5, success=0.95, error=0.2), GroupConfig(share=1.0))
        fleet = many(21, config=QUICK | {"groups": groups})
        fleet.update(fleet.canary())
        fleet.step()
        hints = fleet.step().hints
        fleet.refuse(hints[0]).update(*hints[1:])
        assert fleet.step().release.paused == f"{len(hints) - 1} of {len(hints)} devices of group 1 fare well, 95% must"

    def test_a_canary_that_fares_worse_later_still_stops_it(self) -> None:
        fleet = many(20, config=QUICK | {"soak_s": 100})
        fleet.update(name := fleet.canary())
        fleet.step()
        fleet.step(100)
        assert fleet.release.group == 1
        fleet.told = Told(before={name: {0: (1000, 10)}}, since={name: {0: (1000, 500)}}, promised=0.01)
        plan = fleet.step(100)
        assert plan.release.paused.endswith(f"{name}: flags 50.0% of 1000 inputs, before 1.0% of 1000")

    def test_what_it_told_before_the_offer_is_what_it_is_held_against(self) -> None:
        steady = Pulse(boot=fleet.BOOT, starts=2, since_ms=1000, readings=16, latencies=(100.0,) * 16)
        devices = many(2, config=QUICK | {"soak_s": 100}, now_ms=10**8)
        devices.change(*devices.devices, pulse=steady)
        devices.update(name := devices.canary())
        devices.step()
        slow = msgspec.structs.replace(steady, starts=2, readings=32, latencies=(900.0,) * 16)
        devices.change(name, pulse=slow)
        assert "takes 900 us, before 100 us" in devices.step(100).release.paused

    @given(st.sets(st.integers(0, 39), max_size=40), st.integers(1, 4))
    def test_liars_that_are_not_all_canaries_bring_no_bad_release_past_them(
        self, liars: set[int], canaries: int
    ) -> None:
        fleet = many(40, policy={"canaries": canaries})
        lying = {f"d{number:03}" for number in liars}
        chosen = set(fleet.step().hints)
        for _ in range(8):
            for name in fleet.step().hints:
                (fleet.update if name in lying else fleet.refuse)(name)
        assert (fleet.release.group == 0) == (not chosen <= lying)

    @given(st.sets(st.integers(0, 39), max_size=4))
    def test_liars_that_claim_to_fail_bring_nobody_back_and_a_person_gets_past_them(self, liars: set[int]) -> None:
        fleet = many(40)
        lying = {f"d{number:03}" for number in liars}
        for _ in range(30):
            plan = fleet.step()
            if plan.done:
                break
            for name in plan.hints:
                (fleet.refuse if name in lying else fleet.update)(name)
            if plan.release.paused:
                fleet.resume()
        assert plan.done
        assert set(plan.release.updated) == set(fleet.devices) - lying


@pytest.mark.parametrize(
    ("what", "device", "expected"),
    [
        ("no answer yet", Device(device="a", state="online"), REPEAT_S),
        ("to another", Device(device="a", state="online", outcome="refused", outcome_sequence=99), REPEAT_S),
        ("answered", Device(device="a", state="online", outcome="failed", outcome_sequence=5), REPEAT_ANSWERED_S),
        ("not there to hear it", Device(device="a", state="offline"), math.inf),
    ],
)
def test_a_hint_is_repeated_until_its_device_answers_and_rarely_after_that(
    what: str, device: Device, expected: float
) -> None:
    assert repeat_after_s(device, RELEASE) == expected, what


def release(sequence: int, replaces: str, model: str) -> Released:
    return msgspec.structs.replace(RELEASE, sequence=sequence, replaces=replaces, model_digest=model)


@pytest.mark.parametrize(
    ("what", "settled", "runs", "steps"),
    [
        ("one release", [(1, "x", "y")], "x", [1]),
        ("two in a row", [(1, "x", "y"), (2, "y", "z")], "x", [1, 2]),
        ("in the middle", [(1, "x", "y"), (2, "y", "z")], "y", [2]),
        ("nothing to do", [(1, "x", "y"), (2, "y", "z")], "z", []),
        ("taken back", [(2, "y", "x")], "y", [2]),
        ("taken back, it stays where it is", [(2, "y", "x")], "x", []),
        ("taken back, then repaired otherwise", [(2, "y", "x"), (3, "x", "z")], "y", [2, 3]),
        ("another model", [(1, "x", "y")], "w", []),
    ],
)
def test_the_way_of_a_device_that_was_away(
    what: str, settled: Iterable[tuple[int, str, str]], runs: str, steps: list[int]
) -> None:
    assert [r.sequence for r in way(runs, [release(*one) for one in settled])] == steps, what


class TestTakingBack:
    BACK = msgspec.structs.replace(RELEASE, sequence=6, replaces=NEW, model_digest=OLD)

    def after(self, *devices: Device, s: float = 1.0) -> tuple[Released, bool]:
        return taken_back(devices, self.BACK, timeout_s=60.0, now_ms=1000 + round(1000 * s))

    def test_is_done_when_nobody_online_runs_the_release(self) -> None:
        back, done = self.after(
            Device(device="a", state="online", model_digest=OLD, sequence=6),
            Device(device="b", state="offline", model_digest=NEW, sequence=5),
        )
        assert done
        assert back.updated == ("a",)
        assert back.held == ("b: offline",)

    def test_waits_for_who_is_there_until_it_answered_or_for_so_long(self) -> None:
        one = Device(device="a", state="online", model_digest=NEW, sequence=5)
        assert self.after(one) == (msgspec.structs.replace(self.BACK, held=("a: hinted",)), False)
        assert self.after(one, s=60)[1]
        back, done = self.after(replace(one, outcome="refused", outcome_sequence=6, reason="why"))
        assert (back.held, done) == (("a: refused (why)",), True)


def test_ranks_differ_between_releases() -> None:
    names = [f"d{number}" for number in range(50)]
    orders = {tuple(sorted(names, key=lambda name: rank(name, release(n, "x", "y")))) for n in range(10)}
    assert len(orders) == 10


def test_the_counts_of_members_add_up_at_every_step() -> None:
    devices = many(30)
    for turn in range(12):
        plan = devices.step(20)
        devices.update(*plan.hints[turn % 2 :: 2])
        assert plan.release.counts == dict(sorted(Counter(m.state for m in devices.members.values()).items()))
