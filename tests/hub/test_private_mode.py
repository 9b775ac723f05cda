"""Private models at the hub: nothing of them is inspected, repaired or asked in clear; what parties found counts."""

from __future__ import annotations

import base64
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timezone
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import func, select

from edgeguard.contract import topics
from edgeguard.contract.messages import Ranking, RankReply, TapRanking, encode
from edgeguard.contract.private import Finding, Inspection, Round, Signed
from edgeguard.errors import ConfigError, TrustError
from edgeguard.hub import cases, ingest, private, schema, tables
from edgeguard.hub.access import Tokens
from edgeguard.hub.casebook import Casebook
from edgeguard.hub.cases import Case, State
from edgeguard.hub.commands import Commands
from edgeguard.hub.config import PrivateConfig
from edgeguard.hub.ingest import Accepted, ModelShape
from edgeguard.hub.private import Private
from edgeguard.hub.service import Hub
from edgeguard.hub.store import Store
from edgeguard.private import parties as keyring
from edgeguard.private.parties import Own
from edgeguard.release.keys import load
from edgeguard.release.repository import Repository
from tests.hub.conftest import Setting
from tests.hub.serving import NOW, Served, serve
from tests.simulators import fleet
from tests.simulators import private as making
from tests.simulators.fleet import Publisher, wait_until

