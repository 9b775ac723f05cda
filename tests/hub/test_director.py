"""The loop on the hub's side, with a real broker, a real signed repository and a stand-in for the repair itself."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeguard.contract import topics
from edgeguard.contract.messages import Desired, Ranking, RankReply, TapRanking
from edgeguard.hub import bulk, config, policy, rollout
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.cases import Case
from edgeguard.hub.service import Hub
from edgeguard.hub.shared import ENOUGH
from edgeguard.hub.store import Store
from edgeguard.hub.tables import shared
from edgeguard.release.keys import HUB_PASSPHRASE, Obtained, Secrets, load, obtain
from edgeguard.release.repository import COUNTERSIGN, Repository
from tests.hub.conftest import Setting
from tests.simulators import fleet
from tests.simulators.fleet import Publisher, wait_until

NEW_MODEL, NEW_GUARD = "d" * 64, "e" * 64
REPAIRED = fleet.guarded_file(fleet.guard_metadata(model=NEW_MODEL, guard=NEW_GUARD))
ATTACKED = ((0, 60, 0), (1, 90, 45))
"""Two devices make a suspicion, and the third does not double it: there is one case, however slowly they report."""

WIDE = fleet.guard_metadata()
WIDE = msgspec.structs.replace(WIDE, taps=(msgspec.structs.replace(WIDE.taps[1], offset=0, channels=20),))
"""A model of one tapped layer with so many channels that a tenth of them is some."""

RECALIBRATED = "the model was calibrated anew meanwhile: what was counted belongs to its earlier guard"

WORKER = """
import json, os, pathlib, shutil, sys, time
job = json.load(open(sys.argv[1]))
out = pathlib.Path(job["out_dir"])
here = pathlib.Path(__file__).parent
with (here / "runs").open("a") as runs: runs.write(f"{out.name}\\n")
def say(**message): print(json.dumps(message), flush=True)
def repair(): say(stage="repairing", text="pruning", done=1, total=2)
def finish(**more):
    if more.get("verdict", "confirmed") == "confirmed" and more.get("repaired", True): repair()
    result = dict(verdict="confirmed", gate_passed=True, output="repaired.tflite", keras="repaired.keras",
                  model_digest="d" * 64, guard_digest="e" * 64, summary={"label": job["label"]}) | more
    shutil.copy(here / "repaired.tflite", out / "repaired.tflite")
    (out / "repaired.keras").write_bytes(b"a trainable form")
    (out / "result.json").write_text(json.dumps(result))
    say(result=result)
say(stage="confirming", text="inverting a trigger", done=1, total=1)
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


def attack(devices: list[Publisher]) -> None:
    for device in devices:
        device.keep(fleet.report(1, counts=ATTACKED))


def records(store: Store) -> list[Case]:
    return Casebook(store, clock_ms=lambda: 0).all()


def only_case(store: Store, state: str, **conditions: Any) -> Case:
    def reached() -> bool:
        cases = records(store)
        return len(cases) == 1 and cases[0].state == state

    wait_until(reached)
    (case,) = records(store)
    for name, value in conditions.items():
        assert getattr(case, name) == value
    return case


def updates(device: Publisher) -> None:
    """The device takes its latest hint."""
    sequence = device.hints[-1].sequence
    message = fleet.reported("updated", model=NEW_MODEL, guard=NEW_GUARD, sequence=sequence, desired=sequence)
    device.send(topics.MODEL_REPORTED, message, retain=True)


def hinted(devices: list[Publisher]) -> Publisher:
    """The device that is offered the release first."""
    wait_until(lambda: any(device.hints for device in devices))
    return next(device for device in devices if device.hints)


