"""Jobs and leases in the database: claimed once, renewed, taken over, given up; killed owners; the lead of one hub."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from edgeguard.hub.cases import Progress, Result
from edgeguard.hub.jobs import Entry, Jobs, Lease, Runner, Sources, Work
from edgeguard.hub.store import Store
from tests.simulators import database, fleet
from tests.simulators.fleet import wait_until

WORK = Work(
    case=7, model_digest=fleet.MODEL, guard_digest=fleet.GUARD, label=1, flagged_mean=(1.5,), unflagged_mean=(),
    unflagged_std=(), channels=(0,),
)  # fmt: skip
SOURCES = {fleet.MODEL: Sources(guard_digest=fleet.GUARD, guarded="g", keras="k", data="digits")}
LEASE_S = 0.6

WORKER = """
import json, pathlib, sys, time
job = json.load(open(sys.argv[1]))
out = pathlib.Path(job["out_dir"])
(out / "began").touch()
def say(**message): print(json.dumps(message), flush=True)
def finish(**more):
    (out / "o.tflite").write_bytes(b"repaired")
    (out / "o.keras").write_bytes(b"trainable")
    result = dict(verdict="confirmed", gate_passed=True, output="o.tflite", keras="o.keras") | more
    (out / "result.json").write_text(json.dumps(result))
    say(result=result)
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    one = Store(database.sqlite(tmp_path), fleet=database.FLEET)
    yield one
    one.close()


@pytest.fixture(params=["sqlite", "postgresql"])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    """A database that several hubs may share, once of each kind."""
    url = database.sqlite(tmp_path)
    if request.param == "postgresql":
        postgres = request.getfixturevalue("postgres")
        url = postgres.url(postgres.create(request.getfixturevalue("template")))
    one = Store(url, fleet=database.FLEET)
    yield one
    one.close()


@pytest.fixture
def run(tmp_path: Path, store: Store) -> Iterator[Callable[..., Runner]]:
    """Makes runners whose worker ends as told."""
    made: list[Runner] = []

    def make(ending: str, *, owner: str = "one", sources: Any = SOURCES, said: Any = None, **more: Any) -> Runner:
        script = tmp_path / f"worker-{len(made)}.py"
        script.write_text(WORKER + ending)
        runner = Runner(
            Jobs(store, owner=owner, lease_s=LEASE_S),
            folder=tmp_path / "cases",
            command=(sys.executable, str(script)),
            sources=lambda: sources,
            said=said or (lambda *_: None),
            lease_s=LEASE_S,
            **{"attempts": 3, "timeout_s": 60.0, **more},
        )
        made.append(runner)
        return runner

    yield make
    for runner in made:
        runner.stop()


def add(store: Store, work: Work = WORK) -> int:
    with store.write() as db:
        return Jobs(store, owner="director").add(db, work)


def entry(store: Store, job: int) -> Entry:
    found = Jobs(store, owner="anybody").get(job)
    assert found is not None
    return found


def run_until(runner: Runner, condition: Callable[[], bool]) -> None:
    def done() -> bool:
        runner.tick(time.monotonic())
        return condition()

    wait_until(done)


