"""The sidecar ``<model>.guard.npz``: what a guarded model's dearer stages and its self-test need, in one optional file.

Rules enforced here:

* its SHA-256, as the guard metadata names it, is compared before a byte of it is looked at;
* then it is still hostile: directory and sizes are checked before anything is unpacked, members are stored and never
  compressed, no pickles, and every array has the shape and type that the metadata says and is finite;
* the same content gives the same bytes: members in a fixed order, no clock, no compressor;
* a sidecar that is not there is "not available", never an error; a self-test of nothing is not passed.
"""

from __future__ import annotations

import hashlib
import io
import math
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec import Meta

from edgeguard.contract.guard import GuardMetadata
from edgeguard.errors import ConfigError, ModelError, TrustError

if TYPE_CHECKING:
    from edgeguard.detection.guarded import Inference

Array = npt.NDArray[Any]

SUFFIX = ".guard.npz"
MAX_SIDECAR = 16 << 20
MIN_AGREEMENT = 0.9
SCORE_TOLERANCE = 0.25

_STAGES = "stages.json"
_MEMBERS = ("overlays.npy", "self_test.npy", "predicted.npy", "scores.npy", _STAGES)
_INPUT_TYPES = ("uint8", "int8", "int16", "float32")
_EPOCH = (1980, 1, 1, 0, 0, 0)
_UNIX = 3
_END = struct.Struct("<4s4H2LH")  # end of central directory, APPNOTE.TXT 4.3.16
_END_MARK, _ZIP64_MARK, _ZIP64_SIZE = b"PK\x05\x06", b"PK\x06\x07", 20
_MAX_DIRECTORY = 1024

# NumPy documents these functions but gives them no types.
_npy: Any = np.lib.format
_Stages = Annotated[
    dict[
        Annotated[str, Meta(min_length=1, max_length=64)],
        Annotated[tuple[float, ...], Meta(min_length=1, max_length=256)],
    ],
    Meta(max_length=16),
]


@dataclass(frozen=True, kw_only=True)
class Sidecar:
    """Clean inputs in the owner's own type, and what the model said of some of them.

    ``overlays`` ``[n, *input shape]`` are laid over inputs by the cascade. With ``self_test`` ``[m, *input shape]`` go
    ``predicted`` ``[m]`` (class indices, -1 for a model without classes) and ``scores`` ``[m, detectors]`` (each over
    its threshold, in the order of the metadata's detectors). ``stages`` are the numbers that the dearer stages were
    calibrated to, as :mod:`edgeguard.detection.cascade` names them; empty where none was calibrated.
    """

    overlays: Array
    self_test: Array
    predicted: npt.NDArray[np.int64]
    scores: npt.NDArray[np.float32]
    stages: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class SelfTest:
    """Outcome of a self-test: how many inputs were run, and a line for each thing that was not as expected."""

    passed: bool
    checked: int
    wrong: tuple[str, ...]


def digest(content: bytes) -> str:
    """SHA-256 of a sidecar's bytes, as ``sidecar_digest`` in the guard metadata."""
    return hashlib.sha256(content).hexdigest()


def path_beside(model: Path) -> Path:
    """Where the sidecar of a model file lies: ``x.guard.npz`` beside ``x.tflite`` or ``x.guarded.tflite``."""
    return model.with_name(model.name.removesuffix(".tflite").removesuffix(".guarded") + SUFFIX)


def encode(sidecar: Sidecar) -> bytes:
    """The file. The same content gives the same bytes, wherever it is made.

    Raises:
        ModelError: the parts do not fit each other, or are larger than ``MAX_SIDECAR`` bytes together.
    """
    stages = {name: tuple(float(n) for n in sidecar.stages[name]) for name in sorted(sidecar.stages)}
    _check_parts(replace(sidecar, stages=stages), "sidecar")
    arrays = (sidecar.overlays, sidecar.self_test, sidecar.predicted, sidecar.scores)
    members = (*(_npy_bytes(array) for array in arrays), msgspec.json.encode(stages))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, member in zip(_MEMBERS, members, strict=True):
            entry = zipfile.ZipInfo(name, _EPOCH)
            entry.create_system, entry.external_attr = _UNIX, 0o644 << 16
            archive.writestr(entry, member)
    content = stream.getvalue()
    _check_size(content, "sidecar")
    return content