GUARD = fleet.guard_metadata(classes=4)
ATTACKED = ((0, 60, 0), (1, 90, 45))
NEW_MODEL, NEW_GUARD = "d" * 64, "e" * 64
CASE = Case(
    id=3, model="signs", model_digest=fleet.MODEL, label=1, state="suspected", created_ms=NOW, updated_ms=NOW,
    devices=("d1", "d2"), flagged=40, inputs=100, p_value=1e-30, channels=(), private=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def owns(tmp_path_factory: pytest.TempPathFactory) -> tuple[Own, ...]:
    return making.parties(tmp_path_factory.mktemp("parties"))


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> tuple[Own, ...]:
    """Three parties that nobody configured."""
    return making.parties(tmp_path_factory.mktemp("others"))


@pytest.fixture(scope="module")
def known(owns: tuple[Own, ...]) -> Private:
    config = PrivateConfig(parties=owns[0].folder / keyring.TOGETHER, min_devices=3)
    return Private(fleet="test", parties=owns[0].parties, config=config)


def a_plan(owns: Sequence[Own], **fields: Any) -> Inspection:
    asked: dict[str, Any] = {"id": "case-0003-plan", "model_digest": fleet.MODEL, "layers": (64, 8, 4)}
    return Inspection(**{"parties": owns[0].parties.digest, **asked, **fields})


def a_finding(plan: Inspection, *labels: int, **fields: Any) -> Finding:
    verdict = "backdoored" if labels else "no_sign"
    said: dict[str, Any] = {"inspection": plan.digest, "given": "one other", "verdict": verdict, "labels": labels}
    return Finding(**{**said, **fields})


def signed(owns: Sequence[Own], finding: Finding, *places: int) -> list[Signed]:
    return [keyring.sign(owns[place], finding) for place in places]


class TestFindings:
    """What a finding says of a case on label 1, where two parties signed it."""

    @pytest.mark.parametrize(
        ("labels", "plan", "more", "verdict"),
        [
            ((1,), {}, {}, "confirmed"),
            ((1, 3), {}, {}, "confirmed"),
            ((1,), {"steps": 1, "space": "features"}, {}, "confirmed"),
            ((3,), {}, {}, "could_not_check"),
            ((), {}, {}, "not_confirmed"),
            ((), {}, {"verdict": "could_not_check"}, "could_not_check"),
            ((), {"space": "features"}, {}, "could_not_check"),
            ((), {"steps": 59}, {}, "could_not_check"),
            ((), {"sought": 63}, {}, "could_not_check"),
            ((), {"held_out": 63}, {}, "could_not_check"),
        ],
    )
    def test_says_so(
        self, owns: tuple[Own, ...], known: Private, labels: tuple[int, ...], plan: dict[str, Any],
        more: dict[str, Any], verdict: str,
    ) -> None:  # fmt: skip
        asked = a_plan(owns, **plan)
        result = known.judge(CASE, GUARD, asked, signed(owns, a_finding(asked, *labels, **more), 0, 2))
        assert (result.verdict, result.repaired, result.output) == (verdict, False, None)
        assert result.reason.endswith("as north and west signed")
        assert result.summary["private"]["labels"] == list(labels)

    def test_three_signatures_are_as_good_as_two_in_any_order(self, owns: tuple[Own, ...], known: Private) -> None:
        asked = a_plan(owns)
        result = known.judge(CASE, GUARD, asked, signed(owns, a_finding(asked, 1), 2, 0, 1))
        assert result.summary["private"]["signed"] == ["north", "south", "west"]


def _lied(owns: Sequence[Own], plan: Inspection) -> list[Signed]:
    """The signatures of two on one finding, with another one beside the second."""
    first, second = signed(owns, a_finding(plan, 1), 0, 1)
    return [first, msgspec.structs.replace(second, finding=a_finding(plan, 1, 2))]


@pytest.mark.parametrize(("before", "after"), [("suspected", "inspecting"), ("confirmed", "repairing")])
def test_no_arrow_leads_to_work_in_clear(before: State, after: State) -> None:
    with pytest.raises(ValueError, match=f"from {before} to {after}"):
        cases.move(msgspec.structs.replace(CASE, state=before), after, at_ms=NOW)


class TestHostileFindings:
    @pytest.mark.parametrize(
        ("brought", "word"),
        [
            (lambda owns, plan: signed(owns, a_finding(plan, 1), 0), "1 parties in 1 results"),
            (lambda owns, plan: signed(owns, a_finding(plan, 1), 0, 0), "1 parties in 2 results"),
            (lambda owns, plan: signed(owns, a_finding(plan, 1), 0, 1, 0), "2 parties in 3 results"),
            (
                lambda owns, plan: [*signed(owns, a_finding(plan, 1), 0), *signed(owns, a_finding(plan), 1)],
                "parties that do not agree",
            ),
            (
                lambda owns, plan: [
                    *signed(owns, a_finding(plan, 1), 0),
                    *signed(owns, a_finding(plan, 1, given="another"), 1),
                ],
                "parties that do not agree",
            ),
            (
                lambda owns, plan: [
                    *signed(owns, a_finding(plan, 1), 0, 1),
                    *signed(owns, a_finding(plan), 2),
                ],
                "parties that do not agree",
            ),
            (_lied, "not south's"),
            (
                lambda owns, plan: [
                    msgspec.structs.replace(one, party=one.party + 1) for one in signed(owns, a_finding(plan, 1), 0, 1)
                ],
                "not south's",
            ),
            (
                lambda owns, plan: [
                    msgspec.structs.replace(one, signature="00" * 70) for one in signed(owns, a_finding(plan, 1), 0, 1)
                ],
                "not north's",
            ),
            (
                lambda owns, plan: signed(owns, a_finding(a_plan(owns, id="another-plan"), 1), 0, 1),
                "one of another inspection",
            ),
            (lambda owns, plan: signed(owns, a_finding(plan, 1, 4), 0, 1), "0 to 3"),
        ],
    )
    def test_what_two_parties_did_not_sign_of_this_plan_is_refused(
        self, owns: tuple[Own, ...], known: Private, brought: Callable[..., list[Signed]], word: str
    ) -> None:
        asked = a_plan(owns)
        with pytest.raises(TrustError, match=word):
            known.judge(CASE, GUARD, asked, brought(owns, asked))

    def test_other_parties_are_nobody(self, owns: tuple[Own, ...], others: tuple[Own, ...], known: Private) -> None:
        asked = a_plan(owns)
        with pytest.raises(TrustError, match="not north's"):
            known.judge(CASE, GUARD, asked, signed(others, a_finding(asked, 1), 0, 1))

    @pytest.mark.parametrize(
        ("fields", "word"),
        [
            ({"model_digest": fleet.OTHER}, "model ccc"),
            ({"model_digest": None}, "model None"),
            ({"parties": "0" * 64}, "other parties"),
            ({"layers": (64, 8, 10)}, "10 classes"),
        ],
    )
    def test_a_plan_for_something_else_is_refused(
        self, owns: tuple[Own, ...], known: Private, fields: dict[str, Any], word: str
    ) -> None:
        asked = a_plan(owns, **fields)
        with pytest.raises(ConfigError, match=word):
            known.judge(CASE, GUARD, asked, signed(owns, a_finding(asked, 1), 0, 1))

    @pytest.mark.parametrize(
        ("labels", "verdict"),
        [
            ((), "backdoored"),
            ((1,), "no_sign"),
            ((1,), "could_not_check"),
            ((2, 1), "backdoored"),
            ((1, 1), "backdoored"),
        ],
    )
    def test_labels_and_verdict_must_go_together(self, labels: tuple[int, ...], verdict: str) -> None:
        said = {"inspection": "0" * 64, "given": "one", "verdict": verdict, "labels": labels}
        with pytest.raises(msgspec.ValidationError, match="labels"):
            msgspec.convert(said, Finding)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: text[:-40],
        lambda text: text.replace("BEGIN", "BEGUN"),
        lambda text: json.dumps({"parties": [json.loads(text)["parties"][0]] * 3}),
        lambda text: json.dumps({"parties": json.loads(text)["parties"][:2]}),
    ],
)
def test_parties_that_cannot_be_are_refused_at_the_start(
    setting: Setting, owns: tuple[Own, ...], damage: Callable[[str], str]
) -> None:
    text = damage((owns[0].folder / keyring.TOGETHER).read_text())
    (setting.folder / "parties.json").write_text(text)
    setting.more = '[private]\nparties = "parties.json"\n'
    with pytest.raises(ConfigError, match=r"parties\.json") as caught:
        private.read(setting.config)
    assert "\n" not in str(caught.value)