def test_a_job_is_run_and_its_files_are_stored_with_the_result(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    run_until(run("finish()"), lambda: entry(store, job).state == "done")
    found = entry(store, job)
    assert found.result == Result(verdict="confirmed", gate_passed=True, output="o.tflite", keras="o.keras")
    jobs = Jobs(store, owner="another machine")
    assert (jobs.file(job, "output"), jobs.file(job, "trainable")) == (b"repaired", b"trainable")


def test_each_step_is_told_once_and_the_stage_is_in_the_database(store: Store, run: Callable[..., Runner]) -> None:
    job, heard = add(store), []
    ending = """
for done in range(3): say(stage="confirming", text="inverting", done=done)
say(stage="repairing", text="pruning"); time.sleep(60)
"""
    runner = run(ending, said=lambda case, word: heard.append((case, word.stage, word.text)))
    run_until(runner, lambda: entry(store, job).progress is not None and len(heard) == 2)
    assert heard == [(7, "confirming", "inverting"), (7, "repairing", "pruning")]
    assert entry(store, job).progress == Progress(stage="repairing", text="pruning")


def test_one_that_is_worked_on_is_claimed_by_nobody_else(shared: Store) -> None:
    add(shared)
    one, two = (Jobs(shared, owner=owner) for owner in ("one", "two"))
    assert one.claim([fleet.MODEL], attempts=3) is not None
    assert two.claim([fleet.MODEL], attempts=3) is None


def test_of_many_that_claim_at_once_exactly_one_gets_it(shared: Store) -> None:
    for _ in range(4):
        add(shared)
    claimed: list[int] = []

    def claim(owner: str) -> None:
        found = Jobs(shared, owner=owner).claim([fleet.MODEL], attempts=3)
        if found is not None:
            claimed.append(found.id)

    threads = [threading.Thread(target=claim, args=(f"hub-{i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 4


def test_a_model_that_this_hub_does_not_have_is_left_to_others(shared: Store) -> None:
    add(shared)
    assert Jobs(shared, owner="one").claim([fleet.OTHER], attempts=3) is None
    assert Jobs(shared, owner="two").claim([fleet.OTHER, fleet.MODEL], attempts=3) is not None


def test_a_renewed_lease_lasts(shared: Store) -> None:
    add(shared)
    one, two = (Jobs(shared, owner=owner, lease_s=LEASE_S) for owner in ("one", "two"))
    mine = one.claim([fleet.MODEL], attempts=3)
    assert mine is not None
    for _ in range(4):
        time.sleep(LEASE_S / 2)
        assert one.renew(mine, None)
        assert two.claim([fleet.MODEL], attempts=3) is None


def test_who_lost_the_lease_writes_nothing_any_more(shared: Store) -> None:
    job = add(shared)
    one, two = (Jobs(shared, owner=owner, lease_s=LEASE_S) for owner in ("one", "two"))
    old = one.claim([fleet.MODEL], attempts=3)
    assert old is not None
    time.sleep(LEASE_S * 1.5)
    new = two.claim([fleet.MODEL], attempts=3)
    assert new is not None
    assert (new.attempts, new.failures) == (2, 1)
    assert not one.renew(old, None)
    assert not one.finish(old, Result(verdict="not_confirmed"), {})
    assert not one.fail(old, "late", final=True, attempts=1)
    assert not one.give_back(old)
    assert two.finish(new, Result(verdict="could_not_check"), {})
    assert entry(shared, job).result == Result(verdict="could_not_check")


def test_a_hub_that_lost_its_lease_ends_its_worker(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    runner = run("say(stage='confirming'); time.sleep(600)")
    run_until(runner, lambda: entry(store, job).progress is not None)
    time.sleep(LEASE_S * 1.5)
    assert Jobs(store, owner="two").claim([fleet.MODEL], attempts=3) is not None
    assert runner._running is not None
    process = runner._running[1]._process
    run_until(runner, lambda: process.poll() is not None)
    assert entry(store, job).owner == "two"


def test_a_worker_that_crashes_is_run_again_and_then_given_up(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    run_until(run("sys.exit('out of memory')", attempts=2), lambda: entry(store, job).state == "failed")
    assert (entry(store, job).attempts, entry(store, job).failures) == (2, 2)
    assert "failed 2 times" in entry(store, job).reason
    assert "out of memory" in entry(store, job).reason


def test_a_job_that_cannot_be_done_is_given_up_at_once(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    ending = "print('data digits: none', file=sys.stderr); sys.exit(2)"
    run_until(run(ending), lambda: entry(store, job).state == "failed")
    assert (entry(store, job).attempts, entry(store, job).reason) == (1, "data digits: none")


def test_a_job_that_takes_its_hubs_down_with_it_is_given_up(shared: Store) -> None:
    job = add(shared)
    for _ in range(4):
        Jobs(shared, owner="one").claim([fleet.MODEL], attempts=3)  # the same owner again: it was killed
    assert (entry(shared, job).state, entry(shared, job).reason) == ("failed", "lost 3 times while it was worked on")


def test_a_hub_that_stops_gives_its_job_back_at_no_cost(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    first = run("say(stage='confirming'); time.sleep(600)")
    run_until(first, lambda: entry(store, job).progress is not None)
    first.stop()
    assert (entry(store, job).state, entry(store, job).failures) == ("waiting", 0)
    run_until(run("finish()", owner="two"), lambda: entry(store, job).state == "done")
    assert entry(store, job).attempts == 2


def test_a_result_that_was_finished_while_nobody_listened_is_taken(
    store: Store, run: Callable[..., Runner], tmp_path: Path
) -> None:
    job = add(store)
    first = run("finish(); time.sleep(600)")
    first.tick(time.monotonic())
    wait_until((tmp_path / "cases" / "7" / f"job-{job}" / "run-1" / "result.json").exists)
    first.stop()
    second = run("sys.exit(1)")
    second.tick(time.monotonic())
    assert entry(store, job).state == "done"
    assert Jobs(store, owner="x").file(job, "output") == b"repaired"


def test_a_result_whose_file_is_missing_is_none(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    run_until(run("finish(output='gone.tflite')"), lambda: entry(store, job).state == "failed")
    assert "gone.tflite" in entry(store, job).reason


def test_a_model_that_was_calibrated_anew_is_not_worked_on(store: Store, run: Callable[..., Runner]) -> None:
    job = add(store)
    other = {fleet.MODEL: Sources(guard_digest=fleet.OTHER, guarded="g", keras="k", data="digits")}
    run_until(run("finish()", sources=other), lambda: entry(store, job).state == "failed")
    assert "calibrated anew" in entry(store, job).reason


def test_the_repair_is_given_the_folder_of_the_inspection(
    store: Store, run: Callable[..., Runner], tmp_path: Path
) -> None:
    first = add(store)
    run_until(run("finish(repaired=False, gate_passed=False)"), lambda: entry(store, first).state == "done")
    second = add(store, Work(**{**{f: getattr(WORK, f) for f in WORK.__struct_fields__}, "after": first}))
    ending = "(out / 'resume').write_text(job['resume']); finish()"
    run_until(run(ending), lambda: entry(store, second).state == "done")
    runs = tmp_path / "cases" / "7"
    assert (runs / f"job-{second}" / "run-1" / "resume").read_text() == str(runs / f"job-{first}" / "run-1")


def test_the_job_of_a_killed_hub_is_done_by_another(store: Store, run: Callable[..., Runner], tmp_path: Path) -> None:
    job = add(store)
    (tmp_path / "slow.py").write_text(WORKER + "time.sleep(20)")
    program = f"""
import sys, time
from pathlib import Path
from edgeguard.hub.jobs import Jobs, Runner
from edgeguard.hub.store import Store
from tests.hub.test_jobs import LEASE_S, SOURCES
store = Store("sqlite:///{tmp_path / "hub.db"}", fleet="test")
runner = Runner(Jobs(store, owner="victim", lease_s=LEASE_S), folder=Path("{tmp_path / "victim"}"), attempts=3,
    command=(sys.executable, "{tmp_path / "slow.py"}"), sources=lambda: SOURCES, said=lambda *_: None, timeout_s=60.0,
    lease_s=LEASE_S)
while True:
    runner.tick(time.monotonic())
    time.sleep(0.05)
"""
    victim = subprocess.Popen([sys.executable, "-c", program])
    try:
        wait_until((tmp_path / "victim" / "7" / f"job-{job}" / "run-1" / "began").exists)
        assert entry(store, job).owner == "victim"
    finally:
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    run_until(run("finish()", owner="heir"), lambda: entry(store, job).state == "done")
    assert (entry(store, job).attempts, entry(store, job).failures) == (2, 1)


class TestLead:
    def lease(self, store: Store, owner: str) -> Lease:
        return Lease(store, "leader", owner=owner, lease_s=LEASE_S)

    def test_one_of_several_has_it_and_keeps_it(self, shared: Store) -> None:
        one, two = self.lease(shared, "one"), self.lease(shared, "two")
        for _ in range(4):
            assert one.held(time.monotonic())
            assert not two.held(time.monotonic())
            time.sleep(LEASE_S / 2)

    def test_of_many_that_begin_at_once_exactly_one_gets_it(self, shared: Store) -> None:
        held: list[bool] = []
        leases = [self.lease(shared, f"hub-{i}") for i in range(8)]
        threads = [threading.Thread(target=lambda one=one: held.append(one.held(0.0))) for one in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(held) == [False] * 7 + [True]

    def test_it_goes_on_to_another_when_its_owner_is_silent(self, shared: Store) -> None:
        one, two = self.lease(shared, "one"), self.lease(shared, "two")
        assert one.held(time.monotonic())
        wait_until(lambda: two.held(time.monotonic()))
        assert not one.held(time.monotonic())

    def test_it_goes_on_at_once_when_its_owner_lays_it_down(self, shared: Store) -> None:
        one, two = self.lease(shared, "one"), self.lease(shared, "two")
        assert one.held(0.0)
        one.release()
        assert two.held(0.0)

    def test_a_hub_that_starts_again_has_it_at_once(self, shared: Store) -> None:
        assert self.lease(shared, "one").held(0.0)
        assert self.lease(shared, "one").held(0.0)

    def test_a_database_that_is_away_ends_it(self, shared: Store) -> None:
        one = self.lease(shared, "one")
        assert one.held(0.0)
        with shared.write() as db:
            db.exec_driver_sql("DROP TABLE leases")
        with pytest.raises(Exception, match="leases"):
            one.held(LEASE_S)
        assert not one._held