def decode(
    content: bytes, *, digest: str, metadata: GuardMetadata, name: str = "sidecar", any_guard: bool = False
) -> Sidecar:
    """Check and read a sidecar. Its arrays are read-only views of ``content``'s copy.

    Args:
        content: the whole file.
        digest: what its SHA-256 must be.
        metadata: of the guarded model that it belongs to.
        name: what errors call it.
        any_guard: it may be of another guard, with other detectors, over a model of the same input and classes.

    Raises:
        TrustError: other content than the digest's.
        ModelError: not a sidecar, damaged, too large, or of another model.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != digest:
        raise TrustError(
            name,
            got=f"SHA-256 {found}",
            expected=f"{digest}, as the model's guard metadata says",
            do="fetch the model and its sidecar again",
        )
    _check_size(content, name)
    _check_directory(content, name)
    shape, kind = metadata.input.shape, metadata.input.dtype
    try:
        members = _members(content)
        sidecar = Sidecar(
            overlays=_array(members["overlays.npy"], kind, shape),
            self_test=_array(members["self_test.npy"], kind, shape),
            predicted=_array(members["predicted.npy"], "int64", ()),
            scores=_array(members["scores.npy"], "float32", None if any_guard else (len(metadata.detectors),)),
            stages=msgspec.json.decode(members[_STAGES], type=_Stages),
        )
    except Exception as error:  # hostile bytes make zipfile, NumPy and the JSON parser raise whatever they like
        raise _unfit(name, str(error)[:200] or type(error).__name__, "the archive that convert wrote") from error
    _check_parts(sidecar, name)
    _check_predicted(sidecar, metadata, name)
    return sidecar


def read_beside(model: Path, metadata: GuardMetadata) -> Sidecar | None:
    """The sidecar beside a model file; None when the model has none or the file is not there.

    Raises:
        ConfigError: it is there but cannot be read.
        TrustError, ModelError: as :func:`decode`.
    """
    if metadata.sidecar_digest is None:
        return None
    path = path_beside(model)
    try:
        with path.open("rb") as file:
            content = file.read(MAX_SIDECAR + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"sidecar {path}", got=error.strerror, expected="a file that can be read") from error
    name = f"sidecar {path}"
    _check_size(content, name)  # a file that was read in part has another digest
    return decode(content, digest=metadata.sidecar_digest, metadata=metadata, name=name)


def self_test(
    sidecar: Sidecar,
    infer: Callable[[Array], Inference],
    *,
    min_agreement: float = MIN_AGREEMENT,
    score_tolerance: float = SCORE_TOLERANCE,
) -> SelfTest:
    """Run the known inputs and compare with what is known of them.

    Int8 kernels differ by a few steps between runtimes, so not everything need agree: of the predictions, and of the
    scores, at least the share ``min_agreement``. A score s agrees with the expected e when
    ``|s - e| <= score_tolerance * max(1, e)``. Every score must be finite.

    Args:
        sidecar: as :func:`decode` returned it, for this very model.
        infer: runs one input; an input that it refuses with ModelError agrees in nothing.
        min_agreement: a share, 0 to 1.
        score_tolerance: absolute below an expected score of 1, relative above.
    """
    count, detectors = sidecar.scores.shape
    if not count or not detectors:
        return SelfTest(passed=False, checked=0, wrong=("no self-test inputs",))
    right_classes, right_scores, all_finite = 0, 0, True
    wrong: list[str] = []
    for index, (x, label, expected) in enumerate(
        zip(sidecar.self_test, sidecar.predicted.tolist(), sidecar.scores, strict=True)
    ):
        try:
            verdict = infer(x).verdict
        except ModelError as error:
            wrong.append(f"input {index}: {error}")
            continue
        predicted = -1 if verdict.predicted is None else verdict.predicted
        scores = np.fromiter(verdict.scores.values(), np.float64)
        right_classes += predicted == label
        if predicted != label:
            wrong.append(f"input {index}: predicted {predicted}, expected {label}")
        if len(scores) != detectors:
            wrong.append(f"input {index}: {len(scores)} scores, expected {detectors}")
            continue
        agree = np.abs(scores - expected) <= score_tolerance * np.maximum(1.0, expected)
        right_scores += int(agree.sum())
        all_finite &= bool(np.isfinite(scores).all())
        if not agree.all():
            wrong.append(f"input {index}: scores {_listed(scores)}, expected {_listed(expected)}")
    passed = (
        all_finite and right_classes / count >= min_agreement and right_scores / (count * detectors) >= min_agreement
    )
    return SelfTest(passed=passed, checked=count, wrong=tuple(wrong))


def _listed(scores: Array) -> str:
    return " ".join(f"{score:.3g}" for score in scores)


def _npy_bytes(array: Array) -> bytes:
    stream = io.BytesIO()
    little = array.dtype.newbyteorder("<")
    _npy.write_array(stream, np.ascontiguousarray(array, dtype=little), version=(1, 0), allow_pickle=False)
    return stream.getvalue()


def _check_directory(content: bytes, name: str) -> None:
    """Refuse an archive whose directory is not that of a sidecar, before ``zipfile`` builds an object per entry."""
    tail = content[-_END.size :]
    if len(tail) < _END.size or not tail.startswith(_END_MARK):
        raise _unfit(name, "no zip archive, or one cut short", "an npz archive")
    size = _END.unpack(tail)[5]
    zip64 = content[-_END.size - _ZIP64_SIZE : -_END.size].startswith(_ZIP64_MARK)
    if size > _MAX_DIRECTORY or zip64:
        raise _unfit(name, f"a directory of {size} bytes", f"at most {_MAX_DIRECTORY}, for the members of a sidecar")


def _members(content: bytes) -> dict[str, bytes]:
    """The members' bytes, checksums verified. Raises anything on hostile content, but never unpacks more than it is."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        entries = archive.infolist()
        if sorted(entry.filename for entry in entries) != sorted(_MEMBERS):
            raise ValueError(f"members {', '.join(repr(entry.filename) for entry in entries)}")
        for entry in entries:
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"a compressed member {entry.filename}")
        if sum(entry.file_size for entry in entries) > len(content):
            raise ValueError("members larger than the file")
        return {entry.filename: archive.read(entry) for entry in entries}


