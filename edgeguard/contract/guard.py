"""What a guarded file says of itself: the JSON in the flatbuffer's metadata table under the name ``edgeguard``.

The metadata holds no wall-clock time: the same model, data and environment give the same bytes.

``model_digest``  SHA-256 of the canonical file without guard ops, guard constants and guard metadata: what evidence,
                  cases and releases are keyed by.
``guard_digest``  SHA-256 of those. Re-calibrating changes only this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from edgeguard.contract.messages import MAX_FEATURES, MAX_LABELS, Digest, Text
from edgeguard.errors import ModelError

METADATA_NAME = "edgeguard"
SCORES = "edgeguard_scores"
FEATURES = "edgeguard_features"
PREFIX = "edgeguard_"
"""Every tensor of the guard carries this prefix; no other tensor may."""
SCHEMA: Literal[1] = 1

Positive = Annotated[float, Meta(gt=0)]


class Detector(msgspec.Struct, frozen=True, kw_only=True):
    """One column of ``edgeguard_scores``: its name and the raw score at which the joint decision flags."""

    name: Text
    threshold: Positive


class Tap(msgspec.Struct, frozen=True, kw_only=True):
    """One block of ``edgeguard_features``: ``channels`` numbers from ``offset`` on, of one activation of the model.

    ``linf`` and ``l1`` are norms of its channels over space; ``logit`` are the classes' scores before the softmax, as
    they are.

    ``source_layer`` is the layer of the trainable model that makes the activation, where it is known: the link from a
    device's channel evidence to the model that is repaired.
    """

    tensor: Text
    source_layer: Text
    kind: Literal["linf", "l1", "logit"]
    offset: Annotated[int, Meta(ge=0, le=MAX_FEATURES)]
    channels: Annotated[int, Meta(ge=1, le=MAX_FEATURES)]

    @property
    def columns(self) -> range:
        """Which features these are."""
        return range(self.offset, self.offset + self.channels)


def logit_columns(taps: Iterable[Tap]) -> tuple[int, ...]:
    """Which features are the classes' logits; none for a model without."""
    return tuple(column for tap in taps if tap.kind == "logit" for column in tap.columns)


class ModelInput(msgspec.Struct, frozen=True, kw_only=True):
    """What the model takes: shape without the batch axis, the owner's own type and value range before quantising."""

    shape: tuple[Annotated[int, Meta(ge=1)], ...]
    dtype: Literal["uint8", "int8", "int16", "float32"]
    range: tuple[float, float]


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How many clean inputs fitted the statistics and how many others set the thresholds; digest over both.

    ``synthetic``: they were made up, so that the scores mean nothing and every input is "not checked".
    """

    n_fit: int
    n_threshold: int
    digest: Digest
    synthetic: bool = False


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Where the statistics were measured: int8 kernels differ by a few steps between runtimes."""

    runtime: Text
    version: Text
    threads: int
    cpu: Text


class GuardMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """The guard's own description. ``fpr_upper[c]`` bounds the false-positive rate of predicted class c at 95%.

    ``score_to_p`` lists pairs (joint score, share of clean threshold inputs at or above it), ascending in score.
    ``class_output`` is the index of the output whose argmax is the predicted class; None for a model without classes.
    """

    schema: Literal[1] = SCHEMA
    model_digest: Digest
    guard_digest: Digest
    detectors: Annotated[tuple[Detector, ...], Meta(min_length=1, max_length=64)]
    taps: Annotated[tuple[Tap, ...], Meta(min_length=1, max_length=64)]
    class_output: int | None
    classes: tuple[Text, ...]
    """Names, one per class; empty for a model without classes."""
    input: ModelInput
    fpr: Annotated[float, Meta(gt=0, lt=1)]
    fpr_upper: tuple[float, ...]
    score_to_p: tuple[tuple[float, float], ...]
    calibration: Calibration
    environment: Environment
    sidecar_digest: Digest | None = None

    @property
    def feature_count(self) -> int:
        """D, the length of ``edgeguard_features``."""
        return max(tap.offset + tap.channels for tap in self.taps)


def encode_metadata(metadata: GuardMetadata) -> bytes:
    """The metadata as the JSON that stands in the file."""
    return msgspec.json.encode(metadata)


def decode_metadata(content: bytes) -> GuardMetadata:
    """Decode and check guard metadata.

    Raises:
        ModelError: not JSON, another schema, a missing field, a wrong type, a value out of range, or parts that do not
            fit each other.
    """
    try:
        metadata = msgspec.json.decode(content, type=GuardMetadata)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ModelError(
            "guard metadata", got=str(error)[:300], expected=f"schema {SCHEMA}", do="convert the model again"
        ) from error
    check_metadata(metadata)
    return metadata


def check_metadata(metadata: GuardMetadata) -> None:
    """Raise ModelError unless the parts of the metadata fit each other and what may go on the wire."""
    names = [detector.name for detector in metadata.detectors]
    end = 0
    for tap in metadata.taps:
        if tap.offset != end:
            raise _unfit(f"a tap at offset {tap.offset}", f"{end}, where the one before it ends")
        end += tap.channels
    if len(set(names)) != len(names):
        raise _unfit(f"detectors {', '.join(names)}", "a name of its own for each")
    if end > MAX_FEATURES:
        raise _unfit(f"{end} features", f"at most {MAX_FEATURES}; choose fewer taps (--taps)")
    if len(metadata.classes) > MAX_LABELS:
        raise _unfit(f"{len(metadata.classes)} classes", f"at most {MAX_LABELS}")
    if (metadata.class_output is None) != (not metadata.classes):
        raise _unfit(f"{len(metadata.classes)} classes and class output {metadata.class_output}", "both or neither")
    if len(metadata.fpr_upper) != max(1, len(metadata.classes)):
        raise _unfit(f"{len(metadata.fpr_upper)} false-positive bounds", "one per class")
    if list(metadata.score_to_p) != sorted(metadata.score_to_p, key=lambda pair: pair[0]):
        raise _unfit("a table of p-values out of order", "ascending scores")


def _unfit(got: str, expected: str) -> ModelError:
    return ModelError("guard metadata", got=got, expected=expected, do="convert the model again")
