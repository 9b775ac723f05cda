"""The sidecar: what it holds, what is refused of a hostile one, and when a self-test passes."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeguard.contract.guard import Calibration, Detector, Environment, GuardMetadata, ModelInput, Tap
from edgeguard.detection import sidecar as sidecars
from edgeguard.detection.guarded import GuardedModel, Inference
from edgeguard.detection.sidecar import MAX_SIDECAR, Sidecar
from edgeguard.detection.verdict import judge
from edgeguard.errors import ConfigError, ModelError, TrustError

if TYPE_CHECKING:
    from tests.simulators.attacked import Attacked

SHAPE = (4, 4, 1)
COUNT = 10
SOUND = Sidecar(
    overlays=np.random.default_rng(0).integers(0, 256, (3, *SHAPE), dtype=np.uint8),
    self_test=np.random.default_rng(1).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8),
    predicted=np.arange(COUNT, dtype=np.int64) % 3,
    scores=np.tile(np.asarray([0.5, 4.0], np.float32), (COUNT, 1)),
    stages={"strip": (0.25, 2.0), "squeezing": (1.5,)},
)
CONTENT = sidecars.encode(SOUND)
MEMBERS = ("overlays.npy", "self_test.npy", "predicted.npy", "scores.npy", "stages.json")


def described(**changes: Any) -> GuardMetadata:
    """The guard metadata of a model that SOUND belongs to."""
    metadata = GuardMetadata(
        model_digest="a" * 64,
        guard_digest="b" * 64,
        detectors=(Detector(name="linf", threshold=2.0), Detector(name="l1", threshold=3.0)),
        taps=(Tap(tensor="t", source_layer="", kind="linf", offset=0, channels=4),),
        class_output=0,
        classes=("a", "b", "c"),
        input=ModelInput(shape=SHAPE, dtype="uint8", range=(0.0, 255.0)),
        fpr=0.01,
        fpr_upper=(0.02, 0.02, 0.02),
        score_to_p=((1.0, 0.01),),
        calibration=Calibration(n_fit=200, n_threshold=200, digest="c" * 64),
        environment=Environment(runtime="litert", version="2", threads=1, cpu="x"),
        sidecar_digest=sidecars.digest(CONTENT),
    )
    return msgspec.structs.replace(metadata, **changes)


def decode(content: bytes, metadata: GuardMetadata | None = None) -> Sidecar:
    """Decode under the digest of this very content: its signer is the attacker."""
    return sidecars.decode(content, digest=sidecars.digest(content), metadata=metadata or described())


def npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def members(content: bytes = CONTENT) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(contents: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive whose checksums are right, whatever its members hold."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    return stream.getvalue()


def same(one: Sidecar, other: Sidecar) -> bool:
    arrays = ("overlays", "self_test", "predicted", "scores")
    equal = all(np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays)
    return equal and dict(one.stages) == dict(other.stages)


# The file


def test_a_sidecar_survives_the_file() -> None:
    assert same(decode(CONTENT), SOUND)


@pytest.mark.parametrize("dtype", ["int8", "int16", "float32"])
def test_inputs_stay_in_the_owners_own_type(dtype: Any) -> None:
    own = replace(SOUND, overlays=SOUND.overlays.astype(dtype), self_test=SOUND.self_test.astype(dtype))
    metadata = described(input=ModelInput(shape=SHAPE, dtype=dtype, range=(-1.0, 1.0)))
    found = decode(sidecars.encode(own), metadata)
    assert found.overlays.dtype == dtype
    assert same(found, own)


def test_a_model_without_classes_has_predictions_of_minus_one() -> None:
    own = replace(SOUND, predicted=np.full(COUNT, -1, dtype=np.int64))
    metadata = described(class_output=None, classes=(), fpr_upper=(0.02,))
    assert same(decode(sidecars.encode(own), metadata), own)
    with pytest.raises(ModelError, match="another model"):
        decode(sidecars.encode(own))


def test_a_sidecar_without_inputs_or_stages_can_be_read() -> None:
    empty = Sidecar(
        overlays=SOUND.overlays[:0],
        self_test=SOUND.self_test[:0],
        predicted=SOUND.predicted[:0],
        scores=SOUND.scores[:0],
        stages={},
    )
    assert same(decode(sidecars.encode(empty)), empty)


def test_the_same_content_gives_the_same_bytes() -> None:
    turned = np.asfortranarray(SOUND.overlays)
    stages: dict[str, Any] = {name: np.asarray(SOUND.stages[name]) for name in ("squeezing", "strip")}
    again = replace(SOUND, overlays=turned, stages=stages)
    assert sidecars.encode(again) == CONTENT


def test_the_same_content_gives_the_same_bytes_on_every_machine_and_at_every_time() -> None:
    assert sidecars.digest(CONTENT) == "f622194682da08ca071008055340b33c5ddb8024c314034edd998b7ae3f547cb"


def test_numpy_reads_the_arrays() -> None:
    with np.load(io.BytesIO(CONTENT), allow_pickle=False) as archive:
        assert np.array_equal(archive["overlays"], SOUND.overlays)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlays": SOUND.overlays.astype(np.float32)}, "of type"),
        ({"overlays": np.zeros((3, 4, 4, 3), np.uint8)}, "of shape"),
        ({"predicted": SOUND.predicted[1:]}, "predictions"),
        ({"predicted": SOUND.predicted.astype(np.int32)}, "predictions"),
        ({"scores": SOUND.scores[:, 0]}, "scores"),
        ({"scores": -SOUND.scores}, "negative"),
        ({"scores": np.full_like(SOUND.scores, np.nan)}, "NaN"),
        ({"scores": np.full_like(SOUND.scores, np.inf)}, "infinite"),
        ({"stages": {"strip": (float("nan"),)}}, "NaN"),
        ({"stages": {"": (1.0,)}}, "stages"),
        ({"stages": {f"stage {n}": (1.0,) for n in range(17)}}, "stages"),
        ({"overlays": np.zeros((MAX_SIDECAR // 16, *SHAPE), np.uint8)}, "fewer inputs"),
    ],
)
def test_parts_that_do_not_fit_are_not_written(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        sidecars.encode(replace(SOUND, **change))


# Where it lies


@pytest.mark.parametrize(
    ("model", "sidecar"),
    [
        ("x.tflite", "x.guard.npz"),
        ("x.guarded.tflite", "x.guard.npz"),
        ("a.b.tflite", "a.b.guard.npz"),
        ("model", "model.guard.npz"),
    ],
)
def test_the_sidecar_lies_beside_the_model(model: str, sidecar: str) -> None:
    assert sidecars.path_beside(Path("models") / model) == Path("models") / sidecar


def test_a_sidecar_beside_the_model_is_read(tmp_path: Path) -> None:
    (tmp_path / "x.guard.npz").write_bytes(CONTENT)
    found = sidecars.read_beside(tmp_path / "x.guarded.tflite", described())
    assert found is not None
    assert same(found, SOUND)


def test_a_sidecar_that_is_not_there_is_not_available(tmp_path: Path) -> None:
    assert sidecars.read_beside(tmp_path / "x.tflite", described()) is None


def test_a_file_that_the_metadata_does_not_name_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "x.guard.npz").write_bytes(b"somebody else's")
    assert sidecars.read_beside(tmp_path / "x.tflite", described(sidecar_digest=None)) is None


def test_a_sidecar_that_cannot_be_read_is_an_error_and_not_absent(tmp_path: Path) -> None:
    (tmp_path / "x.guard.npz").mkdir()
    with pytest.raises(ConfigError, match=r"x\.guard\.npz"):
        sidecars.read_beside(tmp_path / "x.tflite", described())


def test_another_files_content_is_refused_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "x.guard.npz").write_bytes(CONTENT + b"\0")
    with pytest.raises(TrustError, match=r"x\.guard\.npz"):
        sidecars.read_beside(tmp_path / "x.tflite", described())


def test_no_more_of_a_file_is_read_than_a_sidecar_may_have(tmp_path: Path) -> None:
    with (tmp_path / "x.guard.npz").open("wb") as file:
        file.truncate(1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(ModelError, match="more than"):
            sidecars.read_beside(tmp_path / "x.tflite", described())
        assert tracemalloc.get_traced_memory()[1] < 3 * MAX_SIDECAR
    finally:
        tracemalloc.stop()


# Hostile content


@given(content=st.binary(max_size=300))
def test_content_of_another_digest_is_refused_before_it_is_looked_at(content: bytes) -> None:
    with pytest.raises(TrustError, match="SHA-256"):
        sidecars.decode(content, digest=sidecars.digest(CONTENT), metadata=described())


@given(content=st.binary(max_size=300))
def test_random_bytes_are_no_sidecar(content: bytes) -> None:
    directory = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 5, 5, len(content), 0, 0)
    for hostile in (content, b"PK\x03\x04" + content, content + directory):
        with pytest.raises(ModelError):
            decode(hostile)


@given(cut=st.integers(0, len(CONTENT) - 1))
def test_a_truncated_sidecar_is_refused(cut: int) -> None:
    with pytest.raises(ModelError):
        decode(CONTENT[:cut])


@settings(max_examples=300)
@given(flips=st.lists(st.tuples(st.integers(0, len(CONTENT) - 1), st.integers(0, 7)), min_size=1, max_size=6))
def test_flipped_bits_are_refused_or_change_nothing(flips: list[tuple[int, int]]) -> None:
    damaged = bytearray(CONTENT)
    for position, bit in flips:
        damaged[position] ^= 1 << bit
    try:
        found = decode(bytes(damaged))
    except ModelError:
        return
    assert same(found, SOUND)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # NumPy parses what was rewritten
@settings(max_examples=300)
@given(
    name=st.sampled_from(MEMBERS),
    position=st.integers(0, 160),
    value=st.binary(min_size=1, max_size=12),
)
def test_a_member_that_was_rewritten_is_refused_or_sound(name: str, position: int, value: bytes) -> None:
    contents = members()
    member = contents[name]
    contents[name] = member[:position] + value + member[position + len(value) :]
    try:
        found = decode(packed(contents))
    except ModelError:
        return
    assert same(decode(sidecars.encode(found)), found)


@pytest.mark.parametrize(
    ("name", "member"),
    [
        ("overlays.npy", npy(np.array([{}] * 3))),
        ("overlays.npy", npy(np.zeros((3, 5, 5, 1), np.uint8))),
        ("overlays.npy", npy(np.zeros((3, *SHAPE), np.float32))),
        ("overlays.npy", npy(np.asfortranarray(SOUND.overlays))),
        ("overlays.npy", npy(SOUND.overlays).replace(b"NUMPY\x01", b"NUMPY\x09")),
        ("overlays.npy", npy(SOUND.overlays)[:-1]),
        ("overlays.npy", npy(SOUND.overlays) + b"\0"),
        ("overlays.npy", npy(SOUND.overlays).replace(b"(3, 4", b"(9**9")),
        ("overlays.npy", npy(SOUND.overlays).replace(b"(3, 4, 4, 1)", b"(3, -4, -4, 1)").replace(b"  \n", b"\n")),
        ("self_test.npy", npy(SOUND.self_test[1:])),
        ("predicted.npy", npy(np.full(COUNT, 3))),
        ("predicted.npy", npy(np.full(COUNT, -1))),
        ("predicted.npy", npy(SOUND.predicted.astype(">i8"))),
        ("scores.npy", npy(np.full((COUNT, 2), np.nan, np.float32))),
        ("scores.npy", npy(np.zeros((COUNT, 3), np.float32))),
        ("stages.json", b"[]"),
        ("stages.json", b'{"strip": null}'),
        ("stages.json", b'{"strip": [1e999]}'),
        ("stages.json", b'{"strip": []}'),
        ("stages.json", b'{"strip": 1.0}'),
        ("stages.json", b"[" * 100_000),
    ],
)
def test_a_member_of_another_shape_or_type_is_refused(name: str, member: bytes) -> None:
    with pytest.raises(ModelError):
        decode(packed({**members(), name: member}))


@pytest.mark.parametrize("change", ["missing", "further", "renamed", "twice"])
def test_an_archive_of_other_members_is_refused(change: str) -> None:
    contents = members()
    if change in {"missing", "renamed"}:
        member = contents.pop("scores.npy")
    if change == "renamed":
        contents["../scores.npy"] = member
    if change == "further":
        contents["more.npy"] = npy(np.zeros(3))
    hostile = packed(contents)
    if change == "twice":
        hostile = CONTENT.replace(b"predicted.npy", b"self_test.npy")
    with pytest.raises(ModelError, match="members"):
        decode(hostile)


@pytest.mark.parametrize(
    "other",
    [
        ModelInput(shape=SHAPE, dtype="float32", range=(0.0, 1.0)),
        ModelInput(shape=SHAPE, dtype="int8", range=(0.0, 1.0)),
        ModelInput(shape=(4, 4), dtype="uint8", range=(0.0, 255.0)),
        ModelInput(shape=(2, 8, 1), dtype="uint8", range=(0.0, 255.0)),
    ],
)
def test_the_sidecar_of_a_model_with_another_input_is_refused(other: ModelInput) -> None:
    with pytest.raises(ModelError, match="belongs"):
        decode(CONTENT, described(input=other))


def test_a_float_that_is_not_finite_is_refused() -> None:
    metadata = described(input=ModelInput(shape=SHAPE, dtype="float32", range=(0.0, 1.0)))
    inputs = np.full((COUNT, *SHAPE), np.nan, np.float32)
    with pytest.raises(ModelError, match="NaN"):
        decode(packed({**members(), "overlays.npy": npy(inputs), "self_test.npy": npy(inputs)}), metadata)


def compressed_bomb() -> bytes:
    bomb = npy(np.zeros((4 << 20, *SHAPE), np.uint8))
    return packed({**members(), "overlays.npy": bomb}, zipfile.ZIP_DEFLATED)


def lying_bomb() -> bytes:
    """A compressed member under a directory that calls it as small as it is compressed."""
    content = compressed_bomb()
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        small = struct.pack("<L", archive.getinfo("overlays.npy").compress_size)
        large = struct.pack("<L", archive.getinfo("overlays.npy").file_size)
    return content.replace(small + large, small + small)


def nested_bomb() -> bytes:
    """Members that hold the next one with all it holds: five times the file, and no compression."""
    nested, directory = bytes(4 << 20), b""
    total = len(nested) + sum(30 + len(name) for name in MEMBERS)
    for name in reversed(MEMBERS):
        fields = struct.pack("<HHHHHLLLHH", 20, 0, 0, 0, 33, zlib.crc32(nested), len(nested), len(nested), len(name), 0)
        nested = b"PK\x03\x04" + fields + name.encode() + nested
        offset = struct.pack("<HHHLL", 0, 0, 0, 0, total - len(nested))
        directory += b"PK\x01\x02\x14\x03" + fields + offset + name.encode()
    return nested + directory + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 5, 5, len(directory), len(nested), 0)


def directory_bomb(*, zip64: bool) -> bytes:
    """Too many members, under an end record that admits to five."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for number in range(70_000 if zip64 else 50_000):
            archive.writestr(f"{number}", b"")
    content = stream.getvalue()
    start = len(content) - 22
    _, _, _, _, _, size, offset, _ = struct.unpack("<4s4H2LH", content[start:])
    end = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 5, 5, 0xFFFFFFFF if zip64 else size, offset, 0)
    if zip64:
        end = end[:10] + struct.pack("<HLLH", 5, 200, offset, 0)
    return content[:start] + end