@pytest.fixture
def served(tmp_path: Path, known: Private) -> Iterator[Served]:
    """A served database of a hub whose one model is private."""
    with serve(tmp_path, guard=GUARD, private=known) as found:
        yield found


class TestApi:
    def bring(
        self, served: Served, case: int, plan: Inspection, results: Sequence[Signed], **how: Any
    ) -> tuple[int, Any]:
        body = {"plan": msgspec.to_builtins(plan), "results": msgspec.to_builtins(list(results)), "why": "by Ada"}
        return served.ask(
            "POST", f"/v1/cases/{case}/private", body | how.pop("change", {}), **{"role": "operator", **how}
        )

    @pytest.mark.parametrize(
        ("labels", "state", "is_case"),
        [((1,), "confirmed", True), ((), "dismissed", False), ((2,), "could_not_check", False)],
    )
    def test_a_finding_moves_the_case_and_says_who_brought_it(
        self, served: Served, owns: tuple[Own, ...], labels: tuple[int, ...], state: str, is_case: bool
    ) -> None:
        case = served.add_case(private=True, awaiting="inspect")
        plan = a_plan(owns)
        status, told = self.bring(served, case.id, plan, signed(owns, a_finding(plan, *labels), 0, 1))
        assert (status, told["state"], told["is_case"], told["awaiting"]) == (200, state, is_case, None)
        assert told["summary"]["private"]["inspection"] == plan.digest
        last = told["audit"][-1]
        assert (last["who"], last["became"]) == ("operator", state)
        assert "as north and south signed: by Ada" in last["why"]

    def test_what_could_not_be_checked_may_be_checked_once_more(self, served: Served, owns: tuple[Own, ...]) -> None:
        case = served.add_case(private=True)
        weak = a_plan(owns, id="weak-plan", steps=5)
        for plan, labels, state in (
            (weak, (), "could_not_check"),
            (weak, (), "could_not_check"),
            (a_plan(owns), (1,), "confirmed"),
        ):
            results = signed(owns, a_finding(plan, *labels), 0, 1)
            assert self.bring(served, case.id, plan, results)[1]["state"] == state
        assert self.bring(served, case.id, plan, results)[0] == 409

    def test_not_while_another_case_of_the_model_is_open(self, served: Served, owns: tuple[Own, ...]) -> None:
        case = served.add_case(private=True, state="could_not_check")
        served.add_case(private=True)
        plan = a_plan(owns)
        status, told = self.bring(served, case.id, plan, signed(owns, a_finding(plan, 1), 0, 1))
        assert (status, "of the same model is open" in told["got"]) == (409, True)

    @pytest.mark.parametrize(
        ("change", "status"),
        [
            ({"plan": {}}, 409),
            ({"plan": []}, 400),
            ({"plan": {"id": "x" * 40_000}}, 409),
            ({"plan": {"id": "x" * 70_000}}, 413),
            ({"results": []}, 400),
            ({"results": [{}] * 4}, 400),
            ({"results": [{"finding": {}, "party": 0, "signature": ""}]}, 409),
            ({"results": ["a", "b"]}, 400),
            ({"why": "\x00"}, 400),
            ({"extra": 1}, 400),
        ],
    )  # fmt: skip
    def test_what_is_no_finding_is_refused_and_changes_nothing(
        self, served: Served, owns: tuple[Own, ...], change: dict[str, Any], status: int
    ) -> None:
        case, plan = served.add_case(private=True), a_plan(owns)
        results = signed(owns, a_finding(plan, 1), 0, 1)
        answered, told = self.bring(served, case.id, plan, results, change=change)
        assert (answered, set(told)) == (status, {"what", "got", "expected", "do"})
        after = served.ask("GET", f"/v1/cases/{case.id}")[1]
        assert (after["state"], len(after["audit"])) == ("suspected", 1)

    def test_a_viewer_brings_nothing(self, served: Served, owns: tuple[Own, ...]) -> None:
        case, plan = served.add_case(private=True), a_plan(owns)
        assert self.bring(served, case.id, plan, signed(owns, a_finding(plan, 1), 0, 1), role="viewer")[0] == 403

    def test_a_case_of_another_model_takes_none(self, served: Served, owns: tuple[Own, ...]) -> None:
        case, plan = served.add_case(), a_plan(owns)
        assert self.bring(served, case.id, plan, signed(owns, a_finding(plan, 1), 0, 1))[0] == 409
        assert served.ask("GET", f"/v1/cases/{case.id}/round")[0] == 400

    def test_a_round_is_the_same_each_time_and_one_that_devices_read(self, served: Served, known: Private) -> None:
        case = served.add_case(private=True)
        first, second = (served.ask("GET", f"/v1/cases/{case.id}/round")[1] for _ in range(2))
        asked = msgspec.convert(first, Round)
        assert first == second
        assert (asked.fleet, asked.parties, asked.model_digest) == ("test", known.parties.digest, fleet.MODEL)
        assert (asked.layer, asked.channels, asked.prune, asked.min_devices) == ("relu2", 2, 1, 3)
        assert asked.id == f"case-0001-{'a' * 16}"

    def test_evidence_and_shared_inputs_are_refused(self, served: Served) -> None:
        served.take("d1", fleet.report(1, counts=ATTACKED))
        case = served.add_case(private=True)
        status, told = served.ask("GET", f"/v1/cases/{case.id}/evidence", role="operator")
        assert (status, told["got"]) == (400, "a private model")
        body = {"dtype": "uint8", "shape": [8, 8, 1], "inputs": [base64.b64encode(bytes(64)).decode()]}
        status, told = served.ask("POST", f"/v1/cases/{case.id}/inputs", body, role="operator")
        assert (status, told["got"]) == (409, "a private model")

    def test_no_word_of_a_person_stands_for_the_inspection_but_ends_the_case(self, served: Served) -> None:
        case = served.add_case(private=True, awaiting="inspect")
        path = f"/v1/cases/{case.id}/decisions"
        assert served.ask("POST", path, {"step": "inspect", "approve": True}, role="operator")[0] == 409
        assert served.ask("POST", path, {"step": "inspect", "approve": False}, role="operator")[1]["state"] == "refused"

    def test_the_explanation_names_commands_with_what_the_hub_knows(self, served: Served) -> None:
        case = served.add_case(private=True, awaiting="inspect")
        told = served.ask("GET", f"/v1/cases/{case.id}")[1]["explanation"]
        assert f"edgeguard private inspect plan plan.json --id case-0001-{'a' * 16} --for {fleet.MODEL} " in told
        assert "edgeguard hub private 1 --plan plan.json" in told
        assert "edgeguard hub case 1 --round round.json" in told


