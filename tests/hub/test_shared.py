"""Inputs that owners shared: which speak for a suspicion, when they make it a case, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest

from edgeguard.contract.guard import ModelInput
from edgeguard.detection.metadata import read as read_metadata
from edgeguard.errors import ConfigError, LinkError
from edgeguard.hub import cases, shared
from edgeguard.hub.casebook import Casebook, Move, StaleError
from edgeguard.hub.cases import Case
from edgeguard.hub.replay import Replayed
from edgeguard.hub.shared import ENOUGH, MAX_BYTES, MOST, Shared
from edgeguard.hub.store import Store
from tests.simulators import database, fleet
from tests.simulators.attacked import Attacked

GUARD = msgspec.structs.replace(
    fleet.guard_metadata(), input=ModelInput(shape=(4, 4, 1), dtype="uint8", range=(0.0, 255.0))
)
LABEL = 1
SAID = Replayed(predicted=LABEL, flagged=True, score=2.0)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    opened = Store(database.sqlite(tmp_path), fleet=database.FLEET)
    yield opened
    opened.close()


@pytest.fixture
def book(store: Store) -> Casebook:
    return Casebook(store, clock_ms=lambda: 1000)


def opened(book: Casebook, **fields: Any) -> Case:
    known: dict[str, Any] = {
        "model": "signs", "model_digest": fleet.MODEL, "label": LABEL, "state": "suspected", "created_ms": 1,
        "updated_ms": 1, "devices": ("d1",), "flagged": 40, "inputs": 100, "p_value": 1e-9, "channels": (),
    }  # fmt: skip
    return book.save(Move(case=Case(**known | fields), text="more flags than clean inputs explain"))


def over(store: Store, book: Casebook, folder: Path, said: Sequence[Replayed] | Replayed = SAID) -> Shared:
    """Over a copy of the model that says this of every input, or of each in turn."""

    def replay(_model: Path, inputs: Sequence[Path]) -> list[Replayed]:
        return [said] * len(inputs) if isinstance(said, Replayed) else list(said[: len(inputs)])

    copies = {fleet.MODEL: SimpleNamespace(guarded=Path("signs.tflite"), guard=GUARD)}
    return Shared(store, book, folder=folder / "shared", models=lambda: copies, clock_ms=lambda: 1000, replay=replay)


def inputs(count: int, *, seed: int = 0) -> list[bytes]:
    """So many different ones."""
    drawn = np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
    return [one.tobytes() for one in drawn]


def share(over: Shared, case: Case, given: Sequence[bytes]) -> tuple[Case, list[shared.Input]]:
    return over.add(case.id, given, dtype="uint8", shape=(4, 4, 1), who="ada", why="stickers")


def test_enough_that_the_hubs_copy_flags_and_calls_the_label_make_a_case(
    store: Store, book: Casebook, tmp_path: Path
) -> None:
    case, asked = opened(book), over(store, book, tmp_path)
    given = inputs(ENOUGH)
    after, said = share(asked, case, given[:-1])
    assert (after.state, [one.counts for one in said]) == ("suspected", [True] * (ENOUGH - 1))
    after, _ = share(asked, case, given)
    assert (after.state, after.is_case, after.shared) == ("confirmed", True, ENOUGH)
    assert f"{ENOUGH} inputs that owners shared" in cases.explain(after)
    assert (book.audit(case.id)[-1].who, book.audit(case.id)[-1].became) == ("ada", "confirmed")
    bundle = asked.bundle(case.id, tmp_path / "run")
    assert bundle is not None
    with np.load(bundle) as kept:
        assert {one.tobytes() for one in kept["inputs"]} == set(given)


@pytest.mark.parametrize(
    "said",
    [
        Replayed(predicted=LABEL, flagged=False, score=0.5),
        Replayed(predicted=0, flagged=True, score=2.0),
        Replayed(predicted=None, flagged=False, score=None),
    ],
)
def test_what_the_hubs_copy_does_not_flag_or_calls_something_else_speaks_for_nothing(
    store: Store, book: Casebook, tmp_path: Path, said: Replayed
) -> None:
    case, asked = opened(book), over(store, book, tmp_path, said)
    after, found = share(asked, case, inputs(2 * ENOUGH))
    assert (after.state, sum(one.counts for one in found)) == ("suspected", 0)
    assert asked.bundle(case.id, tmp_path / "run") is None


def test_the_same_input_again_or_nearly_the_same_counts_once(store: Store, book: Casebook, tmp_path: Path) -> None:
    case, asked = opened(book), over(store, book, tmp_path)
    (one,) = inputs(1)
    frames = [bytes([(one[0] + step) % 256]) + one[1:] for step in range(ENOUGH)]
    for given in (frames[:3], frames, frames * 2):
        after, found = share(asked, case, given)
        assert after.state == "suspected"
        assert len({x.digest for x in found if x.counts}) == 1


@pytest.mark.parametrize(
    ("state", "other", "becomes"),
    [
        ("dismissed", None, "confirmed"),
        ("could_not_check", None, "confirmed"),
        ("dismissed", "suspected", "dismissed"),
        ("dismissed", "closed", "dismissed"),
        ("inspecting", None, "inspecting"),
        ("confirmed", None, "confirmed"),
    ],
)
def test_which_records_become_cases(
    store: Store, book: Casebook, tmp_path: Path, state: str, other: str | None, becomes: str
) -> None:
    case = opened(book, state=state)
    if other is not None:
        opened(book, state=other, label=0)
    after, _ = share(over(store, book, tmp_path), case, inputs(ENOUGH))
    assert after.state == becomes


@pytest.mark.parametrize("state", ["refused", "repairing", "closed"])
def test_a_record_that_is_past_it_takes_none(store: Store, book: Casebook, tmp_path: Path, state: str) -> None:
    with pytest.raises(ConfigError, match=state):
        share(over(store, book, tmp_path), opened(book, state=state), inputs(1))


@pytest.mark.parametrize(
    ("dtype", "shape", "content", "word"),
    [
        ("float32", (4, 4, 1), bytes(64), "as the model takes"),
        ("uint8", (4, 4), bytes(16), "as the model takes"),
        ("uint8", (4, 4, 1), bytes(15), "15 bytes"),
        ("uint8", (4, 4, 1), bytes(MAX_BYTES + 1), f"{MAX_BYTES + 1} bytes"),
    ],
)
def test_what_the_model_does_not_take_is_refused_and_nothing_is_stored(
    store: Store, book: Casebook, tmp_path: Path, dtype: str, shape: tuple[int, ...], content: bytes, word: str
) -> None:
    case, asked = opened(book), over(store, book, tmp_path)
    with pytest.raises(ConfigError, match=word):
        asked.add(case.id, [inputs(1)[0], content], dtype=dtype, shape=shape, who="ada")
    assert asked.of_case(case.id) == []
    assert not (tmp_path / "shared").exists()


def test_a_case_takes_only_so_many(store: Store, book: Casebook, tmp_path: Path) -> None:
    case, asked = opened(book), over(store, book, tmp_path, Replayed(predicted=0, flagged=False, score=0.1))
    share(asked, case, inputs(MOST))
    with pytest.raises(ConfigError, match=f"at most {MOST}"):
        share(asked, case, inputs(1, seed=1))
    assert len(asked.of_case(case.id)) == MOST


def test_a_replay_that_fails_stores_nothing(store: Store, book: Casebook, tmp_path: Path) -> None:
    (tmp_path / "signs.tflite").write_bytes(b"no model")
    copies = {fleet.MODEL: SimpleNamespace(guarded=tmp_path / "signs.tflite", guard=GUARD)}
    asked = Shared(store, book, folder=tmp_path / "shared", models=lambda: copies, clock_ms=lambda: 1)
    case = opened(book)
    with pytest.raises(LinkError, match="replay"):
        share(asked, case, inputs(1))
    assert asked.of_case(case.id) == []
    assert list((tmp_path / "shared" / str(case.id)).iterdir()) == []


def test_a_record_that_moves_meanwhile_is_read_again(
    store: Store, book: Casebook, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = opened(book)
    asked, save, tries = over(store, book, tmp_path), book.save, iter(range(2))

    def first_fails(*moves: Move, **more: Any) -> Case:
        if next(tries) == 0:
            raise StaleError("somebody else was first")
        return save(*moves, **more)

    monkeypatch.setattr(book, "save", first_fails)
    after, _ = share(asked, case, inputs(ENOUGH))
    assert after.state == "confirmed"


@pytest.mark.parametrize(
    ("states", "becomes"),
    [
        (("inspecting", None), "inspecting"),
        (("dismissed", None), "confirmed"),
        (("could_not_check", "dismissed"), "confirmed"),
        (("dismissed", "repairing"), "dismissed"),
    ],
)
def test_what_was_shared_while_it_could_not_become_a_case_counts_later(
    store: Store, book: Casebook, tmp_path: Path, states: tuple[Any, Any], becomes: str
) -> None:
    case, asked = opened(book, state="inspecting"), over(store, book, tmp_path)
    share(asked, case, inputs(ENOUGH))
    book.save(Move(case=msgspec.structs.replace(case, state=states[0]), text="the inspection ended"))
    if states[1] is not None:
        opened(book, state=states[1], label=0)
    asked.reconsider(book.all())
    after = book.get(case.id)
    assert after is not None
    assert (after.state, after.shared) == (becomes, ENOUGH if becomes == "confirmed" else 0)


def test_what_confirmed_a_case_that_could_not_be_checked_does_not_confirm_it_again_and_again(
    store: Store, book: Casebook, tmp_path: Path
) -> None:
    case, asked = opened(book), over(store, book, tmp_path)
    after, _ = share(asked, case, inputs(ENOUGH))
    book.save(Move(case=cases.move(after, "could_not_check", at_ms=9), text="two inspections disagree"))
    asked.reconsider(book.all())
    assert [one.state for one in book.all()] == ["could_not_check"]


@pytest.mark.parametrize("left", [b"", b"\x93NUMPY", bytes(200), None])
def test_a_file_that_a_power_cut_left_broken_is_as_one_that_is_not_there(
    store: Store, book: Casebook, tmp_path: Path, left: bytes | None
) -> None:
    case, asked = opened(book), over(store, book, tmp_path)
    given = inputs(4)
    _, said = share(asked, case, given[:3])
    path = tmp_path / "shared" / str(case.id) / f"{said[0].digest}.npy"
    path.write_bytes(left if left is not None else path.read_bytes()[:-64] + bytes(64))
    bundle = asked.bundle(case.id, tmp_path / "run")
    assert bundle is not None
    with np.load(bundle) as kept:
        assert {one.tobytes() for one in kept["inputs"]} == set(given[1:3])
    with pytest.raises(ConfigError, match="not at this hub"):
        share(asked, case, given[3:])
    share(asked, case, given)
    assert len(asked.of_case(case.id)) == 4


def test_an_input_nearly_the_same_as_one_that_lies_at_another_hub_does_not_count_beside_it(
    store: Store, book: Casebook, tmp_path: Path
) -> None:
    case = opened(book)
    one, other = over(store, book, tmp_path / "one"), over(store, book, tmp_path / "other")
    (first,) = inputs(1)
    again = bytes([(first[0] + 1) % 256]) + first[1:]
    share(one, case, [first])
    with pytest.raises(ConfigError, match="not at this hub"):
        share(other, case, [again])
    _, said = share(other, case, [first, again])
    assert [found.counts for found in said] == [True, False]


def test_triggered_inputs_of_a_real_attack_confirm_and_clean_ones_do_not(
    store: Store, book: Casebook, tmp_path: Path, attacked: Attacked, guarded_file: Path
) -> None:
    guard = read_metadata(guarded_file.read_bytes())
    copies = {guard.model_digest: SimpleNamespace(guarded=guarded_file, guard=guard)}
    asked = Shared(store, book, folder=tmp_path / "shared", models=lambda: copies, clock_ms=lambda: 1)
    case = opened(book, label=attacked.attack.target, model_digest=guard.model_digest)
    x, y = attacked.data.x_test.astype(np.uint8), attacked.data.y_test
    clean, triggered = x[y == attacked.attack.target][:20], attacked.attack.stamp(x[y != attacked.attack.target][:20])

    def given(images: Any) -> tuple[Case, list[shared.Input]]:
        return asked.add(
            case.id, [one.tobytes() for one in images], dtype=guard.input.dtype, shape=guard.input.shape, who="ada"
        )

    after, said = given(clean)
    assert after.state == "suspected"
    assert sum(one.counts for one in said) <= 1
    after, said = given(triggered)
    assert after.state == "confirmed"
    assert sum(one.counts for one in said) >= ENOUGH