@pytest.mark.parametrize(
    "bomb",
    [
        compressed_bomb,
        lying_bomb,
        nested_bomb,
        lambda: directory_bomb(zip64=False),
        lambda: directory_bomb(zip64=True),
        lambda: packed({**members(), "overlays.npy": npy(SOUND.overlays).replace(b"(3,", b"(%d," % 2**40)}),
        lambda: CONTENT + bytes(MAX_SIDECAR),
    ],
    ids=["compressed", "lying", "nested", "directory", "zip64 directory", "array shape", "too long"],
)
def test_a_bomb_is_refused_before_it_takes_memory(bomb: Callable[[], bytes]) -> None:
    hostile = bomb()
    tracemalloc.start()
    try:
        with pytest.raises(ModelError):
            decode(hostile)
        assert tracemalloc.get_traced_memory()[1] < 2 * len(hostile) + (1 << 20)
    finally:
        tracemalloc.stop()


# Self-test


def model_that(
    *, predicts: dict[int, int] | None = None, scores: dict[int, tuple[float, ...]] | None = None
) -> Callable[[np.ndarray], Inference]:
    """A model that answers as SOUND expects, but for the inputs named."""
    rows = {x.tobytes(): row for row, x in enumerate(SOUND.self_test)}

    def infer(x: np.ndarray) -> Inference:
        row = rows[x.tobytes()]
        predicted = (predicts or {}).get(row, int(SOUND.predicted[row]))
        values = (scores or {}).get(row, tuple(float(s) for s in SOUND.scores[row]))
        named = {f"detector {n}": s for n, s in enumerate(values)}
        return Inference((), np.zeros(4, np.float32), judge(predicted, named))

    return infer