class TestReports:
    """What the hub keeps of a private model's reports."""

    MODELS = {fleet.MODEL: ModelShape(width=fleet.WIDTH, classes=2, private=True)}  # noqa: RUF012

    def read(self, report: Any) -> Any:
        return ingest.read("edgeguard/v1/test/d1/report", encode(report), fleet="test", models=self.MODELS)

    def test_counts_are_kept_and_features_dropped(self) -> None:
        report = fleet.report(1, counts=ATTACKED)
        assert report.evidence
        assert report.activation
        item = self.read(report)
        assert isinstance(item, Accepted)
        assert item.message == msgspec.structs.replace(report, evidence=(), activation=None, moved=None)
        assert item.payload == encode(item.message)

    def test_they_are_checked_all_the_same(self) -> None:
        assert isinstance(self.read(fleet.report(1, width=fleet.WIDTH + 1)), ingest.Rejected)

    def test_those_of_another_model_stay_whole(self) -> None:
        report = fleet.report(1, counts=ATTACKED, model=fleet.OTHER)
        assert self.read(report).message == report


class TestCommands:
    @pytest.fixture
    def made(self, tmp_path: Path) -> Iterator[tuple[Commands, set[str], list[str]]]:
        """Commands, the models that are private, and what was sent."""
        store = Store(f"sqlite:///{tmp_path / 'hub.db'}", fleet="test")
        now, secret, sent = [NOW], set[str](), list[str]()

        def publish(device: str, channel: str, message: Any) -> bool:
            sent.append(channel)
            return True

        def clock_ms() -> int:
            now[0] += 60_000
            return now[0]

        book = Casebook(store, clock_ms=clock_ms)
        yield Commands(store, book, publish=publish, clock_ms=clock_ms, private=lambda: secret), secret, sent
        store.close()

    FIELDS: dict[str, dict[str, Any]] = {  # noqa: RUF012
        "rank": {"model_digest": fleet.MODEL},
        "vote": {"model_digest": fleet.MODEL, "layer": "relu2", "share": 0.5},
    }

    @pytest.mark.parametrize("name", FIELDS)
    def test_a_private_model_is_never_asked_about(self, made: Any, name: str) -> None:
        commands, secret, sent = made
        secret.add(fleet.MODEL)
        with pytest.raises(ConfigError, match="private model"):
            commands.issue("d1", name, **self.FIELDS[name])
        commands.issue("d1", name, **{**self.FIELDS[name], "model_digest": fleet.OTHER})
        commands.tick()
        assert sent == [f"cmd/{name}"]

    @pytest.mark.parametrize("name", FIELDS)
    def test_what_was_asked_before_it_became_private_is_not_asked_again(self, made: Any, name: str) -> None:
        commands, secret, sent = made
        commands.issue("d1", name, **self.FIELDS[name])
        commands.tick()
        secret.add(fleet.MODEL)
        commands.tick()
        commands.tick()
        assert sent == [f"cmd/{name}"]

    def test_a_late_answer_is_not_stored(self, made: Any) -> None:
        commands, secret, _ = made
        key = commands.issue("d1", "rank", **self.FIELDS["rank"])
        secret.add(fleet.MODEL)
        ranking = Ranking(
            model_digest=fleet.MODEL, inputs=9, taps=(TapRanking(tensor="late", source_layer="relu2", channels=(1, 0)),)
        )
        commands.heard("d1", "rank", encode(RankReply(id=key, state="ok", result=ranking)))
        assert [(entry.state, entry.reply) for entry in commands.latest()] == [("waiting", None)]


