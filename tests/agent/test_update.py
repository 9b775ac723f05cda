"""Updates: when a hint leads to a fetch, and what may replace a running model."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from edgeguard.agent.config import UpdateConfig
from edgeguard.agent.link import Hint
from edgeguard.agent.update import Fetched, Progress, Updater, admit
from edgeguard.contract.guard import GuardMetadata
from edgeguard.contract.messages import Desired
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection.guarded import GuardedModel
from edgeguard.errors import ConfigError, ModelError, TrustError
from edgeguard.release.client import FetchRequest
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
REFUSED = {"state": "refused", "reason": "bad signature"}
FAILED = {"state": "failed", "reason": "no route"}


class Fetches:
    """Starts real child processes that answer with the results given, one after the other; the last one for ever."""

    def __init__(self, *results: dict[str, Any] | str) -> None:
        self.results = list(results)
        self.requests: list[FetchRequest] = []
        self.children: list[subprocess.Popen[bytes]] = []

    def __call__(self, request: FetchRequest) -> subprocess.Popen[bytes]:
        self.requests.append(request)
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

    def make(*results: dict[str, Any] | str, config: UpdateConfig | None = CONFIG) -> tuple[Updater, Fetches]:
        fetches = Fetches(*results)
        updaters.append(Updater(config, tmp_path, spawn=fetches))
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
    updater, fetches = made(FETCHED)
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
    updater, _ = made(REFUSED, FAILED, FETCHED)
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

    updater = Updater(CONFIG, tmp_path, spawn=refuse)
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


# What may replace a running model


def described(path: Path, **changes: str) -> Fetched:
    content, metadata = path.read_bytes(), metadata_reader.read(path.read_bytes())
    known = {
        "file_digest": sha256(content).hexdigest(),
        "model_digest": metadata.model_digest,
        "guard_digest": metadata.guard_digest,
    }
    return Fetched(sequence=2, path=path, **{**known, **changes})


def test_a_model_of_the_same_interface_is_admitted(digit_models: tuple[Path, Path]) -> None:
    old, new = digit_models
    running = GuardedModel.load(old.read_bytes())
    admitted = admit(new.read_bytes(), described(new), running, load=GuardedModel.load)
    assert admitted.metadata.model_digest == metadata_reader.read(new.read_bytes()).model_digest


@pytest.mark.parametrize("digest", ["file_digest", "model_digest", "guard_digest"])
def test_a_file_that_is_not_what_its_signer_said_is_refused(digit_models: tuple[Path, Path], digest: str) -> None:
    old, new = digit_models
    running = GuardedModel.load(old.read_bytes())
    with pytest.raises(TrustError):
        admit(new.read_bytes(), described(new, **{digest: "f" * 64}), running, load=GuardedModel.load)


def test_a_signed_file_that_is_no_model_is_refused(digit_models: tuple[Path, Path], tmp_path: Path) -> None:
    running = GuardedModel.load(digit_models[0].read_bytes())
    fetched = Fetched(
        sequence=2,
        path=tmp_path,
        file_digest=sha256(b"no model").hexdigest(),
        model_digest=DIGEST,
        guard_digest=DIGEST,
    )
    with pytest.raises(ModelError):
        admit(b"no model", fetched, running, load=GuardedModel.load)


class Differing:
    """A running model that differs from its file in one thing that programs rely on."""

    def __init__(self, model: GuardedModel, interface: tuple[object, ...] | None, **metadata: Any) -> None:
        import msgspec

        self._interface = interface or model.interface()
        self.metadata: GuardMetadata = msgspec.structs.replace(model.metadata, **metadata)

    def interface(self) -> tuple[object, ...]:
        return self._interface


@pytest.mark.parametrize(
    ("interface", "metadata", "named"),
    [
        (((8, 8, 1), "uint8", (((1, 11), "int8"),)), {}, "outputs"),
        (((9, 9, 1), "uint8", (((1, 10), "int8"),)), {}, "input"),
        (None, {"classes": tuple("abcdefghij")}, "classes"),
        (None, {"class_output": None}, "class output"),
    ],
)
def test_a_model_that_takes_or_gives_something_else_is_refused(
    digit_models: tuple[Path, Path], interface: tuple[object, ...] | None, metadata: dict[str, Any], named: str
) -> None:
    old, new = digit_models
    running: Any = Differing(GuardedModel.load(old.read_bytes()), interface, **metadata)
    with pytest.raises(ModelError, match=named):
        admit(new.read_bytes(), described(new), running, load=GuardedModel.load)
