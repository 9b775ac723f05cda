"""An inspection and the repair after it by three real processes, from the command line: same verdict as in clear."""

from __future__ import annotations

import base64
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from benchmarks import relay
from edgeguard.contract.private import Inspection
from edgeguard.private import child, computation, inspections, owners
from edgeguard.private.parties import Own
from tests.simulators import needs
from tests.simulators import private as making

needs.python_module("spu", "spu", until=(3, 11))

pytestmark = pytest.mark.slow
TIMEOUT_S = 400


def start(own: Own, folder: Path, *what: str) -> subprocess.Popen[str]:
    command = [
        sys.executable,
        "-c",
        "from edgeguard.cli import main; main()",
        "private",
        *what,
        "run",
        str(own.folder),
        "--plan",
        str(folder / "plan.json"),
        "--given",
        str(folder / "given"),
        "--timeout",
        "60",
        "--json",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    found = []
    for process in processes:
        out, err = process.communicate(timeout=TIMEOUT_S)
        found.append((process.returncode, out, err))
    return found


class Listening:
    """A party's link, noting how long each message is that it is sent beside those of programs."""

    def __init__(self, link: Any, noted: list[Any]) -> None:
        self._link, self._noted = link, noted

    def all_gather(self, text: str) -> list[str]:
        said: list[str] = self._link.all_gather(text)
        self._noted.append([len(one) for one in said])
        return said

    def scatter(self, texts: list[str], owner: int) -> str:
        said: str = self._link.scatter(texts, owner)
        self._noted.append(len(said))
        return said


@contextmanager
def listening(noted: list[Any], *args: Any, **options: Any) -> Iterator[computation.Computation]:
    """As ``computation.connect``, but what is sent is noted: lengths of messages, and which programs run."""
    with _connect(*args, **options) as joint:
        agree = joint.agree

        def said(what: str, value: str) -> None:
            noted.append([what, value if what == "program" else "as a digest"])
            agree(what, value)

        joint._link, joint.agree = Listening(joint._link, noted), said  # type: ignore[method-assign]
        yield joint


_connect = computation.connect


def inspected(own: Own, folder: Path, hosts: tuple[str, ...]) -> None:
    """An inspection in this process, that notes which steps it does and what it is sent, and keeps its last shares."""
    asked = msgspec.json.decode((folder / "plan.json").read_bytes(), type=Inspection)
    work = own.folder / f"inspection-{asked.digest[:16]}"
    numbers: list[int] = []
    noted: list[Any] = []

    def said(what: str, done: int, total: int) -> None:
        if what == "seeking triggers":
            numbers.append(done)
        if what == "deciding":
            shutil.copy(work / f"state-{done:04}.json", own.folder / "shares.json")

    def delivered(found: object) -> None:
        (own.folder / "seen.json").write_text(json.dumps({"steps": numbers, "sent": noted}))

    computation.connect = partial(listening, noted)
    held = inspections.take(asked, folder / "given", own)
    addresses = computation.Addresses(hosts=hosts)
    inspections.inspect(asked, held, own, work, said, delivered, timeout_s=60, addresses=addresses)


class Ran:
    """Three parties with a plan and what both owners gave."""

    def __init__(self, folder: Path, *, backdoored: bool) -> None:
        self.folder = folder
        self.owns = making.parties(folder / "parties")
        self.asked = making.an_inspection(self.owns, prune=1)
        self.network, self.x = making.a_network(backdoored=backdoored), making.clean_inputs(24)
        self.pad = making.give(self.asked, self.owns, folder / "given", self.network, self.x)
        (folder / "plan.json").write_bytes(msgspec.json.encode(self.asked))

    def run(self, *what: str) -> list[tuple[int, str, str]]:
        return ended([start(own, self.folder, *what) for own in self.owns])

    def work(self, party: int) -> Path:
        return self.owns[party].folder / f"inspection-{self.asked.digest[:16]}"

    def run_here(self) -> None:
        """By three processes of this test, through relays."""
        relays, hosts = relay.between([party.port for party in self.owns[0].parties.parties])
        processes = [
            multiprocessing.get_context("spawn").Process(target=inspected, args=(own, self.folder, at))
            for own, at in zip(self.owns, hosts, strict=True)
        ]
        for process in processes:
            process.start()
        # A party that delivered has done its part, whatever becomes of it while it leaves.
        deadline = time.monotonic() + TIMEOUT_S
        for process, own in zip(processes, self.owns, strict=True):
            while process.is_alive() and not (own.folder / "seen.json").exists():
                assert time.monotonic() < deadline
                time.sleep(0.1)
        for process in processes:
            process.join(child.LEAVE_S)
            process.kill()
            process.join()
        self.received = [
            sum(flow.sent for one in relays for flow in one.flows if party in one.ends and flow.sender != party)
            for party in range(3)
        ]

    def seen(self, party: int, what: str) -> Any:
        return json.loads((self.owns[party].folder / "seen.json").read_bytes())[what]

    def shares(self, party: int) -> Any:
        """After the last step."""
        return json.loads((self.owns[party].folder / "shares.json").read_bytes())["kept"]

    def found(self, party: int) -> Any:
        return inspections.result(self.work(party) / inspections.INSPECTED, inspections.Inspected)

    def clear(self) -> Any:
        from edgeguard.private import inspecting

        return inspecting.in_clear(self.asked, self.network, self.x)


def through_relays(folder: Path, *, backdoored: bool) -> Ran:
    ran = Ran(folder, backdoored=backdoored)
    ran.run_here()
    return ran


@pytest.fixture(scope="module")
def backdoored(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return through_relays(tmp_path_factory.mktemp("backdoored"), backdoored=True)


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    return through_relays(tmp_path_factory.mktemp("clean"), backdoored=False)


def test_a_backdoored_model_is_named_with_its_label_as_in_clear(backdoored: Ran) -> None:
    assert np.flatnonzero(backdoored.clear()[1].flagged).tolist() == [2]
    for party in range(3):
        found = backdoored.found(party)
        assert (found.verdict, found.labels) == ("backdoored", (2,))


def test_a_clean_model_is_left_alone_as_in_clear_and_nothing_of_it_is_kept(clean: Ran) -> None:
    assert not clean.clear()[1].flagged.any()
    for party in range(3):
        found = clean.found(party)
        assert (found.verdict, found.labels, found.padded) == ("no_sign", (), b"")
        assert [path.name for path in clean.work(party).iterdir()] == [inspections.INSPECTED]


@pytest.mark.parametrize("party", range(3))
def test_what_a_party_is_sent_is_as_much_whatever_is_found(backdoored: Ran, clean: Ran, party: int) -> None:
    """The same programs, and beside them as many messages, each as long. Of what programs send the sockets see how
    much: TLS and retries make some of it differ from run to run of one model too."""
    assert backdoored.seen(party, "sent") == clean.seen(party, "sent")
    assert backdoored.received[party] == pytest.approx(clean.received[party], rel=0.1)


def test_the_models_owner_reads_the_trigger_that_the_clear_run_finds(backdoored: Ran) -> None:
    ran = backdoored
    found = ran.found(0)
    (trigger,) = owners.triggers(
        ran.asked, np.frombuffer(found.padded, "<i8"), ran.pad.of(ran.asked, found.given), found.labels
    )
    sizes, decision = ran.clear()
    assert trigger.mask.sum() == pytest.approx(sizes[2], rel=1e-2)
    np.testing.assert_allclose(trigger.mask, decision.trigger.sum(axis=0)[2], atol=1e-2)


def test_all_three_parties_open_the_same(backdoored: Ran) -> None:
    ran = backdoored
    assert len({(ran.work(party) / inspections.INSPECTED).read_bytes() for party in range(3)}) == 1


@pytest.mark.parametrize("party", range(3))
def test_what_a_party_holds_is_as_large_whatever_the_model_and_looks_random(
    backdoored: Ran, clean: Ran, party: int
) -> None:
    """Its shares after twelve steps of two different models. Chi-squared of bytes, as in test_owners.py."""
    sizes = []
    for ran in (backdoored, clean):
        chunks = {
            name: [base64.b64decode(part) for part in json.loads(held["share"])[1:]]
            for name, held in ran.shares(party).items()
        }
        sizes.append({name: [len(chunk) for chunk in parts] for name, parts in chunks.items()})
        content = b"".join(chunk for parts in chunks.values() for chunk in parts)
        counts = np.bincount(np.frombuffer(content, np.uint8), minlength=256)
        assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 400
    assert sizes[0] == sizes[1]


def test_shares_on_disk_are_their_partys_alone(backdoored: Ran) -> None:
    assert {path.stat().st_mode & 0o777 for path in backdoored.work(1).glob("*.json")} == {0o600}


def test_of_what_is_flagged_only_what_a_repair_needs_is_kept(backdoored: Ran) -> None:
    kept = [path.name for path in sorted(backdoored.work(1).iterdir())]
    assert kept == [inspections.INSPECTED, f"state-{backdoored.asked.steps + 1:04}.json"]


@pytest.mark.parametrize(("which", "code", "labels"), [("backdoored", 1, [2]), ("clean", 0, [])])
def test_a_result_is_given_again_and_not_computed_again(
    request: pytest.FixtureRequest, which: str, code: int, labels: list[int]
) -> None:
    """One party alone, with nobody to compute with."""
    ran: Ran = request.getfixturevalue(which)
    ((found, out, err),) = ended([start(ran.owns[0], ran.folder, "inspect")])
    assert found == code, err
    assert json.loads(out.splitlines()[-1]) == {
        "inspection": ran.asked.id,
        "verdict": ran.found(0).verdict,
        "labels": labels,
        "steps": ran.asked.steps,
        "given": ran.found(0).given,
    }


def test_a_run_that_broke_off_while_it_opened_opens_the_same_again(backdoored: Ran) -> None:
    """What a pad hid once is not computed anew: truncation would make it differ."""
    ran = backdoored
    paths = [ran.work(party) / inspections.INSPECTED for party in range(3)]
    before = paths[0].read_bytes()
    for path in paths:
        path.unlink()
    assert [code for code, _, _ in ran.run("inspect")] == [1, 1, 1]
    assert {path.read_bytes() for path in paths} == {before}


def test_parties_repair_what_was_flagged_and_the_owner_gets_the_last_layer(backdoored: Ran) -> None:
    from edgeguard.private import mending

    ran = backdoored
    results = ran.run("repair")
    assert [code for code, _, _ in results] == [0, 0, 0], results
    shown = json.loads(results[0][1].splitlines()[-1])
    assert shown["turned_before"] > 8
    assert (shown["kept"], shown["turned_after"]) == (ran.asked.held_out, 0)
    found = inspections.result(ran.work(2) / inspections.MENDED, inspections.Mended)
    kernel, bias = owners.last_layer(ran.asked, np.frombuffer(found.padded, "<i8"), ran.pad.of(ran.asked, found.given))
    expected = mending.in_clear(ran.asked, ran.network, ran.x, ran.clear()[1].trigger)
    np.testing.assert_allclose(kernel, expected[0], atol=2e-2)
    np.testing.assert_allclose(bias, expected[1], atol=2e-2)
    assert not any(list(ran.work(party).glob("state-*")) for party in range(3))


def test_a_party_that_stops_ends_the_run_and_it_goes_on_from_the_last_shares(tmp_path: Path) -> None:
    ran = Ran(tmp_path, backdoored=True)
    processes = [start(own, ran.folder, "inspect") for own in ran.owns]
    deadline = time.monotonic() + TIMEOUT_S
    while not all((ran.work(party) / "state-0004.json").exists() for party in range(3)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The party with its child, which computes: a power cut takes both.
    os.killpg(processes[2].pid, signal.SIGKILL)
    for code, out, err in ended(processes)[:2]:
        assert (code, out) == (2, "")
        assert "start all three parties again" in err.splitlines()[-1]
    assert not any((ran.work(party) / inspections.INSPECTED).exists() for party in range(3))
    # One party lost what it kept last: all go on from what they have in common.
    (ran.work(0) / "state-0008.json").unlink(missing_ok=True)
    kept = {state.name for state in ran.work(0).glob("state-*.json")}
    for party in (1, 2):
        kept &= {state.name for state in ran.work(party).glob("state-*.json")}
    last = max(int(name[6:10]) for name in kept)
    ran.run_here()
    assert [ran.found(party).labels for party in range(3)] == [(2,)] * 3
    assert {ran.seen(party, "steps")[0] for party in range(3)} == {last + 1}


def test_parties_with_other_shares_do_not_compute(tmp_path: Path) -> None:
    """The owner gave one party a second set: the same inspection, another model."""
    ran = Ran(tmp_path, backdoored=True)
    shutil.rmtree(ran.folder / "other", ignore_errors=True)
    making.give(ran.asked, ran.owns, ran.folder / "other", making.a_network(backdoored=False), ran.x)
    apart = ran.folder / "apart"
    apart.mkdir()
    shutil.copy(ran.folder / "plan.json", apart)
    shutil.copytree(ran.folder / "other", apart / "given")
    folders = [ran.folder, ran.folder, apart]
    results = ended([start(own, folder, "inspect") for own, folder in zip(ran.owns, folders, strict=True)])
    assert [code for code, _, _ in results] == [2, 2, 2]
    # Who hears it first leaves, and may be missed by another before that one has heard it too.
    assert any("what the owners gave; got not the same at all three parties" in err for _, _, err in results)
    assert not any(list(own.folder.glob("inspection-*")) for own in ran.owns)


def test_an_inspection_for_other_parties_is_not_begun(tmp_path: Path) -> None:
    ran = Ran(tmp_path, backdoored=True)
    other = msgspec.structs.replace(ran.asked, parties="1" * 64)
    assert isinstance(other, Inspection)
    (ran.folder / "plan.json").write_bytes(msgspec.json.encode(other))
    ((code, _, err),) = ended([start(ran.owns[0], ran.folder, "inspect")])
    assert (code, "meant for other parties" in err) == (2, True)