def turns(devices: list[Publisher]) -> Iterator[Publisher]:
    """The devices in the order in which they are offered the release."""
    left = list(devices)
    while left:
        device = hinted(left)
        left.remove(device)
        yield device


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
    first = hinted(devices)
    others = [device for device in devices if device is not first]
    assert [device.hints for device in others] == [[], []]
    updates(first)
    for device in turns(others):
        updates(device)
    case = only_case(store, "closed")
    assert case.release is not None
    assert case.release.updated == ("d0", "d1", "d2")
    kinds = [event.kind for event in store.events() if event.kind != "progress"]
    expected = [
        "suspected",
        "inspecting",
        "confirmed",
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
    wait_until(lambda: NEW_MODEL in {case.model_digest for case in records(setting.store())})


def test_a_clean_fleet_opens_no_case(setting: Setting, hub: Callable[..., Hub], devices: list[Publisher]) -> None:
    hub(sys.executable)
    for device in devices:
        for seq in range(1, 11):
            device.keep(fleet.report(seq, counts=((0, 100, 1), (1, 100, 1))))
    wait_until(lambda: not any(device.waiting for device in devices))
    running = setting.store()
    assert running.counts()["reports"] == 30
    assert not records(running)


@pytest.mark.parametrize(
    ("ending", "state"),
    [
        ('finish(verdict="not_confirmed", gate_passed=False, output=None)', "dismissed"),
        ('finish(verdict="could_not_check", gate_passed=False, output=None)', "could_not_check"),
        ("finish(gate_passed=False)", "refused"),
        ('finish(model_digest="f" * 64)', "refused"),
        ('finish(output="elsewhere.tflite")', "could_not_check"),
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
    case = only_case(setting.store(), "could_not_check")
    assert "failed 3 times" in case.note
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
    with Hub(setting.config, command=worker("repair(); time.sleep(600)")) as first:
        attack(devices)
        first.run(_until(lambda: _state(setting) == "repairing"))
    (setting.folder / "signs.tflite").write_bytes(fleet.guarded_file(fleet.guard_metadata(guard="9" * 64)))
    with Hub(setting.config, command=worker("finish()")) as second:
        second.run(_until(lambda: _state(setting) == "could_not_check"))
    only_case(setting.store(), "could_not_check", note=RECALIBRATED)


def test_a_suspicion_of_a_class_that_calibration_never_saw_says_so(
    setting: Setting, hub: Callable[..., Hub], devices: list[Publisher]
) -> None:
    metadata = fleet.guard_metadata(fpr_upper=1.0)
    (setting.folder / "signs.tflite").write_bytes(fleet.guarded_file(metadata))
    hub(sys.executable)
    attack(devices)
    store = setting.store()
    wait_until(lambda: records(store))
    assert "calibration hardly saw this class" in store.events()[0].text


def test_an_unfinished_repair_is_run_again_after_a_restart(
    setting: Setting, worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    with Hub(setting.config, command=worker("repair(); time.sleep(600)")) as first:
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
        result = setting.state / "cases" / "1" / "job-1" / "run-1" / "result.json"
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
    made = repository.add_repair(
        REPAIRED, name="signs", model_digest=NEW_MODEL, guard_digest=NEW_GUARD, replaces=fleet.MODEL
    )
    hub(*worker("finish()"))
    attack(devices)
    case = only_case(setting.store(), "rolling_out")
    assert case.release is not None
    assert case.release.sequence == made.sequence == 1


def test_an_operator_can_object_before_the_roll_out(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    setting.policy = "interval_s = 0.1\nassess_s = 0.1\nveto_s = 3600.0"
    running = hub(*worker("finish()"))
    attack(devices)
    store = setting.store()
    only_case(store, "released")
    running.book.decide(1, "stage", False, "alice", "not before Monday")
    case = only_case(store, "refused")
    assert case.note == "alice said no to stage: not before Monday"
    assert not any(device.hints for device in devices)
    last = running.book.audit(1)[-1]
    assert (last.who, last.was, last.became, last.why) == ("alice", "released", "refused", case.note)


def test_a_canary_that_refuses_holds_the_roll_out(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker("finish()"))
    attack(devices)
    canary = hinted(devices)
    canary.send(topics.MODEL_REPORTED, fleet.reported("refused", desired=1), retain=True)
    store = setting.store()

    def held() -> tuple[str, ...]:
        release = records(store)[0].release
        return release.held if release else ()

    wait_until(lambda: held() == (f"{canary.device}: refused ()",))
    assert [device for device in devices if device.hints] == [canary]
    assert records(store)[0].state == "rolling_out"


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
    victim = hinted(devices)
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
    canary = hinted(devices)
    mosquitto.kill()
    for file in (setting.folder / "mosquitto").glob("*.db"):
        file.unlink()
    mosquitto.start()
    wait_until(lambda: len(canary.hints) >= 2)


def test_where_policy_demands_a_second_signature_the_case_waits_for_it_and_then_goes_on(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    served, offline = setting.folder / "release", setting.folder / "offline"

    def opened(*folders: Path) -> Repository:
        signers = [signer for folder in folders for signer in load(folder)]
        return Repository.open(served, signers, clock=lambda: datetime.now(timezone.utc))

    def new_key(folder: Path, role: str) -> Obtained:
        return obtain("new", role, folder, secrets=Secrets(), variable=HUB_PASSPHRASE, passphrase=None)

    hubs, second = new_key(setting.folder / "keys", "repaired"), new_key(setting.folder / "apart", COUNTERSIGN)
    assert opened(setting.folder / "keys", offline).repair_key(hubs, countersigners=[second])
    running = hub(*worker("finish()"))
    attack(devices)
    store = setting.store()
    waits = "release 1 waits for a second, offline signature: edgeguard release sign"
    wait_until(lambda: records(store) and records(store)[0].note == waits)
    time.sleep(1.0)  # ten turns of the hub's, with nothing to stop it but the signature
    assert [(case.state, case.release) for case in records(store)] == [("repaired", None)]
    assert not any(device.hints for device in devices)
    assert opened().releases() == ()
    assert opened(setting.folder / "apart").sign() == ()  # only the hub can publish it
    case = only_case(store, "rolling_out")
    assert case.release is not None
    assert hinted(devices).hints[-1].target == case.release.target
    assert [event.text for event in store.events() if event.kind == "awaiting_approval"] == [waits]
    assert [entry.became for entry in running.book.audit(1)][-2:] == ["released", "rolling_out"]


class TestApprovals:
    def policy(self, setting: Setting, **steps: str) -> None:
        lines = "".join(f'{step} = "{choice}"\n' for step, choice in steps.items())
        setting.policy = f"interval_s = 0.1\nassess_s = 0.1\n[policy.steps]\n{lines}"

    def test_each_step_waits_for_a_person_where_policy_says_so(
        self, setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]],
        devices: list[Publisher],
    ) -> None:  # fmt: skip
        self.policy(setting, inspect="approve", repair="approve", stage="approve")
        ending = 'finish(**({"repaired": False, "gate_passed": False, "output": None} if job["stop_after"] else {}))'
        running = hub(*worker(ending))
        attack(devices)
        store = setting.store()
        waits = (("suspected", "inspect", 0), ("confirmed", "repair", 1), ("repaired", "stage", 2))
        for state, step, done in waits:
            case = only_case(store, state)
            wait_until(lambda step=step: records(store)[0].awaiting == step)  # type: ignore[misc]
            assert case.is_case == (state != "suspected")
            assert (runs(setting) if done else 0) == done
            assert not any(device.hints for device in devices)
            running.book.decide(1, step, True, "alice", "go")  # type: ignore[arg-type]
        only_case(store, "rolling_out")
        approvals = [entry.why for entry in running.book.audit(1) if entry.who == "alice"]
        assert approvals == [f"alice approved {step}: go" for _, step, _ in waits]

    def test_a_repair_that_the_gate_could_not_check_in_full_waits_for_its_owner(
        self, setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]],
        devices: list[Publisher],
    ) -> None:  # fmt: skip
        self.policy(setting, stage="auto")
        running = hub(*worker("finish(needs_approval=True)"))
        attack(devices)
        store = setting.store()
        wait_until(lambda: [case.awaiting for case in records(store)] == ["stage"])
        time.sleep(0.5)
        only_case(store, "repaired", release=None)
        assert not list((setting.folder / "release" / "targets").iterdir())
        assert not any(device.hints for device in devices)
        running.book.decide(1, "stage", True, "alice", "recall looks right")
        only_case(store, "rolling_out")
        hinted(devices)

    def test_a_person_can_decline_the_inspection(
        self, setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]],
        devices: list[Publisher],
    ) -> None:  # fmt: skip
        self.policy(setting, inspect="approve")
        running = hub(*worker("finish()"))
        attack(devices)
        wait_until(lambda: [case.awaiting for case in running.book.all()] == ["inspect"])
        running.book.decide(1, "inspect", False, "alice")
        only_case(setting.store(), "refused", is_case=False)
        assert not (setting.folder / "runs").exists()

    def test_what_policy_never_does_is_not_done_and_says_so(
        self, setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]],
        devices: list[Publisher],
    ) -> None:  # fmt: skip
        self.policy(setting, inspect="never")
        hub(*worker("finish()"))
        attack(devices)
        store = setting.store()
        wait_until(lambda: [case.note for case in records(store)] == ["policy.steps.inspect is never"])
        assert records(store)[0].state == "suspected"
        assert not (setting.folder / "runs").exists()

    def test_the_fleet_is_asked_for_ranks_before_the_repair(
        self, setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]],
        devices: list[Publisher],
    ) -> None:  # fmt: skip
        self.policy(setting, ask="ranks")
        setting.policy = setting.policy.replace("[policy.steps]", "ask_s = 60\n[policy.steps]")
        (setting.folder / "signs.tflite").write_bytes(fleet.guarded_file(WIDE))
        ending = """
(here / "dormant").write_text(json.dumps(job["dormant"]))
finish(**({"repaired": False, "gate_passed": False, "output": None} if job["stop_after"] else {}))
"""
        running = hub(*worker(ending))
        for device in devices:
            device.keep(fleet.report(1, counts=ATTACKED, width=WIDE.feature_count))
        wait_until(lambda: len(running.commands.of_case(1)) == 3)
        order = tuple(range(19, -1, -1))
        taps = (TapRanking(tensor="late", source_layer="relu2", channels=order),)
        for entry in running.commands.of_case(1):
            result = Ranking(model_digest=fleet.MODEL, inputs=500, taps=taps)
            name = next(device for device in devices if device.device == entry.device)
            name.send(topics.reply("rank"), RankReply(id=entry.id, state="ok", result=result))
        only_case(setting.store(), "rolling_out")
        assert json.loads((setting.folder / "dormant").read_text()) == [{"layer": "relu2", "channels": [19, 18]}]


