"""Roll-outs in a fleet of ten agents around a real hub process: what it does, and what a person can do to it."""

from __future__ import annotations

import time
from collections import Counter
from datetime import datetime, timezone

from edgeguard.hub.casebook import Casebook
from edgeguard.hub.service import clock_ms
from edgeguard.release.repository import Repository
from tests.hub.conftest import Setting
from tests.simulators.fleet import wait_until
from tests.simulators.rollout_fleet import LATER, NEW, OLD, Fault, quick, repair, site


def test_a_release_with_a_failing_device_pauses_resumes_and_is_taken_back(setting: Setting) -> None:
    faults: tuple[Fault, ...] = ("none",) * 9 + ("flags",)
    setting.policy = "interval_s = 0.2\nassess_s = 5.0\ncanaries = 2"
    setting.rollout = quick(soak_s=1)
    with site(setting, faults, away=1) as ten:
        case = ten.wait_for("paused", timeout_s=90)
        assert "d009: flags 32" in case["release"]["paused"]
        before = ten.running()
        ten.steer("resume", "one broken lens")
        case = ten.wait_for("closed", timeout_s=90)
        assert before["d000"] == ten.running()["d000"] == OLD
        assert Counter(ten.members().values()) == {"healthy": 8, "dropped": 1, "away": 1}
        assert sorted(case["release"]["updated"]) == [name for name, model in ten.running().items() if model == NEW]
        ten.steer("back", "too many complaints")
        case = ten.wait_for("rolled_back", timeout_s=90)
        assert set(ten.running().values()) == {OLD}
        assert {agent.sequence for agent in ten.there()} == {2}
        returned = ten.come_back("d000")
        wait_until(lambda: returned.inputs > 80)
        assert (returned.model, returned.taken, returned.hints) == (OLD, [], [])
        trail = [(entry["became"], entry["who"]) for entry in case["audit"]]
        assert trail[0] == ("released", "hub")
        assert [became for became, who in trail if who == "operator"] == ["rolling_out", "rolling_back"]
        assert trail[-1] == ("rolled_back", "hub")


def test_who_was_away_while_two_releases_went_out_takes_the_right_model_once(setting: Setting) -> None:
    setting.rollout = quick(soak_s=0, min_inputs=0)
    with site(setting, ("none",) * 3, away=1) as three:
        three.wait_for("closed")
        store = setting.store()
        repository = Repository.open(
            setting.folder / "release", setting.folder / "keys", clock=lambda: datetime.now(timezone.utc)
        )
        repair(store, repository, LATER, NEW)
        wait_until(lambda: [case.state for case in Casebook(store, clock_ms=clock_ms).all()] == ["closed", "closed"])
        wait_until(lambda: three.case(2)["audit"][-1]["why"].startswith("release 3 is for devices that were away"))
        store.close()
        wait_until(lambda: three.hinted("d000") == 3)
        returned = three.come_back("d000")
        wait_until(lambda: returned.model == LATER)
        assert returned.taken == [3]
        assert three.agents["d001"].taken == three.agents["d002"].taken == [1, 2]


def test_an_ended_roll_out_leaves_every_device_as_it_is_and_no_hint_behind(setting: Setting) -> None:
    setting.rollout = quick(soak_s=1000)
    with site(setting, ("none",) * 3, away=1) as three:
        wait_until(lambda: NEW in three.running().values())
        three.steer("pause")
        three.steer("abort", "another repair is better")
        case = three.wait_for("aborted")
        assert "another repair is better" in case["explanation"]
        assert Counter(three.running().values()) == {OLD: 2, NEW: 1}
        returned = three.come_back("d000")
        wait_until(lambda: returned.inputs > 0)
        assert not returned.hints


def test_a_roll_back_that_is_ended_stops_there_and_can_begin_again(setting: Setting) -> None:
    setting.rollout = quick(soak_s=0, min_inputs=0, timeout_s=60)
    with site(setting, ("none",) * 2) as two:
        two.wait_for("closed")
        two.agents["d001"].fault = "silent"
        two.steer("back")
        wait_until(lambda: two.running() == {"d000": OLD, "d001": NEW})
        wait_until(lambda: two.case()["back"]["held"] == ["d001: hinted"])
        two.steer("abort", "it was the lens")
        two.wait_for("aborted")
        time.sleep(1.0)
        two.agents["d001"].__exit__()
        two.agents["d001"].fault = "none"
        returned = two.come_back("d001")
        wait_until(lambda: returned.inputs > 80)
        assert (returned.model, returned.hints) == (NEW, [])
        two.steer("back", "it was not")
        two.wait_for("rolled_back")
        assert set(two.running().values()) == {OLD}


def test_a_roll_back_leaves_no_hint_behind_for_who_came_after_the_roll_out(setting: Setting) -> None:
    setting.rollout = quick(soak_s=0, min_inputs=0)
    with site(setting, ("none",) * 2) as two:
        two.wait_for("closed")
        later = two.join("d009", "silent")
        wait_until(lambda: bool(later.hints))
        later.leave()
        two.steer("back")
        two.wait_for("rolled_back")
        later.fault = "none"
        returned = two.come_back("d009")
        wait_until(lambda: returned.inputs > 80)
        assert (returned.model, returned.hints) == (OLD, [])
