"""The loop on the hub's side, with a real broker, a real signed repository and a stand-in for the repair itself."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from hashlib import sha256
from typing import Any

import pytest

from edgeguard.contract import topics
from edgeguard.contract.messages import Desired
from edgeguard.hub import rollout
from edgeguard.hub.cases import Case
from edgeguard.hub.service import Hub
from edgeguard.hub.store import Store
from edgeguard.release.repository import Repository
from tests.hub.conftest import Setting
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until

NEW_MODEL, NEW_GUARD = "d" * 64, "e" * 64
REPAIRED = fleet.guarded_file(fleet.guard_metadata(model=NEW_MODEL, guard=NEW_GUARD))
ATTACKED = ((0, 60, 0), (1, 90, 45))
"""Two devices make a suspicion, and the third does not double it: there is one case, however slowly they report."""

WORKER = """
import json, os, pathlib, shutil, sys, time
job = json.load(open(sys.argv[1]))
out = pathlib.Path(job["out_dir"])
here = pathlib.Path(__file__).parent
with (here / "runs").open("a") as runs: runs.write(f"{out.name}\\n")
def say(**message): print(json.dumps(message), flush=True)
def finish(**more):
    result = dict(verdict="confirmed", gate_passed=True, output="repaired.tflite", keras="repaired.keras",
                  model_digest="d" * 64, guard_digest="e" * 64, summary={"label": job["label"]}) | more
    shutil.copy(here / "repaired.tflite", out / "repaired.tflite")
    (out / "result.json").write_text(json.dumps(result))
    say(result=result)
