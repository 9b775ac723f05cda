"""A guarded model on a runtime: one input in, the model's own outputs, its features and a verdict out.

Rules enforced here:

* an input of another shape or type, or with NaN, is refused before it reaches the model;
* the file must have the two guard outputs, of the lengths that its metadata says; otherwise it is not run;
* activations out of all bounds, and a score that is NaN, are "not checked", never
  "clean"; so is every input of a model calibrated on made-up data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from edgeguard.contract.guard import FEATURES, SCORES, GuardMetadata
from edgeguard.detection import metadata as metadata_reader
from edgeguard.detection.runtime import RuntimeInfo, open_interpreter
from edgeguard.detection.verdict import Verdict, judge, not_checked
from edgeguard.errors import ModelError

Array = npt.NDArray[Any]

GUARD_OUTPUTS = (SCORES, FEATURES)
"""Names of the last two outputs of a guarded model."""

MAX_SQUARE = 1e30
"""Features of a larger sum of squares have scores that float32 cannot hold: infinite less infinite, or nothing."""


class Inference(msgspec.Struct, frozen=True):
    """The outcome for one input. ``outputs`` are the model's own, dequantised, without the batch axis."""

    outputs: tuple[Array, ...]
    features: npt.NDArray[np.float32]
    verdict: Verdict


class Measured(NamedTuple):
    """What the graph made of one input, before anything is concluded from it.

    ``scores`` by detector, each over its threshold. ``doubt``: why they do not speak about the input, else empty.
    """

    outputs: tuple[Array, ...]
    features: npt.NDArray[np.float32]
    predicted: int | None
    scores: dict[str, float]
    doubt: str


class TfliteModel:
    """Any single-input TFLite model with a batch of one: quantises the input, runs, and reads raw outputs."""

    def __init__(self, content: bytes, *, threads: int = 1, runtime: str | None = None) -> None:
        """Raises ModelError where the runtime refuses the file or it has several inputs."""
        self._interpreter, self.runtime = open_interpreter(content, threads=threads, name=runtime)
        inputs = self._interpreter.get_input_details()
        if len(inputs) != 1:
            raise ModelError("model file", got=f"{len(inputs)} inputs", expected="one input")
        self._input = inputs[0]
        self.outputs: list[dict[str, Any]] = self._interpreter.get_output_details()
        self._indices = tuple(int(output["index"]) for output in self.outputs)
        self.input_shape = tuple(int(n) for n in self._input["shape"][1:])
        self.input_dtype: np.dtype[Any] = np.dtype(self._input["dtype"])
        scale, zero_point = self._input["quantization"]
        self.input_quantization = (float(scale), int(zero_point))
        """Scale and zero point of the input; a scale of 0 where it is not quantised."""
        self._steps: bytes | None = None
        if self.input_dtype.itemsize == 1:
            pixels = np.arange(256, dtype=np.uint8)
            self._steps = self._quantised(pixels).tobytes()

    def quantise(self, x: Array) -> Array:
        """One input (no batch axis) as the input tensor takes it, with a batch axis of one."""
        if self._steps is not None and x.dtype == np.uint8:
            # A table lookup over bytes: a tenth of the arithmetic's time, and the same numbers.
            return np.frombuffer(x.tobytes().translate(self._steps), self.input_dtype).reshape(1, *x.shape)
        return self._quantised(x[np.newaxis])

    def _quantised(self, x: Array) -> Array:
        if not np.issubdtype(self.input_dtype, np.integer):
            return x.astype(self.input_dtype)
        scale, zero_point = self.input_quantization
        limits = np.iinfo(self.input_dtype)
        if not scale:
            return np.clip(np.round(x), limits.min, limits.max).astype(self.input_dtype)
        steps = np.round(x.astype(np.float32) / np.float32(scale)) + zero_point
        return np.clip(steps, limits.min, limits.max).astype(self.input_dtype)

    def invoke(self, tensor: Array) -> list[Array]:
        """Run on an input tensor as :meth:`quantise` makes it; the raw output tensors, with their batch axis."""
        try:
            self._interpreter.set_tensor(self._input["index"], tensor)
            self._interpreter.invoke()
        except (ValueError, RuntimeError) as error:
            raise ModelError("model file", got=f"refused to run: {str(error)[:200]}", do="convert it again") from error
        read = self._interpreter.get_tensor
        return [read(index) for index in self._indices]

    def predict(self, x: Array, output: int = 0) -> Array:
        """One dequantised output for a batch of inputs [N, ...], run one by one."""
        return np.stack([dequantise(self.invoke(self.quantise(one))[output][0], self.outputs[output]) for one in x])


def _numbers_of(detail: dict[str, Any]) -> npt.NDArray[np.float32] | None:
    """What each byte of a quantised output means, float32 ``[256]``; None for an output that is not made of such bytes.

    A table lookup takes a fraction of the arithmetic's time and gives the same numbers.
    """
    dtype = np.dtype(detail["dtype"])
    if dtype not in (np.int8, np.uint8) or not detail["quantization"][0]:
        return None
    return dequantise(np.arange(256, dtype=np.uint8).view(dtype), detail)


def dequantise(raw: Array, detail: dict[str, Any]) -> Array:
    """An output tensor in real numbers, float32; float tensors come back as they are."""
    scale, zero_point = detail["quantization"]
    if raw.dtype.kind not in "iu" or not scale:
        return raw
    return np.asarray((raw.astype(np.float32) - zero_point) * np.float32(scale))