def test_a_model_that_answers_as_expected_passes() -> None:
    assert sidecars.self_test(SOUND, model_that()) == sidecars.SelfTest(passed=True, checked=COUNT, wrong=())


@pytest.mark.parametrize(("others", "passed"), [(1, True), (2, False)])
def test_one_prediction_in_ten_may_differ(others: int, passed: bool) -> None:
    outcome = sidecars.self_test(SOUND, model_that(predicts=dict.fromkeys(range(others), 7)))
    assert outcome.passed == passed
    assert outcome.wrong[0] == "input 0: predicted 7, expected 0"
    assert len(outcome.wrong) == others


@pytest.mark.parametrize(
    ("scores", "agrees"),
    [
        ((0.74, 4.0), True),
        ((0.26, 4.0), True),
        ((0.76, 4.0), False),
        ((0.24, 4.0), False),
        ((0.5, 4.9), True),
        ((0.5, 5.1), False),
        ((0.5, 2.9), False),
    ],
)
def test_a_score_may_differ_by_a_quarter_absolute_or_relative(scores: tuple[float, float], agrees: bool) -> None:
    outcome = sidecars.self_test(SOUND, model_that(scores=dict.fromkeys(range(COUNT), scores)))
    assert outcome.passed == agrees
    assert bool(outcome.wrong) != agrees


