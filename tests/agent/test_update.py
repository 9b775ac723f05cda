"""Updates: when a hint leads to a fetch, and a fetch to a check."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from edgeguard.agent.admission import Fetched
from edgeguard.agent.config import UpdateConfig
from edgeguard.agent.inference import Running
from edgeguard.agent.link import Hint
from edgeguard.agent.trial import STARTS, Trial
from edgeguard.agent.update import Progress, Updater, install
from edgeguard.contract.messages import Desired
from edgeguard.errors import ConfigError, TrustError
from edgeguard.release.client import FetchRequest
from firmware_bridge.slots import Slots
from tests.simulators.tiny_hub import wait_until

DIGEST = "a" * 64
CONFIG = UpdateConfig(metadata_url="http://h/metadata", targets_url="http://h/targets", root=Path("/r"), retry_s=10.0)
FETCHED = {
    "state": "fetched",
    "path": "/staging/m",
    "file_digest": DIGEST,
    "sequence": 2,
    "model_digest": DIGEST,
    "guard_digest": DIGEST,
}
ADMITTED = {"state": "admitted"}
REFUSED = {"state": "refused", "reason": "bad signature"}
FAILED = {"state": "failed", "reason": "no route"}


class Fetches:
    """Starts real child processes that answer with the results given, one after the other; the last one for ever."""

    def __init__(self, *results: dict[str, Any] | str) -> None:
        self.results = list(results)
        self.requests: list[FetchRequest] = []
        self.examined: list[Fetched] = []
        self.children: list[subprocess.Popen[bytes]] = []

    def __call__(self, request: FetchRequest) -> subprocess.Popen[bytes]:
        self.requests.append(request)
        return self._start()

    def examine(self, fetched: Fetched) -> subprocess.Popen[bytes]:
        self.examined.append(fetched)
        return self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        result = self.results.pop(0) if len(self.results) > 1 else self.results[0]
        program = result if isinstance(result, str) else f"print({json.dumps(json.dumps(result))})"
        self.children.append(subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE))
        return self.children[-1]


def hint(sequence: int, *, fresh: bool = True, target: str = "m.tflite") -> Hint:
    return Hint(Desired(target=target, sequence=sequence), fresh=fresh)


def take(updater: Updater, one: Hint, now_s: float = 0.0) -> Progress | None:
    return updater.hint(one, running_sequence=1, now_s=now_s)


def step(updater: Updater, now_s: float = 0.0) -> Progress | Fetched | None:
    return updater.step(model_digest=DIGEST, running_sequence=1, now_s=now_s)


def outcome(updater: Updater, now_s: float = 0.0) -> Progress | Fetched:
    """The first thing that the fetch under way comes to."""
    found: list[Progress | Fetched] = []

    def arrived() -> bool:
        progress = step(updater, now_s)
        if progress is not None:
            found.append(progress)
        return bool(found)

    wait_until(arrived, "an outcome")
    return found[0]


@pytest.fixture
def made(tmp_path: Path) -> Iterator[Callable[..., tuple[Updater, Fetches]]]:
    updaters = []

    def make(
        *results: dict[str, Any] | str, config: UpdateConfig | None = CONFIG, **more: Any
    ) -> tuple[Updater, Fetches]:
        fetches = Fetches(*results)
        updaters.append(Updater(config, tmp_path, spawn=fetches, examine=fetches.examine, **more))
        return updaters[-1], fetches

    yield make
    for updater in updaters:
        updater.close()


Made = Callable[..., tuple[Updater, Fetches]]


def test_without_a_hint_nothing_is_fetched(made: Made) -> None:
    updater, fetches = made(FETCHED)
    assert step(updater) is None
    assert fetches.requests == []


def test_a_hint_leads_to_a_fetch_of_what_it_names(made: Made) -> None:
    updater, fetches = made(FETCHED, ADMITTED)
    assert take(updater, hint(2)) is None
    assert step(updater) == Progress(state="fetching", sequence=2)
    assert outcome(updater) == Fetched(
        sequence=2, path=Path("/staging/m"), file_digest=DIGEST, model_digest=DIGEST, guard_digest=DIGEST
    )
    (request,) = fetches.requests
    assert (request.target, request.sequence) == ("m.tflite", 2)
    assert (request.running_model_digest, request.running_sequence) == (DIGEST, 1)
    assert request.max_bytes == CONFIG.max_mib << 20


@pytest.mark.parametrize(("sequence", "state"), [(1, "updated"), (0, "refused")])
def test_a_hint_that_is_not_newer_is_answered_without_a_fetch(made: Made, sequence: int, state: str) -> None:
    updater, fetches = made(FETCHED)
    progress = take(updater, hint(sequence))
    assert progress is not None and progress.state == state
    assert step(updater) is None
    assert fetches.requests == []


def test_a_device_without_updates_refuses_and_says_why(made: Made) -> None:
    updater, fetches = made(FETCHED, config=None)
    progress = take(updater, hint(2))
    assert progress is not None and progress.state == "refused" and "[update]" in progress.reason
    assert step(updater) is None
    assert fetches.requests == []


@pytest.mark.parametrize("result", [REFUSED, FAILED])
def test_an_attempt_that_came_to_nothing_is_told_and_repeated_ever_more_rarely(
    made: Made, result: dict[str, Any]
) -> None:
    updater, fetches = made(result)
    take(updater, hint(2))
    step(updater)
    assert outcome(updater) == Progress(state=result["state"], sequence=2, reason=result["reason"])
    for due in (10.0, 30.0, 70.0):
        count = len(fetches.requests)
        assert step(updater, due - 0.1) is None
        assert len(fetches.requests) == count
        assert step(updater, due) is None, "what the first attempt came to must stay visible"
        assert len(fetches.requests) == count + 1
        assert isinstance(outcome(updater, due), Progress)


def test_after_an_attack_the_genuine_release_gets_through(made: Made) -> None:
    updater, _ = made(REFUSED, FAILED, FETCHED, ADMITTED)
    take(updater, hint(2))
    step(updater)
    outcome(updater)
    step(updater, 10.0)
    outcome(updater, 10.0)
    step(updater, 30.0)
    assert isinstance(outcome(updater, 30.0), Fetched)


def test_only_one_fetch_runs_at_a_time(made: Made) -> None:
    updater, fetches = made("import time; time.sleep(60)")
    take(updater, hint(2))
    for now_s in range(5):
        step(updater, float(now_s))
    take(updater, hint(2))
    step(updater, 5.0)
    assert len(fetches.requests) == 1


def test_a_newer_hint_ends_the_fetch_of_the_older(made: Made) -> None:
    updater, fetches = made("import time; time.sleep(60)", FETCHED)
    take(updater, hint(2))
    step(updater)
    take(updater, hint(3, target="n.tflite"))
    assert fetches.children[0].returncode is not None
    step(updater)
    assert [request.sequence for request in fetches.requests] == [2, 3]


def test_a_hint_that_was_taken_back_ends_its_fetch_and_is_not_tried_again(made: Made) -> None:
    updater, fetches = made("import time; time.sleep(60)")
    take(updater, hint(2))
    step(updater)
    take(updater, Hint(None, fresh=True))
    assert fetches.children[0].returncode is not None
    assert step(updater, 1000.0) is None
    assert len(fetches.requests) == 1


def test_the_brokers_repetition_of_a_hint_does_not_hurry_the_retry_but_the_hubs_does(made: Made) -> None:
    updater, fetches = made(REFUSED)
    take(updater, hint(2))
    step(updater)
    outcome(updater)
    take(updater, hint(2, fresh=False), 1.0)
    step(updater, 1.0)
    assert len(fetches.requests) == 1
    take(updater, hint(2), 2.0)
    step(updater, 2.0)
    assert len(fetches.requests) == 2


@pytest.mark.parametrize("program", ["", "raise SystemExit(3)", "print('nonsense')", 'print(\'{"state":"fetched"}\')'])
def test_a_fetch_that_ends_without_a_whole_result_has_failed(made: Made, program: str) -> None:
    updater, _ = made(program)
    take(updater, hint(2))
    step(updater)
    progress = outcome(updater)
    assert isinstance(progress, Progress) and progress.state == "failed"


def test_a_fetch_that_hangs_is_killed(made: Made) -> None:
    updater, fetches = made("import time; time.sleep(60)")
    take(updater, hint(2))
    step(updater)
    progress = step(updater, CONFIG.timeout_s + 60)
    assert isinstance(progress, Progress) and progress.state == "failed"
    assert fetches.children[0].returncode is not None


def test_a_fetch_that_cannot_be_started_has_failed(tmp_path: Path) -> None:
    def refuse(_request: FetchRequest) -> subprocess.Popen[bytes]:
        raise ConfigError("fetch", got="disk full")

    updater = Updater(CONFIG, tmp_path, spawn=refuse, examine=lambda _: pytest.fail("nothing was fetched"))
    take(updater, hint(2))
    assert step(updater) == Progress(state="failed", sequence=2, reason="fetch; got disk full")


def test_a_settled_release_leaves_only_a_newer_hint_open(made: Made) -> None:
    updater, fetches = made(FETCHED)
    take(updater, hint(2))
    updater.settle(2)
    assert step(updater) is None
    take(updater, hint(3))
    updater.settle(2)
    step(updater)
    assert len(fetches.requests) == 1


def test_a_check_that_was_begun_against_another_model_is_begun_anew(made: Made) -> None:
    updater, fetches = made(FETCHED, "import time; time.sleep(60)", FETCHED, ADMITTED)
    take(updater, hint(2))
    step(updater)
    wait_until(lambda: step(updater) is None and len(fetches.children) == 2, "the check")
    updater.settle(0)
    assert fetches.children[1].returncode is not None
    step(updater)
    assert isinstance(outcome(updater), Fetched)
    assert len(fetches.requests) == len(fetches.examined) == 2


# The check of what was fetched


def test_a_fetched_file_is_checked_before_it_is_given_out(made: Made) -> None:
    updater, fetches = made({**FETCHED, "sidecar_path": "/staging/s", "sidecar_digest": DIGEST}, ADMITTED)
    take(updater, hint(2, target="repaired/m-2.tflite"))
    step(updater)
    found = outcome(updater)
    assert fetches.examined == [found]
    assert isinstance(found, Fetched)
    assert (found.sidecar, found.sidecar_digest, found.repair) == (Path("/staging/s"), DIGEST, True)


def test_what_is_no_repair_is_not_called_one(made: Made) -> None:
    updater, fetches = made(FETCHED, ADMITTED)
    take(updater, hint(2, target="m-2.tflite"))
    step(updater)
    outcome(updater)
    assert [fetched.repair for fetched in fetches.examined] == [False]


CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"


@pytest.mark.parametrize(
    ("answer", "state", "named"),
    [
        ({"state": "refused", "reason": "another class"}, "refused", "another class"),
        ({"state": "failed", "reason": "disk"}, "failed", "disk"),
        (CRASH, "refused", "exit code -11"),
        ("", "failed", "without an answer"),
        ("print('{')", "failed", "without an answer"),
    ],
)
def test_a_file_that_does_not_pass_is_not_given_out_and_tried_again_later(
    made: Made, answer: dict[str, Any] | str, state: str, named: str
) -> None:
    updater, fetches = made(FETCHED, answer)
    take(updater, hint(2))
    step(updater)
    progress = outcome(updater)
    assert isinstance(progress, Progress)
    assert progress.state == state
    assert named in progress.reason
    assert step(updater, 9.0) is None
    assert len(fetches.requests) == 1
    step(updater, 10.0)
    assert len(fetches.requests) == 2


def test_a_check_that_hangs_is_killed(made: Made) -> None:
    updater, fetches = made(FETCHED, "import time; time.sleep(60)")
    take(updater, hint(2))
    step(updater)
    wait_until(lambda: step(updater) is None and len(fetches.children) == 2, "the check")
    progress = step(updater, 1000.0)
    assert isinstance(progress, Progress) and progress.state == "failed" and "check" in progress.reason
    assert fetches.children[1].returncode is not None


def test_a_newer_hint_ends_the_check_of_the_older(made: Made) -> None:
    updater, fetches = made(FETCHED, "import time; time.sleep(60)", FETCHED, ADMITTED)
    take(updater, hint(2))
    step(updater)
    wait_until(lambda: step(updater) is None and len(fetches.children) == 2, "the check")
    take(updater, hint(3))
    assert fetches.children[1].returncode is not None
    step(updater)
    assert isinstance(outcome(updater), Fetched)


# Small links, and what this device remembers


def test_a_download_that_came_further_goes_on_soon_and_one_that_did_not_ever_more_rarely(made: Made) -> None:
    updater, fetches = made({**FAILED, "received": 1000})
    take(updater, hint(2))
    step(updater)
    outcome(updater)
    for due in (10.0, 20.0, 30.0):
        step(updater, due)
        outcome(updater, due)
    assert len(fetches.requests) == 4


def test_a_fetch_knows_the_link_the_board_and_what_ran_here(made: Made) -> None:
    config = UpdateConfig(
        metadata_url="http://h/m", targets_url="http://h/t", root=Path("/r"), max_kib_per_s=20, compress=True
    )
    updater, fetches = made(
        FETCHED, config=config, known=lambda: (7, (DIGEST,)), board="Raspberry Pi 5", runtime="litert"
    )
    take(updater, hint(2))
    step(updater)
    (request,) = fetches.requests
    assert (request.bytes_per_s, request.compress) == (20 * 1024, True)
    assert (request.board, request.runtime) == ("Raspberry Pi 5", "litert")
    assert (request.highest_sequence, request.failed) == (7, (DIGEST,))


def test_a_damaged_memory_of_what_ran_here_is_a_failure(made: Made) -> None:
    def damaged() -> tuple[int, tuple[str, ...]]:
        raise TrustError("model slots", got="nonsense")

    updater, fetches = made(FETCHED, known=damaged)
    take(updater, hint(2))
    assert step(updater) == Progress(state="failed", sequence=2, reason="model slots; got nonsense")
    assert fetches.requests == []


# Putting a checked file in place


@pytest.fixture
def slots(tmp_path: Path) -> Slots:
    return Slots.install(tmp_path / "slots", b"old", sequence=1)


@pytest.fixture
def fetched(tmp_path: Path) -> Fetched:
    """A repair with its sidecar, as the fetch child left them."""
    for name, content in (("model", b"new"), ("sidecar", b"clean inputs")):
        (tmp_path / name).write_bytes(content)
    return Fetched(
        sequence=2,
        path=tmp_path / "model",
        file_digest=sha256(b"new").hexdigest(),
        model_digest=DIGEST,
        guard_digest=DIGEST,
        sidecar=tmp_path / "sidecar",
        sidecar_digest=sha256(b"clean inputs").hexdigest(),
        repair=True,
    )


def put(fetched: Fetched, slots: Slots, trial: Trial, load: Callable[[bytes], Any]) -> Running:
    return install(fetched, slots, trial=trial, load=load, anchor="f" * 64, sidecar_of=lambda _: None)


@pytest.mark.parametrize(("repair", "anchor"), [(True, "f" * 64), (False, None)])
def test_a_repair_keeps_what_it_was_held_against_and_a_release_signed_offline_is_that_itself(
    slots: Slots, fetched: Fetched, tmp_path: Path, repair: bool, anchor: str | None
) -> None:
    put(
        replace(fetched, repair=repair), slots, Trial(tmp_path / "trial.json"), lambda _: SimpleNamespace(metadata=None)
    )
    assert (slots.load(), slots.active().anchor) == (b"new", anchor)


def test_a_sidecar_that_changed_since_it_was_checked_is_refused_and_leaves_the_slots(
    slots: Slots, fetched: Fetched, tmp_path: Path
) -> None:
    (tmp_path / "sidecar").write_bytes(b"others")
    with pytest.raises(TrustError, match="fetched sidecar"):
        put(fetched, slots, Trial(tmp_path / "trial.json"), lambda _: pytest.fail("not loaded"))
    assert (slots.load(), slots.previous()) == (b"old", None)


def test_the_first_start_of_a_model_is_on_disk_before_it_runs(slots: Slots, fetched: Fetched, tmp_path: Path) -> None:
    trial = Trial(tmp_path / "trial.json")
    put(fetched, slots, trial, lambda _: SimpleNamespace(metadata=None))
    for _ in range(STARTS - 1):
        assert not trial.failed(fetched.file_digest)
        trial.begin(fetched.file_digest)
    assert trial.failed(fetched.file_digest)