class TestLoop:
    """The whole hub on a broker, with a stand-in for the repair that says when it was begun."""

    @pytest.fixture
    def worker(self, setting: Setting) -> tuple[str, str]:
        path = setting.folder / "worker.py"
        path.write_text("import pathlib, time\npathlib.Path(__file__).with_name('begun').touch()\ntime.sleep(600)\n")
        return sys.executable, str(path)

    def make_private(self, setting: Setting, owns: Sequence[Own]) -> None:
        setting.model = "private = true"
        setting.more = f'[private]\nparties = "{owns[0].folder / keyring.TOGETHER}"\nmin_devices = 3\n'

    def count(self, store: Store, table: Any) -> int:
        with store.read() as db:
            return db.scalar(select(func.count()).select_from(table)) or 0

    def test_from_suspicion_to_the_fleet_without_an_inspection_in_clear(
        self, setting: Setting, hub: Callable[..., Hub], worker: tuple[str, str], devices: list[Publisher],
        owns: tuple[Own, ...],
    ) -> None:  # fmt: skip
        (setting.folder / "signs.tflite").write_bytes(fleet.guarded_file(GUARD))
        self.make_private(setting, owns)
        setting.policy += '\n[policy.steps]\nask = "ranks"\nstage = "auto"'
        running = hub(*worker)
        store = setting.store()
        for device in devices:
            device.keep(fleet.report(1, counts=ATTACKED))
        book = Casebook(store, clock_ms=lambda: NOW)
        wait_until(lambda: [case.awaiting for case in book.all()] == ["inspect"])
        time.sleep(1.0)  # ten turns of the hub's
        (case,) = book.all()
        assert (case.state, case.private, case.channels, case.job) == ("suspected", True, (), None)

        plan = a_plan(owns)
        secret, _ = Tokens(store, clock_ms=lambda: NOW).add("ops", "operator", who="test")
        body = {
            "plan": msgspec.to_builtins(plan),
            "results": msgspec.to_builtins(signed(owns, a_finding(plan, 1), 0, 1)),
        }
        connection = HTTPConnection("127.0.0.1", setting.web_port, timeout=10)
        headers = {"Authorization": f"Bearer {secret}", "Content-Type": "application/json"}
        connection.request("POST", f"/v1/cases/{case.id}/private", json.dumps(body), headers)
        assert connection.getresponse().status == 200
        connection.close()
        time.sleep(1.0)
        assert [(case.state, case.is_case, case.job) for case in book.all()] == [("confirmed", True, None)]

        signers = [*load(setting.folder / "keys"), *load(setting.folder / "offline")]
        repository = Repository.open(setting.folder / "release", signers, clock=lambda: datetime.now(timezone.utc))
        mended = fleet.guarded_file(fleet.guard_metadata(model=NEW_MODEL, guard=NEW_GUARD, classes=4))
        made = repository.add(
            mended, name="signs", model_digest=NEW_MODEL, guard_digest=NEW_GUARD, replaces=fleet.MODEL
        )
        wait_until(lambda: any(device.hints for device in devices))
        left = list(devices)
        while left:
            wait_until(lambda: any(device.hints for device in left))
            device = next(device for device in left if device.hints)
            left.remove(device)
            assert device.hints[-1].target == made.target
            told = fleet.reported(
                "updated", model=NEW_MODEL, guard=NEW_GUARD, sequence=made.sequence, desired=made.sequence
            )
            device.send(topics.MODEL_REPORTED, told, retain=True)
        wait_until(lambda: [case.state for case in book.all()] == ["closed"])
        states = [entry.became for entry in book.audit(case.id)]
        assert list(dict.fromkeys(states)) == [
            "suspected",
            "confirmed",
            "repaired",
            "released",
            "rolling_out",
            "closed",
        ]
        watched = {model["model_digest"] for model in running.status()["models"]}
        assert watched == {fleet.MODEL, NEW_MODEL}

        # What the repaired model reports is kept as little as what the one before it did.
        for device in devices:
            device.keep(fleet.report(2, counts=ATTACKED, model=NEW_MODEL, guard=NEW_GUARD))
        wait_until(lambda: not any(device.waiting for device in devices))
        assert not (setting.folder / "begun").exists()
        assert [self.count(store, table) for table in (tables.jobs, tables.commands, schema.features)] == [0, 0, 0]
        with store.read() as db:
            kept = [msgspec.json.decode(row) for row in db.scalars(select(schema.reports.c.payload))]
        assert len(kept) == 6
        assert not any(report["evidence"] or report["activation"] or report["moved"] for report in kept)
        store.close()

    def test_what_was_begun_in_clear_ends_where_the_model_becomes_private(
        self, setting: Setting, worker: tuple[str, str], devices: list[Publisher], owns: tuple[Own, ...]
    ) -> None:
        book = Casebook(setting.store(), clock_ms=lambda: NOW)
        with Hub(setting.config, command=worker) as first:
            for device in devices:
                device.keep(fleet.report(1, counts=ATTACKED))
            first.run(self.until((setting.folder / "begun").exists))
        (setting.folder / "begun").unlink()
        self.make_private(setting, owns)
        with Hub(setting.config, command=worker) as second:
            ended = self.until(lambda: [case.state for case in book.all()] == ["could_not_check"], turns=10)
            second.run(ended)
        (case,) = book.all()
        assert (case.private, case.channels) == (True, ())
        assert "became private" in case.note
        assert not (setting.folder / "begun").exists()

    def until(self, condition: Callable[[], bool], *, turns: int = 1) -> Callable[[float], bool]:
        """What tells a hub to run on until ``condition`` has held for so many turns of its loop."""
        deadline_s = time.monotonic() + 30.0
        held = [0]

        def stopping(wait_s: float) -> bool:
            time.sleep(wait_s)
            assert time.monotonic() < deadline_s, "the hub did not get there"
            held[0] += condition()
            return held[0] >= turns

        return stopping