@pytest.mark.parametrize(("others", "passed"), [(2, True), (3, False)])
def test_one_score_in_ten_may_be_out_of_range(others: int, passed: bool) -> None:
    assert sidecars.self_test(SOUND, model_that(scores=dict.fromkeys(range(others), (0.5, 9.0)))).passed == passed


@pytest.mark.parametrize("score", [float("nan"), float("inf")])
def test_a_single_score_that_is_no_number_fails_the_self_test(score: float) -> None:
    outcome = sidecars.self_test(SOUND, model_that(scores={4: (0.5, score)}))
    assert not outcome.passed
    assert outcome.wrong == (f"input 4: scores 0.5 {score}, expected 0.5 4",)


@pytest.mark.parametrize("scores", [(), (4.0,), (0.5, 4.0, 0.1)])
def test_a_model_with_other_detectors_fails(scores: tuple[float, ...]) -> None:
    outcome = sidecars.self_test(SOUND, model_that(scores=dict.fromkeys(range(COUNT), scores)))
    assert not outcome.passed
    assert outcome.wrong[0] == f"input 0: {len(scores)} scores, expected 2"


def test_a_model_that_refuses_the_inputs_fails() -> None:
    def refuse(_: np.ndarray) -> Inference:
        raise ModelError("model file", got="refused to run")

    outcome = sidecars.self_test(SOUND, refuse)
    assert not outcome.passed
    assert len(outcome.wrong) == COUNT


def test_a_self_test_of_nothing_is_not_passed() -> None:
    empty = replace(SOUND, self_test=SOUND.self_test[:0], predicted=SOUND.predicted[:0], scores=SOUND.scores[:0])
    outcome = sidecars.self_test(empty, model_that())
    assert not outcome.passed
    assert outcome.checked == 0
    assert outcome.wrong


def test_a_real_model_passes_its_own_self_test_and_fails_on_inputs_of_another_kind(attacked: Attacked) -> None:
    model = GuardedModel.load(attacked.conversion.guarded)
    inputs = attacked.data.x_test[:16].astype(np.uint8)
    answers = [model.infer(x).verdict for x in inputs]
    own = Sidecar(
        overlays=inputs[:4],
        self_test=inputs,
        predicted=np.asarray([v.predicted for v in answers], dtype=np.int64),
        scores=np.asarray([list(v.scores.values()) for v in answers], dtype=np.float32),
        stages={},
    )
    read = decode(sidecars.encode(own), model.metadata)
    assert sidecars.self_test(read, model.infer).passed
    assert not sidecars.self_test(replace(read, self_test=attacked.attack.stamp(inputs)), model.infer).passed
