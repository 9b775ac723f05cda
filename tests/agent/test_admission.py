"""What may replace a running model: the last checks, each with the one thing that is wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeguard.agent.admission import Fetched, Question, admit, answer, ask, read_answer
from edgeguard.detection import sidecar
from edgeguard.detection.guarded import GuardedModel
from edgeguard.detection.sidecar import Sidecar
from edgeguard.errors import ModelError, TrustError

DIGEST = "a" * 64


@dataclass(frozen=True)
class Update:
    """A running model with its sidecar, and one that would replace it with its own."""

    running: bytes
    held: Sidecar
    held_bytes: bytes
    content: bytes
    brought: bytes
    fetched: Fetched

    def admit(self, **changes: Any) -> GuardedModel:
        known: dict[str, Any] = {"held": self.held, "brought": self.brought, "fetched": self.fetched, **changes}
        running = known.pop("running", None) or GuardedModel.load(self.running)
        content = known.pop("content", self.content)
        return admit(content, known.pop("fetched"), running, load=GuardedModel.load, **known)


@pytest.fixture(scope="session")
def update(models_with_sidecars: tuple[Path, Path]) -> Update:
    """A repair: another model of the same data, with the sidecar that convert makes of each."""
    old, new = models_with_sidecars
    both = [sidecar.path_beside(path).read_bytes() for path in (old, new)]
    running, repaired = (GuardedModel.load(path.read_bytes()) for path in (old, new))
    fetched = Fetched(
        sequence=2,
        path=new,
        file_digest=sha256(new.read_bytes()).hexdigest(),
        model_digest=repaired.metadata.model_digest,
        guard_digest=repaired.metadata.guard_digest,
        sidecar=sidecar.path_beside(new),
        sidecar_digest=repaired.metadata.sidecar_digest,
        repair=True,
    )
    held = sidecar.decode(both[0], digest=str(running.metadata.sidecar_digest), metadata=running.metadata)
    return Update(old.read_bytes(), held, both[0], new.read_bytes(), both[1], fetched)


def test_a_repair_that_fits_and_agrees_is_admitted(update: Update) -> None:
    assert update.admit().metadata.model_digest == update.fetched.model_digest


@pytest.mark.parametrize("digest", ["file_digest", "model_digest", "guard_digest"])
def test_a_file_that_is_not_what_its_signer_said_is_refused(update: Update, digest: str) -> None:
    with pytest.raises(TrustError):
        changed: dict[str, Any] = {digest: "f" * 64}
        update.admit(fetched=replace(update.fetched, **changed))


def test_a_signed_file_that_is_no_model_is_refused(update: Update) -> None:
    fetched = replace(update.fetched, file_digest=sha256(b"no model").hexdigest())
    with pytest.raises(ModelError):
        update.admit(content=b"no model", fetched=fetched)


class Differing:
    """A running model that differs from its file in one thing that programs rely on."""

    def __init__(self, model: GuardedModel, interface: tuple[object, ...] | None = None, **metadata: Any) -> None:
        self._model = model
        self._interface = interface or model.interface()
        self.metadata = msgspec.structs.replace(model.metadata, **metadata)

    def interface(self) -> tuple[object, ...]:
        return self._interface

    def infer(self, x: Any) -> Any:
        return self._model.infer(x)


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
    update: Update, interface: tuple[object, ...] | None, metadata: dict[str, Any], named: str
) -> None:
    running = Differing(GuardedModel.load(update.running), interface, **metadata)
    with pytest.raises(ModelError, match=named):
        update.admit(running=running)


def differing(held: Sidecar, share: float) -> Sidecar:
    """What an anchor says that knows another class of some of its inputs."""
    count = round(share * len(held.predicted))
    return replace(held, predicted=np.concatenate([(held.predicted[:count] + 1) % 10, held.predicted[count:]]))


@pytest.mark.parametrize("repair", [True, False])
@pytest.mark.parametrize(("share", "taken"), [(0.0, True), (0.3, False), (1.0, False)])
def test_a_release_must_say_what_the_last_one_that_was_signed_offline_says(
    update: Update, share: float, taken: bool, repair: bool
) -> None:
    held = differing(update.held, share)
    fetched = replace(update.fetched, repair=repair)
    if taken:
        update.admit(held=held, fetched=fetched)
        return
    with pytest.raises(TrustError, match="known class"):
        update.admit(held=held, fetched=fetched)


@pytest.mark.parametrize("missing", ["held", "brought"])
def test_what_cannot_be_checked_is_refused_in_a_repair_and_taken_from_who_signs_offline(
    update: Update, missing: str
) -> None:
    fetched = update.fetched if missing == "held" else replace(update.fetched, sidecar=None, sidecar_digest=None)
    less: dict[str, None] = {missing: None}
    with pytest.raises(TrustError, match="repaired model"):
        update.admit(**less, fetched=fetched)
    update.admit(**less, fetched=replace(fetched, repair=False))


@pytest.mark.parametrize(("rows", "count"), [(range(9), 9), ([0] * 20, 1), ([*range(9), *range(9)], 9)])
def test_a_handful_of_different_self_test_inputs_is_not_enough(update: Update, rows: Sequence[int], count: int) -> None:
    rows, held = list(rows), update.held
    few = replace(held, self_test=held.self_test[rows], predicted=held.predicted[rows], scores=held.scores[rows])
    with pytest.raises(TrustError, match=f"{count} different self-test inputs"):
        update.admit(held=few)


def test_a_sidecar_of_another_model_is_refused(update: Update) -> None:
    with pytest.raises(TrustError, match=f"fetched sidecar.*{update.fetched.sidecar_digest}"):
        update.admit(brought=update.held_bytes)
    with pytest.raises(TrustError, match="as the model's guard metadata says"):
        update.admit(
            brought=update.held_bytes,
            fetched=replace(update.fetched, sidecar_digest=sidecar.digest(update.held_bytes)),
        )


class Off:
    """A loaded model whose scores are not those that its sidecar knows."""

    def __init__(self, model: GuardedModel) -> None:
        self._model = model
        self.metadata, self.interface = model.metadata, model.interface

    def infer(self, x: Any) -> Any:
        found = self._model.infer(x)
        scores = {name: score * 3 + 1 for name, score in found.verdict.scores.items()}
        return msgspec.structs.replace(found, verdict=msgspec.structs.replace(found.verdict, scores=scores))


def test_a_model_whose_scores_are_out_of_range_fails_its_self_test(update: Update) -> None:
    load: Callable[[bytes], Any] = lambda content: Off(GuardedModel.load(content))  # noqa: E731
    running = GuardedModel.load(update.running)
    with pytest.raises(ModelError, match="self-test"):
        admit(update.content, update.fetched, running, load=load, held=update.held, brought=update.brought)


# --- the child ------------------------------------------------------------------------------------


@pytest.fixture
def question(update: Update, models_with_sidecars: tuple[Path, Path]) -> Question:
    fetched = update.fetched
    return Question(
        fetched=str(fetched.path),
        file_digest=fetched.file_digest,
        model_digest=fetched.model_digest,
        guard_digest=fetched.guard_digest,
        sidecar=str(fetched.sidecar),
        sidecar_digest=fetched.sidecar_digest,
        repair=True,
        running=str(models_with_sidecars[0]),
        running_digest=sha256(update.running).hexdigest(),
        held=("/nowhere", str(sidecar.path_beside(models_with_sidecars[0]))),
        runtime="litert",
        threads=1,
    )


def test_the_child_admits_what_fits(question: Question, tmp_path: Path) -> None:
    child = ask(question, tmp_path / "folder" / "question.json")
    child.wait(60)
    found = read_answer(child)
    assert found is not None
    assert (found.state, found.reason) == ("admitted", "")


@pytest.mark.parametrize(
    ("changes", "state", "named"),
    [
        ({"guard_digest": DIGEST}, "refused", "guard_digest"),
        ({"held": ()}, "refused", "0 different self-test inputs"),
        ({"anchor": DIGEST}, "refused", "0 different self-test inputs"),
        ({"sidecar": None, "sidecar_digest": None}, "refused", "no sidecar"),
        ({"sidecar_digest": DIGEST}, "refused", "fetched sidecar; got SHA-256"),
        ({"fetched": "/nowhere"}, "failed", "/nowhere"),
        ({"running_digest": DIGEST}, "failed", "changed"),
    ],
)
def test_the_child_says_what_is_wrong(question: Question, changes: dict[str, Any], state: str, named: str) -> None:
    found = answer(msgspec.structs.replace(question, **changes))
    assert found.state == state
    assert named in found.reason


@pytest.mark.parametrize(("share", "state"), [(0.0, "admitted"), (0.3, "refused")])
def test_a_repair_of_a_repair_is_held_against_the_sidecar_of_what_was_signed_offline_with_whatever_guard(
    question: Question, update: Update, tmp_path: Path, share: float, state: str
) -> None:
    scores = np.ones((len(update.held.self_test), 7), np.float32)
    content = sidecar.encode(replace(differing(update.held, share), scores=scores))
    path = tmp_path / "anchor"
    path.write_bytes(content)
    held = (*question.held, str(path))
    found = answer(msgspec.structs.replace(question, anchor=sidecar.digest(content), held=held))
    assert found.state == state, found.reason


def test_a_question_that_cannot_be_read_is_a_failure(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "edgeguard.agent.admission", str(tmp_path / "none")], stdout=subprocess.PIPE
    )
    child.wait(60)
    found = read_answer(child)
    assert found is not None and found.state == "failed" and "question" in found.reason