say(stage="confirming", text="inverting a trigger", done=1, total=1)
say(stage="repairing", text="pruning", done=1, total=2)
"""


@pytest.fixture
def worker(setting: Setting) -> Callable[[str], tuple[str, str]]:
    """Writes a stand-in worker that ends as told; gives its command."""
    (setting.folder / "repaired.tflite").write_bytes(REPAIRED)

    def write(ending: str) -> tuple[str, str]:
        path = setting.folder / "worker.py"
        path.write_text(WORKER + ending)
        return sys.executable, str(path)

    return write


@pytest.fixture
def devices(setting: Setting) -> Iterator[list[Publisher]]:
    """Three devices that run the attacked model and say so."""
    made = [Publisher(setting.broker_port, f"d{i}") for i in range(3)]
    for device in made:
        device.__enter__()
        wait_until(device.connected)
        device.send(topics.STATUS, fleet.status(), retain=True)
        device.send(topics.BIRTH, fleet.birth(), retain=True)
    yield made
    for device in made:
        device.__exit__()


def attack(devices: list[Publisher]) -> None:
    for device in devices:
        device.keep(fleet.report(1, counts=ATTACKED))


def only_case(store: Store, state: str, **conditions: Any) -> Case:
    def reached() -> bool:
        cases = store.cases()
        return len(cases) == 1 and cases[0].state == state

    wait_until(reached)
    (case,) = store.cases()
    for name, value in conditions.items():
        assert getattr(case, name) == value
    return case


def updates(device: Publisher) -> None:
    """The device takes its latest hint."""
    sequence = device.hints[-1].sequence
    message = fleet.reported("updated", model=NEW_MODEL, guard=NEW_GUARD, sequence=sequence, desired=sequence)
    device.send(topics.MODEL_REPORTED, message, retain=True)


def runs(setting: Setting) -> int:
    return len((setting.folder / "runs").read_text().splitlines())


def test_from_evidence_to_a_repaired_fleet(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker("finish()"))
    store = setting.store()
    attack(devices)
    case = only_case(store, "rolling_out", label=1, model="signs", model_digest=fleet.MODEL)
    assert case.channels[0].source_layer == "relu2"
    first, *others = devices
    wait_until(lambda: first.hints)
    assert [device.hints for device in others] == [[], []]
    updates(first)
    wait_until(lambda: all(device.hints for device in others))
    for device in others:
        updates(device)
    case = only_case(store, "closed")
    assert case.release is not None
    assert case.release.updated == ("d0", "d1", "d2")
    kinds = [event.kind for event in store.events()]
    expected = [
        "suspected",
        "confirming",
        "repairing",
        "repaired",
        "released",
        "rolling_out",
        "device_updated",
        "closed",
    ]
    assert list(dict.fromkeys(kinds)) == expected
    store.close()


def test_the_release_is_signed_for_the_replaced_model(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker("finish()"))
    attack(devices)
    case = only_case(setting.store(), "rolling_out")
    repository = Repository.open(
        setting.folder / "release", setting.folder / "keys", clock=lambda: datetime.now(timezone.utc)
    )
    (release,) = repository.releases()
    assert (release.replaces, release.model_digest, release.guard_digest) == (fleet.MODEL, NEW_MODEL, NEW_GUARD)
    assert release.file_digest == sha256(REPAIRED).hexdigest()
    assert case.release is not None
    assert case.release.target == release.target


def test_the_repaired_model_is_watched_like_any_other(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    running = hub(*worker("finish()"))
    attack(devices)
    only_case(setting.store(), "rolling_out")
    assert {model["model_digest"] for model in running.status()["models"]} == {fleet.MODEL, NEW_MODEL}
    for device in devices:
        device.keep(fleet.report(2, counts=ATTACKED, model=NEW_MODEL, guard=NEW_GUARD))
    wait_until(lambda: NEW_MODEL in {case.model_digest for case in setting.store().cases()})


def test_a_clean_fleet_opens_no_case(setting: Setting, hub: Callable[..., Hub], devices: list[Publisher]) -> None:
    hub(sys.executable)
    for device in devices:
        for seq in range(1, 11):
            device.keep(fleet.report(seq, counts=((0, 100, 1), (1, 100, 1))))
    wait_until(lambda: not any(device.waiting for device in devices))
    running = setting.store()
    assert running.counts()["reports"] == 30
    assert not running.cases()


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        ('finish(verdict="not_confirmed", gate_passed=False, output=None)', "dismissed"),
        ('finish(verdict="could_not_check", gate_passed=False, output=None)', "could_not_check"),
        ("finish(gate_passed=False)", "refused"),
        ('finish(model_digest="f" * 64)', "refused"),
        ('finish(output="elsewhere.tflite")', "refused"),
    ],
)
def test_what_is_not_confirmed_and_gated_is_not_released(
    ending: str,
    state: str,
    setting: Setting,
    hub: Callable[..., Hub],
    worker: Callable[[str], tuple[str, str]],
    devices: list[Publisher],
) -> None:
    hub(*worker(ending))
    attack(devices)
    case = only_case(setting.store(), state)
    assert case.note
    assert not list((setting.folder / "release" / "targets").iterdir())
    assert not any(device.hints for device in devices)


def test_a_worker_that_always_crashes_is_given_up_after_three_runs(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker("sys.exit('out of memory')"))
    attack(devices)
    case = only_case(setting.store(), "could_not_check", failures=3)
    assert "out of memory" in case.note
    assert runs(setting) == 3


def test_a_job_that_cannot_be_done_is_not_tried_again(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker("print('data digits: got 3 images; expected 100', file=sys.stderr); sys.exit(2)"))
    attack(devices)
    only_case(setting.store(), "could_not_check", note="data digits: got 3 images; expected 100")
    assert runs(setting) == 1


def test_a_case_of_a_model_that_was_calibrated_anew_meanwhile_could_not_be_checked(
    setting: Setting, worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    with Hub(setting.config, command=worker("time.sleep(600)")) as first:
        attack(devices)
        first.run(_until(lambda: _state(setting) == "repairing"))
    (setting.folder / "signs.tflite").write_bytes(fleet.guarded_file(fleet.guard_metadata(guard="9" * 64)))
    with Hub(setting.config, command=worker("finish()")) as second:
        second.run(_until(lambda: _state(setting) == "could_not_check"))
    only_case(setting.store(), "could_not_check", runs=1)


def test_a_suspicion_of_a_class_that_calibration_never_saw_says_so(
    setting: Setting, hub: Callable[..., Hub], devices: list[Publisher]
) -> None:
    metadata = fleet.guard_metadata(fpr_upper=1.0)
    (setting.folder / "signs.tflite").write_bytes(fleet.guarded_file(metadata))
    hub(sys.executable)
    attack(devices)
    store = setting.store()
    wait_until(store.cases)
    assert "calibration never saw this class" in store.events()[0].text


def test_an_unfinished_repair_is_run_again_after_a_restart(
    setting: Setting, worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    with Hub(setting.config, command=worker("time.sleep(600)")) as first:
        attack(devices)
        first.run(_until(lambda: _state(setting) == "repairing"))
    assert runs(setting) == 1
    with Hub(setting.config, command=worker("finish()")) as second:
        second.run(_until(lambda: _state(setting) == "rolling_out"))
    assert runs(setting) == 2


def test_a_repair_that_finished_while_the_hub_was_away_is_not_run_again(
    setting: Setting, worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    with Hub(setting.config, command=worker("finish(); time.sleep(600)")) as first:
        attack(devices)
        result = setting.state / "cases" / "1" / "run-1" / "result.json"
        first.run(_until(result.exists))
    with Hub(setting.config, command=worker("sys.exit(1)")) as second:
        second.run(_until(lambda: _state(setting) == "rolling_out"))
    assert runs(setting) == 1


def test_a_release_that_was_made_but_not_recorded_is_not_made_twice(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    repository = Repository.open(
        setting.folder / "release", setting.folder / "keys", clock=lambda: datetime.now(timezone.utc)
    )
    made = repository.add(REPAIRED, name="signs", model_digest=NEW_MODEL, guard_digest=NEW_GUARD, replaces=fleet.MODEL)
    hub(*worker("finish()"))
    attack(devices)
    case = only_case(setting.store(), "rolling_out")
    assert case.release is not None
    assert case.release.sequence == made.sequence == 1


def test_an_operator_can_object_before_the_roll_out(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    setting.policy = "interval_s = 0.1\nveto_s = 3600.0"
    hub(*worker("finish()"))
    attack(devices)
    store = setting.store()
    only_case(store, "released")
    (setting.state / "veto").mkdir()
    (setting.state / "veto" / "1").touch()
    case = only_case(store, "refused")
    assert "operator" in case.note
    assert not any(device.hints for device in devices)


def test_a_canary_that_refuses_holds_the_roll_out(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker("finish()"))
    attack(devices)
    wait_until(lambda: devices[0].hints)
    devices[0].send(topics.MODEL_REPORTED, fleet.reported("refused", desired=1), retain=True)
    store = setting.store()

    def held() -> tuple[str, ...]:
        release = store.cases()[0].release
        return release.held if release else ()

    wait_until(lambda: held() == ("d0: refused ()",))
    assert not devices[1].hints
    assert store.cases()[0].state == "rolling_out"


@pytest.mark.parametrize("sequence", [99, 1])
def test_a_bogus_hint_does_not_stand(
    sequence: int,
    setting: Setting,
    hub: Callable[..., Hub],
    worker: Callable[[str], tuple[str, str]],
    devices: list[Publisher],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("REPEAT_S", "REPEAT_ANSWERED_S"):
        monkeypatch.setattr(rollout, name, 1.0)
    hub(*worker("finish()"))
    attack(devices)
    victim = devices[0]
    wait_until(lambda: victim.hints)
    genuine, bogus = victim.hints[-1], Desired(target="bogus.tflite", sequence=sequence)
    victim.send(topics.MODEL_DESIRED, bogus, retain=True)
    wait_until(lambda: bogus in victim.hints)
    victim.send(topics.MODEL_REPORTED, fleet.reported("refused", desired=sequence), retain=True)
    wait_until(lambda: victim.hints[-1] == genuine)


def test_hints_are_published_again_to_a_broker_that_forgot_them(
    setting: Setting,
    hub: Callable[..., Hub],
    worker: Callable[[str], tuple[str, str]],
    devices: list[Publisher],
    mosquitto: Any,
) -> None:
    hub(*worker("finish()"))
    attack(devices)
    wait_until(lambda: devices[0].hints)
    mosquitto.kill()
    for file in (setting.folder / "mosquitto").glob("*.db"):
        file.unlink()
    mosquitto.start()
    wait_until(lambda: len(devices[0].hints) >= 2)


def _until(condition: Callable[[], bool]) -> Callable[[float], bool]:
    """What tells a hub to run on until ``condition``; fails when that takes too long."""
    deadline = time.monotonic() + 30.0

    def stopping(wait_s: float) -> bool:
        time.sleep(wait_s)
        assert time.monotonic() < deadline, "the hub did not get there"
        return condition()

    return stopping


def _state(setting: Setting) -> str:
    store = setting.store()
    cases = store.cases()
    store.close()
    return cases[0].state if cases else ""