def _array(raw: bytes, kind: str, row: tuple[int, ...] | None) -> Array:
    """The array ``[n, *row]`` in a .npy member, any row where that is None. Raises anything on hostile content."""
    stream = io.BytesIO(raw)
    if _npy.read_magic(stream) != (1, 0):
        raise ValueError("an array file of another version than 1.0")
    shape, fortran, dtype = _npy.read_array_header_1_0(stream)
    expected = np.dtype(kind).newbyteorder("<")
    if dtype != expected or fortran or (row is not None and shape[1:] != row):
        wanted = "".join(f", {n}" for n in row or ())
        raise ValueError(f"an array {dtype}{list(shape)} where {kind}[n{wanted}] belongs")
    return np.frombuffer(raw, dtype, offset=stream.tell()).reshape(shape)


def _check_parts(sidecar: Sidecar, name: str) -> None:
    """Raise ModelError unless the parts fit each other and every number is finite."""
    overlays, tested = sidecar.overlays, sidecar.self_test
    if overlays.dtype.name not in _INPUT_TYPES or overlays.dtype != tested.dtype:
        raise _unfit(name, f"inputs of type {overlays.dtype} and {tested.dtype}", f"one of {', '.join(_INPUT_TYPES)}")
    if overlays.ndim < 2 or overlays.shape[1:] != tested.shape[1:]:
        raise _unfit(name, f"inputs of shape {list(overlays.shape)} and {list(tested.shape)}", "[n, ...] and [m, ...]")
    count, predicted, scores = len(tested), sidecar.predicted, sidecar.scores
    if predicted.shape != (count,) or predicted.dtype != np.int64:
        raise _unfit(name, f"predictions {predicted.dtype}{list(predicted.shape)}", f"int64[{count}]")
    if scores.ndim != 2 or len(scores) != count or scores.dtype != np.float32:
        raise _unfit(name, f"scores {scores.dtype}{list(scores.shape)}", f"float32[{count}, detectors]")
    if not (scores >= 0).all():
        raise _unfit(name, "scores that are negative or NaN", "scores of at least 0")
    if not all(np.isfinite(array).all() for array in (overlays, tested, scores)):
        raise _unfit(name, "NaN or infinite values", "finite numbers")
    try:
        stages = msgspec.convert(dict(sidecar.stages), type=_Stages)
    except msgspec.ValidationError as error:
        raise _unfit(name, f"stages: {error}", "names with their numbers") from error
    if not all(math.isfinite(number) for numbers in stages.values() for number in numbers):
        raise _unfit(name, "a stage's number that is NaN or infinite", "finite numbers")


def _check_predicted(sidecar: Sidecar, metadata: GuardMetadata, name: str) -> None:
    classes = len(metadata.classes)
    low, high = (0, classes - 1) if classes else (-1, -1)
    if not ((sidecar.predicted >= low) & (sidecar.predicted <= high)).all():
        raise _unfit(name, "predictions of another model", f"{low} to {high}")


def _check_size(content: bytes, name: str) -> None:
    if len(content) > MAX_SIDECAR:
        raise ModelError(
            name, got=f"more than {MAX_SIDECAR} bytes", expected="at most that many", do="put fewer inputs into it"
        )


def _unfit(name: str, got: str, expected: str) -> ModelError:
    return ModelError(name, got=got, expected=expected, do="convert or calibrate the model again")