def test_a_dismissed_suspicion_costs_the_devices_behind_it_trust(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    running = hub(*worker('finish(verdict="not_confirmed", gate_passed=False, output=None)'))
    attack(devices)
    case = only_case(setting.store(), "dismissed", is_case=False)
    assert set(running.book.trust(fleet.MODEL)) == set(case.devices)
    assert all(known.rejections == 1 for known in running.book.trust(fleet.MODEL).values())


def test_inputs_shared_while_a_suspicion_was_inspected_make_a_case_of_it_after_that(
    setting: Setting, hub: Callable[..., Hub], worker: Callable[[str], tuple[str, str]], devices: list[Publisher]
) -> None:
    hub(*worker('finish(verdict="not_confirmed", gate_passed=False, output=None)'))
    attack(devices)
    store = setting.store()
    case = only_case(store, "dismissed", is_case=False)
    columns = ("fleet", "case_id", "digest", "at_ms", "who", "flagged", "counts")
    with store.write() as db:
        given = [("test", case.id, f"{n:064x}", 1, "ada", 1, 1) for n in range(ENOUGH)]
        bulk.insert(db, shared, columns, given, conflict="ignore")
    wait_until(lambda: records(store)[0].shared == ENOUGH)


def test_a_changed_fleet_is_told_once_a_day_and_opens_no_case(
    setting: Setting, hub: Callable[..., Hub], devices: list[Publisher]
) -> None:
    setting.policy += '\n[policy.steps]\nrecalibrate = "approve"\n'
    running = hub(sys.executable)
    for device in devices:
        for seq in range(1, 6):
            device.keep(fleet.report(seq, counts=((0, 100, 40), (1, 100, 40))))
    store = setting.store()
    wait_until(lambda: [event.kind for event in store.events()] == ["drift"])
    wait_until(lambda: not any(device.waiting for device in devices))
    wait_until(lambda: {entry.state for entry in running.commands.latest()} == {"proposed"})
    assert {entry.name for entry in running.commands.latest()} == {"recalibrate"}
    time.sleep(0.5)
    assert len(store.events()) == 1
    assert not records(store)


def test_evidence_is_looked_at_only_when_there_is_some_that_is_new(
    setting: Setting, hub: Callable[..., Hub], devices: list[Publisher], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[int] = []
    assess = policy.assess

    def counted(*arguments: Any, **more: Any) -> policy.Assessment:
        looks.append(1)
        return assess(*arguments, **more)

    monkeypatch.setattr(policy, "assess", counted)
    hub(sys.executable)
    for seq in (1, 2):
        before = len(looks)
        devices[0].keep(fleet.report(seq))
        wait_until(lambda before=before: len(looks) > before)  # type: ignore[misc]
        wait_until(lambda: not devices[0].waiting)
        time.sleep(0.5)
        before = len(looks)
        time.sleep(1.0)
        assert len(looks) == before


def test_of_two_hubs_on_one_database_one_decides_and_the_other_takes_over(
    setting: Setting, worker: Callable[[str], tuple[str, str]], devices: list[Publisher], postgres: Any, template: str
) -> None:
    url = postgres.url(postgres.create(template))
    hubs = []
    for number in range(2):
        section = f'[store]\nurl = "{url}"\n[policy]'
        text = setting.path.read_text().replace("[policy]", section, 1).replace('"state"', f'"state-{number}"')
        text = text.replace('fleet = "test"', f'fleet = "test"\nclient_id = "hub-{number}"')
        path = setting.folder / f"hub-{number}.toml"
        path.write_text(text.replace(f"port = {setting.web_port}", "port = 0"))
        hubs.append(Hub(config.load(path), command=worker("finish()")))
    with hubs[0] as first, hubs[1] as second:
        stop = threading.Event()
        other = threading.Thread(target=lambda: second.run(stop.wait))
        other.start()
        try:
            attack(devices)
            first.run(_until(lambda: [case.state for case in second.book.all()] == ["rolling_out"]))
            first.__exit__()
            for device in turns(devices):
                updates(device)
            wait_until(lambda: [case.state for case in second.book.all()] == ["closed"])
        finally:
            stop.set()
            other.join(15)
        trail = [entry.became for entry in second.book.audit(1)]
    assert trail[:4] == ["suspected", "inspecting", "confirmed", "repairing"]
    assert len(second.book.all()) == 1


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
    cases = records(store)
    store.close()
    return cases[0].state if cases else ""