class GuardedModel:
    """A guarded ``.tflite`` that is ready to run. Make one with :meth:`load`."""

    def __init__(self, content: bytes, model: TfliteModel, description: GuardMetadata) -> None:
        self.metadata = description
        self.file_digest = hashlib.sha256(content).hexdigest()
        self._model = model
        self._layout = layout_of(model.outputs, description)
        self._own = tuple((i, model.outputs[i], _numbers_of(model.outputs[i])) for i in self._layout.own)
        self._dtype = np.dtype(description.input.dtype)
        self._floating = np.issubdtype(self._dtype, np.floating)
        self._detectors = tuple(detector.name for detector in description.detectors)

    @classmethod
    def load(cls, content: bytes, *, threads: int = 1, runtime: str | None = None) -> GuardedModel:
        """Open a guarded file.

        Raises:
            ModelError: not a TFLite file, without a guard, refused by the runtime, or at odds with its metadata.
            ConfigError: there is no TFLite runtime.
        """
        description = metadata_reader.read(content)
        return cls(content, TfliteModel(content, threads=threads, runtime=runtime), description)

    @property
    def runtime(self) -> RuntimeInfo:
        """The runtime that runs it."""
        return self._model.runtime

    def interface(self) -> tuple[object, ...]:
        """What a program relies on: shape and type of the input and of the model's own outputs."""
        own = tuple(
            (
                tuple(int(n) for n in self._model.outputs[i]["shape"]),
                np.dtype(self._model.outputs[i]["dtype"]).name,
            )
            for i in self._layout.own
        )
        return (self._model.input_shape, self.metadata.input.dtype, own)

    def check(self, x: Array) -> None:
        """Raise ModelError unless ``x`` is one input of the shape and type that the metadata says, and finite."""
        expected = self.metadata.input
        if tuple(x.shape) != expected.shape or x.dtype != self._dtype:
            raise ModelError(
                "model input",
                got=f"{x.dtype}{list(x.shape)}",
                expected=f"{expected.dtype}{list(expected.shape)}",
                do="bring the data to the shape and type that the model was converted with",
            )
        if self._floating and not np.isfinite(x).all():
            raise ModelError("model input", got="NaN or infinite values", expected="finite numbers")

    def infer(self, x: Array) -> Inference:
        """Run one input (no batch axis, the owner's own type, e.g. uint8 pixels) through model and guard.

        Raises:
            ModelError: the input does not fit.
        """
        found = self.measure(x)
        verdict = _concluded(self.metadata, found.predicted, found.scores, found.doubt)
        return Inference(found.outputs, found.features, verdict)

    def measure(self, x: Array) -> Measured:
        """The same without a verdict, for who draws one from more than this.

        Raises:
            ModelError: the input does not fit.
        """
        self.check(x)
        raw = self._model.invoke(self._model.quantise(x))
        layout = self._layout
        outputs = tuple(
            [
                dequantise(raw[i][0], detail) if numbers is None else numbers.take(raw[i][0].view(np.uint8))
                for i, detail, numbers in self._own
            ]
        )
        predicted = None if layout.classes is None else int(raw[layout.classes].argmax())
        features = raw[layout.features][0]
        scores = dict(zip(self._detectors, raw[layout.scores].ravel().tolist(), strict=True))
        return Measured(outputs, features, predicted, scores, _doubt(self.metadata, features))


def verdict_of(
    description: GuardMetadata, predicted: int | None, scores: Array, features: Array, doubt: str | None = None
) -> Verdict:
    """The verdict on one input, from what the graph made of it.

    Args:
        description: of the guard that scored it.
        predicted: class index, or None for a model without classes.
        scores: ``edgeguard_scores`` [detectors].
        features: ``edgeguard_features`` [D].
        doubt: why these do not speak about the input, where that is known.
    """
    named = dict(zip((detector.name for detector in description.detectors), scores.tolist(), strict=True))
    return _concluded(description, predicted, named, doubt or _doubt(description, features))


def _doubt(description: GuardMetadata, features: Array) -> str:
    if description.calibration.synthetic:
        return "calibrated on synthetic inputs, so that scores mean nothing"
    if not float(features.dot(features)) < MAX_SQUARE:
        return "activations too large to be scored"
    return ""


def _concluded(description: GuardMetadata, predicted: int | None, scores: dict[str, float], doubt: str) -> Verdict:
    return not_checked(predicted, scores, doubt) if doubt else judge(predicted, scores, description.score_to_p)


@dataclass(frozen=True, slots=True)
class Layout:
    """Positions among the outputs of a guarded model: its own, the one with the classes if any, and the guard's."""

    own: tuple[int, ...]
    classes: int | None
    scores: int
    features: int


def layout_of(outputs: Sequence[dict[str, Any]], description: GuardMetadata) -> Layout:
    """Which output is what. The guard's follow the model's own, scores first.

    Args:
        outputs: the runtime's details of them, for a batch of one.
        description: the guard's metadata.

    Raises:
        ModelError: they do not fit the metadata.
    """
    own = tuple(range(len(outputs) - 2))
    shapes = [tuple(int(n) for n in output["shape"]) for output in outputs]
    guard_shapes = [(1, len(description.detectors)), (1, description.feature_count)]
    if not own or shapes[-2:] != guard_shapes or tuple(o["name"] for o in outputs[-2:]) != GUARD_OUTPUTS:
        raise ModelError(
            "model file",
            got="guard outputs that do not fit its guard metadata",
            expected=f"scores {list(guard_shapes[0])} and features {list(guard_shapes[1])} as the last two outputs",
            do="convert the model again",
        )
    index, classes = description.class_output, len(description.classes)
    if index is not None and (index not in own or shapes[index] != (1, classes)):
        raise ModelError(
            "guard metadata",
            got=f"class output {index} of shape {list(shapes[index]) if index in own else []}",
            expected=f"[1, {classes}], one score per class",
            do="convert the model again",
        )
    return Layout(own, index, len(own), len(own) + 1)
